"""One rank on a GPU, without `init`: the kernels of torch_ep/csrc/local give the bits of the CPU's.

Each test runs whole operators of one rank and, as "parts", the same kernels in the steps that an exchange between ranks
is made of. Kernels alone, plans with entries that lead anywhere, and compute-sanitizer: sanitizer/permute.cu.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.harness import random_topk, same_bits, seeded
from support.nvlink_cases import BF16, F16, F32, F64, WIDE_ROWS, Case, check_cases, check_seeds, works
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import torch_ep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LAYOUTS: list[torch_ep.Layout] = ["rank_major", "expert_major"]
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(params=["whole", "parts"], autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.ops.ep._force_parts(request.param == "parts")
    yield request.param
    torch.ops.ep._force_parts(False)


@pytest.fixture
def whole(kernels: str) -> None:
    if kernels != "whole":
        pytest.skip("only whole operators do this")


@pytest.mark.parametrize("batch", range(4))
def test_random_cases(batch: int) -> None:
    assert not check_seeds(0, 1, "", 1000 + 40 * batch, 40)


LARGE = {
    "many tokens": Case(1, (40000,), 4, 8, BF16, 24),
    "many tokens, rank_major": Case(2, (40000,), 2, 3, F32, 4, layout="rank_major", capacity="too small"),
    "many experts": Case(3, (700,), 8, 5000, F16, 40, alignment=16, capacity="tail"),
    "more experts than the kernels count": Case(4, (90,), 4, 20000, F64, 6),
    "many slots": Case(5, (60,), 70, 128, BF16, 72, scales=(F32, 3)),
    "many slots, rank_major": Case(6, (60,), 70, 128, BF16, 515, layout="rank_major"),
    "no tokens": Case(7, (0,), 8, 16, BF16, 64, capacity="tail", alignment=8),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_cases(name: str) -> None:
    assert not check_cases(0, 1, "", [LARGE[name]])


def test_wide_rows() -> None:
    rows = enumerate(WIDE_ROWS)
    cases = [Case(i, (9,), 8, 16, dtype, width, layout=LAYOUTS[i % 2], scales=(F32, 56)) for i, (dtype, width) in rows]
    assert not check_cases(0, 1, "", cases)


def on_cpu_and_cuda(fn: Callable[..., Any], *tensors: Tensor) -> tuple[Any, Any]:
    return fn(*tensors), fn(*(t.cuda() for t in tensors))


@by_layout
@pytest.mark.parametrize("capacity", [None, 40])
def test_bits_of_the_cpu(layout: torch_ep.Layout, capacity: int | None) -> None:
    """NaN included: a row that is not summed keeps its bits."""
    g = seeded(7)
    idx = random_topk(50, 3, 16, g)
    idx[::3, 1:] = -1
    x = torch.randint(-(2**15), 2**15, (50, 72), generator=g).to(torch.int16).view(BF16)
    y = torch.where(torch.rand(50, 72, generator=g) < 0.1, torch.nan, x)
    weights = torch.rand(50, 3, generator=g)

    def run(idx: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> list[Tensor]:
        plan = torch_ep.plan(idx, 16, "", layout=layout, capacity=capacity)
        rows, row_weights = torch_ep.dispatch(x, plan, topk_weights=weights)
        single = torch_ep.plan(idx[:, :1].contiguous(), 16, "", layout=layout)
        lone = torch_ep.combine(torch_ep.dispatch(y, single), single)
        return [*(t for t in plan if isinstance(t, Tensor)), rows, row_weights, lone]

    for got, want in zip(*reversed(on_cpu_and_cuda(run, idx, x, y, weights)), strict=True):
        assert same_bits(got.cpu(), want)


@by_layout
def test_rows_beyond_32_bits(layout: torch_ep.Layout) -> None:
    """Bytes of x and of the result; elements of the sums."""
    tokens, topk, hidden = 40, 2, 2**25 + 8
    idx = random_topk(tokens, topk, 4, seeded(1), holes=0.0).cuda()
    x = torch.randint(0, 255, (tokens, hidden), dtype=torch.uint8, device="cuda")
    plan = torch_ep.plan(idx, 4, "", layout=layout)
    rows = torch_ep.dispatch(x, plan)
    if plan.recv_pair is None:
        assert torch.equal(rows, x)
    else:
        for row, pair in enumerate(plan.recv_pair.tolist()):
            assert torch.equal(rows[row], x[pair // topk])
    del rows
    y = torch.ones(plan.num_rows, hidden, dtype=BF16, device="cuda")
    assert torch_ep.combine(y, plan).eq(topk if layout == "expert_major" else 1).all()


@pytest.mark.parametrize("function", ["dispatch", "combine", "weighted"])
@by_layout
@pytest.mark.parametrize("capacity", [None, 8])
def test_gradients(layout: torch_ep.Layout, capacity: int | None, function: str) -> None:
    g = seeded(3)
    idx = random_topk(6, 2, 4, g).cuda()
    plan = torch_ep.plan(idx, 4, "", layout=layout, capacity=capacity)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64).cuda().requires_grad_()

    if function == "dispatch":
        arguments = [draw(6, 3), draw(6, 2)]
        fn: Callable = lambda x, w: torch_ep.dispatch(x, plan, topk_weights=w)  # noqa: E731
    elif function == "combine":
        back = (plan.num_rows,) if layout == "expert_major" else (plan.num_rows, 2)
        arguments = [draw(plan.num_rows, 3), draw(*back)]
        fn = lambda y, w: torch_ep.combine(y, plan, topk_weights=w)  # noqa: E731
    else:
        arguments = [draw(plan.num_rows, 3), draw(plan.num_rows)]
        fn = lambda y, w: torch_ep.combine(y, plan, row_weights=w)  # noqa: E731
    assert gradcheck(fn, arguments)
    assert gradgradcheck(fn, arguments)


# --- no wait for the device ---


def layer(idx: Tensor, x: Tensor, weights: Tensor, layout: torch_ep.Layout, capacity: int) -> list[Tensor]:
    plan = torch_ep.plan(idx, 16, "", layout=layout, capacity=capacity)
    rows, row_weights = torch_ep.dispatch(x, plan, topk_weights=weights)
    if layout == "rank_major":
        row_weights = row_weights.sum(1)
    return [*(t for t in plan if isinstance(t, Tensor)), rows, torch_ep.combine(rows, plan, row_weights=row_weights)]


@contextlib.contextmanager
def no_wait() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@by_layout
@pytest.mark.parametrize("capacity", [64, 400], ids=["drops", "tail"])
@pytest.mark.usefixtures("whole")
def test_graphs_replay_with_new_routing(layout: torch_ep.Layout, capacity: int) -> None:
    def draw(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        g = seeded(seed)
        x = torch.randn(90, 40, generator=g).to(BF16)
        return random_topk(90, 3, 16, g), x, torch.rand(90, 3, generator=g)

    inputs = [t.cuda() for t in draw(0)]
    layer(*inputs, layout, capacity)
    graph = torch.cuda.CUDAGraph()
    with no_wait(), torch.cuda.graph(graph):
        results = layer(*inputs, layout, capacity)
    for seed in range(1, 6):
        new = draw(seed)
        for old, t in zip(inputs, new, strict=True):
            old.copy_(t)
        graph.replay()
        for got, want in zip(results, layer(*new, layout, capacity), strict=True):
            assert same_bits(got.cpu(), want)


@by_layout
@pytest.mark.usefixtures("whole")
def test_nothing_waits_with_a_capacity(layout: torch_ep.Layout) -> None:
    g = seeded(1)
    idx, weights = random_topk(50, 2, 16, g).cuda(), torch.rand(50, 2, generator=g).cuda().requires_grad_()
    x = torch.randn(50, 24, generator=g).cuda().requires_grad_()
    with no_wait():
        *_, sums = layer(idx, x, weights, layout, 64)
        sums.sum().backward()


@pytest.mark.usefixtures("whole")
def test_an_exact_plan_cannot_be_captured() -> None:
    idx = torch.zeros(4, 1, dtype=torch.int64, device="cuda")
    torch_ep.plan(idx, 4, "")
    with pytest.raises(RuntimeError) as raised, torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch_ep.plan(idx, 4, "")
    assert str(raised.value).splitlines()[0] == (
        "ep::plan: expected a capacity while a CUDA graph is captured: an exact plan waits for the number of rows"
    )
    assert not works(0, 1, "")


# --- errors ---

BAD = {
    "high": ([[0, 1], [2, 4]], "ep::plan: expected topk_idx in [-1, 4), got 4 at token 1, slot 1"),
    "low": ([[0, -2], [9, 9]], "ep::plan: expected topk_idx in [-1, 4), got -2 at token 0, slot 1"),
    "twice": (
        [[0, 1], [2, 2]],
        "ep::plan: expected different experts in one token, got expert 2 at token 1, slots 0 and 1",
    ),
}


def message_of(fn: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as raised:
        fn()
    return str(raised.value).splitlines()[0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", BAD)
def test_bad_indices(name: str, dtype: torch.dtype) -> None:
    idx, message = BAD[name]
    topk_idx = torch.tensor(idx, dtype=dtype, device="cuda")
    assert message_of(lambda: torch_ep.plan(topk_idx, 4, "")) == message
    assert message_of(lambda: torch_ep.plan(topk_idx.cpu(), 4, "")) == message
    assert not works(0, 1, "")


@by_layout
@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("whole")
def test_the_next_call_tells_of_bad_indices_with_a_capacity(name: str, layout: torch_ep.Layout) -> None:
    idx, message = BAD[name]
    plan = torch_ep.plan(torch.tensor(idx, device="cuda"), 4, "", layout=layout, capacity=6)
    torch.cuda.synchronize()
    x = torch.ones(2, 8, device="cuda")
    assert message_of(lambda: torch_ep.dispatch(x, plan)) == message
    # The plan itself is that of tokens without experts.
    empty = torch_ep.plan(torch.full((2, 2), -1), 4, "", layout=layout, capacity=6)
    for name, got, want in zip(plan._fields, plan, empty, strict=True):
        if isinstance(got, Tensor):
            assert torch.equal(got.cpu(), want), name
    assert torch_ep.dispatch(x, plan).eq(0).all()
    assert not works(0, 1, "")


@pytest.mark.parametrize("field", ["send_row", "recv_pair"])
@pytest.mark.usefixtures("whole")
def test_the_next_call_tells_of_a_plan_that_leads_outside(field: str) -> None:
    plan = torch_ep.plan(torch.tensor([[0, 1], [2, 3]], device="cuda"), 4, "")
    bad = getattr(plan, field).clone()
    bad.view(-1)[1] = 77
    bound = {"send_row": 2, "recv_pair": 4}[field]
    for op, width in (("dispatch", 2), ("combine", 4)):
        getattr(torch_ep, op)(torch.ones(width, 8, device="cuda"), plan._replace(**{field: bad}))
        torch.cuda.synchronize()
        message = message_of(lambda: torch_ep.plan(torch.zeros(1, 1, dtype=torch.int64, device="cuda"), 4, ""))
        assert message == f"ep::{op}: expected {field} of this plan in [-1, {bound}), got 77"
    assert not works(0, 1, "")


def test_several_streams() -> None:
    """Operators of different streams share nothing but the report of a failure."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    cases = []
    for seed in range(4):
        g = seeded(seed)
        inputs = random_topk(300, 4, 16, g), torch.randn(300, 64, generator=g), torch.rand(300, 4, generator=g)
        cases.append([t.cuda() for t in inputs])
    want = [layer(*(t.cpu() for t in case), "expert_major", 2000)[-1] for case in cases]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = []
    for _ in range(10):
        for stream, case in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                results.append(layer(*case, "expert_major", 2000))
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        assert same_bits(result[-1].cpu(), want[i % 4])
