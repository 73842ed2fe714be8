"""The nvlink backend equals the specification, bit by bit: on virtual ranks (one GPU) and on two to four GPUs."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import stress
import torch
import torch.distributed as dist
from support import expected
from support.harness import random_topk, same_bits, seeded
from support.nvlink_cases import (
    BF16,
    DEVICE,
    F16,
    F32,
    F64,
    FP8,
    U8,
    Case,
    Comparison,
    check_cases,
    check_plan,
    check_seeds,
    poison,
    problem_of,
    random_numbers,
    to_device,
    works,
)
from support.virtual import GPUS, LIMIT_S, TIMEOUT, VIRTUAL, limits, meet, open_world
from torch import Tensor

import torch_ep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LAYOUTS: list[torch_ep.Layout] = ["rank_major", "expert_major"]
every_world = pytest.mark.parametrize("name", VIRTUAL + GPUS)
several_ranks = pytest.mark.parametrize("name", [*VIRTUAL[1:], *GPUS])
few_worlds = pytest.mark.parametrize("name", ["virtual-1", "virtual-3", "gpus-2", "gpus-4"])


def no_differences(name: str, fn: Callable, *args: Any, limit_s: float = LIMIT_S) -> None:
    for rank, differences in enumerate(open_world(name).run(fn, *args, limit_s=limit_s)):
        assert not differences, f"rank {rank}: " + "\n".join(differences)


# --- equal to the specification ---


@pytest.mark.parametrize("batch", range(2))
@every_world
def test_random_cases(name: str, batch: int) -> None:
    no_differences(name, check_seeds, 1000 * batch, 150)


ROW_TYPES = [(BF16, 24), (F16, 40), (F32, 5), (F64, 6), (FP8, 48)]


def every_kind(world_size: int) -> list[Case]:
    """Each row type with each layout and size mode, and the payloads and index types in turn."""
    tokens = tuple((11, 0, 6, 17, 1, 9, 2, 4)[:world_size])
    cases = []
    for i, (dtype, hidden) in enumerate(ROW_TYPES):
        for j, (layout, capacity) in enumerate(
            (layout, capacity) for layout in LAYOUTS for capacity in ("exact", "fits", "too small", "zero", "tail")
        ):
            cases.append(
                Case(
                    seed=100 * i + j,
                    tokens=tokens,
                    num_topk=(1, 3, 8, 32)[(i + j) % 4],
                    num_local_experts=(1, 4, 64)[j % 3],
                    dtype=dtype,
                    hidden=hidden,
                    layout=layout,
                    capacity=capacity,
                    alignment=8 if layout == "expert_major" and i % 2 else 1,
                    index_dtype=(torch.int32, torch.int64)[(i + j) % 2],
                    weight_dtype=(F32, BF16, F64, None)[j % 4],
                    row_weight_dtype=(F32, BF16, F64)[j % 3],
                    scales=(None, (F32, 3), (U8, 56), (F32, 4))[(i + j) % 4],
                )
            )
    return cases


@every_world
def test_every_kind_of_row_layout_and_size(name: str) -> None:
    no_differences(name, check_cases, every_kind(open_world(name).world_size))


@every_world
def test_data_that_begins_anywhere(name: str) -> None:
    """Contiguous, yet at no address that is a multiple of 16 bytes."""
    cases = [case._replace(shift=True) for case in every_kind(open_world(name).world_size)]
    no_differences(name, check_cases, cases)


def bytes_as_other_types(rank: int, world_size: int, group: str | None, layout: torch_ep.Layout) -> list[str]:
    compare = Comparison(layout)
    idx = random_topk(9 + rank, 2, 4 * world_size, seeded(rank)).to(DEVICE)
    plan = torch_ep.plan(idx, 4 * world_size, group, layout=layout)
    x = torch.randn(len(idx), 48, generator=seeded(rank, 1)).to(FP8).to(DEVICE)
    want = torch_ep.dispatch(x, plan).view(torch.uint8)
    for dtype in (torch.float8_e5m2, torch.uint8):
        rows = torch_ep.dispatch(x.view(dtype), plan)
        assert rows.dtype == dtype
        compare.expect(str(dtype), rows.view(torch.uint8), want)
    return compare.differences


@every_world
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_bytes(name: str, layout: torch_ep.Layout) -> None:
    no_differences(name, bytes_as_other_types, layout)


def wide_rows(world_size: int) -> list[Case]:
    tokens = tuple((9, 3, 0, 12, 5, 1, 7, 2)[:world_size])
    return [
        Case(i, tokens, 8, 4, dtype, hidden, layout=LAYOUTS[i % 2], scales=(F32, 56))
        for i, (dtype, hidden) in enumerate(
            [(BF16, 2880), (BF16, 4096), (BF16, 7168), (FP8, 7168), (BF16, 8192), (F64, 8192)]
        )
    ]


@every_world
def test_wide_rows(name: str) -> None:
    no_differences(name, check_cases, wide_rows(open_world(name).world_size))


def many_tokens(
    rank: int, world_size: int, group: str | None, layout: torch_ep.Layout, capacity: int | None
) -> list[str]:
    """Many rows for every channel. All of it on the device."""
    compare = Comparison(f"{layout}, capacity {capacity}")
    most, num_experts, hidden = limits(world_size)["max_tokens_per_rank"], 16 * world_size, 2880
    tokens = [most - 97 * (r % 3) if r != 1 else 700 for r in range(world_size)]
    options: dict[str, Any] = {
        "layout": layout,
        "capacity": capacity,
        "alignment": 128 if layout == "expert_major" else 1,
    }
    topk_idx = [random_topk(n, 8, num_experts, seeded(r)).to(DEVICE) for r, n in enumerate(tokens)]
    weights = [torch.rand(n, 8, generator=seeded(r, 1)).to(DEVICE) for r, n in enumerate(tokens)]
    routing = expected.route(topk_idx, num_experts, **options)
    x = [_by_token(r, n, hidden) for r, n in enumerate(tokens)]
    want_rows = expected.dispatch(routing, rank, x)
    want_weights = expected.dispatch_weights(routing, rank, weights)

    plan = torch_ep.plan(topk_idx[rank], num_experts, group, **options)
    check_plan(compare, plan, routing.plans[rank])
    poison(want_rows, want_weights)
    rows, row_weights = torch_ep.dispatch(x[rank], plan, topk_weights=weights[rank])
    compare.expect("rows", rows, want_rows)
    compare.expect("weights", row_weights, want_weights)
    y = [expected.dispatch(routing, r, x) for r in range(world_size)]
    compare.expect("sums", torch_ep.combine(rows, plan), expected.combine(routing, rank, y))
    if layout == "expert_major":
        w = [expected.dispatch_weights(routing, r, weights) for r in range(world_size)]
        weighted = torch_ep.combine(rows, plan, row_weights=row_weights)
        compare.expect("weighted sums", weighted, expected.combine(routing, rank, y, w))
    return compare.differences


def _by_token(rank: int, num_tokens: int, hidden: int) -> Tensor:
    """[num_tokens, hidden] bfloat16 from a few numbers: no rank has to draw the rows of all."""
    t = torch.arange(num_tokens, device=DEVICE)[:, None]
    c = torch.arange(hidden, device=DEVICE)
    return ((rank * 977 + t * 31 + c * 7) % 1021 / 64 - 8).to(BF16)


@pytest.mark.parametrize("capacity", [None, 4096], ids=["exact", "capacity"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["virtual-1", "virtual-2", "virtual-4", *GPUS])
def test_many_tokens(name: str, layout: torch_ep.Layout, capacity: int | None) -> None:
    no_differences(name, many_tokens, layout, capacity)


EVERY_PATH = {
    "rank_major-exact-weights-scales": Case(1, (5, 0, 7), 3, 2, BF16, 24, layout="rank_major", scales=(F32, 3)),
    "rank_major-drops": Case(
        2, (5, 3, 4), 2, 2, F32, 5, layout="rank_major", capacity="too small", index_dtype=torch.int32
    ),
    "rank_major-tail-shifted": Case(3, (4, 1, 6), 8, 4, F64, 6, layout="rank_major", capacity="tail", shift=True),
    "expert_major-exact-weights-scales": Case(4, (5, 0, 7), 3, 2, FP8, 48, alignment=8, scales=(U8, 56)),
    "expert_major-drops": Case(5, (5, 3, 4), 2, 2, F16, 40, capacity="too small", weight_dtype=BF16),
    "expert_major-tail-shifted": Case(6, (4, 1, 6), 32, 2, BF16, 515, capacity="tail", weight_dtype=F64, shift=True),
    "expert_major-row-in-parts": Case(7, (3, 2, 0), 2, 1, F64, 8192, row_weight_dtype=F64),
}


@pytest.mark.parametrize("which", EVERY_PATH)
def test_every_path_of_the_kernels(which: str) -> None:
    no_differences("virtual-3", check_cases, [EVERY_PATH[which]])


# --- equal to the other backend ---

_c10d_groups: dict[int, Any] = {}


def equals_c10d(
    rank: int, world_size: int, group: str | None, layout: torch_ep.Layout, capacity: int | None
) -> list[str]:
    """At sizes of real layers, results of every operator and of the gradients, order included."""
    if world_size not in _c10d_groups:
        _c10d_groups[world_size] = dist.new_group(list(range(world_size)))
        other = torch_ep.init(_c10d_groups[world_size], backend="c10d", **limits(world_size))
        assert other.backend == "c10d"
    num_experts, hidden, num_topk = 32 * world_size, 7168, 8
    num_tokens = (2048, 1500, 0, 777)[rank]
    topk_idx = random_topk(num_tokens, num_topk, num_experts, seeded(rank)).to(DEVICE)
    options: dict[str, Any] = {
        "layout": layout,
        "capacity": capacity,
        "alignment": 8 if layout == "expert_major" else 1,
    }
    x = torch.randn(num_tokens, hidden, generator=seeded(rank, 1)).to(DEVICE, BF16)
    weights = torch.rand(num_tokens, num_topk, generator=seeded(rank, 2)).to(DEVICE)
    scales = torch.rand(num_tokens, hidden // 128, generator=seeded(rank, 3)).to(DEVICE)

    def results(of: Any) -> dict[str, Tensor | None]:
        xs, ws = x.clone().requires_grad_(), weights.clone().requires_grad_()
        plan = torch_ep.plan(topk_idx, num_experts, of, **options)
        rows, row_weights = torch_ep.dispatch(xs, plan, topk_weights=ws)
        fp8, row_scales = torch_ep.dispatch(x.to(FP8), plan, scales=scales)
        if layout == "expert_major":
            sums = torch_ep.combine(rows * 0.5, plan, row_weights=row_weights)
            home = None
        else:
            sums, home = torch_ep.combine(rows * 0.5, plan, topk_weights=row_weights)
        outputs = [sums] if home is None else [sums, home]
        cotangents = [x] if home is None else [x, weights]
        grad_x, grad_w = torch.autograd.grad(outputs, [xs, ws], cotangents, allow_unused=True)
        found = {name: getattr(plan, name) for name in plan._fields[:8]}
        return found | {
            "rows": rows,
            "row weights": row_weights,
            "fp8 rows": fp8,
            "scales": row_scales,
            "sums": sums,
            "weights": home,
            "gradient of x": grad_x,
            "gradient of weights": grad_w,
        }

    compare = Comparison(f"{layout}, capacity {capacity}")
    want = results(_c10d_groups[world_size])
    got = results(group)
    for key, value in want.items():
        compare.expect(key, got[key], value)
    return compare.differences


@pytest.mark.parametrize("capacity", [None, 4096, 40000], ids=["exact", "drops", "tail"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", GPUS)
def test_equals_the_c10d_backend(name: str, layout: torch_ep.Layout, capacity: int | None) -> None:
    open_world(name, may_share=False)  # c10d moves CUDA rows by NCCL, which refuses ranks that share a GPU
    no_differences(name, equals_c10d, layout, capacity)


# --- run to run, adjointness, gradients ---


def delay(r: random.Random) -> None:
    """Holds up this rank a little, now and then: on the host, or on the device."""
    if r.random() < 0.2:
        time.sleep(r.random() * 3e-3)
    if DEVICE == "cuda" and r.random() < 0.3:
        torch.cuda._sleep(r.randrange(3_000_000))  # cycles, so up to 2 ms


def repeated(rank: int, world_size: int, group: str | None) -> list[str]:
    differences: list[str] = []
    for case in (
        Case(31, (40,) * world_size, 8, 4, BF16, 1000, capacity="too small"),
        Case(32, (40,) * world_size, 8, 4, F32, 33, layout="rank_major"),
    ):
        problem = problem_of(case)
        topk_idx, x = to_device(problem.topk_idx[rank]), to_device(problem.y[rank].nan_to_num())
        x = random_numbers((case.tokens[rank], case.hidden), case.dtype, 33, rank).to(DEVICE)
        weights = torch.rand(case.tokens[rank], case.num_topk, generator=seeded(34, rank)).to(DEVICE)
        r = random.Random(35 + rank)
        first: list[Tensor] = []
        for run in range(10):
            delay(r)
            plan = torch_ep.plan(topk_idx, case.num_experts, group, **problem.options)
            delay(r)
            rows, row_weights = torch_ep.dispatch(x, plan, topk_weights=weights)
            delay(r)
            factors = row_weights if row_weights.dim() == 1 else row_weights.sum(1)
            sums = torch_ep.combine(rows, plan, row_weights=factors)
            results = [*(t for t in plan if isinstance(t, Tensor)), rows, row_weights, sums]
            first = first or results
            if not all(same_bits(a, b) for a, b in zip(results, first, strict=True)):
                differences.append(f"run {run} of {case}")
    return differences


@few_worlds
def test_same_bits_on_every_run_with_any_rank_late(name: str) -> None:
    no_differences(name, repeated)


def waits_long(rank: int, world_size: int, group: str | None) -> list[str]:
    """The host waits for long in an exact plan, each time for another rank; what it calls next works."""
    for late in range(world_size):
        meet(group)
        if rank == late:
            time.sleep(0.1)  # ten times as long as the host waits before it asks whether the kernel still runs
        plan = torch_ep.plan(torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), world_size, group)
        torch.ones(8, device=DEVICE)
        torch_ep.dispatch(torch.ones(1, 8, device=DEVICE), plan)
    return works(rank, world_size, group)


@pytest.mark.parametrize("name", ["virtual-2", "virtual-3", "gpus-2"])
def test_an_exact_plan_that_waits_for_long_leaves_nothing_behind(name: str) -> None:
    no_differences(name, waits_long)


def inner_products(rank: int, world_size: int, group: str | None, case: Case) -> tuple[float, float, int]:
    """This rank's share of <D x, y> and <x, D^T y>, weights included; rows dropped. All numbers whole, so exact."""
    problem = problem_of(case)
    plan = torch_ep.plan(to_device(problem.topk_idx[rank]), case.num_experts, group, **problem.options)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-99, 100, shape, generator=seeded(case.seed, rank, sum(shape))).to(DEVICE, F64)

    x, w = whole(case.tokens[rank], case.hidden), whole(case.tokens[rank], case.num_topk)
    rows, weights = torch_ep.dispatch(x, plan, topk_weights=w)
    y, v = whole(*rows.shape), whole(*weights.shape)
    sums, home = torch_ep.combine(y, plan, topk_weights=v)
    left = float((rows * y).sum() + (weights * v).sum())
    right = float((x * sums).sum() + (w * home).sum())
    return left, right, int(plan.num_dropped)


