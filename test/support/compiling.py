"""Helpers for tests of compiled code: a folder for Inductor's artifacts, and the exchanges of a graph."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes import pad_mm
from torch.fx import GraphModule, Node
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import torch_ep

EXCHANGES = ("ep::plan", "ep::dispatch", "ep::combine")
# Of Inductor on CUDA, where a kernel in two dimensions has no rows, and it could not tell that they are few: the fix,
# pytorch/pytorch#178878, is in torch 2.12.
DIVIDES_BY_NO_ROWS = torch.__version__ < "2.12"


@functools.cache
def artifacts() -> str:
    """A directory for this run of the tests: nothing stale inside, and the compiler's headers are prepared once."""
    path = tempfile.mkdtemp(prefix="torch_ep-test-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@contextlib.contextmanager
def inductor_cache(path: str) -> Iterator[None]:
    """Lets Inductor keep its artifacts in `path`; `artifacts()` of the parent process, where several share one."""
    with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=path):
        yield


@contextlib.contextmanager
def padded_products() -> Iterator[None]:
    """Inductor pads matrix products as it does on GPUs where it finds that faster: always, and on a CPU too."""
    with (
        mock.patch.object(pad_mm, "check_device", lambda *tensors: True),
        mock.patch.object(pad_mm, "has_triton", lambda: True),
        mock.patch.object(pad_mm, "pad_mat1", wraps=pad_mm.pad_mat1) as padded,
        inductor_config.patch(force_shape_pad=True, shape_padding=True),
    ):
        yield
    assert padded.called


def exchange_nodes(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "call_function" and n.target in torch_ep.EXCHANGES]


def exchanges_in(gm: GraphModule) -> list[str]:
    """The exchanges of a graph, in its order: "plan", "dispatch" or "combine"."""
    return [str(n.target).split(".")[1] for n in exchange_nodes(gm)]


class InductorGraphs:
    """A backend that does all that Inductor does up to code generation and then runs the graphs as they are."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Any:
        return compile_fx(gm, inputs, inner_compile=self._keep)

    def _keep(self, gm: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable:
        self.graphs.append(gm)

        def run(args: list[Any]) -> Any:
            return gm.forward(*args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    @property
    def exchanges(self) -> list[list[str]]:
        return [exchanges_in(gm) for gm in self.graphs]


class CountExchanges(TorchDispatchMode):
    """Counts the exchanges that eager code really does. Entered first it is below the modes of checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in torch_ep.EXCHANGES:
            self.seen.append(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


def record_exchanges(fn: Callable[[], Any]) -> list[tuple[str, int]]:
    """The exchanges that `fn` does, compiled or not, in the order in which they start: (operator, its num_topk).

    What is compiled inside of `fn` would be recorded too, with its fake tensors: compile before.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as prof:
        fn()
    calls = [e for e in prof.events() if e.name in EXCHANGES]
    seen = []
    for event in sorted(calls, key=lambda e: e.time_range.start):
        two_dimensional = [s for s in event.input_shapes if len(s) == 2]
        # plan: topk_idx. dispatch, combine: send_row, after the rows; weights, where given, are in between.
        shape = two_dimensional[0] if event.name == "ep::plan" else two_dimensional[1]
        seen.append((event.name.removeprefix("ep::"), shape[1]))
    return seen
