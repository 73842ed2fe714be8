"""Public functions take the fast path to the operators where no caller can observe the difference, and only there."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
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


def test_the_fast_path_is_taken_without_gradients_and_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    fast: list[str] = []

    def counted(name: str) -> Any:
        def call(*args: Any) -> Any:
            result = getattr(_C, name)(*args)
            if result is not None:
                fast.append(name)
            return result

        return call

    names = ["plan", "dispatch", "combine", "combine_weighted"]
    monkeypatch.setattr(torch_ep.ops, "_C", SimpleNamespace(**{name: counted(name) for name in names}))
    call_all(torch.randn(3, 8))
    assert fast == names
    fast.clear()
    call_all(torch.randn(3, 8, requires_grad=True))
    assert fast == ["plan"]  # the only one without a tensor that requires a gradient
    fast.clear()
    with FunctionLog():
        call_all(torch.randn(3, 8))
    assert fast == []


def test_forward_mode_and_transforms_take_the_slow_path() -> None:
    x = torch.randn(3, 8)
    with forward_ad.dual_level():
        assert call_fast_path("dispatch", x=x) is not None
        assert call_fast_path("dispatch", x=forward_ad.make_dual(x, x)) is None
        assert call_fast_path("dispatch", topk_weights=forward_ad.make_dual(torch.rand(3, 2), torch.rand(3, 2))) is None
    plan, seen = torch_ep.plan(topk_idx(), 4), []

    def look(t: Tensor) -> Tensor:
        seen.append(_C.dispatch(x, torch_ep.Plan, plan, None, None, None))
        return t

    torch.vmap(look)(x)
    assert seen == [None]


def test_fake_tensors_stay_fake() -> None:
    plan = torch_ep.plan(topk_idx(), 4, layout="rank_major")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        rows = torch_ep.dispatch(mode.from_tensor(torch.randn(3, 8)), plan)
    assert type(rows).__name__ == "FakeTensor" and rows.shape == (plan.num_rows, 8)


def test_fast_and_slow_path_give_the_same_result() -> None:
    x = torch.randn(3, 8)
    fast = call_all(x)
    with DispatchLog():
        assert all(torch.equal(a, b) for a, b in zip(fast, call_all(x), strict=True))
    slow = call_all(x.clone().requires_grad_())
    assert all(a.requires_grad for a in slow) and not any(a.requires_grad for a in fast)
    assert all(torch.equal(a, b) for a, b in zip(fast, slow, strict=True))


def call_fast_path(name: str, **changes: Any) -> Any:
    """Calls an operator's fast path with valid arguments, except `changes`. None: it leaves them to the slow path."""
    plan = torch_ep.plan(topk_idx(), 4, layout="expert_major")
    x = torch.randn(plan.num_rows if name.startswith("combine") else 3, 8)
    rows = {"x": x, "type": torch_ep.Plan, "plan": plan}
    arguments = {
        "plan": {"type": torch_ep.Plan, "topk_idx": topk_idx(), "num_experts": 4, "layout": "rank_major"}
        | {"alignment": 1, "capacity": None, "world_size": 1, "group_name": "", "max_tokens_per_rank": None}
        | {"after": None},
        "dispatch": {**rows, "topk_weights": None, "scales": None, "after": None},
        "combine": {**rows, "topk_weights": None, "scales": None, "after": None},
        "combine_weighted": {**rows, "row_weights": torch.rand(plan.num_rows), "after": None},
    }[name]
    return getattr(_C, name)(*(arguments | changes).values())


@pytest.mark.parametrize("name", ["plan", "dispatch", "combine", "combine_weighted"])
def test_the_fast_path_takes_valid_arguments(name: str) -> None:
    result = call_fast_path(name, after=torch.zeros(1))
    assert type(result) is (torch_ep.Plan if name == "plan" else Tensor)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("plan", {"topk_idx": [[0, 3]]}),
        ("plan", {"num_experts": "4"}),
        ("plan", {"num_experts": 2**70}),
        ("plan", {"num_experts": True}),
        ("plan", {"layout": None}),
        ("plan", {"capacity": 4.0}),
        ("plan", {"group_name": "\ud800"}),
        ("plan", {"max_tokens_per_rank": 4.0}),
        ("dispatch", {"x": 1}),
        ("dispatch", {"plan": None}),
        ("dispatch", {"plan": (1, 2)}),
        ("dispatch", {"plan": tuple(torch_ep.plan(topk_idx(), 4))}),
        ("dispatch", {"topk_weights": torch.rand(3, 2).requires_grad_()}),
        ("combine", {"scales": 0.5}),
        ("combine", {"after": torch.zeros(1).requires_grad_()}),
        ("combine_weighted", {"row_weights": None}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_the_fast_path_leaves_the_rest_to_the_slow_path(name: str, changes: dict[str, Any]) -> None:
    assert call_fast_path(name, **changes) is None


@pytest.mark.parametrize(
    "field, value", [("send_row", None), ("recv_pair", None), ("layout", "rank_major"), ("group_name", 1)]
)
def test_the_fast_path_leaves_incomplete_plans_to_the_slow_path(field: str, value: Any) -> None:
    plan = torch_ep.plan(topk_idx(), 4, layout="expert_major")
    assert call_fast_path("dispatch", plan=plan._replace(**{field: value})) is None


@pytest.mark.parametrize("capacity", [None, 8])
@pytest.mark.parametrize("layout", ["rank_major", "expert_major"])
def test_plans_of_both_paths_have_the_same_fields(layout: torch_ep.Layout, capacity: int | None) -> None:
    def plan() -> torch_ep.Plan:
        return torch_ep.plan(topk_idx(), 4, layout=layout, capacity=capacity)

    fast = plan()
    with FunctionLog() as log:
        slow = plan()
    assert len(log.seen) == 1
    for name, a, b in zip(torch_ep.Plan._fields, fast, slow, strict=True):
        assert torch.equal(a, b) if isinstance(b, Tensor) else a == b, name


def test_a_wrong_type_raises_an_error_with_the_name_of_the_argument() -> None:
    with pytest.raises(TypeError, match="ep::plan: expected num_experts to be an int, got str"):
        torch_ep.plan(topk_idx(), "4")  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["rank_major", "expert_major"])
def test_a_plan_is_saved_and_loaded(layout: torch_ep.Layout) -> None:
    x = torch.rand(3, 4)
    plan = torch_ep.plan(topk_idx(), 4, layout=layout)
    rows, low_latency_plan = torch_ep.low_latency_dispatch(x, topk_idx(), num_experts=4, max_tokens_per_rank=3)
    in_flight = torch_ep.low_latency_dispatch_send(x, topk_idx(), num_experts=4, max_tokens_per_rank=3)
    file = io.BytesIO()
    torch.save((plan, low_latency_plan, in_flight), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert [type(t) for t in loaded] == [torch_ep.Plan, torch_ep.LowLatencyPlan, torch_ep.InFlightDispatch]
    assert torch.equal(torch_ep.dispatch(x, loaded[0]), torch_ep.dispatch(x, plan))
    assert torch.equal(
        torch_ep.low_latency_combine(rows, loaded[1]), torch_ep.low_latency_combine(rows, low_latency_plan)
    )
    assert torch.equal(torch_ep.low_latency_dispatch_recv(loaded[2])[0][0], rows[0])
