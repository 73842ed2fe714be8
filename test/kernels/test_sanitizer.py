"""The nvlink kernels under compute-sanitizer, several ranks in each launch: the programs of test/kernels/sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support.builds import CSRC
from support.harness import LIMIT_S
from torch.utils import cpp_extension

SOURCES = Path(__file__).parent / "sanitizer"
_TOOLKIT = Path(cpp_extension.CUDA_HOME or "/usr/local/cuda")


def find(name: str) -> str | None:
    """A program of the CUDA toolkit."""
    folders = [os.environ.get("PATH", ""), str(_TOOLKIT / "bin"), str(_TOOLKIT / "compute-sanitizer")]
    return shutil.which(name, path=os.pathsep.join(folders))


NVCC = find("nvcc")
SANITIZER = find("compute-sanitizer")
# mbarriers of a block that synccheck has room for. Kernels have 48 at most, two for each of 24 warps. Left to itself it
# made room for too few, said so, and the kernel ended with an "unspecified launch failure". Here is room for those of a
# whole launch.
NUM_BARRIERS = 1024

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH or in CUDA_HOME"),
]
needs_sanitizer = pytest.mark.skipif(SANITIZER is None, reason="no compute-sanitizer on PATH or in CUDA_HOME")


def last_lines(command: list[str]) -> tuple[int, str]:
    """(exit status, the end of what it printed)"""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S)
    return done.returncode, "\n".join(done.stdout.splitlines()[-60:])


@pytest.fixture(scope="module", params=["virtual_ranks", "low_latency", "permute"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("sanitizer") / request.param
    target = [f"-I{CSRC}", "-gencode=arch=compute_90a,code=sm_90a", "-std=c++20", "-O3", "-lineinfo"]
    host_compiler = ["-ccbin", os.environ["CUDAHOSTCXX"]] if os.environ.get("CUDAHOSTCXX") else []
    # The host's sums without contraction, as the kernels'.
    flags = [*target, *host_compiler, "-Xcompiler", "-ffp-contract=off"]
    status, output = last_lines([str(NVCC), *flags, str(SOURCES / f"{request.param}.cu"), "-o", str(path)])
    assert status == 0, output
    return str(path)


def sanitizer_version() -> tuple[int, int]:
    answer = subprocess.run([str(SANITIZER), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"[Vv]ersion (\d+)\.(\d+)", answer)
    assert found is not None, answer
    return int(found[1]), int(found[2])


def test_virtual_ranks_in_one_launch(program: str) -> None:
    status, output = last_lines([program, "--cases", "240"])
    assert status == 0, output
    assert output.endswith("ok")


@needs_sanitizer
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(program: str, tool: str) -> None:
    # Of what bulk copies write, initcheck knows since 2025.4 only (release notes of compute-sanitizer).
    fill = ["--fill"] if tool == "initcheck" and sanitizer_version() < (2025, 4) else []
    barriers = ["--num-cuda-barriers", str(NUM_BARRIERS)] if tool == "synccheck" else []
    command = [str(SANITIZER), "--tool", tool, *barriers, "--error-exitcode", "1", program, "--cases", "24", *fill]
    status, output = last_lines(command)
    assert status == 0, output
    assert "\nok\n" in output, output
