"""Mixture-of-Experts dispatch and combine as PyTorch operators."""

import importlib.util
import os

import torch
import torch._inductor.config
import torch.compiler.config

# The import registers the operators.
try:
    from . import _C  # type: ignore[attr-defined] # noqa: F401
except ImportError as error:
    if importlib.util.find_spec("torch_ep._C") is None:
        raise ImportError(
            f"torch_ep: expected the compiled extension in {os.path.dirname(__file__)}, got the sources alone: run "
            "Python in another folder if torch_ep is installed, else compile it: python setup.py build_ext --inplace"
        ) from None
    raise ImportError(
        f"torch_ep: expected the torch that the extension was compiled with, got {torch.__version__}, with which it "
        "does not load: install torch_ep again"
    ) from error
from . import meta, nn, ops, reference  # noqa: F401
from .checkpointing import EXCHANGES, checkpoint_contexts, save_exchanges
from .comm import Communicator, active_ranks, destroy, init, mask_ranks, reset
from .halves import InFlightRows, combine_recv, combine_send, dispatch_recv, dispatch_send, order_after
from .low_latency import (
    InFlightCombine,
    InFlightDispatch,
    LowLatencyPlan,
    LowLatencyStatistics,
    low_latency_combine,
    low_latency_combine_recv,
    low_latency_combine_send,
    low_latency_dispatch,
    low_latency_dispatch_recv,
    low_latency_dispatch_send,
)
from .ops import combine, dispatch, plan
from .plan import Layout, Plan
from .sentinel import from_sentinel, to_sentinel
from .token_counts import mark_tokens

__version__ = "0.2.0"

# Plans hold tensors and plain values only, so `torch.load(weights_only=True)` may construct them.
torch.serialization.add_safe_globals(
    [InFlightCombine, InFlightDispatch, InFlightRows, LowLatencyPlan, LowLatencyStatistics, Plan, nn.RouterStats]
)

# Torch caches compiled graphs by graph and arguments, not by the code of fakes and gradient formulas. The tag keeps
# artifacts of other versions of torch_ep out.
torch.compiler.config.cache_key_tag = f"{torch.compiler.config.cache_key_tag} torch_ep-{__version__}".strip()

# The number of rows of an exact plan differs per step. Operators that depend on it stay out of CUDA graphs, which
# would be recorded again for each number.
if hasattr(torch._inductor.config, "cudagraph_unsafe_unbacked_ops"):
    torch._inductor.config.cudagraph_unsafe_unbacked_ops = [
        *torch._inductor.config.cudagraph_unsafe_unbacked_ops,
        "ep::plan.default",
    ]

__all__ = [
    "EXCHANGES",
    "Communicator",
    "InFlightCombine",
    "InFlightDispatch",
    "InFlightRows",
    "Layout",
    "LowLatencyPlan",
    "LowLatencyStatistics",
    "Plan",
    "active_ranks",
    "checkpoint_contexts",
    "combine",
    "combine_recv",
    "combine_send",
    "destroy",
    "dispatch",
    "dispatch_recv",
    "dispatch_send",
    "from_sentinel",
    "init",
    "low_latency_combine",
    "low_latency_combine_recv",
    "low_latency_combine_send",
    "low_latency_dispatch",
    "low_latency_dispatch_recv",
    "low_latency_dispatch_send",
    "mark_tokens",
    "mask_ranks",
    "nn",
    "order_after",
    "plan",
    "reference",
    "reset",
    "save_exchanges",
    "to_sentinel",
]
