"""Checks of arguments that the layer and its functions share."""

from __future__ import annotations

from typing import Any


def check_int(op: str, name: str, value: Any, low: int, high: int = 2**31 - 1) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{op}: expected {name} to be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{op}: expected {name} from {low} to {high}, got {value}")
    return value
