"""The layer equals the MoE blocks of Hugging Face's models, loaded and configured as docs/coming_from.md says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_ep.nn import MoE

pytest.importorskip("transformers", minversion="5", reason="expected transformers 5 or newer to compare with")

HIDDEN, INTERMEDIATE, EXPERTS, TOPK = 16, 12, 8, 3
SIZES = {"hidden_size": HIDDEN, "num_experts_per_tok": TOPK}
DEEPSEEK = {
    **SIZES,
    "moe_intermediate_size": INTERMEDIATE,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "experts_implementation": "eager",
}
GROUPED = {"num_expert_groups": 4, "num_topk_groups": 2, "route_scale": 2.5, "shared_intermediate": 2 * INTERMEDIATE}
LOCAL = {**SIZES, "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "experts_implementation": "eager"}


def mixtral() -> nn.Module:
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    return MixtralSparseMoeBlock(MixtralConfig(**LOCAL))


def deepseek_v3() -> nn.Module:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE

    return DeepseekV3MoE(DeepseekV3Config(**DEEPSEEK))


def deepseek_v2() -> nn.Module:
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Config, DeepseekV2Moe

    return DeepseekV2Moe(DeepseekV2Config(**DEEPSEEK, topk_method="group_limited_greedy"))


def gpt_oss() -> nn.Module:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssMLP

    return GptOssMLP(GptOssConfig(**LOCAL))


def llama4() -> nn.Module:
    from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextMoe

    return Llama4TextMoe(Llama4TextConfig(**{**LOCAL, "num_experts_per_tok": 1}))


def rows_first(experts: nn.Module) -> dict[str, Tensor]:
    gate, up = experts.gate_up_proj.transpose(1, 2).chunk(2, -1)
    return {"gate_proj": gate, "up_proj": up, "down_proj": experts.down_proj.transpose(1, 2)}


def halves(experts: nn.Module) -> dict[str, Tensor]:
    gate, up = experts.gate_up_proj.chunk(2, -1)
    return {"gate_proj": gate, "up_proj": up, "down_proj": experts.down_proj}


def interleaved(experts: nn.Module) -> dict[str, Tensor]:
    state = {"down_proj": experts.down_proj, "down_proj_bias": experts.down_proj_bias}
    for first, name in enumerate(("gate_proj", "up_proj")):
        state[name] = experts.gate_up_proj[..., first::2]
        state[f"{name}_bias"] = experts.gate_up_proj_bias[..., first::2]
    return state


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], dict[str, Tensor]], dict[str, Any]]] = {
    "Mixtral": (mixtral, rows_first, {}),
    "DeepSeek-V3": (deepseek_v3, rows_first, {**GROUPED, "score": "sigmoid", "selection_bias": True}),
    "DeepSeek-V2": (deepseek_v2, rows_first, {**GROUPED, "normalize": False}),
    "gpt-oss": (gpt_oss, interleaved, {"bias": True, "activation": "swigluoai"}),
    "Llama 4": (
        llama4,
        halves,
        {"score": "sigmoid", "normalize": False, "scale_before_experts": True, "shared_intermediate": INTERMEDIATE},
    ),
}


def state_of(block: nn.Module, of_experts: Callable[[nn.Module], dict[str, Tensor]]) -> dict[str, Tensor]:
    modules = dict(block.named_children())
    router = modules.get("gate", modules.get("router"))
    names = {"weight": "router", "bias": "router_bias", "e_score_correction_bias": "selection_bias"}
    state = {names[name]: t for name, t in router.state_dict().items()} | of_experts(block.experts)
    shared = modules.get("shared_expert", modules.get("shared_experts"))
    return state | ({} if shared is None else {f"shared_expert.{name}": t for name, t in shared.state_dict().items()})


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_models_own_block(name: str) -> None:
    make, of_experts, options = MODELS[name]
    torch.manual_seed(0)
    block = make().eval().requires_grad_(False)
    for t in block.state_dict().values():
        nn.init.normal_(t, std=0.3)
    num_topk = 1 if name == "Llama 4" else TOPK
    layer = MoE(HIDDEN, INTERMEDIATE, EXPERTS, num_topk, **options).requires_grad_(False)
    layer.load_state_dict(state_of(block, of_experts))
    x = torch.randn(3, 7, HIDDEN)
    want = block(x)
    want = (want[0] if isinstance(want, tuple) else want).view(x.shape)
    torch.testing.assert_close(layer(x)[0], want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.decode(x, 21), want, rtol=1e-4, atol=1e-4)
