"""Token counts that change from step to step, under torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_int, check_tensors

__all__ = ["mark_tokens"]


def mark_tokens(*tensors: Tensor, dim: int = 0, name: str = "tokens") -> None:
    """Lets one compiled graph serve every number of tokens, 0 and 1 included.

    torch.compile makes separate graphs for the first size, for 0, for 1 and for all other sizes, each at its first use.
    Ranks with different counts then compile different graphs at different times, and the other ranks wait. Inductor
    even removes exchanges from a graph for 0, since their results have no elements. A marked dimension is unknown to
    the compiler, so one graph serves all sizes. Compiled code must not depend on the value of a marked dimension, as
    in `if x.shape[0] == 0`.

    Call it outside the compiled function, on every input tensor. It has no effect in eager mode.

        for x in batches:
            torch_ep.mark_tokens(x)
            y, stats = compiled_layer(x)

    Args:
        tensors: inputs of the compiled function.
        dim: the token dimension of the tensors.
        name: inputs marked by the same name have the same number of tokens, which is checked at run time. Inputs with
            numbers of their own, such as microbatches, need different names.

    Raises:
        TypeError, ValueError: an argument is of another Python type, or has no such dimension.
    """
    op = "torch_ep.mark_tokens"
    dim = check_int(op, "dim", dim)
    for t in tensors:
        check_tensors(op, {"every argument": t})
        if not -t.dim() <= dim < t.dim():
            raise ValueError(f"{op}: expected dim to be one of a tensor of shape {list(t.shape)}, got {dim}")
        torch._dynamo.decorators.mark_unbacked(t, dim % t.dim(), shape_id=name)
