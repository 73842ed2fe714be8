"""A peer that dies or stalls under the nvlink backend, and the life of its communicators. On GPUs, a process each.

In the folder test, `python -m nvlink.test_nvlink_failures RANK WORLD_SIZE PORT` is a rank that exits without `destroy`.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.harness import PATIENCE, free_port
from support.low_latency_cases import check_seeds, check_without
from support.nvlink_cases import works
from support.virtual import EXPERTS_PER_RANK, NCCL, START_S, Watched, gpu_world, limits, meet

import torch_ep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TIMEOUT = timedelta(seconds=5)
# Beyond the timeout: to read what the others know, and for a busy host. This only stops a hang.
SLACK_S = 300.0
# Of whatever ranks do here. This only stops a hang.
LIMIT_S = 900.0
# Of processes that start, and end by themselves.
EXIT_LIMIT_S = 900.0
KILL_AFTER_S = 0.5  # of exchanges
WORLD_SIZES = (2, 3, 4)

_worlds: dict[int, Watched] = {}


@pytest.fixture(scope="module", autouse=True)
def close_worlds() -> Iterator[None]:
    yield
    for own in _worlds.values():
        own.close()
    _worlds.clear()


@pytest.fixture(params=WORLD_SIZES, ids=[f"gpus-{n}" for n in WORLD_SIZES])
def ranks(request: pytest.FixtureRequest) -> Iterator[Watched]:
    """Those of the test before, unless one died or something was raised: most of a test would be their start."""
    count = torch.cuda.device_count()
    if count < request.param:
        pytest.skip(f"expected {request.param} GPUs, got {count}")
    own = _worlds.get(request.param)
    if own is None:
        own = gpu_world(request.param, TIMEOUT)
        if not all(own.run(has_begun, limit_s=START_S)):
            own.close()
            pytest.fail("a rank could not start: its error is in the captured output")
        _worlds[request.param] = own
    yield own
    if own.failed or not all(process.is_alive() for process in own.processes):
        _worlds.pop(request.param).close()


def has_begun(rank: int, world_size: int) -> bool:
    return True


def exchange(num_tokens: int, hidden: int, capacity: int | None, group: Any = None) -> None:
    """All of a layer; every token visits every rank. Waits for its end."""
    world_size = dist.get_world_size()
    idx = torch.arange(world_size, device="cuda").expand(num_tokens, world_size).contiguous()
    plan = torch_ep.plan(idx, world_size, group, capacity=capacity)
    rows = torch_ep.dispatch(torch.ones(num_tokens, hidden, device="cuda"), plan)
    torch_ep.combine(rows, plan)
    torch.cuda.synchronize()


def until_it_fails(capacity: int | None) -> tuple[str, str, float]:
    """The error's type and message, and the seconds until it came."""
    begin = time.monotonic()
    while True:
        try:
            exchange(512, 4096, capacity)
        except Exception as error:
            return type(error).__name__, str(error).splitlines()[0], time.monotonic() - begin


def attempt(rank: int, world_size: int, culprit: int, what: str, capacity: int | None) -> Any:
    """The culprit misbehaves; the others tell how they learnt of it, what the next call said, and how long it took."""
    exchange(64, 64, capacity)
    if rank == culprit:
        if what == "is killed between exchanges":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "is killed amid exchanges":
            threading.Timer(KILL_AFTER_S, os.kill, (os.getpid(), signal.SIGKILL)).start()
            until_it_fails(capacity)
            time.sleep(60)  # until the timer
        time.sleep(TIMEOUT.total_seconds() * 1.6)
        return None
    kind, message, seconds = until_it_fails(capacity)
    begin = time.monotonic()
    try:
        exchange(8, 8, capacity)
        again = "no error"
    except dist.DistError as error:
        again = str(error).splitlines()[0]
    again_s = time.monotonic() - begin
    begin = time.monotonic()
    if what != "stalls":
        torch_ep.destroy()
    return kind, message, seconds, again, again_s, time.monotonic() - begin


