"""Compares the results of two builds bit by bit: saves digests of random cases with one, checks them with the other.

    PYTHONPATH=OLD_TREE python test/bits.py save bits.json --ranks 1 2 3
    PYTHONPATH=NEW_TREE python test/bits.py check bits.json

Uses public functions only, and the fields of a plan by position, so that it runs with older versions too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tqdm import tqdm

import torch_ep

TIMEOUT = timedelta(minutes=1)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def digest(results: Any) -> str:
    """Of dtypes, shapes and bytes of all tensors in nested tuples."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)}".encode())
            sha.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, (tuple, list)):
            for item in value:
                add(item)

    add(results)
    return sha.hexdigest()[:16]


def random_case(seed: int, rank: int, world_size: int) -> str:
    """Runs one case. Shared numbers come from `seed`; this rank's numbers from `seed` and `rank`."""
    shared = random.Random(seed)
    g = torch.Generator().manual_seed(seed * 100 + rank)
    experts = world_size * shared.choice([1, 2, 5, 16])
    num_topk = shared.randint(1, min(experts, 8))
    tokens_of = [
        random.Random(f"{seed} {r}").choice([0, 1, 3, 17, 40] if world_size == 1 else [1, 3, 17, 40])
        for r in range(world_size)
    ]
    tokens = tokens_of[rank]
    hidden = shared.choice([1, 7, 16, 64, 129])
    dtype, layout = shared.choice(DTYPES), shared.choice(["rank_major", "expert_major"])
    alignment = shared.choice([1, 4]) if layout == "expert_major" else 1
    capacity = shared.choice([None, None, 4 * shared.randint(0, 60)])
    topk_idx = torch.rand(tokens, experts, generator=g).topk(num_topk, dim=1).indices
    topk_idx[torch.rand(tokens, num_topk, generator=g) < shared.choice([0.0, 0.3])] = -1
    plan = torch_ep.plan(topk_idx, experts, layout=layout, capacity=capacity, alignment=alignment)
    x = torch.randn(tokens, hidden, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weights = torch.rand(tokens, num_topk, generator=g).requires_grad_()
    rows, row_weights = torch_ep.dispatch(x, plan, topk_weights=weights)
    out = torch_ep.combine(rows * 2, plan, row_weights=row_weights if layout == "expert_major" else None)
    results: list[Any] = [tuple(plan)[:8], rows, row_weights, out]
    if world_size == 1:  # older versions raise in the backward of a rank without rows
        grads = torch.autograd.grad(out, (x, weights), torch.ones_like(out), allow_unused=True)
        results += [grad for grad in grads if grad is not None]
    if dtype != torch.float64 and not world_size * num_topk % 2:
        room = max(1, *shared.choices([40, 64], k=2))
        with torch.no_grad():
            received, ll_plan = torch_ep.low_latency_dispatch(
                x.detach(),
                topk_idx,
                num_experts=experts,
                max_tokens_per_rank=room,
                topk_weights=weights.detach(),
                quantize=shared.choice([None, "fp8", "fp8_pow2", "fp8_ue8m0"]),
            )
            payloads = received if isinstance(received, tuple) else (received,)
            valid = torch.arange(payloads[0].shape[1]) < ll_plan.tokens_per_expert[:, None]
            y = torch.where(valid[..., None], payloads[0].float(), 0).to(dtype)
            sums = torch_ep.low_latency_combine(y, ll_plan)
        # Rows behind the counts are undefined.
        kept = [t.reshape(*t.shape[:2], -1)[valid].contiguous() for t in payloads]
        results += [kept, tuple(ll_plan)[1:5], ll_plan.row_weights[valid], sums]
    return digest(results)


def run_cases(rank: int, world_size: int, port: int, seeds: range, answers: Any) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size, timeout=TIMEOUT)
        torch_ep.init(timeout=TIMEOUT)
    bar = tqdm(seeds, desc=f"{world_size} ranks", disable=rank > 0, file=sys.stderr)
    try:
        answers.put((rank, [random_case(seed, rank, world_size) for seed in bar]))
    except Exception:
        answers.put((rank, None))
        raise
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def digests(world_size: int, cases: int) -> list[list[str]]:
    """Per rank, a digest per case."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    answers = context.SimpleQueue()
    spawned = mp.spawn(run_cases, (world_size, port, range(cases), answers), world_size, join=False)
    found = dict(answers.get() for _ in range(world_size))
    while not spawned.join():  # raises what a rank raised
        pass
    return [found[rank] for rank in range(world_size)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["save", "check"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3], help="when saving (default: 1 2 3)")
    parser.add_argument("--cases", type=int, default=300, help="per number of ranks, when saving (default: 300)")
    args = parser.parse_args()
    if args.action == "save":
        args.file.write_text(json.dumps({ranks: digests(ranks, args.cases) for ranks in args.ranks}))
        return 0
    wrong = 0
    for ranks, before in json.loads(args.file.read_text()).items():
        now = digests(int(ranks), len(before[0]))
        differing = sorted(
            {i for old, new in zip(before, now, strict=True) for i in range(len(old)) if old[i] != new[i]}
        )
        wrong += len(differing)
        print(f"{ranks} ranks: {len(before[0])} cases, {len(differing)} differ: {differing[:10]}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
