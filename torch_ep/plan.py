"""The plan: who sends what where, as plain tensors."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

__all__ = ["Layout", "Plan"]

Layout = Literal["rank_major", "expert_major"]


class Plan(NamedTuple):
    """Where every token of every rank goes, from this rank's point of view.

    `T` is this rank's number of tokens, `K` experts a token, `W` ranks, `L` local experts, `R` received rows. All
    tensors are int32 but for `recv_topk_idx`, which has the dtype of `topk_idx`. Save it, pass it through a graph,
    use it as often as you like; for a fixed plan `dispatch` and `combine` are linear and each other's transpose.
    """

    #: [T, K] the row, among all that this rank sends, that carries the token for this slot; -1 for no expert.
    send_slot: Tensor
    #: [W] rows sent to each rank.
    send_counts: Tensor
    #: [W] rows that come from each rank, dropped ones included.
    recv_counts: Tensor
    #: rank_major only: [R, K] local expert of each slot of a received row, or -1.
    recv_topk_idx: Tensor | None
    #: expert_major only: [R] which received (row, slot) pair, row * K + slot, or -1 for padding.
    recv_slot: Tensor | None
    #: expert_major: [L] where each expert's group of rows ends, as `grouped_mm` takes it. rank_major: [W] likewise for
    #: the groups of rows of each source rank.
    offsets: Tensor
    #: [L] rows of each local expert, without padding and without dropped ones.
    tokens_per_expert: Tensor
    #: [] rows that found no place within `capacity`.
    num_dropped: Tensor
    layout: Layout
    group_name: str

    @property
    def num_rows(self) -> int:
        """R: rows that `dispatch` returns and `combine` takes."""
        return _recv_map(self).shape[0]


def _recv_map(plan: Plan) -> Tensor:
    """The one of recv_topk_idx and recv_slot that the layout has."""
    recv_map = plan.recv_topk_idx if plan.layout == "rank_major" else plan.recv_slot
    if recv_map is None:
        name = "recv_topk_idx" if plan.layout == "rank_major" else "recv_slot"
        raise ValueError(f"torch_ep: expected a plan of layout {plan.layout!r} to have {name}, got None")
    return recv_map
