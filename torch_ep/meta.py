"""Every fake: what a compiler sees of an operator. The same shapes, dtypes, devices and errors as the kernels'.

The messages are those of `csrc/checks.h` and its callers; `test/test_errors.py` runs both over one table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import SymInt, Tensor

from .comm import communicators

_SUM_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
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


def _type_name(t: Tensor) -> str:
    return _TYPE_NAMES.get(t.dtype, str(t.dtype))


def _check_tensor(op: str, name: str, t: Tensor, shape: Sequence[Size], device_of: Tensor) -> None:
    """-1 in `shape`: any size."""

    def message() -> str:
        return f"{op}: expected {name} of shape {list(shape)} (-1: any size), got {list(t.shape)}"

    torch._check_value(t.dim() == len(shape), message)
    for want, got in zip(shape, t.shape, strict=True):
        if not (isinstance(want, int) and want < 0):
            torch._check_value(want == got, message)  # between symbols this becomes a guard or a run-time check
    if t.device != device_of.device:
        raise ValueError(f"{op}: expected {name} on {device_of.device}, got {t.device}")
    if not t.is_contiguous():
        raise ValueError(f"{op}: expected contiguous {name}, got strides {list(t.stride())}")


def _check_type(op: str, name: str, t: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if t.dtype not in allowed:
        names = [_TYPE_NAMES[dtype] for dtype in allowed]
        listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
        raise TypeError(f"{op}: expected {name} of dtype {listed}, got {_type_name(t)}")


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
            f"{op}: expected an initialised group, got group '{group_name}': "
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
    expert_major = _check_layout(op, layout)
    _check_tensor(op, "topk_idx", topk_idx, (-1, -1), topk_idx)
    _check_type(op, "topk_idx", topk_idx, (torch.int32, torch.int64))
    if topk_idx.shape[1] == 0:
        raise ValueError(f"{op}: expected at least one expert a token, got topk_idx of shape {list(topk_idx.shape)}")
    if world_size <= 0:
        raise ValueError(f"{op}: expected a positive world_size, got {world_size}")
    if num_experts <= 0 or num_experts % world_size:
        raise ValueError(
            f"{op}: expected num_experts to be a positive multiple of the world size {world_size}, got {num_experts}"
        )
    if alignment <= 0:
        raise ValueError(f"{op}: expected a positive alignment, got {alignment}")
    if not expert_major and alignment != 1:
        raise ValueError(f"{op}: expected alignment 1 with layout 'rank_major', got {alignment}")
    if isinstance(capacity, int) and (capacity < 0 or capacity % alignment or capacity >= 2**31):
        raise ValueError(
            f"{op}: expected a capacity from 0 to 2**31 - 1 that is a multiple of the alignment {alignment}, "
            f"got {capacity}"
        )
    _check_group(op, group_name, world_size)
    _check_limit(op, group_name, "num_topk", topk_idx.shape[1])
    _check_limit(op, group_name, "num_experts", num_experts)
    # A symbolic number is left to the kernel, which tells the other ranks; a guard would fail here alone and they wait.
    num_tokens = topk_idx.shape[0]
    if max_tokens_per_rank is not None and isinstance(num_tokens, int) and num_tokens > max_tokens_per_rank:
        raise ValueError(f"{op}: expected at most max_tokens_per_rank = {max_tokens_per_rank} tokens, got {num_tokens}")
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


@torch.library.register_fake("ep::plan")
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
    # With one rank its own tokens bound what arrives; with several only `max_tokens_per_rank` does.
    tokens = topk_idx.shape[0] if world_size == 1 else max_tokens_per_rank
    if tokens is not None:
        bound = world_size * tokens
        if expert_major:
            num_local_experts = num_experts // world_size
            bound = bound * min(topk_idx.shape[1], num_local_experts) + num_local_experts * (alignment - 1)
        torch._check(rows <= bound)
    return _plan_result(topk_idx, rows, num_experts, world_size, expert_major)


@torch.library.register_fake("ep::plan.capacity")
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
    send_slot: Tensor,
    send_counts: Tensor,
    recv_counts: Tensor,
    recv_map: Tensor,
    layout: str,
    group_name: str,
) -> None:
    expert_major = _check_layout(op, layout)
    _check_tensor(op, "send_slot", send_slot, (-1, -1), send_slot)
    _check_type(op, "send_slot", send_slot, (torch.int32,))
    _check_tensor(op, "send_counts", send_counts, (-1,), send_slot)
    _check_type(op, "send_counts", send_counts, (torch.int32,))
    _check_tensor(op, "recv_counts", recv_counts, send_counts.shape, send_slot)
    _check_type(op, "recv_counts", recv_counts, (torch.int32,))
    if expert_major:
        _check_tensor(op, "recv_slot", recv_map, (-1,), send_slot)
        _check_type(op, "recv_slot", recv_map, (torch.int32,))
    else:
        _check_tensor(op, "recv_topk_idx", recv_map, (-1, send_slot.shape[1]), send_slot)


def _check_payloads(
    op: str,
    name: str,
    rows: Tensor,
    num_rows: Size,
    topk_weights: Tensor | None,
    weights_shape: Sequence[Size],
    scales: Tensor | None,
    device_of: Tensor,
) -> None:
    _check_tensor(op, name, rows, (num_rows, -1), device_of)
    if topk_weights is not None:
        _check_tensor(op, "topk_weights", topk_weights, weights_shape, device_of)
        _check_type(op, "topk_weights", topk_weights, _SUM_TYPES)
    if scales is not None:
        _check_tensor(op, "scales", scales, (num_rows, -1), device_of)


@torch.library.register_fake("ep::dispatch")
def _dispatch(
    x: Tensor,
    topk_weights: Tensor | None,
    scales: Tensor | None,
    send_slot: Tensor,
    send_counts: Tensor,
    recv_counts: Tensor,
    recv_map: Tensor,
    layout: str,
    group_name: str,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    op = "ep::dispatch"
    _check_plan_tensors(op, send_slot, send_counts, recv_counts, recv_map, layout, group_name)
    _check_payloads(op, "x", x, send_slot.shape[0], topk_weights, send_slot.shape, scales, send_slot)
    _check_type(op, "x", x, (*_SUM_TYPES, torch.float8_e4m3fn))
    _check_group(op, group_name, send_counts.shape[0])
    _check_limit(op, group_name, "hidden", x.shape[1])
    rows = recv_map.shape[0]
    return (
        x.new_empty(rows, x.shape[1]),
        None if topk_weights is None else topk_weights.new_empty(recv_map.shape),
        None if scales is None else scales.new_empty(rows, scales.shape[1]),
    )


@torch.library.register_fake("ep::combine")
def _combine(
    y: Tensor,
    topk_weights: Tensor | None,
    scales: Tensor | None,
    send_slot: Tensor,
    send_counts: Tensor,
    recv_counts: Tensor,
    recv_map: Tensor,
    layout: str,
    group_name: str,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    op = "ep::combine"
    _check_plan_tensors(op, send_slot, send_counts, recv_counts, recv_map, layout, group_name)
    _check_payloads(op, "y", y, recv_map.shape[0], topk_weights, recv_map.shape, scales, send_slot)
    _check_type(op, "y", y, _SUM_TYPES)
    if scales is not None:
        _check_type(op, "scales", scales, _SUM_TYPES)
    _check_group(op, group_name, send_counts.shape[0])
    _check_limit(op, group_name, "hidden", y.shape[1])
    num_tokens = send_slot.shape[0]
    return (
        y.new_empty(num_tokens, y.shape[1]),
        None if topk_weights is None else topk_weights.new_empty(send_slot.shape),
        None if scales is None else scales.new_empty(num_tokens, scales.shape[1]),
    )


@torch.library.register_fake("ep::combine.weighted")
def _combine_weighted(
    y: Tensor,
    row_weights: Tensor,
    send_slot: Tensor,
    send_counts: Tensor,
    recv_counts: Tensor,
    recv_map: Tensor,
    layout: str,
    group_name: str,
    after: Tensor | None = None,
) -> Tensor:
    op = "ep::combine"
    _check_plan_tensors(op, send_slot, send_counts, recv_counts, recv_map, layout, group_name)
    _check_payloads(op, "y", y, recv_map.shape[0], None, (), None, send_slot)
    _check_type(op, "y", y, _SUM_TYPES)
    _check_tensor(op, "row_weights", row_weights, (recv_map.shape[0],), send_slot)
    _check_type(op, "row_weights", row_weights, _SUM_TYPES)
    _check_group(op, group_name, send_counts.shape[0])
    _check_limit(op, group_name, "hidden", y.shape[1])
    return y.new_empty(send_slot.shape[0], y.shape[1])


@torch.library.register_fake("ep::zero_after")
def _zero_after(dep: Tensor) -> Tensor:
    return dep.new_empty(())


@torch.library.register_fake("ep::grouped_mm")
def _grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    op = "ep::grouped_mm"
    if a.dim() != 2 or b.dim() != 3 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{op}: expected a of shape [m, k] and b of shape [groups, k, n], got {list(a.shape)} and {list(b.shape)}"
        )
    _check_same_type(op, "b", b, a)
    _check_tensor(op, "offsets", offsets, (b.shape[0],), a)
    _check_type(op, "offsets", offsets, (torch.int32,))
    return a.new_empty(a.shape[0], b.shape[2])


@torch.library.register_fake("ep::grouped_mm.transpose")
def _grouped_mm_transpose(a: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
    op = "ep::grouped_mm"
    if a.dim() != 2 or g.dim() != 2 or a.shape[0] != g.shape[0]:
        raise ValueError(
            f"{op}: expected a of shape [m, k] and g of shape [m, n], got {list(a.shape)} and {list(g.shape)}"
        )
    _check_same_type(op, "g", g, a)
    _check_tensor(op, "offsets", offsets, (-1,), a)
    _check_type(op, "offsets", offsets, (torch.int32,))
    return a.new_empty(offsets.shape[0], a.shape[1], g.shape[1])


def _check_same_type(op: str, name: str, t: Tensor, a: Tensor) -> None:
    if t.dtype != a.dtype:
        raise TypeError(f"{op}: expected {name} of dtype {_type_name(a)}, that of a, got {_type_name(t)}")
