"""Megatron-core's MoE layer with torch_ep as its token dispatcher. Tested with megatron-core 0.19.2.

    from torch_ep.integrations.megatron import use_torch_ep

    moe = use_torch_ep(get_moe_module_spec(num_experts=64, moe_grouped_gemm=True))

The layer is Megatron's own: router, experts, shared experts. `token_dispatcher` alone is another one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer  # type: ignore[import-not-found]
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher  # type: ignore[import-not-found]
from torch import Tensor

from .. import comm
from ..comm import init
from ..ops import combine, dispatch, plan
from ..plan import Plan

__all__ = ["TorchEPMoELayer", "TorchEPTokenDispatcher", "set_init_arguments", "use_torch_ep"]

_init_arguments: dict[str, Any] = {}


def set_init_arguments(**arguments: Any) -> None:
    """Sets what `torch_ep.init` is called with for each expert-parallel group that has no communicator yet.

    Args:
        arguments: as `torch_ep.init`, without the group.
    """
    _init_arguments.clear()
    _init_arguments.update(arguments)


class TorchEPTokenDispatcher(MoETokenDispatcher):
    """A token dispatcher that moves one row per (token, rank). Probabilities travel beside the rows.

    Raises:
        ValueError: the configuration asks for what this dispatcher does not do; the message names the option.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: Any,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        if self.tp_size > 1:
            raise ValueError(
                f"{type(self).__name__}: expected expert_tensor_parallel_size 1, got {self.tp_size}: spread experts "
                "over more expert-parallel ranks instead"
            )
        for option in ("moe_pad_expert_input_to_capacity", "moe_shared_expert_overlap"):
            if getattr(config, option):
                raise ValueError(f"{type(self).__name__}: expected {option} False, got True")
        self.num_experts = num_local_experts * self.ep_size
        self.group_name = self.ep_group.group_name if self.ep_size > 1 else ""
        if self.ep_size > 1 and self.group_name not in comm.communicators:
            init(self.ep_group, **_init_arguments)
        self.hidden_shape: torch.Size | None = None
        self.topk_idx: Tensor | None = None
        self.plan: Plan | None = None

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Turns the map [tokens, experts] into indices [tokens, top_k], -1 where a token has fewer experts."""
        self.hidden_shape = tokens.shape
        # Each token's experts in ascending order, then those that it does not visit.
        order = torch.arange(self.num_experts, device=routing_map.device)
        idx = torch.where(routing_map, order, order + self.num_experts).topk(
            self.config.moe_router_topk, dim=1, largest=False, sorted=True
        )[0]
        visits = idx < self.num_experts
        weights = torch.where(visits, probs.gather(1, torch.where(visits, idx, 0)), 0)
        self.topk_idx = torch.where(visits, idx, -1)
        return tokens.reshape(-1, tokens.shape[-1]), weights

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        assert self.topk_idx is not None
        self.plan = plan(self.topk_idx, self.num_experts, self.group_name)
        return dispatch(hidden_states.contiguous(), self.plan, topk_weights=probs.contiguous())

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows are grouped by expert already. The number of tokens per expert goes to the host, as experts take it."""
        assert self.plan is not None
        return hidden_states, self.plan.tokens_per_expert.long().cpu(), probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Sums the rows of each token. The experts have multiplied them by their probabilities."""
        assert self.plan is not None
        return combine(hidden_states.contiguous(), self.plan)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        assert self.hidden_shape is not None
        return hidden_states.view(self.hidden_shape)


class TorchEPMoELayer(MoELayer):
    """Megatron's MoE layer with a `TorchEPTokenDispatcher`, whatever `moe_token_dispatcher_type` says."""

    def __init__(self, config: Any, *args: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        if pg_collection is None:
            from megatron.core.transformer.moe.moe_utils import (  # type: ignore[import-not-found]
                get_default_pg_collection,
            )

            pg_collection = get_default_pg_collection()
        super().__init__(config, *args, pg_collection=pg_collection, **kwargs)
        self.token_dispatcher = TorchEPTokenDispatcher(
            self.num_local_experts, self.local_expert_indices, config=self.config, pg_collection=pg_collection
        )


def use_torch_ep(spec: Any) -> Any:
    """The same spec with torch_ep's layer.

    Args:
        spec: what `get_moe_module_spec` returns: a `functools.partial` of `MoELayer`.

    Raises:
        TypeError: `spec` is of another layer.
    """
    if isinstance(spec, partial) and spec.func is MoELayer:
        return partial(TorchEPMoELayer, *spec.args, **spec.keywords)
    raise TypeError(f"use_torch_ep: expected what get_moe_module_spec returns, a spec of MoELayer, got {spec!r:.100}")
