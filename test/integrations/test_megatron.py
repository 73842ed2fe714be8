"""Megatron-core's MoE layer with torch_ep equals the same layer with Megatron's own all-to-all dispatcher.

Megatron runs on GPUs. Here, on the CPU, stand-ins take the place of the CUDA streams that its layer and its dispatcher
ask for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.harness import PATIENCE, world
from torch import Tensor

core = pytest.importorskip("megatron.core", reason="expected megatron-core 0.19 or newer, for Python 3.12")
if tuple(map(int, core.__version__.split(".")[:2])) < (0, 19):
    pytest.skip(f"expected megatron-core 0.19 or newer, got {core.__version__}", allow_module_level=True)

HIDDEN, EXPERTS, NUM_TOPK = 16, 8, 3


class _Stream:
    """A CUDA stream, and the event that it records."""

    def wait_stream(self, other: Any) -> None:
        pass

    def record_event(self) -> Any:
        return self

    def synchronize(self) -> None:
        pass


def _as_list(sizes: Any) -> Any:
    return sizes.tolist() if isinstance(sizes, Tensor) else sizes


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    stream, all_to_all = _Stream(), dist.all_to_all_single

    def all_to_all_single(out: Tensor, rows: Tensor, output_split_sizes: Any = None, input_split_sizes: Any = None,
                          **kwargs: Any) -> Any:  # fmt: skip
        # On GPUs the dispatcher has made the sizes numbers of the host.
        return all_to_all(out, rows, _as_list(output_split_sizes), _as_list(input_split_sizes), **kwargs)

    with (
        mock.patch.object(MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", stream),
        mock.patch.object(torch.cuda, "current_device", lambda: "cpu"),
        mock.patch.object(torch.cuda, "current_stream", lambda *args: stream),
        mock.patch.object(torch.cuda, "stream", lambda *args: contextlib.nullcontext()),
        mock.patch.object(dist, "all_to_all_single", all_to_all_single),
    ):
        yield


def _config(world_size: int, **options: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_moe_experts=EXPERTS,
        moe_router_topk=NUM_TOPK,
        expert_model_parallel_size=world_size,
        moe_token_dispatcher_type="alltoall",
        use_cpu_initialization=True,
        moe_ffn_hidden_size=12,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        init_method_std=0.1,
        **options,
    )


def _spec() -> Any:
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec

    return get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)


def _build(spec: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return spec(config=config, layer_number=1)


@contextlib.contextmanager
def _parallel(world_size: int, **sizes: int) -> Iterator[None]:
    from megatron.core import parallel_state

    import torch_ep.integrations.megatron as integration

    integration.set_init_arguments(timeout=PATIENCE)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=world_size, **sizes)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"moe_router_load_balancing_type": "none"},
    "auxiliary loss": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1},
    # Tokens lose experts: the router's map has fewer than top-k for them.
    "dropped tokens": {"moe_router_load_balancing_type": "none", "moe_expert_capacity_factor": 0.5},
    "sigmoid": {"moe_router_load_balancing_type": "none", "moe_router_score_function": "sigmoid"},
}


def _equals_alltoall(rank: int, world_size: int, options: dict[str, Any]) -> None:
    """Results and gradients, over three steps of training."""
    from torch_ep.integrations.megatron import TorchEPTokenDispatcher, use_torch_ep

    with _on_cpu(), _parallel(world_size):
        config = _config(world_size, **options)
        theirs, ours = _build(_spec(), config), _build(use_torch_ep(_spec()), config)
        assert isinstance(ours.token_dispatcher, TorchEPTokenDispatcher)
        optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (theirs, ours)]
        for step in range(3):
            results = []
            for layer, optimizer in zip((theirs, ours), optimizers, strict=True):
                optimizer.zero_grad()
                x = torch.randn(5 + rank, 2, HIDDEN, generator=torch.Generator().manual_seed(10 * step + rank))
                x.requires_grad_()
                y, _ = layer(x)
                y.square().mean().backward()
                results.append((y, x.grad, *(p.grad for p in layer.parameters())))
                optimizer.step()
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_alltoall_dispatcher(options: str) -> None:
    world(2).run(_equals_alltoall, OPTIONS[options])


def _alone(rank: int, world_size: int) -> None:
    from torch_ep.integrations.megatron import use_torch_ep

    with _on_cpu(), _parallel(1):
        config = _config(1, **OPTIONS["plain"])
        theirs, ours = _build(_spec(), config), _build(use_torch_ep(_spec()), config)
        x = torch.randn(4, 2, HIDDEN)
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])


def test_one_rank_of_experts() -> None:
    world(2).run(_alone)


def _message(call: Callable[[], Any]) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)
    return "nothing raised"


def _refused(rank: int, world_size: int) -> list[str]:
    from torch_ep.integrations.megatron import TorchEPTokenDispatcher, use_torch_ep

    messages = [_message(lambda: use_torch_ep(torch.nn.Linear))]
    with _on_cpu(), _parallel(1, expert_tensor_parallel_size=2, tensor_model_parallel_size=2):
        from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

        groups = get_default_pg_collection()
        config = _config(1, **OPTIONS["plain"])
        messages.append(_message(lambda: TorchEPTokenDispatcher(EXPERTS, [*range(EXPERTS)], config, groups)))
    with _on_cpu(), _parallel(world_size):
        groups = get_default_pg_collection()
        config = _config(world_size, **OPTIONS["plain"])
        config.moe_shared_expert_overlap = True
        messages.append(_message(lambda: TorchEPTokenDispatcher(4, [*range(4)], config, groups)))
    return messages


def test_what_it_does_not_do_is_an_error() -> None:
    for other, tensor_parallel, overlap in world(2).run(_refused):
        assert other.startswith("use_torch_ep: expected what get_moe_module_spec returns, a spec of MoELayer, got ")
        assert tensor_parallel == (
            "TorchEPTokenDispatcher: expected expert_tensor_parallel_size 1, got 2: spread experts over more "
            "expert-parallel ranks instead"
        )
        assert overlap == "TorchEPTokenDispatcher: expected moe_shared_expert_overlap False, got True"
