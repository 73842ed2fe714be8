"""Times the low-latency dispatch and combine, replayed from CUDA graphs as decoding does, on GPUs.

    python benchmarks/low_latency.py                          # all GPUs that share out the experts evenly
    python benchmarks/low_latency.py --ranks 2 4 --tokens 1 32 128 --ops pair-fp8
    python benchmarks/low_latency.py --gemm 128 4096 7168     # the GEMM between send and recv

Against the other operators of torch_ep, with a capacity, against NCCL, both in graphs too, and against the link. Prints
a table; writes OUTPUT.json and OUTPUT.png. benchmarks/README.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import gpu
import torch
import torch.distributed as dist
from cases import random_inputs
from ranks import environment, over_ranks, positive, run_ranks, spread, summary, write_results
from torch import Tensor
from tqdm import tqdm

import torch_ep
from torch_ep import reference
from torch_ep.low_latency import Quantize

# Of one kernel that signals every peer and awaits every peer, replayed from a graph on 4 x H200: what a direction takes
# if it moves nothing.
SIGNAL_US = 2.35
# About 200 us at 2 GHz: longer than anything measured here is on its way.
PAUSE_CYCLES = 400_000
# us, of the shape below on 4 GPUs: op, tokens per rank.
GOALS = {
    ("dispatch-fp8", 128): 15.0,
    ("combine", 128): 24.0,
    ("pair-fp8", 128): 40.0,
    ("pair-fp8", 32): 20.0,
    ("pair-fp8", 1): 10.0,
}
GOAL_SHAPE = {"ranks": 4, "hidden": 7168, "topk": 8, "experts": 256}
OVERLAPPED_OPS = ("dispatch-fp8", "combine")
# The width of a GEMM that takes as long as an exchange is looked for in so many steps, among multiples of WIDTH_STEP.
FIT_STEPS, FIRST_WIDTH, WIDTH_STEP, WIDEST = 6, 4096, 128, 65536
FIT_TIMES = 7  # times of which a step takes the median


class Case:
    """One batch of this rank, and a routing of its own for each repetition in a graph."""

    def __init__(self, rank: int, ranks: int, tokens: int, args: argparse.Namespace, device: torch.device) -> None:
        self.rank, self.ranks, self.experts, self.device = rank, ranks, args.experts, device
        self.repetitions = args.repetitions
        self.max_tokens = args.max_tokens_per_rank or tokens
        inputs = random_inputs(rank, tokens, args.hidden, args.topk, args.experts, torch.bfloat16, device)
        self.x, self.weights = inputs.x, inputs.topk_weights
        self.fp8, self.scales = (t.to(device) for t in reference.quantize(self.x.cpu(), "fp8"))
        generator = torch.Generator().manual_seed(1000 * rank + tokens)
        scores = torch.rand(self.repetitions, tokens, args.experts, generator=generator)
        self.topk_idx = scores.topk(args.topk, 2).indices.to(device)
        self.plans = [self.dispatch(i)[1] for i in range(self.repetitions)]
        self.y = torch.randn(*self.plans[0].recv_pair.shape, args.hidden, dtype=torch.bfloat16, device=device)
        self.logical_rows, self.wire_rows = self.count_rows()
        # Of which nothing is dropped.
        self.capacity = ranks * tokens * min(args.topk, args.experts // ranks)
        self.throughput_plans = [self.throughput_plan(i) for i in range(self.repetitions)]
        self.throughput_weights = [self.throughput_dispatch(i, plan)[1] for i, plan in enumerate(self.throughput_plans)]
        self.throughput_y = torch.randn(self.capacity, args.hidden, dtype=torch.bfloat16, device=device)

    @property
    def tokens(self) -> int:
        return len(self.x)

    @property
    def sizes(self) -> dict[str, int]:
        return {"num_experts": self.experts, "max_tokens_per_rank": self.max_tokens}

    @property
    def hidden(self) -> int:
        return self.x.shape[1]

    def dispatch(self, i: int, quantize: Quantize | None = None) -> Any:
        return torch_ep.low_latency_dispatch(
            self.x, self.topk_idx[i], topk_weights=self.weights, quantize=quantize, **self.sizes
        )

    def dispatch_send(self, i: int, quantize: Quantize | None = None) -> torch_ep.InFlightDispatch:
        return torch_ep.low_latency_dispatch_send(
            self.x, self.topk_idx[i], topk_weights=self.weights, quantize=quantize, **self.sizes
        )

    def combine(self, i: int) -> Tensor:
        return torch_ep.low_latency_combine(self.y, self.plans[i])

    def combine_send(self, i: int) -> torch_ep.InFlightCombine:
        return torch_ep.low_latency_combine_send(self.y, self.plans[i])

    def pair(self, i: int, quantize: Quantize | None = None) -> Tensor:
        """Combines the rows as they came; quantized ones are no results of an expert, and others take their place."""
        rows, plan = self.dispatch(i, quantize)
        return torch_ep.low_latency_combine(self.y if quantize else rows, plan)

    def throughput_plan(self, i: int) -> torch_ep.Plan:
        return torch_ep.plan(self.topk_idx[i], self.experts, layout="expert_major", capacity=self.capacity)

    def throughput_dispatch(self, i: int, plan: torch_ep.Plan | None = None, fp8: bool = False) -> tuple[Tensor, ...]:
        plan = plan or self.throughput_plan(i)
        if fp8:
            return torch_ep.dispatch(self.fp8, plan, topk_weights=self.weights, scales=self.scales)
        return torch_ep.dispatch(self.x, plan, topk_weights=self.weights)

    def throughput_combine(self, i: int) -> Tensor:
        weights = self.throughput_weights[i]
        return torch_ep.combine(self.throughput_y, self.throughput_plans[i], row_weights=weights)

    def throughput_pair(self, i: int, fp8: bool = False) -> Tensor:
        plan = self.throughput_plan(i)
        rows, weights, *_ = self.throughput_dispatch(i, plan, fp8)
        return torch_ep.combine(self.throughput_y if fp8 else rows, plan, row_weights=weights)

    def count_rows(self) -> tuple[float, float]:
        """All rows of a repetition's busiest rank, and those on the wire, as `gpu.busiest` counts them; the mean."""
        plans = [torch_ep.plan(idx, self.experts, layout="rank_major") for idx in self.topk_idx]
        counts = [gpu.busiest(p.send_counts.tolist(), p.recv_counts.tolist(), self.rank) for p in plans]
        logical, wire = ([over_ranks(rows) for rows in column] for column in zip(*counts, strict=True))
        return statistics.mean(logical), statistics.mean(wire)


