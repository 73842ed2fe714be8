"""A gradient scaler whose ranks skip steps together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm import Group
from .groups import RankGroup, groups_of

__all__ = ["GradScaler"]


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` for experts that are spread over ranks: all ranks of a group take a step, or none does.

    No other rank's gradients show that one rank's experts have overflowed. With torch's scaler, that rank alone skips
    the step and reduces its scale. Here `unscale_` and `step` are collective over `group`.

    Args:
        device, init_scale, growth_factor, backoff_factor, growth_interval, enabled: as in `torch.amp.GradScaler`.
        group: all ranks that train one model: those of the experts and those of the replicas. A ProcessGroup, a
            group's name, a DeviceMesh of any number of dimensions, or None for the default group.
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        group: Group = None,
    ) -> None:
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self._groups: tuple[RankGroup, ...] = groups_of(group)

    def _unscale_grads_(self, *args: Any, **kwargs: Any) -> dict[torch.device, Tensor]:
        # Both `unscale_` and the check for optimizers that unscale by themselves come here.
        found = super()._unscale_grads_(*args, **kwargs)
        assert self._scale is not None
        own = [t.to(self._scale.device) for t in found.values()]
        anywhere = torch.stack(own).max() if own else torch.zeros((), device=self._scale.device)
        for group in self._groups:
            anywhere = group.all_reduce(anywhere, dist.ReduceOp.MAX)
        # Also of a rank without gradients, which torch's scaler would refuse to step.
        return {device: anywhere.to(device) for device in found or (self._scale.device,)}
