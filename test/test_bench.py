"""The benchmark: a tiny run from command line to figure, and that its checks and its count of memory can be trusted."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import world

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
RANKS, TOKENS, HIDDEN, TOPK = 2, [16, 32], 24, 2
MIB = 2**20


def module(name: str) -> Any:
    """A module of the benchmark, which is no package. Also called on the ranks."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "bench.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("bench") / "new" / "tiny"
    sizes = f"--hidden {HIDDEN} --topk {TOPK} --experts 4 --iterations 3".split()
    arguments = ["--ranks", str(RANKS), "--tokens", *map(str, TOKENS), *sizes, "--output", str(output)]
    done = bench(*arguments)
    assert done.returncode == 0, done.stderr
    return {"stdout": done.stdout, "results": json.loads(output.with_suffix(".json").read_text()), "output": output}


def test_results_have_a_row_for_every_case(run: dict[str, Any]) -> None:
    got = [(row["ranks"], row["tokens"], row["op"]) for row in run["results"]["rows"]]
    ops = ["dispatch", "dispatch, cached plan", "combine"]
    assert got == [(RANKS, tokens, op) for tokens in TOKENS for op in ops]


def test_table_shows_the_rows_of_the_results(run: dict[str, Any]) -> None:
    for row in run["results"]["rows"]:
        start = f"{row['tokens']:>6} {row['ranks']:>5} {row['op']:<21} |"
        (line,) = (line for line in run["stdout"].splitlines() if line.startswith(start))
        assert f"| {row['ratio']:6.2f} |" in line


def test_ratio_is_that_of_the_medians_of_the_raw_times(run: dict[str, Any]) -> None:
    for row in run["results"]["rows"]:
        medians = [torch.tensor(row[side]["times_us"], dtype=torch.float64).median() for side in ("ours", "theirs")]
        assert len(row["ours"]["times_us"]) == len(row["theirs"]["times_us"]) == row["iterations"] == 3
        assert row["ratio"] == pytest.approx(float(medians[0] / medians[1]), rel=0.01)


def test_results_say_how_they_came_about(run: dict[str, Any]) -> None:
    results = run["results"]
    assert {"command", "commit", "date", "torch", "hardware", "settings"} <= results.keys()
    assert results["command"].startswith("python benchmarks/bench.py --ranks 2 --tokens 16 32")
    assert results["hardware"]["cores"] > 0
    assert results["hardware"]["cpu"]


def test_bytes_count_a_row_a_rank_for_us_and_a_row_a_pair_for_them(run: dict[str, Any]) -> None:
    for row in run["results"]["rows"]:
        if row["op"] == "combine":
            pairs = row["tokens"] * TOPK
            assert row["theirs"]["logical_bytes"] == pairs * HIDDEN * 4
            assert row["tokens"] * HIDDEN * 4 <= row["ours"]["logical_bytes"] <= pairs * HIDDEN * 4
        for side in ("ours", "theirs"):
            assert 0 < row[side]["wire_bytes"] < row[side]["logical_bytes"]


def test_figure_is_a_readable_png(run: dict[str, Any]) -> None:
    import matplotlib.image

    picture = matplotlib.image.imread(run["output"].with_suffix(".png"))
    assert min(picture.shape[:2]) > 600
    assert picture[..., :3].std() > 0.01  # not blank


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ranks", "3"], "expected a multiple of the 3 ranks, got 64"),
        (["--ranks", "1"], "expected at least 2, got 1"),
        (["--topk", "65"], "expected at most the 64 experts, got 65"),
        (["--tokens", "0"], "expected a positive number, got 0"),
        (["--seconds", "0"], "expected a positive number, got 0"),
    ],
    ids=["experts", "ranks", "topk", "tokens", "seconds"],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module("bench").parse(arguments)
    assert message in capsys.readouterr().err


def _peak(rank: int, world_size: int) -> int:
    def call() -> torch.Tensor:
        first = torch.ones(8 * MIB, dtype=torch.uint8)
        second = torch.ones(16 * MIB, dtype=torch.uint8)
        del first
        third = torch.ones(24 * MIB, dtype=torch.uint8)
        del second
        return third

    platform = module("platforms").PLATFORMS["cpu"]
    platform.prepare_peak()
    platform.peak_bytes(call)  # so that what it needs only once is there
    return platform.peak_bytes(call)


def test_peak_counts_what_lives_at_one_time() -> None:
    for peak in world(RANKS).run(_peak):
        # The kernel counts resident pages for each core apart and adds them up late: some MiB with many cores.
        assert peak == pytest.approx(40 * MIB, abs=4 * MIB)


def _sides(rank: int, layout: str, dtype: torch.dtype) -> tuple[Any, Any]:
    cases = module("cases")
    inputs = cases.random_inputs(rank, 12, 16, 3, 8, dtype, torch.device("cpu"))
    return cases.TorchEP(inputs, layout), cases.by_hand(inputs, layout)


def _check(rank: int, world_size: int, layout: str, dtype: torch.dtype) -> None:
    module("cases").check_equal(*_sides(rank, layout, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["expert_major", "rank_major"])
def test_both_sides_give_the_same(layout: str, dtype: torch.dtype) -> None:
    world(RANKS).run(_check, layout, dtype)


def _check_with_a_wrong_side(rank: int, world_size: int, layout: str, step: str) -> str:
    ours, theirs = _sides(rank, layout, torch.float32)
    right = getattr(theirs, step)

    def wrong(*args: Any) -> Any:
        result = right(*args)
        (result.rows if step == "dispatch" else result)[-1, -1] += 1
        return result

    setattr(theirs, step, wrong)
    try:
        module("cases").check_equal(ours, theirs)
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("step", ["dispatch", "combine"])
@pytest.mark.parametrize("layout", ["expert_major", "rank_major"])
def test_a_side_that_is_wrong_in_one_number_is_not_timed(layout: str, step: str) -> None:
    for error in world(RANKS).run(_check_with_a_wrong_side, layout, step):
        assert error.startswith(f"{step}:")
