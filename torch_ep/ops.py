"""The public functions, and the operators' autograd formulas.

For a fixed plan, dispatch (`D`) and combine (`D^T`) are linear and each the other's transpose, so each is the other's
backward, payload by payload, and a double backward needs nothing more.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from . import _C  # type: ignore[attr-defined]
from .comm import Group, communicators, resolve
from .plan import Layout, Plan, _recv_map

__all__ = ["combine", "dispatch", "plan"]


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
            none. Ranks may hold different numbers of tokens, zero included.
        num_experts: experts over all ranks, a multiple of the world size.
        group: a ProcessGroup, a one-dimensional DeviceMesh, a group's name, or None for the default group. With no
            process group, or one rank, nothing is communicated.
        layout: "rank_major": one row per (token, rank), ordered by source rank, then token. "expert_major": one row
            per (token, local expert), grouped by expert, inside a group by source rank, then token.
        capacity: rows of the result, fixed, so that the graph's shapes are static. Rows that find no place are
            dropped, the last ones in the order of the layout, and counted in `num_dropped`. None: as many rows as
            arrive.
        alignment: expert_major only: every expert's group is padded with zero rows to a multiple of this.
        after: any tensor that must exist before this exchange starts. Only the order matters, not the values.

    Raises:
        ValueError, TypeError: bad arguments; the message names the argument, what was expected and what came. Where it
            is bad on one rank alone, that one raises when all have come to the call, and the others a
            `torch.distributed.DistError` that names it. Transport nvlink does so for what only the device can see;
            else the rank raises at once, and the others after the time-out.
        RuntimeError: `init` was not called for the group, or an argument is of another Python type than its own.
        torch.distributed.DistError: ranks issued different operators, disagree on sizes or dtypes, or did not come in
            time.
    """
    group_name, world_size = resolve(group)
    communicator = communicators.get(group_name)
    max_tokens = None if communicator is None else communicator.max_tokens_per_rank
    if capacity is None:
        args = (topk_idx, num_experts, layout, alignment, world_size, group_name, max_tokens, after)
        if not torch.compiler.is_compiling() and (planned := _C.plan(Plan, *args)) is not None:
            return planned
        fields = torch.ops.ep.plan(*args)
    else:
        fields = torch.ops.ep.plan.capacity(
            topk_idx, num_experts, layout, alignment, capacity, world_size, group_name, max_tokens, after
        )
    send_slot, send_counts, recv_counts, recv_map, offsets, tokens_per_expert, num_dropped = fields
    recv_topk_idx, recv_slot = (recv_map, None) if layout == "rank_major" else (None, recv_map)
    return Plan(
        send_slot,
        send_counts,
        recv_counts,
        recv_topk_idx,
        recv_slot,
        offsets,
        tokens_per_expert,
        num_dropped,
        layout,
        group_name,
    )


def _plan_args(op: str, plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor, str, str]:
    if not isinstance(plan, Plan):
        raise TypeError(f"{op}: expected plan to be a torch_ep.Plan, got {type(plan).__name__}")
    return plan.send_slot, plan.send_counts, plan.recv_counts, _recv_map(plan), plan.layout, plan.group_name


@overload
def dispatch(x: Tensor, plan: Plan, *, after: Tensor | None = None) -> Tensor: ...
@overload
def dispatch(x: Tensor, plan: Plan, *, topk_weights: Tensor, after: Tensor | None = None) -> tuple[Tensor, Tensor]: ...
@overload
def dispatch(x: Tensor, plan: Plan, *, scales: Tensor, after: Tensor | None = None) -> tuple[Tensor, Tensor]: ...
@overload
def dispatch(
    x: Tensor, plan: Plan, *, topk_weights: Tensor, scales: Tensor, after: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]: ...
