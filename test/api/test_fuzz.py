"""As many cases of the fuzzers as fit between the other tests; `python test/fuzz.py` runs more."""

from __future__ import annotations

import pytest
from fuzz import fuzz


@pytest.mark.parametrize(
    ("what", "world_size", "count"),
    [
        ("results", 1, 150),
        ("results", 2, 100),
        ("results", 3, 100),
        ("arguments", 1, 1000),
        ("arguments", 2, 200),
        ("arguments", 3, 100),
    ],
)
def test_random_cases(what: str, world_size: int, count: int) -> None:
    ran, found = fuzz(what, world_size, 0, count, None)
    assert ran == count
    assert not found, "\n".join(found[:5])
