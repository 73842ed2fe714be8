"""Trains a byte-level Mixture-of-Experts language model on the Python standard library's own sources.

The experts of every layer are spread over the ranks (expert parallelism); everything else is on every rank and its
gradients are averaged (data parallelism). Forward and backward are compiled into one graph each, exchanges included.

    python examples/train_moe.py                     # ranks: the GPUs, over NVLink, or else some of the cores
    python examples/train_moe.py --ranks 1           # the same model on one rank, with no process group at all
    python examples/train_moe.py --resume            # go on from the last checkpoint, with any number of ranks
    torchrun --nproc-per-node 2 examples/train_moe.py

Writes into --out: checkpoint.pt (model, optimizer, configuration), figures.json, curves.png and sample.txt.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import signal
import statistics
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import torch_ep

VOCABULARY = 256  # bytes
OUT = Path("runs/moe")
CHECKPOINT, FIGURES, CURVES, SAMPLE = "checkpoint.pt", "figures.json", "curves.png", "sample.txt"
CHECKPOINT_FORMAT = 2
MAX_GRADIENT_NORM = 1.0
PEER_TIMEOUT = timedelta(minutes=10)  # ranks do not compile equally fast

# ----------------------------------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------------------------------

# Not every installation has the tests, and the code tables in `encodings` are near copies of one another: a split by
# file would find most of the validation text again in the training text.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}


class Text(NamedTuple):
    train: Tensor  # [n] uint8
    validation: Tensor
    num_files: int


def standard_library(validation_share: float = 0.05) -> Text:
    """The standard library's sources in the order of their paths, each file in one half of the split only.

    Which half depends on the file's path alone, so that a file more or less moves no other.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    halves: tuple[list[bytes], list[bytes]] = ([], [])
    for name, path in sorted(paths.items()):
        if SKIPPED_FOLDERS.isdisjoint(name.split("/")[:-1]):
            share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
            halves[share < validation_share].append(path.read_bytes() + b"\n")
    if not all(halves):
        raise RuntimeError(f"expected the sources of the standard library in {root}, found {len(paths)} files")
    train, validation = (torch.frombuffer(bytearray(b"".join(half)), dtype=torch.uint8) for half in halves)
    return Text(train, validation, sum(map(len, halves)))


