"""The operators compute the bits of the specification, `torch_ep.reference`, on one to four ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.harness import random_topk, same_bits, seeded, world
from torch import Tensor

import torch_ep
from torch_ep import reference

WORLD_SIZES = (1, 2, 3, 4)
SUM_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("rank_major", "expert_major")

# The same examples on every machine and run; no deadline, since other tests may run beside these.
rich = settings(derandomize=True, deadline=None, database=None, max_examples=8)


class Case(NamedTuple):
    """One problem over all ranks. All numbers follow from the seed, so every rank can work out the whole of it."""

    seed: int
    tokens: tuple[int, ...]  # of each rank
    num_topk: int
    num_local_experts: int
    holes: float  # share of the slots without an expert
    hidden: int
    alignment: int
    index_dtype: torch.dtype

    @property
    def num_experts(self) -> int:
        return self.num_local_experts * len(self.tokens)

    def topk_idx(self) -> list[Tensor]:
        """Of every rank."""
        results = []
        for rank, tokens in enumerate(self.tokens):
            idx = random_topk(tokens, self.num_topk, self.num_experts, seeded(self.seed, rank), self.holes)
            if self.holes:
                idx[3::5] = -1  # whole tokens without an expert
            results.append(idx.to(self.index_dtype))
        return results

    def rows(self, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
        """A tensor of random numbers for every rank, some of them zeros of either sign."""
        results = []
        for rank, shape in enumerate(shapes):
            values = torch.randn(shape, generator=seeded(self.seed, rank, 1), dtype=torch.float64)
            values[torch.rand(shape, generator=seeded(self.seed, rank, 2)) < 0.05] *= 0
            results.append(values.to(dtype))
        return results


@st.composite
def cases(draw: st.DrawFn, world_size: int) -> Case:
    return Case(
        seed=draw(st.integers(0, 2**20)),
        tokens=tuple(draw(st.sampled_from((0, 1, 2, 5, 13, 24))) for _ in range(world_size)),
        num_topk=draw(st.sampled_from((1, 2, 3, 6, 8, 32))),
        num_local_experts=draw(st.sampled_from((1, 2, 3, 5))),
        holes=draw(st.sampled_from((0.0, 0.1, 0.4, 1.0))),
        hidden=draw(st.sampled_from((1, 3, 7, 16, 515))),
        alignment=draw(st.sampled_from((1, 4, 16))),
        index_dtype=draw(st.sampled_from((torch.int32, torch.int64))),
    )


def worst_cases(world_size: int) -> list[Case]:
    """Cases that every run covers, in addition to those that hypothesis draws."""
    uneven = (17, 0, 6, 1)[:world_size]
    return [
        Case(1, (0,) * world_size, 2, 2, 0.0, 3, 4, torch.int64),  # no tokens at all
        Case(2, uneven, 32, 3, 0.1, 1, 16, torch.int32),  # more slots than experts, rows of one element
        Case(3, uneven[::-1], 4, 4, 0.3, 515, 4, torch.int64),
    ]


def over_cases(world_size: int, check: Callable[[Case], None]) -> None:
    """`check` with the worst cases, then with those that hypothesis draws."""
    test = given(cases(world_size))(check)
    for case in worst_cases(world_size):
        test = example(case)(test)
    rich(test)()


class Mode(NamedTuple):
    name: str
    layout: str
    capacity: int | None
    alignment: int

    def arguments(self) -> dict[str, Any]:
        return {"layout": self.layout, "capacity": self.capacity, "alignment": self.alignment}


def modes(case: Case) -> Iterator[Mode]:
    """Both layouts; sizes as they come, with drops, just enough, and more than enough."""
    for layout in LAYOUTS:
        alignment = 1 if layout == "rank_major" else case.alignment
        plans = reference.plan(case.topk_idx(), case.num_experts, layout=layout, alignment=alignment)
        needed = max(p.num_rows for p in plans)
        capacities = {
            "exact": None,
            "too small": needed // 2 // alignment * alignment,
            "just enough": needed,
            "large": needed + 3 * alignment,
        }
        for name, capacity in capacities.items():
            yield Mode(f"{layout}, {name}", layout, capacity, alignment)


def _brief(a: Tensor, b: Tensor) -> str:
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{a.dtype} {list(a.shape)}"
    return f"{a.flatten()[a.flatten() != b.flatten()][:3].tolist()}"


class Comparison:
    """Collects differences, so that a rank that finds one still takes part in the exchanges that follow."""

    def __init__(self) -> None:
        self.differences: list[str] = []

    def expect(self, name: str, got: Tensor | None, want: Tensor | None) -> None:
        if got is None or want is None:
            if got is not want:
                self.differences.append(f"{name}: expected {want}, got {got}")
        elif not same_bits(got, want):
            self.differences.append(f"{name}: expected {_brief(want, got)}, got {_brief(got, want)}")

    def raise_if_any(self) -> None:
        assert not self.differences, "\n".join(self.differences[:5])


def on_ranks(world_size: int, fn: Callable, *args: Any) -> list[Any]:
    """`fn(rank, world_size, *args)` on every rank; with one rank here, without any process group."""
    return [fn(0, 1, *args)] if world_size == 1 else world(world_size).run(fn, *args)


def padding(plan: torch_ep.Plan) -> Tensor:
    """[R] bool: rows that no rank sent."""
    if plan.recv_pair is not None:
        return plan.recv_pair < 0
    return torch.arange(plan.num_rows) >= int(plan.recv_counts.sum())


def _plan_equals(rank: int, world_size: int, case: Case) -> None:
    compare = Comparison()
    topk_idx = case.topk_idx()
    for mode in modes(case):
        got = torch_ep.plan(topk_idx[rank], case.num_experts, **mode.arguments())
        want = reference.plan(topk_idx, case.num_experts, **mode.arguments())[rank]
        for field in got._fields[:8]:
            compare.expect(f"{mode.name}: {field}", getattr(got, field), getattr(want, field))
        if (got.layout, got.num_rows) != (want.layout, want.num_rows):
            compare.differences.append(f"{mode.name}: {got.layout}, {got.num_rows} rows")
    compare.raise_if_any()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_plan(world_size: int) -> None:
    def check(case: Case) -> None:
        on_ranks(world_size, _plan_equals, case)

    over_cases(world_size, check)


def _dispatch_equals(rank: int, world_size: int, case: Case) -> None:
    compare = Comparison()
    topk_idx = case.topk_idx()
    shapes = [(tokens, case.hidden) for tokens in case.tokens]
    for mode in modes(case):
        plan = torch_ep.plan(topk_idx[rank], case.num_experts, **mode.arguments())
        plans = reference.plan(topk_idx, case.num_experts, **mode.arguments())
        for dtype in SUM_TYPES:
            x = case.rows(shapes, dtype)
            w = case.rows([tuple(idx.shape) for idx in topk_idx], dtype)
            rows, weights = torch_ep.dispatch(x[rank], plan, topk_weights=w[rank])
            want_rows, want_weights = reference.dispatch(x, plans, topk_weights=w)[rank]
            compare.expect(f"{mode.name}: rows", rows, want_rows)
            compare.expect(f"{mode.name}: weights", weights, want_weights)
        compare.expect(f"{mode.name}: rows alone", torch_ep.dispatch(x[rank], plan), want_rows)
    compare.raise_if_any()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_dispatch(world_size: int) -> None:
    def check(case: Case) -> None:
        on_ranks(world_size, _dispatch_equals, case)

    over_cases(world_size, check)


def _fp8_equals(rank: int, world_size: int, case: Case, row_dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    compare = Comparison()
    topk_idx = case.topk_idx()
    x = [t.view(row_dtype) for t in case.rows([(n, case.hidden) for n in case.tokens], torch.float8_e4m3fn)]
    scales = [
        torch.randint(0, 256, (tokens, 3), generator=seeded(case.seed, r)).to(scale_dtype)
        for r, tokens in enumerate(case.tokens)
    ]
    w = case.rows([tuple(idx.shape) for idx in topk_idx], torch.float32)
    for mode in modes(case):
        plan = torch_ep.plan(topk_idx[rank], case.num_experts, **mode.arguments())
        plans = reference.plan(topk_idx, case.num_experts, **mode.arguments())
        want_rows, want_weights = reference.dispatch(x, plans, topk_weights=w)[rank]
        want_scales, _ = reference.dispatch(scales, plans)[rank]
        rows, weights, row_scales = torch_ep.dispatch(x[rank], plan, topk_weights=w[rank], scales=scales[rank])
        compare.expect(f"{mode.name}: rows", rows, want_rows)
        compare.expect(f"{mode.name}: weights", weights, want_weights)
        compare.expect(f"{mode.name}: scales", row_scales, want_scales)
        rows, row_scales = torch_ep.dispatch(x[rank], plan, scales=scales[rank])
        compare.expect(f"{mode.name}: rows without weights", rows, want_rows)
        compare.expect(f"{mode.name}: scales without weights", row_scales, want_scales)
    compare.raise_if_any()


@pytest.mark.parametrize(
    ("row_dtype", "scale_dtype"),
    [(torch.float8_e4m3fn, torch.float32), (torch.float8_e5m2, torch.uint8), (torch.uint8, torch.uint8)],
    ids=["e4m3", "e5m2", "uint8"],
)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_dispatch_of_fp8_rows(world_size: int, row_dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    for case in worst_cases(world_size):
        on_ranks(world_size, _fp8_equals, case, row_dtype, scale_dtype)


def _combine_equals(rank: int, world_size: int, case: Case) -> None:
    compare = Comparison()
    topk_idx = case.topk_idx()
    for mode in modes(case):
        plan = torch_ep.plan(topk_idx[rank], case.num_experts, **mode.arguments())
        plans = reference.plan(topk_idx, case.num_experts, **mode.arguments())
        for dtype in SUM_TYPES:
            weight_dtype = torch.promote_types(dtype, torch.float32)
            y = case.rows([(p.num_rows, case.hidden) for p in plans], dtype)
            maps = [p.recv_pair if p.recv_topk_idx is None else p.recv_topk_idx for p in plans]
            w = case.rows([tuple(m.shape) for m in maps], weight_dtype)
            # Whatever nobody sent holds NaN: it must not be read.
            for p, rows, m, weights in zip(plans, y, maps, w, strict=True):
                rows[padding(p)] = torch.nan
                weights[m < 0] = torch.nan
            sums, home = torch_ep.combine(y[rank], plan, topk_weights=w[rank])
            want_sums, want_home = reference.combine(y, plans, topk_weights=w)[rank]
            assert want_home is not None and not want_sums.isnan().any() and not want_home.isnan().any()
            compare.expect(f"{mode.name}: sums", sums, want_sums)
            compare.expect(f"{mode.name}: weights", home, want_home)
            for row_weight_dtype in dict.fromkeys((dtype, weight_dtype)):  # in the same order on every rank
                row_w = case.rows([(p.num_rows,) for p in plans], row_weight_dtype)
                for p, row_weights in zip(plans, row_w, strict=True):
                    row_weights[padding(p)] = torch.nan
                weighted = torch_ep.combine(y[rank], plan, row_weights=row_w[rank])
                want_weighted = reference.combine(y, plans, row_weights=row_w)[rank][0]
                compare.expect(f"{mode.name}: weighted sums", weighted, want_weighted)
        compare.expect(f"{mode.name}: sums alone", torch_ep.combine(y[rank], plan), want_sums)
    compare.raise_if_any()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_combine(world_size: int) -> None:
    def check(case: Case) -> None:
        on_ranks(world_size, _combine_equals, case)

    over_cases(world_size, check)


# Enough tokens for several chunks of the counting passes on every rank; uneven.
MANY = {
    1: Case(11, (2500,), 4, 8, 0.1, 9, 4, torch.int64),
    2: Case(12, (2000, 2301), 4, 4, 0.1, 9, 4, torch.int64),
}


def _layer(case: Case, rank: int, mode: Mode) -> list[Tensor]:
    """All results of plan, dispatch and both combines."""
    plan = torch_ep.plan(case.topk_idx()[rank], case.num_experts, **mode.arguments())
    tokens = case.tokens[rank]
    x = case.rows([(tokens, case.hidden)], torch.float32)[0]
    w = case.rows([(tokens, case.num_topk)], torch.float32)[0]
    rows, weights = torch_ep.dispatch(x, plan, topk_weights=w)
    sums, home = torch_ep.combine(rows, plan, topk_weights=weights)
    row_weights = weights if weights.dim() == 1 else weights.sum(1)
    weighted = torch_ep.combine(rows, plan, row_weights=row_weights)
    return [*(t for t in plan if isinstance(t, Tensor)), rows, weights, sums, home, weighted]


def _threads_agree(rank: int, world_size: int, case: Case) -> None:
    compare = Comparison()
    before = torch.get_num_threads()
    try:
        for mode in modes(case):
            torch.set_num_threads(1)
            want = _layer(case, rank, mode)
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                got = _layer(case, rank, mode)
                for i, (a, b) in enumerate(zip(got, want, strict=True)):
                    compare.expect(f"{mode.name}, {threads} threads: result {i}", a, b)
    finally:
        torch.set_num_threads(before)
    compare.raise_if_any()


@pytest.mark.parametrize("world_size", MANY)
def test_same_bits_on_every_run_and_with_any_number_of_threads(world_size: int) -> None:
    on_ranks(world_size, _threads_agree, MANY[world_size])


def _chunked_plan_equals(rank: int, world_size: int, case: Case) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        _plan_equals(rank, world_size, case)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("world_size", MANY)
def test_plan_made_in_several_chunks(world_size: int) -> None:
    on_ranks(world_size, _chunked_plan_equals, MANY[world_size])


def _inner_products(rank: int, world_size: int, case: Case) -> list[tuple[str, float, float, int]]:
    """This rank's share of <D x, y> and <x, D^T y>, with the weights' share; and how many rows it dropped."""
    results = []
    for mode in modes(case):
        plan = torch_ep.plan(case.topk_idx()[rank], case.num_experts, **mode.arguments())
        generator = seeded(case.seed, rank, 3)

        def whole(*shape: int, generator: torch.Generator = generator) -> Tensor:
            # Whole numbers: sums of their products are exact in float64, so the two sides are equal, not only close.
            return torch.randint(-99, 100, shape, generator=generator).to(torch.float64)

        x, w = whole(case.tokens[rank], case.hidden), whole(case.tokens[rank], case.num_topk)
        rows, weights = torch_ep.dispatch(x, plan, topk_weights=w)
        y, v = whole(*rows.shape), whole(*weights.shape)
        sums, home = torch_ep.combine(y, plan, topk_weights=v)
        left = float((rows * y).sum() + (weights * v).sum())
        right = float((x * sums).sum() + (w * home).sum())
        results.append((mode.name, left, right, int(plan.num_dropped)))
    return results


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_dispatch_and_combine_are_adjoint(world_size: int) -> None:
    case = Case(5, (17, 0, 6, 9)[:world_size], 4, 3, 0.2, 7, 4, torch.int64)
    ranks = on_ranks(world_size, _inner_products, case)
    for shares in zip(*ranks, strict=True):
        name = shares[0][0]
        left, right, dropped = (sum(share[i] for share in shares) for i in (1, 2, 3))
        assert left == right, name
        assert (dropped > 0) == name.endswith("too small"), name
