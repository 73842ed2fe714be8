"""Experts that are spread over a group of ranks: names, states, gradient norms."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..comm import Group, process_group, resolve

__all__ = [
    "clip_grad_norm_",
    "expert_parameter_names",
    "full_state_dict",
    "gather_experts",
    "shard_experts",
]


def gather_experts(t: Tensor, group: Group = None) -> Tensor:
    """Joins every rank's `[num_local_experts, ...]` to `[num_experts, ...]`. Collective."""
    group_name, world_size = resolve(group)
    if world_size == 1:
        return t
    parts = [torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(world_size)]
    dist.all_gather(parts, t.contiguous(), group=process_group(group_name))
    return torch.cat(parts)


def shard_experts(t: Tensor, group: Group = None) -> Tensor:
    """This rank's part of `[num_experts, ...]`."""
    group_name, world_size = resolve(group)
    if world_size == 1:
        return t
    if t.shape[0] % world_size:
        raise ValueError(f"torch_ep.nn.shard_experts: expected a multiple of {world_size} experts, got {t.shape[0]}")
    return t.chunk(world_size)[process_group(group_name).rank()]


def _groups_of_experts(module: nn.Module) -> dict[Tensor, str]:
    """Every `MoE`'s parameters of experts inside, and the name of the group over which they are spread."""
    from .moe import MoE  # which imports this module

    layers = [layer for layer in module.modules() if isinstance(layer, MoE)]
    return {getattr(layer, name): layer.group_name for layer in layers for name in layer.EXPERT_PARAMETERS}


def expert_parameter_names(module: nn.Module) -> list[str]:
    """Names, as in `module.named_parameters()`, of the parameters of every `MoE` inside that are spread over ranks.

    They are different on every rank of the layer's group: what replicates parameters over these ranks, such as
    `DistributedDataParallel`, has to leave them out. None of a layer whose group is one rank.
    """
    groups = _groups_of_experts(module)
    return [name for name, p in module.named_parameters(remove_duplicate=False) if groups.get(p)]


@torch.no_grad()
def clip_grad_norm_(module: nn.Module, max_norm: float) -> Tensor:
    """Scales all gradients by one factor, so that their 2-norm over all ranks is at most `max_norm`.

    Squares of experts' gradients are summed over the group of their layer; every other parameter counts once.
    Gradients that FSDP2 has sharded count whole. Collective over the groups of all layers and shards; the factor is
    the same on every rank if gradients of replicated parameters are, so reduce them first.

    Args:
        module: the whole model; parameters without a gradient have no part in it.
        max_norm: as in `torch.nn.utils.clip_grad_norm_`.

    Returns:
        [] the norm before, the same on every rank; float32, or float64 if a parameter is. The norms
        that it is the sum of are `torch.nn.utils.get_total_norm`'s, in the dtype of the gradients.
    """
    parameters, groups = list(module.parameters()), _groups_of_experts(module)
    # torch's norm is of gradients of one mesh at a time.
    parts: dict[tuple[str, Any], list[nn.Parameter]] = {}
    for p in parameters:
        if p.grad is not None:
            mesh = p.grad.device_mesh if isinstance(p.grad, DTensor) else None
            parts.setdefault((groups.get(p, ""), mesh), []).append(p)

    dtype = functools.reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
    device = parameters[0].device if parameters else None
    # A group's ranks all sum, also one that has no gradients.
    squares = {group: torch.zeros((), dtype=dtype, device=device) for group in ("", *groups.values())}
    for (group, _), part in parts.items():
        norm = nn.utils.get_total_norm([p.grad for p in part if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        squares[group] += norm.to(squares[group]).square()
    for group, square in squares.items():
        if group:
            dist.all_reduce(square, group=process_group(group))
    total = torch.stack(list(squares.values())).sum().sqrt()
    for part in parts.values():
        nn.utils.clip_grads_with_norm_(part, max_norm, total)
    return total


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with all experts of every `MoE` inside, on every rank, whole where FSDP2 has sharded it.

    Collective over the groups of all layers and shards. `load_state_dict` takes it at any world size.
    """
    groups = _groups_of_experts(module)
    state = {}
    for name, value in module.state_dict(keep_vars=True).items():  # names without those of wrappers
        if isinstance(value, Tensor):
            group = groups.get(value)
            value = value.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            value = gather_experts(value, group) if group else value
        state[name] = value
    return state
