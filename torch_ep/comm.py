"""Communicators: one for each process group, made collectively, found again by the operators through its name."""

from __future__ import annotations

from datetime import timedelta
from typing import NamedTuple, Union

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Communicator", "Group", "destroy", "init"]

Group = Union[dist.ProcessGroup, DeviceMesh, str, None]  # noqa: UP007 - evaluated, also on Python 3.10

_NO_LIMIT = -1


class Communicator(NamedTuple):
    """What `init` agreed on for one group. A limit of None is no limit."""

    group_name: str
    rank: int
    world_size: int
    timeout: timedelta
    max_tokens_per_rank: int | None = None
    hidden: int | None = None
    num_topk: int | None = None
    num_experts: int | None = None


# By group name. The kernels have a table of their own; this one is for what is decided while tracing.
communicators: dict[str, Communicator] = {}


def process_group(group_name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type] # a NewType of str


def resolve(group: Group) -> tuple[str, int]:
    """The name and world size of a group; ("", 1) where there is nobody to talk to."""
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return "", 1
        group = dist.group.WORLD
    elif isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"torch_ep: expected a DeviceMesh of one dimension, got {group.ndim} dimensions: "
                'pass the one that experts are spread over, as in mesh["ep"]'
            )
        group = group.get_group()
    elif isinstance(group, str):
        if group == "":
            return "", 1
        if torch.compiler.is_compiling() and group in communicators:
            return group, communicators[group].world_size  # Dynamo cannot trace the look-up below
        group = process_group(group)
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"torch_ep: expected group to be a ProcessGroup, a DeviceMesh, a group's name or None, "
            f"got {type(group).__name__}"
        )
    world_size = group.size()
    return ("", 1) if world_size == 1 else (group.group_name, world_size)


def init(
    group: Group = None,
    *,
    max_tokens_per_rank: int | None = None,
    hidden: int | None = None,
    num_topk: int | None = None,
    num_experts: int | None = None,
    timeout: timedelta = timedelta(minutes=5),
) -> Communicator:
    """Prepares a process group for the operators. Collective: every rank of the group calls it with the same arguments.

    Calling it again replaces the communicator of that group. Without a process group, or with a group of one rank,
    there is nothing to prepare and the operators work without it.

    Args:
        group: a ProcessGroup, a one-dimensional DeviceMesh, a group's name, or None for the default group.
        max_tokens_per_rank: most tokens that a rank will ever pass to `plan`. Bounds the symbolic sizes of compiled
            graphs. None: no limit.
        hidden: most elements of a row. None: no limit.
        num_topk: most experts of a token. None: no limit.
        num_experts: most experts. None: no limit.
        timeout: how long an exchange waits for a peer before it raises `torch.distributed.DistError`, naming it.

    Raises:
        ValueError: a limit or the timeout is not positive.
        torch.distributed.DistError: ranks passed different arguments, or one did not come.
    """
    limits = {
        "max_tokens_per_rank": max_tokens_per_rank,
        "hidden": hidden,
        "num_topk": num_topk,
        "num_experts": num_experts,
    }
    for name, limit in limits.items():
        if limit is not None and limit <= 0:
            raise ValueError(f"torch_ep.init: expected a positive {name} or None, got {limit}")
    if timeout <= timedelta():
        raise ValueError(f"torch_ep.init: expected a positive timeout, got {timeout}")
    group_name, world_size = resolve(group)
    rank = 0
    if world_size > 1:
        rank = process_group(group_name).rank()
        torch.ops.ep._init(
            group_name,
            max(1, int(timeout.total_seconds() * 1000)),
            [_NO_LIMIT if limit is None else limit for limit in limits.values()],
        )
    communicator = Communicator(group_name, rank, world_size, timeout, **limits)
    if world_size > 1:
        communicators[group_name] = communicator
    return communicator


def destroy(group: Group = None) -> None:
    """Forgets the communicator of a group. Local, never waits; the process group itself stays as it is."""
    group_name, world_size = resolve(group)
    if world_size > 1:
        communicators.pop(group_name, None)
        torch.ops.ep._destroy(group_name)
