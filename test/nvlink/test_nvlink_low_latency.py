"""The low-latency pair on the nvlink backend: its bits, CUDA graphs, torch.compile, failures.

Ranks: see support/virtual.py.

In the folder test, replays with new routing, every bit checked:

    python -m nvlink.test_nvlink_low_latency --count 10000 --gpus 4
    python -m nvlink.test_nvlink_low_latency --count 10000 --virtual 4

What needs no GPU to be tried runs on CPU too: the expectation, and the cases over gloo.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import stress
import torch
import torch._dynamo
from support import low_latency_cases, nvlink_cases
from support.devices import needs_cuda
from support.harness import random_topk, same_bits, seeded
from support.low_latency_cases import (
    QUANTIZE,
    Case,
    check_cases,
    check_in_flight,
    check_seeds,
    check_whole,
    check_without,
    draw,
    fits,
    pad,
    problem_of,
    reference_results,
    route,
    works,
)
from support.nvlink_cases import BF16, DEVICE, F16, F32, FP8, Comparison
from support.virtual import LIMIT_S, TIMEOUT, Ranks, VirtualWorld, limits, meet, open_world
from torch import Tensor
from torch._dynamo.utils import counters
from tqdm import tqdm

import torch_ep
from nvlink.test_nvlink import attempt, finish
from nvlink.test_nvlink_graphs import Layers, capture
from torch_ep import LowLatencyPlan, LowLatencyStatistics, reference
from torch_ep.low_latency import Quantize

VIRTUAL = ["virtual-1", "virtual-2", "virtual-3", "virtual-4"]
GPUS = ["gpus-2", "gpus-4", "gpus-8"]
# Graphs of torch.compile belong to the main thread of a process, and virtual ranks beside each other have none.
COMPILE_WORLDS = ["virtual-1", *GPUS]


def worlds(*names: str) -> pytest.MarkDecorator:
    """Those of "gloo" need no GPU."""
    gpu = [pytest.mark.gpu, needs_cuda]
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[] if name.startswith("gloo") else gpu) for name in names]
    )


every_world = worlds(*VIRTUAL, *GPUS)
several_ranks = worlds(*VIRTUAL[1:], *GPUS)
few_worlds = worlds("virtual-1", "virtual-3", "gpus-2", "gpus-4")
kinds = pytest.mark.parametrize("combine", [False, True], ids=["dispatch", "combine"])


def ranks_of(name: str) -> Ranks:
    if name.startswith("virtual"):
        open_world("virtual-1").run(each_kernel_alone)
    return open_world(name)


def no_differences(name: str, fn: Callable, *args: Any, limit_s: float = LIMIT_S) -> None:
    for rank, differences in enumerate(ranks_of(name).run(fn, *args, limit_s=limit_s)):
        assert not differences, f"rank {rank}: " + "\n".join(differences)


_alone: list[bool] = []


def each_kernel_alone(rank: int, world_size: int, group: str | None) -> None:
    """Runs the kernels of this module once per process, see Note [Kernels that wait for other kernels]."""
    if not _alone:
        _alone.append(True)
        differences = check_seeds(rank, world_size, group, 0, 80) + replays(rank, world_size, group, 4, 4, True)
        assert not differences, "\n".join(differences)


# --- equal to the specification ---

BATCHES, BATCH = 2, 160  # random cases


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_expectation_equals_the_specification(world_size: int) -> None:
    seen: set[Any] = set()
    for seed in range(40):
        case = draw(seed, world_size)
        if case.hidden * sum(case.tokens) * case.num_topk > 200_000:  # the specification is slow
            continue
        problem = problem_of(case)
        dispatched, sums = reference_results(case)
        for rank, (rows, scales, want) in enumerate(dispatched):
            for name, got in low_latency_cases.plan(problem.routing, rank, problem.all_weights).items():
                if name == "row_weights":
                    got = torch.where(want.recv_pair >= 0, got, 0)
                assert same_bits(got, getattr(want, name)), f"{case}: {name}"
            assert same_bits(low_latency_cases.dispatch(problem.routing, rank, problem.rows), rows), case
            if scales is not None:
                assert problem.scales is not None
                assert scales.stride() == low_latency_cases.scale_strides(case, scales.shape[2])
                got = low_latency_cases.dispatch(problem.routing, rank, problem.scales)
                assert same_bits(got, scales.clone(memory_format=torch.contiguous_format)), case
            got = low_latency_cases.combine(problem.routing, rank, problem.y, problem.all_weights)
            assert same_bits(got[: case.tokens[rank]], sums[rank]), case
        seen |= {case.quantize, case.dtype, case.routing, case.weighted, ("topk", case.num_topk)}
    assert seen >= {*QUANTIZE, BF16, F16, F32, *nvlink_cases.ROUTINGS, True, False, ("topk", 16)}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_backend_takes_all_cases(world_size: int) -> None:
    drawn = [draw(seed, world_size) for first in range(0, 1000 * BATCHES, 1000) for seed in range(first, first + BATCH)]
    for case in (*drawn, *every_kind(world_size)):
        assert fits(case.hidden, case.dtype if case.quantize is None else FP8), case
        assert fits(case.hidden, case.result_dtype), case
        assert case.num_topk <= limits(world_size)["num_topk"]
        assert case.num_experts <= limits(world_size)["num_experts"]


def test_cases_hold_over_gloo() -> None:
    """So what fails on GPUs alone is the backend there."""
    no_differences("gloo-2", check_seeds, 0, 12)


@pytest.mark.parametrize("batch", range(BATCHES))
@every_world
def test_random_cases(name: str, batch: int) -> None:
    no_differences(name, check_seeds, 1000 * batch, BATCH)


def every_kind(world_size: int) -> list[Case]:
    """Each width with each type and quantization, as far as there is room; experts per token and all else in turn."""
    tokens = (6, 0, 8, 1)[:world_size]
    cases = []
    for hidden in (8, 128, 144, 1000, *low_latency_cases.WIDE):
        for dtype in (BF16, F16, F32):
            for quantize in QUANTIZE:
                if not fits(hidden, dtype if quantize is None else FP8):
                    continue
                i = len(cases)
                result_dtypes = [t for t in (BF16, F32, F16) if fits(hidden, t)]
                cases.append(
                    Case(
                        seed=i,
                        tokens=tokens,
                        max_tokens=8,
                        num_topk=(1, 2, 8, 9, 16)[i % 5],
                        num_local_experts=(4, 1, 7)[i % 3],
                        dtype=dtype,
                        hidden=hidden,
                        routing="random" if i % 2 else "holes",
                        index_dtype=(torch.int32, torch.int64)[i // 2 % 2],
                        weighted=i % 3 > 0,
                        quantize=quantize,
                        result_dtype=result_dtypes[i % len(result_dtypes)],
                    )
                )
    return cases


@every_world
def test_every_width_type_and_quantization(name: str) -> None:
    ranks = ranks_of(name)
    no_differences(name, check_cases, every_kind(ranks.world_size))


@every_world
def test_data_that_begins_anywhere(name: str) -> None:
    """Contiguous, yet at no address that is a multiple of 16 bytes."""
    ranks = ranks_of(name)
    no_differences(name, check_cases, [case._replace(shift=True) for case in every_kind(ranks.world_size)])


def full(world_size: int) -> list[Case]:
    """As many tokens as there is room for, and as many experts per token and per rank."""
    limit = limits(world_size)
    most, num_local = limit["low_latency_tokens"], limit["num_experts"] // world_size
    return [
        Case(1, (most,) * world_size, most, 8, 16, BF16, 7168, routing="random"),
        Case(2, (most,) * world_size, most, 8, 16, BF16, 7168, routing="random", quantize="fp8"),
        Case(3, (most,) * world_size, most, limit["num_topk"], num_local, BF16, 512, quantize="fp8_ue8m0"),
        Case(4, (most,) * world_size, most, 8, 4, BF16, 2880, routing="one expert", weighted=False),
        Case(5, (0,) * world_size, most, 8, 4, BF16, 2880),
    ]


@every_world
def test_as_many_tokens_as_there_is_room_for(name: str) -> None:
    ranks = ranks_of(name)
    no_differences(name, check_cases, full(ranks.world_size))


def not_finite(rank: int, world_size: int, group: str | None, bad: float) -> list[str]:
    """Of groups with such a number only what it means is given, not the bits of a NaN; all other groups as ever."""
    compare = Comparison(f"{bad}")
    topk_idx = torch.full((2, 1), rank * 2, device=DEVICE)
    x = torch.randn(2, 384, generator=seeded(rank)).to(BF16)
    x[1, 130] = bad
    for how in QUANTIZE[1:]:
        assert how is not None
        want_rows, want_scales = reference.quantize(x, how)
        (rows, scales), _ = torch_ep.low_latency_dispatch(
            x.to(DEVICE), topk_idx, num_experts=2 * world_size, max_tokens_per_rank=2, group=group, quantize=how
        )
        rows, scales = rows[0, :2].cpu(), scales[0, :2].cpu().contiguous()
        for got, want, columns in ((rows.float(), want_rows.float(), slice(128, 256)), (scales, want_scales, slice(0))):
            if got.is_floating_point():
                compare.expect(f"{how}: NaN", got.isnan(), want.isnan())
            got, want = got.nan_to_num(9.0, 8.0, -8.0), want.nan_to_num(9.0, 8.0, -8.0)
            good = torch.ones_like(got, dtype=torch.bool)
            good[1, columns] = False
            compare.expect(how, got[good], want[good])
    return compare.differences


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf], ids=["nan", "-nan", "inf", "-inf"])
@worlds("gloo-2", "virtual-1", "gpus-2")
def test_a_value_that_is_not_finite_spoils_only_its_own_group(name: str, bad: float) -> None:
    no_differences(name, not_finite, bad)


# --- with other exchanges, and with computing ---


def interleaved(rank: int, world_size: int, group: str | None, count: int) -> list[str]:
    """Both pairs in random order on one communicator; plan, dispatch and combine between halves as well."""
    order = random.Random(5)  # the same on every rank
    differences: list[str] = []

    def others() -> None:
        differences.extend(nvlink_cases.check_seeds(rank, world_size, group, order.randrange(10**6), 1))

    for _ in range(count):
        what = order.choice(("whole", "in flight", "others", "others between"))
        cases = [draw(order.randrange(10**6), world_size) for _ in range(order.choice((1, 2)))]
        if what == "whole":
            differences += check_whole(rank, group, cases[0])
        elif what == "in flight":
            differences += check_in_flight(rank, group, cases)
        elif what == "others":
            others()
        else:
            differences += check_in_flight(rank, group, cases, others)
    return differences[:5]


@worlds("gloo-2")
def test_interleaved_with_the_other_pair_over_gloo(name: str) -> None:
    no_differences(name, interleaved, 6)


@every_world
def test_interleaved_with_the_other_pair(name: str) -> None:
    no_differences(name, interleaved, 60)


def computes_between(rank: int, world_size: int, group: str | None) -> list[str]:
    compare = Comparison("between the halves")
    a = torch.randn(512, 512, generator=seeded(rank)).to(DEVICE)
    want = a @ a
    finish()
    meet(group)  # the first product of a thread makes things that have to wait for the device

    def between() -> None:
        if DEVICE == "cuda":
            torch.cuda._sleep(200_000 * (rank + 1))  # cycles
        compare.expect("product", a @ a, want)

    tokens = tuple((64, 0, 100, 7)[:world_size])
    for i in range(12):
        cases = [Case(2 * i + j, tokens, 100, 8, 4, BF16, 144, quantize=QUANTIZE[i % 4]) for j in range(1 + i % 2)]
        compare.differences += check_in_flight(rank, group, cases, between)
    return compare.differences


@every_world
def test_computing_between_the_halves(name: str) -> None:
    no_differences(name, computes_between)


def visits_all(world_size: int, num_tokens: int = 3) -> Tensor:
    """[num_tokens, world_size]: of each rank the first expert, of two."""
    return (2 * torch.arange(world_size, device=DEVICE)).expand(num_tokens, -1).contiguous()


def good_dispatch(world_size: int, group: str | None, **options: Any) -> tuple[Tensor, LowLatencyPlan]:
    topk_idx = visits_all(world_size)
    x = torch.ones(len(topk_idx), 64, device=DEVICE, dtype=BF16)
    return torch_ep.low_latency_dispatch(
        x, topk_idx, num_experts=2 * world_size, max_tokens_per_rank=4, group=group, **options
    )


def comes_late(rank: int, world_size: int, group: str | None, combine: bool) -> list[list[int]]:
    """For each rank that comes late: how long this one waited for each."""
    waits = []
    for late in range(world_size):
        rows, plan = good_dispatch(world_size, group)
        statistics = LowLatencyStatistics.zeros(2 * world_size, group, device=DEVICE)
        finish()
        meet(group)
        if rank == late:
            time.sleep(0.05)
        for _ in range(2):  # the second tells what the first one waited for
            if combine:
                torch_ep.low_latency_combine(rows, plan, statistics=statistics)
            else:
                good_dispatch(world_size, group, statistics=statistics)
            finish()
        waits.append(statistics.wait_ns.tolist())
    return waits


@kinds
@several_ranks
def test_who_is_late_is_waited_for(name: str, combine: bool) -> None:
    ranks = ranks_of(name).run(comes_late, combine)
    for rank, waits in enumerate(ranks):
        for late, of_ranks in enumerate(waits):
            assert of_ranks[rank] == 0
            assert rank == late or of_ranks[late] > 20e6


# --- CUDA graphs ---

REPLAYS_PER_CHUNK = 1000  # of one recording, when this is run as a program
TOKENS, MAX_TOKENS, NUM_TOPK, NUM_LOCAL, HIDDEN = (13, 0, 7, 16), 16, 3, 3, 256


class Steps:
    """`calls` dispatches and combines, one after another or two in flight; results are checked on the device.

    What every rank puts in follows from a number on the device: so each rank has what all of them put in.
    """

    def __init__(self, rank: int, world_size: int, group: str | None, calls: int, halves: bool) -> None:
        self.rank, self.world_size, self.group = rank, world_size, group
        self.calls, self.halves = calls, halves
        self.num_experts = NUM_LOCAL * world_size
        room, tokens = world_size * MAX_TOKENS, TOKENS[rank]
        self.number = torch.zeros((), dtype=torch.int64, device=DEVICE)
        self.experts = torch.zeros(room, NUM_TOPK, dtype=torch.int64, device=DEVICE)
        self.x = torch.zeros(room, HIDDEN, dtype=BF16, device=DEVICE)
        self.weights = torch.zeros(room, NUM_TOPK, device=DEVICE)
        self.own = [t[:tokens].clone() for t in (self.x, self.experts, self.weights)]
        shape = (NUM_LOCAL, room, HIDDEN)
        self.y = [low_latency_cases.numbers(shape, BF16, 6, r).to(DEVICE) for r in range(world_size)]
        most = torch.tensor(TOKENS[:world_size], device=DEVICE)
        token = torch.arange(room, device=DEVICE)[:, None]
        self.token, self.there = token, token % MAX_TOKENS < most[token // MAX_TOKENS]
        self.wrong = torch.zeros(len(self.names()), dtype=torch.int64, device=DEVICE)
        self.first_wrong = torch.full_like(self.number, 2**62)

    def names(self) -> list[str]:
        fields = (
            "rows",
            "scales",
            "row_weights",
            "recv_pair",
            "recv_row",
            "tokens_per_expert",
            "source_offsets",
            "sums",
        )
        return [f"{field} of call {i}" for i in range(self.calls) for field in fields]

    def load(self) -> None:
        """Other routing and other numbers, in the same places. At times one expert for all, or none."""
        self.number += 1
        slot = torch.arange(NUM_TOPK, device=DEVICE)
        noise = (self.token * 2654435 + self.number * 40503) % 2147483647 * 48271 % 2147483647
        holes = (noise * 16807 % 2147483647 // 65536 + slot * 7) % 5 == 0
        experts = (noise + slot) % self.num_experts
        one = torch.where(slot == 0, self.number % self.num_experts, -1)
        experts = torch.where(self.number % 7 == 0, one, torch.where(holes, -1, experts))
        self.experts.copy_(torch.where(self.there & (self.number % 11 != 0), experts, -1))
        self.x.copy_((self.token * 31 + torch.arange(HIDDEN, device=DEVICE) * 7 + self.number * 13) % 1021 / 64 - 8)
        self.weights.copy_((noise + slot * 97) % 1021 / 512)
        first = self.rank * MAX_TOKENS
        for own, t in zip(self.own, (self.x, self.experts, self.weights), strict=True):
            own.copy_(t[first : first + len(own)])

    def run(self) -> list[tuple[Any, LowLatencyPlan, Tensor]]:
        """Of each call: rows, with scales or without, plan and sums."""
        x, topk_idx, weights = self.own
        y = self.y[self.rank]
        sizes: dict[str, Any] = {"num_experts": self.num_experts, "max_tokens_per_rank": MAX_TOKENS}
        given = {"group": self.group, "topk_weights": weights, **sizes}
        results: list[tuple[Any, LowLatencyPlan, Tensor]] = []
        for first in range(0, self.calls, 2):
            hows = [QUANTIZE[i % 4] for i in range(first, min(first + 2, self.calls))]
            if self.halves:
                sent = [torch_ep.low_latency_dispatch_send(x, topk_idx, quantize=how, **given) for how in hows]
                moved = [torch_ep.low_latency_dispatch_recv(flight) for flight in sent]
                back = [torch_ep.low_latency_combine_send(y, plan) for _, plan in moved]
                sums = [torch_ep.low_latency_combine_recv(flight) for flight in back]
            else:
                moved = [torch_ep.low_latency_dispatch(x, topk_idx, quantize=how, **given) for how in hows]
                sums = [torch_ep.low_latency_combine(y, plan) for _, plan in moved]
            results += [(rows, plan, out) for (rows, plan), out in zip(moved, sums, strict=True)]
        return results

    def check(self, results: list[tuple[Any, LowLatencyPlan, Tensor]]) -> None:
        """Counts what differs, and spoils the results, which a graph writes anew."""
        routing = route(self.experts, self.num_experts, self.world_size)
        want_plan = low_latency_cases.plan(routing, self.rank, self.weights)
        want_sums = low_latency_cases.combine(routing, self.rank, self.y, self.weights)[: len(self.own[0])]
        filled, counts = want_plan["recv_pair"] >= 0, []
        for i, (result, plan, sums) in enumerate(results):
            how = QUANTIZE[i % 4]
            if how is None:
                moved = {"rows": (result, self.x)}
            else:
                rows, scales = reference.quantize(self.x, how)
                moved = {"rows": (result[0], rows), "scales": (result[1], scales)}
            wrong = {
                name: differing(got, low_latency_cases.dispatch(routing, self.rank, values), filled)
                for name, (got, values) in moved.items()
            }
            for name, want in want_plan.items():
                wrong[name] = differing(getattr(plan, name), want, filled if name == "row_weights" else None)
            wrong["sums"] = differing(sums, want_sums, None)
            fields = (name.partition(" ")[0] for name in self.names()[: len(self.names()) // self.calls])
            counts += [wrong.get(name, torch.zeros_like(self.number)) for name in fields]
            for t in (*(got for got, _ in moved.values()), *(getattr(plan, name) for name in want_plan), sums):
                t.view(torch.uint8).fill_(0x7F) if t.dtype == FP8 else t.fill_(-7)
        found = torch.stack(counts)
        self.wrong += found
        now = torch.where(found.any(), self.number, 2**62)
        self.first_wrong.copy_(torch.minimum(self.first_wrong, now))

    def forget(self) -> None:
        """Returns the counts so far."""
        self.wrong.zero_()
        self.first_wrong.fill_(2**62)

    def differences(self) -> list[str]:
        """Waits for the device."""
        return [
            f"rank {self.rank}, {self.calls} calls, first in step {self.first_wrong.item()} of {self.number.item()}: "
            f"{name}: {count} differ"
            for name, count in zip(self.names(), self.wrong.tolist(), strict=True)
            if count
        ]


def differing(got: Tensor, want: Tensor, filled: Tensor | None) -> Tensor:
    """How many bytes; only where `filled`, of the first dimensions."""
    wrong = got.contiguous().unsqueeze(-1).view(torch.uint8) != want.contiguous().unsqueeze(-1).view(torch.uint8)
    if filled is not None:
        wrong = wrong & filled.reshape(*filled.shape, *[1] * (wrong.dim() - filled.dim()))
    return wrong.sum()


class Recorded:
    """Three CUDA graphs of some steps: new routing; the exchanges alone; the check. Without a GPU: no graphs."""

    def __init__(self, steps: Steps, group: str | None) -> None:
        self._results: list[Any] = []
        self._steps = steps
        steps.load()
        steps.check(steps.run())
        self.graphs = [self._record(fn, group) for fn in (steps.load, self._run, self._check)]
        # Each once while no rank waits for another: see Note [Kernels that wait for other kernels].
        for replay in (self.graphs[0], self.graphs[2]):
            meet(group)
            replay()
            finish()
        meet(group)
        steps.forget()

    def replay(self) -> None:
        for replay in self.graphs:
            replay()

    def _run(self) -> None:
        self._results = self._steps.run()

    def _check(self) -> None:
        self._steps.check(self._results)

    @staticmethod
    def _record(fn: Callable[[], None], group: str | None) -> Callable[[], None]:
        if DEVICE == "cpu":
            fn()
            return fn
        graph, _ = capture(fn, group)
        return graph.replay


def replays(
    rank: int, world_size: int, group: str | None, count: int, calls: int, halves: bool, first: int = 0
) -> list[str]:
    steps = Steps(rank, world_size, group, calls, halves)
    steps.number.fill_(first)
    recorded = Recorded(steps, group)
    for i in range(count):
        recorded.replay()
        if i % 32 == 31:
            finish()  # a device takes so many launches ahead and no more
    return steps.differences()


@pytest.mark.parametrize("halves", [False, True], ids=["whole", "halves"])
@pytest.mark.parametrize("calls", [1, 2, 3, 5])
@few_worlds
def test_any_number_of_calls_in_a_graph(name: str, calls: int, halves: bool) -> None:
    no_differences(name, replays, 200, calls, halves)


@worlds("gloo-2")
def test_steps_over_gloo(name: str) -> None:
    """Without graphs: that it is right what the graphs are compared with."""
    no_differences(name, replays, 12, 5, True)


@every_world
def test_many_replays_with_new_routing(name: str) -> None:
    no_differences(name, replays, 2000, 3, False)


def graphs_among_others(rank: int, world_size: int, group: str | None) -> list[str]:
    """Graphs of the pair and of the other one, and eager calls of both, in random order."""
    compare = Comparison("graphs among others")
    steps = [Steps(rank, world_size, group, calls, halves) for calls, halves in ((1, False), (2, True), (3, False))]
    recorded = [Recorded(own, group) for own in steps]
    layers = Layers(rank, world_size, group, 1, "expert_major", 90)
    layers.run()
    graph, results = capture(layers.run, group)
    order = random.Random(9)  # the same on every rank
    for seed in range(150):
        which = order.randrange(len(steps))
        what = order.choice(("replay", "replay", "replay", "eager steps", "eager", "other graph", "others"))
        if what == "replay":
            recorded[which].replay()
        elif what == "eager steps":
            steps[which].load()
            steps[which].check(steps[which].run())
        elif what == "eager":
            compare.differences += check_cases(rank, world_size, group, [draw(seed + i, world_size) for i in range(4)])
        elif what == "other graph":
            layers.load(seed)
            graph.replay()
            layers.check(compare, f"{seed}: other graph", seed, results)
        else:
            compare.differences += nvlink_cases.check_seeds(rank, world_size, group, seed, 1)
    return compare.differences + [difference for own in steps for difference in own.differences()]


@few_worlds
def test_graphs_and_eager_calls_of_both_pairs_in_any_order(name: str) -> None:
    no_differences(name, graphs_among_others)


def a_half_a_graph(rank: int, world_size: int, group: str | None) -> list[str]:
    """Sent in one graph, received in another: with eager exchanges of the other pair between their replays."""
    steps = Steps(rank, world_size, group, 1, False)
    x, topk_idx, weights = steps.own
    steps.load()
    steps.check(steps.run())
    sizes: dict[str, Any] = {"num_experts": steps.num_experts, "max_tokens_per_rank": MAX_TOKENS}
    given = {"group": group, "topk_weights": weights, **sizes}
    send, sent = capture(lambda: torch_ep.low_latency_dispatch_send(x, topk_idx, **given), group)
    receive, moved = capture(lambda: torch_ep.low_latency_dispatch_recv(sent), group)
    rows, plan = moved
    back, flight = capture(lambda: torch_ep.low_latency_combine_send(steps.y[rank], plan), group)
    home, sums = capture(lambda: torch_ep.low_latency_combine_recv(flight), group)
    differences: list[str] = []
    for seed in range(20):
        steps.load()
        for graph in (send, receive, back, home):
            graph.replay()
            if seed % 3 == 0:
                differences += nvlink_cases.check_seeds(rank, world_size, group, seed, 1)
        steps.check([(rows, plan, sums)])
    return differences + steps.differences()


@few_worlds
def test_each_half_in_a_graph_of_its_own(name: str) -> None:
    no_differences(name, a_half_a_graph)


# --- torch.compile ---


def decode(
    x: Tensor, topk_idx: Tensor, weights: Tensor, up: Tensor, group: str | None, experts: int, form: str
) -> Tensor:
    quantize: Quantize | None = "fp8_pow2" if form == "fp8" else None
    sizes: dict[str, Any] = {"num_experts": experts, "max_tokens_per_rank": MAX_TOKENS}
    given = {"group": group, "topk_weights": weights, **sizes}
    if form == "halves":
        sent = torch_ep.low_latency_dispatch_send(x, topk_idx, **given)
        result, plan = torch_ep.low_latency_dispatch_recv(sent)
    else:
        result, plan = torch_ep.low_latency_dispatch(x, topk_idx, quantize=quantize, **given)
    if form == "fp8":
        rows, scales = result
        result = (rows.to(F32).unflatten(2, (-1, 128)) * scales.unsqueeze(3)).flatten(2).to(x.dtype)
    y = torch.bmm(result, up)
    if form == "halves":
        return torch_ep.low_latency_combine_recv(torch_ep.low_latency_combine_send(y, plan))
    return torch_ep.low_latency_combine(y, plan)


@torch.no_grad()
def compiled_steps(
    rank: int, world_size: int, group: str | None, dtype: torch.dtype, form: str
) -> tuple[list[str], int, int, int]:
    """Returns differences, graphs of the compiler, skipped CUDA graphs, and inputs copied for the other CUDA graphs."""
    torch._dynamo.reset()
    counters.clear()
    experts = NUM_LOCAL * world_size

    def whole(seeds: tuple[int, ...], *shape: int) -> Tensor:
        # Few and small, so that sums are exact in whatever order.
        return torch.randint(-4, 5, shape, generator=seeded(*seeds)).to(DEVICE, dtype)

    up = whole((1, rank), NUM_LOCAL, HIDDEN, 64)
    compiled = torch.compile(decode, mode="reduce-overhead", fullgraph=True)
    compare = Comparison(f"{form}, {dtype}")
    for step in range(12):
        x = whole((2, rank, step), 8, HIDDEN)
        topk_idx = random_topk(8, NUM_TOPK, experts, seeded(3, rank, step)).to(DEVICE)
        weights = torch.exp2(torch.randint(-1, 2, (8, NUM_TOPK), generator=seeded(4, rank, step)).float()).to(DEVICE)
        torch.compiler.cudagraph_mark_step_begin()
        got = compiled(x, topk_idx, weights, up, group, experts, form).clone()
        want = decode(x, topk_idx, weights, up, group, experts, form)
        compare.expect(f"step {step}", got + 0, want + 0)  # without the sign of zeros
    graphs = counters["stats"]["unique_graphs"]
    skipped, recorded = (counters["inductor"][f"cudagraph_{what}"] for what in ("skips", "recorded_non_static_inputs"))
    torch._dynamo.reset()
    return compare.differences, graphs, skipped, recorded


@pytest.mark.parametrize("form", ["whole", "halves", "fp8"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@worlds(*COMPILE_WORLDS)
def test_compiled_step_is_one_cuda_graph_and_equals_eager(name: str, dtype: torch.dtype, form: str) -> None:
    for differences, graphs, skipped, recorded in ranks_of(name).run(compiled_steps, dtype, form):
        assert not differences
        assert graphs == 1
        assert skipped == 0 and recorded > 0  # a CUDA graph it was


# --- failures, after which everything works ---

SHORT = timedelta(seconds=3)


def in_own_world(name: str, fn: Callable, *args: Any, **changes: Any) -> list[Any]:
    """`fn(rank, world_size, group, shared, *args)` on ranks with a short timeout and other limits.

    `shared`: a dict, the same one for all ranks of a process. Virtual ranks are made for it, as a timeout would end
    them for all others; ranks that are processes call `init` again.
    """
    kind, _, count = name.partition("-")
    if kind == "virtual":
        return ranks_of("virtual-1").run(_on_own_virtual_ranks, int(count), fn, args, changes)[0]
    return open_world(name, may_share=False).run(_after_another_init, fn, args, changes)


def _on_own_virtual_ranks(
    rank: int, _: int, group: str | None, world_size: int, fn: Callable, args: tuple, changes: dict[str, Any]
) -> list[Any]:
    own = VirtualWorld(world_size, timeout=SHORT, **changes)
    answers = own.run(fn, {}, *args)
    own.close()
    return answers


def _after_another_init(
    rank: int, world_size: int, group: str | None, fn: Callable, args: tuple, changes: dict[str, Any]
) -> Any:
    torch_ep.init(timeout=SHORT, backend="nvlink", **{**limits(world_size), **changes})
    answer = fn(rank, world_size, group, {}, *args)
    torch_ep.init(timeout=TIMEOUT, backend="nvlink", **limits(world_size))
    return answer


def reset(rank: int, group: str | None, shared: dict[int, int]) -> None:
    """`torch_ep.reset`; for virtual ranks, which have no store to agree through, what it does on the device."""
    if group is None:
        torch_ep.reset()
        return
    shared[rank] = torch.ops.ep._settle_nvlink(group)
    meet(group)
    torch.ops.ep._restart_nvlink(group, max(shared.values()) + 1)
    meet(group)


Answer = tuple[tuple[str, str], tuple[str, str], list[str]]


def stays_away(
    rank: int, world_size: int, group: str | None, shared: dict[int, int], culprit: int, what: str
) -> Answer | list[str]:
    """The error, that of the call after it, and what is wrong after a reset."""
    rows, plan = good_dispatch(world_size, group)
    torch_ep.low_latency_combine(rows, plan)
    given = (torch.ones(3, 64, device=DEVICE, dtype=BF16), visits_all(world_size))
    sizes: dict[str, Any] = {"num_experts": 2 * world_size, "max_tokens_per_rank": 4, "group": group}
    calls: dict[str, Callable] = {
        "dispatch": lambda: torch_ep.low_latency_dispatch(*given, **sizes),
        "dispatch in halves": lambda: torch_ep.low_latency_dispatch_recv(
            torch_ep.low_latency_dispatch_send(*given, **sizes)
        ),
        "combine": lambda: torch_ep.low_latency_combine(rows, plan),
        "combine in halves": lambda: torch_ep.low_latency_combine_recv(torch_ep.low_latency_combine_send(rows, plan)),
    }
    finish()
    meet(group)
    errors = [] if rank == culprit else [attempt(calls[what], calls[what]), attempt(calls[what])]
    reset(rank, group, shared)
    differences = works(rank, world_size, group)
    return (errors[0], errors[1], differences) if errors else differences


@pytest.mark.parametrize(
    ("which", "what"),
    [("first", "dispatch"), ("last", "dispatch in halves"), ("last", "combine"), ("first", "combine in halves")],
    ids=lambda value: value.replace(" ", "-"),
)
@several_ranks
def test_a_rank_that_does_not_come(name: str, which: str, what: str) -> None:
    culprit = 0 if which == "first" else int(name.partition("-")[2]) - 1
    answers = in_own_world(name, stays_away, culprit, what)
    assert answers[culprit] == []
    op = f"ep::low_latency_{what.partition(' ')[0]}"
    for rank, answer in enumerate(answers):
        if rank != culprit:
            (kind, message), again, differences = answer
            assert kind == "DistError", message
            assert message.startswith(f"{op}: rank {rank} waited in exchange "), message
            assert re.search(rf"\) for rank {culprit}\b", message), message
            assert again == (kind, message)  # until a reset
            assert not differences


def goes_on_without(
    rank: int, world_size: int, group: str | None, shared: dict[int, int], lost: int, by_host: bool
) -> tuple[list[str], list[bool], list[bool], list[str]]:
    """Returns differences without a rank, active ranks then and after a reset, and differences after the reset."""
    differences = check_seeds(rank, world_size, group, 0, 4)
    meet(group)
    if rank != lost:
        if by_host:
            torch_ep.mask_ranks([lost], group)
        differences += check_without(rank, world_size, group, lost, 5)
    active = torch_ep.active_ranks(group)
    meet(group)
    reset(rank, group, shared)
    return differences, active, torch_ep.active_ranks(group), works(rank, world_size, group)


@pytest.mark.parametrize("by_host", [True, False], ids=["masked by the host", "masked by a timeout"])
@several_ranks
def test_the_others_go_on_without_a_rank(name: str, by_host: bool) -> None:
    world_size = int(name.partition("-")[2])
    lost = world_size - 1
    answers = in_own_world(name, goes_on_without, lost, by_host, on_timeout="raise" if by_host else "mask")
    for rank, (differences, active, active_again, differences_again) in enumerate(answers):
        assert not differences
        assert active == [rank == lost or other != lost for other in range(world_size)]
        assert active_again == [True] * world_size
        assert not differences_again


class Halves:
    """Dispatches or combines of one kind, to send and to receive."""

    def __init__(self, world_size: int, group: str | None, combine: bool) -> None:
        self.rows, self.plan = good_dispatch(world_size, group)
        self.combine = combine
        x = torch.ones(3, 64, device=DEVICE, dtype=BF16)
        self.given = (x, visits_all(world_size))
        self.sizes: dict[str, Any] = {"num_experts": 2 * world_size, "max_tokens_per_rank": 4, "group": group}

    def send(self) -> Any:
        if self.combine:
            return torch_ep.low_latency_combine_send(self.rows, self.plan)
        return torch_ep.low_latency_dispatch_send(*self.given, **self.sizes)

    def receive(self, flight: Any) -> None:
        (torch_ep.low_latency_combine_recv if self.combine else torch_ep.low_latency_dispatch_recv)(flight)

    def whole(self) -> None:
        if self.combine:
            torch_ep.low_latency_combine(self.rows, self.plan)
        else:
            torch_ep.low_latency_dispatch(*self.given, **self.sizes)


def sends_thrice(rank: int, world_size: int, group: str | None, shared: dict[int, int], combine: bool) -> Any:
    halves = Halves(world_size, group, combine)
    _flights = [halves.send(), halves.send()]
    finish()
    error = attempt(halves.send, halves.send)
    reset(rank, group, shared)
    return error, works(rank, world_size, group)


@kinds
@every_world
def test_a_third_send_without_a_receive_fails(name: str, combine: bool) -> None:
    for (kind, message), differences in in_own_world(name, sends_thrice, combine):
        assert kind == "DistError", message
        assert message.startswith(f"ep::low_latency_{'combine' if combine else 'dispatch'}: "), message
        assert "' on their way, got a third, exchange " in message, message
        assert not differences


def receives_in_another_order(
    rank: int, world_size: int, group: str | None, shared: dict[int, int], combine: bool, what: str
) -> Any:
    halves = Halves(world_size, group, combine)
    first = halves.send()
    if what == "a whole one between":
        error = attempt(halves.whole, halves.send)
    else:
        second = halves.send()
        if what == "one twice":
            halves.receive(first)
        wrong = first if what == "one twice" else second
        error = attempt(lambda: halves.receive(wrong), halves.send)
    reset(rank, group, shared)
    return error, works(rank, world_size, group)


@pytest.mark.parametrize(
    "what", ["the second first", "one twice", "a whole one between"], ids=lambda value: value.replace(" ", "-")
)
@kinds
@few_worlds
def test_received_in_another_order(name: str, combine: bool, what: str) -> None:
    for (kind, message), differences in in_own_world(name, receives_in_another_order, combine, what):
        assert kind == "DistError", message
        assert message.startswith(f"ep::low_latency_{'combine' if combine else 'dispatch'}: expected exchange "), (
            message
        )
        assert "got the status of exchange" in message, message
        assert not differences


def without_room(rank: int, world_size: int, group: str | None, shared: dict[int, int]) -> Any:
    return attempt(lambda: good_dispatch(world_size, group)), nvlink_cases.works(rank, world_size, group)


@few_worlds
def test_without_low_latency_tokens(name: str) -> None:
    for (kind, message), differences in in_own_world(name, without_room, low_latency_tokens=None):
        assert kind == "RuntimeError", message
        assert message.startswith(
            "ep::low_latency_dispatch: expected low_latency_tokens of torch_ep.init to be given, on backend nvlink"
        ), message
        assert not differences


def disagree(rank: int, world_size: int, group: str | None, what: str) -> tuple[tuple[str, str], list[str]]:
    odd = rank == world_size - 1

    def unless_odd(name: str, usual: Any, other: Any) -> Any:
        return other if odd and what == name else usual

    rows, plan = good_dispatch(world_size, group)
    hidden, dtype = unless_odd("hidden", 64, 80), unless_odd("dtype", BF16, F16)
    experts, topk_idx = unless_odd("num_experts", 2, 3) * world_size, visits_all(world_size)
    if odd and what == "num_topk":
        topk_idx = torch.cat([topk_idx, torch.full_like(topk_idx[:, :1], -1)], 1)
    x = torch.ones(len(topk_idx), hidden, device=DEVICE, dtype=dtype)
    most, quantize = unless_odd("max_tokens_per_rank", 4, 5), unless_odd("quantize", None, "fp8")

    def call() -> object:
        if what == "hidden of combine":
            return torch_ep.low_latency_combine(rows.new_zeros(*rows.shape[:2], 80 if odd else 64), plan)
        return torch_ep.low_latency_dispatch(
            x, topk_idx, num_experts=experts, max_tokens_per_rank=most, group=group, quantize=quantize
        )

    error = attempt(call, lambda: good_dispatch(world_size, group))
    return error, works(rank, world_size, group)


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("hidden", "hidden"),
        ("num_experts", "num_experts"),
        ("num_topk", "num_topk"),
        ("max_tokens_per_rank", "max_tokens_per_rank"),
        ("dtype", "dtype"),
        ("quantize", "quantize (0: none, 1: fp8, 2: fp8_pow2, 3: fp8_ue8m0)"),
        ("hidden of combine", "hidden"),
    ],
)
@several_ranks
def test_the_error_names_the_argument_that_differs_between_ranks(name: str, what: str, named: str) -> None:
    answers = ranks_of(name).run(disagree, what)
    for rank, ((kind, message), differences) in enumerate(answers):
        assert kind == "DistError", message
        assert f"expected the same {named} on every rank, got " in message, message
        assert re.search(rf" on rank {rank} and .* on rank \d", message), message
        if rank != len(answers) - 1:
            assert f"on rank {len(answers) - 1}" in message, message
        assert not differences


def one_rank_is_wrong(rank: int, world_size: int, group: str | None, what: str, halves: bool) -> Any:
    """The last rank's errors of the second operator, called twice; and what differs, where a bad entry is none."""
    experts, bad = 2 * world_size, world_size - 1
    given = [random_topk(6, 2, experts, seeded(r)) for r in range(world_size)]
    token, entry = {"high": (5, experts + 3), "low": (5, -7), "twice": (0, 1)}[what]
    given[bad][5] = torch.tensor([1, 0])  # in "twice" after the token that has expert 1 twice
    given[bad][token] = torch.tensor([1, entry])
    taken = [t.clone() for t in given]
    taken[bad][token, 1] = -1
    routing = route(pad(taken, 6, -1), experts, world_size)
    x = [low_latency_cases.numbers((6, 64), BF16, 8, r) for r in range(world_size)]
    y = [low_latency_cases.numbers((2, 6 * world_size, 64), BF16, 9, r) for r in range(world_size)]
    own = y[rank].to(DEVICE)
    errors = []

    def next_of(fn: Callable[[], Any]) -> Any:
        finish()
        if rank == bad and not errors:
            errors.append(attempt(fn))
        return fn()

    arguments = (x[rank].to(DEVICE), given[rank].to(DEVICE))
    sizes: dict[str, Any] = {"num_experts": experts, "max_tokens_per_rank": 6, "group": group}
    if halves:
        flight = torch_ep.low_latency_dispatch_send(*arguments, **sizes)
        rows, plan = next_of(lambda: torch_ep.low_latency_dispatch_recv(flight))
    else:
        rows, plan = torch_ep.low_latency_dispatch(*arguments, **sizes)
    sums = next_of(lambda: torch_ep.low_latency_combine(own, plan))
    compare = Comparison(what)
    want = low_latency_cases.plan(routing, rank, None)
    filled = want["recv_pair"] >= 0
    for name in ("recv_pair", "recv_row", "tokens_per_expert", "source_offsets"):
        compare.expect(name, getattr(plan, name), want[name])
    moved = low_latency_cases.dispatch(routing, rank, pad(x, 6))
    compare.expect("rows", rows.cpu()[filled], moved[filled])
    compare.expect("sums", sums, low_latency_cases.combine(routing, rank, y, None))
    return errors, compare.differences + works(rank, world_size, group)


