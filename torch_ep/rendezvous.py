"""Rendezvous of the ranks of a process group through the group's store, before the ranks have connections.

Every message has a random key, so the rendezvous does not depend on earlier calls of any rank. Every access to the
store ends at its deadline, even if the host of the store is dead.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group

__all__ = ["all_gather", "connect", "report_failure"]

T = TypeVar("T")

# Ranks must run the same protocol (csrc/c10d/channel.h, exchange.h). Raise it with every change of a message.
PROTOCOL = 4

# Rank 0 times out this much earlier than the other ranks, so that it can report the missing ranks to them.
_VERDICT = timedelta(seconds=2)
# Interval at which a wait in Python checks for signals, in seconds.
_TICK_S = 0.1


def _bounded(what: str, timeout: timedelta, act: Callable[[], T]) -> T:
    """Runs `act` and returns its result. Raises `DistError` after `timeout`: `act` may hang on a dead host."""
    result: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            result.append(act())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True, name=f"torch_ep {what}")
    thread.start()
    deadline = time.monotonic() + timeout.total_seconds()
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(_TICK_S)
    if raised:
        raise raised[0]
    if not result:
        raise dist.DistError(
            f"{what}: no answer within {timeout}: the store of the group, or a rank's host, does not answer"
        )
    return result[0]


def _names(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def all_gather(
    group: dist.ProcessGroup,
    op: str,
    value: str,
    timeout: timedelta,
    *,
    call: str | None = None,
    failure: str | None = None,
) -> list[str]:
    """Every rank's value, by group rank. Collective; returns after all ranks have called it. O(world_size) requests.

    Rank 0 collects the values and answers each rank under the random name that it gave.

    Args:
        group: the group of ranks.
        op: the name in error messages.
        value: this rank's value.
        timeout: how long to wait for the other ranks.
        call: what this rank calls, the same on every rank, where `op` may mean several calls. Default: `op`.
        failure: this rank's error, which every rank raises instead of returning values.

    Raises:
        torch.distributed.DistError: a rank timed out or failed, the store does not answer, or ranks run
            different versions of torch_ep or made different calls.
    """
    call = op if call is None else call
    rank, world_size = group.rank(), group.size()
    store = dist.PrefixStore("torch_ep/rendezvous", group.get_group_store())
    mine = uuid.uuid4().hex
    keys = [str(r) for r in range(world_size)]

    def late(names: list[int]) -> dist.DistError:
        whom = f"{_names(names)}, not heard of since" if names else "a rank that is not known"
        return dist.DistError(
            f"{op}: rank {rank} waited in the store of group '{group.group_name}' (timeout {timeout}) for {whom}: "
            "dead, stalled, or running something else"
        )

    def came() -> list[bool]:
        return [store.check([key]) and store.get(key) != b"" for key in keys]

    def collect() -> list[str]:
        deadline = time.monotonic() + timeout.total_seconds()
        try:
            store.wait(keys, timeout)
            # A rank that failed before has left an empty value, and writes the next one after it comes here.
            entries = [json.loads(store.get(key) or b"null") for key in keys]
        except Exception:
            entries = []
        while entries and not all(entries) and time.monotonic() < deadline:  # a rank that timed out earlier may retry
            time.sleep(0.02)
            entries = [json.loads(store.get(key) or b"null") for key in keys]
        if not entries or not all(entries):
            present = came()
            missing = [r for r in range(world_size) if not present[r]]
            names = [json.loads(store.get(keys[r]))["name"] for r in range(1, world_size) if present[r]]
            for name in names:
                store.set(name, json.dumps({"missing": missing}))
            linger(names)
            raise late(missing)
        for key in keys:
            store.delete_key(key)
        protocols = [entry["protocol"] for entry in entries]
        failures = [entry.get("failure") for entry in entries]
        calls = [entry.get("call") for entry in entries]
        answer = json.dumps(
            {
                "protocols": protocols,
                "failures": failures,
                "calls": calls,
                "values": [entry["value"] for entry in entries],
            }
        )
        shared = uuid.uuid4().hex
        store.set(shared, answer)
        names = [entry["name"] for entry in entries[1:]]
        for name in names:
            store.set(name, json.dumps({"shared": shared}))
        if len({*protocols}) > 1 or any(failures) or len({*calls}) > 1:
            linger(names)
        return check(answer, shared)

    def linger(names: list[str]) -> None:
        """Waits until all ranks have read the error: rank 0 may host the store, and the error may end it."""
        end = time.monotonic() + _VERDICT.total_seconds()
        while any(store.check([name]) for name in names) and time.monotonic() < end:
            time.sleep(0.02)

    def receive() -> list[str]:
        try:
            store.wait([mine], timeout + _VERDICT)
        except Exception:
            raise late([] if came()[0] else [0]) from None
        answer = json.loads(store.get(mine))
        shared = answer.get("shared")
        both = None if shared is None else store.get(shared).decode()
        store.delete_key(mine)
        if both is None:
            raise late(answer["missing"])
        return check(both, shared)

    def check(answer: str, shared: str) -> list[str]:
        if store.add(f"{shared}/readers", 1) == world_size:  # the last reader deletes the keys
            store.delete_key(shared)
            store.delete_key(f"{shared}/readers")
        both = json.loads(answer)
        for other, protocol in enumerate(both["protocols"]):
            if protocol != PROTOCOL:
                raise dist.DistError(
                    f"{op}: expected the same version of torch_ep on every rank, got protocol {PROTOCOL} on rank "
                    f"{rank} and {protocol} on rank {other}: install one version everywhere"
                )
        for other, failure in enumerate(both["failures"]):
            if failure is not None:
                raise dist.DistError(f"{op}: rank {other} failed before it: {failure}")
        for other, theirs in enumerate(both["calls"]):
            if theirs != call:
                raise dist.DistError(
                    f"{op}: expected the same call on every rank, got {call} on rank {rank} and {theirs} on "
                    f"rank {other}"
                )
        return both["values"]

    def exchange() -> list[str]:
        entry = {"name": mine, "protocol": PROTOCOL, "call": call, "value": value, "failure": failure}
        store.set(keys[rank], json.dumps(entry))
        try:
            return collect() if rank == 0 else receive()
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise dist.DistError(
                f"{op}: the store of group '{group.group_name}' is gone; its host, that of rank 0 or of the launcher, "
                f"has ended or cannot be reached: {str(error).splitlines()[0]}"
            ) from None
        except BaseException:
            store.set(keys[rank], "")  # marks this rank as absent after the error
            raise

    return _bounded(op, timeout + 2 * _VERDICT, exchange)


def report_failure(group: dist.ProcessGroup, op: str, failure: str, timeout: timedelta) -> None:
    """Reports this rank's failure to the other ranks, which are in `all_gather` or will call it."""
    # all_gather raises the failure or a timeout. The caller's own error is more specific.
    with suppress(dist.DistError):
        all_gather(group, op, "", timeout, failure=failure)


