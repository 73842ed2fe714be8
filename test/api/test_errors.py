"""Every message about a bad argument: from the kernel, and the same from the fake. Then everything still works.

What only the device can see is raised on CUDA by the next call; an exact plan waits for its own and raises at once.
Messages about peers that are gone: test_failures.py, nvlink/test_nvlink_failures.py. About links and symmetric
memory: nvlink/test_symmetric.py.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.compiling import InductorGraphs
from support.devices import LIMITS, Ranks, needs_cuda, one_rank_on
from support.harness import world
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_ep

ops = torch.ops.ep


class Case(NamedTuple):
    op: Callable
    arguments: dict[str, Any]
    error: type[Exception]
    message: str
    fake: bool = True  # whether the fake sees it too: it knows no values, and takes any strides (see meta.py)
    # On CUDA: what the next call says, # for numbers that no test can know. None: the call itself says `message`.
    later: str | None = None


def topk() -> torch.Tensor:
    return torch.tensor([[0, 2], [3, -1], [1, 0]])


def low_latency_rows(
    x: torch.Tensor, topk_idx: torch.Tensor, num_experts: int = 4, max_tokens_per_rank: int = 3, **options: Any
) -> Any:
    return torch_ep.low_latency_dispatch(
        x, topk_idx, num_experts=num_experts, max_tokens_per_rank=max_tokens_per_rank, **options
    )


def freed(t: torch.Tensor) -> torch.Tensor:
    t.untyped_storage().resize_(0)
    return t


def int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def plan_arguments(**changes: Any) -> dict[str, Any]:
    return {
        "topk_idx": topk(),
        "num_experts": 4,
        "layout": "expert_major",
        "alignment": 1,
        "world_size": 1,
        "group_name": "",
        **changes,
    }


def plan(error: type[Exception], message: str, *, fake: bool = True, **changes: Any) -> Case:
    op = ops.plan.capacity if "capacity" in changes else ops.plan.default
    return Case(op, plan_arguments(**changes), error, f"ep::plan: {message}", fake)


def move_arguments(layout: str) -> dict[str, Any]:
    """The plan of `topk()` on one rank, by the names that dispatch and combine use."""
    names = ("send_row", "send_counts", "recv_counts", "recv_map")
    return {
        **dict(zip(names, ops.plan(**plan_arguments(layout=layout)), strict=False)),
        "layout": layout,
        "group_name": "",
    }


def dispatch(
    message: str,
    *,
    error: type[Exception] = ValueError,
    fake: bool = True,
    later: str | None = None,
    plan_layout: str = "expert_major",
    **changes: Any,
) -> Case:
    given = {"x": torch.ones(3, 4), "topk_weights": None, "scales": None, **move_arguments(plan_layout), **changes}
    return Case(ops.dispatch.default, given, error, f"ep::dispatch: {message}", fake, later)


def combine(
    message: str,
    *,
    error: type[Exception] = ValueError,
    plan_layout: str = "expert_major",
    fake: bool = True,
    **changes: Any,
) -> Case:
    given = {"y": torch.ones(5, 4), "topk_weights": None, "scales": None, **move_arguments(plan_layout), **changes}
    return Case(ops.combine.default, given, error, f"ep::combine: {message}", fake)


def weighted(message: str, *, error: type[Exception] = ValueError, **changes: Any) -> Case:
    given = {"y": torch.ones(5, 4), "row_weights": torch.ones(5), **move_arguments("expert_major"), **changes}
    return Case(ops.combine.weighted, given, error, f"ep::combine: {message}")


def grouped_mm(message: str, *, error: type[Exception] = ValueError, fake: bool = True, **changes: Any) -> Case:
    given = {"a": torch.ones(5, 4), "offsets": torch.tensor([2, 5], dtype=torch.int32), **changes}
    if "g" in given:
        return Case(ops.grouped_mm.transpose, given, error, f"ep::grouped_mm: {message}", fake)
    return Case(ops.grouped_mm.default, {"b": torch.ones(2, 4, 3), **given}, error, f"ep::grouped_mm: {message}", fake)


def low_latency_dispatch(
    message: str,
    *,
    error: type[Exception] = ValueError,
    fake: bool = True,
    told_later: bool = False,
    send: bool = False,
    **changes: Any,
) -> Case:
    given = {
        "x": torch.ones(3, 4),
        "topk_idx": topk(),
        "topk_weights": None,
        "quantize": "",
        "num_experts": 4,
        "max_tokens_per_rank": 3,
        "world_size": 1,
        "group_name": "",
        **changes,
    }
    op = ops.low_latency_dispatch_send if send else ops.low_latency_dispatch
    message = f"ep::low_latency_dispatch: {message}"
    return Case(op.default, given, error, message, fake, message if told_later else None)


def low_latency_combine(
    message: str, *, error: type[Exception] = ValueError, fake: bool = True, **changes: Any
) -> Case:
    given = {
        "y": torch.ones(4, 3, 4),
        "topk_idx": topk(),
        "row_weights": torch.ones(4, 3),
        "recv_row": low_latency_rows(torch.ones(3, 4), topk())[1].recv_row,
        "num_experts": 4,
        "world_size": 1,
        "group_name": "",
        **changes,
    }
    return Case(ops.low_latency_combine.default, given, error, f"ep::low_latency_combine: {message}", fake)


def dispatch_recv(message: str, *, error: type[Exception] = ValueError, fake: bool = True, **changes: Any) -> Case:
    given = {
        "status": torch.tensor([[3], [0]]),
        "in_flight": torch.zeros(3, 48, dtype=torch.uint8),
        "hidden": 4,
        "dtype": torch.float32,
        "num_topk": 2,
        "quantize": "",
        "num_experts": 4,
        "max_tokens_per_rank": 3,
        "world_size": 1,
        "group_name": "",
        **changes,
    }
    return Case(ops.low_latency_dispatch_recv.default, given, error, f"ep::low_latency_dispatch_recv: {message}", fake)


def combine_recv(message: str, *, error: type[Exception] = ValueError, fake: bool = True, **changes: Any) -> Case:
    given = {
        "status": torch.tensor([[3], [0]]),
        "in_flight": torch.zeros(3, 16, dtype=torch.uint8),
        "topk_idx": topk(),
        "hidden": 4,
        "dtype": torch.float32,
        "num_experts": 4,
        "world_size": 1,
        "group_name": "",
        **changes,
    }
    return Case(ops.low_latency_combine_recv.default, given, error, f"ep::low_latency_combine_recv: {message}", fake)


EXPANDED = torch.zeros(1, dtype=torch.int64).expand(4)
FLOATS = "dtype Double, Float, BFloat16 or Half"

CASES = {
    "plan-layout": plan(ValueError, "expected layout 'rank_major' or 'expert_major', got 'row'", layout="row"),
    "plan-dim": plan(ValueError, "expected topk_idx of shape [num_tokens, num_topk], got [2]", topk_idx=topk()[0]),
    "plan-dtype": plan(TypeError, "expected topk_idx of dtype Int or Long, got Short", topk_idx=topk().to(torch.int16)),
    "plan-strides": plan(
        ValueError, "expected contiguous topk_idx, got strides [1, 2]", topk_idx=topk().t(), fake=False
    ),
    "plan-no-slot": plan(
        ValueError,
        "expected at least one expert per token, got 0",
        topk_idx=topk().new_empty(3, 0),
    ),
    "plan-world_size": plan(ValueError, "expected a positive world_size, got 0", world_size=0),
    "plan-num_experts": plan(
        ValueError, "expected num_experts to be a positive multiple of the world size 1, got 0", num_experts=0
    ),
    "plan-indivisible": plan(
        ValueError,
        "expected num_experts to be a positive multiple of the world size 2, got 5",
        num_experts=5,
        world_size=2,
    ),
    "plan-alignment": plan(ValueError, "expected a positive alignment, got 0", alignment=0),
    "plan-alignment-rank_major": plan(
        ValueError, "expected alignment 1 with layout 'rank_major', got 8", alignment=8, layout="rank_major"
    ),
    "plan-alignment-large": plan(
        ValueError, f"expected alignment of at most {2**30 // 4}, got {2**62}", alignment=2**62
    ),
    "plan-num_experts-large": plan(
        ValueError, f"expected num_experts of at most {2**24}, got {2**24 + 1}", num_experts=2**24 + 1
    ),
    "plan-num_topk-large": plan(
        ValueError, "expected num_topk of at most 65535, got 65536", topk_idx=topk().new_empty(0, 2**16)
    ),
    "plan-freed": plan(
        ValueError,
        "expected topk_idx with a storage of at least 48 bytes, got 0: its memory was freed, as FSDP frees that of "
        "parameters: pass it while it is there",
        topk_idx=freed(topk()),
        fake=False,
    ),
    "plan-capacity": plan(
        ValueError,
        "expected a capacity from 0 to 2**31 - 1 that is a multiple of the alignment 1, got -1",
        capacity=-1,
    ),
    "plan-capacity-unaligned": plan(
        ValueError,
        "expected a capacity from 0 to 2**31 - 1 that is a multiple of the alignment 4, got 6",
        capacity=6,
        alignment=4,
    ),
    "plan-max_tokens_per_rank": plan(
        ValueError, "expected at most max_tokens_per_rank = 2 tokens, got 3", max_tokens_per_rank=2
    ),
    "plan-group": plan(
        RuntimeError,
        "expected an initialized group, got group 'nowhere': call torch_ep.init(group) on every rank first",
        world_size=2,
        group_name="nowhere",
    ),
    "plan-index-high": plan(
        ValueError, "expected topk_idx in [-1, 3), got 3 at token 1, slot 0", num_experts=3, fake=False
    ),
    "plan-index-low": plan(
        ValueError,
        "expected topk_idx in [-1, 4), got -2 at token 0, slot 1",
        topk_idx=topk() - topk().eq(2) * 4,
        fake=False,
    ),
    "plan-duplicate": plan(
        ValueError,
        "expected different experts in one token, got expert 1 at token 2, slots 0 and 1",
        topk_idx=topk() + topk().eq(0).int(),
        fake=False,
    ),
    "dispatch-layout": dispatch("expected layout 'rank_major' or 'expert_major', got 'expert'", layout="expert"),
    "dispatch-tokens": dispatch(
        "expected x of shape [3, hidden], one row per token of the plan, got [2, 4]"
        ": pass the tokens of the plan's topk_idx",
        x=torch.ones(2, 4),
    ),
    "dispatch-dim": dispatch(
        "expected x of shape [3, hidden], one row per token of the plan, got [3, 4, 1]"
        ": pass the tokens of the plan's topk_idx",
        x=torch.ones(3, 4, 1),
    ),
    "dispatch-dtype": dispatch(
        f"expected x of {FLOATS.replace(' or Half', ', Half')}, Float8_e4m3fn, Float8_e5m2 or Byte, got Long",
        error=TypeError,
        x=torch.ones(3, 4, dtype=torch.int64),
    ),
    "dispatch-strides": dispatch("expected contiguous x, got strides [1, 3]", x=torch.ones(4, 3).t(), fake=False),
    "dispatch-weights": dispatch(
        "expected topk_weights of shape [3, 2], one per token and slot of the plan, got [3, 3]"
        ": pass the weights of the plan's topk_idx",
        topk_weights=torch.ones(3, 3),
    ),
    "dispatch-weights-dtype": dispatch(
        f"expected topk_weights of {FLOATS}, got Int",
        error=TypeError,
        topk_weights=torch.ones(3, 2, dtype=torch.int32),
    ),
    "dispatch-scales": dispatch(
        "expected scales of shape [3, n], one row per token of the plan, got [4, 1]"
        ": pass the tokens of the plan's topk_idx",
        scales=torch.ones(4, 1),
    ),
    "dispatch-send_row": dispatch(
        "expected send_row of dtype Int, got Long", error=TypeError, send_row=torch.zeros(3, 2, dtype=torch.int64)
    ),
    "dispatch-recv_counts": dispatch(
        "expected recv_counts of shape [1], got [2]: pass the plan as torch_ep.plan returned it",
        recv_counts=torch.zeros(2, dtype=torch.int32),
    ),
    "dispatch-recv_pair": dispatch(
        "expected recv_pair of shape [num_rows], got [5, 1]: pass the plan as torch_ep.plan returned it",
        recv_map=torch.zeros(5, 1, dtype=torch.int32),
    ),
    "dispatch-recv_topk_idx": dispatch(
        "expected recv_topk_idx of shape [num_rows, 2], got [3, 1]: pass the plan as torch_ep.plan returned it",
        plan_layout="rank_major",
        recv_map=torch.zeros(3, 1, dtype=torch.int64),
    ),
    "dispatch-send_row-values": dispatch(
        "expected send_row of this plan in [-1, 3), got 3",
        fake=False,
        later="ep::dispatch: expected send_row of this plan in [-1, 3), got 3",
        send_row=torch.tensor([[0, 0], [1, -1], [3, 3]], dtype=torch.int32),
    ),
    "dispatch-send_row-shared": dispatch(
        "expected send_row of this plan to name each row for one token, got tokens 0 and 2 for row 0",
        fake=False,
        send_row=int32([0, 0], [1, -1], [2, 0]),
    ),
    "dispatch-send_row-row-without-token": dispatch(
        "expected send_row of this plan to name each of the 3 rows of send_counts, got no token for row 1",
        fake=False,
        send_row=int32([0, 0], [-1, -1], [2, 2]),
    ),
    "dispatch-send_row-too-few": dispatch(
        "expected send_row of this plan to name each of the 7 rows of send_counts, got 6 slots",
        fake=False,
        send_counts=int32(7),
    ),
    "dispatch-counts-of-one-rank": dispatch(
        "expected send_counts and recv_counts of this plan to be equal on one rank, got 3 and 60",
        fake=False,
        recv_counts=int32(60),
    ),
    "dispatch-no-slot": dispatch(
        "expected at least one expert per token, got 0", send_row=int32([], [], []), recv_map=int32()
    ),
    "dispatch-recv_topk_idx-dtype": dispatch(
        "expected recv_topk_idx of dtype Int or Long, got Float",
        error=TypeError,
        plan_layout="rank_major",
        recv_map=torch.zeros(3, 2),
    ),
    "dispatch-freed": dispatch(
        "expected x with a storage of at least 48 bytes, got 0: its memory was freed, as FSDP frees that of "
        "parameters: pass it while it is there",
        fake=False,
        x=freed(torch.ones(3, 4)),
    ),
    "dispatch-recv_pair-values": dispatch(
        "expected recv_pair of this plan in [-1, 6), got -2",
        fake=False,
        later="ep::dispatch: expected recv_pair of this plan in [-1, 6), got -2",
        recv_map=torch.tensor([0, -2, 1, 2, 4], dtype=torch.int32),
    ),
    "dispatch-counts-values": dispatch(
        "expected send_counts of this plan in [0, 2147483647), got -3",
        fake=False,
        later="ep::dispatch: expected send_row of this plan in [-1, 0), got #",
        send_counts=torch.tensor([-3], dtype=torch.int32),
    ),
    "combine-rows": combine(
        "expected y of shape [5, hidden], one row per row of the dispatch, got [6, 4]"
        ": pass the experts' results for the rows that it returned",
        y=torch.ones(6, 4),
    ),
    "combine-dtype": combine(
        f"expected y of {FLOATS}, got Float8_e4m3fn", error=TypeError, y=torch.ones(5, 4).to(torch.float8_e4m3fn)
    ),
    "combine-send_row-shared": combine(
        "expected send_row of this plan to name each row for one token, got tokens 0 and 1 for row 0",
        fake=False,
        send_row=int32([0, 0], [0, -1], [2, 2]),
    ),
    "combine-strides": combine("expected contiguous y, got strides [0, 0]", y=torch.ones(()).expand(5, 4), fake=False),
    "combine-weights": combine(
        "expected topk_weights of shape [5], as dispatch returned the weights, got [5, 2]"
        ": pass these, or others in their places; to weigh rows pass row_weights=",
        topk_weights=torch.ones(5, 2),
    ),
    "combine-weights-rank_major": combine(
        "expected topk_weights of shape [3, 2], as dispatch returned the weights, got [3]"
        ": pass these, or others in their places; to weigh rows pass row_weights=",
        plan_layout="rank_major",
        y=torch.ones(3, 4),
        topk_weights=torch.ones(3),
    ),
    "combine-scales-dtype": combine(
        f"expected scales of {FLOATS}, got Byte", error=TypeError, scales=torch.ones(5, 1, dtype=torch.uint8)
    ),
    "weighted-shape": weighted(
        "expected row_weights of shape [5], one per row of the dispatch, got [5, 1]"
        ": pass the weights that it returned in layout expert_major",
        row_weights=torch.ones(5, 1),
    ),
    "weighted-dtype": weighted(
        f"expected row_weights of {FLOATS}, got Int", error=TypeError, row_weights=torch.ones(5, dtype=torch.int32)
    ),
    "low_latency-quantize": low_latency_dispatch(
        "expected quantize '', 'fp8', 'fp8_pow2' or 'fp8_ue8m0', got 'int8'", quantize="int8"
    ),
    "low_latency-x": low_latency_dispatch("expected x of shape [num_tokens, hidden], got [4]", x=torch.ones(4)),
    "low_latency-dtype": low_latency_dispatch(
        "expected x of dtype Float, BFloat16 or Half, got Double", error=TypeError, x=torch.ones(3, 4).double()
    ),
    "low_latency-hidden": low_latency_dispatch("expected a positive hidden, got 0", x=torch.ones(3, 0)),
    "low_latency-strides": low_latency_dispatch(
        "expected contiguous x, got strides [1, 3]", x=torch.ones(4, 3).t(), fake=False
    ),
    "low_latency-tokens": low_latency_dispatch(
        "expected topk_idx of shape [2, num_topk], one row per token of x, got [3, 2]"
        ": pass the topk_idx of these tokens",
        x=torch.ones(2, 4),
    ),
    "low_latency-topk_idx": low_latency_dispatch(
        "expected topk_idx of dtype Int or Long, got Short", error=TypeError, topk_idx=topk().to(torch.int16)
    ),
    "low_latency-no-slot": low_latency_dispatch(
        "expected at least one expert per token, got 0", topk_idx=topk().new_empty(3, 0)
    ),
    "low_latency-weights": low_latency_dispatch(
        "expected topk_weights of shape [3, 2], one per entry of topk_idx, got [3, 3]"
        ": pass the weights of that topk_idx",
        topk_weights=torch.ones(3, 3),
    ),
    "low_latency-weights-dtype": low_latency_dispatch(
        "expected topk_weights of dtype Float, got BFloat16", error=TypeError, topk_weights=torch.ones(3, 2).bfloat16()
    ),
    "low_latency-world_size": low_latency_dispatch("expected a positive world_size, got 0", world_size=0),
    "low_latency-num_experts": low_latency_dispatch(
        "expected num_experts to be a positive multiple of the world size 2, got 5", num_experts=5, world_size=2
    ),
    "low_latency-no-room": low_latency_dispatch(
        "expected a positive max_tokens_per_rank, got 0", max_tokens_per_rank=0
    ),
    "low_latency-too-much-room": low_latency_dispatch(
        "expected max_tokens_per_rank of at most 536870911 with world_size 1 and 4 slots per token or local experts, "
        "got 536870912",
        max_tokens_per_rank=2**29,
    ),
    "low_latency-max_tokens_per_rank": low_latency_dispatch(
        "expected at most max_tokens_per_rank = 2 tokens, got 3", max_tokens_per_rank=2
    ),
    "low_latency-group": low_latency_dispatch(
        "expected an initialized group, got group 'nowhere': call torch_ep.init(group) on every rank first",
        error=RuntimeError,
        world_size=2,
        group_name="nowhere",
    ),
    "low_latency-index-high": low_latency_dispatch(
        "expected topk_idx in [-1, 3), got 3 at token 1, slot 0", num_experts=3, fake=False, told_later=True
    ),
    "low_latency-index-low": low_latency_dispatch(
        "expected topk_idx in [-1, 4), got -2 at token 0, slot 1",
        topk_idx=topk() - topk().eq(2) * 4,
        fake=False,
        told_later=True,
    ),
    "low_latency-duplicate": low_latency_dispatch(
        "expected different experts in one token, got expert 1 at token 2, slots 0 and 1",
        topk_idx=topk() + topk().eq(0).int(),
        fake=False,
        told_later=True,
    ),
    "low_latency-send": low_latency_dispatch(
        "expected at most max_tokens_per_rank = 2 tokens, got 3", max_tokens_per_rank=2, send=True
    ),
    "low_latency-recv-quantize": dispatch_recv(
        "expected quantize '', 'fp8', 'fp8_pow2' or 'fp8_ue8m0', got 'fp4'", quantize="fp4"
    ),
    "low_latency-recv-num_experts": dispatch_recv(
        "expected num_experts to be a positive multiple of the world size 1, got 0", num_experts=0
    ),
    "low_latency-recv-dtype": dispatch_recv(
        "expected rows of dtype Float, BFloat16 or Half, got Double", error=TypeError, dtype=torch.float64
    ),
    "low_latency-recv-hidden": dispatch_recv("expected a positive hidden, got 0", hidden=0),
    "low_latency-recv-hidden-large": dispatch_recv(
        f"expected hidden of at most {2**31 - 1}, got {2**62}", hidden=2**62
    ),
    "low_latency-recv-num_topk-large": dispatch_recv("expected num_topk of at most 65535, got 65536", num_topk=2**16),
    "low_latency-recv-world_size-large": dispatch_recv(
        f"expected num_experts of at most {2**24}, got {2**40}", num_experts=2**40, world_size=2**40
    ),
    "low_latency-recv-status": dispatch_recv(
        "expected status of shape [2, 1], got [2, 2]: pass what the send returned, whole",
        status=torch.zeros(2, 2, dtype=torch.int64),
    ),
    "low_latency-recv-status-dtype": dispatch_recv(
        "expected status of dtype Long, got Int", error=TypeError, status=torch.zeros(2, 1, dtype=torch.int32)
    ),
    "low_latency-recv-in_flight": dispatch_recv(
        "expected in_flight of shape [3, 64], got [3, 48]: pass what the send returned, whole", hidden=8
    ),
    "low_latency-recv-in_flight-dtype": dispatch_recv(
        "expected in_flight of dtype Byte, got Char", error=TypeError, in_flight=torch.zeros(3, 48, dtype=torch.int8)
    ),
    "low_latency-recv-counts": dispatch_recv(
        "expected status and in_flight of one send, got [4] rows by the status and 3 in flight",
        status=torch.tensor([[4], [0]]),
        fake=False,
    ),
    "low_latency-recv-counts-negative": dispatch_recv(
        "expected status and in_flight of one send, got [-1] rows by the status and 3 in flight",
        status=torch.tensor([[-1], [0]]),
        fake=False,
    ),
    "low_latency-recv-same-token": dispatch_recv(
        "expected tokens of in_flight that grow from row to row of a source rank, got 0 after 0",
        in_flight=int32(*[[0] * 4 + [0, 0, 1] + [0] * 5] * 3).view(torch.uint8),
        fake=False,
    ),
    "low_latency-recv-same-expert": dispatch_recv(
        "expected different experts in one row of in_flight, got expert 2 twice",
        in_flight=int32(*[[0] * 4 + [token, 2, 2] + [0] * 5 for token in range(3)]).view(torch.uint8),
        fake=False,
    ),
    "low_latency-recv-tokens": dispatch_recv(
        "expected tokens of in_flight in [0, 3), got 3",
        in_flight=torch.full((3, 12), 3, dtype=torch.int32).view(torch.uint8),
        fake=False,
    ),
    "low_latency-recv-experts": dispatch_recv(
        "expected experts of in_flight in [-1, 4), got 4",
        in_flight=torch.tensor([[0] * 5 + [4] + [0] * 6] * 3, dtype=torch.int32).view(torch.uint8),
        fake=False,
    ),
    "low_latency-combine-num_experts": low_latency_combine(
        "expected num_experts to be a positive multiple of the world size 2, got 5", num_experts=5, world_size=2
    ),
    "low_latency-combine-recv_row": low_latency_combine(
        "expected recv_row of dtype Int, got Long", error=TypeError, recv_row=torch.zeros(3, 2, dtype=torch.int64)
    ),
    "low_latency-combine-room": low_latency_combine(
        "expected recv_row to have the same number of rows for each of 2 ranks, got 3", world_size=2
    ),
    "low_latency-combine-y": low_latency_combine(
        "expected y of shape [4, 3, hidden], as low_latency_dispatch returned the rows, got [4, 2, 4]"
        ": pass the experts' results in their places",
        y=torch.ones(4, 2, 4),
    ),
    "low_latency-combine-dtype": low_latency_combine(
        "expected y of dtype Float, BFloat16 or Half, got Float8_e4m3fn",
        error=TypeError,
        y=torch.ones(4, 3, 4).to(torch.float8_e4m3fn),
    ),
    "low_latency-combine-hidden": low_latency_combine("expected a positive hidden, got 0", y=torch.ones(4, 3, 0)),
    "low_latency-combine-strides": low_latency_combine(
        "expected contiguous y, got strides [0, 0, 0]", y=torch.ones(()).expand(4, 3, 4), fake=False
    ),
    "low_latency-combine-weights": low_latency_combine(
        "expected row_weights of shape [4, 3], got [12]: pass the plan as torch_ep.low_latency_dispatch returned it",
        row_weights=torch.ones(12),
    ),
    "low_latency-combine-weights-dtype": low_latency_combine(
        "expected row_weights of dtype Float, got Half", error=TypeError, row_weights=torch.ones(4, 3).half()
    ),
    "low_latency-combine-slots": low_latency_combine(
        "expected topk_idx of shape [num_tokens, 2], got [3, 1]"
        ": pass the plan as torch_ep.low_latency_dispatch returned it",
        topk_idx=topk()[:, :1].contiguous(),
    ),
    "low_latency-combine-tokens": low_latency_combine(
        "expected at most max_tokens_per_rank = 3 tokens, got 6", topk_idx=torch.cat([topk(), topk()])
    ),
    "low_latency-combine-index": low_latency_combine(
        "expected topk_idx in [-1, 4), got 4 at token 1, slot 0", topk_idx=topk() + topk().eq(3).int(), fake=False
    ),
    "low_latency-combine-recv_row-values": low_latency_combine(
        "expected recv_row in [-1, 12), got 12",
        recv_row=torch.tensor([[0, 6], [9, -1], [12, 1]], dtype=torch.int32),
        fake=False,
    ),
    "low_latency-combine-recv_row-negative": low_latency_combine(
        "expected recv_row in [-1, 12), got -2",
        recv_row=torch.tensor([[0, 6], [9, -2], [3, 1]], dtype=torch.int32),
        fake=False,
    ),
    "low_latency-combine-other-plan": low_latency_combine(
        "expected topk_idx and recv_row of one dispatch, got 3 tokens with experts and 2 with rows",
        recv_row=torch.tensor([[0, 6], [-1, -1], [3, 1]], dtype=torch.int32),
        fake=False,
    ),
    "low_latency-combine-recv-dtype": combine_recv(
        "expected rows of dtype Float, BFloat16 or Half, got Byte", error=TypeError, dtype=torch.uint8
    ),
    "low_latency-combine-recv-in_flight": combine_recv(
        "expected in_flight of shape [rows, 32], got [3, 16]: pass what the send returned, whole", hidden=8
    ),
    "low_latency-combine-recv-topk_idx": combine_recv(
        "expected topk_idx of dtype Int or Long, got Short", error=TypeError, topk_idx=topk().to(torch.int16)
    ),
    "low_latency-combine-recv-tokens": combine_recv(
        "expected the topk_idx of the send, by which as many rows come from each rank, got one by which 2 come "
        "from rank 0, where 3 came",
        topk_idx=topk()[:2].contiguous(),
        fake=False,
    ),
    "grouped_mm-shape": grouped_mm(
        "expected a of shape [m, k] and b of shape [groups, k, n], got [5, 4] and [2, 5, 3]", b=torch.ones(2, 5, 3)
    ),
    "grouped_mm-dtype": grouped_mm(
        "expected b of dtype Float, that of a, got Double", error=TypeError, b=torch.ones(2, 4, 3).double()
    ),
    "grouped_mm-freed": grouped_mm(
        "expected b with a storage of at least 96 bytes, got 0: its memory was freed, as FSDP frees that of "
        "parameters: pass it while it is there",
        b=freed(torch.ones(2, 4, 3)),
        fake=False,
    ),
    "grouped_mm-device": grouped_mm("expected b on cpu, got meta", b=torch.ones(2, 4, 3, device="meta"), fake=False),
    "grouped_mm-offsets": grouped_mm(
        "expected offsets of shape [2], one end per group, got [1]", offsets=torch.zeros(1, dtype=torch.int32)
    ),
    "grouped_mm-offsets-values": grouped_mm(
        "expected offsets that grow from 0 to at most 5, got 6 after 2",
        offsets=torch.tensor([2, 6], dtype=torch.int32),
        fake=False,
    ),
    "grouped_mm-transpose": grouped_mm(
        "expected a of shape [m, k] and g of shape [m, n], got [5, 4] and [4, 3]", g=torch.ones(4, 3)
    ),
    "grouped_mm-transpose-dtype": grouped_mm(
        "expected g of dtype Float, that of a, got Half", error=TypeError, g=torch.ones(5, 3).half()
    ),
}

# Of what c10d has in flight, of values that nvlink does not look at (see "On one GPU" below), or of tensors that cannot
# go to another device.
C10D_ONLY = (
    "plan-freed",
    "dispatch-freed",
    "grouped_mm-freed",
    "grouped_mm-device",
    "dispatch-send_row-shared",
    "dispatch-send_row-row-without-token",
    "dispatch-send_row-too-few",
    "dispatch-counts-of-one-rank",
    "combine-send_row-shared",
    "low_latency-recv-counts-negative",
    "low_latency-recv-same-token",
    "low_latency-recv-same-expert",
    "low_latency-recv-counts",
    "low_latency-recv-tokens",
    "low_latency-recv-experts",
    "low_latency-combine-index",
    "low_latency-combine-recv_row-values",
    "low_latency-combine-recv_row-negative",
    "low_latency-combine-other-plan",
    "low_latency-combine-recv-tokens",
)


def on(device: str, value: Any) -> Any:
    """A tensor on that device, with its strides, of which a copy keeps no 0; other values as they are."""
    if not isinstance(value, torch.Tensor) or device == "cpu":
        return value
    moved = value.to(device)
    return moved if moved.stride() == value.stride() else moved.as_strided(value.shape, value.stride())


def what_comes_later(device: str) -> str:
    """The first line of what the device found and the next call raises."""
    torch.cuda.synchronize()
    with pytest.raises((ValueError, dist.DistError)) as raised:
        torch_ep.plan(topk().to(device), 4)
    return str(raised.value).splitlines()[0]


@pytest.mark.parametrize("name", CASES)
def test_kernel(device: str, name: str) -> None:
    if device == "cuda" and name in C10D_ONLY:
        pytest.skip("only c10d can say this")
    case = CASES[name]
    arguments = {name: on(device, value) for name, value in case.arguments.items()}
    if device == "cuda" and case.later is not None:
        case.op(**arguments)
        assert re.fullmatch(re.escape(case.later).replace(r"\#", r"\d+"), what_comes_later(device))
    else:
        with pytest.raises(case.error) as raised:
            case.op(**arguments)
        assert str(raised.value).splitlines()[0] == case.message
    x, topk_idx = torch.arange(12.0, device=device).view(3, 4), topk().to(device)
    sums = x * torch.tensor([[2.0], [1], [2]], device=device)
    p = torch_ep.plan(topk_idx, 4)
    assert torch.equal(torch_ep.combine(torch_ep.dispatch(x, p), p), sums)
    assert torch.equal(torch_ep.low_latency_combine(*low_latency_rows(x, topk_idx)), sums)


@pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.fake], ids=[name for name, case in CASES.items() if case.fake]
)
def test_fake_raises_the_same_error(case: Case) -> None:
    with FakeTensorMode() as mode, pytest.raises(case.error) as raised:
        case.op(**{k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in case.arguments.items()})
    assert str(raised.value).splitlines()[0] == case.message


@pytest.mark.parametrize("name", ["plan-strides", "dispatch-strides", "low_latency-combine-strides"])
def test_strides_are_said_when_compiled_too(name: str) -> None:
    case = CASES[name]
    with pytest.raises(ValueError) as raised:
        torch.compile(lambda: case.op(**case.arguments), fullgraph=True, backend=InductorGraphs())()
    assert str(raised.value).splitlines()[0] == case.message


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("low_latency")])
def test_operators_of_torch_say_the_same(name: str) -> None:
    # The way of other devices than the CPU.
    ops._force_aten(True)
    try:
        with pytest.raises(CASES[name].error) as raised:
            CASES[name].op(**CASES[name].arguments)
    finally:
        ops._force_aten(False)
    assert str(raised.value).splitlines()[0] == CASES[name].message


def test_devices_differ() -> None:
    given = move_arguments("expert_major")
    with FakeTensorMode() as mode, pytest.raises(ValueError) as raised:
        plan_tensors = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        ops.dispatch(x=torch.empty(3, 4, device="cuda"), topk_weights=None, scales=None, **plan_tensors)
    assert str(raised.value) == "ep::dispatch: expected x on cpu, got cuda:0"


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens_per_rank", 0), ("hidden", -1), ("num_topk", 0), ("num_experts", 0), ("low_latency_tokens", 0)],
)
def test_init_limits(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"torch_ep.init: expected a positive {name} or None, got {value}"):
        torch_ep.init(**{name: value})


@pytest.mark.parametrize("name", ["max_tokens_per_rank", "hidden", "num_topk", "num_experts", "low_latency_tokens"])
def test_init_types(name: str) -> None:
    with pytest.raises(TypeError, match=f"torch_ep.init: expected {name} to be an int or None, got float"):
        torch_ep.init(**{name: 4.5})
    with pytest.raises(TypeError, match=r"torch_ep.init: expected timeout to be a datetime.timedelta, got int"):
        torch_ep.init(timeout=5)


def test_a_plan_of_another_kind() -> None:
    x, idx = torch.ones(2, 4), torch.tensor([[0], [1]])
    plan = torch_ep.plan(idx, 2)
    rows, low_latency_plan = low_latency_rows(x, idx, 2, 2)
    calls: list[tuple[str, Callable]] = [
        ("ep::dispatch: expected x to be a Tensor, got Plan", lambda: torch_ep.dispatch(plan, x)),
        ("ep::dispatch: expected plan to be a torch_ep.Plan, got tuple", lambda: torch_ep.dispatch(x, tuple(plan))),
        (
            "ep::dispatch: expected plan to be a torch_ep.Plan, got LowLatencyPlan",
            lambda: torch_ep.dispatch(x, low_latency_plan),
        ),
        (
            "ep::combine: expected plan to be a torch_ep.Plan, got LowLatencyPlan",
            lambda: torch_ep.combine(x, low_latency_plan),
        ),
        (
            "ep::combine: expected plan to be a torch_ep.Plan, got list",
            lambda: torch_ep.combine(x, [], row_weights=torch.ones(2)),
        ),
        (
            "ep::low_latency_combine: expected plan to be a torch_ep.LowLatencyPlan, got Plan",
            lambda: torch_ep.low_latency_combine(rows, plan),
        ),
        (
            "ep::low_latency_combine: expected plan to be a torch_ep.LowLatencyPlan, got Plan",
            lambda: torch_ep.low_latency_combine_send(rows, plan),
        ),
        (
            "ep::low_latency_dispatch_recv: expected in_flight to be a torch_ep.InFlightDispatch, got InFlightCombine",
            lambda: torch_ep.low_latency_dispatch_recv(torch_ep.low_latency_combine_send(rows, low_latency_plan)),
        ),
        (
            "ep::low_latency_combine_recv: expected in_flight to be a torch_ep.InFlightCombine, got tuple",
            lambda: torch_ep.low_latency_combine_recv(()),
        ),
    ]
    for message, call in calls:
        with pytest.raises(TypeError) as raised:
            call()
        assert str(raised.value) == message


def plan_of_topk() -> torch_ep.Plan:
    return torch_ep.plan(topk(), 4)


def low_latency_plan() -> Any:
    return low_latency_rows(torch.ones(3, 4), topk())[1]


def in_flight() -> torch_ep.InFlightDispatch:
    return torch_ep.low_latency_dispatch_send(torch.ones(3, 4), topk(), num_experts=4, max_tokens_per_rank=3)


# Calls with an argument of another Python type than its own, or that Python alone can tell is out of its range.
PYTHON_TYPES: dict[str, tuple[Callable, type[Exception], str]] = {
    "list": (
        lambda: torch_ep.plan([[0, 1]] * 10_000, 4),
        TypeError,
        "ep::plan: expected topk_idx to be a Tensor, got list: pass torch.tensor(...)",
    ),
    "numpy": (
        lambda: torch_ep.plan(topk().numpy(), 4),
        TypeError,
        "ep::plan: expected topk_idx to be a Tensor, got ndarray: pass torch.from_numpy(...)",
    ),
    "num_experts-bool": (
        lambda: torch_ep.plan(topk(), True),
        TypeError,
        "ep::plan: expected num_experts to be an int, got bool",
    ),
    "capacity-float": (
        lambda: torch_ep.plan(topk(), 4, capacity=4.5),
        TypeError,
        "ep::plan: expected capacity to be an int, got float",
    ),
    "alignment-huge": (
        lambda: torch_ep.plan(topk(), 4, alignment=10**5000),
        ValueError,
        "ep::plan: expected alignment of at most 64 bits, got an int of 16610 bits",
    ),
    "layout": (
        lambda: torch_ep.plan(topk(), 4, layout=None),
        TypeError,
        "ep::plan: expected layout 'rank_major' or 'expert_major', got NoneType",
    ),
    "after": (
        lambda: torch_ep.plan(topk(), 4, after=1),
        TypeError,
        "ep::plan: expected after to be a Tensor or None, got int",
    ),
    "x-tuple": (
        lambda: torch_ep.dispatch((1.0, 2.0), plan_of_topk()),
        TypeError,
        "ep::dispatch: expected x to be a Tensor, got tuple: pass torch.tensor(...)",
    ),
    "topk_weights-list": (
        lambda: torch_ep.dispatch(torch.ones(3, 4), plan_of_topk(), topk_weights=[0.5]),
        TypeError,
        "ep::dispatch: expected topk_weights to be a Tensor or None, got list: pass torch.tensor(...)",
    ),
    "scales-float": (
        lambda: torch_ep.dispatch(torch.ones(3, 4), plan_of_topk(), scales=0.5),
        TypeError,
        "ep::dispatch: expected scales to be a Tensor or None, got float",
    ),
    "sparse": (
        lambda: torch_ep.dispatch(torch.ones(3, 4).to_sparse(), plan_of_topk()),
        TypeError,
        "ep::dispatch: expected x to be a dense Tensor, got one of layout torch.sparse_coo",
    ),
    "plan.send_row": (
        lambda: torch_ep.dispatch(torch.ones(3, 4), plan_of_topk()._replace(send_row=[0])),
        TypeError,
        "ep::dispatch: expected plan.send_row to be a Tensor, got list: pass torch.tensor(...)",
    ),
    "plan.group_name": (
        lambda: torch_ep.combine(torch.ones(5, 4), plan_of_topk()._replace(group_name=0)),
        TypeError,
        "ep::combine: expected plan.group_name to be a str, got int",
    ),
    "row_weights": (
        lambda: torch_ep.combine(torch.ones(5, 4), plan_of_topk(), row_weights=1.0),
        TypeError,
        "ep::combine: expected row_weights to be a Tensor or None, got float",
    ),
    "low_latency-positional": (
        lambda: torch_ep.low_latency_dispatch(torch.ones(3, 4), topk(), 4, 3),
        TypeError,
        "ep::low_latency_dispatch: expected two positional arguments, x and topk_idx, got 4: pass the others by name, "
        "num_experts= and max_tokens_per_rank= included: their order is another in DeepEP",
    ),
    "low_latency-send-positional": (
        lambda: torch_ep.low_latency_dispatch_send(torch.ones(3, 4), topk(), 4, max_tokens_per_rank=3),
        TypeError,
        "ep::low_latency_dispatch_send: expected two positional arguments, x and topk_idx, got 3: pass the others by "
        "name, num_experts= and max_tokens_per_rank= included: their order is another in DeepEP",
    ),
    "low_latency-num_experts": (
        lambda: low_latency_rows(torch.ones(3, 4), topk(), 4.0),
        TypeError,
        "ep::low_latency_dispatch: expected num_experts to be an int, got float",
    ),
    "low_latency-quantize": (
        lambda: low_latency_rows(torch.ones(3, 4), topk(), quantize=8),
        TypeError,
        "ep::low_latency_dispatch: expected quantize 'fp8', 'fp8_pow2', 'fp8_ue8m0' or None, got int",
    ),
    "low_latency-statistics": (
        lambda: low_latency_rows(torch.ones(3, 4), topk(), statistics=(1, 2)),
        TypeError,
        "ep::low_latency_dispatch: expected statistics to be a torch_ep.LowLatencyStatistics or None, got tuple",
    ),
    "low_latency-statistics-expanded": (
        lambda: low_latency_rows(
            torch.ones(3, 4), topk(), statistics=torch_ep.LowLatencyStatistics(EXPANDED, torch.zeros(1).long())
        ),
        ValueError,
        "ep::low_latency_dispatch: expected statistics.tokens_per_expert to be a contiguous tensor that can be added "
        "to in place: make it by torch_ep.LowLatencyStatistics.zeros",
    ),
    "low_latency-statistics-shape": (
        lambda: low_latency_rows(torch.ones(3, 4), topk(), statistics=torch_ep.LowLatencyStatistics.zeros(2)),
        ValueError,
        "ep::low_latency_dispatch: expected statistics.tokens_per_expert of shape [4] and dtype int64 on cpu, got [2] "
        "and int64 on cpu: make them by torch_ep.LowLatencyStatistics.zeros(4, group, device=...)",
    ),
    "low_latency-plan.source_offsets": (
        lambda: torch_ep.low_latency_combine(
            torch.ones(4, 3, 4), low_latency_plan()._replace(source_offsets=torch.zeros(4))
        ),
        ValueError,
        "ep::low_latency_combine: expected plan.source_offsets of shape [num_local_experts, world_size], got [4]: pass "
        "the plan as torch_ep.low_latency_dispatch returned it",
    ),
    "low_latency-in_flight.topk_idx": (
        lambda: torch_ep.low_latency_dispatch_recv(in_flight()._replace(topk_idx=torch.zeros(4))),
        ValueError,
        "ep::low_latency_dispatch_recv: expected in_flight.topk_idx of shape [num_tokens, num_topk], got [4]: pass the "
        "tuple as the send returned it",
    ),
    "low_latency-in_flight.hidden": (
        lambda: torch_ep.low_latency_dispatch_recv(in_flight()._replace(hidden=None)),
        TypeError,
        "ep::low_latency_dispatch_recv: expected in_flight.hidden to be an int, got NoneType",
    ),
    "statistics-num_experts": (
        lambda: torch_ep.LowLatencyStatistics.zeros(0),
        ValueError,
        "torch_ep.LowLatencyStatistics.zeros: expected num_experts to be a positive multiple of the world size 1, got "
        "0",
    ),
    "mark_tokens": (
        lambda: torch_ep.mark_tokens([1.0]),
        TypeError,
        "torch_ep.mark_tokens: expected every argument to be a Tensor, got list: pass torch.tensor(...)",
    ),
    "mark_tokens-dim": (
        lambda: torch_ep.mark_tokens(torch.ones(3), dim=1),
        ValueError,
        "torch_ep.mark_tokens: expected dim to be one of a tensor of shape [3], got 1",
    ),
}
# Dynamo makes tensors of arrays, cannot trace sparse ones, and has no int of that size; mark_tokens is for eager code.
NOT_TRACED = ("numpy", "sparse", "alignment-huge", "mark_tokens", "mark_tokens-dim")


@pytest.mark.parametrize("name", PYTHON_TYPES)
def test_python_types(name: str) -> None:
    call, error, message = PYTHON_TYPES[name]
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error and str(raised.value) == message


@pytest.mark.parametrize("name", [name for name in PYTHON_TYPES if name not in NOT_TRACED])
def test_python_types_come_first_under_compile(name: str) -> None:
    call, error, message = PYTHON_TYPES[name]
    torch._dynamo.reset()
    with pytest.raises(error) as raised:
        torch.compile(call, backend="eager", fullgraph=True)()
    assert str(raised.value).splitlines()[0] == message
    torch._dynamo.reset()


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize(
    "name", ["plan-num_topk-large", "dispatch-tokens", "dispatch-dtype", "combine-rows", "low_latency-tokens"]
)
def test_the_error_of_a_fake_comes_first_under_compile(name: str, fullgraph: bool) -> None:
    case = CASES[name]
    torch._dynamo.reset()
    with pytest.raises(case.error) as raised:
        torch.compile(lambda: case.op(**case.arguments), backend="eager", fullgraph=fullgraph)()
    assert str(raised.value).splitlines()[0] == case.message
    torch._dynamo.reset()


def test_integers_of_numpy_are_integers() -> None:
    four = np.int64(4)
    plan = torch_ep.plan(topk(), four, capacity=np.int32(8), alignment=four)
    assert plan.num_rows == 8 and plan.offsets.tolist() == [4, 8, 8, 8]
    assert low_latency_rows(torch.ones(3, 4), topk(), four, np.uint8(3))[1].num_experts == 4


def test_init_timeout() -> None:
    with pytest.raises(
        ValueError, match=r"torch_ep.init: expected a timeout above 0 and of at most 365 days, 0:00:00, got 0:00:00"
    ):
        torch_ep.init(timeout=timedelta())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "ib"}, "expected backend 'auto', 'c10d' or 'nvlink', got 'ib'"),
        ({"provider": "nccl"}, "expected provider 'torch' or 'nvshmem', got 'nccl'"),
        ({"on_timeout": "wait"}, "expected on_timeout 'raise' or 'mask', got 'wait'"),
        ({"num_sms": 0}, r"expected num_sms from \d to 128, got 0"),
        ({"num_sms": 129}, r"expected num_sms from \d to 128, got 129"),
    ],
    ids=["backend", "provider", "on_timeout", "no-sms", "too-many-sms"],
)
def test_init_choices(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^torch_ep.init: {message}$"):
        torch_ep.init(**arguments)


# Whether torch_ep has CUDA, whether there is a device, what `init` is given, why nvlink cannot be used.
REASONS = {
    "no-cuda": (False, True, LIMITS, "torch_ep was built without CUDA"),
    "no-device": (True, False, LIMITS, "there is no CUDA device"),
    "limits": (
        True,
        True,
        {"hidden": 8, "num_experts": 4},
        "its buffers need every limit, and max_tokens_per_rank, num_topk is not given",
    ),
    "topk": (True, True, {**LIMITS, "num_topk": 33}, "it takes at most 32 experts per token, and num_topk is 33"),
    "other-gpu": (True, True, LIMITS, "torch_ep was not built for this GPU"),
}


@pytest.mark.parametrize("name", REASONS)
def test_init_explains_why_nvlink_cannot_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built, available, limits, reason = REASONS[name]
    monkeypatch.setattr(ops, "_backends", lambda: ["nvlink"] if built else [])
    monkeypatch.setattr(ops, "_nvlink_runs", lambda: False, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    with pytest.raises(RuntimeError) as raised:
        torch_ep.init(backend="nvlink", **limits)
    assert str(raised.value) == f"torch_ep.init: backend 'nvlink' cannot be used: {reason}"
    chosen = torch_ep.init(**limits)
    assert (chosen.backend, chosen.reason, chosen.symmetric_bytes) == ("c10d", reason, 0)


class GroupOnCpu:
    """As much of a process group as is asked."""

    _device_types = (torch.device("cpu"),)


@pytest.mark.parametrize(
    ("world_size", "num_experts", "reason"),
    [
        (2, 5, "num_experts = 5 is no multiple of the 2 ranks"),
        (17, 17, "it takes at most 16 ranks, and there are 17"),
        (4, 4880, "it takes at most 4876 experts on 4 ranks, and num_experts is 4880"),
        (2, 4, "the process group has no backend for CUDA"),
    ],
    ids=["num_experts", "ranks", "experts", "backend"],
)
def test_why_ranks_cannot_use_nvlink(
    world_size: int, num_experts: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_backends", lambda: ["nvlink"])
    limits = {**LIMITS, "num_experts": num_experts}
    assert torch_ep.comm._why_not_nvlink(GroupOnCpu(), world_size, limits) == reason  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["max_tokens_per_rank", "hidden"])
def test_limits_whose_buffers_would_overflow(name: str) -> None:
    limits = {**LIMITS, name: 2**62}
    with pytest.raises(ValueError) as raised:
        ops._nvlink_bytes(2, **limits, num_sms=8)
    message = f"torch_ep.init: expected {name} of at most {2**24} on backend nvlink, got {2**62}"
    assert str(raised.value).splitlines()[0] == message


@pytest.mark.skipif("nvlink" not in ops._backends(), reason="torch_ep was built without CUDA")
def test_only_nvlink_is_settled() -> None:
    with pytest.raises(RuntimeError, match=r"torch_ep.reset: group 'nowhere' does not use the nvlink backend"):
        ops._settle_nvlink("nowhere")


def test_only_nvlink_masks() -> None:
    message = "torch_ep.mask_ranks: expected a group on backend nvlink, got group ''"
    with pytest.raises(RuntimeError, match=message):
        torch_ep.mask_ranks([1])
    assert torch_ep.active_ranks() == [True]


def test_who_can_be_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    communicator = torch_ep.Communicator("g", 1, 3, timedelta(seconds=1), backend="nvlink")
    monkeypatch.setitem(torch_ep.comm.communicators, "g", communicator)
    monkeypatch.setattr(torch_ep.comm, "resolve", lambda group: ("g", 3))
    for ranks in ([1], [0, 3], [-1]):
        with pytest.raises(ValueError) as raised:
            torch_ep.mask_ranks(ranks, "g")
        assert str(raised.value) == f"torch_ep.mask_ranks: expected some of the other ranks [0, 2], got {ranks}"
    asked = []
    monkeypatch.setattr(ops, "_mask_nvlink", lambda *arguments: asked.append(arguments), raising=False)
    torch_ep.mask_ranks([2, 0, 2], "g")
    assert asked == [("g", 0b101)]
    monkeypatch.setattr(ops, "_masked_nvlink", lambda name: 0b101, raising=False)
    assert torch_ep.active_ranks("g") == [False, True, False]


def test_reset_of_one_rank_has_nothing_to_do() -> None:
    torch_ep.reset()


def test_group_of_another_type() -> None:
    with pytest.raises(
        TypeError, match="expected group to be a ProcessGroup, a DeviceMesh, a group's name or None, got int"
    ):
        torch_ep.plan(topk(), 4, 3)  # type: ignore[arg-type]


def test_combine_takes_one_kind_of_weights() -> None:
    p = torch_ep.plan(topk(), 4)
    with pytest.raises(ValueError, match=r"ep::combine: expected row_weights or topk_weights, got both"):
        torch_ep.combine(torch.ones(5, 4), p, row_weights=torch.ones(5), topk_weights=torch.ones(5))


def test_plan_with_the_wrong_fields() -> None:
    p = torch_ep.plan(topk(), 4)._replace(layout="rank_major")
    with pytest.raises(TypeError, match=r"ep::dispatch: expected plan.recv_topk_idx to be a Tensor, got NoneType"):
        torch_ep.dispatch(torch.ones(3, 4), p)
    with pytest.raises(ValueError, match="expected a plan of layout 'rank_major' to have recv_topk_idx, got None"):
        _ = p.num_rows


LAYERS = {
    "hidden": (ValueError, "expected hidden from 1 to 2147483647, got 0", {"hidden": 0}),
    "intermediate": (ValueError, "expected intermediate from 1 to 2147483647, got -1", {"intermediate": -1}),
    "intermediate-none": (TypeError, "expected intermediate to be an int, got NoneType", {"intermediate": None}),
    "experts_fn": (
        TypeError,
        "expected experts_fn to be a function of (rows, offsets) or None, got Tensor",
        {"experts_fn": torch.ones(2)},
    ),
    "num_experts": (TypeError, "expected num_experts to be an int, got float", {"num_experts": 4.0}),
    "num_topk-none": (ValueError, "expected num_topk from 1 to 4, got 0", {"num_topk": 0}),
    "num_topk-many": (ValueError, "expected num_topk from 1 to 4, got 5", {"num_topk": 5}),
    "shared_intermediate": (
        ValueError,
        "expected shared_intermediate from 0 to 2147483647, got -1",
        {"shared_intermediate": -1},
    ),
    "num_expert_groups": (TypeError, "expected num_expert_groups to be an int, got float", {"num_expert_groups": 2.0}),
    "num_expert_groups-indivisible": (
        ValueError,
        "expected num_expert_groups to divide num_experts = 4, got 3",
        {"num_expert_groups": 3},
    ),
    "num_topk_groups": (
        ValueError,
        "expected num_topk_groups from 1 to 2, got 3",
        {"num_expert_groups": 2, "num_topk_groups": 3},
    ),
    "num_topk_groups-few": (
        ValueError,
        "expected num_topk of at most 1, the experts in num_topk_groups = 1 groups, got 2",
        {"num_expert_groups": 4},
    ),
    "group_score_topk": (
        ValueError,
        "expected group_score_topk from 1 to 2, got 3",
        {"num_expert_groups": 2, "group_score_topk": 3},
    ),
    "score": (ValueError, "expected score 'softmax' or 'sigmoid', got 'tanh'", {"score": "tanh"}),
    "activation": (
        ValueError,
        "expected activation 'silu', 'gelu', 'swigluoai' or a function of (gate, up), got 'swish'",
        {"activation": "swish"},
    ),
    "layout": (ValueError, "expected layout 'rank_major' or 'expert_major', got 'row'", {"layout": "row"}),
    "alignment": (ValueError, "expected alignment from 1 to 2147483647, got 0", {"alignment": 0}),
    "alignment-type": (TypeError, "expected alignment to be an int, got float", {"alignment": 8.0}),
    "capacity": (ValueError, "expected capacity from 0 to 2147483647, got -1", {"capacity": -1}),
    "capacity-type": (TypeError, "expected capacity to be an int, got float", {"capacity": 1.5}),
    "capacity-unaligned": (
        ValueError,
        "expected a capacity that is a multiple of the alignment 8, got 12",
        {"capacity": 12, "alignment": 8},
    ),
    "capacity-expanded": (
        ValueError,
        "expected a capacity whose rows take fewer than 2**31 rows of this rank's experts, "
        "got 1073741824, which takes 2147483648",
        {"capacity": 2**30, "layout": "rank_major"},
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str) -> None:
    error, message, changes = LAYERS[name]
    arguments = {"hidden": 4, "intermediate": 4, "num_experts": 4, "num_topk": 2, **changes}
    with pytest.raises(error) as raised:
        torch_ep.nn.MoE(**arguments)
    assert str(raised.value) == f"torch_ep.nn.MoE: {message}"


def test_choice_among_groups() -> None:
    with pytest.raises(ValueError) as raised:
        torch_ep.nn.group_limited_topk(torch.rand(3, 8), 3, 3, 1)
    assert str(raised.value) == (
        "torch_ep.nn.group_limited_topk: expected num_expert_groups to divide num_experts = 8, got 3"
    )


def test_layer_of_rank_major_takes_a_capacity_that_is_no_multiple_of_its_alignment() -> None:
    layer = torch_ep.nn.MoE(4, 4, 4, 2, layout="rank_major", capacity=5, alignment=8)
    assert layer(torch.ones(3, 4))[1].num_dropped == 0


# On several ranks: the message of each rank, and that the group works right after.


def works(rank: int, world_size: int, device: str) -> bool:
    p = torch_ep.plan(torch.arange(world_size, device=device)[:, None], world_size)
    x = torch.full((world_size, 3), float(rank), device=device)
    return torch.equal(torch_ep.combine(torch_ep.dispatch(x, p), p), x)


def raise_what_the_device_found(world_size: int, device: str) -> None:
    """Which is what the next call does."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch_ep.plan(torch.zeros(2, 1, dtype=torch.int64, device=device), world_size)