def dispatch(
    x: Tensor,
    plan: Plan,
    *,
    topk_weights: Tensor | None = None,
    scales: Tensor | None = None,
    after: Tensor | None = None,
) -> Any:
    """Copies each token's row to the ranks that hold its experts. Collective; differentiable; its transpose: `combine`.

    One row crosses the link per (token, rank), whatever the layout. Rows of padding are zero.

    Args:
        x: [num_tokens, hidden], contiguous; float64, float32, bfloat16, float16, float8_e4m3fn, float8_e5m2, or uint8,
            as which numbers of four bits travel, two in a byte.
        plan: of the same tokens.
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
    if not torch.compiler.is_compiling() and (got := _C.dispatch(x, plan, topk_weights, scales, after)) is not None:
        return got
    rows, weights, row_scales = torch.ops.ep.dispatch(x, topk_weights, scales, *_plan_args("ep::dispatch", plan), after)
    results = (rows, *(t for t in (weights, row_scales) if t is not None))
    return results if len(results) > 1 else rows


@overload
def combine(y: Tensor, plan: Plan, *, row_weights: Tensor | None = None, after: Tensor | None = None) -> Tensor: ...
@overload
def combine(y: Tensor, plan: Plan, *, topk_weights: Tensor, after: Tensor | None = None) -> tuple[Tensor, Tensor]: ...
def combine(
    y: Tensor,
    plan: Plan,
    *,
    row_weights: Tensor | None = None,
    topk_weights: Tensor | None = None,
    after: Tensor | None = None,
) -> Any:
    """Brings rows back and sums those of each token. Collective; differentiable; its transpose: `dispatch`.

    Rows of one rank are summed there before they are sent. Sums accumulate in float32 (float64 for float64) in the
    order of the token's slots and are rounded to y's dtype on the wire and at the end; bitwise the same on every run.

    Args:
        y: [plan.num_rows, hidden], contiguous; float64, float32, bfloat16 or float16. Rows of padding are not read.
        plan: that of the dispatch.
        row_weights: [plan.num_rows] floating: each row is multiplied by its weight while it is summed. Differentiable,
            with no further exchange. The received weights of an expert_major dispatch are what fits here.
        topk_weights: numbers that travel back beside the rows, in the shape in which `dispatch` returns them.
        after: any tensor that must exist before this exchange starts.

    Returns:
        The sums [num_tokens, hidden], zero for a token without experts; with `topk_weights` a tuple with these numbers,
        [num_tokens, num_topk], 0 where `topk_idx` is -1.

    Raises:
        ValueError, TypeError, RuntimeError, torch.distributed.DistError: as `plan`; ValueError too if both
        `row_weights` and `topk_weights` are given.
    """
    if row_weights is not None:
        if topk_weights is not None:
            raise ValueError("torch_ep.combine: expected row_weights or topk_weights, got both")
        if not torch.compiler.is_compiling() and (got := _C.combine_weighted(y, plan, row_weights, after)) is not None:
            return got
        return torch.ops.ep.combine.weighted(y, row_weights, *_plan_args("ep::combine", plan), after)
    if not torch.compiler.is_compiling() and (got := _C.combine(y, plan, topk_weights, None, after)) is not None:
        return got
    tokens, weights, _ = torch.ops.ep.combine(y, topk_weights, None, *_plan_args("ep::combine", plan), after)
    return tokens if weights is None else (tokens, weights)


# Autograd. Every formula sends all payloads in one exchange, whichever gradients are wanted, so that ranks cannot come
# to differ in what they exchange.


def _contiguous(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.contiguous()  # a sum's gradient arrives with strides of zero


def _is_floating(t: Tensor | None) -> bool:
    return t is not None and t.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _save_after(ctx: Any, after: Tensor | None) -> None:
    ctx.after_shape = ctx.after_dtype = None
    if after is not None and after.requires_grad:
        ctx.after_shape, ctx.after_dtype = after.shape, after.dtype


def _grad_after(ctx: Any, exchanged: Tensor) -> Tensor | None:
    """Zeros that depend on this backward's exchange, so that what came before in forward comes after it in backward."""
    if ctx.after_shape is None:
        return None
    return torch.ops.ep.zero_after(exchanged).to(ctx.after_dtype).expand(ctx.after_shape)


def _dispatch_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, _, scales, *plan_tensors, layout, group_name, after = inputs
    ctx.save_for_backward(*plan_tensors)
    ctx.layout, ctx.group_name = layout, group_name
    ctx.x_floating, ctx.scales_floating = _is_floating(x), _is_floating(scales)
    ctx.mark_non_differentiable(*(t for t in output if t is not None and not _is_floating(t)))
    _save_after(ctx, after)


