"""Ranks of the nvlink backend for tests: virtual ones, several in a process on one GPU, and real ones, a process each.

open_world("virtual-3").run(fn, *args)    # fn(rank, world_size, group, *args) on every rank
open_world("gpus-2").run(fn, *args)       # the same
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib.util
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

import torch_ep
from support.harness import Workers, World, _serve, answer_jobs, free_port

# Far above any healthy wait, also where eight ranks share a GPU and a host.
TIMEOUT = timedelta(minutes=2)
EXPERTS_PER_RANK = 64
NCCL = "cpu:gloo,cuda:nccl"
# How long a test's ranks may take, and their processes to start on a host that has just booted. These only bound hangs;
# together they stay below the timeout of pytest, which could not say where the ranks are.
LIMIT_S = 900.0
START_S = 600.0
# Until whoever waits for ranks gives up: so that they, who know where they are, do so before.
_GRACE_S = 10.0
_LOOK_S = 2.0  # between two looks at where virtual ranks are
VIRTUAL = [f"virtual-{n}" for n in (1, 2, 3, 4, 5, 8)]
GPUS = [f"gpus-{n}" for n in (2, 4, 8)]

# Note [Kernels that wait for other kernels]
# A virtual rank's kernel waits on the GPU for another rank's, which its thread may not have launched yet. So nothing
# on the way to that launch may wait for the device: no kernel is loaded on its first use, and no two streams share a
# hardware queue, of kernels or of copies. Both are set before CUDA starts, hence the process of their own. Nor is any
# operator used whose kernel torch itself compiles and loads on first use, as that of torch.exp2 (torch's
# "jiterator"). Nor is device memory allocated then (CUDA C++ Programming Guide, "Implicit Synchronization"): each
# stream's share is in the allocator's hands before. Nor does a kernel need more local memory than any before it,
# which the driver might get only once the device is idle: each kind of kernel has run before, on one rank alone.
# Last, while a copy between host and device waits for a kernel before it, it holds what the driver has few of, such
# as staging buffers for memory that is not page-locked. All ranks but one may stand there: so the host waits for the
# kernel first, and only then copies.
_HOST_ENVIRONMENT = {"CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}


class Ranks(Protocol):
    world_size: int

    def run(self, fn: Callable, *args: Any, limit_s: float = LIMIT_S, **kwargs: Any) -> list[Any]:
        """`fn(rank, world_size, group, *args, **kwargs)` on every rank; its results. `fn`: a module's function."""
        ...


