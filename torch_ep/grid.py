"""Grids of nodes: the process groups of a group whose ranks exchange on two levels.

    rank = node * ranks_per_node + position in the node

A node is a set of ranks with fast links, usually one host. A rail is the set of ranks that have the same
position in their nodes. Every rank is in one node and on one rail.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from . import rendezvous

__all__ = [
    "Grid",
    "destroy_orphans",
    "flat_group_of",
    "gather_hosts",
    "group_of_same_ranks",
    "make_flat_group",
    "make_grid",
    "ranks_per_node_of",
]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Grid(NamedTuple):
    """The process groups of this rank. A rail and a node have groups of their own, which only torch_ep uses."""

    flat: dist.ProcessGroup
    rail: dist.ProcessGroup
    node: dist.ProcessGroup


# Grids are kept until their flat group is gone: making groups is collective, and `torch_ep.destroy` is local.
_grids: dict[tuple[str, int], Grid] = {}  # by flat group and ranks per node
_flat_groups: dict[tuple[str, str], tuple[dist.ProcessGroup, ...]] = {}  # by a mesh's groups: these, and the flat one
# Above the serial number of every group made here that this rank is in. Names have one: a store keeps the addresses of
# groups that are gone, under their names.
_next_serial = 0


def host_name() -> str:
    """A name of this host: containers of one host may have names of their own, and hosts may share a name."""
    boot_id = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    return f"{socket.gethostname()} {boot_id}"


def _names(mesh: DeviceMesh) -> tuple[str, str]:
    return mesh.get_group(0).group_name, mesh.get_group(1).group_name


def flat_group_of(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """The group of all ranks of a two-dimensional mesh; None before `make_flat_group`."""
    found = _flat_groups.get(_names(mesh))
    return None if found is None else found[-1]


def make_flat_group(mesh: DeviceMesh, timeout: timedelta) -> dist.ProcessGroup:
    """The group of all ranks of a mesh of dimensions (node, position in the node). Collective at first."""
    names, dimensions = _names(mesh), (mesh.get_group(0), mesh.get_group(1))
    found = _flat_groups.get(names)
    if found is None or found[:2] != dimensions or not _exists(found[2]):
        ranks = mesh.mesh.flatten().tolist()
        if ranks != sorted(ranks):
            raise ValueError(
                "torch_ep.init: expected a DeviceMesh of ascending ranks, (node, position in the node), got "
                f"{mesh.mesh.tolist()}"
            )
        serial = _next_serial
        for dimension in reversed(dimensions):  # then the largest of all ranks
            serials = rendezvous.all_gather(
                dimension, "torch_ep.init", str(serial), timeout, call="torch_ep.init with a mesh of nodes"
            )
            serial = max(map(int, serials))
        backend = dist.get_backend_config(dimensions[0])
        name = f"torch_ep/mesh/{hashlib.sha256(str(ranks).encode()).hexdigest()}/{serial}"
        found = _flat_groups[names] = (*dimensions, _new_group(ranks, backend, name, serial, timeout))
    return found[2]


def _exists(group: dist.ProcessGroup) -> bool:
    return group in dist.distributed_c10d._world.pg_map


def destroy_orphans() -> None:
    """Destroys the groups of rails and nodes whose flat group is gone."""
    for key, grid in list(_grids.items()):
        if not _exists(grid.flat):
            del _grids[key]
            for group in (grid.rail, grid.node):
                if _exists(group):
                    dist.destroy_process_group(group)


@contextmanager
def _no_bound_device() -> Iterator[None]:
    """Keeps torch from splitting a new NCCL group off the default group, which all ranks of that would have to join."""
    default = distributed_c10d._get_default_group()
    device = default.bound_device_id
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = device


def group_of_same_ranks(process: dist.ProcessGroup, backend: str, timeout: timedelta) -> dist.ProcessGroup:
    """Another group of the ranks of `process`, with another backend. Collective over these ranks alone."""
    serials = rendezvous.all_gather(
        process, "torch_ep.init", str(_next_serial), timeout, call="another group of the ranks"
    )
    serial = max(map(int, serials))
    name = f"torch_ep/{process.group_name}/{backend}/{serial}"
    return _new_group(dist.get_process_group_ranks(process), backend, name, serial, timeout)


def _new_group(ranks: Sequence[int], backend: str, name: str, serial: int, timeout: timedelta) -> dist.ProcessGroup:
    """A group of these ranks alone. Only they call this, with a name not used before.

    `torch.distributed.new_group(use_local_synchronization=True)` names a group by its ranks and by how many groups
    this process is in: ranks of different numbers don't meet, and after a group was destroyed they read the
    addresses of an earlier one.
    """
    global _next_serial
    _next_serial = max(_next_serial, serial + 1)
    with _no_bound_device():
        group, _ = distributed_c10d._new_process_group_helper(
            len(ranks),
            list(ranks).index(dist.get_rank()),
            list(ranks),
            dist.Backend(backend),
            distributed_c10d._get_default_store(),
            group_name=name,  # type: ignore[arg-type] # a NewType of str
            timeout=timeout,
        )
    distributed_c10d._world.pg_group_ranks[group] = {rank: index for index, rank in enumerate(ranks)}
    return group


def gather_hosts(
    process: dist.ProcessGroup, arguments: Mapping[str, Any], timeout: timedelta, *, failure: str | None = None
) -> tuple[list[str], int]:
    """Checks that all ranks call `init` with the same arguments. Collective.

    Returns:
        Each rank's host, and a serial number for `make_grid`.

    Raises:
        torch.distributed.DistError: ranks passed different arguments, or one failed, or one did not come.
    """
    shown = {name: str(value) for name, value in arguments.items()}
    answers = rendezvous.all_gather(
        process,
        "torch_ep.init",
        json.dumps([host_name(), _next_serial, shown]),
        timeout,
        call="torch_ep.init with ranks_per_node or a mesh of nodes",
        failure=failure,
    )
    hosts, serials, others = zip(*map(json.loads, answers), strict=True)
    for rank, other in enumerate(others):
        for name, value in other.items():
            if value != others[0][name]:
                raise dist.DistError(
                    f"torch_ep.init: expected the same {name} on every rank, got {others[0][name]} on rank 0 and "
                    f"{value} on rank {rank}"
                )
    return list(hosts), max(serials)


def ranks_per_node_of(hosts: Sequence[str]) -> tuple[int | None, str]:
    """Ranks per node if the ranks of each host are consecutive and equally many, else None; and the reason."""
    starts = [rank for rank, host in enumerate(hosts) if rank == 0 or hosts[rank - 1] != host]
    sizes = [end - start for start, end in zip(starts, [*starts[1:], len(hosts)], strict=True)]
    if len({*hosts}) == 1:
        return None, "all ranks are on one host"
    if len({*hosts}) != len(starts):
        return None, "the ranks of a host are not consecutive"
    if len({*sizes}) > 1:
        return None, f"hosts have different numbers of ranks: {sizes}"
    if sizes[0] == 1:
        return None, "every host has one rank"
    return sizes[0], f"{len(sizes)} hosts of {sizes[0]} ranks"


def make_grid(process: dist.ProcessGroup, ranks_per_node: int, serial: int, timeout: timedelta) -> Grid:
    """The grid of a group. Collective at first, with the same serial number on every rank."""
    key = process.group_name, ranks_per_node
    grid = _grids.get(key)
    if grid is None or grid.flat != process:
        ranks, rank = dist.get_process_group_ranks(process), process.rank()
        backend = dist.get_backend_config(process)
        number, position = divmod(rank, ranks_per_node)
        node, rail = (
            _new_group(members, backend, f"torch_ep/{process.group_name}/{name}/{serial}", serial, timeout)
            for name, members in (
                (f"node{number}", ranks[number * ranks_per_node : (number + 1) * ranks_per_node]),
                (f"rail{position}", ranks[position::ranks_per_node]),
            )
        )
        grid = _grids[key] = Grid(process, rail, node)
    return grid
