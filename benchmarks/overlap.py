"""Times exchanges in halves beside work, and nn.MoE(overlap=) forward and backward, in one run.

Started by torchrun on every host, as multi_node.py; or with hosts made of network namespaces, as root:

    python benchmarks/overlap.py --simulate 2 --rate 1gbit

Work is matrix products that take about as long as the exchange. Prints two tables; rank 0 writes OUTPUT.json.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import random_inputs
from hosts import add_arguments, torchrun_on_simulated_hosts
from platforms import PLATFORMS, cores
from ranks import environment, over_ranks, positive, statistics_of, write_results
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import torch_ep

RESULTS = Path(__file__).parent / "results"
WARM_UP = 2
PRODUCT = 256  # rows and columns of the matrices of one piece of work
OPS = ("dispatch", "combine")
KINDS = ("exchange", "experts", "in flight")
LABELS = {"exchange": "in an exchange", "experts": "in the experts", "in flight": "rows in flight"}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--tokens", type=positive, default=1024, help="per rank (default: %(default)s)")
    p.add_argument("--hidden", type=positive, default=1024, help="elements per token (default: %(default)s)")
    p.add_argument("--intermediate", type=positive, default=128, help="of the layer's experts (default: %(default)s)")
    p.add_argument("--topk", type=positive, default=8, help="experts per token (default: %(default)s)")
    p.add_argument("--experts", type=positive, default=16, help="over all ranks (default: %(default)s)")
    p.add_argument("--overlap", type=int, nargs="+", default=[0, 1, 2, 4], help="of nn.MoE (default: %(default)s)")
    p.add_argument("--iterations", type=positive, default=15, help="timed calls of each kind (default: %(default)s)")
    p.add_argument("--output", type=Path, default=RESULTS / "overlap", help="where the results go, without .json")
    p.add_argument("--trace", type=Path, help="also draws one step without and one with overlap, as this picture")
    add_arguments(p, ranks_per_node=1)
    return p


def measure(calls: dict[str, Callable[[], Any]], iterations: int, bar: tqdm) -> dict[str, dict[str, float]]:
    """Microseconds of the slowest rank per call, alternating."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    for i in range(WARM_UP + iterations):
        for name, call in calls.items():
            dist.barrier()
            start = time.perf_counter()
            call()
            elapsed = over_ranks(time.perf_counter() - start)
            if i >= WARM_UP:
                seconds[name].append(elapsed)
        bar.update()
    gc.enable()
    return {name: statistics_of([s * 1e6 for s in times]) for name, times in seconds.items()}


def work_of(microseconds: float) -> Callable[[], None]:
    """Matrix products of about that duration on this rank."""
    a = torch.randn(PRODUCT, PRODUCT)
    times, elapsed = 1, 0.0
    while elapsed < microseconds / 2:  # the first products are slow: count on longer runs alone
        times *= 2
        start = time.perf_counter()
        for _ in range(times):
            a @ a
        elapsed = (time.perf_counter() - start) * 1e6
    times = max(1, round(times * microseconds / elapsed))

    def work() -> None:
        for _ in range(times):
            a @ a

    return work


def exchange_calls(op: str, args: argparse.Namespace, rank: int, bar: tqdm) -> dict[str, Callable[[], Any]]:
    inputs = random_inputs(rank, args.tokens, args.hidden, args.topk, args.experts, torch.float32, torch.device("cpu"))
    plan = torch_ep.plan(inputs.topk_idx, args.experts)
    sent = inputs.x if op == "dispatch" else torch_ep.dispatch(inputs.x, plan)
    send, recv = getattr(torch_ep, f"{op}_send"), getattr(torch_ep, f"{op}_recv")
    whole = getattr(torch_ep, op)

    def exchange() -> None:
        recv(send(sent, plan), plan)

    alone = measure({"exchange": exchange}, 3, bar)["exchange"]["median_us"]
    work = work_of(over_ranks(alone))

    def together() -> None:
        in_flight = send(sent, plan)
        work()
        recv(in_flight, plan)

    return {"whole": lambda: whole(sent, plan), "exchange": exchange, "work": work, "together": together}


def layer_calls(args: argparse.Namespace, rank: int) -> dict[str, Callable[[], Any]]:
    x = torch.randn(args.tokens, args.hidden, generator=torch.Generator().manual_seed(rank))
    calls = {}
    for overlap in args.overlap:
        torch.manual_seed(0)
        layer = torch_ep.nn.MoE(args.hidden, args.intermediate, args.experts, args.topk, overlap=overlap,
                                shared_intermediate=args.intermediate)  # fmt: skip

        def step(layer: torch_ep.nn.MoE = layer) -> None:
            layer.zero_grad(set_to_none=True)
            layer(x)[0].sum().backward()

        calls[f"overlap {overlap}"] = step
    return calls


def exposed(times: dict[str, dict[str, float]]) -> float:
    """(together - the longer alone) / the shorter alone: 0 if the shorter is hidden, 1 if nothing is."""
    exchange, work, together = (times[name]["median_us"] for name in ("exchange", "work", "together"))
    return (together - max(exchange, work)) / min(exchange, work)