def limits(world_size: int) -> dict[str, Any]:
    """Of every world here: arguments of `torch_ep.init`."""
    return {
        "max_tokens_per_rank": 2048,
        "hidden": 8192,
        "num_topk": 32,
        "num_experts": EXPERTS_PER_RANK * world_size,
        "low_latency_tokens": 128,
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


def reserve(group: str | None) -> None:
    """For one of several virtual ranks, after something that emptied the allocator's cache, such as a capture.

    They have to meet before and after: see Note [Kernels that wait for other kernels].
    """
    if group in _barriers and _barriers[group].parties > 1:
        _reserve(torch.cuda.current_stream())


def _reserve(stream: torch.cuda.Stream) -> None:
    """Lets the allocator have memory for the stream: see Note [Kernels that wait for other kernels]."""
    with torch.cuda.stream(stream):
        blocks = [torch.empty(_RESERVED_BYTES, dtype=torch.uint8, device="cuda")]
        blocks += [torch.empty(2**20, dtype=torch.uint8, device="cuda") for _ in range(_RESERVED_SMALL_BLOCKS)]
    del blocks


class _WaitsBeforeCopies(TorchFunctionMode):
    """See Note [Kernels that wait for other kernels]."""

    _COPIES = ("to", "cpu", "cuda", "copy_", "item", "tolist", "equal", "allclose", "nonzero")
    _CASTS = ("__bool__", "__int__", "__float__", "__index__")

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        copies = getattr(func, "__name__", "") in (*self._COPIES, *self._CASTS)
        if copies and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream().synchronize()
        return func(*args, **(kwargs or {}))


class VirtualWorld:
    """`world_size` ranks in this process, on one GPU: each a thread with a stream of its own.

    A single rank runs in the thread that calls `run`, since CUDA graphs of torch.compile belong to the main thread.
    """

    def __init__(
        self, world_size: int, *, timeout: timedelta = TIMEOUT, num_sms: int = 8, device: int = 0, **changes: Any
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

    def run(self, fn: Callable, *args: Any, limit_s: float = LIMIT_S, **kwargs: Any) -> list[Any]:
        """As `Ranks`. Raises if a rank raised, or does not answer within `limit_s`; then the ranks are of no more use.

        The message has what ranks raised, the first one first, and where those stood that stood still. `limit_s` does
        not bound a single rank, which nobody waits for.
        """
        if self.world_size == 1:
            ok, answer = self._call(0, fn, args, kwargs)
            if not ok:
                raise AssertionError(answer)
            return [answer]
        for stream in self._streams:
            _reserve(stream)  # anew, if something has emptied the cache
        for jobs in self._jobs:
            jobs.put((fn, args, kwargs))
        begun = time.monotonic()
        answers: dict[int, Any] = {}
        failures: list[str] = []
        watch = _Watch(self._threads)
        while len(answers) < self.world_size:
            if time.monotonic() - begun > limit_s:
                missing = sorted(set(range(self.world_size)) - set(answers))
                failures.insert(0, f"{fn.__name__}: no answer within {limit_s:g} s from ranks {missing}")
                raise TimeoutError("\n".join([*failures, *watch.stood_still()]))
            try:
                rank, (ok, answers[rank]) = self._answers.get(timeout=_LOOK_S)
            except queue.Empty:
                watch.look(set(range(self.world_size)) - set(answers))
                continue
            if not ok:
                failures.append(f"--- rank {rank}, after {time.monotonic() - begun:.1f} s:\n{answers[rank]}")
        if failures:
            raise AssertionError("\n".join([*failures, *watch.stood_still()]))
        return [answers[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """Ends the threads and the ranks. Not after a timeout: a thread may still be in an exchange."""
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
            # A single rank waits for nobody, and is compiled, which modes are in the way of.
            waits = _WaitsBeforeCopies() if self.world_size > 1 else contextlib.nullcontext()
            with torch.cuda.stream(stream), waits:
                result = fn(rank, self.world_size, self.groups[rank], *args, **kwargs)
            stream.synchronize()
            return True, result
        except BaseException:
            _barriers[self.groups[rank]].abort()  # this rank comes to none any more
            return False, traceback.format_exc()


class _Watch:
    """Looks at the stacks of threads: who has the same one twice in a row stands still."""

    def __init__(self, threads: list[threading.Thread]) -> None:
        self._threads = threads
        self._since: dict[int, tuple[str, float]] = {}
        self._longest: dict[int, tuple[float, str]] = {}

    def look(self, ranks: set[int]) -> None:
        frames, now = sys._current_frames(), time.monotonic()
        for rank in ranks:
            stack = "".join(traceback.format_stack(frames.get(self._threads[rank].ident or 0)))
            before, since = self._since.get(rank, ("", now))
            if stack == before:
                self._longest[rank] = max(self._longest.get(rank, (0.0, "")), (now - since, stack))
            else:
                self._since[rank] = stack, now
        frames.clear()  # this one holds them, and they hold it

    def stood_still(self) -> list[str]:
        return [
            f"--- rank {rank} stood still for {seconds:.0f} s or more at:\n{stack}"
            for rank, (seconds, stack) in sorted(self._longest.items())
        ]


class Watched(Workers):
    """Workers whose message, if one of them does not answer in time, has the Python stacks of those."""

    def __init__(self, count: int, target: Callable[..., None], *args: Any) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._where: list[str] = []
        super().__init__(count, _begin, self._folder.name, time.time(), target, *args)

    def run(self, fn: Callable, *args: Any, limit_s: float = LIMIT_S, **kwargs: Any) -> list[Any]:
        """As `Workers`."""
        try:
            return super().run(_watched, self._folder.name, limit_s, fn, args, kwargs, limit_s=limit_s + _GRACE_S)
        except TimeoutError:
            raise TimeoutError(
                "\n".join([f"{fn.__name__}: not all answered within {limit_s:g} s", *self._where])
            ) from None

    def close(self) -> None:
        self._where = []
        for rank, process in enumerate(self.processes):
            path = Path(self._folder.name, str(rank))
            state = path.read_text() if path.exists() else "it has not begun: it imports, or could not"
            ended = "" if process.exitcode is None else f", ended with {process.exitcode}"
            self._where.append(f"--- rank {rank}{ended}: {state}")
        super().close()
        self._folder.cleanup()


@contextlib.contextmanager
def _says_where(folder: str, rank: int, what: str, limit_s: float) -> Iterator[None]:
    """Leaves in a file of this process what it does, and after `limit_s` the stacks of its threads."""
    with open(Path(folder, str(rank)), "w") as file:
        file.write(f"{what}\n")
        file.flush()
        faulthandler.dump_traceback_later(limit_s, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            file.write("ended\n")


def _begin(rank: int, pipe: Connection, folder: str, asked: float, target: Callable[..., None], *args: Any) -> None:
    with _says_where(folder, rank, f"starts, {time.time() - asked:.1f} s after it was asked to", START_S / 2):
        target(rank, pipe, *args)


def _watched(
    rank: int, world_size: int, folder: str, limit_s: float, fn: Callable, args: tuple, kwargs: dict[str, Any]
) -> Any:
    with _says_where(folder, rank, f"in {fn.__name__}", limit_s):
        return fn(rank, world_size, *args, **kwargs)


_hosted: dict[int, VirtualWorld] = {}  # in the host process


def _host(rank: int, pipe: Connection) -> None:
    """The process of the virtual ranks."""
    torch.set_num_threads(1)
    answer_jobs(rank, 1, pipe)


def _start_host() -> Workers:
    """See Note [Kernels that wait for other kernels]. The program of the parent, which the process imports before all
    else, may start CUDA: so the environment is there from the beginning."""
    with mock.patch.dict(os.environ, {**_HOST_ENVIRONMENT, **os.environ}):
        return Watched(1, _host)


def _run_each_kernel_alone() -> None:
    from support.nvlink_cases import BF16, F16, F32, F64, FP8, Case, check_cases  # they ask for CUDA

    alone = VirtualWorld(1)
    rows = [(BF16, 1000), (F16, 33), (F32, 64), (F64, 3), (FP8, 48)]
    cases = [
        Case(i, (40,), 8, 16, dtype, hidden, layout=layout, weight_dtype=F64 if shift else BF16, shift=shift)
        for i, (dtype, hidden) in enumerate(rows)
        for layout in ("rank_major", "expert_major")
        for shift in (False, True)
    ]
    (differences,) = alone.run(check_cases, cases)
    assert not differences, "\n".join(differences)
    alone.close()


def _run_hosted(
    rank: int, _: int, world_size: int, fn: Callable, args: tuple, kwargs: dict[str, Any], limit_s: float
) -> list[Any]:
    if not _hosted:
        _run_each_kernel_alone()
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

    def run(self, fn: Callable, *args: Any, limit_s: float = LIMIT_S, **kwargs: Any) -> list[Any]:
        host = _workers("host", _start_host)
        # The host itself gives up after limit_s, and knows more. Its start may come before.
        (answers,) = host.run(_run_hosted, self.world_size, fn, args, kwargs, limit_s, limit_s=limit_s + START_S)
        if answers is None:
            raise AssertionError(f"{fn.__name__}: the process of the virtual ranks is gone")
        return answers


class ProcessRanks:
    """Ranks that are processes, by the default group: on a GPU each, or over gloo where that is all there is."""

    def __init__(self, world_size: int, name: str, make: Callable[[], Workers]) -> None:
        self.world_size = world_size
        self._name, self._make = name, make

    def run(self, fn: Callable, *args: Any, limit_s: float = LIMIT_S, **kwargs: Any) -> list[Any]:
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
    if _mps_environment:  # the daemon ends once its last client has
        environment = {**os.environ, **_mps_environment}
        subprocess.run([str(MPS)], env=environment, input=b"quit\n", stdout=subprocess.DEVNULL, timeout=60)


def gpu_world(world_size: int, timeout: timedelta = TIMEOUT) -> Watched:
    """A rank on each of the first GPUs, over nvlink, with `limits`. `timeout`: of exchanges."""
    init = {"backend": "nvlink", **limits(world_size)}
    return Watched(world_size, _serve, world_size, free_port(), timeout, NCCL, init)


MPS = shutil.which("nvidia-cuda-mps-control")
_SMS_PER_RANK = 16  # of eight ranks on one GPU, with all thread blocks running at once
_mps_environment: dict[str, str] = {}


def shared_gpu_world(world_size: int, timeout: timedelta = TIMEOUT) -> Watched:
    """Processes that share the GPUs there are, under NVIDIA MPS, over nvlink on the heap of NVSHMEM."""
    init = {"backend": "nvlink", "provider": "nvshmem", "num_sms": _SMS_PER_RANK, **limits(world_size)}
    with mock.patch.dict(os.environ, _start_mps()):
        return Watched(world_size, _serve, world_size, free_port(), timeout, "cpu:gloo,cuda:gloo", init)


def _start_mps() -> dict[str, str]:
    """The environment of processes under an MPS daemon of these tests, which ends with them."""
    if not _mps_environment:
        folder = tempfile.mkdtemp(prefix="mps")
        _mps_environment.update(CUDA_MPS_PIPE_DIRECTORY=f"{folder}/pipe", CUDA_MPS_LOG_DIRECTORY=f"{folder}/log")
        for path in _mps_environment.values():
            os.makedirs(path)
        environment = {**os.environ, **_mps_environment}
        subprocess.run([str(MPS), "-d"], env=environment, check=True)
    return _mps_environment


def _without_gpu(world_size: int) -> World:
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):  # the processes inherit it
        return World(world_size, **limits(world_size))


def open_world(name: str, may_share: bool = True) -> Ranks:
    """ "virtual-N": N virtual ranks. "gpus-N": N processes over nvlink. "gloo-N": N processes without a GPU.

    Processes over nvlink have a GPU each where there are as many. Where there are fewer they share them under MPS, if
    the test says that they may; where that is not possible the test is skipped.
    """
    kind, _, count = name.partition("-")
    world_size = int(count)
    if kind == "virtual":
        return HostedRanks(world_size)
    if kind == "gloo":
        return ProcessRanks(world_size, name, lambda: _without_gpu(world_size))
    if torch.cuda.device_count() >= world_size:
        return ProcessRanks(world_size, name, lambda: gpu_world(world_size))
    if not may_share:
        pytest.skip(f"expected {world_size} GPUs, got {torch.cuda.device_count()}")
    if torch.cuda.device_count() == 0 or MPS is None or importlib.util.find_spec("nvshmem") is None:
        pytest.skip(f"expected {world_size} GPUs, or NVIDIA MPS and nvshmem4py, got {torch.cuda.device_count()} GPUs")
    return ProcessRanks(world_size, name, lambda: shared_gpu_world(world_size))
