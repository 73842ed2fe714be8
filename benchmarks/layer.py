"""Times a compiled MoE layer, forward and backward, against the same layer on `all_to_all_single`, on GPUs.

    python benchmarks/layer.py                   # every number of GPUs, from 2, that divides the experts
    python benchmarks/layer.py --ranks 4 --topk 8

Both layers share the code of router and experts: `BaselineMoE` replaces the exchanges of `torch_ep.nn.MoE`. Prints a
table and writes OUTPUT.json. benchmarks/README.md describes the measurements.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gpu
import torch
import torch.distributed as dist
from cases import SortedPairs, sort_pairs
from ranks import environment, over_ranks, positive, run_ranks, spread, summary, write_results
from torch import Tensor
from torch.autograd.function import once_differentiable
from tqdm import tqdm

import torch_ep

WARM_UP = 5
COMPILE_TIMEOUT = timedelta(minutes=10)  # ranks do not compile equally fast
SIDES = ("ours", "baseline")
# Relative norm of a difference: both sides sum in bfloat16 and round at different places.
TOLERANCE = 0.02


class _Expand(torch.autograd.Function):
    """One row per sorted pair. Backward gathers and sums each token's rows, without the atomics of `index_add_`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, home: Tensor) -> Tensor:
        ctx.save_for_backward(home)
        ctx.num_tokens = len(x)
        return x.index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (home,) = ctx.saved_tensors
        return grad.index_select(0, home).view(ctx.num_tokens, -1, grad.shape[1]).sum(1), None, None


class _Reorder(torch.autograd.Function):
    """rows[permutation]. Backward gathers by the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, permutation: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, permutation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


def _all_to_all(rows: Tensor, send: list[int], recv: list[int]) -> Tensor:
    out = rows.new_empty(sum(recv), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), recv, send)
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], recv: list[int]) -> Tensor:
        ctx.send, ctx.recv = send, recv
        return _all_to_all(rows, send, recv)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_to_all(grad, ctx.recv, ctx.send), None, None


# `all_to_all_single` takes its splits from the host, which breaks the graph: the exchanges run eagerly between the
# compiled router, experts and sum.
@torch.compiler.disable
def to_experts(x: Tensor, topk_idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, SortedPairs]:
    pairs = sort_pairs(topk_idx, num_experts)
    rows = _AllToAll.apply(_Expand.apply(x, pairs.token, pairs.home), pairs.send, pairs.recv)
    return _Reorder.apply(rows, pairs.by_expert, pairs.by_source), pairs.offsets, pairs


@torch.compiler.disable
def from_experts(y: Tensor, pairs: SortedPairs) -> Tensor:
    """[tokens * topk, hidden], by token."""
    rows = _AllToAll.apply(_Reorder.apply(y, pairs.by_source, pairs.by_expert), pairs.recv, pairs.send)
    return _Reorder.apply(rows, pairs.home, pairs.order)


class BaselineMoE(torch_ep.nn.MoE):
    """`MoE` with one row per (token, expert) over `all_to_all_single`."""

    def forward(self, x: Tensor) -> tuple[Tensor, torch_ep.nn.RouterStats]:
        topk_idx, weights, aux_loss, load = self.route(x)
        rows, offsets, pairs = to_experts(x, topk_idx, self.num_experts)
        y = from_experts(self.experts(rows, offsets), pairs)
        y = (y.view(*weights.shape, -1) * weights[..., None]).sum(1).to(x.dtype)  # one kernel when compiled
        return y, torch_ep.nn.RouterStats(aux_loss, load, load.new_zeros(()))


def step(layer: torch.nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """Forward and backward. Gradients are replaced, not accumulated."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    y, _ = layer(x)
    y.backward(grad)
    return y.detach()


def check_same(layers: dict[str, torch.nn.Module], x: Tensor, grad: Tensor) -> None:
    """Raises RuntimeError unless output and gradients of both layers are the same up to rounding."""
    found = {}
    for side, layer in layers.items():
        y = step(layer, x, grad)
        found[side] = {"output": y, "gradient of x": x.grad.clone()}
        found[side] |= {f"gradient of {name}": p.grad for name, p in layer.named_parameters()}
    for name, want in found["baseline"].items():
        error = ((found["ours"][name].float() - want.float()).norm() / want.float().norm()).item()
        if not error < TOLERANCE:
            raise RuntimeError(f"{name}: expected the same from both layers within {TOLERANCE}, got {error:.3g}")


def row(ranks: int, times: dict[str, Any]) -> dict[str, Any]:
    ratio = round(times["ours"]["median_us"] / times["baseline"]["median_us"], 4)
    return {"ranks": ranks, "ratio": ratio, **times}


