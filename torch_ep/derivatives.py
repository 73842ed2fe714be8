"""What an operator's derivatives consist of: its reverse mode, its forward mode and its rule for vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.decorators import skip_code
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

from . import _C  # type: ignore[attr-defined]

__all__ = ["is_floating", "register_derivatives"]

# Torch has one level of dual numbers; torch.func nests its own by wrapping tensors.
_LEVEL = 0

_library = torch.library.Library("ep", "IMPL")


def is_floating(t: Tensor | None) -> bool:
    """Whether it has derivatives: fp8 rows have none."""
    return t is not None and t.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def register_derivatives(
    name: str, num_inputs: int, *, backward: Callable, setup_context: Callable, jvp: Callable
) -> None:
    """Registers the derivatives of `ep::name`, whose first `num_inputs` arguments are the ones that have any.

    Args:
        backward, setup_context: as `torch.library.register_autograd` takes them.
        jvp: `jvp(tangents, *arguments)` returns the results' tangents, None for a result that has none. `tangents` has
            a tangent of each of the inputs, zeros where none is given, so that all ranks exchange the same, and None
            where the input is None or not floating. The arguments come without tangents.

    `torch.library.register_autograd` alone drops tangents silently. Under vmap the operator runs once per entry, one
    after the other: as `torch.func.jacfwd` requires.
    """
    op = torch._library.utils.lookup_op(f"ep::{name}")
    reverse = make_autograd_impl(op, Info(backward, setup_context))

    def autograd(keys: Any, *args: Any) -> Any:
        if not _C.has_tangent(*args[:num_inputs]):
            return reverse(keys, *args)
        primals: list[Tensor | None] = []
        tangents: list[Tensor | None] = []
        for argument in args[:num_inputs]:
            if argument is None:
                primals.append(None)
                tangents.append(None)
                continue
            primal, tangent = forward_ad.unpack_dual(argument, level=_LEVEL)
            if tangent is not None and not is_floating(primal):
                raise TypeError(f"ep::{name}: expected no tangent of a tensor of dtype {primal.dtype}, got one")
            primals.append(primal)
            tangents.append(_dense(tangent, primal) if is_floating(primal) else None)
        # What reverse mode saves keeps its tangents, for forward over reverse. Its autograd.Function takes arguments
        # with tangents only while forward mode is off, which would turn off the outer levels of torch.func as well.
        has_graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in primals)
        with forward_ad._set_fwd_grad_enabled(not has_graph):
            results = reverse(keys, *args)
        result_tangents = jvp(tangents, *primals, *args[num_inputs:])
        if isinstance(results, Tensor):
            return forward_ad.make_dual(results, result_tangents, level=_LEVEL)
        return tuple(
            result if tangent is None else forward_ad.make_dual(result, tangent, level=_LEVEL)
            for result, tangent in zip(results, result_tangents, strict=True)
        )

    # Where a graph breaks, Dynamo would try to trace it. torch.compiler.disable does this too, but not in torch.export.
    skip_code(autograd.__code__)

    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple:
        if info.batch_size == 0:
            raise ValueError(f"ep::{name}: expected at least one entry to map over, got none")
        calls = [
            op(*(a if d is None else a.select(d, i).contiguous() for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        results = tuple(None if entries[0] is None else torch.stack(entries) for entries in zip(*calls, strict=True))
        return results, tuple(None if t is None else 0 for t in results)

    _library.impl(op.name().removeprefix("ep::"), autograd, "Autograd", with_keyset=True)
    torch.library.register_vmap(f"ep::{name}", vmap, lib=_library)


def _dense(tangent: Tensor | None, primal: Tensor) -> Tensor:
    if tangent is None or tangent._is_zerotensor():
        return torch.zeros_like(primal, memory_format=torch.contiguous_format)
    return tangent.contiguous()
