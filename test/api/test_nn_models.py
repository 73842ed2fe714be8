"""Options of the layer for published models: each one equals the dense layer in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from support.compiling import InductorGraphs
from support.devices import Ranks
from support.harness import seeded, world
from support.moe_cases import TOKENS, choose, clamped_swiglu, dense_self, full_weights, make_layer, make_x, swiglu
from torch import Tensor, nn

from torch_ep.nn import MoE, expert_parameter_names, full_state_dict, group_limited_topk, grouped_mm, swigluoai

LAYOUTS = ("rank_major", "expert_major")
every_layout = pytest.mark.parametrize("layout", LAYOUTS)

GROUPED = {"num_expert_groups": 4, "num_topk_groups": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "groups by their best expert": GROUPED,
    "groups by their best two experts": {**GROUPED, "score": "sigmoid", "selection_bias": True},
    "groups by a given number": {"num_expert_groups": 2, "num_topk_groups": 1, "group_score_topk": 3},
    "gelu": {"activation": "gelu", "shared_intermediate": 4},
    "swigluoai": {"activation": "swigluoai", "shared_intermediate": 4},
    "biases": {"bias": True},
    "biases, not normalized": {"bias": True, "normalize": False, "shared_intermediate": 4, "alignment": 8},
    "biases, capacity to spare": {"bias": True, "capacity": 64},
    "scaled before": {"scale_before_experts": True, "route_scale": 2.0},
    "scaled before, biases": {"scale_before_experts": True, "bias": True, "alignment": 8, "capacity": 128},
    "another activation": {"activation": lambda gate, up: (gate + up).relu().square(), "shared_intermediate": 4},
}
MODELS: dict[str, dict[str, Any]] = {
    "DeepSeek-V2": {**GROUPED, "normalize": False, "route_scale": 16.0, "shared_intermediate": 4},
    "DeepSeek-V3": {
        **GROUPED,
        "score": "sigmoid",
        "selection_bias": True,
        "route_scale": 2.5,
        "shared_intermediate": 4,
    },
    "gpt-oss": {"bias": True, "activation": "swigluoai"},
    "Llama 4": {
        "num_topk": 1,
        "score": "sigmoid",
        "normalize": False,
        "scale_before_experts": True,
        "shared_intermediate": 4,
    },
}
every_option = pytest.mark.parametrize("name", [*OPTIONS, *MODELS])
ROOM = max(TOKENS)


def _options(name: str) -> dict[str, Any]:
    return OPTIONS[name] if name in OPTIONS else MODELS[name]


def _outputs(rank: int, world_size: int, device: str, name: str, layout: str) -> dict[str, tuple[Tensor, Tensor]]:
    """By what was called: the layer's output, and that of its dense self."""
    layer = make_layer(device, layout=layout, **_options(name)).requires_grad_(False)
    x = make_x(device, rank, TOKENS[rank], layer.hidden)
    want = dense_self(layer, x, full_weights(layer)).out
    found = {"forward": layer(x)[0]}
    if layout == "expert_major":  # in which decode has no part
        found["decode"] = layer.float().decode(x.float(), ROOM).double()
    return {call: (got.cpu(), want.cpu()) for call, got in found.items()}


@every_layout
@every_option
@pytest.mark.parametrize("world_size", [1, 2])
def test_equals_its_dense_self(device: str, world_size: int, name: str, layout: str) -> None:
    args = (device, name, layout)
    for found in [_outputs(0, 1, *args)] if world_size == 1 else Ranks(device, world_size).run(_outputs, *args):
        torch.testing.assert_close(*found["forward"], rtol=1e-9, atol=1e-12)
        if "decode" in found:
            torch.testing.assert_close(*found["decode"], rtol=1e-4, atol=1e-5)


EVERYTHING = {
    **GROUPED,
    "score": "sigmoid",
    "selection_bias": True,
    "bias": True,
    "activation": "swigluoai",
    "scale_before_experts": True,
    "shared_intermediate": 4,
}
COMPILED = {"everything": EVERYTHING, "experts_fn": {"experts_fn": lambda rows, offsets: rows.sin()}}


