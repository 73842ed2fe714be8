"""`bench.py --device cuda`: every op over the GPUs of this host, against NCCL and the link rate."""

from __future__ import annotations

import argparse
import gc
import math
import os
import subprocess
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from cases import BaselinePairs, BaselineRankMajor, TorchEP, check_equal, random_inputs
from platforms import cores
from ranks import over_ranks, run_ranks, spread, summary
from torch import Tensor
from tqdm import tqdm

import torch_ep

# GB/s per GPU and direction, all GPUs at once: bulk copies of 14336 B rows to peers, 4 x H200, 64 to 128 SMs.
LINK_GBS = 345.0
SCALE_BLOCK = 128  # elements per fp8 scale
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
WARM_UP = 10
# Decoding does not replay larger batches from graphs, and a capacity that drops nothing costs more there.
MOST_GRAPH_TOKENS = 512
L2_BYTES = 256 * 2**20  # several times the L2 cache of any GPU
# About 500 us at 2 GHz: longer than the host needs to issue a call.
HEAD_START_CYCLES = 1_000_000
TIMEOUT = timedelta(minutes=2)
SIDES = ("ours", "baseline", "nccl")


class Stopwatch:
    """Times a call on the device: the ranks meet on the device first, the host runs ahead. Collective."""

    def __init__(self, device: torch.device) -> None:
        self.l2 = torch.empty(L2_BYTES, dtype=torch.uint8, device=device)
        self.signals = symm_mem.empty(1, dtype=torch.int32, device=device)
        self.meeting = symm_mem.rendezvous(self.signals, dist.group.WORLD.group_name)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Callable[[], Any], flush: bool = True) -> float:
        """Microseconds on this rank. Results are freed after the clock has stopped.

        Args:
            call: timed once.
            flush: overwrites L2 first; False: makes the same call first, untimed.
        """
        if flush:
            self.l2.zero_()
        else:
            call()
        torch.cuda._sleep(HEAD_START_CYCLES)
        self.meeting.barrier()
        self.start.record()
        result = call()
        self.end.record()
        self.end.synchronize()
        del result
        return self.start.elapsed_time(self.end) * 1e3


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """A function that replays `call` from a CUDA graph. The next replay overwrites its result."""
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog thread makes CUDA calls of its own: they must not end the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [tokens, hidden] as float8_e4m3fn, and its scales [tokens, hidden / 128] float32, to multiply by."""
    blocks = x.float().view(len(x), -1, SCALE_BLOCK)
    scales = blocks.abs().amax(2).clamp_min(1e-4) / FP8_MAX
    return (blocks / scales[..., None]).to(torch.float8_e4m3fn).view(x.shape), scales


class Case:
    """One routing and one batch on this rank, for both sides."""

    def __init__(self, rank: int, ranks: int, tokens: int, args: argparse.Namespace, device: torch.device) -> None:
        self.inputs = random_inputs(rank, tokens, args.hidden, args.topk, args.experts, torch.bfloat16, device)
        self.fp8, self.scales = quantize(self.inputs.x)
        self.baseline = BaselinePairs(self.inputs)
        # Rows move as bits, and gathers are faster in words.
        self.baseline_fp8 = BaselinePairs(self.inputs._replace(x=self.fp8.view(torch.int32)), self.scales)
        self.rank, self.capacity = rank, ranks * tokens  # drops nothing

    def plan(self, layout: torch_ep.Layout = "rank_major", capacity: int | None = None) -> torch_ep.Plan:
        return torch_ep.plan(self.inputs.topk_idx, self.inputs.num_experts, layout=layout, capacity=capacity)

    def dispatch(self, plan: torch_ep.Plan) -> tuple[Tensor, Tensor]:
        return torch_ep.dispatch(self.inputs.x, plan, topk_weights=self.inputs.topk_weights)

    def dispatch_fp8(self, plan: torch_ep.Plan) -> tuple[Tensor, Tensor, Tensor]:
        return torch_ep.dispatch(self.fp8, plan, topk_weights=self.inputs.topk_weights, scales=self.scales)


class Calls(NamedTuple):
    """The timed calls of this rank."""

    ours: Callable[[], Any]
    baseline: Callable[[], Any]


def _plan(case: Case, capacity: bool) -> Calls:
    return Calls(partial(case.plan, capacity=case.capacity if capacity else None), case.baseline.route)


def _busiest_rows(case: Case, layout: torch_ep.Layout) -> int:
    """Rows of the rank that receives most: the least capacity that drops nothing. Collective."""
    return int(over_ranks(case.plan(layout).num_rows))


def _dispatch(case: Case, layout: torch_ep.Layout, capacity: bool = False) -> Calls:
    rows = _busiest_rows(case, layout) if capacity else None
    return Calls(
        lambda: case.dispatch(case.plan(layout, rows)),
        lambda: case.baseline.dispatch(case.baseline.route()),
    )


def _dispatch_cached(case: Case, layout: torch_ep.Layout) -> Calls:
    plan, routing = case.plan(layout), case.baseline.route()
    return Calls(lambda: case.dispatch(plan), lambda: case.baseline.dispatch(routing))


def _dispatch_fp8(case: Case, capacity: bool = False) -> Calls:
    rows = _busiest_rows(case, "rank_major") if capacity else None
    return Calls(
        lambda: case.dispatch_fp8(case.plan(capacity=rows)),
        lambda: case.baseline_fp8.dispatch(case.baseline_fp8.route()),
    )


def _dispatch_fp8_cached(case: Case) -> Calls:
    plan, routing = case.plan(), case.baseline_fp8.route()
    return Calls(lambda: case.dispatch_fp8(plan), lambda: case.baseline_fp8.dispatch(routing))


def _combine(case: Case, layout: torch_ep.Layout, weighted: bool) -> Calls:
    plan, routing = case.plan(layout), case.baseline.route()
    rows, weights = case.dispatch(plan)
    received = case.baseline.dispatch(routing)
    return Calls(
        lambda: torch_ep.combine(rows, plan, row_weights=weights if weighted else None),
        lambda: case.baseline.combine(received.rows, received, routing),
    )


def _graph(case: Case) -> Calls:
    def pair(capacity: int | None) -> Tensor:
        plan = case.plan(capacity=capacity)
        return torch_ep.combine(case.dispatch(plan)[0], plan)

    def baseline() -> Tensor:
        routing = case.baseline.route()
        received = case.baseline.dispatch(routing)
        return case.baseline.combine(received.rows, received, routing)

    ours = captured(partial(pair, case.capacity))
    if not torch.equal(ours(), pair(None)):
        raise RuntimeError("graph: the replay returned other sums than the eager calls")
    return Calls(ours, baseline)


class Op(NamedTuple):
    """A row of the table."""

    title: str
    prepare: Callable[[Case], Calls]
    row_bytes: Callable[[int], int]  # wire bytes per row, of the hidden size, without indices and weights
    exchanges: int = 1  # per call
    in_graph: bool = False


def bf16_bytes(hidden: int) -> int:
    return 2 * hidden


def fp8_bytes(hidden: int) -> int:
    return hidden + hidden // SCALE_BLOCK * 4


def _no_bytes(hidden: int) -> int:
    return 0


OPS = {
    "dispatch": Op("bf16, rank_major, exact plan included", partial(_dispatch, layout="rank_major"), bf16_bytes),
    "dispatch-capacity": Op(
        "bf16, rank_major, plan with a capacity included",
        partial(_dispatch, layout="rank_major", capacity=True),
        bf16_bytes,
    ),
    "dispatch-cached": Op("bf16, rank_major, cached plan", partial(_dispatch_cached, layout="rank_major"), bf16_bytes),
    "dispatch-fp8": Op("fp8 and scales, rank_major, exact plan included", _dispatch_fp8, fp8_bytes),
    "dispatch-fp8-capacity": Op(
        "fp8 and scales, rank_major, plan with a capacity included", partial(_dispatch_fp8, capacity=True), fp8_bytes
    ),
    "dispatch-fp8-cached": Op("fp8 and scales, rank_major, cached plan", _dispatch_fp8_cached, fp8_bytes),
    "dispatch-expert": Op(
        "bf16, expert_major, exact plan included", partial(_dispatch, layout="expert_major"), bf16_bytes
    ),
    "dispatch-expert-capacity": Op(
        "bf16, expert_major, plan with a capacity included",
        partial(_dispatch, layout="expert_major", capacity=True),
        bf16_bytes,
    ),
    "dispatch-expert-cached": Op(
        "bf16, expert_major, cached plan", partial(_dispatch_cached, layout="expert_major"), bf16_bytes
    ),
    "combine": Op("bf16, rank_major", partial(_combine, layout="rank_major", weighted=False), bf16_bytes),
    "combine-expert": Op("bf16, expert_major", partial(_combine, layout="expert_major", weighted=False), bf16_bytes),
    "combine-weighted": Op(
        "bf16, expert_major, row_weights", partial(_combine, layout="expert_major", weighted=True), bf16_bytes
    ),
    "plan": Op("exact, rank_major", partial(_plan, capacity=False), _no_bytes),
    "plan-capacity": Op("capacity, rank_major", partial(_plan, capacity=True), _no_bytes),
    "graph": Op(
        f"plan with capacity, dispatch and combine in a CUDA graph, to {MOST_GRAPH_TOKENS} tokens",
        _graph,
        bf16_bytes,
        exchanges=2,
        in_graph=True,
    ),
}


def ops_for(tokens: int, names: Sequence[str]) -> list[str]:
    return [name for name in names if not OPS[name].in_graph or tokens <= MOST_GRAPH_TOKENS]


def check(case: Case) -> None:
    """Raises RuntimeError or AssertionError unless both sides return the same, fp8 included. Collective."""
    check_equal(TorchEP(case.inputs, "expert_major"), case.baseline)
    baseline = BaselineRankMajor(case.inputs)
    check_equal(TorchEP(case.inputs, "rank_major"), baseline)
    rows, _, scales = case.dispatch_fp8(case.plan())
    routing = baseline.route()
    for name, got, sent in (
        ("rows", rows.view(torch.int32), case.baseline_fp8.inputs.x),
        ("scales", scales, case.scales),
    ):
        want = BaselineRankMajor(case.inputs._replace(x=sent)).dispatch(routing).rows
        if not torch.equal(got, want):
            raise RuntimeError(f"dispatch-fp8: the two sides returned different {name}")


def busiest(send: Sequence[int], recv: Sequence[int], rank: int) -> tuple[int, int]:
    """Rows in the busier direction of this rank: all of them, and those from or to other ranks."""
    return max(sum(send), sum(recv)), max(sum(send) - send[rank], sum(recv) - recv[rank])


def floor_us(wire_bytes: int, link_gbs: float) -> float:
    return wire_bytes / link_gbs / 1e3


def equal_splits(wire_bytes: Sequence[int], ranks: int, device: torch.device) -> Callable[[], Any]:
    """The best case of NCCL: one `all_to_all_single` per number of bytes, without permutation, counts or allocation."""
    chunks = [math.ceil(exchanged / (ranks - 1) / 16) * 16 for exchanged in wire_bytes]
    sent, received = (torch.empty(ranks * max(chunks), dtype=torch.uint8, device=device) for _ in range(2))

    def call() -> None:
        for chunk in chunks:
            dist.all_to_all_single(received[: ranks * chunk], sent[: ranks * chunk])

    return call


def alternate(timers: dict[str, Callable[[], float]], iterations: int, bar: tqdm) -> dict[str, dict[str, Any]]:
    """Summaries of the times that the timers return. They alternate, so that a disturbance affects all. Collective."""
    for _ in range(WARM_UP):
        for timer in timers.values():
            timer()
    times: dict[str, list[float]] = {name: [] for name in timers}
    gc.collect()
    gc.disable()
    for _ in range(iterations):
        for name, timer in timers.items():
            times[name].append(timer())
        bar.update()
    gc.enable()
    return {name: summary(t) for name, t in times.items()}


def row(
    op: str, ranks: int, tokens: int, logical_bytes: int, wire_bytes: int, link_gbs: float, times: dict[str, Any]
) -> dict[str, Any]:
    """A row of the table, given the summary of each side. A plan moves no rows, so it has no rates and no floor."""
    us = times["ours"]["median_us"]
    floor = floor_us(wire_bytes, link_gbs) if wire_bytes else None
    return {
        "ranks": ranks,
        "tokens": tokens,
        "op": op,
        "logical_bytes": logical_bytes,
        "wire_bytes": wire_bytes,
        "logical_gbs": round(logical_bytes / us / 1e3, 1) if wire_bytes else None,
        "wire_gbs": round(wire_bytes / us / 1e3, 1) if wire_bytes else None,
        "floor_us": None if floor is None else round(floor, 2),
        "floor_ratio": None if floor is None else round(us / floor, 3),
        "ratio": round(us / times["baseline"]["median_us"], 4),
        "nccl_ratio": round(us / times["nccl"]["median_us"], 4) if "nccl" in times else None,
        **times,
    }


def measure(name: str, case: Case, stopwatch: Stopwatch, ranks: int, args: argparse.Namespace, bar: tqdm) -> dict:
    """One row of the table; the same on every rank."""
    op, rank, device = OPS[name], case.rank, case.inputs.x.device
    plan = case.plan()
    bytes_per_row = op.row_bytes(args.hidden) * op.exchanges
    counts = busiest(plan.send_counts.tolist(), plan.recv_counts.tolist(), rank)
    logical, wire = (int(over_ranks(rows)) * bytes_per_row for rows in counts)
    calls: dict[str, Callable[[], Any]] = op.prepare(case)._asdict()
    if wire:
        splits = equal_splits([wire // op.exchanges] * op.exchanges, ranks, device)
        calls["nccl"] = captured(splits) if op.in_graph else splits
    times = alternate({side: partial(stopwatch, call) for side, call in calls.items()}, args.iterations, bar)
    return row(name, ranks, len(case.inputs.x), logical, wire, args.link_gbs, times)


def join_group(rank: int, ranks: int, port: int, timeout: timedelta = TIMEOUT) -> torch.device:
    """Joins the default group, one process per GPU: NCCL for CUDA tensors, gloo for CPU tensors."""
    # Nothing here uses NVLink multicast, and its set-up fails on hosts that do not allow it.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    torch.set_num_threads(max(1, cores() // ranks))
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=address, rank=rank, world_size=ranks, timeout=timeout)
    return device


def hardware() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = None
    return {
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "driver": driver,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "cores": cores(),
    }


def describe(communicator: torch_ep.Communicator) -> dict[str, Any]:
    return {name: getattr(communicator, name) for name in ("backend", "reason", "symmetric_bytes", "num_sms")}


def measure_ranks(rank: int, ranks: int, port: int, args: argparse.Namespace, results: Connection) -> None:
    """One rank of a run. Rank 0 prints, and sends (hardware, communicator) and then the rows to `results`."""
    device = join_group(rank, ranks, port)
    torch.set_grad_enabled(False)
    communicator = torch_ep.init(
        max_tokens_per_rank=max(args.tokens),
        hidden=args.hidden,
        num_topk=args.topk,
        num_experts=args.experts,
        timeout=TIMEOUT,
        backend="nvlink",
        num_sms=args.num_sms,
    )
    stopwatch = Stopwatch(device)
    if rank == 0:
        about = hardware()
        results.send((about, describe(communicator)))
        print(
            f"{ranks} x {about['gpus'][0]}, {communicator.num_sms} SMs, "
            f"{communicator.symmetric_bytes / 2**20:.0f} MiB of symmetric memory per rank\n{HEAD}",
            flush=True,
        )
    cases = [(tokens, name) for tokens in args.tokens for name in ops_for(tokens, args.ops)]
    total = len(cases) * args.iterations
    with tqdm(total=total, desc=f"{ranks} GPUs", unit="it", disable=True if rank else None) as bar:
        case = None
        for tokens, name in cases:
            bar.set_postfix_str(f"{tokens} tokens, {name}")
            if case is None or tokens != len(case.inputs.x):
                case = Case(rank, ranks, tokens, args, device)
                check(case)
            measured = measure(name, case, stopwatch, ranks, args, bar)
            if rank == 0:
                results.send(measured)
                tqdm.write(line(measured))
    torch_ep.destroy()
    dist.destroy_process_group()


OP_WIDTH = max(map(len, OPS))
HEAD = (
    f"{'':>6} {'':>5} {'':<{OP_WIDTH}} | {'torch_ep, us':^27} | {'GB/s':^13} | {'floor':^14} | {'baseline':^15} | "
    f"{'equal splits':^15}\n"
    f"{'tokens':>6} {'ranks':>5} {'op':<{OP_WIDTH}} | {'median':>9} {'(p5 to p95)':<17} | {'logical':>7} {'wire':>5} "
    f"| {'us':>7} {'ratio':>6} | {'us':>8} {'ratio':>6} | {'us':>8} {'ratio':>6}"
)


def line(row: dict[str, Any]) -> str:
    def number(value: float | None, width: int, digits: int) -> str:
        return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"

    ours = row["ours"]
    us = f"{ours['median_us']:9.1f} {spread(ours, 1):<17}"
    baseline = f"{row['baseline']['median_us']:8.1f} {row['ratio']:6.2f}"
    nccl = row["nccl"]["median_us"] if "nccl" in row else None
    return (
        f"{row['tokens']:>6} {row['ranks']:>5} {row['op']:<{OP_WIDTH}} | {us} | "
        f"{number(row['logical_gbs'], 7, 0)} {number(row['wire_gbs'], 5, 0)} | "
        f"{number(row['floor_us'], 7, 1)} {number(row['floor_ratio'], 6, 2)} | "
        f"{baseline} | {number(nccl, 8, 1)} {number(row['nccl_ratio'], 6, 2)}"
    )


def verdict(rows: list[dict[str, Any]]) -> str:
    slower = sum(row["ratio"] > 1 for row in rows)
    text = f"{len(rows)} rows: slower than the baseline in {slower}"
    largest = [row for row in rows if row["floor_ratio"] and row["tokens"] == max(r["tokens"] for r in rows)]
    if largest:
        ratios = [row["floor_ratio"] for row in largest]
        text += f"; {largest[0]['tokens']} tokens take {min(ratios):.2f} to {max(ratios):.2f} times the floor"
    return text


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The results, except what `ranks.environment` adds."""
    rows: list[dict[str, Any]] = []
    communicators = {}
    for ranks in args.ranks:
        (about, communicator), *measured = run_ranks(measure_ranks, ranks, args)
        communicators[ranks] = communicator
        rows += measured
    settings = {
        k: getattr(args, k) for k in ("hidden", "topk", "experts", "device", "iterations", "num_sms", "link_gbs")
    }
    return {"hardware": about, "communicators": communicators, "settings": settings, "rows": rows}


def draw(results: dict[str, Any], path: Path) -> None:
    from figure import draw_gpu  # imported here: the ranks import this file and draw nothing

    draw_gpu(results, path)
