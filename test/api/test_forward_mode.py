"""Forward mode: tangents of the operators and of a layer against the Jacobian, through every way that torch has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo
from support.harness import random_topk, seeded, world
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradcheck

import torch_ep
from api.test_autograd import FUNCTIONS, HIDDEN, NUM_EXPERTS, NUM_TOPK, _inputs, every_function, every_mode

TOKENS = 5
DOUBLE = {"dtype": torch.float64}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), **DOUBLE)


X, WEIGHTS = numbers(TOKENS, HIDDEN), numbers(TOKENS, NUM_TOPK, seed=1)
TANGENTS = (numbers(TOKENS, HIDDEN, seed=2), numbers(TOKENS, NUM_TOPK, seed=3))


def make_plan(**options: object) -> torch_ep.Plan:
    topk_idx = random_topk(TOKENS, NUM_TOPK, NUM_EXPERTS, seeded(4), holes=0)
    return torch_ep.plan(topk_idx, NUM_EXPERTS, **options)  # type: ignore[arg-type]


PLAN = make_plan()


def layer(x: Tensor, weights: Tensor) -> Tensor:
    rows, row_weights = torch_ep.dispatch(x, PLAN, topk_weights=weights)
    return torch_ep.combine(rows.sin(), PLAN, row_weights=row_weights)


def dense(x: Tensor, weights: Tensor) -> Tensor:
    """Computes the same as `layer`."""
    return x.sin() * weights.sum(1, keepdim=True)


@every_function
@every_mode
def test_gradcheck_in_forward_mode(mode: str, function: str) -> None:
    plan, inputs = _inputs(0, "cpu", TOKENS, mode)
    fn, names = FUNCTIONS[function]
    arguments = [inputs[name] for name in names]
    assert gradcheck(lambda *args: fn(plan, *args), arguments, check_forward_ad=True, check_backward_ad=False)


@every_function
@every_mode
def test_jacobians_of_forward_and_reverse_mode_are_equal(mode: str, function: str) -> None:
    plan, inputs = _inputs(0, "cpu", TOKENS, mode)
    fn, names = FUNCTIONS[function]
    arguments = tuple(inputs[name].detach() for name in names)

    def results(*args: Tensor) -> tuple[Tensor, ...]:
        return fn(plan, *args)

    got = torch.func.jacfwd(results, argnums=tuple(range(len(arguments))))(*arguments)
    torch.testing.assert_close(got, torch.autograd.functional.jacobian(results, arguments))


@pytest.mark.parametrize("op", [torch.ops.ep.grouped_mm.default, torch.ops.ep.grouped_mm.transpose], ids=str)
def test_gradcheck_of_grouped_mm_in_forward_mode(op: Callable) -> None:
    b = numbers(2, 3, 4, seed=1) if op is torch.ops.ep.grouped_mm.default else numbers(TOKENS, 4, seed=1)
    offsets = torch.tensor([2, 4], dtype=torch.int32)
    arguments = (numbers(TOKENS, 3).requires_grad_(), b.requires_grad_(), offsets)
    assert gradcheck(op, arguments, check_forward_ad=True)


def jvp(fn: Callable) -> Tensor:
    return torch.func.jvp(fn, (X, WEIGHTS), TANGENTS)[1]


def dual_level(fn: Callable) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(fn(*map(forward_ad.make_dual, (X, WEIGHTS), TANGENTS))).tangent


def one_tangent(fn: Callable) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(fn(X, forward_ad.make_dual(WEIGHTS, TANGENTS[1]))).tangent


def zero_tensor(fn: Callable) -> Tensor | None:
    """Torch's own formulas make such tangents."""
    with forward_ad.dual_level():
        zero = torch._efficientzerotensor(WEIGHTS.shape, **DOUBLE)
        x = forward_ad.make_dual(X, TANGENTS[0])
        return forward_ad.unpack_dual(fn(x, forward_ad.make_dual(WEIGHTS, zero))).tangent


