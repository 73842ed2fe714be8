"""Times whole dispatch and combine calls against the same work written by hand, side by side in the same run.

    python benchmarks/bench.py                                  # all sizes, 2 and 4 ranks
    python benchmarks/bench.py --ranks 2 --tokens 256 8192      # some
    python benchmarks/bench.py --layout rank_major --dtype bfloat16

Prints a table; writes OUTPUT.json (every time that was taken, with command, commit and hardware) and OUTPUT.png.
benchmarks/README.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import platform as host
import shlex
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import OPS, Op, Side, TorchEP, by_hand, check_equal, random_inputs
from platforms import PLATFORMS, Platform, cores
from tqdm import tqdm

import torch_ep

SIDES = ("ours", "theirs")
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
WARM_UP = 2
# Peaks differ by a buffer where a thread of the backend frees its input late: the median tells.
PEAK_CALLS = 3
# A median of fewer says little.
MIN_ITERATIONS = 7
MIB = 2**20


def threads_of(ranks: int) -> int:
    """Threads of each rank: the cores are shared out, and no rank goes without one."""
    return max(1, cores() // ranks)


def over_ranks(value: float, op: dist.ReduceOp.RedOpType = dist.ReduceOp.MAX) -> float:
    t = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(t, op)
    return t.item()


def timed(call: Callable[[], Any], platform: Platform) -> float:
    """Seconds of one call on this rank, ranks aligned before it. Results are freed after the clock has stopped."""
    platform.synchronize()
    dist.barrier()
    start = time.perf_counter()
    result = call()
    platform.synchronize()
    seconds = time.perf_counter() - start
    del result
    return seconds


def slowest_of_each(seconds: list[float]) -> list[float]:
    """For each iteration the time of the rank that took longest, in microseconds."""
    t = torch.tensor(seconds, dtype=torch.float64) * 1e6
    dist.all_reduce(t, dist.ReduceOp.MAX)
    return [round(us, 1) for us in t.tolist()]


def traffic(side: Side, op: Op) -> dict[str, int]:
    """Bytes that the busiest rank sends: all of them, and those that leave the rank."""
    rows = side.sends(side.route())
    bytes_per_row = sum(side.bytes_per_row()[step] for step in op.steps)
    own = rows[dist.get_rank()]
    return {
        "logical_bytes": int(over_ranks(sum(rows) * bytes_per_row)),
        "wire_bytes": int(over_ranks((sum(rows) - own) * bytes_per_row)),
    }


def sides_of(rank: int, tokens: int, args: argparse.Namespace) -> dict[str, Side]:
    inputs = random_inputs(
        rank, tokens, args.hidden, args.topk, args.experts, DTYPES[args.dtype], PLATFORMS[args.device].device(rank)
    )
    return {"ours": TorchEP(inputs, args.layout), "theirs": by_hand(inputs, args.layout)}


def measure(op: Op, sides: dict[str, Side], platform: Platform, args: argparse.Namespace, bar: tqdm) -> dict[str, Any]:
    """One row of the table; the same on every rank."""
    calls = {name: op.prepare(side) for name, side in sides.items()}
    for _ in range(WARM_UP):
        pair = over_ranks(sum(timed(call, platform) for call in calls.values()))
    iterations = min(args.iterations, max(MIN_ITERATIONS, int(args.seconds / pair)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    for _ in range(iterations):
        for name, call in calls.items():  # interleaved, so that what disturbs the machine disturbs both
            seconds[name].append(timed(call, platform))
        bar.update()
    gc.enable()
    bar.update(args.iterations - iterations)
    result: dict[str, Any] = {"op": op.name, "iterations": iterations}
    for name in SIDES:
        times = slowest_of_each(seconds[name])
        result[name] = {
            "median_us": round(statistics.median(times), 1),
            "min_us": min(times),
            "max_us": max(times),
            **traffic(sides[name], op),
            "times_us": times,
        }
    result["ratio"] = round(result["ours"]["median_us"] / result["theirs"]["median_us"], 4)
    return result


def join_group(rank: int, ranks: int, port: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(threads_of(ranks))
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(PLATFORMS[args.device].backend, init_method=address, rank=rank, world_size=ranks)
    torch_ep.init()
    torch.set_grad_enabled(False)


Peaks = dict[tuple[int, str, str], int]  # of (tokens, op, side)


def measure_peaks(rank: int, ranks: int, port: int, args: argparse.Namespace, results: Connection) -> None:
    """What one rank does in the run that measures memory."""
    join_group(rank, ranks, port, args)
    platform = PLATFORMS[args.device]
    platform.prepare_peak()
    peaks: Peaks = {}
    cases = [(tokens, op) for tokens in args.tokens for op in OPS]
    for tokens, op in tqdm(cases, desc=f"{ranks} ranks, memory", disable=True if rank else None):
        for name, side in sides_of(rank, tokens, args).items():
            call = op.prepare(side)
            found = []
            for _ in range(PEAK_CALLS):
                dist.barrier()
                found.append(over_ranks(platform.peak_bytes(call)))
            peaks[tokens, op.name, name] = int(statistics.median(found))
    if rank == 0:
        results.send(peaks)
    dist.destroy_process_group()


def measure_times(
    rank: int, ranks: int, port: int, args: argparse.Namespace, results: Connection, peaks: Peaks
) -> None:
    """What one rank does in the run that measures times; rank 0 prints and sends the rows of the table."""
    join_group(rank, ranks, port, args)
    if rank == 0:
        print(HEAD, flush=True)
    total = len(args.tokens) * len(OPS) * args.iterations
    with tqdm(total=total, desc=f"{ranks} ranks, times", unit="it", disable=True if rank else None) as bar:
        for tokens in args.tokens:
            sides = sides_of(rank, tokens, args)
            check_equal(*sides.values())
            for op in OPS:
                bar.set_postfix_str(f"{tokens} tokens, {op.name}")
                row = measure(op, sides, PLATFORMS[args.device], args, bar)
                row = {"ranks": ranks, "threads": threads_of(ranks), "tokens": tokens, **row}
                for name in SIDES:
                    row[name]["peak_bytes"] = peaks[tokens, op.name, name]
                if rank == 0:
                    results.send(row)
                    tqdm.write(line(row))
    dist.destroy_process_group()


def run_ranks(fn: Callable[..., None], ranks: int, args: argparse.Namespace, *more: Any) -> list[Any]:
    """Runs `fn` on so many fresh processes; what rank 0 sent."""
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


def commit() -> str | None:
    """That of the working tree, marked where tracked files differ from it; None outside of git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno", "..") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", "benchmarks/bench.py", *args.command]),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "torch_ep": torch_ep.__version__,
        "python": host.python_version(),
        "system": f"{host.system()} {host.machine()}",
        "hardware": PLATFORMS[args.device].hardware(),
    }