@pytest.mark.parametrize("capacity", ["exact", "too small", "tail"])
@pytest.mark.parametrize("layout", LAYOUTS)
@every_world
def test_dispatch_and_combine_are_adjoint(name: str, layout: torch_ep.Layout, capacity: str) -> None:
    ranks = open_world(name)
    tokens = tuple((17, 0, 6, 9, 3, 12, 1, 8)[: ranks.world_size])
    case = Case(
        41, tokens, 4, 3, F64, 7, layout=layout, capacity=capacity, alignment=4 if layout == "expert_major" else 1
    )
    shares = ranks.run(inner_products, case)
    left, right, dropped = (sum(share[i] for share in shares) for i in range(3))
    assert left == right
    assert (dropped > 0) == (capacity == "too small")


def gradients(rank: int, world_size: int, group: str | None, case: Case) -> list[str]:
    """Those of every operator: of linear ones the transpose, bit by bit."""
    compare = Comparison(case)
    problem = problem_of(case)
    routing = problem.routing
    plan = torch_ep.plan(to_device(problem.topk_idx[rank]), case.num_experts, group, **problem.options)
    assert problem.weights is not None and problem.back is not None

    def of_ranks(shapes: Sequence[tuple[int, ...]], salt: int) -> list[Tensor]:
        return [random_numbers(shape, F64, case.seed, r, salt) for r, shape in enumerate(shapes)]

    received = [tuple(t.shape) for t in problem.y]
    home = [(n, case.hidden) for n in case.tokens]
    received_weights = [tuple(t.shape) for t in problem.back]
    home_weights = [tuple(t.shape) for t in problem.topk_idx]

    x, w = (to_device(of_ranks(shapes, 11)[rank]).requires_grad_() for shapes in (home, home_weights))
    outputs = torch_ep.dispatch(x, plan, topk_weights=w)
    g, gw = of_ranks(received, 12), of_ranks(received_weights, 13)
    grads = torch.autograd.grad(outputs, [x, w], [to_device(g[rank]), to_device(gw[rank])])
    compare.expect("gradient of x", grads[0], expected.combine(routing, rank, g))
    compare.expect("gradient of topk_weights", grads[1], expected.combine_weights(routing, rank, gw))

    y, v = (to_device(of_ranks(shapes, 14)[rank]).requires_grad_() for shapes in (received, received_weights))
    outputs = torch_ep.combine(y, plan, topk_weights=v)
    g, gw = of_ranks(home, 15), of_ranks(home_weights, 16)
    grads = torch.autograd.grad(outputs, [y, v], [to_device(g[rank]), to_device(gw[rank])])
    rows = expected.dispatch(routing, rank, g)
    compare.expect("gradient of y", grads[0], rows)
    compare.expect("gradient of weights that come back", grads[1], expected.dispatch_weights(routing, rank, gw))

    u = to_device(of_ranks([shape[:1] for shape in received], 17)[rank]).requires_grad_()
    output = torch_ep.combine(y, plan, row_weights=u)
    grads = torch.autograd.grad(output, [y, u], to_device(g[rank]))
    # Rows that nobody sent are zero in `rows`, and so are their gradients; the sign of such a zero is not promised.
    rows = to_device(rows)
    compare.expect("gradient of y, weighted", grads[0] + 0.0, rows * u.detach()[:, None] + 0.0)
    if not torch.allclose(grads[1], (rows * y.detach()).sum(1), rtol=1e-12, atol=1e-12):
        compare.differences.append(f"{case}: gradient of row_weights")

    # Gradients of other strides: one number everywhere, and columns that lie together.
    ones = [torch.ones(shape, dtype=F64) for shape in received]
    (grad,) = torch.autograd.grad(torch_ep.dispatch(x, plan).sum(), x)
    compare.expect("gradient of a sum", grad, expected.combine(routing, rank, ones))
    g = of_ranks(home, 18)
    strided = to_device(g[rank].t().contiguous()).t()
    (grad,) = torch.autograd.grad(torch_ep.combine(y, plan), y, strided)
    compare.expect("gradient of y from columns", grad, expected.dispatch(routing, rank, g))
    (again,) = torch.autograd.grad(torch_ep.combine(y, plan)[:, ::2].sum(), y)
    every_second = [torch.arange(case.hidden).remainder(2).eq(0).to(F64).expand(shape).contiguous() for shape in home]
    compare.expect("gradient of every second column", again, expected.dispatch(routing, rank, every_second))
    return compare.differences


