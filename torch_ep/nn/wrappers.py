"""Refuses wrappers that would make different experts of several ranks equal."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from .marks import marked_tensors, marks_of

__all__ = ["watch_wrappers"]


def _refuse_ddp(ddp: DistributedDataParallel, module: nn.Module) -> None:
    ranks = dist.get_process_group_ranks(ddp.process_group)
    delayed = set(ddp._delay_all_reduce_params)
    replicated, of_root = [], []
    for name, t, mark in marked_tensors(module):
        if not mark.group.others(ranks):
            continue
        if name not in ddp.parameters_to_ignore or t in delayed:
            replicated.append(name)
        elif t.requires_grad and "." not in name and f".{name}" not in ddp.parameters_to_ignore:
            of_root.append(name)
    if replicated:
        raise ValueError(
            f"torch_ep.nn: expected DistributedDataParallel to ignore experts {replicated}, which are different on "
            "ranks of its group: call DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, "
            "torch_ep.nn.expert_parameter_names(model)) before it wraps the model, with marked buffers if there are any"
        )
    if of_root:
        raise ValueError(
            f"torch_ep.nn: expected experts {of_root} in a module inside of what DistributedDataParallel wraps, got "
            "them in the wrapped module itself, whose parameters it never ignores: put the layer into a module"
        )


def _refuse_fsdp(fsdp: Any, module: nn.Module) -> None:
    groups = (fsdp.__dict__.get("process_group"), fsdp.__dict__.get("_inter_node_pg"))
    ranks = [rank for group in groups if group is not None for rank in dist.get_process_group_ranks(group)]
    ignored = fsdp._ignored_params
    names = [
        name
        for name, t, mark in marked_tensors(module)
        if isinstance(t, nn.Parameter) and t not in ignored and mark.group.others(ranks)
    ]
    for owner in module.modules():  # without use_orig_params=True, a flattened parameter is a plain attribute
        flattened = [name for name in marks_of(owner) if isinstance(owner.__dict__.get(name), Tensor)]
        names += [name for name in flattened if marks_of(owner)[name].group.others(ranks)]
    if names:
        raise ValueError(
            f"torch_ep.nn: expected FullyShardedDataParallel to ignore experts {names}, which are different on ranks "
            'of its group: use fully_shard(model, mesh=mesh["dp"]), or pass them as ignored_states'
        )


def _registration_hook(wrapper: nn.Module, name: str, module: nn.Module | None) -> None:
    if module is None:
        return
    if name == "module" and isinstance(wrapper, DistributedDataParallel):
        _refuse_ddp(wrapper, module)
    elif name == "_fsdp_wrapped_module":
        _refuse_fsdp(wrapper, module)


def watch_wrappers() -> None:
    """Has `DistributedDataParallel` and `FullyShardedDataParallel` raise instead of changing experts."""
    register_module_module_registration_hook(_registration_hook)