@pytest.mark.parametrize(
    ("which", "what", "capacity"),
    [
        ("last", "stalls", None),
        ("last", "stalls", 4096),
        ("first", "stalls", None),
        ("last", "is killed between exchanges", None),
        ("last", "is killed amid exchanges", 4096),
        ("first", "is killed between exchanges", None),
    ],
    ids=lambda value: str(value).replace(" ", "-"),
)
def test_a_rank_that(ranks: Watched, which: str, what: str, capacity: int | None) -> None:
    """An error names it, in time. Where all are alive, a reset makes their group work again, however often."""
    culprit = 0 if which == "first" else ranks.world_size - 1
    if which == "first" and what != "stalls" and ranks.world_size > 2:
        pytest.skip("the death of the rank that keeps the group's store is tried with two ranks")
    answers = ranks.run(attempt, culprit, what, capacity, limit_s=LIMIT_S)
    if what == "stalls":
        for differences in ranks.run(after_reset, limit_s=LIMIT_S):
            assert not differences
    for rank, answer in enumerate(answers):
        if rank == culprit:
            assert answer is None
            continue
        assert answer is not None, f"rank {rank} died too"
        kind, message, seconds, again, again_s, destroy_s = answer
        assert kind == "DistError", message
        assert f"rank {rank} waited in exchange" in message
        assert f"rank {culprit}" in message.partition(" for ")[2], message
        assert message.startswith(("ep::plan: ", "ep::dispatch: ", "ep::combine: "))
        assert seconds < KILL_AFTER_S + TIMEOUT.total_seconds() + SLACK_S
        assert again != "no error"  # until a reset
        assert again_s < SLACK_S / 2
        assert destroy_s < SLACK_S / 2


def after_reset(rank: int, world_size: int) -> list[str]:
    torch_ep.reset()
    return works(rank, world_size, None)


def resets(rank: int, world_size: int) -> list[str]:
    differences = []
    for _ in range(3):
        torch_ep.reset()
        differences += works(rank, world_size, None)
    return differences


def test_reset_without_need(ranks: Watched) -> None:
    for differences in ranks.run(resets, limit_s=LIMIT_S):
        assert not differences


def killed_while_others_destroy(rank: int, world_size: int) -> float | None:
    exchange(64, 64, 256)
    if rank == world_size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    begin = time.monotonic()
    torch_ep.destroy()
    return time.monotonic() - begin


def test_destroy_does_not_wait_for_a_peer_that_is_gone(ranks: Watched) -> None:
    for seconds in ranks.run(killed_while_others_destroy, limit_s=LIMIT_S)[:-1]:
        assert seconds is not None and seconds < SLACK_S / 2


def killed_while_others_decode(rank: int, world_size: int) -> tuple[list[str], list[bool]]:
    torch_ep.init(timeout=TIMEOUT, backend="nvlink", on_timeout="mask", **limits(world_size))
    differences = check_seeds(rank, world_size, None, 0, 4)
    meet(None)
    if rank == world_size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    differences += check_without(rank, world_size, None, world_size - 1, 20)
    return differences, torch_ep.active_ranks()


def test_a_killed_process_leaves_the_others_decoding(ranks: Watched) -> None:
    answers = ranks.run(killed_while_others_decode, limit_s=LIMIT_S)[:-1]
    for answer in answers:
        assert answer is not None
        differences, active = answer
        assert not differences
        assert active == [True] * len(answers) + [False]


def destroyed(rank: int, world_size: int) -> str:
    torch_ep.destroy()
    try:
        exchange(8, 8, None)
    except RuntimeError as error:
        message = str(error).splitlines()[0]
    else:
        message = "no error"
    torch_ep.init(timeout=TIMEOUT, backend="nvlink", **limits(world_size))
    return message if not works(rank, world_size, None) else "does not work after init"


def test_destroyed_then_initialized_again(ranks: Watched) -> None:
    for message in ranks.run(destroyed, limit_s=LIMIT_S):
        assert "expected an initialized group" in message


