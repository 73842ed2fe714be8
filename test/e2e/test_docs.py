"""The code in the README and the tutorial runs as it stands there, that for GPUs where there are any; help()."""

from __future__ import annotations

import inspect
import os
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import World, world
from support.virtual import NCCL

import torch_ep

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python(?: (ranks|gpus)=(\d+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(path: str, what: str) -> list[tuple[int, str]]:
    """(how many, code) of every block for so many "ranks" or "gpus"; line numbers are those of the page."""
    text = (ROOT / path).read_text()
    found = []
    for m in BLOCK.finditer(text):
        code = "\n" * text[: m.start(3)].count("\n") + m[3]
        compile(code, path, "exec")  # of any kind, wherever this runs
        if (m[1] or "ranks") == what:
            found.append((int(m[2] or 1), code))
    return found


def execute(rank: int, world_size: int, code: str, path: str) -> None:
    exec(compile(code, path, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("path", ["README.md", "docs/tutorial.md"])
def test_code_runs(path: str) -> None:
    found = blocks(path, "ranks")
    assert found
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for ranks, code in found:
        if ranks == 1:
            exec(compile(code, path, "exec"), namespace)  # blocks of one rank continue each other
        else:
            world(ranks).run(execute, code, path)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_first_example_runs_as_a_program(tmp_path: Path, ranks: int) -> None:
    """On one rank by python, on several by torchrun."""
    (tmp_path / "train.py").write_text(blocks("README.md", "ranks")[0][1])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *(torchrun if ranks > 1 else []), str(tmp_path / "train.py")]
    done = subprocess.run(command, capture_output=True, text=True, env={**environment, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    # Lines of several ranks may run into one another.
    printed = re.findall(rf"rank (\d) of {ranks}, step (\d+): loss (\d\.\d+)", done.stdout)
    losses = {(int(rank), int(step)): float(loss) for rank, step, loss in printed}
    assert sorted(losses) == [(rank, step) for rank in range(ranks) for step in (0, 20, 40)]
    assert all(losses[rank, 0] > losses[rank, 40] > 0 for rank in range(ranks))


def execute_in_turn(rank: int, world_size: int, codes: list[str], path: str) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for code in codes:
        exec(compile(code, path, "exec"), namespace)


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["docs/tutorial.md"])
def test_code_for_gpus_runs(path: str) -> None:
    by_count: dict[int, list[str]] = {}  # blocks for as many GPUs continue each other
    for gpus, code in blocks(path, "gpus"):
        by_count.setdefault(gpus, []).append(code)
    assert by_count
    for gpus, codes in by_count.items():
        if torch.cuda.device_count() < gpus:
            pytest.skip(f"expected {gpus} GPUs, got {torch.cuda.device_count()}")
        own = World(gpus, c10d_backend=NCCL)
        try:
            own.run(execute_in_turn, codes, path)
        finally:
            own.close()


LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


PAGES = sorted(
    str(p.relative_to(ROOT)) for pattern in ("*.md", "docs/*.md", "benchmarks/*.md") for p in ROOT.glob(pattern)
)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in LINK.findall((ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("record", [torch_ep.Plan])
def test_help_describes_every_field(record: type) -> None:
    attributes = pydoc.plain(pydoc.render_doc(record)).split("Attributes:")[1].split("-----")[0]
    assert re.findall(r"^ \|      (\w+): ", attributes, re.MULTILINE) == list(record._fields)


@pytest.mark.parametrize("layout", ["rank_major", "expert_major"])
def test_described_shapes_and_dtypes_of_a_plan_are_those_of_one(layout: torch_ep.Layout) -> None:
    topk_idx = torch.tensor([[0, 1, 4], [-1, 2, 3]])
    plan = torch_ep.plan(topk_idx, 5, layout=layout, alignment=1)
    sizes = {"T": 2, "K": 3, "W": 1, "L": 5, "R": plan.num_rows}
    field = r"^    (\w+): \[([\w, ]*)\],? (?:dtype of `)?(\w+)"
    described = re.findall(field, str(inspect.getdoc(torch_ep.Plan)), re.MULTILINE)
    assert len(described) == 7  # all tensors but `offsets`, whose shape depends on the layout
    for name, shape, dtype in described:
        tensor = getattr(plan, name)
        if tensor is not None:
            assert list(tensor.shape) == [sizes[letter] for letter in re.findall(r"\w", shape)], name
            assert tensor.dtype == (topk_idx.dtype if dtype == "topk_idx" else getattr(torch, dtype)), name
