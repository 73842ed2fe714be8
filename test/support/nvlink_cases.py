"""Random problems for a backend, and what every rank finds wrong with its results: for the tests of nvlink.

Everything of a case follows from its numbers, so that every rank can work out the whole of it. Without a GPU the cases
run on CPU tensors, over gloo: the results are the same.
"""

from __future__ import annotations

import functools
import math
import random
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

import torch_ep
from support import expected
from support.harness import random_topk, same_bits, seeded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

BF16, F16, F32, F64, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn
U8 = torch.uint8

# (dtype, hidden): rows of 16 B, of odd and of even multiples of it, of no multiple of it, of none.
SMALL_ROWS = [
    (BF16, 8), (BF16, 24), (BF16, 56), (BF16, 515), (BF16, 64), (BF16, 1000),
    (F16, 1), (F16, 8), (F16, 40), (F16, 72),
    (F32, 4), (F32, 12), (F32, 5), (F32, 64), (F32, 33),
    (F64, 2), (F64, 6), (F64, 3), (F64, 130),
    (FP8, 16), (FP8, 48), (FP8, 7), (FP8, 128), (FP8, 1024),
]  # fmt: skip
WIDE_ROWS = [
    (BF16, 2880), (BF16, 4096), (BF16, 7168), (BF16, 8192), (F16, 2880), (F32, 7168), (F64, 8192), (FP8, 7168),
    (FP8, 8192), (F32, 4099),
]  # fmt: skip
ROUTINGS = ("random", "random", "holes", "holes", "one expert", "one rank", "own rank", "none", "few tokens")
SCALES = [(F32, 1), (F32, 3), (F32, 4), (F32, 56), (U8, 1), (U8, 3), (U8, 4), (U8, 56), (U8, 16)]
CAPACITIES = ("exact", "exact", "fits", "too small", "zero", "tail")


class Case(NamedTuple):
    """One problem over all ranks, in one mode."""

    seed: int
    tokens: tuple[int, ...]  # of each rank
    num_topk: int
    num_local_experts: int
    dtype: torch.dtype
    hidden: int
    routing: str = "holes"
    layout: torch_ep.Layout = "expert_major"
    capacity: str = "exact"
    alignment: int = 1
    index_dtype: torch.dtype = torch.int64
    weight_dtype: torch.dtype | None = F32  # of topk_weights; None: none travel
    row_weight_dtype: torch.dtype = F32
    scales: tuple[torch.dtype, int] | None = None
    shift: bool = False  # whether tensors begin one element after where an allocation does

    @property
    def num_experts(self) -> int:
        return self.num_local_experts * len(self.tokens)


def draw(seed: int, world_size: int) -> Case:
    r = random.Random(seed)
    wide = r.random() < 0.12
    dtype, hidden = r.choice(WIDE_ROWS if wide else SMALL_ROWS)
    most = 6 if wide else r.choice((1, 5, 13, 40))
    tokens = [r.randint(0, most) for _ in range(world_size)]
    if r.random() < 0.3:
        tokens[r.randrange(world_size)] = 0
    layout: torch_ep.Layout = r.choice(("rank_major", "expert_major"))
    return Case(
        seed=seed,
        tokens=tuple(tokens),
        num_topk=r.choice((1, 2, 3, 8, 9, 16, 32)),
        num_local_experts=r.choice((1, 2, 3, 5, 8, 16, 64)),
        dtype=dtype,
        hidden=hidden,
        routing=r.choice(ROUTINGS),
        layout=layout,
        capacity=r.choice(CAPACITIES),
        alignment=r.choice((1, 8, 128)) if layout == "expert_major" else 1,
        index_dtype=r.choice((torch.int32, torch.int64)),
        weight_dtype=r.choice((None, F32, BF16, F64)),
        row_weight_dtype=r.choice((F32, BF16, F64)),
        scales=r.choice((None, r.choice(SCALES))),
        shift=r.random() < 0.25,
    )


def route_tokens(case: Case) -> list[Tensor]:
    """topk_idx of every rank."""
    world_size, num_local = len(case.tokens), case.num_local_experts
    results = []
    for rank, n in enumerate(case.tokens):
        g = seeded(case.seed, rank, 1)
        if case.routing in ("one rank", "own rank"):
            holder = rank if case.routing == "own rank" else case.seed % world_size
            idx = random_topk(n, case.num_topk, num_local, g, holes=0.0)
            idx[idx >= 0] += holder * num_local
        else:
            idx = random_topk(n, case.num_topk, case.num_experts, g, holes=0.0 if case.routing == "random" else 0.4)
        if case.routing == "none":
            idx.fill_(-1)
        elif case.routing == "one expert":
            idx.fill_(-1)
            idx[:, case.seed % case.num_topk] = case.seed % case.num_experts
        elif case.routing == "few tokens":
            idx[torch.rand(n, generator=g) < 0.8] = -1
        results.append(idx.to(case.index_dtype))
    return results


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, *seeds: int) -> Tensor:
    """Any bit patterns: what is copied need not be a number."""
    size = torch.empty((), dtype=dtype).element_size()
    bits = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), generator=seeded(*seeds), dtype=torch.uint8)
    return bits.view(dtype)


