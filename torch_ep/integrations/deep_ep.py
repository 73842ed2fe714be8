"""DeepEP's Python interface on torch_ep, for code that is written for the package `deep_ep`.

    from torch_ep.integrations import deep_ep

    deep_ep.install()  # before the first `import deep_ep`

Signatures are those of DeepEP 1.2.1 (`Buffer`) and of its later `ElasticBuffer` and `EPBuffer`. What has no counterpart
raises NotImplementedError. docs/integrations/deep_ep.md lists the differences call by call.

Note [Streams]
Everything runs on the current stream. A result is ready for whatever that stream runs next, so that an event that
`async_finish` returns only orders other streams. On a CPU events do nothing.

Note [Limits]
torch_ep's kernels need the limits of `torch_ep.init`, which DeepEP's constructors do not take. So they grow with the
calls. Arguments that DeepEP requires to be equal on all ranks keep this collective. The number of tokens of
`Buffer.dispatch` is not among them: `install(max_tokens_per_rank=)` states it.
"""

from __future__ import annotations

import importlib.machinery
import inspect
import sys
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from types import ModuleType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from .. import low_latency, ops
from ..comm import (
    Communicator,
    _arguments_of,
    active_ranks,
    communicators,
    destroy,
    init,
    mask_ranks,
    reset,
    resolve,
)
from ..grid import group_of_same_ranks
from ..plan import Plan

__all__ = [
    "Buffer",
    "Config",
    "EPBuffer",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "Handle",
    "LowLatencyHandle",
    "install",
    "topk_idx_t",
]

#: The dtype of indices. int32 works, too.
topk_idx_t = torch.int64

_VERSION = "1.2.1+torch.ep"
_ALIGNMENT = 2**21  # of the sizes of ElasticBuffer
_GROUP_TIMEOUT = timedelta(minutes=10)  # of making a group, in which no rank is missing
# Arguments of `install`, for `torch_ep.init`.
_options: dict[str, Any] = {}


class _Made:
    """The communicator that this module made or found for a group."""

    def __init__(self, communicator: Communicator, arguments: dict[str, Any], states_tokens: bool) -> None:
        self.communicator = communicator
        self.arguments = arguments
        #: Whether someone stated the most tokens per rank of `Buffer.dispatch`.
        self.states_tokens = states_tokens
        self.num_buffers = 0


_made: dict[str, _Made] = {}  # by group name


def _require(
    group: dist.ProcessGroup, defaults: dict[str, Any], limits: dict[str, int | None], *, masks: bool = False
) -> _Made:
    """Makes the group's communicator, or a larger one. Collective where it does. See Note [Limits].

    A communicator that the program made by `torch_ep.init` keeps its arguments. A limit of None stays none. None among
    `limits`: unknown, so no limit, if nobody has stated one.
    """
    name, world_size = resolve(group)
    made, current = _made.get(name), communicators.get(name)
    num_buffers = 0 if made is None else made.num_buffers
    if world_size > 1 and (current is None or _arguments_of[name][0] != group):
        made = None  # none yet, or one that torch_ep.destroy has ended, or of an earlier group of that name
    elif current is not None and (made is None or current is not made.communicator):
        made = _Made(current, dict(_arguments_of[name][1]), states_tokens=True)
    arguments = {**defaults, **_options} if made is None else dict(made.arguments)
    states_tokens = "max_tokens_per_rank" in _options if made is None else made.states_tokens
    if masks:
        arguments["on_timeout"] = "mask"
    for limit, value in limits.items():
        known = arguments.get(limit, 0)
        if value is None and states_tokens:
            continue
        arguments[limit] = None if known is None or value is None else max(known, value)
    if made is None:
        made = _Made(init(group, **arguments), arguments, states_tokens)
    elif arguments != made.arguments:
        made.communicator, made.arguments = init(group, **arguments), arguments
    made.num_buffers = num_buffers
    _made[name] = made
    return made


