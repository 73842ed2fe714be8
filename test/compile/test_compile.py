"""torch.compile: one graph, no breaks, equal to eager, for every number of tokens and whatever the other ranks have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from support.compiling import DIVIDES_BY_NO_ROWS, InductorGraphs, artifacts, inductor_cache, padded_products
from support.devices import Ranks, needs_cuda, one_rank_on
from support.harness import random_topk, seeded
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import torch_ep

HIDDEN, EXPERTS, TOPK = 16, 4, 2
# In the order in which specialisation on 0 and 1 costs most graphs.
TOKENS = (2, 0, 1, 17, 4096)

MODES = {
    "expert_major-exact": {"layout": "expert_major", "alignment": 4},
    "expert_major-capacity": {"layout": "expert_major", "alignment": 4, "capacity": 24},
    "rank_major-exact": {"layout": "rank_major", "alignment": 4},
    "rank_major-capacity": {"layout": "rank_major", "alignment": 4, "capacity": 7},
}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
# The two that share least: sizes that depend on data, and static sizes after an unknown number of tokens.
two_modes = pytest.mark.parametrize("name", ["expert_major-exact", "rank_major-capacity"])


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_layer(device: str, **mode: Any) -> torch_ep.nn.MoE:
    torch.manual_seed(0)
    return torch_ep.nn.MoE(HIDDEN, 8, EXPERTS, TOPK, **mode).to(device)


def tokens(device: str, count: int, *seeds: int) -> Tensor:
    return torch.randn(count, HIDDEN, generator=seeded(count, *seeds)).to(device).requires_grad_()


def run_layer(layer: Any, module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Everything that one step of `layer` (`module`, compiled or not) gives: results and gradients."""
    module.zero_grad()
    x.grad = None
    y, stats = layer(x)
    (y.square().sum() + stats.aux_loss).backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    results = {"y": y.detach(), **{k: v.detach() for k, v in stats._asdict().items()}}
    return {**results, "x.grad": x.grad, **grads}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, expected in want.items():
        # Sums over thousands of tokens, which Inductor and cuBLAS order differently on CUDA.
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if expected.is_cuda and expected.is_floating_point() else {}
        torch.testing.assert_close(got[name], expected, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def graph_breaks() -> int:
    return sum(counters["graph_break"].values())


@each_mode
def test_fullgraph_equals_eager_with_a_fixed_number_of_tokens(device: str, mode: dict[str, Any]) -> None:
    layer = make_layer(device, **mode)
    x = tokens(device, 9)
    compiled = torch.compile(layer, fullgraph=True, backend=InductorGraphs())
    assert_same(run_layer(compiled, layer, x), run_layer(layer, layer, x))


@each_mode
def test_one_graph_for_every_number_of_tokens(device: str, mode: dict[str, Any]) -> None:
    layer = make_layer(device, **mode)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for count in TOKENS:
        x = tokens(device, count)
        torch_ep.mark_tokens(x)
        assert_same(run_layer(compiled, layer, x), run_layer(layer, layer, tokens(device, count)))
    assert backend.frame_count == 1


def test_a_graph_for_each_special_size_without_marks(device: str) -> None:
    """Compilations that the documentation of `mark_tokens` states for plain use: 2, 0, 1, and one for the rest."""
    layer = make_layer(device)
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for count in TOKENS + TOKENS:
        compiled(tokens(device, count))
    assert backend.frame_count == 4


@two_modes
def test_inductor_fullgraph_equals_eager_for_every_number_of_tokens(device: str, name: str) -> None:
    layer = make_layer(device, **MODES[name])
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    fails = device == "cuda" and name == "expert_major-exact" and DIVIDES_BY_NO_ROWS
    with inductor_cache(artifacts()):
        for count in TOKENS:
            x = tokens(device, count)
            torch_ep.mark_tokens(x)
            with pytest.raises(ZeroDivisionError) if fails and count == 0 else contextlib.nullcontext():
                assert_same(run_layer(compiled, layer, x), run_layer(layer, layer, tokens(device, count)))
    assert backend.frame_count == 1


def test_no_graph_break_without_fullgraph_where_data_dependent_sizes_are_captured(device: str) -> None:
    layer = make_layer(device)
    backend = CompileCounterWithBackend("aot_eager")
    x = tokens(device, 9)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        got = run_layer(torch.compile(layer, backend=backend), layer, x)
    assert (graph_breaks(), backend.frame_count) == (0, 1)
    assert_same(got, run_layer(layer, layer, x))


def test_no_graph_break_without_fullgraph_with_a_capacity(device: str) -> None:
    layer = make_layer(device, capacity=24)
    backend = CompileCounterWithBackend("aot_eager")
    run_layer(torch.compile(layer, backend=backend), layer, tokens(device, 9))
    assert (graph_breaks(), backend.frame_count) == (0, 1)


def test_only_the_exact_plan_breaks_the_graph_without_fullgraph(device: str) -> None:
    layer = make_layer(device)
    x = tokens(device, 9)
    got = run_layer(torch.compile(layer, backend="aot_eager"), layer, x)
    (reason,) = counters["graph_break"]
    assert "ep.plan.default" in reason
    assert_same(got, run_layer(layer, layer, x))


class Bare(nn.Module):
    """The operators alone, with every input from outside: their numbers of tokens must be found equal."""

    def __init__(self, layout: str, capacity: int | None) -> None:
        super().__init__()
        self.layout, self.capacity = layout, capacity

    def forward(self, x: Tensor, topk_idx: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        plan = torch_ep.plan(topk_idx, EXPERTS, layout=self.layout, capacity=self.capacity)
        rows, row_weights = torch_ep.dispatch(x, plan, topk_weights=weights)
        return torch_ep.combine(rows.sin(), plan, topk_weights=row_weights)


@pytest.mark.parametrize("capacity", [None, 16], ids=["exact", "capacity"])
@pytest.mark.parametrize("layout", ["rank_major", "expert_major"])
def test_operators_take_marked_inputs(device: str, layout: str, capacity: int | None) -> None:
    module = Bare(layout, capacity)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for count in TOKENS:
        x, weights = tokens(device, count), torch.rand(count, TOPK, generator=seeded(count, 1))
        weights = weights.to(device).requires_grad_()
        topk_idx = random_topk(count, TOPK, EXPERTS, seeded(count)).to(device)
        torch_ep.mark_tokens(x, topk_idx, weights)
        results = []
        for fn in (compiled, module):
            outputs = fn(x, topk_idx, weights)
            grads = torch.autograd.grad([y.square().sum() for y in outputs], (x, weights))
            results.append((*outputs, *grads))
        torch.testing.assert_close(*results)
    assert backend.frame_count == 1


def test_inputs_marked_by_different_names_have_numbers_of_their_own(device: str) -> None:
    module = Bare("expert_major", None)

    def both(*args: Tensor) -> list[Tensor]:
        return [y for part in (args[:3], args[3:]) for y in module(*part)]

    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both, fullgraph=True, backend=backend)
    for counts in [(5, 2), (0, 3), (1, 0)]:
        args: list[Tensor] = []
        for name, count in zip("ab", counts, strict=True):
            topk_idx = random_topk(count, TOPK, EXPERTS, seeded(count)).to(device)
            part = tokens(device, count), topk_idx, torch.rand(count, TOPK).to(device)
            torch_ep.mark_tokens(*part, name=name)
            args += part
        torch.testing.assert_close(compiled(*args), both(*args))
    assert backend.frame_count == 1


def _training(x: Tensor, topk_idx: Tensor, weights: Tensor, w: Tensor) -> Tensor:
    plan = torch_ep.plan(topk_idx, EXPERTS, layout="rank_major", capacity=10)
    rows, _ = torch_ep.dispatch(x @ w, plan, topk_weights=weights)
    return torch_ep.combine(rows @ w, plan) @ w


def _decoding(x: Tensor, topk_idx: Tensor, weights: Tensor, w: Tensor) -> Tensor:
    rows, plan = torch_ep.low_latency_dispatch(
        x @ w, topk_idx, num_experts=EXPERTS, max_tokens_per_rank=6, topk_weights=weights
    )
    return torch_ep.low_latency_combine(torch.bmm(rows, w.expand(EXPERTS, -1, -1)), plan)


@pytest.mark.parametrize(("step", "hidden"), [(_training, 18), (_decoding, 20)], ids=["training", "decoding"])
def test_operators_take_products_that_inductor_has_padded(device: str, step: Any, hidden: int) -> None:
    x, w = (torch.randn(n, hidden, generator=seeded(n)).div(hidden**0.5).to(device) for n in (5, hidden))
    topk_idx = random_topk(5, TOPK, EXPERTS, seeded(1)).to(device)
    weights = torch.rand(5, TOPK, generator=seeded(2)).to(device)
    results = []
    with one_rank_on(device), inductor_cache(artifacts()), padded_products():
        for run in (step, torch.compile(step, fullgraph=True)):
            x_leaf = x.clone().requires_grad_(step is _training)
            y = run(x_leaf, topk_idx, weights, w)
            if step is _training:
                y.square().sum().backward()
            results.append({"y": y.detach(), **({} if x_leaf.grad is None else {"x.grad": x_leaf.grad})})
    eager, compiled = results
    assert_same(compiled, eager)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("capacity", [None, 192], ids=["exact", "capacity"])
def test_cuda_graphs_of_a_layer_equal_eager(capacity: int | None) -> None:
    """In bfloat16, for which torch has grouped products that do not wait. An exact plan alone cuts the graph."""
    torch.manual_seed(0)
    layer = torch_ep.nn.MoE(64, 32, 8, 2, capacity=capacity, alignment=8, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    with one_rank_on("cuda"), inductor_cache(artifacts()):
        for step in range(6):
            x = torch.randn(64, 64, generator=seeded(step)).to("cuda", torch.bfloat16)
            torch.compiler.cudagraph_mark_step_begin()
            got = run_layer(compiled, layer, x.clone().requires_grad_())
            want = run_layer(layer, layer, x.clone().requires_grad_())
            assert got.keys() == want.keys()
            for name, expected in want.items():
                # Compiled code rounds to bfloat16 less often.
                off = (got[name].double() - expected.double()).abs().max()
                assert off <= 0.03 * expected.double().abs().max() + 1e-3, f"step {step}: {name}: off by {off}"
    if capacity is not None:
        assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["inductor"]["cudagraph_recorded_non_static_inputs"] > 0  # graphs it was


# Two ranks.


def _step_on_ranks(
    rank: int,
    world_size: int,
    device: str,
    backend: str,
    mode: dict[str, Any],
    counts: Sequence[Sequence[int]],
    marked: bool,
) -> int:
    """Steps with different numbers of tokens here and there; each equal to eager. Returns the graphs made."""
    torch._dynamo.reset()
    layer = make_layer(device, **mode)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for step, step_counts in enumerate(counts):
        count = step_counts[rank]
        x = tokens(device, count, rank, step)
        if marked:
            torch_ep.mark_tokens(x)
        got = run_layer(compiled, layer, x)
        assert_same(got, run_layer(layer, layer, tokens(device, count, rank, step)))
    torch._dynamo.reset()
    return counter.frame_count


@two_modes
def test_two_ranks_that_compile_different_numbers_of_graphs(device: str, name: str) -> None:
    counts = [(5, 3), (6, 3), (0, 3), (1, 0), (7, 1)]
    graphs = Ranks(device, 2).run(_step_on_ranks, device, "aot_eager", MODES[name], counts, marked=False)
    assert graphs == [4, 3]  # 5, any, 0, 1 here; 3, 0, 1 there


def test_two_ranks_need_one_graph_each_where_tokens_are_marked(device: str) -> None:
    counts = [(2, 3), (0, 1), (1, 0), (17, 0), (0, 0), (300, 40)]
    graphs = Ranks(device, 2).run(_step_on_ranks, device, "aot_eager", MODES["expert_major-exact"], counts, marked=True)
    assert graphs == [1, 1]


def _too_many_tokens(rank: int, world_size: int, device: str, marked: bool) -> tuple[list[str], bool]:
    """Rank 0 exceeds its limit in a compiled graph. Returns each rank's error, and whether the next step is right."""
    torch._dynamo.reset()
    group = dist.new_group(list(range(world_size)))
    others = {} if device == "cpu" else {"hidden": HIDDEN, "num_topk": TOPK, "num_experts": EXPERTS}
    communicator = torch_ep.init(group, max_tokens_per_rank=4, **others)
    assert communicator.backend == ("c10d" if device == "cpu" else "nvlink")

    def fn(x: Tensor, topk_idx: Tensor) -> Tensor:
        plan = torch_ep.plan(topk_idx, EXPERTS, group)
        return torch_ep.combine(torch_ep.dispatch(x, plan), plan)

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    raised, right = [], False
    for counts in [(3, 3), (2, 2), (5, 3), (4, 3)]:
        count = counts[rank]
        x = tokens(device, count).detach()
        topk_idx = random_topk(count, TOPK, EXPERTS, seeded(count), holes=0).to(device)
        if marked:
            torch_ep.mark_tokens(x, topk_idx)
        try:
            right = torch.allclose(compiled(x, topk_idx), TOPK * x)
        except (ValueError, dist.DistError) as error:
            raised.append(f"{type(error).__name__}: {error}")
    torch_ep.destroy(group)
    dist.destroy_process_group(group)
    torch._dynamo.reset()
    return raised, right


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "plain"])
def test_a_dynamic_graph_leaves_a_limit_to_the_kernel_which_tells_the_other_ranks(device: str, marked: bool) -> None:
    ((first,), _), ((second,), _) = results = Ranks(device, 2).run(_too_many_tokens, device, marked)
    assert first.startswith("ValueError: ep::plan: expected at most max_tokens_per_rank = 4 tokens, got 5")
    assert second.startswith("DistError") and "rank 0" in second and "max_tokens_per_rank" in second, second
    assert [right for _, right in results] == [True, True]


