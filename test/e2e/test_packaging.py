"""Builds find torch and say what they do; what a wheel and a source distribution hold; torch's caches."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
import torch
from support.builds import ROOT, Build

import torch_ep

# --- which torch a build takes ---


@pytest.fixture
def requirements(tmp_path: Path) -> Path:
    """A folder to import setuptools from, which hides every installed package, as pip does in an isolated build."""
    folder = tmp_path / "overlay"
    folder.mkdir()
    installed = Path(setuptools.__file__).parents[1]
    for path in (*installed.glob("setuptools*"), installed / "_distutils_hack"):
        (folder / path.name).symlink_to(path)
    hide = 'import sys\nsys.path[:] = [p for p in sys.path if not p.endswith(("site-packages", "dist-packages"))]\n'
    (folder / "sitecustomize.py").write_text(hide)
    return folder


def run_setup(python: str, requirements: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(requirements), "PYTHONNOUSERSITE": "1"}
    command = [python, "setup.py", "--version"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_an_isolated_build_by_pip_finds_torch(requirements: Path) -> None:
    done = run_setup(sys.executable, requirements)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == torch_ep.__version__


def test_a_build_without_torch_explains_what_to_do(requirements: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare")
    done = run_setup(str(tmp_path / "bare" / "bin" / "python"), requirements)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"torch_ep: expected torch 2.11 or newer to build with, got none in {tmp_path / 'bare'}\n"
    )
    assert "--no-build-isolation (pip, uv) or --no-isolation (python -m build)" in done.stderr


def test_an_old_torch_is_refused(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(SystemExit, match=r"^torch_ep: expected torch 2.11 or newer to build with, got 2.9.1\+cpu$"):
        build.extension()


def test_an_old_setuptools_is_refused(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    message = 'torch_ep: expected setuptools 77 or newer to build with, got 65.5.0: install "setuptools>=77"'
    with pytest.raises(SystemExit, match=f"^{message}$"):
        build.extension()


def test_uv_builds_with_the_torch_that_it_installs_beside(tmp_path: Path) -> None:
    """Without a network, so without fetching anything for the build."""
    uv = pytest.importorskip("uv").find_uv_bin()
    project, target = tmp_path / "project", tmp_path / "target"
    csrc = project / "torch_ep" / "csrc"
    csrc.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    (project / "torch_ep" / "__init__.py").touch()
    (csrc / "instead.cpp").write_text("// what takes minutes to compile is left out\n")
    command = [uv, "pip", "install", "--offline", "--no-deps", "--python", sys.executable, "--target", str(target)]
    done = subprocess.run([*command, "."], capture_output=True, text=True, cwd=project)
    assert done.returncode == 0, done.stderr
    assert list((target / "torch_ep").glob("_C.*"))


# --- what a build says ---


@pytest.mark.parametrize(
    ("cuda", "ninja", "max_jobs", "news"),
    [
        (None, True, "", "without CUDA kernels (this torch has no CUDA): about 3 minutes on 4 cores"),
        (None, True, "1", "without CUDA kernels (this torch has no CUDA): about 10 minutes on 1 core"),
        ("13.0", False, "", "with CUDA 13.0: about 10 minutes on 1 core of 4, since ninja is not installed"),
    ],
    ids=["four-cores", "one-job", "cuda-without-ninja"],
)
def test_a_build_prints_its_steps_and_duration(
    build: Build,
    monkeypatch: pytest.MonkeyPatch,
    cuda: str | None,
    ninja: bool,
    max_jobs: str,
    news: str,
) -> None:
    build.add_nvcc()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setenv("MAX_JOBS", max_jobs)
    build.extension(cuda=cuda)
    described = build.namespace["describe"](["x.cpp"] * 20, ninja)
    assert described == f"20 files with torch {torch.__version__}, {news}, less where built before"


# The log of a build without CUDA, cut in the middle of a line and with commands shortened.
LOG = """\
torch_ep: building 11 files with torch 2.13.0+cpu, without CUDA kernels (this torch has no CUDA): about 2 minutes
building 'torch_ep._C' extension
[1/11] c++ -MMD -MF torch_ep/csrc/aten/local.o.d -c -c torch_ep/csrc/aten/local.cpp
torch_ep/csrc/aten/local.cpp:1:1: note: as [9/9] declared here
[2/11] c++ -MMD -MF torch_ep/csrc/comm/backend.o.d -c"""


def test_the_progress_of_a_build_is_read_from_its_log(setup_env: ModuleType) -> None:
    lines = LOG.splitlines()
    progress = [setup_env.compiled_files("\n".join(lines[:n])) for n in range(len(lines) + 1)]
    assert progress == ["", "", "", *["1 of 11 files compiled"] * 2, "2 of 11 files compiled"]


def test_a_long_command_shows_that_it_goes_on(
    setup_env: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(setup_env, "SECONDS_BETWEEN_NEWS", 1)
    (tmp_path / "recorded").write_text(f"{LOG}\n")
    shown = tmp_path / "shown"  # the command ends when the test has seen its news, however slow the machine is
    monkeypatch.setattr(
        setup_env, "say", lambda line: (print(line, file=sys.stderr), "compiled" in line and shown.touch())
    )
    command = ["sh", "-c", "cat recorded; until [ -e shown ]; do sleep 0.1; done; exit 3"]
    assert setup_env.run(command, "building", tmp_path / "log", cwd=tmp_path) == 3
    first, second = capsys.readouterr().err.splitlines()
    assert first == LOG.splitlines()[0]
    assert re.fullmatch(r"building: \d+:\d\d, 2 of 11 files compiled", second)


# --- what an import says ---


@pytest.mark.parametrize(
    ("extension", "message"),
    [
        (None, "expected the compiled extension in {folder}, got the sources alone: run Python in another folder"),
        (b"", "expected the torch that the extension was compiled with, got {torch}, with which it does not load"),
    ],
    ids=["missing", "does-not-load"],
)
def test_an_import_without_a_working_extension_explains_what_to_do(
    tmp_path: Path, extension: bytes | None, message: str
) -> None:
    folder = tmp_path / "torch_ep"
    shutil.copytree(ROOT / "torch_ep", folder, ignore=shutil.ignore_patterns("_C.*", "csrc"))
    if extension is not None:
        (folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(extension)
    done = subprocess.run([sys.executable, "-c", "import torch_ep"], capture_output=True, text=True, cwd=tmp_path)
    expected = message.format(folder=folder, torch=torch.__version__)
    assert done.stderr.splitlines()[-1].startswith(f"ImportError: torch_ep: {expected}")


# --- what is distributed ---


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("wheel")
    for earlier in (ROOT / "build").glob("lib*"):  # what lies there is taken as it is, removed modules too
        shutil.rmtree(earlier)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True)
    (path,) = folder.glob("torch_ep-*.whl")
    return zipfile.ZipFile(path).namelist()


def test_wheel_contains_the_extension(wheel: list[str]) -> None:
    assert [name for name in wheel if name.startswith("torch_ep/_C.") and name.endswith((".so", ".pyd"))]


MODULES = {p.relative_to(ROOT).as_posix() for p in (ROOT / "torch_ep").rglob("*.py")} | {"torch_ep/py.typed"}


def test_wheel_contains_every_module_and_the_type_marker(wheel: list[str]) -> None:
    assert set(wheel) >= MODULES


def test_wheel_contains_nothing_else(wheel: list[str]) -> None:
    others = {name for name in wheel if not name.startswith("torch_ep/_C.")} - MODULES
    assert {name.split("/")[0] for name in others} == {f"torch_ep-{torch_ep.__version__}.dist-info"}


def test_source_distribution_contains_the_sources_of_a_wheel(tmp_path: Path) -> None:
    # An egg_info elsewhere: that of an earlier build lists files that are then taken whatever MANIFEST.in says.
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT)
    (path,) = tmp_path.glob("torch_ep-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "torch_ep" / "csrc").rglob("*") if p.is_file()}
    assert names >= sources | MODULES | {"setup.py", "pyproject.toml", "README.md", "LICENSE"}


def test_compiled_artifacts_are_those_of_this_version() -> None:
    assert f"torch_ep-{torch_ep.__version__}" in torch.compiler.config.cache_key_tag
