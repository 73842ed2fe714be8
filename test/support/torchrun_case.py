"""The program that `torchrun` starts on every host of api/test_groups.py: compares operators with the reference."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor

import torch_ep
from support.harness import PATIENCE, random_topk, seeded
from torch_ep import reference

NUM_EXPERTS, NUM_TOPK, HIDDEN = 8, 3, 5


def check_against_reference(group: torch_ep.comm.Group, rank: int, world_size: int, seed: int = 0) -> None:
    """Plans, dispatches and combines on `group`, of which this is `rank`; raises on any difference, at the end."""
    tokens = [4 + 3 * r for r in range(world_size)]
    idx = [random_topk(n, NUM_TOPK, NUM_EXPERTS, seeded(seed, r)) for r, n in enumerate(tokens)]
    x = [torch.randn(n, HIDDEN, generator=seeded(seed, r, 1)) for r, n in enumerate(tokens)]
    w = [torch.rand(n, NUM_TOPK, generator=seeded(seed, r, 2)) for r, n in enumerate(tokens)]
    differences: list[str] = []

    def expect(name: str, got: Tensor | None, want: Tensor | None) -> None:
        if got is None or want is None or not torch.equal(got, want):
            differences.append(f"{name}: expected {want}, got {got}")

    for layout in ("rank_major", "expert_major"):
        for capacity in (None, 8):
            plan = torch_ep.plan(idx[rank], NUM_EXPERTS, group, layout=layout, capacity=capacity)
            plans = reference.plan(idx, NUM_EXPERTS, layout=layout, capacity=capacity)
            rows, weights = torch_ep.dispatch(x[rank], plan, topk_weights=w[rank])
            moved = reference.dispatch(x, plans, topk_weights=w)
            expect("rows", rows, moved[rank][0])
            expect("weights", weights, moved[rank][1])
            sums = torch_ep.combine(rows, plan)
            expect("sums", sums, reference.combine([r for r, _ in moved], plans)[rank][0])
    if differences:
        raise AssertionError("\n".join(differences))


def main() -> None:
    dist.init_process_group("gloo", timeout=PATIENCE)
    torch_ep.init(timeout=PATIENCE)
    check_against_reference(None, dist.get_rank(), dist.get_world_size())
    print(f"rank {dist.get_rank()} of {dist.get_world_size()}: equal to the reference", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
