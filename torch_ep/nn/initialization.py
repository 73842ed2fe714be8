"""Initial values for parameters, whatever has sharded or parametrized them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .marks import Mark, marks_of, spans_group

__all__ = ["new_values"]


def _fill(name: str, t: Tensor, values: Tensor, mark: Mark | None) -> None:
    """Sets `t`, which is `values` or a DTensor of which this rank has the `values` of its experts or a part of them."""
    if not isinstance(t, DTensor):
        t.copy_(values)
        return
    shape, offsets = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
    begin = list(offsets)
    if mark is not None and spans_group(name, t, mark):
        begin[mark.dim] -= mark.group.rank * values.shape[mark.dim]
    t.to_local().copy_(values[tuple(slice(b, b + n) for b, n in zip(begin, shape, strict=True))])


def _local_shape(name: str, t: Tensor, mark: Mark | None) -> list[int]:
    shape = list(t.shape)
    if mark is not None and spans_group(name, t, mark):
        shape[mark.dim] //= mark.group.size
    return shape


@contextmanager
def new_values(module: nn.Module, name: str) -> Iterator[Tensor]:
    """A plain tensor to write all of a parameter into, or all of this rank's experts; becomes its value at the end.

    FSDP2 and `distribute_experts` make the parameter a DTensor, where writing to a row may change a copy of the row. A
    parametrized one is computed anew at each access.
    """
    mark = marks_of(module).get(name)
    t = getattr(module, name)
    if module._parameters.get(name) is not None and not isinstance(t, DTensor):
        yield t
        return
    values = torch.empty(_local_shape(name, t, mark), dtype=t.dtype, device=t.device)
    yield values
    if name in module._parameters:
        _fill(name, t, values, mark)
    elif nn.utils.parametrize.is_parametrized(module, name):
        parametrizations = module.parametrizations[name]  # type: ignore[index, union-attr]
        original = getattr(parametrizations, "original", None)
        if not isinstance(t, DTensor) and all(hasattr(p, "right_inverse") for p in parametrizations):
            setattr(module, name, values)
        elif original is not None:
            _fill(name, original, values, mark)
        else:
            raise RuntimeError(
                f"torch_ep.nn: expected a right_inverse of what parametrizes '{name}', to initialize it: initialize "
                "it before it is parametrized"
            )
    else:  # torch.nn.utils.prune
        _fill(name, module._parameters[f"{name}_orig"], values, mark)  # type: ignore[arg-type]