def _compiled(device: str, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """By name: a result of the compiled layer, and of the layer."""
    torch._dynamo.reset()
    layer = make_layer(device, dtype=torch.float32, **COMPILED[name])
    x = make_x(device, 0, TOKENS[0], layer.hidden).float()
    results = []
    for step in (torch.compile(layer, fullgraph=True, backend=InductorGraphs()), layer):
        layer.zero_grad()
        tokens = x.clone().requires_grad_()
        y, stats = step(tokens)
        (y.square().sum() + stats.aux_loss).backward()
        grads = {f"{name}.grad": p.grad for name, p in layer.named_parameters()}
        results.append({"y": y.detach(), "x.grad": tokens.grad, **grads})
    layer.requires_grad_(False)
    decode = torch.compile(layer.decode, fullgraph=True, backend=InductorGraphs())
    for result, step in zip(results, (decode, layer.decode), strict=True):
        result["decode"] = step(x, ROOM)
    torch._dynamo.reset()
    return {name: (results[0][name].cpu(), results[1][name].cpu()) for name in results[0]}


def _assert_same(found: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, (got, want) in found.items():
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_whole(device: str, name: str) -> None:
    _assert_same(_compiled(device, name))


# --- groups of experts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, -5.0], ids=["positive", "negative"])
@pytest.mark.parametrize("group_score_topk", [1, 2, 4])
@pytest.mark.parametrize("num_expert_groups, num_topk_groups", [(1, 1), (2, 1), (4, 3), (4, 4), (3, 2)])
def test_choice_is_among_the_best_groups(
    device: str, num_expert_groups: int, num_topk_groups: int, group_score_topk: int, shift: float
) -> None:
    num_experts, num_topk = 4 * num_expert_groups, 4
    scores = torch.rand(33, num_experts, generator=seeded(num_expert_groups, num_topk_groups)).double() + shift
    groups = num_expert_groups, num_topk_groups
    got = group_limited_topk(scores.to(device), num_topk, *groups, group_score_topk=group_score_topk)
    assert got.tolist() == [choose(row, num_topk, *groups, group_score_topk) for row in scores.tolist()]


def test_groups_of_no_tokens(device: str) -> None:
    assert group_limited_topk(torch.rand(0, 8, device=device), 3, 4, 2).shape == (0, 3)


def test_a_token_visits_few_groups(device: str) -> None:
    layer = make_layer(device, **MODELS["DeepSeek-V3"])
    topk_idx = layer.route(make_x(device, 0, 64, layer.hidden))[0]
    groups_of_tokens = [len(set(row)) for row in (topk_idx // 2).tolist()]
    assert max(groups_of_tokens) == layer.num_topk_groups


# --- biases -----------------------------------------------------------------------------------------------------------


def test_scores_are_the_softmax_over_the_chosen_logits(device: str) -> None:
    """As gpt-oss and Mixtral define them."""
    layer = make_layer(device, bias=True)
    x = make_x(device, 0, 9, layer.hidden)
    topk_idx, weights, _, _ = layer.route(x)
    logits, chosen = (x @ layer.router.T + layer.router_bias).topk(layer.num_topk)
    assert torch.equal(topk_idx, chosen)
    torch.testing.assert_close(weights, logits.softmax(-1))


def _state_of_biases(rank: int, world_size: int) -> tuple[dict[str, Tensor], list[str], Tensor]:
    layer = make_layer(bias=True)
    state = full_state_dict(layer)
    other = MoE(layer.hidden, layer.intermediate, layer.num_experts, layer.num_topk, bias=True, dtype=torch.float64)
    assert not any(p.any() for name, p in other.named_parameters() if name.endswith("_bias"))
    other.load_state_dict(state)
    with torch.no_grad():
        return state, expert_parameter_names(layer), other(make_x("cpu", 0, 9, layer.hidden))[0]


def test_biases_of_experts_are_spread_over_ranks() -> None:
    want, _, y = _state_of_biases(0, 1)
    assert want["down_proj_bias"].shape == (8, 8) and want["gate_proj_bias"].shape == (8, 6)
    for state, spread, got in world(2).run(_state_of_biases):
        assert list(state) == list(want) and all(torch.equal(state[name], want[name]) for name in want)
        assert set(spread) == {f"{name}_proj{bias}" for name in ("gate", "up", "down") for bias in ("", "_bias")}
        torch.testing.assert_close(got, y)


def test_same_weights_with_and_without_biases() -> None:
    torch.manual_seed(5)
    layer = MoE(8, 6, 8, 3, bias=True, dtype=torch.float64)
    for name, p in make_layer().named_parameters():
        assert torch.equal(layer.get_parameter(name), p)


def test_autocast_takes_biases_along(device: str) -> None:
    layer = make_layer(device, bias=True, shared_intermediate=4, dtype=torch.float32).requires_grad_(False)
    x = make_x(device, 0, 9, layer.hidden).float()
    with torch.autocast(device, torch.bfloat16):
        results = layer(x)[0], layer.decode(x, 9)
    for y in results:
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x)[0], rtol=0.05, atol=0.1)


# --- activations ------------------------------------------------------------------------------------------------------


def test_swigluoai_clamps_gate_above_and_up_on_both_sides(device: str) -> None:
    gate = torch.tensor([-20.0, -1, 1, 7, 20], dtype=torch.float64, device=device)[:, None].expand(5, 5).contiguous()
    up = torch.tensor([-20.0, -7, 1, 7, 20], dtype=torch.float64, device=device).expand(5, 5).contiguous()
    gate.requires_grad_(), up.requires_grad_()
    got = swigluoai(gate, up)
    torch.testing.assert_close(got, clamped_swiglu(gate, up))
    got.sum().backward()
    assert not gate.grad[4].any() and not up.grad[:, [0, 4]].any()
    torch.testing.assert_close(swigluoai(gate, up, alpha=1.0, limit=30.0), torch.nn.functional.silu(gate) * (up + 1))


# --- weights before the experts ---------------------------------------------------------------------------------------


def test_rows_scaled_before_the_experts_keep_their_dtype(device: str) -> None:
    layer = make_layer(device, scale_before_experts=True, dtype=torch.bfloat16)
    x = make_x(device, 0, 9, layer.hidden).bfloat16()
    y, _ = layer(x)
    weights = {name: t.double() for name, t in full_weights(layer).items()}
    want = dense_self(layer, x.double(), weights).out
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), want, rtol=0.05, atol=0.02 * float(want.abs().max()))


