"""What the benchmarks share: a process for each rank, times over ranks, and what a run says about itself."""

from __future__ import annotations

import contextlib
import datetime
import platform as host
import shlex
import socket
import statistics
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
    """Runs `fn(rank, ranks, port, args, results, *more)` on so many fresh processes; what rank 0 sent to `results`."""
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
            ended = context.join(timeout=0.1)  # raises what a rank raised, after it has ended the others
            with contextlib.suppress(EOFError):  # of a rank 0 that ended
                while receiver.poll():
                    received.append(receiver.recv())
    finally:
        for process in context.processes:
            process.kill()
    return received


def over_ranks(value: float, op: dist.ReduceOp.RedOpType = dist.ReduceOp.MAX) -> float:
    t = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(t, op)
    return t.item()


def summary(times_us: list[float]) -> dict[str, Any]:
    """Of this rank's times, the same on every rank: for each iteration the time of the rank that took longest."""
    t = torch.tensor(times_us, dtype=torch.float64)
    dist.all_reduce(t, dist.ReduceOp.MAX)
    return statistics_of([round(us, 1) for us in t.tolist()])


def statistics_of(times_us: list[float]) -> dict[str, Any]:
    return {
        "median_us": round(statistics.median(times_us), 1),
        "min_us": min(times_us),
        "max_us": max(times_us),
        "times_us": times_us,
    }


def positive(text: str, kind: Callable[[str], Any] = int) -> Any:
    """A type for argparse."""
    value = kind(text)
    if value <= 0:
        raise ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def commit() -> str | None:
    """That of the working tree, marked where tracked files differ from it; None outside of git."""

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