@pytest.mark.parametrize("capacity", ["exact", "too small", "tail"])
@pytest.mark.parametrize("layout", LAYOUTS)
@few_worlds
def test_gradients(name: str, layout: torch_ep.Layout, capacity: str) -> None:
    tokens = tuple((7, 0, 5, 9)[: open_world(name).world_size])
    case = Case(51, tokens, 3, 3, F64, 6, layout=layout, capacity=capacity, weight_dtype=F64)
    no_differences(name, gradients, case)


def fp8_gradients(rank: int, world_size: int, group: str | None) -> list[str]:
    """Rows of fp8 have no gradient; what travels with them has: rows of no bytes at all on the way back."""
    case = Case(52, tuple(3 + r for r in range(world_size)), 3, 2, FP8, 32, scales=(F32, 3))
    compare = Comparison(case)
    problem = problem_of(case)
    plan = torch_ep.plan(to_device(problem.topk_idx[rank]), case.num_experts, group, **problem.options)
    w = torch.rand(case.tokens[rank], 3).to(DEVICE).requires_grad_()
    s = torch.rand(case.tokens[rank], 3).to(DEVICE).requires_grad_()
    _, weights, scales = torch_ep.dispatch(to_device(problem.x[rank]), plan, topk_weights=w, scales=s)
    gw = [random_numbers((p.num_rows,), F32, 53, r) for r, p in enumerate(problem.routing.plans)]
    gs = [random_numbers((p.num_rows, 3), F32, 54, r) for r, p in enumerate(problem.routing.plans)]
    grads = torch.autograd.grad([weights, scales], [w, s], [to_device(gw[rank]), to_device(gs[rank])])
    compare.expect("gradient of topk_weights", grads[0], expected.combine_weights(problem.routing, rank, gw))
    compare.expect("gradient of scales", grads[1], expected.combine(problem.routing, rank, gs))
    return compare.differences


