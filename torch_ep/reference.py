"""The specification: the operators on all ranks at once, in plain torch, one row at a time.

Every argument and result is a list with one entry per rank. Copied rows, indices and sums of the operators
equal the reference bit by bit: the order and the width of the accumulation are part of the specification.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .low_latency import LowLatencyPlan, Quantize
from .plan import Layout, Plan

__all__ = [
    "combine",
    "dispatch",
    "low_latency_combine",
    "low_latency_dispatch",
    "plan",
    "quantize",
]


def plan(
    topk_idx: Sequence[Tensor],
    num_experts: int,
    *,
    layout: Layout,
    capacity: int | None = None,
    alignment: int = 1,
    ranks_per_node: int | None = None,
    max_relay_rows: int | None = None,
) -> list[Plan]:
    """As `torch_ep.plan`, for every rank; with `ranks_per_node` on a grid of nodes, as `torch_ep.init` makes it."""
    if ranks_per_node is not None:
        return _plan_on_grid(topk_idx, num_experts, ranks_per_node, max_relay_rows, layout, capacity, alignment)
    world_size = len(topk_idx)
    num_local = num_experts // world_size
    num_topk = topk_idx[0].shape[1]
    ints: dict[str, Any] = {"dtype": torch.int32}
    # wire[s][d]: the tokens of rank s that visit rank d, in order.
    wire = [
        [
            [t for t, experts in enumerate(idx.tolist()) if any(e >= 0 and e // num_local == d for e in experts)]
            for d in range(world_size)
        ]
        for idx in topk_idx
    ]
    plans = []
    for rank, idx in enumerate(topk_idx):
        send_row = torch.full(idx.shape, -1, **ints)
        row = 0
        for d in range(world_size):
            for t in wire[rank][d]:
                for k, e in enumerate(idx[t].tolist()):
                    if e >= 0 and e // num_local == d:
                        send_row[t, k] = row
                row += 1

        received = [(s, t) for s in range(world_size) for t in wire[s][rank]]
        recv_counts = [len(wire[s][rank]) for s in range(world_size)]
        local = [
            [e - rank * num_local if e >= 0 and e // num_local == rank else -1 for e in topk_idx[s][t].tolist()]
            for s, t in received
        ]
        recv_topk_idx = recv_pair = None
        if layout == "rank_major":
            rows = len(received) if capacity is None else capacity
            kept = min(rows, len(received))
            recv_topk_idx = torch.full((rows, num_topk), -1, dtype=idx.dtype)
            for i in range(kept):
                recv_topk_idx[i] = torch.tensor(local[i])
            counts = [sum(row.count(e) for row in local[:kept]) for e in range(num_local)]
            ends = torch.tensor(recv_counts).cumsum(0)
            num_dropped = len(received) - kept
        else:
            slots: list[int] = []
            counts, group_ends = [], []
            for e in range(num_local):
                group = [i * num_topk + row.index(e) for i, row in enumerate(local) if e in row]
                space = len(group) if capacity is None else max(0, capacity - len(slots))
                counts.append(min(len(group), space))
                slots += group + [-1] * (-len(group) % alignment)
                group_ends.append(len(slots))
            ends = torch.tensor(group_ends)
            rows = len(slots) if capacity is None else capacity
            num_dropped = sum(slot >= 0 for slot in slots[rows:])
            recv_pair = torch.tensor((slots + [-1] * rows)[:rows], **ints)
        plans.append(
            Plan(
                send_row=send_row,
                send_counts=torch.tensor([len(wire[rank][d]) for d in range(world_size)], **ints),
                recv_counts=torch.tensor(recv_counts, **ints),
                recv_topk_idx=recv_topk_idx,
                recv_pair=recv_pair,
                offsets=ends.clamp(max=rows).to(torch.int32),
                tokens_per_expert=torch.tensor(counts, **ints),
                num_dropped=torch.tensor(num_dropped, **ints),
                layout=layout,
                group_name="",
            )
        )
    return plans


def _links(plans: Sequence[Plan]) -> list[list[tuple[int, int, int, list[int]]]]:
    """For each rank, for each wire row it receives: (source rank, token, the sender's row, the token's slots)."""
    world_size = len(plans)
    links: list[list[tuple[int, int, int, list[int]]]] = [[] for _ in range(world_size)]
    for source, p in enumerate(plans):
        ends = p.send_counts.cumsum(0).tolist()
        slots_of: dict[int, tuple[int, list[int]]] = {}
        for t, slots in enumerate(p.send_row.tolist()):
            for k, row in enumerate(slots):
                if row >= 0:
                    slots_of.setdefault(row, (t, []))[1].append(k)
        for row in sorted(slots_of):
            destination = next(d for d in range(world_size) if row < ends[d])
            links[destination].append((source, *slots_of[row][:1], row, slots_of[row][1]))
    return links


def dispatch(
    x: Sequence[Tensor],
    plans: Sequence[Plan],
    *,
    topk_weights: Sequence[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor | None]]:
    """As `torch_ep.dispatch`, for every rank: (rows, weights or None). Scales are permuted as the rows."""
    if plans[0].rail is not None:
        return _dispatch_on_grid(x, plans, topk_weights)
    results: list[tuple[Tensor, Tensor | None]] = []
    for plan_, links in zip(plans, _links(plans), strict=True):
        num_topk = plan_.send_row.shape[1]
        rows = torch.zeros(plan_.num_rows, x[0].shape[1]).to(x[0].dtype)
        weights = None
        if topk_weights is not None:
            shape = (plan_.num_rows, num_topk) if plan_.layout == "rank_major" else (plan_.num_rows,)
            weights = torch.zeros(shape, dtype=topk_weights[0].dtype)
        if plan_.recv_pair is None:
            for i, (source, t, _, slots) in enumerate(links[: plan_.num_rows]):
                rows[i] = x[source][t]
                if weights is not None and topk_weights is not None:
                    weights[i, slots] = topk_weights[source][t, slots]
        else:
            for i, slot in enumerate(plan_.recv_pair.tolist()):
                if slot >= 0:
                    source, t, *_ = links[slot // num_topk]
                    rows[i] = x[source][t]
                    if weights is not None and topk_weights is not None:
                        weights[i] = topk_weights[source][t, slot % num_topk]
        results.append((rows, weights))
    return results


def combine(
    y: Sequence[Tensor],
    plans: Sequence[Plan],
    *,
    row_weights: Sequence[Tensor] | None = None,
    topk_weights: Sequence[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor | None]]:
    """As `torch_ep.combine`, for every rank: (sums, weights or None)."""
    if plans[0].rail is not None:
        return _combine_on_grid(y, plans, row_weights, topk_weights)
    dtype = y[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    hidden = y[0].shape[1]
    # wire[s][row]: the sum returned to rank s for each row that rank s sent.
    wire: list[dict[int, Tensor]] = [{} for _ in plans]
    source_weights = None
    if topk_weights is not None:
        source_weights = [torch.zeros(p.send_row.shape, dtype=topk_weights[0].dtype) for p in plans]
    for rank, (plan_, links) in enumerate(zip(plans, _links(plans), strict=True)):
        num_topk = plan_.send_row.shape[1]
        row_of = {} if plan_.recv_pair is None else {s: i for i, s in enumerate(plan_.recv_pair.tolist()) if s >= 0}
        for i, (source, t, row, slots) in enumerate(links):
            if plan_.recv_pair is None:
                own = [(i, slots)] if i < plan_.num_rows else []
            else:
                own = [(row_of[i * num_topk + k], [k]) for k in slots if i * num_topk + k in row_of]
            acc = torch.zeros(hidden, dtype=wide)
            for n, (j, ks) in enumerate(own):
                term = y[rank][j].to(wide)
                if row_weights is not None:
                    term = row_weights[rank][j].to(wide) * term
                acc = term if n == 0 else acc + term
                if source_weights is not None and topk_weights is not None:
                    values = topk_weights[rank][j]
                    source_weights[source][t, ks] = values[ks] if plan_.recv_pair is None else values
            wire[source][row] = acc.to(dtype)
    results: list[tuple[Tensor, Tensor | None]] = []
    for rank, plan_ in enumerate(plans):
        sums = torch.zeros(plan_.send_row.shape[0], hidden, dtype=dtype)
        for t, slots in enumerate(plan_.send_row.tolist()):
            total: Tensor | None = None
            for row in dict.fromkeys(row for row in slots if row >= 0):
                term = wire[rank][row].to(wide)
                total = term if total is None else total + term
            if total is not None:
                sums[t] = total.to(dtype)
        results.append((sums, None if source_weights is None else source_weights[rank]))
    return results


def _nodes(world_size: int, ranks_per_node: int) -> list[list[int]]:
    return [[*range(first, first + ranks_per_node)] for first in range(0, world_size, ranks_per_node)]


def _rails(world_size: int, ranks_per_node: int) -> list[list[int]]:
    return [[*range(position, world_size, ranks_per_node)] for position in range(ranks_per_node)]


def _in_groups(groups: list[list[int]], call: Callable[..., list], *of_ranks: Sequence[Any] | None) -> list[Any]:
    """`call` for the ranks of each group, with their entries of each argument; the results of all ranks."""
    results: dict[int, Any] = {}
    for ranks in groups:
        arguments = [None if values is None else [values[rank] for rank in ranks] for values in of_ranks]
        results.update(zip(ranks, call(*arguments), strict=True))
    return [results[rank] for rank in range(len(results))]


def _grid_of(plans: Sequence[Plan]) -> tuple[list[list[int]], list[list[int]], list[Plan], list[Plan]]:
    """The ranks of each rail and of each node, and both plans of every rank."""
    ranks_per_node = plans[0].send_counts.shape[0]
    rails, nodes = _rails(len(plans), ranks_per_node), _nodes(len(plans), ranks_per_node)
    return rails, nodes, [p.rail for p in plans if p.rail is not None], [p._replace(rail=None) for p in plans]


def _plan_on_grid(
    topk_idx: Sequence[Tensor],
    num_experts: int,
    ranks_per_node: int,
    max_relay_rows: int | None,
    layout: Layout,
    capacity: int | None,
    alignment: int,
) -> list[Plan]:
    world_size = len(topk_idx)
    num_nodes = world_size // ranks_per_node

    def on_rail(idx: Sequence[Tensor]) -> list[Plan]:
        relay_rows = None if capacity is None else max_relay_rows
        return plan(idx, num_experts, layout="rank_major", capacity=relay_rows)

    def in_node(idx: Sequence[Tensor]) -> list[Plan]:
        return plan(idx, num_experts // num_nodes, layout=layout, capacity=capacity, alignment=alignment)

    rails = _in_groups(_rails(world_size, ranks_per_node), on_rail, topk_idx)
    nodes = _in_groups(_nodes(world_size, ranks_per_node), in_node, [p.recv_topk_idx for p in rails])
    return [
        node._replace(num_dropped=rail.num_dropped + node.num_dropped, rail=rail)
        for rail, node in zip(rails, nodes, strict=True)
    ]


def _dispatch_on_grid(
    x: Sequence[Tensor], plans: Sequence[Plan], topk_weights: Sequence[Tensor] | None
) -> list[tuple[Tensor, Tensor | None]]:
    def move(x: Sequence[Tensor], plans: Sequence[Plan], weights: Sequence[Tensor] | None) -> list:
        return dispatch(x, plans, topk_weights=weights)

    rails, nodes, rail_plans, node_plans = _grid_of(plans)
    relayed = _in_groups(rails, move, x, rail_plans, topk_weights)
    weights = None if topk_weights is None else [w for _, w in relayed]
    return _in_groups(nodes, move, [rows for rows, _ in relayed], node_plans, weights)


def _combine_on_grid(
    y: Sequence[Tensor],
    plans: Sequence[Plan],
    row_weights: Sequence[Tensor] | None,
    topk_weights: Sequence[Tensor] | None,
) -> list[tuple[Tensor, Tensor | None]]:
    """The sum of each node is rounded."""

    def bring(y: Any, plans: Any, row_weights: Any, topk_weights: Any) -> list:
        return combine(y, plans, row_weights=row_weights, topk_weights=topk_weights)

    rails, nodes, rail_plans, node_plans = _grid_of(plans)
    sums = _in_groups(nodes, bring, y, node_plans, row_weights, topk_weights)
    weights = None if topk_weights is None else [w for _, w in sums]
    return _in_groups(rails, bring, [s for s, _ in sums], rail_plans, None, weights)


def _low_latency_dispatch_on_grid(
    x: Sequence[Tensor],
    topk_idx: Sequence[Tensor],
    num_experts: int,
    max_tokens_per_rank: int,
    topk_weights: Sequence[Tensor] | None,
    quantize: Quantize | None,
    ranks_per_node: int,
) -> list[tuple[Tensor, Tensor | None, LowLatencyPlan]]:
    world_size = len(x)
    num_nodes = world_size // ranks_per_node
    relay_rows = num_nodes * max_tokens_per_rank

    def relay(x: Any, idx: Any, weights: Any) -> list:
        plans = plan(idx, num_experts, layout="rank_major", capacity=relay_rows)
        return [(*rows, p) for rows, p in zip(dispatch(x, plans, topk_weights=weights), plans, strict=True)]

    def in_node(rows: Any, idx: Any, weights: Any) -> list:
        return low_latency_dispatch(
            rows, idx, num_experts // num_nodes, relay_rows, topk_weights=weights, quantize=quantize
        )

    relayed = _in_groups(_rails(world_size, ranks_per_node), relay, x, topk_idx, topk_weights)
    rails = [p for *_, p in relayed]
    weights = None if topk_weights is None else [w for _, w, _ in relayed]
    received = _in_groups(
        _nodes(world_size, ranks_per_node),
        in_node,
        [rows for rows, *_ in relayed],
        [p.recv_topk_idx for p in rails],
        weights,
    )
    return [(rows, scales, p._replace(rail=rail)) for (rows, scales, p), rail in zip(received, rails, strict=True)]


def _low_latency_combine_on_grid(y: Sequence[Tensor], plans: Sequence[LowLatencyPlan]) -> list[Tensor]:
    ranks_per_node = plans[0].source_offsets.shape[1]

    def bring(sums: Any, rails: Any) -> list:
        return [rows for rows, _ in combine(sums, rails)]

    in_node = [p._replace(rail=None) for p in plans]
    sums = _in_groups(_nodes(len(y), ranks_per_node), low_latency_combine, y, in_node)
    return _in_groups(_rails(len(y), ranks_per_node), bring, sums, [p.rail for p in plans])


def quantize(x: Tensor, how: Quantize) -> tuple[Tensor, Tensor]:
    """The rows [T, H] in float8_e4m3fn and their scales [T, S], as `torch_ep.low_latency_dispatch` sends them."""
    rows, scales = [], []
    for group in x.to(torch.float32).split(128, dim=1):
        amax = group.abs().amax(1, keepdim=True).clamp(min=1e-4)
        most = torch.full_like(amax, 448)  # a tensor: torch multiplies by the reciprocal of a number
        if how == "fp8":
            scale, factor = amax / most, most / amax
        else:
            bits = (amax / most).view(torch.int32)
            exponent = (bits >> 23) + (bits & 0x7FFFFF).ne(0)  # of the least power of 2 that is not below
            exponent = exponent.clamp(max=255)  # of NaN, too
            scale = (exponent << 23).view(torch.float32)
            factor = 1 / scale
        scales.append(exponent if how == "fp8_ue8m0" else scale)
        rows.append((group * factor).clamp(-448, 448).to(torch.float8_e4m3fn))
    if how == "fp8_ue8m0":
        scales += [torch.zeros_like(scales[0])] * (-len(scales) % 4)
        return torch.cat(rows, 1), torch.cat(scales, 1).to(torch.uint8).view(torch.int32)
    return torch.cat(rows, 1), torch.cat(scales, 1)


def _maybe_quantize(x: Tensor, how: Quantize | None) -> tuple[Tensor, Tensor | None]:
    return (x, None) if how is None else quantize(x, how)


def low_latency_dispatch(
    x: Sequence[Tensor],
    topk_idx: Sequence[Tensor],
    num_experts: int,
    max_tokens_per_rank: int,
    *,
    topk_weights: Sequence[Tensor] | None = None,
    quantize: Quantize | None = None,
    ranks_per_node: int | None = None,
) -> list[tuple[Tensor, Tensor | None, LowLatencyPlan]]:
    """As `torch_ep.low_latency_dispatch`, for every rank: (rows, scales or None, plan). Undefined values are zero."""
    if ranks_per_node is not None:
        return _low_latency_dispatch_on_grid(
            x, topk_idx, num_experts, max_tokens_per_rank, topk_weights, quantize, ranks_per_node
        )
    world_size, num_topk = len(x), topk_idx[0].shape[1]
    num_local, room = num_experts // world_size, world_size * max_tokens_per_rank
    sent = [_maybe_quantize(t, quantize) for t in x]
    rows_of, scales_of = [rows for rows, _ in sent], [scales for _, scales in sent if scales is not None]
    ints: dict[str, Any] = {"dtype": torch.int32}
    results: list[tuple[Tensor, Tensor | None, LowLatencyPlan]] = []
    for rank in range(world_size):
        rows = torch.zeros((num_local, room, x[0].shape[1]), dtype=rows_of[0].dtype)
        scales = None
        if scales_of:
            # Column-major, with columns of a multiple of 4 rows.
            shape = (num_local, scales_of[0].shape[1], room + -room % 4)
            scales = torch.zeros(shape, dtype=scales_of[0].dtype).transpose(1, 2)[:, :room]
        counts = [0] * num_local
        source_offsets = torch.zeros(num_local, world_size, **ints)
        recv_pair = torch.full((num_local, room), -1, **ints)
        recv_row = torch.full((room, num_topk), -1, **ints)
        row_weights = torch.zeros(num_local, room)
        for source in range(world_size):
            for t, experts in enumerate(topk_idx[source].tolist()):
                for k, expert in enumerate(experts):
                    if expert < 0 or expert // num_local != rank:
                        continue
                    e, token = expert % num_local, source * max_tokens_per_rank + t
                    row = counts[e]
                    counts[e] += 1
                    rows[e, row] = rows_of[source][t]
                    if scales is not None:
                        scales[e, row] = scales_of[source][t]
                    recv_pair[e, row] = token * num_topk + k
                    recv_row[token, k] = e * room + row
                    row_weights[e, row] = 1 if topk_weights is None else topk_weights[source][t, k]
            source_offsets[:, source] = torch.tensor(counts)
        plan_ = LowLatencyPlan(
            topk_idx=topk_idx[rank],
            tokens_per_expert=torch.tensor(counts, **ints),
            source_offsets=source_offsets,
            recv_pair=recv_pair,
            recv_row=recv_row,
            row_weights=row_weights,
            num_experts=num_experts,
            group_name="",
        )
        results.append((rows, scales, plan_))
    return results


def low_latency_combine(y: Sequence[Tensor], plans: Sequence[LowLatencyPlan]) -> list[Tensor]:
    """As `torch_ep.low_latency_combine`, for every rank."""
    if plans[0].rail is not None:
        return _low_latency_combine_on_grid(y, plans)
    world_size, dtype, hidden = len(y), y[0].dtype, y[0].shape[2]
    num_local = plans[0].num_experts // world_size
    # partial[rank][token of all ranks]: the weighted sum of that token's rows there.
    partial: list[dict[int, Tensor]] = [{} for _ in plans]
    for rank, plan_ in enumerate(plans):
        flat, weights = y[rank].flatten(0, 1), plan_.row_weights.flatten()
        for token, slots in enumerate(plan_.recv_row.tolist()):
            total: Tensor | None = None
            for row in slots:
                if row >= 0:
                    term = weights[row] * flat[row].to(torch.float32)
                    total = term if total is None else total + term
            if total is not None:
                partial[rank][token] = total.to(dtype)
    results = []
    for rank, plan_ in enumerate(plans):
        first = rank * plan_.recv_row.shape[0] // world_size
        sums = torch.zeros(plan_.topk_idx.shape[0], hidden, dtype=dtype)
        for t, experts in enumerate(plan_.topk_idx.tolist()):
            total = None
            for there in dict.fromkeys(expert // num_local for expert in experts if expert >= 0):
                term = partial[there][first + t].to(torch.float32)
                total = term if total is None else total + term
            if total is not None:
                sums[t] = total.to(dtype)
        results.append(sums)
    return results