def windows(text: Tensor, starts: Tensor, length: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """[n, length] inputs that begin at `starts`, and the targets: the same one byte later."""
    index = starts[:, None] + torch.arange(length + 1)
    span = text[index].to(device=device, dtype=torch.int64)
    return span[:, :-1].contiguous(), span[:, 1:].contiguous()


class Baselines(NamedTuple):
    unigram: float  # nats per byte
    bigram: float


def baselines(train: Tensor, before: Tensor, after: Tensor) -> Baselines:
    """The loss, on each byte `after` given the one `before` it, of models that count bytes and pairs of bytes.

    Unigrams with add-one smoothing: p(b) = (n_b + 1) / (n + 256). Bigrams fall back on them, with the weight of one
    observation: p(b | a) = (n_ab + p(b)) / (n_a + 1), which is a stronger opponent than add-one.
    """
    train = train.to(torch.int64)
    count = torch.bincount(train, minlength=VOCABULARY).double()
    p = (count + 1) / (count.sum() + VOCABULARY)
    pairs = torch.bincount(train[:-1] * VOCABULARY + train[1:], minlength=VOCABULARY**2).double()
    pairs = pairs.view(VOCABULARY, VOCABULARY)
    p_next = (pairs + p) / (pairs.sum(1, keepdim=True) + 1)
    return Baselines(-p[after].log().mean().item(), -p_next[before, after].log().mean().item())


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """What the parameters' shapes and the meaning of the numbers depend on; a checkpoint carries it."""

    layers: int = 4
    dim: int = 128
    heads: int = 4
    experts: int = 8
    topk: int = 2
    intermediate: int = 192
    context: int = 256
    balance: str = "bias"  # "bias": loss-free, by the router's selection bias; "aux": auxiliary loss; "none"


def capacity_rows(
    config: ModelConfig, layout: str, factor: float | None, num_tokens: int, world_size: int
) -> int | None:
    """Rows that a rank expects from an even router, times `factor`; None: as many rows as arrive."""
    if factor is None:
        return None
    if layout == "expert_major":  # a row for each (token, expert)
        even = num_tokens * config.topk
    else:  # a row for each (token, rank): not for those that have all their experts elsewhere
        choices = math.comb(config.experts, config.topk)
        missed = math.comb(config.experts - config.experts // world_size, config.topk)
        even = num_tokens * world_size * (choices - missed) / choices
    return math.ceil(even * factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [batch, heads, context, head_dim]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


#: Turns queries, keys and values, each [batch, heads, length, head_dim] with positions in them, into such results.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.dim // config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend = attend_causally) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.out(y.transpose(1, 2).reshape(batch, length, dim))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layout: torch_ep.Layout, capacity: int | None) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.moe = torch_ep.nn.MoE(
            config.dim,
            config.intermediate,
            config.experts,
            config.topk,
            selection_bias=config.balance == "bias",
            layout=layout,
            capacity=capacity,
        )

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend = attend_causally
    ) -> tuple[Tensor, torch_ep.nn.RouterStats]:
        x = x + self.attention(self.attention_norm(x), cos, sin, attend)
        y, stats = self.moe(self.moe_norm(x))
        return x + y, stats


class Output(NamedTuple):
    logits: Tensor  # [batch, length, 256]
    aux_loss: Tensor  # [], the mean over layers
    load: Tensor  # [layers, experts]: how often this rank's tokens chose each expert
    num_dropped: Tensor  # []: rows that found no place on this rank, over all layers


class MoETransformer(nn.Module):
    """A decoder over bytes. The same seed gives the same parameters at every world size."""

    def __init__(
        self, config: ModelConfig, layout: torch_ep.Layout = "expert_major", capacity: int | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.dim)
        self.blocks = nn.ModuleList(Block(config, layout, capacity) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, VOCABULARY, bias=False)
        head_dim = config.dim // config.heads
        frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angle = torch.arange(config.context)[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def moe_layers(self) -> list[torch_ep.nn.MoE]:
        return [block.moe for block in self.blocks]

    def forward(self, tokens: Tensor) -> Output:
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.embedding(tokens)
        stats = []
        for block in self.blocks:
            x, layer_stats = block(x, cos, sin)
            stats.append(layer_stats)
        return Output(
            self.head(self.norm(x)),
            torch.stack([s.aux_loss for s in stats]).mean(),
            torch.stack([s.tokens_per_expert for s in stats]),
            torch.stack([s.num_dropped for s in stats]).sum(),
        )


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


# ----------------------------------------------------------------------------------------------------------------------
# Ranks, gradients, optimizer
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, t: Tensor) -> Tensor:
        if self.world_size > 1:
            t = t.clone()
            dist.all_reduce(t)
        return t

    def gather(self, value: Any) -> list[Any]:
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values


@torch.no_grad()
def average_gradients(model: nn.Module, ranks: Ranks) -> None:
    """Turns every rank's gradients into those of the mean of all ranks' losses. Collective."""
    if ranks.world_size == 1:
        return
    experts = set(torch_ep.nn.expert_parameter_names(model))
    replicated = [p.grad for name, p in model.named_parameters() if name not in experts]
    flat = torch.cat([grad.flatten() for grad in replicated])
    dist.all_reduce(flat)
    for grad, summed in zip(replicated, flat.split([grad.numel() for grad in replicated]), strict=True):
        grad.copy_(summed.view_as(grad))
    # The gradient of an expert is already the sum over the tokens of all ranks.
    torch._foreach_div_([p.grad for p in model.parameters()], ranks.world_size)


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear over the first 5 % of the steps, then a cosine down to a twentieth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: the same file whatever the world size
# ----------------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    path: Path, model: MoETransformer, optimizer: torch.optim.Optimizer, ranks: Ranks, step: int, **more: Any
) -> None:
    """Collective; rank 0 writes. The file is complete or absent, never half written."""
    experts = set(torch_ep.nn.expert_parameter_names(model))
    moments: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        gather = torch_ep.nn.gather_experts if name in experts else (lambda t: t)
        moments[name] = {key: gather(state[key]) for key in ("exp_avg", "exp_avg_sq")} | {"step": state["step"]}
    checkpoint = {
        "format": CHECKPOINT_FORMAT,
        "config": asdict(model.config),
        "model": torch_ep.nn.full_state_dict(model),
        "optimizer": moments,
        "step": step,
        **more,
    }
    if ranks.rank == 0:
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


