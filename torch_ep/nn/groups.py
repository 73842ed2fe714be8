"""Groups of ranks that modules keep: by name, but safe to pickle."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..comm import Group, process_group, resolve

__all__ = ["RankGroup", "data_parallel_groups", "groups_of"]

_DESCRIPTION_BYTES = 128  # of a dtype and a shape, as text


class RankGroup:
    """A process group, by its name.

    The name counts the groups of a process, so that a pickled name may be another group where it is loaded: ranks are
    compared before the first use there.
    """

    def __init__(self, group: Group = None) -> None:
        self._name, self.size = resolve(group)
        self._rank = 0
        self.ranks: tuple[int, ...] = ()
        if self.size > 1:
            process = process_group(self._name)
            self._rank, self.ranks = process.rank(), tuple(dist.get_process_group_ranks(process))
        self._unchecked = False

    @property
    def name(self) -> str:
        if self._unchecked:
            self._check()
        return self._name

    @property
    def rank(self) -> int:
        if self._unchecked:
            self._check()
        return self._rank

    @property
    def position(self) -> tuple[int, int]:
        """Rank and size, also of a group that this process does not have."""
        return self._rank, self.size

    def is_same(self, other: RankGroup) -> bool:
        """Whether both were made from one group, also if this process does not have it."""
        return (self._name, self.ranks) == (other._name, other.ranks)

    def others(self, ranks: Iterable[int]) -> list[int]:
        """Those of `ranks`, global ones, that are in the group, except this rank."""
        return [rank for rank in ranks if rank in self.ranks and rank != self.ranks[self.rank]]

    def on_device(self, t: Tensor) -> Tensor:
        """`t` on a device that the group has a backend for: its own, if that is one."""
        types = process_group(self.name)._device_types
        return t if torch.device(t.device.type) in types else t.to(types[0])

    def all_reduce(self, t: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Of every rank's `t`, a tensor on the same device. Collective."""
        if self.size == 1:
            return t
        reduced = self.on_device(t.clone())
        dist.all_reduce(reduced, op, group=process_group(self.name))
        return reduced.to(t.device)

    def check_same(self, op: str, t: Tensor) -> None:
        """Raises on every rank unless all pass tensors of one dtype and shape. Collective.

        gloo ends the process, or returns garbage, where ranks gather tensors of different sizes.
        """
        own = f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"[:_DESCRIPTION_BYTES]
        described = torch.zeros(_DESCRIPTION_BYTES, dtype=torch.uint8)
        described[: len(own)] = torch.tensor(list(own.encode()), dtype=torch.uint8)
        described = self.on_device(described)
        parts = [torch.empty_like(described) for _ in range(self.size)]
        dist.all_gather(parts, described, group=process_group(self.name))
        for rank, part in enumerate(parts):
            other = bytes(part.tolist()).rstrip(b"\0").decode()
            if other != own:
                raise dist.DistError(
                    f"{op}: expected tensors of one dtype and shape on every rank, got {own} on rank {self.rank} and "
                    f"{other} on rank {rank}"
                )

    def _check(self) -> None:
        try:
            process = process_group(self._name)
            found = (process.rank(), tuple(dist.get_process_group_ranks(process)))
        except (KeyError, RuntimeError, ValueError):
            found = None
        if found != (self._rank, self.ranks):
            got = "no such group" if found is None else f"rank {found[0]} of a group of ranks {list(found[1])}"
            raise RuntimeError(
                f"torch_ep.nn: expected to be rank {self._rank} of group '{self._name}' of ranks {list(self.ranks)}, "
                f"where this module was pickled, got {got}: call layer.set_group, or mark_expert_parameters again. "
                "Another rank's module has other experts: load the state of torch_ep.nn.full_state_dict(model) instead"
            )
        self._unchecked = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_unchecked": self.size > 1}

    def __deepcopy__(self, memo: dict[int, Any]) -> RankGroup:
        return self


def groups_of(group: Group) -> tuple[RankGroup, ...]:
    """One for each dimension of a DeviceMesh, or the one group."""
    if isinstance(group, DeviceMesh):
        return tuple(RankGroup(group.get_group(dim)) for dim in range(group.ndim))
    return (RankGroup(group),)


def data_parallel_groups(group: Group) -> tuple[RankGroup, ...]:
    """Where `group` is one dimension of a larger DeviceMesh: those of its dimensions whose names begin with "dp"."""
    if not isinstance(group, DeviceMesh):
        return ()
    root, own = group._get_root_mesh(), group.mesh_dim_names or ()
    names = [name for name in root.mesh_dim_names or () if name.startswith("dp") and name not in own]
    return tuple(RankGroup(root.get_group(name)) for name in names)
