"""The figure of a benchmark's results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def _columns(rows: list[dict[str, Any]], *path: str) -> list[float]:
    values = []
    for row in rows:
        value: Any = row
        for key in path:
            value = value[key]
        values.append(value)
    return values


def _token_axis(axes: Axes, tokens: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(tokens))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(tokens, [str(t) for t in tokens])
    axes.grid(True, alpha=0.3)


def draw_cpu(results: dict[str, Any], path: Path) -> None:
    """One column for each number of ranks: times, ratio of the times, ratio of the peak memory."""
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
        for op, color in zip(ops, COLOURS, strict=False):
            of_op = sorted((r for r in rows if r["ranks"] == ranks and r["op"] == op), key=lambda r: r["tokens"])
            tokens = _columns(of_op, "tokens")
            for side, style, marker in (("ours", "-", "o"), ("theirs", "--", "s")):
                median, low, high = (
                    [us / 1000 for us in _columns(of_op, side, key)] for key in ("median_us", "min_us", "max_us")
                )
                times.plot(tokens, median, style, marker=marker, markersize=4, color=color)
                times.fill_between(tokens, low, high, color=color, alpha=0.12, linewidth=0)
            ratios.plot(tokens, _columns(of_op, "ratio"), "-o", markersize=4, color=color)
            ours, theirs = (_columns(of_op, side, "peak_bytes") for side in ("ours", "theirs"))
            # Tiny sizes need less than what can be measured.
            shares = [a / b if b else math.nan for a, b in zip(ours, theirs, strict=True)]
            peaks.plot(tokens, shares, "-o", markersize=4, color=color)
        for axes in (times, ratios, peaks):
            _token_axis(axes, sorted({row["tokens"] for row in rows}))
        times.set_yscale("log")
        times.set_title(f"{ranks} ranks")
        for axes in (ratios, peaks):
            axes.axhline(1, color="black", linewidth=1)
            axes.set_ylim(0, 1.1 * max(1, axes.get_ylim()[1]))
        peaks.set_xlabel("tokens a rank")
    labels = ("ms a call (median; band: min to max)", "time, ours / by hand", "peak memory, ours / by hand")
    for axes, label in zip(grid[:, 0], labels, strict=True):
        axes.set_ylabel(label)
    handles = [Line2D([], [], color=color, label=op) for op, color in zip(ops, COLOURS, strict=False)]
    handles.append(Line2D([], [], color="black", marker="o", markersize=4, label="torch_ep"))
    handles.append(Line2D([], [], color="black", marker="s", markersize=4, linestyle="--", label="by hand"))
    grid[0, 0].legend(handles=handles, fontsize=8.5, loc="upper left")
    hardware = results["hardware"]
    figure.suptitle(
        "Whole calls against permute + all_to_all_single + scatter-add\n"
        f"{settings['layout']}, {settings['dtype']}, hidden {settings['hidden']}, {settings['experts']} experts, "
        f"top-{settings['topk']}\n{hardware['cpu']}, {hardware['cores']} cores, torch {results['torch']}",
        fontsize=10.5,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Time of each op beside that of NCCL, over the floor of the link."""
    shown = {"ours": "torch_ep", "nccl": "all_to_all_single, equal splits of the same bytes", "theirs": "by hand, NCCL"}
    width = 0.27
    for n, (side, label) in enumerate(shown.items()):
        places = [i + (n - 1) * width for i, row in enumerate(rows) if side in row]
        times = [row[side]["median_us"] for row in rows if side in row]
        bars = axes.bar(places, times, width, label=label, color=("#0072b2", "#e69f00", "#bbbbbb")[n])
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    floors = {i: row["floor_us"] for i, row in enumerate(rows) if row["floor_us"] is not None}
    starts, ends = ([i + side for i in floors] for side in (-0.45, 0.45))
    axes.hlines(list(floors.values()), starts, ends, color="black", linewidth=1.2, label="remote bytes / link rate")
    labels = [row["op"] for row in rows]
    axes.set_xticks(range(len(rows)), labels, rotation=20, ha="right", rotation_mode="anchor", fontsize=8.5)
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])  # room for the legend
    axes.grid(True, axis="y", alpha=0.3)