def read_checkpoint(path: Path, option: str = "--resume") -> dict[str, Any]:
    """Everything on the CPU. `ModelConfig(**checkpoint["config"])` and `checkpoint["model"]` are all a server needs.

    `option` is the one that named the path, for what is said if it cannot be read.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"{option}: no checkpoint at {path}") from None
    if checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise SystemExit(f"{option}: {path}: expected format {CHECKPOINT_FORMAT}, got {checkpoint.get('format')}")
    return checkpoint


@torch.no_grad()
def restore(checkpoint: dict[str, Any], model: MoETransformer, optimizer: torch.optim.Optimizer) -> None:
    """Each rank takes its experts, and their optimizer moments, out of the full ones."""
    model.load_state_dict(checkpoint["model"])
    experts = set(torch_ep.nn.expert_parameter_names(model))
    for name, parameter in model.named_parameters():
        full = checkpoint["optimizer"][name]
        take = torch_ep.nn.shard_experts if name in experts else (lambda t: t)
        state = {key: take(full[key]).to(parameter.device, copy=True) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {**state, "step": full["step"].to(parameter.device, copy=True)}


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class History:
    """What the figure shows; a checkpoint carries it, so that a resumed run shows all of its past."""

    train_step: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    validation_step: list[int] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    load: list[list[list[int]]] = field(default_factory=list)  # [time][layer][expert] tokens since the entry before
    num_dropped: int = 0


class Trainer:
    def __init__(self, args: argparse.Namespace, ranks: Ranks) -> None:
        self.args, self.ranks = args, ranks
        self.config = model_config(args)
        self.text = standard_library()
        self.batch_tokens = args.batch * args.context
        # Windows from all over the validation text, in whole batches: every rank must run the same exchanges.
        count = args.validation_batches * args.batch
        last = self.text.validation.numel() - args.context - 1
        self.validation = torch.arange(count) * last // max(1, count - 1)
        self.baselines = baselines(self.text.train, *windows(self.text.validation, self.validation, args.context))

        torch.manual_seed(args.seed)  # the same on every rank: replicated parameters start equal
        tokens_per_rank = self.batch_tokens // ranks.world_size
        capacity = capacity_rows(self.config, args.layout, args.capacity, tokens_per_rank, ranks.world_size)
        self.model = MoETransformer(self.config, args.layout, capacity).to(ranks.device)
        self.optimizer = make_optimizer(self.model, args.lr)
        self.history, self.step = History(), 0
        if args.resume:
            checkpoint = read_checkpoint(args.out / CHECKPOINT)
            restore(checkpoint, self.model, self.optimizer)
            self.history, self.step = History(**checkpoint["history"]), checkpoint["step"]
        # Training runs the compiled model. Validation and sampling run the same parameters eagerly: a second graph
        # would cost more to compile than it saves here.
        self.compiled = self.model if args.eager else torch.compile(self.model, fullgraph=True, dynamic=False)
        self.seconds: list[float] = []  # of each step of this run

    def own(self, starts: Tensor) -> Tensor:
        """This rank's part of a global batch."""
        return starts.chunk(self.ranks.world_size)[self.ranks.rank]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Depends on the seed and the step alone: neither a restart nor the world size changes what is learnt from."""
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + step)
        last = self.text.train.numel() - self.args.context - 1
        starts = torch.randint(last + 1, (self.args.batch,), generator=generator)
        return windows(self.text.train, self.own(starts), self.args.context, self.ranks.device)

    def train_step(self) -> tuple[Tensor, Output]:
        """This rank's loss, without the auxiliary one, and what else the model said."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.args.steps, self.args.lr)
        inputs, targets = self.batch(self.step)
        output = self.compiled(inputs)
        loss = cross_entropy(output.logits, targets)
        aux_weight = self.args.aux_weight if self.config.balance == "aux" else 0.0
        self.optimizer.zero_grad()
        (loss + aux_weight * output.aux_loss).backward()
        average_gradients(self.model, self.ranks)
        torch_ep.nn.clip_grad_norm_(self.model, MAX_GRADIENT_NORM)
        self.optimizer.step()
        if self.config.balance == "bias":
            for layer, load in zip(self.model.moe_layers(), output.load, strict=True):
                layer.update_selection_bias(load, self.args.bias_rate)
        self.step += 1
        return loss.detach(), output

    @torch.no_grad()
    def validate(self) -> float:
        """Nats per byte, of all ranks together."""
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for starts in self.validation.split(self.args.batch):
            inputs, targets = windows(self.text.validation, self.own(starts), self.args.context, self.ranks.device)
            total += cross_entropy(self.model(inputs).logits, targets)
        return self.ranks.sum(total).item() / self.ranks.world_size / self.args.validation_batches

    def train(self, progress: Progress) -> None:
        """To the last step, with a checkpoint after every validation."""
        args, history = self.args, self.history
        log_every, validate_every = max(1, args.steps // 100), max(1, args.steps // args.validations)
        since_log: list[tuple[Tensor, Tensor, Tensor]] = []
        while self.step < args.steps:
            started = time.perf_counter()
            loss, output = self.train_step()
            since_log.append((loss, output.load, output.num_dropped))
            validate = self.step % validate_every == 0 or self.step == args.steps
            if validate or self.step % log_every == 0:
                losses, loads, dropped = (self.ranks.sum(torch.stack(t).sum(0)) for t in zip(*since_log, strict=True))
                history.train_step.append(self.step)
                history.train_loss.append(losses.item() / self.ranks.world_size / len(since_log))
                history.load.append(loads.tolist())
                history.num_dropped += int(dropped)
                since_log.clear()
            self.seconds.append(time.perf_counter() - started)
            loss_so_far = f", loss {history.train_loss[-1]:.3f}" if history.train_loss else ""
            progress.update(f"{self.tokens_per_second():,.0f} tokens/s{loss_so_far}")
            if validate:
                history.validation_step.append(self.step)
                history.validation_loss.append(self.validate())
                self.save()
                progress.say(
                    f"step {self.step:5d}   train {history.train_loss[-1]:.3f}   "
                    f"validation {history.validation_loss[-1]:.3f} nats per byte   "
                    f"{self.tokens_per_second():,.0f} tokens/s"
                )

    def tokens_per_second(self) -> float:
        """Of all ranks, the median step. The first two steps compile and warm up."""
        return self.batch_tokens / statistics.median(self.seconds[2:] or self.seconds or [math.inf])

    def save(self) -> None:
        saved = {name: value for name, value in vars(self.args).items() if name not in NOT_SAVED}
        path = self.args.out / CHECKPOINT
        save_checkpoint(
            path, self.model, self.optimizer, self.ranks, self.step, arguments=saved, history=asdict(self.history)
        )

    @torch.no_grad()
    def sample(self, prompt: bytes, length: int, temperature: float = 0.8) -> list[str]:
        """One continuation from each rank; on every rank all of them. Collective: ranks exchange at every byte."""
        generator = torch.Generator().manual_seed(self.args.seed + self.ranks.rank)
        tokens = torch.tensor([list(prompt)], device=self.ranks.device)
        for _ in range(length):
            logits = self.model(tokens[:, -self.args.context :]).logits[0, -1].float().cpu()
            chosen = torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)
            tokens = torch.cat([tokens, chosen.to(tokens.device)[None]], 1)
        return self.ranks.gather(bytes(tokens[0].tolist()).decode("utf-8", "replace"))


