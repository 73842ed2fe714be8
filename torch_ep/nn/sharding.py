"""Experts that are spread over a group of ranks: names, states, gradient norms."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ..comm import Group, process_group
from .groups import RankGroup
from .marks import Mark, has_marks, mark, marked_tensors, spans_group
from .states import full_tensor, watch_optimizers, watch_states
from .wrappers import watch_wrappers

__all__ = [
    "clip_grad_norm_",
    "distribute_experts",
    "expert_parameter_names",
    "full_state_dict",
    "gather_experts",
    "mark_expert_parameters",
    "shard_experts",
]


def gather_experts(t: Tensor, group: Group = None, *, dim: int = 0) -> Tensor:
    """Joins every rank's `[num_local_experts, ...]` to `[num_experts, ...]`, along `dim`. Collective.

    A DTensor that is sharded over the group comes back whole, as a plain tensor.

    Raises:
        torch.distributed.DistError: ranks pass tensors of different dtypes or shapes.
    """
    ranks = RankGroup(group)
    spans = spans_group("t", t, Mark(ranks, dim, None))
    if isinstance(t, DTensor):
        t = full_tensor(t)
    if spans or ranks.size == 1:
        return t
    ranks.check_same("torch_ep.nn.gather_experts", t)
    own = ranks.on_device(t.contiguous())
    parts = [torch.empty_like(own) for _ in range(ranks.size)]
    dist.all_gather(parts, own, group=process_group(ranks.name))
    return torch.cat(parts, dim).to(t.device)


def shard_experts(t: Tensor, group: Group = None, *, dim: int = 0) -> Tensor:
    """This rank's part of `[num_experts, ...]`, along `dim`, in memory of its own."""
    ranks = RankGroup(group)
    if ranks.size == 1:
        return t
    if t.shape[dim] % ranks.size:
        raise ValueError(f"torch_ep.nn.shard_experts: expected a multiple of {ranks.size} experts, got {t.shape[dim]}")
    return t.chunk(ranks.size, dim)[ranks.rank].clone()


def mark_expert_parameters(
    module: nn.Module, group: Group = None, names: Iterable[str] | None = None, *, dim: int = 0
) -> None:
    """Marks parameters as experts: different on every rank of `group`, slices of one tensor along `dim`.

    The parameters of `MoE` are marked, and what parametrizes them. Mark adapters of experts, and experts of modules of
    your own: then `expert_parameter_names`, `clip_grad_norm_`, `full_state_dict`, `distribute_experts` and `state_dict`
    handle them like those of `MoE`, and wrappers that would replicate them raise. Marks belong to the module that owns
    a parameter. They survive what replaces or renames the parameter, and copies and pickles of the module.

    Args:
        module: owns the parameters.
        group: ranks over which they are spread, as in `torch_ep.plan`. "": they are replicated.
        names: of parameters or buffers of `module` itself. None: all inside of it, also those that are added later.
        dim: the dimension along which ranks hold slices, of equal size.

    Raises:
        ValueError: `module` has no parameter or buffer of that name.
    """
    if dim < 0:
        raise ValueError(f"torch_ep.nn.mark_expert_parameters: expected dim of at least 0, got {dim}")
    if names is not None:
        parametrized = module._modules.get("parametrizations")
        own = {
            *module._parameters,
            *module._buffers,
            *(parametrized if isinstance(parametrized, nn.ModuleDict) else ()),
        }
        names = list(names)
        unknown = [name for name in names if name not in own]
        if unknown:
            raise ValueError(
                f"torch_ep.nn.mark_expert_parameters: expected names of {type(module).__name__}'s own parameters or "
                f"buffers, got {unknown}: it has {sorted(own)}; for those of modules inside, pass that module"
            )
    mark_experts(module, RankGroup(group), names, dim)


def mark_experts(
    module: nn.Module, group: RankGroup, names: Iterable[str] | None, dim: int = 0, *, replace: bool = True
) -> None:
    """`mark`, and the hooks that marked experts need in states, optimizers and wrappers."""
    mark(module, group, names, dim, replace=replace)
    if group.size > 1:
        _watch()
        for owner in module.modules():
            if has_marks(owner):
                watch_states(owner)


@functools.cache
def _watch() -> None:
    watch_wrappers()
    watch_optimizers()


def _experts(module: nn.Module) -> dict[Tensor, tuple[Mark, bool]]:
    """Every marked tensor inside, with its mark and whether it is a DTensor of all ranks' experts."""
    return {t: (found, spans_group(name, t, found)) for name, t, found in marked_tensors(module)}


def expert_parameter_names(module: nn.Module) -> list[str]:
    """Names, as in `module.named_parameters()`, of the parameters that are experts, spread over ranks.

    They are different on every rank of their group: what replicates parameters over these ranks, such as
    `DistributedDataParallel`, has to leave them out. None of a layer whose group is one rank.

    Raises:
        ValueError: FSDP2 has sharded or replicated some over ranks that hold different ones.
    """
    experts = _experts(module)
    return [name for name, p in module.named_parameters(remove_duplicate=False) if p in experts]


def _groups_of_shards(t: Tensor) -> tuple[str, ...]:
    if not isinstance(t, DTensor):
        return ()
    mesh = t.device_mesh
    sharded = (i for i, placement in enumerate(t.placements) if not placement.is_replicate() and mesh.size(i) > 1)
    return tuple(mesh.get_group(i).group_name for i in sharded)


def _local_grad(p: Tensor, grad: Tensor) -> Tensor:
    if isinstance(p, DTensor) and isinstance(grad, DTensor):
        return grad.redistribute(placements=p.placements).to_local()
    return grad