def jacfwd(fn: Callable) -> Tensor:
    return torch.cat([t.flatten() for t in torch.func.jacfwd(fn, argnums=(0, 1))(X, WEIGHTS)])


def linearize(fn: Callable) -> Tensor:
    return torch.func.linearize(fn, X, WEIGHTS)[1](*TANGENTS)


def twice(fn: Callable) -> Tensor:
    """The second derivative in one direction."""
    return torch.func.jvp(lambda *args: torch.func.jvp(fn, args, TANGENTS)[1], (X, WEIGHTS), TANGENTS)[1]


def reverse_over_forward(fn: Callable) -> Tensor:
    inputs = [X.clone().requires_grad_(), WEIGHTS.clone().requires_grad_()]
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(fn(*map(forward_ad.make_dual, inputs, TANGENTS))).tangent
        assert tangent is not None
        return torch.cat([g.flatten() for g in torch.autograd.grad(tangent.square().sum(), inputs)])


def reverse_over_jvp(fn: Callable) -> Tensor:
    inputs = (X.clone().requires_grad_(), WEIGHTS.clone().requires_grad_())
    tangent = torch.func.jvp(fn, inputs, TANGENTS)[1]
    return torch.cat([g.flatten() for g in torch.autograd.grad(tangent.square().sum(), inputs)])


def forward_over_reverse(fn: Callable) -> Tensor:
    with forward_ad.dual_level():
        inputs = [t.clone().requires_grad_() for t in (X, WEIGHTS)]
        duals = list(map(forward_ad.make_dual, inputs, TANGENTS))
        grads = torch.autograd.grad(fn(*duals).square().sum(), duals, create_graph=True)
        return torch.cat([forward_ad.unpack_dual(g).tangent.flatten() for g in grads])


