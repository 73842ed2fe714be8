"""torchtitan's trainer on the CPU: for its tests, and for benchmarks/torchtitan_step.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from .harness import seeded

TOKEN_DISPATCHER = "torch_ep.integrations.torchtitan.token_dispatcher"
SELECTIVE_AC = "torch_ep.integrations.torchtitan.selective_ac"
OVERRIDES = (TOKEN_DISPATCHER, SELECTIVE_AC)
BATCH = 2  # sequences per rank and step
VOCABULARY = 2048
STEPS = 20


class _CPUModule:
    """torch.cpu, with what torchtitan asks a device's module for besides."""

    get_device_name = staticmethod(lambda device=None: "CPU")
    get_device_properties = staticmethod(lambda device=None: SimpleNamespace(total_memory=2**30))
    memory_stats = staticmethod(lambda device=None: {})
    empty_cache = reset_peak_memory_stats = staticmethod(lambda: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


def import_for_cpu() -> None:
    """Imports torchtitan, which otherwise takes a machine without accelerators for one with CUDA."""
    from torch import _utils

    saved = _utils._get_available_device_type, _utils._get_device_module
    _utils._get_available_device_type = lambda: "cpu"
    _utils._get_device_module = lambda device_type: _CPUModule()
    try:
        import torchtitan.trainer  # noqa: F401
    finally:
        _utils._get_available_device_type, _utils._get_device_module = saved


def make_trainer(
    rank: int,
    world_size: int,
    imports: tuple = (),
    *,
    num_layers: int = 3,
    num_topk: int = 3,
    dtype: str = "float32",
    seq_len: int = 32,
    comm_backend: str = "standard",
    capacity_factor: float | None = None,
    cuda_graphs: bool = False,
    compile_backend: str | None = None,
    expert_parallel: int = 2,
    tensor_parallel: int = 1,
) -> Any:
    """torchtitan's trainer of the first layers of its debug model (the first one is dense), on random tokens."""
    import_for_cpu()
    from torch.distributed.fsdp import FSDPModule
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.distributed import ParallelDims
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.deepseek_v3 import config_registry, model_registry
    from torchtitan.trainer import Trainer

    class RandomTokens(BaseDataLoader):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):
            pass

        def __init__(self, config: Any, *, dp_rank: int, seq_len: int, local_batch_size: int, **_: Any) -> None:
            self.generator, self.shape = seeded(dp_rank), (local_batch_size, seq_len + 1)

        def __iter__(self) -> Iterator:
            while True:
                tokens = torch.randint(VOCABULARY // 4, self.shape, generator=self.generator)
                positions = torch.arange(self.shape[1] - 1).repeat(self.shape[0], 1)
                yield {"input": tokens[:, :-1].contiguous(), "positions": positions}, tokens[:, 1:].contiguous()

        def state_dict(self) -> dict:
            return {}

        def load_state_dict(self, state_dict: dict) -> None:
            pass

    class NoTokenizer(BaseTokenizer):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):
            pass

        def __init__(self, config: Any, **_: Any) -> None:
            super().__init__()

        encode = decode = get_vocab_size = None

    class CPUTrainer(Trainer):
        def init_distributed(self) -> Any:  # the process group is there
            return ParallelDims.from_config(self.config.parallelism, world_size)

    os.environ["LOCAL_RANK"] = str(rank)
    config = config_registry.deepseek_v3_debugmodel()
    config.model_spec = model_registry(
        "debugmodel", moe_comm_backend=comm_backend, non_blocking_capacity_factor=capacity_factor
    )
    config.dataloader, config.tokenizer = RandomTokens.Config(), NoTokenizer.Config()
    config.training.local_batch_size, config.training.seq_len, config.training.steps = BATCH, seq_len, STEPS
    config.training.mixed_precision_param = dtype
    config.training.disable_cuda_graphs = not cuda_graphs
    config.parallelism.expert_parallel_degree = expert_parallel
    config.parallelism.tensor_parallel_degree = tensor_parallel
    config.parallelism.spmd_backend = "partial_dtensor"  # the others need a newer torch than 2.13
    config.debug.seed = 1
    config.checkpoint.enable = False
    config.override.imports = list(imports)
    config.compile.enable, config.compile.backend = compile_backend is not None, compile_backend or "inductor"
    config.model_spec.model.layers = config.model_spec.model.layers[:num_layers]
    for layer in config.model_spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()  # Flex has no backward on a CPU
        if layer.moe is not None:
            layer.moe.router.top_k = layer.moe.routed_experts.token_dispatcher.top_k = num_topk
    trainer = CPUTrainer(config)
    for module in trainer.model_parts[0].modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return trainer


def train(trainer: Any, steps: int) -> list[float]:
    losses: list[float] = []
    trainer.metrics_processor.log = lambda step, loss, *_, **__: losses.append(float(loss))
    batches = trainer.batch_generator(trainer.dataloader)
    for _ in range(steps):
        trainer.step += 1
        trainer.train_step(batches)
    return losses