def _group_for_rows(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group itself. Where that is of gloo alone and rows are on GPUs: a group of the same ranks for them."""
    backends = dist.get_backend_config(group)  # as in "cpu:gloo,cuda:nccl"; "gloo" alone serves both
    is_fit = "cuda:" in backends and "cuda:gloo" not in backends
    if not torch.cuda.is_available() or group.size() == 1 or is_fit:
        return group
    found, rows = _groups_for_rows.get(group.group_name, (None, None))
    if rows is None or found != group:
        rows = group_of_same_ranks(group, "cpu:gloo,cuda:nccl", _GROUP_TIMEOUT)
        _groups_for_rows[group.group_name] = group, rows
    return rows


_groups_for_rows: dict[str, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}  # by the name of the first


def _not_here(what: str, instead: str) -> NoReturn:
    raise NotImplementedError(f"deep_ep.{what} is not in torch_ep: {instead}")


# --- events ---


class EventHandle:
    """What the current stream has been given so far. On a CPU: nothing to wait for."""

    def __init__(self) -> None:
        self.event = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None

    def current_stream_wait(self) -> None:
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


class EventOverlap:
    """An event, what has to live until it, and a function to call after waiting for it."""

    def __init__(self, event: EventHandle | None = None, extra_tensors: tuple[Tensor, ...] | None = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self.hook_after_wait: Callable[[], Any] | None = None
        self._release_handle = False

    def current_stream_wait(self, release_handle: bool = False) -> Any:
        """The current stream waits for the event. Returns what the registered hook returns, or None."""
        if self.event is None:
            raise RuntimeError(
                "deep_ep.EventOverlap.current_stream_wait: expected the event of a call with async_finish=True, got "
                "none: the results of other calls need no wait"
            )
        self.event.current_stream_wait()
        hook, self.hook_after_wait = self.hook_after_wait, None
        result = None if hook is None else hook()
        if release_handle:
            self.event = None
        return result

    def wait(self) -> Any:
        return self.current_stream_wait()

    def register_hook_after_wait(self, hook_after_wait: Callable[[], Any]) -> None:
        if self.hook_after_wait is not None:
            raise RuntimeError("deep_ep.EventOverlap.register_hook_after_wait: expected one hook per event, got two")
        self.hook_after_wait = hook_after_wait

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        self._release_handle = release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        if self.event is not None:
            self.current_stream_wait(self._release_handle)
        self._release_handle = False


def _wait_for(*events: EventOverlap | EventHandle | None) -> None:
    for event in events:
        handle = event.event if isinstance(event, EventOverlap) else event
        if handle is not None:
            handle.current_stream_wait()


def _event(is_wanted: bool) -> EventOverlap:
    return EventOverlap(EventHandle() if is_wanted else None)


class Config:
    """Tuning of DeepEP's kernels. torch_ep has none of it; no bytes have to be set aside either."""

    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        self.num_sms = num_sms
        self.num_max_nvl_chunked_send_tokens = num_max_nvl_chunked_send_tokens
        self.num_max_nvl_chunked_recv_tokens = num_max_nvl_chunked_recv_tokens
        self.num_max_rdma_chunked_send_tokens = num_max_rdma_chunked_send_tokens
        self.num_max_rdma_chunked_recv_tokens = num_max_rdma_chunked_recv_tokens

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


# --- handles and rows ---


class Handle:
    """Of `Buffer.dispatch`. Opaque in DeepEP's clients; here it has the plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan


class LowLatencyHandle:
    """Of `Buffer.low_latency_dispatch`. Has no plan until the rows are received."""

    def __init__(self, topk_idx: Tensor, num_experts: int, max_tokens_per_rank: int, hidden: int) -> None:
        self.topk_idx = topk_idx
        self.plan: low_latency.LowLatencyPlan | None = None
        self.num_experts = num_experts
        self.max_tokens_per_rank = max_tokens_per_rank
        self.hidden = hidden
        #: For `zero_copy`: of `get_next_low_latency_combine_buffer`.
        self.combine_buffer: Tensor | None = None


def _check(op: str, name: str, value: Any, kind: type, origin: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(
            f"{op}: expected {name} to be a {kind.__name__}, got {type(value).__name__}: pass the one of {origin}"
        )


def _dispatch(x: Any, plan: Plan, topk_weights: Tensor | None) -> tuple[Any, Tensor | None]:
    """x: rows, or rows and their scales. Returns the received ones and the received weights."""
    rows, scales = x if isinstance(x, tuple) else (x, None)
    payloads: dict[str, Tensor] = {}
    if topk_weights is not None:
        payloads["topk_weights"] = topk_weights.contiguous()
    if scales is not None:
        payloads["scales"] = (scales.unsqueeze(1) if scales.dim() == 1 else scales).contiguous()
    received = ops.dispatch(rows.contiguous(), plan, **payloads)  # type: ignore[call-overload]
    if not payloads:
        return received, None
    weights = received[1] if topk_weights is not None else None
    if scales is None:
        return received[0], weights
    return (received[0], received[-1].squeeze(1) if scales.dim() == 1 else received[-1]), weights


def _combine(op: str, x: Tensor, plan: Plan, topk_weights: Tensor | None, bias: Any) -> tuple[Tensor, Tensor | None]:
    """The sums over ranks of rows, and of all weights beside them."""
    biases = bias if isinstance(bias, tuple) else () if bias is None else (bias,)
    if len(biases) > 2 or (isinstance(bias, tuple) and len(bias) != 2):
        raise ValueError(f"{op}: expected bias to be a Tensor, two Tensors or None, got a tuple of {len(biases)}")
    x, weights = x.contiguous(), None
    if topk_weights is None:
        sums = ops.combine(x, plan)
    elif plan.layout == "expert_major":
        sums, weights = ops.combine(x, plan, topk_weights=topk_weights.contiguous())
    else:
        # Every column of the weights, that of an expert elsewhere included, is summed over the ranks.
        combine = torch.ops.ep.combine if plan.rail is None else torch.ops.ep.combine.grid
        sums, _, weights = combine(x, None, topk_weights.contiguous(), *ops._operator_args(op, plan), None)
    if biases:
        total = sums.float()
        for term in biases:
            total = total + term.float()
        sums = total.to(sums.dtype)
    return sums, weights


def _refuse_overflow(op: str, plan: Plan, capacity: int, name: str) -> None:
    """Without waiting for the device."""
    message = f"{op}: expected at most {capacity} received rows, got more: raise {name}"
    torch._assert_async(plan.num_dropped == 0, message)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _uses_of_storage(t: Tensor) -> int:
    storage = t.untyped_storage()  # outlives the next call
    return torch._C._storage_Use_Count(storage._cdata)


def _move(into: Tensor, value: Tensor) -> None:
    """`into` gets the value; without a copy, unless a view of `into` has to get it as well."""
    if _uses_of_storage(into) > _uses_of_storage(torch.empty(0)):
        into.copy_(value)
    else:
        into.set_(value)  # type: ignore[call-overload]


class _Pending:
    """Receives that a hook has yet to run. Ranks receive in the order of their sends."""

    def __init__(self) -> None:
        self._receives: deque[Callable[[], None]] = deque()

    def add(self, receive: Callable[[], None]) -> Callable[[], None]:
        """Returns the hook, which first runs the receives of earlier sends."""
        self._receives.append(receive)

        def hook() -> None:
            while receive in self._receives:
                self._receives.popleft()()

        return hook

    def drain(self, leave: int = 0) -> None:
        while len(self._receives) > leave:
            self._receives.popleft()()


class _GroupBuffer:
    """What the buffers share: the group and its communicator, as `runtime`."""

    group: Any
    runtime: Communicator | None
    explicitly_destroy: bool

    def _open(self, group: Any, explicitly_destroy: bool, defaults: dict[str, Any], *, masks: bool = False) -> None:
        name = f"deep_ep.{type(self).__name__}"
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"{name}: expected group to be a ProcessGroup, got {type(group).__name__}")
        self.group = group
        self.explicitly_destroy = explicitly_destroy
        self._rows = _group_for_rows(group)
        made = _require(self._rows, defaults, {}, masks=masks)
        made.num_buffers += 1
        self.runtime = made.communicator

    def _limit(self, **limits: int | None) -> None:
        if self.runtime is None:
            raise RuntimeError(f"deep_ep.{type(self).__name__}: expected a buffer, got a destroyed one: make a new one")
        self.runtime = _require(self._rows, {}, limits).communicator

    def destroy(self) -> None:
        """Closes the communicator of the group, if no other buffer uses it."""
        if not self.explicitly_destroy:
            raise ValueError(
                f"deep_ep.{type(self).__name__}.destroy: expected a buffer made with explicitly_destroy=True, got False"
            )
        if self.runtime is None:
            return
        self.runtime = None
        name, _ = resolve(self._rows)
        made = _made[name]
        made.num_buffers -= 1
        if made.num_buffers == 0:
            del _made[name]
            destroy(self._rows)

    def get_comm_stream(self) -> Any:
        """The current stream: see Note [Streams]."""
        if not torch.cuda.is_available():
            _not_here(f"{type(self).__name__}.get_comm_stream", "there are no streams on a CPU")
        return torch.cuda.current_stream()


class Buffer(_GroupBuffer):
    """DeepEP's `Buffer`: normal dispatch and combine, and the low-latency pair."""

    num_sms: int = 20
    _has_num_sms = False  # else torch_ep's own default

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
    ) -> None:
        if group is None and comm is not None:
            _not_here("Buffer(comm=)", "pass group, a torch.distributed.ProcessGroup")
        if group is None:
            raise ValueError("deep_ep.Buffer: expected group, a torch.distributed.ProcessGroup, got None")
        defaults = {"num_sms": Buffer.num_sms} if Buffer._has_num_sms else {}
        self._open(group, explicitly_destroy, defaults, masks=enable_shrink)
        self.rank = self.group.rank()
        self.group_size = self.group.size()
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.enable_shrink = enable_shrink
        self._dispatches = _Pending()
        self._combines = _Pending()

    # --- sizes and tuning ---

    @staticmethod
    def is_sm90_compiled() -> bool:
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Of the kernels of communicators that are made from now on."""
        if new_num_sms % 2:
            raise ValueError(f"deep_ep.Buffer.set_num_sms: expected an even number, got {new_num_sms}")
        Buffer.num_sms, Buffer._has_num_sms = new_num_sms, True

    @staticmethod
    def capture() -> EventOverlap:
        return _event(True)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """About what the low-latency pair takes on backend nvlink. Nobody has to set it aside."""
        return 8 * num_ranks * num_max_dispatch_tokens_per_rank * hidden

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Config(Buffer.num_sms)

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: torch.Size | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> Tensor:
        _not_here(
            "Buffer.get_local_buffer_tensor",
            "its buffers belong to the kernels; torch_ep.reset(group) makes a group usable again after an error",
        )

    # --- normal mode ---

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, None, Tensor, Tensor, EventOverlap]:
        """Counts what this rank sends. `dispatch` itself follows `topk_idx`, if it gets it."""
        world_size = self.group_size
        if num_experts <= 0 or num_experts % world_size:
            raise ValueError(
                f"deep_ep.Buffer.get_dispatch_layout: expected num_experts to be a positive multiple of the world size "
                f"{world_size}, got {num_experts}"
            )
        _wait_for(previous_event)
        idx = topk_idx.long()
        experts = idx.masked_fill(idx < 0, num_experts)  # one more for none; likewise one more rank
        per_expert = idx.new_zeros(num_experts + 1, dtype=torch.int32)
        per_expert.scatter_add_(0, experts.flatten(), torch.ones_like(experts.flatten(), dtype=torch.int32))
        ranks = experts // (num_experts // world_size)
        visits = torch.zeros(idx.shape[0], world_size + 1, dtype=torch.bool, device=idx.device)
        visits = visits.scatter_(1, ranks, True)[:, :world_size].contiguous()
        return visits.sum(0, dtype=torch.int32), None, per_expert[:num_experts], visits, _event(async_finish)

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        handle: Handle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, Tensor | None, Tensor | None, list[int] | None, Handle | None, EventOverlap]:
        """One row per (token, rank), by source rank, then token. With a handle: the same routing again."""
        op = "deep_ep.Buffer.dispatch"
        _wait_for(previous_event)
        if handle is not None:
            _check(op, "handle", handle, Handle, "Buffer.dispatch")
            if topk_idx is not None or topk_weights is not None:
                raise ValueError(f"{op}: expected handle or topk_idx and topk_weights, got both: the handle has routed")
            return _dispatch(x, handle.plan, None)[0], None, None, None, None, _event(async_finish)
        layout = {
            "num_tokens_per_rank": num_tokens_per_rank,
            "is_token_in_rank": is_token_in_rank,
            "num_tokens_per_expert": num_tokens_per_expert,
        }
        missing = [name for name, value in layout.items() if value is None]
        if missing:
            raise ValueError(
                f"{op}: expected handle, or what get_dispatch_layout returns, got no {', no '.join(missing)}"
            )
        assert is_token_in_rank is not None and num_tokens_per_expert is not None
        if topk_idx is None and topk_weights is not None:
            raise ValueError(f"{op}: expected topk_idx with topk_weights, got none")
        num_experts = num_tokens_per_expert.shape[0]
        if topk_idx is None:  # one "expert" per rank
            ranks = torch.arange(self.group_size, device=is_token_in_rank.device)
            indices, num_indexed = torch.where(is_token_in_rank, ranks, -1), self.group_size
        else:
            indices, num_indexed = topk_idx.contiguous(), num_experts
        rows = x[0] if isinstance(x, tuple) else x
        self._limit(max_tokens_per_rank=None, hidden=rows.shape[1], num_topk=indices.shape[1], num_experts=num_experts)
        plan = ops.plan(indices, num_indexed, self._rows, layout="rank_major", capacity=num_worst_tokens or None)
        recv_x, recv_topk_weights = _dispatch(x, plan, topk_weights)
        counts: list[int] = []
        if num_worst_tokens:
            _refuse_overflow(op, plan, num_worst_tokens, "num_worst_tokens")
        else:
            per_expert = plan.tokens_per_expert
            if topk_idx is None:
                totals = num_tokens_per_expert.clone()
                dist.all_reduce(totals, group=self._rows)
                per_expert = totals.view(self.group_size, -1)[self.rank]
            counts = [_round_up(count, expert_alignment) for count in per_expert.tolist()]
        recv_topk_idx = None if topk_idx is None else plan.recv_topk_idx
        return recv_x, recv_topk_idx, recv_topk_weights, counts, Handle(plan), _event(async_finish)

    def combine(
        self,
        x: Tensor,
        handle: Handle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Sums rows, and weights beside them, over the ranks that a token visited. Nothing is multiplied."""
        op = "deep_ep.Buffer.combine"
        _check(op, "handle", handle, Handle, "Buffer.dispatch")
        _wait_for(previous_event)
        return *_combine(op, x, handle.plan, topk_weights, bias), _event(async_finish)

    def internode_dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> NoReturn:
        _not_here("Buffer.internode_dispatch", "call dispatch, which serves every group")

    def internode_combine(
        self,
        x: Tensor,
        handle: Any,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> NoReturn:
        _not_here("Buffer.internode_combine", "call combine, which serves every group")

    # --- low-latency mode ---

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Nothing to do: normal mode does not touch the buffers of the low-latency pair."""

    @torch.no_grad()
    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Any, Tensor, LowLatencyHandle, EventOverlap, Callable[[], None] | None]:
        """Rows per local expert, in tensors of a fixed size. With a hook: they are filled when it is called."""
        op = "deep_ep.Buffer.low_latency_dispatch"
        _check_finish(op, async_finish, return_recv_hook)
        if use_ue8m0 and not round_scale:
            raise ValueError(f"{op}: expected round_scale=True with use_ue8m0=True, got False")
        quantize: Any = None
        if use_fp8:
            quantize = "fp8_ue8m0" if use_ue8m0 else "fp8_pow2" if round_scale else "fp8"
        x, topk_idx = x.detach(), topk_idx.contiguous()
        max_tokens, hidden = num_max_dispatch_tokens_per_rank, x.shape[1]
        self._limit(
            hidden=hidden, num_topk=topk_idx.shape[1], num_experts=num_experts, low_latency_tokens=max_tokens,
            max_tokens_per_rank=max_tokens,
        )  # fmt: skip
        sizes: dict[str, Any] = {"num_experts": num_experts, "max_tokens_per_rank": max_tokens}
        statistics = self._statistics(op, "dispatch_wait_recv_cost_stats", dispatch_wait_recv_cost_stats, num_experts)
        handle = LowLatencyHandle(topk_idx, num_experts, max_tokens, hidden)

        def count(plan: low_latency.LowLatencyPlan) -> None:
            handle.plan = plan
            if cumulative_local_expert_recv_stats is not None:
                cumulative_local_expert_recv_stats.add_(plan.tokens_per_expert)

        if not return_recv_hook:
            self._dispatches.drain()
            received, plan = low_latency.low_latency_dispatch(
                x, topk_idx, group=self._rows, quantize=quantize, statistics=statistics, **sizes
            )
            count(plan)
            return received, plan.tokens_per_expert, handle, _event(async_finish), None

        self._dispatches.drain(leave=1)  # at most two may be in flight
        sent = low_latency.low_latency_dispatch_send(x, topk_idx, group=self._rows, quantize=quantize, **sizes)
        num_local, room = num_experts // self.group_size, self.group_size * max_tokens
        rows = x.new_empty(num_local, room, hidden, dtype=torch.float8_e4m3fn if use_fp8 else x.dtype)
        results, counts = [rows], x.new_empty(num_local, dtype=torch.int32)
        if use_fp8:
            width, dtype = (512, torch.int32) if use_ue8m0 else (128, torch.float32)  # channels per scale, or four
            scales = x.new_empty(num_local, -(-hidden // width), _round_up(room, 4), dtype=dtype)
            results.append(scales.transpose(1, 2)[:, :room])
            del scales  # so that only the result uses the memory: see `_move`

        def receive() -> None:
            with torch.no_grad():
                received, plan = low_latency.low_latency_dispatch_recv(sent, statistics=statistics)
                count(plan)
                for into, value in zip(results, received if use_fp8 else (received,), strict=True):
                    _move(into, value)
                counts.copy_(plan.tokens_per_expert)

        hook = self._dispatches.add(receive)
        return (rows, results[1]) if use_fp8 else rows, counts, handle, _event(False), hook

    @torch.no_grad()
    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Callable[[], None] | None]:
        """Weighs and sums the rows of each token.

        Rows are weighed where the experts are, so the weights travel there first, in an exchange of 16 bytes per row.
        """
        op = "deep_ep.Buffer.low_latency_combine"
        _check(op, "handle", handle, LowLatencyHandle, "Buffer.low_latency_dispatch")
        _check_finish(op, async_finish, return_recv_hook)
        if use_logfmt:
            _not_here("Buffer.low_latency_combine(use_logfmt=)", "rows return as they are: leave it False")
        if zero_copy and handle.combine_buffer is None:
            raise ValueError(
                f"{op}: expected get_next_low_latency_combine_buffer before zero_copy=True, got no such call"
            )
        self._dispatches.drain()
        plan = handle.plan
        if plan is None:
            raise ValueError(f"{op}: expected the handle of this buffer's low_latency_dispatch, got one of another")
        shape = tuple(handle.topk_idx.shape)
        for name, given in (("topk_idx", topk_idx), ("topk_weights", topk_weights)):
            if tuple(given.shape) != shape:
                raise ValueError(f"{op}: expected {name} of the dispatch's shape {[*shape]}, got {[*given.shape]}")
        if out is not None and (tuple(out.shape), out.dtype) != ((shape[0], handle.hidden), x.dtype):
            raise ValueError(
                f"{op}: expected out of shape {[shape[0], handle.hidden]} and dtype {x.dtype}, got {[*out.shape]} and "
                f"{out.dtype}"
            )
        y = handle.combine_buffer if zero_copy else x.detach()
        assert y is not None
        # Slots of -1 weigh nothing.
        weights = topk_weights.detach().float().masked_fill(topk_idx < 0, 0)
        _, weighing = low_latency.low_latency_dispatch(
            weights.new_zeros(shape[0], 4),
            handle.topk_idx,
            num_experts=handle.num_experts,
            max_tokens_per_rank=handle.max_tokens_per_rank,
            group=self._rows,
            topk_weights=weights,
        )
        plan = plan._replace(row_weights=weighing.row_weights)
        statistics = self._statistics(
            op, "combine_wait_recv_cost_stats", combine_wait_recv_cost_stats, handle.num_experts
        )
        if not return_recv_hook:
            self._combines.drain()
            sums = low_latency.low_latency_combine(y.contiguous(), plan, statistics=statistics)
            return sums if out is None else out.copy_(sums), _event(async_finish), None

        self._combines.drain(leave=1)
        sent = low_latency.low_latency_combine_send(y.contiguous(), plan)
        result = y.new_empty(shape[0], handle.hidden) if out is None else out

        def receive() -> None:
            with torch.no_grad():
                sums = low_latency.low_latency_combine_recv(sent, statistics=statistics)
                if out is None:
                    _move(result, sums)
                else:
                    out.copy_(sums)

        return result, _event(False), self._combines.add(receive)

    def _statistics(
        self, op: str, name: str, waits: Tensor | None, num_experts: int
    ) -> low_latency.LowLatencyStatistics | None:
        """ns are added to `waits`; rows to a tensor that nobody reads."""
        if waits is None:
            return None
        world_size = self.group_size
        if waits.dtype != torch.int64 or tuple(waits.shape) not in ((world_size,), (world_size, world_size)):
            raise ValueError(
                f"{op}: expected {name} of dtype torch.int64 and shape [{world_size}], or a row of that per rank, got "
                f"{waits.dtype} and {[*waits.shape]}"
            )
        waits = waits if waits.dim() == 1 else waits[self.rank]
        return low_latency.LowLatencyStatistics(waits.new_zeros(num_experts // world_size), waits)

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> Tensor:
        """An ordinary tensor of bfloat16: combine reads any in place."""
        _check(
            "deep_ep.Buffer.get_next_low_latency_combine_buffer", "handle", handle, LowLatencyHandle,
            "Buffer.low_latency_dispatch",
        )  # fmt: skip
        num_local, room = handle.num_experts // self.group_size, self.group_size * handle.max_tokens_per_rank
        handle.combine_buffer = handle.topk_idx.new_empty(num_local, room, handle.hidden, dtype=torch.bfloat16)
        return handle.combine_buffer

    def _check_shrink(self, name: str) -> None:
        if not self.enable_shrink:
            raise ValueError(f"deep_ep.Buffer.{name}: expected a buffer made with enable_shrink=True, got False")

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        self._check_shrink("low_latency_update_mask_buffer")
        if not mask:
            _not_here(
                "Buffer.low_latency_update_mask_buffer(mask=False)",
                "call low_latency_clean_mask_buffer on every rank, which takes all ranks in again",
            )
        mask_ranks([rank_to_mask], self._rows)

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        self._check_shrink("low_latency_query_mask_buffer")
        masked = [not active for active in active_ranks(self._rows)]
        mask_status.copy_(torch.tensor(masked, dtype=mask_status.dtype))

    def low_latency_clean_mask_buffer(self) -> None:
        """Takes masked ranks in again. Collective, unlike in DeepEP: `torch_ep.reset`."""
        self._check_shrink("low_latency_clean_mask_buffer")
        reset(self._rows)


def _check_finish(op: str, async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise ValueError(f"{op}: expected async_finish or return_recv_hook, got both")


# --- ElasticBuffer and EPBuffer ---


class EPHandle:
    """Of `ElasticBuffer.dispatch` and `EPBuffer.dispatch`: the plan, and what DeepEP tells about it.

    Fields that describe DeepEP's own buffers are None.
    """

    def __init__(
        self,
        plan: Plan,
        topk_idx: Tensor,
        *,
        num_experts: int,
        expert_alignment: int,
        num_max_tokens_per_rank: int,
        num_sms: int,
        do_expand: bool,
        num_recv_tokens_per_expert_list: list[int],
    ) -> None:
        self.plan = plan
        self.topk_idx = topk_idx
        self.num_experts = num_experts
        self.expert_alignment = expert_alignment
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.num_sms = num_sms
        self.do_expand = do_expand
        self.num_recv_tokens_per_expert_list = num_recv_tokens_per_expert_list
        self.psum_num_recv_tokens_per_scaleup_rank = plan.recv_counts.cumsum(0, dtype=torch.int32)
        counts = plan.tokens_per_expert
        self.num_unaligned_recv_tokens_per_expert = counts if do_expand else None
        padded = (counts + expert_alignment - 1) // expert_alignment * expert_alignment
        ends = padded.cumsum(0, dtype=torch.int32)
        #: [L] int32. Expanded: where the tokens of each expert end; else the sums of padded counts.
        self.psum_num_recv_tokens_per_expert = ends - padded + counts if do_expand else ends
        #: Rows of the result; without a host wait, those it has room for.
        self.num_recv_tokens = self.num_expanded_tokens = plan.num_rows
        self.recv_src_metadata: Tensor | None = None
        self.dst_buffer_slot_idx: Tensor | None = None
        self.token_metadata_at_forward: Tensor | None = None
        self.channel_linked_list: Tensor | None = None


class _Elastic(_GroupBuffer):
    """What ElasticBuffer and EPBuffer share."""

    num_max_tokens_per_rank: int
    _name: str

    def _open_elastic(
        self,
        group: Any,
        num_bytes: int | None,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int,
        use_fp8_dispatch: bool,
        timeouts: tuple[int, int],
        explicitly_destroy: bool,
    ) -> None:
        self._name = f"deep_ep.{type(self).__name__}"
        self._open(group, explicitly_destroy, {"timeout": timedelta(seconds=max(timeouts))})
        self.rank_idx = self.group.rank()
        self.num_ranks = self.group.size()
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        if num_bytes is None:
            num_bytes = self.get_buffer_size_hint(group, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch)
        self.num_bytes = num_bytes
        self.num_scaleout_ranks, self.num_scaleup_ranks = self.get_logical_domain_size()
        self.scaleout_rank_idx, self.scaleup_rank_idx = divmod(self.rank_idx, self.num_scaleup_ranks)
        self.num_rdma_ranks, self.num_nvlink_ranks = self.get_physical_domain_size()

    @staticmethod
    def get_buffer_size_hint(
        group: dist.ProcessGroup,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """About what plan, dispatch and combine take on backend nvlink. Nobody has to set it aside."""
        return _round_up(4 * (group.size() - 1) * num_max_tokens_per_rank * (hidden + 4 * num_topk), _ALIGNMENT)

    @staticmethod
    def capture() -> EventHandle:
        return EventHandle()

    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True) -> None:
        dist.barrier(self._rows)

    def get_physical_domain_size(self) -> tuple[int, int]:
        """(nodes, ranks per node) of a grid, else (1, ranks)."""
        if self.runtime is None or self.runtime.rail is None or self.runtime.node is None:
            return 1, self.num_ranks
        return self.runtime.rail.world_size, self.runtime.node.world_size

    def get_logical_domain_size(self) -> tuple[int, int]:
        return self.get_physical_domain_size()

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """There are no queue pairs."""
        return 0

    def _num_sms(self) -> int:
        """Of the kernels that run, 0 without kernels."""
        return 0 if self.runtime is None else self.runtime.num_sms

    def _dispatch(
        self,
        x: Any,
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        stats: Tensor | None,
        num_experts: int | None,
        num_max_tokens_per_rank: int | None,
        expert_alignment: int | None,
        handle: EPHandle | None,
        copies_topk_idx: bool,
        do_cpu_sync: bool | None,
        do_expand: bool,
        use_tma_aligned_col_major_sf: bool,
    ) -> tuple[Any, Tensor | None, Tensor | None, EPHandle]:
        op = f"{self._name}.dispatch"
        rows = x[0] if isinstance(x, tuple) else x
        if handle is not None:
            _check(op, "handle", handle, EPHandle, f"{type(self).__name__}.dispatch")
            if topk_idx is not None:
                raise ValueError(f"{op}: expected handle or topk_idx, got both: the handle has routed")
            if do_cpu_sync:
                raise ValueError(f"{op}: expected do_cpu_sync=False or None with a handle, got True")
            for name, given in (
                ("num_experts", num_experts),
                ("num_max_tokens_per_rank", num_max_tokens_per_rank),
                ("expert_alignment", expert_alignment),
                ("do_expand", do_expand),
            ):
                if given is not None and given != getattr(handle, name):
                    raise ValueError(f"{op}: expected {name} of the handle, {getattr(handle, name)}, got {given}")
        else:
            if topk_idx is None or num_experts is None:
                raise ValueError(f"{op}: expected handle, or topk_idx and num_experts, got neither")
            handle = self._route(
                op, rows, topk_idx, num_experts, num_max_tokens_per_rank, expert_alignment or 1, copies_topk_idx,
                do_cpu_sync is not False, do_expand,
            )  # fmt: skip
        plan = handle.plan
        recv_x, recv_topk_weights = _dispatch(x, plan, topk_weights)
        if stats is not None:
            stats.add_(plan.tokens_per_expert)
        if use_tma_aligned_col_major_sf and isinstance(recv_x, tuple):
            recv_x = recv_x[0], _column_major(recv_x[1])
        return recv_x, plan.recv_topk_idx, recv_topk_weights, handle

    def _route(
        self,
        op: str,
        rows: Tensor,
        topk_idx: Tensor,
        num_experts: int,
        max_tokens: int | None,
        alignment: int,
        copies_topk_idx: bool,
        is_exact: bool,
        do_expand: bool,
    ) -> EPHandle:
        max_tokens = self.num_max_tokens_per_rank if max_tokens is None else max_tokens
        num_topk = topk_idx.shape[1]
        self._limit(
            max_tokens_per_rank=max_tokens or None, hidden=rows.shape[1], num_topk=num_topk, num_experts=num_experts
        )
        capacity = None
        if not is_exact:
            if not max_tokens:
                raise ValueError(f"{op}: expected num_max_tokens_per_rank with do_cpu_sync=False, got 0")
            capacity = self.num_ranks * max_tokens
            if do_expand:
                num_local = num_experts // self.num_ranks
                capacity = capacity * min(num_topk, num_local) + num_local * (alignment - 1)
                capacity = _round_up(capacity, alignment)
        plan = ops.plan(
            topk_idx.contiguous(),
            num_experts,
            self._rows,
            layout="expert_major" if do_expand else "rank_major",
            capacity=capacity,
            alignment=alignment if do_expand else 1,
        )
        if capacity is not None:
            _refuse_overflow(op, plan, capacity, "num_max_tokens_per_rank")
        counts = [_round_up(n, alignment) for n in plan.tokens_per_expert.tolist()] if is_exact else []
        return EPHandle(
            plan,
            topk_idx.clone() if copies_topk_idx else topk_idx,
            num_experts=num_experts,
            expert_alignment=alignment,
            num_max_tokens_per_rank=max_tokens,
            num_sms=self._num_sms(),
            do_expand=do_expand,
            num_recv_tokens_per_expert_list=counts,
        )

    def _combine(self, x: Tensor, handle: EPHandle, topk_weights: Tensor | None, bias: Any) -> tuple:
        op = f"{self._name}.combine"
        _check(op, "handle", handle, EPHandle, f"{type(self).__name__}.dispatch")
        return _combine(op, x, handle.plan, topk_weights, bias)


def _column_major(scales: Tensor) -> Tensor:
    """In columns of a multiple of 16 bytes, as the tensor memory accelerator takes them."""
    rows, columns = scales.shape
    room = _round_up(rows, 16 // scales.element_size())
    return scales.new_empty(columns, room).t()[:rows].copy_(scales)


class ElasticBuffer(_Elastic):
    """DeepEP's `ElasticBuffer`: expert parallelism, without its other services."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        if num_cpu_bytes:
            _not_here("ElasticBuffer(num_cpu_bytes=)", "there is no storage on hosts: leave it 0")
        timeouts = (num_cpu_timeout_secs, num_gpu_timeout_secs)
        self._open_elastic(
            group, num_bytes, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch, timeouts, explicitly_destroy
        )

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
    ) -> int:
        return self._num_sms()

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Any, Tensor | None, Tensor | None, EPHandle, EventOverlap]:
        """One row per (token, rank); with `do_expand` one per (token, expert), grouped by expert."""
        _wait_for(previous_event, previous_event_before_epilogue)
        results = self._dispatch(
            x, topk_idx, topk_weights, cumulative_local_expert_recv_stats, num_experts, num_max_tokens_per_rank,
            expert_alignment, handle, do_handle_copy, do_cpu_sync, do_expand, use_tma_aligned_col_major_sf,
        )  # fmt: skip
        return *results, _event(async_with_compute_stream)

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Sums the rows of each token. Nothing is multiplied."""
        _wait_for(previous_event, previous_event_before_epilogue)
        return *self._combine(x, handle, topk_weights, bias), _event(async_with_compute_stream)


class EPBuffer(_Elastic):
    """DeepEP's `EPBuffer`."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        lb_allocation_plan_or_num_bytes: Any = 0,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int | None = None,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        if not isinstance(lb_allocation_plan_or_num_bytes, int) or lb_allocation_plan_or_num_bytes:
            _not_here("EPBuffer(lb_allocation_plan_or_num_bytes=)", _LB)
        timeouts = (num_cpu_timeout_secs, num_gpu_timeout_secs)
        self._open_elastic(
            group, num_bytes, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch, timeouts, explicitly_destroy
        )

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 0,
        sm_write_gbs: float = 0,
    ) -> int:
        return self._num_sms()

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = False,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
        defer_epilogue: bool = False,
    ) -> Any:
        """As `ElasticBuffer.dispatch`. With `defer_epilogue`: an event, whose wait returns the results."""
        if do_handle_copy:
            _not_here("EPBuffer.dispatch(do_handle_copy=)", "pass a clone of topk_idx")
        _wait_for(previous_event)
        results = self._dispatch(
            x, topk_idx, topk_weights, cumulative_local_expert_recv_stats, num_experts, num_max_tokens_per_rank,
            expert_alignment, handle, False, do_cpu_sync, do_expand, use_tma_aligned_col_major_sf,
        )  # fmt: skip
        return self._finish("dispatch", results, async_with_compute_stream, defer_epilogue)

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        defer_epilogue: bool = False,
    ) -> Any:
        """As `ElasticBuffer.combine`. With `defer_epilogue`: an event, whose wait returns the results."""
        _wait_for(previous_event)
        results = self._combine(x, handle, topk_weights, bias)
        return self._finish("combine", results, async_with_compute_stream, defer_epilogue)

    def _finish(self, name: str, results: tuple, is_async: bool, is_deferred: bool) -> Any:
        event = _event(is_async)
        if not is_deferred:
            return *results, event
        if not is_async:
            raise ValueError(
                f"{self._name}.{name}: expected async_with_compute_stream=True with defer_epilogue=True, got False"
            )
        event.register_hook_after_wait(lambda: results)
        return event


