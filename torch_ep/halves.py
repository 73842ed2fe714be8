"""dispatch and combine in two halves: what runs between them overlaps with the transfer.

    in_flight = dispatch_send(x, plan)
    ...                                   # work that does not need the rows
    rows = dispatch_recv(in_flight, plan)

The backward of each half is a half of the other operator: that of `dispatch_recv` sends a combine, that of
`dispatch_send` receives it. So the backward overlaps where the forward does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_int, check_tensors, check_type, refuse
from .derivatives import is_floating, register_derivatives
from .ops import (
    _check_combine_arguments,
    _check_dispatch_arguments,
    _contiguous,
    _grad_after,
    _is_filled,
    _plan_args,
    _save_after,
    _save_plan,
    _weigh_backward_in_blocks,
    _without_columns,
    combine,
    dispatch,
)
from .peer_errors import reports_to_peers
from .plan import Plan

__all__ = ["InFlightRows", "combine_recv", "combine_send", "dispatch_recv", "dispatch_send", "order_after"]


class InFlightRows(NamedTuple):
    """What a `_send` returns, for one `_recv`. On a grid of nodes, the exchange in flight is that of the rail."""

    #: [1] float64: the number of the exchange. Differentiable.
    ticket: Tensor
    #: "dispatch" or "combine".
    op: str
    #: Elements per row, and their dtype.
    hidden: int
    dtype: torch.dtype
    #: Of the payloads beside the rows; None where there are none.
    weights_dtype: torch.dtype | None
    scales_columns: int | None
    scales_dtype: torch.dtype | None


def _in_flight(op: str, ticket: Tensor, rows: Tensor, weights: Tensor | None, scales: Tensor | None) -> InFlightRows:
    return InFlightRows(ticket, op, *_payload_types(rows, weights, scales))


def _payload_types(rows: Tensor, weights: Tensor | None, scales: Tensor | None) -> tuple:
    """What a _recv operator needs to know of the payloads."""
    return (
        rows.shape[1],
        rows.dtype,
        None if weights is None else weights.dtype,
        None if scales is None else scales.shape[1],
        None if scales is None else scales.dtype,
    )


@reports_to_peers("ep::dispatch", 1, "plan")
def dispatch_send(
    x: Tensor,
    plan: Plan,
    *,
    topk_weights: Tensor | None = None,
    scales: Tensor | None = None,
    after: Tensor | None = None,
) -> InFlightRows:
    """The first half of `dispatch`. Collective; differentiable.

    When it returns it has read its arguments, in the order of the current stream. It waits until every rank has come
    to the call, but not for their rows. At most two dispatches and two combines of a group may be in flight. Every
    rank receives them in the order of their sends.

    On backend c10d rows of CPU tensors travel while other code runs. Backend nvlink and one rank alone transfer them
    in this half. On a grid of nodes, the rows between the nodes travel, and `dispatch_recv` exchanges them inside each
    node.

    Args: as `dispatch`.

    Returns:
        The exchange in flight, for one `dispatch_recv`.

    Raises:
        RuntimeError: a third dispatch would be in flight.
        ValueError, TypeError, RuntimeError, torch.distributed.DistError: as `dispatch`.
    """
    if _has_rail(plan):
        plan = plan.rail  # type: ignore[assignment]
    arguments = _check_dispatch_arguments(x, plan, topk_weights, scales, after)
    return _in_flight("dispatch", torch.ops.ep.dispatch_send(*arguments), x, topk_weights, scales)


def dispatch_recv(in_flight: InFlightRows, plan: Plan, *, after: Tensor | None = None) -> Any:
    """The second half of `dispatch`. Collective; differentiable.

    Args:
        in_flight: what `dispatch_send` returned, whose gradient belongs to this call alone.
        plan: the plan of the send.
        after: any tensor that must exist before this half waits, such as the result of the work that overlaps. Without
            it, a compiler may wait before that work.

    Returns:
        What `dispatch` returns.

    Raises:
        ValueError: the exchange was received already, was sent after another one that is still in flight, or was in
            flight when the group was reset.
        TypeError, RuntimeError, torch.distributed.DistError: as `dispatch`.
    """
    op = "ep::dispatch_recv"
    rail_plan = plan.rail if _has_rail(plan) else None
    arguments = _check_recv_arguments(op, in_flight, plan if rail_plan is None else rail_plan, after)
    rows, weights, scales = torch.ops.ep.dispatch_recv(*arguments)
    if rail_plan is not None:
        payloads = {"topk_weights": weights, "scales": scales}
        return dispatch(rows, plan._replace(rail=None), **payloads)  # type: ignore[call-overload]
    results = (rows, *(t for t in (weights, scales) if t is not None))
    return results if len(results) > 1 else rows


@reports_to_peers("ep::combine", 1, "plan")
def combine_send(
    y: Tensor,
    plan: Plan,
    *,
    row_weights: Tensor | None = None,
    topk_weights: Tensor | None = None,
    after: Tensor | None = None,
) -> InFlightRows:
    """The first half of `combine`. Collective; differentiable.

    As for `dispatch_send`, it has read its arguments when it returns, and waits until every rank has come to the call.
    On a grid of nodes it exchanges rows inside each node, and then rows between the nodes travel.

    Args: as `combine`.

    Returns:
        The exchange in flight, for one `combine_recv`.

    Raises:
        RuntimeError: a third combine would be in flight.
        ValueError, TypeError, RuntimeError, torch.distributed.DistError: as `combine`.
    """
    if _has_rail(plan):
        returned = combine(y, plan._replace(rail=None), row_weights=row_weights, topk_weights=topk_weights, after=after)  # type: ignore[call-overload]
        y, topk_weights = returned if isinstance(returned, tuple) else (returned, None)
        plan, row_weights, after = plan.rail, None, None  # type: ignore[assignment]
    arguments = _check_combine_arguments(y, plan, row_weights, topk_weights, after)
    send = torch.ops.ep.combine_send.default if row_weights is None else torch.ops.ep.combine_send.weighted
    return _in_flight("combine", send(*arguments), y, topk_weights, None)


def combine_recv(in_flight: InFlightRows, plan: Plan, *, after: Tensor | None = None) -> Any:
    """The second half of `combine`. Collective; differentiable.

    Args, Raises: as `dispatch_recv`.

    Returns:
        What `combine` returns.
    """
    of_send = plan.rail if _has_rail(plan) else plan
    arguments = _check_recv_arguments("ep::combine_recv", in_flight, of_send, after)
    tokens, weights, _ = torch.ops.ep.combine_recv(*arguments)
    return tokens if weights is None else (tokens, weights)


def order_after(x: Tensor, in_flight: Any) -> Tensor:
    """Returns x. A compiler computes what depends on the result only after the send of `in_flight`.

    Give an input of the work that is to overlap. Without it, a compiler may move the work before the send; together
    with `after=` of the `_recv`, work stays between the halves, in the backward too. It costs nothing where x comes
    from elementwise work, with which it is fused; else it copies x. Outside of `torch.compile` it returns x itself:
    there, code runs in its order.

    Args:
        x: any tensor.
        in_flight: what any `_send` returned, of the low-latency pair too.

    Raises:
        TypeError: `in_flight` is something else.
    """
    marker = getattr(in_flight, "ticket", getattr(in_flight, "status", None))
    if not isinstance(marker, Tensor):
        refuse(
            TypeError,
            f"torch_ep.order_after: expected what a send returned, got {type(in_flight).__name__}",
        )
    if not torch.compiler.is_compiling():
        return x
    # x - 0 is x for every value: -0 + 0 would be 0.
    return x - torch.ops.ep.zero_after(marker).to(x.device, x.dtype)


def _has_rail(plan: Any) -> bool:
    return isinstance(plan, Plan) and plan.rail is not None


def _check_recv_arguments(op: str, in_flight: Any, plan: Any, after: Any) -> tuple:
    """The arguments of ep::dispatch_recv or ep::combine_recv."""
    check_type(op, "in_flight", in_flight, InFlightRows, f"what torch_ep.{op[4:-5]}_send returned")
    if in_flight.op != op[4:-5]:
        refuse(ValueError, f"{op}: expected what torch_ep.{op[4:-5]}_send returned, got op {str(in_flight.op)[:20]!r}")
    check_tensors(op, {"in_flight.ticket": in_flight.ticket}, {"after": after})
    ticket, _, hidden, dtype, weights_dtype, scales_columns, scales_dtype = in_flight
    check_type(op, "in_flight.dtype", dtype, torch.dtype, "a torch.dtype")
    for name, value in (("weights_dtype", weights_dtype), ("scales_dtype", scales_dtype)):
        check_type(op, f"in_flight.{name}", value, (torch.dtype, type(None)), "a torch.dtype or None")
    types = (
        check_int(op, "in_flight.hidden", hidden),
        dtype,
        weights_dtype,
        None if scales_columns is None else check_int(op, "in_flight.scales_columns", scales_columns),
        scales_dtype,
    )
    return ticket, *_plan_args(op, plan), *types, after


# Derivatives. As for the whole operators, all payloads are sent whichever gradients are wanted.


def _differentiable_types(rows: Tensor, weights: Tensor | None, scales: Tensor | None) -> tuple:
    """The types of the payloads of the transposed exchange: rows and scales without derivatives stay out of it."""
    hidden, dtype, weights_dtype, columns, scales_dtype = _payload_types(rows, weights, scales)
    if not is_floating(rows):
        hidden, dtype = 0, torch.float32
    if not is_floating(scales):
        columns = scales_dtype = None
    return hidden, dtype, weights_dtype, columns, scales_dtype


def _send_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    rows, weights, scales, *plan, after = inputs
    _save_plan(ctx, plan)
    ctx.types, ctx.rows_floating = _differentiable_types(rows, weights, scales), is_floating(rows)
    _save_after(ctx, after)


def _recv_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, *plan = inputs[:7]
    _save_plan(ctx, plan)
    ctx.num_inputs = len(inputs)
    ctx.rows_floating, ctx.scales_floating = is_floating(output[0]), is_floating(output[2])
    ctx.mark_non_differentiable(*(t for t in output if t is not None and not is_floating(t)))
    _save_after(ctx, inputs[-1])


def _send_backward(recv: Callable) -> Callable:
    def backward(ctx: Any, grad_ticket: Tensor) -> tuple:
        plan = (*ctx.saved_tensors, *ctx.names)
        rows, weights, scales = recv(grad_ticket, *plan, *ctx.types)
        return rows if ctx.rows_floating else None, weights, scales, *[None] * len(plan), _grad_after(ctx, rows)

    return backward


def _recv_backward(send: Callable) -> Callable:
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor | None, grad_scales: Tensor | None) -> tuple:
        plan = (*ctx.saved_tensors, *ctx.names)
        others = [None] * (ctx.num_inputs - 2)
        if not ctx.needs_input_grad[0]:  # nobody would receive
            return None, *others, _grad_after(ctx, grad_rows)
        if not ctx.rows_floating:
            grad_rows = _without_columns(plan[3])  # of as many rows as recv_map
        grad_scales = _contiguous(grad_scales) if ctx.scales_floating else None
        ticket = send(_contiguous(grad_rows), _contiguous(grad_weights), grad_scales, *plan)
        return ticket, *others, _grad_after(ctx, ticket)

    return backward


def _send_weighted_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    y, row_weights, *plan, after = inputs
    _save_plan(ctx, plan, y, row_weights)
    ctx.types = _differentiable_types(y, None, None)
    _save_after(ctx, after)


def _send_weighted_backward(ctx: Any, grad_ticket: Tensor) -> tuple:
    y, row_weights, *tensors = ctx.saved_tensors
    rows, _, _ = torch.ops.ep.dispatch_recv(grad_ticket, *tensors, *ctx.names, *ctx.types)
    grad_after = _grad_after(ctx, rows)
    grads = _weigh_backward_in_blocks(rows, y, row_weights, _is_filled(tensors[-1], ctx.names[0]))
    return *grads, *[None] * (len(tensors) + len(ctx.names)), grad_after


def _refuse_tangents(name: str) -> Callable:
    def jvp(tangents: Sequence[Tensor | None], *arguments: Any) -> Any:
        whole = name.split("_")[0]
        raise TypeError(f"ep::{name}: expected no tangent (forward mode), got one: call torch_ep.{whole}")

    return jvp


for _name, _num_inputs, _backward, _setup in (
    ("dispatch_send", 3, _send_backward(torch.ops.ep.combine_recv), _send_setup),
    ("dispatch_recv", 1, _recv_backward(torch.ops.ep.combine_send.default), _recv_setup),
    ("combine_send", 3, _send_backward(torch.ops.ep.dispatch_recv), _send_setup),
    ("combine_send.weighted", 2, _send_weighted_backward, _send_weighted_setup),
    ("combine_recv", 1, _recv_backward(torch.ops.ep.dispatch_send), _recv_setup),
):
    register_derivatives(
        _name, _num_inputs, backward=_backward, setup_context=_setup, jvp=_refuse_tangents(_name.split(".")[0])
    )


def _zero_after_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.shape, ctx.dtype = inputs[0].shape, inputs[0].dtype


def _zero_after_backward(ctx: Any, grad: Tensor) -> Tensor:
    return torch.ops.ep.zero_after(grad).to(ctx.dtype).expand(ctx.shape)


def _zero_after_jvp(tangents: Sequence[Tensor | None], dep: Tensor) -> Tensor:
    return torch.ops.ep.zero_after(dep)


register_derivatives(
    "zero_after", 1, backward=_zero_after_backward, setup_context=_zero_after_setup, jvp=_zero_after_jvp
)
