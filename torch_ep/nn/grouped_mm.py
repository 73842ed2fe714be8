"""Grouped matrix products: one per local expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

__all__ = ["grouped_mm"]


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """`a[rows of group i] @ b[i] + bias[i]` for every group: torch's grouped GEMM where it runs, the same elsewhere.

    Args:
        a: [rows, k].
        b: [groups, k, n], contiguous or the transpose of a contiguous tensor; else slower.
        offsets: [groups] int32: where each group of rows ends. Rows past the last group are undefined, as are their
            gradients, which reach neither b nor bias.
        bias: [groups, n]. Of the dtype of a and b.

    Returns:
        [rows, n].
    """
    if bias is not None:
        # A product too: its gradient sums each group's rows in one order, accumulates in float32, and leaves out rows
        # past the last group. Eight columns of ones are the 16 bytes that torch's grouped GEMM asks for.
        ones, padded = a.new_ones(a.shape[0], 8), F.pad(bias[:, None], (0, 0, 0, 7))
        return grouped_mm(a, b, offsets) + grouped_mm(ones, padded, offsets)
    is_dense = b.is_contiguous() or b.transpose(1, 2).is_contiguous()
    if a.dtype == torch.bfloat16 and is_dense and b.shape[1] % 8 == 0 and b.shape[2] % 8 == 0:
        return F.grouped_mm(a, b, offs=offsets)  # bfloat16, rows of multiples of 16 bytes
    return torch.ops.ep.grouped_mm(a, b, offsets)


def _grouped_mm_flop(a_shape: Sequence[int], b_shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Of grouped products of matrices that share a dimension or have one of groups; no group is padded."""
    groups = a_shape[0] if len(a_shape) == len(b_shape) == 3 else 1
    return 2 * groups * a_shape[-2] * a_shape[-1] * b_shape[-1]


for _op in (torch.ops.ep.grouped_mm, torch.ops.aten._grouped_mm):
    if _op not in flop_registry:  # torch 2.13 has none for its own
        register_flop_formula(_op)(_grouped_mm_flop)
