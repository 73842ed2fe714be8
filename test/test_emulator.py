"""The nvlink kernels on a CPU, several ranks side by side: what they compute is right, bit by bit.

Runs the programs that compute-sanitizer runs on a GPU (test/sanitizer), made C++ by emulator/translate.py.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from emulator.translate import KERNELS, translate
from support.harness import LIMIT_S
from test_cuda_sources import cuda_include_folders, needs_nvcc

# CUDA's headers come with nvcc, which itself is not needed here.
pytestmark = needs_nvcc

# Random ones of each program, besides fourteen larger ones of virtual_ranks that are always run.
CASES = {"virtual_ranks": 48, "low_latency": 40, "permute": 60}


def build(
    name: str, folder: Path, change: Callable[[str, str], str] = lambda name, text: text, optimize: str = "-O1"
) -> Path:
    """A program of test/sanitizer. `change(file name, text)`: what to compile instead."""
    source = translate(name, folder, change)
    program = folder / name
    flags = ["-x", "c++", "-std=c++20", optimize, "-w", "-pthread", "-ffp-contract=off"]
    flags += ["-U_FORTIFY_SOURCE", "-fno-strict-aliasing"]  # as device code is compiled
    includes = [word for path in cuda_include_folders() for word in ("-isystem", path)]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    command = [
        *compiler,
        *flags,
        *includes,
        f"-I{folder / KERNELS}",
        "-include",
        str(folder / "emulator.h"),
        str(source),
        "-o",
        str(program),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return program


def run(program: Path, cases: int, *options: str) -> tuple[int, str]:
    command = [program, "--cases", str(cases), *options]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=LIMIT_S)
    return done.returncode, (done.stdout + done.stderr)[-4000:]


class Fault(NamedTuple):
    program: str
    file: str
    right: str
    wrong: str


FAULTS = {
    "plan: rows that come before": Fault(
        "virtual_ranks", "plan.cu", "received_before += b < block_ ?", "received_before += b <= block_ ?"
    ),
    "dispatch: rows in a flag": Fault(
        "virtual_ranks", "dispatch.cu", "static_cast<uint64_t>(told_count) << 24", "uint64_t{1} << 24"
    ),
    "combine: rows of the own rank": Fault(
        "virtual_ranks", "device/reduce.cuh", "take(terms.own_rows);", "take(terms.own_rows & -terms.own_rows);"
    ),
    "combine: columns of a part": Fault(
        "virtual_ranks", "combine.cu", "(part + 1) * pieces() / cut.parts}", "part * pieces() / cut.parts + 1}"
    ),
    "dispatch: a flag before its rows": Fault(
        "virtual_ranks", "dispatch.cu", "bulk_wait<1>();  // all but this token's", ";"
    ),
    "dispatch: a stage used before it has left": Fault(
        "virtual_ranks",
        "dispatch.cu",
        "bulk_wait_read<1>();\n    } else {\n      bulk_wait_read<0>();",
        "bulk_wait_read<2>();\n    } else {\n      bulk_wait_read<1>();",
    ),
    "dispatch: a chunk that nobody takes": Fault(
        "virtual_ranks", "dispatch.cu", "receivers_ + int64_t{atomicAdd", "receivers_ + 1 + int64_t{atomicAdd"
    ),
    "combine: the first part of a row awaited alone": Fault(
        "virtual_ranks",
        "combine.cu",
        "chunk_of<few>(theirs, row, columns.end - 1)",
        "chunk_of<few>(theirs, row, columns.begin)",
    ),
    "combine: rows read before they have come": Fault(
        "virtual_ranks", "device/reduce.cuh", "copy_wait<kDepth - 1>();", "copy_wait<kDepth>();"
    ),
    "low latency: a flag before its row": Fault(
        "low_latency", "low_latency_dispatch.cu", "bulk_wait<1>();  // all but this token's", ";"
    ),
    "low latency: a doubled expert": Fault("low_latency", "device/counter.cuh", "visited |=", "visited +="),
    "rows written without a credit": Fault(
        "virtual_ranks",
        "device/exchange.cuh",
        "load_acquire_system(x.own(x.layout().done(p))) >= last;",
        "true;",
    ),
    "an epoch left out": Fault(
        "virtual_ranks", "device/exchange.cuh", "state.epoch = x.epoch;", "state.epoch = x.epoch + 1;"
    ),
    "low latency: rows of the ranks before": Fault(
        "low_latency", "device/low_latency_receive.cuh", "sum += count(s, expert);", "sum += 1;"
    ),
    "low latency: rounding of a scale": Fault("low_latency", "device/quantize.cuh", "(bits + 0x7fffff)", "bits"),
    "low latency: not counted as received": Fault(
        "low_latency", "device/low_latency.cuh", "lane < 2 &&", "lane < 1 &&"
    ),
    "low latency: a half written again too early": Fault(
        "low_latency", "device/low_latency.cuh", "is_peer && done + 2 < number", "is_peer && done + 4 < number"
    ),
    "low latency: two packed rows in one place": Fault(
        "low_latency", "layout.h", "token * bytes;", "token / 2 * bytes;"
    ),
    "permute plan: rows that come before": Fault(
        "permute", "permute_plan.cu", "before += b < block_", "before += b <= block_"
    ),
    "permute plan: tokens in words before": Fault(
        "permute", "permute_plan.cu", "for (int w = 0; w < word; ++w)", "for (int w = 1; w < word; ++w)"
    ),
    "permute plan: an expert without padding": Fault(
        "permute", "permute_plan.cu", "const int most = a_.alignment - 1;", "const int most = a_.alignment - 2;"
    ),
    "permute: an entry that nothing confirms": Fault(
        "permute", "permute_kernels.cu", "map_.recv_pair[row] == pair_of(k)", "map_.recv_pair[row] >= 0"
    ),
    "permute: a row of padding": Fault(
        "permute", "permute_kernels.cu", "is_padding = from < 0", "is_padding = from < -1"
    ),
    "permute: a row with slots in two groups": Fault(
        "permute", "permute_kernels.cu", "k < group && is_first", "k < 0 && is_first"
    ),
    "unpermute: a zero of a sum of nothing": Fault(
        "permute", "permute_kernels.cu", "terms == 0 ? Raw{} :", "terms < 0 ? Raw{} :"
    ),
    "low latency: what a pack holds": Fault(
        "low_latency", "device/packet.cuh", "{b.z, b.w, c.x, number}", "{b.z, b.w, c.y, number}"
    ),
}


def build_faulty(fault: Fault, folder: Path) -> Path:
    planted = []

    def change(path: str, text: str) -> str:
        if not path.endswith(f"/{fault.file}"):
            return text
        planted.append(fault.right in text)
        return text.replace(fault.right, fault.wrong)

    program = build(fault.program, folder, change, "-O0")
    assert planted == [True]
    return program


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Programs by their name or by that of their fault. All are built side by side, from the first question on."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = {name: pool.submit(build, name, tmp_path_factory.mktemp("emulator")) for name in CASES}
        jobs |= {n: pool.submit(build_faulty, f, tmp_path_factory.mktemp("emulator")) for n, f in FAULTS.items()}
        yield lambda name: jobs[name].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("program", CASES)
def test_random_cases(built: Callable[[str], Path], program: str) -> None:
    code, output = run(built(program), CASES[program])
    assert code == 0, output
    assert output.endswith("ok\n")


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(built: Callable[[str], Path], name: str) -> None:
    code, output = run(built(name), CASES[FAULTS[name].program], "--timeout", "10")
    assert code != 0, output
