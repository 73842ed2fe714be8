"""The Mixture-of-Experts layer that users start from."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Generator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..comm import Group
from ..halves import InFlightRows, combine_recv, combine_send, dispatch_recv, dispatch_send, order_after
from ..low_latency import LowLatencyStatistics, Quantize, low_latency_combine, low_latency_dispatch
from ..ops import combine, dispatch, plan
from ..plan import Layout, Plan, _recv_map
from .checks import check_int
from .feed_forward import Activation, check_activation, feed_forward
from .grouped_mm import grouped_mm
from .groups import RankGroup, data_parallel_groups, groups_of
from .initialization import new_values
from .marks import regroup
from .router_stats import RouterStats, checkpointable
from .routing import check_expert_groups, group_limited_topk
from .sharding import mark_experts

__all__ = ["MoE"]


_GROUP_CHANNELS = 128  # that share a scale, in quantized rows

_OP = "torch_ep.nn.MoE"  # in messages
# Names of earlier versions, in which `shared_expert` was `shared`.
_RENAMED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def _autocasts(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _autocast_dtype(t: Tensor) -> torch.dtype:
    """In which a matrix product takes `t`: autocast's, which leaves float64 alone; without autocast t's own."""
    if t.is_floating_point() and t.dtype != torch.float64 and _autocasts(t.device.type):
        return torch.get_autocast_dtype(t.device.type)
    return t.dtype


def _autocast(t: Tensor) -> Tensor:
    dtype = _autocast_dtype(t)
    return t if t.dtype == dtype else t.to(dtype)


def _local(t: Tensor) -> Tensor:
    """This rank's experts where `distribute_experts` has made them a DTensor."""
    return t.to_local() if isinstance(t, DTensor) else t


def _dequantize(rows: Tensor, scales: Tensor, *, dtype: torch.dtype) -> Tensor:
    """[L, C, H] of `dtype` from what a quantized `low_latency_dispatch` returns, whichever kind of scales it has."""
    if scales.dtype == torch.int32:  # four exponents in a word: a float32's bits, but for their place
        shift = torch.arange(0, 32, 8, dtype=torch.int32, device=scales.device)
        exponents = ((scales[..., None] >> shift) & 0xFF).flatten(-2)
        scales = (exponents << 23).view(torch.float32)
    hidden, groups = rows.shape[-1], scales.shape[-1]
    # Whole groups: with fewer channels, Inductor's loops for CPU leave out the last, incomplete one (torch 2.13).
    wide = F.pad(rows.float(), (0, groups * _GROUP_CHANNELS - hidden)).unflatten(-1, (groups, _GROUP_CHANNELS))
    return (wide * scales[..., None]).flatten(-2)[..., :hidden].to(dtype)


def _in_compiled_code(after: Tensor) -> Tensor | None:
    """An argument `after`, which eager code does not need: its gradient would cost a pass over memory."""
    return after if torch.compiler.is_compiling() else None


def _scale(rows: Tensor, weights: Tensor) -> Tensor:
    """Each row times its weight, rounded once."""
    return (rows * weights[..., None]).to(rows.dtype)


@functools.cache  # one warning per name
def _warn_renamed(old: str) -> None:
    message = f"{_OP}.{old} is deprecated: use {_RENAMED[old]}, the same parameter"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


