"""dispatch and combine in halves equal the whole operators; exchanges in flight are received once, in their order."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.harness import PATIENCE, random_topk, same_bits, seeded, world
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import torch_ep

EXPERTS, NUM_TOPK, HIDDEN = 12, 3, 7
TOKENS = [13, 0, 5, 24, 1, 9]  # per rank
LAYOUTS = ("rank_major", "expert_major")


def _whole_dispatch(x: Tensor, plan: torch_ep.Plan, **payloads: Any) -> Any:
    return torch_ep.dispatch(x, plan, **payloads)


def _whole_combine(y: Tensor, plan: torch_ep.Plan, **payloads: Any) -> Any:
    return torch_ep.combine(y, plan, **payloads)


def _dispatch_in_halves(x: Tensor, plan: torch_ep.Plan, **payloads: Any) -> Any:
    return torch_ep.dispatch_recv(torch_ep.dispatch_send(x, plan, **payloads), plan)


def _combine_in_halves(y: Tensor, plan: torch_ep.Plan, **payloads: Any) -> Any:
    return torch_ep.combine_recv(torch_ep.combine_send(y, plan, **payloads), plan)


WHOLE, HALVES = (_whole_dispatch, _whole_combine), (_dispatch_in_halves, _combine_in_halves)


def _tuple(results: Any) -> tuple:
    return results if isinstance(results, tuple) else (results,)


def _inputs(rank: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    idx = random_topk(TOKENS[(rank + seed) % len(TOKENS)], NUM_TOPK, EXPERTS, seeded(seed, rank), 0.3)
    x = torch.randn(idx.shape[0], HIDDEN, generator=seeded(seed, rank, 1)).to(dtype)
    return idx, x, torch.rand(idx.shape, generator=seeded(seed, rank, 2))


def _layer(exchanges: tuple[Callable, Callable], plan: torch_ep.Plan, x: Tensor, w: Tensor) -> list[Tensor]:
    """Every payload, in both directions."""
    dispatch, combine = exchanges
    rows, weights, scales = dispatch(x.sin(), plan, topk_weights=w, scales=x[:, :2].contiguous())
    sums, returned = combine(rows.cos(), plan, topk_weights=weights.exp())
    results = [rows, weights, scales, sums, returned]
    if plan.layout == "expert_major":
        results.append(combine(rows, plan, row_weights=weights))
    return results


def _with_derivatives(exchanges: tuple[Callable, Callable], plan: torch_ep.Plan, x: Tensor, w: Tensor) -> list[Tensor]:
    """Results of the layer, and its first and second derivatives."""
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    results = _layer(exchanges, plan, *leaves)
    first = torch.autograd.grad(sum(t.float().square().sum() for t in results), leaves, create_graph=True)
    second = torch.autograd.grad(sum(t.float().square().sum() for t in first), leaves)
    return [*results, *first, *second]


def _halves_equal_whole(rank: int, world_size: int, ranks_per_node: int | None) -> None:
    torch_ep.init(timeout=PATIENCE, ranks_per_node=ranks_per_node, max_tokens_per_rank=max(TOKENS))
    cases = itertools.product(LAYOUTS, (None, 0, 16), (torch.float32, torch.bfloat16))
    for seed, (layout, capacity, dtype) in enumerate(cases):
        idx, x, w = _inputs(rank, seed, dtype)
        plan = torch_ep.plan(idx, EXPERTS, layout=layout, capacity=capacity)
        got, want = (_with_derivatives(exchanges, plan, x, w) for exchanges in (HALVES, WHOLE))
        assert all(map(same_bits, got, want)), (layout, capacity, dtype)
    torch_ep.init(timeout=PATIENCE)


@pytest.mark.parametrize(
    ("world_size", "ranks_per_node"), [(2, None), (3, None), (4, 2)], ids=["2 ranks", "3 ranks", "grid"]
)
def test_results_and_derivatives_equal_the_whole_operators(world_size: int, ranks_per_node: int | None) -> None:
    world(world_size).run(_halves_equal_whole, ranks_per_node)


def test_one_rank_equals_the_whole_operators() -> None:
    for layout in LAYOUTS:
        idx, x, w = _inputs(0, 0)
        plan = torch_ep.plan(idx, EXPERTS, layout=layout)
        got, want = (_with_derivatives(exchanges, plan, x, w) for exchanges in (HALVES, WHOLE))
        assert all(map(same_bits, got, want))


def _rows_without_derivatives(rank: int, world_size: int) -> None:
    idx, x, w = _inputs(rank, 0)
    rows8 = x.to(torch.float8_e4m3fn)
    plan = torch_ep.plan(idx, EXPERTS)
    results = []
    for dispatch, _ in (WHOLE, HALVES):
        leaf = w.clone().requires_grad_()
        rows, weights, scales = dispatch(rows8, plan, topk_weights=leaf, scales=torch.arange(idx.shape[0])[:, None])
        assert not rows.requires_grad and not scales.requires_grad
        (grad,) = torch.autograd.grad((weights * rows.float().sum(1)).sum(), leaf)
        results.append((rows.float(), weights, scales, grad))
    assert all(map(same_bits, *results))


def test_rows_without_derivatives_bring_gradients_of_their_weights() -> None:
    world(2).run(_rows_without_derivatives)


def _arguments_are_free(rank: int, world_size: int) -> None:
    for layout in LAYOUTS:
        idx, x, w = _inputs(rank, 0)
        plan = torch_ep.plan(idx, EXPERTS, layout=layout)
        rows, weights = torch_ep.dispatch(x, plan, topk_weights=w)
        sums, returned = torch_ep.combine(rows, plan, topk_weights=weights)
        in_flight = torch_ep.dispatch_send(x, plan, topk_weights=w)
        x.fill_(torch.nan)
        w.fill_(torch.nan)
        got = torch_ep.dispatch_recv(in_flight, plan)
        assert all(map(same_bits, got, (rows, weights)))
        in_flight = torch_ep.combine_send(rows, plan, topk_weights=weights)
        rows.fill_(torch.nan)
        weights.fill_(torch.nan)
        assert all(map(same_bits, torch_ep.combine_recv(in_flight, plan), (sums, returned)))


def test_a_send_has_read_its_arguments() -> None:
    world(2).run(_arguments_are_free)


def _interleaved(rank: int, world_size: int, seed: int) -> None:
    """Whole operators, halves of both pairs and another group, in an order that all ranks draw alike."""
    draw = random.Random(seed)
    other = dist.new_group()
    torch_ep.init(other, timeout=PATIENCE)
    waiting: dict[tuple, list] = {}
    problems = []

    def check(got: Any, want: Any) -> None:
        problems.extend("differs" for ours, theirs in zip(_tuple(got), _tuple(want), strict=True)
                        if not same_bits(ours, theirs))  # fmt: skip

    for step in range(120):
        group = draw.choice([None, other])
        op = draw.choice(["dispatch", "combine", "low latency"])
        action = draw.choice(["whole", "send", "recv", "recv"])
        queue = waiting.setdefault((group, op), [])
        idx, x, w = _inputs(rank, step)
        if action == "recv" and queue:
            receive, want = queue.pop(0)
            check(receive(), want)
        elif op == "low latency":
            sizes = {"num_experts": EXPERTS, "max_tokens_per_rank": max(TOKENS), "group": group}
            rows, plan = torch_ep.low_latency_dispatch(x, idx, **sizes)
            want = torch_ep.low_latency_combine(rows, plan)
            if action == "send" and len(queue) < 2:
                in_flight = torch_ep.low_latency_combine_send(rows, plan)
                queue.append((lambda t=in_flight: torch_ep.low_latency_combine_recv(t), want))
        else:
            plan = torch_ep.plan(idx, EXPERTS, group, layout=draw.choice(LAYOUTS))
            rows, weights = torch_ep.dispatch(x, plan, topk_weights=w)
            if op == "dispatch" and action == "send" and len(queue) < 2:
                in_flight = torch_ep.dispatch_send(x, plan, topk_weights=w)
                queue.append((lambda t=in_flight, p=plan: torch_ep.dispatch_recv(t, p), (rows, weights)))
            if op == "combine":
                want = torch_ep.combine(rows, plan)
                if action == "send" and len(queue) < 2:
                    in_flight = torch_ep.combine_send(rows, plan)
                    queue.append((lambda t=in_flight, p=plan: torch_ep.combine_recv(t, p), want))
    for queue in waiting.values():
        for receive, want in queue:
            check(receive(), want)
    torch_ep.destroy(other)
    dist.destroy_process_group(other)
    assert not problems


@pytest.mark.parametrize("seed", range(3))
def test_halves_mixed_with_whole_operators_of_several_groups(seed: int) -> None:
    world(3).run(_interleaved, seed)


def _recv_message(in_flight: Any, plan: Any, recv: Callable = torch_ep.dispatch_recv) -> str:
    try:
        recv(in_flight, plan)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "nothing raised"


def _misused(rank: int, world_size: int) -> dict[str, str]:
    """What misuse raises; afterwards everything still works."""
    idx, x, _ = _inputs(rank, 0)
    plan = torch_ep.plan(idx, EXPERTS)
    want = torch_ep.dispatch(x, plan)
    first, second = torch_ep.dispatch_send(x, plan), torch_ep.dispatch_send(x, plan)
    messages = {}
    messages["third"] = _recv_message(x, plan, torch_ep.dispatch_send)
    messages["order"] = _recv_message(second, plan)
    messages["operator"] = _recv_message(first, plan, torch_ep.combine_recv)
    messages["relabeled"] = _recv_message(first._replace(op="combine"), plan, torch_ep.combine_recv)
    messages["ticket"] = _recv_message(first._replace(ticket=torch.full((1,), 0.5, dtype=torch.float64)), plan)
    messages["sum"] = _recv_message(first._replace(ticket=first.ticket + 2.0**40), plan)
    messages["hidden"] = _recv_message(first._replace(hidden=HIDDEN + 1), plan)
    messages["dtype"] = _recv_message(first._replace(dtype=torch.bfloat16), plan)
    messages["weights"] = _recv_message(first._replace(weights_dtype=torch.float32), plan)
    messages["ticket dtype"] = _recv_message(first._replace(ticket=first.ticket.float()), plan)
    messages["type"] = _recv_message(first.ticket, plan)
    other_idx = torch.cat([idx, torch.zeros(1, NUM_TOPK, dtype=torch.int64) - 1])
    other_idx[-1, :2] = torch.tensor([0, EXPERTS - 1])
    messages["plan"] = _recv_message(first, torch_ep.plan(other_idx, EXPERTS))
    assert same_bits(torch_ep.dispatch_recv(first, plan), want)
    messages["twice"] = _recv_message(first, plan)
    assert same_bits(torch_ep.dispatch_recv(second, plan), want)
    messages["none"] = _recv_message(second, plan)
    return messages


def test_every_misuse_is_an_error_that_names_it() -> None:
    for messages in world(2).run(_misused):
        third = messages.pop("third")
        assert third.startswith("RuntimeError: ep::dispatch_send: expected at most 2 exchanges in flight of group '0'")
        assert "got a third beside" in third and "receive these first" in third
        wrong = {
            "order": "was sent later: receive in the order of the sends",
            "relabeled": "was received already, or belongs to another operator or group",
            "ticket": "no send has returned: pass the ticket of a send unchanged",
            "sum": "no send has returned: pass the ticket of a send unchanged",
            "twice": "was received already, or belongs to another operator or group",
            "none": "(none in flight)",
            "operator": "ep::combine_recv: expected what torch_ep.combine_send returned, got op 'dispatch'",
            "hidden": "ep::dispatch_recv: expected hidden 7, as it was sent, got 8",
            "dtype": "expected dtype Float, as it was sent, got BFloat16",
            "weights": "expected weights_dtype None, as it was sent, got Float",
            "plan": "ep::dispatch_recv: expected a result of rows ",
        }
        for name, text in wrong.items():
            assert messages[name].startswith("ValueError: ") and text in messages[name], (name, messages[name])
        assert messages["ticket dtype"] == "TypeError: ep::dispatch_recv: expected ticket of dtype Double, got Float"
        assert "expected in_flight to be what torch_ep.dispatch_send returned" in messages["type"]


def _lost_in_reset(rank: int, world_size: int) -> tuple[str, str]:
    idx, x, _ = _inputs(rank, 0)
    plan = torch_ep.plan(idx, EXPERTS)
    want = torch_ep.dispatch(x, plan)
    in_flight = torch_ep.dispatch_send(x, plan)
    torch_ep.reset()
    message = _recv_message(in_flight, plan)
    assert same_bits(_dispatch_in_halves(x, plan), want)
    # A gradient that no _recv takes leaves an exchange in flight, which a reset ends.
    returned = torch_ep.combine_send(want, plan)
    torch_ep.reset()
    assert same_bits(torch_ep.combine_recv(torch_ep.combine_send(want, plan), plan), torch_ep.combine(want, plan))
    return message, _recv_message(returned, plan, torch_ep.combine_recv)


def test_a_reset_ends_what_is_in_flight() -> None:
    for messages in world(2).run(_lost_in_reset):
        assert all("was in flight when the group was reset or destroyed: send again" in text for text in messages)


def _failure_between(rank: int, world_size: int) -> None:
    """Rank 1 fails in an operator between the halves: all ranks learn of it, and the halves go on."""
    idx, x, _ = _inputs(rank, 0)
    plan = torch_ep.plan(idx, EXPERTS)
    want = torch_ep.dispatch(x, plan)
    in_flight = torch_ep.dispatch_send(x, plan)
    with pytest.raises((ValueError, dist.DistError)):
        torch_ep.plan(idx + EXPERTS if rank == 0 else idx, EXPERTS)
    assert same_bits(torch_ep.dispatch_recv(in_flight, plan), want)


def test_a_failure_between_the_halves_leaves_them_usable() -> None:
    world(2).run(_failure_between)


def _tangent(rank: int, world_size: int) -> None:
    idx, x, _ = _inputs(rank, 3)
    plan = torch_ep.plan(idx, EXPERTS)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(TypeError, match="expected no tangent"):
        torch_ep.dispatch_send(torch.autograd.forward_ad.make_dual(x, x), plan)
    torch_ep.reset()


def test_forward_mode_is_refused() -> None:
    world(2).run(_tangent)


def _checkpointed(rank: int, world_size: int) -> None:
    idx, x, w = _inputs(rank, 0)
    plan = torch_ep.plan(idx, EXPERTS)
    want = _with_derivatives(WHOLE, plan, x, w)[:5]
    leaf = x.clone().requires_grad_()
    for contexts in ({}, {"context_fn": torch_ep.checkpoint_contexts}):
        results = checkpoint(lambda t: _layer(HALVES, plan, t, w), leaf, use_reentrant=False, **contexts)
        assert all(map(same_bits, results, want))
        begun = torch_ep._C.exchanges_begun()
        sum(t.square().sum() for t in results).backward()
        # The backward of three exchanges; without the contexts, these three again before it.
        assert torch_ep._C.exchanges_begun() - begun == (3 if contexts else 6)


def test_activation_checkpointing_repeats_halves_or_saves_them() -> None:
    world(2).run(_checkpointed)


def test_order_after_returns_its_argument_and_refuses_others() -> None:
    x = torch.tensor([-0.0, torch.nan, 1.0])
    idx, tokens, _ = _inputs(0, 0)
    plan = torch_ep.plan(idx, EXPERTS)
    in_flight = torch_ep.dispatch_send(tokens, plan)
    assert torch_ep.order_after(x, in_flight) is x
    compiled = torch.compile(torch_ep.order_after, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(x, in_flight), x)
    torch_ep.dispatch_recv(in_flight, plan)
    with pytest.raises(TypeError, match=r"torch_ep\.order_after: expected what a send returned, got Tensor"):
        torch_ep.order_after(x, x)
