"""What a forward pass tells about its routing, and how it survives reentrant checkpointing."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

__all__ = ["CheckpointedStats", "RouterStats", "checkpointable"]


class RouterStats(NamedTuple):
    """What a forward pass tells about its routing; tensors on the device, no wait."""

    #: [] the Switch auxiliary loss of this rank's tokens, E * sum(f_e * p_e): 1 for an even load (arXiv:2101.03961).
    aux_loss: Tensor
    #: [num_experts] int64: how often this rank's tokens chose each expert.
    tokens_per_expert: Tensor
    #: [] int32: rows that did not fit into `capacity` on this rank.
    num_dropped: Tensor


class CheckpointedStats(Tensor):
    """`RouterStats` under reentrant checkpointing: the auxiliary loss, with the fields of `RouterStats`.

    Note [Reentrant checkpointing]
    `torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)` runs the layer in the forward of an autograd
    Function, without gradients, and again in its backward. Tensors that the layer returns get a gradient, but not
    tensors in a tuple that the layer returns. So what the layer returns beside y is a tensor then: the auxiliary loss.

    Compiled code cannot ask for the frames around it while it is traced: the same graph also runs outside of a
    checkpoint. But it makes its results when it runs, and calls `RouterStats._make` for this one.
    """

    # Operators return plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _stats: RouterStats
    _expects_grad: bool

    @property
    def aux_loss(self) -> Tensor:
        if self.requires_grad:
            return self.as_subclass(Tensor)  # type: ignore[arg-type]
        if self._expects_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "torch_ep.nn.MoE: expected aux_loss with a gradient, got one that a reentrant checkpoint has cut off: "
                "return the stats, or stats.aux_loss, as an element of the checkpointed function's result, not in a "
                "list, tuple or dict within it, or pass use_reentrant=False"
            )
        return self._stats.aux_loss

    @property
    def tokens_per_expert(self) -> Tensor:
        return self._stats.tokens_per_expert

    @property
    def num_dropped(self) -> Tensor:
        return self._stats.num_dropped

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.aux_loss, self.tokens_per_expert, self.num_dropped))


def _in_autograd_function() -> bool:
    """Whether the layer runs in the forward or backward of an autograd Function."""
    if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
        return False  # neither
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        code = frame.f_code
        takes_ctx = code.co_name in ("forward", "backward") and code.co_varnames[:1] == ("ctx",)
        if takes_ctx and isinstance(frame.f_locals.get("ctx"), FunctionCtx):
            return True
    return False


def checkpointable(stats: RouterStats, expects_grad: bool) -> RouterStats:
    """`stats`, or under reentrant checkpointing a tensor with its fields; `expects_grad`: of the auxiliary loss."""
    if torch.compiler.is_compiling() or not _in_autograd_function():  # compiled: see `_make`
        return stats
    tensor: Any = stats.aux_loss.as_subclass(CheckpointedStats)  # type: ignore[arg-type]
    tensor._stats, tensor._expects_grad = stats, expects_grad
    return tensor


@torch.compiler.disable
def _make(cls: type[RouterStats], fields: Iterable[Tensor]) -> RouterStats:
    """How compiled code makes the stats that it returns. See Note [Reentrant checkpointing]."""
    return checkpointable(cls(*fields), expects_grad=True)


RouterStats._make = classmethod(_make)  # type: ignore[assignment]
