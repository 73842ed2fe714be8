"""The MoE layer equals its dense self with every option and over any number of ranks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from support.devices import Ranks
from support.harness import seeded, world
from support.moe_cases import SHAPE, TOKENS, dense, dense_self, full_weights, make_layer, make_x
from torch import Tensor, nn

import torch_ep
from torch_ep.nn import MoE, full_state_dict, grouped_mm, moe

LAYOUTS = ("rank_major", "expert_major")
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


OPTIONS = {
    "softmax": {},
    "softmax, not normalized": {"normalize": False},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid, not normalized": {"score": "sigmoid", "normalize": False},
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
        want = dense_self(layer, x, full_weights(layer))
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
def test_autocast_equals_a_layer_with_explicit_casts(
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
    original = moe.dispatch
    monkeypatch.setattr(moe, "dispatch", lambda x, *a, **k: sent.append(x.dtype) or original(x, *a, **k))
    layer = make_layer(device, dtype=torch.float32, layout=layout)
    with _autocast(device):
        layer(make_x(device, 0, 9, layer.hidden).float())
    assert sent == [torch.bfloat16] * (2 if layout == "rank_major" else 1)


def test_rows_of_decode_travel_in_autocasts_dtype(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    original = moe.low_latency_dispatch
    monkeypatch.setattr(moe, "low_latency_dispatch", lambda x, *a, **k: sent.append(x.dtype) or original(x, *a, **k))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_mm_of_transposed_parameters(device: str, dtype: torch.dtype) -> None:
    """As Hugging Face keeps them, [groups, n, k]: their gradients need no copy into that layout."""
    generator = seeded(0)
    a = torch.randn(20, 16, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(3, 8, 16, generator=generator).to(device, dtype).requires_grad_()
    offsets = torch.tensor([7, 7, 18], dtype=torch.int32, device=device)
    results = []
    for b in (weight.transpose(1, 2), weight.transpose(1, 2).contiguous()):
        y = grouped_mm(a, b, offsets)[:18]
        grads = torch.autograd.grad(y.float().square().sum(), (a, weight))
        results.append((y, grads[0][:18], grads[1]))
    torch.testing.assert_close(*results)
    assert results[0][2].stride() == weight.stride()


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


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_bias_of_grouped_mm(device: str, name: str, dtype: torch.dtype) -> None:
    a, b, offsets = _case(device, name, dtype)
    bias = torch.randn(len(offsets), 16, generator=seeded(4), dtype=torch.float64).to(device, dtype).requires_grad_()
    got = grouped_mm(a, b, offsets, bias=bias)
    assert (got.shape, got.dtype) == ((9, 16), dtype)
    g = torch.randn(9, 16, generator=seeded(3), dtype=torch.float64).to(device, dtype)
    g[offsets[-1] :] = torch.nan
    got.backward(g)
    for group, (begin, end) in enumerate(_begin_end(offsets)):
        torch.testing.assert_close(got[begin:end], a[begin:end] @ b[group] + bias[group])
        torch.testing.assert_close(bias.grad[group], g[begin:end].sum(0))


def test_gradient_of_a_bias_is_a_sum_in_float32(device: str) -> None:
    a, b, bias = (torch.zeros(shape, dtype=torch.bfloat16, device=device) for shape in ((4096, 8), (1, 8, 8), (1, 8)))
    offsets = torch.tensor([4096], dtype=torch.int32, device=device)
    grouped_mm(a, b, offsets, bias=bias.requires_grad_()).backward(torch.ones_like(a))
    assert (bias.grad == 4096).all()  # adding one by one in bfloat16 ends at 256


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


@pytest.fixture
def _warnings_anew() -> None:
    moe._warn_renamed.cache_clear()


@pytest.mark.usefixtures("_warnings_anew")
@pytest.mark.parametrize("old, new", [("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")])
def test_earlier_name_of_a_parameter_warns_once(old: str, new: str) -> None:
    layer = make_layer()
    message = rf"torch_ep\.nn\.MoE\.{old} is deprecated: use {new}"
    with pytest.warns(DeprecationWarning, match=message) as caught:
        assert getattr(layer, old) is getattr(layer, new)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert getattr(layer, old) is getattr(layer, new)
    with pytest.raises(KeyError, match=f"attribute '{old}' already exists"):
        setattr(layer, old, nn.Parameter(torch.zeros(())))


def _with_earlier_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("_proj", "").replace("shared_expert", "shared"): t for name, t in state.items()}


def _loads_earlier_names(rank: int, world_size: int, full: bool) -> bool:
    layer, other = (nn.Sequential(make_layer(shared_intermediate=4, selection_bias=True)) for _ in range(2))
    want = full_state_dict(layer) if full else layer.state_dict()
    nn.init.zeros_(other[0].gate_proj)
    nn.init.zeros_(other[0].shared_expert.down_proj.weight)
    state = _with_earlier_names(want)
    assert {"0.gate", "0.up", "0.down", "0.shared.gate.weight"} < set(state)
    before = dict(state)
    other.load_state_dict(state)
    assert state == before  # the caller's dict has the same keys and tensors
    loaded = other.state_dict()
    return all(torch.equal(t, loaded[name]) for name, t in layer.state_dict().items())


@pytest.mark.parametrize("full", [False, True], ids=["own", "full"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_state_with_earlier_names_loads(world_size: int, full: bool) -> None:
    if world_size == 1:
        assert _loads_earlier_names(0, 1, full)
    else:
        assert all(world(2).run(_loads_earlier_names, full))