HEAD = (
    f"{'':>6} {'':>5} {'':<21} | {'median us (min to max)':^55} | {'':>6} | {'peak MiB':^15} | "
    f"{'logical MiB':^15} | {'wire MiB':^15}\n"
    f"{'tokens':>6} {'ranks':>5} {'op':<21} | {'ours':^27} {'theirs':^27} | {'ratio':>6} | {'ours':>7} {'theirs':>7} | "
    f"{'ours':>7} {'theirs':>7} | {'ours':>7} {'theirs':>7}"
)


def line(row: dict[str, Any]) -> str:
    ours, theirs = (row[side] for side in SIDES)

    def times(side: dict[str, Any]) -> str:
        return f"{side['median_us']:9.0f} {'({:.0f} to {:.0f})'.format(side['min_us'], side['max_us']):<17}"

    def mib(key: str) -> str:
        return " ".join(f"{side[key] / MIB:7.2f}" for side in (ours, theirs))

    return (
        f"{row['tokens']:>6} {row['ranks']:>5} {row['op']:<21} | {times(ours):<27} {times(theirs):<27} | "
        f"{row['ratio']:6.2f} | {mib('peak_bytes')} | {mib('logical_bytes')} | {mib('wire_bytes')}"
    )


def verdict(rows: list[dict[str, Any]]) -> str:
    slower = sum(row["ratio"] > 1 for row in rows)
    larger = sum(row["ours"]["peak_bytes"] > row["theirs"]["peak_bytes"] for row in rows)
    ratios = [row["ratio"] for row in rows]
    return (
        f"{len(rows)} rows: ratio (ours / theirs) {min(ratios):.2f} to {max(ratios):.2f}, "
        f"above 1.00 in {slower}; more peak memory in {larger}"
    )


def parse(argv: list[str]) -> argparse.Namespace:
    def positive(text: str, kind: Callable[[str], Any] = int) -> Any:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
        return value

    parser = argparse.ArgumentParser(
        description="Whole dispatch and combine calls of torch_ep against permute + all_to_all_single + scatter-add.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--ranks", type=positive, nargs="+", default=[2, 4], help="processes; one run for each number")
    sizes = [256, 512, 1024, 2048, 4096, 8192]
    add("--tokens", type=positive, nargs="+", default=sizes, help="tokens of each rank")
    add("--hidden", type=positive, default=1024, help="elements of a token")
    add("--topk", type=positive, default=8, help="experts of a token")
    add("--experts", type=positive, default=64, help="experts over all ranks")
    add("--dtype", choices=DTYPES, default="float32", help="of the rows")
    add("--layout", choices=["expert_major", "rank_major"], default="expert_major", help="of the received rows")
    add("--device", choices=PLATFORMS, default="cpu", help="where the tensors are")
    add("--iterations", type=positive, default=50, help="most timed calls of a side for one row of the table")
    add(
        "--seconds",
        type=partial(positive, kind=float),
        default=3.0,
        help=f"fewer calls where a row of the table would take longer, but at least {MIN_ITERATIONS}",
    )
    output = Path(__file__).parent / "results" / "cpu"
    add("--output", type=Path, default=output, help="where the results go: .json and .png are appended")
    args = parser.parse_args(argv)
    args.command = argv
    for ranks in args.ranks:
        if ranks < 2:
            parser.error(f"--ranks: expected at least 2, got {ranks}: one rank exchanges nothing")
        if args.experts % ranks:
            parser.error(f"--experts: expected a multiple of the {ranks} ranks, got {args.experts}")
    if args.topk > args.experts:
        parser.error(f"--topk: expected at most the {args.experts} experts, got {args.topk}")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    from figure import draw  # here, not above: the ranks import this file too and draw nothing

    args.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {k: getattr(args, k) for k in ("hidden", "topk", "experts", "dtype", "layout", "device", "iterations")}
    rows = []
    for ranks in args.ranks:
        (peaks,) = run_ranks(measure_peaks, ranks, args)
        rows += run_ranks(measure_times, ranks, args, peaks)
    results = {**environment(args), "settings": settings, "rows": rows}
    print(verdict(rows))
    json_path, png_path = (Path(f"{args.output}{suffix}") for suffix in (".json", ".png"))
    json_path.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, png_path)
    print(f"wrote {json_path} and {png_path}")


if __name__ == "__main__":
    main(sys.argv[1:])
