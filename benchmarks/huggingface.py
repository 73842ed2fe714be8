"""Times the experts of a model of transformers, forward and backward, with torch_ep and with its own exchange.

    python benchmarks/huggingface.py                # on the CPU, over gloo

Prints a table and writes OUTPUT.json. Needs transformers 5.24.
"""

from __future__ import annotations

import argparse
import gc
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from platforms import PLATFORMS, cores
from ranks import environment, over_ranks, positive, run_ranks, statistics_of, write_results
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
WARM_UP = 2
# ep_implementation and experts_implementation of transformers.
SIDES = {
    "torch_ep": ("torch_ep", "torch_ep"),
    "all_to_all, grouped_mm": ("all_to_all", "grouped_mm"),
    "all_to_all, eager": ("all_to_all", "eager"),
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--ranks", type=positive, default=2, help="default: %(default)s")
    p.add_argument("--tokens", type=positive, nargs="+", default=[64, 512, 2048], help="per rank (%(default)s)")
    p.add_argument("--hidden", type=positive, default=512, help="default: %(default)s")
    p.add_argument("--intermediate", type=positive, default=256, help="default: %(default)s")
    p.add_argument("--experts", type=positive, default=16, help="default: %(default)s")
    p.add_argument("--topk", type=positive, default=4, help="default: %(default)s")
    p.add_argument("--iterations", type=positive, default=15, help="timed steps per side (default: %(default)s)")
    p.add_argument("--output", type=Path, default=RESULTS / "huggingface", help="without .json")
    return p


def make_experts(args: argparse.Namespace, side: str, world_size: int) -> torch.nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import MixtralConfig
    from transformers.distributed.expert_parallel import apply_expert_parallelism
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    import torch_ep.integrations.huggingface  # noqa: F401

    ep_implementation, experts_implementation = SIDES[side]
    config = MixtralConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_local_experts=args.experts,
        num_experts_per_tok=args.topk,
        experts_implementation=experts_implementation,
    )
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.experts = MixtralExperts(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    mesh = init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("ep", "tp"))
    plan = {
        "experts.gate_up_proj": "grouped_gemm",
        "experts.down_proj": "grouped_gemm",
        "experts": "ep_dispatch_experts",
    }
    return apply_expert_parallelism(model, mesh["ep"], mesh["tp"], plan, ep_implementation).experts


def run(rank: int, world_size: int, port: int, args: argparse.Namespace, results: Connection) -> None:
    torch.set_num_threads(max(1, cores() // world_size))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    sides = {name: make_experts(args, name, world_size) for name in SIDES}
    with tqdm(total=len(args.tokens) * (WARM_UP + args.iterations), unit="step", disable=True if rank else None) as bar:
        for tokens in args.tokens:
            generator = torch.Generator().manual_seed(1000 * rank + tokens)
            x = torch.randn(tokens, args.hidden, generator=generator).requires_grad_()
            weights, idx = torch.rand(tokens, args.experts, generator=generator).softmax(1).topk(args.topk)
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            outputs: dict[str, torch.Tensor] = {}
            gc.collect()
            for i in range(WARM_UP + args.iterations):
                for name, experts in sides.items():  # alternating, so that a disturbance affects all sides
                    experts.zero_grad(set_to_none=True)
                    x.grad = None
                    dist.barrier()
                    start = time.perf_counter()
                    out = experts(x, idx, weights)
                    out.square().sum().backward()
                    elapsed = over_ranks(time.perf_counter() - start)
                    outputs[name] = out.detach()
                    if i >= WARM_UP:
                        seconds[name].append(elapsed)
                bar.update()
            for name in outputs:
                torch.testing.assert_close(outputs[name], outputs["torch_ep"], rtol=1e-3, atol=1e-4)
            if rank == 0:
                results.send({"tokens": tokens, **{n: statistics_of([s * 1e6 for s in t]) for n, t in seconds.items()}})
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    import sys

    import transformers

    args = parser().parse_args()
    rows: list[dict[str, Any]] = run_ranks(run, args.ranks, args)
    print(f"{'tokens':>8}" + "".join(f"{name + ', ms':>28}" for name in SIDES) + f"{'ratio to the best other':>26}")
    for row in rows:
        times = [row[name]["median_us"] / 1e3 for name in SIDES]
        print(f"{row['tokens']:>8}" + "".join(f"{t:28.1f}" for t in times) + f"{times[0] / min(times[1:]):26.2f}")
    print(
        write_results(
            args.output,
            {
                **environment("huggingface.py", sys.argv[1:]),
                "transformers": transformers.__version__,
                "hardware": PLATFORMS["cpu"].hardware(),
                "settings": {
                    name: getattr(args, name) for name in ("ranks", "hidden", "intermediate", "experts", "topk")
                },
                "rows": rows,
            },
        )
    )


if __name__ == "__main__":
    main()