@torch.no_grad()
def clip_grad_norm_(module: nn.Module, max_norm: float) -> Tensor:
    """Scales all gradients by one factor, so that their 2-norm over all ranks is at most `max_norm`.

    Squares of experts' gradients are summed over their group; every other parameter counts once. Gradients that FSDP2
    has sharded count whole. Collective over the groups of all experts and shards; the factor is the same on every rank
    if gradients of replicated parameters are, so reduce them first. Where the group has no backend for the device of
    the parameters, as NCCL has none for the CPU, sums travel on the group's device.

    Args:
        module: the whole model; parameters without a gradient have no part in it.
        max_norm: as in `torch.nn.utils.clip_grad_norm_`.

    Returns:
        [] the norm before, the same on every rank; float32, or float64 if a parameter is. The norms
        that it is the sum of are `torch.nn.utils.get_total_norm`'s, in the dtype of the gradients.

    Raises:
        ValueError: max_norm is negative or NaN; or FSDP2 has sharded or replicated experts over ranks that hold
            different ones.
    """
    if not max_norm >= 0:
        raise ValueError(f"torch_ep.nn.clip_grad_norm_: expected max_norm of at least 0, got {max_norm}")
    parameters, experts = list(module.parameters()), _experts(module)
    # By the groups over which squares are summed. A group's ranks all sum, also one that has no gradients.
    parts: dict[tuple[str, ...], list[Tensor]] = {(): []}
    for p in parameters:
        found, spans = experts.get(p, (None, False))
        groups = _groups_of_shards(p) + ((found.group.name,) if found is not None and not spans else ())
        part = parts.setdefault(groups, [])
        if p.grad is not None:
            part.append(_local_grad(p, p.grad))

    dtype = functools.reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
    device = parameters[0].device if parameters else None
    total = torch.zeros((), dtype=dtype, device=device)
    for groups, grads in parts.items():
        square = nn.utils.get_total_norm(grads).to(total).square()
        for group in groups:
            square = RankGroup(group).all_reduce(square)
        total += square
    total.sqrt_()
    by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = {}  # torch scales those of one mesh at a time
    for p in parameters:
        by_mesh.setdefault(p.grad.device_mesh if isinstance(p.grad, DTensor) else None, []).append(p)
    for on_mesh in by_mesh.values():
        nn.utils.clip_grads_with_norm_(on_mesh, max_norm, total)
    return total


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with all experts inside, on every rank, whole where FSDP2 has sharded it.

    Collective over the groups of all experts and shards. `load_state_dict` takes it at any world size.

    Raises:
        ValueError: FSDP2 has sharded or replicated experts over ranks that hold different ones.
    """
    state = module.state_dict(keep_vars=True)  # names without those of wrappers; reshards what FSDP2 has gathered
    experts = _experts(module)
    for name, value in state.items():
        if isinstance(value, Tensor):
            found, spans = experts.get(value, (None, False))
            if found is not None and value.dim() <= found.dim:
                raise ValueError(
                    f"torch_ep.nn.full_state_dict: expected '{name}' to have a dimension {found.dim} of experts, got "
                    f"{value.dim()} dimensions: mark it with another dim, or as replicated"
                )
            value = value.detach()
            value = full_tensor(value) if isinstance(value, DTensor) else value
            if found is not None and not spans:
                value = gather_experts(value, found.group.name, dim=found.dim)
        state[name] = value
    return dict(state)


@torch.no_grad()
def distribute_experts(module: nn.Module, mesh: DeviceMesh | None = None) -> None:
    """Makes marked parameters DTensors of all experts, of which each rank holds its shard, in the same memory.

    That is how torch's tools know them: after it, and after `fully_shard` over the other dimension of the mesh,
    `torch.distributed.checkpoint` with its model and optimizer states saves and loads all experts at any world size.
    `MoE` computes with the local shards. Gradients become DTensors. Call it before `fully_shard`, and before the
    optimizer is made; there, give these parameters a group of their own. Where a rank has fewer experts than there are
    data-parallel ranks, have `fully_shard` shard another dimension, by its `shard_placement_fn`.

    Args:
        module: the whole model.
        mesh: one-dimensional, of the ranks of the group: `mesh["ep"]` of the mesh whose `mesh["dp"]` goes to
            `fully_shard`. None: a mesh of each group alone.

    Raises:
        ValueError: the mesh is of other ranks than the group; parameters are DTensors of other meshes.
    """
    distributed: dict[Tensor, nn.Parameter] = {}
    for name, p, found in list(marked_tensors(module)):
        if not isinstance(p, nn.Parameter) or p.dim() <= found.dim or spans_group(name, p, found):
            continue
        if isinstance(p, DTensor):
            raise ValueError(
                f"torch_ep.nn.distribute_experts: expected '{name}' to be a plain tensor, got a DTensor over "
                f"{p.device_mesh}: call it before fully_shard"
            )
        if p not in distributed:
            over = mesh or DeviceMesh.from_group(process_group(found.group.name), p.device.type)
            if tuple(over.mesh.tolist()) != found.group.ranks:
                raise ValueError(
                    f"torch_ep.nn.distribute_experts: expected a mesh of ranks {list(found.group.ranks)}, over which "
                    f"'{name}' is spread, got {over.mesh.tolist()}"
                )
            shards = DTensor.from_local(p.detach(), over, [Shard(found.dim)], run_check=False)
            distributed[p] = nn.Parameter(shards, requires_grad=p.requires_grad)
        owner, _, own_name = name.rpartition(".")
        module.get_submodule(owner)._parameters[own_name] = distributed[p]
