"""Mixture-of-Experts dispatch and combine as PyTorch operators."""

import torch  # noqa: F401 - the extension links against it

# Importing them is what registers the operators.
from . import _C, meta, nn, ops, reference  # type: ignore[attr-defined] # noqa: F401
from .comm import Communicator, destroy, init
from .dynamic import mark_tokens
from .ops import combine, dispatch, plan
from .plan import Layout, Plan
from .recompute import EXCHANGES, checkpoint_contexts, save_exchanges

__version__ = "0.1.0"

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
    "save_exchanges",
]
