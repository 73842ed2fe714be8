"""Exchanges run in program order on every rank, compiled or not; ranks that differ get an error, not a hang."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from support.compiling import InductorGraphs, artifacts, exchange_nodes, inductor_cache, record_exchanges
from support.devices import Ranks
from support.harness import random_topk, seeded
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx import Node

import torch_ep

EXPERTS, HIDDEN = 4, 8
LAYOUT = "expert_major"


def two_microbatches(xa: Tensor, idx_a: Tensor, xb: Tensor, idx_b: Tensor) -> tuple[Tensor, Tensor]:
    """Independent but for `after`: both plans, both dispatches, both combines, as overlapped training has them."""
    plan_a = torch_ep.plan(idx_a, EXPERTS, layout=LAYOUT)
    plan_b = torch_ep.plan(idx_b, EXPERTS, layout=LAYOUT, after=plan_a.send_counts)
    rows_a = torch_ep.dispatch(xa, plan_a, after=plan_b.send_counts)
    rows_b = torch_ep.dispatch(xb, plan_b, after=rows_a)
    ya = torch_ep.combine(rows_a.sin(), plan_a, after=rows_b)
    yb = torch_ep.combine(rows_b.cos(), plan_b, after=ya)
    return ya, yb


# (operator, num_topk): a has one expert a token and b has two, which tells their exchanges apart.
FORWARD = [("plan", 1), ("plan", 2), ("dispatch", 1), ("dispatch", 2), ("combine", 1), ("combine", 2)]
BACKWARD = [("dispatch", 2), ("dispatch", 1), ("combine", 2), ("combine", 1)]


def microbatches(device: str, count_a: int, count_b: int, rank: int = 0, mark: bool = True) -> list[Tensor]:
    args: list[Tensor] = []
    for name, count, num_topk in (("a", count_a, 1), ("b", count_b, 2)):
        x = torch.randn(count, HIDDEN, generator=seeded(count, rank)).to(device).requires_grad_()
        part = x, random_topk(count, num_topk, EXPERTS, seeded(count, rank, 1)).to(device)
        if mark:
            torch_ep.mark_tokens(*part, name=name)
        args += part
    return args


def step(fn: Callable, args: list[Tensor]) -> list[Tensor]:
    """Results and gradients."""
    results = fn(*args)
    return [*results, *torch.autograd.grad(sum(y.square().sum() for y in results), (args[0], args[2]))]


def _record_on_ranks(
    rank: int, world_size: int, device: str, backend: str, cache: str
) -> list[tuple[list[tuple[str, int]], int]]:
    """For several token counts, different on every rank: what ran, in order, and the graphs made so far."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(two_microbatches, fullgraph=True, backend=counter)
    seen = []
    with inductor_cache(cache):
        for counts in [((5, 3), (2, 7)), ((300, 0), (1, 40)), ((0, 1), (0, 0))]:
            args = microbatches(device, *counts[rank], rank)
            if not seen:
                step(compiled, args)
            results: list[Tensor] = []
            order = record_exchanges(lambda results=results, args=args: results.extend(step(compiled, args)))
            want = step(two_microbatches, microbatches(device, *counts[rank], rank, mark=False))
            torch.testing.assert_close(results, want)
            seen.append((order, counter.frame_count))
    torch._dynamo.reset()
    return seen


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_microbatches_in_one_graph_keep_program_order_on_every_rank(device: str, backend: str) -> None:
    for seen in Ranks(device, 2).run(_record_on_ranks, device, backend, artifacts()):
        assert seen == [(FORWARD + BACKWARD, 1)] * 3


def depends_on(node: Node, other: Node) -> bool:
    seen, todo = set(), [node]
    while todo:
        current = todo.pop()
        if current is other:
            return True
        if current not in seen:
            seen.add(current)
            todo += current.all_input_nodes
    return False


