"""State dicts of modules with marked experts, and of their optimizers.

Note [States of experts]
A rank's experts are a slice of a larger tensor, under the same name on every rank. `state_dict` says so: its values are
DTensors of all experts, sharded over the group, in the memory of this rank's. What knows DTensors saves all experts
(`torch.distributed.checkpoint`, `get_model_state_dict`), what does not know them fails instead of saving one rank's.
A DTensor also knows its rank, in its pickled mesh, so that no other rank takes it for its own.

Loading takes DTensors of the same rank, or all experts, of which every rank takes its own. A plain tensor of as many
experts as a rank has could be any rank's, and is refused. Optimizers have the same in `state_dict`; a hook on the first
step of each one finds those that update experts.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..comm import process_group
from .groups import RankGroup
from .marks import Mark, marked_modules, marked_tensors, spans_group

__all__ = ["as_dtensor", "full_tensor", "shard_like", "watch_optimizers", "watch_states"]


def full_tensor(t: DTensor) -> Tensor:
    """All of `t`, on its device; also where that is the CPU and the mesh has CUDA devices. Collective over the mesh."""
    on_mesh: Any = t.to(t.device_mesh.device_type)
    return on_mesh.full_tensor().to(t.device)


def shard_like(t: Tensor, model: DTensor) -> DTensor:
    """This rank's shard of `t`, which every rank of the mesh has, in memory of its own; placed like `model`."""
    t = t.detach()
    if not any(placement.is_shard() for placement in model.placements):
        t = t.clone()
    sharded: Any = distribute_tensor(t, model.device_mesh, model.placements, src_data_rank=None)
    return sharded if model.is_meta else sharded.to(model.device)


@torch.no_grad()
def as_dtensor(name: str, t: Tensor, mark: Mark) -> Tensor:
    """All ranks' experts, of which `t`, in the same memory, is this rank's shard."""
    if t.dim() <= mark.dim or spans_group(name, t, mark):
        return t
    if isinstance(t, DTensor):
        raise RuntimeError(
            f"torch_ep.nn: expected experts '{name}' to be sharded over their group before FSDP2 shards them: it makes "
            "states of this rank's experts alone. Call torch_ep.nn.distribute_experts(model, mesh['ep']) before "
            "fully_shard(model, mesh=mesh['dp']), or save torch_ep.nn.full_state_dict(model)"
        )
    mesh = DeviceMesh.from_group(process_group(mark.group.name), t.device.type)
    return DTensor.from_local(t, mesh, [Shard(mark.dim)], run_check=False)


def _refuse_other_ranks(name: str, value: DTensor, group: RankGroup) -> None:
    """An unpickled DTensor has the coordinate of the rank that pickled it."""
    mesh = value.device_mesh
    here = (mesh.mesh == dist.get_rank()).nonzero().flatten().tolist()
    if not here and mesh.ndim == 1:
        here = [group.rank]  # a replica's
    saved = list(mesh.get_coordinate() or ())
    if saved != here:
        raise RuntimeError(
            f"torch_ep.nn: expected experts '{name}' of this rank, at {here} of their mesh, got those of the rank at "
            f"{saved}: load each rank's own state, or that of torch_ep.nn.full_state_dict(model), on every rank"
        )


def _gathered(value: DTensor, dim: int, num_experts: int) -> Tensor:
    """The full tensor of `value`. Collective over its mesh."""
    mesh, placements, local = value.device_mesh, value.placements, value.to_local()
    shape = torch.Size([*value.shape[:dim], num_experts, *value.shape[dim + 1 :]])
    # For a model on meta, `set_model_state_dict(broadcast_from_rank0=True)` gives shards of all experts the parameter's
    # shape, which is that of one rank's experts.
    if shape != value.shape and compute_local_shape_and_global_offset(shape, mesh, placements)[0] == tuple(local.shape):
        stride = torch.empty(shape, device="meta").stride()
        value = DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
    return full_tensor(value)


def _own_experts(name: str, value: Tensor, t: Tensor, mark: Mark, *, assign: bool) -> Tensor:
    """What of `value`, from a state, belongs into `t` on this rank. Where it is assigned, it has memory of its own."""
    group, dim = mark.group, mark.dim
    if t.dim() <= dim or value.dim() != t.dim():
        return value  # torch compares the shapes
    spans = spans_group(name, t, mark)
    size = t.shape[dim] // group.size if spans else t.shape[dim]
    num_experts = size * group.size
    if value is t:
        if isinstance(t, DTensor) and not spans:
            raise RuntimeError(
                f"torch_ep.nn: expected experts '{name}' to be sharded over their group before FSDP2 shards them: "
                "broadcast_from_rank0 takes the experts of all ranks for copies. Call torch_ep.nn.distribute_experts("
                "model, mesh['ep']) before fully_shard, or pass the full state on every rank"
            )
        return value
    if isinstance(value, DTensor):
        _refuse_other_ranks(name, value, group)
        if spans and (value.device_mesh, value.placements) == (t.device_mesh, t.placements):  # type: ignore[attr-defined]
            return value
        ranks = value.device_mesh.mesh.flatten().tolist()
        over_group = bool(group.others(ranks)) or dist.get_rank() not in ranks
        if over_group and value.placements == (Shard(dim),) and value.shape[dim] == num_experts and not spans:
            return shard_like(value.to_local(), t) if isinstance(t, DTensor) else value.to_local()
        value = _gathered(value, dim, num_experts)
    if value.shape[dim] == num_experts:
        part = value if spans else value.narrow(dim, group.rank * size, size)
    elif value.shape[dim] == size:
        raise RuntimeError(
            f"torch_ep.nn: expected all {num_experts} experts of '{name}', or a DTensor as in state_dict(), got a "
            f"tensor of {size}, which could be any rank's: save state_dict() or torch_ep.nn.full_state_dict(model)"
        )
    else:
        return value
    if isinstance(t, DTensor):
        return shard_like(part, t)
    return part.clone() if assign else part


