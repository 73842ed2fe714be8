"""The layers of torch_ep/csrc: includes point down only, and no backend knows another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "torch_ep" / "csrc"
# What a file of each folder may include, besides files of its own folder.
BELOW: dict[str, set[str]] = {
    "core": set(),
    "local": {"core"},
    "c10d": {"core", "local"},
    "nvlink": {"core"},
    "ops": {"core"},
}
# ops/schemas.cpp registers switches of the permute kernels for tests.
ALLOWED = {("ops/schemas.cpp", "local/permute.h")}
# Of the local folder, what another backend may be built from. backend.cpp has no header: nothing can include it.
LIBRARY = {"local/permute.h", "local/row_exchange.h", "local/composed_backend.h"}

INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def includes(csrc: Path) -> list[tuple[str, str]]:
    files = sorted(p for p in csrc.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))
    return [(p.relative_to(csrc).as_posix(), header) for p in files for header in INCLUDE.findall(p.read_text())]


def faults(csrc: Path) -> list[str]:
    found = []
    for file, header in includes(csrc):
        folder, target = file.split("/")[0], header.split("/")[0]
        if not (csrc / header).is_file():
            found.append(f"{file} includes {header}, which is not below {csrc.name}")
        elif target != folder and target not in BELOW[folder] and (file, header) not in ALLOWED:
            found.append(f"{file} includes {header}: {folder} may include {sorted(BELOW[folder])}")
        elif target == "local" and folder != "local" and header not in LIBRARY:
            found.append(f"{file} includes {header}, which is private to local")
    return found


def test_includes_point_down() -> None:
    assert {p.name for p in CSRC.iterdir() if p.is_dir()} == set(BELOW)
    assert includes(CSRC)
    assert not faults(CSRC)


@pytest.mark.parametrize(
    ("file", "header"),
    [
        ("core/a.h", "ops/b.h"),
        ("nvlink/a.cpp", "c10d/b.h"),
        ("c10d/a.h", "nvlink/b.h"),
        ("ops/a.cpp", "nvlink/b.h"),
        ("c10d/a.h", "local/b.h"),
        ("core/a.h", "b.h"),
    ],
)
def test_an_include_that_points_up_is_found(file: str, header: str, tmp_path: Path) -> None:
    for path in (file, header):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / file).write_text(f'#include "{header}"\n')
    if header == "b.h":
        (tmp_path / header).unlink()
    assert len(faults(tmp_path)) == 1


@pytest.mark.parametrize("folder", ["core", "local", "ops"])
def test_nothing_outside_a_backend_names_it(folder: str) -> None:
    """Neither its name nor its namespace."""
    for file in (p for p in (CSRC / folder).rglob("*") if p.is_file()):
        code = re.sub(r"//[^\n]*", "", file.read_text())
        assert not re.search(r"nvlink|c10d", code, re.IGNORECASE), file