def exit_without_destroy(rank: int, world_size: int, port: int) -> None:
    faulthandler.dump_traceback_later(EXIT_LIMIT_S - 10)
    torch.cuda.set_device(rank)
    dist.init_process_group(
        NCCL,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=PATIENCE,
    )
    torch_ep.init(timeout=PATIENCE, backend="nvlink", **limits(world_size))
    for capacity in (None, 1024):
        exchange(128, 64, capacity)
    meet(None)  # the rank that keeps the group's store may leave only now
    print(f"rank {rank} leaves", flush=True)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_exit_without_destroy(world_size: int) -> None:
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"expected {world_size} GPUs, got {torch.cuda.device_count()}")
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "nvlink.test_nvlink_failures", *map(str, (rank, world_size, port))],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        deadline = time.monotonic() + EXIT_LIMIT_S
        for rank, process in enumerate(processes):
            try:
                output, _ = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                pytest.fail(f"rank {rank} has not ended within {EXIT_LIMIT_S:g} s:\n{process.communicate()[0]}")
            assert process.returncode == 0, output
            assert f"rank {rank} leaves" in output
            assert "terminate called" not in output and "CUDA error" not in output, output
    finally:
        for process in processes:
            process.kill()


def larger(rank: int, world_size: int) -> tuple[list[str], list[int], list[str]]:
    small = {"max_tokens_per_rank": 16, "hidden": 64, "num_topk": 2, "num_experts": 2 * world_size}
    symmetric, messages = [], []
    for given in (small, limits(world_size)):
        communicator = torch_ep.init(timeout=TIMEOUT, backend="nvlink", **given)
        symmetric.append(communicator.symmetric_bytes)
        try:
            exchange(17, 64, None)
            messages.append("no error")
        except ValueError as error:
            messages.append(str(error).splitlines()[0])
    return messages, symmetric, works(rank, world_size, None)


def test_init_again_with_larger_limits(ranks: Watched) -> None:
    # Topk is the world size here, so with two ranks the tokens are what is too many, and else the experts a token.
    for messages, (few, many), differences in ranks.run(larger, limit_s=LIMIT_S):
        assert "expected at most" in messages[0]
        assert messages[1] == "no error"
        assert few < many
        assert not differences


def used_bytes(rank: int, world_size: int, times: int) -> int:
    """Of the device, once `init` was called so often."""
    for _ in range(times):
        torch_ep.init(timeout=TIMEOUT, backend="nvlink", **limits(world_size))
        exchange(64, 64, None)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    meet(None)  # a buffer is free once no peer maps it
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_a_second_init_frees_the_memory_of_the_first(ranks: Watched) -> None:
    before = ranks.run(used_bytes, 2, limit_s=LIMIT_S)
    after = ranks.run(used_bytes, 6, limit_s=LIMIT_S)
    limit = limits(ranks.world_size)
    one_buffer = 2 * ranks.world_size * limit["max_tokens_per_rank"] * limit["hidden"] * 2
    for was, now in zip(before, after, strict=True):
        assert now - was < one_buffer  # six more would be there otherwise


def reference_workload(rank: int, world_size: int) -> tuple[int, list[str]]:
    communicator = torch_ep.init(
        timeout=TIMEOUT, backend="nvlink", max_tokens_per_rank=4096, hidden=7168, num_topk=8, num_experts=256
    )
    assert communicator.num_sms <= 24
    exchange(4096, 7168, None)
    found = communicator.symmetric_bytes
    torch_ep.init(timeout=TIMEOUT, backend="nvlink", **limits(world_size))
    return found, works(rank, world_size, None)


def test_symmetric_memory_of_the_reference_workload(ranks: Watched) -> None:
    if 256 % ranks.world_size:
        pytest.skip("256 experts over two or four ranks")
    for found, differences in ranks.run(reference_workload, limit_s=LIMIT_S):
        # One receive buffer of bfloat16 rows for dispatch, one for combine.
        assert 0 < found <= 2 * ranks.world_size * 4096 * 7168 * 2
        assert not differences


def several(rank: int, world_size: int) -> list[str]:
    """Communicators of two groups of the same ranks, used in turn."""
    other: Any = dist.new_group(list(range(world_size)))
    given = {**limits(world_size), "max_tokens_per_rank": 256, "num_experts": 2 * EXPERTS_PER_RANK * world_size}
    torch_ep.init(other, timeout=TIMEOUT, backend="nvlink", **given)
    differences: list[str] = []
    for _ in range(3):
        differences += works(rank, world_size, None) + works(rank, world_size, other.group_name)
    torch_ep.destroy(other)
    return differences + works(rank, world_size, None)


def test_two_groups_of_the_same_ranks(ranks: Watched) -> None:
    for differences in ranks.run(several, limit_s=LIMIT_S):
        assert not differences


if __name__ == "__main__":
    exit_without_destroy(*map(int, sys.argv[1:4]))
