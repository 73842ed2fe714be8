"""The permute kernels composed of torch's own operators, for devices without others: here on the CPU, on one rank.

`test_cuda.py` runs them where they are meant to run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.harness import random_topk, same_bits, seeded

import torch_ep
from torch_ep import reference


@pytest.fixture(autouse=True)
def aten_kernels() -> Iterator[None]:
    torch.ops.ep._force_aten(True)
    yield
    torch.ops.ep._force_aten(False)


LAYOUTS = [("rank_major", 1), ("expert_major", 1), ("expert_major", 4)]


@pytest.mark.parametrize("capacity", [None, 0, 8, 640])
@pytest.mark.parametrize(("layout", "alignment"), LAYOUTS)
@pytest.mark.parametrize(
    ("num_tokens", "num_topk", "num_experts", "hidden"), [(7, 3, 6, 5), (0, 2, 4, 3), (33, 8, 16, 1), (5, 1, 2, 4)]
)
def test_equals_the_reference(
    num_tokens: int, num_topk: int, num_experts: int, hidden: int, layout: str, alignment: int, capacity: int | None
) -> None:
    g = seeded(num_tokens, num_topk, alignment)
    idx = random_topk(num_tokens, num_topk, num_experts, g)
    p = torch_ep.plan(idx, num_experts, layout=layout, capacity=capacity, alignment=alignment)
    (want,) = reference.plan([idx], num_experts, layout=layout, capacity=capacity, alignment=alignment)
    for field, got in zip(want._fields, p, strict=True):
        if isinstance(got, torch.Tensor):
            assert got.dtype == getattr(want, field).dtype
            assert torch.equal(got, getattr(want, field)), field
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, w = torch.randn(num_tokens, hidden, generator=g).to(dtype), torch.rand(num_tokens, num_topk, generator=g)
        rows, weights = torch_ep.dispatch(x, p, topk_weights=w)
        ((want_rows, want_weights),) = reference.dispatch([x], [want], topk_weights=[w])
        assert torch.equal(rows, want_rows)
        assert torch.equal(weights, want_weights)
        sums, back = torch_ep.combine(rows, p, topk_weights=weights)
        ((want_sums, want_back),) = reference.combine([rows], [want], topk_weights=[weights])
        assert same_bits(sums, want_sums)
        assert torch.equal(back, want_back)
        row_weights = torch.rand(p.num_rows, generator=g).round()
        ((want_sums, _),) = reference.combine([-rows], [want], row_weights=[row_weights])
        assert same_bits(torch_ep.combine(-rows, p, row_weights=row_weights), want_sums)  # -0 among the terms


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8])
def test_fp8_rows_and_scales(dtype: torch.dtype) -> None:
    idx = random_topk(9, 2, 4, seeded(1))
    x = torch.randn(9, 16, generator=seeded(2)).to(torch.float8_e4m3fn).view(dtype)
    scales = torch.rand(9, 2, generator=seeded(3))
    p = torch_ep.plan(idx, 4, alignment=4)
    rows, row_scales = torch_ep.dispatch(x, p, scales=scales)
    (want,) = reference.plan([idx], 4, layout="expert_major", alignment=4)
    assert rows.dtype == dtype
    assert torch.equal(rows.view(torch.uint8), reference.dispatch([x], [want])[0][0].view(torch.uint8))
    assert torch.equal(row_scales, reference.dispatch([scales], [want])[0][0])


@pytest.mark.parametrize(
    ("idx", "message"),
    [
        ([[0, 1], [2, 2]], "expected different experts in one token, got expert 2 at token 1, slots 0 and 1"),
        ([[0, 1], [2, 4]], r"expected topk_idx in \[-1, 4\), got 4 at token 1, slot 1"),
        ([[0, -2]], r"expected topk_idx in \[-1, 4\), got -2 at token 0, slot 1"),
    ],
    ids=["duplicate", "high", "low"],
)
def test_bad_indices(idx: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch_ep.plan(torch.tensor(idx), 4)
