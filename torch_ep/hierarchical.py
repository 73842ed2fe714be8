"""plan, dispatch and combine on a grid of nodes: products of an exchange over the rail and one inside the node.

    plan        rail: one row per (token, node), layout rank_major. node: of these rows, in the layout asked for.
    dispatch    D = D_node * D_rail
    combine     D^T = D_rail^T * D_node^T

Fakes, derivatives and compiled graphs follow from those of the two operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from . import meta
from .checks import first_in_dynamo, refuse
from .comm import Communicator
from .plan import Layout, Plan

__all__ = ["HierarchicalPlan"]


class HierarchicalPlan(NamedTuple):
    """A plan on a grid of nodes: `torch_ep.plan` returns it for a group whose `init` made a grid.

    Its other attributes are those of a `Plan` that tell of the rows of this rank: `Plan` describes them. Rows of one
    source are ordered by (position in the node, node, token).

    Attributes:
        rail: what this rank sends to its counterparts in all nodes, and receives from them to relay: one row per
            (token, node). Layout rank_major.
        node: what this rank sends inside its node of the rows that it relays, and receives from there.
        group_name: name of the group of all ranks.
    """

    rail: Plan
    node: Plan
    group_name: str

    @property
    def layout(self) -> Layout:
        return self.node.layout

    @property
    def num_rows(self) -> int:
        """Rows that `dispatch` returns and `combine` takes."""
        return self.node.num_rows

    @property
    def recv_topk_idx(self) -> Tensor | None:
        return self.node.recv_topk_idx

    @property
    def recv_pair(self) -> Tensor | None:
        """[R] int32. Which received (row, slot) pair of the exchange inside the node, or -1 for padding."""
        return self.node.recv_pair

    @property
    def offsets(self) -> Tensor:
        """As `Plan.offsets`. rank_major: [ranks of a node], where the rows of each relaying rank end."""
        return self.node.offsets

    @property
    def tokens_per_expert(self) -> Tensor:
        return self.node.tokens_per_expert

    @property
    def padded_tokens_per_expert(self) -> Tensor:
        return self.node.padded_tokens_per_expert

    @property
    def num_dropped(self) -> Tensor:
        """[] int32. Rows dropped on this rank, as a relay beyond `max_relay_rows`, or beyond `capacity`."""
        return self.rail.num_dropped + self.node.num_dropped

    def local_expert_of_rows(self) -> Tensor:
        return self.node.local_expert_of_rows()


def make_plan(
    plan: Callable[..., Any],
    communicator: Communicator,
    topk_idx: Tensor,
    layout: Layout,
    num_experts: int,
    capacity: int | None,
    alignment: int,
    after: Tensor | None,
) -> HierarchicalPlan:
    """`plan` by two plans. All arguments are checked before the first exchange, which would tell of a part alone."""
    try:
        meta.check_plan_options(num_experts, layout, alignment, capacity, communicator.world_size)
    except (TypeError, ValueError) as error:
        raise first_in_dynamo(error) from None
    rail, node, relay_rows = communicator.rail, communicator.node, None
    assert rail is not None and node is not None
    if capacity is not None:
        relay_rows = communicator.max_relay_rows
        if relay_rows is None:
            refuse(
                ValueError,
                "ep::plan: expected torch_ep.init with max_relay_rows or max_tokens_per_rank for a plan with a "
                "capacity on a grid of nodes, got neither",
            )
    first = plan(topk_idx, num_experts, rail.group_name, layout="rank_major", capacity=relay_rows, after=after)
    second = plan(
        first.recv_topk_idx,
        num_experts // rail.world_size,
        node.group_name,
        layout=layout,
        capacity=capacity,
        alignment=alignment,
    )
    return HierarchicalPlan(first, second, communicator.group_name)


def dispatch(
    dispatch: Callable[..., Any],
    x: Tensor,
    plan: HierarchicalPlan,
    topk_weights: Tensor | None,
    scales: Tensor | None,
    after: Tensor | None,
) -> Any:
    names = [name for name, t in (("topk_weights", topk_weights), ("scales", scales)) if t is not None]
    relayed = dispatch(x, plan.rail, topk_weights=topk_weights, scales=scales, after=after)
    rows, *others = relayed if names else (relayed,)
    return dispatch(rows, plan.node, **dict(zip(names, others, strict=True)))


def combine(
    combine: Callable[..., Any],
    y: Tensor,
    plan: HierarchicalPlan,
    row_weights: Tensor | None,
    topk_weights: Tensor | None,
    after: Tensor | None,
) -> Any:
    sums = combine(y, plan.node, row_weights=row_weights, topk_weights=topk_weights, after=after)
    if topk_weights is None:
        return combine(sums, plan.rail)
    return combine(sums[0], plan.rail, topk_weights=sums[1])
