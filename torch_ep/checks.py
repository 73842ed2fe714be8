"""Checks the Python types of arguments before an operator runs. csrc/core/checks.h and meta.py check the rest."""

from __future__ import annotations

import functools
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import SymInt, Tensor

__all__ = ["check_int", "check_str", "check_tensors", "check_type", "first_in_dynamo", "refuse"]

# The conversion to a tensor, by the name of the type that was passed instead.
_TENSOR_FROM = {"list": "torch.tensor", "tuple": "torch.tensor", "ndarray": "torch.from_numpy"}


@functools.cache
def _dynamo_error_types() -> dict[type[Exception], type[Exception]]:
    """Maps an error type to a subclass that Dynamo raises unchanged."""
    from torch._dynamo.exc import Unsupported

    return {kind: type(kind.__name__, (Unsupported, kind), {}) for kind in (TypeError, ValueError, RuntimeError)}


def first_in_dynamo(error: Exception) -> Exception:
    """Returns `error`. While Dynamo traces, returns an error of that type and message that Dynamo raises unchanged.

    Dynamo wraps every other error in a message of its own. With `fullgraph=True` the user sees this error. Without it
    Dynamo breaks the graph, and the call raises again in eager mode.
    """
    if torch._guards.TracingContext.try_get() is None:
        return error
    return _dynamo_error_types()[type(error)](str(error))


@torch.compiler.assume_constant_result  # Dynamo calls it instead of tracing it
def refuse(kind: type[Exception], message: str) -> NoReturn:
    raise first_in_dynamo(kind(message))


def check_type(op: str, name: str, value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    if not isinstance(value, kind):
        refuse(TypeError, f"{op}: expected {name} to be {expected}, got {type(value).__name__}")


def check_tensors(op: str, needed: dict[str, Any], optional: dict[str, Any] | None = None) -> None:
    """Checks, by argument name, that `needed` are dense tensors and `optional` dense tensors or None."""
    for name, value in needed.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            _refuse_tensor(op, name, value, "a Tensor")
    for name, value in () if optional is None else optional.items():
        if value is not None and (not isinstance(value, Tensor) or value.layout is not torch.strided):
            _refuse_tensor(op, name, value, "a Tensor or None")


def _refuse_tensor(op: str, name: str, value: Any, expected: str) -> None:
    got = type(value).__name__
    if isinstance(value, Tensor):
        refuse(TypeError, f"{op}: expected {name} to be a dense Tensor, got one of layout {value.layout}")
    remedy = f": pass {_TENSOR_FROM[got]}(...)" if got in _TENSOR_FROM else ""
    refuse(TypeError, f"{op}: expected {name} to be {expected}, got {got}{remedy}")


def check_int(op: str, name: str, value: Any) -> int:
    """Returns `value` as an int. Accepts int, SymInt and other integral types, such as those of numpy."""
    if type(value) is int and (torch.compiler.is_compiling() or value.bit_length() < 64):
        return value
    if isinstance(value, bool) or not isinstance(value, int | SymInt | Integral):
        refuse(TypeError, f"{op}: expected {name} to be an int, got {type(value).__name__}")
    if isinstance(value, SymInt):
        return value  # type: ignore[return-value]
    value = int(value)
    if value.bit_length() >= 64:
        refuse(ValueError, f"{op}: expected {name} of at most 64 bits, got an int of {value.bit_length()} bits")
    return value


def check_str(op: str, name: str, value: Any, expected: str) -> None:
    if not isinstance(value, str):
        refuse(TypeError, f"{op}: expected {name} {expected}, got {type(value).__name__}")