def _save_hook(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    for name, t, mark in marked_tensors(module, prefix=prefix, nested=False):
        value = state_dict.get(name)
        if isinstance(value, Tensor) and value is not t:  # with keep_vars=True it is
            state_dict[name] = as_dtensor(name, value, mark)


@torch.no_grad()
def _load_hook(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
) -> None:
    assign = local_metadata.get("assign_to_params_buffers", False)
    for name, t, mark in marked_tensors(module, prefix=prefix, nested=False):
        value = state_dict.get(name)
        if isinstance(value, Tensor):
            state_dict[name] = _own_experts(name, value, t, mark, assign=assign)
    for own_name, p in module._parameters.items():
        name = prefix + own_name
        if isinstance(p, DTensor) and name in state_dict and not isinstance(state_dict[name], DTensor):
            raise RuntimeError(
                f"torch_ep.nn: expected a DTensor for '{name}', which FSDP2 has sharded, got a plain tensor: load the "
                "state with torch.distributed.checkpoint.state_dict.set_model_state_dict(model, state, "
                "options=StateDictOptions(full_state_dict=True))"
            )


def watch_states(module: nn.Module) -> None:
    """Has `module.state_dict` and `load_state_dict` handle what is marked in it."""
    if _save_hook not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_save_hook)
        module.register_load_state_dict_pre_hook(_load_hook)


# --- optimizers -------------------------------------------------------------------------------------------------------

_watched: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def _experts_of(optimizer: torch.optim.Optimizer) -> dict[Tensor, tuple[str, Mark]]:
    """Its parameters that are marked, by themselves, with name and mark."""
    own = set(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    return {
        t: (name, mark)
        for module in list(marked_modules)
        for name, t, mark in marked_tensors(module, nested=False)
        if t in own
    }


def _moments(state: dict[str, Any], p: Tensor, mark: Mark) -> Iterator[tuple[str, Tensor, bool]]:
    """Tensors of a parameter's state that have its dimensions, by key, and whether they are of as many experts."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() == p.dim() > mark.dim:
            yield key, value, value.shape[mark.dim] == p.shape[mark.dim]


def _own_moments(name: str, state: dict[str, Any], p: Tensor, mark: Mark) -> dict[str, Any]:
    """`state` with this rank's slice of what is of all experts; what is of as many as a rank has is taken as it is."""
    own = dict(state)
    for key, value, same in _moments(state, p, mark):
        if not same or isinstance(value, DTensor) or isinstance(p, DTensor):
            own[key] = _own_experts(f"{key} of {name}", value, p, mark, assign=True)
    return own


def _save_optimizer_hook(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    experts = _experts_of(optimizer)
    parameters = dict.fromkeys(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    saved = dict(state_dict["state"])
    for index, p in enumerate(parameters):
        if p in experts and index in saved:
            name, mark = experts[p]
            saved[index] = dict(saved[index])
            for key, value, same in _moments(saved[index], p, mark):
                if same:
                    saved[index][key] = as_dtensor(f"{key} of {name}", value, mark)
    return {**state_dict, "state": saved}


@torch.no_grad()
def _load_optimizer_hook(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    experts = _experts_of(optimizer)
    loaded = dict(state_dict["state"])
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        for p, key in zip(group["params"], saved["params"], strict=False):
            if p in experts and key in loaded:
                name, mark = experts[p]
                loaded[key] = _own_moments(name, loaded[key], p, mark)
    return {**state_dict, "state": loaded}


def _refuse_zero(optimizer: torch.optim.Optimizer, experts: dict[Tensor, tuple[str, Mark]]) -> None:
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None or not isinstance(optimizer, module.ZeroRedundancyOptimizer):
        return
    ranks = dist.get_process_group_ranks(optimizer.process_group)
    names = [name for name, mark in experts.values() if mark.group.others(ranks)]
    if names:
        raise ValueError(
            f"torch_ep.nn: expected ZeroRedundancyOptimizer without experts {names}, which are different on ranks of "
            "its group, and it copies them: pass their data-parallel group as process_group, or give them an "
            "optimizer of their own"
        )


@torch.no_grad()
def _first_step_hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or optimizer in _watched:
        return
    _watched.add(optimizer)
    experts = _experts_of(optimizer)
    if not experts:
        return
    _refuse_zero(optimizer, experts)
    for p, (name, mark) in experts.items():
        spans_group(name, p, mark)
        if p in optimizer.state:  # loaded before this hook was there
            optimizer.state[p] = _own_moments(name, optimizer.state[p], p, mark)
    optimizer.register_state_dict_post_hook(_save_optimizer_hook)
    optimizer.register_load_state_dict_pre_hook(_load_optimizer_hook)


def watch_optimizers() -> None:
    """Has every optimizer that updates marked parameters handle them, from its first step on."""
    register_optimizer_step_pre_hook(_first_step_hook)
