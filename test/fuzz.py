"""Random cases without end, each of which a seed makes again: `python test/fuzz.py --help`.

`results`: the operators against `torch_ep.reference`, bit by bit, on several ranks. `arguments`: wrong and extreme
arguments, and plans as an edited file may have them; each call has to return numbers that were there, or to raise an
error of the kinds that the docstrings name, in a few words, after which the group works.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from api.test_low_latency import FORMS
from api.test_low_latency import Case as LowLatencyCase
from api.test_low_latency import case_differs as low_latency_case_differs
from api.test_reference import LAYOUTS, SUM_TYPES, Case, Comparison, Mode, padding
from support.harness import Workers, World, answer_jobs
from torch import Tensor

import torch_ep
from torch_ep import reference

ops = torch.ops.ep

# --- results ---


def draw_case(rng: random.Random, world_size: int) -> Case:
    most = rng.choice((1, 3, 6, 12))
    return Case(
        seed=rng.randrange(2**20),
        tokens=tuple(rng.choice((0, 1, most, rng.randint(0, most))) for _ in range(world_size)),
        num_topk=rng.choice((1, 2, 3, 4, 8, 11)),
        num_local_experts=rng.choice((1, 2, 3, 5)),
        holes=rng.choice((0.0, 0.1, 0.4, 1.0)),
        hidden=rng.choice((1, 3, 8, 17, 130)),
        alignment=rng.choice((1, 2, 4, 16)),
        index_dtype=rng.choice((torch.int32, torch.int64)),
    )


def draw_mode(rng: random.Random, case: Case) -> tuple[Mode, list[torch_ep.Plan]]:
    """How rows are laid out, and the plans of that."""
    layout = rng.choice(LAYOUTS)
    alignment = 1 if layout == "rank_major" else case.alignment
    capacity = None
    if rng.random() < 0.6:
        exact = reference.plan(case.topk_idx(), case.num_experts, layout=layout, alignment=alignment)
        needed = max(p.num_rows for p in exact)
        capacity = rng.choice((0, needed // 2, needed, needed + 5)) // alignment * alignment
    mode = Mode(f"{layout}, {capacity}", layout, capacity, alignment)
    return mode, reference.plan(case.topk_idx(), case.num_experts, **mode.arguments())


def with_grad(t: Tensor, on: bool) -> Tensor:
    return t.clone().requires_grad_(on)


def dispatch(rng: random.Random, x: Tensor, plan: torch_ep.Plan, **payloads: Any) -> Any:
    """Whole or in halves."""
    if rng.random() < 0.3:
        return torch_ep.dispatch_recv(torch_ep.dispatch_send(x, plan, **payloads), plan)
    return torch_ep.dispatch(x, plan, **payloads)


def combine(rng: random.Random, y: Tensor, plan: torch_ep.Plan, **payloads: Any) -> Any:
    if rng.random() < 0.3:
        return torch_ep.combine_recv(torch_ep.combine_send(y, plan, **payloads), plan)
    return torch_ep.combine(y, plan, **payloads)


def check_dispatch(
    rng: random.Random, rank: int, case: Case, plan: torch_ep.Plan, plans: list[torch_ep.Plan], compare: Comparison
) -> None:
    dtype = rng.choice((*SUM_TYPES, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8))
    scale_dtype = rng.choice((torch.float32, torch.float64, torch.uint8, torch.int32))
    has_weights, has_scales, has_grad = rng.random() < 0.6, rng.random() < 0.3, rng.random() < 0.4
    x = case.rows([(t, case.hidden) for t in case.tokens], dtype)
    w = case.rows([(t, case.num_topk) for t in case.tokens], rng.choice(SUM_TYPES))
    scales = [(8 * t).to(scale_dtype) for t in case.rows([(t, 3) for t in case.tokens], torch.float64)]
    want_rows, want_weights = reference.dispatch(x, plans, topk_weights=w)[rank]
    want_scales, _ = reference.dispatch(scales, plans)[rank]
    own_x = with_grad(x[rank], has_grad and dtype in SUM_TYPES)
    own_w = with_grad(w[rank], has_grad)
    payloads = {"topk_weights": own_w} if has_weights else {}
    if has_scales:
        payloads["scales"] = scales[rank]
    results = dispatch(rng, own_x, plan, **payloads)
    rows, *others = results if isinstance(results, tuple) else (results,)
    compare.expect("rows", rows.detach(), want_rows)
    if has_weights:
        compare.expect("weights", others[0].detach(), want_weights)
    if has_scales:
        compare.expect("scales", others[-1].detach(), want_scales)
    if not has_grad or dtype not in SUM_TYPES:
        return
    # The gradient of dispatch is combine.
    grads = case.rows([(p.num_rows, case.hidden) for p in plans], dtype)
    weight_grads = [torch.ones_like(want) for _, want in reference.dispatch(x, plans, topk_weights=w)]
    want_x, want_w = reference.combine(grads, plans, topk_weights=weight_grads)[rank]
    outputs, cotangents, inputs = [rows], [grads[rank]], [own_x]
    if has_weights:
        outputs.append(others[0])
        cotangents.append(weight_grads[rank])
        inputs.append(own_w)
    got = torch.autograd.grad(outputs, inputs, cotangents)
    compare.expect("gradient of x", got[0], want_x)
    if has_weights:
        compare.expect("gradient of weights", got[1], want_w)


def weighted_gradients(rows: Tensor, y: Tensor, row_weights: Tensor, plan: torch_ep.Plan) -> tuple[Tensor, Tensor]:
    """Of y and of its weights, where `rows` are the gradients that arrive: NaN in padding counts for nothing."""
    wide = torch.promote_types(y.dtype, torch.float32)
    is_padding = padding(plan)[:, None]
    grad_y = (rows.to(wide) * row_weights[:, None].to(wide)).masked_fill(is_padding, 0).to(y.dtype)
    products = (rows.to(wide) * y.to(wide)).masked_fill(is_padding, 0)
    return grad_y, products.sum(1).to(row_weights.dtype)


def check_combine(
    rng: random.Random, rank: int, case: Case, plan: torch_ep.Plan, plans: list[torch_ep.Plan], compare: Comparison
) -> None:
    dtype, kind, has_grad = rng.choice(SUM_TYPES), rng.choice(("rows", "weights", "weighted")), rng.random() < 0.4
    y = case.rows([(p.num_rows, case.hidden) for p in plans], dtype)
    maps = [p.recv_pair if p.recv_topk_idx is None else p.recv_topk_idx for p in plans]
    w = case.rows([tuple(m.shape) for m in maps], rng.choice(SUM_TYPES))
    row_w = case.rows([(p.num_rows,) for p in plans], rng.choice((dtype, torch.promote_types(dtype, torch.float32))))
    # Whatever nobody sent holds NaN: it must not be read.
    for p, rows, m, weights, row_weights in zip(plans, y, maps, w, row_w, strict=True):
        rows[padding(p)] = torch.nan
        weights[m < 0] = torch.nan
        row_weights[padding(p)] = torch.nan
    own_y, own_row_w = with_grad(y[rank], has_grad), with_grad(row_w[rank], has_grad)
    if kind == "weighted":
        sums = combine(rng, own_y, plan, row_weights=own_row_w)
        want, want_home = reference.combine(y, plans, row_weights=row_w)[rank][0], None
    elif kind == "weights":
        sums, home = combine(rng, own_y, plan, topk_weights=w[rank])
        want, want_home = reference.combine(y, plans, topk_weights=w)[rank]
        compare.expect("weights that return", home.detach(), want_home)
    else:
        sums = combine(rng, own_y, plan)
        want = reference.combine(y, plans)[rank][0]
    compare.expect(f"sums, {kind}", sums.detach(), want)
    if not has_grad:
        return
    # The gradient of combine is dispatch.
    grads = case.rows([(t, case.hidden) for t in case.tokens], dtype)
    want_rows, _ = reference.dispatch(grads, plans)[rank]
    if kind != "weighted":
        (got,) = torch.autograd.grad(sums, own_y, grads[rank])
        compare.expect("gradient of y", got, want_rows)
        return
    got_y, got_w = torch.autograd.grad(sums, (own_y, own_row_w), grads[rank])
    want_y, want_w = weighted_gradients(want_rows, y[rank], row_w[rank], plan)
    compare.expect("gradient of y, weighted", got_y, want_y)
    compare.expect("gradient of row_weights", got_w, want_w)


def check_results(rank: int, world_size: int, seed: int) -> list[str]:
    """Collective. Runs a plan with a dispatch and a combine, or a low-latency pair. Returns the differences."""
    rng = random.Random(seed)
    torch.set_num_threads(rng.choice((1, 1, 2)))
    uses_torch = rng.random() < 0.2
    ops._force_aten(uses_torch)  # the kernels of other devices
    try:
        if rng.random() < 0.25:
            return check_low_latency(rng, rank, world_size)
        case = draw_case(rng, world_size)
        mode, plans = draw_mode(rng, case)
        compare = Comparison()
        plan = torch_ep.plan(case.topk_idx()[rank], case.num_experts, **mode.arguments())
        for field in plan._fields[:8]:
            compare.expect(field, getattr(plan, field), getattr(plans[rank], field))
        check_dispatch(rng, rank, case, plan, plans, compare)
        check_combine(rng, rank, case, plan, plans, compare)
        return [f"{mode.name}, torch's operators: {uses_torch}, {case}: {d}" for d in compare.differences]
    finally:
        ops._force_aten(False)


def check_low_latency(rng: random.Random, rank: int, world_size: int) -> list[str]:
    most = rng.choice((1, 2, 3, 5))
    case = LowLatencyCase(
        seed=rng.randrange(2**20),
        tokens=tuple(rng.choice((0, 1, most, rng.randint(0, most))) for _ in range(world_size)),
        max_tokens=most,
        num_topk=rng.choice((1, 2, 3, 8, 9)),
        num_local_experts=rng.choice((1, 2, 3)),
        hidden=rng.choice((1, 5, 127, 128, 200)),
        dtype=rng.choice((torch.float32, torch.bfloat16, torch.float16)),
        index_dtype=rng.choice((torch.int32, torch.int64)),
        holes=rng.choice((0.0, 0.2, 1.0)),
        one_expert=rng.random() < 0.15,
        weighted=rng.random() < 0.7,
    )
    quantize = rng.choice((None, None, "fp8", "fp8_pow2", "fp8_ue8m0"))
    return low_latency_case_differs(rank, world_size, case, quantize, rng.choice(list(FORMS)))


# --- arguments ---

INT32 = (-(2**31), -3, -2, -1, 0, 1, 2, 3, 5, 7, 60, 2**20, 2**31 - 2, 2**31 - 1)
# None of them makes a table of gigabytes, which would only show how much memory there is.
INTS = (-(2**63), -(2**31) - 1, -1, 0, 1, 2, 3, 4, 6, 2**31, 2**32, 2**61, 2**62 + 1, 2**63 - 1)
NOT_TENSORS = (None, 3, 1.5, True, "x", [[0, 1], [2, 3]], ((0.5,),), np.ones((2, 2)), [[0] * 4] * 10_000, object(), {})
NOT_INTS = (None, 1.5, True, "4", [4], 2**63, -(2**200), 10**5000, np.float32(4), torch.tensor(4), object())
NOT_STRINGS = (
    None,
    4,
    "",
    "expert",
    "rank_major",
    "expert_major",
    b"rank_major",
    ["expert_major"],
    "fp8",
    "\0" * 9_999,
)
# The kinds that the docstrings name. Memory that is not there counts as the caller's own.
ERRORS = (ValueError, TypeError, RuntimeError, MemoryError)
OURS = ("ep::", "torch_ep", "low_latency_")
NO_MEMORY = ("can't allocate memory", "bad_alloc", "Storage size calculation overflowed", "overflow")
MOST_CHARACTERS = 600
POISON = 1e30


def poison() -> None:
    """Fills memory that the next call is likely to get with what none may return."""
    for size in (1, 4, 16, 64, 256, 1024):
        junk = [torch.full((size,), POISON) for _ in range(4)]
        del junk


def complaint(call: Callable[[], Any], any_number: bool = False) -> str | None:
    """Returns the defects of a call's result or error. `any_number`: the call got arbitrary bytes."""
    poison()
    try:
        result = call()
    except ERRORS as error:
        text = str(error)
        kind = type(error)
        if kind not in (ValueError, TypeError, RuntimeError, MemoryError, dist.DistError):
            return f"{kind.__name__}: {text[:300]}"
        if "INTERNAL ASSERT" in text or len(text) > MOST_CHARACTERS:
            return f"{kind.__name__} of {len(text)} characters: {text[:300]}"
        if not text.startswith(OURS) and not any(words in text for words in NO_MEMORY) and kind is not MemoryError:
            return f"{kind.__name__} in words of others: {text[:300]}"
        return None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    for t in () if any_number else torch.utils._pytree.tree_leaves(result):
        if isinstance(t, Tensor) and t.device.type == "cpu" and t.dtype in SUM_TYPES and (t.abs() > POISON / 1e6).any():
            return "returned memory of others"
    return None


