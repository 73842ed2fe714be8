"""An error that one rank alone meets before an exchange: the other ranks, which wait for it, are told."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import _C  # type: ignore[attr-defined]
from .comm import resolve

__all__ = ["reports_to_peers"]

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def reports_to_peers(
    op: str, position: int, name: str
) -> Callable[[Callable[_Parameters, _Result]], Callable[_Parameters, _Result]]:
    """For a public function that ends in the exchange of `op`. Compiled graphs have the operators' own checks alone.

    Args:
        op: the operator, as in its errors.
        position, name: of the argument that says which group: a group, or a plan with its name.
    """

    def decorate(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
        @functools.wraps(function)
        def told(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            begun = _C.exchanges_begun()
            try:
                return function(*args, **kwargs)
            except Exception as error:
                # Once the exchange has begun, the operator has told. Within a mode there may be no exchange at all.
                if _C.exchanges_begun() == begun and _get_current_dispatch_mode() is None:
                    source = args[position] if position < len(args) else kwargs.get(name)
                    torch.ops.ep._report_failure(op, _group_name(source), str(error))
                raise

        return told

    return decorate


def _group_name(source: Any) -> str:
    """Of a group or a plan; a name that no group has, if it is neither."""
    try:
        return resolve(getattr(source, "group_name", source))[0]
    except Exception:
        return "?"
