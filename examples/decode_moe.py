"""Continues prompts with the language model that train_moe.py trained: one byte of each prompt at every step.

The prompts are shared out among the ranks, evenly or not, and so are the experts of every layer, which the tokens reach
by torch_ep's low-latency exchanges. A step is one compiled graph: attention over the cached keys and values, router,
exchanges, experts, and the choice of the next bytes. On GPUs with NVLink it is one CUDA graph.

    python examples/train_moe.py                     # first: writes runs/moe/checkpoint.pt
    python examples/decode_moe.py                    # ranks: the GPUs, over NVLink, or else some of the cores
    python examples/decode_moe.py --prompt "def main(" --prompt "class Stack:" --temperature 0.8
    torchrun --nproc-per-node 2 examples/decode_moe.py

Writes into --out: decode.json (texts and figures) and latency.png.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import train_moe as demo
from torch import Tensor, nn

import torch_ep

FIGURES, LATENCIES = "decode.json", "latency.png"
WARM_UP_STEPS = 3  # one compiles, one warms up, one records the CUDA graph
DEFAULT_STEPS = 128
PRINTED_TEXTS = 8
PROMPTS = (
    "import os\n",
    "def main(",
    "class Queue:\n    def ",
    "    for name in sorted(",
    'if __name__ == "',
    "try:\n",
)

# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


class Cache(nn.Module):
    """Keys and values of one layer, at every position that each sequence has reached."""

    def __init__(self, batch: int, config: demo.ModelConfig) -> None:
        super().__init__()
        shape = (batch, config.heads, config.context, config.dim // config.heads)
        self.register_buffer("keys", torch.zeros(shape))
        self.register_buffer("values", torch.zeros(shape))

    def fill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention from the first position on. `demo.Attend`."""
        batch, _, length, _ = k.shape
        self.keys[:batch, :, :length] = k
        self.values[:batch, :, :length] = v
        return demo.attend_causally(q, k, v)

    def extend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Attention of one position of each sequence, [batch], to those up to it. With `positions`: `demo.Attend`."""
        batch, _, context, _ = self.keys.shape
        rows = torch.arange(batch, device=k.device)
        self.keys[rows, :, positions] = k[:, :, 0]
        self.values[rows, :, positions] = v[:, :, 0]
        reached = torch.arange(context, device=k.device) <= positions[:, None]
        return F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=reached[:, None, None])


class Decoder(nn.Module):
    """Texts that grow by a byte a step. Collective: every rank makes the same calls, also one without any text.

    Their state is in buffers, which a step changes in place: it takes no argument, waits for nothing, and a CUDA graph
    finds everything where it was. Every rank has as many slots for texts and so the same graph; idle slots are computed
    like the others, but visit no experts.

    Args:
        model: with parameters that want no gradients.
        prompts: of this rank, at least a byte each, by their numbers among those of all ranks.
        slots: of each rank, for a text each.
        temperature: 0: always the likeliest byte.
        seed: with its number and the position it decides what is drawn for a prompt, whichever rank has it.
        quantize: as in `torch_ep.nn.MoE.decode`.
        count: whether to keep statistics.
    """

    noise: Tensor | None

    def __init__(
        self,
        model: demo.MoETransformer,
        prompts: dict[int, bytes],
        slots: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        quantize: torch_ep.low_latency.Quantize | None = None,
        count: bool = False,
    ) -> None:
        super().__init__()
        config = model.config
        self.model, self.prompts = model, prompts
        self.slots, self.quantize, self.count = slots, quantize, count
        self.caches = nn.ModuleList(Cache(slots, config) for _ in range(config.layers))
        self.register_buffer("active", torch.arange(slots) < len(prompts))
        self.register_buffer("text", torch.zeros(slots, config.context, dtype=torch.int64))
        #: Of the last byte of each text.
        self.register_buffer("positions", torch.zeros(slots, dtype=torch.int64))
        # The largest sum of a logit and Gumbel noise is a draw from their softmax.
        noise = torch.zeros(slots, config.context, demo.VOCABULARY) if temperature else None
        if noise is not None:
            for row, number in zip(noise, prompts, strict=False):
                row.copy_(temperature * gumbel(seed * 1_000_003 + number, config.context))
        self.register_buffer("noise", noise)
        experts, world_size = model.moe_layers()[0].num_local_experts, model.moe_layers()[0].world_size
        self.register_buffer("tokens_per_expert", torch.zeros(config.layers, experts, dtype=torch.int64))
        self.register_buffer("wait_ns", torch.zeros(config.layers, world_size, dtype=torch.int64))
        self.to(model.cos.device)
        self.restart()

    def restart(self) -> None:
        """Back to the prompts, and counters to zero. What the prefill cached stays."""
        text = torch.zeros(self.text.shape, dtype=torch.int64)
        positions = torch.zeros(self.slots, dtype=torch.int64)
        for slot, prompt in enumerate(self.prompts.values()):
            text[slot, : len(prompt)] = torch.tensor(list(prompt))
            positions[slot] = len(prompt) - 1
        self.text.copy_(text)
        self.positions.copy_(positions)
        self.tokens_per_expert.zero_()
        self.wait_ns.zero_()

    def prefill(self, length: int) -> None:
        """Caches the first `length` positions, by the forward pass of training.

        A shorter prompt takes along what lies behind it. A step overwrites that before anything attends to it.
        """
        x = self.model.embedding(self.text[: len(self.prompts), :length])
        for block, cache in zip(self.model.blocks, self.caches, strict=True):
            x, _ = block(x, self.model.cos[:length], self.model.sin[:length], cache.fill)

    def forward(self) -> None:
        """One step: reads the last byte of each text and writes the next."""
        model, positions = self.model, self.positions
        rows = torch.arange(self.slots, device=positions.device)
        cos, sin = model.cos[positions][:, None, None], model.sin[positions][:, None, None]
        x = model.embedding(self.text[rows, positions])[:, None]
        for layer, (block, cache) in enumerate(zip(model.blocks, self.caches, strict=True)):
            attend = functools.partial(cache.extend, positions=positions)
            x = x + block.attention(block.attention_norm(x), cos, sin, attend)
            statistics = None
            if self.count:
                statistics = torch_ep.LowLatencyStatistics(self.tokens_per_expert[layer], self.wait_ns[layer])
            x = x + block.moe.decode(
                block.moe_norm(x), self.slots, active=self.active, statistics=statistics, quantize=self.quantize
            )
        logits = model.head(model.norm(x))[:, 0]
        if self.noise is not None:
            logits = logits + self.noise[rows, positions]
        self.text[rows, positions + 1] = logits.argmax(-1)
        self.positions.add_(1)

    def texts(self) -> dict[int, bytes]:
        """The whole texts, by the numbers of their prompts."""
        ends = (self.positions + 1).tolist()
        return {
            number: bytes(row[:end]) for number, row, end in zip(self.prompts, self.text.tolist(), ends, strict=False)
        }


def gumbel(seed: int, context: int) -> Tensor:
    """[context, 256] numbers from the standard Gumbel distribution."""
    exponential = torch.empty(context, demo.VOCABULARY)
    exponential.exponential_(generator=torch.Generator().manual_seed(seed))
    return -exponential.clamp_min(torch.finfo(torch.float32).tiny).log()


# ----------------------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------------------


class Clock:
    """When steps end: on a GPU by its own time, so that the host does not wait for a step before it issues the next."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ticks: list[Any] = []

    def tick(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.ticks.append(event)
        else:
            self.ticks.append(time.perf_counter())

    def intervals_ms(self) -> list[float]:
        """Between each tick and the next. Waits for the device."""
        pairs = itertools.pairwise(self.ticks)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [begin.elapsed_time(end) for begin, end in pairs]
        return [1e3 * (end - begin) for begin, end in pairs]


def share(prompts: Sequence[bytes], rank: int, world_size: int) -> dict[int, bytes]:
    """Those of one rank, by their numbers: every `world_size`-th, so none where there are fewer prompts than ranks."""
    return {number: prompts[number] for number in range(rank, len(prompts), world_size)}


def limits(args: argparse.Namespace) -> dict[str, int]:
    """What `torch_ep.init` makes room for: the tokens of the prefill, and the one of each slot in a step.

    Rows may be float32, which takes the room of two of the two-byte elements that it counts.
    """
    return {
        "max_tokens_per_rank": num_slots(args) * max(1, prefill_length(args)),
        "low_latency_tokens": num_slots(args),
        "hidden": 2 * args.config.dim,
        "num_topk": args.config.topk,
        "num_experts": args.config.experts,
    }


def num_slots(args: argparse.Namespace) -> int:
    return -(-len(args.prompts) // args.ranks)


def prefill_length(args: argparse.Namespace) -> int:
    """The last byte of a prompt is read by the first step."""
    return max(map(len, args.prompts)) - 1


def load_model(args: argparse.Namespace, device: torch.device) -> demo.MoETransformer:
    """Each rank takes its experts out of the full ones."""
    model = demo.MoETransformer(args.config)
    model.load_state_dict(demo.read_checkpoint(args.checkpoint, "--checkpoint")["model"])
    return model.to(device).requires_grad_(False)


def decode(args: argparse.Namespace, ranks: demo.Ranks) -> None:
    """What every rank does, from the prompts to the results."""
    communicator = demo.init_exchanges(args.device, limits(args))
    decoder = Decoder(
        load_model(args, ranks.device),
        share(args.prompts, ranks.rank, ranks.world_size),
        num_slots(args),
        temperature=args.temperature,
        seed=args.seed,
        quantize=args.quantize,
        count=args.statistics,
    )
    progress = demo.Progress(ranks, args.steps)
    progress.say(
        f"{len(args.prompts)} prompt{'s' * (len(args.prompts) > 1)} over {args.ranks} rank{'s' * (args.ranks > 1)} on "
        f"{args.device}, {args.threads} thread{'s' * (args.threads > 1)} each\n"
        f"{demo.describe_exchanges(args, communicator)}"
    )
    started = time.perf_counter()
    if prefill_length(args):
        decoder.prefill(prefill_length(args))
    prefilled = time.perf_counter()
    step = decoder
    if not args.eager:
        progress.say("compiling: up to a minute, next to nothing the next time")
        # A CUDA graph can hold the exchanges only where they do not wait for the host.
        mode = "reduce-overhead" if communicator.backend == "nvlink" else None
        step = torch.compile(decoder, fullgraph=True, dynamic=False, mode=mode)
    for _ in range(WARM_UP_STEPS):
        step()
        decoder.restart()
    warm = time.perf_counter()

    clock = Clock(ranks.device)
    clock.tick()
    for _ in range(args.steps):
        step()
        clock.tick()
        progress.bar.update()
    latencies = slowest(ranks.gather(clock.intervals_ms()))
    progress.close()

    texts = {number: text for part in ranks.gather(decoder.texts()) for number, text in part.items()}
    counted = statistics(decoder, ranks) if args.statistics else None
    if ranks.rank == 0:
        figures = {
            **latency_figures(latencies, len(args.prompts)),
            "prompts_per_rank": [len(share(args.prompts, rank, args.ranks)) for rank in range(args.ranks)],
            "steps": args.steps,
            "seconds_prefill": prefilled - started,
            "seconds_warm_up": warm - prefilled,
            "statistics": counted,
            "temperature": args.temperature,
            "seed": args.seed,
            "quantize": args.quantize,
            "compiled": not args.eager,
            "world_size": args.ranks,
            "device": args.device,
            "backend": communicator.backend,
            "symmetric_bytes": communicator.symmetric_bytes,
            "threads_per_rank": args.threads,
            "checkpoint": str(args.checkpoint),
            "model": asdict(args.config),
            "torch": torch.__version__,
            "texts": [
                {"prompt": printable(prompt), "continuation": printable(texts[number][len(prompt) :])}
                for number, prompt in enumerate(args.prompts)
            ],
        }
        (args.out / FIGURES).write_text(json.dumps(figures, indent=1) + "\n")
        plot(figures, args.out / LATENCIES)
        print(f"{report(figures)}\n\n{FIGURES} and {LATENCIES} are in {args.out}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------------------------


def printable(text: bytes) -> str:
    return text.decode("utf-8", "replace")


def slowest(latencies: Sequence[Sequence[float]]) -> list[float]:
    """Of all ranks, at each step: its result is there when the last one has it."""
    return [max(of_step) for of_step in zip(*latencies, strict=True)]


def latency_figures(latencies_ms: list[float], num_prompts: int) -> dict[str, Any]:
    t = torch.tensor(latencies_ms, dtype=torch.float64)
    return {
        "tokens_per_second": num_prompts / (t.mean().item() / 1e3),
        "latency_ms": {
            "median": t.quantile(0.5).item(),
            "p99": t.quantile(0.99).item(),
            "mean": t.mean().item(),
            "max": t.max().item(),
        },
        "latencies_ms": latencies_ms,
    }


def statistics(decoder: Decoder, ranks: demo.Ranks) -> dict[str, Any]:
    """Collective. tokens_per_expert: [layer][expert], those of all ranks; wait_ms: [rank][peer], over all layers."""
    tokens = ranks.gather(decoder.tokens_per_expert.tolist())
    return {
        "tokens_per_expert": [list(itertools.chain(*parts)) for parts in zip(*tokens, strict=True)],
        "wait_ms": ranks.gather([ns / 1e6 for ns in decoder.wait_ns.sum(0).tolist()]),
    }


def plot(figures: dict[str, Any], path: Path) -> None:
    """How many steps took how long."""
    plt = demo.pyplot()
    latencies, marks = figures["latencies_ms"], figures["latency_ms"]
    low, high = 0.98 * min(latencies), 1.02 * max(latencies)
    num_bins = 60
    bins = [low * (high / low) ** (i / num_bins) for i in range(num_bins + 1)]
    figure, ax = plt.subplots(figsize=(8, 4), layout="constrained", facecolor="white")
    ax.hist(latencies, bins=bins, color="#9ec5f0")
    ax.set(xscale="log", xlabel="latency of a step, ms", ylabel="steps")
    for name, color in (("median", "#1f5fa8"), ("p99", "#b3541e")):
        ax.axvline(marks[name], color=color, lw=1.4, ls=(0, (5, 3)), label=f"{name} {marks[name]:.2f} ms")
    texts, ranks = len(figures["texts"]), figures["world_size"]
    ax.set_title(
        f"Decoding {texts} text{'s' * (texts > 1)} on {ranks} rank{'s' * (ranks > 1)}: "
        f"{figures['tokens_per_second']:,.0f} tokens/s"
    )
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("{x:g}")
    ax.yaxis.set_major_locator(plt.MaxNLocator(integer=True))
    ax.grid(color=demo.GRID, lw=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="upper right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(figures: dict[str, Any]) -> str:
    """Texts and figures, as they are printed."""
    lines = []
    for number, text in enumerate(figures["texts"][:PRINTED_TEXTS]):
        lines += [f"--- {number}", text["prompt"] + text["continuation"]]
    if len(figures["texts"]) > PRINTED_TEXTS:
        lines.append(f"--- and {len(figures['texts']) - PRINTED_TEXTS} more, in {FIGURES}")
    latency = figures["latency_ms"]
    lines += [
        "---\n",
        f"{figures['tokens_per_second']:,.0f} tokens/s; latency of a step: median {latency['median']:.2f} ms, "
        f"p99 {latency['p99']:.2f} ms",
    ]
    if figures["statistics"] is not None:
        for layer, tokens in enumerate(figures["statistics"]["tokens_per_expert"]):
            lines.append(f"layer {layer}, tokens of each expert: {' '.join(map(str, tokens))}")
        for rank, waits in enumerate(figures["statistics"]["wait_ms"]):
            lines.append(f"rank {rank}, ms waited for each rank: {' '.join(f'{ms:.1f}' for ms in waits)}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description="Continues prompts with a trained MoE model.", formatter_class=formatter)
    run = p.add_argument_group("run")
    run.add_argument(
        "--checkpoint", type=Path, default=demo.OUT / demo.CHECKPOINT, help="what examples/train_moe.py wrote"
    )
    run.add_argument("--out", type=Path, default=Path("runs/decode"), help="folder for the results")
    demo.add_placement(run)
    run.add_argument("--statistics", action="store_true", help="count each expert's tokens and the waits for each rank")

    decoding = p.add_argument_group("decoding")
    decoding.add_argument(
        "--prompt", action="append", help="text to continue; may be given several times; a few of Python if not given"
    )
    decoding.add_argument(
        "--batch", type=int, help="texts over all ranks, prompts repeated if they are fewer; as prompts if not given"
    )
    decoding.add_argument(
        "--steps",
        type=int,
        help=f"bytes to add to each prompt; {DEFAULT_STEPS}, or what the context has room for, if not given",
    )
    decoding.add_argument("--temperature", type=float, default=0.8, help="of the choice; 0: always the likeliest byte")
    decoding.add_argument("--seed", type=int, default=0, help="of the choice, with a temperature")
    decoding.add_argument(
        "--quantize", choices=("fp8", "fp8_pow2", "fp8_ue8m0"), help="tokens travel in fp8; as they are if not given"
    )
    return p


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, checked; with `config`, that of the checkpoint, and `prompts`, one for each text."""
    p = parser()
    args = p.parse_args(argv)
    demo.check_installed(p)
    if not args.checkpoint.exists():
        out = "" if args.checkpoint.parent == demo.OUT else f" --out {args.checkpoint.parent}"
        p.error(f"--checkpoint: no checkpoint at {args.checkpoint}: run python examples/train_moe.py{out} first")
    args.config = demo.ModelConfig(**demo.read_checkpoint(args.checkpoint, "--checkpoint")["config"])
    demo.place(p, args, lambda ranks: args.config.experts % ranks == 0)
    if args.config.experts % args.ranks:
        p.error(f"--ranks: expected to divide the checkpoint's {args.config.experts} experts, got {args.ranks}")

    given = [prompt.encode("utf-8", "surrogateescape") for prompt in args.prompt or PROMPTS]
    if not all(given):
        p.error("--prompt: expected at least one byte, got none")
    if args.batch is None:
        args.batch = len(given)
    demo.check_positive(p, args, "batch")
    args.prompts = list(itertools.islice(itertools.cycle(given), args.batch))
    longest = max(map(len, args.prompts))
    room = args.config.context - longest
    if room <= 0:
        p.error(f"--prompt: expected less than the checkpoint's context of {args.config.context} bytes, got {longest}")
    if args.steps is None:
        args.steps = min(DEFAULT_STEPS, room)
    demo.check_positive(p, args, "steps")
    if args.steps > room:
        p.error(f"--steps: expected at most {room} behind a prompt of {longest} bytes, got {args.steps}")
    if args.temperature < 0:
        p.error(f"--temperature: expected 0 or more, got {args.temperature}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        return demo.on_every_rank(decode, args)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
