"""Expert parallelism of torchtitan's models by torch_ep. Tested with torchtitan 0.3.0.

    torchrun --nproc-per-node 8 -m torchtitan.train --module deepseek_v3 --config deepseek_v3_16b \\
        --training.disable_cuda_graphs --override.imports \\
        torch_ep.integrations.torchtitan.token_dispatcher torch_ep.integrations.torchtitan.selective_ac

Each name is an override of torchtitan's configuration. The first replaces the token dispatchers of all MoE layers. The
second makes selective activation checkpointing keep what exchanges return.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

try:
    from torchtitan.config import derive, override  # type: ignore[import-not-found]
    from torchtitan.distributed.activation_checkpoint import SelectiveAC  # type: ignore[import-not-found]
    from torchtitan.models.common.token_dispatcher import (  # type: ignore[import-not-found]
        BaseEPTokenDispatcher,
        HybridEPTokenDispatcher,
    )
except ImportError as error:
    raise ImportError(
        f"torch_ep.integrations.torchtitan: expected torchtitan 0.3 and triton, got: {error}. "
        "Run: pip install torchtitan==0.3.0 triton"
    ) from error

from ..checkpointing import EXCHANGES
from ..comm import init
from ..ops import combine, dispatch, plan
from ..plan import Plan

__all__ = ["TorchEPSelectiveAC", "TorchEPTokenDispatcher", "selective_ac", "token_dispatcher"]


class Dispatched(NamedTuple):
    """What `TorchEPTokenDispatcher.combine` needs of its dispatch."""

    plan: Plan
    row_weights: Tensor


class TorchEPTokenDispatcher(BaseEPTokenDispatcher):
    """A token dispatcher that moves one row per (token, rank). Differentiable; compiles in one graph.

    Also dispatches on one rank, where expert parallelism is off.

    Raises:
        ValueError: a field of the configuration is out of its range.
        torch.distributed.DistError: `torch_ep.init` of the group failed on a rank.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(HybridEPTokenDispatcher.Config):
        """The fields of HybridEP's, of which torchtitan allows CUDA graphs where a capacity is set.

        Args:
            non_blocking_capacity_factor: None: exact sizes, for which the host waits. Else in (0, 1]: makes room for
                this share of the most rows that can arrive, besides padding. 1 drops nothing.
            pad_multiple: pads the rows of each expert to a multiple of this. None: no padding.
            hidden_dim: most elements of a row, for the buffers of backend nvlink. None: no limit.
            num_max_tokens_per_rank: most tokens per rank, for the buffers of backend nvlink. None: no limit.
        """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        factor, alignment = config.non_blocking_capacity_factor, config.pad_multiple
        if factor is not None and not 0 < factor <= 1:
            raise ValueError(
                f"TorchEPTokenDispatcher: expected non_blocking_capacity_factor in (0, 1], got {factor}: "
                "pass 1 to drop nothing, or None for exact sizes"
            )
        if alignment is not None and alignment < 1:
            raise ValueError(
                f"TorchEPTokenDispatcher: expected pad_multiple of at least 1, got {alignment}: "
                "pass None for no padding"
            )
        self.capacity_factor = factor
        self.alignment = alignment or 1
        self.limits = {"max_tokens_per_rank": config.num_max_tokens_per_rank, "hidden": config.hidden_dim}
        self.group_name, self.world_size = "", 1

    def init_buffer(self) -> None:
        """Prepares the group of the mesh. Collective."""
        if self.ep_mesh is None:
            return
        communicator = init(self.ep_mesh, num_topk=self.top_k, num_experts=self.num_experts, **self.limits)
        self.group_name, self.world_size = communicator.group_name, communicator.world_size

    def dispatch(
        self,
        x_TD: Tensor,
        topk_scores_TK: Tensor,
        topk_expert_ids_TK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> tuple[Tensor, Tensor, Dispatched]:
        """Rows for this rank's experts, how many each has with its padding, and what `combine` takes."""
        p = plan(
            topk_expert_ids_TK.contiguous(),
            self.num_experts,
            self.group_name,
            capacity=self._capacity(x_TD.shape[0]),
            alignment=self.alignment,
        )
        rows, row_weights = dispatch(x_TD.contiguous(), p, topk_weights=topk_scores_TK.contiguous())
        return rows, p.padded_tokens_per_expert, Dispatched(p, row_weights)

    def combine(self, routed_output_RD: Tensor, metadata: Dispatched, x_TD: Tensor) -> Tensor:
        """The sums of each token's rows, weighted by its scores."""
        return combine(routed_output_RD.contiguous(), metadata.plan, row_weights=metadata.row_weights)

    def _capacity(self, num_tokens: int) -> int | None:
        """Rows to make room for. torchtitan gives every rank as many tokens."""
        if self.capacity_factor is None:
            return None
        num_local_experts = self.num_experts // self.world_size
        most_rows = self.world_size * num_tokens * min(num_local_experts, self.top_k)
        rows = math.ceil(self.capacity_factor * most_rows) + num_local_experts * (self.alignment - 1)
        return -(-rows // self.alignment) * self.alignment


class TorchEPSelectiveAC(SelectiveAC):
    """torchtitan's selective activation checkpointing, which also saves what exchanges return."""

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        pass

    def get_save_ops(self) -> set:
        return super().get_save_ops() | set(EXCHANGES)


@override(target=BaseEPTokenDispatcher.Config, description="Dispatch and combine by torch_ep.")
def token_dispatcher(config: Any, **values: Any) -> Any:
    """Takes the fields that `config` has in common with `TorchEPTokenDispatcher.Config`; `values` replace them."""
    return derive(config, TorchEPTokenDispatcher.Config, **values)


@override(target=SelectiveAC.Config, exact=True, description="Save what torch_ep's exchanges return.")
def selective_ac(config: Any) -> Any:
    return derive(config, TorchEPSelectiveAC.Config)