class Progress:
    """A bar on a terminal and lines anywhere; silent on all ranks but the first."""

    def __init__(self, ranks: Ranks, steps: int, done: int = 0) -> None:
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())  # its own lock is a semaphore, which a process that is killed leaves behind
        self.speaks = ranks.rank == 0
        self.bar = tqdm(
            total=steps,
            initial=done,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.1,
            disable=None if self.speaks else True,  # None: a bar only on a terminal
        )

    def say(self, line: str) -> None:
        if self.speaks:
            self.bar.write(line)
            sys.stdout.flush()

    def update(self, figures: str) -> None:
        self.bar.set_postfix_str(figures)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


# ----------------------------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------------------------


def num_parameters(model: MoETransformer) -> int:
    """Counts the experts of all ranks."""
    experts, world_size = set(torch_ep.nn.expert_parameter_names(model)), model.moe_layers()[0].world_size
    return sum(p.numel() * (world_size if name in experts else 1) for name, p in model.named_parameters())


def summary(trainer: Trainer, communicator: torch_ep.Communicator, seconds: float) -> dict[str, Any]:
    """The figures of the run, for figures.json."""
    history, ranks, args = trainer.history, trainer.ranks, trainer.args
    losses = {"model": history.validation_loss[-1], **trainer.baselines._asdict()}
    return {
        "validation_nats_per_byte": losses,
        "validation_bits_per_byte": {name: loss / math.log(2) for name, loss in losses.items()},
        "validation_bytes": trainer.validation.numel() * args.context,
        "training_bytes": trainer.text.train.numel(),
        "steps": trainer.step,
        "tokens_seen": trainer.step * trainer.batch_tokens,
        "tokens_per_second": trainer.tokens_per_second() if trainer.seconds else None,
        "seconds_first_step": trainer.seconds[0] if trainer.seconds else None,
        "seconds_total": seconds,
        "rows_dropped": history.num_dropped,
        "parameters": num_parameters(trainer.model),
        "model": asdict(trainer.config),
        "world_size": ranks.world_size,
        "device": ranks.device.type,
        "backend": communicator.backend,
        "symmetric_bytes": communicator.symmetric_bytes,
        "threads_per_rank": torch.get_num_threads(),
        "compiled": not args.eager,
        "layout": args.layout,
        "capacity": args.capacity,
        "seed": args.seed,
        "torch": torch.__version__,
        "history": asdict(history),
    }


