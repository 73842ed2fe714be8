"""Runs a function on several ranks, each a process of a group. Processes stay up from test to test."""

from __future__ import annotations

import atexit
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# These limits only stop a hang, so they are far above the time of a test on a busy machine. The layer that knows most
# gives up first: an exchange, then `Workers`, then pytest (pyproject.toml).
PATIENCE = timedelta(minutes=10)
LIMIT_S = 1200.0


# Every rank needs these modules. Importing them takes seconds, so the server from which ranks are forked does it once.
PRELOADED = ["pytest", "torch_ep", "torch.testing", "torch._dynamo.testing", "torch._inductor.compile_fx"]


def process_context() -> Any:
    """The multiprocessing context that starts ranks.

    Ranks are forks of a server that has imported PRELOADED. On a GPU host they are new processes, because CUDA reads
    its environment when a process starts.
    """
    if torch.cuda.is_available():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def short_timeout() -> timedelta:
    """A timeout for tests in which a rank is missing: they wait for all of it.

    The ranks that are there must meet within it, so it is 5 to 20 seconds, by how many processes share a core.
    """
    sharing = os.getloadavg()[0] / (os.cpu_count() or 1)
    return timedelta(seconds=round(5 * min(max(1.0, sharing), 4.0)))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answer_jobs(rank: int, world_size: int, pipe: Connection) -> None:
    """Runs the jobs that come through the pipe until it is closed."""
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            os._exit(0)
        fn, args, kwargs = job
        try:
            answer = (True, fn(rank, world_size, *args, **kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)


def _serve(
    rank: int, pipe: Connection, world_size: int, port: int, timeout: timedelta, c10d_backend: str, init: dict[str, Any]
) -> None:
    import torch_ep

    torch.set_num_threads(1)
    if "cuda" in c10d_backend:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        c10d_backend,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=PATIENCE,
    )
    torch_ep.init(timeout=timeout, **init)
    answer_jobs(rank, world_size, pipe)


class Workers:
    """Processes that each run `target(rank, pipe, *args)`, which ends in `answer_jobs`."""

    def __init__(self, count: int, target: Callable[..., None], *args: Any) -> None:
        self.world_size = count
        self.failed = False  # whether something was raised: the ranks may be out of step since
        context = process_context()
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=target, args=(rank, theirs, *args), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def run(self, fn: Callable, *args: Any, limit_s: float = LIMIT_S, **kwargs: Any) -> list[Any]:
        """`fn(rank, world_size, *args, **kwargs)` on every rank; its results. `fn` must be a module's function.

        A rank that exits answers None. Raises if a rank raised, or if one does not answer within `limit_s`.
        """
        for pipe in self._pipes:
            pipe.send((fn, args, kwargs))
        answers: list[Any] = [None] * self.world_size
        pending = dict(enumerate(self._pipes))
        while pending:
            ready = wait(list(pending.values()), timeout=limit_s)
            if not ready:
                self.failed = True
                self.close()
                raise TimeoutError(f"{fn.__name__}: no answer within {limit_s} s from ranks {sorted(pending)}")
            for rank, pipe in list(pending.items()):
                if pipe in ready:
                    del pending[rank]
                    try:
                        answers[rank] = pipe.recv()
                    except EOFError:
                        answers[rank] = (True, None)
        failed = [f"--- rank {rank}:\n{answer}" for rank, (ok, answer) in enumerate(answers) if not ok]
        if failed:
            self.failed = True
            raise AssertionError("\n".join(failed))
        return [answer for _, answer in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()


class World(Workers):
    """`world_size` ranks with the default group initialized for torch_ep; `init`: further arguments of `init`."""

    def __init__(self, world_size: int, timeout: timedelta = PATIENCE, c10d_backend: str = "gloo", **init: Any) -> None:
        super().__init__(world_size, _serve, world_size, free_port(), timeout, c10d_backend, init)


_worlds: dict[int, World] = {}


def world(world_size: int) -> World:
    """The shared world of that size: for tests that leave its group usable."""
    found = _worlds.get(world_size)
    if found is None or not all(process.is_alive() for process in found.processes):
        found = _worlds[world_size] = World(world_size)
    return found


@atexit.register
def _close_all() -> None:
    for w in _worlds.values():
        w.close()


def random_topk(
    num_tokens: int, num_topk: int, num_experts: int, generator: torch.Generator, holes: float = 0.2
) -> torch.Tensor:
    """[num_tokens, num_topk] int64: different experts in each token, some -1, in no order."""
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    idx = scores.topk(min(num_topk, num_experts), dim=1).indices
    if num_topk > num_experts:
        idx = torch.cat([idx, idx.new_full((num_tokens, num_topk - num_experts), -1)], 1)
    idx[torch.rand(idx.shape, generator=generator) < holes] = -1
    return idx.contiguous()


def seeded(*seeds: int) -> torch.Generator:
    """A generator that depends on all of the numbers."""
    return torch.Generator().manual_seed(hash(seeds) % 2**31)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Also tells -0 from 0, and a NaN from none."""
    if a.dtype != b.dtype or a.shape != b.shape or not a.is_contiguous():
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