# --- experts of one's own ---------------------------------------------------------------------------------------------


class FusedExperts(nn.Module):
    """Both first projections in one parameter, as many models have them."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.cat([layer.gate_proj, layer.up_proj], 2).detach())
        self.down_proj = nn.Parameter(layer.down_proj.detach())

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        return grouped_mm(swiglu(*grouped_mm(rows, self.gate_up_proj, offsets).chunk(2, -1)), self.down_proj, offsets)


class Overridden(MoE):
    def experts(self, rows: Tensor, offsets: Tensor) -> Tensor:
        return FusedExperts(self)(rows, offsets)


class OverriddenTwice(MoE):
    def experts(self, rows: Tensor, offsets: Tensor) -> Tensor:
        raise NotImplementedError

    def decode_experts(self, rows: Tensor, tokens_per_expert: Tensor) -> Tensor:
        done = torch.full_like(rows, torch.nan)
        for expert, count in enumerate(tokens_per_expert.tolist()):
            inner = swiglu(rows[expert, :count] @ self.gate_proj[expert], rows[expert, :count] @ self.up_proj[expert])
            done[expert, :count] = inner @ self.down_proj[expert]
        return done


def _with_experts(how: str, layer: MoE) -> MoE:
    """The same layer, its experts given in another way."""
    sizes = layer.hidden, layer.intermediate, layer.num_experts, layer.num_topk
    options = {"layout": layer.layout, "dtype": torch.float64, "shared_intermediate": 4}
    if how == "overridden":
        other = Overridden(*sizes, **options)
    elif how == "decode_experts overridden":
        other = OverriddenTwice(*sizes, **options)
    else:
        experts = FusedExperts(layer)
        experts_fn = experts if how == "module" else lambda rows, offsets: experts.to(rows.dtype)(rows, offsets)
        other = MoE(layer.hidden, None, *sizes[2:], experts_fn=experts_fn, **options)
    other.load_state_dict(layer.state_dict(), strict=False)
    return other.to(layer.router.device)


def _own_experts(rank: int, world_size: int, device: str, how: str, layout: str) -> dict[str, tuple[Tensor, Tensor]]:
    layer = make_layer(device, layout=layout, shared_intermediate=4)
    other, x = _with_experts(how, layer), make_x(device, rank, TOKENS[rank], layer.hidden)
    found = {}
    if how != "decode_experts overridden":
        found = {f"forward, {name}": pair for name, pair in _results(layer, other, x).items()}
    with torch.no_grad():
        decoded = [m.float().requires_grad_(False).decode(x.float(), ROOM) for m in (other, layer)]
    return {name: (got.cpu(), want.cpu()) for name, (got, want) in {**found, "decode": decoded}.items()}


def _results(layer: MoE, other: MoE, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """By name: of the other layer and of this one."""
    results: list[dict[str, Tensor]] = []
    for module in (other, layer):
        tokens = x.clone().requires_grad_()
        y, stats = module(tokens)
        (y.square().sum() + stats.aux_loss).backward()
        results.append({"y": y.detach(), "x.grad": tokens.grad, "router.grad": module.router.grad})
    return {name: (results[0][name], results[1][name]) for name in results[0]}


@every_layout
@pytest.mark.parametrize("how", ["module", "function", "overridden", "decode_experts overridden"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_experts_of_ones_own(device: str, world_size: int, how: str, layout: str) -> None:
    args = (device, how, layout)
    for found in [_own_experts(0, 1, *args)] if world_size == 1 else Ranks(device, world_size).run(_own_experts, *args):
        for name, (got, want) in found.items():
            tolerance = {"rtol": 1e-5, "atol": 1e-6} if name == "decode" else {}
            torch.testing.assert_close(got, want, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_layer_of_other_experts_has_none_of_its_own(device: str) -> None:
    experts = FusedExperts(make_layer())
    layer = MoE(8, None, 8, 3, experts_fn=experts, bias=True)
    assert set(layer.state_dict()) == {"router", "router_bias", "experts_fn.gate_up_proj", "experts_fn.down_proj"}
    assert layer.EXPERT_PARAMETERS == ()
    layer = MoE(8, None, 8, 3, experts_fn=lambda rows, offsets: rows.double(), device=device)
    assert layer(make_x(device, 0, 9, 8))[0].dtype == torch.float64  # no dtype of experts to be checked