MUTED, GRID = "#59636e", "#e4e7eb"


def pyplot() -> Any:
    """matplotlib.pyplot, without a display, in the style of these figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 10, "text.color": "#1f2328", "axes.labelcolor": MUTED, "axes.edgecolor": "#c3c9d0"}
    )
    plt.rcParams.update(
        {"xtick.color": MUTED, "ytick.color": MUTED, "axes.titlesize": 11, "axes.titlelocation": "left"}
    )
    return plt


def plot(figures: dict[str, Any], path: Path) -> None:
    """The loss curves above, the load of every expert over time below, a panel for each layer."""
    plt = pyplot()
    history, losses = figures["history"], figures["validation_nats_per_byte"]
    loads = torch.tensor(history["load"], dtype=torch.float64)  # [time, layers, experts]
    relative = loads / loads.mean(2, keepdim=True)
    _, layers, experts = loads.shape

    figure = plt.figure(figsize=(11, 8), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.08)
    rows = figure.add_gridspec(2, 1, height_ratios=[1.5, 1])

    ax = figure.add_subplot(rows[0])
    ax.plot(history["train_step"], history["train_loss"], color="#9ec5f0", lw=1.4, label="training")
    ax.plot(
        history["validation_step"],
        history["validation_loss"],
        color="#1f5fa8",
        lw=2,
        marker="o",
        ms=5,
        label="validation",
    )
    for name, color in (("unigram", "#8a6d3b"), ("bigram", "#b3541e")):
        ax.axhline(losses[name], color=color, lw=1.4, ls=(0, (5, 3)))
        ax.annotate(
            f"{name} {losses[name]:.2f}",
            (1, losses[name]),
            xycoords=("axes fraction", "data"),
            xytext=(-6, 4),
            textcoords="offset points",
            ha="right",
            color=color,
        )
    ax.annotate(
        f"{losses['model']:.2f}",
        (history["validation_step"][-1], losses["model"]),
        xytext=(0, 9),
        textcoords="offset points",
        ha="center",
        color="#1f5fa8",
        fontweight="bold",
    )
    bottom = math.floor(2 * min(history["train_loss"] + history["validation_loss"])) / 2 - 0.5
    top = max(losses["unigram"], losses["model"]) + 0.4
    ax.set(xlim=(0, figures["steps"] * 1.01), ylim=(max(0, bottom), top), xlabel="step", ylabel="nats per byte")
    ax.set_title(
        f"Loss on the Python standard library: {figures['parameters'] / 1e6:.1f} M parameters, "
        f"{layers} layers of {experts} experts over {figures['world_size']} rank{'s' * (figures['world_size'] > 1)}, "
        f"{figures['tokens_seen'] / 1e6:.1f} M bytes seen"
    )
    ax.grid(color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="lower left")

    panels = rows[1].subgridspec(1, layers, wspace=0.06).subplots(squeeze=False)[0]
    for layer, ax in enumerate(panels):
        image = ax.pcolormesh(
            [0, *history["train_step"]],
            [expert - 0.5 for expert in range(experts + 1)],
            relative[:, layer].T,
            cmap="RdBu_r",
            vmin=0,
            vmax=2,
        )
        ax.invert_yaxis()
        ax.set_title(f"layer {layer}")
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(plt.MaxNLocator(3, integer=True))
        ax.yaxis.set_major_locator(plt.MaxNLocator(min(experts, 8), integer=True))
        ax.tick_params(labelleft=layer == 0)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    panels[0].set_ylabel("expert")
    bar = figure.colorbar(image, ax=panels, extend="max", pad=0.015, ticks=[0, 0.5, 1, 1.5, 2])
    bar.set_label("tokens of an expert / even share")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(figures: dict[str, Any]) -> str:
    """The table at the end of a run."""
    nats, bits = figures["validation_nats_per_byte"], figures["validation_bits_per_byte"]
    lines = [f"{'':10}{'nats/byte':>12}{'bits/byte':>12}", *(f"{n:10}{nats[n]:12.3f}{bits[n]:12.3f}" for n in nats)]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Command line and ranks
# ----------------------------------------------------------------------------------------------------------------------

#: Of this machine or this call, not of the training: not taken from a checkpoint.
NOT_SAVED = {"out", "resume", "ranks", "threads", "device", "eager", "sample_bytes"}


def add_placement(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--ranks", type=int, help="processes; the GPUs, or else up to 4 of the cores, if not given")
    group.add_argument("--threads", type=int, help="threads of a rank; its share of the cores if not given")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda: each rank one GPU")
    group.add_argument("--eager", action="store_true", help="do not compile")


def place(p: argparse.ArgumentParser, args: argparse.Namespace, fits: Callable[[int], bool]) -> None:
    """Settles the device, the ranks and their threads, where not given by what is there; `fits(1)` holds."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "WORLD_SIZE" in os.environ:  # torchrun
        args.ranks = int(os.environ["WORLD_SIZE"])
    elif args.ranks is None:
        most = torch.cuda.device_count() if args.device == "cuda" else max(2, min(4, cores))
        args.ranks = next(n for n in range(most, 0, -1) if fits(n))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", args.ranks))
    if args.threads is None:
        args.threads = max(1, cores // max(1, local_ranks))
    check_positive(p, args, "ranks", "threads")
    if args.device == "cuda" and local_ranks > torch.cuda.device_count():
        p.error(f"--ranks: expected at most one for each of the {torch.cuda.device_count()} GPUs, got {local_ranks}")


def check_positive(p: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) <= 0:
            p.error(f"--{name.replace('_', '-')}: expected a positive number, got {getattr(args, name)}")


def check_installed(p: argparse.ArgumentParser) -> None:
    missing = [name for name in ("matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        p.error(f"this needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def parser() -> argparse.ArgumentParser:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description="Trains a byte-level MoE language model.", formatter_class=formatter)
    default = ModelConfig()
    run = p.add_argument_group("run")
    run.add_argument("--out", type=Path, default=OUT, help="folder for the results")
    run.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, with its settings")
    add_placement(run)
    run.add_argument("--seed", type=int, default=0, help="of the parameters, the batches and the sample")
    run.add_argument("--sample-bytes", type=int, default=400, help="length of the text generated at the end")

    training = p.add_argument_group("training")
    training.add_argument(
        "--steps", type=int, default=400, help="optimizer steps in all, a resumed run's past included"
    )
    training.add_argument("--batch", type=int, default=16, help="windows in a step, over all ranks")
    training.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    training.add_argument("--validations", type=int, default=8, help="how often to validate and write a checkpoint")
    training.add_argument("--validation-batches", type=int, default=16, help="batches in one validation")

    model = p.add_argument_group("model")
    model.add_argument("--layers", type=int, default=default.layers)
    model.add_argument("--dim", type=int, default=default.dim)
    model.add_argument("--heads", type=int, default=default.heads)
    model.add_argument("--experts", type=int, default=default.experts, help="in each layer, over all ranks")
    model.add_argument("--topk", type=int, default=default.topk, help="experts that a token visits")
    model.add_argument("--intermediate", type=int, default=default.intermediate, help="inner size of an expert")
    model.add_argument("--context", type=int, default=default.context, help="bytes that the model sees")

    routing = p.add_argument_group("routing")
    routing.add_argument("--layout", choices=("expert_major", "rank_major"), default="expert_major")
    routing.add_argument(
        "--capacity",
        type=float,
        metavar="FACTOR",
        help="static shapes: rows of a rank as a multiple of an even load's, the rest is dropped; exact if not given",
    )
    routing.add_argument("--balance", choices=("bias", "aux", "none"), default=default.balance, help="of the experts")
    routing.add_argument("--bias-rate", type=float, default=5e-3, help="step of the selection bias (--balance bias)")
    routing.add_argument("--aux-weight", type=float, default=1e-2, help="of the auxiliary loss (--balance aux)")
    return p


def model_config(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig(**{f.name: getattr(args, f.name) for f in fields(ModelConfig)})


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, those of the checkpoint as the defaults of a resumed run, checked."""
    p = parser()
    args = p.parse_args(argv)
    if args.resume:
        checkpoint = read_checkpoint(args.out / CHECKPOINT)
        p.set_defaults(**checkpoint["arguments"])
        args = p.parse_args(argv)
        config = ModelConfig(**checkpoint["config"])
        for f in fields(ModelConfig):
            if getattr(args, f.name) != getattr(config, f.name):
                p.error(
                    f"--resume: the checkpoint has --{f.name} {getattr(config, f.name)}, got {getattr(args, f.name)}"
                )
    positive = ("steps", "batch", "validations", "validation_batches", "sample_bytes")
    check_positive(p, args, *positive, "layers", "dim", "heads", "experts", "topk", "intermediate", "context")
    place(p, args, lambda ranks: args.experts % ranks == 0 and args.batch % ranks == 0)
    if args.capacity is not None and args.capacity <= 0:
        p.error(f"--capacity: expected a positive factor, got {args.capacity}")
    if args.experts % args.ranks or args.batch % args.ranks:
        p.error(
            f"--experts and --batch: expected multiples of the {args.ranks} ranks, got {args.experts}, {args.batch}"
        )
    if args.topk > args.experts:
        p.error(f"--topk: expected at most --experts, {args.experts}, got {args.topk}")
    if args.dim % (2 * args.heads):
        p.error(f"--dim: expected an even multiple of --heads, {args.heads}, got {args.dim}")
    check_installed(p)
    return args


def limits(args: argparse.Namespace) -> dict[str, int]:
    """What `torch_ep.init` makes room for. Validation and sampling pass no more tokens at once than training does."""
    config, tokens = model_config(args), args.batch * args.context // args.ranks
    capacity = capacity_rows(config, args.layout, args.capacity, tokens, args.ranks)
    if args.ranks == 1 and args.layout == "rank_major" and capacity is not None:
        tokens = max(tokens, capacity)  # on one rank the layer's second plan, of the rows that came, is of this group
    return {
        "max_tokens_per_rank": tokens,
        "hidden": config.dim,
        "num_topk": config.topk,
        "num_experts": config.experts,
    }


def init_exchanges(device: str, limits: dict[str, int]) -> torch_ep.Communicator:
    """With its limits known, torch_ep takes NVLink by itself where the GPUs have it. Collective."""
    backend = "auto" if device == "cuda" else "c10d"
    return torch_ep.init(timeout=PEER_TIMEOUT, backend=backend, **limits)


def describe_exchanges(args: argparse.Namespace, communicator: torch_ep.Communicator) -> str:
    if args.device == "cpu":
        return "exchanges: " + ("over gloo" if args.ranks > 1 else "none, there is one rank")
    what = f"exchanges: backend {communicator.backend} ({communicator.reason})"
    if communicator.symmetric_bytes:
        what += f", {communicator.symmetric_bytes / 2**20:.1f} MiB of symmetric memory per rank"
    return what


def train(args: argparse.Namespace, ranks: Ranks) -> None:
    """What every rank does, from the first step to the results."""
    started = time.perf_counter()
    communicator = init_exchanges(args.device, limits(args))
    trainer = Trainer(args, ranks)
    progress = Progress(ranks, args.steps, trainer.step)
    text, base = trainer.text, trainer.baselines
    progress.say(
        f"{num_parameters(trainer.model):,} parameters; {args.ranks} rank{'s' * (args.ranks > 1)} on {args.device}, "
        f"{args.threads} thread{'s' * (args.threads > 1)} each; {text.train.numel():,} bytes of Python in "
        f"{text.num_files} files, validation apart\n"
        f"{describe_exchanges(args, communicator)}\n"
        f"baselines on the validation text: unigram {base.unigram:.3f}, bigram {base.bigram:.3f} nats per byte"
    )
    if trainer.step:
        progress.say(f"resuming after step {trainer.step} of {args.steps}")
    if trainer.step == 0:
        progress.say(f"validation loss before training: {trainer.validate():.3f} nats per byte")
    if not args.eager and trainer.step < args.steps:
        progress.say("compiling in the first step: half a minute to a minute, next to nothing the next time")
    trainer.train(progress)
    progress.close()
    if not trainer.seconds:  # resumed after the last step: the loss of what was loaded, not of what was saved
        trainer.history.validation_loss[-1] = trainer.validate()
    samples = trainer.sample(b"def ", args.sample_bytes)
    if ranks.rank == 0:
        figures = summary(trainer, communicator, time.perf_counter() - started)
        (args.out / SAMPLE).write_text("\n\n-----\n\n".join(samples))
        (args.out / FIGURES).write_text(json.dumps(figures, indent=1) + "\n")
        plot(figures, args.out / CURVES)
        print(f"\n--- a sample of {args.sample_bytes} bytes\n{samples[0]}\n---\n\n{report(figures)}")
        print(f"\n{CHECKPOINT}, {FIGURES}, {CURVES} and {SAMPLE} are in {args.out}", flush=True)


#: What every rank does, once there is a process group if there are several.
RankMain = Callable[[argparse.Namespace, Ranks], None]


def in_group(run: RankMain, args: argparse.Namespace, local_rank: int, **rendezvous: Any) -> None:
    """Joins the process group, runs, and leaves it."""
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    torch.set_num_threads(args.threads)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=PEER_TIMEOUT, **rendezvous)
    run(args, Ranks(dist.get_rank(), args.ranks, device))
    torch_ep.destroy()
    dist.destroy_process_group()


def worker(rank: int, run: RankMain, port: int, args: argparse.Namespace) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent reports an interrupt, once
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    in_group(run, args, rank, store=store, rank=rank, world_size=args.ranks)


def launch(run: RankMain, args: argparse.Namespace) -> None:
    """Runs the ranks on this machine; none of them outlives this call."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.spawn(worker, (run, store.port, args), nprocs=args.ranks, join=False)
    try:
        while not context.join():
            pass
    finally:
        for process in context.processes:
            process.kill()
        for process in context.processes:
            process.join()


def on_every_rank(run: RankMain, args: argparse.Namespace) -> int:
    """Runs `run` here, in the rank of torchrun that this is, or in processes of its own; the exit status."""
    try:
        if "WORLD_SIZE" in os.environ:
            in_group(run, args, int(os.environ["LOCAL_RANK"]))
        elif args.ranks == 1:
            torch.set_num_threads(args.threads)
            run(args, Ranks(device=torch.device(args.device)))
            torch_ep.destroy()
        else:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
            launch(run, args)
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        print(f"a rank failed, the others were ended: {error}", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    try:
        return on_every_rank(train, args)
    except KeyboardInterrupt:
        checkpoint = args.out / CHECKPOINT
        kept = checkpoint.exists() and checkpoint.stat().st_mtime > started
        print("\ninterrupted" + (f"; --resume goes on from {checkpoint}" if kept else ""), file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