class SharedExpert(nn.Module):
    """The expert that every token visits: `down_proj(activation(gate_proj(x), up_proj(x)))`."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        *,
        bias: bool = False,
        activation: str | Activation = "silu",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        kwargs = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(hidden, intermediate, **kwargs)
        self.up_proj = nn.Linear(hidden, intermediate, **kwargs)
        self.down_proj = nn.Linear(intermediate, hidden, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, lambda t, name: getattr(self, name)(t), self.activation)


class MoE(nn.Module):
    """A Mixture-of-Experts feed-forward layer whose experts are spread over a group of ranks.

    `forward(x)` returns `(y, RouterStats)`, y of x's shape. Gradients of the experts are complete on the rank that
    holds them; those of the router and the shared expert are of this rank's tokens and want the reduction that the
    rest of the model gets. Parameters start the same whatever the world size, given the same random seed.

    Under `torch.autocast` rows travel and experts multiply in autocast's dtype, and y has it; the router stays in
    float32 at least.

    Args:
        hidden: size of a token.
        intermediate: inner size of an expert: `activation(x @ gate_proj, x @ up_proj) @ down_proj`. None with
            `experts_fn`.
        num_experts: over all ranks; a multiple of the world size.
        num_topk: experts per token.
        group: ranks that share the experts, as in `torch_ep.plan`; `torch_ep.init` it first. None: the default group.
        score: "softmax" over the experts, or "sigmoid" of each.
        normalize: whether the chosen scores of a token are scaled to the sum of 1. With "softmax" they are then the
            softmax over the chosen logits, as in Mixtral and gpt-oss.
        route_scale: factor on the weights after that.
        num_expert_groups, num_topk_groups: a token's experts come from `num_topk_groups` of `num_expert_groups` groups
            of consecutive experts, as in DeepSeek's node-limited routing: see `group_limited_topk`. 1: no groups.
        group_score_topk: experts whose scores sum to the score of a group. None: 2 with a selection bias, as in
            DeepSeek-V3, and 1 without, as in DeepSeek-V2.
        selection_bias: adds a bias to the scores for the choice alone, moved by `update_selection_bias` (loss-free
            balancing, arXiv:2408.15664).
        shared_intermediate: inner size of an expert that every token visits, here on its own rank; 0 for none.
        bias: adds a bias to the router's logits and to the projections of every expert, the shared one included, but
            not in `experts_fn`.
        activation: what is between the projections of every expert, the shared one included. "silu" (SwiGLU) and "gelu"
            (GEGLU, by the error function): that function of gate, times up. "swigluoai": the clamped SwiGLU of gpt-oss,
            as `torch_ep.nn.swigluoai`. Or any function of `(gate, up)`, both [rows, intermediate] in `forward` and
            [L, rows, intermediate] in `decode`; rows of padding hold anything.
        experts_fn: a function or module to call in place of these experts, with the arguments and the result of
            `experts`. The layer then has no parameters of experts itself. `decode` calls it too: see `decode_experts`.
            The parameters and buffers of such a module are marked as experts, spread over `group` along dimension 0:
            see `mark_expert_parameters`. Before passing the module, mark those that are spread otherwise, or
            replicated (group ""): marks that are there stay.
        scale_before_experts: whether weights multiply the rows that go into the experts, as in Llama 4, and not those
            that come out of them.
        layout, capacity, alignment: as in `torch_ep.plan`. `capacity` is for all local experts together.
            "expert_major" fills it expert by expert, padding included: the last experts lose rows first. "rank_major"
            fills it source rank by source rank: tokens of the last ranks do, for every expert here.
        overlap: number of chunks into which `forward` splits this rank's tokens, so that the exchanges of one chunk
            overlap with the experts of another, and the shared expert with the first dispatch; backward too. The same
            on every rank. `capacity` is per chunk. 0: whole exchanges of all tokens. 1: no chunks, only the shared
            expert overlaps. docs/overlap.md says where it pays.

    Parameters:
        router: [num_experts, hidden].
        gate_proj, up_proj: [L, hidden, intermediate], of the L = num_experts / world size experts of this rank. Most
            Hugging Face models and `nn.Linear` store the transpose, [out, in] per expert: see docs/coming_from.md.
        down_proj: [L, intermediate, hidden].
        shared_expert.gate_proj, .up_proj, .down_proj: `nn.Linear`, if there is a shared expert.
        router_bias: [num_experts], and gate_proj_bias, up_proj_bias: [L, intermediate], down_proj_bias: [L, hidden],
            all zero at first; None without `bias`.

    Raises:
        ValueError, TypeError: an argument is out of range or of another type.
        ValueError (`forward`): x is not of [..., hidden].
        TypeError (`forward`): x is not of the experts' dtype.
    """

    #: Parameters with a first dimension of experts, spread over the ranks.
    EXPERT_PARAMETERS: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")

    overlap: int = 0  # in layers pickled by earlier versions

    router_bias: nn.Parameter | None
    selection_bias: Tensor | None

    def __init__(
        self,
        hidden: int,
        intermediate: int | None,
        num_experts: int,
        num_topk: int,
        *,
        group: Group = None,
        score: Literal["softmax", "sigmoid"] = "softmax",
        normalize: bool = True,
        route_scale: float = 1.0,
        num_expert_groups: int = 1,
        num_topk_groups: int = 1,
        group_score_topk: int | None = None,
        selection_bias: bool = False,
        shared_intermediate: int = 0,
        bias: bool = False,
        activation: str | Activation = "silu",
        experts_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        scale_before_experts: bool = False,
        layout: Layout = "expert_major",
        capacity: int | None = None,
        alignment: int = 1,
        overlap: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._group, self._replicas = RankGroup(group), data_parallel_groups(group)
        self.world_size = self._group.size
        check_int(_OP, "hidden", hidden, 1)
        check_int(_OP, "num_experts", num_experts, 1)
        if num_experts % self.world_size:
            raise ValueError(
                f"{_OP}: expected num_experts to be a multiple of the world size {self.world_size}, got {num_experts}"
            )
        check_int(_OP, "num_topk", num_topk, 1, num_experts)
        check_int(_OP, "num_expert_groups", num_expert_groups, 1, num_experts)
        if group_score_topk is None:
            group_score_topk = min(2 if selection_bias else 1, num_experts // num_expert_groups)
        check_expert_groups(_OP, num_experts, num_topk, num_expert_groups, num_topk_groups, group_score_topk)
        check_int(_OP, "shared_intermediate", shared_intermediate, 0)
        check_int(_OP, "overlap", overlap, 0)
        if score not in ("softmax", "sigmoid"):
            raise ValueError(f"{_OP}: expected score 'softmax' or 'sigmoid', got {score!r}")
        if not (experts_fn is None or callable(experts_fn)):
            got = type(experts_fn).__name__
            raise TypeError(f"{_OP}: expected experts_fn to be a function of (rows, offsets) or None, got {got}")
        check_activation(_OP, activation)
        self.activation, self.scale_before_experts = activation, scale_before_experts
        self.hidden, self.intermediate = hidden, intermediate
        self.num_experts, self.num_topk = num_experts, num_topk
        self.num_local_experts = num_experts // self.world_size
        self.score, self.normalize, self.route_scale = score, normalize, route_scale
        self.num_expert_groups, self.num_topk_groups = num_expert_groups, num_topk_groups
        self.group_score_topk = group_score_topk
        self.layout, self.capacity, self.alignment = layout, capacity, alignment
        self.overlap = overlap
        self._check_exchange()

        kwargs = {"device": device, "dtype": dtype}
        self.router = nn.Parameter(torch.empty(num_experts, hidden, **kwargs))
        self.experts_fn = experts_fn
        if experts_fn is None:
            self._make_experts(intermediate, bias, **kwargs)
        else:
            self.EXPERT_PARAMETERS = ()
        self.register_parameter("router_bias", nn.Parameter(torch.empty(num_experts, **kwargs)) if bias else None)
        zeros = torch.zeros(num_experts, device=device, dtype=torch.float32) if selection_bias else None
        self.register_buffer("selection_bias", zeros)
        mark_experts(self, self._group, self.EXPERT_PARAMETERS)
        if isinstance(experts_fn, nn.Module):
            mark_experts(experts_fn, self._group, None, replace=False)
        self.reset_parameters()  # before those of modules inside, as loops over `modules()` do
        self.shared_expert = None
        if shared_intermediate:
            self.shared_expert = SharedExpert(hidden, shared_intermediate, bias=bias, activation=activation, **kwargs)

    @property
    def group_name(self) -> str:
        """Name of the group that shares the experts; "" for one rank."""
        return self._group.name

    @group_name.setter
    def group_name(self, name: str) -> None:
        self.set_group(name)

    def set_group(self, group: Group) -> None:
        """Exchanges over another group from now on: in another process, a pickled layer does not have its own.

        Raises:
            ValueError: this is another rank in that group, so that the layer has the experts of another rank.
        """
        new = RankGroup(group)
        if new.position != self._group.position:
            (rank, size), (new_rank, new_size) = self._group.position, new.position
            raise ValueError(
                f"torch_ep.nn.MoE.set_group: expected a group where this is rank {rank} of {size}, whose experts the "
                f"layer has, got one where it is rank {new_rank} of {new_size}: make a new layer, and load the state "
                "of torch_ep.nn.full_state_dict(layer) into it"
            )
        regroup(self, self._group, new)
        self._group, self._replicas = new, data_parallel_groups(group) or self._replicas
        mark_experts(self, self._group, self.EXPERT_PARAMETERS)

    def _make_experts(self, intermediate: int | None, bias: bool, **kwargs: Any) -> None:
        intermediate = check_int(_OP, "intermediate", intermediate, 1)
        num_local_experts, hidden = self.num_local_experts, self.hidden
        self.gate_proj = nn.Parameter(torch.empty(num_local_experts, hidden, intermediate, **kwargs))
        self.up_proj = nn.Parameter(torch.empty(num_local_experts, hidden, intermediate, **kwargs))
        self.down_proj = nn.Parameter(torch.empty(num_local_experts, intermediate, hidden, **kwargs))
        for name in self.EXPERT_PARAMETERS:
            shape = num_local_experts, getattr(self, name).shape[2]
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(shape, **kwargs)) if bias else None)
        if bias:
            self.EXPERT_PARAMETERS += tuple(f"{name}_bias" for name in self.EXPERT_PARAMETERS)

    def _check_exchange(self) -> None:
        """Raises what `plan` would raise in the first forward pass."""
        if self.layout not in ("rank_major", "expert_major"):
            raise ValueError(f"{_OP}: expected layout 'rank_major' or 'expert_major', got {self.layout!r}")
        check_int(_OP, "alignment", self.alignment, 1)
        if self.capacity is None:
            return
        check_int(_OP, "capacity", self.capacity, 0)
        if self.layout == "expert_major" and self.capacity % self.alignment:
            raise ValueError(
                f"{_OP}: expected a capacity that is a multiple of the alignment {self.alignment}, got {self.capacity}"
            )
        expanded = self._local_capacity()
        if self.layout == "rank_major" and expanded is not None and expanded >= 2**31:
            raise ValueError(
                f"{_OP}: expected a capacity whose rows take fewer than 2**31 rows of this rank's experts, "
                f"got {self.capacity}, which takes {expanded}"
            )

    @property
    def gate(self) -> nn.Parameter:
        """Deprecated: `gate_proj`."""
        _warn_renamed("gate")
        return self.gate_proj

    @property
    def up(self) -> nn.Parameter:
        """Deprecated: `up_proj`."""
        _warn_renamed("up")
        return self.up_proj

    @property
    def down(self) -> nn.Parameter:
        """Deprecated: `down_proj`."""
        _warn_renamed("down")
        return self.down_proj

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(fan-in), biases of zeros. Draws every rank's experts and keeps its own."""
        bound, rank = 1 / math.sqrt(self.hidden), self._group.rank
        with new_values(self, "router") as router:
            router.uniform_(-bound, bound)
        if self.router_bias is not None:
            with new_values(self, "router_bias") as bias:
                bias.zero_()
        for name in self.EXPERT_PARAMETERS:
            with new_values(self, name) as weight:
                if name.endswith("_bias"):
                    weight.zero_()
                    continue
                bound = 1 / math.sqrt(weight.shape[1])
                draw = torch.empty_like(weight[0])
                for expert in range(self.num_experts):
                    draw.uniform_(-bound, bound)
                    if expert // self.num_local_experts == rank:
                        weight[expert % self.num_local_experts] = draw
        if self.selection_bias is not None:
            self.selection_bias.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoE:
        """The bias stays in float32, where small updates still move it; it goes to another device with the rest."""
        bias = self.selection_bias
        super()._apply(fn, recurse)
        if bias is not None and self.selection_bias is not None and self.selection_bias.dtype != torch.float32:
            self.selection_bias = bias.to(self.selection_bias.device, torch.float32)
        return self

    def _choose(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """topk_idx, topk_weights [num_tokens, num_topk]; the scores [num_tokens, num_experts] behind them."""
        if _autocasts(x.device.type):  # a logit of few bits is another choice
            with torch.autocast(x.device.type, enabled=False):
                return self._choose(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), self.router.to(wide))
        if self.router_bias is not None:
            logits = logits + self.router_bias.to(wide)
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        choice = scores if self.selection_bias is None else scores + self.selection_bias
        if self.num_expert_groups == 1:
            topk_idx = choice.detach().topk(self.num_topk, dim=-1).indices
        else:
            groups = self.num_expert_groups, self.num_topk_groups
            topk_idx = group_limited_topk(
                choice.detach(), self.num_topk, *groups, group_score_topk=self.group_score_topk
            )
        weights = scores.gather(1, topk_idx)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
        return topk_idx, weights * self.route_scale, scores

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """topk_idx, topk_weights [num_tokens, num_topk], aux_loss [], tokens_per_expert [num_experts] of this rank."""
        topk_idx, weights, scores = self._choose(x)
        wide = scores.dtype
        flat = topk_idx.flatten()
        load = torch.zeros(self.num_experts, dtype=torch.int64, device=x.device).scatter_add(
            0, flat, torch.ones_like(flat)
        )
        shares = scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)
        tokens = load.sum().clamp_min(1).to(wide) / self.num_topk  # a tensor: no rank may fail for having no tokens
        aux_loss = self.num_experts * ((load.to(wide) / self.num_topk / tokens) * (shares.sum(0) / tokens)).sum()
        return topk_idx, weights, aux_loss, load

    def experts(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Applies each local expert to its group of rows: what to override, or to replace by `experts_fn`.

        Args:
            rows: [R, hidden]. Rows of padding are zero in `forward`; what becomes of them is not read.
            offsets: [L] int32, on the device: where each local expert's rows end. Rows past the last are padding.

        Returns:
            [R, hidden], contiguous: the result of every row, by its own expert.
        """
        if self.experts_fn is not None:
            return self._call_experts_fn(self.experts_fn, rows, offsets)

        def project(t: Tensor, name: str) -> Tensor:
            bias = getattr(self, f"{name}_bias")
            bias = None if bias is None else _autocast(_local(bias))
            return grouped_mm(t, _autocast(_local(getattr(self, name))), offsets, bias=bias)

        return feed_forward(rows, project, self.activation)

    def _call_experts_fn(self, experts_fn: Callable[[Tensor, Tensor], Tensor], rows: Tensor, offsets: Tensor) -> Tensor:
        if isinstance(experts_fn, nn.Module):
            # A DTensor of all ranks' experts, as `distribute_experts` makes them, does not multiply with plain rows.
            ranks = self._group.ranks
            own = {
                name: p.to_local()
                for name, p in experts_fn.named_parameters()
                if isinstance(p, DTensor) and tuple(p.device_mesh.mesh.flatten().tolist()) == ranks
            }
            if own:
                return torch.func.functional_call(experts_fn, own, (rows, offsets))
        return experts_fn(rows, offsets)

    def _tokens(self, x: Tensor) -> Tensor:
        """x as [num_tokens, hidden], contiguous."""
        if x.shape[-1:] != (self.hidden,):
            raise ValueError(f"{_OP}: expected x of [..., {self.hidden}], got {list(x.shape)}")
        tokens = x.reshape(-1, self.hidden)
        # `is_contiguous` depends on whether there is one token: more than the compiler knows of marked ones.
        return tokens if tokens.stride() == (self.hidden, 1) else tokens.contiguous()

    def _payload(self, tokens: Tensor) -> Tensor:
        """The tokens in the dtype in which experts multiply."""
        payload = _autocast(tokens)
        dtype = payload.dtype if self.experts_fn is not None else _autocast_dtype(self.gate_proj)
        if payload.dtype != dtype:
            raise TypeError(f"{_OP}: expected x of {dtype}, the experts' dtype, got {payload.dtype}")
        return payload

    def _local_capacity(self) -> int | None:
        """rank_major with a capacity: rows for every expert here that the received rows could name, so none drops."""
        if self.capacity is None:
            return None
        rows = self.capacity * min(self.num_topk, self.num_local_experts) + self.num_local_experts * (
            self.alignment - 1
        )
        return -(-rows // self.alignment) * self.alignment

    def forward(self, x: Tensor) -> tuple[Tensor, RouterStats]:
        if self.overlap:
            return self._forward_in_chunks(x)
        tokens = self._tokens(x)
        topk_idx, weights, aux_loss, load = self.route(tokens)
        tokens = self._payload(tokens)
        p = self._plan(topk_idx)
        rows, row_weights = dispatch(tokens, p, topk_weights=weights)
        y = self._experts_of_plan(rows, row_weights, p, combine)
        stats = RouterStats(aux_loss, load, p.num_dropped)
        return self._with_shared(y, tokens).view(x.shape), checkpointable(stats, self.router.requires_grad)

    # Note [Chunks]
    # Per chunk i: send its dispatch D(i), receive it, run the experts, send its combine C(i), receive it. The order,
    # for three chunks:
    #
    #     send D(0), shared expert, send D(1), receive D(0), experts 0, send C(0),
    #     send D(2), receive D(1), experts 1, send C(1), receive C(0),
    #     receive D(2), experts 2, send C(2), receive C(1), receive C(2)
    #
    # At most two exchanges of each kind are in flight. The backward runs in the reverse order, in which receive D(i)
    # becomes send C(i), and so on. In compiled code every step depends on the one before, forward and backward: all
    # ranks then exchange in the same order. Eager code runs in its order, so there nothing pays for the dependences.

    def _forward_in_chunks(self, x: Tensor) -> tuple[Tensor, RouterStats]:
        tokens = self._tokens(x)
        topk_idx, weights, aux_loss, load = self.route(tokens)
        tokens = self._payload(tokens)
        chunks = list(zip(*(t.tensor_split(self.overlap) for t in (tokens, topk_idx, weights)), strict=True))
        y: list[Tensor] = []
        in_flight = self._send(*chunks[0])
        shared = None if self.shared_expert is None else self.shared_expert(order_after(tokens, in_flight[0]))
        last = in_flight[0].ticket if shared is None else shared
        num_dropped = in_flight[1].num_dropped
        returning: tuple[InFlightRows, Plan] | None = None
        for chunk in (*chunks[1:], None):
            sent, p = in_flight
            if chunk is not None:
                in_flight = self._send(*chunk, after=_in_compiled_code(last))
                last = in_flight[0].ticket
                num_dropped = num_dropped + in_flight[1].num_dropped
            rows, row_weights = dispatch_recv(sent, p, after=_in_compiled_code(last))
            returned = self._experts_of_plan(rows, row_weights, p, combine_send)
            last = returned.ticket
            if returning is not None:
                y.append(combine_recv(*returning, after=_in_compiled_code(last)))
                last = y[-1]
            returning = returned, p
        assert returning is not None
        y.append(combine_recv(*returning, after=_in_compiled_code(last) if len(y) else None))
        whole = y[0] if len(y) == 1 else torch.cat(y)
        whole = whole if shared is None else whole + shared
        stats = RouterStats(aux_loss, load, num_dropped)
        return whole.view(x.shape), checkpointable(stats, self.router.requires_grad)

    def steps(self, x: Tensor) -> Generator[None, None, tuple[Tensor, RouterStats]]:
        """`forward` as a generator, which yields where an exchange is in flight: see `interleave`. Eager code only.

        Returns:
            What `forward` returns, with `overlap` 1, by `yield from` or `interleave`.

        Raises:
            ValueError, TypeError: as `forward`.
        """
        tokens = self._tokens(x)
        topk_idx, weights, aux_loss, load = self.route(tokens)
        tokens = self._payload(tokens)
        sent, p = self._send(tokens, topk_idx, weights)
        yield
        rows, row_weights = dispatch_recv(sent, p)
        returned = self._experts_of_plan(rows, row_weights, p, combine_send)
        yield
        y = combine_recv(returned, p)
        stats = RouterStats(aux_loss, load, p.num_dropped)
        return self._with_shared(y, tokens).view(x.shape), checkpointable(stats, self.router.requires_grad)

    def _plan(self, topk_idx: Tensor, after: Tensor | None = None) -> Plan:
        return plan(
            topk_idx,
            self.num_experts,
            self.group_name,
            layout=self.layout,
            capacity=self.capacity,
            alignment=1 if self.layout == "rank_major" else self.alignment,
            after=after,
        )

    def _send(
        self, tokens: Tensor, topk_idx: Tensor, weights: Tensor, *, after: Tensor | None = None
    ) -> tuple[InFlightRows, Plan]:
        p = self._plan(topk_idx, after)
        return dispatch_send(tokens, p, topk_weights=weights, after=after), p

    def _experts_of_plan(self, rows: Tensor, weights: Tensor, p: Plan, give_back: Callable) -> Any:
        """Runs the experts, and returns their results by `give_back`: `combine` or `combine_send`."""
        if self.layout == "rank_major":
            # A row for each rank that a token visits; its experts here are one more dispatch, among this rank alone.
            local = plan(
                _recv_map(p),
                self.num_local_experts,
                "",
                capacity=self._local_capacity(),
                alignment=self.alignment,
            )
            expanded, expanded_weights = dispatch(rows, local, topk_weights=weights)
            return give_back(self._apply_experts(expanded, expanded_weights, local, combine), p)
        return self._apply_experts(rows, weights, p, give_back)

    def _apply_experts(self, rows: Tensor, weights: Tensor, p: Plan, give_back: Callable) -> Any:
        if self.scale_before_experts:
            return give_back(self.experts(_scale(rows, weights), p.offsets), p)
        return give_back(self.experts(rows, p.offsets), p, row_weights=weights)

    def _with_shared(self, y: Tensor, tokens: Tensor) -> Tensor:
        return y if self.shared_expert is None else y + self.shared_expert(tokens)

    def decode(
        self,
        x: Tensor,
        max_tokens_per_rank: int,
        *,
        active: Tensor | None = None,
        statistics: LowLatencyStatistics | None = None,
        quantize: Quantize | None = None,
    ) -> Tensor:
        """What `forward` says of a few tokens, by the low-latency exchanges. Collective; inference only.

        Shapes are static and nothing waits for the host, so that a step of a server is one graph. Every expert
        multiplies all rows that it has room for: many more than arrive, if `max_tokens_per_rank` is large. `layout`,
        `capacity` and `alignment` have no part in it, and nothing is dropped.

        Args:
            x: [..., hidden]; float32, bfloat16 or float16. Ranks may hold different numbers of tokens.
            max_tokens_per_rank: most tokens of a rank, the same on every rank.
            active: x's shape without hidden, bool: the other tokens visit no expert but the shared one. A server's idle
                slots; a rank that has nothing to do needs them in compiled code, since Inductor leaves out whatever has
                results of no elements, and the exchanges of no tokens are among that.
            statistics: counts the rows of each expert and the waits for each peer.
            quantize: how rows travel, as in `torch_ep.low_latency_dispatch`; they are widened again for the experts.

        Returns:
            y of x's shape.

        Raises:
            RuntimeError: gradients are wanted: call it under `torch.no_grad()`.
            ValueError, TypeError: as `forward`.
            ValueError, TypeError, torch.distributed.DistError: as `torch_ep.low_latency_dispatch`.
        """
        tokens = self._tokens(x)
        topk_idx, weights, _ = self._choose(tokens)
        tokens = self._payload(tokens)
        if active is not None:
            topk_idx = torch.where(active.reshape(-1, 1), topk_idx, -1)
        received, p = low_latency_dispatch(
            tokens,
            topk_idx,
            num_experts=self.num_experts,
            max_tokens_per_rank=max_tokens_per_rank,
            group=self.group_name,
            topk_weights=weights,
            quantize=quantize,
            statistics=statistics,
        )
        rows = received if quantize is None else _dequantize(*received, dtype=tokens.dtype)
        if self.scale_before_experts:
            rows = _scale(rows, p.row_weights)
            p = p._replace(row_weights=torch.ones_like(p.row_weights))
        y = low_latency_combine(self.decode_experts(rows, p.tokens_per_expert), p, statistics=statistics)
        return self._with_shared(y, tokens).view(x.shape)

    def decode_experts(self, rows: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """`experts` for the rows of `decode`: what to override for a GEMM that leaves out the rows that hold nothing.

        A layer with `experts_fn`, or with a method `experts` of its own, calls that for all rows, in groups of C.

        Args:
            rows: [L, C, hidden] for C = world size * max_tokens_per_rank.
            tokens_per_expert: [L] int32, on the device: how many rows of each expert hold a token, the first ones. The
                others are undefined, and what becomes of them is not read.

        Returns:
            [L, C, hidden], contiguous.
        """
        if self.experts_fn is not None or type(self).experts is not MoE.experts:
            offsets = torch.arange(1, rows.shape[0] + 1, dtype=torch.int32, device=rows.device) * rows.shape[1]
            return self.experts(rows.flatten(0, 1), offsets).unflatten(0, rows.shape[:2])

        def project(t: Tensor, name: str) -> Tensor:
            bias = getattr(self, f"{name}_bias")
            product = torch.bmm(t, _local(getattr(self, name)))
            return product if bias is None else product + _autocast(_local(bias))[:, None]

        return feed_forward(rows, project, self.activation)

    @torch.no_grad()
    def update_selection_bias(
        self, tokens_per_expert: Tensor, rate: float = 1e-3, *, group: Group | Literal["auto"] = "auto"
    ) -> None:
        """Moves the bias of every expert by `rate` towards an even load. Collective over the layer's group and `group`.

        Args:
            tokens_per_expert: [num_experts] of this rank, as `RouterStats` has it, or a sum over steps.
            rate: how far the bias of each expert moves.
            group: ranks with replicas of the layer, over which the load is summed as well, so that they keep one bias:
                the data-parallel group, or a DeviceMesh of any number of dimensions; it may include the layer's own
                group. "": no other ranks. "auto": the dimensions whose names begin with "dp" of the DeviceMesh of
                which the layer's group is another dimension.

        Raises:
            ValueError: tokens_per_expert has another shape, or rate is not finite. Raised on this rank alone: the
                others wait for it.
            RuntimeError: the layer has no selection bias.
        """
        if self.selection_bias is None:
            raise RuntimeError("torch_ep.nn.MoE: expected a layer made with selection_bias=True")
        if tokens_per_expert.shape != self.selection_bias.shape:
            raise ValueError(
                f"torch_ep.nn.MoE.update_selection_bias: expected tokens_per_expert of shape "
                f"{list(self.selection_bias.shape)}, one per expert of all ranks, got {list(tokens_per_expert.shape)}: "
                "pass tokens_per_expert of the layer's RouterStats"
            )
        if not math.isfinite(rate):
            raise ValueError(f"torch_ep.nn.MoE.update_selection_bias: expected a finite rate, got {rate}")
        replicas = self._replicas if group == "auto" else groups_of(group)
        load = tokens_per_expert.to(torch.float32)
        for ranks in (self._group, *replicas):
            load = ranks.all_reduce(load)
        if self.selection_bias.dtype != torch.float32:  # cast by what goes around `_apply`
            self.selection_bias = self.selection_bias.float()
        self.selection_bias += rate * torch.sign(load.mean() - load)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # In place, so that the shared expert gets its own: `load_state_dict` passes a copy of the caller's dict.
        for old, new in _RENAMED.items():
            for old_key, new_key in (
                (prefix + old, prefix + new),
                (f"{prefix}shared.{old}.weight", f"{prefix}shared_expert.{new}.weight"),
            ):
                if old_key in state_dict:
                    state_dict[new_key] = state_dict.pop(old_key)
        # Hooks take this rank's experts out of what comes: leave the caller's dict alone, except for modules inside.
        own = dict(state_dict)
        if isinstance(own.get(prefix + "selection_bias"), Tensor):
            own[prefix + "selection_bias"] = own[prefix + "selection_bias"].float()
        super()._load_from_state_dict(own, prefix, *args)
        state_dict.update((key, value) for key, value in own.items() if "." in key.removeprefix(prefix))

    def extra_repr(self) -> str:
        return (
            f"hidden={self.hidden}, intermediate={self.intermediate}, num_experts={self.num_experts}, "
            f"num_topk={self.num_topk}, world_size={self.world_size}, score={self.score}, layout={self.layout}, "
            f"capacity={self.capacity}"
        )
