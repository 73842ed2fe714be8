"""Mixture-of-Experts dispatch and combine as PyTorch operators."""

import torch  # noqa: F401 - the extension links against it

from . import _C, meta, ops, reference  # noqa: F401 - importing them is what registers the operators
from .comm import Communicator, destroy, init
from .ops import combine, dispatch, plan
from .plan import Layout, Plan

__version__ = "0.1.0"

__all__ = ["Communicator", "Layout", "Plan", "combine", "destroy", "dispatch", "init", "plan"]