@pytest.mark.parametrize("halves", [False, True], ids=["whole", "halves"])
@pytest.mark.parametrize("what", ["high", "low", "twice"])
@every_world
def test_a_bad_index_raises_only_on_its_own_rank(name: str, what: str, halves: bool) -> None:
    answers = ranks_of(name).run(one_rank_is_wrong, what, halves)
    experts, op = 2 * len(answers), "ep::low_latency_dispatch"
    message = {
        "high": f"{op}: expected topk_idx in [-1, {experts}), got {experts + 3} at token 5, slot 1",
        "low": f"{op}: expected topk_idx in [-1, {experts}), got -7 at token 5, slot 1",
        "twice": f"{op}: expected different experts in one token, got expert 1 at token 0",
    }[what]
    for rank, (errors, differences) in enumerate(answers):
        assert not differences
        if rank == len(answers) - 1:
            ((kind, told),) = errors
            assert kind == "ValueError"
            assert told.startswith(message)
        else:
            assert errors == []


def beyond_limits(rank: int, world_size: int, group: str | None) -> tuple[list[tuple[str, str]], list[str]]:
    limit = limits(world_size)
    experts, topk, tokens = limit["num_experts"], limit["num_topk"], limit["low_latency_tokens"]
    rows, plan = good_dispatch(world_size, group)

    def dispatch(
        hidden: int = 64,
        num_topk: int = 1,
        num_experts: int = experts,
        most: int = 4,
        count: int = 1,
        dtype: torch.dtype = BF16,
        quantize: Quantize | None = None,
    ) -> Callable:
        x = torch.ones(count, hidden, device=DEVICE, dtype=dtype)
        topk_idx = torch.arange(num_topk, device=DEVICE).expand(count, -1).contiguous()
        return lambda: torch_ep.low_latency_dispatch(
            x, topk_idx, num_experts=num_experts, max_tokens_per_rank=most, group=group, quantize=quantize
        )

    calls = [
        dispatch(count=5),
        dispatch(most=tokens + 1),
        dispatch(num_topk=topk + 1),
        dispatch(num_experts=experts + world_size),
        dispatch(hidden=limit["hidden"] + 8),
        dispatch(hidden=4),
        dispatch(hidden=24, quantize="fp8"),
        dispatch(hidden=limit["hidden"], dtype=F32),
        lambda: torch_ep.low_latency_combine(rows.new_zeros(*rows.shape[:2], limit["hidden"] + 8), plan),
        lambda: torch_ep.low_latency_combine(rows.new_zeros(*rows.shape[:2], 4), plan),
        lambda: torch_ep.low_latency_combine(rows.new_zeros(*rows.shape[:2], limit["hidden"]).float(), plan),
    ]
    return [attempt(call) for call in calls], works(rank, world_size, group)