def odd_tensors(rng: random.Random, t: Tensor) -> list[Callable[[], Any]]:
    """Ways to make another tensor of one."""
    freed = t.clone()
    rank = max(t.dim(), 1)
    if t.dim() == 0:
        t = t.reshape(1)
    return [
        lambda: t.to(rng.choice((torch.int16, torch.int32, torch.int64, torch.float16, torch.bool, torch.complex64))),
        lambda: t[:-1],
        lambda: t[:0],
        lambda: t[..., :0].contiguous(),
        lambda: torch.cat([t, t]),
        lambda: t.unsqueeze(rng.randrange(rank)),
        lambda: t.flatten(),
        lambda: t.transpose(0, -1),
        lambda: t[:1].expand_as(t) if len(t) else t,
        lambda: t.new_empty((0, 2 ** rng.randrange(17, 40))),
        lambda: t.new_empty(()),
        lambda: t.to("meta"),
        lambda: t.to_sparse(),
        lambda: torch.nn.Parameter(t, requires_grad=t.is_floating_point()),
        lambda: torch._neg_view(t) if t.is_floating_point() else t,
        lambda: torch._efficientzerotensor(t.shape, dtype=t.dtype),
        lambda: (freed.untyped_storage().resize_(0), freed)[1],
        lambda: t.clone().requires_grad_(t.is_floating_point()),
        lambda: t.detach().numpy(),
        lambda: t.tolist(),
    ]


