"""Between -1 for "no expert", as plans have it, and the number that a framework has for it."""

from __future__ import annotations

from torch import Tensor

__all__ = ["from_sentinel", "to_sentinel"]


def to_sentinel(topk_idx: Tensor, sentinel: int) -> Tensor:
    """topk_idx with `sentinel` in place of -1: what frameworks take that have another number for "no expert".

    Args:
        topk_idx: int32 or int64, of any shape: experts, or -1 for none, as `Plan.local_expert_of_rows` returns them.
        sentinel: no expert's number; most often the number of experts.

    Returns:
        A new tensor of the shape and dtype of `topk_idx`.
    """
    return topk_idx.masked_fill(topk_idx == -1, sentinel)


def from_sentinel(topk_idx: Tensor, sentinel: int) -> Tensor:
    """topk_idx with -1 in place of `sentinel`, as `plan` and `low_latency_dispatch` take it: undoes `to_sentinel`.

    Args, Returns: as `to_sentinel`.
    """
    return topk_idx.masked_fill(topk_idx == sentinel, -1)