@every_world
def test_beyond_the_limits(name: str) -> None:
    ranks = ranks_of(name)
    limit, told = limits(ranks.world_size), "the limit given to torch_ep.init"
    experts, topk, hidden = limit["num_experts"], limit["num_topk"], limit["hidden"]
    tokens = limit["low_latency_tokens"]
    there, back = "ep::low_latency_dispatch", "ep::low_latency_combine"
    wide = f"{2 * hidden + 16 * topk} bytes with what travels along"
    too_little = (
        f"torch_ep.init makes room for rows of hidden = {hidden} elements of two bytes; give it a larger hidden"
    )
    want = [
        f"{there}: expected at most max_tokens_per_rank = 4 tokens, got 5",
        f"{there}: expected at most low_latency_tokens = {tokens}, {told}, got {tokens + 1}",
        f"{there}: expected at most num_topk = {topk}, {told}, got {topk + 1}",
        f"{there}: expected at most num_experts = {experts}, {told}, got {experts + ranks.world_size}",
        f"{there}: expected at most hidden = {hidden}, {told}, got {hidden + 8}",
        f"{there}: expected rows of a multiple of 16 bytes on backend nvlink, got 8",
        f"{there}: expected rows of a multiple of 16 bytes on backend nvlink, got 24",
        f"{there}: expected rows of at most {wide}, got {4 * hidden + 16}: {too_little}",
        f"{back}: expected at most hidden = {hidden}, {told}, got {hidden + 8}",
        f"{back}: expected rows of a multiple of 16 bytes on backend nvlink, got 8",
        f"{back}: expected rows of at most {wide}, got {4 * hidden}: {too_little}",
    ]
    for errors, differences in ranks.run(beyond_limits):
        for (kind, message), start in zip(errors, want, strict=True):
            assert kind == "ValueError", message
            assert message.startswith(start)
        assert not differences


