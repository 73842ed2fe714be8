"""Expert parallelism of Hugging Face's models by torch_ep. Tested with transformers 5.24.

    import torch_ep.integrations.huggingface

    model = AutoModelForCausalLM.from_pretrained(
        name, distributed_config=DistributedConfig(fsdp_size=8, ep_size=8, ep_implementation="torch_ep")
    )

The import registers "torch_ep" as an `ep_implementation`, and as an `experts_implementation` for one process. Together
they exchange rows grouped by expert, and multiply these groups as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import (  # type: ignore[import-not-found]
    EPImplementation,
    EPImplementationInterface,
)
from transformers.integrations.moe import ExpertsInterface  # type: ignore[import-not-found]

from .. import comm
from ..comm import init
from ..nn import grouped_mm
from ..ops import combine, dispatch, plan

__all__ = ["TorchEP", "experts_forward", "set_init_arguments"]

NAME = "torch_ep"

_init_arguments: dict[str, Any] = {}


def set_init_arguments(**arguments: Any) -> None:
    """Sets what `torch_ep.init` is called with for each expert-parallel group that has no communicator yet.

    Call it before the model is made, for example with the four limits that backend nvlink needs.

    Args:
        arguments: as `torch_ep.init`, without the group.
    """
    _init_arguments.clear()
    _init_arguments.update(arguments)


class TorchEP(EPImplementation):
    """An `ep_implementation` that moves one row per (token, rank). Differentiable; compiles in one graph.

    Ranks may hold different batches, and different numbers of tokens. Where the ranks of a tensor-parallel group share
    a batch, each takes a slice of it, and the results are gathered.

    Raises:
        torch.distributed.DistError: `torch_ep.init` of the group failed on a rank.
    """

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts: Any = experts
        self.group_name = ep_mesh.get_group().group_name if ep_mesh.size() > 1 else ""
        self.num_experts = self.num_local_experts * ep_mesh.size()
        if self.group_name and self.group_name not in comm.communicators:
            init(ep_mesh.get_group(), **_init_arguments)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        num_tokens = hidden_states.shape[0]
        tokens, idx, weights = hidden_states, top_k_index, top_k_weights
        if self.tp_mesh.size() > 1:
            tokens, idx, weights = (self._slice(t) for t in (tokens, idx, weights))
        p = plan(idx.contiguous(), self.num_experts, self.group_name)
        rows, row_weights = dispatch(tokens.contiguous(), p, topk_weights=weights.contiguous())
        y = self._run_experts(rows, p.offsets, p.local_expert_of_rows())
        out = combine(y.contiguous(), p, row_weights=row_weights)
        return self._gather(out, num_tokens) if self.tp_mesh.size() > 1 else out

    def _run_experts(self, rows: Tensor, offsets: Tensor, experts: Tensor) -> Tensor:
        if self.experts.config._experts_implementation == NAME:
            return _grouped_experts(self.experts, rows, offsets)
        # One expert per row, of weight 1: `combine` weighs. Implementations of transformers connect no rows to no
        # graph, in which FSDP would wait for gradients.
        is_empty = not torch.compiler.is_compiling() and rows.shape[0] == 0
        if is_empty:
            rows, experts = rows.sum(0, keepdim=True), experts.new_zeros(1)
        y = self.experts_forward(rows, experts[:, None].long(), rows.new_ones(rows.shape[0], 1))
        return y[:0] if is_empty else y

    def _slice(self, t: Tensor) -> Tensor:
        """This rank's part of a tensor that the ranks of the tensor-parallel group share."""
        shared = DTensor.from_local(t, self.tp_mesh, [Replicate()], run_check=False)
        return shared.redistribute(self.tp_mesh, [Shard(0)]).to_local()

    def _gather(self, out: Tensor, num_tokens: int) -> Tensor:
        shape = (num_tokens, out.shape[1])
        parts = DTensor.from_local(out, self.tp_mesh, [Shard(0)], shape=torch.Size(shape), stride=(shape[1], 1))
        return parts.full_tensor()


def _grouped_experts(experts: nn.Module, rows: Tensor, offsets: Tensor) -> Tensor:
    """The experts of a module of transformers, of rows that are grouped by expert."""

    def project(t: Tensor, name: str) -> Tensor:
        weight = getattr(experts, name)
        weight = weight if experts.is_transposed else weight.transpose(1, 2)
        return grouped_mm(t, weight, offsets, bias=getattr(experts, f"{name}_bias") if experts.has_bias else None)

    if experts.has_gate:
        inner = experts._apply_gate(project(rows, "gate_up_proj"))  # type: ignore[operator]
    else:
        inner = experts.act_fn(project(rows, "up_proj"))  # type: ignore[operator]
    y = project(inner, "down_proj")
    return experts.post_expert_norm(y) if experts.has_post_expert_norm else y  # type: ignore[operator]


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """An `experts_implementation` of one process: rows are permuted by expert, multiplied, and summed per token.

    Args:
        self: the module of experts.
        hidden_states: [num_tokens, hidden].
        top_k_index: [num_tokens, top_k]: local experts; `num_experts` and above for none.
        top_k_weights: [num_tokens, top_k].

    Returns:
        [num_tokens, hidden].
    """
    num_experts: int = self.num_experts  # type: ignore[assignment]
    idx = torch.where(top_k_index < num_experts, top_k_index, -1)
    p = plan(idx, num_experts, "")
    rows, row_weights = dispatch(hidden_states.contiguous(), p, topk_weights=top_k_weights.contiguous())
    return combine(_grouped_experts(self, rows, p.offsets).contiguous(), p, row_weights=row_weights)


EPImplementationInterface.register(NAME, TorchEP)
ExpertsInterface.register(NAME, experts_forward)