class Op(NamedTuple):
    """A row of the table. Each call is of one repetition, by its number."""

    title: str
    whole: Callable[[Case, int], Any]
    throughput: Callable[[Case, int], Any]
    row_bytes: tuple[Callable[[int], int], ...]  # of each exchange, of the hidden size, without indices and weights
    send: Callable[[Case, int], Any] | None = None
    recv: Callable[[Any], Any] | None = None


OPS = {
    "dispatch": Op(
        "bf16",
        Case.dispatch,
        Case.throughput_dispatch,
        (gpu.bf16_bytes,),
        Case.dispatch_send,
        torch_ep.low_latency_dispatch_recv,
    ),
    "dispatch-fp8": Op(
        "fp8 and scales, quantized on the way",
        partial(Case.dispatch, quantize="fp8"),
        partial(Case.throughput_dispatch, fp8=True),
        (gpu.fp8_bytes,),
        partial(Case.dispatch_send, quantize="fp8"),
        torch_ep.low_latency_dispatch_recv,
    ),
    "combine": Op(
        "bf16",
        Case.combine,
        Case.throughput_combine,
        (gpu.bf16_bytes,),
        Case.combine_send,
        torch_ep.low_latency_combine_recv,
    ),
    "pair": Op("dispatch, then combine of its rows", Case.pair, Case.throughput_pair, (gpu.bf16_bytes, gpu.bf16_bytes)),
    "pair-fp8": Op(
        "dispatch-fp8, then combine of bf16 rows",
        partial(Case.pair, quantize="fp8"),
        partial(Case.throughput_pair, fp8=True),
        (gpu.fp8_bytes, gpu.bf16_bytes),
    ),
}


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype == torch.float8_e4m3fn:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return a.dtype == b.dtype and torch.equal(a, b)


