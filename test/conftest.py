"""Fixtures that several files share, and how the files are spread over processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.builds import Build, load_setup_env
from support.devices import CUDA, one_rank_on

# The files that take longest start first, so that no process is left with one of them at the end.
LONGEST = [
    "test_failures.py",  # mostly waits for timeouts, which leaves a core to the compilers of the next files
    "test_cuda_sources.py",
    "test_decode.py",
    "test_compile.py",
    "test_emulator.py",
    "test_demo.py",
    "test_opcheck.py",
    "test_bench.py",
    "test_examples.py",
    "test_docs.py",
    "test_protocol.py",
    "test_packaging.py",
]
MOST_PROCESSES = 4  # each has ranks of its own


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Of `-n auto`: a process for each core. On a GPU host the tests run in one process, as they share the GPUs."""
    if torch.cuda.is_available():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores == 1 else min(cores, MOST_PROCESSES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(Path(item.path).name, len(order)))


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Either "cpu", or "cuda" with the nvlink backend for one rank: see support/devices.py."""
    with one_rank_on(request.param):
        yield request.param


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Build:
    return Build(monkeypatch, tmp_path)


@pytest.fixture
def setup_env() -> ModuleType:
    return load_setup_env()
