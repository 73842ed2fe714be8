"""What is measured: the operators of torch_ep, and the same work on top of `all_to_all_single`.

Both sides are objects with the same three steps: `route` (who sends what where), `dispatch` and `combine`. To measure
another device add a platform (platforms.py); to compare with another implementation write one more such class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

import torch_ep


class Inputs(NamedTuple):
    """What one rank passes to the layer."""

    x: Tensor  # [tokens, hidden]
    topk_idx: Tensor  # [tokens, topk] int64
    topk_weights: Tensor  # [tokens, topk] float32, each token's add up to 1
    num_experts: int

    @property
    def row_bytes(self) -> int:
        return self.x.shape[1] * self.x.element_size()


def random_inputs(
    rank: int, tokens: int, hidden: int, topk: int, experts: int, dtype: torch.dtype, device: torch.device
) -> Inputs:
    """An even random routing: every token chooses its experts uniformly, without repetition."""
    generator = torch.Generator().manual_seed(1000 * rank + tokens)
    scores, topk_idx = torch.rand(tokens, experts, generator=generator).topk(topk, 1)
    return Inputs(
        torch.randn(tokens, hidden, generator=generator).to(device, dtype),
        topk_idx.to(device),
        scores.softmax(1).to(device),
        experts,
    )


class Received(NamedTuple):
    """What a dispatch returns."""

    rows: Tensor
    weights: Tensor | None = None  # of each row, where the side moves them with the rows
    scales: Tensor | None = None  # likewise


class Side(Protocol):
    """One implementation. `route` gives whatever its own `dispatch` and `combine` want."""

    def route(self) -> Any: ...
    def dispatch(self, routing: Any) -> Received: ...
    def combine(self, y: Tensor, received: Received, routing: Any) -> Tensor: ...
    def sends(self, routing: Any) -> Sequence[int]:
        """Rows to each rank."""
        ...

    def bytes_per_row(self) -> dict[str, int]:
        """What crosses for each row in "route", "dispatch" and "combine"."""
        ...


class TorchEP:
    """The operators, called as a user calls them."""

    def __init__(self, inputs: Inputs, layout: torch_ep.Layout) -> None:
        self.inputs, self.layout = inputs, layout

    def route(self) -> torch_ep.Plan:
        return torch_ep.plan(self.inputs.topk_idx, self.inputs.num_experts, layout=self.layout)

    def dispatch(self, routing: torch_ep.Plan) -> Received:
        return Received(*torch_ep.dispatch(self.inputs.x, routing, topk_weights=self.inputs.topk_weights))

    def combine(self, y: Tensor, received: Received, routing: torch_ep.Plan) -> Tensor:
        weights = received.weights if self.layout == "expert_major" else None
        return torch_ep.combine(y, routing, row_weights=weights)

    def sends(self, routing: torch_ep.Plan) -> Sequence[int]:
        return routing.send_counts.tolist()

    def bytes_per_row(self) -> dict[str, int]:
        i = self.inputs
        topk = i.topk_idx.shape[1]
        weights = topk * i.topk_weights.element_size()
        return {"route": topk * 4, "dispatch": i.row_bytes + weights, "combine": i.row_bytes}  # experts go as int32


def _exchange(t: Tensor, send: list[int], recv: list[int]) -> Tensor:
    out = t.new_empty(sum(recv), *t.shape[1:])
    dist.all_to_all_single(out, t, recv, send)
    return out


def _exchange_evenly(t: Tensor) -> Tensor:
    out = torch.empty_like(t)
    dist.all_to_all_single(out, t)
    return out


class PairRouting(NamedTuple):
    token: Tensor  # [pairs] int64, by expert, then token
    weight: Tensor  # [pairs, 1]
    send: list[int]
    recv: list[int]
    chunks: list[list[int]]  # [source rank][local expert] received rows


class BaselineExpertMajor:
    """One row per (token, expert): sort, exchange, regroup by local expert; back the same way, scatter-add at home.

    Chosen for speed on the CPU, where there was a choice: splitting and joining whole chunks against one more
    `index_select` to regroup (as in Megatron-LM's `sort_chunks_by_idxs`), `scatter_add_` against `index_add_` and
    `bmm` to sum. Buffers are dropped as soon as they are not needed.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def route(self) -> PairRouting:
        experts, order = torch.sort(self.inputs.topk_idx.flatten(), stable=True)
        counts = torch.bincount(experts, minlength=self.inputs.num_experts)
        received = _exchange_evenly(counts)
        world_size = dist.get_world_size()
        chunks = received.view(world_size, -1).tolist()
        return PairRouting(
            token=order // self.inputs.topk_idx.shape[1],
            weight=self.inputs.topk_weights.flatten()[order, None].to(self.inputs.x.dtype),
            send=counts.view(world_size, -1).sum(1).tolist(),
            recv=[sum(chunk) for chunk in chunks],
            chunks=chunks,
        )

    def dispatch(self, routing: PairRouting) -> Received:
        rows = _exchange(self.inputs.x.index_select(0, routing.token), routing.send, routing.recv)
        return Received(_transpose_chunks(rows, routing.chunks))

    def combine(self, y: Tensor, received: Received, routing: PairRouting) -> Tensor:
        by_expert = [list(sizes) for sizes in zip(*routing.chunks, strict=True)]
        rows = _exchange(_transpose_chunks(y, by_expert), routing.recv, routing.send)
        rows.mul_(routing.weight)
        index = routing.token[:, None].expand_as(rows)
        return torch.zeros_like(self.inputs.x).scatter_add_(0, index, rows)

    def sends(self, routing: PairRouting) -> Sequence[int]:
        return routing.send

    def bytes_per_row(self) -> dict[str, int]:
        return {"route": 0, "dispatch": self.inputs.row_bytes, "combine": self.inputs.row_bytes}


def _transpose_chunks(rows: Tensor, sizes: list[list[int]]) -> Tensor:
    """From chunks ordered (i, j), `sizes[i][j]` rows each, to the order (j, i)."""
    width = len(sizes[0])
    chunks = rows.split([size for line in sizes for size in line])
    return torch.cat([chunk for j in range(width) for chunk in chunks[j::width]])


@dataclass(frozen=True)
class SortedPairs:
    """The (token, expert) pairs of every rank by expert, as index tensors: one gather to get into an order or out."""

    token: Tensor  # [pairs] int64, of each pair in the order in which they are sent: by expert, then token
    order: Tensor  # [pairs] int64, which (token, slot) each is
    home: Tensor  # [pairs] int64, the inverse: where in that order each (token, slot) is
    send: list[int]
    recv: list[int]
    by_expert: Tensor  # [received] int64, the received row of each place by local expert, source rank, token
    by_source: Tensor  # [received] int64, the inverse
    offsets: Tensor  # [local experts] int32, where the rows of each end


def _inverse(permutation: Tensor) -> Tensor:
    places = torch.arange(len(permutation), device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, places)


def sort_pairs(topk_idx: Tensor, num_experts: int) -> SortedPairs:
    """Sorts this rank's pairs and exchanges counts; waits once for the device. Every slot has to name an expert."""
    device, world_size = topk_idx.device, dist.get_world_size()
    experts, order = torch.sort(topk_idx.flatten(), stable=True)
    counts = torch.searchsorted(experts, torch.arange(num_experts + 1, device=device)).diff()
    received = _exchange_evenly(counts)
    send, recv = torch.stack([counts, received]).view(2, world_size, -1).sum(2).tolist()
    local = torch.arange(num_experts // world_size, device=device).repeat(world_size)
    by_expert = torch.sort(local.repeat_interleave(received, output_size=sum(recv)), stable=True).indices
    return SortedPairs(
        token=order // topk_idx.shape[1],
        order=order,
        home=_inverse(order),
        send=send,
        recv=recv,
        by_expert=by_expert,
        by_source=_inverse(by_expert),
        offsets=received.view(world_size, -1).sum(0).cumsum(0).to(torch.int32),
    )


class BaselinePairs:
    """One row per (token, expert), as `BaselineExpertMajor`, written for GPUs: gathers by index instead of many chunks,
    one wait for the device, no atomics: at home the rows of a token are gathered and summed by a `bmm`.
    """

    def __init__(self, inputs: Inputs, scales: Tensor | None = None) -> None:
        self.inputs, self.scales = inputs, scales

    def route(self) -> SortedPairs:
        return sort_pairs(self.inputs.topk_idx, self.inputs.num_experts)

    def dispatch(self, routing: SortedPairs) -> Received:
        def move(t: Tensor) -> Tensor:
            received = _exchange(t.index_select(0, routing.token), routing.send, routing.recv)
            return received.index_select(0, routing.by_expert)

        return Received(move(self.inputs.x), scales=None if self.scales is None else move(self.scales))

    def combine(self, y: Tensor, received: Received, routing: SortedPairs) -> Tensor:
        back = _exchange(y.index_select(0, routing.by_source), routing.recv, routing.send)
        weights = self.inputs.topk_weights.to(y.dtype)
        rows = back.index_select(0, routing.home).view(*weights.shape, -1)
        return torch.bmm(weights[:, None], rows).squeeze(1)

    def sends(self, routing: SortedPairs) -> Sequence[int]:
        return routing.send

    def bytes_per_row(self) -> dict[str, int]:
        return {"route": 0, "dispatch": self.inputs.row_bytes, "combine": self.inputs.row_bytes}


class VisitRouting(NamedTuple):
    token: Tensor  # [rows sent] int64, by rank, then token
    here: Tensor  # [rows sent, topk] bool: which of the token's experts that rank holds
    send: list[int]
    recv: list[int]
    recv_topk_idx: Tensor


class BaselineRankMajor:
    """One row per (token, rank), with its local experts and weights; back the same way, scatter-add at home."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def route(self) -> VisitRouting:
        topk_idx, world_size = self.inputs.topk_idx, dist.get_world_size()
        num_local = self.inputs.num_experts // world_size
        destination = topk_idx // num_local
        visits = torch.zeros(world_size, len(topk_idx), dtype=torch.bool, device=topk_idx.device)
        visits.scatter_(0, destination.t(), True)
        counts = visits.sum(1)
        received = _exchange_evenly(counts)
        rank, token = visits.nonzero().unbind(1)
        here = destination[token] == rank[:, None]
        send, recv = counts.tolist(), received.tolist()
        local = torch.where(here, topk_idx[token] % num_local, -1)
        return VisitRouting(token, here, send, recv, _exchange(local, send, recv))

    def dispatch(self, routing: VisitRouting) -> Received:
        rows = _exchange(self.inputs.x.index_select(0, routing.token), routing.send, routing.recv)
        weights = torch.where(routing.here, self.inputs.topk_weights[routing.token], 0)
        return Received(rows, _exchange(weights, routing.send, routing.recv))

    def combine(self, y: Tensor, received: Received, routing: VisitRouting) -> Tensor:
        rows = _exchange(y, routing.recv, routing.send)
        index = routing.token[:, None].expand_as(rows)
        return torch.zeros_like(self.inputs.x).scatter_add_(0, index, rows)

    def sends(self, routing: VisitRouting) -> Sequence[int]:
        return routing.send

    def bytes_per_row(self) -> dict[str, int]:
        i = self.inputs
        topk = i.topk_idx.shape[1]
        weights = topk * i.topk_weights.element_size()
        experts = topk * i.topk_idx.element_size()
        return {"route": experts, "dispatch": i.row_bytes + weights, "combine": i.row_bytes}


def make_baseline(inputs: Inputs, layout: torch_ep.Layout) -> Side:
    return BaselineExpertMajor(inputs) if layout == "expert_major" else BaselineRankMajor(inputs)


class Op(NamedTuple):
    """One row of the table: a call on each side, and the steps whose bytes it moves."""

    name: str
    steps: tuple[str, ...]
    prepare: Callable[[Side], Callable[[], Any]]


def _dispatch(side: Side) -> Callable[[], Any]:
    return lambda: side.dispatch(side.route())


def _dispatch_cached(side: Side) -> Callable[[], Any]:
    routing = side.route()
    return lambda: side.dispatch(routing)


def _combine(side: Side) -> Callable[[], Any]:
    routing = side.route()
    received = side.dispatch(routing)
    return lambda: side.combine(received.rows, received, routing)


OPS = (
    Op("dispatch", ("route", "dispatch"), _dispatch),
    Op("dispatch, cached plan", ("dispatch",), _dispatch_cached),
    Op("combine", ("combine",), _combine),
)


def check_equal(ours: Side, baseline: Side) -> None:
    """Raises unless both sides give the same rows, bit by bit and in the same order, and the same sums."""
    routings = ours.route(), baseline.route()
    received = ours.dispatch(routings[0]), baseline.dispatch(routings[1])
    if not torch.equal(received[0].rows, received[1].rows):
        raise RuntimeError("dispatch: the two sides returned different rows")
    sums = [side.combine(r.rows, r, w) for side, r, w in zip((ours, baseline), received, routings, strict=True)]
    # The sides round at different places: allow the width of the dtype for a sum of a few rows of order 1.
    tolerance = 32 * torch.finfo(sums[0].dtype).eps
    torch.testing.assert_close(sums[0], sums[1], rtol=tolerance, atol=tolerance, msg=lambda m: f"combine: {m}")