def random_numbers(shape: tuple[int, ...], dtype: torch.dtype, *seeds: int) -> Tensor:
    """Some of them zeros of either sign."""
    g = seeded(*seeds)
    values = torch.randn(shape, generator=g, dtype=torch.float64)
    values[torch.rand(shape, generator=g) < 0.05] *= 0
    return values.to(dtype)


class Problem(NamedTuple):
    """A case's tensors, on CPU, of every rank."""

    topk_idx: list[Tensor]
    options: dict[str, Any]
    routing: expected.Routing
    x: list[Tensor]
    weights: list[Tensor] | None
    scales: list[Tensor] | None
    y: list[Tensor]  # with NaN in rows that nobody sent
    back: list[Tensor] | None  # weights that come back
    row_weights: list[Tensor]


def make_problem(case: Case) -> Problem:
    topk_idx = route_tokens(case)
    options: dict[str, Any] = {"layout": case.layout, "alignment": case.alignment}
    exact = expected.route(topk_idx, case.num_experts, **options)
    needed = max(p.num_rows for p in exact.plans)
    options["capacity"] = {
        "exact": None,
        "fits": needed,
        "too small": needed // 2 // case.alignment * case.alignment,
        "zero": 0,
        "tail": needed + 3 * case.alignment,
    }[case.capacity]
    routing = exact if case.capacity == "exact" else expected.route(topk_idx, case.num_experts, **options)
    ranks = range(len(case.tokens))
    empty, maps = [], []
    for received in routing.ranks:
        recv_map = received.plan.recv_pair if received.plan.recv_topk_idx is None else received.plan.recv_topk_idx
        assert recv_map is not None
        maps.append(recv_map)
        if received.plan.recv_pair is not None:
            empty.append(received.plan.recv_pair < 0)
        else:
            empty.append(torch.arange(received.plan.num_rows) >= len(received.source))
    sum_type = BF16 if case.dtype == FP8 else case.dtype
    y = [random_numbers((len(empty[r]), case.hidden), sum_type, case.seed, r, 5) for r in ranks]
    row_weights = [random_numbers((len(empty[r]),), case.row_weight_dtype, case.seed, r, 6) for r in ranks]
    weights = back = scales = None
    if case.weight_dtype is not None:
        weights = [random_bits(tuple(topk_idx[r].shape), case.weight_dtype, case.seed, r, 3) for r in ranks]
        back = [random_bits(tuple(maps[r].shape), case.weight_dtype, case.seed, r, 7) for r in ranks]
    for r in ranks:
        y[r][empty[r]] = torch.nan
        row_weights[r][empty[r]] = torch.nan
        if back is not None:
            back[r][maps[r] < 0] = torch.nan
    if case.scales is not None:
        dtype, width = case.scales
        scales = [random_bits((n, width), dtype, case.seed, r, 4) for r, n in enumerate(case.tokens)]
    return Problem(
        topk_idx=topk_idx,
        options=options,
        routing=routing,
        x=[random_bits((n, case.hidden), case.dtype, case.seed, r, 2) for r, n in enumerate(case.tokens)],
        weights=weights,
        scales=scales,
        y=y,
        back=back,
        row_weights=row_weights,
    )


_problem_lock = threading.Lock()
_cached_problem = functools.lru_cache(maxsize=32)(make_problem)


def problem_of(case: Case) -> Problem:
    """The same object for all virtual ranks, which are threads of one process."""
    with _problem_lock:
        return _cached_problem(case)


def to_device(t: Tensor, shift: bool = False) -> Tensor:
    """A copy; with `shift` its data begins one element after an allocation does."""
    if not shift:
        return t.to(DEVICE, copy=True)
    whole = torch.empty(t.numel() + 1, dtype=t.dtype, device=DEVICE)
    whole[1:].view(torch.uint8).copy_(t.reshape(-1).view(torch.uint8))
    return whole[1:].view(t.shape)


def poison(*results: Tensor | None) -> None:
    """Leaves what the allocator will use for results of these sizes full of a pattern that no result has."""
    blocks = [torch.empty(t.nbytes, dtype=torch.uint8, device=DEVICE) for t in results if t is not None and t.nbytes]
    for block in blocks:
        block.fill_(0x7F)