def edited(rng: random.Random, t: Tensor) -> Tensor:
    """With other numbers, or other sizes; int32 tables of plans above all."""
    rng = random.Random(rng.random())  # how many it draws depends on sizes, which ranks may not share
    if t.layout != torch.strided:
        return t
    t = t.clone()
    way = rng.randrange(5)
    if way == 0:
        return rng.choice((t[:-1], torch.cat([t, t]), t[:0])) if t.dim() else t + 1
    if way == 1 and t.numel() > 1:
        flat = t.view(-1)
        return flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(rng.randrange(99)))].view(t.shape)
    flat = t.view(-1)
    for _ in range(rng.choice((1, 1, 2, 5)) if len(flat) else 0):
        value = rng.choice((*INT32, len(flat), len(flat) + 1, int(flat[rng.randrange(len(flat))])))
        flat[rng.randrange(len(flat))] = value % 256 if t.dtype is torch.uint8 else value
    return t


def edited_tuple(rng: random.Random, value: Any) -> Any:
    """A plan or what is in flight, with some fields that do not fit."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        name = rng.choice(value._fields)
        field = getattr(value, name)
        if isinstance(field, Tensor) and rng.random() < 0.85:
            field = edited(rng, field)
        elif isinstance(field, Tensor):
            field = rng.choice(odd_tensors(rng, field))() if rng.random() < 0.5 else rng.choice(NOT_TENSORS)
        elif isinstance(field, bool | int):
            field = rng.choice((*INTS, *NOT_INTS))
        elif isinstance(field, torch.dtype):
            field = rng.choice((torch.float64, torch.int8, torch.bfloat16, "float32", None))
        else:
            field = rng.choice(NOT_STRINGS)
        value = value._replace(**{name: field})
    return value


class Arguments:
    """Those of every operator, which fit each other; then some that do not. The same on every rank for one seed."""

    def __init__(self, rng: random.Random, rank: int) -> None:
        self.rng = rng
        world_size = torch_ep.comm.resolve(None)[1]
        tokens, self.num_topk = rng.choice((0, 1, 5)), rng.choice((1, 2, 3))
        self.num_experts, self.most = 2 * world_size * rng.choice((1, 2)), 5
        scores = torch.rand(tokens, max(self.num_experts, 3), generator=torch.Generator().manual_seed(rank))
        idx = scores.topk(self.num_topk, 1).indices
        self.idx = torch.where(idx < self.num_experts, idx, -1)
        self.x, self.w = torch.ones(tokens, 4), torch.ones(tokens, self.num_topk)
        self.layout = rng.choice(LAYOUTS)
        self.capacity = rng.choice((None, None, 4, 40))

    def plan(self) -> torch_ep.Plan:
        return torch_ep.plan(self.idx, self.num_experts, layout=self.layout, capacity=self.capacity)  # type: ignore[arg-type]

    def sizes(self) -> dict[str, Any]:
        return {"num_experts": self.num_experts, "max_tokens_per_rank": self.most}

    def other(self, value: Any) -> Any:
        """Something else in its place."""
        rng = self.rng
        if isinstance(value, Tensor):
            return rng.choice(odd_tensors(rng, value))() if rng.random() < 0.7 else rng.choice(NOT_TENSORS)
        if hasattr(value, "_fields"):
            return edited_tuple(rng, value) if rng.random() < 0.9 else rng.choice((*NOT_TENSORS, tuple(value)))
        if isinstance(value, int):
            return rng.choice((*INTS, *NOT_INTS, np.int64(value)))
        return rng.choice(NOT_STRINGS)


def calls_of(a: Arguments) -> dict[str, Callable[[], tuple[Callable, dict[str, Any]]]]:
    """By name: a function and arguments that fit. Some exchange to make these."""

    def plan() -> tuple[Callable, dict[str, Any]]:
        sizes = {"num_experts": a.num_experts, "layout": a.layout, "alignment": 1}
        return torch_ep.plan, {"topk_idx": a.idx, **sizes, **({} if a.capacity is None else {"capacity": a.capacity})}

    def dispatch() -> tuple[Callable, dict[str, Any]]:
        return torch_ep.dispatch, {"x": a.x, "plan": a.plan(), "topk_weights": a.w, "scales": a.x}

    def combine() -> tuple[Callable, dict[str, Any]]:
        p = a.plan()
        weights = torch.ones(p.num_rows, a.num_topk) if a.layout == "rank_major" else torch.ones(p.num_rows)
        return torch_ep.combine, {"y": torch.ones(p.num_rows, 4), "plan": p, "topk_weights": weights}

    def combine_weighted() -> tuple[Callable, dict[str, Any]]:
        p = a.plan()
        y = torch.ones(p.num_rows, 4).requires_grad_(a.rng.random() < 0.5)
        return torch_ep.combine, {"y": y, "plan": p, "row_weights": torch.ones(p.num_rows)}

    def gradient(function: Callable) -> Callable:
        def forward_and_backward(**arguments: Any) -> Any:
            first, t = next(iter(arguments.items()))
            if not isinstance(t, Tensor) or not t.is_floating_point() or t.device.type == "meta":
                return function(**arguments)
            t = t.detach().requires_grad_()
            return torch.autograd.grad(function(**{**arguments, first: t}).sum(), t)

        return forward_and_backward

    def dispatch_gradient() -> tuple[Callable, dict[str, Any]]:
        return gradient(torch_ep.dispatch), {"x": a.x, "plan": a.plan()}

    def combine_gradient() -> tuple[Callable, dict[str, Any]]:
        p = a.plan()
        arguments = {"y": torch.ones(p.num_rows, 4), "plan": p, "row_weights": torch.ones(p.num_rows)}
        return gradient(torch_ep.combine), arguments

    def low_latency_dispatch() -> tuple[Callable, dict[str, Any]]:
        quantize = a.rng.choice((None, "fp8"))
        function = a.rng.choice((torch_ep.low_latency_dispatch, torch_ep.low_latency_dispatch_send))
        arguments = {"x": a.x, "topk_idx": a.idx, **a.sizes(), "topk_weights": a.w}
        return function, arguments if quantize is None else {**arguments, "quantize": quantize}

    def low_latency_combine() -> tuple[Callable, dict[str, Any]]:
        rows, p = torch_ep.low_latency_dispatch(a.x, a.idx, **a.sizes())
        function = a.rng.choice((torch_ep.low_latency_combine, torch_ep.low_latency_combine_send))
        return function, {"y": torch.ones_like(rows), "plan": p}

    def low_latency_dispatch_recv() -> tuple[Callable, dict[str, Any]]:
        in_flight = torch_ep.low_latency_dispatch_send(a.x, a.idx, **a.sizes())
        statistics = torch_ep.LowLatencyStatistics.zeros(a.num_experts)
        return torch_ep.low_latency_dispatch_recv, {"in_flight": in_flight, "statistics": statistics}

    def low_latency_combine_recv() -> tuple[Callable, dict[str, Any]]:
        rows, p = torch_ep.low_latency_dispatch(a.x, a.idx, **a.sizes())
        in_flight = torch_ep.low_latency_combine_send(torch.ones_like(rows), p)
        return torch_ep.low_latency_combine_recv, {"in_flight": in_flight}

    def half_send() -> tuple[Callable, dict[str, Any]]:
        name, arguments = a.rng.choice((("dispatch", dispatch), ("combine", combine), ("combine", combine_weighted)))
        return getattr(torch_ep, f"{name}_send"), arguments()[1]

    def half_recv() -> tuple[Callable, dict[str, Any]]:
        name, arguments = a.rng.choice((("dispatch", dispatch), ("combine", combine)))
        sent = arguments()[1]
        in_flight = getattr(torch_ep, f"{name}_send")(**sent)
        return getattr(torch_ep, f"{name}_recv"), {"in_flight": in_flight, "plan": sent["plan"]}

    def grouped_mm() -> tuple[Callable, dict[str, Any]]:
        offsets = torch.tensor([1, 3], dtype=torch.int32)
        return ops.grouped_mm.default, {"a": torch.ones(3, 4), "b": torch.ones(2, 4, 5), "offsets": offsets}

    makers = (
        plan,
        dispatch,
        combine,
        combine_weighted,
        dispatch_gradient,
        combine_gradient,
        low_latency_dispatch,
        low_latency_combine,
        low_latency_dispatch_recv,
        low_latency_combine_recv,
        half_send,
        half_recv,
        grouped_mm,
    )
    return {maker.__name__: maker for maker in makers}


def operator_calls(a: Arguments) -> dict[str, tuple[Callable, dict[str, Any]]]:
    """Operators called past the public functions, by the integers of their schemas."""
    group_name, world_size = torch_ep.comm.resolve(None)
    rows = world_size * a.most
    plan = {"topk_idx": a.idx, "num_experts": a.num_experts, "layout": a.layout, "alignment": 1}
    group = {"world_size": world_size, "group_name": group_name}
    recv = {
        "status": torch.zeros(2, world_size, dtype=torch.int64),
        "in_flight": torch.zeros(rows, 16 + 16 + 16, dtype=torch.uint8),
        "hidden": 4,
        "dtype": torch.float32,
    }
    return {
        "plan": (ops.plan.default, {**plan, **group, "max_tokens_per_rank": 9}),
        "plan.capacity": (ops.plan.capacity, {**plan, "capacity": 40, **group}),
        "low_latency_dispatch_recv": (
            ops.low_latency_dispatch_recv.default,
            {
                **recv,
                "num_topk": 2,
                "quantize": "",
                "num_experts": a.num_experts,
                "max_tokens_per_rank": a.most,
                **group,
            },
        ),
        "low_latency_combine_recv": (
            ops.low_latency_combine_recv.default,
            {
                **recv,
                "in_flight": recv["in_flight"][:, :16].contiguous(),
                "topk_idx": a.idx,
                "num_experts": a.num_experts,
                **group,
            },
        ),
    }


def check_arguments(rank: int, world_size: int, seed: int) -> list[str]:
    """Collective. Calls one operator with wrong arguments, the same on all ranks. Returns the defects of the answer."""
    rng = random.Random(seed)
    torch.set_num_threads(1)
    ops._force_aten(rng.random() < 0.2)
    try:
        a = Arguments(rng, 0)
        if rng.random() < 0.15:
            name, (function, arguments) = rng.choice(list(operator_calls(a).items()))
            changed = rng.choice([k for k, v in arguments.items() if isinstance(v, int)])
            arguments[changed] = rng.choice(INTS)
        else:
            name, make = rng.choice(list(calls_of(a).items()))
            function, arguments = make()
            changed = rng.choice(list(arguments))
            value = a.other(arguments[changed])
            if name == "grouped_mm" and not (isinstance(value, Tensor) and value.layout is torch.strided):
                return []  # an operator: what its schema and its devices do not take is for torch to say
            arguments[changed] = value
        if function in (torch_ep.plan, torch_ep.dispatch, torch_ep.combine) and rng.random() < 0.1:
            changed, arguments = "after", {**arguments, "after": rng.choice(NOT_TENSORS)}
        wrong = complaint(lambda: function(**arguments), any_number=name.endswith("recv"))
        if name.startswith("half"):
            torch_ep.reset()  # ends what is in flight
        if wrong is None and world_size > 1:
            wrong = None if works(rank) else "the group does not work any more"
        return [] if wrong is None else [f"{name}({changed}={brief(arguments[changed])}): {wrong}"]
    finally:
        ops._force_aten(False)


def brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} of strides {value.stride() if value.layout is torch.strided else ()}"
    if isinstance(value, int):
        return str(value) if value.bit_length() < 999 else f"an int of {value.bit_length()} bits"
    return type(value).__name__ if hasattr(value, "_fields") else repr(value)[:100]


def works(rank: int) -> bool:
    world_size = torch_ep.comm.resolve(None)[1]
    plan = torch_ep.plan(torch.arange(world_size)[:, None], world_size)
    x = torch.full((world_size, 3), float(rank))
    return torch.equal(torch_ep.combine(torch_ep.dispatch(x, plan), plan), x)


def check_edited_plans(rank: int, world_size: int, seed: int) -> list[str]:
    """A plan that is edited on one rank alone. Collective: the others have to hear of it."""
    rng = random.Random(seed)
    torch.set_num_threads(1)
    a, bad = Arguments(rng, rank), rng.randrange(world_size)
    plan, is_combine = a.plan(), rng.random() < 0.5
    other = plan
    name = rng.choice(("send_row", "send_counts", "recv_counts", "recv_map"))
    if name == "recv_map":
        name = "recv_topk_idx" if a.layout == "rank_major" else "recv_pair"
    if rank == bad:
        other = plan._replace(**{name: edited(rng, getattr(plan, name))})
    rows = torch.ones(plan.num_rows if is_combine else len(a.x), 4)
    wrong = complaint(lambda: (torch_ep.combine if is_combine else torch_ep.dispatch)(rows, other))
    if wrong is None and not works(rank):
        wrong = "the group does not work any more"
    return [] if wrong is None else [f"{name} of rank {bad}, {'combine' if is_combine else 'dispatch'}: {wrong}"]


# --- running them ---

CHECKS: dict[str, tuple[Callable, ...]] = {
    "results": (check_results,),
    "arguments": (check_arguments, check_edited_plans),
}
CHUNK = 50  # cases between two words to the processes
LIMIT_S = 600  # only stops what hangs


def _alone(rank: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    answer_jobs(rank, 1, pipe)


def start(world_size: int) -> Workers:
    return Workers(1, _alone) if world_size == 1 else World(world_size)


def run_cases(rank: int, world_size: int, what: str, seeds: Sequence[int]) -> list[tuple[int, str]]:
    """(seed, what is wrong) of all cases. An error ends them: with it a rank may be out of step."""
    found = []
    for seed in seeds:
        checks = CHECKS[what] if world_size > 1 else CHECKS[what][:1]
        try:
            differences = checks[seed % len(checks)](rank, world_size, seed)
        except Exception as error:
            raise RuntimeError(f"seed {seed}: {type(error).__name__}: {error}") from error
        found += [(seed, difference) for difference in differences]
    return found


class Fuzzer:
    """Runs cases on processes that it replaces when they die."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers: Workers | None = None

    def run(self, what: str, seeds: Sequence[int]) -> list[str]:
        """Returns the defects, each with its seed."""
        found = self._attempt(what, seeds)
        if found is not None:
            return found
        results: list[str] = []
        for seed in seeds:  # something died: which case was it?
            alone = self._attempt(what, [seed])
            results += [f"seed {seed}: a process died, hung or lost step"] if alone is None else alone
        return results or [f"seeds {seeds[0]} to {seeds[-1]}: a process died, hung or lost step, not by one case alone"]

    def _attempt(self, what: str, seeds: Sequence[int]) -> list[str] | None:
        if self._workers is None:
            self._workers = start(self.world_size)
        try:
            answers = self._workers.run(run_cases, what, seeds, limit_s=LIMIT_S)
        except (AssertionError, TimeoutError, OSError) as error:
            print(error, file=sys.stderr)
            answers = [None]
        if None in answers:
            self.close()
            return None
        return [
            f"seed {seed}, rank {rank} of {self.world_size}: {wrong}"
            for rank, answer in enumerate(answers)
            for seed, wrong in answer
        ]

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()
            self._workers = None


