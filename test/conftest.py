"""Fixtures of several files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from devices import CUDA, one_rank_on


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Either "cpu", or "cuda" with the nvlink backend for one rank: see devices.py."""
    with one_rank_on(request.param):
        yield request.param
