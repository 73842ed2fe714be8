"""The public functions, and the operators' derivatives.

For a fixed plan, dispatch (`D`) and combine (`D^T`) are linear and transposes of each other. The backward of each
is the other, per payload, which also covers double backward. In forward mode the tangent of a linear map is the map
applied to the tangent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from . import _C, meta  # type: ignore[attr-defined]
from .checks import check_int, check_str, check_tensors, check_type, first_in_dynamo, refuse
from .comm import Communicator, Group, communicators, resolve
from .derivatives import is_floating, register_derivatives
from .peer_errors import reports_to_peers
from .plan import Layout, Plan

__all__ = ["combine", "dispatch", "plan"]


@reports_to_peers("ep::plan", 2, "group")
def plan(
    topk_idx: Tensor,
    num_experts: int,
    group: Group = None,
    *,
    layout: Layout = "expert_major",
    capacity: int | None = None,
    alignment: int = 1,
    after: Tensor | None = None,
) -> Plan:
    """Decides which rows every rank sends to every other. Collective; moves indices, no payload.

    Rank `r` of `W` holds experts `[r * num_experts // W, (r + 1) * num_experts // W)`.

    Args:
        topk_idx: [num_tokens, num_topk] int32 or int64, contiguous: the experts of each token, all different, -1 for
            none; num_topk up to 65535. Ranks may hold different numbers of tokens, zero included.
        num_experts: experts over all ranks, a multiple of the world size, at most 2**24.
        group: a ProcessGroup, a one-dimensional DeviceMesh, a group's name, or None for the default group; or the
            two-dimensional DeviceMesh of a grid of nodes. With no process group, or one rank, nothing is communicated.
        layout: "rank_major": one row per (token, rank), ordered by source rank, then token. "expert_major": one row
            per (token, local expert), grouped by expert, inside a group by source rank, then token. On a grid of nodes
            the order of sources is (position in the node, node).
        capacity: rows of the result, at most 2**31 - 1, so that the graph's shapes are static. Overflow
            rows, the last in the order of the layout, are dropped and counted in `num_dropped`. None: all received
            rows.
        alignment: expert_major only: every expert's group is padded with zero rows to a multiple of this, at most 2**30
            over the number of local experts.
        after: any tensor that must exist before this exchange starts. Only the order matters, not the values.

    Raises:
        ValueError, TypeError: bad arguments; the message names the argument, what was expected and what came. Where it
            is bad on one rank alone, that one raises when all have come to the call, and the others a
            `torch.distributed.DistError` that names it. On backend nvlink this holds for what only the device can
            see; else the rank raises at once, and the others after the timeout.
        RuntimeError: `init` was not called for the group.
        torch.distributed.DistError: ranks issued different operators, disagree on sizes or dtypes, or timed
            out.
    """
    group_name, world_size = resolve(group)
    communicator = communicators.get(group_name)
    if communicator is not None and communicator.rail is not None:
        sizes = _check_plan_arguments(topk_idx, num_experts, layout, capacity, alignment, after)
        return _plan_on_grid(communicator, topk_idx, layout, *sizes, after)
    max_tokens = None if communicator is None else communicator.max_tokens_per_rank
    group_args = (world_size, group_name, max_tokens, after)
    if not torch.compiler.is_compiling():
        planned = _C.plan(Plan, topk_idx, num_experts, layout, alignment, capacity, *group_args)
        if planned is not None:
            return planned
    sizes = _check_plan_arguments(topk_idx, num_experts, layout, capacity, alignment, after)
    num_experts, capacity, alignment = sizes
    if capacity is None:
        fields = torch.ops.ep.plan(topk_idx, num_experts, layout, alignment, *group_args)
    else:
        fields = torch.ops.ep.plan.capacity(topk_idx, num_experts, layout, alignment, capacity, *group_args)
    send_row, send_counts, recv_counts, recv_map, offsets, tokens_per_expert, num_dropped = fields
    recv_topk_idx, recv_pair = (recv_map, None) if layout == "rank_major" else (None, recv_map)
    return Plan(
        send_row,
        send_counts,
        recv_counts,
        recv_topk_idx,
        recv_pair,
        offsets,
        tokens_per_expert,
        num_dropped,
        layout,
        group_name,
    )


def _check_plan_arguments(
    topk_idx: Any, num_experts: Any, layout: Any, capacity: Any, alignment: Any, after: Any
) -> tuple[int, int | None, int]:
    """num_experts, capacity, alignment as ints."""
    op = "ep::plan"
    check_tensors(op, {"topk_idx": topk_idx}, {"after": after})
    check_str(op, "layout", layout, "'rank_major' or 'expert_major'")
    return (
        check_int(op, "num_experts", num_experts),
        None if capacity is None else check_int(op, "capacity", capacity),
        check_int(op, "alignment", alignment),
    )


def _plan_args(op: str, plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor, str, str]:
    """The fields of a plan that dispatch and combine take, checked."""
    check_type(op, "plan", plan, Plan, "a torch_ep.Plan")
    check_str(op, "plan.layout", plan.layout, "'rank_major' or 'expert_major'")
    check_str(op, "plan.group_name", plan.group_name, "to be a str")
    is_rank_major = plan.layout == "rank_major"
    recv_map: Any = plan.recv_topk_idx if is_rank_major else plan.recv_pair
    fields = {
        "plan.send_row": plan.send_row,
        "plan.send_counts": plan.send_counts,
        "plan.recv_counts": plan.recv_counts,
        "plan.recv_topk_idx" if is_rank_major else "plan.recv_pair": recv_map,
    }
    check_tensors(op, fields)
    return plan.send_row, plan.send_counts, plan.recv_counts, recv_map, plan.layout, plan.group_name


def _operator_args(op: str, plan: Plan) -> tuple:
    """The fields of a plan as the operator for it takes them, on one level or on two, checked."""
    args = _plan_args(op, plan)
    if plan.rail is None:
        return args
    check_type(op, "plan.rail", plan.rail, Plan, "a torch_ep.Plan or None")
    *rail, _, rail_name = _plan_args(op, plan.rail)
    *node, layout, group_name = args
    if rail_name == group_name:
        refuse(ValueError, f"{op}: expected plan.rail of another group than the plan's, got group '{group_name}' twice")
    return *rail, *node, layout, rail_name, group_name


def _check_dispatch_arguments(x: Any, plan: Any, topk_weights: Any, scales: Any, after: Any) -> tuple:
    """The arguments of ep::dispatch."""
    op = "ep::dispatch"
    check_tensors(op, {"x": x}, {"topk_weights": topk_weights, "scales": scales, "after": after})
    return x, topk_weights, scales, *_operator_args(op, plan), after


def _check_combine_arguments(y: Any, plan: Any, row_weights: Any, topk_weights: Any, after: Any) -> tuple:
    """The arguments of ep::combine.weighted with `row_weights`, else of ep::combine."""
    op = "ep::combine"
    check_tensors(op, {"y": y}, {"row_weights": row_weights, "topk_weights": topk_weights, "after": after})
    if row_weights is None:
        return y, topk_weights, None, *_operator_args(op, plan), after
    if topk_weights is not None:
        refuse(ValueError, f"{op}: expected row_weights or topk_weights, got both")
    return y, row_weights, *_operator_args(op, plan), after


@overload
def dispatch(x: Tensor, plan: Plan, *, after: Tensor | None = None) -> Tensor: ...
@overload
def dispatch(x: Tensor, plan: Plan, *, topk_weights: Tensor, after: Tensor | None = None) -> tuple[Tensor, Tensor]: ...
@overload
def dispatch(x: Tensor, plan: Plan, *, scales: Tensor, after: Tensor | None = None) -> tuple[Tensor, Tensor]: ...
@overload
def dispatch(
    x: Tensor,
    plan: Plan,
    *,
    topk_weights: Tensor,
    scales: Tensor,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...
@reports_to_peers("ep::dispatch", 1, "plan")
def dispatch(
    x: Tensor,
    plan: Plan,
    *,
    topk_weights: Tensor | None = None,
    scales: Tensor | None = None,
    after: Tensor | None = None,
) -> Any:
    """Copies each token's row to the ranks that hold its experts. Collective; differentiable; its transpose: `combine`.

    One row crosses the link per (token, rank), whatever the layout. Rows of padding are zero. Weights travel beside the
    rows and do not change them: `combine(row_weights=)` applies them.

    Args:
        x: [num_tokens, hidden], contiguous; float64, float32, bfloat16, float16, float8_e4m3fn, float8_e5m2, or uint8,
            as which numbers of four bits travel, two in a byte.
        plan: the plan of these tokens.
        topk_weights: [num_tokens, num_topk] floating: weights that travel with the rows. Differentiable.
        scales: [num_tokens, n] of any dtype: numbers that travel with each row, such as the scales of an fp8 row.
            Differentiable where floating.
        after: any tensor that must exist before this exchange starts.

    Returns:
        The received rows [plan.num_rows, hidden]; then, in a tuple and only if asked for, the received weights
        (rank_major: [plan.num_rows, num_topk], 0 where `recv_topk_idx` is -1; expert_major: [plan.num_rows], 0 for
        padding) and the received scales [plan.num_rows, n].

    Raises:
        ValueError, TypeError, RuntimeError, torch.distributed.DistError: as `plan`.
    """
    if not torch.compiler.is_compiling():
        got = _C.dispatch(x, Plan, plan, topk_weights, scales, after)
        if got is not None:
            return got
    arguments = _check_dispatch_arguments(x, plan, topk_weights, scales, after)
    op = torch.ops.ep.dispatch if plan.rail is None else torch.ops.ep.dispatch.grid
    rows, weights, row_scales = op(*arguments)
    results = (rows, *(t for t in (weights, row_scales) if t is not None))
    return results if len(results) > 1 else rows


@overload
def combine(y: Tensor, plan: Plan, *, row_weights: Tensor | None = None, after: Tensor | None = None) -> Tensor: ...
@overload
def combine(y: Tensor, plan: Plan, *, topk_weights: Tensor, after: Tensor | None = None) -> tuple[Tensor, Tensor]: ...
@reports_to_peers("ep::combine", 1, "plan")
def combine(
    y: Tensor,
    plan: Plan,
    *,
    row_weights: Tensor | None = None,
    topk_weights: Tensor | None = None,
    after: Tensor | None = None,
) -> Any:
    """Brings rows back and sums those of each token. Collective; differentiable; its transpose: `dispatch`.

    Only `row_weights` weigh rows. Without them rows are summed as they are, also where dispatch brought weights: right
    if the experts have multiplied their rows by these, else an unweighted sum.

    Rows of one rank are summed there before they are sent. Sums accumulate in float32 (float64 for float64) in the
    order of the token's slots and are rounded to y's dtype on the wire and at the end; bitwise the same on every run.

    Args:
        y: [plan.num_rows, hidden], contiguous; float64, float32, bfloat16 or float16. Rows of padding are not read.
        plan: the plan of the dispatch.
        row_weights: [plan.num_rows] floating: each row is multiplied by its weight while it is summed. Differentiable,
            with no further exchange. Pass the received weights of an expert_major dispatch.
        topk_weights: numbers that travel back beside the rows, in the shape in which `dispatch` returns them.
        after: any tensor that must exist before this exchange starts.

    Returns:
        The sums [num_tokens, hidden], zero for a token without experts; with `topk_weights` a tuple with these numbers,
        [num_tokens, num_topk], 0 where `topk_idx` is -1.

    Raises:
        ValueError, TypeError, RuntimeError, torch.distributed.DistError: as `plan`; ValueError too if both
        `row_weights` and `topk_weights` are given.
    """
    if not torch.compiler.is_compiling():
        if row_weights is None:
            got = _C.combine(y, Plan, plan, topk_weights, None, after)
        else:
            got = None if topk_weights is not None else _C.combine_weighted(y, Plan, plan, row_weights, after)
        if got is not None:
            return got
    arguments = _check_combine_arguments(y, plan, row_weights, topk_weights, after)
    if row_weights is not None:
        weighted = torch.ops.ep.combine.weighted if plan.rail is None else torch.ops.ep.combine.grid_weighted
        return weighted(*arguments)
    op = torch.ops.ep.combine if plan.rail is None else torch.ops.ep.combine.grid
    tokens, weights, _ = op(*arguments)
    return tokens if weights is None else (tokens, weights)


# Note [Grids of nodes]
# With experts numbered rank after rank, the exchange on a grid is a product of two: D = D_node * D_rail, where D_rail
# brings a row to each node that has an expert of its token, and D_node brings it to those experts. `plan` calls itself
# twice. dispatch and combine are an operator each, so that the two levels can overlap; their fakes are compositions of
# those of one level, and each is the other's derivative as before.


def _plan_on_grid(
    communicator: Communicator,
    topk_idx: Tensor,
    layout: Layout,
    num_experts: int,
    capacity: int | None,
    alignment: int,
    after: Tensor | None,
) -> Plan:
    rail, node = communicator.rail, communicator.node
    assert rail is not None and node is not None
    try:  # all of them before the first exchange, which takes a part
        meta.check_plan_options(num_experts, layout, alignment, capacity, communicator.world_size)
    except (TypeError, ValueError) as error:
        raise first_in_dynamo(error) from None
    relay_rows = None
    if capacity is not None:
        relay_rows = communicator.max_relay_rows
        if relay_rows is None:
            refuse(
                ValueError,
                "ep::plan: expected torch_ep.init with max_relay_rows or max_tokens_per_rank for a plan with a "
                "capacity on a grid of nodes, got neither",
            )
    rail_plan = plan(topk_idx, num_experts, rail.group_name, layout="rank_major", capacity=relay_rows, after=after)
    assert rail_plan.recv_topk_idx is not None
    num_local_experts = num_experts // rail.world_size
    node_plan = plan(
        rail_plan.recv_topk_idx,
        num_local_experts,
        node.group_name,
        layout=layout,
        capacity=capacity,
        alignment=alignment,
    )
    return node_plan._replace(num_dropped=node_plan.num_dropped + rail_plan.num_dropped, rail=rail_plan)


# Derivatives. Every formula sends all payloads in one exchange, whichever gradients are wanted and tangents given, so
# that ranks cannot come to differ in what they exchange.


# Of rows whose gradients are computed in place: on a CPU they stay in its cache, elsewhere they outlast the launches.
_CPU_BLOCK_BYTES, _DEVICE_BLOCK_BYTES = 2**18, 2**23


def _contiguous(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.contiguous()  # a sum's gradient arrives with strides of zero


def _save_after(ctx: Any, after: Tensor | None) -> None:
    ctx.after_shape = ctx.after_dtype = None
    if after is not None and after.requires_grad:
        ctx.after_shape, ctx.after_dtype = after.shape, after.dtype


def _grad_after(ctx: Any, exchanged: Tensor) -> Tensor | None:
    """Zeros that depend on this backward's exchange, so that what came before in forward comes after it in backward."""
    if ctx.after_shape is None:
        return None
    return torch.ops.ep.zero_after(exchanged).to(ctx.after_dtype).expand(ctx.after_shape)


