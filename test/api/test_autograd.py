"""Gradients: of the operators against numerical ones, on one rank and two; of a layer against its dense self."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.devices import Ranks
from support.harness import random_topk, seeded, world
from support.moe_cases import dense_self, fill_biases
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import torch_ep
from torch_ep.nn import MoE, gather_experts

NUM_EXPERTS, NUM_TOPK, HIDDEN = 4, 3, 3

# Layout, capacity and alignment. For the tokens below a capacity of 4 drops rows and one of 32 does not.
MODES = {
    "rank_major": {"layout": "rank_major"},
    "rank_major, drops": {"layout": "rank_major", "capacity": 4},
    "rank_major, spare": {"layout": "rank_major", "capacity": 32},
    "expert_major": {"layout": "expert_major", "alignment": 4},
    "expert_major, drops": {"layout": "expert_major", "capacity": 4},
    "expert_major, spare": {"layout": "expert_major", "capacity": 32, "alignment": 4},
}
every_mode = pytest.mark.parametrize("mode", MODES)


def _inputs(rank: int, device: str, tokens: int, mode: str) -> tuple[torch_ep.Plan, dict[str, Tensor]]:
    """A plan of random tokens, and float64 arguments of every kind that fit it."""
    generator = seeded(rank, tokens)
    topk_idx = random_topk(tokens, NUM_TOPK, NUM_EXPERTS, generator)
    topk_idx[0] = torch.tensor([0, NUM_EXPERTS - 1, 1])  # whatever is drawn, one token goes to every rank
    plan = torch_ep.plan(topk_idx.to(device), NUM_EXPERTS, **MODES[mode])
    recv_map = plan.recv_pair if plan.recv_topk_idx is None else plan.recv_topk_idx
    shapes = {
        "x": (tokens, HIDDEN),
        "topk_weights": (tokens, NUM_TOPK),
        "scales": (tokens, 2),
        "y": (plan.num_rows, HIDDEN),
        "recv_weights": tuple(recv_map.shape),
        "row_weights": (plan.num_rows,),
    }
    return plan, {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(device).requires_grad_()
        for name, shape in shapes.items()
    }


def _dispatch(plan: torch_ep.Plan, x: Tensor, topk_weights: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
    return torch_ep.dispatch(x, plan, topk_weights=topk_weights, scales=scales)


def _combine(plan: torch_ep.Plan, y: Tensor, recv_weights: Tensor) -> tuple[Tensor, ...]:
    return torch_ep.combine(y, plan, topk_weights=recv_weights)


def _combine_weighted(plan: torch_ep.Plan, y: Tensor, row_weights: Tensor) -> tuple[Tensor, ...]:
    return (torch_ep.combine(y, plan, row_weights=row_weights),)


FUNCTIONS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "dispatch": (_dispatch, ("x", "topk_weights", "scales")),
    "combine": (_combine, ("y", "recv_weights")),
    "combine.weighted": (_combine_weighted, ("y", "row_weights")),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS)


@every_mode
def test_only_modes_with_drops_in_their_names_drop_rows(device: str, mode: str) -> None:
    plan, _ = _inputs(0, device, 5, mode)
    assert (plan.num_dropped > 0) == mode.endswith("drops")


@every_function
@every_mode
def test_gradcheck(device: str, mode: str, function: str) -> None:
    plan, inputs = _inputs(0, device, 5, mode)
    fn, names = FUNCTIONS[function]
    assert gradcheck(lambda *args: fn(plan, *args), [inputs[name] for name in names])


@every_function
@every_mode
def test_gradgradcheck(device: str, mode: str, function: str) -> None:
    plan, inputs = _inputs(0, device, 5, mode)
    fn, names = FUNCTIONS[function]
    assert gradgradcheck(lambda *args: fn(plan, *args), [inputs[name] for name in names])


def _lockstep_differences(fn: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], world_size: int) -> list[str]:
    """Compares the gradients of sum over ranks of <outputs, constants> with numerical ones. Collective.

    Every rank takes part in every evaluation, whosever input is moved. Returns what differs, so that all ranks get
    through all exchanges.
    """
    rank = dist.get_rank()
    generator = seeded(rank, 77)
    constants = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device) for t in fn(*inputs)]

    def loss(*args: Tensor) -> Tensor:
        return torch.stack([(t * c).sum() for t, c in zip(fn(*args), constants, strict=True)]).sum()

    analytical = torch.autograd.grad(loss(*inputs), inputs, materialize_grads=True)
    numerical = [torch.zeros_like(t) for t in inputs]
    step = 0.5  # the functions are at most quadratic in any one number: central differences are exact
    for mover in range(world_size):
        numels = torch.tensor([t.numel() for t in inputs])
        dist.broadcast(numels, mover)
        for i, numel in enumerate(numels.tolist()):
            for j in range(numel):
                totals = []
                for sign in (1, -1):
                    moved = [t.detach().clone().requires_grad_() for t in inputs]
                    if rank == mover:
                        moved[i].detach().view(-1)[j] += sign * step
                    total = loss(*moved).detach()
                    dist.all_reduce(total)
                    totals.append(float(total))
                if rank == mover:
                    numerical[i].view(-1)[j] = (totals[0] - totals[1]) / (2 * step)
    return [
        f"input {i}: expected {want}, got {got}"
        for i, (got, want) in enumerate(zip(analytical, numerical, strict=True))
        if not torch.allclose(got, want, rtol=1e-9, atol=1e-9)
    ]


def _check_lockstep(rank: int, world_size: int, device: str, mode: str, function: str) -> tuple[list[str], list[str]]:
    # One rank has a token more than the other.
    plan, all_inputs = _inputs(rank, device, 2 + rank, mode)
    fn, names = FUNCTIONS[function]
    inputs = [all_inputs[name] for name in names]
    first = _lockstep_differences(lambda *args: fn(plan, *args), inputs, world_size)

    outputs = fn(plan, *inputs)
    cotangents = [torch.randn(t.shape, dtype=torch.float64, generator=seeded(rank, 78)).to(device) for t in outputs]

    def gradients(*args: Tensor) -> Sequence[Tensor]:
        own, grads = args[: len(inputs)], args[len(inputs) :]
        return torch.autograd.grad(fn(plan, *own), own, grads, create_graph=True)

    second = _lockstep_differences(gradients, [*inputs, *(c.requires_grad_() for c in cotangents)], world_size)
    return first, second


@every_function
@pytest.mark.parametrize("mode", ["rank_major, drops", "expert_major", "expert_major, drops"])
def test_first_and_second_gradients_over_two_ranks(device: str, mode: str, function: str) -> None:
    for first, second in Ranks(device, 2).run(_check_lockstep, device, mode, function):
        assert not first
        assert not second


@every_mode
def test_padding_does_not_reach_gradients(device: str, mode: str) -> None:
    plan, inputs = _inputs(0, device, 5, mode)
    if plan.recv_pair is not None:
        padding = plan.recv_pair < 0
    else:
        padding = torch.arange(plan.num_rows, device=device) >= plan.recv_counts.sum()
    y, row_weights = inputs["y"], inputs["row_weights"]
    with torch.no_grad():
        y[padding] = torch.nan
        row_weights[padding] = torch.nan
    torch_ep.combine(y, plan, row_weights=row_weights).sum().backward()
    assert y.grad[~padding].all() and row_weights.grad[~padding].all()
    assert not y.grad[padding].any() and not row_weights.grad[padding].any()  # NaN would count as something


def test_fp8_rows_have_no_gradient_but_their_weights_and_scales_do(device: str) -> None:
    plan, inputs = _inputs(0, device, 5, "expert_major")
    w, scales = inputs["topk_weights"], inputs["scales"]
    x8 = inputs["x"].detach().to(torch.float8_e4m3fn).requires_grad_()
    rows, weights, row_scales = torch_ep.dispatch(x8, plan, topk_weights=w, scales=scales)
    assert not rows.requires_grad
    constants = [
        torch.randn(t.shape, dtype=torch.float64, generator=seeded(1)).to(device) for t in (weights, row_scales)
    ]
    torch.autograd.backward([weights, row_scales], constants)

    x = torch.zeros(5, HIDDEN, dtype=torch.float64, device=device)
    expected = torch.autograd.grad(_dispatch(plan, x, w, scales)[1:], [w, scales], constants)
    assert x8.grad is None
    assert torch.equal(w.grad, expected[0])
    assert torch.equal(scales.grad, expected[1])


def test_integer_scales_have_no_gradient(device: str) -> None:
    plan, inputs = _inputs(0, device, 5, "expert_major")
    rows, scales = torch_ep.dispatch(inputs["x"], plan, scales=torch.ones(5, 2, dtype=torch.uint8, device=device))
    assert not scales.requires_grad
    (grad,) = torch.autograd.grad(rows, inputs["x"], torch.ones_like(rows))
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("layout", ["rank_major", "expert_major"])
def test_gradients_with_strides_of_zero(device: str, layout: str) -> None:
    plan, inputs = _inputs(0, device, 5, layout)
    x, y, row_weights = inputs["x"], inputs["y"], inputs["row_weights"]
    # A sum's gradient is a single number expanded to every place.
    torch_ep.dispatch(x, plan).sum().backward()
    with torch.no_grad():
        copies = torch_ep.combine(torch.ones(plan.num_rows, 1, dtype=torch.float64, device=device), plan)
    assert torch.equal(x.grad, copies.expand_as(x))
    torch_ep.combine(y, plan).sum().backward()
    recv_map = plan.recv_pair if plan.recv_topk_idx is None else plan.recv_topk_idx[:, 0].clamp(min=0)
    real = (recv_map >= 0).to(torch.float64)
    assert torch.equal(y.grad, real[:, None].expand_as(y))
    torch_ep.combine(y.detach(), plan, row_weights=row_weights).sum().backward()
    assert torch.allclose(row_weights.grad, y.detach().sum(1) * real)


LAYER = {"hidden": 6, "intermediate": 5, "num_experts": 6, "num_topk": 3}
TOKENS = (7, 0, 4)
AUX_WEIGHT = 0.3


def _layer_gradients(
    rank: int, world_size: int, device: str, options: dict[str, Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Gradients by name: those of the layer over the ranks, and those of its dense self on all tokens."""
    torch.manual_seed(3)
    layer = MoE(**LAYER, shared_intermediate=4, dtype=torch.float64, **options).to(device)
    fill_biases(layer)
    shapes = [(n, LAYER["hidden"]) for n in TOKENS[:world_size]]
    xs = [torch.randn(shape, generator=seeded(9, r)).to(device, torch.float64) for r, shape in enumerate(shapes)]
    constants = [torch.randn(x.shape, generator=seeded(10, r)).to(device, torch.float64) for r, x in enumerate(xs)]
    weights = {name: p.detach() for name, p in layer.named_parameters()}
    for name in layer.EXPERT_PARAMETERS:
        weights[name] = gather_experts(weights[name])
    weights = {name: p.clone().requires_grad_() for name, p in weights.items()}

    x = xs[rank].clone().requires_grad_()
    y, stats = layer(x)
    ((y * constants[rank]).sum() + AUX_WEIGHT * stats.aux_loss).backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    for name, grad in grads.items():
        if name in layer.EXPERT_PARAMETERS:
            grads[name] = gather_experts(grad)
        else:
            dist.all_reduce(grad)

    dense_xs = [x.clone().requires_grad_() for x in xs]
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for dense_x, constant in zip(dense_xs, constants, strict=True):
        want = dense_self(layer, dense_x, weights)
        loss = loss + (want.out * constant).sum() + AUX_WEIGHT * want.aux_loss
    loss.backward()
    result = {name: (grad, weights[name].grad) for name, grad in grads.items()}
    result["x"] = (x.grad, dense_xs[rank].grad)
    return {name: (got.cpu(), want.cpu()) for name, (got, want) in result.items()}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"layout": "expert_major"}, id="expert_major"),
        pytest.param({"layout": "rank_major", "score": "sigmoid", "normalize": False}, id="rank_major, sigmoid"),
        pytest.param({"layout": "expert_major", "capacity": 64, "alignment": 8}, id="expert_major, capacity"),
        pytest.param({"layout": "rank_major", "capacity": 16}, id="rank_major, capacity"),
        pytest.param({"layout": "expert_major", "alignment": 8, "bias": True}, id="expert_major, biases"),
        pytest.param({"layout": "rank_major", "bias": True}, id="rank_major, biases"),
        pytest.param(
            {"layout": "expert_major", "alignment": 8, "scale_before_experts": True}, id="expert_major, scaled before"
        ),
        pytest.param(
            {"layout": "rank_major", "scale_before_experts": True, "activation": "swigluoai", "score": "sigmoid"},
            id="rank_major, scaled before",
        ),
    ],
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_layer_gradients_equal_the_dense_ones(device: str, world_size: int, options: dict[str, Any]) -> None:
    for grads in Ranks(device, world_size).run(_layer_gradients, device, options):
        assert set(grads) > {"x", "router", "gate_proj", "up_proj", "down_proj"}
        for name, (got, want) in grads.items():
            # The auxiliary loss counts in float32, and only the router and the input see it.
            rtol, atol = (1e-6, 1e-7) if name in ("router", "router_bias", "x") else (1e-9, 1e-12)
            torch.testing.assert_close(got, want, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def _gradient_of_a_sum(rank: int, world_size: int) -> bool:
    """A sum's gradient has strides of zero, also where there are no tokens."""
    num_tokens = 3 if rank else 0
    x = torch.ones(num_tokens, 4, requires_grad=True)
    plan = torch_ep.plan(torch.arange(world_size).repeat(num_tokens, 1), world_size)
    torch_ep.combine(torch_ep.dispatch(x, plan), plan).sum().backward()
    return torch.equal(x.grad, torch.full_like(x, world_size))


def test_gradient_of_a_sum_on_a_rank_without_tokens() -> None:
    assert world(2).run(_gradient_of_a_sum) == [True, True]
