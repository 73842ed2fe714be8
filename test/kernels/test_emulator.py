"""The nvlink kernels on a CPU, several ranks side by side: they compute the right bits.

Runs the programs of test/kernels/sanitizer, which compute-sanitizer runs on a GPU. emulator/translate.py makes C++ of
them.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from support.harness import LIMIT_S

from kernels.emulator.translate import KERNELS, ROOT, translate
from kernels.test_cuda_sources import cuda_include_folders, needs_nvcc

# CUDA's headers come with nvcc, which itself is not needed here.
pytestmark = needs_nvcc

# Random cases per program. Each program also runs some fixed ones.
CASES = {"virtual_ranks": 20, "low_latency": 16, "permute": 30}


def build(name: str, folder: Path, change: Callable[[str, str], str] = lambda name, text: text) -> Path:
    """Builds a program of test/kernels/sanitizer. `change(file name, text)` returns the text to compile."""
    source = translate(name, folder, change)
    program = folder / name
    flags = ["-x", "c++", "-std=c++20", "-O1", "-w", "-ffp-contract=off"]
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
    """A planted fault: in each line after a comment `// fault: <name>`, the expression `right` becomes `wrong`.

    `right` is a pattern, to which `wrong` may refer. Every program is built once, with all its faults, of which
    `EMULATOR_FAULT` selects one at run time.
    """

    program: str
    right: str
    wrong: str


FAULTS = {
    "plan: rows of earlier blocks": Fault("virtual_ranks", "b < block_", "b <= block_"),
    "dispatch: row count in a flag": Fault("virtual_ranks", r"static_cast<uint64_t>\(count\)", "uint64_t{1}"),
    "combine: rows of the own rank": Fault("virtual_ranks", r"terms\.own_rows", "terms.own_rows & -terms.own_rows"),
    "combine: columns of a part": Fault(
        "virtual_ranks", r"\(part \+ 1\) \* pieces\(\) / cut\.parts", "part * pieces() / cut.parts + 1"
    ),
    "dispatch: flag before its rows": Fault("virtual_ranks", r"bulk_wait<1>\(\)", "void()"),
    "dispatch: stage reused too early": Fault(
        "virtual_ranks", r"bulk_wait_read<(\d)>\(\)", r"bulk_wait_read<\1 + 1>()"
    ),
    "dispatch: chunk that no warp takes": Fault(
        "virtual_ranks", r"receivers_ (?=\+ int64_t)(.*)(?= :)", r"receivers_ + 1 \1"
    ),
    "combine: only the first part awaited": Fault("virtual_ranks", r"columns\.end - 1", "columns.begin"),
    "combine: rows read before they arrive": Fault(
        "virtual_ranks", r"copy_wait<kDepth - 1>\(\)", "copy_wait<kDepth>()"
    ),
    "low latency: flag before its row": Fault("low_latency", r"bulk_wait<1>\(\)", "void()"),
    "low latency: doubled expert": Fault("low_latency", r"visited \|= (.*)(?=;)", r"visited += \1"),
    "rows written without a credit": Fault("virtual_ranks", r"(?<=return ).* >= last", "true"),
    "skipped epoch": Fault("virtual_ranks", r"x\.epoch", "x.epoch + 1"),
    "low latency: rows of earlier ranks": Fault("low_latency", r"count\(s, expert\)", "1"),
    "low latency: scale not rounded up": Fault("low_latency", r"\(bits \+ 0x7fffff\)", "bits"),
    "low latency: receive not counted": Fault("low_latency", "lane < 2", "lane < 1"),
    "low latency: half reused too early": Fault("low_latency", r"done \+ 2", "done + 4"),
    "low latency: two inline rows in one place": Fault("low_latency", r"token \* bytes", "token / 2 * bytes"),
    "low latency: contents of a packet": Fault("low_latency", r"c\.x", "c.y"),
    "permute plan: rows of earlier blocks": Fault("permute", "b < block_", "b <= block_"),
    "permute plan: tokens of earlier words": Fault("permute", "(?<=w = )0", "1"),
    "permute plan: expert without padding": Fault("permute", r"a_\.alignment - 1", "a_.alignment - 2"),
    "permute: unconfirmed pair": Fault(
        "permute", r"map_\.recv_pair\[row\] == pair_of\(k\)", "map_.recv_pair[row] >= 0"
    ),
    "permute: padding row": Fault("permute", "from < 0", "from < -1"),
    "permute: row with slots in two groups": Fault("permute", "k < group", "k < 0"),
    "unpermute: zero of an empty sum": Fault("permute", "terms == 0", "terms < 0"),
}


def plant_all(program: str) -> Callable[[str, str], str]:
    """The argument `change` of `build` that plants every fault of a program. A number in FAULTS selects one."""

    def change(path: str, text: str) -> str:
        for number, (name, fault) in enumerate(FAULTS.items()):
            if fault.program != program:
                continue
            choice = rf"(emulator::is_planted({number}) ? ({fault.wrong}) : (\g<0>))"
            for line in re.findall(rf"(?<=// fault: {name}\n).*", text):
                planted, count = re.subn(fault.right, choice, line)
                assert count == 1, f"{name}: {count} places in {path}: {line}"
                text = text.replace(f"// fault: {name}\n{line}", f"// fault: {name}\n{planted}")
        return text

    return change


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Returns a program by name. All programs build side by side."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = {n: pool.submit(build, n, tmp_path_factory.mktemp("emulator"), plant_all(n)) for n in CASES}
        yield lambda name: jobs[name].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("program", CASES)
def test_random_cases(built: Callable[[str], Path], program: str) -> None:
    code, output = run(built(program), CASES[program])
    assert code == 0, output
    assert output.endswith("ok\n")


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("EMULATOR_FAULT", str(list(FAULTS).index(name)))
    program = FAULTS[name].program
    code, output = run(built(program), CASES[program], "--timeout", "10")
    assert code != 0, output


def test_every_marker_has_its_fault() -> None:
    """A marker without a fault tests nothing."""
    sources = [p for p in (ROOT / KERNELS).rglob("*") if p.suffix in (".cu", ".cuh", ".h")]
    marked = {name for path in sources for name in re.findall(r"// fault: (.*)", path.read_text())}
    assert marked == FAULTS.keys()
