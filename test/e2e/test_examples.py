"""The numbered examples run as they say: alone and on two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {"01_dispatch_combine": [], "02_moe_layer": ["--steps", "6", "--backend", "aot_eager"], "03_decode": []}


def output(command: list[str]) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_numbered_example_is_here() -> None:
    assert sorted(EXAMPLES) == sorted(p.stem for p in (ROOT / "examples").glob("[0-9]*.py"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_on_two_ranks(name: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    printed = output([*launcher, str(ROOT / "examples" / f"{name}.py"), *EXAMPLES[name]])
    if name == "02_moe_layer":
        losses = [float(line.split("loss ")[1].split(",")[0]) for line in printed.splitlines()]
        assert losses[-1] < losses[0]
    else:
        assert "rank 0:" in printed and "rank 1:" in printed


def test_example_alone() -> None:
    assert "rank 0: 16 tokens left for [16] rows per rank" in output(
        [str(ROOT / "examples" / "01_dispatch_combine.py")]
    )
