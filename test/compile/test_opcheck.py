"""Promises to a compiler about every operator: opcheck, and properties that opcheck does not check."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from support.devices import Ranks
from support.harness import random_topk, seeded
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import torch_ep

DEFAULT_TEST_UTILS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
ep = torch.ops.ep
OPS = (
    ep.plan.default,
    ep.plan.capacity,
    ep.dispatch.default,
    ep.combine.default,
    ep.combine.weighted,
    ep.dispatch.grid,
    ep.combine.grid,
    ep.combine.grid_weighted,
    ep.low_latency_dispatch.default,
    ep.low_latency_dispatch_send.default,
    ep.low_latency_dispatch_recv.default,
    ep.low_latency_combine.default,
    ep.low_latency_combine_send.default,
    ep.low_latency_combine_recv.default,
    ep.zero_after.default,
    ep.grouped_mm.default,
    ep.grouped_mm.transpose,
)
# opcheck repeats a call with the same arguments: more exchanges in flight than may be, and tickets used twice. See
# test/compile/test_halves.py.
HALVES = (
    ep.dispatch_send.default,
    ep.dispatch_recv.default,
    ep.combine_send.default,
    ep.combine_send.weighted,
    ep.combine_recv.default,
)
NUM_EXPERTS, NUM_TOPK, HIDDEN, CAPACITY, MAX_TOKENS = 6, 3, 5, 16, 7
LOW_LATENCY_HIDDEN = {"cpu": HIDDEN, "cuda": 16}  # nvlink has rows of a multiple of 16 bytes only


class Call(NamedTuple):
    op: Any
    args: tuple


# A call's name says how `make_call` builds it: op, layout, and what it is given.
PLANS = [
    f"{op}, {layout}{after}"
    for op in ("plan", "plan.capacity")
    for layout in ("rank_major", "expert_major")
    for after in ("", ", after")
]
MOVES = [
    f"{op}, {layout}, {size}{payload}"
    for op in ("dispatch", "combine")
    for layout in ("rank_major", "expert_major")
    for size in ("exact", "capacity")
    for payload in ("", ", weights", ", weights, scales, after")
] + [
    f"{op}, {layout}, {size}{after}"
    for op in ("combine.weighted", "dispatch.grid", "combine.grid", "combine.grid_weighted")
    for layout in ("rank_major", "expert_major")
    for size in ("exact", "capacity")
    for after in ("", ", after")
]
FP8 = [f"dispatch, {layout}, exact, weights, scales, fp8" for layout in ("rank_major", "expert_major")]
LOW_LATENCY = [
    f"low_latency_dispatch{half}{options}"
    for half in ("", "_send", "_recv")
    for options in ("", ", weights, after", ", fp8", ", weights, fp8_ue8m0")
] + [f"low_latency_combine{half}{after}" for half in ("", "_send", "_recv") for after in ("", ", after")]
LOCAL = ["zero_after", "grouped_mm", "grouped_mm.transpose"]
EXCHANGES = PLANS + MOVES + FP8 + LOW_LATENCY
CALLS = EXCHANGES + LOCAL


def make_low_latency_call(
    op: str, words: list[str], x: Tensor, topk_idx: Tensor, after: Tensor | None, world_size: int, group_name: str
) -> Call:
    quantize = next((word for word in words if word.startswith("fp8")), "")
    weights = torch.rand(topk_idx.shape).to(x.device) if "weights" in words else None
    ranks = (world_size, group_name)
    dispatch = (x, topk_idx, weights, quantize, NUM_EXPERTS, MAX_TOKENS, *ranks)
    if op == "low_latency_dispatch":
        return Call(ep.low_latency_dispatch.default, (*dispatch, after))
    if op == "low_latency_dispatch_send":
        return Call(ep.low_latency_dispatch_send.default, (*dispatch, after))
    if op == "low_latency_dispatch_recv":
        sent = ep.low_latency_dispatch_send(*dispatch)
        sizes = (x.shape[1], x.dtype, topk_idx.shape[1], quantize, NUM_EXPERTS, MAX_TOKENS, *ranks)
        return Call(ep.low_latency_dispatch_recv.default, (*sent, *sizes))
    rows, _, _, _, _, recv_row, row_weights, _ = ep.low_latency_dispatch(*dispatch)
    combine = (rows, topk_idx, row_weights, recv_row, NUM_EXPERTS, *ranks)
    if op == "low_latency_combine":
        return Call(ep.low_latency_combine.default, (*combine, after))
    if op == "low_latency_combine_send":
        return Call(ep.low_latency_combine_send.default, (*combine, after))
    sent = ep.low_latency_combine_send(*combine)
    return Call(ep.low_latency_combine_recv.default, (*sent, topk_idx, x.shape[1], x.dtype, NUM_EXPERTS, *ranks))


def make_call(name: str, rank: int, world_size: int, device: str, tokens: int, grad: bool) -> Call:
    """The operator of that name and its arguments on this rank. Collective."""
    op, *words = name.split(", ")
    generator = seeded(rank, tokens)
    group_name, _ = torch_ep.comm.resolve(None)
    dtype = torch.float32

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).to(device).requires_grad_(grad)

    if op == "zero_after":
        return Call(ep.zero_after.default, (numbers(tokens, 2).detach(),))
    if op == "grouped_mm":
        offsets = torch.tensor([tokens // 2, tokens // 2, tokens], dtype=torch.int32, device=device)
        return Call(ep.grouped_mm.default, (numbers(tokens + 2, 4), numbers(3, 4, 5), offsets))
    if op == "grouped_mm.transpose":
        offsets = torch.tensor([tokens // 2, tokens // 2, tokens], dtype=torch.int32, device=device)
        return Call(ep.grouped_mm.transpose, (numbers(tokens + 2, 4), numbers(tokens + 2, 5), offsets))

    after = numbers(2) if "after" in words else None
    topk_idx = random_topk(tokens, NUM_TOPK, NUM_EXPERTS, generator).to(device)
    if op.startswith("low_latency"):  # for inference only
        x = numbers(tokens, LOW_LATENCY_HIDDEN[device]).detach()
        after = None if after is None else after.detach()
        return make_low_latency_call(op, words, x, topk_idx, after, world_size, group_name)
    layout = words[0]
    group = (world_size, group_name, None)
    exact = (topk_idx, NUM_EXPERTS, layout, 1, *group)
    with_capacity = (topk_idx, NUM_EXPERTS, layout, 1, CAPACITY, *group)
    if op == "plan":
        return Call(ep.plan.default, (*exact, after.detach() if after is not None else None))
    if op == "plan.capacity":
        return Call(ep.plan.capacity, (*with_capacity, after.detach() if after is not None else None))

    fields = ep.plan.default(*exact) if words[1] == "exact" else ep.plan.capacity(*with_capacity)
    plan_args = (*fields[:4], layout, group_name, after)
    recv_map = fields[3]
    name, _, overload = op.partition(".")
    if "grid" in overload:  # this group is the rail, and every rank a node of its own
        rail = ep.plan.default(topk_idx, NUM_EXPERTS, "rank_major", 1, *group)
        in_node = (rail[3], NUM_EXPERTS // world_size, layout, 1)
        alone = (1, "", None)
        is_exact = words[1] == "exact"
        fields = ep.plan.default(*in_node, *alone) if is_exact else ep.plan.capacity(*in_node, CAPACITY, *alone)
        plan_args = (*rail[:4], *fields[:4], layout, group_name, "", after)
        recv_map = fields[3]
    if overload.endswith("weighted"):
        y = numbers(recv_map.shape[0], HIDDEN)
        return Call(getattr(ep.combine, overload), (y, numbers(recv_map.shape[0]), *plan_args))
    rows = tokens if name == "dispatch" else recv_map.shape[0]
    weights_shape = (tokens, NUM_TOPK) if name == "dispatch" else tuple(recv_map.shape)
    x = numbers(rows, HIDDEN)
    if "fp8" in words:
        x = x.detach().to(torch.float8_e4m3fn)
    weights = numbers(*weights_shape) if "weights" in words else None
    scales = numbers(rows, 2) if "scales" in words else None
    return Call(getattr(getattr(ep, name), overload or "default"), (x, weights, scales, *plan_args))


def is_half(name: str) -> bool:
    return "_send" in name or "_recv" in name


def can_repeat(name: str, world_size: int, device: str) -> bool:
    """Whether two calls with the same arguments have the same results."""
    if name not in LOW_LATENCY:
        return True
    if device == "cuda":
        # No two sends have the same status, which is good for one receive; and rows behind the counts are undefined.
        return world_size == 1 and name.startswith("low_latency_combine") and not is_half(name)
    return world_size == 1 or "_recv" in name  # no two exchanges wait for the same time


def forget_what_is_on_its_way(name: str, device: str) -> None:
    """Collective. On nvlink every send wants a receive, and at most two may be on their way."""
    if device == "cuda" and is_half(name):
        torch_ep.reset()


def utils_of(name: str, world_size: int, device: str) -> tuple[str, ...]:
    if name in FP8:  # two of the tests compute with the arguments themselves, which torch cannot do in fp8
        return ("test_autograd_registration", "test_faketensor")
    if not can_repeat(name, world_size, device):  # the test compares the results of two calls
        return tuple(test for test in DEFAULT_TEST_UTILS if test != "test_aot_dispatch_dynamic")
    return DEFAULT_TEST_UTILS


def _opcheck(rank: int, world_size: int, device: str, name: str, tokens: int) -> dict[str, str]:
    answers: dict[str, str] = {}
    for test in utils_of(name, world_size, device):
        call = make_call(name, rank, world_size, device, tokens, grad=True)
        result = torch.library.opcheck(call.op, call.args, test_utils=test, raise_exception=False)
        forget_what_is_on_its_way(name, device)
        # As text: exceptions that hold symbols cannot be sent to another process.
        answers.update((test, answer if isinstance(answer, str) else repr(answer)) for test, answer in result.items())
    return answers


def _assert_success(results: list[dict[str, str]], name: str, device: str) -> None:
    failed = [
        f"rank {rank}, {test}: {answer}"
        for rank, result in enumerate(results)
        for test, answer in result.items()
        if answer != "SUCCESS"
    ]
    assert not failed, "\n".join(failed)
    assert all(len(result) == len(utils_of(name, len(results), device)) for result in results)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(device: str, name: str) -> None:
    _assert_success([_opcheck(0, 1, device, name, 7)], name, device)


def _opcheck_uneven(rank: int, world_size: int, device: str, name: str) -> dict[str, str]:
    return _opcheck(rank, world_size, device, name, 5 + 2 * rank)


@pytest.mark.parametrize("name", EXCHANGES)
def test_opcheck_over_two_ranks(device: str, name: str) -> None:
    # opcheck calls the operator several times; all ranks do so in lockstep, and say only afterwards how it went.
    _assert_success(Ranks(device, 2).run(_opcheck_uneven, device, name), name, device)


def _storages(values: Any) -> set[int]:
    """Where the tensors among the values live; empty tensors live nowhere."""
    tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.untyped_storage().nbytes()]
    return {t.untyped_storage().data_ptr() for t in tensors}


def _alias(rank: int, world_size: int, device: str, name: str, tokens: int) -> list[str]:
    call = make_call(name, rank, world_size, device, tokens, grad=False)
    kept: list[Any] = []  # alive, so that no memory is handed out twice
    seen = _storages(call.args)
    found = []
    for turn in range(3):
        if turn > 0 and device == "cuda" and "_recv" in name:  # there a status is good for one receive
            kept.append(call)
            call = make_call(name, rank, world_size, device, tokens, grad=False)
            seen |= _storages(call.args)
        kept.append(call.op(*call.args))
        forget_what_is_on_its_way(name, device)
        results = [t for t in tree_leaves(kept[-1]) if isinstance(t, Tensor)]
        for i, result in enumerate(results):
            where = _storages(result)
            if where & seen:
                found.append(f"call {turn}, result {i}")
            seen |= where
    return found


every_size = pytest.mark.parametrize("tokens", [0, 1, 7])


@every_size
@pytest.mark.parametrize("world_size", [1, 2])
def test_results_share_no_memory(device: str, world_size: int, tokens: int) -> None:
    # Not with an argument, nor with each other, nor with what an earlier call returned.
    ranks = None if world_size == 1 else Ranks(device, 2)
    for name in CALLS if ranks is None else EXCHANGES:
        found = [_alias(0, 1, device, name, tokens)] if ranks is None else ranks.run(_alias, device, name, tokens)
        assert not any(found), f"{name}: {found}"


def _fake_differs(rank: int, world_size: int, device: str, name: str, tokens: int) -> list[str]:
    call = make_call(name, rank, world_size, device, tokens, grad=False)
    real = call.op(*call.args)
    forget_what_is_on_its_way(name, device)
    shape_env = ShapeEnv()
    with FakeTensorMode(shape_env=shape_env) as mode:
        leaves, spec = tree_flatten(call.args)
        fake_args = tree_unflatten([mode.from_tensor(t) if isinstance(t, Tensor) else t for t in leaves], spec)
        fake = call.op(*fake_args)
    found = []
    real, fake = ([r] if isinstance(r, Tensor) else list(r) for r in (real, fake))
    for i, (a, b) in enumerate(zip(real, fake, strict=True)):
        if a is None or b is None:
            if a is not b:
                found.append(f"result {i}: {a} against {b}")
            continue
        # The exact plan's rows are the only size that a fake may leave open.
        open_rows = name.startswith("plan, ") and i == 3
        shapes = (tuple(a.shape), tuple(b.shape))
        if open_rows:
            assert not isinstance(b.shape[0], int)
            shapes = (shapes[0][1:], shapes[1][1:])
        facts = ((shapes[0], a.stride(), a.dtype, a.device), (shapes[1], b.stride(), b.dtype, b.device))
        if facts[0] != facts[1]:
            found.append(f"result {i}: {facts[0]} against {facts[1]}")
    return found


@every_size
@pytest.mark.parametrize("name", CALLS)
def test_fakes_equal_kernels(device: str, name: str, tokens: int) -> None:
    assert not _fake_differs(0, 1, device, name, tokens)


@every_size
def test_fakes_equal_kernels_on_two_ranks(device: str, tokens: int) -> None:
    ranks = Ranks(device, 2)
    for name in EXCHANGES:
        found = ranks.run(_fake_differs, device, name, tokens)
        assert not any(found), f"{name}: {found}"


def _rows_at_the_bound(rank: int, world_size: int, device: str, layout: str) -> tuple[int, int]:
    """Compiled, with the worst routing that there is: the rows that came, and the bound that the fake gives them."""
    tokens, num_topk, num_local_experts = 5, 2, 2
    # The groups of world_size * tokens rows must each miss their padded size by all but one row.
    alignment = 1 if layout == "rank_major" else {1: 4, 2: 3}[world_size]
    topk_idx = torch.tensor([[0, 1]] * tokens, device=device)
    x = torch.ones(tokens, 3, device=device)

    def layer(topk_idx: Tensor, x: Tensor) -> Tensor:
        plan = torch_ep.plan(topk_idx, num_local_experts * world_size, layout=layout, alignment=alignment)
        return torch_ep.dispatch(x, plan)

    _, before = torch_ep.comm._arguments_of.get(torch_ep.comm.resolve(None)[0], (None, None))
    torch._dynamo.reset()
    try:
        if before is not None:  # with one rank the tokens that are given bound the rows
            torch_ep.init(**{**before, "max_tokens_per_rank": tokens})
        rows = torch.compile(layer, backend="aot_eager", fullgraph=True)(topk_idx, x).shape[0]
    finally:
        if before is not None:
            torch_ep.init(**before)
    bound = world_size * tokens
    if layout == "expert_major":
        bound = bound * num_topk + num_local_experts * (alignment - 1)
    return rows, bound


@pytest.mark.parametrize("layout", ["rank_major", "expert_major"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_compiled_code_accepts_as_many_rows_as_can_arrive(device: str, world_size: int, layout: str) -> None:
    if world_size == 1:
        rows, bound = _rows_at_the_bound(0, 1, device, layout)
    else:
        # All tokens went to the experts of rank 0.
        rows, bound = Ranks(device, 2).run(_rows_at_the_bound, device, layout)[0]
    assert rows == bound


every_op = pytest.mark.parametrize("op", (*OPS, *HALVES), ids=str)


def test_every_operator_is_checked_here() -> None:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("ep::")]
    public = {name for name in names if not name.startswith("ep::_")}
    assert public == {op.name() for op in (*OPS, *HALVES)}


@every_op
def test_tags(op: Any) -> None:
    assert torch.Tag.pt2_compliant_tag in op.tags
    # Those that wait for the device: CUDA graphs are cut there and nowhere else.
    waits = (ep.plan.default, ep.grouped_mm.default, ep.grouped_mm.transpose)
    assert (torch.Tag.cudagraph_unsafe in op.tags) == (op in waits)
    # Turns opcheck's comparison with the fake off.
    assert torch.Tag.dynamic_output_shape not in op.tags
    # Makes a partitioner treat the operator as a random number generator.
    assert torch.Tag.nondeterministic_seeded not in op.tags


@every_op
def test_schema_is_functional(op: Any) -> None:
    values = [*op._schema.arguments, *op._schema.returns]
    assert all(value.alias_info is None for value in values)


@every_op
def test_python_module(op: Any) -> None:
    # What torch tells users to import where a fake is missing.
    assert torch._C._dispatch_pystub(op._schema.name, op._schema.overload_name)[0] == "torch_ep.meta"
