"""Grouped matrix products: one per local expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["grouped_mm"]


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """`a[rows of group i] @ b[i]` for every group: torch's grouped GEMM where it runs, the same result elsewhere.

    Args:
        a: [rows, k].
        b: [groups, k, n].
        offsets: [groups] int32: where each group of rows ends. Rows past the last group are undefined.
    """
    if a.dtype == torch.bfloat16 and b.is_contiguous() and b.shape[1] % 8 == 0 and b.shape[2] % 8 == 0:
        return F.grouped_mm(a, b, offs=offsets)  # bfloat16, rows of multiples of 16 bytes
    return torch.ops.ep.grouped_mm(a, b, offsets)
