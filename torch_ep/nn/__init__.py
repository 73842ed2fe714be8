"""The Mixture-of-Experts layer, and what states and gradients need where experts are spread over ranks."""

from .feed_forward import Activation, swigluoai
from .grouped_mm import grouped_mm
from .moe import MoE, RouterStats
from .routing import group_limited_topk
from .sharding import clip_grad_norm_, expert_parameter_names, full_state_dict, gather_experts, shard_experts

__all__ = [
    "Activation",
    "MoE",
    "RouterStats",
    "clip_grad_norm_",
    "expert_parameter_names",
    "full_state_dict",
    "gather_experts",
    "group_limited_topk",
    "grouped_mm",
    "shard_experts",
    "swigluoai",
]
