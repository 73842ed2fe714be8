"""The Mixture-of-Experts layer, and what states and gradients need where experts are spread over ranks."""

from .feed_forward import Activation, swigluoai
from .grad_scaler import GradScaler
from .grouped_mm import grouped_mm
from .interleave import interleave
from .moe import MoE
from .router_stats import RouterStats
from .routing import group_limited_topk
from .sharding import (
    clip_grad_norm_,
    distribute_experts,
    expert_parameter_names,
    full_state_dict,
    gather_experts,
    mark_expert_parameters,
    shard_experts,
)

__all__ = [
    "Activation",
    "GradScaler",
    "MoE",
    "RouterStats",
    "clip_grad_norm_",
    "distribute_experts",
    "expert_parameter_names",
    "full_state_dict",
    "gather_experts",
    "group_limited_topk",
    "grouped_mm",
    "interleave",
    "mark_expert_parameters",
    "shard_experts",
    "swigluoai",
]