def chunks(first: int, count: int | None) -> Iterator[range]:
    end = None if count is None else first + count
    while end is None or first < end:
        step = CHUNK if end is None else min(CHUNK, end - first)
        yield range(first, first + step)
        first += step


def fuzz(
    what: str, world_size: int, seed: int, count: int | None, until: float | None, progress: Any = None
) -> tuple[int, list[str]]:
    """How many cases ran, and what is wrong. `until`: of time.monotonic()."""
    fuzzer, ran, found = Fuzzer(world_size), 0, []
    try:
        for seeds in chunks(seed, count):
            if until is not None and time.monotonic() > until:
                break
            wrong = fuzzer.run(what, seeds)
            found += wrong
            ran += len(seeds)
            if progress is not None:
                progress.update(len(seeds))
            for line in wrong[:3]:
                print(line, file=sys.stderr)
    finally:
        fuzzer.close()
    return ran, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="cases of each kind on each number of ranks; 0: no end")
    parser.add_argument("--minutes", type=float, help="stop after so long, for each kind and number of ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3], help="numbers of ranks")
    parser.add_argument("--only", choices=CHECKS, help="one kind of cases")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; each case has the next one")
    args = parser.parse_args()
    failed = False
    for what in CHECKS if args.only is None else (args.only,):
        for world_size in args.ranks:
            count = args.cases or None
            until = None if args.minutes is None else time.monotonic() + 60 * args.minutes
            progress = None
            if sys.stderr.isatty():
                from tqdm import tqdm

                progress = tqdm(total=count, desc=f"{what}, {world_size} ranks", unit="case")
            ran, found = fuzz(what, world_size, args.seed, count, until, progress)
            if progress is not None:
                progress.close()
            print(f"{what}, {world_size} ranks: {ran} cases, {len(found)} wrong", flush=True)
            failed = failed or bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
