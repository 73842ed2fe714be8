"""Times training steps of torchtitan's debug MoE model, with torch_ep's token dispatcher and with the standard one.

    python benchmarks/torchtitan_step.py            # on the CPU, over gloo

Prints a table and writes OUTPUT.json. Needs torchtitan 0.3.0 and triton.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from platforms import PLATFORMS, cores
from ranks import environment, over_ranks, positive, run_ranks, statistics_of, write_results
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "test"))
from support.torchtitan_on_cpu import BATCH, OVERRIDES, make_trainer

RESULTS = Path(__file__).parent / "results"
WARM_UP = 2
SIDES: dict[str, tuple] = {"torch_ep": OVERRIDES, "standard": ()}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--ranks", type=positive, default=2, help="default: %(default)s")
    p.add_argument("--seq-len", type=positive, nargs="+", default=[64, 256], help=f"times {BATCH} (%(default)s)")
    p.add_argument("--layers", type=positive, default=3, help="the first one is dense (default: %(default)s)")
    p.add_argument("--iterations", type=positive, default=8, help="timed steps per side (default: %(default)s)")
    p.add_argument("--output", type=Path, default=RESULTS / "torchtitan_step", help="without .json")
    return p


def step_of(trainer: Any) -> Callable[[], None]:
    trainer.metrics_processor.should_log = lambda step: False
    batches = trainer.batch_generator(trainer.dataloader)
    return lambda: trainer.train_step(batches)


def exchange_of(trainer: Any, rank: int, num_tokens: int) -> Callable[[], None]:
    """Dispatch and combine of one layer, forward and backward, without experts."""
    dispatcher = trainer.model_parts[0].layers["1"].moe.routed_experts.token_dispatcher
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(num_tokens, 256, generator=generator).bfloat16().requires_grad_()
    scores, idx = torch.rand(num_tokens, dispatcher.num_experts, generator=generator).topk(dispatcher.top_k)
    counts = torch.bincount(idx.flatten(), minlength=dispatcher.num_experts)

    def exchange() -> None:
        rows, _, metadata = dispatcher.dispatch(x, scores.requires_grad_(), idx, counts)
        dispatcher.combine(rows, metadata, x).sum().backward()

    return exchange


def time_sides(sides: dict[str, Callable[[], None]], iterations: int, bar: tqdm) -> dict[str, dict[str, float]]:
    times_us: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(WARM_UP + iterations):
        for name, run_side in sides.items():  # alternating, so that a disturbance affects all sides
            dist.barrier()
            start = time.perf_counter()
            run_side()
            elapsed = over_ranks(time.perf_counter() - start)
            if i >= WARM_UP:
                times_us[name].append(elapsed * 1e6)
        bar.update()
    return {name: statistics_of(times) for name, times in times_us.items()}


def run(rank: int, world_size: int, port: int, args: argparse.Namespace, results: Connection) -> None:
    torch.set_num_threads(max(1, cores() // world_size))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    rounds = 2 * len(args.seq_len) * (WARM_UP + args.iterations)
    with tqdm(total=rounds, unit="step", disable=True if rank else None) as bar:
        for seq_len in args.seq_len:
            options = {"num_layers": args.layers, "dtype": "bfloat16", "seq_len": seq_len}
            trainers = {name: make_trainer(rank, world_size, side, **options) for name, side in SIDES.items()}
            num_tokens = BATCH * seq_len
            measured = {
                "step": {name: step_of(t) for name, t in trainers.items()},
                "exchange": {name: exchange_of(t, rank, num_tokens) for name, t in trainers.items()},
            }
            for what, sides in measured.items():
                times = time_sides(sides, args.iterations, bar)
                if rank == 0:
                    results.send({"what": what, "tokens": num_tokens, **times})
            for trainer in trainers.values():
                trainer.close()
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    args = parser().parse_args()
    rows = run_ranks(run, args.ranks, args)
    print(f"{'':>10}{'tokens':>8}" + "".join(f"{name + ', ms':>16}" for name in SIDES) + f"{'ratio':>8}")
    for row in rows:
        times = [row[name]["median_us"] / 1e3 for name in SIDES]
        print(
            f"{row['what']:>10}{row['tokens']:>8}"
            + "".join(f"{t:16.1f}" for t in times)
            + f"{times[0] / times[1]:8.2f}"
        )
    print(
        write_results(
            args.output,
            {
                **environment("torchtitan_step.py", sys.argv[1:]),
                "torchtitan": version("torchtitan"),
                "hardware": PLATFORMS["cpu"].hardware(),
                "settings": {name: getattr(args, name) for name in ("ranks", "layers")},
                "rows": rows,
            },
        )
    )


if __name__ == "__main__":
    main()
