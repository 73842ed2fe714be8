"""Expected results of the operators, over all ranks at once, in vectorized torch: the bits of `torch_ep.reference`.

The specification works row by row and is slow. `api/test_expected.py` shows that this module equals it, so it can check
thousands of cases and large ones. It runs where its arguments are: on CPU or on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import torch_ep


class Received(NamedTuple):
    """The expected result of one rank and its plan. `n`: wire rows that arrive, dropped ones included."""

    plan: torch_ep.Plan
    #: [n] where each wire row comes from.
    source: Tensor
    token: Tensor
    #: [n] the row among those that its source sends.
    send_row: Tensor
    #: [n, K] the result's row of each slot of a wire row, or -1: no expert here, or dropped.
    row_of: Tensor


class Routing(NamedTuple):
    """The routing of all ranks."""

    ranks: list[Received]

    @property
    def plans(self) -> list[torch_ep.Plan]:
        return [r.plan for r in self.ranks]


def _exclusive(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


def route(
    topk_idx: Sequence[Tensor],
    num_experts: int,
    *,
    layout: torch_ep.Layout,
    capacity: int | None = None,
    alignment: int = 1,
) -> Routing:
    """`torch_ep.plan` of every rank. topk_idx: of each rank [tokens, K]."""
    world_size, num_topk = len(topk_idx), topk_idx[0].shape[1]
    num_local = num_experts // world_size
    device = topk_idx[0].device
    send_row, send_counts, visits = [], [], []
    for idx in topk_idx:
        idx = idx.long()
        to = torch.where(idx >= 0, idx // num_local, world_size)
        visited = torch.zeros(len(idx), world_size + 1, dtype=torch.int64, device=device).scatter_(1, to, 1)
        visited = visited[:, :world_size]
        counts = visited.sum(0)
        row = visited.cumsum(0) - 1 + _exclusive(counts)
        row = torch.cat([row, row.new_full((len(idx), 1), -1)], 1)
        send_row.append(row.gather(1, to))
        send_counts.append(counts)
        visits.append(visited.bool())

    ranks = []
    for rank in range(world_size):
        tokens = [visited[:, rank].nonzero()[:, 0] for visited in visits]
        sources = [torch.full_like(t, s) for s, t in enumerate(tokens)]
        first = [_exclusive(counts)[rank] for counts in send_counts]
        send_rows = [f + torch.arange(len(t), device=device) for f, t in zip(first, tokens, strict=True)]
        local = torch.cat([idx[t] for idx, t in zip(topk_idx, tokens, strict=True)]).long() - rank * num_local
        local = torch.where((local >= 0) & (local < num_local), local, -1)
        n = len(local)
        recv_counts = torch.stack([counts[rank] for counts in send_counts])
        here = local >= 0
        recv_topk_idx = recv_pair = None
        if layout == "rank_major":
            rows = n if capacity is None else capacity
            kept = min(n, rows)
            row_of = torch.where(here, torch.arange(n, device=device)[:, None], -1)
            row_of = torch.where(row_of < kept, row_of, -1)
            recv_topk_idx = local.new_full((rows, num_topk), -1)
            recv_topk_idx[:kept] = local[:kept]
            recv_topk_idx = recv_topk_idx.to(topk_idx[0].dtype)
            kept_experts = local[:kept][here[:kept]]
            tokens_per_expert = torch.bincount(kept_experts, minlength=num_local)
            ends = recv_counts.cumsum(0)
            num_dropped = n - kept
        else:
            pairs = here.flatten().nonzero()[:, 0]  # row * K + slot, in order
            experts, order = local.flatten()[pairs].sort(stable=True)
            pairs = pairs[order]
            counts = torch.bincount(experts, minlength=num_local)
            padded = (counts + alignment - 1) // alignment * alignment
            ends, begins = padded.cumsum(0), _exclusive(padded)
            place = begins[experts] + torch.arange(len(pairs), device=device) - _exclusive(counts)[experts]
            rows = int(ends[-1]) if capacity is None else capacity
            kept_pairs = place < rows
            recv_pair = pairs.new_full((rows,), -1)
            recv_pair[place[kept_pairs]] = pairs[kept_pairs]
            row_of = local.new_full((n * num_topk,), -1)
            row_of[pairs] = torch.where(kept_pairs, place, -1)
            row_of = row_of.view(n, num_topk)
            tokens_per_expert = torch.minimum(counts, (rows - begins).clamp(min=0))
            num_dropped = int((~kept_pairs).sum())
            recv_pair = recv_pair.int()
        plan = torch_ep.Plan(
            send_row=send_row[rank].int(),
            send_counts=send_counts[rank].int(),
            recv_counts=recv_counts.int(),
            recv_topk_idx=recv_topk_idx,
            recv_pair=recv_pair,
            offsets=ends.clamp(max=rows).int(),
            tokens_per_expert=tokens_per_expert.int(),
            num_dropped=torch.tensor(num_dropped, dtype=torch.int32, device=device),
            layout=layout,
            group_name="",
        )
        ranks.append(Received(plan, torch.cat(sources), torch.cat(tokens), torch.cat(send_rows), row_of))
    return Routing(ranks)


def _joined(tensors: Sequence[Tensor], r: Received) -> Tensor:
    """The wire rows of one rank, taken from what all ranks hold of their tokens."""
    sizes = torch.tensor([len(t) for t in tensors], device=r.source.device)
    return torch.cat(list(tensors))[_exclusive(sizes)[r.source] + r.token]


def _moved(wire: Tensor, r: Received) -> Tensor:
    """The wire rows where the result has them, zeros elsewhere."""
    out = wire.new_zeros(r.plan.num_rows, wire.shape[1])
    if r.plan.recv_pair is None:
        kept = min(wire.shape[0], out.shape[0])
        out[:kept] = wire[:kept]
    else:
        valid = r.plan.recv_pair >= 0
        out[valid] = wire[r.plan.recv_pair[valid].long() // r.plan.send_row.shape[1]]
    return out


def dispatch(routing: Routing, rank: int, x: Sequence[Tensor]) -> Tensor:
    """[R, n] rows, or scales, that `rank` receives. x: of each rank [tokens, n], of any dtype."""
    r = routing.ranks[rank]
    bits = [t.view(torch.uint8) for t in x]  # indexing does not know every dtype
    return _moved(_joined(bits, r), r).view(x[0].dtype)


def dispatch_weights(routing: Routing, rank: int, topk_weights: Sequence[Tensor]) -> Tensor:
    """[R, K] or [R] weights that `rank` receives. topk_weights: of each rank [tokens, K]."""
    r = routing.ranks[rank]
    wire = _joined(topk_weights, r)
    if r.plan.recv_topk_idx is not None:
        return torch.where(r.plan.recv_topk_idx >= 0, _moved(wire, r), 0)
    assert r.plan.recv_pair is not None
    flat = torch.cat([wire.flatten(), wire.new_zeros(1)])
    return flat[torch.where(r.plan.recv_pair >= 0, r.plan.recv_pair.long(), len(flat) - 1)]


def _sum_in_order(terms: Tensor, total: Tensor, first: Tensor, has: Tensor) -> Tensor:
    """total + terms where `has`; the first term as it is, so that -0 stays one."""
    added = torch.where(first[:, None], terms, total + terms)
    return torch.where(has[:, None], added, total)


def _wire_sums(r: Received, y: Tensor, row_weights: Tensor | None) -> Tensor:
    """[n, hidden] what one rank sends back for each of its wire rows."""
    wide = torch.promote_types(y.dtype, torch.float32)
    n, num_topk = r.row_of.shape
    total = torch.zeros(n, y.shape[1], dtype=wide, device=y.device)
    y = torch.cat([y, y.new_zeros(1, y.shape[1])])  # for rows that are not there
    row_of = r.row_of
    if r.plan.recv_pair is None:  # one row, however many experts
        row_of, num_topk = row_of.amax(1, keepdim=True), 1
    seen = torch.zeros(n, dtype=torch.bool, device=y.device)
    for k in range(num_topk):
        rows = row_of[:, k]
        term = y[rows].to(wide)
        if row_weights is not None:
            weights = torch.cat([row_weights, row_weights.new_zeros(1)])
            term = weights[rows].to(wide)[:, None] * term
        total = _sum_in_order(term, total, ~seen, rows >= 0)
        seen |= rows >= 0
    return total.to(y.dtype)


def combine(routing: Routing, rank: int, y: Sequence[Tensor], row_weights: Sequence[Tensor] | None = None) -> Tensor:
    """[tokens, hidden] sums that come home to `rank`. y: of each rank [R, hidden]."""
    own = routing.ranks[rank].plan
    wide = torch.promote_types(y[0].dtype, torch.float32)
    wire = y[0].new_zeros(int(own.send_counts.sum()) + 1, y[0].shape[1])
    for i, r in enumerate(routing.ranks):
        mine = r.source == rank
        part = r._replace(row_of=r.row_of[mine])
        wire[r.send_row[mine]] = _wire_sums(part, y[i], None if row_weights is None else row_weights[i])
    num_tokens, num_topk = own.send_row.shape
    total = torch.zeros(num_tokens, y[0].shape[1], dtype=wide, device=y[0].device)
    for k in range(num_topk):
        row = own.send_row[:, k]
        before = own.send_row[:, :k]
        has = (row >= 0) & ~(before == row[:, None]).any(1)
        total = _sum_in_order(wire[row.long()].to(wide), total, (before < 0).all(1), has)
    return total.to(y[0].dtype)


def combine_weights(routing: Routing, rank: int, topk_weights: Sequence[Tensor]) -> Tensor:
    """[tokens, K] weights that come home to `rank`. topk_weights: of each rank [R, K] or [R]."""
    own = routing.ranks[rank].plan
    num_tokens, num_topk = own.send_row.shape
    wire = topk_weights[0].new_zeros(int(own.send_counts.sum()), num_topk)
    for r, weights in zip(routing.ranks, topk_weights, strict=True):
        mine = r.source == rank
        rows = r.row_of[mine]
        padded = torch.cat([weights, weights.new_zeros(1, *weights.shape[1:])])
        if r.plan.recv_pair is None:
            slots = torch.arange(num_topk, device=rows.device).expand_as(rows)
            values = padded[rows, slots]
        else:
            values = padded[rows]
        wire[r.send_row[mine]] = values
    valid = own.send_row >= 0
    home = topk_weights[0].new_zeros(num_tokens, num_topk)
    token, slot = valid.nonzero(as_tuple=True)
    home[token, slot] = wire[own.send_row[valid].long(), slot]
    return home
