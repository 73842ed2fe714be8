"""The MoE layer equals its dense self with every option and over any number of ranks; its states fit any world size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.nn.functional as F
from devices import Ranks
from harness import seeded, world
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import torch_ep
from torch_ep.nn import (
    MoE,
    clip_grad_norm_,
    expert_parameter_names,
    full_state_dict,
    gather_experts,
    grouped_mm,
    shard_experts,
)

SHAPE = {"hidden": 8, "intermediate": 6, "num_experts": 8, "num_topk": 3}
TOKENS = (9, 0, 5, 1)  # of each rank
LAYOUTS = ("rank_major", "expert_major")
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


class Dense(NamedTuple):
    out: Tensor
    aux_loss: Tensor
    chosen: Tensor  # [tokens, num_experts], 1 where the token visits the expert


def dense(
    x: Tensor,
    weights: dict[str, Tensor],
    num_topk: int,
    *,
    score: str = "softmax",
    normalize: bool = True,
    route_scale: float = 1.0,
    keep: Tensor | None = None,
) -> Dense:
    """The layer in plain torch: every expert over all tokens, masked. `keep`: 0 where a (token, expert) is dropped."""
    logits = x @ weights["router"].T
    scores = logits.exp() / logits.exp().sum(1, keepdim=True) if score == "softmax" else 1 / (1 + (-logits).exp())
    biased = scores + weights["selection_bias"] if "selection_bias" in weights else scores
    chosen = torch.zeros_like(scores)
    for token, order in enumerate(biased.argsort(dim=1, descending=True)):
        chosen[token, order[:num_topk]] = 1
    gates = scores * chosen
    if normalize:
        gates = gates / gates.sum(1, keepdim=True)
    gates = gates * route_scale * (1 if keep is None else keep)
    out = torch.zeros_like(x)
    for e in range(scores.shape[1]):
        inner = F.silu(x @ weights["gate"][e]) * (x @ weights["up"][e])
        out = out + gates[:, e : e + 1] * (inner @ weights["down"][e])
    if "shared.gate.weight" in weights:
        inner = F.silu(x @ weights["shared.gate.weight"].T) * (x @ weights["shared.up.weight"].T)
        out = out + inner @ weights["shared.down.weight"].T
    # Switch Transformers: experts * sum over experts of (share of the choices) * (mean probability).
    aux = torch.zeros((), dtype=x.dtype, device=x.device)
    if len(x):
        shares = scores / scores.sum(1, keepdim=True)
        aux = scores.shape[1] * (chosen.mean(0) / num_topk * shares.mean(0)).sum()
    return Dense(out, aux, chosen)


def full_weights(layer: MoE) -> dict[str, Tensor]:
    """Its parameters and buffers with all experts. Collective."""
    weights = {name: t.detach() for name, t in layer.state_dict().items()}
    return {
        name: gather_experts(t, layer.group_name) if name in layer.EXPERT_PARAMETERS else t
        for name, t in weights.items()
    }


def make_layer(device: str = "cpu", **options: Any) -> MoE:
    torch.manual_seed(5)
    layer = MoE(**{**SHAPE, "dtype": torch.float64, **options})
    if layer.selection_bias is not None:
        layer.selection_bias.copy_(torch.linspace(-0.5, 0.5, layer.num_experts))
    return layer.to(device)


def make_x(device: str, rank: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(rank, 4), dtype=torch.float64).to(device)


OPTIONS = {
    "softmax": {},
    "softmax, not normalised": {"normalize": False},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid, not normalised": {"score": "sigmoid", "normalize": False},
    "scaled": {"route_scale": 2.5},
    "biased choice": {"score": "sigmoid", "selection_bias": True, "route_scale": 0.5},
    "shared expert": {"shared_intermediate": 5},
    "aligned": {"alignment": 8},
    "capacity to spare": {"capacity": 64},
}


def _against_dense(rank: int, world_size: int, device: str, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The layer's output and loss in one row of numbers, and what they should be."""
    layer = make_layer(device, **options)
    x = make_x(device, rank, TOKENS[rank], layer.hidden)
    with torch.no_grad():
        y, stats = layer(x)
        want = dense(
            x,
            full_weights(layer),
            layer.num_topk,
            score=layer.score,
            normalize=layer.normalize,
            route_scale=layer.route_scale,
        )
    # Counts and losses are in float32.
    results = torch.cat([y.flatten(), stats.aux_loss[None]]), torch.cat([want.out.flatten(), want.aux_loss[None]])
    return results[0].cpu(), results[1].cpu()


