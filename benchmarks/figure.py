"""Figures of benchmark results: at most six lines per panel, all of them in the legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # needs no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
BASELINE = "baseline: permute + all_to_all_single"


def _columns(rows: Sequence[dict[str, Any]], *path: str) -> list[float]:
    values = []
    for row in rows:
        value: Any = row
        for key in path:
            value = value[key]
        values.append(value)
    return values


def _of_op(rows: Sequence[dict[str, Any]], op: str) -> list[dict[str, Any]]:
    return sorted((row for row in rows if row["op"] == op), key=lambda row: row["tokens"])


def _token_axis(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    tokens = sorted({row["tokens"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(tokens))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(tokens, [str(t) for t in tokens])
    axes.set_xlabel("tokens per rank")
    axes.grid(True, alpha=0.3)


def _on_gpus(results: dict[str, Any]) -> str:
    """The second line of a title."""
    hardware = results["hardware"]
    return (
        f"{len(hardware['gpus'])} x {hardware['gpus'][0]}, driver {hardware['driver']}, torch {results['torch']}, "
        f"CUDA {hardware['cuda']}, NCCL {hardware['nccl']}"
    )


def draw_cpu(results: dict[str, Any], path: Path) -> None:
    """One column per number of ranks: times, ratio of the times, ratio of the peak memory."""
    rows, settings = results["rows"], results["settings"]
    worlds = sorted({row["ranks"] for row in rows})
    ops = list(dict.fromkeys(row["op"] for row in rows))
    figure, grid = plt.subplots(
        3,
        len(worlds),
        figsize=(5.2 * len(worlds) + 0.8, 9.6),
        height_ratios=(3, 2, 2),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for column, ranks in enumerate(worlds):
        times, ratios, peaks = grid[:, column]
        for op, color in zip(ops, COLORS, strict=False):
            of_op = _of_op([row for row in rows if row["ranks"] == ranks], op)
            tokens = _columns(of_op, "tokens")
            for side, style, marker in (("ours", "-", "o"), ("baseline", "--", "s")):
                median, low, high = (
                    [us / 1000 for us in _columns(of_op, side, key)] for key in ("median_us", "p5_us", "p95_us")
                )
                times.plot(tokens, median, style, marker=marker, markersize=4, color=color)
                times.fill_between(tokens, low, high, color=color, alpha=0.12, linewidth=0)
            ratios.plot(tokens, _columns(of_op, "ratio"), "-o", markersize=4, color=color)
            ours, baseline = (_columns(of_op, side, "peak_bytes") for side in ("ours", "baseline"))
            # Small batches need less than the resolution of the measurement.
            shares = [a / b if b else math.nan for a, b in zip(ours, baseline, strict=True)]
            peaks.plot(tokens, shares, "-o", markersize=4, color=color)
        for axes in (times, ratios, peaks):
            _token_axis(axes, rows)
        times.set_yscale("log")
        times.set_title(f"{ranks} ranks")
        for axes in (ratios, peaks):
            axes.axhline(1, color="black", linewidth=1)
            axes.set_ylim(0, 1.1 * max(1, axes.get_ylim()[1]))
    labels = ("ms per call", "time, torch_ep / baseline", "peak memory, torch_ep / baseline")
    for axes, label in zip(grid[:, 0], labels, strict=True):
        axes.set_ylabel(label)
    handles = [Line2D([], [], color=color, label=op) for op, color in zip(ops, COLORS, strict=False)]
    handles.append(Line2D([], [], color="black", marker="o", markersize=4, label="torch_ep, median"))
    handles.append(Line2D([], [], color="black", marker="s", markersize=4, linestyle="--", label="baseline, median"))
    handles.append(Patch(color="black", alpha=0.12, label="5th to 95th percentile"))
    grid[0, 0].legend(handles=handles, fontsize=8.5, loc="upper left")
    hardware = results["hardware"]
    figure.suptitle(
        f"Whole calls; {BASELINE} + scatter_add_\n"
        f"{settings['layout']}, {settings['dtype']}, hidden {settings['hidden']}, {settings['experts']} experts, "
        f"top-{settings['topk']}\n{hardware['cpu']}, {hardware['cores']} cores, torch {results['torch']}",
        fontsize=10.5,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """The time of each op beside that of NCCL and of the baseline, and the floor of the link."""
    shown = {"ours": "torch_ep", "nccl": "NCCL, equal splits of the same bytes", "baseline": f"{BASELINE}, NCCL"}
    width = 0.27
    for n, (side, label) in enumerate(shown.items()):
        places = [i + (n - 1) * width for i, row in enumerate(rows) if side in row]
        times = [row[side]["median_us"] for row in rows if side in row]
        bars = axes.bar(places, times, width, label=label, color=("#0072b2", "#e69f00", "#bbbbbb")[n])
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    floors = {i: row["floor_us"] for i, row in enumerate(rows) if row["floor_us"] is not None}
    starts, ends = ([i + side for i in floors] for side in (-0.45, 0.45))
    axes.hlines(
        list(floors.values()), starts, ends, color="black", linewidth=1.2, label="floor: wire bytes / link rate"
    )
    labels = [row["op"] for row in rows]
    axes.set_xticks(range(len(rows)), labels, rotation=20, ha="right", rotation_mode="anchor", fontsize=8.5)
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])  # room for the legend
    axes.set_ylabel("us per call, median")
    axes.grid(True, axis="y", alpha=0.3)
    axes.legend(fontsize=8.5, ncols=4, loc="upper center")


OPS_PER_PANEL = 3  # with their baselines, six lines


def _panels(ops: Sequence[str]) -> list[list[str]]:
    """Groups of related ops: the variants of one dispatch, the combines, and the rest."""
    families: dict[str, list[str]] = {}
    for op in ops:
        family = op.removesuffix("-capacity").removesuffix("-cached")
        if not family.startswith("dispatch"):
            family = "combine" if family.startswith("combine") else "rest"
        families.setdefault(family, []).append(op)
    return [ops[i : i + OPS_PER_PANEL] for ops in families.values() for i in range(0, len(ops), OPS_PER_PANEL)]


def draw_gpu(results: dict[str, Any], path: Path) -> None:
    """Per number of GPUs: the ops at the most tokens, and below the times of related ops over the tokens."""
    rows, settings = results["rows"], results["settings"]
    worlds = sorted({row["ranks"] for row in rows})
    panels = _panels(list(dict.fromkeys(row["op"] for row in rows)))
    most = max(row["tokens"] for row in rows)
    figure = plt.figure(figsize=(15, 9.5 * len(worlds)), layout="constrained")
    for part, ranks in zip(figure.subfigures(len(worlds), squeeze=False)[:, 0], worlds, strict=True):
        of_world = [row for row in rows if row["ranks"] == ranks]
        grid = part.add_gridspec(2, len(panels), height_ratios=(5, 4))
        bars = part.add_subplot(grid[0, :])
        _bars(bars, [row for row in of_world if row["tokens"] == most])
        bars.set_title(f"{ranks} GPUs, {most} tokens per rank")
        first = None
        for place, ops in enumerate(panels):
            axes = first = part.add_subplot(grid[1, place], sharey=first)
            for op, color in zip(ops, COLORS, strict=False):
                of_op = _of_op(of_world, op)
                tokens = _columns(of_op, "tokens")
                axes.plot(tokens, _columns(of_op, "ours", "median_us"), "-o", markersize=4, color=color, label=op)
                axes.plot(tokens, _columns(of_op, "baseline", "median_us"), "--", linewidth=0.9, color=color)
            _token_axis(axes, of_world)
            axes.set_yscale("log")
            axes.tick_params(labelleft=place == 0)
            handles = axes.get_legend_handles_labels()[0]
            axes.legend(
                handles=[*handles, Line2D([], [], color="black", ls="--", lw=0.9, label="baseline")], fontsize=8
            )
        part.axes[1].set_ylabel("us per call, median")
    figure.suptitle(
        f"Whole calls, hidden {settings['hidden']}, top-{settings['topk']} of {settings['experts']} experts, "
        f"{settings['num_sms']} SMs\n{_on_gpus(results)}",
        fontsize=10.5,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


LOW_LATENCY_SIDES = {
    "ours": ("-", "o", "low latency"),
    "throughput": ("--", None, "plan with capacity + dispatch or combine"),
    "nccl": ("-.", None, "NCCL, equal splits of the same bytes"),
}


def _latencies(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """One op over the tokens, beside what it is compared with."""
    tokens = _columns(rows, "tokens")
    for (side, (style, marker, label)), color in zip(LOW_LATENCY_SIDES.items(), COLORS, strict=False):
        axes.plot(tokens, _columns(rows, side, "median_us"), style, marker=marker, ms=4, color=color, label=label)
    axes.plot(tokens, _columns(rows, "floor_us"), ":", color="black", label="floor: wire bytes / link rate + signals")
    goals = [row for row in rows if row["goal_us"] is not None]
    if goals:
        axes.plot(_columns(goals, "tokens"), _columns(goals, "goal_us"), "k*", markersize=10, label="goal")
    _token_axis(axes, rows)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("us per call, median")
    axes.legend(fontsize=8)


def _overlap(axes: Axes, rows: list[dict[str, Any]]) -> None:
    shown = {"exchange": "exchange", "gemm": "GEMM", "sequential": "one after the other", "overlapped": "overlapped"}
    width = 0.2
    for n, (name, label) in enumerate(shown.items()):
        places = [i + (n - 1.5) * width for i in range(len(rows))]
        bars = axes.bar(places, _columns(rows, name, "median_us"), width, label=label, color=COLORS[n])
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    names = [f"{row['op']}\n{row['tokens']} tokens\n{row['fraction']:.0%} hidden" for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=7.5)
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # room for the legend
    axes.set_ylabel("us per call, median")
    axes.grid(True, axis="y", alpha=0.3)
    axes.legend(fontsize=8, ncols=2, loc="upper left")


def draw_low_latency(results: dict[str, Any], path: Path) -> None:
    """Per number of GPUs: one panel per op, and one with a GEMM between send and recv."""
    rows, overlap, settings = results["rows"], results["overlap"], results["settings"]
    worlds = sorted({row["ranks"] for row in rows})
    ops = list(dict.fromkeys(row["op"] for row in rows))
    columns = 3
    height = -(-(len(ops) + bool(overlap)) // columns)
    figure = plt.figure(figsize=(5.5 * columns, 4.4 * height * len(worlds) + 0.8), layout="constrained")
    for part, ranks in zip(figure.subfigures(len(worlds), squeeze=False)[:, 0], worlds, strict=True):
        grid = part.add_gridspec(height, columns)
        for place, op in enumerate(ops):
            axes = part.add_subplot(grid[divmod(place, columns)])
            _latencies(axes, _of_op([row for row in rows if row["ranks"] == ranks], op))
            axes.set_title(f"{op}, {ranks} GPUs")
        if overlap:
            axes = part.add_subplot(grid[divmod(len(ops), columns)])
            _overlap(axes, [row for row in overlap if row["ranks"] == ranks])
            axes.set_title(f"a GEMM between send and recv, {ranks} GPUs")
    figure.suptitle(
        f"Low latency in CUDA graphs, hidden {settings['hidden']}, top-{settings['topk']} of {settings['experts']} "
        f"experts\n{_on_gpus(results)}",
        fontsize=10.5,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
