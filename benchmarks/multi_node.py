"""Times plan + dispatch + combine between hosts: on two levels, flat, and by all_to_all_single, in one run.

On a cluster, one command per node, N nodes of L ranks (the first node's address after --master-addr):

    torchrun --nnodes N --nproc-per-node L --node-rank K --master-addr ADDRESS benchmarks/multi_node.py

With SLURM: srun --ntasks-per-node 1 torchrun --nnodes $SLURM_NNODES --nproc-per-node L --rdzv-backend c10d
--rdzv-endpoint ADDRESS:29500 benchmarks/multi_node.py. On one Linux machine, as root, with hosts made of network
namespaces:

    python benchmarks/multi_node.py --simulate 2 --ranks-per-node 2 --rate 1gbit

Prints a table; rank 0 writes OUTPUT.json (summaries, command, commit, hardware): please send it in.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gpu
import torch
import torch.distributed as dist
from cases import BaselineExpertMajor, BaselinePairs, Inputs, Side, random_inputs
from hosts import add_arguments, torchrun_on_simulated_hosts
from platforms import PLATFORMS, cores
from ranks import environment, over_ranks, positive, summary, write_results
from torch import Tensor
from tqdm import tqdm

import torch_ep

RESULTS = Path(__file__).parent / "results"
SIDES = ("two levels", "flat", "baseline")


class Setting(NamedTuple):
    """What depends on the device."""

    hidden: int
    experts: int
    dtype: torch.dtype
    c10d_backend: str
    baseline: Callable[[Inputs], Side]
    synchronize: Callable[[], None]
    hardware: Callable[[], dict[str, Any]]


SETTINGS = {
    "cpu": Setting(1024, 64, torch.float32, "gloo", BaselineExpertMajor, lambda: None, PLATFORMS["cpu"].hardware),
    "cuda": Setting(
        7168, 256, torch.bfloat16, "cpu:gloo,cuda:nccl", BaselinePairs, torch.cuda.synchronize, gpu.hardware
    ),
}
WARM_UP = 2


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--device", choices=list(SETTINGS), help="default: cuda if there is a GPU per rank, else cpu")
    p.add_argument("--tokens", type=positive, nargs="+", default=[256, 1024, 4096], help="per rank (%(default)s)")
    p.add_argument("--hidden", type=positive, help="elements per token (default: 1024; on GPUs 7168)")
    p.add_argument("--topk", type=positive, default=8, help="experts per token (default: %(default)s)")
    p.add_argument("--experts", type=positive, help="over all ranks (default: 64; on GPUs 256)")
    p.add_argument(
        "--node-limit", type=positive, help="most nodes per token, as in DeepSeek's routing (default: no limit)"
    )
    p.add_argument(
        "--iterations", type=positive, default=15, help="timed calls per side and row (default: %(default)s)"
    )
    p.add_argument("--output", type=Path, default=RESULTS / "multi_node", help="where the results go, without .json")
    add_arguments(p, ranks_per_node=2)
    return p


class Whole:
    """plan, dispatch and combine of torch_ep in one call."""

    def __init__(self, inputs: Inputs, group: Any) -> None:
        self.inputs, self.group = inputs, group

    def __call__(self) -> Tensor:
        i = self.inputs
        plan = torch_ep.plan(i.topk_idx, i.num_experts, self.group)
        rows, weights = torch_ep.dispatch(i.x, plan, topk_weights=i.topk_weights)
        return torch_ep.combine(rows, plan, row_weights=weights)


def by_hand(side: Side) -> Tensor:
    routing = side.route()
    received = side.dispatch(routing)
    return side.combine(received.rows, received, routing)


def paper_bytes(inputs: Inputs, group: Any, ranks_per_node: int) -> int:
    """Bytes of payload that leave this rank for other nodes: a row per (token, node), and back a sum for each."""
    plan = torch_ep.plan(inputs.topk_idx, inputs.num_experts, group)
    assert plan.rail is not None
    node = dist.get_rank() // ranks_per_node

    def remote(counts: Tensor) -> int:
        return int(counts.sum() - counts[node])

    topk = inputs.topk_idx.shape[1]
    forward = inputs.row_bytes + topk * (inputs.topk_weights.element_size() + 4)  # experts go as int32
    return remote(plan.rail.send_counts) * forward + remote(plan.rail.recv_counts) * inputs.row_bytes


def sent_bytes(interface: str | None) -> int:
    """Bytes that this host has sent through a network card."""
    return 0 if interface is None else int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def measure(
    calls: dict[str, Callable[[], Tensor]], args: argparse.Namespace, synchronize: Callable[[], None], bar: tqdm
) -> dict[str, Any]:
    """One row of the table; the same on every rank."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    sent: dict[str, list[int]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    for i in range(WARM_UP + args.iterations):
        for name, call in calls.items():  # alternating, so that a disturbance affects all sides
            synchronize()
            dist.barrier()
            before, start = sent_bytes(args.interface), time.perf_counter()
            result = call()
            synchronize()
            elapsed = time.perf_counter() - start
            dist.barrier()
            if i >= WARM_UP:
                seconds[name].append(elapsed)
                sent[name].append(sent_bytes(args.interface) - before)
            del result
        bar.update()
    gc.enable()
    row: dict[str, Any] = {}
    for name in calls:
        row[name] = summary([s * 1e6 for s in seconds[name]])
        if args.interface is not None:
            row[name]["sent_bytes"] = int(over_ranks(sorted(sent[name])[len(sent[name]) // 2]))
    return row


def check_equal(calls: dict[str, Callable[[], Tensor]]) -> None:
    """Raises unless all sides give the same sums, up to their rounding."""
    first, *others = (call() for call in calls.values())
    tolerance = 32 * torch.finfo(first.dtype).eps
    for name, other in zip(list(calls)[1:], others, strict=True):
        torch.testing.assert_close(first, other, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def line(row: dict[str, Any]) -> str:
    times = [row[name]["median_us"] / 1e3 for name in SIDES]
    ratios = [row["two levels"]["median_us"] / row[name]["median_us"] for name in ("flat", "baseline")]
    gbs = row["paper_bytes_per_node"] / row["two levels"]["median_us"] / 1e3
    return (
        f"{row['tokens']:>7} "
        + "".join(f"{t:12.1f}" for t in times)
        + "".join(f"{r:10.2f}" for r in ratios)
        + f"{gbs:12.2f}"
    )


HEAD = (
    f"{'tokens':>7} " + "".join(f"{name + ', ms':>12}" for name in ("2 levels", "flat", "baseline"))
    + f"{'of flat':>10}{'of base.':>10}{'GB/s out':>12}"
)  # fmt: skip


def run(args: argparse.Namespace, arguments: list[str]) -> None:
    """One rank, started by torchrun."""
    local_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
    device_name = args.device or ("cuda" if torch.cuda.device_count() >= local_ranks else "cpu")
    setting = SETTINGS[device_name]
    device = torch.device("cpu")
    if device_name == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, cores() // local_ranks))
    dist.init_process_group(setting.c10d_backend)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    nodes = world_size // local_ranks
    torch.set_grad_enabled(False)
    hidden, experts = args.hidden or setting.hidden, args.experts or setting.experts
    limits = {"max_tokens_per_rank": max(args.tokens), "hidden": hidden, "num_topk": args.topk, "num_experts": experts}
    flat = dist.new_group()
    torch_ep.init(flat, **limits, backend="c10d")
    communicator = torch_ep.init(ranks_per_node=local_ranks, **limits)
    if communicator.rail is None or communicator.node is None:
        sys.exit(f"expected several nodes of several ranks: {communicator.reason}")
    results: dict[str, Any] = {
        **environment("multi_node.py", arguments),
        "hardware": setting.hardware(),
        "settings": {
            "nodes": nodes,
            "ranks_per_node": local_ranks,
            "hidden": hidden,
            "topk": args.topk,
            "experts": experts,
            "backends": communicator.reason,
            "symmetric_bytes": communicator.symmetric_bytes,
            "network": args.rate or ("not limited" if args.simulate else "of the cluster"),
        },
        "rows": [],
    }
    if rank == 0:
        print(f"{communicator.reason}\n{HEAD}", flush=True)
    total = len(args.tokens) * (WARM_UP + args.iterations)
    with tqdm(total=total, unit="call", disable=True if rank else None) as bar:
        for tokens in args.tokens:
            inputs = random_inputs(rank, tokens, hidden, args.topk, experts, setting.dtype, device)
            if args.node_limit:
                scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(rank))
                limited = torch_ep.nn.group_limited_topk(scores, args.topk, nodes, min(nodes, args.node_limit))
                inputs = inputs._replace(topk_idx=limited.to(device))
            hand = partial(by_hand, setting.baseline(inputs))
            calls = {"two levels": Whole(inputs, None), "flat": Whole(inputs, flat), "baseline": hand}
            check_equal(calls)
            on_paper = torch.tensor(float(paper_bytes(inputs, None, local_ranks)))
            dist.all_reduce(on_paper, group=torch_ep.comm.process_group(communicator.node.group_name))
            row = {"tokens": tokens, **measure(calls, args, setting.synchronize, bar)}
            row["paper_bytes_per_node"] = int(over_ranks(on_paper.item()))
            results["rows"].append(row)
            if rank == 0:
                tqdm.write(line(row))
    if rank == 0:
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
        sys.exit("expected torchrun to start this on every node, or --simulate: see --help")


if __name__ == "__main__":
    main()
