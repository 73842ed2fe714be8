"""`bench.py --device cpu`: time and memory of dispatch and combine against the baseline."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import OPS, Op, Side, TorchEP, check_equal, make_baseline, random_inputs
from platforms import PLATFORMS, Platform, cores
from ranks import over_ranks, run_ranks, spread, summary
from tqdm import tqdm

import torch_ep

SIDES = ("ours", "baseline")
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
WARM_UP = 2
# A thread of gloo may free its input late, which adds a buffer to a peak: take the median.
PEAK_CALLS = 3
MIN_ITERATIONS = 7
MIB = 2**20


def threads_of(ranks: int) -> int:
    """Threads per rank: cores / ranks, at least 1."""
    return max(1, cores() // ranks)


def timed(call: Callable[[], Any], platform: Platform) -> float:
    """Seconds per call on this rank. Ranks meet at a barrier first; results are freed after the clock has stopped."""
    platform.synchronize()
    dist.barrier()
    start = time.perf_counter()
    result = call()
    platform.synchronize()
    seconds = time.perf_counter() - start
    del result
    return seconds


def traffic(side: Side, op: Op) -> dict[str, int]:
    """Bytes that the busiest rank sends: with (logical) and without (wire) the rows that stay on it."""
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
    return {"ours": TorchEP(inputs, args.layout), "baseline": make_baseline(inputs, args.layout)}


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
        for name, call in calls.items():  # alternating, so that a disturbance of the machine affects both sides
            seconds[name].append(timed(call, platform))
        bar.update()
    gc.enable()
    bar.update(args.iterations - iterations)
    result: dict[str, Any] = {"op": op.name, "iterations": iterations}
    for name in SIDES:
        result[name] = {**summary([s * 1e6 for s in seconds[name]]), **traffic(sides[name], op)}
    result["ratio"] = round(result["ours"]["median_us"] / result["baseline"]["median_us"], 4)
    return result


def join_group(rank: int, ranks: int, port: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(threads_of(ranks))
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(PLATFORMS[args.device].backend, init_method=address, rank=rank, world_size=ranks)
    torch_ep.init()
    torch.set_grad_enabled(False)


Peaks = dict[tuple[int, str, str], int]  # bytes by (tokens, op, side)


def measure_peaks(rank: int, ranks: int, port: int, args: argparse.Namespace, results: Connection) -> None:
    """One rank of the run that measures memory. Rank 0 sends the peaks to `results`."""
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
    """One rank of the run that measures times. Rank 0 prints the rows of the table and sends them to `results`."""
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


HEAD = (
    f"{'':>6} {'':>5} {'':<21} | {'median us (p5 to p95)':^55} | {'':>6} | {'peak MiB':^15} | "
    f"{'logical MiB':^15} | {'wire MiB':^15}\n"
    f"{'tokens':>6} {'ranks':>5} {'op':<21} | {'ours':^27} {'baseline':^27} | {'ratio':>6} | {'ours':>7} {'base':>7} | "
    f"{'ours':>7} {'base':>7} | {'ours':>7} {'base':>7}"
)


def line(row: dict[str, Any]) -> str:
    ours, baseline = (row[side] for side in SIDES)

    def times(side: dict[str, Any]) -> str:
        return f"{side['median_us']:9.0f} {spread(side):<17}"

    def mib(key: str) -> str:
        return " ".join(f"{side[key] / MIB:7.2f}" for side in (ours, baseline))

    return (
        f"{row['tokens']:>6} {row['ranks']:>5} {row['op']:<21} | {times(ours):<27} {times(baseline):<27} | "
        f"{row['ratio']:6.2f} | {mib('peak_bytes')} | {mib('logical_bytes')} | {mib('wire_bytes')}"
    )


def verdict(rows: list[dict[str, Any]]) -> str:
    slower = sum(row["ratio"] > 1 for row in rows)
    larger = sum(row["ours"]["peak_bytes"] > row["baseline"]["peak_bytes"] for row in rows)
    ratios = [row["ratio"] for row in rows]
    return (
        f"{len(rows)} rows: ratio (ours / baseline) {min(ratios):.2f} to {max(ratios):.2f}, "
        f"above 1.00 in {slower}; more peak memory in {larger}"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The results, except what `ranks.environment` adds."""
    rows = []
    for ranks in args.ranks:
        (peaks,) = run_ranks(measure_peaks, ranks, args)
        rows += run_ranks(measure_times, ranks, args, peaks)
    settings = {k: getattr(args, k) for k in ("hidden", "topk", "experts", "dtype", "layout", "device", "iterations")}
    return {"hardware": PLATFORMS[args.device].hardware(), "settings": settings, "rows": rows}


def draw(results: dict[str, Any], path: Path) -> None:
    from figure import draw_cpu  # imported here: the ranks import this file and draw nothing

    draw_cpu(results, path)
