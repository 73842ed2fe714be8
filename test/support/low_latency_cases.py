"""Expected results of the low-latency pair, over all ranks at once, and random problems for it: for tests on GPUs.

The expectation is vectorised torch of fixed shapes, which runs where its arguments are and never waits for a device: it
can be captured in a CUDA graph. It has the bits of `torch_ep.reference`. Everything of a case follows from its numbers,
so that every rank can work out the whole of it; without a GPU the cases run over gloo.

Symbols: W ranks, M tokens a rank at most, K experts a token, E experts, L = E / W of a rank, C = W * M rows that an
expert has room for. Token `source * M + t` is token t of rank `source`.
"""

from __future__ import annotations

import functools
import math
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import torch_ep
from support import nvlink_cases
from support.harness import random_topk, seeded
from support.nvlink_cases import (
    BF16,
    DEVICE,
    F16,
    F32,
    ROUTINGS,
    Comparison,
    poison,
    random_bits,
    route_tokens,
    to_device,
)
from torch_ep import LowLatencyPlan, LowLatencyStatistics, reference
from torch_ep.low_latency import Quantize

QUANTIZE: tuple[Quantize | None, ...] = (None, "fp8", "fp8_pow2", "fp8_ue8m0")


class Routing(NamedTuple):
    """The routing of all ranks."""

    world_size: int
    #: [C, K] int64: as given, -1 where there is no such token.
    experts: Tensor
    #: [C, K] int64: the row of each slot among those of its expert.
    position: Tensor
    #: [E, C] int64: the token of each row, or -1.
    token: Tensor
    #: [E, C] int64: the slot of that token.
    slot: Tensor
    #: [E, W] int64: where each source's rows end.
    ends: Tensor

    @property
    def num_local_experts(self) -> int:
        return self.token.shape[0] // self.world_size

    def of(self, t: Tensor, rank: int) -> Tensor:
        """[L, ...] what `rank` has of a tensor [E, ...]."""
        return t.unflatten(0, (self.world_size, -1))[rank]


def pad(tensors: Sequence[Tensor], max_tokens: int, fill: float = 0) -> Tensor:
    """[C, n] of tensors [tokens, n] of each rank."""
    whole = tensors[0].new_full((len(tensors), max_tokens, tensors[0].shape[1]), fill)
    for part, t in zip(whole, tensors, strict=True):
        part[: len(t)] = t
    return whole.flatten(0, 1)


def route(experts: Tensor, num_experts: int, world_size: int) -> Routing:
    """experts: [C, K] topk_idx of all ranks, -1 where there is no such token."""
    room, num_topk = experts.shape
    ints: dict[str, Any] = {"dtype": torch.int64, "device": experts.device}
    experts = experts.long()
    to = torch.where(experts >= 0, experts, num_experts)
    named = torch.zeros(room, num_experts + 1, **ints).scatter_(1, to, 1)
    slot = torch.zeros(room, num_experts + 1, **ints).scatter_(1, to, torch.arange(num_topk, **ints).expand_as(to))
    row = named.cumsum(0) - 1
    place = torch.where(named.bool(), row, room)[:, :num_experts].t()
    token = torch.full((num_experts, room + 1), -1, **ints)
    token = token.scatter_(1, place, torch.arange(room, **ints).expand_as(place))[:, :room]
    return Routing(
        world_size=world_size,
        experts=experts,
        position=row.gather(1, to),
        token=token,
        slot=slot[:, :num_experts].t().gather(1, token.clamp(min=0)),
        ends=named[:, :num_experts].unflatten(0, (world_size, -1)).sum(1).cumsum(0).t(),
    )


