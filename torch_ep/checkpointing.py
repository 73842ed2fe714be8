"""Keeps recomputation from communicating twice.

Torch's default partitioner never recomputes a custom operator. Activation checkpointing does, and so does
`torch._functorch.config.activation_memory_budget` below 1; this module exempts the exchanges from both.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

__all__ = ["EXCHANGES", "checkpoint_contexts", "save_exchanges"]

try:
    from torch._inductor.custom_graph_pass import CustomGraphPass as _Pass
except ImportError:  # a torch built without Inductor
    _Pass = object  # type: ignore[assignment, misc]

#: The operators that communicate: what a selective checkpointing policy should save.
EXCHANGES = (
    torch.ops.ep.plan.default,
    torch.ops.ep.plan.capacity,
    torch.ops.ep.dispatch.default,
    torch.ops.ep.combine.default,
    torch.ops.ep.combine.weighted,
    torch.ops.ep.dispatch.grid,
    torch.ops.ep.combine.grid,
    torch.ops.ep.combine.grid_weighted,
    torch.ops.ep.dispatch_send.default,
    torch.ops.ep.dispatch_recv.default,
    torch.ops.ep.combine_send.default,
    torch.ops.ep.combine_send.weighted,
    torch.ops.ep.combine_recv.default,
    # Inference only: a frozen layer may run these during training.
    torch.ops.ep.low_latency_dispatch.default,
    torch.ops.ep.low_latency_dispatch_send.default,
    torch.ops.ep.low_latency_dispatch_recv.default,
    torch.ops.ep.low_latency_combine.default,
    torch.ops.ep.low_latency_combine_send.default,
    torch.ops.ep.low_latency_combine_recv.default,
)


def checkpoint_contexts() -> Any:
    """A `context_fn` for `torch.utils.checkpoint.checkpoint`: recomputes everything but the exchanges."""
    return create_selective_checkpoint_contexts(list(EXCHANGES))


class _SaveExchanges(_Pass):
    """An Inductor pass over the joint graph, for use with an activation memory budget.

    Set `torch._inductor.config.joint_custom_pre_pass = torch_ep.save_exchanges`; then no budget above 0 makes the
    backward repeat an exchange.
    """

    def __call__(self, graph: Graph) -> None:
        for node in graph.nodes:
            source = node.args[0] if node.target is operator.getitem else node
            if getattr(source, "target", None) in EXCHANGES:
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> str:
        return "torch_ep.save_exchanges"


save_exchanges = _SaveExchanges()
