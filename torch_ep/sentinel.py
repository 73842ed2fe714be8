"""Converts between -1, which plans use for "no expert", and a framework's sentinel."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_int, check_tensors, refuse

__all__ = ["from_sentinel", "to_sentinel"]


def to_sentinel(topk_idx: Tensor, sentinel: int) -> Tensor:
    """Replaces -1 by `sentinel`, for frameworks that use another number for "no expert".

    Args:
        topk_idx: int32 or int64, of any shape: experts, or -1 for none, as `Plan.local_expert_of_rows` returns them.
        sentinel: a number that no expert has, usually the number of experts.

    Returns:
        A new tensor of the shape and dtype of `topk_idx`.

    Raises:
        TypeError, ValueError: an argument is of another type, or the dtype cannot hold the sentinel.
    """
    _check("to_sentinel", topk_idx, sentinel)
    return topk_idx.masked_fill(topk_idx == -1, sentinel)


def from_sentinel(topk_idx: Tensor, sentinel: int) -> Tensor:
    """Replaces `sentinel` by -1, as `plan` and `low_latency_dispatch` expect. The inverse of `to_sentinel`.

    Args, Returns: as `to_sentinel`.
    """
    _check("from_sentinel", topk_idx, sentinel)
    return topk_idx.masked_fill(topk_idx == sentinel, -1)


def _check(name: str, topk_idx: Tensor, sentinel: int) -> None:
    op = f"torch_ep.{name}"
    check_tensors(op, {"topk_idx": topk_idx})
    check_int(op, "sentinel", sentinel)
    if topk_idx.dtype not in (torch.int32, torch.int64):
        refuse(TypeError, f"{op}: expected topk_idx of dtype int32 or int64, got {topk_idx.dtype}")
    if not torch.iinfo(topk_idx.dtype).min <= sentinel <= torch.iinfo(topk_idx.dtype).max:
        refuse(ValueError, f"{op}: expected a sentinel that {topk_idx.dtype} holds, got {sentinel}")
