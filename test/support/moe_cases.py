"""The MoE layer that tests share, and the same layer in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from support.harness import seeded
from torch_ep.nn import MoE, gather_experts, shard_experts

SHAPE = {"hidden": 8, "intermediate": 6, "num_experts": 8, "num_topk": 3}
TOKENS = (9, 0, 5, 1)  # of each rank
PROJECTIONS = ("gate", "up", "down")


class Dense(NamedTuple):
    out: Tensor
    aux_loss: Tensor
    chosen: Tensor  # [tokens, num_experts], 1 where the token visits the expert


def choose(
    scores: list[float], num_topk: int, num_expert_groups: int, num_topk_groups: int, group_score_topk: int
) -> list[int]:
    """The experts of one token: the best ones of the groups whose best ones sum to the most."""
    size = len(scores) // num_expert_groups
    groups = [list(range(first, first + size)) for first in range(0, len(scores), size)]

    def score_of(group: list[int]) -> float:
        return sum(sorted((scores[e] for e in group), reverse=True)[:group_score_topk])

    groups.sort(key=score_of, reverse=True)
    allowed = [e for group in groups[:num_topk_groups] for e in group]
    return sorted(allowed, key=lambda e: scores[e], reverse=True)[:num_topk]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate = torch.where(gate > 7, 7.0, gate)
    up = torch.where(up.abs() > 7, 7.0 * up.sign(), up)
    return gate / (1 + (-1.702 * gate).exp()) * (up + 1)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate * (1 + torch.erf(gate / 2**0.5)) / 2 * up


ACTIVATIONS = {"silu": swiglu, "gelu": geglu, "swigluoai": clamped_swiglu}


def dense(
    x: Tensor,
    weights: dict[str, Tensor],
    num_topk: int,
    *,
    score: str = "softmax",
    normalize: bool = True,
    route_scale: float = 1.0,
    num_expert_groups: int = 1,
    num_topk_groups: int = 1,
    group_score_topk: int = 1,
    activation: Callable[[Tensor, Tensor], Tensor] = swiglu,
    scale_before_experts: bool = False,
    keep: Tensor | None = None,
) -> Dense:
    """The layer in plain torch: every expert over all tokens, masked. `keep`: 0 where a (token, expert) is dropped."""
    logits = x @ weights["router"].T + weights.get("router_bias", 0)
    scores = logits.exp() / logits.exp().sum(1, keepdim=True) if score == "softmax" else 1 / (1 + (-logits).exp())
    biased = scores + weights["selection_bias"] if "selection_bias" in weights else scores
    chosen = torch.zeros_like(scores)
    for token, row in enumerate(biased.tolist()):
        chosen[token, choose(row, num_topk, num_expert_groups, num_topk_groups, group_score_topk)] = 1
    gates = scores * chosen
    if normalize:
        gates = gates / gates.sum(1, keepdim=True)
    kept = chosen if keep is None else chosen * keep
    gates = gates * route_scale * kept
    before, after = (gates, kept) if scale_before_experts else (kept, gates)
    out = torch.zeros_like(x)
    for e in range(scores.shape[1]):
        bias = {name: weights[f"{name}_proj_bias"][e] if f"{name}_proj_bias" in weights else 0 for name in PROJECTIONS}
        rows = x * before[:, e : e + 1]
        inner = activation(rows @ weights["gate_proj"][e] + bias["gate"], rows @ weights["up_proj"][e] + bias["up"])
        out = out + after[:, e : e + 1] * (inner @ weights["down_proj"][e] + bias["down"])
    if "shared_expert.gate_proj.weight" in weights:
        gate, up, down = (weights[f"shared_expert.{name}_proj.weight"].T for name in PROJECTIONS)
        biases = [weights.get(f"shared_expert.{name}_proj.bias", 0) for name in PROJECTIONS]
        out = out + activation(x @ gate + biases[0], x @ up + biases[1]) @ down + biases[2]
    # Switch Transformers: experts * sum over experts of (share of the choices) * (mean probability).
    aux = torch.zeros((), dtype=x.dtype, device=x.device)
    if len(x):
        shares = scores / scores.sum(1, keepdim=True)
        aux = scores.shape[1] * (chosen.mean(0) / num_topk * shares.mean(0)).sum()
    return Dense(out, aux, chosen)


def dense_self(layer: MoE, x: Tensor, weights: dict[str, Tensor], *, keep: Tensor | None = None) -> Dense:
    """Computes the layer's result for x, given all its weights."""
    return dense(
        x,
        weights,
        layer.num_topk,
        score=layer.score,
        normalize=layer.normalize,
        route_scale=layer.route_scale,
        num_expert_groups=layer.num_expert_groups,
        num_topk_groups=layer.num_topk_groups,
        group_score_topk=layer.group_score_topk,
        activation=ACTIVATIONS.get(layer.activation, layer.activation),
        scale_before_experts=layer.scale_before_experts,
        keep=keep,
    )


def full_weights(layer: MoE) -> dict[str, Tensor]:
    """Its parameters and buffers with all experts. Collective."""
    weights = {name: t.detach() for name, t in layer.state_dict().items()}
    return {
        name: gather_experts(t, layer.group_name) if name in layer.EXPERT_PARAMETERS else t
        for name, t in weights.items()
    }


@torch.no_grad()
def fill_biases(layer: MoE) -> None:
    """With numbers that are the same whatever the world size, where a new layer has zeros."""
    for seed, (name, p) in enumerate(layer.named_parameters()):
        if name.endswith("_bias"):
            spread = name in layer.EXPERT_PARAMETERS
            shape = (layer.num_experts, *p.shape[1:])
            values = torch.randn(shape, generator=seeded(seed, 6), dtype=p.dtype)
            p.copy_(shard_experts(values, layer.group_name) if spread else values)


def make_layer(device: str = "cpu", **options: Any) -> MoE:
    torch.manual_seed(5)
    layer = MoE(**{**SHAPE, "dtype": torch.float64, **options})
    if layer.selection_bias is not None:
        layer.selection_bias.copy_(torch.linspace(-0.5, 0.5, layer.num_experts))
    fill_biases(layer)
    return layer.to(device)


def make_x(device: str, rank: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(rank, 4), dtype=torch.float64).to(device)
