"""Shared by the benchmarks: one process per rank, statistics over ranks, origin and files of results."""

from __future__ import annotations

import contextlib
import datetime
import json
import platform as host
import shlex
import socket
import subprocess
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import torch_ep


def run_ranks(fn: Callable[..., None], ranks: int, args: Namespace, *more: Any) -> list[Any]:
    """Runs `fn(rank, ranks, port, args, results, *more)` in one new process per rank.

    Returns:
        The objects that rank 0 sent to the pipe `results`.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    receiver, sender = Pipe(duplex=False)
    context = mp.spawn(fn, (ranks, port, args, sender, *more), nprocs=ranks, join=False)
    sender.close()
    received = []
    try:
        ended = False
        while not ended:
            ended = context.join(timeout=0.1)  # ends the other ranks, then raises the error of the rank that failed
            with contextlib.suppress(EOFError):  # rank 0 has ended
                while receiver.poll():
                    received.append(receiver.recv())
    finally:
        for process in context.processes:
            process.kill()
    return received


def over_ranks(value: float, op: dist.ReduceOp.RedOpType = dist.ReduceOp.MAX) -> float:
    """Reduces a number over all ranks. Collective."""
    t = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(t, op)
    return t.item()


def summary(times_us: list[float]) -> dict[str, float]:
    """Statistics of the slowest rank's time per iteration, given this rank's times. Collective."""
    t = torch.tensor(times_us, dtype=torch.float64)
    dist.all_reduce(t, dist.ReduceOp.MAX)
    return statistics_of(t.tolist())


QUANTILES = {"median_us": 0.5, "p5_us": 0.05, "p95_us": 0.95, "min_us": 0.0, "max_us": 1.0}


def statistics_of(times_us: list[float]) -> dict[str, float]:
    """Microseconds, rounded to a tenth."""
    quantiles = torch.tensor(times_us, dtype=torch.float64).quantile(torch.tensor([*QUANTILES.values()]).double())
    return {name: round(us, 1) for name, us in zip(QUANTILES, quantiles.tolist(), strict=True)}


def spread(times: dict[str, float], digits: int = 0) -> str:
    """The 5th and the 95th percentile, for a table."""
    return f"({times['p5_us']:.{digits}f} to {times['p95_us']:.{digits}f})"


def write_results(output: Path, results: dict[str, Any]) -> Path:
    """Writes OUTPUT.json, one line per row of each table; returns its path."""

    def dump(value: Any) -> str:
        if isinstance(value, list) and value:
            return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        return json.dumps(value)

    path = Path(f"{output}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "{\n" + ",\n".join(f" {json.dumps(key)}: {dump(value)}" for key, value in results.items()) + "\n}\n"
    )
    return path


def positive(text: str, kind: Callable[[str], Any] = int) -> Any:
    """A type for argparse."""
    value = kind(text)
    if value <= 0:
        raise ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def commit() -> str | None:
    """The commit of the working tree, with "-dirty" if tracked files differ from it; None outside of git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno", "..") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(script: str, arguments: list[str]) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", f"benchmarks/{script}", *arguments]),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "torch_ep": torch_ep.__version__,
        "python": host.python_version(),
        "system": f"{host.system()} {host.machine()}",
    }
