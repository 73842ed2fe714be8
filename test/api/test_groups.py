"""Every way to name a group, several groups in one process, their life and death, and ranks on several hosts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.harness import LIMIT_S, PATIENCE, World, free_port, random_topk, seeded, world
from support.torchrun_case import HIDDEN, NUM_EXPERTS, NUM_TOPK, check_against_reference
from torch.distributed.device_mesh import init_device_mesh

import torch_ep
from torch_ep import rendezvous

TIMEOUT = PATIENCE


def _plan(group: Any) -> torch_ep.Plan:
    return torch_ep.plan(random_topk(4, NUM_TOPK, NUM_EXPERTS, seeded(1)), NUM_EXPERTS, group)


def _default(world_size: int) -> Any:
    return None


def _process_group(world_size: int) -> Any:
    return dist.new_group(list(range(world_size)))


def _name(world_size: int) -> Any:
    return dist.new_group(list(range(world_size))).group_name


def _mesh(world_size: int) -> Any:
    return init_device_mesh("cpu", (world_size,))


NAMED = {"None": _default, "ProcessGroup": _process_group, "name": _name, "DeviceMesh": _mesh}


def _check_named(rank: int, world_size: int, make: Callable[[int], Any]) -> tuple[int, int]:
    group = make(world_size)
    communicator = torch_ep.init(group, timeout=TIMEOUT)
    check_against_reference(group, rank, world_size)
    if communicator.group_name != dist.group.WORLD.group_name:  # a mesh of all ranks is the default group, which stays
        torch_ep.destroy(group)
    return communicator.rank, communicator.world_size


@pytest.mark.parametrize("named", NAMED)
def test_arguments_that_name_a_group(named: str) -> None:
    assert world(2).run(_check_named, NAMED[named]) == [(0, 2), (1, 2)]


def _check_mesh_dimension(rank: int, world_size: int) -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    torch_ep.init(mesh["ep"], timeout=TIMEOUT)
    # Each row of the mesh has data of its own, at the same time.
    check_against_reference(mesh["ep"], mesh.get_local_rank("ep"), 2, seed=mesh.get_local_rank("dp"))
    raised = []
    cube = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("dp", "ep", "tp"))
    for call in (torch_ep.init, torch_ep.destroy, _plan):
        try:
            call(cube)
        except ValueError as error:
            raised.append(str(error))
    torch_ep.destroy(mesh["ep"])
    return raised


def test_dimension_of_a_mesh() -> None:
    for raised in world(4).run(_check_mesh_dimension):
        assert len(raised) == 3
        expected = "expected a DeviceMesh of one dimension, or of two for a grid of nodes, got 3 dimensions"
        assert all(expected in message for message in raised)


def _check_group_of_one(rank: int, world_size: int) -> tuple[str, int]:
    groups = [dist.new_group([r]) for r in range(world_size)]
    # Only one rank does anything: a group of one needs nobody else, not even `init`.
    if rank == 1:
        check_against_reference(groups[rank], 0, 1)
        communicator = torch_ep.init(groups[rank])
        check_against_reference(groups[rank], 0, 1)
        torch_ep.destroy(groups[rank])
        check_against_reference(groups[rank], 0, 1)
        return communicator.group_name, communicator.world_size
    return "", 1


def test_group_of_one_rank() -> None:
    assert world(2).run(_check_group_of_one) == [("", 1)] * 2


def _check_disjoint(rank: int, world_size: int) -> None:
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = groups[rank % 2]
    torch_ep.init(mine, timeout=TIMEOUT)
    # Different work at the same time; the ranks of a group are its own, not the world's.
    for seed in range(1 + 2 * (rank % 2)):
        check_against_reference(mine, dist.get_rank(mine), 2, seed=seed + 10 * (rank % 2))
    torch_ep.destroy(mine)


def test_disjoint_groups_at_the_same_time() -> None:
    world(4).run(_check_disjoint)


def _check_interleaved(rank: int, world_size: int) -> None:
    groups = [dist.new_group([0, 1]) for _ in range(2)]
    idx = [random_topk(6, NUM_TOPK, NUM_EXPERTS, seeded(i, rank)) for i in range(2)]
    x = [torch.randn(6, HIDDEN, generator=seeded(i, rank)) for i in range(2)]
    for group in groups:
        torch_ep.init(group, timeout=TIMEOUT)
    alone = []
    for i, group in enumerate(groups):
        plan = torch_ep.plan(idx[i], NUM_EXPERTS, group)
        alone.append(torch_ep.combine(torch_ep.dispatch(x[i], plan), plan))
    # Now step by step in turn. Each group counts its own exchanges: one is ahead of the other.
    torch_ep.plan(idx[1], NUM_EXPERTS, groups[1])
    plans = [torch_ep.plan(idx[i], NUM_EXPERTS, groups[i]) for i in range(2)]
    rows = [torch_ep.dispatch(x[i], plans[i]) for i in (1, 0)][::-1]
    together = [torch_ep.combine(rows[i], plans[i]) for i in range(2)]
    for group in groups:
        torch_ep.destroy(group)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


def test_two_groups_of_the_same_ranks_interleaved() -> None:
    world(2).run(_check_interleaved)


def _check_init_twice(rank: int, world_size: int) -> tuple[int | None, int | None]:
    group = dist.new_group(list(range(world_size)))
    first = torch_ep.init(group, max_tokens_per_rank=2, timeout=TIMEOUT)
    second = torch_ep.init(group, max_tokens_per_rank=99, timeout=TIMEOUT)
    check_against_reference(group, rank, world_size)  # with more tokens than the first allowed
    torch_ep.destroy(group)
    return first.max_tokens_per_rank, second.max_tokens_per_rank


def _reset_keeps(rank: int, world_size: int) -> tuple[Any, Any]:
    name = torch_ep.comm.resolve(None)[0]
    before = torch_ep.init(timeout=TIMEOUT)
    torch_ep.reset()
    check_against_reference(None, rank, world_size)
    return before, torch_ep.comm.communicators[name]


def test_reset_keeps_the_communicators_description() -> None:
    for before, after in world(2).run(_reset_keeps):
        assert after == before


def test_init_again_replaces_the_communicator() -> None:
    assert world(2).run(_check_init_twice) == [(2, 99)] * 2


def test_init_of_one_rank_forgets_the_backend_before(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch_ep.Communicator("", 0, 1, TIMEOUT)
    monkeypatch.setitem(torch_ep.comm.communicators, "", before)
    torch_ep.init(backend="c10d")
    assert "" not in torch_ep.comm.communicators


def _message(group: Any) -> str:
    try:
        _plan(group)
    except RuntimeError as error:
        return str(error)
    return "no error"


def _check_destroy(rank: int, world_size: int) -> list[str]:
    group = dist.new_group(list(range(world_size)))
    before = _message(group)
    torch_ep.init(group, timeout=TIMEOUT)
    check_against_reference(group, rank, world_size)
    torch_ep.destroy(group)
    torch_ep.destroy(group)  # nothing is left: nothing to do
    after = _message(group)
    # The process group is as usable as ever, and so are the operators after another init.
    total = torch.ones(())
    dist.all_reduce(total, group=group)
    assert total == world_size
    torch_ep.init(group, timeout=TIMEOUT)
    check_against_reference(group, rank, world_size)
    torch_ep.destroy(group)
    return [before, after]


def test_a_group_wants_init_before_use_and_after_destroy() -> None:
    for messages in world(2).run(_check_destroy):
        for message in messages:
            assert "ep::plan: expected an initialized group" in message
            assert "call torch_ep.init(group) on every rank first" in message


def _check_recreated(rank: int, world_size: int, port: int) -> tuple[bool, str]:
    name = dist.group.WORLD.group_name
    check_against_reference(None, rank, world_size)
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    message = _message(None)
    torch_ep.init(timeout=TIMEOUT)
    check_against_reference(None, rank, world_size)
    return dist.group.WORLD.group_name == name, message


def test_a_new_process_group_of_an_old_name_wants_init_again() -> None:
    own = World(2)  # its default group does not survive
    try:
        for same_name, message in own.run(_check_recreated, free_port()):
            assert same_name
            assert (
                "was destroyed or re-created since torch_ep.init: call torch_ep.init(group) on every rank again"
                in message
            )
    finally:
        own.close()


def _init_with_a_bad_argument(rank: int, world_size: int, connected: bool) -> str:
    group = dist.new_group()
    if connected:
        torch_ep.init(group, timeout=TIMEOUT)
    try:
        torch_ep.init(group, timeout=TIMEOUT, hidden=-1 if rank == 1 else None)
        message = ""
    except (ValueError, dist.DistError) as error:
        message = str(error).splitlines()[0]
    torch_ep.init(group, timeout=TIMEOUT)
    torch_ep.destroy(group)
    return message


@pytest.mark.parametrize("connected", [False, True], ids=["first", "again"])
def test_a_bad_argument_of_init_on_one_rank_reaches_the_others(connected: bool) -> None:
    first, second, third = world(3).run(_init_with_a_bad_argument, connected)
    own = "torch_ep.init: expected a positive hidden or None, got -1"
    assert second == own
    assert first == third and f": {own}" in first and "rank 1 failed before" in first


def test_a_rendezvous_after_a_failed_one() -> None:
    """A rank that failed has left an empty value in the store. Rank 0 comes first, and waits for the next value."""
    store = dist.HashStore()
    keys = dist.PrefixStore("torch_ep/rendezvous", store)
    keys.set("1", "")

    def gather(rank: int) -> list[str]:
        group: Any = SimpleNamespace(
            rank=lambda: rank, size=lambda: 2, get_group_store=lambda: store, group_name="a group"
        )
        return rendezvous.all_gather(group, "test", str(rank), timedelta(minutes=1))

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(gather, 0)
        while not first.done() and not keys.check(["0"]):
            time.sleep(0.01)
        time.sleep(0.2)  # rank 0 reads the empty value; if it is later, this finds nothing, and passes
        second = pool.submit(gather, 1)
        assert first.result() == second.result() == ["0", "1"]


def _late_in_a_part(rank: int, world_size: int) -> str:
    group = dist.new_group([1, 2])
    if rank == 0:
        return ""
    torch_ep.init(group, hidden=4)
    plan = torch_ep.plan(torch.zeros(1, 1, dtype=torch.int64), 2, group)
    try:
        torch_ep.dispatch(torch.zeros(1, 3 + rank), plan)
    except (ValueError, dist.DistError) as error:
        return str(error).splitlines()[0]
    return ""


def test_errors_of_a_part_of_the_ranks_say_which_global_ranks_they_are() -> None:
    _, one, two = world(3).run(_late_in_a_part)
    assert "expected at most hidden = 4" in two
    assert one.endswith("(ranks 0 to 1 of this group are global ranks [1, 2])"), one


def test_a_group_that_is_gone_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"expected the name of a process group, got 'gone', which there is not"):
        torch_ep.plan(torch.zeros(1, 1, dtype=torch.int64), 2, "gone")


def test_two_hosts_on_loopback() -> None:
    """Runs one torchrun per host, for two hosts."""
    tests = Path(__file__).parents[1]
    paths = [str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    # The name of this machine may lead elsewhere or nowhere; both agents are on the loopback interface.
    env["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    agents = [
        subprocess.Popen(
            [*command, "--node-rank", str(node), str(tests / "support" / "torchrun_case.py")],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    try:
        outputs = [agent.communicate(timeout=LIMIT_S)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    for node, (agent, output) in enumerate(zip(agents, outputs, strict=True)):
        assert agent.returncode == 0, output
        assert f"rank {node} of 2: equal to the reference" in output


def test_processes_of_a_launcher_without_a_group_are_warned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_ep.comm, "_warned_of_separate_worlds", False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.warns(
        UserWarning, match=r"launched as one of WORLD_SIZE = 4, but torch.distributed is not initialized"
    ):
        torch_ep.plan(torch.tensor([[0]]), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch_ep.plan(torch.tensor([[0]]), 2)
        torch_ep.plan(torch.tensor([[0]]), 2, "")


def _init_too_early(rank: int, world_size: int, port: int) -> list[str]:
    dist.destroy_process_group()
    torch_ep.init()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    messages = []
    for _ in range(2):
        try:
            torch_ep.plan(torch.tensor([[0]]), 2)
        except RuntimeError as error:
            messages.append(str(error).splitlines()[0])
        torch_ep.init()
    return messages


def test_init_before_the_process_group_raises_later() -> None:
    own = World(2)
    try:
        for messages in own.run(_init_too_early, free_port()):
            assert len(messages) == 1
            assert "call torch_ep.init(group) on every rank first. (torch_ep.init was called before" in messages[0]
    finally:
        own.close()
