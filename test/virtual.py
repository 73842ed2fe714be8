"""Ranks of the nvlink transport for tests: virtual ones, several on one GPU, and real ones, a process and a GPU each.

open_world("virtual-3").run(fn, *args)    # fn(rank, world_size, group, *args) on every rank
open_world("gpus-2").run(fn, *args)       # the same
"""

from __future__ import annotations

import atexit
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, Protocol
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import Workers, World, answer_jobs

import torch_ep

# Far above any healthy wait, also where eight ranks share a GPU and a host.
TIMEOUT = timedelta(seconds=30)
EXPERTS_PER_RANK = 64
NCCL = "cpu:gloo,cuda:nccl"
VIRTUAL = [f"virtual-{n}" for n in (1, 2, 3, 4, 5, 8)]
GPUS = [f"gpus-{n}" for n in (2, 3, 4)]

# Note [Kernels that wait for other kernels]
# A virtual rank's kernel waits on the GPU for another rank's, which its thread may not have launched yet. So nothing on
# the way to that launch may wait for the device: no kernel is loaded on its first use, and no two streams share a
# hardware queue. Both are set before CUDA starts, hence the process of their own. Nor is device memory allocated then
# (CUDA C++ Programming Guide, "Implicit Synchronization"): each stream's share is in the allocator's hands before.
_HOST_ENVIRONMENT = {"CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}


class Ranks(Protocol):
    world_size: int

    def run(self, fn: Callable, *args: Any, limit_s: float = 240, **kwargs: Any) -> list[Any]:
        """`fn(rank, world_size, group, *args, **kwargs)` on every rank; its results. `fn`: a module's function."""
        ...


def limits(world_size: int) -> dict[str, Any]:
    """Of every world here: arguments of `torch_ep.init`."""
    return {
        "max_tokens_per_rank": 2048,
        "hidden": 8192,
        "num_topk": 32,
        "num_experts": EXPERTS_PER_RANK * world_size,
    }


_RESERVED_BYTES = 2**30
_RESERVED_SMALL_BLOCKS = 64  # of 1 MiB, the most that the allocator takes for small

_barriers: dict[str, threading.Barrier] = {}


def meet(group: str | None) -> None:
    """Waits on the host until every rank is here. No kernel takes part."""
    if group in _barriers:
        _barriers[group].wait()
    elif dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # on CPU


def _reserve(stream: torch.cuda.Stream) -> None:
    """Lets the allocator have memory for the stream: see Note [Kernels that wait for other kernels]."""
    with torch.cuda.stream(stream):
        blocks = [torch.empty(_RESERVED_BYTES, dtype=torch.uint8, device="cuda")]
        blocks += [torch.empty(2**20, dtype=torch.uint8, device="cuda") for _ in range(_RESERVED_SMALL_BLOCKS)]
    del blocks


class VirtualWorld:
    """`world_size` ranks in this process, on one GPU: each a thread with a stream of its own.

    A single rank runs in the thread that calls `run`, since CUDA graphs of torch.compile belong to the main thread.
    """

    def __init__(
        self, world_size: int, *, timeout: timedelta = TIMEOUT, num_sms: int = 8, device: int = 0, **changes: int
    ) -> None:
        self.world_size = world_size
        torch.cuda.set_device(device)
        self.groups = torch_ep.comm.init_virtual(
            world_size, **{**limits(world_size), **changes}, timeout=timeout, num_sms=num_sms
        )
        barrier = threading.Barrier(world_size)
        _barriers.update((group, barrier) for group in self.groups)
        self._device = device
        self._streams = [torch.cuda.Stream() for _ in range(world_size)]
        for stream in self._streams:
            _reserve(stream)
        self._jobs: list[queue.SimpleQueue] = [queue.SimpleQueue() for _ in range(world_size)]
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        if world_size > 1:
            for rank in range(world_size):
                thread = threading.Thread(target=self._serve, args=(rank,), daemon=True)
                thread.start()
                self._threads.append(thread)

    def run(self, fn: Callable, *args: Any, limit_s: float = 240, **kwargs: Any) -> list[Any]:
        """As `Ranks`. Raises if a rank raised, or does not answer within `limit_s`; then the ranks are of no more use.

        `limit_s` does not bound a single rank, which nobody waits for.
        """
        answers: dict[int, tuple[bool, Any]] = {}
        if self.world_size == 1:
            answers[0] = self._call(0, fn, args, kwargs)
        else:
            for jobs in self._jobs:
                jobs.put((fn, args, kwargs))
            deadline = time.monotonic() + limit_s
            while len(answers) < self.world_size:
                try:
                    rank, answer = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    raise TimeoutError(self._where_they_are(fn, limit_s, set(answers))) from None
                answers[rank] = answer
        failed = [f"--- rank {rank}:\n{answer}" for rank, (ok, answer) in sorted(answers.items()) if not ok]
        if failed:
            raise AssertionError("\n".join(failed))
        return [answers[rank][1] for rank in range(self.world_size)]

    def close(self) -> None:
        """Ends the threads and the ranks. Not after a time-out: a thread may still be in an exchange."""
        for jobs in self._jobs:
            jobs.put(None)
        for thread in self._threads:
            thread.join()
        for group in self.groups:
            torch_ep.destroy(group)
            del _barriers[group]

    def _serve(self, rank: int) -> None:
        while (job := self._jobs[rank].get()) is not None:
            self._answers.put((rank, self._call(rank, *job)))

    def _call(self, rank: int, fn: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[bool, Any]:
        try:
            torch.cuda.set_device(self._device)
            stream = self._streams[rank]
            with torch.cuda.stream(stream):
                result = fn(rank, self.world_size, self.groups[rank], *args, **kwargs)
            stream.synchronize()
            return True, result
        except BaseException:
            return False, traceback.format_exc()

    def _where_they_are(self, fn: Callable, limit_s: float, answered: set[int]) -> str:
        frames = sys._current_frames()
        lines = [f"{fn.__name__}: no answer within {limit_s} s"]
        for rank, thread in enumerate(self._threads):
            frame = frames.get(thread.ident or 0)
            if rank not in answered and frame is not None:
                lines.append(f"--- rank {rank} is at:\n{''.join(traceback.format_stack(frame))}")
        return "\n".join(lines)


_hosted: dict[int, VirtualWorld] = {}  # in the host process


def _host(rank: int, pipe: Connection) -> None:
    """The process of the virtual ranks; see Note [Kernels that wait for other kernels]."""
    for name, value in _HOST_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(1)
    answer_jobs(rank, 1, pipe)


def _run_hosted(
    rank: int, _: int, world_size: int, fn: Callable, args: tuple, kwargs: dict[str, Any], limit_s: float
) -> list[Any]:
    if world_size not in _hosted:
        _hosted[world_size] = VirtualWorld(world_size)
    return _hosted[world_size].run(fn, *args, limit_s=limit_s, **kwargs)


def _on_default_group(rank: int, world_size: int, fn: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    result = fn(rank, world_size, None, *args, **kwargs)
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return result


class HostedRanks:
    """Virtual ranks in the host process, which all sizes share."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def run(self, fn: Callable, *args: Any, limit_s: float = 240, **kwargs: Any) -> list[Any]:
        host = _workers("host", lambda: Workers(1, _host))
        # The host itself gives up after limit_s, and can say where the ranks are.
        (answers,) = host.run(_run_hosted, self.world_size, fn, args, kwargs, limit_s, limit_s=limit_s + 60)
        if answers is None:
            raise AssertionError(f"{fn.__name__}: the process of the virtual ranks is gone")
        return answers


class ProcessRanks:
    """Ranks that are processes, by the default group: on a GPU each, or over gloo where that is all there is."""

    def __init__(self, world_size: int, name: str, make: Callable[[], World]) -> None:
        self.world_size = world_size
        self._name, self._make = name, make

    def run(self, fn: Callable, *args: Any, limit_s: float = 240, **kwargs: Any) -> list[Any]:
        return _workers(self._name, self._make).run(_on_default_group, fn, args, kwargs, limit_s=limit_s)


_running: dict[str, Workers] = {}


def _workers(name: str, make: Callable[[], Workers]) -> Workers:
    """Those of that name; new ones after a failure, which may have left the old ones out of step."""
    found = _running.get(name)
    if found is not None and (found.failed or not all(process.is_alive() for process in found.processes)):
        found.close()
        found = None
    if found is None:
        found = _running[name] = make()
    return found


@atexit.register
def _close_all() -> None:
    for workers in _running.values():
        workers.close()


def _without_gpu(world_size: int) -> World:
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):  # the processes inherit it
        return World(world_size, **limits(world_size))


def open_world(name: str) -> Ranks:
    """ "virtual-N": N virtual ranks. "gpus-N": N GPUs over nvlink. "gloo-N": N processes without a GPU.

    Skips the test that asks where there are not as many GPUs.
    """
    kind, _, count = name.partition("-")
    world_size = int(count)
    if kind == "virtual":
        return HostedRanks(world_size)
    if kind == "gloo":
        return ProcessRanks(world_size, name, lambda: _without_gpu(world_size))
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"expected {world_size} GPUs, got {torch.cuda.device_count()}")
    return ProcessRanks(
        world_size,
        name,
        lambda: World(world_size, TIMEOUT, backend=NCCL, transport="nvlink", **limits(world_size)),
    )
