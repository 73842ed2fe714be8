"""The fake implementation of every operator: the shapes, dtypes, devices and errors of the kernels.

The messages are those of `csrc/core/checks.h` and its callers; `test/api/test_errors.py` runs both over one table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import SymInt, Tensor

from .checks import first_in_dynamo
from .comm import communicators

_SUM_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ROW_TYPES = (*_SUM_TYPES, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8)
_LOW_LATENCY_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# As the kernels print them.
_TYPE_NAMES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
    torch.float8_e4m3fn: "Float8_e4m3fn",
    torch.float8_e5m2: "Float8_e5m2",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.int16: "Short",
    torch.int8: "Char",
    torch.uint8: "Byte",
    torch.bool: "Bool",
}

Size = int | SymInt


def _name_of_type(dtype: torch.dtype) -> str:
    return _TYPE_NAMES.get(dtype, str(dtype))


def _type_name(t: Tensor) -> str:
    return _name_of_type(t.dtype)


# As in csrc/core/checks.h.
_MAX_SIZE = 2**31 - 1
_MAX_EXPERTS = 2**24
_MAX_TOPK = 2**16 - 1
_MAX_PADDING = 2**30


class _ShapeOf(NamedTuple):
    """The reason for an expected shape, and the remedy for another shape. As in csrc/core/checks.h."""

    what: str = ""
    remedy: str = ""


_OWN_SHAPE = _ShapeOf()
_PLAN_FIELD = _ShapeOf("", ": pass the plan as torch_ep.plan returned it")
_TOKENS = _ShapeOf(", one row per token of the plan", ": pass the tokens of the plan's topk_idx")
_TOKEN_SLOTS = _ShapeOf(
    ", one per token and slot of the plan",
    ": pass the weights of the plan's topk_idx",
)
_ROWS = _ShapeOf(
    ", one row per row of the dispatch",
    ": pass the experts' results for the rows that it returned",
)
_ROW_WEIGHTS = _ShapeOf(
    ", one per row of the dispatch",
    ": pass the weights that it returned in layout expert_major",
)
_RETURNED_WEIGHTS = _ShapeOf(
    ", as dispatch returned the weights", ": pass these, or others in their places; to weigh rows pass row_weights="
)
_TOKENS_OF_X = _ShapeOf(", one row per token of x", ": pass the topk_idx of these tokens")
_ENTRIES = _ShapeOf(", one per entry of topk_idx", ": pass the weights of that topk_idx")
_LOW_LATENCY_ROWS = _ShapeOf(
    ", as low_latency_dispatch returned the rows",
    ": pass the experts' results in their places",
)
_LOW_LATENCY_PLAN_FIELD = _ShapeOf("", ": pass the plan as torch_ep.low_latency_dispatch returned it")
_IN_FLIGHT = _ShapeOf("", ": pass what the send returned, whole")
_GROUPS = _ShapeOf(", one end per group")


def _fake(name: str) -> Callable[[Callable], Callable]:
    """Registers a fake. Its errors reach the user unchanged under torch.compile too."""

    def register(function: Callable) -> Callable:
        @torch.library.register_fake(name)
        @functools.wraps(function)
        def fake(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except (TypeError, ValueError, RuntimeError) as error:
                if type(error) not in (TypeError, ValueError, RuntimeError):
                    raise  # an error of the compiler about a symbol
                raise first_in_dynamo(error) from None

        return fake

    return register


def _check_tensor(
    op: str,
    name: str,
    t: Tensor,
    shape: Sequence[Size | str],
    device_of: Tensor,
    of: _ShapeOf = _OWN_SHAPE,
) -> None:
    """A name in `shape`: any size.

    That it is contiguous is for the kernels to check: Inductor gives matrix products that it pads as slices of wider
    ones, runs the fakes on these, and makes them contiguous later, since operators are given the strides of the trace.
    """

    def message() -> str:
        dims = ", ".join(str(dim) for dim in shape)
        return f"{op}: expected {name} of shape [{dims}]{of.what}, got {list(t.shape)}{of.remedy}"

    torch._check_value(t.dim() == len(shape), message)
    for want, got in zip(shape, t.shape, strict=True):
        if not isinstance(want, str):
            torch._check_value(want == got, message)  # between symbols this becomes a guard or a run-time check
    if t.device != device_of.device:
        raise ValueError(f"{op}: expected {name} on {device_of.device}, got {t.device}")


def _check_type(op: str, name: str, t: Tensor, allowed: Sequence[torch.dtype]) -> None:
    _check_dtype(op, name, t.dtype, allowed)


def _check_dtype(op: str, name: str, dtype: torch.dtype, allowed: Sequence[torch.dtype]) -> None:
    if dtype not in allowed:
        names = [_TYPE_NAMES[dtype] for dtype in allowed]
        listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
        raise TypeError(f"{op}: expected {name} of dtype {listed}, got {_name_of_type(dtype)}")


def _check_layout(op: str, layout: str) -> bool:
    if layout not in ("rank_major", "expert_major"):
        raise ValueError(f"{op}: expected layout 'rank_major' or 'expert_major', got '{layout}'")
    return layout == "expert_major"


def _check_group(op: str, group_name: str, world_size: int) -> None:
    if world_size == 1:
        return
    communicator = communicators.get(group_name)
    if communicator is None:
        raise RuntimeError(
            f"{op}: expected an initialized group, got group '{group_name}': "
            "call torch_ep.init(group) on every rank first"
        )
    if communicator.world_size != world_size:
        raise ValueError(
            f"{op}: expected world_size {communicator.world_size} (the size of group '{group_name}'), got {world_size}"
        )


def _check_limit(op: str, group_name: str, name: str, got: Size) -> None:
    communicator = communicators.get(group_name)
    limit = None if communicator is None else getattr(communicator, name)
    if limit is not None and isinstance(got, int) and got > limit:
        raise ValueError(f"{op}: expected at most {name} = {limit}, the limit given to torch_ep.init, got {got}")


def _check_at_most(op: str, name: str, got: Size, most: int) -> None:
    if isinstance(got, int) and got > most:
        raise ValueError(f"{op}: expected {name} of at most {most}, got {got}")


def _check_topk(op: str, num_topk: Size) -> None:
    if isinstance(num_topk, int) and num_topk <= 0:
        raise ValueError(f"{op}: expected at least one expert per token, got {num_topk}")
    _check_at_most(op, "num_topk", num_topk, _MAX_TOPK)


def _check_index_type(op: str, name: str, t: Tensor) -> None:
    _check_type(op, name, t, (torch.int32, torch.int64))


def check_experts(op: str, num_experts: int, world_size: int) -> None:
    if world_size <= 0:
        raise ValueError(f"{op}: expected a positive world_size, got {world_size}")
    if num_experts <= 0 or num_experts % world_size:
        raise ValueError(
            f"{op}: expected num_experts to be a positive multiple of the world size {world_size}, got {num_experts}"
        )
    _check_at_most(op, "num_experts", num_experts, _MAX_EXPERTS)


def _check_tokens(op: str, num_tokens: Size, max_tokens_per_rank: int) -> None:
    # A symbolic number is left to the kernel, which reports to all ranks; a guard would fail on one rank only.
    if isinstance(num_tokens, int) and num_tokens > max_tokens_per_rank:
        raise ValueError(f"{op}: expected at most max_tokens_per_rank = {max_tokens_per_rank} tokens, got {num_tokens}")


def _check_plan_arguments(
    topk_idx: Tensor,
    num_experts: int,
    layout: str,
    alignment: int,
    capacity: Size | None,
    world_size: int,
    group_name: str,
    max_tokens_per_rank: int | None,
) -> bool:
    op = "ep::plan"
    _check_layout(op, layout)
    _check_tensor(op, "topk_idx", topk_idx, ("num_tokens", "num_topk"), topk_idx)
    _check_index_type(op, "topk_idx", topk_idx)
    _check_topk(op, topk_idx.shape[1])
    _check_at_most(op, "entries of topk_idx", topk_idx.numel(), _MAX_SIZE)
    expert_major = check_plan_options(num_experts, layout, alignment, capacity, world_size)
    _check_group(op, group_name, world_size)
    _check_limit(op, group_name, "num_topk", topk_idx.shape[1])
    _check_limit(op, group_name, "num_experts", num_experts)
    if max_tokens_per_rank is not None:
        _check_tokens(op, topk_idx.shape[0], max_tokens_per_rank)
    return expert_major


def check_plan_options(num_experts: int, layout: str, alignment: int, capacity: Size | None, world_size: int) -> bool:
    """Checks the arguments of ep::plan that are no tensors. Returns whether the layout is expert_major."""
    op = "ep::plan"
    expert_major = _check_layout(op, layout)
    check_experts(op, num_experts, world_size)
    if alignment <= 0:
        raise ValueError(f"{op}: expected a positive alignment, got {alignment}")
    _check_at_most(op, "alignment", alignment, _MAX_PADDING // (num_experts // world_size))
    if not expert_major and alignment != 1:
        raise ValueError(f"{op}: expected alignment 1 with layout 'rank_major', got {alignment}")
    if isinstance(capacity, int) and (capacity < 0 or capacity % alignment or capacity > _MAX_SIZE):
        raise ValueError(
            f"{op}: expected a capacity from 0 to 2**31 - 1 that is a multiple of the alignment {alignment}, "
            f"got {capacity}"
        )
    return expert_major


def _plan_result(topk_idx: Tensor, rows: Size, num_experts: int, world_size: int, expert_major: bool) -> tuple:
    num_tokens, num_topk = topk_idx.shape
    num_local_experts = num_experts // world_size
    ints: dict[str, Any] = {"dtype": torch.int32, "device": topk_idx.device}
    recv_map = torch.empty(rows, **ints) if expert_major else topk_idx.new_empty(rows, num_topk)
    return (
        torch.empty(num_tokens, num_topk, **ints),
        torch.empty(world_size, **ints),
        torch.empty(world_size, **ints),
        recv_map,
        torch.empty(num_local_experts if expert_major else world_size, **ints),
        torch.empty(num_local_experts, **ints),
        torch.empty((), **ints),
    )


@_fake("ep::plan")
def _plan(
    topk_idx: Tensor,
    num_experts: int,
    layout: str,
    alignment: int,
    world_size: int,
    group_name: str,
    max_tokens_per_rank: int | None = None,
    after: Tensor | None = None,
) -> tuple:
    expert_major = _check_plan_arguments(
        topk_idx, num_experts, layout, alignment, None, world_size, group_name, max_tokens_per_rank
    )
    rows = torch.library.get_ctx().new_dynamic_size(min=0)
    # A single rank's own tokens bound its received rows. Over several ranks only `max_tokens_per_rank` does.
    tokens = topk_idx.shape[0] if world_size == 1 else max_tokens_per_rank
    if tokens is not None:
        bound = world_size * tokens
        if expert_major:
            num_local_experts = num_experts // world_size
            bound = bound * min(topk_idx.shape[1], num_local_experts) + num_local_experts * (alignment - 1)
        torch._check(rows <= (min(bound, _MAX_SIZE) if isinstance(bound, int) else bound))
    return _plan_result(topk_idx, rows, num_experts, world_size, expert_major)


@_fake("ep::plan.capacity")
def _plan_capacity(
    topk_idx: Tensor,
    num_experts: int,
    layout: str,
    alignment: int,
    capacity: Size,
    world_size: int,
    group_name: str,
    max_tokens_per_rank: int | None = None,
    after: Tensor | None = None,
) -> tuple:
    expert_major = _check_plan_arguments(
        topk_idx, num_experts, layout, alignment, capacity, world_size, group_name, max_tokens_per_rank
    )
    return _plan_result(topk_idx, capacity, num_experts, world_size, expert_major)


def _check_plan_tensors(
    op: str,
    send_row: Tensor,
    send_counts: Tensor,
    recv_counts: Tensor,
    recv_map: Tensor,
    layout: str,
    group_name: str,
) -> None:
    expert_major = _check_layout(op, layout)
    _check_tensor(op, "send_row", send_row, ("num_tokens", "num_topk"), send_row, _PLAN_FIELD)
    _check_type(op, "send_row", send_row, (torch.int32,))
    _check_topk(op, send_row.shape[1])
    _check_tensor(op, "send_counts", send_counts, ("world_size",), send_row, _PLAN_FIELD)
    _check_type(op, "send_counts", send_counts, (torch.int32,))
    _check_tensor(op, "recv_counts", recv_counts, send_counts.shape, send_row, _PLAN_FIELD)
    _check_type(op, "recv_counts", recv_counts, (torch.int32,))
    if expert_major:
        _check_tensor(op, "recv_pair", recv_map, ("num_rows",), send_row, _PLAN_FIELD)
        _check_type(op, "recv_pair", recv_map, (torch.int32,))
    else:
        _check_tensor(op, "recv_topk_idx", recv_map, ("num_rows", send_row.shape[1]), send_row, _PLAN_FIELD)
        _check_index_type(op, "recv_topk_idx", recv_map)


def _check_payloads(
    op: str,
    name: str,
    rows: Tensor,
    num_rows: Size,
    rows_of: _ShapeOf,
    topk_weights: Tensor | None,
    weights_shape: Sequence[Size],
    weights_of: _ShapeOf,
    scales: Tensor | None,
    device_of: Tensor,
) -> None:
    _check_tensor(op, name, rows, (num_rows, "hidden"), device_of, rows_of)
    if topk_weights is not None:
        _check_tensor(op, "topk_weights", topk_weights, weights_shape, device_of, weights_of)
        _check_type(op, "topk_weights", topk_weights, _SUM_TYPES)
    if scales is not None:
        _check_tensor(op, "scales", scales, (num_rows, "n"), device_of, rows_of)


@_fake("ep::dispatch")
def _dispatch(
    x: Tensor,
    topk_weights: Tensor | None,
    scales: Tensor | None,
    send_row: Tensor,
    send_counts: Tensor,
    recv_counts: Tensor,
    recv_map: Tensor,
    layout: str,
    group_name: str,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    op = "ep::dispatch"
    _check_plan_tensors(op, send_row, send_counts, recv_counts, recv_map, layout, group_name)
    _check_payloads(
        op, "x", x, send_row.shape[0], _TOKENS, topk_weights, send_row.shape, _TOKEN_SLOTS, scales, send_row
    )
    _check_type(op, "x", x, _ROW_TYPES)
    _check_group(op, group_name, send_counts.shape[0])
    _check_limit(op, group_name, "hidden", x.shape[1])
    rows = recv_map.shape[0]
    return (
        x.new_empty(rows, x.shape[1]),
        None if topk_weights is None else topk_weights.new_empty(recv_map.shape),
        None if scales is None else scales.new_empty(rows, scales.shape[1]),
    )


@_fake("ep::combine")
def _combine(
    y: Tensor,
    topk_weights: Tensor | None,
    scales: Tensor | None,
    send_row: Tensor,
    send_counts: Tensor,
    recv_counts: Tensor,
    recv_map: Tensor,
    layout: str,
    group_name: str,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    op = "ep::combine"
    _check_plan_tensors(op, send_row, send_counts, recv_counts, recv_map, layout, group_name)
    _check_payloads(
        op, "y", y, recv_map.shape[0], _ROWS, topk_weights, recv_map.shape, _RETURNED_WEIGHTS, scales, send_row
    )
    _check_type(op, "y", y, _SUM_TYPES)
    if scales is not None:
        _check_type(op, "scales", scales, _SUM_TYPES)
    _check_group(op, group_name, send_counts.shape[0])
    _check_limit(op, group_name, "hidden", y.shape[1])
    num_tokens = send_row.shape[0]
    return (
        y.new_empty(num_tokens, y.shape[1]),
        None if topk_weights is None else topk_weights.new_empty(send_row.shape),
        None if scales is None else scales.new_empty(num_tokens, scales.shape[1]),
    )


@_fake("ep::combine.weighted")
def _combine_weighted(
    y: Tensor,
    row_weights: Tensor,
    send_row: Tensor,
    send_counts: Tensor,
    recv_counts: Tensor,
    recv_map: Tensor,
    layout: str,
    group_name: str,
    after: Tensor | None = None,
) -> Tensor:
    op = "ep::combine"
    _check_plan_tensors(op, send_row, send_counts, recv_counts, recv_map, layout, group_name)
    _check_tensor(op, "y", y, (recv_map.shape[0], "hidden"), send_row, _ROWS)
    _check_type(op, "y", y, _SUM_TYPES)
    _check_tensor(op, "row_weights", row_weights, (recv_map.shape[0],), send_row, _ROW_WEIGHTS)
    _check_type(op, "row_weights", row_weights, _SUM_TYPES)
    _check_group(op, group_name, send_counts.shape[0])
    _check_limit(op, group_name, "hidden", y.shape[1])
    return y.new_empty(send_row.shape[0], y.shape[1])


def _ticket(like: Tensor) -> Tensor:
    return like.new_empty(1, dtype=torch.float64)


@_fake("ep::dispatch_send")
def _dispatch_send(
    x: Tensor, topk_weights: Tensor | None, scales: Tensor | None, *plan: Any, after: Tensor | None = None
) -> Tensor:
    _dispatch(x, topk_weights, scales, *plan)
    return _ticket(x)


@_fake("ep::combine_send")
def _combine_send(
    y: Tensor, topk_weights: Tensor | None, scales: Tensor | None, *plan: Any, after: Tensor | None = None
) -> Tensor:
    _combine(y, topk_weights, scales, *plan)
    return _ticket(y)


@_fake("ep::combine_send.weighted")
def _combine_send_weighted(y: Tensor, row_weights: Tensor, *plan: Any, after: Tensor | None = None) -> Tensor:
    _combine_weighted(y, row_weights, *plan)
    return _ticket(y)


def _received(
    op: str,
    ticket: Tensor,
    plan: tuple,
    rows: Size,
    weights_shape: Sequence[Size],
    hidden: Size,
    dtype: torch.dtype,
    weights_dtype: torch.dtype | None,
    scales_columns: Size | None,
    scales_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    _check_plan_tensors(op, *plan)
    _check_tensor(op, "ticket", ticket, (1,), plan[0], _IN_FLIGHT)
    _check_type(op, "ticket", ticket, (torch.float64,))
    return (
        ticket.new_empty((rows, hidden), dtype=dtype),
        None if weights_dtype is None else ticket.new_empty(weights_shape, dtype=weights_dtype),
        None if scales_columns is None else ticket.new_empty((rows, scales_columns), dtype=scales_dtype),
    )


@_fake("ep::dispatch_recv")
def _dispatch_recv(ticket: Tensor, *arguments: Any, after: Tensor | None = None) -> tuple:
    plan, types = arguments[:6], arguments[6:11]
    recv_map = plan[3]
    return _received("ep::dispatch_recv", ticket, plan, recv_map.shape[0], recv_map.shape, *types)


@_fake("ep::combine_recv")
def _combine_recv(ticket: Tensor, *arguments: Any, after: Tensor | None = None) -> tuple:
    plan, types = arguments[:6], arguments[6:11]
    send_row = plan[0]
    return _received("ep::combine_recv", ticket, plan, send_row.shape[0], send_row.shape, *types)


_RELAYED = _ShapeOf(", one row per row that this rank relays", ": pass the plan as torch_ep.plan returned it")


_PlanTensors = tuple[Tensor, Tensor, Tensor, Tensor]


def _check_grid_plan(
    op: str, rail: _PlanTensors, node: _PlanTensors, layout: str, rail_name: str, group_name: str
) -> None:
    _check_plan_tensors(op, *rail, "rank_major", rail_name)
    _check_plan_tensors(op, *node, layout, group_name)
    _check_tensor(op, "send_row", node[0], (rail[3].shape[0], rail[0].shape[1]), rail[0], _RELAYED)


def _split_grid_plan(arguments: tuple) -> tuple[_PlanTensors, _PlanTensors, str, str, str]:
    """The plan of the rail, that of the node, the layout and the names of both groups."""
    return arguments[:4], arguments[4:8], *arguments[8:11]  # type: ignore[return-value]


@_fake("ep::dispatch.grid")
def _dispatch_grid(
    x: Tensor,
    topk_weights: Tensor | None,
    scales: Tensor | None,
    *arguments: Any,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rail, node, layout, rail_name, group_name = _split_grid_plan(arguments)
    _check_grid_plan("ep::dispatch", rail, node, layout, rail_name, group_name)
    return _dispatch(*_dispatch(x, topk_weights, scales, *rail, "rank_major", rail_name), *node, layout, group_name)


@_fake("ep::combine.grid")
def _combine_grid(
    y: Tensor,
    topk_weights: Tensor | None,
    scales: Tensor | None,
    *arguments: Any,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rail, node, layout, rail_name, group_name = _split_grid_plan(arguments)
    _check_grid_plan("ep::combine", rail, node, layout, rail_name, group_name)
    return _combine(*_combine(y, topk_weights, scales, *node, layout, group_name), *rail, "rank_major", rail_name)


@_fake("ep::combine.grid_weighted")
def _combine_grid_weighted(y: Tensor, row_weights: Tensor, *arguments: Any, after: Tensor | None = None) -> Tensor:
    rail, node, layout, rail_name, group_name = _split_grid_plan(arguments)
    _check_grid_plan("ep::combine", rail, node, layout, rail_name, group_name)
    sums = _combine_weighted(y, row_weights, *node, layout, group_name)
    return _combine(sums, None, None, *rail, "rank_major", rail_name)[0]


_QUANTIZE = ("", "fp8", "fp8_pow2", "fp8_ue8m0")
_GROUP = 128  # channels that share a scale
_SCALE_ROWS = 4  # an expert's rows are padded to a multiple of this in the layout of scales


def _ceil_div(n: Size, by: int) -> Size:
    return (n + by - 1) // by


def _check_quantize(op: str, quantize: str) -> None:
    if quantize not in _QUANTIZE:
        raise ValueError(f"{op}: expected quantize '', 'fp8', 'fp8_pow2' or 'fp8_ue8m0', got '{quantize}'")


def _check_hidden(op: str, hidden: Size) -> None:
    if isinstance(hidden, int) and hidden <= 0:
        raise ValueError(f"{op}: expected a positive hidden, got {hidden}")
    _check_at_most(op, "hidden", hidden, _MAX_SIZE)


def _check_low_latency_sizes(
    op: str, num_experts: int, num_topk: int, max_tokens_per_rank: int, world_size: int
) -> None:
    _check_topk(op, num_topk)
    check_experts(op, num_experts, world_size)
    if max_tokens_per_rank <= 0:
        raise ValueError(f"{op}: expected a positive max_tokens_per_rank, got {max_tokens_per_rank}")
    factor = max(num_topk, num_experts // world_size)
    most = _MAX_SIZE // (world_size * factor)
    if max_tokens_per_rank > most:
        raise ValueError(
            f"{op}: expected max_tokens_per_rank of at most {most} with world_size {world_size} and {factor} "
            f"slots per token or local experts, got {max_tokens_per_rank}"
        )


def _num_scales(hidden: Size, quantize: str) -> Size:
    groups = _ceil_div(hidden, _GROUP)
    return 0 if quantize == "" else _ceil_div(groups, 4) if quantize == "fp8_ue8m0" else groups


def _wire_row_bytes(hidden: Size, dtype: torch.dtype, quantize: str, num_topk: int) -> Size:
    """`LowLatencyWireRow` of csrc/core/low_latency_wire_row.h."""
    parts = (
        hidden * (dtype.itemsize if quantize == "" else 1),
        4 * _num_scales(hidden, quantize),
        4 * (1 + num_topk),
        4 * num_topk,
    )
    return sum(_ceil_div(part, 16) * 16 for part in parts)


def _check_low_latency_group(
    op: str, group_name: str, world_size: int, hidden: Size, num_topk: int, num_experts: int
) -> None:
    _check_group(op, group_name, world_size)
    _check_limit(op, group_name, "hidden", hidden)
    _check_limit(op, group_name, "num_topk", num_topk)
    _check_limit(op, group_name, "num_experts", num_experts)


def _check_low_latency_tokens(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    quantize: str,
    num_experts: int,
    max_tokens_per_rank: int,
    world_size: int,
    group_name: str,
) -> None:
    op = "ep::low_latency_dispatch"
    _check_quantize(op, quantize)
    _check_tensor(op, "x", x, ("num_tokens", "hidden"), x)
    _check_type(op, "x", x, _LOW_LATENCY_TYPES)
    _check_hidden(op, x.shape[1])
    _check_tensor(op, "topk_idx", topk_idx, (x.shape[0], "num_topk"), x, _TOKENS_OF_X)
    _check_index_type(op, "topk_idx", topk_idx)
    if topk_weights is not None:
        _check_tensor(op, "topk_weights", topk_weights, topk_idx.shape, x, _ENTRIES)
        _check_type(op, "topk_weights", topk_weights, (torch.float32,))
    num_topk = topk_idx.shape[1]
    _check_low_latency_sizes(op, num_experts, num_topk, max_tokens_per_rank, world_size)
    _check_low_latency_group(op, group_name, world_size, x.shape[1], num_topk, num_experts)
    _check_tokens(op, x.shape[0], max_tokens_per_rank)


def _low_latency_rows(
    like: Tensor,
    hidden: Size,
    dtype: torch.dtype,
    num_topk: int,
    quantize: str,
    num_experts: int,
    max_tokens_per_rank: int,
    world_size: int,
) -> tuple:
    experts, room = num_experts // world_size, world_size * max_tokens_per_rank
    ints: dict[str, Any] = {"dtype": torch.int32, "device": like.device}
    scales = None
    if quantize:
        dtype = torch.float8_e4m3fn
        count, padded = _num_scales(hidden, quantize), _ceil_div(room, _SCALE_ROWS) * _SCALE_ROWS
        scales = torch.empty_strided(
            (experts, room, count),
            (count * padded, 1, padded),
            dtype=torch.int32 if quantize == "fp8_ue8m0" else torch.float32,
            device=like.device,
        )
    return (
        like.new_empty((experts, room, hidden), dtype=dtype),
        scales,
        torch.empty(experts, **ints),
        torch.empty((experts, world_size), **ints),
        torch.empty((experts, room), **ints),
        torch.empty((room, num_topk), **ints),
        like.new_empty((experts, room), dtype=torch.float32),
        like.new_empty(world_size, dtype=torch.int64),
    )


def _in_flight(like: Tensor, world_size: int, rows: int, wire_row_bytes: Size) -> tuple[Tensor, Tensor]:
    return (
        like.new_empty((2, world_size), dtype=torch.int64),
        like.new_empty((rows, wire_row_bytes), dtype=torch.uint8),
    )


def _check_in_flight(
    op: str, status: Tensor, in_flight: Tensor, rows: Size | str, wire_row_bytes: Size, world_size: int
) -> None:
    _check_tensor(op, "status", status, (2, world_size), status, _IN_FLIGHT)
    _check_type(op, "status", status, (torch.int64,))
    _check_tensor(op, "in_flight", in_flight, (rows, wire_row_bytes), status, _IN_FLIGHT)
    _check_type(op, "in_flight", in_flight, (torch.uint8,))


@_fake("ep::low_latency_dispatch")
def _low_latency_dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    quantize: str,
    num_experts: int,
    max_tokens_per_rank: int,
    world_size: int,
    group_name: str,
    after: Tensor | None = None,
) -> tuple:
    _check_low_latency_tokens(
        x, topk_idx, topk_weights, quantize, num_experts, max_tokens_per_rank, world_size, group_name
    )
    return _low_latency_rows(
        x, x.shape[1], x.dtype, topk_idx.shape[1], quantize, num_experts, max_tokens_per_rank, world_size
    )


@_fake("ep::low_latency_dispatch_send")
def _low_latency_dispatch_send(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    quantize: str,
    num_experts: int,
    max_tokens_per_rank: int,
    world_size: int,
    group_name: str,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_low_latency_tokens(
        x, topk_idx, topk_weights, quantize, num_experts, max_tokens_per_rank, world_size, group_name
    )
    return _in_flight(
        x,
        world_size,
        world_size * max_tokens_per_rank,
        _wire_row_bytes(x.shape[1], x.dtype, quantize, topk_idx.shape[1]),
    )


@_fake("ep::low_latency_dispatch_recv")
def _low_latency_dispatch_recv(
    status: Tensor,
    in_flight: Tensor,
    hidden: Size,
    dtype: torch.dtype,
    num_topk: int,
    quantize: str,
    num_experts: int,
    max_tokens_per_rank: int,
    world_size: int,
    group_name: str,
    after: Tensor | None = None,
) -> tuple:
    op = "ep::low_latency_dispatch_recv"
    _check_quantize(op, quantize)
    _check_low_latency_sizes(op, num_experts, num_topk, max_tokens_per_rank, world_size)
    _check_dtype(op, "rows", dtype, _LOW_LATENCY_TYPES)
    _check_hidden(op, hidden)
    wire_row_bytes = _wire_row_bytes(hidden, dtype, quantize, num_topk)
    _check_in_flight(op, status, in_flight, world_size * max_tokens_per_rank, wire_row_bytes, world_size)
    return _low_latency_rows(in_flight, hidden, dtype, num_topk, quantize, num_experts, max_tokens_per_rank, world_size)


def _check_low_latency_results(
    y: Tensor,
    topk_idx: Tensor,
    row_weights: Tensor,
    recv_row: Tensor,
    num_experts: int,
    world_size: int,
    group_name: str,
) -> None:
    op = "ep::low_latency_combine"
    _check_tensor(op, "recv_row", recv_row, ("rows", "num_topk"), recv_row, _LOW_LATENCY_PLAN_FIELD)
    _check_type(op, "recv_row", recv_row, (torch.int32,))
    room, num_topk = recv_row.shape
    _check_topk(op, num_topk)
    check_experts(op, num_experts, world_size)
    if room % world_size:
        raise ValueError(
            f"{op}: expected recv_row to have the same number of rows for each of {world_size} ranks, got {room}"
        )
    _check_low_latency_sizes(op, num_experts, num_topk, room // world_size, world_size)
    experts = num_experts // world_size
    _check_tensor(op, "y", y, (experts, room, "hidden"), recv_row, _LOW_LATENCY_ROWS)
    _check_type(op, "y", y, _LOW_LATENCY_TYPES)
    _check_hidden(op, y.shape[2])
    _check_tensor(op, "row_weights", row_weights, (experts, room), recv_row, _LOW_LATENCY_PLAN_FIELD)
    _check_type(op, "row_weights", row_weights, (torch.float32,))
    _check_tensor(op, "topk_idx", topk_idx, ("num_tokens", num_topk), recv_row, _LOW_LATENCY_PLAN_FIELD)
    _check_index_type(op, "topk_idx", topk_idx)
    _check_low_latency_group(op, group_name, world_size, y.shape[2], num_topk, num_experts)
    _check_tokens(op, topk_idx.shape[0], room // world_size)


@_fake("ep::low_latency_combine")
def _low_latency_combine(
    y: Tensor,
    topk_idx: Tensor,
    row_weights: Tensor,
    recv_row: Tensor,
    num_experts: int,
    world_size: int,
    group_name: str,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_low_latency_results(y, topk_idx, row_weights, recv_row, num_experts, world_size, group_name)
    return y.new_empty((topk_idx.shape[0], y.shape[2])), y.new_empty(world_size, dtype=torch.int64)


@_fake("ep::low_latency_combine_send")
def _low_latency_combine_send(
    y: Tensor,
    topk_idx: Tensor,
    row_weights: Tensor,
    recv_row: Tensor,
    num_experts: int,
    world_size: int,
    group_name: str,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_low_latency_results(y, topk_idx, row_weights, recv_row, num_experts, world_size, group_name)
    return _in_flight(y, world_size, recv_row.shape[0], y.shape[2] * y.dtype.itemsize)


@_fake("ep::low_latency_combine_recv")
def _low_latency_combine_recv(
    status: Tensor,
    in_flight: Tensor,
    topk_idx: Tensor,
    hidden: Size,
    dtype: torch.dtype,
    num_experts: int,
    world_size: int,
    group_name: str,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    op = "ep::low_latency_combine_recv"
    _check_tensor(op, "topk_idx", topk_idx, ("num_tokens", "num_topk"), status, _IN_FLIGHT)
    _check_index_type(op, "topk_idx", topk_idx)
    _check_topk(op, topk_idx.shape[1])
    check_experts(op, num_experts, world_size)
    _check_dtype(op, "rows", dtype, _LOW_LATENCY_TYPES)
    _check_hidden(op, hidden)
    _check_in_flight(op, status, in_flight, "rows", hidden * dtype.itemsize, world_size)
    return (
        in_flight.new_empty((topk_idx.shape[0], hidden), dtype=dtype),
        in_flight.new_empty(world_size, dtype=torch.int64),
    )


@_fake("ep::zero_after")
def _zero_after(dep: Tensor) -> Tensor:
    return dep.new_empty(())


@_fake("ep::grouped_mm")
def _grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    op = "ep::grouped_mm"
    if a.dim() != 2 or b.dim() != 3 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{op}: expected a of shape [m, k] and b of shape [groups, k, n], got {list(a.shape)} and {list(b.shape)}"
        )
    _check_factors(op, a, "b", b)
    _check_tensor(op, "offsets", offsets, (b.shape[0],), a, _GROUPS)
    _check_type(op, "offsets", offsets, (torch.int32,))
    return a.new_empty(a.shape[0], b.shape[2])


@_fake("ep::grouped_mm.transpose")
def _grouped_mm_transpose(a: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
    op = "ep::grouped_mm"
    if a.dim() != 2 or g.dim() != 2 or a.shape[0] != g.shape[0]:
        raise ValueError(
            f"{op}: expected a of shape [m, k] and g of shape [m, n], got {list(a.shape)} and {list(g.shape)}"
        )
    _check_factors(op, a, "g", g)
    _check_tensor(op, "offsets", offsets, ("groups",), a, _GROUPS)
    _check_type(op, "offsets", offsets, (torch.int32,))
    return a.new_empty(offsets.shape[0], a.shape[1], g.shape[1])


def _check_factors(op: str, a: Tensor, name: str, t: Tensor) -> None:
    if t.dtype != a.dtype:
        raise TypeError(f"{op}: expected {name} of dtype {_type_name(a)}, that of a, got {_type_name(t)}")
    if t.device != a.device:
        raise ValueError(f"{op}: expected {name} on {a.device}, got {t.device}")
