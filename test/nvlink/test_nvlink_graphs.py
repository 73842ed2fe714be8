"""CUDA graphs over the nvlink backend: capacity mode is captured and replayed with new routing, forward and backward.

Epochs advance on the device, so a graph may hold any number of exchanges and be replayed in between anything else.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import expected
from support.harness import random_topk, seeded
from support.nvlink_cases import BF16, DEVICE, F32, F64, Comparison, random_numbers, works
from support.virtual import LIMIT_S, meet, open_world, reserve
from torch import Tensor
from torch._dynamo.utils import counters

import torch_ep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LAYOUTS: list[torch_ep.Layout] = ["rank_major", "expert_major"]
WORLDS = ["virtual-1", "virtual-3", "gpus-2", "gpus-4"]
# Graphs of torch.compile belong to the main thread of a process, and virtual ranks beside each other have none.
COMPILE_WORLDS = ["virtual-1", "gpus-2", "gpus-4"]

TOKENS, NUM_TOPK, HIDDEN = 13, 3, 40


def no_differences(name: str, fn: Callable, *args: Any, limit_s: float = LIMIT_S) -> None:
    for rank, differences in enumerate(open_world(name).run(fn, *args, limit_s=limit_s)):
        assert not differences, f"rank {rank}: " + "\n".join(differences)


class Layers:
    """`count` layers, one after another: plan, dispatch with weights, combine; and their gradients. Inputs stay."""

    def __init__(
        self, rank: int, world_size: int, group: str | None, count: int, layout: torch_ep.Layout, capacity: int
    ) -> None:
        self.rank, self.world_size, self.group = rank, world_size, group
        self.count, self.layout, self.capacity = count, layout, capacity
        self.num_experts = 4 * world_size
        self.x = torch.zeros(TOKENS, HIDDEN, device=DEVICE, dtype=F64, requires_grad=True)
        self.weights = torch.zeros(TOKENS, NUM_TOPK, device=DEVICE, dtype=F64, requires_grad=True)
        self.grad = torch.zeros(TOKENS, HIDDEN, device=DEVICE, dtype=F64)
        self.topk_idx = torch.full((TOKENS, NUM_TOPK), -1, device=DEVICE)

    def options(self) -> dict[str, Any]:
        return {"layout": self.layout, "capacity": self.capacity}

    def inputs(self, seed: int, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Whole numbers, and few of them: sums over a few layers are exact in float64."""
        g = seeded(seed, rank)

        def whole(*shape: int) -> Tensor:
            return torch.randint(-4, 5, shape, generator=g).to(F64)

        topk_idx = random_topk(TOKENS, NUM_TOPK, self.num_experts, g, holes=0.3)
        return topk_idx, whole(TOKENS, HIDDEN), whole(TOKENS, NUM_TOPK), whole(TOKENS, HIDDEN)

    @torch.no_grad()
    def load(self, seed: int) -> None:
        """Other routing and other numbers, in the same places."""
        for own, new in zip(
            (self.topk_idx, self.x, self.weights, self.grad), self.inputs(seed, self.rank), strict=True
        ):
            own.copy_(new)

    def run(self) -> list[Tensor]:
        """Sums, gradients, and how many rows each layer dropped."""
        h, dropped = self.x, []
        for _ in range(self.count):
            plan = torch_ep.plan(self.topk_idx, self.num_experts, self.group, **self.options())
            rows, row_weights = torch_ep.dispatch(h, plan, topk_weights=self.weights)
            factors = row_weights if row_weights.dim() == 1 else row_weights.sum(1)
            h = torch_ep.combine(rows, plan, row_weights=factors)
            dropped.append(plan.num_dropped)
        grads = torch.autograd.grad(h, [self.x, self.weights], self.grad)
        return [h.detach(), *grads, *dropped]

    def want(self, seed: int) -> list[Tensor]:
        """The same from what each layer does to a row: it multiplies it by the weights of the rows that were kept."""
        ranks = range(self.world_size)
        inputs = [self.inputs(seed, r) for r in ranks]
        routing = expected.route([i[0] for i in inputs], self.num_experts, **self.options())
        _, x, w, g = inputs[self.rank]
        kept = torch.zeros(TOKENS, NUM_TOPK, dtype=F64)
        for r in routing.ranks:
            mine = r.source == self.rank
            kept[r.token[mine]] += (r.row_of[mine] >= 0).to(F64)
        factor = (w * kept).sum(1, keepdim=True)
        h = x * factor**self.count
        grad_x = g * factor**self.count
        grad_factor = (g * x).sum(1, keepdim=True) * self.count * factor ** (self.count - 1)
        dropped = routing.plans[self.rank].num_dropped
        return [h, grad_x, grad_factor * kept, *[dropped] * self.count]

    def check(self, compare: Comparison, name: str, seed: int, got: list[Tensor]) -> None:
        for part, a, b in zip(("sums", "gradient of x", "gradient of weights", *range(9)), got, self.want(seed)):  # noqa: B905
            compare.expect(f"{name}: {part}", _plain(a), _plain(b))