@few_worlds
def test_gradients_of_payloads_beside_fp8_rows(name: str) -> None:
    no_differences(name, fp8_gradients)


# --- limits and errors, after which everything works ---


def finish() -> None:
    """Waits until this rank's exchanges have ended, with or without what they had to say."""
    if DEVICE == "cuda":
        torch.cuda.current_stream().synchronize()


def attempt(fn: Callable[[], Any], later: Callable[[], Any] | None = None) -> tuple[str, str]:
    """The error of `fn`, or of the call after it, which is what reports an error that only the device could see."""
    try:
        fn()
        finish()
        if later is not None:
            later()
    except Exception as error:
        return type(error).__name__, str(error).splitlines()[0]
    return "", "no error"


Answer = tuple[list[tuple[str, str]], list[str]]


def beyond_limits(rank: int, world_size: int, group: str | None) -> Answer:
    limit = limits(world_size)
    experts, topk, hidden = limit["num_experts"], limit["num_topk"], limit["hidden"]
    plan = torch_ep.plan(torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), world_size, group)
    calls: list[Callable] = [
        lambda: torch_ep.plan(torch.arange(topk + 1, device=DEVICE)[None], experts, group),
        lambda: torch_ep.plan(torch.zeros(4, 1, dtype=torch.int64, device=DEVICE), experts + world_size, group),
        lambda: torch_ep.dispatch(torch.ones(1, hidden + 1, device=DEVICE), plan),
        lambda: torch_ep.combine(torch.ones(plan.num_rows, hidden + 1, device=DEVICE), plan),
    ]
    return [attempt(call) for call in calls], works(rank, world_size, group)


