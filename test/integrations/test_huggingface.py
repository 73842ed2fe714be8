"""Models of transformers with expert parallelism by torch_ep equal the same models in one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import PATIENCE, world
from torch import Tensor, nn

import torch_ep

pytest.importorskip("transformers", minversion="5.24", reason="expected transformers 5.24 or newer")
pytest.importorskip("accelerate", reason="expected accelerate, which transformers needs for device maps")

EXPERTS, NUM_TOPK, HIDDEN, VOCABULARY = 8, 3, 16, 64
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": NUM_TOPK,
    "tie_word_embeddings": False,
}
# Configurations of tiny models, by the names of transformers' classes.
CONFIGS: dict[str, dict[str, Any]] = {
    "Mixtral": {"intermediate_size": 12, "num_local_experts": EXPERTS},
    "Qwen3Moe": {
        "intermediate_size": 12, "moe_intermediate_size": 12, "num_experts": EXPERTS, "head_dim": 4,
    },
    "DeepseekV3": {
        "intermediate_size": 12, "moe_intermediate_size": 12, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
        "n_group": 4, "topk_group": 2, "num_key_value_heads": 4, "first_k_dense_replace": 1, "q_lora_rank": 8,
        "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
    },
    "GptOss": {"intermediate_size": 12, "num_local_experts": EXPERTS, "head_dim": 4},
}  # fmt: skip
models = pytest.mark.parametrize("name", CONFIGS)
# Ranks with batches of their own; ranks that share a batch.
LAYOUTS = {"batch per rank": {"fsdp_size": 2, "ep_size": 2}, "shared batch": {"tp_size": 2, "ep_size": 2}}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@functools.cache
def _folder(name: str, base: Path) -> str:
    """A saved model of random weights."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **CONFIGS[name]})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)  # logits that differ enough for every token to have its own experts
    model.save_pretrained(base / name)
    return str(base / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return functools.partial(_folder, base=tmp_path_factory.mktemp("models"))


def _load(path: str, experts: str = "eager", **layout: int) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    import torch_ep.integrations.huggingface as integration

    integration.set_init_arguments(timeout=PATIENCE)
    distributed = {}
    if layout:
        distributed["distributed_config"] = DistributedConfig(**layout, ep_implementation="torch_ep")
    return AutoModelForCausalLM.from_pretrained(
        path, experts_implementation=experts, dtype=torch.float32, **distributed
    ).eval()


def _full(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def _ids(rank: int, layout: str) -> Tensor:
    """Batches of different lengths, unless the ranks share one."""
    seed, length = (0, 6) if layout == "shared batch" else (rank, 5 + 2 * rank)
    return torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = _full(model(ids, use_cache=False).logits)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _equals_one_process(rank: int, world_size: int, path: str, layout: str, experts: str) -> None:
    model, alone = _load(path, experts, **LAYOUTS[layout]), _load(path)
    batches = [_ids(r, layout) for r in range(1 if layout == "shared batch" else world_size)]
    ids = batches[rank % len(batches)]
    with torch.no_grad():
        torch.testing.assert_close(_full(model(ids).logits), alone(ids).logits)
    _loss(model, ids).backward()
    sum(_loss(alone, batch) / len(batches) for batch in batches).backward()
    gradients = {name: parameter.grad for name, parameter in alone.named_parameters()}
    compared = 0
    for name, parameter in model.named_parameters():
        want = gradients[name]
        if parameter.grad is None:  # experts of this rank that no token visits, where there are none elsewhere either
            assert want is None or not want.any(), name
            continue
        got = _full(parameter.grad)
        torch.testing.assert_close(got, want, msg=lambda m, name=name: f"{name}: {m}")
        compared += 1
    assert compared > len(gradients) // 2


@models
@layouts
@pytest.mark.parametrize("experts", ["eager", "torch_ep"])
def test_logits_and_gradients_equal_one_process(folder: Any, name: str, layout: str, experts: str) -> None:
    world(2).run(_equals_one_process, folder(name), layout, experts)


@models
def test_experts_of_one_process_equal_those_of_transformers(folder: Any, name: str) -> None:
    ours, theirs = _load(folder(name), "torch_ep"), _load(folder(name))
    ids = _ids(0, "shared batch")
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    _loss(ours, ids).backward()
    _loss(theirs, ids).backward()
    for (name_of, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        got, want = (torch.zeros_like(p) if t.grad is None else t.grad for t in (p, q))
        torch.testing.assert_close(got, want, msg=lambda m, name=name_of: f"{name}: {m}")


def _compiled(rank: int, world_size: int, path: str) -> None:
    """The experts as transformers calls them, in one graph."""
    torch._dynamo.reset()
    model = _load(path, "torch_ep", **LAYOUTS["batch per rank"])
    experts = next(m for name, m in model.named_modules() if name.endswith(".experts"))
    forward = torch.compile(experts.forward, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (7 + rank, 4, 9):
        x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        idx = torch.rand(tokens, EXPERTS).topk(NUM_TOPK).indices
        weights = torch.rand(tokens, NUM_TOPK)
        results = []
        for function in (experts.forward, forward):
            y = function(x, idx, weights)
            results.append((y, *torch.autograd.grad(y.square().sum(), x)))
        torch.testing.assert_close(*results)
    torch._dynamo.reset()


def test_experts_compile_in_one_graph(folder: Any) -> None:
    world(2).run(_compiled, folder("Qwen3Moe"))


def _generated(rank: int, world_size: int, path: str, layout: str) -> None:
    """With a cache; ranks with batches of their own stop after different numbers of tokens."""
    model, alone = _load(path, "torch_ep", **LAYOUTS[layout]), _load(path)
    ids = _ids(rank, layout)
    count = 6 if layout == "shared batch" else 4 + 3 * rank
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    got = model.generate(ids, synced_gpus=layout == "batch per rank", **options)
    assert torch.equal(got, alone.generate(ids, **options))
    assert got.shape[1] == ids.shape[1] + count


@layouts
def test_generate_with_a_cache(folder: Any, layout: str) -> None:
    world(2).run(_generated, folder("Qwen3Moe"), layout)


def _saved(rank: int, world_size: int, path: str, target: str) -> None:
    model = _load(path, "torch_ep", **LAYOUTS["batch per rank"])
    model.save_pretrained(target, is_main_process=rank == 0)
    torch.distributed.barrier()
    again, alone = _load(target), _load(path)
    for (name, p), (other, q) in zip(again.named_parameters(), alone.named_parameters(), strict=True):
        assert name == other and torch.equal(p, q), name


def test_save_pretrained_keeps_the_names_of_transformers(folder: Any, tmp_path: Path) -> None:
    world(2).run(_saved, folder("GptOss"), str(tmp_path / "saved"))


def _on_four(rank: int, world_size: int, path: str) -> None:
    """Two tensor-parallel pairs with a batch each, all four ranks share the experts."""
    model, alone = _load(path, "torch_ep", tp_size=2, fsdp_size=2, ep_size=4), _load(path)
    ids = _ids(rank // 2, "batch per rank")
    with torch.no_grad():
        torch.testing.assert_close(_full(model(ids).logits), alone(ids).logits)


def test_tensor_and_expert_parallelism_together(folder: Any) -> None:
    world(4).run(_on_four, folder("Mixtral"))


def test_the_registry_knows_it() -> None:
    from transformers.distributed.expert_parallel import EPImplementationInterface
    from transformers.integrations.moe import ExpertsInterface

    import torch_ep.integrations.huggingface as integration

    assert EPImplementationInterface()["torch_ep"] is integration.TorchEP
    assert ExpertsInterface()["torch_ep"] is integration.experts_forward


def test_importing_torch_ep_imports_no_framework() -> None:
    import subprocess
    import sys

    code = "import sys, torch_ep; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch_ep.__version__