def _names_of(plan: Sequence[Any]) -> list[str]:
    """The layout and the names of groups among the arguments that are a plan."""
    return [a for a in plan if isinstance(a, str)]


def _save_plan(ctx: Any, plan: Sequence[Any], *others: Tensor) -> None:
    """Saves the arguments that are a plan, on one level or on two: tensors, then a layout and names of groups."""
    ctx.save_for_backward(*others, *(a for a in plan if isinstance(a, Tensor)))
    ctx.names = _names_of(plan)


def _dispatch_op(names: Sequence[str]) -> Any:
    """The dispatch for a plan on one level, or on two."""
    return torch.ops.ep.dispatch.default if len(names) == 2 else torch.ops.ep.dispatch.grid


def _combine_op(names: Sequence[str]) -> Any:
    return torch.ops.ep.combine.default if len(names) == 2 else torch.ops.ep.combine.grid


def _dispatch_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, _, scales, *plan, after = inputs
    _save_plan(ctx, plan)
    ctx.x_floating, ctx.scales_floating = is_floating(x), is_floating(scales)
    ctx.mark_non_differentiable(*(t for t in output if t is not None and not is_floating(t)))
    _save_after(ctx, after)


def _dispatch_backward(ctx: Any, grad_x: Tensor, grad_weights: Tensor | None, grad_scales: Tensor | None) -> tuple:
    plan = (*ctx.saved_tensors, *ctx.names)  # once: activation checkpointing unpacks a tensor a single time
    if not ctx.x_floating:
        grad_x = _without_columns(plan[-1 - len(ctx.names)])  # of as many rows as recv_map
    x, weights, scales = _combine_op(ctx.names)(
        _contiguous(grad_x),
        _contiguous(grad_weights),
        _contiguous(grad_scales) if ctx.scales_floating else None,
        *plan,
    )
    return x if ctx.x_floating else None, weights, scales, *[None] * len(plan), _grad_after(ctx, x)