def filled(t: Tensor, plan: torch_ep.LowLatencyPlan) -> Tensor:
    """The rows of t [local experts, rows, ...] that a dispatch filled, one expert after the other."""
    kept = plan.recv_pair >= 0
    return t.view(torch.uint8)[kept].view(t.dtype) if t.dtype == torch.float8_e4m3fn else t[kept]


def contents(result: Any) -> list[Tensor]:
    """Whatever of the result of an op is defined."""
    if isinstance(result, Tensor):
        return [result]
    rows, plan = result
    results = [rows] if isinstance(rows, Tensor) else rows
    fields = (plan.tokens_per_expert, plan.source_offsets, plan.recv_pair, plan.recv_row)
    return [*fields, *(filled(t, plan) for t in (*results, plan.row_weights))]


def expect_same(what: str, got: Any, want: Any) -> None:
    if not all(same_bits(a, b) for a, b in zip(contents(got), contents(want), strict=True)):
        raise RuntimeError(f"{what} returned something else than the eager call")


def check(case: Case) -> None:
    """Raises unless rows, scales, weights and sums of every repetition are those of the other operators."""
    tolerance = 32 * torch.finfo(torch.bfloat16).eps  # as in cases.check_equal
    for i in range(case.repetitions):
        plan = torch_ep.plan(case.topk_idx[i], case.experts, layout="expert_major")
        wanted = {
            None: torch_ep.dispatch(case.x, plan, topk_weights=case.weights),
            "fp8": torch_ep.dispatch(case.fp8, plan, topk_weights=case.weights, scales=case.scales),
        }
        for quantize, (want_rows, want_weights, *want_scales) in wanted.items():
            result, got = case.dispatch(i, quantize)
            rows, *scales = result if quantize else (result,)
            for part, of, want in (
                ("rows", rows, want_rows),
                ("weights", got.row_weights, want_weights),
                *(("scales", *both) for both in zip(scales, want_scales, strict=True)),
            ):
                if not same_bits(filled(of, got), want):
                    raise RuntimeError(
                        f"low_latency_dispatch, quantize={quantize}: other {part} than torch_ep.dispatch"
                    )
        sums = case.pair(i), torch_ep.combine(wanted[None][0], plan, row_weights=wanted[None][1])
        torch.testing.assert_close(*sums, rtol=tolerance, atol=tolerance, msg=lambda m: f"low_latency_combine: {m}")


class Timeable(Protocol):
    """An event of torch.cuda."""

    def record(self) -> None: ...
    def elapsed_time(self, end: Any) -> float: ...


class Graphs:
    """Makes CUDA graphs and times them: all that only a GPU can do."""

    def __init__(self, device: torch.device) -> None:
        self.stopwatch = gpu.Stopwatch(device)

    def capture(self, call: Callable[[], Any]) -> Callable[[], Any]:
        return gpu.captured(call)

    def warm_us(self, call: Callable[[], Any]) -> float:
        return self.stopwatch(call, flush=False)

    def cold_us(self, call: Callable[[], Any]) -> float:
        return self.stopwatch(call)

    def event(self) -> Timeable:
        """One that a graph records each time it is replayed."""
        return torch.cuda.Event(enable_timing=True, external=True)

    def pause(self) -> None:
        torch.cuda._sleep(PAUSE_CYCLES)

    def nothing(self) -> None:
        """A kernel that does nothing."""
        torch.cuda._sleep(0)


def repeated(call: Callable[[int], Any], repetitions: int) -> Callable[[], Any]:
    """All repetitions, one after the other; returns what the last one does, and frees the others' at once."""

    def run() -> Any:
        for i in range(repetitions - 1):
            call(i)
        return call(repetitions - 1)

    return run


class Warm:
    """Times a graph of repetitions: us of one of them, on this rank."""

    def __init__(self, graphs: Graphs, call: Callable[[int], Any], repetitions: int) -> None:
        self.graphs, self.repetitions = graphs, repetitions
        self.graph = graphs.capture(repeated(call, repetitions))

    def __call__(self) -> float:
        return self.graphs.warm_us(self.graph) / self.repetitions


