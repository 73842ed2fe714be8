"""What e2e/test_multi_node.py starts for each rank: exchanges until the link is cut, then again once it is back.

    python link_case.py RANKS_PER_NODE TIMEOUT_S FOLDER

The files `ready RANK` and `answer RANK` in FOLDER tell how far a rank is; it goes on at the file `back`.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import torch_ep
from support.harness import LIMIT_S, PATIENCE, random_topk, seeded


def exchange(rank: int) -> None:
    idx = random_topk(16, 3, 8, seeded(rank), 0)
    x = torch.randn(16, 4, generator=seeded(rank, 1))
    plan = torch_ep.plan(idx, 8)
    torch.testing.assert_close(torch_ep.combine(torch_ep.dispatch(x, plan), plan), 3 * x)


def main() -> None:
    ranks_per_node, timeout_s, folder = int(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=PATIENCE)
    rank = dist.get_rank()
    torch_ep.init(timeout=timedelta(seconds=timeout_s), ranks_per_node=ranks_per_node)
    exchange(rank)
    (folder / f"ready {rank}").touch()
    end = time.monotonic() + LIMIT_S
    message, began = "", time.monotonic()
    while not message and time.monotonic() < end:
        began = time.monotonic()
        try:
            exchange(rank)
        except (RuntimeError, ValueError) as error:
            message = f"{type(error).__name__}: {error}"
    waited = time.monotonic() - began
    (folder / f"answer {rank}").write_text(f"{waited}\n{message}")
    while not (folder / "back").exists() and time.monotonic() < end:
        time.sleep(0.1)
    torch_ep.init(timeout=timedelta(seconds=60), ranks_per_node=ranks_per_node)
    exchange(rank)
    (folder / f"again {rank}").touch()
    dist.barrier()


if __name__ == "__main__":
    main()