def _without_columns(rows: Tensor) -> Tensor:
    """Rows of hidden size 0, in place of rows without a derivative: their weights and scales may have one."""
    return rows.new_empty((rows.shape[0], 0), dtype=torch.float32)


def _dispatch_jvp(tangents: Sequence[Tensor | None], x: Tensor, topk_weights: Any, scales: Any, *plan: Any) -> tuple:
    grad_x, *others = tangents
    op = _dispatch_op(_names_of(plan))
    rows, *others = op(_without_columns(x) if grad_x is None else grad_x, *others, *plan)
    return None if grad_x is None else rows, *others


def _combine_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, _, _, *plan, after = inputs
    _save_plan(ctx, plan)
    _save_after(ctx, after)


def _combine_backward(ctx: Any, grad_y: Tensor, grad_weights: Tensor | None, grad_scales: Tensor | None) -> tuple:
    plan = (*ctx.saved_tensors, *ctx.names)
    y, weights, scales = _dispatch_op(ctx.names)(
        _contiguous(grad_y), _contiguous(grad_weights), _contiguous(grad_scales), *plan
    )
    return y, weights, scales, *[None] * len(plan), _grad_after(ctx, y)


def _combine_jvp(tangents: Sequence[Tensor | None], y: Tensor, topk_weights: Any, scales: Any, *plan: Any) -> tuple:
    return _combine_op(_names_of(plan))(*tangents, *plan)


