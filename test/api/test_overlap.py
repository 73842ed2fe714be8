"""Layers whose exchanges overlap with work: equal to plain layers, in the same order on every rank."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from typing import Any

import pytest
import torch
from support.compiling import artifacts, inductor_cache
from support.harness import PATIENCE, same_bits, seeded, world
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import torch_ep
from torch_ep.nn import MoE, interleave

HIDDEN, INTERMEDIATE, EXPERTS, NUM_TOPK = 8, 6, 8, 3
TOKENS = [11, 2, 0, 7]  # per rank


def _layer(layout: str = "expert_major", **options: Any) -> MoE:
    torch.manual_seed(0)
    return MoE(HIDDEN, INTERMEDIATE, EXPERTS, NUM_TOPK, layout=layout, **options)


def _x(rank: int, seed: int = 0) -> Tensor:
    return torch.randn(TOKENS[rank], HIDDEN, generator=seeded(rank, seed))


def _gradients(layer: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y.square().sum(), (x, *layer.parameters())))


def _equals_plain_layers(rank: int, world_size: int, ranks_per_node: int | None) -> None:
    """A layer of n chunks against the plain layer over each chunk, routed as the whole; by the bit, forward."""
    torch_ep.init(timeout=PATIENCE, ranks_per_node=ranks_per_node, max_tokens_per_rank=max(TOKENS))
    cases = itertools.product(("expert_major", "rank_major"), (None, 24), (1, 2, 3))
    for layout, capacity, chunks in cases:
        options = {"layout": layout, "capacity": capacity, "shared_intermediate": 4}
        overlapped, plain = _layer(overlap=chunks, **options), _layer(**options)
        plain.load_state_dict(overlapped.state_dict())
        x = _x(rank).requires_grad_()
        got, stats = overlapped(x)
        idx, weights, aux_loss, load = plain.route(x)
        y = []
        for tokens, chunk_idx, chunk_weights in zip(*(t.tensor_split(chunks) for t in (x, idx, weights)), strict=True):
            p = plain._plan(chunk_idx)
            rows, row_weights = torch_ep.dispatch(tokens, p, topk_weights=chunk_weights)
            y.append(plain._experts_of_plan(rows, row_weights, p, torch_ep.combine))
        want = torch.cat(y) + plain.shared_expert(x)
        assert same_bits(got, want), (layout, capacity, chunks)
        assert same_bits(stats.aux_loss, aux_loss) and same_bits(stats.tokens_per_expert, load)
        for ours, theirs in zip(_gradients(overlapped, x, got), _gradients(plain, x, want), strict=True):
            torch.testing.assert_close(ours, theirs)  # sums over chunks, in another order
    torch_ep.init(timeout=PATIENCE)


@pytest.mark.parametrize(("world_size", "ranks_per_node"), [(2, None), (4, 2)], ids=["2 ranks", "grid"])
def test_chunks_equal_plain_layers(world_size: int, ranks_per_node: int | None) -> None:
    world(world_size).run(_equals_plain_layers, ranks_per_node)


def test_one_rank_in_chunks_equals_the_plain_layer() -> None:
    x = _x(0)
    want, _ = _layer()(x)
    got, _ = _layer(overlap=3)(x)
    torch.testing.assert_close(got, want)


def _compiled_chunks(rank: int, world_size: int) -> None:
    for chunks in (1, 3):
        torch._dynamo.reset()
        layer = _layer(overlap=chunks, shared_intermediate=4)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
        for tokens in (9 - rank, 4 + rank):
            x = torch.randn(tokens, HIDDEN, generator=seeded(rank)).requires_grad_()
            got, want = compiled(x)[0], layer(x)[0]
            assert same_bits(got, want)
            torch.testing.assert_close(_gradients(layer, x, got), _gradients(layer, x, want))
    torch._dynamo.reset()


def test_compiled_chunks_equal_eager_ones() -> None:
    world(2).run(_compiled_chunks)


def _halves_of(fn: Any) -> list[str]:
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        fn()
    halves = [e for e in prof.events() if e.name.startswith("ep::") and e.name.endswith(("_send", "_recv"))]
    return [e.name.removeprefix("ep::") for e in sorted(halves, key=lambda e: e.time_range.start)]


# Three chunks, as Note [Chunks] has them: what sends, then what receives.
FORWARD = [
    "dispatch_send", "dispatch_send", "dispatch_recv", "combine_send",
    "dispatch_send", "dispatch_recv", "combine_send", "combine_recv",
    "dispatch_recv", "combine_send", "combine_recv", "combine_recv",
]  # fmt: skip
_SWAPPED = {"send": "recv", "recv": "send", "dispatch": "combine", "combine": "dispatch"}


def _mirrored(order: list[str]) -> list[str]:
    """The backward: reversed, in which a send is a receive, and a dispatch a combine."""
    return ["_".join(_SWAPPED[word] for word in name.split("_")) for name in reversed(order)]


def _sends(order: list[str]) -> list[str]:
    return [name for name in order if name.endswith("_send")]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_chunks_overlap_forward_and_backward(backend: str) -> None:
    """Every dispatch but the last is sent before the experts of the chunk before it, in compiled code too."""
    torch._dynamo.reset()
    layer = _layer(overlap=3)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = _x(0).requires_grad_()
    with inductor_cache(artifacts()):
        compiled(x)[0].sum().backward()
        results: list[Tensor] = []
        assert _halves_of(lambda: results.append(compiled(x)[0])) == FORWARD
        backward = _halves_of(lambda: results[0].square().sum().backward())
    torch._dynamo.reset()
    mirrored = _mirrored(FORWARD)
    assert sorted(backward) == sorted(mirrored)
    assert _sends(backward) == _sends(mirrored)
    if backend == "eager":
        assert backward == mirrored


class Block(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.mix = nn.Linear(HIDDEN, HIDDEN)
        self.moe = MoE(HIDDEN, INTERMEDIATE, EXPERTS, NUM_TOPK, shared_intermediate=4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        return x + self.moe(x)[0]

    def steps(self, x: Tensor) -> Generator[None, None, Tensor]:
        x = x + self.mix(x)
        y, _ = yield from self.moe.steps(x)
        return x + y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(seed) for seed in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def steps(self, x: Tensor) -> Generator[None, None, Tensor]:
        for block in self.blocks:
            x = yield from block.steps(x)
        return x


def _interleaved(rank: int, world_size: int) -> tuple[list[str], list[str]]:
    model = Model()
    xs = [_x(rank, seed).requires_grad_() for seed in range(2)]
    want = [model(x) for x in xs]
    want_gradients = _gradients_of_two(model, xs, want)
    got: list[Tensor] = []
    forward = _halves_of(lambda: got.extend(interleave(*(model.steps(x) for x in xs))))
    assert all(map(same_bits, got, want))
    gradients: list[Tensor] = []
    backward = _halves_of(lambda: gradients.extend(_gradients_of_two(model, xs, got)))
    torch.testing.assert_close(gradients, want_gradients)
    assert all(map(same_bits, gradients[:2], want_gradients[:2]))
    return forward, backward


def _gradients_of_two(model: nn.Module, xs: list[Tensor], ys: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(sum(y.square().sum() for y in ys), (*xs, *model.parameters())))


def test_two_micro_batches_interleave_forward_and_backward() -> None:
    """While an exchange of one micro-batch is in flight, the other one works."""
    experts, between = ["dispatch_recv", "combine_send"] * 2, ["combine_recv", "dispatch_send"] * 2
    expected = ["dispatch_send"] * 2 + (experts + between) * 2 + experts + ["combine_recv"] * 2
    for forward, backward in world(2).run(_interleaved):
        assert forward == expected
        assert backward == _mirrored(expected)


def test_interleave_closes_the_others_on_an_error() -> None:
    closed = []

    def fails() -> Generator[None, None, None]:
        yield
        raise KeyError("mine")

    def waits() -> Generator[None, None, None]:
        try:
            while True:
                yield
        finally:
            closed.append(True)

    with pytest.raises(KeyError, match="mine"):
        interleave(waits(), fails())
    assert closed == [True]


def test_overlap_is_checked() -> None:
    with pytest.raises(ValueError, match=r"torch_ep\.nn\.MoE: expected overlap"):
        _layer(overlap=-1)
    with pytest.raises(TypeError, match=r"torch_ep\.nn\.MoE: expected overlap"):
        _layer(overlap=1.5)
