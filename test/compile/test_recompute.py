"""Recomputing activations does not communicate again, where the tools for it are used; without them it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
from support.compiling import CountExchanges, InductorGraphs
from support.devices import Ranks
from support.harness import seeded
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import torch_ep

HIDDEN, EXPERTS, TOPK = 16, 4, 2
# What a step of the layer has to exchange: in forward, and in backward.
FORWARD = ["plan", "dispatch", "combine"]
BACKWARD = ["dispatch", "combine"]


def make_layer(device: str, **kwargs: Any) -> torch_ep.nn.MoE:
    torch.manual_seed(0)
    return torch_ep.nn.MoE(HIDDEN, 8, EXPERTS, TOPK, **kwargs).to(device)


def step(fn: Callable, layer: torch_ep.nn.MoE, count: int = 64, rank: int = 0) -> list[Tensor]:
    """Results and gradients of one step."""
    layer.zero_grad()
    x = torch.randn(count, HIDDEN, generator=seeded(count, rank)).to(layer.router.device).requires_grad_()
    y, stats = fn(x)
    (y.square().sum() + stats.aux_loss).backward()
    grads = [x.grad, *(p.grad.clone() for p in layer.parameters())]
    return [y.detach(), stats.aux_loss.detach(), *grads]


def checkpointed(layer: torch_ep.nn.MoE, selective: bool) -> Callable:
    kwargs = {"context_fn": torch_ep.checkpoint_contexts} if selective else {}
    return lambda x: checkpoint(layer, x, use_reentrant=False, **kwargs)


def eager_exchanges(fn: Callable, layer: torch_ep.nn.MoE, **kwargs: Any) -> list[str]:
    want = step(layer, layer, **kwargs)
    with CountExchanges() as count:
        got = step(fn, layer, **kwargs)
    torch.testing.assert_close(got, want)
    return count.seen


def compiled_exchanges(fn: Callable, layer: torch_ep.nn.MoE, **kwargs: Any) -> list[list[str]]:
    torch._dynamo.reset()
    want = step(layer, layer, **kwargs)
    backend = InductorGraphs()
    got = step(torch.compile(fn, fullgraph=True, backend=backend), layer, **kwargs)
    torch._dynamo.reset()
    torch.testing.assert_close(got, want)
    return backend.exchanges


@pytest.mark.parametrize("capacity", [None, 96], ids=["exact", "capacity"])
def test_selective_checkpointing_exchanges_once_in_eager(device: str, capacity: int | None) -> None:
    layer = make_layer(device, capacity=capacity)
    assert eager_exchanges(checkpointed(layer, True), layer) == FORWARD + BACKWARD


def test_full_checkpointing_exchanges_again_in_eager(device: str) -> None:
    layer = make_layer(device)
    seen = eager_exchanges(checkpointed(layer, False), layer)
    assert seen[:4] == [*FORWARD, "plan"] and len(seen) > len(FORWARD + BACKWARD)


@pytest.mark.parametrize("capacity", [None, 96], ids=["exact", "capacity"])
def test_selective_checkpointing_exchanges_once_when_compiled(device: str, capacity: int | None) -> None:
    layer = make_layer(device, capacity=capacity)
    assert compiled_exchanges(checkpointed(layer, True), layer) == [FORWARD, BACKWARD]


def test_full_checkpointing_exchanges_again_when_compiled(device: str) -> None:
    layer = make_layer(device)
    assert "plan" in compiled_exchanges(checkpointed(layer, False), layer)[1]


def test_the_default_partitioner_exchanges_once(device: str) -> None:
    layer = make_layer(device)
    assert compiled_exchanges(layer, layer) == [FORWARD, BACKWARD]


@pytest.mark.parametrize("budget", [0.5, 0.01])
def test_a_memory_budget_exchanges_once_with_save_exchanges(device: str, budget: float) -> None:
    layer = make_layer(device)
    with (
        torch._functorch.config.patch(activation_memory_budget=budget),
        torch._inductor.config.patch(joint_custom_pre_pass=torch_ep.save_exchanges),
    ):
        assert compiled_exchanges(layer, layer) == [FORWARD, BACKWARD]


def test_a_memory_budget_exchanges_again_without_save_exchanges(device: str) -> None:
    layer = make_layer(device)
    with torch._functorch.config.patch(activation_memory_budget=0.01):
        assert "plan" in compiled_exchanges(layer, layer)[1]


def test_every_operator_that_communicates_is_in_exchanges() -> None:
    """An operator with a group is one that communicates, and none may be forgotten."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("ep::")]
    found = set()
    for name in names:
        packet, _, overload = name.removeprefix("ep::").partition(".")
        op = getattr(getattr(torch.ops.ep, packet), overload or "default")
        if not packet.startswith("_") and any(a.name == "group_name" for a in op._schema.arguments):
            found.add(op)
    assert set(torch_ep.EXCHANGES) == found


def _on_ranks(rank: int, world_size: int, device: str) -> tuple[list[str], list[list[str]]]:
    layer = make_layer(device)
    kwargs = {"count": (64, 40)[rank], "rank": rank}
    selective = checkpointed(layer, True)
    return eager_exchanges(selective, layer, **kwargs), compiled_exchanges(selective, layer, **kwargs)


def test_selective_checkpointing_exchanges_once_on_two_ranks(device: str) -> None:
    assert Ranks(device, 2).run(_on_ranks, device) == [(FORWARD + BACKWARD, [FORWARD, BACKWARD])] * 2
