"""Dispatch and combine of one decoding step: static shapes, few tokens, no separate plan, inference only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import meta
from .checks import check_int, check_str, check_tensors, check_type, first_in_dynamo, refuse
from .comm import Communicator, Group, communicators, resolve
from .ops import combine, dispatch, plan
from .peer_errors import reports_to_peers
from .plan import Plan

__all__ = [
    "InFlightCombine",
    "InFlightDispatch",
    "LowLatencyPlan",
    "LowLatencyStatistics",
    "Quantize",
    "low_latency_combine",
    "low_latency_combine_recv",
    "low_latency_combine_send",
    "low_latency_dispatch",
    "low_latency_dispatch_recv",
    "low_latency_dispatch_send",
]

Quantize = Literal["fp8", "fp8_pow2", "fp8_ue8m0"]

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


class LowLatencyPlan(NamedTuple):
    """The source of every row of a `low_latency_dispatch`, for `low_latency_combine` on this rank.

    `T` is this rank's number of tokens, at most `M` = max_tokens_per_rank, `K` experts per token, `W` ranks, `L` local
    experts, `C` = W * M rows that each expert has room for. All tensors but two are int32.
    """

    #: [T, K] int32 or int64: of this rank, as given.
    topk_idx: Tensor
    #: [L] rows of each local expert. Rows past this count are undefined.
    tokens_per_expert: Tensor
    #: [L, W] where each source rank's rows end within those of the expert.
    source_offsets: Tensor
    #: [L, C] which (source rank, token, slot) each row is: (source * M + token) * K + slot; -1 past the last row.
    recv_pair: Tensor
    #: [C, K] the reverse: for token `source * M + token`, the row of each slot as expert * C + row; -1 where the slot
    #: has no expert here, or the source has no such token.
    recv_row: Tensor
    #: [L, C] float32: the weight of each row, 1 if no `topk_weights` were given; undefined past the last row.
    row_weights: Tensor
    num_experts: int
    group_name: str
    #: On a grid of nodes: the plan of the exchange between nodes. The other fields are then of the exchange inside the
    #: node, whose tokens are the rows that its ranks relay. Else None.
    rail: Plan | None = None


class LowLatencyStatistics(NamedTuple):
    """Counters on the device, added to in place by the functions that they are passed to, compiled or not.

    A monitor of expert load and slow ranks may read them at any time.
    """

    #: [num_local_experts] int64: rows that each local expert got (dispatch only).
    tokens_per_expert: Tensor
    #: [world_size] int64: ns that this rank waited for each other. On backend nvlink each call adds those of the
    #: exchange before it, of its kind: they are known when that has ended, and no kernel waits for its own end. On a
    #: grid of nodes: the waits for the ranks of the own node.
    wait_ns: Tensor

    @classmethod
    def zeros(
        cls, num_experts: int, group: Group = None, *, device: torch.device | str | None = None
    ) -> LowLatencyStatistics:
        """Returns zero counters, for `num_experts` experts over all ranks of the group."""
        _, world_size = resolve(group)
        op = "torch_ep.LowLatencyStatistics.zeros"
        num_experts = check_int(op, "num_experts", num_experts)
        if num_experts <= 0 or num_experts % world_size:
            refuse(
                ValueError,
                f"{op}: expected num_experts to be a positive multiple of the world size {world_size}, got "
                f"{num_experts}",
            )
        return cls(
            torch.zeros(num_experts // world_size, dtype=torch.int64, device=device),
            torch.zeros(world_size, dtype=torch.int64, device=device),
        )


class InFlightDispatch(NamedTuple):
    """A dispatch that was sent, for `low_latency_dispatch_recv`. Its fields are internal."""

    #: [2, W] int64: rows from each rank; ns waited for each rank.
    status: Tensor
    #: uint8 [W * max_tokens_per_rank, bytes per wire row]: the wire rows. Undefined on backend nvlink, which keeps
    #: them in its own buffers.
    data: Tensor
    topk_idx: Tensor
    hidden: int
    dtype: torch.dtype
    quantize: str
    num_experts: int
    max_tokens_per_rank: int
    world_size: int
    group_name: str
    rail: Plan | None = None


class InFlightCombine(NamedTuple):
    """A combine that was sent, for `low_latency_combine_recv`. Its fields are internal."""

    #: As in `InFlightDispatch`.
    status: Tensor
    data: Tensor
    topk_idx: Tensor
    hidden: int
    dtype: torch.dtype
    num_experts: int
    world_size: int
    group_name: str
    rail: Plan | None = None


def _dispatched(fields: tuple, topk_idx: Tensor, num_experts: int, group_name: str, statistics: Any) -> Any:
    rows, scales, tokens_per_expert, source_offsets, recv_pair, recv_row, row_weights, wait_ns = fields
    if statistics is not None:
        statistics.tokens_per_expert.add_(tokens_per_expert)
        statistics.wait_ns.add_(wait_ns)
    plan = LowLatencyPlan(
        topk_idx=topk_idx,
        tokens_per_expert=tokens_per_expert,
        source_offsets=source_offsets,
        recv_pair=recv_pair,
        recv_row=recv_row,
        row_weights=row_weights,
        num_experts=num_experts,
        group_name=group_name,
    )
    return (rows if scales is None else (rows, scales)), plan


def _require_sizes_by_name(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Raises TypeError for sizes passed by position: DeepEP has them in another order."""

    @functools.wraps(function)
    def checked(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        if len(args) > 2:
            refuse(
                TypeError,
                f"ep::{function.__name__}: expected two positional arguments, x and topk_idx, got {len(args)}: pass "
                "the others by name, num_experts= and max_tokens_per_rank= included: their order is another in DeepEP",
            )
        return function(*args, **kwargs)

    return checked


def _check_dispatch_arguments(
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    quantize: Any,
    num_experts: Any,
    max_tokens_per_rank: Any,
    world_size: int,
    statistics: Any,
    after: Any,
) -> tuple[Tensor, Tensor, Tensor | None, str, int, int]:
    """Checks and returns the arguments of ep::low_latency_dispatch that precede world_size."""
    op = "ep::low_latency_dispatch"
    check_tensors(op, {"x": x, "topk_idx": topk_idx}, {"topk_weights": topk_weights, "after": after})
    if quantize is None:
        quantize = ""
    check_str(op, "quantize", quantize, "'fp8', 'fp8_pow2', 'fp8_ue8m0' or None")
    num_experts = check_int(op, "num_experts", num_experts)
    max_tokens_per_rank = check_int(op, "max_tokens_per_rank", max_tokens_per_rank)
    _check_statistics(op, statistics, num_experts, world_size, x.device)
    return x, topk_idx, topk_weights, quantize, num_experts, max_tokens_per_rank


def _check_statistics(op: str, statistics: Any, num_experts: int, world_size: int, device: torch.device) -> None:
    if statistics is None:
        return
    check_type(op, "statistics", statistics, LowLatencyStatistics, "a torch_ep.LowLatencyStatistics or None")
    sizes = {"tokens_per_expert": num_experts // world_size, "wait_ns": world_size}
    for name, size in sizes.items():
        counters = getattr(statistics, name)
        check_tensors(op, {f"statistics.{name}": counters})
        is_zero = not torch.compiler.is_compiling() and counters._is_zerotensor()
        if is_zero or not counters.is_contiguous():
            refuse(
                ValueError,
                f"{op}: expected statistics.{name} to be a contiguous tensor that can be added to in place: make it by "
                "torch_ep.LowLatencyStatistics.zeros",
            )
        if (counters.shape, counters.dtype, counters.device) != ((size,), torch.int64, device):
            refuse(
                ValueError,
                f"{op}: expected statistics.{name} of shape [{size}] and dtype int64 on {device}, got "
                f"{list(counters.shape)} and {str(counters.dtype).removeprefix('torch.')} on {counters.device}: make "
                f"them by torch_ep.LowLatencyStatistics.zeros({num_experts}, group, device=...)",
            )


def _relay(
    communicator: Communicator,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    quantize: str,
    num_experts: int,
    max_tokens_per_rank: int,
    after: Tensor | None,
) -> tuple[Plan, dict[str, Any]]:
    """The exchange between the nodes of a grid: see Note [Grids of nodes] in ops.py.

    Returns its plan, and the arguments of the exchange inside this rank's node.
    """
    rail, node, op = communicator.rail, communicator.node, "ep::low_latency_dispatch"
    assert rail is not None and node is not None
    try:
        meta.check_experts(op, num_experts, communicator.world_size)
    except ValueError as error:
        raise first_in_dynamo(error) from None
    if topk_idx.dim() > 0 and topk_idx.shape[0] > max_tokens_per_rank:
        refuse(
            ValueError,
            f"{op}: expected at most max_tokens_per_rank = {max_tokens_per_rank} tokens, got {topk_idx.shape[0]}",
        )
    relay_rows = rail.world_size * max_tokens_per_rank
    rail_plan = plan(topk_idx, num_experts, rail.group_name, layout="rank_major", capacity=relay_rows, after=after)
    if topk_weights is None:
        rows, weights = dispatch(x, rail_plan), None
    else:
        rows, weights = dispatch(x, rail_plan, topk_weights=topk_weights)
    return rail_plan, {
        "x": rows,
        "topk_idx": rail_plan.recv_topk_idx,
        "num_experts": num_experts // rail.world_size,
        "max_tokens_per_rank": relay_rows,
        "group": node.group_name,
        "topk_weights": weights,
        "quantize": quantize or None,
    }


def _check_rail(op: str, name: str, rail: Any) -> Plan:
    """Checks a rail before the exchange inside the node, which comes first or at the same time."""
    check_type(op, name, rail, Plan, "a torch_ep.Plan or None")
    check_tensors(op, {f"{name}.send_row": rail.send_row, f"{name}.send_counts": rail.send_counts})
    check_str(op, f"{name}.group_name", rail.group_name, "to be a str")
    if rail.group_name not in communicators:
        refuse(
            RuntimeError,
            f"{op}: expected an initialized group, got group '{rail.group_name}': call torch_ep.init with "
            "ranks_per_node on every rank first",
        )
    return rail


def _of_node(op: str, statistics: Any, rail: Plan, in_node: Any = None) -> LowLatencyStatistics | None:
    """The counters of the ranks of this rank's node. `in_node`: what has the number of experts of the node."""
    if statistics is None:
        return None
    communicator = communicators[rail.group_name]
    num_nodes = communicator.world_size
    if in_node is not None:
        _, ranks_per_node = resolve(in_node.group_name)
        num_experts, device = num_nodes * in_node.num_experts, rail.send_counts.device
        _check_statistics(op, statistics, num_experts, num_nodes * ranks_per_node, device)
    return statistics._replace(wait_ns=statistics.wait_ns.view(num_nodes, -1)[communicator.rank])


@reports_to_peers("ep::low_latency_dispatch", 5, "group")
@_require_sizes_by_name
def low_latency_dispatch(
    x: Tensor,
    topk_idx: Tensor,
    *,
    num_experts: int,
    max_tokens_per_rank: int,
    group: Group = None,
    topk_weights: Tensor | None = None,
    quantize: Quantize | None = None,
    statistics: LowLatencyStatistics | None = None,
    after: Tensor | None = None,
) -> tuple[Any, LowLatencyPlan]:
    """Copies each token's row to the experts that it names, in tensors of a fixed size. Collective; inference only.

    Rank `r` of `W` holds experts `[r * num_experts // W, (r + 1) * num_experts // W)`. A row crosses the link once per
    (token, rank); its weights travel with it, since `low_latency_combine` applies them where the experts are. So they
    are an argument here and not there, unlike in DeepEP. Sizes go by name: DeepEP has them in another order.

    Args:
        x: [T, H] bfloat16, float16 or float32, contiguous. T is at most `max_tokens_per_rank`, zero included; ranks may
            hold different numbers of tokens.
        topk_idx: [T, K] int32 or int64, contiguous: the experts of each token, all different, -1 for none.
        num_experts: experts over all ranks, a multiple of the world size, at most 2**24.
        max_tokens_per_rank: M, equal on every rank. It determines the sizes of the results. W * M * K and
            W * M * L are at most 2**31 - 1.
        group: a ProcessGroup, a one-dimensional DeviceMesh, a group's name, or None for the default group. With no
            process group, or one rank, nothing is communicated. On a grid of nodes, rows cross the network unquantized,
            once per (token, node), before the exchange inside the node.
        topk_weights: [T, K] float32: the weights with which combine sums. None: all 1.
        quantize: rows are sent and returned in float8_e4m3fn, each group of 128 channels divided by a scale (the last
            group may be shorter). With a = max(1e-4, the largest |x| of the group), all in float32:
            "fp8": scale a / 448, rows x * (448 / a). "fp8_pow2": the scale is the least power of 2 that is at least
            a / 448, rows x * (1 / scale). "fp8_ue8m0": as "fp8_pow2", with the scales as biased exponents, four in an
            int32, the first in its lowest byte. `torch_ep.reference.quantize` is the specification.
        statistics: counters to add to.
        after: any tensor that must exist before this exchange starts. Only the order matters, not the values.

    Returns:
        `(rows, plan)`, or `((rows, scales), plan)` if quantized.

        rows: [L, C, H], x's dtype or float8_e4m3fn, with L = num_experts / W local experts and C = W * M. The first
        `plan.tokens_per_expert[e]` rows of expert `e` are filled, by source rank, then token; the others undefined.

        scales: [L, C, S] float32 for S = ceil(H / 128) groups, or int32 with S = ceil(H / 512). Column-major for each
        expert, as masked grouped GEMMs take it: strides (S * C', 1, C'), C' = C rounded up to a multiple of 4.

    Raises:
        ValueError, TypeError: bad arguments; the message names the argument, what was expected and what came. Where it
            is bad on one rank alone, that one raises when all have come to the call, and the others a
            `torch.distributed.DistError` that names it. On backend nvlink this holds for what only the device can
            see; else the rank raises at once, and the others after the timeout.
        RuntimeError: an argument requires a gradient or has a tangent; `init` was not called for the group.
        torch.distributed.DistError: ranks issued different operators, disagree on sizes, or timed out.
    """
    group_name, world_size = resolve(group)
    arguments = _check_dispatch_arguments(
        x, topk_idx, topk_weights, quantize, num_experts, max_tokens_per_rank, world_size, statistics, after
    )
    communicator = communicators.get(group_name)
    if communicator is not None and communicator.rail is not None:
        relay, relayed = _relay(communicator, *arguments, after)
        received, plan = low_latency_dispatch(
            **relayed, statistics=_of_node("ep::low_latency_dispatch", statistics, relay)
        )
        return received, plan._replace(rail=relay)
    fields = torch.ops.ep.low_latency_dispatch(*arguments, world_size, group_name, after)
    return _dispatched(fields, topk_idx, num_experts, group_name, statistics)


@reports_to_peers("ep::low_latency_combine", 1, "plan")
def low_latency_combine(
    y: Tensor, plan: LowLatencyPlan, *, statistics: LowLatencyStatistics | None = None, after: Tensor | None = None
) -> Tensor:
    """Brings the experts' results back and sums those of each token, weighted. Collective; inference only.

    The rows of a token on one rank are summed there, times their weights, in the order of its slots; the sums of the
    ranks are added here, in the order in which its slots first name them. Both accumulate in float32 and round to y's
    dtype; bitwise the same on every run. y is read in place, without a staging copy.

    Args:
        y: [L, C, H] bfloat16, float16 or float32, contiguous: the results for the rows of the dispatch. Rows past
            an expert's count are not read.
        plan: the plan of the dispatch. Its weights are used: unlike in DeepEP they are an argument of the dispatch.
        statistics: counters; only `wait_ns` is added to.
        after: any tensor that must exist before this exchange starts.

    Returns:
        The sums [T, H], zero for a token without experts.

    Raises:
        ValueError, TypeError, RuntimeError, torch.distributed.DistError: as `low_latency_dispatch`.
    """
    if isinstance(plan, LowLatencyPlan) and plan.rail is not None:
        op = "ep::low_latency_combine"
        rail = _check_rail(op, "plan.rail", plan.rail)
        of_node = _of_node(op, statistics, rail, plan)
        return combine(low_latency_combine(y, plan._replace(rail=None), statistics=of_node, after=after), rail)
    arguments = _check_combine_arguments(y, plan, statistics, after)
    out, wait_ns = torch.ops.ep.low_latency_combine(*arguments, after)
    if statistics is not None:
        statistics.wait_ns.add_(wait_ns)
    return out


def _check_combine_arguments(y: Any, plan: Any, statistics: Any, after: Any) -> tuple:
    """Checks and returns the arguments of ep::low_latency_combine up to group_name, the last element."""
    op = "ep::low_latency_combine"
    check_type(op, "plan", plan, LowLatencyPlan, "a torch_ep.LowLatencyPlan")
    tensors = {
        "y": y,
        "plan.topk_idx": plan.topk_idx,
        "plan.source_offsets": plan.source_offsets,
        "plan.recv_row": plan.recv_row,
        "plan.row_weights": plan.row_weights,
    }
    check_tensors(op, tensors, {"after": after})
    origin = "plan as torch_ep.low_latency_dispatch"
    _check_matrix(op, "plan.source_offsets", plan.source_offsets, "num_local_experts, world_size", origin)
    _check_matrix(op, "plan.recv_row", plan.recv_row, "rows, num_topk", origin)
    num_experts = check_int(op, "plan.num_experts", plan.num_experts)
    check_str(op, "plan.group_name", plan.group_name, "to be a str")
    world_size = plan.source_offsets.shape[1]
    _check_statistics(op, statistics, num_experts, world_size, y.device)
    return y, plan.topk_idx, plan.row_weights, plan.recv_row, num_experts, world_size, plan.group_name


def _check_matrix(op: str, name: str, t: Tensor, shape: str, origin: str) -> None:
    if t.dim() != 2 or t.shape[1] == 0:
        refuse(
            ValueError,
            f"{op}: expected {name} of shape [{shape}], got {list(t.shape)}: pass the {origin} returned it",
        )


def _check_in_flight(op: str, in_flight: Any, kind: type, statistics: Any, after: Any) -> None:
    check_type(op, "in_flight", in_flight, kind, f"a torch_ep.{kind.__name__}")
    tensors = {
        "in_flight.status": in_flight.status,
        "in_flight.data": in_flight.data,
        "in_flight.topk_idx": in_flight.topk_idx,
    }
    check_tensors(op, tensors, {"after": after})
    _check_matrix(op, "in_flight.topk_idx", in_flight.topk_idx, "num_tokens, num_topk", "tuple as the send")
    check_type(op, "in_flight.dtype", in_flight.dtype, torch.dtype, "a torch.dtype")
    check_str(op, "in_flight.group_name", in_flight.group_name, "to be a str")
    check_int(op, "in_flight.hidden", in_flight.hidden)
    check_int(op, "in_flight.num_experts", in_flight.num_experts)
    check_int(op, "in_flight.world_size", in_flight.world_size)
    if kind is InFlightDispatch:
        check_str(op, "in_flight.quantize", in_flight.quantize, "to be a str")
        check_int(op, "in_flight.max_tokens_per_rank", in_flight.max_tokens_per_rank)
    if statistics is not None and in_flight.world_size > 0:
        _check_statistics(op, statistics, in_flight.num_experts, in_flight.world_size, in_flight.data.device)


@reports_to_peers("ep::low_latency_dispatch", 5, "group")
@_require_sizes_by_name
def low_latency_dispatch_send(
    x: Tensor,
    topk_idx: Tensor,
    *,
    num_experts: int,
    max_tokens_per_rank: int,
    group: Group = None,
    topk_weights: Tensor | None = None,
    quantize: Quantize | None = None,
    after: Tensor | None = None,
) -> InFlightDispatch:
    """The first half of `low_latency_dispatch`: code between the two halves overlaps with the transfer.

    When it returns it has read its arguments, in the order of the current stream. At most two dispatches may be in
    flight; every send needs one `low_latency_dispatch_recv`, on every rank in the same order. Backend nvlink raises
    otherwise. Backend c10d completes the transfer in the send and does not check the order.

    Args, Raises: as `low_latency_dispatch`.
    """
    group_name, world_size = resolve(group)
    arguments = _check_dispatch_arguments(
        x, topk_idx, topk_weights, quantize, num_experts, max_tokens_per_rank, world_size, None, after
    )
    communicator = communicators.get(group_name)
    if communicator is not None and communicator.rail is not None:
        relay, relayed = _relay(communicator, *arguments, after)
        return low_latency_dispatch_send(**relayed)._replace(rail=relay)
    *_, num_experts, max_tokens_per_rank = arguments
    status, data = torch.ops.ep.low_latency_dispatch_send(*arguments, world_size, group_name, after)
    return InFlightDispatch(
        status=status,
        data=data,
        topk_idx=topk_idx,
        hidden=x.shape[1],
        dtype=x.dtype,
        quantize=quantize or "",
        num_experts=num_experts,
        max_tokens_per_rank=max_tokens_per_rank,
        world_size=world_size,
        group_name=group_name,
    )


def low_latency_dispatch_recv(
    in_flight: InFlightDispatch, *, statistics: LowLatencyStatistics | None = None, after: Tensor | None = None
) -> tuple[Any, LowLatencyPlan]:
    """The second half of `low_latency_dispatch`. Collective; returns and raises as the whole operator does.

    Args:
        in_flight: what the send returned.
        statistics: as for the whole operator.
        after: any tensor that must exist before this half waits, such as the result of the work that overlaps.
    """
    op = "ep::low_latency_dispatch_recv"
    if isinstance(in_flight, InFlightDispatch) and in_flight.rail is not None:
        rail = _check_rail(op, "in_flight.rail", in_flight.rail)
        of_node = _of_node(op, statistics, rail, in_flight)
        received, plan = low_latency_dispatch_recv(in_flight._replace(rail=None), statistics=of_node, after=after)
        return received, plan._replace(rail=in_flight.rail)
    _check_in_flight(op, in_flight, InFlightDispatch, statistics, after)
    status, data, topk_idx, hidden, dtype, quantize, num_experts, max_tokens_per_rank, world_size, name, _ = in_flight
    fields = torch.ops.ep.low_latency_dispatch_recv(
        status,
        data,
        hidden,
        dtype,
        topk_idx.shape[1],
        quantize,
        num_experts,
        max_tokens_per_rank,
        world_size,
        name,
        after,
    )
    return _dispatched(fields, topk_idx, num_experts, name, statistics)


@reports_to_peers("ep::low_latency_combine", 1, "plan")
def low_latency_combine_send(y: Tensor, plan: LowLatencyPlan, *, after: Tensor | None = None) -> InFlightCombine:
    """The first half of `low_latency_combine`. Collective.

    When it returns it has read y, in the order of the current stream. At most two combines may be in flight; every send
    needs one `low_latency_combine_recv`, on every rank in the same order.

    Args, Raises: as `low_latency_combine`.
    """
    if isinstance(plan, LowLatencyPlan) and plan.rail is not None:
        rail = _check_rail("ep::low_latency_combine", "plan.rail", plan.rail)
        return low_latency_combine_send(y, plan._replace(rail=None), after=after)._replace(rail=rail)
    arguments = _check_combine_arguments(y, plan, None, after)
    *_, num_experts, world_size, group_name = arguments
    status, data = torch.ops.ep.low_latency_combine_send(*arguments, after)
    return InFlightCombine(
        status=status,
        data=data,
        topk_idx=plan.topk_idx,
        hidden=y.shape[2],
        dtype=y.dtype,
        num_experts=num_experts,
        world_size=world_size,
        group_name=group_name,
    )


def low_latency_combine_recv(
    in_flight: InFlightCombine, *, statistics: LowLatencyStatistics | None = None, after: Tensor | None = None
) -> Tensor:
    """The second half of `low_latency_combine`. Collective; returns and raises as the whole operator does.

    Args:
        in_flight: what the send returned.
        statistics: as for the whole operator.
        after: any tensor that must exist before this half waits, such as the result of the work that overlaps.
    """
    op = "ep::low_latency_combine_recv"
    if isinstance(in_flight, InFlightCombine) and in_flight.rail is not None:
        rail = _check_rail(op, "in_flight.rail", in_flight.rail)
        of_node = _of_node(op, statistics, rail, in_flight)
        sums = low_latency_combine_recv(in_flight._replace(rail=None), statistics=of_node, after=after)
        return combine(sums, rail)
    _check_in_flight(op, in_flight, InFlightCombine, statistics, after)
    *arguments, _ = in_flight
    out, wait_ns = torch.ops.ep.low_latency_combine_recv(*arguments, after)
    if statistics is not None:
        statistics.wait_ns.add_(wait_ns)
    return out
