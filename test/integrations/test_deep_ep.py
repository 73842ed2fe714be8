"""DeepEP's interface on torch_ep: its signatures, what its own test programs assert, and every message."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.devices import CUDA, Ranks
from support.harness import PATIENCE, World, free_port, random_topk, same_bits, seeded, world
from torch import Tensor

import torch_ep
from torch_ep import reference
from torch_ep.integrations import deep_ep
from torch_ep.integrations.deep_ep import Buffer, ElasticBuffer, EPBuffer, EventHandle, EventOverlap

TOKENS, HIDDEN, NUM_TOPK, LOCAL_EXPERTS = 12, 256, 4, 3
devices = pytest.mark.parametrize("device", ["cpu", CUDA])
sizes = pytest.mark.parametrize("world_size", [2, 4])
# With a GPU, a group of gloo gets another one for rows, and these tests look at the group that they made.
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="expected a host without a GPU, got one with a GPU")

# Names and defaults, written down from DeepEP's sources: `Buffer` of deep_ep/buffers/legacy.py at commit 189df346,
# which equals deep_ep/buffer.py of 1.2.1 with `enable_shrink`, `use_logfmt` and the counters; `ElasticBuffer` of
# deep_ep/buffers/elastic.py at 3caa7ed3; `EPBuffer` of deep_ep/buffers/ep.py at ff924ed8. No default: "".
LATE = {"previous_event": None, "async_finish": False, "allocate_on_comm_stream": False}
LAYOUT = {
    "num_tokens_per_rank": None,
    "num_tokens_per_rdma_rank": None,
    "is_token_in_rank": None,
    "num_tokens_per_expert": None,
    "topk_idx": None,
    "topk_weights": None,
    "expert_alignment": 1,
}
SUMS = {"x": "", "handle": "", "topk_weights": None, "bias": None}
ELASTIC_DISPATCH = {
    "x": "",
    "topk_idx": None,
    "topk_weights": None,
    "cumulative_local_expert_recv_stats": None,
    "num_experts": None,
    "num_max_tokens_per_rank": None,
    "expert_alignment": None,
    "num_sms": 0,
    "num_qps": 0,
    "previous_event": None,
}
ELASTIC_ASYNC = {"async_with_compute_stream": False, "allocate_on_comm_stream": False}
ELASTIC_HINT = {
    "group": "",
    "num_max_tokens_per_rank": "",
    "hidden": "",
    "num_topk": 0,
    "use_fp8_dispatch": False,
    "allow_hybrid_mode": True,
    "allow_multiple_reduction": True,
}
ELASTIC_LIMITS = {"num_max_tokens_per_rank": 0, "hidden": 0, "num_topk": 0, "use_fp8_dispatch": False}
ELASTIC_MODES = {
    "deterministic": False,
    "allow_hybrid_mode": True,
    "allow_multiple_reduction": True,
    "prefer_overlap_with_compute": True,
}
ELASTIC_ENDS = {
    "num_allocated_qps": 0,
    "num_cpu_timeout_secs": 300,
    "num_gpu_timeout_secs": 100,
    "explicitly_destroy": False,
}
SMS = {"num_experts": "", "num_topk": "", "num_scaleout_topk": 0, "rdma_gbs": 0, "nvlink_gbs": 0}
BARRIER = {"use_comm_stream": True, "with_cpu_sync": False, "sequential": True}
SIGNATURES: dict[type, dict[str, dict[str, Any]]] = {
    Buffer: {
        "__init__": {
            "group": "",
            "num_nvl_bytes": 0,
            "num_rdma_bytes": 0,
            "low_latency_mode": False,
            "num_qps_per_rank": 24,
            "allow_nvlink_for_low_latency_mode": True,
            "allow_mnnvl": False,
            "explicitly_destroy": False,
            "enable_shrink": False,
            "comm": None,
        },
        "destroy": {},
        "is_sm90_compiled": {},
        "set_num_sms": {"new_num_sms": ""},
        "capture": {},
        "get_low_latency_rdma_size_hint": dict.fromkeys(
            ("num_max_dispatch_tokens_per_rank", "hidden", "num_ranks", "num_experts"), ""
        ),
        "get_comm_stream": {},
        "get_local_buffer_tensor": {"dtype": "", "size": None, "offset": 0, "use_rdma_buffer": False},
        "get_dispatch_config": {"num_ranks": ""},
        "get_combine_config": {"num_ranks": ""},
        "get_dispatch_layout": {"topk_idx": "", "num_experts": "", **LATE},
        "dispatch": {"x": "", "handle": None, **LAYOUT, "num_worst_tokens": 0, "config": None, **LATE},
        "combine": {**SUMS, "config": None, **LATE},
        "internode_dispatch": {"x": "", "handle": None, **LAYOUT, "config": None, **LATE},
        "internode_combine": {**SUMS, "config": None, **LATE},
        "clean_low_latency_buffer": dict.fromkeys(("num_max_dispatch_tokens_per_rank", "hidden", "num_experts"), ""),
        "low_latency_dispatch": {
            **dict.fromkeys(("x", "topk_idx", "num_max_dispatch_tokens_per_rank", "num_experts"), ""),
            "cumulative_local_expert_recv_stats": None,
            "dispatch_wait_recv_cost_stats": None,
            "use_fp8": True,
            "round_scale": False,
            "use_ue8m0": False,
            "async_finish": False,
            "return_recv_hook": False,
        },
        "low_latency_combine": {
            **dict.fromkeys(("x", "topk_idx", "topk_weights", "handle"), ""),
            "use_logfmt": False,
            "zero_copy": False,
            "async_finish": False,
            "return_recv_hook": False,
            "out": None,
            "combine_wait_recv_cost_stats": None,
        },
        "low_latency_update_mask_buffer": {"rank_to_mask": "", "mask": False},
        "low_latency_query_mask_buffer": {"mask_status": ""},
        "low_latency_clean_mask_buffer": {},
        "get_next_low_latency_combine_buffer": {"handle": ""},
    },
    ElasticBuffer: {
        "__init__": {
            "group": "",
            "num_bytes": None,
            "num_cpu_bytes": 0,
            **ELASTIC_LIMITS,
            **ELASTIC_MODES,
            "sl_idx": 3,
            **ELASTIC_ENDS,
        },
        "destroy": {},
        "get_buffer_size_hint": ELASTIC_HINT,
        "barrier": BARRIER,
        "capture": {},
        "get_comm_stream": {},
        "get_physical_domain_size": {},
        "get_logical_domain_size": {},
        "get_theoretical_num_sms": {**SMS, "sm_read_gbs": 200, "sm_write_gbs": 50},
        "get_theoretical_num_qps": {"num_sms": ""},
        "dispatch": {
            **ELASTIC_DISPATCH,
            "previous_event_before_epilogue": None,
            **ELASTIC_ASYNC,
            "handle": None,
            "do_handle_copy": True,
            "do_cpu_sync": None,
            "do_expand": False,
            "do_zero_padding": False,
            "use_tma_aligned_col_major_sf": False,
        },
        "combine": {
            **SUMS,
            "num_sms": 0,
            "num_qps": 0,
            "previous_event": None,
            "previous_event_before_epilogue": None,
            **ELASTIC_ASYNC,
        },
    },
    EPBuffer: {
        "__init__": {
            "group": "",
            "num_bytes": None,
            **ELASTIC_LIMITS,
            "lb_allocation_plan_or_num_bytes": 0,
            **ELASTIC_MODES,
            "sl_idx": None,
            **ELASTIC_ENDS,
        },
        "destroy": {},
        "get_buffer_size_hint": ELASTIC_HINT,
        "barrier": BARRIER,
        "capture": {},
        "get_comm_stream": {},
        "get_physical_domain_size": {},
        "get_logical_domain_size": {},
        "get_theoretical_num_sms": {**SMS, "sm_read_gbs": 0, "sm_write_gbs": 0},
        "get_theoretical_num_qps": {"num_sms": ""},
        "dispatch": {
            **ELASTIC_DISPATCH,
            **ELASTIC_ASYNC,
            "handle": None,
            "do_handle_copy": False,
            "do_cpu_sync": None,
            "do_expand": False,
            "do_zero_padding": False,
            "use_tma_aligned_col_major_sf": False,
            "defer_epilogue": False,
        },
        "combine": {
            **SUMS,
            "num_sms": 0,
            "num_qps": 0,
            "previous_event": None,
            **ELASTIC_ASYNC,
            "defer_epilogue": False,
        },
    },
    EventOverlap: {
        "__init__": {"event": None, "extra_tensors": None},
        "current_stream_wait": {"release_handle": False},
        "wait": {},
        "register_hook_after_wait": {"hook_after_wait": ""},
        "__call__": {"release_handle": False},
    },
    EventHandle: {"__init__": {}, "current_stream_wait": {}},
    deep_ep.Config: {
        "__init__": {
            "num_sms": 20,
            "num_max_nvl_chunked_send_tokens": 6,
            "num_max_nvl_chunked_recv_tokens": 256,
            "num_max_rdma_chunked_send_tokens": 6,
            "num_max_rdma_chunked_recv_tokens": 256,
        },
        "get_nvl_buffer_size_hint": {"hidden_bytes": "", "num_ranks": ""},
        "get_rdma_buffer_size_hint": {"hidden_bytes": "", "num_ranks": ""},
    },
}


@pytest.mark.parametrize(
    ("owner", "method"),
    [(owner, method) for owner, methods in SIGNATURES.items() for method in methods],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_signatures_are_those_of_deep_ep(owner: type, method: str) -> None:
    parameters = inspect.signature(getattr(owner, method)).parameters.values()
    got = [(p.name, "" if p.default is p.empty else p.default) for p in parameters if p.name != "self"]
    assert got == [*SIGNATURES[owner][method].items()]


# --- install ---


@pytest.fixture
def not_installed() -> Iterator[None]:
    """No `deep_ep` in the process, before and after."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "deep_ep"]:
            del sys.modules[name]
        deep_ep._options.clear()

    forget()
    yield
    forget()


