"""What a wheel and a source distribution hold, and what importing the package does to torch's caches."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import torch_ep

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True)
    (path,) = folder.glob("torch_ep-*.whl")
    return zipfile.ZipFile(path).namelist()


def test_wheel_contains_the_extension(wheel: list[str]) -> None:
    assert [name for name in wheel if name.startswith("torch_ep/_C.") and name.endswith((".so", ".pyd"))]


def test_wheel_contains_every_module_and_the_type_marker(wheel: list[str]) -> None:
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "torch_ep").glob("*.py")}
    assert modules | {"torch_ep/py.typed"} <= set(wheel)


def test_wheel_contains_nothing_else(wheel: list[str]) -> None:
    assert {name.split("/")[0] for name in wheel} == {"torch_ep", f"torch_ep-{torch_ep.__version__}.dist-info"}


def test_source_distribution_contains_every_source(tmp_path: Path) -> None:
    # An egg_info elsewhere: that of an earlier build lists files that are then taken whatever MANIFEST.in says.
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT)
    (path,) = tmp_path.glob("torch_ep-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "torch_ep" / "csrc").rglob("*") if p.is_file()}
    assert sources | {"setup.py", "pyproject.toml"} <= names


def test_compiled_artifacts_are_those_of_this_version() -> None:
    assert f"torch_ep-{torch_ep.__version__}" in torch.compiler.config.cache_key_tag
