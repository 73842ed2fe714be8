"""Every message about a bad argument: from the kernel, and the same from the fake. Then everything still works."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
import torch
from harness import world
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_ep

ops = torch.ops.ep


class Case(NamedTuple):
    op: Callable
    arguments: dict[str, Any]
    error: type[Exception]
    message: str
    fake: bool = True  # whether the fake sees it too: it knows no values


def topk() -> torch.Tensor:
    return torch.tensor([[0, 2], [3, -1], [1, 0]])


def plan_arguments(**changes: Any) -> dict[str, Any]:
    return {
        "topk_idx": topk(),
        "num_experts": 4,
        "layout": "expert_major",
        "alignment": 1,
        "world_size": 1,
        "group_name": "",
        **changes,
    }


def plan(error: type[Exception], message: str, *, fake: bool = True, **changes: Any) -> Case:
    op = ops.plan.capacity if "capacity" in changes else ops.plan.default
    return Case(op, plan_arguments(**changes), error, f"ep::plan: {message}", fake)


def move_arguments(layout: str) -> dict[str, Any]:
    """The plan of `topk()` on one rank, by the names that dispatch and combine use."""
    names = ("send_slot", "send_counts", "recv_counts", "recv_map")
    return {
        **dict(zip(names, ops.plan(**plan_arguments(layout=layout)), strict=False)),
        "layout": layout,
        "group_name": "",
    }


def dispatch(
    message: str,
    *,
    error: type[Exception] = ValueError,
    fake: bool = True,
    plan_layout: str = "expert_major",
    **changes: Any,
) -> Case:
    given = {"x": torch.ones(3, 4), "topk_weights": None, "scales": None, **move_arguments(plan_layout), **changes}
    return Case(ops.dispatch.default, given, error, f"ep::dispatch: {message}", fake)


def combine(
    message: str, *, error: type[Exception] = ValueError, plan_layout: str = "expert_major", **changes: Any
) -> Case:
    given = {"y": torch.ones(5, 4), "topk_weights": None, "scales": None, **move_arguments(plan_layout), **changes}
    return Case(ops.combine.default, given, error, f"ep::combine: {message}")


def weighted(message: str, *, error: type[Exception] = ValueError, **changes: Any) -> Case:
    given = {"y": torch.ones(5, 4), "row_weights": torch.ones(5), **move_arguments("expert_major"), **changes}
    return Case(ops.combine.weighted, given, error, f"ep::combine: {message}")


def grouped_mm(message: str, *, error: type[Exception] = ValueError, fake: bool = True, **changes: Any) -> Case:
    given = {"a": torch.ones(5, 4), "offsets": torch.tensor([2, 5], dtype=torch.int32), **changes}
    if "g" in given:
        return Case(ops.grouped_mm.transpose, given, error, f"ep::grouped_mm: {message}", fake)
    return Case(ops.grouped_mm.default, {"b": torch.ones(2, 4, 3), **given}, error, f"ep::grouped_mm: {message}", fake)


FLOATS = "dtype Double, Float, BFloat16 or Half"

CASES = {
    "plan-layout": plan(ValueError, "expected layout 'rank_major' or 'expert_major', got 'row'", layout="row"),
    "plan-dim": plan(ValueError, "expected topk_idx of shape [-1, -1] (-1: any size), got [2]", topk_idx=topk()[0]),
    "plan-dtype": plan(TypeError, "expected topk_idx of dtype Int or Long, got Short", topk_idx=topk().to(torch.int16)),
    "plan-strides": plan(ValueError, "expected contiguous topk_idx, got strides [1, 2]", topk_idx=topk().t()),
    "plan-no-slot": plan(
        ValueError,
        "expected at least one expert a token, got topk_idx of shape [3, 0]",
        topk_idx=topk().new_empty(3, 0),
    ),
    "plan-world_size": plan(ValueError, "expected a positive world_size, got 0", world_size=0),
    "plan-num_experts": plan(
        ValueError, "expected num_experts to be a positive multiple of the world size 1, got 0", num_experts=0
    ),
    "plan-indivisible": plan(
        ValueError,
        "expected num_experts to be a positive multiple of the world size 2, got 5",
        num_experts=5,
        world_size=2,
    ),
    "plan-alignment": plan(ValueError, "expected a positive alignment, got 0", alignment=0),
    "plan-alignment-rank_major": plan(
        ValueError, "expected alignment 1 with layout 'rank_major', got 8", alignment=8, layout="rank_major"
    ),
    "plan-capacity": plan(
        ValueError,
        "expected a capacity from 0 to 2**31 - 1 that is a multiple of the alignment 1, got -1",
        capacity=-1,
    ),
    "plan-capacity-unaligned": plan(
        ValueError,
        "expected a capacity from 0 to 2**31 - 1 that is a multiple of the alignment 4, got 6",
        capacity=6,
        alignment=4,
    ),
    "plan-max_tokens_per_rank": plan(
        ValueError, "expected at most max_tokens_per_rank = 2 tokens, got 3", max_tokens_per_rank=2
    ),
    "plan-group": plan(
        RuntimeError,
        "expected an initialised group, got group 'nowhere': call torch_ep.init(group) on every rank first",
        world_size=2,
        group_name="nowhere",
    ),
    "plan-index-high": plan(
        ValueError, "expected topk_idx in [-1, 3), got 3 at token 1, slot 0", num_experts=3, fake=False
    ),
    "plan-index-low": plan(
        ValueError,
        "expected topk_idx in [-1, 4), got -2 at token 0, slot 1",
        topk_idx=topk() - topk().eq(2) * 4,
        fake=False,
    ),
    "plan-duplicate": plan(
        ValueError,
        "expected different experts in one token, got expert 1 at token 2, slots 0 and 1",
        topk_idx=topk() + topk().eq(0).int(),
        fake=False,
    ),
    "dispatch-layout": dispatch("expected layout 'rank_major' or 'expert_major', got 'expert'", layout="expert"),
    "dispatch-tokens": dispatch("expected x of shape [3, -1] (-1: any size), got [2, 4]", x=torch.ones(2, 4)),
    "dispatch-dim": dispatch("expected x of shape [3, -1] (-1: any size), got [3, 4, 1]", x=torch.ones(3, 4, 1)),
    "dispatch-dtype": dispatch(
        f"expected x of {FLOATS.replace(' or Half', ', Half')} or Float8_e4m3fn, got Long",
        error=TypeError,
        x=torch.ones(3, 4, dtype=torch.int64),
    ),
    "dispatch-strides": dispatch("expected contiguous x, got strides [1, 3]", x=torch.ones(4, 3).t()),
    "dispatch-weights": dispatch(
        "expected topk_weights of shape [3, 2] (-1: any size), got [3, 3]", topk_weights=torch.ones(3, 3)
    ),
    "dispatch-weights-dtype": dispatch(
        f"expected topk_weights of {FLOATS}, got Int",
        error=TypeError,
        topk_weights=torch.ones(3, 2, dtype=torch.int32),
    ),
    "dispatch-scales": dispatch("expected scales of shape [3, -1] (-1: any size), got [4, 1]", scales=torch.ones(4, 1)),
    "dispatch-send_slot": dispatch(
        "expected send_slot of dtype Int, got Long", error=TypeError, send_slot=torch.zeros(3, 2, dtype=torch.int64)
    ),
    "dispatch-recv_counts": dispatch(
        "expected recv_counts of shape [1] (-1: any size), got [2]", recv_counts=torch.zeros(2, dtype=torch.int32)
    ),
    "dispatch-recv_slot": dispatch(
        "expected recv_slot of shape [-1] (-1: any size), got [5, 1]", recv_map=torch.zeros(5, 1, dtype=torch.int32)
    ),
    "dispatch-recv_topk_idx": dispatch(
        "expected recv_topk_idx of shape [-1, 2] (-1: any size), got [3, 1]",
        plan_layout="rank_major",
        recv_map=torch.zeros(3, 1, dtype=torch.int64),
    ),
    "dispatch-send_slot-values": dispatch(
        "expected send_slot of this plan in [-1, 3), got 3",
        fake=False,
        send_slot=torch.tensor([[0, 0], [1, -1], [3, 3]], dtype=torch.int32),
    ),
    "dispatch-recv_slot-values": dispatch(
        "expected recv_slot of this plan in [-1, 6), got -2",
        fake=False,
        recv_map=torch.tensor([0, -2, 1, 2, 4], dtype=torch.int32),
    ),
    "dispatch-counts-values": dispatch(
        "expected send_counts of this plan in [0, 2147483647), got -3",
        fake=False,
        send_counts=torch.tensor([-3], dtype=torch.int32),
    ),
    "combine-rows": combine("expected y of shape [5, -1] (-1: any size), got [6, 4]", y=torch.ones(6, 4)),
    "combine-dtype": combine(
        f"expected y of {FLOATS}, got Float8_e4m3fn", error=TypeError, y=torch.ones(5, 4).to(torch.float8_e4m3fn)
    ),
    "combine-strides": combine("expected contiguous y, got strides [0, 0]", y=torch.ones(()).expand(5, 4)),
    "combine-weights": combine(
        "expected topk_weights of shape [5] (-1: any size), got [5, 2]", topk_weights=torch.ones(5, 2)
    ),
    "combine-weights-rank_major": combine(
        "expected topk_weights of shape [3, 2] (-1: any size), got [3]",
        plan_layout="rank_major",
        y=torch.ones(3, 4),
        topk_weights=torch.ones(3),
    ),
    "combine-scales-dtype": combine(
        f"expected scales of {FLOATS}, got Byte", error=TypeError, scales=torch.ones(5, 1, dtype=torch.uint8)
    ),
    "weighted-shape": weighted(
        "expected row_weights of shape [5] (-1: any size), got [5, 1]", row_weights=torch.ones(5, 1)
    ),
    "weighted-dtype": weighted(
        f"expected row_weights of {FLOATS}, got Int", error=TypeError, row_weights=torch.ones(5, dtype=torch.int32)
    ),
    "grouped_mm-shape": grouped_mm(
        "expected a of shape [m, k] and b of shape [groups, k, n], got [5, 4] and [2, 5, 3]", b=torch.ones(2, 5, 3)
    ),
    "grouped_mm-dtype": grouped_mm(
        "expected b of dtype Float, that of a, got Double", error=TypeError, b=torch.ones(2, 4, 3).double()
    ),
    "grouped_mm-offsets": grouped_mm(
        "expected offsets of shape [2] (-1: any size), got [1]", offsets=torch.zeros(1, dtype=torch.int32)
    ),
    "grouped_mm-offsets-values": grouped_mm(
        "expected offsets that grow from 0 to at most 5, got 6 after 2",
        offsets=torch.tensor([2, 6], dtype=torch.int32),
        fake=False,
    ),
    "grouped_mm-transpose": grouped_mm(
        "expected a of shape [m, k] and g of shape [m, n], got [5, 4] and [4, 3]", g=torch.ones(4, 3)
    ),
    "grouped_mm-transpose-dtype": grouped_mm(
        "expected g of dtype Float, that of a, got Half", error=TypeError, g=torch.ones(5, 3).half()
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel(case: Case) -> None:
    with pytest.raises(case.error) as raised:
        case.op(**case.arguments)
    assert str(raised.value).splitlines()[0] == case.message


@pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.fake], ids=[name for name, case in CASES.items() if case.fake]
)
def test_fake_says_the_same(case: Case) -> None:
    with FakeTensorMode() as mode, pytest.raises(case.error) as raised:
        case.op(**{k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in case.arguments.items()})
    assert str(raised.value).splitlines()[0] == case.message


def test_devices_differ() -> None:
    given = move_arguments("expert_major")
    with FakeTensorMode() as mode, pytest.raises(ValueError) as raised:
        plan_tensors = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        ops.dispatch(x=torch.empty(3, 4, device="cuda"), topk_weights=None, scales=None, **plan_tensors)
    assert str(raised.value) == "ep::dispatch: expected x on cpu, got cuda:0"


@pytest.mark.parametrize(
    ("name", "value"), [("max_tokens_per_rank", 0), ("hidden", -1), ("num_topk", 0), ("num_experts", 0)]
)
def test_init_limits(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"torch_ep.init: expected a positive {name} or None, got {value}"):
        torch_ep.init(**{name: value})


def test_init_timeout() -> None:
    with pytest.raises(ValueError, match=r"torch_ep.init: expected a positive timeout, got 0:00:00"):
        torch_ep.init(timeout=timedelta())


def test_group_of_another_type() -> None:
    with pytest.raises(
        TypeError, match="expected group to be a ProcessGroup, a DeviceMesh, a group's name or None, got int"
    ):
        torch_ep.plan(topk(), 4, 3)  # type: ignore[arg-type]


def test_combine_takes_one_kind_of_weights() -> None:
    p = torch_ep.plan(topk(), 4)
    with pytest.raises(ValueError, match=r"torch_ep.combine: expected row_weights or topk_weights, got both"):
        torch_ep.combine(torch.ones(5, 4), p, row_weights=torch.ones(5), topk_weights=torch.ones(5))


def test_plan_with_the_wrong_fields() -> None:
    p = torch_ep.plan(topk(), 4)._replace(layout="rank_major")
    with pytest.raises(ValueError, match="expected a plan of layout 'rank_major' to have recv_topk_idx, got None"):
        torch_ep.dispatch(torch.ones(3, 4), p)


# On several ranks: the message of each rank, and that the group works right after.


def works(rank: int, world_size: int) -> bool:
    p = torch_ep.plan(torch.arange(world_size)[:, None], world_size)
    y = torch_ep.combine(torch_ep.dispatch(torch.full((world_size, 3), float(rank)), p), p)
    return torch.equal(y, torch.full((world_size, 3), float(rank)))


def caught(rank: int, world_size: int, which: str) -> tuple[str, str, bool]:
    idx = torch.zeros(2, 1, dtype=torch.int64)
    try:
        if which == "index on one rank":
            torch_ep.plan(idx + (9 if rank == 1 else 0), world_size)
        elif which == "num_experts differs":
            torch_ep.plan(idx, world_size * (1 + rank))
        elif which == "num_topk differs":
            torch_ep.plan(torch.arange(rank + 1)[None], 2 * world_size)
        elif which == "hidden differs":
            p = torch_ep.plan(idx, world_size)
            torch_ep.dispatch(torch.ones(2, 3 + rank), p)
        elif which == "dtype differs":
            p = torch_ep.plan(idx, world_size)
            torch_ep.dispatch(torch.ones(2, 3, dtype=torch.float32 if rank else torch.float64), p)
        elif which == "weights on one rank":
            p = torch_ep.plan(idx, world_size)
            torch_ep.dispatch(torch.ones(2, 3), p, **({} if rank else {"topk_weights": torch.ones(2, 1)}))
        elif which == "world_size":
            ops.plan(idx, 3, "expert_major", 1, 3, torch_ep.comm.resolve(None)[0])
        elif which == "init differs":
            torch_ep.init(hidden=7 + rank)
    except Exception as error:
        return type(error).__name__, str(error).splitlines()[0], works(rank, world_size)
    return "", "no error", works(rank, world_size)


@pytest.mark.parametrize(
    ("which", "errors", "messages"),
    [
        (
            "index on one rank",
            ("DistError", "ValueError"),
            (
                "ep::plan: rank 1 failed before exchange",
                "ep::plan: expected topk_idx in [-1, 2), got 9 at token 0, slot 0",
            ),
        ),
        (
            "num_experts differs",
            ("DistError", "DistError"),
            (
                "ep::plan: expected the same num_experts on every rank, got 2 on rank 0 and 4 on rank 1",
                "ep::plan: expected the same num_experts on every rank, got 4 on rank 1 and 2 on rank 0",
            ),
        ),
        (
            "num_topk differs",
            ("DistError", "DistError"),
            (
                "ep::plan: expected the same num_topk on every rank, got 1 on rank 0 and 2 on rank 1",
                "ep::plan: expected the same num_topk on every rank, got 2 on rank 1 and 1 on rank 0",
            ),
        ),
        (
            "hidden differs",
            ("DistError", "DistError"),
            (
                "ep::dispatch: expected the same hidden on every rank, got 3 on rank 0 and 4 on rank 1",
                "ep::dispatch: expected the same hidden on every rank, got 4 on rank 1 and 3 on rank 0",
            ),
        ),
        (
            "dtype differs",
            ("DistError", "DistError"),
            (
                "ep::dispatch: expected the same dtype on every rank, got Double on rank 0 and Float on rank 1",
                "ep::dispatch: expected the same dtype on every rank, got Float on rank 1 and Double on rank 0",
            ),
        ),
        (
            "weights on one rank",
            ("DistError", "DistError"),
            (
                "ep::dispatch: expected the same bytes of topk_weights a token on every rank, "
                "got 4 on rank 0 and 0 on rank 1",
                "ep::dispatch: expected the same bytes of topk_weights a token on every rank, "
                "got 0 on rank 1 and 4 on rank 0",
            ),
        ),
        (
            "world_size",
            ("ValueError", "ValueError"),
            ("ep::plan: expected world_size 2 (the size of group '0'), got 3",) * 2,
        ),
        (
            "init differs",
            ("DistError", "DistError"),
            (
                "torch_ep.init: expected the same hidden on every rank, got 7 on rank 0 and 8 on rank 1",
                "torch_ep.init: expected the same hidden on every rank, got 8 on rank 1 and 7 on rank 0",
            ),
        ),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_ranks(which: str, errors: tuple[str, str], messages: tuple[str, str]) -> None:
    for (kind, message, usable), error, expected in zip(world(2).run(caught, which), errors, messages, strict=True):
        assert kind == error
        assert message.startswith(expected)
        assert usable


def test_a_peers_bad_index_is_told_in_its_own_words() -> None:
    (_, message, _), _ = world(2).run(caught, "index on one rank")
    assert message.endswith(": ep::plan: expected topk_idx in [-1, 2), got 9 at token 0, slot 0")


def beyond_limits(rank: int, world_size: int) -> list[tuple[str, str]]:
    torch_ep.init(max_tokens_per_rank=4, hidden=8, num_topk=2, num_experts=2 * world_size)
    p = torch_ep.plan(torch.zeros(1, 1, dtype=torch.int64), world_size, capacity=world_size)
    calls: list[Callable] = [
        lambda: torch_ep.plan(torch.zeros(5 if rank == 0 else 4, 1, dtype=torch.int64), world_size),
        lambda: torch_ep.plan(torch.arange(3)[None], 2 * world_size),
        lambda: torch_ep.plan(torch.zeros(4, 1, dtype=torch.int64), 3 * world_size),
        lambda: torch_ep.dispatch(torch.ones(1, 9), p),
        lambda: torch_ep.combine(torch.ones(world_size, 9), p),
    ]
    seen = []
    for call in calls:
        for mode in (None, FakeTensorMode(allow_non_fake_inputs=True)):
            try:
                if mode is None:
                    call()
                elif call is not calls[0]:  # there ranks differ, and a fake knows only its own
                    with mode:
                        call()
                else:
                    continue
                seen.append(("", "no error"))
            except Exception as error:
                seen.append((type(error).__name__, str(error).splitlines()[0]))
    assert works(rank, world_size)
    torch_ep.init()
    return seen


def test_limits_of_init() -> None:
    first, second = world(2).run(beyond_limits)
    limit = "the limit given to torch_ep.init"
    tokens = "ep::plan: expected at most max_tokens_per_rank = 4 tokens, got 5"
    assert first[0] == ("ValueError", tokens)
    assert second[0][0] == "DistError"
    assert second[0][1].endswith(tokens)
    expected = [
        ("ValueError", f"ep::plan: expected at most num_topk = 2, {limit}, got 3"),
        ("ValueError", f"ep::plan: expected at most num_experts = 4, {limit}, got 6"),
        ("ValueError", f"ep::dispatch: expected at most hidden = 8, {limit}, got 9"),
        ("ValueError", f"ep::combine: expected at most hidden = 8, {limit}, got 9"),
    ]
    for seen in (first, second):
        assert seen[1:] == [entry for entry in expected for _ in ("kernel", "fake")]


def broken_plan(rank: int, world_size: int) -> tuple[str, bool]:
    p = torch_ep.plan(torch.zeros(2, 1, dtype=torch.int64), world_size)
    try:
        torch_ep.dispatch(torch.ones(2, 3), p._replace(send_slot=p.send_slot + 7) if rank == 1 else p)
    except Exception as error:
        return str(error).splitlines()[0], works(rank, world_size)
    return "no error", works(rank, world_size)


def test_broken_plan_of_one_rank() -> None:
    (first, first_works), (second, second_works) = world(2).run(broken_plan)
    assert second == "ep::dispatch: expected send_slot of this plan in [-1, 2), got 8"
    assert first.startswith("ep::dispatch: rank 1 failed before exchange")
    assert first.endswith(second)
    assert first_works and second_works


def another_plan(rank: int, world_size: int) -> tuple[str, bool]:
    """Rank 1 passes a plan of other routing: what it sends is not what rank 0 waits for."""
    p = torch_ep.plan(torch.zeros(2, 1, dtype=torch.int64), world_size)
    q = torch_ep.plan(torch.tensor([[0], [-1]]), world_size)
    try:
        torch_ep.dispatch(torch.ones(2, 3), q if rank == 1 else p)
    except Exception as error:
        return str(error).splitlines()[0], works(rank, world_size)
    return "no error", works(rank, world_size)


def test_plans_of_different_routing() -> None:
    first, second = world(2).run(another_plan)
    assert first == (
        "ep::dispatch: expected the same plan on every rank, got one by which 2 rows go from rank 1 to rank 0, "
        "where rank 1 sends 1",
        True,
    )
    assert second[1]