@several_ranks
def test_beyond_the_limits(name: str) -> None:
    ranks = open_world(name)
    limit = limits(ranks.world_size)
    told = "the limit given to torch_ep.init"
    experts, topk, hidden = limit["num_experts"], limit["num_topk"], limit["hidden"]
    for errors, differences in ranks.run(beyond_limits):
        assert errors == [
            ("ValueError", f"ep::plan: expected at most num_topk = {topk}, {told}, got {topk + 1}"),
            (
                "ValueError",
                f"ep::plan: expected at most num_experts = {experts}, {told}, got {experts + ranks.world_size}",
            ),
            ("ValueError", f"ep::dispatch: expected at most hidden = {hidden}, {told}, got {hidden + 1}"),
            ("ValueError", f"ep::combine: expected at most hidden = {hidden}, {told}, got {hidden + 1}"),
        ]
        assert not differences


def plan_of(topk_idx: Tensor, num_experts: int, group: str | None, capacity: int | None) -> torch_ep.Plan:
    return torch_ep.plan(topk_idx.to(DEVICE), num_experts, group, capacity=capacity)


def one_rank_is_wrong(
    rank: int, world_size: int, group: str | None, bad: int, what: str, capacity: int | None
) -> Answer:
    experts = 2 * world_size
    idx = random_topk(8, 2, experts, seeded(rank))
    if rank == bad and what == "tokens":
        idx = random_topk(limits(world_size)["max_tokens_per_rank"] + 1, 2, experts, seeded(rank))
    elif rank == bad:
        idx[5, 1] = {"high": experts + 3, "low": -7, "twice": 1}[what]
        if what == "twice":
            idx[5, 0] = 1
    error = attempt(
        lambda: plan_of(idx, experts, group, capacity),
        None if capacity is None else lambda: plan_of(idx[:1], experts, group, capacity),
    )
    return [error], works(rank, world_size, group)


