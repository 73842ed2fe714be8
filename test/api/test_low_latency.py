"""The low-latency pair equals its specification bit by bit, whole and in halves, and what else it promises."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from support.compiling import InductorGraphs, artifacts, inductor_cache
from support.harness import random_topk, same_bits, seeded, world
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import torch_ep
from torch_ep import LowLatencyPlan, LowLatencyStatistics, reference

WORLD_SIZES = (1, 2, 3, 4)
QUANTIZE = (None, "fp8", "fp8_pow2", "fp8_ue8m0")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Case(NamedTuple):
    """One problem over all ranks. All numbers follow from the seed, so every rank can work out the whole of it."""

    seed: int
    tokens: tuple[int, ...]  # of each rank
    max_tokens: int
    num_topk: int
    num_local_experts: int
    hidden: int
    dtype: torch.dtype = torch.bfloat16
    index_dtype: torch.dtype = torch.int64
    holes: float = 0.2  # share of the slots without an expert
    one_expert: bool = False  # every token goes to the last expert and nowhere else
    weighted: bool = True

    @property
    def num_experts(self) -> int:
        return self.num_local_experts * len(self.tokens)

    def topk_idx(self) -> list[Tensor]:
        """Of every rank."""
        results = []
        for rank, tokens in enumerate(self.tokens):
            idx = random_topk(tokens, self.num_topk, self.num_experts, seeded(self.seed, rank), self.holes)
            if self.one_expert:
                idx = torch.full_like(idx, -1)
                idx[:, self.seed % self.num_topk] = self.num_experts - 1
            results.append(idx.to(self.index_dtype))
        return results

    def x(self) -> list[Tensor]:
        """Of every rank: numbers of very different sizes, zeros of either sign among them."""
        results = []
        for rank, tokens in enumerate(self.tokens):
            generator = seeded(self.seed, rank, 1)
            values = torch.randn(tokens, self.hidden, generator=generator)
            values *= 2.0 ** torch.randint(-12, 12, (tokens, 1), generator=generator)
            values[torch.rand(values.shape, generator=generator) < 0.05] *= 0
            results.append(values.to(self.dtype))
        return results

    def weights(self) -> list[Tensor] | None:
        if not self.weighted:
            return None
        return [torch.rand(t, self.num_topk, generator=seeded(self.seed, r, 2)) for r, t in enumerate(self.tokens)]

    def y(self, plans: Sequence[LowLatencyPlan], dtype: torch.dtype) -> list[Tensor]:
        """Results of the experts of every rank: NaN where there are no rows."""
        results = []
        for rank, plan in enumerate(plans):
            values = torch.randn(*plan.recv_pair.shape, self.hidden, generator=seeded(self.seed, rank, 3))
            values[torch.rand(values.shape, generator=seeded(self.seed, rank, 4)) < 0.05] *= 0
            values[plan.recv_pair < 0] = torch.nan
            results.append(values.to(dtype))
        return results


def random_cases(world_size: int, count: int) -> list[Case]:
    draw = random.Random(world_size)
    cases = []
    for seed in range(count):
        max_tokens = draw.choice((1, 2, 3, 5))
        tokens = tuple(draw.choice((0, 1, max_tokens, draw.randint(0, max_tokens))) for _ in range(world_size))
        cases.append(
            Case(
                seed=seed,
                tokens=tokens,
                max_tokens=max_tokens,
                num_topk=draw.choice((1, 2, 3, 8, 9, 16)),
                num_local_experts=draw.choice((1, 2, 3, 7)),
                hidden=draw.choice((1, 5, 64, 127, 128, 200, 515, 640)),
                dtype=draw.choice(DTYPES),
                index_dtype=draw.choice((torch.int32, torch.int64)),
                holes=draw.choice((0.0, 0.2, 0.5, 1.0)),
                one_expert=draw.random() < 0.15,
                weighted=draw.random() < 0.7,
            )
        )
    return cases


def wide_cases(world_size: int) -> list[Case]:
    """The widths of models in use, with few tokens; more slots than experts; nothing at all."""
    tokens = (2, 0, 1, 3)[:world_size]
    widths = [
        Case(i, tokens, 3, num_topk, 2, hidden, holes=0.1)
        for i, (hidden, num_topk) in enumerate([(2048, 8), (2880, 4), (4096, 9), (7168, 8), (8192, 16)])
    ]
    return [*widths, Case(9, tokens, 3, 16, 1, 130, holes=0.0), Case(10, (0,) * world_size, 2, 2, 2, 130)]


def arguments(case: Case, rank: int, quantize: str | None = None) -> tuple[tuple, dict[str, Any]]:
    """Of `low_latency_dispatch` on this rank."""
    weights = case.weights()
    options = {
        "num_experts": case.num_experts,
        "max_tokens_per_rank": case.max_tokens,
        "topk_weights": None if weights is None else weights[rank],
        "quantize": quantize,
    }
    return (case.x()[rank], case.topk_idx()[rank]), options


def in_halves(*args: Any, **kwargs: Any) -> Any:
    return torch_ep.low_latency_dispatch_recv(torch_ep.low_latency_dispatch_send(*args, **kwargs))


def combine_in_halves(*args: Any) -> Tensor:
    return torch_ep.low_latency_combine_recv(torch_ep.low_latency_combine_send(*args))


FORMS: dict[str, tuple[Callable, Callable]] = {
    "whole": (torch_ep.low_latency_dispatch, torch_ep.low_latency_combine),
    "halves": (in_halves, combine_in_halves),
}


def differ(name: str, got: Tensor, want: Tensor) -> list[str]:
    if got.stride() != want.stride():
        return [f"{name}: expected strides {want.stride()}, got {got.stride()}"]
    if not same_bits(got.contiguous(), want.contiguous()):
        return [f"{name}: expected {want.dtype} {list(want.shape)} {want}, got {got.dtype} {list(got.shape)} {got}"]
    return []


def rows_differ(name: str, got: Tensor, want: Tensor, filled: Tensor) -> list[str]:
    """As `differ`, where `filled` [L, C]: whatever lies behind the rows of an expert may be anything."""
    if (got.shape, got.stride(), got.dtype) != (want.shape, want.stride(), want.dtype):
        return [
            f"{name}: expected {want.dtype} {want.shape} {want.stride()}, got {got.dtype} {got.shape} {got.stride()}"
        ]
    if got.dtype == torch.float8_e4m3fn:
        got, want = got.view(torch.uint8), want.view(torch.uint8)
    return differ(name, got[filled], want[filled])


def case_differs(rank: int, world_size: int, case: Case, quantize: Any, form: str) -> list[str]:
    dispatch, combine = FORMS[form]
    expected = reference.low_latency_dispatch(
        case.x(),
        case.topk_idx(),
        case.num_experts,
        case.max_tokens,
        topk_weights=case.weights(),
        quantize=quantize,
    )
    plans = [plan for _, _, plan in expected]
    want_rows, want_scales, want = expected[rank]
    args, kwargs = arguments(case, rank, quantize)
    result, plan = dispatch(*args, **kwargs)
    rows, scales = (result, None) if quantize is None else result
    filled = want.recv_pair >= 0
    found = rows_differ("rows", rows, want_rows, filled)
    if scales is not None and want_scales is not None:
        found += rows_differ("scales", scales, want_scales, filled)
    found += rows_differ("row_weights", plan.row_weights, want.row_weights, filled)
    for field in ("topk_idx", "tokens_per_expert", "source_offsets", "recv_pair", "recv_row"):
        found += differ(field, getattr(plan, field), getattr(want, field))
    # Undefined is undefined: nobody may read it.
    plan = plan._replace(row_weights=plan.row_weights.masked_fill(~filled, torch.nan))
    for dtype in (case.dtype, torch.float32):
        y = case.y(plans, dtype)
        found += differ(f"sums of {dtype}", combine(y[rank], plan), reference.low_latency_combine(y, plans)[rank])
    return [f"{case}, {quantize}, {form}: {text}" for text in found]


def cases_differ(rank: int, world_size: int, cases: Sequence[Case], aten: bool = False) -> list[str]:
    """Differences of all cases: a rank that finds one still takes part in the exchanges that follow."""
    torch.ops.ep._force_aten(aten)
    try:
        found = []
        for i, case in enumerate(cases):
            quantize, form = QUANTIZE[i % 4], ("whole", "halves")[i // 4 % 2]
            found += case_differs(rank, world_size, case, quantize, form)
        return found
    finally:
        torch.ops.ep._force_aten(False)


def on_ranks(world_size: int, fn: Callable, *args: Any) -> list[Any]:
    """`fn(rank, world_size, *args)` on every rank; with one rank here, without any process group."""
    return [fn(0, 1, *args)] if world_size == 1 else world(world_size).run(fn, *args)


def assert_none(found: Sequence[Sequence[str]]) -> None:
    texts = list(itertools.chain(*found))
    assert not texts, f"{len(texts)} differences:\n" + "\n".join(texts[:3])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_equals_the_reference(world_size: int) -> None:
    assert_none(on_ranks(world_size, cases_differ, random_cases(world_size, 64)))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_equals_the_reference_with_rows_of_models(world_size: int) -> None:
    # Each with every quantization.
    cases = [case for case in wide_cases(world_size) for _ in QUANTIZE]
    assert_none(on_ranks(world_size, cases_differ, cases))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_equals_the_reference_by_the_operators_of_torch(world_size: int) -> None:
    # The way of other devices than the CPU.
    assert_none(on_ranks(world_size, cases_differ, random_cases(world_size, 32), True))


def _differs_from_plan(rank: int, world_size: int, cases: Sequence[Case]) -> list[str]:
    found = []
    for case in cases:
        args, kwargs = arguments(case, rank)
        rows, plan = torch_ep.low_latency_dispatch(*args, **kwargs)
        y = torch.randn(rows.shape, generator=seeded(case.seed, rank)).to(case.dtype)
        out = torch_ep.low_latency_combine(y, plan)
        weights = kwargs["topk_weights"]
        exact = torch_ep.plan(args[1], case.num_experts)
        packed, row_weights = torch_ep.dispatch(
            args[0], exact, topk_weights=torch.ones(args[1].shape) if weights is None else weights
        )
        filled = plan.recv_pair >= 0
        found += differ("counts", plan.tokens_per_expert, exact.tokens_per_expert)
        found += differ("rows", rows[filled], packed)
        found += differ("weights", plan.row_weights[filled], row_weights)
        found += differ("sums", out, torch_ep.combine(y[filled], exact, row_weights=row_weights))
    return found


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_equals_the_pair_for_training(world_size: int) -> None:
    # In turn with plan, dispatch and combine, on one group.
    assert_none(on_ranks(world_size, _differs_from_plan, random_cases(world_size, 24)))


# Quantisation.

LIMIT = 448.0


def quantized(x: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """The rows of tokens that all go to one expert, and their scales."""
    topk_idx = torch.zeros(x.shape[0], 1, dtype=torch.int64)
    (rows, scales), _ = torch_ep.low_latency_dispatch(
        x, topk_idx, num_experts=1, max_tokens_per_rank=x.shape[0], quantize=how
    )
    return rows[0].float(), scales[0]


def row_of(*values: float) -> Tensor:
    return torch.tensor([values])


def test_fp8_scale_is_the_largest_number_over_448() -> None:
    largest = torch.arange(1.0, 100.0)[:, None] / 7  # a product with 1 / 448 would differ for some
    rows, scales = quantized(torch.cat([largest / 3, -largest], 1), "fp8")
    assert torch.equal(scales, largest / torch.full_like(largest, LIMIT))
    assert not torch.equal(scales, largest * (1 / LIMIT))
    assert (rows[:, 1] == -LIMIT).all()


@pytest.mark.parametrize("exponent", [-18, -3, 0, 1, 100])
@pytest.mark.parametrize(
    ("factor", "above"), [(1.0, 0), (1 + 2**-23, 1), (1.5, 1)], ids=["power", "just-above", "between"]
)
def test_pow2_scale_is_the_least_power_that_is_enough(exponent: int, factor: float, above: int) -> None:
    _, scales = quantized(row_of(LIMIT * factor * 2.0**exponent), "fp8_pow2")
    assert scales.item() == 2.0 ** (exponent + above)


def test_ue8m0_scales_are_the_exponents_of_pow2() -> None:
    x = torch.randn(3, 700, generator=seeded(1)) * 2.0 ** torch.arange(3)[:, None]
    rows, scales = quantized(x, "fp8_pow2")
    same_rows, packed = quantized(x, "fp8_ue8m0")
    assert torch.equal(rows, same_rows)
    assert packed.shape == (3, 2)  # six groups
    for token in range(3):
        numbers = [int(packed[token, i // 4]) >> (8 * (i % 4)) & 0xFF for i in range(8)]
        assert numbers == [int(math.log2(s)) + 127 for s in scales[token].tolist()] + [0, 0]


@pytest.mark.parametrize("how", QUANTIZE[1:])
def test_rows_of_zeros_have_a_scale(how: str) -> None:
    rows, scales = quantized(torch.zeros(2, 200), how)
    least = torch.tensor([1e-4]) / torch.tensor([LIMIT])
    want: Any = {"fp8": least.item(), "fp8_pow2": 2.0**-22, "fp8_ue8m0": 105 | 105 << 8}[how]
    assert not rows.any()
    assert scales.unique().tolist() == [want]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_to_the_nearest_and_never_beyond_448(dtype: torch.dtype) -> None:
    x = torch.randn(4, 128, generator=seeded(2)).to(dtype)
    for how in ("fp8", "fp8_pow2"):
        rows, scales = quantized(x, how)
        exact = x.float() / scales
        # Neighbours of e4m3 are 2^-3 of their power of two apart, 2^-9 below the least normal number.
        spacing = 2.0 ** (exact.abs().clamp(min=2.0**-6).log2().floor() - 3)
        assert ((rows - exact).abs() <= spacing / 2 * 1.001).all()
        assert rows.abs().max() <= LIMIT


@pytest.mark.parametrize("how", QUANTIZE[1:])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_a_value_that_is_not_finite_spoils_only_its_own_group(bad: float, how: str) -> None:
    x = torch.ones(1, 256)
    x[0, 3] = bad
    want_rows, _ = reference.quantize(x, how)
    rows, scales = quantized(x, how)
    assert torch.equal(rows.isnan(), want_rows.float().isnan()) and rows[0, 3].isnan()
    if how == "fp8_ue8m0":
        scales = 2.0 ** (torch.cat([scales & 0xFF, scales >> 8], 1).float() - 127)
    assert (rows[0, 128:] * scales[0, 1] - 1).abs().max() < 0.04
    assert not (rows[0, :128] * scales[0, 0]).isfinite().any()


@pytest.mark.parametrize("max_tokens", [1, 3, 4, 5])
@pytest.mark.parametrize("how", QUANTIZE[1:])
def test_scales_are_laid_out_for_masked_grouped_gemms(how: str, max_tokens: int) -> None:
    x = torch.randn(1, 700, generator=seeded(3))
    (_, scales), _ = torch_ep.low_latency_dispatch(
        x, torch.tensor([[0, 1]]), num_experts=2, max_tokens_per_rank=max_tokens, quantize=how
    )
    count, padded = (2 if how == "fp8_ue8m0" else 6), (max_tokens + 3) // 4 * 4
    assert scales.shape == (2, max_tokens, count)
    assert scales.stride() == (count * padded, 1, padded)


# Several in flight, and order.


def _two_in_flight(rank: int, world_size: int, cases: Sequence[Case]) -> list[str]:
    found = []
    given = [arguments(case, rank, quantize) for case, quantize in zip(cases, (None, "fp8"), strict=True)]
    alone = [torch_ep.low_latency_dispatch(*args, **kwargs) for args, kwargs in given]
    y = [torch.randn(*plan.row_weights.shape, 9, generator=seeded(rank)) for _, plan in alone]
    sums = [torch_ep.low_latency_combine(t, plan) for t, (_, plan) in zip(y, alone, strict=True)]
    # Dispatches overlap, then one combine with what is left of them, then the combines with each other.
    flights = [torch_ep.low_latency_dispatch_send(*args, **kwargs) for args, kwargs in given]
    first = torch_ep.low_latency_dispatch_recv(flights[0])
    combines = [torch_ep.low_latency_combine_send(y[0], first[1])]
    together = [first, torch_ep.low_latency_dispatch_recv(flights[1])]
    combines.append(torch_ep.low_latency_combine_send(y[1], together[1][1]))
    for i, flight in enumerate(combines):
        found += differ(f"sums {i}", torch_ep.low_latency_combine_recv(flight), sums[i])
        for a, b in zip(tree_leaves(together[i]), tree_leaves(alone[i]), strict=True):
            if isinstance(a, Tensor):
                found += differ(f"dispatch {i}", a, b)
    return found


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_two_microbatches_in_flight(world_size: int) -> None:
    cases = [Case(i, (3, 0, 2, 1)[:world_size], 3, 3, 2, 150) for i in range(2)]
    assert_none(on_ranks(world_size, _two_in_flight, cases))


def _share_a_group(rank: int, world_size: int, case: Case) -> list[str]:
    """Exchanges of both kinds between the halves, in the same order on every rank."""
    args, kwargs = arguments(case, rank)
    rows, plan = torch_ep.low_latency_dispatch(*args, **kwargs)
    out = torch_ep.low_latency_combine(rows, plan)
    flight = torch_ep.low_latency_dispatch_send(*args, **kwargs)
    exact = torch_ep.plan(args[1], case.num_experts)
    packed = torch_ep.dispatch(args[0], exact)
    again, plan_again = torch_ep.low_latency_dispatch_recv(flight)
    back = torch_ep.low_latency_combine_send(again, plan_again)
    sums = torch_ep.combine(packed, exact)
    found = differ("sums", torch_ep.low_latency_combine_recv(back), out)
    return found + differ("sums of the others", sums, torch_ep.combine(torch_ep.dispatch(args[0], exact), exact))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_other_exchanges_may_run_between_the_halves(world_size: int) -> None:
    assert_none(on_ranks(world_size, _share_a_group, Case(7, (2, 3, 0, 1)[:world_size], 3, 3, 2, 20)))


# Statistics.


def _count(rank: int, world_size: int, form: str) -> tuple[LowLatencyStatistics, Tensor]:
    case = Case(3, (3, 1, 2)[:world_size], 3, 3, 2, 20)
    args, kwargs = arguments(case, rank)
    statistics = LowLatencyStatistics.zeros(case.num_experts)
    for _ in range(2):
        if form == "whole":
            rows, plan = torch_ep.low_latency_dispatch(*args, **kwargs, statistics=statistics)
            torch_ep.low_latency_combine(rows, plan, statistics=statistics)
        else:
            sent = torch_ep.low_latency_dispatch_send(*args, **kwargs)
            rows, plan = torch_ep.low_latency_dispatch_recv(sent, statistics=statistics)
            back = torch_ep.low_latency_combine_send(rows, plan)
            torch_ep.low_latency_combine_recv(back, statistics=statistics)
    return statistics, plan.tokens_per_expert


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("world_size", [1, 3])
def test_statistics_count_rows_and_waiting(world_size: int, form: str) -> None:
    ranks = on_ranks(world_size, _count, form)
    for rank, (statistics, tokens_per_expert) in enumerate(ranks):
        assert statistics.tokens_per_expert.dtype == statistics.wait_ns.dtype == torch.int64
        assert torch.equal(statistics.tokens_per_expert, 2 * tokens_per_expert)
        assert statistics.wait_ns.shape == (world_size,)
        assert statistics.wait_ns[rank] == 0
    assert (sum(statistics.wait_ns.sum() for statistics, _ in ranks) > 0) == (world_size > 1)


def _waits(rank: int, world_size: int, combine: bool) -> tuple[list[int], int, int]:
    given = {"x": torch.ones(1, 4), "topk_idx": torch.tensor([[0]])}
    sizes = {"num_experts": world_size, "max_tokens_per_rank": 1}
    rows, plan = torch_ep.low_latency_dispatch(**given, **sizes)
    statistics = LowLatencyStatistics.zeros(world_size)
    time.sleep(0.05 * (world_size - rank))
    before = time.time_ns()
    if combine:
        torch_ep.low_latency_combine(rows, plan, statistics=statistics)
    else:
        torch_ep.low_latency_dispatch(**given, **sizes, statistics=statistics)
    return statistics.wait_ns.tolist(), before, time.time_ns()


@pytest.mark.parametrize("combine", [False, True], ids=["dispatch", "combine"])
def test_waiting_is_between_the_times_at_which_ranks_came(combine: bool) -> None:
    ranks = world(3).run(_waits, combine)
    for (a, (waits, before, _)), (b, (waits_there, _, after)) in itertools.permutations(enumerate(ranks), 2):
        # One of two ranks waits for the other, as long as that came later.
        assert waits[b] == 0 or waits_there[a] == 0
        assert 0 <= waits[b] <= after - before
    early, middle, late = sorted(range(3), key=lambda rank: sum(ranks[rank][0]), reverse=True)
    waits = ranks[early][0]
    assert waits[late] == waits[middle] + ranks[middle][0][late] > 0


# Inference only.

TWO_OF_EACH = {"num_experts": 2, "max_tokens_per_rank": 2}


def calls_with(x: Tensor) -> dict[str, Callable]:
    """Every operator that takes x, or numbers that depend on it."""
    idx = torch.tensor([[0], [1]])
    with torch.no_grad():
        rows, plan = torch_ep.low_latency_dispatch(x.detach(), idx, **TWO_OF_EACH)
    y = rows + x.sum()
    return {
        "low_latency_dispatch": lambda: torch_ep.low_latency_dispatch(x, idx, **TWO_OF_EACH),
        "low_latency_dispatch_send": lambda: torch_ep.low_latency_dispatch_send(x, idx, **TWO_OF_EACH),
        "low_latency_combine": lambda: torch_ep.low_latency_combine(y, plan),
        "low_latency_combine_send": lambda: torch_ep.low_latency_combine_send(y, plan),
    }


WHOLE_AND_SENT = (
    "low_latency_dispatch",
    "low_latency_dispatch_send",
    "low_latency_combine",
    "low_latency_combine_send",
)


@pytest.mark.parametrize("name", WHOLE_AND_SENT)
def test_gradients_are_refused(name: str) -> None:
    call = calls_with(torch.ones(2, 3, requires_grad=True))[name]
    with pytest.raises(RuntimeError) as raised:
        call()
    assert str(raised.value).splitlines()[0] == (
        f"ep::{name}: expected no argument to require a gradient: this operator is for inference only: call it "
        "under torch.no_grad(); for training use torch_ep.plan, dispatch and combine"
    )
    with torch.no_grad():
        assert not any(t.requires_grad for t in tree_leaves(call()) if isinstance(t, Tensor))
    with torch.inference_mode():
        call()


def test_gradients_of_weights_are_refused() -> None:
    weights = torch.ones(2, 1, requires_grad=True)
    with pytest.raises(RuntimeError, match="for inference only"):
        torch_ep.low_latency_dispatch(torch.ones(2, 3), torch.tensor([[0], [1]]), topk_weights=weights, **TWO_OF_EACH)


def test_gradients_are_refused_while_compiling() -> None:
    def step(x: Tensor) -> Tensor:
        return torch_ep.low_latency_dispatch(x, torch.tensor([[0], [1]]), **TWO_OF_EACH)[0]

    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="for inference only"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(torch.ones(2, 3, requires_grad=True))
    torch._dynamo.reset()


# Compiled.


class Step(nn.Module):
    """One MoE layer of a decoding step."""

    def __init__(self, form: str, quantize: Any, num_experts: int) -> None:
        super().__init__()
        self.form, self.quantize, self.num_experts = form, quantize, num_experts

    def forward(self, x: Tensor, topk_idx: Tensor, weights: Tensor, statistics: LowLatencyStatistics | None) -> Tensor:
        given = (x * 2, topk_idx)
        options = {
            "num_experts": self.num_experts,
            "max_tokens_per_rank": 4,
            "topk_weights": weights,
            "quantize": self.quantize,
        }
        if self.form == "whole":
            result, plan = torch_ep.low_latency_dispatch(*given, **options, statistics=statistics)
        else:
            sent = torch_ep.low_latency_dispatch_send(*given, **options)
            result, plan = torch_ep.low_latency_dispatch_recv(sent, statistics=statistics)
        if self.quantize is None:
            y = result.relu()
        else:
            rows, scales = result
            y = (rows.to(torch.float32).unflatten(2, (-1, 128)) * scales.unsqueeze(3)).flatten(2).relu()
        y = y.to(x.dtype)
        if self.form == "whole":
            return torch_ep.low_latency_combine(y, plan, statistics=statistics) + 1
        return torch_ep.low_latency_combine_recv(torch_ep.low_latency_combine_send(y, plan), statistics=statistics) + 1


def step_inputs(rank: int, num_experts: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = seeded(rank, count)
    x = torch.randn(count, 256, generator=generator)
    return x, random_topk(count, 2, num_experts, generator), torch.rand(count, 2, generator=generator)


def _compiled_differs(rank: int, world_size: int, form: str, quantize: Any, backend: Any) -> list[str]:
    if backend == "graphs":
        backend = InductorGraphs()
    num_experts = 2 * world_size
    step = Step(form, quantize, num_experts)
    found = []
    torch._dynamo.reset()
    try:
        compiled = torch.compile(step, fullgraph=True, backend=backend)
        for count in (3, 4 - rank % 2, 0, 1):
            given = step_inputs(rank, num_experts, count)
            torch_ep.mark_tokens(*given)
            counters = [LowLatencyStatistics.zeros(num_experts) for _ in range(2)]
            found += differ(f"{count} tokens", compiled(*given, counters[0]), step(*given, counters[1]))
            found += differ("counts", counters[0].tokens_per_expert, counters[1].tokens_per_expert)
            if world_size > 1:
                dist.all_reduce(counters[0].wait_ns)  # one of two ranks comes later
                found += [] if counters[0].wait_ns.sum() > 0 else ["nobody waited"]
    finally:
        torch._dynamo.reset()
    return found


@pytest.mark.parametrize("quantize", [None, "fp8"], ids=["rows", "fp8"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_compiled_equals_eager(world_size: int, form: str, quantize: Any) -> None:
    assert_none(on_ranks(world_size, _compiled_differs, form, quantize, "graphs"))


@pytest.fixture
def _artifacts() -> Iterator[None]:
    with inductor_cache(artifacts()):
        yield


@pytest.mark.usefixtures("_artifacts")
def test_generated_code_equals_eager() -> None:
    assert_none([_compiled_differs(0, 1, "halves", "fp8", "inductor")])


@pytest.mark.parametrize("form", FORMS)
def test_export_keeps_the_operators(form: str) -> None:
    step, given = Step(form, None, 2), (*step_inputs(0, 2, 3), None)
    exported = torch.export.export(step, given).run_decompositions()
    targets = [str(node.target).split(".")[1] for node in exported.graph.nodes if str(node.target).startswith("ep.")]
    halves = ("_send", "_recv") if form == "halves" else ("",)
    assert targets == [f"low_latency_{op}{half}" for op in ("dispatch", "combine") for half in halves]
    assert torch.equal(exported.module()(*given), step(*given))
