"""Which experts a token visits, given its scores."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_int

__all__ = ["group_limited_topk"]


def check_expert_groups(
    op: str, num_experts: int, num_topk: int, num_expert_groups: int, num_topk_groups: int, group_score_topk: int
) -> None:
    check_int(op, "num_expert_groups", num_expert_groups, 1, num_experts)
    if num_experts % num_expert_groups:
        raise ValueError(
            f"{op}: expected num_expert_groups to divide num_experts = {num_experts}, got {num_expert_groups}"
        )
    group_size = num_experts // num_expert_groups
    check_int(op, "num_topk_groups", num_topk_groups, 1, num_expert_groups)
    check_int(op, "group_score_topk", group_score_topk, 1, group_size)
    if num_topk > num_topk_groups * group_size:
        raise ValueError(
            f"{op}: expected num_topk of at most {num_topk_groups * group_size}, the experts in num_topk_groups = "
            f"{num_topk_groups} groups, got {num_topk}"
        )


def group_limited_topk(
    scores: Tensor, num_topk: int, num_expert_groups: int, num_topk_groups: int, *, group_score_topk: int = 1
) -> Tensor:
    """Chooses each token's experts from its best groups of experts alone, so that a token visits few nodes.

    A group is `num_experts / num_expert_groups` consecutive experts. Its score is the sum of its `group_score_topk`
    highest scores. The token's experts are the best ones in the `num_topk_groups` groups with the highest scores; no
    expert of another group is chosen, whatever the scores.

    Hugging Face's `DeepseekV3MoE` scores the experts of other groups as zero, which is better than a negative score.

    `group_score_topk` is 1 in DeepSeek-V2 (`group_limited_greedy`, arXiv:2405.04434), 2 in DeepSeek-V3 (`noaux_tc`,
    on scores with the selection bias, arXiv:2412.19437), and `num_topk // num_topk_groups` in Megatron-LM.

    Args:
        scores: [num_tokens, num_experts] floating: what the choice goes by, a selection bias included.
        num_topk: experts per token.
        num_expert_groups: groups of experts; divides num_experts.
        num_topk_groups: groups per token.
        group_score_topk: experts per group whose scores are summed.

    Returns:
        topk_idx [num_tokens, num_topk] int64, the highest score first.

    Raises:
        ValueError, TypeError: an argument is out of range or of another type.
    """
    op, num_experts = "torch_ep.nn.group_limited_topk", scores.shape[-1]
    check_int(op, "num_topk", num_topk, 1, num_experts)
    check_expert_groups(op, num_experts, num_topk, num_expert_groups, num_topk_groups, group_score_topk)
    grouped = scores.unflatten(-1, (num_expert_groups, num_experts // num_expert_groups))
    group_scores = grouped.topk(group_score_topk, dim=-1).values.sum(-1)
    best = group_scores.topk(num_topk_groups, dim=-1).indices
    outside = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, best, False)
    limited = grouped.masked_fill(outside[..., None], -torch.inf).flatten(-2)
    return limited.topk(num_topk, dim=-1).indices