_LB = "copy weights of replicas by torch.distributed, and name replicas in topk_idx (docs/serving.md, EPLB)"
_COLLECTIVES = "use the collectives of torch.distributed"
_SEND_RECV = "use torch.distributed.send and recv"
_ENGRAM = "look rows up by torch_ep.plan and dispatch of their indices, or keep the table elsewhere"
_SERVICES: dict[type, dict[str, str]] = {
    ElasticBuffer: {
        "get_engram_storage_size_hint": _ENGRAM,
        "engram_write": _ENGRAM,
        "engram_fetch": _ENGRAM,
        "get_pp_buffer_size_hint": _SEND_RECV,
        "pp_set_config": _SEND_RECV,
        "pp_send": _SEND_RECV,
        "pp_recv": _SEND_RECV,
        "get_agrs_num_max_session_bytes": _COLLECTIVES,
        "get_agrs_buffer_size_hint": _COLLECTIVES,
        "create_agrs_session": _COLLECTIVES,
        "destroy_agrs_session": _COLLECTIVES,
        "agrs_new_session": _COLLECTIVES,
        "agrs_set_config": _COLLECTIVES,
        "agrs_get_inplace_tensor": _COLLECTIVES,
        "all_gather": _COLLECTIVES,
    },
    EPBuffer: {"lb_get_theoretical_num_sms": _LB, "lb_prefetch_weights": _LB, "lb_reduce_grads": _LB},
}


