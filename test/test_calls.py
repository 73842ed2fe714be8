"""The short way from the public functions to the operators is taken where nobody is to notice, and only there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import torch_ep
from torch_ep import _C  # type: ignore[attr-defined]

ep = torch.ops.ep
OPS = [ep.plan.default, ep.dispatch.default, ep.combine.default, ep.combine.weighted]


def topk_idx() -> Tensor:
    return torch.tensor([[0, 3], [-1, 2], [1, 0]])


def call_all(x: Tensor) -> list[Tensor]:
    plan = torch_ep.plan(topk_idx(), 4, layout="expert_major")
    rows, weights = torch_ep.dispatch(
        x, plan, topk_weights=torch.rand(3, 2, generator=torch.Generator().manual_seed(1))
    )
    return [rows, torch_ep.combine(rows, plan), torch_ep.combine(rows, plan, row_weights=weights)]


class DispatchLog(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ep":
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


class FunctionLog(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch._ops.ep" or str(func).startswith("ep."):
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_every_call() -> None:
    with DispatchLog() as log:
        call_all(torch.randn(3, 8))
    assert log.seen == OPS


def test_a_function_mode_sees_every_call() -> None:
    with FunctionLog() as log:
        call_all(torch.randn(3, 8))
    assert len(log.seen) == len(OPS)


def test_which_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    short: list[str] = []

    def counted(name: str) -> Any:
        return lambda *args: (short.append(name), getattr(_C, name)(*args))[1]

    names = ["plan", "dispatch", "combine", "combine_weighted"]
    monkeypatch.setattr(torch_ep.ops, "_C", SimpleNamespace(**{name: counted(name) for name in names}))
    call_all(torch.randn(3, 8))
    assert short == names
    short.clear()
    call_all(torch.randn(3, 8, requires_grad=True))
    assert short == ["plan"]  # the only one without a tensor that requires a gradient
    short.clear()
    with FunctionLog():
        call_all(torch.randn(3, 8))
    assert short == []


def test_fake_tensors_stay_fake() -> None:
    plan = torch_ep.plan(topk_idx(), 4, layout="rank_major")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        rows = torch_ep.dispatch(mode.from_tensor(torch.randn(3, 8)), plan)
    assert type(rows).__name__ == "FakeTensor" and rows.shape == (plan.num_rows, 8)


def test_both_ways_give_the_same() -> None:
    x = torch.randn(3, 8)
    short = call_all(x)
    with DispatchLog():
        assert all(torch.equal(a, b) for a, b in zip(short, call_all(x), strict=True))
    long = call_all(x.clone().requires_grad_())
    assert all(a.requires_grad for a in long) and not any(a.requires_grad for a in short)
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))


@pytest.mark.parametrize(
    "name, args, message",
    [
        ("plan", (), "ep::plan: expected 8 arguments, got 0"),
        ("dispatch", (1,) * 10, "ep::dispatch: expected a Tensor, got int"),
        ("combine", (None,) * 10, "ep::combine: expected a Tensor, got NoneType"),
        ("combine_weighted", (0.5,) * 9, "ep::combine: expected a Tensor, got float"),
        ("plan", (torch.zeros(1, 1).long(), "4", "rank_major", 1, 1, "", None, None), "'str' object cannot be"),
        ("plan", (torch.zeros(1, 1).long(), 4, 5, 1, 1, "", None, None), "bad argument type"),
    ],
)
def test_arguments_of_other_types_are_named(name: str, args: tuple, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        getattr(_C, name)(*args)