def _combine_weighted_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    y, row_weights, *plan, after = inputs
    _save_plan(ctx, plan, y, row_weights)
    _save_after(ctx, after)


def _is_filled(recv_map: Tensor, layout: str) -> Tensor:
    """[R] bool: rows that are not padding. Padding may hold NaN: select with it, never multiply by 0."""
    return recv_map >= 0 if layout == "expert_major" else (recv_map >= 0).any(1)


def _weigh_backward(rows: Tensor, y: Tensor, row_weights: Tensor, is_filled: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of y and of its row weights. `rows` is the gradient of the weighted rows."""
    accumulate = torch.promote_types(y.dtype, torch.float32)
    wide = rows.to(accumulate)
    grad_y = torch.where(is_filled[:, None], wide * row_weights[:, None].to(accumulate), 0).to(y.dtype)
    products = torch.where(is_filled[:, None], wide * y.to(accumulate), 0)
    return grad_y, products.sum(1).to(row_weights.dtype)


def _weigh_backward_in_blocks(rows: Tensor, y: Tensor, row_weights: Tensor, is_filled: Tensor) -> tuple[Tensor, Tensor]:
    """`_weigh_backward`, which may overwrite `rows`."""
    arguments = (rows, y, row_weights, is_filled)
    block_bytes = _CPU_BLOCK_BYTES if rows.is_cpu else _DEVICE_BLOCK_BYTES
    # A compiler fuses the formula, and a second derivative needs all of it. Else it goes by blocks, in place.
    if type(rows) is not Tensor or torch.is_grad_enabled() or rows.nbytes <= block_bytes:
        return _weigh_backward(*arguments)
    # No allocation outlives its block: a surviving one would fragment the heap and prevent its reuse.
    grad_y, grad_weights = rows, rows.new_empty(rows.shape[0], dtype=row_weights.dtype)
    num_blocks = min(rows.nbytes // block_bytes, max(1, rows.shape[0] // 2))
    blocks = [t.tensor_split(num_blocks) for t in (grad_y, grad_weights, *arguments)]
    for grad_y_block, grad_weights_block, *block in zip(*blocks, strict=True):
        for into, value in zip((grad_y_block, grad_weights_block), _weigh_backward(*block), strict=True):
            into.copy_(value)
    return grad_y, grad_weights


def _combine_weighted_backward(ctx: Any, grad: Tensor) -> tuple:
    y, row_weights, *tensors = ctx.saved_tensors
    rows, _, _ = _dispatch_op(ctx.names)(_contiguous(grad), None, None, *tensors, *ctx.names)
    grad_after = _grad_after(ctx, rows)
    grads = _weigh_backward_in_blocks(rows, y, row_weights, _is_filled(tensors[-1], ctx.names[0]))
    return *grads, *[None] * (len(tensors) + len(ctx.names)), grad_after


def _combine_weighted_jvp(tangents: Sequence[Tensor], y: Tensor, row_weights: Tensor, *plan: Any) -> Tensor:
    names = _names_of(plan)
    recv_map = [a for a in plan if isinstance(a, Tensor)][4 * (len(names) - 1) - 1]  # `after` may follow
    is_filled = _is_filled(recv_map, names[0])
    accumulate = torch.promote_types(y.dtype, torch.float32)
    y, grad_y = (torch.where(is_filled[:, None], t, 0).to(accumulate) for t in (y, tangents[0]))
    row_weights, grad_weights = (
        torch.where(is_filled, t, 0)[:, None].to(accumulate) for t in (row_weights, tangents[1])
    )
    rows = (grad_y * row_weights + y * grad_weights).to(tangents[0].dtype)
    return _combine_op(names)(rows, None, None, *plan)[0]


def _grouped_mm_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_mm_backward(ctx: Any, grad: Tensor) -> tuple:
    a, b, offsets = ctx.saved_tensors
    grad_a = torch.ops.ep.grouped_mm(grad, b.transpose(1, 2), offsets)
    if b.stride(1) == 1 and not b.is_contiguous():
        # The transpose of a parameter [groups, n, k]: its gradient has the parameter's layout, without a copy.
        grad_b = torch.ops.ep.grouped_mm.transpose(grad.contiguous(), a, offsets).transpose(1, 2)
    else:
        grad_b = torch.ops.ep.grouped_mm.transpose(a, grad, offsets)
    return grad_a, grad_b, None


def _grouped_mm_transpose_backward(ctx: Any, grad: Tensor) -> tuple:
    a, g, offsets = ctx.saved_tensors
    return (
        torch.ops.ep.grouped_mm(g, grad.transpose(1, 2), offsets),
        torch.ops.ep.grouped_mm(a, grad, offsets),
        None,
    )


def _bilinear_jvp(op: Any) -> Callable:
    def jvp(tangents: Sequence[Tensor], a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
        return op(tangents[0], b, offsets) + op(a, tangents[1], offsets)

    return jvp


for _name in ("dispatch", "dispatch.grid"):
    register_derivatives(_name, 3, backward=_dispatch_backward, setup_context=_dispatch_setup, jvp=_dispatch_jvp)
for _name in ("combine", "combine.grid"):
    register_derivatives(_name, 3, backward=_combine_backward, setup_context=_combine_setup, jvp=_combine_jvp)
for _name in ("combine.weighted", "combine.grid_weighted"):
    register_derivatives(
        _name,
        2,
        backward=_combine_weighted_backward,
        setup_context=_combine_weighted_setup,
        jvp=_combine_weighted_jvp,
    )
register_derivatives(
    "grouped_mm",
    2,
    backward=_grouped_mm_backward,
    setup_context=_grouped_mm_setup,
    jvp=_bilinear_jvp(torch.ops.ep.grouped_mm.default),
)
register_derivatives(
    "grouped_mm.transpose",
    2,
    backward=_grouped_mm_transpose_backward,
    setup_context=_grouped_mm_setup,
    jvp=_bilinear_jvp(torch.ops.ep.grouped_mm.transpose),
)
