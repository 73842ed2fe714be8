"""How Sphinx builds these pages: see `make docs`.

Links from a page to a file outside of docs/ become links to the repository, if it is known
(`make docs ARGS="-D repository=https://..."`), and text otherwise.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch_ep  # noqa: E402 - the line above finds it

project = "torch_ep"
release = version = torch_ep.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "torch_ep"

myst_heading_anchors = 3  # for links such as tutorial.md#training

default_role = "code"  # docstrings mark code by single backquotes, as Markdown does
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
napoleon_use_ivar = True
toc_object_entries_show_parents = "hide"

LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def _link_to_repository(app: Any, docname: str, source: list[str]) -> None:
    folder = (ROOT / "docs" / docname).parent

    def replace(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = (folder / target).resolve()
        if "://" in target or not path.exists() or path.is_relative_to(ROOT / "docs"):
            return match[0]
        if not app.config.repository:
            return text
        return f"[{text}]({app.config.repository}/blob/main/{path.relative_to(ROOT).as_posix()}{anchor})"

    source[0] = LINK.sub(replace, source[0])


def _escape_bars(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """`|x|` in a docstring is an absolute value, not a substitution of reStructuredText."""
    lines[:] = [line.replace("|", r"\|") for line in lines]


# Napoleon takes the words before the first colon of an attribute for its type. These two keep the description whole.
_descriptions: dict[str, list[str]] = {}
_ATTRIBUTES = ("attribute", "data", "property")


def _keep_description(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what in _ATTRIBUTES:
        _descriptions[name] = [] if lines and lines[0].startswith("Alias for field number") else lines[:]


def _restore_description(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what in _ATTRIBUTES:
        lines[:] = _descriptions.pop(name)


def setup(app: Any) -> None:
    app.add_config_value("repository", "", "env")
    app.connect("source-read", _link_to_repository)
    app.connect("autodoc-process-docstring", _escape_bars, priority=480)
    app.connect("autodoc-process-docstring", _keep_description, priority=490)  # napoleon's has 500
    app.connect("autodoc-process-docstring", _restore_description, priority=510)
