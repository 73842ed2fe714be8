"""How much memory the operators take at their peak, counted by torch's allocator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.harness import random_topk, same_bits, seeded, world
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import torch_ep

TOKENS, HIDDEN, EXPERTS, TOPK = 512, 4096, 8, 4


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that live at once of those that `call` allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        results = call()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    del results
    return peak


def weighted(layout: torch_ep.Layout, dtype: torch.dtype) -> tuple[torch_ep.Plan, Tensor, Tensor, Tensor]:
    """A plan, rows, their weights and a gradient of their sums."""
    topk_idx = random_topk(TOKENS, TOPK, EXPERTS, seeded(0), holes=0)
    plan = torch_ep.plan(topk_idx, EXPERTS, layout=layout, capacity=2400 if layout == "expert_major" else 600)
    y = torch.randn(plan.num_rows, HIDDEN, generator=seeded(1)).to(dtype)
    return plan, y, torch.rand(plan.num_rows, generator=seeded(2)), torch.randn(TOKENS, HIDDEN).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["rank_major", "expert_major"])
def test_the_backward_of_a_weighted_combine_needs_little_beside_its_results(
    layout: torch_ep.Layout, dtype: torch.dtype
) -> None:
    plan, y, row_weights, grad = weighted(layout, dtype)
    y.requires_grad_()
    row_weights.requires_grad_()
    out = torch_ep.combine(y, plan, row_weights=row_weights)
    peak = peak_bytes(lambda: torch.autograd.grad(out, (y, row_weights), grad))
    assert y.nbytes <= peak <= 2.5 * y.nbytes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["rank_major", "expert_major"])
def test_gradients_by_blocks_have_the_bits_of_the_whole(layout: torch_ep.Layout, dtype: torch.dtype) -> None:
    plan, y, row_weights, grad = weighted(layout, dtype)
    padding = (plan.recv_pair if plan.recv_topk_idx is None else plan.recv_topk_idx[:, 0]) < 0
    assert padding.any()
    y[padding] = row_weights[padding] = torch.nan
    inputs = (y.requires_grad_(), row_weights.requires_grad_())
    out = torch_ep.combine(y, plan, row_weights=row_weights)
    by_blocks = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    whole = torch.autograd.grad(out, inputs, grad, create_graph=True)
    assert all(same_bits(a, b.detach()) for a, b in zip(by_blocks, whole, strict=True))


def _dispatch_peak(rank: int, world_size: int, hidden: int) -> tuple[int, int, int]:
    """(peak, bytes of the received wire rows, bytes of the result)

    A thread of gloo may hold the send buffer for a moment after the exchange. The least of several peaks leaves that
    moment out.
    """
    topk_idx = random_topk(TOKENS, TOPK, EXPERTS, seeded(rank), holes=0)
    plan = torch_ep.plan(topk_idx, EXPERTS)
    x = torch.randn(TOKENS, hidden, generator=seeded(1))
    rows = torch_ep.dispatch(x, plan)
    peak = min(peak_bytes(lambda: torch_ep.dispatch(x, plan)) for _ in range(10))
    return peak, int(plan.recv_counts.sum()) * x[0].nbytes, rows.nbytes


def test_wire_rows_are_in_memory_that_the_communicator_keeps() -> None:
    for peak, wire, result in world(2).run(_dispatch_peak, HIDDEN):
        assert wire < 2**26 and result <= peak <= result + 2**16


def test_large_wire_rows_are_gone_after_the_operator() -> None:
    for peak, wire, result in world(2).run(_dispatch_peak, 8 * HIDDEN):
        assert wire > 2**26 and wire + result <= peak <= wire + result + 2**16