@every_layout
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_its_dense_self(device: str, name: str, layout: str) -> None:
    got, want = _against_dense(0, 1, device, {"layout": layout, **OPTIONS[name]})
    torch.testing.assert_close(got[:-1], want[:-1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got[-1], want[-1], rtol=1e-6, atol=1e-6)


@every_layout
@pytest.mark.parametrize("name", ["softmax", "biased choice", "shared expert", "capacity to spare"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_equals_its_dense_self_over_ranks(device: str, world_size: int, name: str, layout: str) -> None:
    for got, want in Ranks(device, world_size).run(_against_dense, device, {"layout": layout, **OPTIONS[name]}):
        torch.testing.assert_close(got[:-1], want[:-1], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(got[-1], want[-1], rtol=1e-6, atol=1e-6)


def test_layouts_agree(device: str) -> None:
    x = make_x(device, 0, 9, SHAPE["hidden"])
    by_rank, by_expert = (make_layer(device, layout=layout)(x)[0] for layout in LAYOUTS)
    torch.testing.assert_close(by_rank, by_expert, rtol=1e-12, atol=1e-12)


def test_bias_changes_the_choice_and_nothing_else(device: str) -> None:
    layer = make_layer(device, selection_bias=True, score="sigmoid", normalize=False)
    layer.selection_bias.zero_()
    layer.selection_bias[3] = 10
    x = make_x(device, 0, 9, layer.hidden)
    topk_idx, weights, _, _ = layer.route(x)
    assert (topk_idx == 3).sum(1).eq(1).all()
    scores = torch.sigmoid(x @ layer.router.T)
    torch.testing.assert_close(weights, scores.gather(1, topk_idx))


def test_stats_count_the_choices(device: str) -> None:
    layer = make_layer(device)
    x = make_x(device, 0, 9, layer.hidden)
    _, stats = layer(x)
    want = dense(x, full_weights(layer), layer.num_topk)
    assert torch.equal(stats.tokens_per_expert, want.chosen.sum(0).long())
    assert stats.num_dropped == 0


@pytest.mark.parametrize("capacity", [0, 5, 16])
@every_layout
def test_capacity_drops_the_last_rows_of_the_layout(device: str, layout: str, capacity: int) -> None:
    layer = make_layer(device, layout=layout, capacity=capacity)
    x = make_x(device, 0, 20, layer.hidden)
    weights = full_weights(layer)
    chosen = dense(x, weights, layer.num_topk).chosen
    keep = torch.zeros_like(chosen)
    if layout == "rank_major":
        keep[:capacity] = 1  # one row a token
        dropped = len(x) - capacity
    else:
        for expert, token in chosen.T.nonzero()[:capacity].tolist():
            keep[token, expert] = 1
        dropped = int(chosen.sum()) - capacity
    y, stats = layer(x)
    torch.testing.assert_close(y, dense(x, weights, layer.num_topk, keep=keep).out, rtol=1e-9, atol=1e-12)
    assert stats.num_dropped == dropped


@every_layout
def test_no_tokens(device: str, layout: str) -> None:
    layer = make_layer(device, layout=layout, shared_intermediate=4)
    x = make_x(device, 0, 0, layer.hidden).requires_grad_()
    y, stats = layer(x)
    (y.sum() + stats.aux_loss).backward()
    assert y.shape == (0, layer.hidden)
    assert stats.aux_loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


def test_input_of_three_dimensions(device: str) -> None:
    layer = make_layer(device)
    x = make_x(device, 0, 2, 5, layer.hidden)
    y, _ = layer(x)
    assert torch.equal(y, layer(x.view(10, layer.hidden))[0].view(x.shape))


STRIDED = {
    "columns": lambda x: x.repeat(1, 2)[:, : x.shape[1]],
    "one token, expanded": lambda x: x[:1].expand(4, -1),
    "transposed": lambda x: x.view(3, 3, -1).transpose(0, 1),
}


@pytest.mark.parametrize("name", STRIDED)
def test_strided_input(device: str, name: str) -> None:
    layer = make_layer(device).requires_grad_(False)
    x = STRIDED[name](make_x(device, 0, 9, layer.hidden))
    assert not x.is_contiguous()
    assert torch.equal(layer(x)[0], layer(x.contiguous())[0])
    decoder, x = layer.float(), x.float()
    assert torch.equal(decoder.decode(x, 9), decoder.decode(x.contiguous(), 9))


@pytest.mark.parametrize("marked", [False, True], ids=["plain", "marked"])
def test_strided_input_compiled(device: str, marked: bool) -> None:
    torch._dynamo.reset()
    layer = make_layer(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for count in (5, 3, 1, 0):
        x = STRIDED["columns"](make_x(device, count, count, layer.hidden))
        if marked:
            torch_ep.mark_tokens(x)
        torch.testing.assert_close(compiled(x)[0], layer(x)[0])
    torch._dynamo.reset()


@pytest.mark.parametrize("shape", [(2, 4), (3, 2, 16), (16,), ()], ids=str)
def test_tokens_of_another_size(device: str, shape: tuple[int, ...]) -> None:
    layer = make_layer(device).requires_grad_(False)
    x = make_x(device, 0, *shape)
    message = rf"torch_ep\.nn\.MoE: expected x of \[\.\.\., 8\], got \[{', '.join(map(str, shape))}\]"
    with pytest.raises(ValueError, match=message):
        layer(x)
    with pytest.raises(ValueError, match=message):
        layer.decode(x, 8)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="raised exception ValueError"):
        torch.compile(layer, fullgraph=True, backend="eager")(x)
    torch._dynamo.reset()


def test_tokens_of_another_dtype(device: str) -> None:
    layer = make_layer(device, dtype=torch.float32).requires_grad_(False)
    x = make_x(device, 0, 9, layer.hidden)
    for dtype in (torch.bfloat16, torch.float64, torch.int64):
        message = rf"torch_ep\.nn\.MoE: expected x of torch\.float32, the experts' dtype, got {dtype}"
        with pytest.raises(TypeError, match=message):
            layer(x.to(dtype))
        with pytest.raises(TypeError, match=message):
            layer.decode(x.to(dtype), 9)


def test_router_in_float32_beside_experts_in_bfloat16(device: str) -> None:
    layer = make_layer(device, dtype=torch.bfloat16)
    layer.router = nn.Parameter(layer.router.float())
    y, _ = layer(make_x(device, 0, 9, layer.hidden).bfloat16())
    assert y.dtype == torch.bfloat16


@every_layout
def test_bfloat16_goes_through_torchs_grouped_mm(device: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs))
    layer = make_layer(device, layout=layout, dtype=torch.bfloat16, intermediate=16)
    x = make_x(device, 0, 9, layer.hidden).bfloat16()
    y, _ = layer(x)
    assert len(calls) == 3
    assert y.dtype == torch.bfloat16
    weights = {name: t.double() for name, t in full_weights(layer).items()}
    want = dense(x.double(), weights, layer.num_topk).out
    # Seven bits of mantissa, three products deep.
    torch.testing.assert_close(y.double(), want, rtol=0.05, atol=0.02 * float(want.abs().max()))


def _autocast(device: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16)


class Projected(nn.Module):
    """A layer whose input has autocast's dtype or, without `before`, that of the parameters."""

    def __init__(self, device: str, before: bool, layout: str) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.before = nn.Linear(8, 8) if before else nn.Identity()
        self.moe = MoE(8, 16, 8, 3, layout=layout, shared_intermediate=8)
        self.to(device)

    def forward(self, x: Tensor) -> tuple[Tensor, torch_ep.nn.RouterStats]:
        return self.moe(self.before(x))


def _autocast_step(
    rank: int, world_size: int, device: str, before: bool, layout: str, compiled: bool
) -> dict[str, list[Tensor]]:
    """By name: a result or gradient of a step under autocast, and the same of a layer cast by hand."""
    torch._dynamo.reset()
    auto, manual = Projected(device, before, layout), Projected(device, before, layout)
    for p in manual.parameters():
        if p is not manual.moe.router:
            p.data = p.data.bfloat16()
    x = make_x(device, rank, TOKENS[rank], 8).bfloat16()  # for the router, too, both ways the same
    inputs = x.float().requires_grad_(), x.clone().requires_grad_()
    run = torch.compile(auto, fullgraph=True, backend="aot_eager") if compiled else auto
    with _autocast(device):
        outputs = run(inputs[0]), None
    outputs = outputs[0], manual(inputs[1])
    found: dict[str, list[Tensor]] = {}
    for (y, stats), module, x in zip(outputs, (auto, manual), inputs, strict=True):
        (y.float().square().sum() + stats.aux_loss).backward()
        results = {"y": y, **stats._asdict(), "x.grad": x.grad}
        for name, p in module.named_parameters():
            assert p.grad.dtype == p.dtype
            results[name] = p.grad
        for name, t in results.items():
            found.setdefault(name, []).append(t.detach().cpu())
    torch._dynamo.reset()
    return found


@every_layout
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("before", [False, True], ids=["alone", "after a Linear"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_autocast_equals_a_layer_cast_by_hand(
    device: str, world_size: int, before: bool, compiled: bool, layout: str
) -> None:
    args = (device, before, layout, compiled)
    steps = [_autocast_step(0, 1, *args)] if world_size == 1 else Ranks(device, world_size).run(_autocast_step, *args)
    for found in steps:
        assert found["y"][0].dtype == torch.bfloat16
        assert torch.equal(*found["tokens_per_expert"])
        torch.testing.assert_close(*found["y"], rtol=0.02, atol=0.02)
        for name, (got, want) in found.items():
            # The gradient of x is a sum of several, in float32 or in bfloat16.
            torch.testing.assert_close(
                got.float(), want.float(), rtol=0.02, atol=0.02, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_autocast_leaves_the_router_alone(device: str) -> None:
    layer = make_layer(device, dtype=torch.float32)
    x = make_x(device, 0, 256, layer.hidden).float()
    want = layer.route(x)
    with _autocast(device):
        got = layer.route(x)
        rounded = F.linear(x, layer.router).softmax(-1).topk(layer.num_topk).indices
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert not torch.equal(rounded, want[0])  # x tells


def test_autocast_leaves_float64_alone(device: str) -> None:
    layer = make_layer(device, shared_intermediate=4)
    x = make_x(device, 0, 9, layer.hidden)
    want, _ = layer(x)
    with _autocast(device):
        assert torch.equal(layer(x)[0], want)
        with pytest.raises(TypeError, match=r"expected x of torch\.float64, the experts' dtype, got torch\.bfloat16"):
            layer(x.float())


@every_layout
def test_rows_travel_in_autocasts_dtype(device: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    original = torch_ep.nn.dispatch
    monkeypatch.setattr(torch_ep.nn, "dispatch", lambda x, *a, **k: sent.append(x.dtype) or original(x, *a, **k))
    layer = make_layer(device, dtype=torch.float32, layout=layout)
    with _autocast(device):
        layer(make_x(device, 0, 9, layer.hidden).float())
    assert sent == [torch.bfloat16] * (2 if layout == "rank_major" else 1)


def test_rows_of_decode_travel_in_autocasts_dtype(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    original = torch_ep.nn.low_latency_dispatch
    monkeypatch.setattr(
        torch_ep.nn, "low_latency_dispatch", lambda x, *a, **k: sent.append(x.dtype) or original(x, *a, **k)
    )
    layer = make_layer(device, dtype=torch.float32).requires_grad_(False)
    with _autocast(device):
        layer.decode(make_x(device, 0, 9, layer.hidden).float(), 9)
    assert sent == [torch.bfloat16]


def _decoded_under_autocast(rank: int, world_size: int, device: str, quantize: Any) -> tuple[Tensor, Tensor]:
    # 16: a row of fp8 is a multiple of 16 bytes, as nvlink asks for.
    layer = make_layer(device, hidden=16, dtype=torch.float32, shared_intermediate=4).requires_grad_(False)
    x = make_x(device, rank, TOKENS[rank], layer.hidden).float()
    want = layer.decode(x, 9, quantize=quantize)
    with _autocast(device):
        return layer.decode(x, 9, quantize=quantize).cpu(), want.cpu()


@pytest.mark.parametrize("quantize", [None, "fp8"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_decode_under_autocast(device: str, world_size: int, quantize: Any) -> None:
    args = (device, quantize)
    results = (
        [_decoded_under_autocast(0, 1, *args)]
        if world_size == 1
        else Ranks(device, world_size).run(_decoded_under_autocast, *args)
    )
    for got, want in results:
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.02)


GROUPS = {
    "full": (3, 7, 9),
    "empty groups": (0, 4, 4, 9, 9),
    "rows past the last": (2, 5),
    "no rows in any": (0, 0),
}


def _case(device: str, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    ends = GROUPS[name]
    a = torch.randn(9, 8, generator=seeded(1), dtype=torch.float64).to(dtype)
    b = torch.randn(len(ends), 8, 16, generator=seeded(2), dtype=torch.float64).to(dtype)
    return a.to(device), b.to(device), torch.tensor(ends, dtype=torch.int32, device=device)


def _begin_end(offsets: Tensor) -> list[tuple[int, int]]:
    ends = offsets.tolist()
    return list(zip([0, *ends], ends, strict=False))


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_grouped_mm(device: str, name: str, dtype: torch.dtype) -> None:
    a, b, offsets = _case(device, name, dtype)
    got = grouped_mm(a, b, offsets)
    assert (got.shape, got.dtype) == ((9, 16), dtype)
    for group, (begin, end) in enumerate(_begin_end(offsets)):
        torch.testing.assert_close(got[begin:end], a[begin:end] @ b[group])


@pytest.mark.parametrize("name", GROUPS)
def test_fallback_of_grouped_mm_and_its_transpose(device: str, name: str) -> None:
    a, b, offsets = _case(device, name, torch.float64)
    got = torch.ops.ep.grouped_mm(a, b, offsets)
    g = torch.randn(9, 16, generator=seeded(3), dtype=torch.float64).to(device)
    products = torch.ops.ep.grouped_mm.transpose(a, g, offsets)
    for group, (begin, end) in enumerate(_begin_end(offsets)):
        torch.testing.assert_close(got[begin:end], a[begin:end] @ b[group])
        torch.testing.assert_close(products[group], a[begin:end].T @ g[begin:end])
    assert not got[offsets[-1] :].any()


@pytest.mark.parametrize("name", GROUPS)
def test_gradients_of_the_fallback(device: str, name: str) -> None:
    a, b, offsets = _case(device, name, torch.float64)
    a, b = a[:, :2].contiguous().requires_grad_(), b[:, :2, :3].contiguous().requires_grad_()
    g = torch.randn(9, 3, generator=seeded(3), dtype=torch.float64).to(device).requires_grad_()
    for fn, args in ((torch.ops.ep.grouped_mm, (a, b)), (torch.ops.ep.grouped_mm.transpose, (a, g))):
        assert torch.autograd.gradcheck(lambda *x, fn=fn: fn(*x, offsets), args)
        assert torch.autograd.gradgradcheck(lambda *x, fn=fn: fn(*x, offsets), args)


def _moved_bias(rank: int, world_size: int, device: str) -> Tensor:
    layer = make_layer(device, selection_bias=True)
    layer.selection_bias.zero_()
    # Each rank finds experts `rank` and 2 busy, and the others' busy ones idle.
    load = torch.zeros(layer.num_experts, dtype=torch.int64, device=device)
    load[rank], load[2] = 100, 90
    layer.update_selection_bias(load, rate=0.25)
    return layer.selection_bias.cpu()


@pytest.mark.parametrize("world_size", [1, 2])
def test_update_of_the_bias_moves_against_the_load_of_all_ranks(device: str, world_size: int) -> None:
    biases = [_moved_bias(0, 1, device)] if world_size == 1 else Ranks(device, world_size).run(_moved_bias, device)
    busy = {*range(world_size), 2}
    for bias in biases:
        assert bias.tolist() == [-0.25 if expert in busy else 0.25 for expert in range(8)]


def test_updates_of_the_bias_even_the_load_out(device: str) -> None:
    layer = make_layer(device, selection_bias=True, score="sigmoid")
    layer.selection_bias.copy_(torch.linspace(-1, 1, layer.num_experts))  # the last experts take it all
    x = make_x(device, 0, 256, layer.hidden)

    def load() -> Tensor:
        return layer.route(x)[3]

    even = len(x) * layer.num_topk // layer.num_experts
    assert load().max() > 2 * even
    for _ in range(100):
        layer.update_selection_bias(load(), rate=0.02)
    assert load().max() < 1.4 * even


def test_update_needs_a_bias() -> None:
    layer = make_layer()
    with pytest.raises(RuntimeError, match="selection_bias=True"):
        layer.update_selection_bias(torch.zeros(8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_topk": 0}, "num_topk from 1 to 8, got 0"),
        ({"num_topk": 9}, "num_topk from 1 to 8, got 9"),
        ({"score": "tanh"}, "'softmax' or 'sigmoid', got 'tanh'"),
    ],
    ids=["no experts", "too many experts", "unknown score"],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_layer(**arguments)


class Model(nn.Module):
    """A layer below the root, so that its parameters' names have a prefix."""

    def __init__(self, group: Any = None) -> None:
        super().__init__()
        self.before = nn.Linear(8, 8, dtype=torch.float64)
        self.moe = MoE(**SHAPE, selection_bias=True, shared_intermediate=4, group=group, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(self.before(x))[0]


def _full_state(rank: int, world_size: int, device: str) -> dict[str, Tensor]:
    torch.manual_seed(21)
    model = Model().to(device)
    model.moe.selection_bias += torch.arange(8, device=device) / 100
    return {name: t.cpu() for name, t in full_state_dict(model).items()}


def _loaded_output(rank: int, world_size: int, device: str, state: dict[str, Tensor]) -> tuple[Tensor, int]:
    torch.manual_seed(rank)
    model = Model().to(device)
    model.load_state_dict(state)
    with torch.no_grad():
        return model(make_x(device, 77, 6, 8)).cpu(), model.moe.gate.shape[0]


def _states(device: str, world_size: int) -> list[dict[str, Tensor]]:
    return [_full_state(0, 1, device)] if world_size == 1 else Ranks(device, world_size).run(_full_state, device)


@pytest.mark.parametrize("world_size", [2, 4])
def test_same_seed_same_parameters_whatever_the_world_size(device: str, world_size: int) -> None:
    want = _full_state(0, 1, device)
    for state in _states(device, world_size):
        assert list(state) == list(want)
        for name in want:
            assert torch.equal(state[name], want[name]), name


@pytest.mark.parametrize("saved", [1, 2, 4])
@pytest.mark.parametrize("loaded", [1, 2, 4])
def test_state_loads_at_any_world_size(device: str, saved: int, loaded: int) -> None:
    state = _states(device, saved)[-1]
    want, _ = _loaded_output(0, 1, device, _full_state(0, 1, device))
    if loaded == 1:
        results = [_loaded_output(0, 1, device, state)]
    else:
        results = Ranks(device, loaded).run(_loaded_output, device, state)
    for got, num_local_experts in results:
        assert num_local_experts == SHAPE["num_experts"] // loaded
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def _own_state_round_trip(rank: int, world_size: int, device: str) -> bool:
    torch.manual_seed(1)
    model, other = Model().to(device), Model().to(device)
    other.load_state_dict(model.state_dict())
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_ranks_own_state_loads_again(device: str) -> None:
    assert all(Ranks(device, 2).run(_own_state_round_trip, device))


def _shapes_after_load(rank: int, world_size: int, device: str) -> list[tuple[int, ...]]:
    layer = make_layer(device)
    state = full_state_dict(layer)
    layer._load_from_state_dict(state, "", {}, True, [], [], [])
    return [tuple(state[name].shape) for name in layer.EXPERT_PARAMETERS]


def test_loading_leaves_the_callers_dict_alone(device: str) -> None:
    assert Ranks(device, 2).run(_shapes_after_load, device) == [[(8, 8, 6), (8, 8, 6), (8, 6, 8)]] * 2


def _sharded(rank: int, world_size: int, device: str) -> tuple[Tensor, Tensor]:
    everything = torch.arange(24.0, device=device).view(8, 3)
    mine = shard_experts(everything)
    return mine.cpu(), gather_experts(mine).cpu()


def test_shard_and_gather_are_inverse(device: str) -> None:
    for rank, (mine, whole) in enumerate(Ranks(device, 2).run(_sharded, device)):
        assert torch.equal(mine, torch.arange(24.0).view(2, 4, 3)[rank])
        assert torch.equal(whole, torch.arange(24.0).view(8, 3))


def test_one_rank_needs_no_group() -> None:
    assert make_layer().group_name == ""
    assert torch_ep.comm.resolve(None) == ("", 1)


# --- data parallelism -------------------------------------------------------------------------------------------------

MESHES = {"dp 1, ep 2": (1, 2), "dp 2, ep 1": (2, 1), "dp 2, ep 2": (2, 2)}
each_mesh = pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES.keys())
EXPERTS_OF_MODEL = ["moe.gate", "moe.up", "moe.down"]
MAX_NORM = 0.1


@contextmanager
def _mesh(shape: tuple[int, int]) -> Iterator[DeviceMesh]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "ep"))
    communicator = torch_ep.init(mesh["ep"])
    try:
        yield mesh
    finally:
        if communicator.group_name not in ("", dist.group.WORLD.group_name):
            torch_ep.destroy(mesh["ep"])


def _whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def _sharded_full_state(rank: int, world_size: int, shape: tuple[int, int]) -> dict[str, Tensor]:
    with _mesh(shape) as mesh:
        torch.manual_seed(21)
        model = Model(mesh["ep"])
        model.moe.selection_bias += torch.arange(8) / 100
        return full_state_dict(fully_shard(model, mesh=mesh["dp"]))


@each_mesh
def test_full_state_of_a_layer_that_fsdp_has_sharded(shape: tuple[int, int]) -> None:
    want = _full_state(0, 1, "cpu")
    for state in world(shape[0] * shape[1]).run(_sharded_full_state, shape):
        assert list(state) == list(want)
        for name in want:
            assert type(state[name]) is Tensor
            assert torch.equal(state[name], want[name]), name


def _loaded_into_shards(rank: int, world_size: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
    with _mesh((1, 2) if world_size == 2 else (2, 2)) as mesh:
        torch.manual_seed(rank)
        model = Model(mesh["ep"])
        fully_shard(model, mesh=mesh["dp"])
        set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))
        return full_state_dict(model)


@pytest.mark.parametrize("world_size", [2, 4])
def test_full_state_loads_into_what_fsdp_has_sharded(world_size: int) -> None:
    want = _full_state(0, 1, "cpu")
    for state in world(world_size).run(_loaded_into_shards, want):
        for name in want:
            assert torch.equal(state[name], want[name]), name


def _shapes_of_two_names(rank: int, world_size: int, device: str) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    layer = make_layer(device)
    module = nn.ModuleDict({"first": layer, "again": layer})
    state = full_state_dict(module)
    return expert_parameter_names(module), {name: tuple(t.shape) for name, t in state.items()}


def test_state_of_a_layer_with_two_names(device: str) -> None:
    expected = {
        f"{prefix}.{name}": shape
        for prefix in ("first", "again")
        for name, shape in {"router": (8, 8), "gate": (8, 8, 6), "up": (8, 8, 6), "down": (8, 6, 8)}.items()
    }
    for names, shapes in Ranks(device, 2).run(_shapes_of_two_names, device):
        assert shapes == expected
        assert names == [name for name in expected if "router" not in name]


def _wrapped_state(rank: int, world_size: int) -> dict[str, tuple[int, ...]]:
    state = full_state_dict(nn.Sequential(checkpoint_wrapper(make_layer())))
    assert not any(t.requires_grad for t in state.values())
    return {name: tuple(t.shape) for name, t in state.items()}


def test_state_of_a_wrapped_layer() -> None:
    want = {"0.router": (8, 8), "0.gate": (8, 8, 6), "0.up": (8, 8, 6), "0.down": (8, 6, 8)}
    assert world(2).run(_wrapped_state) == [want, want]


def _loss(model: nn.Module, rank: int) -> Tensor:
    return model(make_x("cpu", rank, 4 + rank, 8)).square().sum()


def _reduced_by_ddp(model: Model, mesh: DeviceMesh, rank: int) -> None:
    experts = expert_parameter_names(model)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, experts)
    replicated = DistributedDataParallel(model)  # which reduces for as long as it lives
    _loss(replicated, rank).backward()
    for name in experts:
        grad = model.get_parameter(name).grad
        dist.all_reduce(grad, group=mesh["dp"].get_group())
        grad /= mesh.size()


def _reduced_by_fsdp(sharded: nn.Module, mesh: DeviceMesh, rank: int, model: nn.Module | None = None) -> None:
    """`sharded` is all of the model, or the part of it that is sharded over "dp"."""
    experts = expert_parameter_names(sharded)
    fully_shard(sharded, mesh=mesh["dp"])
    _loss(model or sharded, rank).backward()
    for name, p in sharded.named_parameters():
        grad = p.grad.to_local()
        if name not in experts:
            dist.all_reduce(grad, group=mesh["ep"].get_group())
        grad /= mesh["ep"].size()


def _reduced_by_fsdp_over_two_meshes(model: Model, mesh: DeviceMesh, rank: int) -> None:
    fully_shard(model.before, mesh=init_device_mesh("cpu", (mesh.size(),)))
    _reduced_by_fsdp(model.moe, mesh, rank, model)


def _reduced_by_hand_beside_fsdp(model: Model, mesh: DeviceMesh, rank: int) -> None:
    fully_shard(model.before, mesh=init_device_mesh("cpu", (mesh.size(),)))
    _loss(model, rank).backward()
    experts = expert_parameter_names(model.moe)
    for name, p in model.moe.named_parameters():
        dist.all_reduce(p.grad, group=mesh["dp"].get_group() if name in experts else None)
        p.grad /= mesh.size()


REDUCED = {
    "DDP": _reduced_by_ddp,
    "FSDP2": _reduced_by_fsdp,
    "FSDP2 over two meshes": _reduced_by_fsdp_over_two_meshes,
    "by hand beside FSDP2": _reduced_by_hand_beside_fsdp,
}


def _data_parallel_step(
    rank: int, world_size: int, shape: tuple[int, int], how: str, max_norm: float
) -> tuple[list[str], Tensor, dict[str, Tensor]]:
    """Names of the experts' parameters, the norm, and all gradients, clipped and whole."""
    with _mesh(shape) as mesh:
        torch.manual_seed(21)
        model = Model(mesh["ep"])
        names = expert_parameter_names(model)
        REDUCED[how](model, mesh, rank)
        norm = clip_grad_norm_(model, max_norm)
        grads = {name: _whole(p.grad) for name, p in model.named_parameters()}
        return (
            names,
            norm,
            {name: gather_experts(grad, mesh["ep"]) if name in names else grad for name, grad in grads.items()},
        )


@pytest.mark.parametrize("max_norm", [MAX_NORM, 1e9], ids=["clipped", "below"])
@pytest.mark.parametrize("how", REDUCED)
@each_mesh
def test_gradients_clipped_together_are_those_of_one_rank(shape: tuple[int, int], how: str, max_norm: float) -> None:
    world_size = shape[0] * shape[1]
    torch.manual_seed(21)
    model = Model()
    (sum(_loss(model, rank) for rank in range(world_size)) / world_size).backward()
    want_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    assert want_norm > 2 * MAX_NORM
    for names, norm, grads in world(world_size).run(_data_parallel_step, shape, how, max_norm):
        assert names == (EXPERTS_OF_MODEL if shape[1] > 1 else [])
        torch.testing.assert_close(norm, want_norm)
        for name, p in model.named_parameters():
            torch.testing.assert_close(grads[name], p.grad, msg=lambda m, name=name: f"{name}: {m}")


class Frozen(Model):
    """Rank 1 has no gradients of experts at all."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.before.weight.grad = torch.full((8, 8), 0.5, dtype=torch.float64)
        if rank == 0:
            self.moe.gate.grad = torch.full_like(self.moe.gate, 2)


def _clip_frozen(rank: int, world_size: int) -> tuple[float, float, float]:
    model = Frozen(rank)
    norm = clip_grad_norm_(model, 1.0)
    return float(norm), float(model.before.weight.grad[0, 0]), float(clip_grad_norm_(Model(), 1.0))


def test_ranks_without_gradients_clip_along() -> None:
    want = (64 * 0.5**2 + 4 * 8 * 6 * 2**2) ** 0.5
    for norm, element, of_none in world(2).run(_clip_frozen):
        assert norm == pytest.approx(want)
        assert element == pytest.approx(0.5 / want, rel=1e-5)
        assert of_none == 0


def test_norm_of_bfloat16_gradients_is_in_float32() -> None:
    layer = make_layer(dtype=torch.bfloat16)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    norm = clip_grad_norm_(layer, 1.0)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(sum(p.numel() for p in layer.parameters()) ** 0.5, rel=2**-7)


def _experts_after_ddp(rank: int, world_size: int) -> list[Tensor]:
    torch.manual_seed(21)
    model = Model()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, expert_parameter_names(model))
    DistributedDataParallel(model)
    return [p.detach() for p in (model.moe.gate, model.moe.up, model.moe.down)]


def test_ddp_leaves_every_ranks_experts_alone() -> None:
    first, second = world(2).run(_experts_after_ddp)
    want = _full_state(0, 1, "cpu")
    for name, a, b in zip(EXPERTS_OF_MODEL, first, second, strict=True):
        assert torch.equal(torch.cat([a, b]), want[name])
