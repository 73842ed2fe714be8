"""Checks of arguments before they reach an operator: their Python types. The rest: csrc/core/checks.h and meta.py."""

from __future__ import annotations

import functools
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import SymInt, Tensor

__all__ = ["check_int", "check_str", "check_tensors", "check_type", "first_in_dynamo", "refuse"]

# How to make a tensor of what people pass in its place.
_TENSOR_FROM = {"list": "torch.tensor", "tuple": "torch.tensor", "ndarray": "torch.from_numpy"}


@functools.cache
def _raised_as_they_are() -> dict[type[Exception], type[Exception]]:
    """By kind of error, the kind that Dynamo raises as it is."""
    from torch._dynamo.exc import Unsupported

    return {kind: type(kind.__name__, (Unsupported, kind), {}) for kind in (TypeError, ValueError, RuntimeError)}


def first_in_dynamo(error: Exception) -> Exception:
    """`error`; while Dynamo traces, an error of the same type and message that Dynamo raises as it is.

    Dynamo hides every other error behind a page of its own. With `fullgraph=True` the user sees this error. Without it
    Dynamo breaks the graph, and the call raises again in eager mode.
    """
    if torch._guards.TracingContext.try_get() is None:
        return error
    return _raised_as_they_are()[type(error)](str(error))


@torch.compiler.assume_constant_result  # Dynamo calls it instead of tracing it
def refuse(kind: type[Exception], message: str) -> NoReturn:
    raise first_in_dynamo(kind(message))


def check_type(op: str, name: str, value: Any, kind: type, expected: str) -> None:
    if not isinstance(value, kind):
        refuse(TypeError, f"{op}: expected {name} to be {expected}, got {type(value).__name__}")


def check_tensors(op: str, needed: dict[str, Any], optional: dict[str, Any] | None = None) -> None:
    """By name, the arguments that have to be tensors, and those that may be None instead."""
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
    """The int that `value` is, or that an integer of numpy holds."""
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