def _dispatch_backward(ctx: Any, grad_x: Tensor, grad_weights: Tensor | None, grad_scales: Tensor | None) -> tuple:
    plan_tensors = ctx.saved_tensors  # once: activation checkpointing unpacks a tensor a single time
    recv_map = plan_tensors[-1]
    if not ctx.x_floating:  # fp8 rows have no gradient, but their weights and scales may: rows of width zero
        grad_x = recv_map.new_empty((recv_map.shape[0], 0), dtype=torch.float32)
    x, weights, scales = torch.ops.ep.combine(
        _contiguous(grad_x),
        _contiguous(grad_weights),
        _contiguous(grad_scales) if ctx.scales_floating else None,
        *plan_tensors,
        ctx.layout,
        ctx.group_name,
    )
    return x if ctx.x_floating else None, weights, scales, *[None] * 6, _grad_after(ctx, x)


def _combine_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, _, _, *plan_tensors, layout, group_name, after = inputs
    ctx.save_for_backward(*plan_tensors)
    ctx.layout, ctx.group_name = layout, group_name
    _save_after(ctx, after)


def _combine_backward(ctx: Any, grad_y: Tensor, grad_weights: Tensor | None, grad_scales: Tensor | None) -> tuple:
    y, weights, scales = torch.ops.ep.dispatch(
        _contiguous(grad_y),
        _contiguous(grad_weights),
        _contiguous(grad_scales),
        *ctx.saved_tensors,
        ctx.layout,
        ctx.group_name,
    )
    return y, weights, scales, *[None] * 6, _grad_after(ctx, y)


def _combine_weighted_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    y, row_weights, *plan_tensors, layout, group_name, after = inputs
    ctx.save_for_backward(y, row_weights, *plan_tensors)
    ctx.layout, ctx.group_name = layout, group_name
    _save_after(ctx, after)


def _combine_weighted_backward(ctx: Any, grad: Tensor) -> tuple:
    y, row_weights, *plan_tensors = ctx.saved_tensors
    rows, _, _ = torch.ops.ep.dispatch(_contiguous(grad), None, None, *plan_tensors, ctx.layout, ctx.group_name)
    recv_map = plan_tensors[-1]
    valid = recv_map >= 0 if ctx.layout == "expert_major" else (recv_map >= 0).any(1)
    accumulate = torch.promote_types(y.dtype, torch.float32)
    # Rows of padding may hold anything, NaN included: select, never multiply by zero.
    wide = rows.to(accumulate)
    grad_y = torch.where(valid[:, None], wide * row_weights[:, None].to(accumulate), 0).to(y.dtype)
    products = torch.where(valid[:, None], wide * y.to(accumulate), 0)
    grad_weights = products.sum(1).to(row_weights.dtype)
    return grad_y, grad_weights, *[None] * 6, _grad_after(ctx, rows)


def _grouped_mm_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_mm_backward(ctx: Any, grad: Tensor) -> tuple:
    a, b, offsets = ctx.saved_tensors
    return (
        torch.ops.ep.grouped_mm(grad, b.transpose(1, 2), offsets),
        torch.ops.ep.grouped_mm.transpose(a, grad, offsets),
        None,
    )


def _grouped_mm_transpose_backward(ctx: Any, grad: Tensor) -> tuple:
    a, g, offsets = ctx.saved_tensors
    return (
        torch.ops.ep.grouped_mm(g, grad.transpose(1, 2), offsets),
        torch.ops.ep.grouped_mm(a, grad, offsets),
        None,
    )


torch.library.register_autograd("ep::grouped_mm", _grouped_mm_backward, setup_context=_grouped_mm_setup)
torch.library.register_autograd(
    "ep::grouped_mm.transpose", _grouped_mm_transpose_backward, setup_context=_grouped_mm_setup
)
torch.library.register_autograd("ep::dispatch", _dispatch_backward, setup_context=_dispatch_setup)
torch.library.register_autograd("ep::combine", _combine_backward, setup_context=_combine_setup)
torch.library.register_autograd(
    "ep::combine.weighted", _combine_weighted_backward, setup_context=_combine_weighted_setup
)
