"""Where tests run that hold on CPU and on CUDA alike: fixture `device` (conftest.py) and the ranks that go with it.

On CPU rows travel by c10d over gloo. On CUDA they travel by nvlink, whose kernels also run for one rank alone once
`init` was given every limit, those of the low-latency pair once it was given `low_latency_tokens`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch

import torch_ep
from support.harness import world
from support.virtual import open_world

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])

# Of one rank on CUDA: above what any of these tests needs.
LIMITS = {"max_tokens_per_rank": 8192, "hidden": 64, "num_topk": 8, "num_experts": 64, "low_latency_tokens": 16}
# Far more than a kernel that waits for its own blocks needs.
TIMEOUT = timedelta(seconds=20)


@contextlib.contextmanager
def one_rank_on(device: str, *, timeout: timedelta = TIMEOUT, **changes: int) -> Iterator[None]:
    """Has the operators without a group run in the kernels of nvlink, where `device` is "cuda"."""
    if device == "cpu":
        yield
        return
    torch_ep.init("", backend="nvlink", timeout=timeout, **{**LIMITS, **changes})
    try:
        yield
    finally:
        torch.cuda.synchronize()  # so that the buffers can go
        torch_ep.destroy("")


class Ranks:
    """`run(fn, *args)` calls `fn(rank, world_size, *args)` on every rank and returns the results, which are on CPU.

    "cpu": the shared processes of that world size. "cuda": a GPU each; skips the test where there are not as many.
    """

    def __init__(self, device: str, world_size: int) -> None:
        self._ranks = world(world_size) if device == "cpu" else None
        self._gpus = None if device == "cpu" else open_world(f"gpus-{world_size}", may_share=False)

    def run(self, fn: Callable, *args: Any, **kwargs: Any) -> list[Any]:
        if self._ranks is not None:
            return self._ranks.run(fn, *args, **kwargs)
        assert self._gpus is not None
        return self._gpus.run(_on_default_group, fn, args, kwargs)


def _on_default_group(
    rank: int, world_size: int, group: str | None, fn: Callable, args: tuple, kwargs: dict[str, Any]
) -> Any:
    return fn(rank, world_size, *args, **kwargs)