@every_world
def test_stress(name: str) -> None:
    summary = stress.run(ranks_of(name), exchanges=400, seed=1, progress=False, limit_s=LIMIT_S, low_latency=True)
    assert not summary.problems


def main() -> int:
    parser = argparse.ArgumentParser(description="Replays of CUDA graphs, every bit checked; see the top of this file.")
    parser.add_argument("--count", type=int, default=10_000, help="replays (default 10000)")
    parser.add_argument("--calls", type=int, default=3, help="dispatches and combines in a graph (default 3)")
    parser.add_argument("--halves", action="store_true", help="in halves, two in flight")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--virtual", type=int, metavar="N", help="N ranks on one GPU")
    where.add_argument("--gpus", type=int, metavar="N", help="N ranks on a GPU each")
    where.add_argument("--gloo", type=int, metavar="N", help="N ranks without a GPU, and without graphs")
    args = parser.parse_args()
    name = next(f"{kind}-{n}" for kind in ("virtual", "gpus", "gloo") if (n := getattr(args, kind)))
    ranks = ranks_of(name)
    found: list[str] = []
    with tqdm(total=args.count, unit="replay") as bar:
        while bar.n < bar.total and not found:
            chunk = min(REPLAYS_PER_CHUNK, bar.total - bar.n)
            for differences in ranks.run(replays, chunk, args.calls, args.halves, bar.n):
                found += differences
            bar.update(chunk)
    for text in found:
        print(text, file=sys.stderr)
    print(f"{name}: {bar.n} replays of {args.calls} calls, {len(found)} kinds of result with differences")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
