"""Converts between -1, which plans use for "no expert", and a framework's sentinel."""

from __future__ import annotations

from torch import Tensor

__all__ = ["from_sentinel", "to_sentinel"]


def to_sentinel(topk_idx: Tensor, sentinel: int) -> Tensor:
    """Replaces -1 by `sentinel`, for frameworks that use another number for "no expert".

    Args:
        topk_idx: int32 or int64, of any shape: experts, or -1 for none, as `Plan.local_expert_of_rows` returns them.
        sentinel: a number that no expert has, usually the number of experts.

    Returns:
        A new tensor of the shape and dtype of `topk_idx`.
    """
    return topk_idx.masked_fill(topk_idx == -1, sentinel)


def from_sentinel(topk_idx: Tensor, sentinel: int) -> Tensor:
    """Replaces `sentinel` by -1, as `plan` and `low_latency_dispatch` expect. The inverse of `to_sentinel`.

    Args, Returns: as `to_sentinel`.
    """
    return topk_idx.masked_fill(topk_idx == sentinel, -1)
