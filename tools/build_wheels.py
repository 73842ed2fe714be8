"""Builds a wheel of torch_ep for each of several versions of torch, and checks that it installs and runs.

    python tools/build_wheels.py --torch 2.13.0                                    # the torch that pip finds
    python tools/build_wheels.py --torch 2.13.0 2.14.1 --index-url https://download.pytorch.org/whl/cpu
    python tools/build_wheels.py --torch 2.11.0 --index-url https://download.pytorch.org/whl/cu130

A wheel fits one minor version of torch, and has CUDA kernels if that torch has CUDA and nvcc is found. Each wheel is
checked in a new environment without a compiler: `python -m torch_ep.doctor`, and an exchange between two ranks.
Writes OUTPUT/torch-VERSION/*.whl. Needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD_TOOLS = ("setuptools>=77", "wheel", "ninja", "numpy")
EXCHANGE = """
import torch, torch.distributed as dist, torch_ep
dist.init_process_group("gloo")
torch_ep.init()
x = torch.randn(4, 8)
plan = torch_ep.plan(torch.arange(4)[:, None], num_experts=4)
assert torch.equal(torch_ep.combine(torch_ep.dispatch(x, plan), plan), x)
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--torch", nargs="+", required=True, metavar="VERSION", help="versions to build for")
    p.add_argument("--index-url", help="where pip finds torch (default: pip's own)")
    p.add_argument("--python", default=sys.executable, help="the Python to build for (default: this one)")
    p.add_argument("--output", type=Path, default=ROOT / "dist", help="default: %(default)s")
    return p


def run(*command: str | Path, **options: object) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


def make_environment(folder: Path, python: str, version: str, index_url: str | None, *packages: str) -> Path:
    """A virtual environment with that torch. Returns its Python."""
    run(python, "-m", "venv", folder)
    made = folder / "bin" / "python"
    index = ["--index-url", index_url] if index_url else []
    run(made, "-m", "pip", "install", "--quiet", *index, f"torch=={version}")
    if packages:
        run(made, "-m", "pip", "install", "--quiet", *packages)
    return made


def check(python: Path, folder: Path) -> None:
    """Runs the installed wheel, away from the sources and without a compiler."""
    hidden = folder / "no-compiler"
    hidden.mkdir()
    for name in ("cc", "gcc", "g++", "c++", "clang", "nvcc"):
        (hidden / name).write_text("#!/bin/sh\necho expected no compiler to be called >&2\nexit 1\n")
        (hidden / name).chmod(0o755)
    environment = {**os.environ, "PATH": os.pathsep.join([str(hidden), os.environ["PATH"]]), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    run(python, "-m", "torch_ep.doctor", cwd=folder, env=environment)
    (folder / "exchange.py").write_text(EXCHANGE)
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "exchange.py"]
    run(python, *ranks, cwd=folder, env=environment)


def build(version: str, args: argparse.Namespace) -> Path:
    """The wheel for one version of torch, checked."""
    output = args.output / f"torch-{version}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        builder = make_environment(folder / "build", args.python, version, args.index_url, *BUILD_TOOLS)
        sources = folder / "sources"  # a copy: a build leaves its extension among the sources
        tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], check=True, capture_output=True).stdout
        for path in filter(None, tracked.decode().split("\0")):
            (sources / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, sources / path)
        output.mkdir(parents=True, exist_ok=True)
        run(builder, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", output, sources)
        (wheel,) = output.glob("*.whl")
        user = make_environment(folder / "use", args.python, version, args.index_url)
        run(user, "-m", "pip", "install", "--quiet", wheel)
        check(user, folder)
    return wheel


def main() -> None:
    args = parser().parse_args()
    for version in args.torch:
        shutil.rmtree(args.output / f"torch-{version}", ignore_errors=True)
    print("\n".join(str(build(version, args)) for version in args.torch))


if __name__ == "__main__":
    main()
