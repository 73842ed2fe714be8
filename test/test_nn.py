"""The MoE layer equals its dense self with every option and over any number of ranks; its states fit any world size."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from devices import Ranks
from harness import seeded
from torch import Tensor, nn

import torch_ep
from torch_ep.nn import MoE, full_state_dict, gather_experts, grouped_mm, shard_experts

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

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(8, 8, dtype=torch.float64)
        self.moe = MoE(**SHAPE, selection_bias=True, shared_intermediate=4, dtype=torch.float64)

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
