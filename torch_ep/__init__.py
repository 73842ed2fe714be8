"""Mixture-of-Experts dispatch and combine as PyTorch operators."""

import torch
import torch._inductor.config
import torch.compiler.config

# Importing them is what registers the operators.
from . import _C, meta, nn, ops, reference  # type: ignore[attr-defined] # noqa: F401
from .comm import Communicator, destroy, init, reset
from .dynamic import mark_tokens
from .ops import combine, dispatch, plan
from .plan import Layout, Plan
from .recompute import EXCHANGES, checkpoint_contexts, save_exchanges

__version__ = "0.1.0"

# Torch caches compiled graphs by graph and arguments, not by the code of fakes and gradient formulas: without this, an
# artifact of another version could be taken for one of this.
torch.compiler.config.cache_key_tag = f"{torch.compiler.config.cache_key_tag} torch_ep-{__version__}".strip()

# The rows of an exact plan differ from step to step: what depends on their number stays out of CUDA graphs, which would
# be recorded anew for each number.
if hasattr(torch._inductor.config, "cudagraph_unsafe_unbacked_ops"):
    torch._inductor.config.cudagraph_unsafe_unbacked_ops = [
        *torch._inductor.config.cudagraph_unsafe_unbacked_ops,
        "ep::plan.default",
    ]

__all__ = [
    "EXCHANGES",
    "Communicator",
    "Layout",
    "Plan",
    "checkpoint_contexts",
    "combine",
    "destroy",
    "dispatch",
    "init",
    "mark_tokens",
    "nn",
    "plan",
    "reference",
    "reset",
    "save_exchanges",
]
