"""Marks on modules: which of their tensors are experts, spread over a group of ranks.

Note [Marks of experts]
Tensors cannot carry the mark: `to_empty`, `deepcopy`, `fully_shard` and `load_state_dict(assign=True)` replace them.
Names cannot either: wrappers, parametrizations and adapters rename what they hold. So the mark is on the module that
owns the parameter, under the parameter's name there. `deepcopy` and `pickle` copy it with the module.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .groups import RankGroup

__all__ = ["Mark", "has_marks", "mark", "marked_modules", "marked_tensors", "marks_of", "regroup", "spans_group"]

_ATTRIBUTE = "_expert_marks"
_ALL = ""  # the name under which a module has the mark of all tensors inside
# torch.nn.utils.prune and the hooks of weight_norm and spectral_norm keep `name` as these.
_SUFFIXES = ("_orig", "_mask", "_g", "_u", "_v")


class Mark(NamedTuple):
    """How a tensor is spread: `group`'s ranks hold slices along `dim`, `size` long; None: of unknown length."""

    group: RankGroup
    dim: int
    size: int | None


class _Marks:
    """Those of one module, by the name of a tensor there."""

    def __init__(self, module: nn.Module, by_name: dict[str, Mark]) -> None:
        self._module = weakref.ref(module)
        self.by_name = by_name
        marked_modules.add(module)

    # Copies belong to copies of the module, which is in `memo` before its attributes are copied.
    def __deepcopy__(self, memo: dict[int, Any]) -> _Marks:
        module = self._owner()
        return _Marks(memo.get(id(module), module), dict(self.by_name))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Marks, (self._owner(), self.by_name)

    def _owner(self) -> nn.Module:
        module = self._module()
        assert module is not None  # it holds these marks
        return module


#: All modules with marks, for what has parameters but no module: an optimizer.
marked_modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def has_marks(module: nn.Module) -> bool:
    return _ATTRIBUTE in module.__dict__


def marks_of(module: nn.Module) -> dict[str, Mark]:
    """By the names of its own tensors; under "" that of all inside."""
    marks = module.__dict__.get(_ATTRIBUTE)
    return {} if marks is None else marks.by_name


def _size(t: Tensor | None, group: RankGroup, dim: int) -> int | None:
    if t is None or t.dim() <= dim:
        return None
    spans = isinstance(t, DTensor) and group.others(_ranks(t))
    return t.shape[dim] // group.size if spans else t.shape[dim]


def mark(module: nn.Module, group: RankGroup, names: Iterable[str] | None, dim: int, *, replace: bool = True) -> None:
    """Marks tensors of `module` by name, also those that do not exist yet, or all tensors inside.

    `replace=False`: modules that have marks keep them, and so do the modules inside those.
    """
    if has_marks(module):
        if not replace:
            return
    else:
        module.__dict__[_ATTRIBUTE] = _Marks(module, {})
    by_name = marks_of(module)
    own = dict(chain(module._parameters.items(), module._buffers.items()))
    if names is None:
        by_name.clear()
        by_name[_ALL] = Mark(group, dim, None)
        for child in module.children():
            mark(child, group, None, dim, replace=replace)
        names = own
    for name in names:
        by_name[name] = Mark(group, dim, _size(own.get(name), group, dim))


def regroup(module: nn.Module, old: RankGroup, new: RankGroup) -> None:
    """Replaces `old` by `new` in all marks inside of `module`."""
    for owner in module.modules():
        by_name = marks_of(owner)
        by_name.update({name: m._replace(group=new) for name, m in by_name.items() if m.group.is_same(old)})


def _mark_of(name: str, marks: dict[str, Mark], inherited: Mark | None) -> Mark | None:
    if name in marks:
        return marks[name]
    stem = next((name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix)), name)
    return marks.get(stem, inherited)


def marked_tensors(
    module: nn.Module,
    *,
    prefix: str = "",
    inherited: Mark | None = None,
    nested: bool = True,
) -> Iterator[tuple[str, Tensor, Mark]]:
    """Names below `prefix`, parameters and buffers of `module` that are spread over several ranks, and their marks.

    `nested`: with those of modules inside that have marks of their own.
    """
    marks = marks_of(module)
    inherited = marks.get(_ALL, inherited)
    for name, t in chain(module._parameters.items(), module._buffers.items()):
        found = _mark_of(name, marks, inherited)
        if t is not None and found is not None and found.group.size > 1:
            yield prefix + name, t, found
    for child_name, child in module._modules.items():
        if child is None or (not nested and has_marks(child)):
            continue
        child_prefix = f"{prefix}{child_name}."
        if child_name == "parametrizations" and isinstance(child, nn.ModuleDict):
            # Whatever computes an expert from parameters of its own has different ones on every rank.
            for name, of_name in child.items():
                yield from marked_tensors(
                    of_name, prefix=f"{child_prefix}{name}.", inherited=_mark_of(name, marks, inherited), nested=nested
                )
        else:
            yield from marked_tensors(child, prefix=child_prefix, inherited=inherited, nested=nested)


def _ranks(t: DTensor) -> list[int]:
    return t.device_mesh.mesh.flatten().tolist()


def spans_group(name: str, t: Tensor, found: Mark) -> bool:
    """Whether `t` is a DTensor of all ranks' experts, not of this rank's alone.

    Raises:
        ValueError: `t` is a DTensor that takes different experts of several ranks for one tensor.
    """
    if not isinstance(t, DTensor):
        return False
    others = found.group.others(_ranks(t))
    if others and found.size is not None and t.dim() > found.dim and t.shape[found.dim] == found.size:
        raise ValueError(
            f"torch_ep.nn: expected experts '{name}' to be sharded or replicated over ranks that hold the same "
            f"experts, got a DTensor that is also on ranks {others}, which hold others: pass the data-parallel mesh, "
            'as in fully_shard(model, mesh=mesh["dp"])'
        )
    return bool(others)
