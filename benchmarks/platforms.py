"""Where it is measured: device, backend, and how to time and count there. Another device is one more entry."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Platform(NamedTuple):
    backend: str  # of torch.distributed
    device: Callable[[int], torch.device]  # of a rank
    synchronize: Callable[[], None]  # returns when the device has done all that was issued
    prepare_peak: Callable[[], None]  # once, in a process that measures memory and no times
    peak_bytes: Callable[[Callable[[], Any]], int]
    hardware: Callable[[], dict[str, Any]]


# Blocks from this size on get pages of their own while memory is measured.
_MMAP_THRESHOLD = 64 * 1024
_M_MMAP_THRESHOLD = -3  # malloc.h


def _own_status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"expected {key} in /proc/self/status")


def _count_every_block() -> None:
    """Makes this process give back at once what it frees, so that resident memory is what lives. For good.

    malloc otherwise keeps freed blocks and hands them out again: a second call would seem to need no memory.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD):
        raise RuntimeError("expected the C library to be glibc: peak memory is measured by its mallopt")
    libc.malloc_trim(0)


def _cpu_peak_bytes(call: Callable[[], Any]) -> int:
    """Most resident memory of this process during the call, above that before it.

    The kernel's own high-water mark, set back before the call: nothing is sampled, and all counts, whoever allocated
    it on whichever thread. (torch.profiler misses what the threads of gloo free: buffers live on in its books.)
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _own_status("VmRSS")
    result = call()
    peak = _own_status("VmHWM") - before
    del result
    return max(0, peak)


def _cpu_hardware() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            model = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), model)
    except OSError:
        pass  # not Linux
    return {"cpu": model, "cores": cores()}


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


PLATFORMS = {
    "cpu": Platform(
        backend="gloo",
        device=lambda rank: torch.device("cpu"),
        synchronize=lambda: None,
        prepare_peak=_count_every_block,
        peak_bytes=_cpu_peak_bytes,
        hardware=_cpu_hardware,
    ),
}
