"""The code in the README and the tutorial runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from harness import world

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python(?: ranks=(\d+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(path: str) -> list[tuple[int, str]]:
    """(ranks, code) of every block; line numbers are those of the page."""
    text = (ROOT / path).read_text()
    return [(int(m[1] or 1), "\n" * text[: m.start(2)].count("\n") + m[2]) for m in BLOCK.finditer(text)]


def execute(rank: int, world_size: int, code: str, path: str) -> None:
    exec(compile(code, path, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("path", ["README.md", "docs/tutorial.md"])
def test_code_runs(path: str) -> None:
    found = blocks(path)
    assert found
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for ranks, code in found:
        if ranks == 1:
            exec(compile(code, path, "exec"), namespace)  # blocks of one rank continue each other
        else:
            world(ranks).run(execute, code, path)


LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


PAGES = sorted(
    str(p.relative_to(ROOT)) for pattern in ("*.md", "docs/*.md", "benchmarks/*.md") for p in ROOT.glob(pattern)
)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in LINK.findall((ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target