def _one_rank_then_two(rank: int, world_size: int, device: str, cache: str) -> list[bool]:
    """Runs the same code for a group of one rank, then for the default group. Returns whether each is right."""
    torch._dynamo.reset()

    def fn(x: Tensor, topk_idx: Tensor, group: str | None) -> Tensor:
        plan = torch_ep.plan(topk_idx, EXPERTS, group, layout="rank_major", capacity=12)
        return torch_ep.combine(torch_ep.dispatch(x, plan).relu(), plan)

    x, topk_idx = tokens(device, 6, rank), random_topk(6, TOPK, EXPERTS, seeded(rank)).to(device)
    right = []
    with inductor_cache(cache):
        for group in ("", None):
            y = torch.compile(fn, fullgraph=True)(x, topk_idx, group)
            (grad,) = torch.autograd.grad(y.square().sum(), x)
            want = fn(x, topk_idx, group)
            (want_grad,) = torch.autograd.grad(want.square().sum(), x)
            right.append(torch.allclose(y, want) and torch.allclose(grad, want_grad))
            torch._dynamo.reset()  # the guards are gone, the artifacts on disk are not
    return right


def test_artifacts_of_a_smaller_world_are_not_taken_for_a_larger_one(device: str, tmp_path: Path) -> None:
    assert Ranks(device, 2).run(_one_rank_then_two, device, str(tmp_path)) == [[True, True]] * 2