def caught(rank: int, world_size: int, device: str, which: str) -> tuple[str, str, bool]:
    idx = torch.zeros(2, 1, dtype=torch.int64, device=device)

    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    try:
        if which == "index on one rank":
            torch_ep.plan(idx + (9 if rank == 1 else 0), world_size)
        elif which == "num_experts differs":
            torch_ep.plan(idx, world_size * (1 + rank))
        elif which == "num_topk differs":
            torch_ep.plan(torch.arange(rank + 1, device=device)[None], 2 * world_size)
        elif which == "hidden differs":
            p = torch_ep.plan(idx, world_size)
            torch_ep.dispatch(ones(2, 3 + rank), p)
        elif which == "dtype differs":
            p = torch_ep.plan(idx, world_size)
            torch_ep.dispatch(ones(2, 3, dtype=torch.float32 if rank else torch.float64), p)
        elif which == "weights on one rank":
            p = torch_ep.plan(idx, world_size)
            torch_ep.dispatch(ones(2, 3), p, **({} if rank else {"topk_weights": ones(2, 1)}))
        elif which == "dtype of weights differs":
            p = torch_ep.plan(idx, world_size)
            torch_ep.dispatch(ones(2, 3), p, topk_weights=ones(2, 1, dtype=torch.bfloat16 if rank else torch.float16))
        elif which == "dtype of scales differs":
            p = torch_ep.plan(idx, world_size)
            torch_ep.dispatch(ones(2, 3), p, scales=ones(2, 1, dtype=torch.int32 if rank else torch.float32))
        elif which == "topk_idx of another dtype":
            torch_ep.plan(idx.double() if rank else idx, world_size)
        elif which == "x of another shape":
            p = torch_ep.plan(idx, world_size)
            torch_ep.dispatch(ones(2 + rank, 3), p)
        elif which == "y of another dtype":
            p = torch_ep.plan(idx, world_size)
            torch_ep.combine(ones(p.num_rows, 3, dtype=torch.int64 if rank else torch.float32), p)
        elif which == "row_weights of another shape":
            p = torch_ep.plan(idx, world_size)
            torch_ep.combine(ones(p.num_rows, 3), p, row_weights=ones(p.num_rows + rank))
        elif which == "world_size":
            ops.plan(idx, 3, "expert_major", 1, 3, torch_ep.comm.resolve(None)[0])
        elif which == "init differs":
            torch_ep.init(hidden=7 + rank)
        elif which == "backend differs":
            torch_ep.init(backend="c10d" if rank else "auto")
        elif which == "provider differs":
            torch_ep.init(provider="nvshmem" if rank else "torch")
        elif which == "num_sms differs":
            torch_ep.init(num_sms=7 + rank)
        elif which == "low_latency_tokens differ":
            torch_ep.init(low_latency_tokens=9 if rank else None)
        elif which == "on_timeout differs":
            torch_ep.init(on_timeout="mask" if rank else "raise")
        raise_what_the_device_found(world_size, device)
    except Exception as error:
        return type(error).__name__, str(error).splitlines()[0], works(rank, world_size, device)
    return "", "no error", works(rank, world_size, device)