class Halves:
    """Times sends and recvs apart, by events in their graph. Between the two there is a pause: a recv finds everything
    there, so that it takes what it costs and not what the link does."""

    def __init__(
        self, graphs: Graphs, send: Callable[[int], Any], recv: Callable[[Any], Any], repetitions: int
    ) -> None:
        self.graphs = graphs
        self.events = [[graphs.event() for _ in range(4)] for _ in range(repetitions)]

        def both(i: int) -> None:
            begin_send, end_send, begin_recv, end_recv = self.events[i]
            begin_send.record()
            in_flight = send(i)
            end_send.record()
            graphs.pause()
            begin_recv.record()
            recv(in_flight)
            end_recv.record()

        self.graph = graphs.capture(repeated(both, repetitions))

    def _mean_us(self, begin: int, end: int) -> float:
        self.graphs.warm_us(self.graph)
        return statistics.mean(events[begin].elapsed_time(events[end]) for events in self.events) * 1e3

    def send_us(self) -> float:
        return self._mean_us(0, 1)

    def recv_us(self) -> float:
        return self._mean_us(2, 3)


def empty_interval_us(graphs: Graphs, repetitions: int) -> float:
    """What `Halves` measures of a kernel that does nothing."""
    halves = Halves(graphs, lambda i: graphs.nothing(), lambda _: graphs.nothing(), repetitions)
    return summary([halves.send_us() for _ in range(gpu.WARM_UP)])["median_us"]


def goal_us(op: str, ranks: int, tokens: int, args: argparse.Namespace) -> float | None:
    shape = {"ranks": ranks, "hidden": args.hidden, "topk": args.topk, "experts": args.experts}
    return GOALS.get((op, tokens)) if shape == GOAL_SHAPE else None


def row(
    op: str,
    ranks: int,
    tokens: int,
    logical_bytes: int,
    wire_bytes: Sequence[int],
    args: argparse.Namespace,
    times: dict[str, Any],
) -> dict[str, Any]:
    """A row of the table from the times of its sides and the bytes on the wire of each exchange."""
    us = times["ours"]["median_us"]
    link = gpu.floor_us(sum(wire_bytes), args.link_gbs)
    floor = link + SIGNAL_US * len(wire_bytes)
    goal = goal_us(op, ranks, tokens, args)
    return {
        "ranks": ranks,
        "tokens": tokens,
        "op": op,
        "logical_bytes": logical_bytes,
        "wire_bytes": sum(wire_bytes),
        "link_us": round(link, 2),
        "floor_us": round(floor, 2),
        "floor_ratio": round(us / floor, 3),
        "goal_us": goal,
        "goal_ratio": None if goal is None else round(us / goal, 3),
        "throughput_ratio": round(us / times["throughput"]["median_us"], 4),
        "nccl_ratio": round(us / times["nccl"]["median_us"], 4),
        **times,
    }


def measure(name: str, case: Case, graphs: Graphs, args: argparse.Namespace, bar: tqdm) -> dict[str, Any]:
    """One row of the table; the same on every rank."""
    op, repetitions = OPS[name], case.repetitions
    wire = [round(case.wire_rows * row_bytes(case.hidden)) for row_bytes in op.row_bytes]
    logical = sum(round(case.logical_rows * row_bytes(case.hidden)) for row_bytes in op.row_bytes)
    splits = gpu.equal_splits(wire, case.ranks, case.device)

    def warm(call: Callable[[int], Any]) -> Warm:
        return Warm(graphs, call, repetitions)

    whole = partial(op.whole, case)
    ours = warm(whole)
    expect_same(f"{name}: the graph", ours.graph(), whole(repetitions - 1))
    timers = {
        "ours": ours,
        "cold": partial(graphs.cold_us, graphs.capture(partial(whole, 0))),
        "throughput": warm(partial(op.throughput, case)),
        "nccl": warm(lambda i: splits()),
    }
    if op.send is not None and op.recv is not None:
        send, recv = partial(op.send, case), op.recv
        split = warm(lambda i: recv(send(i)))
        expect_same(f"{name}: the graph of both halves", split.graph(), whole(repetitions - 1))
        halves = Halves(graphs, send, recv, repetitions)
        timers |= {"split": split, "send": halves.send_us, "recv": halves.recv_us}
    times = gpu.alternate(timers, args.iterations, bar)
    return row(name, case.ranks, case.tokens, logical, wire, args, times)


