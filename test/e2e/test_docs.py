"""The pages: their code runs as it stands there (on GPUs where there are any); links, names and figures are right."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
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


PAGES_WITH_CODE = [
    "README.md",
    *(
        f"docs/{name}.md"
        for name in (
            "tutorial",
            "concepts",
            "training",
            "your_own_experts",
            "serving",
            "multi_node",
            "overlap",
            "coming_from",
        )
    ),
]


@pytest.mark.parametrize("path", PAGES_WITH_CODE)
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
    (tmp_path / "first.py").write_text(blocks("README.md", "ranks")[0][1])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *(torchrun if ranks > 1 else []), str(tmp_path / "first.py")]
    done = subprocess.run(command, capture_output=True, text=True, env={**environment, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    # Lines of several ranks may run into one another. 16 tokens per rank have two experts each.
    rows = [int(n) for n in re.findall(r"(\d+) rows for this rank's experts, \[16, 64\] gradients", done.stdout)]
    assert len(rows) == ranks and sum(rows) == 16 * 2 * ranks


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


LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]*))?\)")
PAGES = sorted(
    str(p.relative_to(ROOT)) for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md") for p in ROOT.glob(pattern)
)


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub and MyST make them."""
    without_code = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for path, anchor in LINK.findall((ROOT / page).read_text()):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_every_page_is_in_the_table_of_contents() -> None:
    trees = re.findall(r"```\{toctree\}\n(.*?)```", (ROOT / "docs/index.md").read_text(), re.DOTALL)
    listed = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    pages = [p.relative_to(ROOT / "docs").with_suffix("").as_posix() for p in (ROOT / "docs").glob("**/*.md")]
    assert sorted([*listed, "index"]) == sorted(pages)


@pytest.mark.parametrize("module", [torch_ep, torch_ep.nn], ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_api_reference(module: ModuleType) -> None:
    documented = " ".join(p.read_text() for p in (ROOT / "docs/api").glob("*.md"))
    names = [name for name in module.__all__ if not isinstance(getattr(module, name), ModuleType)]
    assert [n for n in names if not re.search(rf":: {module.__name__}\.{n}$", documented, re.MULTILINE)] == []


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="expected Sphinx, as `make docs` installs it")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-d", str(tmp_path / "doctrees"), "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_diagrams_equal_the_output_of_their_script() -> None:
    diagrams = script("docs/diagrams.py").DIAGRAMS
    assert {p.stem for p in (ROOT / "docs/images").iterdir()} == set(diagrams)
    for name, draw in diagrams.items():
        assert (ROOT / f"docs/images/{name}.svg").read_text() == draw().svg(), f"run docs/diagrams.py: {name} differs"


def test_messages_in_troubleshooting_are_those_of_the_code() -> None:
    """Every quoted part of a message is somewhere in the sources or in what tests expect."""
    folders, suffixes = ("torch_ep", "test"), {".py", ".cpp", ".h", ".cu", ".cuh"}
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    sources = "\n".join(p.read_text() for p in files if p != Path(__file__))
    sources = re.sub(r'"\s*\n\s*(?:f|r|rf)?"', "", sources)  # literals that continue each other
    rows = re.findall(r"^\| (`[^|]*?) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [part for row in rows for part in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 80
    assert [part for part in quoted if part not in sources] == []


# The lines of the README's first table: file of results, operator, tokens per rank.
FIGURES = [
    ("gpu", "dispatch-cached", 4096),
    ("gpu", "dispatch-fp8-cached", 4096),
    ("gpu", "combine", 4096),
    ("gpu", "dispatch", 4096),
    ("gpu_low_latency", "pair-fp8", 128),
]


def test_figures_of_the_readme_are_those_measured() -> None:
    table = (ROOT / "README.md").read_text().split("|---|---|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    for line, (name, op, tokens) in zip(table, FIGURES, strict=True):
        results = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
        row = next(r for r in results["rows"] if (r["ranks"], r["op"], r["tokens"]) == (4, op, tokens))
        time_us = row["ours"]["median_us"]
        digits = 1 if time_us < 100 else 0
        rates = (row[f"{kind}_bytes"] / time_us / 1000 for kind in ("logical", "wire"))
        assert line.split("|")[2:5] == [f" {time_us:.{digits}f} us ", *(f" {rate:.0f} " for rate in rates)], line


def test_at_most_a_quarter_of_the_readme_is_about_performance() -> None:
    text = (ROOT / "README.md").read_text()
    table, section = (
        text.split("\n| 4 H100")[1].split("\nInstall")[0],
        text.split("## Performance")[1].split("\n## ")[0],
    )
    assert len(table.split()) + len(section.split()) <= len(text.split()) / 4


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
