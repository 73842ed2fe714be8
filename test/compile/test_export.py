"""torch.export and AOTInductor of a layer on one rank: any number of tokens, saved and loaded."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.compiling import artifacts, exchanges_in, inductor_cache
from support.harness import seeded
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import torch_ep

HIDDEN = 16
# Not the number that is exported with, and 0 and 1, on which tracing likes to specialise.
TOKENS = (0, 1, 2, 17, 300)
MODES = {"exact": {}, "capacity": {"capacity": 24}, "rank_major": {"layout": "rank_major", "alignment": 4}}


class Block(nn.Module):
    """The layer as models have it: a part with a residual. Its result is a tensor, as an engine wants it."""

    def __init__(self, **mode: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.moe = torch_ep.nn.MoE(HIDDEN, 8, 4, 2, **mode)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(x)[0]


def example(device: str, count: int) -> Tensor:
    return torch.randn(count, HIDDEN, generator=seeded(count)).to(device)


def device_of(block: Block) -> str:
    return block.moe.router.device.type


def export(block: Block, strict: bool) -> ExportedProgram:
    x = example(device_of(block), 5)
    with torch.no_grad():
        return torch.export.export(block, (x,), dynamic_shapes={"x": {0: Dim.DYNAMIC}}, strict=strict)


def assert_equal_for_all_counts(fn: Callable, block: Block, tokens: tuple[int, ...] = TOKENS) -> None:
    with torch.no_grad():
        for count in tokens:
            x = example(device_of(block), count)
            torch.testing.assert_close(fn(x), block(x), msg=lambda m, count=count: f"{count} tokens: {m}")


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_exported_equals_eager(device: str, mode: dict, strict: bool) -> None:
    block = Block(**mode).to(device)
    assert_equal_for_all_counts(export(block, strict).module(), block)


def test_decompositions_keep_the_operators(device: str) -> None:
    block = Block().to(device)
    program = export(block, strict=False).run_decompositions()
    assert exchanges_in(program.graph_module) == ["plan", "dispatch", "combine"]
    assert_equal_for_all_counts(program.module(), block)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_saved_and_loaded_equals_eager(device: str, mode: dict) -> None:
    block = Block(**mode).to(device)
    buffer = io.BytesIO()
    torch.export.save(export(block, strict=False), buffer)
    buffer.seek(0)
    assert_equal_for_all_counts(torch.export.load(buffer).module(), block)


def test_package_of_aot_inductor_equals_eager(device: str, tmp_path: Path) -> None:
    block = Block().to(device)
    path = str(tmp_path / "block.pt2")
    with inductor_cache(artifacts()):
        torch._inductor.aoti_compile_and_package(export(block, strict=False), package_path=path)
        loaded = torch._inductor.aoti_load_package(path)
    assert_equal_for_all_counts(loaded, block)
