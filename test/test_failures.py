"""A peer that dies, stalls or runs something else: an error that names it, within the time-out, never a hang."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
from harness import World

import torch_ep

TIMEOUT = timedelta(seconds=3)
# What a rank may take beyond its time-out to find out whom to name: this only bounds a hang.
GRACE_S = 12.0


@pytest.fixture
def ranks() -> Iterator[World]:
    own = World(3, timeout=TIMEOUT)  # its group does not survive
    yield own
    own.close()


def exchange(num_tokens: int = 8, hidden: int = 4) -> None:
    world_size = torch.distributed.get_world_size()
    idx = torch.arange(world_size).expand(num_tokens, world_size).contiguous()
    torch_ep.dispatch(torch.ones(num_tokens, hidden), torch_ep.plan(idx, world_size))


def attempt(rank: int, world_size: int, culprit: int, what: str) -> tuple[str, str, float] | None:
    """The culprit misbehaves; the others tell the error's type and message, and how long it took."""
    exchange()
    begun = time.monotonic()
    if rank == culprit:
        if what == "exits":
            os._exit(1)
        if what == "exits amid rows":
            threading.Timer(0.2, os._exit, (1,)).start()
        if what == "stalls":
            time.sleep(TIMEOUT.total_seconds() * 2)
        if what in ("stalls", "does something else"):
            return None
    try:
        while True:
            exchange(2048, 1024) if what == "exits amid rows" else exchange()
    except Exception as error:
        return type(error).__name__, str(error).splitlines()[0], time.monotonic() - begun


@pytest.mark.parametrize("what", ["exits", "exits amid rows", "stalls", "does something else"])
def test_the_last_rank(ranks: World, what: str) -> None:
    culprit = ranks.world_size - 1
    answers = ranks.run(attempt, culprit, what, limit_s=60)
    for answer in answers[:culprit]:
        assert answer is not None
        kind, message, seconds = answer
        assert kind == "DistError"
        assert f"for rank {culprit}, not heard of since" in message, message
        assert message.startswith("ep::plan: rank ") or "amid" in what
        assert seconds < TIMEOUT.total_seconds() + GRACE_S
    assert answers[culprit] is None


def again(rank: int, world_size: int, culprit: int, what: str) -> list[str]:
    """What an exchange, and a reset, say after the exchange that failed."""
    attempt(rank, world_size, culprit, what)
    messages = []
    for call in (exchange, exchange, torch_ep.reset):
        try:
            call()
        except Exception as error:
            messages.append(str(error).splitlines()[0])
    return messages


@pytest.mark.parametrize("what", ["exits", "stalls"])
def test_a_closed_group_says_so(ranks: World, what: str) -> None:
    culprit = ranks.world_size - 1
    told = "is closed since an exchange on it failed: make the process group anew, then call torch_ep.init(group)"
    for messages in ranks.run(again, culprit, what, limit_s=60)[:culprit]:
        assert len(messages) == 3
        assert all(told in message for message in messages), messages
        assert messages[0].startswith("ep::plan: group '")
        assert messages[2].startswith("torch_ep.init: group '")


def test_the_rank_that_keeps_the_store(ranks: World) -> None:
    answers = ranks.run(attempt, 0, "exits", limit_s=60)
    for answer in answers[1:]:
        assert answer is not None
        kind, message, _ = answer
        assert kind == "DistError"
        assert "it is likely the one that keeps it (rank 0)" in message or "for rank 0, not heard of since" in message


def init_alone(rank: int, world_size: int) -> str | None:
    if rank == world_size - 1:
        return None
    try:
        torch_ep.init(timeout=TIMEOUT)
    except Exception as error:
        return str(error).splitlines()[0]
    return "no error"


def test_init_that_a_rank_does_not_join(ranks: World) -> None:
    for message in ranks.run(init_alone, limit_s=60)[:-1]:
        assert message.startswith("torch_ep.init: rank ")
        assert f"for rank {ranks.world_size - 1}, not heard of since" in message
