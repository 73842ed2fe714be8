"""The plan: the source and destination of every row, as plain tensors."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Layout", "Plan"]

Layout = Literal["rank_major", "expert_major"]


class Plan(NamedTuple):
    """Where every token of every rank goes, from this rank's point of view.

    Save it, pass it through a graph, use it as often as you like; for a fixed plan `dispatch` and `combine` are linear
    and each other's transpose. In the shapes, `T` is this rank's number of tokens, `K` experts per token, `W` ranks,
    `L` local experts, `R` rows that `dispatch` returns. A slot is a position in a token's row of `topk_idx`.

    On a grid of nodes (`torch_ep.init(ranks_per_node=)`), `rail` plans the exchange between nodes. The other fields
    plan the exchange inside this rank's node: `W` counts the ranks of the node, and `T` the rows that this rank relays.

    Attributes:
        send_row: [T, K] int32. The sent row that carries the token for this slot, counted over all rows that this
            rank sends; -1 for no expert.
        send_counts: [W] int32. Rows sent to each rank.
        recv_counts: [W] int32. Rows received from each rank, dropped rows included.
        recv_topk_idx: [R, K], dtype of `topk_idx`. Local expert of each slot of a received row, or -1. None for layout
            expert_major.
        recv_pair: [R] int32. Which received (row, slot) pair, row * K + slot, or -1 for padding. None for layout
            rank_major.
        offsets: int32. expert_major: [L], where each expert's group of rows ends, as `grouped_mm` takes it.
            rank_major: [W], where the group of rows of each source rank ends.
        tokens_per_expert: [L] int32. Rows of each local expert, without padding and dropped rows.
        num_dropped: [] int32. Overflow: rows dropped because they exceed `capacity`, and on a grid of nodes rows that
            this rank did not relay because they exceed `max_relay_rows`.
        layout: "rank_major" or "expert_major".
        group_name: name of the ranks' group, "" for one rank.
        rail: on a grid of nodes, the plan of the exchange among the ranks that have this rank's position in their
            nodes. Layout rank_major: one row per (token, node). Else None.
    """

    send_row: Tensor
    send_counts: Tensor
    recv_counts: Tensor
    recv_topk_idx: Tensor | None
    recv_pair: Tensor | None
    offsets: Tensor
    tokens_per_expert: Tensor
    num_dropped: Tensor
    layout: Layout
    group_name: str
    rail: Plan | None = None

    @property
    def num_rows(self) -> int:
        """R: rows that `dispatch` returns and `combine` takes."""
        return _recv_map(self).shape[0]

    def local_expert_of_rows(self) -> Tensor:
        """The local expert, 0 to L - 1, of each received row; -1 for none. Does not synchronize with the device.

        `to_sentinel` replaces the -1 where a kernel or framework wants another number.

        Returns:
            expert_major: [R] int32, -1 for rows of padding, within a group and past the last. rank_major: [R, K], the
            field `recv_topk_idx`.
        """
        recv_map = _recv_map(self)
        if self.layout == "rank_major":
            return recv_map
        rows = torch.arange(recv_map.shape[0], dtype=torch.int32, device=recv_map.device)
        expert = torch.searchsorted(self.offsets, rows, right=True, out_int32=True)
        return expert.masked_fill(recv_map < 0, -1)

    @property
    def padded_tokens_per_expert(self) -> Tensor:
        """[L] int32: rows of each local expert, padding included. Does not synchronize with the device.

        expert_major: the sizes of the groups that `offsets` ends. rank_major has no padding: `tokens_per_expert`.
        """
        if self.layout == "rank_major":
            return self.tokens_per_expert
        return self.offsets.diff(prepend=self.offsets.new_zeros(1))


def _recv_map(plan: Plan) -> Tensor:
    """recv_topk_idx for layout rank_major, recv_pair for layout expert_major."""
    recv_map = plan.recv_topk_idx if plan.layout == "rank_major" else plan.recv_pair
    if recv_map is None:
        name = "recv_topk_idx" if plan.layout == "rank_major" else "recv_pair"
        raise ValueError(f"torch_ep: expected a plan of layout {plan.layout!r} to have {name}, got None")
    return recv_map
