"""Times plan, dispatch and combine of one rank on a GPU, where nothing is exchanged, against torch's gather.

    python benchmarks/one_rank.py                                # the shapes below
    python benchmarks/one_rank.py --shape 4096 7168 8 256        # tokens, hidden, top-k, experts; may be repeated

Prints a table and writes OUTPUT.json. benchmarks/README.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gpu
import torch
from cases import random_inputs
from ranks import environment, positive, spread, statistics_of, write_results
from torch import Tensor
from tqdm import tqdm

import torch_ep

SHAPES = [(4096, 7168, 8, 256), (4096, 2048, 6, 64), (16384, 2048, 8, 128), (64, 7168, 8, 256)]
WARM_UP = 10
COPY_BYTES = 2**30
DTYPE = torch.bfloat16
# Of the norm of a difference to the norm: the sides round at different places.
TOLERANCE = 0.02


class Stopwatch:
    """Times a call on the device, with nothing left in L2 and the host ahead of it."""

    def __init__(self) -> None:
        self.l2 = torch.empty(gpu.L2_BYTES, dtype=torch.uint8, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Callable[[], Any]) -> float:
        """Microseconds. Results are freed after the clock has stopped."""
        self.l2.zero_()
        torch.cuda._sleep(gpu.HEAD_START_CYCLES)
        self.start.record()
        result = call()
        self.end.record()
        self.end.synchronize()
        del result
        return self.start.elapsed_time(self.end) * 1e3


def alternate(calls: dict[str, Callable[[], Any]], stopwatch: Stopwatch, iterations: int) -> dict[str, dict]:
    """The sides by turns, so that what disturbs the machine disturbs all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    for i in range(WARM_UP + iterations):
        for name, call in calls.items():
            us = stopwatch(call)
            if i >= WARM_UP:
                times[name].append(us)
    gc.enable()
    return {name: statistics_of(t) for name, t in times.items()}


class Sorted(NamedTuple):
    """What torch's gathers need of a routing."""

    token: Tensor  # [pairs] int64, by expert
    home: Tensor  # [tokens, topk] int64: where each pair is in that order
    offsets: Tensor  # [experts]


class TorchGather:
    """The same by torch's operators: a sort, and a gather each way."""

    def __init__(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int) -> None:
        self.x, self.topk_idx, self.topk_weights, self.num_experts = x, topk_idx, topk_weights, num_experts

    def plan(self) -> Sorted:
        experts, order = torch.sort(self.topk_idx.flatten(), stable=True)
        home = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        ends = torch.arange(1, self.num_experts + 1, device=order.device)
        return Sorted(
            order // self.topk_idx.shape[1], home.view(self.topk_idx.shape), torch.searchsorted(experts, ends)
        )

    def dispatch(self, plan: Sorted) -> Tensor:
        return self.x.index_select(0, plan.token)

    def combine(self, y: Tensor, plan: Sorted) -> Tensor:
        rows = y.index_select(0, plan.home.flatten()).view(*plan.home.shape, -1)
        return torch.bmm(self.topk_weights.to(y.dtype)[:, None], rows).squeeze(1)


def measure(shape: tuple[int, int, int, int], groups: dict[str, str], stopwatch: Stopwatch, args: Any) -> list[dict]:
    """Rows of the table for one shape. `groups`: the group's name of each side that is ours."""
    tokens, hidden, topk, experts = shape
    inputs = random_inputs(0, tokens, hidden, topk, experts, DTYPE, torch.device("cuda"))
    x, topk_idx, topk_weights = inputs.x, inputs.topk_idx, inputs.topk_weights
    gather = TorchGather(x, topk_idx, topk_weights, experts)
    torch_plan = gather.plan()
    y = gather.dispatch(torch_plan)
    calls: dict[str, dict[str, Callable[[], Any]]] = {
        "plan": {"torch": gather.plan},
        "plan, capacity": {},
        "dispatch": {"torch": partial(gather.dispatch, torch_plan)},
        "combine": {"torch": partial(gather.combine, y, torch_plan)},
    }
    for side, group in groups.items():
        exact = partial(torch_ep.plan, topk_idx, experts, group)
        plan = exact()
        rows, weights = torch_ep.dispatch(x, plan, topk_weights=topk_weights)
        if not torch.equal(rows, y):
            raise RuntimeError(f"dispatch, {side}: expected the rows of torch's gather, got others")
        sums, want = torch_ep.combine(rows, plan, row_weights=weights), gather.combine(y, torch_plan)
        if (sums - want).float().norm() > TOLERANCE * want.float().norm():
            raise RuntimeError(f"combine, {side}: expected the sums of torch's product, got others")
        calls["plan"][side] = exact
        calls["plan, capacity"][side] = partial(exact, capacity=plan.num_rows)
        calls["dispatch"][side] = partial(torch_ep.dispatch, x, plan, topk_weights=topk_weights)
        calls["combine"][side] = partial(torch_ep.combine, rows, plan, row_weights=weights)
        del rows, sums, want
    moved = (tokens + tokens * topk) * hidden * DTYPE.itemsize
    results = []
    for op, sides in calls.items():
        times = alternate(sides, stopwatch, args.iterations)
        floor = round(moved / args.copy_rate / 1e3, 1) if op in ("dispatch", "combine") else None
        results.append({"shape": shape, "op": op, "moved_bytes": moved if floor else 0, "floor_us": floor, **times})
    return results