def fit_width(gemm_us: Callable[[int], float], target_us: float) -> int:
    """The width of a GEMM, of those tried, that comes closest to a time that it is given; it grows with the width."""
    tried: dict[int, float] = {}
    width = FIRST_WIDTH
    while len(tried) < FIT_STEPS and width not in tried:
        tried[width] = gemm_us(width)
        steps = round(width * target_us / tried[width] / WIDTH_STEP)
        width = min(max(steps, 1) * WIDTH_STEP, WIDEST)
    return min(tried, key=lambda w: abs(tried[w] - target_us))


class Gemm:
    """[m, k] x [k, n] in bfloat16."""

    def __init__(self, m: int, n: int, k: int, device: torch.device) -> None:
        self.a, self.b = (torch.randn(*s, dtype=torch.bfloat16, device=device) for s in ((m, k), (k, n)))
        self.out = self.a.new_empty(m, n)

    def __call__(self) -> None:
        torch.mm(self.a, self.b, out=self.out)


def overlap_row(
    op: str, ranks: int, tokens: int, gemm: Sequence[int], times: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """How much of the shorter of exchange and GEMM the other hides: 1 is all of it, 0 nothing."""
    exchange, alone, sequential, overlapped = (
        times[name]["median_us"] for name in ("exchange", "gemm", "sequential", "overlapped")
    )
    return {
        "ranks": ranks,
        "tokens": tokens,
        "op": op,
        "shape": list(gemm),
        "fraction": round((sequential - overlapped) / min(exchange, alone), 3),
        **times,
    }


def measure_overlap(name: str, case: Case, graphs: Graphs, args: argparse.Namespace, bar: tqdm) -> dict[str, Any]:
    """One row of the second table; the same on every rank."""
    op = OPS[name]
    if op.send is None or op.recv is None:
        raise ValueError(f"{name}: expected an op of two halves")
    send, recv = partial(op.send, case), op.recv

    def warm(call: Callable[[int], Any]) -> Warm:
        return Warm(graphs, call, case.repetitions)

    def quick_us(timer: Warm) -> float:
        return summary([timer() for _ in range(FIT_TIMES)])["median_us"]

    exchange = warm(lambda i: recv(send(i)))
    m, n, k = args.gemm or (case.tokens, None, case.hidden)
    if n is None:

        def gemm_us(width: int) -> float:
            candidate = Gemm(m, width, k, case.device)
            return quick_us(warm(lambda i: candidate()))

        n = fit_width(gemm_us, quick_us(exchange))
    gemm = Gemm(m, n, k, case.device)

    def sequential(i: int) -> None:
        recv(send(i))
        gemm()

    def overlapped(i: int) -> None:
        in_flight = send(i)
        gemm()
        recv(in_flight)

    timers = {
        "exchange": exchange,
        "gemm": warm(lambda i: gemm()),
        "sequential": warm(sequential),
        "overlapped": warm(overlapped),
    }
    times = gpu.alternate(timers, args.iterations, bar)
    return overlap_row(name, case.ranks, case.tokens, (m, n, k), times)


def measure_all(
    rank: int,
    ranks: int,
    args: argparse.Namespace,
    device: torch.device,
    graphs: Graphs,
    report: Callable[[str, dict[str, Any]], None],
) -> None:
    """Reports ("rows" or "overlap", row) one by one, on every rank."""
    total = (len(args.tokens) * len(args.ops) + len(args.overlap_tokens) * len(OVERLAPPED_OPS)) * args.iterations
    with tqdm(total=total, desc=f"{ranks} GPUs", unit="it", disable=True if rank else None) as bar:
        for table, measured, batches, names in (
            ("rows", measure, args.tokens, args.ops),
            ("overlap", measure_overlap, args.overlap_tokens, OVERLAPPED_OPS),
        ):
            for tokens in batches:
                bar.set_postfix_str(f"{table}, {tokens} tokens")
                case = Case(rank, ranks, tokens, args, device)
                check(case)
                for name in names:
                    bar.set_postfix_str(f"{table}, {tokens} tokens, {name}")
                    report(table, measured(name, case, graphs, args, bar))
                del case  # before the next one is made: results have room for every token of every rank


def measure_ranks(rank: int, ranks: int, port: int, args: argparse.Namespace, results: Connection) -> None:
    """What one rank does; rank 0 prints, and sends (hardware, communicator) and then (table, row) of both tables."""
    device = gpu.join_group(rank, ranks, port)
    torch.set_grad_enabled(False)
    most = max([*args.tokens, *args.overlap_tokens])
    communicator = torch_ep.init(
        max_tokens_per_rank=most,
        hidden=args.hidden,
        num_topk=args.topk,
        num_experts=args.experts,
        low_latency_tokens=args.max_tokens_per_rank or most,
        timeout=gpu.TIMEOUT,
        backend="nvlink",
        num_sms=args.num_sms,
    )
    graphs = Graphs(device)
    empty_us = empty_interval_us(graphs, args.repetitions)
    heads = {"rows": HEAD, "overlap": OVERLAP_HEAD}
    if rank == 0:
        about = gpu.hardware()
        results.send((about, {**gpu.describe(communicator), "empty_interval_us": empty_us}))
        print(
            f"{ranks} x {about['gpus'][0]}, {communicator.symmetric_bytes / 2**20:.0f} MiB symmetric per rank; "
            f"send and recv include {empty_us:.1f} us that an empty kernel takes too",
            flush=True,
        )

    def report(table: str, measured: dict[str, Any]) -> None:
        if rank:
            return
        results.send((table, measured))
        if table in heads:
            tqdm.write(heads.pop(table))
        tqdm.write(line(measured) if table == "rows" else overlap_line(measured))

    measure_all(rank, ranks, args, device, graphs, report)
    torch_ep.destroy()
    dist.destroy_process_group()


HEAD = (
    f"{'':>6} {'':>5} {'':<12} | {'whole, us':^30} | {'halves, us':^20} | {'floor, us':^21} | {'goal':^12} | "
    f"{'plan, capacity':^14} | {'equal splits':^14}\n"
    f"{'tokens':>6} {'ranks':>5} {'op':<12} | {'median':>6} {'(p5 to p95)':<16} {'cold':>6} | "
    f"{'send':>6} {'recv':>6} {'both':>6} | {'link':>6} {'+signal':>7} {'ratio':>6} | {'us':>5} {'ratio':>6} | "
    f"{'us':>7} {'ratio':>6} | {'us':>7} {'ratio':>6}"
)


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def line(row: dict[str, Any]) -> str:
    ours = row["ours"]
    halves = " ".join(
        _number(row[side]["median_us"] if side in row else None, 6, 1) for side in ("send", "recv", "split")
    )
    baselines = " | ".join(
        f"{row[side]['median_us']:7.1f} {row[f'{side}_ratio']:6.2f}" for side in ("throughput", "nccl")
    )
    return (
        f"{row['tokens']:>6} {row['ranks']:>5} {row['op']:<12} | "
        f"{ours['median_us']:6.1f} {spread(ours, 1):<16} {row['cold']['median_us']:6.1f} | {halves} | "
        f"{row['link_us']:6.1f} {row['floor_us']:7.1f} {row['floor_ratio']:6.2f} | "
        f"{_number(row['goal_us'], 5, 0)} {_number(row['goal_ratio'], 6, 2)} | {baselines}"
    )


OVERLAP_HEAD = (
    f"{'':>6} {'':>5} {'':<12} | {'':<18} | {'alone, us':^15} | {'together, us':^21} |\n"
    f"{'tokens':>6} {'ranks':>5} {'op':<12} | {'GEMM':<18} | {'exchange':>8} {'GEMM':>6} | "
    f"{'in turn':>8} {'overlapped':>12} | hidden"
)


def overlap_line(row: dict[str, Any]) -> str:
    shape = " x ".join(map(str, row["shape"]))
    return (
        f"{row['tokens']:>6} {row['ranks']:>5} {row['op']:<12} | {shape:<18} | "
        f"{row['exchange']['median_us']:8.1f} {row['gemm']['median_us']:6.1f} | "
        f"{row['sequential']['median_us']:8.1f} {row['overlapped']['median_us']:12.1f} | {row['fraction']:6.2f}"
    )


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    slower = {side: sum(row[f"{side}_ratio"] > 1 for row in rows) for side in ("throughput", "nccl")}
    text = f"{len(rows)} rows: slower than plan with capacity in {slower['throughput']}, than NCCL in {slower['nccl']}"
    goals = [row["goal_ratio"] for row in rows if row["goal_ratio"] is not None]
    if goals:
        text += f"; {sum(ratio <= 1 for ratio in goals)} of {len(goals)} goals reached"
    return text


def parse(argv: list[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description="The low-latency dispatch and combine of torch_ep, from CUDA graphs.",
        epilog="ops: " + "; ".join(f"{name}: {op.title}" for name, op in OPS.items()),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    ranks = "GPUs; one run for each number; if not given as many as share out the experts evenly"
    p.add_argument("--ranks", type=positive, nargs="+", help=ranks)
    tokens = [2**n for n in range(10)]
    p.add_argument("--tokens", type=positive, nargs="+", default=tokens, help="tokens of each rank")
    most = "what results have room for; if not given the tokens of each batch"
    p.add_argument("--max-tokens-per-rank", type=positive, help=most)
    p.add_argument("--hidden", type=positive, default=7168, help="elements of a token")
    p.add_argument("--topk", type=positive, default=8, help="experts of a token")
    p.add_argument("--experts", type=positive, default=256, help="experts over all ranks")
    p.add_argument("--ops", choices=OPS, nargs="+", metavar="OP", default=list(OPS), help="some of the ops below")
    overlap = "tokens of each rank for the overlap with a GEMM; none at all: it is not measured"
    p.add_argument("--overlap-tokens", type=positive, nargs="*", default=[32, 128, 512], help=overlap)
    gemm = "of the GEMM between send and recv; if not given tokens, what takes about as long as the exchange, hidden"
    p.add_argument("--gemm", type=positive, nargs=3, metavar=("M", "N", "K"), help=gemm)
    p.add_argument("--repetitions", type=positive, default=16, help="of the op, back to back in one graph")
    p.add_argument("--iterations", type=positive, default=50, help="timed replays of each graph")
    p.add_argument("--num-sms", type=positive, default=24, help="blocks of the operators that it is compared with")
    link = "GB/s of the link of one GPU, one way, for the floor"
    p.add_argument("--link-gbs", type=partial(positive, kind=float), default=gpu.LINK_GBS, help=link)
    output = Path(__file__).parent / "results" / "gpu_low_latency"
    p.add_argument("--output", type=Path, default=output, help="where the results go: .json and .png are appended")
    args = p.parse_args(argv)
    gpus = torch.cuda.device_count()
    if args.ranks is None:
        args.ranks = [max((n for n in range(2, gpus + 1) if args.experts % n == 0), default=0)]
        if args.ranks == [0]:
            p.error(f"expected at least 2 GPUs that share out {args.experts} experts evenly, got {gpus}")
    for n in args.ranks:
        if not 2 <= n <= gpus:
            p.error(f"--ranks: expected 2 to the number of GPUs, {gpus}, got {n}")
        if args.experts % n:
            p.error(f"--experts: expected a multiple of the {n} ranks, got {args.experts}")
    if args.topk > args.experts:
        p.error(f"--topk: expected at most the {args.experts} experts, got {args.topk}")
    if args.hidden % gpu.SCALE_BLOCK:
        p.error(f"--hidden: expected a multiple of {gpu.SCALE_BLOCK}, the elements of an fp8 scale, got {args.hidden}")
    batch = max([*args.tokens, *args.overlap_tokens])
    if args.max_tokens_per_rank is not None and args.max_tokens_per_rank < batch:
        p.error(f"--max-tokens-per-rank: expected at least the {batch} tokens, got {args.max_tokens_per_rank}")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    tables: dict[str, list[dict[str, Any]]] = {"rows": [], "overlap": []}
    communicators = {}
    for ranks in args.ranks:
        (hardware, communicators[ranks]), *measured = run_ranks(measure_ranks, ranks, args)
        for table, measured_row in measured:
            tables[table].append(measured_row)
    names = ("hidden", "topk", "experts", "max_tokens_per_rank", "repetitions", "iterations", "num_sms", "link_gbs")
    results = {
        **environment("low_latency.py", argv),
        "hardware": hardware,
        "communicators": communicators,
        "settings": {**{name: getattr(args, name) for name in names}, "signal_us": SIGNAL_US},
        **tables,
    }
    print(verdict(tables["rows"]))
    json_path, png_path = write_results(args.output, results), Path(f"{args.output}.png")
    from figure import draw_low_latency  # imported here: the ranks import this file and draw nothing

    draw_low_latency(results, png_path)
    print(f"wrote {json_path} and {png_path}")


if __name__ == "__main__":
    main(sys.argv[1:])
