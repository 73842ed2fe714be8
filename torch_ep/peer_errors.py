"""Reports an error that one rank raises before an exchange to the other ranks, which wait for that rank."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import _C  # type: ignore[attr-defined]
from .comm import communicators, resolve

__all__ = ["reports_to_peers"]

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def reports_to_peers(
    op: str, position: int, name: str
) -> Callable[[Callable[_Parameters, _Result]], Callable[_Parameters, _Result]]:
    """Decorates a public function that ends in the exchange of `op`. Compiled graphs run only the operators' checks.

    Args:
        op: the operator's name, as its errors print it.
        position, name: position and name of the argument that holds the group, or a plan that names the group.
    """

    def decorate(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
        @functools.wraps(function)
        def report_error(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            begun = _C.exchanges_begun()
            try:
                return function(*args, **kwargs)
            except Exception as error:
                # Once the exchange has begun, the operator reports. Under a dispatch mode there may be no exchange.
                if _C.exchanges_begun() == begun and _get_current_dispatch_mode() is None:
                    source = args[position] if position < len(args) else kwargs.get(name)
                    torch.ops.ep._report_failure(op, _group_name(op, source), str(error))
                raise

        return report_error

    return decorate


def _group_name(op: str, source: Any) -> str:
    """The name of a group or of a plan's group. "?", which names no group, for any other value.

    On a grid of nodes, the group of the first exchange of `op`. The report reaches the other one from there.
    """
    is_combine = op.endswith("combine")
    rail = getattr(source, "rail", None)
    if rail is not None and not is_combine:
        source = rail
    try:
        name = resolve(getattr(source, "group_name", source))[0]
    except Exception:
        return "?"
    communicator = communicators.get(name)
    if communicator is None or communicator.rail is None or communicator.node is None:
        return name
    return (communicator.node if is_combine else communicator.rail).group_name