def measure_ranks(rank: int, ranks: int, port: int, args: argparse.Namespace, results: Connection) -> None:
    """One rank of a run. Rank 0 prints, and sends (hardware, communicator) and then the row to `results`."""
    device = gpu.join_group(rank, ranks, port, COMPILE_TIMEOUT)
    communicator = torch_ep.init(
        max_tokens_per_rank=args.tokens,
        hidden=args.hidden,
        num_topk=args.topk,
        num_experts=args.experts,
        timeout=COMPILE_TIMEOUT,
        backend="nvlink",
        num_sms=args.num_sms,
    )
    stopwatch = gpu.Stopwatch(device)
    layers: dict[str, Any] = {}
    for side, kind in (("ours", torch_ep.nn.MoE), ("baseline", BaselineMoE)):
        torch.manual_seed(0)  # the same parameters
        layers[side] = kind(
            args.hidden, args.intermediate, args.experts, args.topk, device=device, dtype=torch.bfloat16
        )
        layers[side].compile(fullgraph=side == "ours", dynamic=False)
    torch.manual_seed(rank + 1)
    x = torch.randn(args.tokens, args.hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x, requires_grad=False)
    check_same(layers, x, grad)
    over_ranks(0)  # a rank with a mismatch ends all ranks here, before the timing

    def call(side: str) -> Callable[[], Tensor]:
        return lambda: step(layers[side], x, grad)

    calls = {side: call(side) for side in SIDES}
    for _ in range(WARM_UP):
        for timed in calls.values():
            stopwatch(timed)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    gc.collect()
    gc.disable()
    for _ in tqdm(range(args.iterations), desc=f"{ranks} GPUs", disable=True if rank else None):
        for side in SIDES:  # alternating, so that a disturbance affects both
            times[side].append(stopwatch(calls[side]))
    gc.enable()
    measured = row(ranks, {side: summary(t) for side, t in times.items()})
    if rank == 0:
        results.send((gpu.hardware(), gpu.describe(communicator)))
        results.send(measured)
        print(line(measured), flush=True)
    torch_ep.destroy()
    dist.destroy_process_group()


HEAD = (
    f"{'':>5} | {'forward and backward, median us (p5 to p95)':^55} |\n"
    f"{'ranks':>5} | {'torch_ep':^27} {'baseline':^27} | ratio"
)


def line(row: dict[str, Any]) -> str:
    def times(side: dict[str, Any]) -> str:
        return f"{side['median_us']:9.0f} {spread(side):<17}"

    return f"{row['ranks']:>5} | {times(row['ours'])} {times(row['baseline'])} | {row['ratio']:5.2f}"


def parse(argv: list[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description="A compiled MoE layer, forward and backward, against the same one on all_to_all_single.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    ranks = "GPUs; one run per number; every number from 2 that divides the experts if not given"
    p.add_argument("--ranks", type=positive, nargs="+", help=ranks)
    p.add_argument("--tokens", type=positive, default=4096, help="tokens per rank")
    p.add_argument("--hidden", type=positive, default=2048, help="elements per token")
    p.add_argument("--intermediate", type=positive, default=1408, help="inner size of an expert")
    p.add_argument("--experts", type=positive, default=64, help="experts over all ranks")
    p.add_argument("--topk", type=positive, default=6, help="experts per token")
    p.add_argument("--num-sms", type=positive, default=24, help="SMs that the kernels of torch_ep may use")
    p.add_argument("--iterations", type=positive, default=30, help="timed steps per layer")
    output = Path(__file__).parent / "results" / "gpu_layer"
    p.add_argument("--output", type=Path, default=output, help="path of the results, without .json")
    args = p.parse_args(argv)
    gpus = torch.cuda.device_count()
    if args.ranks is None:
        args.ranks = [n for n in range(2, gpus + 1) if args.experts % n == 0]
        if not args.ranks:
            p.error(f"expected a number of GPUs, at least 2, that divides {args.experts} experts, got {gpus}")
    for n in args.ranks:
        if not 2 <= n <= gpus:
            p.error(f"--ranks: expected 2 to the number of GPUs, {gpus}, got {n}")
        if args.experts % n:
            p.error(f"--experts: expected a multiple of the {n} ranks, got {args.experts}")
    if args.topk > args.experts:
        p.error(f"--topk: expected at most the {args.experts} experts, got {args.topk}")
    for name in ("hidden", "intermediate"):
        if getattr(args, name) % 8:
            p.error(f"--{name}: expected a multiple of 8, for a grouped GEMM in bfloat16, got {getattr(args, name)}")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    print(HEAD, flush=True)
    rows, communicators = [], {}
    for ranks in args.ranks:
        (hardware, communicators[ranks]), measured = run_ranks(measure_ranks, ranks, args)
        rows.append(measured)
    names = ("tokens", "hidden", "intermediate", "experts", "topk", "num_sms", "iterations")
    results = {
        **environment("layer.py", argv),
        "hardware": hardware,
        "communicators": communicators,
        "settings": {name: getattr(args, name) for name in names},
        "rows": rows,
    }
    print(f"wrote {write_results(args.output, results)}")


if __name__ == "__main__":
    main(sys.argv[1:])
