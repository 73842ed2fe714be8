"""Times whole dispatch and combine calls against a baseline of permute and all_to_all_single, in the same run.

    python benchmarks/bench.py                                  # the GPUs if there are two, or else CPU with gloo
    python benchmarks/bench.py --ranks 2 --tokens 256 4096      # some sizes
    python benchmarks/bench.py --device cuda --ops dispatch combine --num-sms 16
    python benchmarks/bench.py --device cpu --layout rank_major --dtype bfloat16

Prints a table; writes OUTPUT.json (summaries, command, commit, hardware) and OUTPUT.png. benchmarks/README.md describes
the measurements.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import cpu
import gpu
import torch
from ranks import environment, positive, write_results

RESULTS = Path(__file__).parent / "results"
# Per device. An option of the other device is an error.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "ranks": [2, 4],
        "tokens": [256, 512, 1024, 2048, 4096, 8192],
        "hidden": 1024,
        "experts": 64,
        "dtype": "float32",
        "layout": "expert_major",
        "seconds": 3.0,
        "output": RESULTS / "cpu",
    },
    "cuda": {
        "ranks": None,  # as many as there are GPUs
        "tokens": [1, 64, 512, 4096],
        "hidden": 7168,
        "experts": 256,
        "ops": list(gpu.OPS),
        "num_sms": 24,
        "link_gbs": gpu.LINK_GBS,
        "output": RESULTS / "gpu",
    },
}


def parser() -> argparse.ArgumentParser:
    def both(text: str, name: str) -> str:
        cpu_default, cuda_default = (
            " ".join(map(str, d)) if isinstance(d := DEFAULTS[device][name], list) else d for device in DEFAULTS
        )
        return f"{text} (default: {cpu_default}; on GPUs {cuda_default or 'as many as divide the experts evenly'})"

    p = argparse.ArgumentParser(
        description="Whole dispatch and combine calls of torch_ep against permute and all_to_all_single.",
        epilog="ops on GPUs: " + "; ".join(f"{name}: {op.title}" for name, op in gpu.OPS.items()),
    )
    devices = list(DEFAULTS)
    p.add_argument("--device", choices=devices, help="device of the tensors (default: cuda if there are two GPUs)")
    p.add_argument("--ranks", type=positive, nargs="+", help=both("processes; one run per number", "ranks"))
    p.add_argument("--tokens", type=positive, nargs="+", help=both("tokens per rank", "tokens"))
    p.add_argument("--hidden", type=positive, help=both("elements per token", "hidden"))
    p.add_argument("--topk", type=positive, default=8, help="experts per token (default: %(default)s)")
    p.add_argument("--experts", type=positive, help=both("experts over all ranks", "experts"))
    iterations = "most timed calls per side and row of the table (default: %(default)s)"
    p.add_argument("--iterations", type=positive, default=50, help=iterations)
    output = "where the results go: .json and .png are appended (default: benchmarks/results/cpu or gpu)"
    p.add_argument("--output", type=Path, help=output)

    on_cpu = p.add_argument_group("CPU only")
    on_cpu.add_argument("--dtype", choices=cpu.DTYPES, help="of the rows (default: float32)")
    layouts = ["expert_major", "rank_major"]
    on_cpu.add_argument("--layout", choices=layouts, help="of the received rows (default: expert_major)")
    fewer = f"limit per row of the table; at least {cpu.MIN_ITERATIONS} calls are timed all the same (default: 3)"
    on_cpu.add_argument("--seconds", type=partial(positive, kind=float), help=fewer)

    on_gpu = p.add_argument_group("GPUs only")
    on_gpu.add_argument("--ops", choices=gpu.OPS, nargs="+", metavar="OP", help="which of the ops below (default: all)")
    on_gpu.add_argument("--num-sms", type=positive, help="SMs that the kernels may use (default: 24)")
    link = f"GB/s per GPU and direction, for the floor (default: {gpu.LINK_GBS:g}, see benchmarks/README.md)"
    on_gpu.add_argument("--link-gbs", type=partial(positive, kind=float), help=link)
    return p


def parse(argv: list[str]) -> argparse.Namespace:
    p = parser()
    args = p.parse_args(argv)
    args.command = argv
    gpus = torch.cuda.device_count()
    if args.device is None:
        args.device = "cuda" if gpus >= 2 else "cpu"
    defaults = DEFAULTS[args.device]
    for name, value in vars(args).items():
        if name in defaults and value is None:
            setattr(args, name, defaults[name])
        elif value is not None and name not in defaults and any(name in others for others in DEFAULTS.values()):
            p.error(f"--{name.replace('_', '-')}: not an option of --device {args.device}")
    if args.ranks is None:
        args.ranks = [max((n for n in range(2, gpus + 1) if args.experts % n == 0), default=2)]
    for ranks in args.ranks:
        if ranks < 2:
            p.error(f"--ranks: expected at least 2, got {ranks}: one rank exchanges nothing, see one_rank.py")
        if args.experts % ranks:
            p.error(f"--experts: expected a multiple of the {ranks} ranks, got {args.experts}")
        if args.device == "cuda" and ranks > gpus:
            p.error(f"--ranks: expected at most one per GPU, of which there are {gpus}, got {ranks}")
    if args.topk > args.experts:
        p.error(f"--topk: expected at most the {args.experts} experts, got {args.topk}")
    if args.device == "cuda" and args.hidden % gpu.SCALE_BLOCK:
        p.error(f"--hidden: expected a multiple of {gpu.SCALE_BLOCK}, the elements of an fp8 scale, got {args.hidden}")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    side = gpu if args.device == "cuda" else cpu
    results = {**environment("bench.py", argv), **side.run(args)}
    print(side.verdict(results["rows"]))
    json_path, png_path = write_results(args.output, results), Path(f"{args.output}.png")
    side.draw(results, png_path)
    print(f"wrote {json_path} and {png_path}")


if __name__ == "__main__":
    main(sys.argv[1:])
