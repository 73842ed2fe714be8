"""The nvlink kernels on a CPU, several ranks side by side: what they compute is right, bit by bit.

Runs the program that compute-sanitizer runs on a GPU (sanitizer/virtual_ranks.cu), made C++ by emulator/translate.py.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from emulator.translate import translate
from test_cuda_sources import cuda_include_folders, needs_nvcc

# CUDA's headers come with nvcc, which itself is not needed here.
pytestmark = needs_nvcc

CASES = 120  # of random ones, besides twelve larger ones that are always run


def build(folder: Path, change: Callable[[str, str], str] = lambda name, text: text) -> Path:
    """The program. `change(file name, text)`: what to compile instead."""
    source = translate(folder, change)
    program = folder / "virtual_ranks"
    flags = ["-x", "c++", "-std=c++20", "-O1", "-w", "-pthread", "-ffp-contract=off"]
    flags += ["-U_FORTIFY_SOURCE", "-fno-strict-aliasing"]  # as device code is compiled
    includes = [word for path in cuda_include_folders() for word in ("-isystem", path)]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    command = [*compiler, *flags, *includes, "-include", str(folder / "emulator.h"), str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return program


def run(program: Path, cases: int, timeout_s: float = 400) -> tuple[int, str]:
    done = subprocess.run(
        [program, "--cases", str(cases)], capture_output=True, text=True, errors="replace", timeout=timeout_s
    )
    return done.returncode, (done.stdout + done.stderr)[-4000:]


def test_random_cases_of_one_to_four_ranks(tmp_path: Path) -> None:
    code, output = run(build(tmp_path), CASES)
    assert code == 0, output
    assert output.endswith("ok\n")


# File, what stands there, and what stands there instead.
FAULTS = {
    "plan: rows that come before": ("plan.cu", "before += b < block ? n : 0;", "before += b <= block ? n : 0;"),
    "dispatch: rows in a flag": ("dispatch.cu", "static_cast<uint64_t>(told_count) << 24", "uint64_t{1} << 24"),
    "combine: order of a sum": ("combine.cu", "left == terms.all", "false"),
    "an epoch left out": ("device/exchange.cuh", "state.epoch = x.epoch;", "state.epoch = x.epoch + 1;"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(tmp_path: Path, fault: str) -> None:
    file, right, wrong = FAULTS[fault]
    planted = []

    def change(name: str, text: str) -> str:
        if not name.endswith(f"csrc/cuda/{file}"):
            return text
        planted.append(right in text)
        return text.replace(right, wrong)

    code, output = run(build(tmp_path, change), CASES)
    assert planted == [True]
    assert code != 0, output