WRONG = {
    "tokens": lambda w: "ep::plan: expected at most max_tokens_per_rank = 2048 tokens, got 2049",
    "high": lambda w: f"ep::plan: expected topk_idx in [-1, {2 * w}), got {2 * w + 3} at token 5, slot 1",
    "low": lambda w: f"ep::plan: expected topk_idx in [-1, {2 * w}), got -7 at token 5, slot 1",
    "twice": lambda w: "ep::plan: expected different experts in one token, got expert 1 at token 5",
}


@pytest.mark.parametrize("capacity", [None, 64], ids=["exact", "capacity"])
@pytest.mark.parametrize("what", WRONG)
@several_ranks
def test_an_error_on_one_rank_raises_on_all_ranks(name: str, what: str, capacity: int | None) -> None:
    ranks = open_world(name)
    bad = ranks.world_size - 1
    for rank, (((kind, message),), differences) in enumerate(ranks.run(one_rank_is_wrong, bad, what, capacity)):
        if rank == bad:
            assert kind == "ValueError", message
            assert message.startswith(WRONG[what](ranks.world_size))
        else:
            assert kind == "DistError", message
            assert re.search(rf"\brank {bad}\b", message), message
        assert not differences


@pytest.mark.parametrize("what", ["high", "low", "twice"])
def test_a_bad_index_of_a_single_rank(what: str) -> None:
    (((kind, message),), differences) = open_world("virtual-1").run(one_rank_is_wrong, 0, what, None)[0]
    assert kind == "ValueError"
    assert message.startswith(WRONG[what](1))
    assert not differences