WAYS = [
    jvp,
    dual_level,
    one_tangent,
    zero_tensor,
    jacfwd,
    linearize,
    twice,
    reverse_over_forward,
    reverse_over_jvp,
    forward_over_reverse,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_tangents_equal_the_dense_ones(way: Callable) -> None:
    got, want = way(layer), way(dense)
    assert want.abs().sum() > 0
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("inside", [True, False], ids=["jvp inside", "jvp outside"])
def test_tangents_of_compiled_code(inside: bool) -> None:
    def tangent(fn: Callable) -> Callable:
        return lambda x, weights: torch.func.jvp(fn, (x, weights), TANGENTS)[1]

    def compile(fn: Callable) -> Callable:
        return torch.compile(fn, backend="aot_eager", fullgraph=inside)

    torch._dynamo.reset()
    got = compile(tangent(layer)) if inside else tangent(compile(layer))
    torch.testing.assert_close(got(X, WEIGHTS), jvp(dense))
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", ["rank_major", "expert_major"])
def test_tangents_of_a_layer(layout: torch_ep.Layout) -> None:
    torch.manual_seed(0)
    moe = torch_ep.nn.MoE(HIDDEN, 4, NUM_EXPERTS, 2, layout=layout, selection_bias=True).double()
    step = 1e-6 * TANGENTS[0]
    numerical = (moe(X + step)[0] - moe(X - step)[0]) / 2e-6
    torch.testing.assert_close(torch.func.jvp(lambda x: moe(x)[0], (X,), TANGENTS[:1])[1], numerical)


def test_rows_without_derivatives_have_weights_that_have_some() -> None:
    x8 = torch.ones(TOKENS, 4).to(torch.float8_e4m3fn)

    def weights_of(weights: Tensor) -> Tensor:
        return torch_ep.dispatch(x8, PLAN, topk_weights=weights)[1]

    tangent = torch.func.jvp(weights_of, (WEIGHTS,), TANGENTS[1:])[1]
    assert torch.equal(tangent, weights_of(TANGENTS[1]))
    with forward_ad.dual_level(), pytest.raises(TypeError) as raised:
        torch_ep.dispatch(forward_ad.make_dual(x8, x8), PLAN)
    assert str(raised.value) == "ep::dispatch: expected no tangent of a tensor of dtype torch.float8_e4m3fn, got one"


@pytest.mark.parametrize("layout", ["rank_major", "expert_major"])
def test_padding_does_not_reach_tangents(layout: torch_ep.Layout) -> None:
    plan = make_plan(layout=layout, capacity=32)
    recv_map = plan.recv_pair if plan.recv_topk_idx is None else plan.recv_topk_idx[:, 0]
    padding = recv_map < 0
    y, row_weights = numbers(32, HIDDEN).index_fill(0, padding.nonzero()[:, 0], torch.nan), numbers(32, seed=1)
    tangents = (y.clone().requires_grad_(), row_weights.clone().requires_grad_())
    tangent = torch.func.jvp(lambda y, w: torch_ep.combine(y, plan, row_weights=w), (y, row_weights), tangents)[1]
    assert not tangent.isnan().any()
    assert not any(g[padding].any() for g in torch.autograd.grad(tangent.sum(), tangents))


def low_latency_calls(x: Tensor) -> dict[str, Callable]:
    idx = torch.tensor([[0], [1]])
    sizes = {"num_experts": 2, "max_tokens_per_rank": 2}
    rows, plan = torch_ep.low_latency_dispatch(torch.ones(2, 3), idx, **sizes)
    y = rows + x.sum()
    return {
        "low_latency_dispatch": lambda: torch_ep.low_latency_dispatch(x, idx, **sizes),
        "low_latency_dispatch_send": lambda: torch_ep.low_latency_dispatch_send(x, idx, **sizes),
        "low_latency_combine": lambda: torch_ep.low_latency_combine(y, plan),
        "low_latency_combine_send": lambda: torch_ep.low_latency_combine_send(y, plan),
    }


@pytest.mark.parametrize("name", low_latency_calls(torch.ones(2, 3)))
def test_the_low_latency_pair_refuses_tangents(name: str) -> None:
    message = (
        f"ep::{name}: expected no argument to have a tangent (forward mode): this operator is for inference only: "
        "call it under torch.no_grad(); for training use torch_ep.plan, dispatch and combine"
    )
    x = torch.ones(2, 3)
    with forward_ad.dual_level(), pytest.raises(RuntimeError) as raised:
        low_latency_calls(forward_ad.make_dual(x, x))[name]()
    assert str(raised.value).splitlines()[0] == message
    with pytest.raises(RuntimeError) as raised:
        torch.func.jvp(lambda t: low_latency_calls(t)[name](), (x,), (x,))
    assert str(raised.value).splitlines()[0] == message


def test_vmap_of_nothing() -> None:
    with pytest.raises(ValueError) as raised:
        torch.vmap(lambda x: torch_ep.dispatch(x, PLAN))(torch.ones(0, TOKENS, HIDDEN))
    assert str(raised.value) == "ep::dispatch: expected at least one entry to map over, got none"


def _tangents_on_ranks(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """Of x and of the weights at once; expected is what the maps of the tangents give."""
    topk_idx = random_topk(3 + rank, NUM_TOPK, NUM_EXPERTS, seeded(rank))
    plan = torch_ep.plan(topk_idx, NUM_EXPERTS)
    (x, tangent), (w, tangent_w) = (
        (numbers(3 + rank, n, seed=9 + rank), numbers(3 + rank, n, seed=7 + rank)) for n in (HIDDEN, NUM_TOPK)
    )

    def product(x: Tensor, w: Tensor) -> Tensor:
        rows, row_weights = torch_ep.dispatch(x, plan, topk_weights=w)
        return torch_ep.combine(rows, plan, row_weights=row_weights)

    got = torch.func.jvp(product, (x, w), (tangent, tangent_w))[1]
    return got, product(tangent, w) + product(x, tangent_w)


def test_tangents_over_ranks() -> None:
    for got, want in world(2).run(_tangents_on_ranks):
        torch.testing.assert_close(got, want)
