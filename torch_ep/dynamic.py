"""Token counts that change from step to step, under torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_int, check_tensors

__all__ = ["mark_tokens"]


def mark_tokens(*tensors: Tensor, dim: int = 0, name: str = "tokens") -> None:
    """Lets one compiled graph serve every number of tokens, 0 and 1 included.

    torch.compile makes a graph for the first size it sees, one for 0, one for 1, and one for all others, each when it
    comes: ranks with different counts then compile different numbers of graphs at different times, and the others
    wait. From a graph for 0 Inductor even takes exchanges out, as their results have no elements. A dimension that is
    marked is unknown to the compiler, so that the first graph is the last. The price: nothing that is compiled may
    depend on its value, as in `if x.shape[0] == 0`.

    Call it outside of what is compiled, on every tensor that goes in; nothing happens in eager mode.

        for x in batches:
            torch_ep.mark_tokens(x)
            y, stats = compiled_layer(x)

    Args:
        tensors: inputs of the compiled function.
        dim: their dimension of tokens.
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