def _plain(t: Tensor) -> Tensor:
    """Without the sign of zeros, which depends on the order of operations that gradients leave open."""
    return t + 0.0 if t.is_floating_point() else t


_capturing = threading.Lock()


def capture(fn: Callable[[], Any], group: str | None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `fn` and what it returned. One virtual rank after the other, for capture waits for the device."""
    torch.cuda.current_stream().synchronize()
    meet(group)  # so nobody's kernel still waits for another rank
    with _capturing:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = fn()
    meet(group)
    reserve(group)  # a capture empties the allocator's cache
    meet(group)
    return graph, result


def replays(
    rank: int, world_size: int, group: str | None, count: int, layout: torch_ep.Layout, capacity: int
) -> list[str]:
    compare = Comparison(f"{count} layers, {layout}, capacity {capacity}")
    layers = Layers(rank, world_size, group, count, layout, capacity)
    layers.load(0)
    layers.check(compare, "eager", 0, layers.run())
    graph, results = capture(layers.run, group)
    for seed in range(1, 12):
        layers.load(seed)
        graph.replay()
        layers.check(compare, f"replay {seed}", seed, results)
    return compare.differences


@pytest.mark.parametrize("capacity", [6, 120], ids=["drops", "tail"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", WORLDS)
def test_replays_with_new_routing(name: str, count: int, layout: torch_ep.Layout, capacity: int) -> None:
    no_differences(name, replays, count, layout, capacity)


def forward_alone(rank: int, world_size: int, group: str | None, exchanges: int) -> list[str]:
    """One to five exchanges in a graph: of every kind of op an odd and an even number."""
    compare = Comparison(f"{exchanges} exchanges")
    num_experts, capacity = 4 * world_size, 40
    plan_idx = [random_topk(TOKENS, NUM_TOPK, num_experts, seeded(7, r)) for r in range(world_size)]
    routing = expected.route(plan_idx, num_experts, layout="expert_major", capacity=capacity)
    plan = torch_ep.plan(plan_idx[rank].to(DEVICE), num_experts, group, capacity=capacity)
    x = torch.zeros(TOKENS, HIDDEN, device=DEVICE, dtype=F32)

    def run() -> list[Tensor]:
        results: list[Tensor] = []
        for i in range(exchanges):
            results.append(torch_ep.combine(results[-1], plan) if i % 2 else torch_ep.dispatch(x, plan))
        return results

    run()
    graph, results = capture(run, group)
    for seed in range(5):
        values = [random_numbers((TOKENS, HIDDEN), F32, 8, seed, r) for r in range(world_size)]
        x.copy_(values[rank])
        graph.replay()
        rows = [expected.dispatch(routing, r, values) for r in range(world_size)]
        wanted = (rows[rank], expected.combine(routing, rank, rows))
        for i, got in enumerate(results):
            compare.expect(f"replay {seed}: exchange {i}", got, wanted[i % 2])
    return compare.differences


@pytest.mark.parametrize("exchanges", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", WORLDS)
def test_any_number_of_exchanges_in_a_graph(name: str, exchanges: int) -> None:
    no_differences(name, forward_alone, exchanges)


def interleaved(rank: int, world_size: int, group: str | None) -> list[str]:
    """Three graphs, eager calls and exact plans, in random order; all with routing of their own."""
    compare = Comparison("interleaved")
    kinds: list[tuple[int, torch_ep.Layout, int]] = [
        (1, "expert_major", 90),
        (2, "rank_major", 60),
        (3, "expert_major", 8),
    ]
    graphs = []
    for count, layout, capacity in kinds:
        layers = Layers(rank, world_size, group, count, layout, capacity)
        layers.run()
        graphs.append((layers, *capture(layers.run, group)))
    order = random.Random(9)  # the same on every rank
    for seed in range(60):
        what = order.choice(("graph", "graph", "graph", "eager", "exact"))
        layers, graph, results = graphs[order.randrange(len(graphs))]
        if what == "exact":
            compare.differences += works(rank, world_size, group)
            continue
        layers.load(seed)
        if what == "graph":
            graph.replay()
            layers.check(compare, f"{seed}: replay", seed, results)
        else:
            layers.check(compare, f"{seed}: eager", seed, layers.run())
    return compare.differences


@pytest.mark.parametrize("name", WORLDS)
def test_graphs_and_eager_calls_in_any_order(name: str) -> None:
    no_differences(name, interleaved)


def back_to_back(rank: int, world_size: int, group: str | None) -> list[str]:
    """The host waits for no replay: the sums of each replay go into the next one on the device."""
    compare = Comparison("back to back")
    layers = Layers(rank, world_size, group, 1, "expert_major", 200)
    layers.load(3)
    with torch.no_grad():
        layers.weights.fill_(1)  # so a layer multiplies by the number of experts
        layers.x.sign_()
    start = layers.x.detach().to("cpu", copy=True)
    topk_idx = layers.topk_idx.cpu()
    layers.run()
    graph, results = capture(layers.run, group)
    times = 25
    for _ in range(times):
        graph.replay()
        with torch.no_grad():
            layers.x.copy_(results[0])
    factor = (topk_idx >= 0).sum(1, keepdim=True).to(F64)
    compare.expect("sums", _plain(layers.x), _plain(start * factor**times))
    return compare.differences


@pytest.mark.parametrize("name", WORLDS)
def test_replays_back_to_back(name: str) -> None:
    no_differences(name, back_to_back)


def outside_bytes() -> int:
    """Bytes that the allocator holds for others than graphs."""
    return sum(s["total_size"] for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == (0, 0))


def memory(rank: int, world_size: int, group: str | None) -> tuple[int, int, int]:
    """Bytes allocated: by capture outside of the graph's pool; by replays; by replays as the device counts them."""
    layers = Layers(rank, world_size, group, 2, "expert_major", 90)
    layers.run()
    # A graph has tensors of torch's random numbers outside of its pool: these of the first leave room for the second's.
    _first = capture(lambda: torch.ones(1, device=DEVICE), group)
    before = outside_bytes()
    graph, _results = capture(layers.run, group)
    captured = outside_bytes() - before
    graph.replay()
    torch.cuda.synchronize()
    allocated, (free, _) = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
    return captured, torch.cuda.memory_allocated() - allocated, free - torch.cuda.mem_get_info()[0]


@pytest.mark.parametrize("name", ["virtual-1", "gpus-2", "gpus-4"])
def test_a_graph_allocates_in_its_pool_alone(name: str) -> None:
    for captured, allocated, used in open_world(name).run(memory):
        assert captured <= 0
        assert allocated == 0
        assert used <= 0


def exact_plan_in_capture(rank: int, world_size: int, group: str | None) -> tuple[str, list[str]]:
    topk_idx = torch.zeros(4, 1, dtype=torch.int64, device=DEVICE)
    message = "no error"
    try:
        capture(lambda: torch_ep.plan(topk_idx, world_size, group), group)
    except Exception as error:
        message = str(error).splitlines()[0]
        meet(group)
        reserve(group)
        meet(group)
    return message, works(rank, world_size, group)


@pytest.mark.parametrize("name", WORLDS)
def test_capturing_an_exact_plan_raises(name: str) -> None:
    for message, differences in open_world(name).run(exact_plan_in_capture):
        assert message.startswith("ep::plan: ")
        assert "capacity" in message and "captur" in message
        assert not differences


# --- torch.compile ---


def moe_step(
    x: Tensor,
    topk_idx: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    group: str | None,
    capacity: int,
    experts: int,
) -> Tensor:
    """One expert for all of a rank's rows. Routing is given: a compiled router may choose otherwise between equals."""
    plan = torch_ep.plan(topk_idx, experts, group, capacity=capacity)
    rows, row_weights = torch_ep.dispatch(x, plan, topk_weights=weights)
    return torch_ep.combine(F.silu(rows @ up) @ down, plan, row_weights=row_weights)


def compiled_steps(rank: int, world_size: int, group: str | None, dtype: torch.dtype) -> tuple[list[str], int, int]:
    """Returns differences from eager, skipped graphs, and inputs that recorded graphs copy before a replay."""
    torch._dynamo.reset()
    counters.clear()
    experts, capacity, hidden, inner = 4 * world_size, 64 * world_size, 64, 48
    g = seeded(5, rank)
    up = (torch.randn(hidden, inner, generator=g) / 8).to(DEVICE, dtype).requires_grad_()
    down = (torch.randn(inner, hidden, generator=g) / 8).to(DEVICE, dtype).requires_grad_()
    compiled = torch.compile(moe_step, mode="reduce-overhead", fullgraph=True)
    differences = []
    tolerance: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5} if dtype == F32 else {"rtol": 3e-2, "atol": 3e-2}
    for step in range(9):
        g = seeded(6, rank, step)
        x = torch.randn(32, hidden, generator=g).to(DEVICE, dtype).requires_grad_()
        weights = torch.rand(32, NUM_TOPK, generator=g).to(DEVICE).requires_grad_()
        topk_idx = random_topk(32, NUM_TOPK, experts, g).to(DEVICE)
        cotangent = torch.randn(32, hidden, generator=g).to(DEVICE, dtype)

        def run(fn: Callable, x=x, topk_idx=topk_idx, weights=weights, cotangent=cotangent) -> list[Tensor]:  # type: ignore[no-untyped-def]
            out = fn(x, topk_idx, weights, up, down, group, capacity, experts)
            grads = torch.autograd.grad(out, [x, weights, up, down], cotangent)
            return [t.detach().clone() for t in (out, *grads)]

        torch.compiler.cudagraph_mark_step_begin()
        got, want = run(compiled), run(moe_step)
        for name, a, b in zip(("sums", "x", "weights", "up", "down"), got, want, strict=True):
            if not torch.allclose(a, b, **tolerance):
                differences.append(f"step {step}: {name}: off by {(a - b).abs().max().item()}")
    skipped, recorded = (counters["inductor"][f"cudagraph_{what}"] for what in ("skips", "recorded_non_static_inputs"))
    torch._dynamo.reset()
    return differences, skipped, recorded


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", COMPILE_WORLDS)
def test_compiled_step_with_cuda_graphs_equals_eager(name: str, dtype: torch.dtype) -> None:
    for differences, skipped, recorded in open_world(name).run(compiled_steps, dtype):
        assert not differences
        assert skipped == 0 and recorded > 0  # graphs it was