def intervals(step: Callable[[], Any]) -> dict[str, list[tuple[float, float]]]:
    """(start, end) in ms of what a step does on this rank, by kind."""
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        step()
    events = sorted((e.time_range.start, e.time_range.end, e.name) for e in prof.events() if e.name.startswith("ep::"))
    first = min(e.time_range.start for e in prof.events())
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in KINDS}
    sent: dict[str, list[float]] = {op: [] for op in OPS}
    for start, end, name in events:
        op, _, half = name.removeprefix("ep::").partition("_")
        span = ((start - first) / 1e3, (end - first) / 1e3)
        if op in OPS and half == "send":
            sent[op].append(span[1])
        elif op in OPS and half == "recv":
            found["in flight"].append((sent[op].pop(0), span[0]))
        if op in (*OPS, "plan"):
            found["exchange"].append(span)
        elif op == "grouped":
            found["experts"].append(span)
    found["step"] = [(0.0, (max(e.time_range.end for e in prof.events()) - first) / 1e3)]
    return found


def draw_trace(steps: dict[str, dict[str, list[tuple[float, float]]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = {"exchange": "#c0504d", "experts": "#4f81bd", "in flight": "#9bbb59"}
    figure, all_axes = pyplot.subplots(len(steps), 1, sharex=True, figsize=(9, 1.6 * len(steps) + 0.5))
    for axes, (title, found) in zip(all_axes, steps.items(), strict=True):
        for row, kind in enumerate(KINDS):
            axes.broken_barh([(a, b - a) for a, b in found[kind]], (row + 0.1, 0.8), color=colors[kind])
        axes.axvline(found["step"][0][1], color="black", linewidth=1)
        axes.set_yticks([row + 0.5 for row in range(len(KINDS))], [LABELS[kind] for kind in KINDS])
        axes.set_title(f"{title}: {found['step'][0][1]:.0f} ms", loc="left", fontsize=10)
        axes.invert_yaxis()
    all_axes[-1].set_xlabel("ms since the start of forward and backward, rank 0; the line is the end")
    figure.tight_layout()
    figure.savefig(path)


def run(args: argparse.Namespace, arguments: list[str]) -> None:
    """One rank, started by torchrun."""
    ranks_here = int(os.environ["LOCAL_WORLD_SIZE"]) * (args.simulate or 1)
    torch.set_num_threads(max(1, cores() // ranks_here))
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch_ep.init(max_tokens_per_rank=args.tokens)
    results: dict[str, Any] = {
        **environment("overlap.py", arguments),
        "hardware": PLATFORMS["cpu"].hardware(),
        "settings": {
            **{name: getattr(args, name) for name in ("tokens", "hidden", "intermediate", "topk", "experts")},
            "ranks": world_size,
            "network": args.rate or ("not limited" if args.simulate else "of the cluster"),
        },
        "rows": [],
    }
    total = len(OPS) * (WARM_UP + 3) + (len(OPS) + 1) * (WARM_UP + args.iterations)
    with tqdm(total=total, unit="call", disable=True if rank else None) as bar:
        with torch.no_grad():
            for op in OPS:
                times = measure(exchange_calls(op, args, rank, bar), args.iterations, bar)
                results["rows"].append({"op": op, **times, "exposed": round(exposed(times), 3)})
        results["rows"].append({"op": "layer", **measure(layer_calls(args, rank), args.iterations, bar)})
    if args.trace:
        calls = layer_calls(args, rank)
        best = min(args.overlap[1:], key=lambda n: results["rows"][-1][f"overlap {n}"]["median_us"])
        names = {f"overlap {args.overlap[0]}": "whole exchanges", f"overlap {best}": f"overlap={best}"}
        for name in names:
            calls[name]()
        steps = {title: intervals(calls[name]) for name, title in names.items()}
        if rank == 0:
            draw_trace(steps, args.trace)
    if rank == 0:
        print(f"{'':>10}{'whole, ms':>12}{'halves':>12}{'work':>12}{'together':>12}{'exposed':>10}")
        for row in results["rows"][: len(OPS)]:
            times = "".join(
                f"{row[name]['median_us'] / 1e3:12.1f}" for name in ("whole", "exchange", "work", "together")
            )
            print(f"{row['op']:>10}{times}{row['exposed']:10.2f}")
        layer = results["rows"][-1]
        first = layer[f"overlap {args.overlap[0]}"]["median_us"]
        print(f"\nnn.MoE, forward and backward, ms (of overlap {args.overlap[0]})")
        for overlap in args.overlap:
            us = layer[f"overlap {overlap}"]["median_us"]
            print(f"{overlap:>10}{us / 1e3:12.1f}{us / first:10.2f}")
        print(write_results(args.output, results), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    arguments = sys.argv[1:]
    args = parser().parse_args(arguments)
    if "RANK" in os.environ:
        run(args, arguments)
    elif args.simulate:
        torchrun_on_simulated_hosts(Path(__file__), arguments, args)
    else:
        sys.exit("expected torchrun to start this on every host, or --simulate: see --help")


if __name__ == "__main__":
    main()