def different_operators(rank: int, world_size: int, group: str | None, odd: int) -> Answer:
    idx = torch.zeros(2, 1, dtype=torch.int64)
    plan = plan_of(idx, world_size, group, 2 * world_size)
    x, y = torch.ones(2, 8, device=DEVICE), torch.ones(plan.num_rows, 8, device=DEVICE)
    wrong = (lambda: torch_ep.dispatch(x, plan)) if rank == odd else (lambda: torch_ep.combine(y, plan))
    error = attempt(wrong, lambda: plan_of(idx, world_size, group, 2 * world_size))
    return [error], works(rank, world_size, group)


@several_ranks
def test_different_operators_are_both_named(name: str) -> None:
    ranks = open_world(name)
    for ((kind, message),), differences in ranks.run(different_operators, 0):
        assert kind == "DistError", message
        assert "ep::dispatch" in message and "ep::combine" in message, message
        assert not differences


def different_sizes(rank: int, world_size: int, group: str | None, what: str) -> Answer:
    idx = torch.zeros(2, 1, dtype=torch.int64)
    plan = plan_of(idx, world_size, group, 2 * world_size)
    odd = rank == world_size - 1
    x = torch.ones(2, 16 if what == "hidden" and odd else 8, device=DEVICE)
    x = x.half() if what == "dtype" and odd else x
    weights = torch.ones(2, 1, device=DEVICE) if what == "weights" and odd else None
    payloads = {
        "dtype of topk_weights": {"topk_weights": torch.ones(2, 1, dtype=BF16 if odd else F16, device=DEVICE)},
        "dtype of scales": {"scales": torch.ones(2, 1, dtype=torch.int32 if odd else F32, device=DEVICE)},
    }
    experts = 2 * world_size if what == "num_experts" and odd else world_size

    def wrong() -> None:
        if what == "num_experts":
            plan_of(idx, experts, group, 2 * world_size)
        elif weights is not None:
            torch_ep.dispatch(x, plan, topk_weights=weights)
        else:
            torch_ep.dispatch(x, plan, **payloads.get(what, {}))

    error = attempt(wrong, lambda: plan_of(idx, world_size, group, 2 * world_size))
    return [error], works(rank, world_size, group)