@pytest.mark.usefixtures("not_installed")
def test_clients_import_what_they_need() -> None:
    """The imports of vLLM, SGLang, Megatron-LM, torchtitan and NeMo."""
    installed = deep_ep.install(max_tokens_per_rank=8)
    assert deep_ep.install(timeout=PATIENCE) is installed and deep_ep._options == {"timeout": PATIENCE}
    assert importlib.util.find_spec("deep_ep") is not None
    assert importlib.import_module("deep_ep").Buffer is Buffer
    assert importlib.import_module("deep_ep").topk_idx_t is torch.int64
    for module, names in deep_ep._PACKAGE.items():
        for name in names:
            assert getattr(importlib.import_module(module), name) is getattr(deep_ep, name)
    assert importlib.import_module("deep_ep").utils.EventOverlap is EventOverlap
    with pytest.raises(ImportError, match="HybridEPBuffer"):
        exec("from deep_ep import HybridEPBuffer")


@pytest.mark.usefixtures("not_installed")
def test_install_refuses() -> None:
    with pytest.raises(TypeError, match=r"install: expected arguments of torch_ep.init, .*hidden.*, got num_tokens"):
        deep_ep.install(num_tokens=4)
    sys.modules["deep_ep"] = ModuleType("deep_ep")
    with pytest.raises(
        RuntimeError, match=r"install: expected no import of deep_ep so far, got .*: call install\(\) f"
    ):
        deep_ep.install()


def test_import_of_torch_ep_imports_no_integration() -> None:
    code = "import sys, torch_ep; assert not any(name.startswith('torch_ep.integrations') for name in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# --- normal mode ---


class Problem:
    """Of every rank, so that a rank can work out what all of them send."""

    def __init__(self, world_size: int, seed: int = 0, holes: float = 0.2, dtype: torch.dtype = torch.bfloat16) -> None:
        self.world_size, self.num_experts = world_size, LOCAL_EXPERTS * world_size
        tokens = [TOKENS - 5 * (r % 3) for r in range(world_size)]
        self.idx = [random_topk(t, NUM_TOPK, self.num_experts, seeded(seed, r), holes) for r, t in enumerate(tokens)]
        self.x = [torch.randn(t, HIDDEN, generator=seeded(seed, r, 1)).to(dtype) for r, t in enumerate(tokens)]
        self.weights = [torch.rand(t, NUM_TOPK, generator=seeded(seed, r, 2)) for r, t in enumerate(tokens)]
        self.max_tokens = max(tokens)

    def plans(self, **options: Any) -> list[torch_ep.Plan]:
        return reference.plan(self.idx, self.num_experts, **{"layout": "rank_major", **options})


def _same(name: str, got: Any, want: Any) -> None:
    got = got.cpu() if isinstance(got, Tensor) else got
    if isinstance(want, Tensor):
        assert same_bits(got.contiguous(), want.contiguous()), f"{name}: expected {want}, got {got}"
    else:
        assert got == want, f"{name}: expected {want}, got {got}"


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    return reference.quantize(x, "fp8")