class Comparison:
    """Collects differences, so that a rank that finds one still takes part in the exchanges that follow."""

    def __init__(self, title: object) -> None:
        self.title = title
        self.differences: list[str] = []

    def expect(self, name: str, got: Tensor | None, want: Tensor | None) -> None:
        if got is None or want is None:
            if got is not want:
                self.differences.append(f"{self.title}: {name}: expected {type(want)}, got {type(got)}")
            return
        got = got.detach()
        if got.device != want.device:
            got = got.to(want.device)
        if not same_bits(got, want):
            self.differences.append(f"{self.title}: {name}: {_difference(got, want)}")


def _difference(got: Tensor, want: Tensor) -> str:
    if got.dtype != want.dtype or got.shape != want.shape:
        return f"expected {want.dtype} {list(want.shape)}, got {got.dtype} {list(got.shape)}"
    if not got.is_contiguous():
        return f"expected contiguous, got strides {got.stride()}"
    flat_got, flat_want = got.reshape(-1), want.reshape(-1)
    size = want.element_size()
    bad = (flat_got.view(torch.uint8) != flat_want.view(torch.uint8)).view(-1, size).any(1).nonzero()[:, 0]
    first = int(bad[0])
    row = first // max(1, math.prod(want.shape[1:]))
    return (
        f"{len(bad)} of {want.numel()} elements, the first in row {row} of {want.shape[0] if want.dim() else 1}: "
        f"expected {flat_want[first].item()}, got {flat_got[first].item()}"
    )


def check_plan(compare: Comparison, got: torch_ep.Plan, want: torch_ep.Plan) -> None:
    for name in got._fields[:8]:
        compare.expect(name, getattr(got, name), getattr(want, name))
    if (got.layout, got.num_rows) != (want.layout, want.num_rows):
        compare.differences.append(f"{compare.title}: expected {want.num_rows} rows, got {got.num_rows}, {got.layout}")


def check_case(rank: int, group: str | None, case: Case) -> list[str]:
    """Plan, dispatch and combine of one case on this rank; what differs. Collective."""
    compare = Comparison(case)
    problem = problem_of(case)
    routing, want_plan = problem.routing, problem.routing.plans[rank]
    own = functools.partial(to_device, shift=case.shift)

    topk_idx = own(problem.topk_idx[rank])
    poison(*(t for t in want_plan if isinstance(t, Tensor)))
    plan = torch_ep.plan(topk_idx, case.num_experts, group, **problem.options)
    check_plan(compare, plan, want_plan)

    x = own(problem.x[rank])
    rows = expected.dispatch(routing, rank, problem.x)
    payloads: dict[str, Tensor] = {}
    want = [rows]
    if problem.weights is not None:
        payloads["topk_weights"] = own(problem.weights[rank])
        want.append(expected.dispatch_weights(routing, rank, problem.weights))
    if problem.scales is not None:
        payloads["scales"] = own(problem.scales[rank])
        want.append(expected.dispatch(routing, rank, problem.scales))
    if payloads:
        poison(*want)
        got = torch_ep.dispatch(x, plan, **payloads)
        for name, a, b in zip(("rows", *payloads), got, want, strict=True):
            compare.expect(f"dispatch: {name}", a, b)
        del got
    poison(rows)
    compare.expect("dispatch alone", torch_ep.dispatch(x, plan, after=topk_idx), rows)

    y = own(problem.y[rank])
    sums = expected.combine(routing, rank, problem.y)
    if problem.back is not None:
        home = expected.combine_weights(routing, rank, problem.back)
        poison(sums, home)
        got_sums, got_home = torch_ep.combine(y, plan, topk_weights=own(problem.back[rank]))
        compare.expect("combine with weights: sums", got_sums, sums)
        compare.expect("combine with weights: weights", got_home, home)
        del got_sums, got_home
    else:
        poison(sums)
        compare.expect("combine alone", torch_ep.combine(y, plan), sums)
    weighted = expected.combine(routing, rank, problem.y, problem.row_weights)
    poison(weighted)
    got_weighted = torch_ep.combine(y, plan, row_weights=own(problem.row_weights[rank]))
    compare.expect("weighted combine", got_weighted, weighted)
    return compare.differences


def check_cases(rank: int, world_size: int, group: str | None, cases: list[Case]) -> list[str]:
    """The first differences of these, over all of them, so that ranks stay in step."""
    differences: list[str] = []
    for case in cases:
        differences += check_case(rank, group, case)
    return differences[:5]


def check_seeds(rank: int, world_size: int, group: str | None, first: int, count: int) -> list[str]:
    return check_cases(rank, world_size, group, [draw(seed, world_size) for seed in range(first, first + count)])


def works(rank: int, world_size: int, group: str | None) -> list[str]:
    """Runs a valid exchange of each kind afterwards. Returns the differences."""
    tokens = tuple(5 + r for r in range(world_size))
    return check_cases(
        rank,
        world_size,
        group,
        [
            Case(1, tokens, 3, 4, BF16, 24, scales=(F32, 3)),
            Case(2, tokens, 3, 4, F32, 12, layout="rank_major", capacity="tail"),
        ],
    )