def test_after_makes_every_exchange_depend_on_the_one_before_forward_and_backward(device: str) -> None:
    """So no scheduler may swap them: the order above is no luck."""
    torch._dynamo.reset()
    backend = InductorGraphs()
    step(torch.compile(two_microbatches, fullgraph=True, backend=backend), microbatches(device, 5, 3))
    forward, backward = (exchange_nodes(gm) for gm in backend.graphs)
    assert (len(forward), len(backward)) == (len(FORWARD), len(BACKWARD))
    loose = [
        f"{first} -> {second}"
        for nodes in (forward, backward)
        for first, second in itertools.pairwise(nodes)
        if not depends_on(second, first)
    ]
    assert not loose


def repeated_and_unused(x: Tensor, topk_idx: Tensor) -> Tensor:
    """Compilers merge equal calls and drop a call whose result is unused; eager runs all of them."""
    first = torch_ep.plan(topk_idx, EXPERTS, layout=LAYOUT, capacity=16)
    second = torch_ep.plan(topk_idx, EXPERTS, layout=LAYOUT, capacity=16)
    torch_ep.dispatch(x + 1, first)
    return torch_ep.combine(torch_ep.dispatch(x, first) + torch_ep.dispatch(x, second), first)


def _merge_on_ranks(rank: int, world_size: int, device: str) -> list[tuple[str, int]]:
    torch._dynamo.reset()
    count = (5, 1)[rank]  # 1 is specialised: this rank's graph is another one
    x = torch.randn(count, HIDDEN, generator=seeded(rank)).to(device).requires_grad_()
    topk_idx = random_topk(count, 2, EXPERTS, seeded(rank)).to(device)
    compiled = torch.compile(repeated_and_unused, fullgraph=True, backend=InductorGraphs())

    def run(fn: Callable) -> tuple[Tensor, Tensor]:
        y = fn(x, topk_idx)
        return y, torch.autograd.grad(y.square().sum(), x)[0]

    torch.testing.assert_close(run(compiled), run(repeated_and_unused))
    order = record_exchanges(lambda: run(compiled))
    torch._dynamo.reset()
    return order


def test_merged_and_dropped_calls_leave_results_equal_and_ranks_in_step(device: str) -> None:
    first, second = Ranks(device, 2).run(_merge_on_ranks, device)
    assert first == second
    assert first[:3] == [("plan", 2), ("dispatch", 2), ("combine", 2)]


def _mismatch(rank: int, world_size: int, device: str) -> tuple[str, bool]:
    """Rank 1 forgets its dispatch. The message that this rank gets, and whether the group works afterwards."""
    topk_idx = random_topk(4, 2, EXPERTS, seeded(rank), holes=0).to(device)
    x = torch.randn(4, HIDDEN, generator=seeded(rank)).to(device)
    plan = torch_ep.plan(topk_idx, EXPERTS, layout=LAYOUT)
    message = "nothing was raised"
    try:
        if rank == 0:
            torch_ep.dispatch(x, plan)
        else:
            torch_ep.combine(torch.zeros(plan.num_rows, HIDDEN, device=device), plan)
        if device == "cuda":  # where the next call raises what the device found
            torch.cuda.synchronize()
            torch_ep.plan(topk_idx, EXPERTS, layout=LAYOUT)
    except dist.DistError as error:
        message = str(error)
    again = torch_ep.plan(topk_idx, EXPERTS, layout=LAYOUT)
    y = torch_ep.combine(torch_ep.dispatch(x, again), again)
    return message, torch.allclose(y, 2 * x)


def test_ranks_with_different_sequences_all_learn_both_operators_and_their_numbers(device: str) -> None:
    for message, _ in Ranks(device, 2).run(_mismatch, device):
        told = re.findall(r"rank (\d) (?:is )?in (ep::\w+) \(exchange (\d+)\)", message)
        assert {(rank, op) for rank, op, _ in told} == {("0", "ep::dispatch"), ("1", "ep::combine")}, message
        assert len({number for *_, number in told}) == 1, message


def test_the_group_works_after_a_mismatch(device: str) -> None:
    assert [works for _, works in Ranks(device, 2).run(_mismatch, device)] == [True, True]