def plan(routing: Routing, rank: int, weights: Tensor | None) -> dict[str, Tensor]:
    """The tensors of `LowLatencyPlan` on `rank`, but its topk_idx. weights: [C, K] topk_weights of all ranks."""
    token, slot, ends = (routing.of(t, rank) for t in (routing.token, routing.slot, routing.ends))
    num_local, room = token.shape
    num_topk = routing.experts.shape[1]
    pair = torch.where(token >= 0, token * num_topk + slot, -1)
    here = (routing.experts >= 0) & (routing.experts // num_local == rank)
    recv_row = torch.where(here, routing.experts % num_local * room + routing.position, -1)
    row_weights = torch.ones_like(pair, dtype=F32) if weights is None else weights.flatten()[pair.clamp(min=0)]
    ints = {"tokens_per_expert": ends[:, -1], "source_offsets": ends, "recv_pair": pair, "recv_row": recv_row}
    own = {name: t.to(torch.int32, memory_format=torch.contiguous_format) for name, t in ints.items()}
    return {**own, "row_weights": row_weights}


def dispatch(routing: Routing, rank: int, values: Tensor) -> Tensor:
    """[L, C, n] rows, or scales, that `rank` receives; zeros where there is none. values: [C, n] of all ranks."""
    token = routing.of(routing.token, rank)
    bits = values.view(torch.uint8)  # indexing does not know every dtype
    return torch.where((token >= 0)[:, :, None], bits[token.clamp(min=0)], 0).view(values.dtype)


def combine(routing: Routing, rank: int, y: Sequence[Tensor], weights: Tensor | None) -> Tensor:
    """[M, H] sums that come home to `rank`. y: of each rank [L, C, H]; weights: as in `plan`."""
    num_local, room, hidden = y[0].shape
    max_tokens = room // routing.world_size
    own = slice(rank * max_tokens, (rank + 1) * max_tokens)
    experts, position = routing.experts[own], routing.position[own]
    there = torch.where(experts >= 0, experts // num_local, -1)
    row = experts % num_local * room + position
    shape, num_topk = (max_tokens, hidden), experts.shape[1]
    partial = []
    for r, rows in enumerate(y):
        total = torch.zeros(shape, dtype=F32, device=rows.device)
        seen = torch.zeros_like(there[:, 0], dtype=torch.bool)
        for k in range(num_topk):
            has = there[:, k] == r
            term = rows.flatten(0, 1)[torch.where(has, row[:, k], 0)].to(F32)
            if weights is not None:
                term = weights[own, k, None] * term
            # The first term as it is, so that -0 stays one.
            total = torch.where(has[:, None], torch.where(seen[:, None], total + term, term), total)
            seen = seen | has
        partial.append(total.to(rows.dtype).to(F32))
    total = torch.zeros(shape, dtype=F32, device=y[0].device)
    by_token = torch.stack(partial, 1)
    for k in range(num_topk):
        before = there[:, :k]
        has = (there[:, k] >= 0) & ~(before == there[:, k, None]).any(1)
        index = there[:, k].clamp(min=0)[:, None, None].expand(-1, 1, hidden)
        term = by_token.gather(1, index)[:, 0]
        is_first = (before < 0).all(1)[:, None]
        total = torch.where(has[:, None], torch.where(is_first, term, total + term), total)
    return total.to(y[0].dtype)


# --- random problems ---

WIDE = (2048, 2880, 4096, 7168, 8192)
# Numbers of a row: of 16 bytes and of multiples of it, in groups of 128 that are full and that are not.
SMALL = {BF16: (8, 24, 56, 64, 136, 1000), F16: (8, 40, 72, 128, 1000), F32: (4, 12, 64, 132, 516)}
SMALL_QUANTISED = (16, 48, 128, 144, 272, 640, 1008, 1024)
# What `virtual.limits` has room for: rows of twice as many bytes as its `hidden`, and what goes with them.
MOST_ROW_BYTES = 2 * 8192
MOST_NUMBERS = 2**19  # of the rows of a rank


def fits(hidden: int, dtype: torch.dtype) -> bool:
    """Whether the nvlink backend takes such rows, with the limits of `virtual.limits`."""
    row_bytes = hidden * dtype.itemsize
    return row_bytes % 16 == 0 and row_bytes <= MOST_ROW_BYTES


class Case(NamedTuple):
    """One problem over all ranks."""

    seed: int
    tokens: tuple[int, ...]  # of each rank
    max_tokens: int
    num_topk: int
    num_local_experts: int
    dtype: torch.dtype
    hidden: int
    routing: str = "holes"
    index_dtype: torch.dtype = torch.int64
    weighted: bool = True
    quantize: Quantize | None = None
    result_dtype: torch.dtype = BF16  # of what the experts compute
    shift: bool = False  # whether tensors begin one element after where an allocation does

    @property
    def num_experts(self) -> int:
        return self.num_local_experts * len(self.tokens)


def draw(seed: int, world_size: int) -> Case:
    r = random.Random(f"{seed} of {world_size}")
    quantize = r.choice(QUANTIZE)
    dtype = r.choice((BF16, F16, F32))
    wide = r.random() < 0.15
    hidden = r.choice(WIDE if wide else SMALL[dtype] if quantize is None else SMALL_QUANTISED)
    if quantize is None and not fits(hidden, dtype):
        dtype = BF16
    max_tokens = r.choice((1, 2, 5, 8) if wide else (1, 2, 7, 33, 64, 128))
    tokens = [r.choice((0, 1, max_tokens, r.randint(0, max_tokens))) for _ in range(world_size)]
    most_experts = max(1, MOST_NUMBERS // (world_size * max_tokens * hidden))
    return Case(
        seed=seed,
        tokens=tuple(tokens),
        max_tokens=max_tokens,
        num_topk=r.choice((1, 2, 3, 8, 9, 16)),
        num_local_experts=min(r.choice((1, 2, 5, 8, 16, 64)), most_experts),
        dtype=dtype,
        hidden=hidden,
        routing=r.choice(ROUTINGS),
        index_dtype=r.choice((torch.int32, torch.int64)),
        weighted=r.random() < 0.7,
        quantize=quantize,
        result_dtype=r.choice([t for t in (BF16, F16, F32) if fits(hidden, t)]),
        shift=r.random() < 0.2,
    )


def numbers(shape: tuple[int, ...], dtype: torch.dtype, *seeds: int) -> Tensor:
    """From -8 to 8, of few bits; some of them zeros of either sign."""
    values = torch.randint(-(2**15), 2**15, shape, generator=seeded(*seeds), dtype=torch.int16)
    values = values.to(F32) / 4096
    return torch.where(values * 4096 % 16 == 0, values * 0, values).to(dtype)


def many_numbers(shape: tuple[int, ...], dtype: torch.dtype, *seeds: int) -> Tensor:
    """The same ones over and over, of a number that divides no row: for less time."""
    count = math.prod(shape)
    values = numbers((65521,), dtype, *seeds)
    return values.repeat(count // len(values) + 1)[:count].view(shape)


def rows_of(case: Case, rank: int) -> Tensor:
    """x of one rank: any bits where they are copied; where they are quantized, numbers of very different sizes."""
    shape = (case.tokens[rank], case.hidden)
    if case.quantize is None:
        return random_bits(shape, case.dtype, case.seed, rank, 2)
    x = numbers(shape, F32, case.seed, rank, 2)
    x *= 2.0 ** torch.randint(-14, 12, (shape[0], 1), generator=seeded(case.seed, rank, 3))
    x[::5, :128] *= 0
    return x.to(case.dtype)


class Problem(NamedTuple):
    """A case's tensors, on CPU, of every rank."""

    topk_idx: list[Tensor]
    x: list[Tensor]
    weights: list[Tensor] | None
    routing: Routing
    all_weights: Tensor | None  # [C, K]
    rows: Tensor  # [C, H] as they travel
    scales: Tensor | None  # [C, S]
    y: list[Tensor]  # with NaN in rows that nobody sent


def make_problem(case: Case) -> Problem:
    world_size = len(case.tokens)
    ranks = range(world_size)
    topk_idx = route_tokens(
        nvlink_cases.Case(
            case.seed,
            case.tokens,
            case.num_topk,
            case.num_local_experts,
            case.dtype,
            case.hidden,
            routing=case.routing,
            index_dtype=case.index_dtype,
        )
    )
    x = [rows_of(case, r) for r in ranks]
    weights = None
    if case.weighted:
        weights = [numbers((n, case.num_topk), F32, case.seed, r, 4) for r, n in enumerate(case.tokens)]
    routing = route(pad(topk_idx, case.max_tokens, -1), case.num_experts, world_size)
    rows, scales = pad([t.view(torch.uint8) for t in x], case.max_tokens).view(case.dtype), None
    if case.quantize is not None:
        rows, scales = reference.quantize(rows, case.quantize)
    shape = (case.num_local_experts, world_size * case.max_tokens, case.hidden)
    y = [many_numbers(shape, case.result_dtype, case.seed, r, 5) for r in ranks]
    for r in ranks:
        y[r][routing.of(routing.token, r) < 0] = torch.nan
    return Problem(
        topk_idx=topk_idx,
        x=x,
        weights=weights,
        routing=routing,
        all_weights=None if weights is None else pad(weights, case.max_tokens),
        rows=rows,
        scales=scales,
        y=y,
    )


_problem_lock = threading.Lock()
_cached_problem = functools.lru_cache(maxsize=32)(make_problem)


def problem_of(case: Case) -> Problem:
    """The same object for all virtual ranks, which are threads of one process."""
    with _problem_lock:
        return _cached_problem(case)


# --- exchanges, checked ---


def scale_strides(case: Case, num_scales: int) -> tuple[int, int, int]:
    padded = (len(case.tokens) * case.max_tokens + 3) // 4 * 4
    return num_scales * padded, 1, padded


class Checked:
    """A dispatch and a combine of one case on one rank, step by step; collects what differs. Each step is collective.

    In halves: `send`, `receive`, `send_sums`, `receive_sums`. Whole: without the steps that send.
    """

    def __init__(self, rank: int, group: str | None, case: Case) -> None:
        self.rank, self.case = rank, case
        self.problem = problem_of(case)
        self.compare = Comparison(case)
        self.statistics = LowLatencyStatistics.zeros(case.num_experts, group, device=DEVICE)
        self._y: Tensor | None = None
        self._flight: Any = None
        own = functools.partial(to_device, shift=case.shift)
        weights = self.problem.weights
        x, topk_idx = own(self.problem.x[rank]), own(self.problem.topk_idx[rank])
        self._read = [x] if weights is None else [x, own(weights[rank])]  # by the time that a dispatch has been sent
        self._given = (x, topk_idx)
        self._options: dict[str, Any] = {
            "num_experts": case.num_experts,
            "max_tokens_per_rank": case.max_tokens,
            "group": group,
            "topk_weights": None if weights is None else self._read[1],
            "quantize": case.quantize,
        }

    def send(self) -> None:
        self._flight = torch_ep.low_latency_dispatch_send(*self._given, **self._options)
        for t in self._read:
            t.fill_(torch.nan)

    def receive(self) -> None:
        problem, routing = self.problem, self.problem.routing
        want = plan(routing, self.rank, problem.all_weights)
        rows = dispatch(routing, self.rank, problem.rows)
        scales = None if problem.scales is None else dispatch(routing, self.rank, problem.scales)
        poison(*want.values(), rows, scales)
        if self._flight is None:
            result, got = torch_ep.low_latency_dispatch(*self._given, **self._options, statistics=self.statistics)
        else:
            result, got = torch_ep.low_latency_dispatch_recv(self._flight, statistics=self.statistics)
            self._flight = None
        filled = want["recv_pair"] >= 0
        if scales is None:
            self._expect_filled("rows", result, rows, rows.stride(), filled)
        else:
            self._expect_filled("rows", result[0], rows, rows.stride(), filled)
            self._expect_filled("scales", result[1], scales, scale_strides(self.case, scales.shape[2]), filled)
        weights = want.pop("row_weights")
        self._expect_filled("row_weights", got.row_weights, weights, weights.stride(), filled)
        for name, t in want.items():
            self.compare.expect(name, getattr(got, name), t)
        self.compare.expect("topk_idx", got.topk_idx, problem.topk_idx[self.rank])
        counts = want["tokens_per_expert"].long()
        self.compare.expect("statistics", self.statistics.tokens_per_expert, counts)
        # Undefined is undefined: nobody may read it.
        self.plan = got._replace(row_weights=got.row_weights.masked_fill(~filled.to(DEVICE), torch.nan))

    def send_sums(self) -> None:
        self._y = self._results()
        self._flight = torch_ep.low_latency_combine_send(self._y, self.plan)
        self._y.fill_(torch.nan)

    def receive_sums(self) -> None:
        problem, tokens = self.problem, self.case.tokens[self.rank]
        want = combine(problem.routing, self.rank, problem.y, problem.all_weights)[:tokens]
        poison(want)
        if self._flight is None:
            got = torch_ep.low_latency_combine(self._results(), self.plan, statistics=self.statistics)
        else:
            got = torch_ep.low_latency_combine_recv(self._flight, statistics=self.statistics)
            self._flight = None
        self.compare.expect("sums", got, want)
        waits = self.statistics.wait_ns.tolist()
        if min(waits) < 0 or waits[self.rank] != 0 or len(waits) != len(self.case.tokens):
            self.compare.differences.append(f"{self.case}: waited {waits} ns")

    def _results(self) -> Tensor:
        return to_device(self.problem.y[self.rank], self.case.shift)

    def _expect_filled(self, name: str, got: Tensor, want: Tensor, strides: tuple[int, ...], filled: Tensor) -> None:
        """Only where `filled` [L, C]: whatever lies behind the rows of an expert may be anything."""
        if (got.dtype, got.shape, got.stride()) != (want.dtype, want.shape, strides):
            self.compare.differences.append(
                f"{self.case}: {name}: expected {want.dtype} {list(want.shape)} of strides {strides}, "
                f"got {got.dtype} {list(got.shape)} of strides {got.stride()}"
            )
            return
        if want.dtype == torch.float8_e4m3fn:  # indexing does not know it
            got, want = got.view(torch.uint8), want.view(torch.uint8)
        self.compare.expect(name, got.to(want.device)[filled], want[filled])


def nothing() -> None:
    """The default action between the halves of an operator."""


def check_whole(rank: int, group: str | None, case: Case) -> list[str]:
    checked = Checked(rank, group, case)
    checked.receive()
    checked.receive_sums()
    return checked.compare.differences


def check_in_flight(
    rank: int, group: str | None, cases: Sequence[Case], between: Callable[[], object] = nothing
) -> list[str]:
    """One case, or two of which both are on their way at times. `between`: done while something is."""
    runs = [Checked(rank, group, case) for case in cases]
    for run in runs:
        run.send()
        between()
    for run in runs:
        run.receive()
        run.send_sums()
        between()
    for run in runs:
        run.receive_sums()
    return [difference for run in runs for difference in run.compare.differences]


def check_cases(rank: int, world_size: int, group: str | None, cases: Sequence[Case]) -> list[str]:
    """The first differences: of the cases whole, in halves and two at a time, in turn."""
    differences: list[str] = []
    for i in range(0, len(cases), 4):
        for case in cases[i : i + 1]:
            differences += check_whole(rank, group, case)
        differences += check_in_flight(rank, group, cases[i + 1 : i + 2])
        differences += check_in_flight(rank, group, cases[i + 2 : i + 4])
    return differences[:5]


def check_seeds(rank: int, world_size: int, group: str | None, first: int, count: int) -> list[str]:
    return check_cases(rank, world_size, group, [draw(seed, world_size) for seed in range(first, first + count)])


def check_without(rank: int, world_size: int, group: str | None, lost: int, steps: int) -> list[str]:
    """Decode steps of the other ranks. `lost` counts as absent: it has no tokens, and its experts give nothing."""
    differences: list[str] = []
    num_local, max_tokens, hidden = 2, 6, 64
    experts = num_local * world_size
    for step in range(steps):
        given = [random_topk(max_tokens, 2, experts, seeded(step, r)) for r in range(world_size)]
        taken = [torch.where(t // num_local == lost, -1, t) for t in given]
        taken[lost] = torch.full_like(taken[lost], -1)
        routing = route(pad(taken, max_tokens, -1), experts, world_size)
        x = [numbers((max_tokens, hidden), BF16, step, r, 1) for r in range(world_size)]
        y = [numbers((num_local, max_tokens * world_size, hidden), BF16, step, r, 2) for r in range(world_size)]
        arguments = (x[rank].to(DEVICE), given[rank].to(DEVICE))
        rows, got = torch_ep.low_latency_dispatch(
            *arguments, num_experts=experts, max_tokens_per_rank=max_tokens, group=group
        )
        sums = torch_ep.low_latency_combine(y[rank].to(DEVICE), got)
        compare = Comparison(f"step {step} without rank {lost}")
        want = plan(routing, rank, None)
        filled = want["recv_pair"] >= 0
        for name in ("tokens_per_expert", "source_offsets", "recv_pair", "recv_row"):
            compare.expect(name, getattr(got, name), want[name])
        compare.expect("rows", rows.cpu()[filled], dispatch(routing, rank, pad(x, max_tokens))[filled])
        compare.expect("sums", sums, combine(routing, rank, y, None))
        differences += compare.differences
    return differences


def works(rank: int, world_size: int, group: str | None) -> list[str]:
    """Returns differences of valid exchanges afterwards: both halves of the memory, every form, the other kind."""
    tokens = tuple(3 + r for r in range(world_size))
    cases = [
        Case(i, tokens, 9, 3, 4, BF16, 144, quantize=quantize, weighted=i % 2 == 0)
        for i, quantize in enumerate((*QUANTIZE, None))
    ]
    return check_cases(rank, world_size, group, cases) + nvlink_cases.works(rank, world_size, group)


def reference_results(case: Case) -> tuple[list[tuple[Tensor, Tensor | None, LowLatencyPlan]], list[Tensor]]:
    """Returns the results of `torch_ep.reference` for a case: (rows, scales, plan) per rank, and the sums."""
    problem = problem_of(case)
    dispatched = reference.low_latency_dispatch(
        problem.x,
        problem.topk_idx,
        case.num_experts,
        case.max_tokens,
        topk_weights=problem.weights,
        quantize=case.quantize,
    )
    return dispatched, reference.low_latency_combine(problem.y, [plan for _, _, plan in dispatched])