def _service(what: str, instead: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        _not_here(what, instead)

    return staticmethod(refuse)


for _class, _names in _SERVICES.items():
    for _missing, _instead in _names.items():
        setattr(_class, _missing, _service(f"{_class.__name__}.{_missing}", _instead))


# --- the package ---

# Names that each module of the package has.
_PACKAGE: dict[str, tuple[str, ...]] = {
    "deep_ep": (
        "Buffer", "Config", "EPBuffer", "EPHandle", "ElasticBuffer", "EventHandle", "EventOverlap", "topk_idx_t",
    ),
    "deep_ep.buffer": ("Buffer", "Config", "EventHandle", "EventOverlap"),
    "deep_ep.buffers": (),
    "deep_ep.buffers.elastic": ("EPHandle", "ElasticBuffer"),
    "deep_ep.buffers.ep": ("EPBuffer", "EPHandle"),
    "deep_ep.buffers.legacy": ("Buffer", "Config", "EventHandle", "EventOverlap"),
    "deep_ep.utils": ("EventHandle", "EventOverlap"),
    "deep_ep.utils.event": ("EventHandle", "EventOverlap"),
}  # fmt: skip


def install(**options: Any) -> ModuleType:
    """Makes `import deep_ep` import this module's classes. Call it before any code imports `deep_ep`.

    Args:
        options: arguments of `torch_ep.init` for the communicators that buffers make, such as `timeout`,
            `backend`, `ranks_per_node` and limits. The same on every rank. `max_tokens_per_rank`, the most tokens that
            a rank ever passes to `Buffer.dispatch`, is what normal mode over NVLink needs.

    Returns:
        The module `deep_ep`.

    Raises:
        TypeError: an option is no argument of `torch_ep.init`.
        RuntimeError: another `deep_ep` was imported before.
    """
    op = "torch_ep.integrations.deep_ep.install"
    known = [*inspect.signature(init).parameters][1:]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"{op}: expected arguments of torch_ep.init, {', '.join(known)}, got {', '.join(unknown)}")
    found = sys.modules.get("deep_ep")
    if found is not None and getattr(found, "__version__", None) != _VERSION:
        raise RuntimeError(
            f"{op}: expected no import of deep_ep so far, got {getattr(found, '__file__', found)}: call install() first"
        )
    _options.clear()
    _options.update(options)
    if found is None:
        for name, exported in _PACKAGE.items():
            module = ModuleType(name, "DeepEP's interface on torch_ep: see torch_ep.integrations.deep_ep.")
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            module.__path__ = []
            for attribute in exported:
                setattr(module, attribute, globals()[attribute])
            module.__all__ = [*exported]  # type: ignore[attr-defined]
            sys.modules[name] = module
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
        sys.modules["deep_ep"].__version__ = _VERSION  # type: ignore[attr-defined]
    return sys.modules["deep_ep"]
