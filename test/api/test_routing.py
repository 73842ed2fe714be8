"""A plan describes its rows; numbers other than -1 for "no expert"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from support.devices import Ranks
from support.harness import random_topk, seeded
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs

import torch_ep

NUM_EXPERTS, NUM_TOPK = 8, 3
TOKENS = (9, 0)
MODES: dict[str, dict[str, Any]] = {
    "rank_major": {"layout": "rank_major"},
    "rank_major, room to spare": {"layout": "rank_major", "capacity": 64},
    "rank_major, drops": {"layout": "rank_major", "capacity": 4},
    "expert_major": {},
    "expert_major, aligned": {"alignment": 4},
    "expert_major, room to spare": {"capacity": 64, "alignment": 4},
    "expert_major, drops": {"capacity": 8, "alignment": 4},
    "expert_major, no room": {"capacity": 0},
}
every_mode = pytest.mark.parametrize("name", MODES)


def _topk_idx(rank: int, device: str) -> Tensor:
    return random_topk(TOKENS[rank], NUM_TOPK, NUM_EXPERTS, seeded(rank, 11)).to(device)


def _plan_and_experts(rank: int, world_size: int, device: str, name: str) -> tuple[torch_ep.Plan, Tensor]:
    """The plan, and of each of its rows the experts, which have travelled as weights: 0 for none, and one more each."""
    topk_idx = _topk_idx(rank, device)
    plan = torch_ep.plan(topk_idx, NUM_EXPERTS, **MODES[name])
    x = torch.ones(topk_idx.shape[0], 4, device=device)
    _, experts = torch_ep.dispatch(x, plan, topk_weights=(topk_idx + 1).double())
    return plan, experts.long()


def _of_rows(*args: Any) -> list[Tensor]:
    plan, experts = _plan_and_experts(*args)
    said = plan.local_expert_of_rows(), plan.padded_tokens_per_expert
    return [t.cpu() for t in (*said, experts, plan.offsets, plan.tokens_per_expert)]


@every_mode
@pytest.mark.parametrize("world_size", [1, 2])
def test_experts_and_padded_counts_of_rows(device: str, world_size: int, name: str) -> None:
    args = (device, name)
    results = [_of_rows(0, 1, *args)] if world_size == 1 else Ranks(device, world_size).run(_of_rows, *args)
    num_local_experts, alignment = NUM_EXPERTS // world_size, MODES[name].get("alignment", 1)
    for rank, (local_expert, padded, experts, offsets, tokens_per_expert) in enumerate(results):
        want = torch.where(experts == 0, -1, experts - 1 - rank * num_local_experts)
        assert torch.equal(local_expert.long(), want)
        assert torch.equal(want[want >= 0].bincount(minlength=num_local_experts), tokens_per_expert.long())
        assert padded.dtype == torch.int32
        assert torch.equal(padded, -(-tokens_per_expert // alignment) * alignment)
        if name.startswith("expert_major"):
            assert local_expert.dtype == torch.int32
            assert torch.equal(padded.cumsum(0), offsets.long())


def test_experts_of_no_rows(device: str) -> None:
    plan = torch_ep.plan(torch.empty(0, NUM_TOPK, dtype=torch.int64, device=device), NUM_EXPERTS)
    assert plan.local_expert_of_rows().shape == (0,)
    assert plan.padded_tokens_per_expert.tolist() == [0] * NUM_EXPERTS


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_sentinel_and_back(device: str, dtype: torch.dtype) -> None:
    topk_idx = torch.tensor([[0, 2], [3, -1], [-1, -1]], dtype=dtype, device=device)
    given = torch_ep.to_sentinel(topk_idx, 4)
    assert given.dtype == dtype and given.tolist() == [[0, 2], [3, 4], [4, 4]]
    assert torch.equal(torch_ep.from_sentinel(given, 4), topk_idx)
    assert topk_idx.tolist() == [[0, 2], [3, -1], [-1, -1]]


def _in_a_graph(topk_idx: Tensor, mode: dict[str, Any]) -> tuple[Tensor, Tensor]:
    plan = torch_ep.plan(torch_ep.from_sentinel(topk_idx, NUM_EXPERTS), NUM_EXPERTS, **mode)
    return _of_a_plan(plan)


def _of_a_plan(plan: torch_ep.Plan) -> tuple[Tensor, Tensor]:
    return torch_ep.to_sentinel(plan.local_expert_of_rows(), NUM_EXPERTS), plan.padded_tokens_per_expert


@every_mode
def test_compiled_nothing_waits_for_the_host(device: str, name: str) -> None:
    topk_idx = torch_ep.to_sentinel(_topk_idx(0, device), NUM_EXPERTS)
    plan = torch_ep.plan(_topk_idx(0, device), NUM_EXPERTS, **MODES[name])
    want = _of_a_plan(plan)
    for fn, args in ((_in_a_graph, (topk_idx, MODES[name])), (_of_a_plan, (plan,))):
        torch._dynamo.reset()
        backend = AotEagerAndRecordGraphs()
        got = torch.compile(fn, fullgraph=True, backend=backend)(*args)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        targets = [str(node.target) for gm in backend.fw_graphs for node in gm.graph.nodes]
        assert targets and not [t for t in targets if "_local_scalar_dense" in t or "nonzero" in t]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("topk_idx", "sentinel", "message"),
    [
        (torch.zeros(2), 4, "expected topk_idx of dtype int32 or int64, got torch.float32"),
        (torch.zeros(2, dtype=torch.int32), 2**40, "expected a sentinel that torch.int32 holds, got 1099511627776"),
        ([0, 1], 4, "expected topk_idx to be a Tensor, got list: pass torch.tensor(...)"),
    ],
)
@pytest.mark.parametrize("name", ["to_sentinel", "from_sentinel"])
def test_a_bad_sentinel_is_refused(name: str, topk_idx: Any, sentinel: int, message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        getattr(torch_ep, name)(topk_idx, sentinel)
    assert str(raised.value) == f"torch_ep.{name}: {message}"
