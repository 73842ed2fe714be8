"""What an expert computes between its projections."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Activation", "swigluoai"]

#: `activation(gate, up)`, all three of one shape: what goes into the last projection.
Activation = Callable[[Tensor, Tensor], Tensor]


def swigluoai(gate: Tensor, up: Tensor, *, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """The clamped SwiGLU of gpt-oss: `(up + 1) * gate * sigmoid(alpha * gate)`.

    Args:
        gate: [..., intermediate] floating, clamped to at most `limit`.
        up: of gate's shape and dtype, clamped to -limit .. limit.

    Returns:
        A tensor of gate's shape and dtype.
    """
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


#: Activations by the names that vLLM has for them; those of one argument are multiplied by `up`.
_OF_GATE: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}
_OF_BOTH: dict[str, Activation] = {"swigluoai": swigluoai}


def check_activation(op: str, activation: str | Activation) -> None:
    names = (*_OF_GATE, *_OF_BOTH)
    if not callable(activation) and activation not in names:
        expected = ", ".join(map(repr, names))
        raise ValueError(f"{op}: expected activation {expected} or a function of (gate, up), got {activation!r}")


def feed_forward(x: Tensor, project: Callable[[Tensor, str], Tensor], activation: str | Activation) -> Tensor:
    """An expert; `project(x, name)` is one of gate_proj, up_proj and down_proj."""
    if isinstance(activation, str) and activation in _OF_GATE:
        # In this order and without gradients, the product of gate_proj is freed before that of up_proj is made.
        inner = _OF_GATE[activation](project(x, "gate_proj")) * project(x, "up_proj")
    else:
        of_both = _OF_BOTH[activation] if isinstance(activation, str) else activation
        inner = of_both(project(x, "gate_proj"), project(x, "up_proj"))
    return project(inner, "down_proj")