@pytest.mark.parametrize(
    ("which", "errors", "messages"),
    [
        (
            "index on one rank",
            ("DistError", "ValueError"),
            (
                "ep::plan: rank 1 failed before exchange",
                "ep::plan: expected topk_idx in [-1, 2), got 9 at token 0, slot 0",
            ),
        ),
        (
            "num_experts differs",
            ("DistError", "DistError"),
            (
                "ep::plan: expected the same num_experts on every rank, got 2 on rank 0 and 4 on rank 1",
                "ep::plan: expected the same num_experts on every rank, got 4 on rank 1 and 2 on rank 0",
            ),
        ),
        (
            "num_topk differs",
            ("DistError", "DistError"),
            (
                "ep::plan: expected the same num_topk on every rank, got 1 on rank 0 and 2 on rank 1",
                "ep::plan: expected the same num_topk on every rank, got 2 on rank 1 and 1 on rank 0",
            ),
        ),
        (
            "hidden differs",
            ("DistError", "DistError"),
            (
                "ep::dispatch: expected the same hidden on every rank, got 3 on rank 0 and 4 on rank 1",
                "ep::dispatch: expected the same hidden on every rank, got 4 on rank 1 and 3 on rank 0",
            ),
        ),
        (
            "dtype differs",
            ("DistError", "DistError"),
            (
                "ep::dispatch: expected the same dtype on every rank, got Double on rank 0 and Float on rank 1",
                "ep::dispatch: expected the same dtype on every rank, got Float on rank 1 and Double on rank 0",
            ),
        ),
        (
            "weights on one rank",
            ("DistError", "DistError"),
            (
                "ep::dispatch: expected the same bytes of topk_weights per token on every rank, "
                "got 4 on rank 0 and 0 on rank 1",
                "ep::dispatch: expected the same bytes of topk_weights per token on every rank, "
                "got 0 on rank 1 and 4 on rank 0",
            ),
        ),
        (
            "dtype of weights differs",
            ("DistError", "DistError"),
            (
                "ep::dispatch: expected the same dtype of topk_weights on every rank, "
                "got Half on rank 0 and BFloat16 on rank 1",
                "ep::dispatch: expected the same dtype of topk_weights on every rank, "
                "got BFloat16 on rank 1 and Half on rank 0",
            ),
        ),
        (
            "dtype of scales differs",
            ("DistError", "DistError"),
            (
                "ep::dispatch: expected the same dtype of scales on every rank, got Float on rank 0 and Int on rank 1",
                "ep::dispatch: expected the same dtype of scales on every rank, got Int on rank 1 and Float on rank 0",
            ),
        ),
        (
            "world_size",
            ("ValueError", "ValueError"),
            ("ep::plan: expected world_size 2 (the size of group '0'), got 3",) * 2,
        ),
        (
            "init differs",
            ("DistError", "DistError"),
            (
                "torch_ep.init: expected the same hidden on every rank, got 7 on rank 0 and 8 on rank 1",
                "torch_ep.init: expected the same hidden on every rank, got 8 on rank 1 and 7 on rank 0",
            ),
        ),
        (
            "backend differs",
            ("DistError", "DistError"),
            (
                "torch_ep.init: expected the same backend (0: auto, 1: c10d, 2: nvlink) on every rank, "
                "got 0 on rank 0 and 1 on rank 1",
                "torch_ep.init: expected the same backend (0: auto, 1: c10d, 2: nvlink) on every rank, "
                "got 1 on rank 1 and 0 on rank 0",
            ),
        ),
        (
            "provider differs",
            ("DistError", "DistError"),
            (
                "torch_ep.init: expected the same provider (0: torch, 1: nvshmem) on every rank, "
                "got 0 on rank 0 and 1 on rank 1",
                "torch_ep.init: expected the same provider (0: torch, 1: nvshmem) on every rank, "
                "got 1 on rank 1 and 0 on rank 0",
            ),
        ),
        (
            "num_sms differs",
            ("DistError", "DistError"),
            (
                "torch_ep.init: expected the same num_sms on every rank, got 7 on rank 0 and 8 on rank 1",
                "torch_ep.init: expected the same num_sms on every rank, got 8 on rank 1 and 7 on rank 0",
            ),
        ),
        (
            "low_latency_tokens differ",
            ("DistError", "DistError"),
            (
                "torch_ep.init: expected the same low_latency_tokens (0: None) on every rank, "
                "got 0 on rank 0 and 9 on rank 1",
                "torch_ep.init: expected the same low_latency_tokens (0: None) on every rank, "
                "got 9 on rank 1 and 0 on rank 0",
            ),
        ),
        (
            "on_timeout differs",
            ("DistError", "DistError"),
            (
                "torch_ep.init: expected the same on_timeout (0: raise, 1: mask) on every rank, "
                "got 0 on rank 0 and 1 on rank 1",
                "torch_ep.init: expected the same on_timeout (0: raise, 1: mask) on every rank, "
                "got 1 on rank 1 and 0 on rank 0",
            ),
        ),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_ranks(device: str, which: str, errors: tuple[str, str], messages: tuple[str, str]) -> None:
    for (kind, message, usable), error, expected in zip(
        Ranks(device, 2).run(caught, device, which), errors, messages, strict=True
    ):
        assert kind == error
        assert message.startswith(expected)
        assert usable


@pytest.mark.parametrize(
    ("which", "error", "message"),
    [
        ("topk_idx of another dtype", "TypeError", "ep::plan: expected topk_idx of dtype Int or Long, got Double"),
        (
            "x of another shape",
            "ValueError",
            "ep::dispatch: expected x of shape [2, hidden], one row per token of the plan, got [3, 3]"
            ": pass the tokens of the plan's topk_idx",
        ),
        (
            "y of another dtype",
            "TypeError",
            "ep::combine: expected y of dtype Double, Float, BFloat16 or Half, got Long",
        ),
        (
            "row_weights of another shape",
            "ValueError",
            "ep::combine: expected row_weights of shape [0], one per row of the dispatch, got [1]"
            ": pass the weights that it returned in layout expert_major",
        ),
    ],
    ids=lambda value: value.replace(" ", "-") if " of " in value else "",
)
def test_a_bad_argument_on_one_rank_raises_on_the_others(which: str, error: str, message: str) -> None:
    """Over a process group, where no rank has to wait for the timeout."""
    (other, told, others_work), (own, said, own_works) = world(2).run(caught, "cpu", which)
    assert (own, said) == (error, message)
    assert other == "DistError"
    op = message.partition(": ")[0]
    assert re.fullmatch(rf"{op}: rank 1 failed before exchange \d+: {re.escape(message)}", told), told
    assert own_works and others_work


def test_a_bad_index_of_a_peer_raises_with_the_message_of_the_peer(device: str) -> None:
    (_, message, _), _ = Ranks(device, 2).run(caught, device, "index on one rank")
    assert message.endswith(": ep::plan: expected topk_idx in [-1, 2), got 9 at token 0, slot 0")


def low_latency_caught(rank: int, world_size: int, which: str) -> tuple[str, str, bool]:
    idx = torch.tensor([[0], [1]])
    x = torch.ones(2, 3)

    def dispatch(x: torch.Tensor = x, idx: torch.Tensor = idx, experts: int = 2, room: int = 2, **options: Any) -> Any:
        return low_latency_rows(x, idx, experts, room, **options)

    rows, plan = dispatch()
    other = dispatch(idx=torch.tensor([[0], [-1]]))[1]
    calls: dict[str, Callable] = {
        "index": lambda: dispatch(idx=idx + 9 * rank),
        "tokens": lambda: dispatch(torch.ones(2 + rank, 3), torch.zeros(2 + rank, 1, dtype=torch.int64)),
        "num_experts": lambda: dispatch(experts=2 + 2 * rank),
        "num_topk": lambda: dispatch(idx=torch.tensor([[0, -1], [1, -1]]) if rank else idx),
        "max_tokens_per_rank": lambda: dispatch(room=2 + rank),
        "hidden": lambda: dispatch(torch.ones(2, 3 + rank)),
        "dtype": lambda: dispatch(x.half() if rank else x),
        "dtype of one": lambda: dispatch(x.int() if rank else x),
        "row_weights of one": lambda: torch_ep.low_latency_combine(
            rows, plan._replace(row_weights=plan.row_weights.half() if rank else plan.row_weights)
        ),
        "quantize": lambda: dispatch(quantize="fp8" if rank else None),
        "world_size": lambda: ops.low_latency_dispatch(x, idx, None, "", 3, 2, 3, torch_ep.comm.resolve(None)[0]),
        "operator": lambda: torch_ep.low_latency_combine(rows, plan) if rank else dispatch(),
        "half": lambda: torch_ep.low_latency_combine_send(rows, plan) if rank else dispatch(),
        "combine dtype": lambda: torch_ep.low_latency_combine(rows.half() if rank else rows, plan),
        "plan": lambda: torch_ep.low_latency_combine(rows, other if rank else plan),
        "recv_row": lambda: torch_ep.low_latency_combine(rows, plan._replace(recv_row=plan.recv_row + 7 * rank)),
    }
    try:
        calls[which]()
    except Exception as error:
        return type(error).__name__, str(error).splitlines()[0], works(rank, world_size, "cpu")
    return "", "no error", works(rank, world_size, "cpu")


def _differs(op: str, name: str, first: str, second: str) -> tuple[str, str]:
    told = f"ep::low_latency_{op}: expected the same {name} on every rank, got"
    return f"{told} {first} on rank 0 and {second} on rank 1", f"{told} {second} on rank 1 and {first} on rank 0"


LOW_LATENCY_RANKS = {
    "index": (
        ("DistError", "ValueError"),
        (
            "ep::low_latency_dispatch: rank 1 failed before exchange",
            "ep::low_latency_dispatch: expected topk_idx in [-1, 2), got 9 at token 0, slot 0",
        ),
    ),
    "tokens": (
        ("DistError", "ValueError"),
        (
            "ep::low_latency_dispatch: rank 1 failed before exchange",
            "ep::low_latency_dispatch: expected at most max_tokens_per_rank = 2 tokens, got 3",
        ),
    ),
    "num_experts": (("DistError", "DistError"), _differs("dispatch", "num_experts", "2", "4")),
    "num_topk": (("DistError", "DistError"), _differs("dispatch", "num_topk", "1", "2")),
    "max_tokens_per_rank": (("DistError", "DistError"), _differs("dispatch", "max_tokens_per_rank", "2", "3")),
    "hidden": (("DistError", "DistError"), _differs("dispatch", "hidden", "3", "4")),
    "dtype": (("DistError", "DistError"), _differs("dispatch", "dtype", "Float", "Half")),
    "dtype of one": (
        ("DistError", "TypeError"),
        (
            "ep::low_latency_dispatch: rank 1 failed before exchange",
            "ep::low_latency_dispatch: expected x of dtype Float, BFloat16 or Half, got Int",
        ),
    ),
    "row_weights of one": (
        ("DistError", "TypeError"),
        (
            "ep::low_latency_combine: rank 1 failed before exchange",
            "ep::low_latency_combine: expected row_weights of dtype Float, got Half",
        ),
    ),
    "quantize": (
        ("DistError", "DistError"),
        _differs("dispatch", "quantize (0: none, 1: fp8, 2: fp8_pow2, 3: fp8_ue8m0)", "0", "1"),
    ),
    "world_size": (
        ("ValueError", "ValueError"),
        ("ep::low_latency_dispatch: expected world_size 2 (the size of group '0'), got 3",) * 2,
    ),
    "operator": (
        ("DistError", "DistError"),
        (
            "ep::low_latency_dispatch: ranks issued different sequences of operators on group '0': rank 0 is in "
            "ep::low_latency_dispatch (exchange",
            "ep::low_latency_combine: ranks issued different sequences of operators on group '0': rank 1 is in "
            "ep::low_latency_combine (exchange",
        ),
    ),
    "half": (
        ("DistError", "DistError"),
        ("ep::low_latency_dispatch: ranks issued different", "ep::low_latency_combine: ranks issued different"),
    ),
    "combine dtype": (("DistError", "DistError"), _differs("combine", "dtype", "Float", "Half")),
    "plan": (
        ("DistError", "DistError"),
        (
            "ep::low_latency_combine: expected the same plan on every rank, got one by which 1 rows go from rank 1 to "
            "rank 0, where rank 1 sends 0",
        )
        * 2,
    ),
    "recv_row": (
        ("DistError", "ValueError"),
        (
            "ep::low_latency_combine: rank 1 failed before exchange",
            "ep::low_latency_combine: expected recv_row in [-1, 4), got 8",
        ),
    ),
}


@pytest.mark.parametrize("which", LOW_LATENCY_RANKS)
def test_ranks_of_the_low_latency_pair(which: str) -> None:
    errors, messages = LOW_LATENCY_RANKS[which]
    for (kind, message, usable), error, expected in zip(
        world(2).run(low_latency_caught, which), errors, messages, strict=True
    ):
        assert kind == error
        assert message.startswith(expected)
        assert usable


def low_latency_beyond_limits(rank: int, world_size: int) -> list[tuple[str, str]]:
    _, before = torch_ep.comm._arguments_of[torch_ep.comm.resolve(None)[0]]
    rows, plan = low_latency_rows(torch.ones(1, 9), torch.tensor([[0]]), 2, 1)
    torch_ep.init(max_tokens_per_rank=4, hidden=8, num_topk=2, num_experts=2 * world_size)
    calls: list[Callable] = [
        lambda: low_latency_rows(torch.ones(1, 9), torch.tensor([[0]]), 2, 1),
        lambda: low_latency_rows(torch.ones(1, 8), torch.tensor([[0, 1, 2]]), 4, 1),
        lambda: low_latency_rows(torch.ones(1, 8), torch.tensor([[0]]), 6, 1),
        lambda: torch_ep.low_latency_combine(rows, plan),
    ]
    seen = []
    for call in calls:
        for mode in (contextlib.nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
            try:
                with mode:
                    call()
                seen.append(("", "no error"))
            except Exception as error:
                seen.append((type(error).__name__, str(error).splitlines()[0]))
    torch_ep.init(**before)
    return seen


def test_limits_of_init_bind_the_low_latency_pair() -> None:
    limit = "the limit given to torch_ep.init"
    expected = [
        ("ValueError", f"ep::low_latency_dispatch: expected at most hidden = 8, {limit}, got 9"),
        ("ValueError", f"ep::low_latency_dispatch: expected at most num_topk = 2, {limit}, got 3"),
        ("ValueError", f"ep::low_latency_dispatch: expected at most num_experts = 4, {limit}, got 6"),
        ("ValueError", f"ep::low_latency_combine: expected at most hidden = 8, {limit}, got 9"),
    ]
    for seen in world(2).run(low_latency_beyond_limits):
        assert seen == [entry for entry in expected for _ in ("kernel", "fake")]


def uninitialized(rank: int, world_size: int) -> str:
    group = dist.new_group(list(range(world_size)))
    try:
        torch_ep.reset(group)
    except RuntimeError as error:
        return str(error).replace(group.group_name, "NAME")
    finally:
        dist.barrier(group)  # a rank that leaves at once fails those that still connect to it
        dist.destroy_process_group(group)
    return "no error"


def test_reset_of_an_uninitialized_group() -> None:
    told = "call torch_ep.init(group) on every rank first"
    for message in world(2).run(uninitialized):
        assert message == f"torch_ep.reset: expected an initialized group, got group 'NAME': {told}"


def beyond_limits(rank: int, world_size: int, device: str) -> list[tuple[str, str]]:
    _, before = torch_ep.comm._arguments_of[torch_ep.comm.resolve(None)[0]]
    backend = torch_ep.comm.communicators[torch_ep.comm.resolve(None)[0]].backend
    assert backend == ("nvlink" if device == "cuda" else "c10d")
    torch_ep.init(max_tokens_per_rank=4, hidden=8, num_topk=2, num_experts=2 * world_size, backend=backend)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    p = torch_ep.plan(zeros(1, 1), world_size, capacity=world_size)
    calls: list[Callable] = [
        lambda: torch_ep.plan(zeros(5 if rank == 0 else 4, 1), world_size),
        lambda: torch_ep.plan(torch.arange(3, device=device)[None], 2 * world_size),
        lambda: torch_ep.plan(zeros(4, 1), 3 * world_size),
        lambda: torch_ep.dispatch(torch.ones(1, 9, device=device), p),
        lambda: torch_ep.combine(torch.ones(world_size, 9, device=device), p),
    ]
    seen = []
    for call in calls:
        for mode in (None, FakeTensorMode(allow_non_fake_inputs=True)):
            try:
                if mode is None:
                    call()
                elif call is not calls[0]:  # there ranks differ, and a fake knows only its own
                    with mode:
                        call()
                else:
                    continue
                seen.append(("", "no error"))
            except Exception as error:
                seen.append((type(error).__name__, str(error).splitlines()[0]))
    assert works(rank, world_size, device)
    torch_ep.init(**before)
    return seen


def test_limits_of_init(device: str) -> None:
    first, second = Ranks(device, 2).run(beyond_limits, device)
    limit = "the limit given to torch_ep.init"
    tokens = "ep::plan: expected at most max_tokens_per_rank = 4 tokens, got 5"
    assert first[0] == ("ValueError", tokens)
    assert second[0][0] == "DistError"
    assert second[0][1].startswith("ep::plan: rank 0 failed before exchange")
    # A kernel tells its peers what is wrong, and no numbers.
    assert second[0][1].endswith(tokens if device == "cpu" else "max_tokens_per_rank tokens, got more")
    expected = [
        ("ValueError", f"ep::plan: expected at most num_topk = 2, {limit}, got 3"),
        ("ValueError", f"ep::plan: expected at most num_experts = 4, {limit}, got 6"),
        ("ValueError", f"ep::dispatch: expected at most hidden = 8, {limit}, got 9"),
        ("ValueError", f"ep::combine: expected at most hidden = 8, {limit}, got 9"),
    ]
    for seen in (first, second):
        assert seen[1:] == [entry for entry in expected for _ in ("kernel", "fake")]


def broken_plan(rank: int, world_size: int) -> tuple[str, bool]:
    p = torch_ep.plan(torch.zeros(2, 1, dtype=torch.int64), world_size)
    try:
        torch_ep.dispatch(torch.ones(2, 3), p._replace(send_row=p.send_row + 7) if rank == 1 else p)
    except Exception as error:
        return str(error).splitlines()[0], works(rank, world_size, "cpu")
    return "no error", works(rank, world_size, "cpu")


def test_broken_plan_of_one_rank() -> None:
    (first, first_works), (second, second_works) = world(2).run(broken_plan)
    assert second == "ep::dispatch: expected send_row of this plan in [-1, 2), got 7"
    assert first.startswith("ep::dispatch: rank 1 failed before exchange")
    assert first.endswith(second)
    assert first_works and second_works


def another_plan(rank: int, world_size: int, device: str) -> tuple[str, bool]:
    """Rank 1 passes a plan of other routing: what it sends is not what rank 0 waits for."""
    p = torch_ep.plan(torch.zeros(2, 1, dtype=torch.int64, device=device), world_size)
    q = torch_ep.plan(torch.tensor([[0], [-1]], device=device), world_size)
    try:
        torch_ep.dispatch(torch.ones(2, 3, device=device), q if rank == 1 else p)
        raise_what_the_device_found(world_size, device)
    except Exception as error:
        return str(error).splitlines()[0], works(rank, world_size, device)
    return "no error", works(rank, world_size, device)


def test_plans_of_different_routing(device: str) -> None:
    first, second = Ranks(device, 2).run(another_plan, device)
    assert first == (
        "ep::dispatch: expected the same plan on every rank, got one by which 2 rows go from rank 1 to rank 0, "
        "where rank 1 sends 1",
        True,
    )
    assert second[1]


# On one GPU.


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", ["plan-index-high", "plan-index-low", "plan-duplicate"])
def test_a_bad_index_in_capacity_mode_raises_in_the_next_call(name: str) -> None:
    case = CASES[name]
    arguments = {key: on("cuda", value) for key, value in case.arguments.items()}
    with one_rank_on("cuda"):
        ops.plan.capacity(**arguments, capacity=8)
        assert what_comes_later("cuda") == case.message
        assert works(0, 1, "cuda")


@pytest.mark.gpu
@needs_cuda
def test_an_exact_plan_cannot_be_captured() -> None:
    topk_idx = topk().cuda()
    with one_rank_on("cuda"):
        with pytest.raises(RuntimeError) as raised, torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch_ep.plan(topk_idx, 4)
        assert str(raised.value).splitlines()[0] == (
            "ep::plan: expected a capacity while a CUDA graph is captured: an exact plan waits for the number of rows"
        )
        assert works(0, 1, "cuda")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        (
            {"num_experts": 2**17},
            RuntimeError,
            "backend 'nvlink' cannot be used: it takes at most 4266 experts on 1 ranks, and num_experts is 131072",
        ),
        (
            {"max_tokens_per_rank": 2**24 + 1, "hidden": 1, "num_topk": 1, "num_experts": 1},
            ValueError,
            "expected max_tokens_per_rank of at most 16777216 on backend nvlink, got 16777217",
        ),
    ],
    ids=["num_experts", "max_tokens_per_rank"],
)
def test_init_limits_of_nvlink(limits: dict[str, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        torch_ep.init("", backend="nvlink", **{**LIMITS, **limits})
    assert str(raised.value).splitlines()[0] == f"torch_ep.init: {message}"
    with one_rank_on("cuda"):
        assert works(0, 1, "cuda")


def low_latency_combine_on_cuda(name: str) -> torch.Tensor:
    """The one column of the sums of that case: of ones, the number of rows that were added."""
    out, _ = CASES[name].op(**{key: on("cuda", value) for key, value in CASES[name].arguments.items()})
    torch.cuda.synchronize()
    return out[:, 0]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(
    ("what", "counts"),
    [("index", [2, 0, 2]), ("recv_row-values", [2, 1, 1]), ("recv_row-negative", [2, 1, 2])],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_low_latency_combine_skips_indices_out_of_range(what: str, counts: list[int]) -> None:
    """Where topk_idx is bad its dispatch has told; recv_row the kernel follows to no address outside y."""
    with one_rank_on("cuda"):
        assert low_latency_combine_on_cuda(f"low_latency-combine-{what}").tolist() == counts
        assert works(0, 1, "cuda")


@pytest.mark.gpu
@needs_cuda
def test_low_latency_combine_by_another_plan_ends_by_the_time_out() -> None:
    """No counts travel that could tell."""
    with one_rank_on("cuda", timeout=timedelta(milliseconds=300)):
        low_latency_combine_on_cuda("low_latency-combine-other-plan")
        told = what_comes_later("cuda")
        assert told.startswith(
            "ep::low_latency_combine: rank 0 waited in exchange 1 of group '' (rows, timeout 300 ms)"
        )
        torch_ep.reset()
        assert works(0, 1, "cuda")


@pytest.mark.gpu
@needs_cuda
def test_a_status_of_nothing_in_flight() -> None:
    """All that nvlink can find wrong between the halves: a status holds a number, and the rows lie in the buffers."""
    for kind in ("recv-counts", "combine-recv-tokens"):
        case = CASES[f"low_latency-{kind}"]
        with one_rank_on("cuda"):
            case.op(**{key: on("cuda", value) for key, value in case.arguments.items()})
            assert re.match(
                r"ep::low_latency_(dispatch|combine): expected exchange 1 of group '' to be received next, "
                rf"got the status of exchange {case.arguments['status'][0].item()}: ",
                what_comes_later("cuda"),
            )
            torch_ep.reset()
            assert works(0, 1, "cuda")