@pytest.mark.parametrize(
    "what", ["hidden", "dtype", "weights", "dtype of topk_weights", "dtype of scales", "num_experts"]
)
@pytest.mark.parametrize("name", ["virtual-3", "gpus-2"])
def test_the_error_names_the_argument_that_differs_between_ranks(name: str, what: str) -> None:
    words = {"weights": "bytes of topk_weights per token"}.get(what, what)
    for ((kind, message),), differences in open_world(name).run(different_sizes, what):
        assert kind == "DistError", message
        assert f"expected the same {words} on every rank" in message, message
        assert not differences


# --- the communicator ---


def backends(rank: int, world_size: int, group: str | None) -> list[tuple[str, str, int]]:
    """What `init` decides: asked for, by itself, and the other one."""
    found = []
    for backend in ("nvlink", "auto", "c10d", "nvlink"):
        c = torch_ep.init(backend=backend, timeout=TIMEOUT, **limits(world_size))
        assert not works(rank, world_size, group), backend
        found.append((c.backend, c.reason, c.symmetric_bytes))
    return found


@pytest.mark.parametrize("name", GPUS)
def test_backend_by_name_and_by_itself(name: str) -> None:
    for asked, itself, other, _ in open_world(name, may_share=False).run(backends):
        assert asked[0] == itself[0] == "nvlink"
        assert other[0] == "c10d"
        assert itself[1]  # says why
        assert asked[2] > 0 and other[2] == 0


@pytest.mark.parametrize("name", ["virtual-2", "virtual-5", *GPUS])
def test_stress(name: str) -> None:
    ranks = open_world(name)
    assert not stress.run(ranks, exchanges=200, seed=1, progress=False, limit_s=LIMIT_S).problems
