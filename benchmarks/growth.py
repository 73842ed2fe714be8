"""Prints how messages, bytes and memory per rank grow with the number of ranks, on one level and on two.

    python benchmarks/growth.py                    # 16 to 2048 ranks, 8 per node
    python benchmarks/growth.py --check 4 8 16     # counts messages and bytes in real processes on the CPU first

One call each of plan, dispatch (with weights) and combine (with row weights), expert_major, backend c10d. Between peers
that have no rows for each other only headers travel; the table has the most messages that there can be. In a check all
peers have rows for each other, so that counts must be equal to what is computed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from ranks import over_ranks, positive, run_ranks, write_results

import torch_ep

HEADER_BYTES = 344  # csrc/c10d/channel.h
HEADERS_HELD = 4  # per peer and rank itself: two exchanges, in and out
EXCHANGES = 3  # plan, dispatch, combine
# Messages of rows per peer: the experts of a plan; weights and rows; rows. On a grid rows go in parts of the columns.
ROW_MESSAGES = 1 + 2 + 1
PARTS = 4  # csrc/local/grid.cpp
GRID_ROW_MESSAGES = 1 + (1 + PARTS) + PARTS
HIDDEN, TOPK, NUM_EXPERTS_PER_RANK, TOKENS = 1024, 8, 4, 64


class Growth(NamedTuple):
    """Per rank."""

    connections: int
    headers: int
    most_messages: int  # headers included
    header_bytes: int  # sent in the three exchanges
    held_bytes: int  # of headers, for as long as the communicator lives


def flat(world_size: int) -> Growth:
    peers = world_size - 1
    headers = EXCHANGES * peers
    return Growth(
        peers,
        headers,
        headers + ROW_MESSAGES * peers,
        headers * HEADER_BYTES,
        HEADERS_HELD * world_size * HEADER_BYTES,
    )


def grid(world_size: int, ranks_per_node: int) -> Growth:
    rail, node = flat(world_size // ranks_per_node), flat(ranks_per_node)
    sums = Growth(*(a + b for a, b in zip(rail, node, strict=True)))
    return sums._replace(most_messages=sums.headers + GRID_ROW_MESSAGES * sums.connections)


def row_bytes(plan: torch_ep.Plan, rank: int) -> int:
    """Bytes of rows that one level sends in plan, dispatch and combine, without those of this rank itself."""

    def to_others(counts: torch.Tensor) -> int:
        return int(counts.sum() - counts[rank])

    experts = weights = 4 * TOPK  # int32, float32
    row = 4 * HIDDEN
    return to_others(plan.send_counts) * (experts + weights + row) + to_others(plan.recv_counts) * row


def count(rank: int, ranks: int, port: int, args: argparse.Namespace, results: Any) -> None:
    """One rank of a check. Rank 0 sends the differences between what was counted and what is computed."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    ranks_per_node = 2
    group = dist.new_group()
    torch_ep.init(group)
    communicator = torch_ep.init(ranks_per_node=ranks_per_node)
    levels = [group.group_name], [c.group_name for c in (communicator.rail, communicator.node) if c is not None]
    num_experts = NUM_EXPERTS_PER_RANK * ranks
    generator = torch.Generator().manual_seed(rank)
    scores, topk_idx = torch.rand(TOKENS, num_experts, generator=generator).topk(TOPK)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)

    def traffic(names: list[str]) -> torch.Tensor:
        return torch.tensor([torch.ops.ep._traffic(name) for name in names]).sum(0)

    problems = []
    for names, on, computed in (
        (levels[0], group, flat(ranks)),
        (levels[1], None, grid(ranks, ranks_per_node)),
    ):
        before = traffic(names)
        plan = torch_ep.plan(topk_idx, num_experts, on)
        rows, weights = torch_ep.dispatch(x, plan, topk_weights=scores)
        torch_ep.combine(rows, plan, row_weights=weights)
        messages, sent, held = (traffic(names) - before * torch.tensor([1, 1, 0])).tolist()
        if plan.rail is None:
            payload = row_bytes(plan, rank)
        else:
            payload = row_bytes(plan.rail, rank // ranks_per_node) + row_bytes(plan, rank % ranks_per_node)
        for what, counted, expected in (
            ("messages", messages, computed.most_messages),
            ("bytes sent", sent, computed.header_bytes + payload),
            ("bytes of headers held", held, computed.held_bytes),
        ):
            most = int(over_ranks(abs(counted - expected)))
            if most > 0:
                problems.append(f"{ranks} ranks: {what} differ from what is computed by up to {most}")
    if rank == 0:
        results.send(problems)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks-per-node", type=positive, default=8, help="default: %(default)s")
    parser.add_argument(
        "--check", type=positive, nargs="+", metavar="RANKS", help="even numbers of processes", default=[]
    )
    parser.add_argument("--output", type=Path, help="where to write the table, without .json")
    args = parser.parse_args()
    for ranks in args.check:
        (problems,) = run_ranks(count, ranks, args)
        if problems:
            sys.exit("\n".join(problems))
        print(f"{ranks} processes: messages, bytes and memory as computed")
    rows = []
    print(f"{'ranks':>6} {'':8}" + "".join(f"{name.replace('_', ' '):>15}" for name in Growth._fields))
    world_size = 16
    while world_size <= 2048:
        for name, growth in (("flat", flat(world_size)), ("two levels", grid(world_size, args.ranks_per_node))):
            print(f"{world_size:>6} {name:8}" + "".join(f"{value:>15,}" for value in growth))
            rows.append({"ranks": world_size, "levels": name, **growth._asdict()})
        world_size *= 2
    if args.output is not None:
        print(write_results(args.output, {"ranks_per_node": args.ranks_per_node, "rows": rows}))


if __name__ == "__main__":
    main()