@contextmanager
def connect(group: dist.ProcessGroup, timeout: timedelta) -> Iterator[str]:
    """Connects every rank with every other over TCP, by a gloo backend of torch_ep's own. Collective.

    Yields the name of a process group with that backend, valid within the `with` block. The connections stay for as
    long as a communicator uses them.

    Raises:
        RuntimeError: this torch has no gloo, or ranks cannot reach each other.
        torch.distributed.DistError: as `all_gather`.
    """
    if not dist.is_gloo_available():
        raise RuntimeError("torch_ep.init: expected a torch that has gloo, got one without: ranks connect by it")
    rank, world_size = group.rank(), group.size()
    name = "torch_ep/" + all_gather(group, "torch_ep.init", uuid.uuid4().hex, timeout)[0]
    store = dist.PrefixStore(name, group.get_group_store())

    def start() -> Any:
        return dist.ProcessGroupGloo(store, rank, world_size, timeout)  # type: ignore[attr-defined]

    try:
        gloo = _bounded("torch_ep.init", timeout + _VERDICT, start)
    except RuntimeError as error:
        if isinstance(error, dist.DistError):
            raise
        raise RuntimeError(
            f"torch_ep.init: rank {rank} cannot connect to the other ranks of group '{group.group_name}' over TCP: if "
            "the host has several networks, set GLOO_SOCKET_IFNAME to the interface that reaches the other hosts. gloo "
            f"says: {str(error).splitlines()[0]}"
        ) from error
    connections = dist.ProcessGroup(store, rank, world_size)
    connections._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
    connections._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    _register_process_group(name, connections)  # type: ignore[arg-type] # a NewType of str
    try:
        yield name
    finally:
        _unregister_process_group(name)  # type: ignore[arg-type]