def draw_gpu(results: dict[str, Any], path: Path) -> None:
    """One column for each number of GPUs: the ops at the most tokens, times and floor ratios over the tokens."""
    rows, settings, hardware = results["rows"], results["settings"], results["hardware"]
    worlds = sorted({row["ranks"] for row in rows})
    ops = list(dict.fromkeys(row["op"] for row in rows))
    most = max(row["tokens"] for row in rows)
    figure, grid = plt.subplots(
        2, len(worlds), figsize=(12 * len(worlds), 9.6), sharey="row", squeeze=False, layout="constrained"
    )
    colors = dict(zip(ops, plt.get_cmap("tab20").colors, strict=False))
    for column, ranks in enumerate(worlds):
        bars, times = grid[:, column]
        of_world = [row for row in rows if row["ranks"] == ranks]
        _bars(bars, [row for row in of_world if row["tokens"] == most])
        bars.set_title(f"{ranks} GPUs, {most} tokens a rank")
        for op in ops:
            of_op = sorted((row for row in of_world if row["op"] == op), key=lambda row: row["tokens"])
            tokens = _columns(of_op, "tokens")
            times.plot(tokens, _columns(of_op, "ours", "median_us"), "-o", markersize=4, color=colors[op], label=op)
            times.plot(tokens, _columns(of_op, "theirs", "median_us"), "--", linewidth=0.8, color=colors[op])
        _token_axis(times, sorted({row["tokens"] for row in of_world}))
        times.set_yscale("log")
        times.set_xlabel("tokens a rank")
    grid[0, 0].set_ylabel("us a call, median of the slowest rank")
    grid[1, 0].set_ylabel("us a call (dashed: by hand)")
    grid[0, 0].legend(fontsize=8.5, ncols=4, loc="upper center")
    figure.legend(*grid[1, 0].get_legend_handles_labels(), fontsize=8.5, ncols=6, loc="outside lower center")
    figure.suptitle(
        f"Whole calls, hidden {settings['hidden']}, top-{settings['topk']} of {settings['experts']} experts, "
        f"{settings['num_sms']} blocks\n{len(hardware['gpus'])} x {hardware['gpus'][0]}, driver {hardware['driver']}, "
        f"torch {results['torch']}, CUDA {hardware['cuda']}, NCCL {hardware['nccl']}",
        fontsize=10.5,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


LINES = {
    "ours": ("-", "o", "low latency"),
    "throughput": ("--", None, "plan with capacity"),
    "nccl": ("-.", None, "all_to_all_single, equal splits of the same bytes"),
}


def _latencies(axes: Axes, rows: list[dict[str, Any]], ops: list[str], colors: dict[str, Any]) -> None:
    """Each op against the tokens, beside its baselines, over its floor."""
    for op in ops:
        of_op = sorted((row for row in rows if row["op"] == op), key=lambda row: row["tokens"])
        tokens = _columns(of_op, "tokens")
        for side, (style, marker, _) in LINES.items():
            widths = {"markersize": 4} if side == "ours" else {"linewidth": 0.9}
            axes.plot(tokens, _columns(of_op, side, "median_us"), style, marker=marker, color=colors[op], **widths)
        axes.plot(tokens, _columns(of_op, "floor_us"), ":", color=colors[op])
        goals = [row for row in of_op if row["goal_us"] is not None]
        axes.plot(_columns(goals, "tokens"), _columns(goals, "goal_us"), "*", markersize=11, color=colors[op], mec="k")
    _token_axis(axes, sorted({row["tokens"] for row in rows}))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens a rank")
    handles = [Line2D([], [], color=colors[op], marker="o", markersize=4, label=op) for op in ops]
    handles += [Line2D([], [], color="black", linestyle=style, label=label) for style, _, label in LINES.values()]
    handles.append(Line2D([], [], color="black", linestyle=":", label="floor: remote bytes / link rate, and signals"))
    if any(row["goal_us"] is not None for row in rows if row["op"] in ops):
        handles.append(Line2D([], [], color="white", marker="*", markersize=11, mec="k", linestyle="", label="goal"))
    axes.legend(handles=handles, fontsize=8)


def _overlap(axes: Axes, rows: list[dict[str, Any]]) -> None:
    shown = {"exchange": "exchange", "gemm": "GEMM", "sequential": "one after the other", "overlapped": "overlapped"}
    width = 0.2
    for n, (name, label) in enumerate(shown.items()):
        places = [i + (n - 1.5) * width for i in range(len(rows))]
        bars = axes.bar(places, _columns(rows, name, "median_us"), width, label=label, color=COLOURS[n])
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    names = [f"{row['op']}\n{row['tokens']} tokens\n{row['fraction']:.0%} hidden" for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=8.5)
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])  # room for the legend
    axes.grid(True, axis="y", alpha=0.3)
    axes.legend(fontsize=8, ncols=4, loc="upper center")


def draw_low_latency(results: dict[str, Any], path: Path) -> None:
    """One column for each number of GPUs: single exchanges, pairs, and a GEMM between send and recv."""
    rows, overlap = results["rows"], results["overlap"]
    settings, hardware = results["settings"], results["hardware"]
    worlds = sorted({row["ranks"] for row in rows})
    ops = list(dict.fromkeys(row["op"] for row in rows))
    colors = dict(zip(ops, plt.get_cmap("tab10").colors, strict=False))
    panels = [group for pair in (False, True) if (group := [op for op in ops if op.startswith("pair") == pair])]
    height = len(panels) + bool(overlap)
    figure, grid = plt.subplots(
        height, len(worlds), figsize=(9 * len(worlds), 5 * height + 0.8), squeeze=False, layout="constrained"
    )
    for column, ranks in enumerate(worlds):
        of_world = [row for row in rows if row["ranks"] == ranks]
        for axes, group in zip(grid[:, column], panels, strict=False):
            _latencies(axes, of_world, group, colors)
            axes.set_title(f"{ranks} GPUs")
        if overlap:
            _overlap(grid[-1, column], [row for row in overlap if row["ranks"] == ranks])
            grid[-1, column].set_title(f"{ranks} GPUs, a GEMM between send and recv")
    for axes in grid[:, 0]:
        axes.set_ylabel("us, median of the slowest rank")
    figure.suptitle(
        f"Low latency in CUDA graphs, hidden {settings['hidden']}, top-{settings['topk']} of {settings['experts']} "
        f"experts\n{len(hardware['gpus'])} x {hardware['gpus'][0]}, driver {hardware['driver']}, "
        f"torch {results['torch']}, CUDA {hardware['cuda']}, NCCL {hardware['nccl']}",
        fontsize=10.5,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
