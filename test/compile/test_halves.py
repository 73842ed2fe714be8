"""Halves of exchanges in compiled code: equal to eager code, with work between them, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.compiling import artifacts, inductor_cache
from support.harness import random_topk, same_bits, seeded, world
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import torch_ep

EXPERTS, NUM_TOPK, HIDDEN = 4, 2, 8


@pytest.fixture(scope="module")
def work() -> Iterator[Callable[[Tensor], Tensor]]:
    """Work that a profile shows, as a matrix product would be: a compiler does not look inside."""
    with torch.library._scoped_library("halves_test", "DEF") as library:
        for schema, function in (
            ("work(Tensor x) -> Tensor", torch.sin),
            ("work_backward(Tensor grad, Tensor x) -> Tensor", lambda grad, x: grad * x.cos()),
        ):
            name = schema.partition("(")[0]
            library.define(schema, tags=[torch.Tag.pt2_compliant_tag])
            library.impl(name, function, "CPU")
            torch.library.register_fake(f"halves_test::{name}", lambda *args: torch.empty_like(args[0]), lib=library)

        def setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
            ctx.save_for_backward(*inputs)

        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return torch.ops.halves_test.work_backward(grad.contiguous(), *ctx.saved_tensors)

        torch.library.register_autograd("halves_test::work", backward, setup_context=setup, lib=library)
        yield torch.ops.halves_test.work


def order_of(fn: Callable[[], Any]) -> list[str]:
    """The halves and the work that `fn` runs, in the order in which they start."""
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        fn()
    named = [e for e in prof.events() if e.name.startswith("halves_test::") or e.name.endswith(("_send", "_recv"))]
    return [e.name.split("::")[1] for e in sorted(named, key=lambda e: e.time_range.start)]


def _inputs(rank: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    idx = random_topk(tokens, NUM_TOPK, EXPERTS, seeded(rank, tokens))
    x = torch.randn(tokens, HIDDEN, generator=seeded(rank, tokens, 1)).requires_grad_()
    return idx, x, torch.randn(tokens, HIDDEN, generator=seeded(rank, tokens, 2)).requires_grad_()


def overlapped(work: Callable[[Tensor], Tensor], idx: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """Two pieces of work beside a dispatch, and one beside a combine."""
    plan = torch_ep.plan(idx, EXPERTS)
    in_flight = torch_ep.dispatch_send(x * 2, plan)
    beside = work(work(torch_ep.order_after(z * 3, in_flight)) + 1)
    rows = torch_ep.dispatch_recv(in_flight, plan, after=beside)
    in_flight = torch_ep.combine_send(rows.sigmoid(), plan)
    again = work(torch_ep.order_after(beside * 2, in_flight))
    return torch_ep.combine_recv(in_flight, plan, after=again) + again


FORWARD = ["dispatch_send", "work", "work", "dispatch_recv", "combine_send", "work", "combine_recv"]
BACKWARD = ["dispatch_send", "work_backward", "dispatch_recv", "combine_send", "work_backward", "work_backward",
            "combine_recv"]  # fmt: skip


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_work_stays_between_the_halves_forward_and_backward(work: Callable, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(overlapped, fullgraph=True, backend=backend)
    idx, x, z = _inputs(0, 6)
    with inductor_cache(artifacts()):
        compiled(work, idx, x, z).sum().backward()
        results = []
        assert order_of(lambda: results.append(compiled(work, idx, x, z))) == FORWARD
        assert order_of(lambda: results[0].square().sum().backward()) == BACKWARD
    torch._dynamo.reset()


def low_latency(work: Callable[[Tensor], Tensor], idx: Tensor, x: Tensor, z: Tensor) -> Tensor:
    in_flight = torch_ep.low_latency_dispatch_send(x * 2, idx, num_experts=EXPERTS, max_tokens_per_rank=8)
    beside = work(torch_ep.order_after(z * 3, in_flight))
    rows, plan = torch_ep.low_latency_dispatch_recv(in_flight, after=beside)
    in_flight = torch_ep.low_latency_combine_send(rows.sigmoid(), plan)
    again = work(torch_ep.order_after(beside * 2, in_flight))
    return torch_ep.low_latency_combine_recv(in_flight, after=again) + again


@torch.no_grad()
def test_work_stays_between_the_halves_of_the_low_latency_pair(work: Callable) -> None:
    torch._dynamo.reset()
    idx, x, z = _inputs(0, 6)
    with inductor_cache(artifacts()):
        compiled = torch.compile(low_latency, fullgraph=True)
        torch.testing.assert_close(compiled(work, idx, x, z), low_latency(work, idx, x, z))
        dispatch, combine = (
            [f"low_latency_{op}_send", "work", f"low_latency_{op}_recv"] for op in ("dispatch", "combine")
        )
        assert order_of(lambda: compiled(work, idx, x, z)) == dispatch + combine
    torch._dynamo.reset()


def layer(idx: Tensor, x: Tensor, z: Tensor, layout: str, capacity: int | None) -> Tensor:
    weights = z[:, :NUM_TOPK].sigmoid().contiguous()
    plan = torch_ep.plan(idx, EXPERTS, layout=layout, capacity=capacity)
    in_flight = torch_ep.dispatch_send(x, plan, topk_weights=weights)
    rows, row_weights = torch_ep.dispatch_recv(in_flight, plan)
    if layout == "rank_major":
        in_flight = torch_ep.combine_send(rows.sin() * row_weights.sum(1, keepdim=True), plan)
    else:
        in_flight = torch_ep.combine_send(rows.sin(), plan, row_weights=row_weights)
    return torch_ep.combine_recv(in_flight, plan) + z


def _compiled_equals_eager(rank: int, world_size: int) -> None:
    for layout in ("rank_major", "expert_major"):
        for capacity in (None, 12):
            torch._dynamo.reset()
            compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
            for tokens in (3 + rank, 0, 7 - 6 * rank):
                idx, x, z = _inputs(rank, tokens)
                results = []
                for function in (layer, compiled):
                    out = function(idx, x, z, layout, capacity)
                    results.append([out, *torch.autograd.grad(out.square().sum(), (x, z))])
                assert all(map(same_bits, *results)), (layout, capacity, tokens)
    torch._dynamo.reset()


def test_compiled_halves_equal_eager_ones() -> None:
    world(2).run(_compiled_equals_eager)


def _exported(rank: int, world_size: int) -> None:
    class Layer(torch.nn.Module):
        def forward(self, idx: Tensor, x: Tensor, z: Tensor) -> Tensor:
            return layer(idx, x, z, "expert_major", 12)

    inputs = tuple(t.detach() for t in _inputs(rank, 5))
    program = torch.export.export(Layer(), inputs, strict=False)
    assert same_bits(program.module()(*inputs), Layer()(*inputs))


def test_halves_are_exported() -> None:
    world(2).run(_exported)