def _dequantize(rows: Tensor, scales: Tensor) -> Tensor:
    if scales.dtype == torch.int32:  # four biased exponents
        exponents = scales.flatten().view(torch.uint8).view(*scales.shape[:-1], -1)[..., : rows.shape[-1] // 128]
        scales = (exponents.int() << 23).view(torch.float32)
    return (rows.float().unflatten(-1, (-1, 128)) * scales.unsqueeze(-1)).flatten(-2).bfloat16()


def _layout_of(buffer: Buffer, idx: Tensor, num_experts: int) -> dict[str, Any]:
    per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(idx, num_experts)
    assert per_rdma_rank is None and event.event is None
    return {
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_rdma_rank": per_rdma_rank,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
    }


def _intranode(rank: int, world_size: int, device: str) -> None:
    """What tests/test_intranode.py asserts, and the bits of the specification."""
    problem = Problem(world_size)
    buffer = Buffer(dist.group.WORLD, int(1e9), 0)
    idx, num_experts = problem.idx[rank].to(device), problem.num_experts
    layout = _layout_of(buffer, idx, num_experts)
    in_rank = torch.stack([((idx // LOCAL_EXPERTS == r) & (idx >= 0)).any(1) for r in range(world_size)], 1)
    _same("is_token_in_rank", layout["is_token_in_rank"], in_rank.cpu())
    _same("num_tokens_per_rank", layout["num_tokens_per_rank"], in_rank.sum(0, dtype=torch.int32).cpu())
    counts = torch.tensor([(problem.idx[rank] == e).sum() for e in range(num_experts)], dtype=torch.int32)
    _same("num_tokens_per_expert", layout["num_tokens_per_expert"], counts)

    plans = problem.plans()
    per_expert = plans[rank].tokens_per_expert.tolist()
    same_x = [torch.full_like(x, r + 1) for r, x in enumerate(problem.x)]
    for xs, is_fp8, with_topk, is_async, has_previous in itertools.product(
        (problem.x, same_x), (False, True), (False, True), (False, True), (False, True)
    ):
        sent = [_quantize(x) for x in xs] if is_fp8 else [(x, None) for x in xs]
        x = tuple(t.to(device) for t in sent[rank]) if is_fp8 else xs[rank].to(device)
        options: dict[str, Any] = {"async_finish": is_async, "config": Buffer.get_dispatch_config(world_size)}
        if has_previous:
            options["previous_event"] = buffer.capture()
        topk = {"topk_idx": idx, "topk_weights": problem.weights[rank].to(device)} if with_topk else {}
        recv_x, recv_idx, recv_weights, received, handle, event = buffer.dispatch(x, **layout, **topk, **options)
        if is_async:
            event.current_stream_wait()
        rows = [r for r, _ in reference.dispatch([s[0] for s in sent], plans)]
        if is_fp8:
            scales = [r for r, _ in reference.dispatch([s[1] for s in sent], plans)]
            _same("recv_x", recv_x[0].view(torch.uint8), rows[rank].view(torch.uint8))
            _same("recv_x scales", recv_x[1], scales[rank])
        else:
            _same("recv_x", recv_x, rows[rank])
        assert received == per_expert
        if with_topk:
            want = [w for _, w in reference.dispatch(xs, plans, topk_weights=problem.weights)]
            _same("recv_topk_idx", recv_idx, plans[rank].recv_topk_idx)
            _same("recv_topk_weights", recv_weights, want[rank])
            assert [(recv_idx == e).sum().item() for e in range(LOCAL_EXPERTS)] == per_expert
        else:
            assert recv_idx is None and recv_weights is None
        _same("rows from each rank", handle.plan.offsets, plans[rank].offsets)

        again = buffer.dispatch(x, handle=handle, **options)
        assert again[1:5] == (None, None, None, None)
        pairs = zip(again[0], recv_x, strict=True) if is_fp8 else [(again[0], recv_x)]
        for got, before in pairs:
            _same("cached", got.cpu().view(torch.uint8), before.cpu().contiguous().view(torch.uint8))

        y = _dequantize(*recv_x) if is_fp8 else recv_x
        values = [_dequantize(*s) for s in sent] if is_fp8 else xs
        sums = reference.combine([r for r, _ in reference.dispatch(values, plans)], plans)[rank][0]
        bias = torch.randn(2, *sums.shape, generator=seeded(rank, 7)).bfloat16()
        for given, want in (
            (None, sums),
            (bias[0].to(device), (sums.float() + bias[0].float()).bfloat16()),
            ((bias[0].to(device), bias[1].to(device)), (sums.float() + bias[0].float() + bias[1].float()).bfloat16()),
        ):
            combined, weights, event = buffer.combine(y, handle, topk_weights=recv_weights, bias=given, **options)
            if is_async:
                event.current_stream_wait()
            _same("combined_x", combined, want)
            if with_topk:  # a slot's weight comes from one rank, zeros from the others
                want_weights = problem.weights[rank].masked_fill(problem.idx[rank] < 0, 0)
                _same("combined_topk_weights", weights, want_weights)
            else:
                assert weights is None


@devices
@sizes
def test_intranode_program(device: str, world_size: int) -> None:
    Ranks(device, world_size).run(_intranode, device)


def _other_forms(rank: int, world_size: int, device: str) -> None:
    problem = Problem(world_size, seed=1)
    buffer = Buffer(dist.group.WORLD)
    idx, x = problem.idx[rank].to(device), problem.x[rank].to(device)
    layout, plan = _layout_of(buffer, idx, problem.num_experts), problem.plans()[rank]
    topk = {"topk_idx": idx, "topk_weights": problem.weights[rank].to(device)}

    padded = [-(-n // 8) * 8 for n in plan.tokens_per_expert.tolist()]
    recv_x, recv_idx, recv_weights, received, handle, _ = buffer.dispatch(x, **layout, **topk, expert_alignment=8)
    assert received == padded and buffer.dispatch(x, **layout, expert_alignment=8)[3] == padded

    # Weights at combine are summed over the ranks, those of experts elsewhere included.
    ones = torch.ones(recv_idx.shape, device=device)
    _, weights, _ = buffer.combine(recv_x, handle, topk_weights=ones)
    visited = layout["is_token_in_rank"].sum(1, keepdim=True).float().expand(-1, NUM_TOPK)
    _same("sums of weights", weights, visited.cpu())

    # Room for all that may come: static shapes, no counts, -1 past the rows.
    room = world_size * problem.max_tokens
    worst_x, worst_idx, worst_weights, received, worst, _ = buffer.dispatch(x, **layout, **topk, num_worst_tokens=room)
    assert received == [] and worst_x.shape[0] == room and (worst_idx[plan.num_rows :] == -1).all()
    for name, got, want in (("x", worst_x, recv_x), ("idx", worst_idx, recv_idx), ("w", worst_weights, recv_weights)):
        _same(f"worst {name}", got[: plan.num_rows], want.cpu())
    _same("worst combine", buffer.combine(worst_x, worst)[0], buffer.combine(recv_x, handle)[0].cpu())

    # One scale per token; a column-major tensor of scales.
    rows, scales = (t.to(device) for t in _quantize(problem.x[rank]))
    got = buffer.dispatch((rows, scales[:, 0]), handle=handle)[0][1]
    both = buffer.dispatch((rows, scales.t().contiguous().t()), handle=handle)[0][1]
    assert got.shape == (plan.num_rows,)
    _same("scales", got, both[:, 0].cpu())

    # No token anywhere.
    nothing = idx[:0]
    empty = buffer.dispatch(x[:0], **_layout_of(buffer, nothing, problem.num_experts), topk_idx=nothing)
    assert empty[0].shape == (0, HIDDEN) and empty[2] is None and empty[3] == [0] * LOCAL_EXPERTS


@devices
@sizes
def test_other_forms_of_dispatch(device: str, world_size: int) -> None:
    Ranks(device, world_size).run(_other_forms, device)


# --- gradients ---


class Dispatch(torch.autograd.Function):
    """As clients wrap it: backward is combine with the handle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, idx: Tensor, weights: Tensor, num_experts: int, buffer: Buffer) -> Any:
        event = EventOverlap(EventHandle())
        *layout, event = buffer.get_dispatch_layout(idx, num_experts, previous_event=event, async_finish=True)
        names = ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert", "is_token_in_rank")
        rows, recv_idx, recv_weights, _, ctx.handle, event = buffer.dispatch(
            x, topk_idx=idx, topk_weights=weights, **dict(zip(names, layout, strict=True)), previous_event=event,
            async_finish=True, allocate_on_comm_stream=True,
        )  # fmt: skip
        event.current_stream_wait()
        ctx.buffer = buffer
        ctx.mark_non_differentiable(recv_idx)
        return rows, recv_idx, recv_weights, ctx.handle

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # type: ignore[override]
        x, weights, _ = ctx.buffer.combine(gradients[0].contiguous(), ctx.handle, topk_weights=gradients[2].float())
        return x, None, weights, None, None


class Combine(torch.autograd.Function):
    """Backward is a dispatch with the handle."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, handle: Any, buffer: Buffer) -> Tensor:
        ctx.handle, ctx.buffer = handle, buffer
        return buffer.combine(y, handle)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return ctx.buffer.dispatch(gradient.contiguous(), handle=ctx.handle)[0], None, None


def _gradients(rank: int, world_size: int, device: str) -> None:
    problem = Problem(world_size, seed=2, dtype=torch.float32)
    buffer = Buffer(dist.group.WORLD)
    idx, num_experts = problem.idx[rank].to(device), problem.num_experts

    def experts(rows: Tensor, weights: Tensor, recv_idx: Tensor) -> Tensor:
        scale = torch.where(recv_idx >= 0, weights * (recv_idx + 1), 0).sum(1, keepdim=True)
        return rows.sin() * scale

    outcomes = []
    for form in ("client", "torch_ep", "direct"):
        x = problem.x[rank].clone().to(device).requires_grad_()
        weights = problem.weights[rank].clone().to(device).requires_grad_()
        if form == "client":
            rows, recv_idx, recv_weights, handle = Dispatch.apply(x, idx, weights, num_experts, buffer)
            out = Combine.apply(experts(rows, recv_weights, recv_idx), handle, buffer)
        elif form == "direct":  # the calls themselves are differentiable, too
            layout = _layout_of(buffer, idx, num_experts)
            rows, recv_idx, recv_weights, _, handle, _ = buffer.dispatch(
                x, **layout, topk_idx=idx, topk_weights=weights
            )
            out, _, _ = buffer.combine(experts(rows, recv_weights, recv_idx), handle)
        else:
            plan = torch_ep.plan(idx, num_experts, layout="rank_major")
            rows, recv_weights = torch_ep.dispatch(x, plan, topk_weights=weights)
            out = torch_ep.combine(experts(rows, recv_weights, plan.recv_topk_idx), plan)
        out.cos().sum().backward()
        outcomes.append([out.detach(), x.grad, weights.grad])
    for outcome in outcomes[1:]:
        for name, got, want in zip(("out", "x.grad", "weights.grad"), outcome, outcomes[0], strict=True):
            _same(name, got, want.cpu())

    # Without any communication: every rank computes the experts of its own tokens.
    leaves = [problem.x[rank].clone().requires_grad_(), problem.weights[rank].clone().requires_grad_()]
    local = torch.where(problem.idx[rank] >= 0, leaves[1] * (problem.idx[rank] % LOCAL_EXPERTS + 1), 0)
    out = leaves[0].sin() * local.sum(1, keepdim=True)
    out.cos().sum().backward()
    for got, want in zip(outcomes[0], [out.detach(), *(t.grad for t in leaves)], strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)


@devices
@sizes
def test_gradients_as_clients_compute_them(device: str, world_size: int) -> None:
    Ranks(device, world_size).run(_gradients, device)


# --- low latency ---

FORMATS = [(False, False, False), (True, False, False), (True, True, False), (True, True, True)]
QUANTIZE: dict[tuple[bool, bool, bool], Any] = dict(zip(FORMATS, (None, "fp8", "fp8_pow2", "fp8_ue8m0"), strict=True))


def _low_latency(rank: int, world_size: int, device: str) -> None:
    """What tests/test_low_latency.py asserts, and the bits of the specification."""
    problem = Problem(world_size, seed=3)
    max_tokens, num_experts = problem.max_tokens, problem.num_experts
    buffer = Buffer(dist.group.WORLD, num_rdma_bytes=1, low_latency_mode=True, num_qps_per_rank=LOCAL_EXPERTS)
    buffer.clean_low_latency_buffer(max_tokens, HIDDEN, num_experts)
    idx, weights = problem.idx[rank].to(device), problem.weights[rank].to(device)
    for chosen, has_hook in itertools.product(FORMATS, (False, True)):
        use_fp8, round_scale, use_ue8m0 = chosen
        expected = reference.low_latency_dispatch(
            problem.x, problem.idx, num_experts, max_tokens, topk_weights=problem.weights, quantize=QUANTIZE[chosen]
        )
        want_rows, want_scales, want_plan = expected[rank]
        stats = torch.zeros(LOCAL_EXPERTS, dtype=torch.int32, device=device)
        waits = torch.zeros(world_size, world_size, dtype=torch.int64, device=device)
        recv_x, counts, handle, event, hook = buffer.low_latency_dispatch(
            problem.x[rank].to(device), idx, max_tokens, num_experts, cumulative_local_expert_recv_stats=stats,
            dispatch_wait_recv_cost_stats=waits, use_fp8=use_fp8, round_scale=round_scale, use_ue8m0=use_ue8m0,
            async_finish=not has_hook, return_recv_hook=has_hook,
        )  # fmt: skip
        if has_hook:
            assert hook is not None and event.event is None
            hook()
            hook()  # does no harm
        else:
            assert hook is None
            event.current_stream_wait()
        rows, scales = recv_x if use_fp8 else (recv_x, None)
        _same("recv_count", counts, want_plan.tokens_per_expert)
        _same("cumulative stats", stats, want_plan.tokens_per_expert)
        assert not waits[torch.arange(world_size) != rank].any()
        all_idx = torch.cat(problem.idx)
        for e, n in enumerate(counts.tolist()):
            assert n == (all_idx == rank * LOCAL_EXPERTS + e).sum()
            _same("rows", rows[e, :n].view(torch.uint8), want_rows[e, :n].view(torch.uint8))
            if scales is not None and want_scales is not None:
                _same("scales", scales[e, :n], want_scales[e, :n].contiguous())
        if scales is not None and want_scales is not None:
            assert scales.stride() == want_scales.stride()

        y = torch.zeros_like(want_rows, dtype=torch.bfloat16, device=device)
        for e, n in enumerate(counts.tolist()):
            y[e, :n] = rows[e, :n] if scales is None else _dequantize(rows[e, :n].cpu(), scales[e, :n].cpu()).to(device)
        every_y = [
            r if s is None else torch.where(p.recv_pair[..., None] >= 0, _dequantize(r, s), 0) for r, s, p in expected
        ]
        sums = reference.low_latency_combine(every_y, [p for *_, p in expected])[rank]
        for zero_copy, has_out in itertools.product((False, True), (False, True)):
            given = y
            if zero_copy:
                buffer.get_next_low_latency_combine_buffer(handle)[:, :, :] = y
                given = torch.full_like(y, torch.nan)
            out = torch.full((idx.shape[0], HIDDEN), torch.nan, device=device).bfloat16() if has_out else None
            waits = torch.zeros(world_size, dtype=torch.int64, device=device)
            combined, event, hook = buffer.low_latency_combine(
                given, idx, weights, handle, zero_copy=zero_copy, async_finish=not has_hook,
                return_recv_hook=has_hook, out=out, combine_wait_recv_cost_stats=waits,
            )  # fmt: skip
            assert out is None or combined is out
            if has_hook:
                assert hook is not None
                hook()
            else:
                event.current_stream_wait()
            _same("combined_x", combined, sums)
        total = weights.masked_fill(idx < 0, 0).sum(1, keepdim=True).cpu()
        torch.testing.assert_close(
            combined.cpu().float(), problem.x[rank].float() * total, rtol=0.1 if use_fp8 else 0.02, atol=0.02
        )


@devices
@sizes
def test_low_latency_program(device: str, world_size: int) -> None:
    Ranks(device, world_size).run(_low_latency, device)


def _hooks(rank: int, world_size: int, device: str) -> None:
    """Receives go in the order of the sends, whatever the order of the hooks. Views made before a hook see its rows."""
    problems = [Problem(world_size, seed=seed) for seed in (4, 5, 6)]
    buffer = Buffer(dist.group.WORLD, low_latency_mode=True)
    sizes = (problems[0].max_tokens, problems[0].num_experts)
    sent = [
        buffer.low_latency_dispatch(
            p.x[rank].to(device), p.idx[rank].to(device), *sizes, use_fp8=False, return_recv_hook=True
        )
        for p in problems  # the third receives the first: two may be in flight
    ]
    assert [s[2].plan is None for s in sent] == [False, True, True]
    (first, *_), (second, *_), (third, *_) = sent
    views = [t.view(-1, HIDDEN) for t in (first, second)]
    addresses = [t.data_ptr() for t in (first, second, third)]
    sent[2][4]()
    assert sent[0][2].plan is not None and len(buffer._dispatches._receives) == 0
    wanted = [reference.low_latency_dispatch(p.x, p.idx, sizes[1], sizes[0])[rank] for p in problems]
    for (rows, counts, *_), (want, _, plan) in zip(sent, wanted, strict=True):
        _same("counts", counts, plan.tokens_per_expert)
        for e, n in enumerate(counts.tolist()):
            _same("rows", rows[e, :n], want[e, :n])
    # The third send received the first. The second has a view, so its rows are copied; the third takes over its rows.
    assert [t.data_ptr() == a for t, a in zip((first, second, third), addresses, strict=True)] == [True, True, False]
    assert [view.data_ptr() for view in views] == addresses[:2]

    # The experts' results of two micro-batches, and a hook of the next dispatch that has not run.
    pending = buffer.low_latency_dispatch(
        problems[2].x[rank].to(device), problems[2].idx[rank].to(device), *sizes, use_fp8=False, return_recv_hook=True
    )
    combines = [
        buffer.low_latency_combine(
            s[0], p.idx[rank].to(device), p.weights[rank].to(device), s[2], return_recv_hook=True
        )
        for s, p in zip(sent[:2], problems[:2], strict=True)
    ]
    combines[1][2]()
    combines[0][2]()
    pending[4]()
    _same("pending", pending[1], wanted[2][2].tokens_per_expert)
    for (combined, *_), p in zip(combines, problems[:2], strict=True):
        every = reference.low_latency_dispatch(p.x, p.idx, sizes[1], sizes[0], topk_weights=p.weights)
        _same("combined", combined, reference.low_latency_combine([r for r, *_ in every], [q for *_, q in every])[rank])

    # A slot that combine masks weighs nothing; a tensor that wants gradients is none of the pair's business.
    p = problems[0]
    x = p.x[rank].clone().to(device).requires_grad_()
    rows, _, handle, _, _ = buffer.low_latency_dispatch(x, p.idx[rank].to(device), *sizes, use_fp8=False)
    masked = p.idx[rank].clone()
    masked[:, 0] = -1
    got, _, _ = buffer.low_latency_combine(rows, masked.to(device), p.weights[rank].to(device), handle)
    total = p.weights[rank].masked_fill(masked < 0, 0).sum(1, keepdim=True)
    torch.testing.assert_close(got.cpu().float(), p.x[rank].float() * total, rtol=0.02, atol=0.02)


@devices
@sizes
def test_hooks(device: str, world_size: int) -> None:
    Ranks(device, world_size).run(_hooks, device)


# --- ElasticBuffer and EPBuffer ---


def _elastic(rank: int, world_size: int, device: str, kind: type) -> None:
    """What tests/ep/test_ep.py asserts, and the bits of the specification."""
    problem = Problem(world_size, seed=8)
    num_experts, room = problem.num_experts, problem.max_tokens
    buffer = kind(dist.group.WORLD, num_max_tokens_per_rank=room, hidden=HIDDEN, num_topk=NUM_TOPK)
    assert buffer.num_bytes == kind.get_buffer_size_hint(dist.group.WORLD, room, HIDDEN, NUM_TOPK) > 0
    assert buffer.get_logical_domain_size() == buffer.get_physical_domain_size() == (1, world_size)
    assert (buffer.scaleout_rank_idx, buffer.scaleup_rank_idx) == (0, rank)
    assert buffer.get_theoretical_num_qps(buffer.get_theoretical_num_sms(num_experts, NUM_TOPK)) == 0
    buffer.barrier()
    idx, weights = problem.idx[rank].to(device), problem.weights[rank].to(device)
    for do_expand, alignment, is_exact, is_fp8, is_async in itertools.product(
        (False, True), (1, 8), (True, False), (False, True), (False, True)
    ):
        options: dict[str, Any] = {"layout": "expert_major" if do_expand else "rank_major"}
        if do_expand:
            options["alignment"] = alignment
        plan = problem.plans(**options)[rank]
        sent = [_quantize(x) if is_fp8 else (x, None) for x in problem.x]
        x = tuple(t.to(device) for t in sent[rank]) if is_fp8 else problem.x[rank].to(device)
        stats = torch.zeros(LOCAL_EXPERTS, dtype=torch.int32, device=device)
        late = {"async_with_compute_stream": is_async, "previous_event": buffer.capture()}

        def launch(name: str, late: dict[str, Any] = late, is_async: bool = is_async, **arguments: Any) -> tuple:
            if kind is EPBuffer and is_async:
                return getattr(buffer, name)(**arguments, **late, defer_epilogue=True).wait()
            *results, event = getattr(buffer, name)(**arguments, **late)
            if is_async:
                event.current_stream_wait()
            else:
                assert event.event is None
            return tuple(results)

        recv_x, recv_idx, recv_weights, handle = launch(
            "dispatch", x=x, topk_idx=idx, topk_weights=weights, num_experts=num_experts, do_expand=do_expand,
            expert_alignment=alignment, do_cpu_sync=None if is_exact else False,
            cumulative_local_expert_recv_stats=stats, use_tma_aligned_col_major_sf=True,
        )  # fmt: skip
        assert (handle.topk_idx is idx) == (kind is EPBuffer)
        _same("stats", stats, plan.tokens_per_expert)
        rows, scales = recv_x if is_fp8 else (recv_x, None)
        n = plan.num_rows
        if is_exact:
            assert rows.shape[0] == handle.num_recv_tokens == handle.num_expanded_tokens == n
        else:
            most = world_size * room
            if do_expand:
                most = most * min(NUM_TOPK, LOCAL_EXPERTS) + LOCAL_EXPERTS * (alignment - 1)
                most = -(-most // alignment) * alignment
            assert rows.shape[0] == handle.num_recv_tokens == most and handle.num_recv_tokens_per_expert_list == []
        plans = problem.plans(**options)
        want = reference.dispatch([s[0] for s in sent], plans, topk_weights=problem.weights)[rank]
        _same("rows", rows[:n].view(torch.uint8), want[0].view(torch.uint8))
        assert not rows[n:].float().any()
        _same("weights", recv_weights[:n], want[1])
        if scales is not None:
            assert scales.stride(0) == 1 and scales.stride(1) % 4 == 0
            _same("scales", scales[:n], reference.dispatch([s[1] for s in sent], plans)[rank][0])
        if do_expand:
            assert recv_idx is None
            _same("unaligned", handle.num_unaligned_recv_tokens_per_expert, plan.tokens_per_expert)
        else:
            assert handle.num_unaligned_recv_tokens_per_expert is None
            _same("recv_topk_idx", recv_idx[:n], plan.recv_topk_idx)
        counts = plan.tokens_per_expert.tolist()
        padded = [-(-count // alignment) * alignment for count in counts]
        if is_exact:
            assert handle.num_recv_tokens_per_expert_list == padded
        ends = handle.psum_num_recv_tokens_per_expert.tolist()
        starts = [sum(padded[:e]) for e in range(LOCAL_EXPERTS)]
        added = counts if do_expand else padded
        assert ends == [start + more for start, more in zip(starts, added, strict=True)]
        per_rank = handle.psum_num_recv_tokens_per_scaleup_rank
        _same("psum of ranks", per_rank, plan.recv_counts.cumsum(0, dtype=torch.int32))

        for again in ({}, {"topk_weights": weights, "num_experts": num_experts}):
            cached_x, cached_idx, cached_weights, cached = launch(
                "dispatch", x=x, handle=handle, do_expand=do_expand, **again
            )
            assert cached is handle and cached_idx is recv_idx
            cached_rows = cached_x[0] if is_fp8 else cached_x
            _same("cached", cached_rows.view(torch.uint8), rows.cpu().view(torch.uint8))
            if again:
                _same("cached weights", cached_weights, recv_weights.cpu())
            else:
                assert cached_weights is None

        y = rows if scales is None else _dequantize(rows.cpu(), scales.cpu().contiguous()).to(device)
        bias = torch.randn(problem.x[rank].shape, generator=seeded(rank, 9)).bfloat16()
        every_x = [s[0] if s[1] is None else _dequantize(*s) for s in sent]
        sums, _ = reference.combine([r for r, _ in reference.dispatch(every_x, plans)], plans)[rank]
        for given, expected in ((None, sums), (bias.to(device), (sums.float() + bias.float()).bfloat16())):
            combined, combined_weights = launch("combine", x=y, handle=handle, topk_weights=recv_weights, bias=given)
            _same("combined", combined, expected)
            _same("combined weights", combined_weights, problem.weights[rank].masked_fill(problem.idx[rank] < 0, 0))


@devices
@sizes
@pytest.mark.parametrize("kind", [ElasticBuffer, EPBuffer], ids=lambda kind: kind.__name__)
def test_elastic_program(device: str, world_size: int, kind: type) -> None:
    Ranks(device, world_size).run(_elastic, device, kind)


# --- groups, limits, events ---


def _limits(rank: int, world_size: int) -> None:
    """Limits grow with the calls, except those of a communicator that the program made."""
    calls: list[dict[str, Any]] = []
    make = deep_ep.init
    deep_ep.init = lambda group, **arguments: (calls.append(arguments), make(group, **arguments))[1]
    try:
        deep_ep._options.update(timeout=PATIENCE, max_tokens_per_rank=16)
        group = dist.new_group()
        buffer = Buffer(group, explicitly_destroy=True)
        assert buffer.runtime.max_tokens_per_rank == 16 and buffer.runtime.hidden is None
        x, idx = torch.ones(3, 128), torch.tensor([[0, 1], [2, 3], [1, 2]]) % (2 * world_size)

        def normal(x: Tensor, num_experts: int = 2 * world_size) -> None:
            handle = buffer.dispatch(x, **_layout_of(buffer, idx, num_experts), topk_idx=idx)[4]
            buffer.combine(x.new_ones(handle.plan.num_rows, x.shape[1]), handle)

        for _ in range(2):
            normal(x)
        grown = {"max_tokens_per_rank": 16, "hidden": 128, "num_topk": 2, "num_experts": 2 * world_size}
        assert calls[1:] == [{"timeout": PATIENCE, **grown}]
        buffer.low_latency_dispatch(x.bfloat16(), idx, 4, 4 * world_size, use_fp8=False)
        normal(torch.ones(3, 64))
        grown = {**grown, "num_experts": 4 * world_size, "low_latency_tokens": 4}
        assert calls[2:] == [{"timeout": PATIENCE, **grown}]
        assert {name: getattr(buffer.runtime, name) for name in grown} == grown
        other = ElasticBuffer(group, explicitly_destroy=True)  # a buffer of another kind shares the communicator
        other.dispatch(x, idx, num_experts=2 * world_size, num_max_tokens_per_rank=32)
        assert len(calls) == 4 and other.runtime.max_tokens_per_rank == 32
        buffer.destroy()
        buffer.destroy()
        assert group.group_name in torch_ep.comm.communicators
        other.destroy()
        assert group.group_name not in torch_ep.comm.communicators

        # Nobody states the tokens: no limit on them, from the first normal dispatch on.
        deep_ep._options.clear()
        deep_ep._options.update(timeout=PATIENCE)
        buffer = Buffer(group)
        buffer.low_latency_dispatch(x.bfloat16(), idx, 4, 2 * world_size, use_fp8=False)
        assert buffer.runtime.max_tokens_per_rank == 4
        normal(x)
        assert buffer.runtime.max_tokens_per_rank is None
        buffer.low_latency_dispatch(x.bfloat16(), idx, 4, 2 * world_size, use_fp8=False)
        assert buffer.runtime.max_tokens_per_rank is None

        # The program's own communicator: its limits grow, what it left open stays open. So it is after it was replaced.
        torch_ep.init(group, timeout=PATIENCE, hidden=64)
        num_calls = len(calls)
        normal(torch.ones(3, 32))
        assert len(calls) == num_calls
        normal(x)
        assert (buffer.runtime.hidden, buffer.runtime.num_topk) == (128, None)
        torch_ep.init(group, timeout=PATIENCE, max_tokens_per_rank=8)
        normal(x)
        assert buffer.runtime.max_tokens_per_rank == 8
        torch_ep.destroy(group)
        normal(x)
        assert buffer.runtime.num_topk == 2

        Buffer.set_num_sms(24)
        assert (Buffer.num_sms, Buffer.get_combine_config(8).num_sms) == (24, 24)
        Buffer(group, enable_shrink=True)
        assert calls[-1]["on_timeout"] == "mask" and "num_sms" not in calls[-1]
        torch_ep.destroy(group)
        Buffer(group)
        assert calls[-1] == {"num_sms": 24, "timeout": PATIENCE}
        torch_ep.destroy(group)
    finally:
        Buffer.num_sms, Buffer._has_num_sms = 20, False
        deep_ep._options.clear()
        deep_ep.init = make


@without_gpu
def test_limits_grow_with_the_calls() -> None:
    world(2).run(_limits)


def _after_another_group(rank: int, world_size: int, port: int) -> None:
    """A group may have the name of one that is gone."""
    idx, x = torch.tensor([[0], [1]]), torch.ones(2, 8)
    for attempt in range(2):
        buffer = Buffer(dist.group.WORLD)
        buffer.dispatch(x, **_layout_of(buffer, idx, world_size), topk_idx=idx)
        if attempt == 0:
            dist.barrier()
            dist.destroy_process_group()
            address = f"tcp://127.0.0.1:{port}"
            dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size, timeout=PATIENCE)


@without_gpu
def test_a_group_may_have_the_name_of_one_that_is_gone() -> None:
    own = World(2)
    try:
        own.run(_after_another_group, free_port())
    finally:
        own.close()


def _group_of_gloo_alone(rank: int, world_size: int) -> None:
    """vLLM passes a group of gloo for rows of GPUs. Here gloo stands for NCCL."""
    backends: list[str] = []
    make = deep_ep.group_of_same_ranks

    def make_of_gloo(group: Any, backend: str, timeout: Any) -> Any:
        backends.append(backend)
        return make(group, "gloo", timeout)

    group = dist.new_group()
    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        assert deep_ep._group_for_rows(group) is group
    with (
        mock.patch.object(deep_ep, "group_of_same_ranks", make_of_gloo),
        mock.patch.object(torch.cuda, "is_available", lambda: True),
    ):
        rows = deep_ep._group_for_rows(group)
        assert deep_ep._group_for_rows(group) is rows and rows.group_name != group.group_name
        for fit in ("cpu:gloo,cuda:nccl", "cuda:nccl"):
            with mock.patch.object(dist, "get_backend_config", lambda group, fit=fit: fit):
                assert deep_ep._group_for_rows(group) is group
    assert backends == ["cpu:gloo,cuda:nccl"]
    assert dist.get_process_group_ranks(rows) == dist.get_process_group_ranks(group)
    torch_ep.init(rows, timeout=PATIENCE)
    idx = torch.tensor([[rank]])
    plan = torch_ep.plan(idx, world_size, rows)
    _same("rows", torch_ep.dispatch(torch.full((1, 4), rank + 1.0), plan), torch.full((1, 4), rank + 1.0))
    torch_ep.destroy(rows)


def test_a_group_that_cannot_move_rows_of_gpus_gets_one_that_can() -> None:
    world(2).run(_group_of_gloo_alone)


def _masks(rank: int, world_size: int) -> None:
    group = dist.new_group()
    buffer = Buffer(group, enable_shrink=True)
    status = torch.full((world_size,), 7, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * world_size
    with pytest.raises(RuntimeError, match="expected a group on backend nvlink"):
        buffer.low_latency_update_mask_buffer(1 - rank, True)
    buffer.low_latency_clean_mask_buffer()
    torch_ep.destroy(group)


@without_gpu
def test_masks() -> None:
    world(2).run(_masks)


def _on_nodes(rank: int, world_size: int) -> None:
    """A group that the program made a grid of nodes stays one."""
    group = dist.new_group()
    torch_ep.init(group, ranks_per_node=2, timeout=PATIENCE)
    problem = Problem(world_size, seed=11)
    idx, x, weights = problem.idx[rank], problem.x[rank], problem.weights[rank]
    buffer = ElasticBuffer(group)
    assert buffer.get_logical_domain_size() == (2, 2) and (buffer.scaleout_rank_idx, buffer.scaleup_rank_idx) == (
        rank // 2,
        rank % 2,
    )
    plain = Buffer(group)
    layout = _layout_of(plain, idx, problem.num_experts)
    recv_x, _, recv_weights, _, handle, _ = plain.dispatch(x, **layout, topk_idx=idx, topk_weights=weights)
    combined, combined_weights, _ = plain.combine(recv_x, handle, topk_weights=recv_weights)
    visited = layout["is_token_in_rank"].sum(1, keepdim=True)
    torch.testing.assert_close(combined, x * visited, rtol=0.02, atol=0.02)
    _same("weights", combined_weights, weights.masked_fill(idx < 0, 0))
    for has_hook in (False, True):
        rows, _, handle, _, hook = plain.low_latency_dispatch(
            x, idx, problem.max_tokens, problem.num_experts, use_fp8=False, return_recv_hook=has_hook
        )
        if hook is not None:
            hook()
        combined, _, _ = plain.low_latency_combine(rows, idx, weights, handle)
        total = weights.masked_fill(idx < 0, 0).sum(1, keepdim=True)
        torch.testing.assert_close(combined.float(), x.float() * total, rtol=0.02, atol=0.02)
    torch_ep.destroy(group)


@without_gpu
def test_on_a_grid_of_nodes() -> None:
    world(4).run(_on_nodes)


def test_events() -> None:
    event = EventOverlap(EventHandle(), (torch.ones(1),))
    event.register_hook_after_wait(lambda: "done")
    with pytest.raises(RuntimeError, match="register_hook_after_wait: expected one hook per event, got two"):
        event.register_hook_after_wait(lambda: "again")
    assert event.wait() == "done" and event.current_stream_wait() is None
    with event as entered:
        assert entered is event
    assert event.event is not None
    with event(release_handle=True):
        pass
    assert event.event is None
    with event:  # nothing to wait for
        pass
    with pytest.raises(RuntimeError, match="current_stream_wait: expected the event of a call with async_finish=True"):
        event.current_stream_wait()


def test_sizes_and_tuning() -> None:
    config = deep_ep.Config(20, 8, 256)
    assert (config.num_sms, config.num_max_nvl_chunked_send_tokens, config.num_max_rdma_chunked_recv_tokens) == (
        20,
        8,
        256,
    )
    assert config.get_nvl_buffer_size_hint(14336, 8) == config.get_rdma_buffer_size_hint(14336, 8) == 0
    assert Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256) == 8 * 8 * 128 * 7168
    assert Buffer.is_sm90_compiled() and Buffer.capture().event is not None
    with pytest.raises(ValueError, match="set_num_sms: expected an even number, got 3"):
        Buffer.set_num_sms(3)


# --- messages ---


def _refused(rank: int, world_size: int) -> dict[str, str]:
    """What is raised, by case. Every rank makes the same mistakes."""
    group = dist.group.WORLD
    problem = Problem(world_size)
    idx, x, weights, num_experts = problem.idx[rank], problem.x[rank], problem.weights[rank], problem.num_experts
    buffer = Buffer(group)
    elastic, ep = ElasticBuffer(group, num_max_tokens_per_rank=16), EPBuffer(group)
    layout = _layout_of(buffer, idx, num_experts)
    topk = {"topk_idx": idx, "topk_weights": weights}
    recv_x, *_, handle, _ = buffer.dispatch(x, **layout, **topk)
    sizes = (problem.max_tokens, num_experts)
    rows, _, pair, *_ = buffer.low_latency_dispatch(x, idx, *sizes, use_fp8=False)
    elastic_x, _, _, elastic_handle, _ = elastic.dispatch(x, **topk, num_experts=num_experts)
    of_others = deep_ep.LowLatencyHandle(idx, num_experts, problem.max_tokens, HIDDEN)
    destroyed = Buffer(group, explicitly_destroy=True)
    destroyed._rows = dist.new_group()  # of no one else
    deep_ep._require(destroyed._rows, {"timeout": PATIENCE}, {}).num_buffers += 1
    destroyed.destroy()
    two = (x, x, x)
    cases: dict[str, Callable[[], Any]] = {
        "no group": lambda: Buffer(None),
        "mpi": lambda: Buffer(None, comm=object()),
        "group": lambda: Buffer("world"),  # type: ignore[arg-type]
        "destroy": buffer.destroy,
        "destroyed": lambda: destroyed.low_latency_dispatch(x, idx, *sizes),
        "local buffer": lambda: buffer.get_local_buffer_tensor(torch.int8),
        "internode dispatch": lambda: buffer.internode_dispatch(x),
        "internode combine": lambda: buffer.internode_combine(x, handle),
        "layout experts": lambda: buffer.get_dispatch_layout(idx, num_experts + 1),
        "no layout": lambda: buffer.dispatch(x, **topk, is_token_in_rank=layout["is_token_in_rank"]),
        "handle and topk": lambda: buffer.dispatch(x, handle=handle, **topk),
        "weights alone": lambda: buffer.dispatch(x, **layout, topk_weights=weights),
        "handle type": lambda: buffer.dispatch(x, handle=(1, 2)),  # type: ignore[arg-type]
        "overflow": lambda: buffer.dispatch(x, **layout, **topk, num_worst_tokens=1),
        "combine handle": lambda: buffer.combine(recv_x, pair),
        "biases": lambda: buffer.combine(recv_x, handle, bias=two),  # type: ignore[arg-type]
        "ue8m0": lambda: buffer.low_latency_dispatch(x, idx, *sizes, use_ue8m0=True),
        "both": lambda: buffer.low_latency_dispatch(x, idx, *sizes, async_finish=True, return_recv_hook=True),
        "wait stats": lambda: buffer.low_latency_dispatch(
            x, idx, *sizes, dispatch_wait_recv_cost_stats=torch.zeros(world_size)
        ),
        "logfmt": lambda: buffer.low_latency_combine(rows, idx, weights, pair, use_logfmt=True),
        "zero copy": lambda: buffer.low_latency_combine(rows, idx, weights, pair, zero_copy=True),
        "pair handle": lambda: buffer.low_latency_combine(rows, idx, weights, handle),  # type: ignore[arg-type]
        "another's": lambda: buffer.low_latency_combine(rows, idx, weights, of_others),
        "shape of idx": lambda: buffer.low_latency_combine(rows, idx[:, :1], weights, pair),
        "shape of weights": lambda: buffer.low_latency_combine(rows, idx, weights[:1], pair),
        "out": lambda: buffer.low_latency_combine(rows, idx, weights, pair, out=x[:1]),
        "combine both": lambda: buffer.low_latency_combine(
            rows, idx, weights, pair, async_finish=True, return_recv_hook=True
        ),
        "next buffer": lambda: buffer.get_next_low_latency_combine_buffer(handle),  # type: ignore[arg-type]
        "shrink": lambda: buffer.low_latency_query_mask_buffer(torch.zeros(world_size)),
        "shrink, update": lambda: buffer.low_latency_update_mask_buffer(0, True),
        "shrink, clean": buffer.low_latency_clean_mask_buffer,
        "cpu bytes": lambda: ElasticBuffer(group, num_cpu_bytes=1),
        "lb": lambda: EPBuffer(group, lb_allocation_plan_or_num_bytes=1),
        "elastic neither": lambda: elastic.dispatch(x, topk_idx=idx),
        "elastic both": lambda: elastic.dispatch(x, topk_idx=idx, handle=elastic_handle),
        "elastic sync": lambda: elastic.dispatch(x, handle=elastic_handle, do_cpu_sync=True),
        "elastic differs": lambda: elastic.dispatch(x, handle=elastic_handle, num_experts=num_experts + 1),
        "elastic expand": lambda: elastic.dispatch(x, handle=elastic_handle, do_expand=True),
        "elastic handle": lambda: elastic.combine(elastic_x, handle),  # type: ignore[arg-type]
        "elastic overflow": lambda: elastic.dispatch(
            x, **topk, num_experts=num_experts, num_max_tokens_per_rank=1, do_cpu_sync=False
        ),
        "no room": lambda: ep.dispatch(x, topk_idx=idx, num_experts=num_experts, do_cpu_sync=False),
        "handle copy": lambda: ep.dispatch(x, topk_idx=idx, num_experts=num_experts, do_handle_copy=True),
        "defer": lambda: ep.dispatch(x, topk_idx=idx, num_experts=num_experts, defer_epilogue=True),
        **{
            f"{owner.__name__}.{name}": getattr(owner, name)
            for owner, names in deep_ep._SERVICES.items()
            for name in names
        },
    }
    if not torch.cuda.is_available():
        cases["stream"] = buffer.get_comm_stream
    messages = {}
    for name, call in cases.items():
        try:
            call()
        except Exception as error:
            messages[name] = f"{type(error).__name__}: {error}"
        else:
            messages[name] = "nothing"
    shrinking = Buffer(dist.new_group(), enable_shrink=True)
    try:
        shrinking.low_latency_update_mask_buffer(0)
    except NotImplementedError as error:
        messages["unmask"] = f"NotImplementedError: {error}"
    torch_ep.destroy(shrinking.group)
    return messages


MESSAGES = {
    "no group": r"ValueError: deep_ep.Buffer: expected group, a torch.distributed.ProcessGroup, got None",
    "mpi": r"NotImplementedError: deep_ep.Buffer\(comm=\) is not in torch_ep: pass group, a torch.distributed.Proc",
    "group": r"TypeError: deep_ep.Buffer: expected group to be a ProcessGroup, got str",
    "destroy": r"ValueError: deep_ep.Buffer.destroy: expected a buffer made with explicitly_destroy=True, got False",
    "destroyed": r"RuntimeError: deep_ep.Buffer: expected a buffer, got a destroyed one: make a new one",
    "local buffer": r"NotImplementedError: deep_ep.Buffer.get_local_buffer_tensor is not in .* torch_ep.reset\(group\)",
    "internode dispatch": r"NotImplementedError: deep_ep.Buffer.internode_dispatch is not in torch_ep: call dispatch",
    "internode combine": r"NotImplementedError: deep_ep.Buffer.internode_combine is not in torch_ep: call combine",
    "layout experts": r"ValueError: .*get_dispatch_layout: expected num_experts to be a positive multiple of .* got 7",
    "no layout": r"ValueError: deep_ep.Buffer.dispatch: expected handle, or what get_dispatch_layout returns, got no "
    r"num_tokens_per_rank, no num_tokens_per_expert",
    "handle and topk": r"ValueError: deep_ep.Buffer.dispatch: expected handle or topk_idx and topk_weights, got both",
    "weights alone": r"ValueError: deep_ep.Buffer.dispatch: expected topk_idx with topk_weights, got none",
    "handle type": r"TypeError: deep_ep.Buffer.dispatch: expected handle to be a Handle, got tuple: pass the one of B",
    "overflow": r"RuntimeError: .*Buffer.dispatch: expected at most 1 received rows, got more: raise num_worst_tokens",
    "combine handle": r"TypeError: deep_ep.Buffer.combine: expected handle to be a Handle, got LowLatencyHandle: pass",
    "biases": r"ValueError: deep_ep.Buffer.combine: expected bias to be a Tensor, two Tensors or None, got a t",
    "ue8m0": r"ValueError: .*low_latency_dispatch: expected round_scale=True with use_ue8m0=True, got False",
    "both": r"ValueError: .*low_latency_dispatch: expected async_finish or return_recv_hook, got both",
    "wait stats": r"ValueError: .*expected dispatch_wait_recv_cost_stats of dtype torch.int64 and shape \[2\], or a r"
    r"ow of that per rank, got torch.float32 and \[2\]",
    "logfmt": r"NotImplementedError: .*low_latency_combine\(use_logfmt=\) is not in torch_ep: .* leave it False",
    "zero copy": r"ValueError: .*expected get_next_low_latency_combine_buffer before zero_copy=True, got no such call",
    "pair handle": r"TypeError: .*low_latency_combine: expected handle to be a LowLatencyHandle, got Handle: pass",
    "another's": r"ValueError: .*low_latency_combine: expected the handle of this buffer's low_latency_dispatch, got",
    "shape of idx": r"ValueError: .*low_latency_combine: expected topk_idx of the dispatch's shape \[\d+, 4\], got",
    "shape of weights": r"ValueError: .*low_latency_combine: expected topk_weights of the dispatch's shape \[\d+, 4\]",
    "out": r"ValueError: .*low_latency_combine: expected out of shape \[\d+, 256\] and dtype torch.bfloat16, got \[1,",
    "combine both": r"ValueError: .*low_latency_combine: expected async_finish or return_recv_hook, got both",
    "next buffer": r"TypeError: .*get_next_low_latency_combine_buffer: expected handle to be a LowLatencyHandle, got H",
    "shrink": r"ValueError: .*low_latency_query_mask_buffer: expected a buffer made with enable_shrink=True, got False",
    "shrink, update": r"ValueError: .*low_latency_update_mask_buffer: expected a buffer made with enable_shrink=True",
    "shrink, clean": r"ValueError: .*low_latency_clean_mask_buffer: expected a buffer made with enable_shrink=True",
    "unmask": r"NotImplementedError: .*low_latency_update_mask_buffer\(mask=False\) is not .* on every rank",
    "cpu bytes": r"NotImplementedError: deep_ep.ElasticBuffer\(num_cpu_bytes=\) is not in torch_ep: .* leave it 0",
    "lb": r"NotImplementedError: deep_ep.EPBuffer\(lb_allocation_plan_or_num_bytes=\) is not in torch_ep: copy w",
    "elastic neither": r"ValueError: .*ElasticBuffer.dispatch: expected handle, or topk_idx and num_experts, got n",
    "elastic both": r"ValueError: deep_ep.ElasticBuffer.dispatch: expected handle or topk_idx, got both",
    "elastic sync": r"ValueError: .*ElasticBuffer.dispatch: expected do_cpu_sync=False or None with a handle, got True",
    "elastic differs": r"ValueError: deep_ep.ElasticBuffer.dispatch: expected num_experts of the handle, 6, got 7",
    "elastic expand": r"ValueError: deep_ep.ElasticBuffer.dispatch: expected do_expand of the handle, False, got True",
    "elastic handle": r"TypeError: deep_ep.ElasticBuffer.combine: expected handle to be a EPHandle, got Handle",
    "elastic overflow": r"RuntimeError: .*expected at most 2 received rows, got more: raise num_max_tokens_p",
    "no room": r"ValueError: .*EPBuffer.dispatch: expected num_max_tokens_per_rank with do_cpu_sync=False, got 0",
    "handle copy": r"NotImplementedError: deep_ep.EPBuffer.dispatch\(do_handle_copy=\) is not in torch_ep: pass a c",
    "defer": r"ValueError: .*EPBuffer.dispatch: expected async_with_compute_stream=True with defer_epilogue=True, got",
    "stream": r"NotImplementedError: deep_ep.Buffer.get_comm_stream is not in torch_ep: there are no streams on a CPU",
}


@without_gpu
def test_every_message() -> None:
    for messages in world(2).run(_refused):
        for name, message in messages.items():
            expected = MESSAGES.get(name, rf"NotImplementedError: deep_ep.{name} is not in torch_ep: \w+")
            assert re.match(expected, message), f"{name}: expected {expected}, got {message}"
        assert not torch.cuda.is_available() or messages.pop("stream", None) is None
        assert set(MESSAGES) <= {*messages, "stream"}