SIDES = ("ours", "with init", "torch")
WIDTH = 27  # of a side's column
HEAD = f"{'tokens x hidden, top-k of experts':<34} {'op':<15} | {'floor':>7} | " + " | ".join(
    f"{side:>{WIDTH}}" for side in SIDES
)


def line(row: dict[str, Any]) -> str:
    tokens, hidden, topk, experts = row["shape"]

    def column(side: str) -> str:
        if side not in row:
            return f"{'-':>{WIDTH}}"
        times = row[side]
        return f"{times['median_us']:.1f} {spread(times, 1)}".rjust(WIDTH)

    floor = "-" if row["floor_us"] is None else f"{row['floor_us']:.1f}"
    name = f"{tokens} x {hidden}, {topk} of {experts}"
    return f"{name:<34} {row['op']:<15} | {floor:>7} | " + " | ".join(map(column, SIDES))


def copy_rate(stopwatch: Stopwatch, iterations: int) -> float:
    """GB/s, read and written, of a large copy on the device."""
    source, target = (torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    times = alternate({"copy": lambda: target.copy_(source)}, stopwatch, iterations)
    return 2 * COPY_BYTES / times["copy"]["median_us"] / 1e3


def parse(argv: list[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Plan, dispatch and combine of one rank against torch's gather, on a GPU.")
    names = ("TOKENS", "HIDDEN", "TOPK", "EXPERTS")
    p.add_argument("--shape", type=positive, nargs=4, action="append", metavar=names, help="default: those of the file")
    p.add_argument("--iterations", type=positive, default=50, help="timed calls per side (default: %(default)s)")
    output = Path(__file__).parent / "results" / "one_rank"
    p.add_argument("--output", type=Path, default=output, help="where the results go: .json is appended")
    args = p.parse_args(argv)
    args.shape = [tuple(shape) for shape in args.shape or SHAPES]
    for _, _, topk, experts in args.shape:
        if topk > experts:
            p.error(f"--shape: expected at most the {experts} experts per token, got {topk}")
    if not torch.cuda.is_available():
        p.error("expected a GPU, got none")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    torch.set_grad_enabled(False)
    most = {
        name: max(shape[i] for shape in args.shape) for i, name in enumerate(("tokens", "hidden", "topk", "experts"))
    }
    (with_init,) = torch_ep.comm.init_virtual(
        1,
        max_tokens_per_rank=most["tokens"],
        hidden=most["hidden"],
        num_topk=most["topk"],
        num_experts=most["experts"],
        num_sms=24,
    )
    stopwatch = Stopwatch()
    args.copy_rate = copy_rate(stopwatch, args.iterations)
    print(f"{torch.cuda.get_device_name()}, copies {args.copy_rate:.0f} GB/s read and written; median us (p5 to p95)")
    print(HEAD, flush=True)
    rows = []
    for shape in tqdm(args.shape, unit="shape"):
        for row in measure(shape, {"ours": "", "with init": with_init}, stopwatch, args):
            rows.append(row)
            tqdm.write(line(row))
    results = {
        **environment("one_rank.py", argv),
        "hardware": gpu.hardware(),
        "settings": {"dtype": str(DTYPE), "iterations": args.iterations},
        "copy_gbs": round(args.copy_rate, 1),
        "rows": rows,
    }
    print(f"wrote {write_results(args.output, results)}")


if __name__ == "__main__":
    main(sys.argv[1:])
