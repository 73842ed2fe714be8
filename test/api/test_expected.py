"""The vectorised expectation that the GPU tests use is the specification, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import expected
from support.harness import random_topk, same_bits, seeded
from support.nvlink_cases import check_seeds
from support.virtual import open_world
from torch import Tensor

from torch_ep import reference

NUM_LOCAL, HIDDEN = 3, 5
TOKENS = (9, 0, 14, 3)


def _random(shapes: list[tuple[int, ...]], dtype: torch.dtype, *seeds: int) -> list[Tensor]:
    """With zeros of either sign."""
    results = []
    for rank, shape in enumerate(shapes):
        t = torch.randn(shape, generator=seeded(*seeds, rank), dtype=torch.float64)
        t[torch.rand(shape, generator=seeded(*seeds, rank, 1)) < 0.2] *= 0
        results.append(t.to(dtype))
    return results


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("capacity", [None, 0, 8, 400], ids=["exact", "none", "drops", "tail"])
@pytest.mark.parametrize("layout", ["rank_major", "expert_major"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_expectation_equals_the_specification(
    world_size: int, layout: Any, capacity: int | None, index_dtype: torch.dtype
) -> None:
    tokens, num_experts = TOKENS[:world_size], NUM_LOCAL * world_size
    options = {"layout": layout, "capacity": capacity, "alignment": 4 if layout == "expert_major" else 1}
    idx = [random_topk(n, 4, num_experts, seeded(1, r)).to(index_dtype) for r, n in enumerate(tokens)]
    want_plans = reference.plan(idx, num_experts, **options)
    routing = expected.route(idx, num_experts, **options)
    for got, want in zip(routing.plans, want_plans, strict=True):
        for name, a, b in zip(want._fields, got, want, strict=True):
            assert a is b is None or (same_bits(a, b) if isinstance(b, Tensor) else a == b), name

    maps = [p.recv_pair if p.recv_topk_idx is None else p.recv_topk_idx for p in want_plans]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = _random([(n, HIDDEN) for n in tokens], dtype, 2)
        w = _random([tuple(t.shape) for t in idx], dtype, 3)
        y = _random([(p.num_rows, HIDDEN) for p in want_plans], dtype, 4)
        v = _random([tuple(m.shape) for m in maps], dtype, 5)
        u = _random([(p.num_rows,) for p in want_plans], dtype, 6)
        moved = reference.dispatch(x, want_plans, topk_weights=w)
        home = reference.combine(y, want_plans, topk_weights=v)
        weighted = reference.combine(y, want_plans, row_weights=u)
        for rank in range(world_size):
            assert same_bits(expected.dispatch(routing, rank, x), moved[rank][0])
            assert same_bits(expected.dispatch_weights(routing, rank, w), moved[rank][1])
            assert same_bits(expected.combine(routing, rank, y), home[rank][0])
            assert same_bits(expected.combine_weights(routing, rank, v), home[rank][1])
            assert same_bits(expected.combine(routing, rank, y, u), weighted[rank][0])
    fp8 = [t.to(torch.float8_e4m3fn) for t in _random([(n, HIDDEN) for n in tokens], torch.float32, 7)]
    for rank, (rows, _) in enumerate(reference.dispatch(fp8, want_plans)):
        assert same_bits(expected.dispatch(routing, rank, fp8), rows)


@pytest.mark.parametrize("world_size", [1, 3])
def test_cases_of_the_gpu_tests_hold_over_gloo(world_size: int) -> None:
    """So what fails on GPUs alone is the backend there."""
    for differences in open_world(f"gloo-{world_size}").run(check_seeds, 0, 60):
        assert not differences
