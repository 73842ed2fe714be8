"""Draws the diagrams of these pages.

    python docs/diagrams.py        writes docs/images/*.svg

Numbers in the diagrams come from `torch_ep.reference`, so that they cannot differ from what the operators do.
`test/e2e/test_docs.py` fails if a committed diagram is not what this script draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import torch

from torch_ep import reference
from torch_ep.plan import Plan

IMAGES = Path(__file__).parent / "images"

# Rank 0 is blue and rank 1 is orange in every diagram. The colors differ in brightness too.
RANK_FILL = ("#cfe0f5", "#fbd9b5")
RANK_LINE = ("#2b5f9e", "#b3611a")
PAPER, INK, MUTED, GRID, PADDING = "#ffffff", "#1f2328", "#59636e", "#c7ccd1", "#eef0f2"
GREEN_FILL, GREEN_LINE = "#d5ecd4", "#2f7d32"


class Drawing:
    """An SVG with a white background, so that it is readable on a dark page."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        content: str,
        *,
        anchor: str = "start",
        color: str = INK,
        size: int = 13,
        mono: bool = False,
        bold: bool = False,
    ) -> None:
        family = "ui-monospace, Menlo, Consolas, monospace" if mono else "system-ui, Segoe UI, Helvetica, sans-serif"
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{color}" font-size="{size}"'
            f' font-family="{family}"{weight}>{escape(content)}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        label: str = "",
        *,
        fill: str = PAPER,
        line: str = GRID,
        mono: bool = False,
        size: int = 13,
        dashed: bool = False,
    ) -> None:
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}" stroke="{line}"'
            f"{dash}/>"
        )
        lines = label.split("\n") if label else []
        for i, row in enumerate(lines):
            middle = y + height / 2 + (i - (len(lines) - 1) / 2) * (size + 4) + size * 0.35
            self.text(x + width / 2, middle, row, anchor="middle", mono=mono, size=size)

    def arrow(self, x1: float, y1: float, x2: float, y2: float, *, color: str = INK, dashed: bool = False) -> None:
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{color}" stroke-width="1.5"'
            f' marker-end="url(#head-{color[1:]})"{dash}/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, *, color: str = GRID, dashed: bool = False) -> None:
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{color}" stroke-width="1.5"{dash}/>'
        )

    def svg(self) -> str:
        colors = sorted({INK, MUTED, *RANK_LINE, GREEN_LINE})
        heads = "".join(
            f'<marker id="head-{color[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{color}"/></marker>'
            for color in colors
        )
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img">\n<title>{escape(self.title)}</title>\n'
            f'<defs>{heads}</defs>\n<rect width="100%" height="100%" fill="{PAPER}"/>\n{body}\n</svg>\n'
        )


# The example of docs/concepts.md: two ranks, two experts each. Rank 0 holds experts 0 and 1.
TOPK_IDX = [torch.tensor([[0, 3], [2, 3], [1, -1]]), torch.tensor([[3, 0]])]
NUM_EXPERTS, WORLD_SIZE, NUM_TOPK = 4, 2, 2
TOKEN_NAMES = (("a", "b", "c"), ("d",))


def plans(layout: str, alignment: int = 1) -> list[Plan]:
    return reference.plan(TOPK_IDX, NUM_EXPERTS, layout=layout, alignment=alignment)  # type: ignore[arg-type]


def token_of_row(plan: Plan, rank: int, row: int) -> str:
    """The name of the token that the rank's wire row `row` carries."""
    token = next(t for t, entries in enumerate(plan.send_row.tolist()) if row in entries)
    return TOKEN_NAMES[rank][token]


def received_tokens(rank: int) -> list[tuple[int, str]]:
    """(source rank, token) of each wire row that the rank receives, in order."""
    received = []
    for source, plan in enumerate(plans("rank_major")):
        ends = plan.send_counts.cumsum(0).tolist()
        rows = range(ends[rank] - int(plan.send_counts[rank]), ends[rank])
        received += [(source, token_of_row(plan, source, row)) for row in rows]
    return received


def token_box(d: Drawing, x: float, y: float, rank: int, label: str, width: float = 34, height: float = 26) -> None:
    d.box(x, y, width, height, label, fill=RANK_FILL[rank], line=RANK_LINE[rank], mono=True)


def plan_diagram() -> Drawing:
    d = Drawing(860, 330, "From topk_idx to send_row: six numbers, worked through")
    plan = plans("expert_major")[0]
    d.text(20, 28, "1. topk_idx of rank 0", bold=True)
    d.text(20, 46, "three tokens, two slots", color=MUTED)
    for t, entries in enumerate(TOPK_IDX[0].tolist()):
        token_box(d, 20, 62 + 32 * t, 0, TOKEN_NAMES[0][t])
        for k, expert in enumerate(entries):
            fill, line = (PADDING, GRID) if expert < 0 else (RANK_FILL[expert // 2], RANK_LINE[expert // 2])
            d.box(66 + 44 * k, 62 + 32 * t, 40, 26, str(expert), fill=fill, line=line, mono=True)
    d.text(20, 182, "blue: an expert of rank 0", color=MUTED)
    d.text(20, 200, "orange: an expert of rank 1", color=MUTED)
    d.text(20, 218, "gray: -1, no expert", color=MUTED)

    d.arrow(172, 106, 232, 106)
    d.text(250, 28, "2. one wire row per (token, rank)", bold=True)
    d.text(250, 46, "by destination rank, then token", color=MUTED)
    row, ends = 0, plan.send_counts.cumsum(0).tolist()
    for destination in range(WORLD_SIZE):
        while row < ends[destination]:
            d.text(266, 80 + 32 * row, str(row), anchor="end", mono=True, color=MUTED)
            token_box(d, 276, 62 + 32 * row, 0, token_of_row(plan, 0, row))
            d.arrow(316, 75 + 32 * row, 364, 75 + 32 * row, color=RANK_LINE[destination])
            d.text(374, 80 + 32 * row, f"to rank {destination}")
            row += 1
    d.text(250, 210, "b names two experts of rank 1,", color=MUTED)
    d.text(250, 228, "and its row crosses the link once.", color=MUTED)

    d.arrow(458, 106, 518, 106)
    d.text(536, 28, "3. send_row", bold=True)
    d.text(536, 46, "the wire row of each slot", color=MUTED)
    for t, entries in enumerate(plan.send_row.tolist()):
        token_box(d, 536, 62 + 32 * t, 0, TOKEN_NAMES[0][t])
        for k, entry in enumerate(entries):
            d.box(582 + 44 * k, 62 + 32 * t, 40, 26, str(entry), fill=PADDING if entry < 0 else PAPER, mono=True)
    d.text(536, 182, f"send_counts = {plan.send_counts.tolist()}", mono=True)
    d.text(536, 200, f"recv_counts = {plan.recv_counts.tolist()}", mono=True)

    d.line(20, 250, 840, 250)
    d.text(20, 278, "Expert e lives on rank e * W // num_experts. Here W = 2 and num_experts = 4.", color=MUTED)
    d.text(20, 300, "Rank 1 has one token, d, with topk_idx [3, 0]: one of its rows comes to rank 0.", color=MUTED)
    return d


def layouts_diagram() -> Drawing:
    d = Drawing(860, 400, "The rows that rank 1 receives, in both layouts")
    rank = 1
    by_rank, by_expert = plans("rank_major")[rank], plans("expert_major", alignment=4)[rank]
    received = received_tokens(rank)

    d.text(20, 28, "rank_major: one row per (token, rank)", bold=True)
    d.text(20, 46, "ordered by source rank, then token", color=MUTED)
    d.text(84, 72, "row", anchor="middle", color=MUTED)
    d.text(160, 72, "recv_topk_idx", anchor="middle", color=MUTED)
    assert by_rank.recv_topk_idx is not None and by_expert.recv_pair is not None
    for i, (source, name) in enumerate(received):
        d.text(50, 98 + 32 * i, str(i), anchor="end", mono=True, color=MUTED)
        token_box(d, 66, 80 + 32 * i, source, name)
        for k, expert in enumerate(by_rank.recv_topk_idx[i].tolist()):
            d.box(118 + 44 * k, 80 + 32 * i, 40, 26, str(expert), fill=PADDING if expert < 0 else PAPER, mono=True)
    d.text(20, 200, f"offsets = {by_rank.offsets.tolist()}", mono=True)
    d.text(20, 218, "where each source rank's rows end", color=MUTED)
    d.text(20, 248, "Experts are local numbers:", color=MUTED)
    d.text(20, 266, "expert 2 is local expert 0 of rank 1.", color=MUTED)

    d.text(400, 28, "expert_major: one row per (token, local expert)", bold=True)
    d.text(400, 46, "grouped by expert; alignment=4 pads each group to 4 rows", color=MUTED)
    d.text(516, 72, "row", anchor="middle", color=MUTED)
    d.text(592, 72, "recv_pair", anchor="middle", color=MUTED)
    pairs, begin = by_expert.recv_pair.tolist(), 0
    for expert, end in enumerate(by_expert.offsets.tolist()):
        top = 80 + 32 * begin
        d.box(400, top - 3, 80, 32 * (end - begin) - 4, f"local\nexpert {expert}", fill=GREEN_FILL, line=GREEN_LINE)
        for i in range(begin, end):
            pair = pairs[i]
            if pair < 0:
                d.box(499, 80 + 32 * i, 34, 26, "0", fill=PADDING, mono=True)
            else:
                token_box(d, 499, 80 + 32 * i, *received[pair // NUM_TOPK])
                why = f"= {pair // NUM_TOPK} * {NUM_TOPK} + {pair % NUM_TOPK}"
                d.text(630, 98 + 32 * i, why, mono=True, color=MUTED)
            d.box(572, 80 + 32 * i, 40, 26, str(pair), fill=PADDING if pair < 0 else PAPER, mono=True)
        begin = end
    d.text(720, 98, "row * K + slot", color=MUTED)
    d.text(400, 360, f"offsets = {by_expert.offsets.tolist()}", mono=True)
    d.text(400, 380, f"tokens_per_expert = {by_expert.tokens_per_expert.tolist()}", mono=True)
    return d


def linear_maps_diagram() -> Drawing:
    d = Drawing(860, 210, "dispatch and combine are each other's transpose")
    stages = (("x", "[T, hidden]"), ("rows", "[R, hidden]"), ("y", "[R, hidden]"), ("out", "[T, hidden]"))
    for i, (name, shape) in enumerate(stages):
        d.box(20 + 230 * i, 70, 110, 50, f"{name}\n{shape}", mono=True, size=12)
    for i, name in enumerate(("dispatch", "experts", "combine")):
        d.arrow(134 + 230 * i, 86, 246 + 230 * i, 86)
        d.text(190 + 230 * i, 78, name, anchor="middle")
    for i, name in enumerate(("combine", "backward", "dispatch")):
        d.arrow(246 + 230 * i, 106, 134 + 230 * i, 106, color=RANK_LINE[1], dashed=True)
        d.text(190 + 230 * i, 126, name, anchor="middle", color=RANK_LINE[1])
    d.text(20, 34, "forward", bold=True)
    d.text(90, 34, "and backward", bold=True, color=RANK_LINE[1])
    d.text(
        20,
        165,
        "The backward of dispatch is combine, and the backward of combine is dispatch, by one plan:",
        color=MUTED,
    )
    d.text(20, 185, "<dispatch(x), y> == <x, combine(y)> for every x and y.", mono=True, color=MUTED)
    return d


def wire_rows_diagram() -> Drawing:
    d = Drawing(860, 370, "A wire row, and where wire rows lie in the receiver's buffer")
    d.text(20, 28, "A wire row: what crosses the link for one (token, rank)", bold=True)
    parts = (("row: hidden elements", 400, "14336 B"), ("topk_weights", 150, "32 B"), ("scales", 120, "0 B"))
    x = 20.0
    for label, width, size in parts:
        d.box(x, 44, width, 34, label, fill=RANK_FILL[0], line=RANK_LINE[0])
        d.text(x + width / 2, 98, size, anchor="middle", color=MUTED)
        x += width
        d.text(
            20,
            122,
            "Sizes: hidden 7168 in bfloat16, eight float32 weights, no scales. Each part is padded to 16 bytes.",
            color=MUTED,
        )

    d.text(20, 166, "Symmetric buffer of rank 0, part for dispatch (4 ranks)", bold=True)
    for i, source in enumerate((1, 2, 3)):
        y = 184 + 44 * i
        d.text(20, y + 22, f"from rank {source}")
        for chunk in range(4):
            fill = GREEN_FILL if chunk < 3 - i else PAPER
            d.box(116 + 120 * chunk, y, 104, 32, "", fill=fill, line=GREEN_LINE if chunk < 3 - i else GRID)
            if chunk < 3 - i:
                for row in range(3):
                    d.box(122 + 120 * chunk + 26 * row, y + 6, 24, 20, "", fill=RANK_FILL[0], line=RANK_LINE[0])
                d.box(202 + 120 * chunk, y + 6, 14, 20, "e", fill=PAPER, line=GREEN_LINE, mono=True, size=11)
        d.text(600, y + 22, "..." if i else "at most one row per token")
    d.text(
        20,
        338,
        "A chunk is a few rows (blue) and one flag (e). The flag holds the number of the exchange.",
        color=MUTED,
    )
    d.text(20, 358, "Rows of rank 0's own tokens never pass through this buffer.", color=MUTED)
    return d


def exchange_diagram() -> Drawing:
    d = Drawing(860, 560, "Timeline of two exchanges between two ranks, with credits")
    left, right = 250, 610
    for x, rank in ((left, 0), (right, 1)):
        d.text(x, 28, f"rank {rank}", anchor="middle", bold=True, color=RANK_LINE[rank])
        d.line(x, 40, x, 540, color=RANK_LINE[rank])
    for y, height, name in (
        (54, 180, "exchange 7\ndispatch"),
        (262, 130, "exchange 8\ncombine"),
        (420, 110, "exchange 9\ndispatch"),
    ):
        for x, rank in ((left, 0), (right, 1)):
            d.box(x - 8, y, 16, height, fill=RANK_FILL[rank], line=RANK_LINE[rank])
        d.box(20, y, 110, height, name, fill=PADDING)

    def both(y: float, label: str, *, green: bool = False, dashed: bool = False) -> None:
        colors = (GREEN_LINE, GREEN_LINE) if green else RANK_LINE
        d.arrow(left + 10, y, right - 12, y + 24, color=colors[0], dashed=dashed)
        d.arrow(right - 10, y, left + 12, y + 24, color=colors[1], dashed=dashed)
        d.text((left + right) / 2, y - 3, label, anchor="middle")

    both(74, "header 7: operator, sizes, rows each way")
    both(118, "rows of a chunk, then its flag = 7")
    both(154, "rows of a chunk, then its flag = 7")
    both(206, "done = 7", green=True, dashed=True)
    both(282, "header 8")
    both(316, "rows back, flags = 8")
    both(364, "done = 8", green=True, dashed=True)
    both(440, "header 9")
    both(482, "rows of a chunk, then its flag = 9")

    notes = (
        (640, 76, "nobody waits to send:"),
        (640, 93, "the credit is there"),
        (640, 140, "the receiver copies a chunk"),
        (640, 157, "as soon as its flag says 7"),
        (640, 214, "the credit: the buffer of"),
        (640, 231, "dispatch may be written again"),
        (640, 330, "combine has a buffer of its own"),
        (640, 486, "allowed because done >= 7"),
        (640, 503, "(seen one exchange ago)"),
    )
    for x, y, note in notes:
        d.text(x, y, note, color=MUTED)
    return d


def low_latency_diagram() -> Drawing:
    d = Drawing(860, 366, "Timeline of the low-latency pair")
    left, right = 250, 610
    for x, rank in ((left, 0), (right, 1)):
        d.text(x, 28, f"rank {rank}", anchor="middle", bold=True, color=RANK_LINE[rank])
        d.line(x, 40, x, 346, color=RANK_LINE[rank])
    for y, height, name in ((54, 90, "dispatch, send"), (186, 40, "dispatch, receive"), (256, 80, "combine")):
        for x, rank in ((left, 0), (right, 1)):
            d.box(x - 8, y, 16, height, fill=RANK_FILL[rank], line=RANK_LINE[rank])
        d.box(20, y, 150, height, name, fill=PADDING)
    for y, label in (
        (76, "announcement n: rows per expert"),
        (124, "rows, each with n inside"),
        (286, "weighted sums, each with n inside"),
    ):
        d.arrow(left + 10, y, right - 12, y + 30, color=RANK_LINE[0])
        d.arrow(right - 10, y, left + 12, y + 30, color=RANK_LINE[1])
        d.text((left + right) / 2, y - 3, label, anchor="middle")
    d.text(150, 170, "your work", color=MUTED)
    notes = (
        (640, 76, "a send waits for no rank:"),
        (640, 93, "it needs the credit of n - 2"),
        (640, 200, "rows go to their expert by the"),
        (640, 217, "counts of all announcements"),
        (640, 291, "one sum per (token, rank)"),
        (640, 308, "crosses the link"),
    )
    for x, y, note in notes:
        d.text(x, y, note, color=MUTED)
    return d


def warps_diagram() -> Drawing:
    d = Drawing(860, 420, "Which thread blocks and warps of dispatch do what")
    d.text(20, 28, "dispatch with num_sms=24, layout expert_major: 24 thread blocks, one per SM", bold=True)
    for block in range(24):
        sends = block < 8
        d.box(
            20 + 34 * block,
            44,
            30,
            34,
            str(block),
            fill=RANK_FILL[0] if sends else GREEN_FILL,
            line=RANK_LINE[0] if sends else GREEN_LINE,
            mono=True,
            size=11,
        )
    d.text(20, 98, "8 blocks send", color=RANK_LINE[0])
    d.text(292, 98, "16 blocks receive", color=GREEN_LINE)

    columns = (
        (20, "A sending warp", RANK_FILL[0], RANK_LINE[0]),
        (300, "A receiving warp", GREEN_FILL, GREEN_LINE),
        (580, "The first receiving warp", GREEN_FILL, GREEN_LINE),
    )
    steps = (
        (
            "take the next chunk of tokens",
            "wait for the peer's credit",
            "load the row to shared memory",
            "store it to every peer it visits",
            "publish the flag of the chunk",
            "at the end: copy own rows",
        ),
        (
            "copy own rows while no chunk is here",
            "poll the flag of the next chunk",
            "load the row to shared memory",
            "store it to each expert's group",
            "",
            "at the end: count the block as done",
        ),
        (
            "write a header into every peer",
            "wait for every peer's header",
            "compare operator and sizes",
            "then receive as the others do",
            "",
            "last block: tell every peer done = e",
        ),
    )
    for (x, name, fill, line), rows in zip(columns, steps, strict=True):
        d.text(x, 140, name, bold=True, color=line)
        for i, step in enumerate(rows):
            if step:
                d.box(x, 152 + 40 * i, 250, 30, step, fill=fill, line=line, size=12)
    d.text(20, 408, "The boxes of a column run from top to bottom. The columns run at the same time.", color=MUTED)
    return d


def backends_diagram() -> Drawing:
    d = Drawing(860, 300, "Layers: operators, the check of arguments, backends")
    d.box(
        20,
        20,
        820,
        40,
        "torch_ep.plan, dispatch, combine, low_latency_*: functions of tensors, a group's name and ints",
    )
    d.box(20, 84, 820, 40, "check of the arguments, once, for every backend", fill=PADDING)
    backends = (
        ("local", "one rank\nCPU and CUDA\nno init needed"),
        ("c10d", "any process group\ngloo, NCCL\nevery network"),
        ("nvlink", "GPUs that can write\ninto each other\nneeds the limits of init"),
    )
    for i, (name, what) in enumerate(backends):
        x = 20 + 280 * i
        d.arrow(x + 130, 126, x + 130, 150)
        d.box(x, 154, 260, 110, "", fill=GREEN_FILL, line=GREEN_LINE)
        d.text(x + 130, 180, name, anchor="middle", bold=True)
        for j, text in enumerate(what.split("\n")):
            d.text(x + 130, 204 + 20 * j, text, anchor="middle")
    d.text(
        20,
        288,
        "All backends return the same bits. Communicator.backend and Communicator.reason say which one runs.",
        color=MUTED,
    )
    return d


def training_diagram() -> Drawing:
    d = Drawing(860, 330, "Four ranks as a mesh of data parallelism by expert parallelism")
    d.text(20, 28, 'mesh = (2, 2), names ("dp", "ep")', bold=True)
    for dp in range(2):
        for ep in range(2):
            x, y = 120 + 200 * ep, 60 + 120 * dp
            d.box(x, y, 160, 90, "", fill=PAPER, line=INK)
            d.text(x + 80, y + 20, f"rank {2 * dp + ep}", anchor="middle", bold=True)
            d.box(x + 14, y + 30, 132, 22, "router, attention", fill=PADDING, size=12)
            d.box(
                x + 14,
                y + 58,
                132,
                22,
                f"experts {2 * ep}, {2 * ep + 1}",
                fill=RANK_FILL[ep],
                line=RANK_LINE[ep],
                size=12,
            )
    d.text(20, 110, "dp = 0", color=MUTED)
    d.text(20, 230, "dp = 1", color=MUTED)
    d.text(200, 296, "ep = 0", anchor="middle", color=MUTED)
    d.text(400, 296, "ep = 1", anchor="middle", color=MUTED)
    d.line(200, 152, 200, 178, color=RANK_LINE[0])
    d.line(400, 152, 400, 178, color=RANK_LINE[1])
    notes = (
        ("Replicated parameters (gray)", True),
        ("equal on all four ranks;", False),
        ("average their gradients over all four.", False),
        ("", False),
        ("Experts (blue, orange)", True),
        ("equal along dp only; backward has summed", False),
        ("their gradients over ep already; sum over dp,", False),
        ("then divide by the number of all ranks.", False),
    )
    for i, (note, bold) in enumerate(notes):
        if note:
            d.text(520, 84 + 22 * i, note, bold=bold, color=INK if bold else MUTED)
    return d


def grouped_mm_diagram() -> Drawing:
    d = Drawing(860, 330, "Rows for a grouped GEMM and for a masked GEMM")
    d.text(20, 28, "dispatch: rows [R, hidden] and plan.offsets", bold=True)
    for i in range(8):
        padding = i in (2, 3, 7)
        d.box(90, 48 + 28 * i, 150, 24, "padding" if padding else "", fill=PADDING if padding else RANK_FILL[0])
    d.text(80, 48 + 28 * 4 - 4, "offsets[0]=4", anchor="end", size=11, mono=True)
    d.text(80, 48 + 28 * 8 - 4, "offsets[1]=8", anchor="end", size=11, mono=True)
    d.box(290, 62, 110, 80, "weight[0]\n[hidden, n]", fill=GREEN_FILL, line=GREEN_LINE, mono=True, size=12)
    d.box(290, 174, 110, 80, "weight[1]\n[hidden, n]", fill=GREEN_FILL, line=GREEN_LINE, mono=True, size=12)
    d.arrow(244, 102, 286, 102)
    d.arrow(244, 214, 286, 214)
    d.text(20, 302, "One call multiplies each group by its expert's weight.", color=MUTED)

    d.text(440, 28, "low_latency_dispatch: rows [L, C, hidden], counts", bold=True)
    for expert in range(2):
        y = 48 + 124 * expert
        count = (3, 1)[expert]
        for i in range(4):
            empty = i >= count
            d.box(
                560,
                y + 26 * i,
                150,
                22,
                "undefined" if empty else "",
                fill=PADDING if empty else RANK_FILL[0],
                dashed=empty,
                size=11,
            )
        d.text(550, y + 20, f"expert {expert}", anchor="end")
        d.text(550, y + 40, f"count {count}", anchor="end", mono=True, size=11)
        d.box(740, y + 12, 100, 72, f"weight[{expert}]", fill=GREEN_FILL, line=GREEN_LINE, mono=True, size=12)
        d.arrow(714, y + 48, 736, y + 48)
    d.text(420, 302, "C = world_size * max_tokens_per_rank. Counts stay on the device.", color=MUTED)
    return d


def serving_diagram() -> Drawing:
    d = Drawing(860, 300, "One CUDA graph per batch size, the same on every rank")
    d.text(20, 28, "Every rank replays the same graph in the same step", bold=True)
    sizes = ((8, 8), (8, 3), (32, 20))
    for step, (size, busiest) in enumerate(sizes):
        x = 120 + 250 * step
        d.text(x + 100, 56, f"step {step}: graph of {size} tokens", anchor="middle")
        for rank in range(2):
            y = 70 + 84 * rank
            used = busiest if rank == 0 else (5, 0, 32)[step]
            d.box(x, y, 200, 56, "", fill=PAPER, line=RANK_LINE[rank])
            width = 184 * used / size
            if used:
                d.box(x + 8, y + 8, width, 20, "", fill=RANK_FILL[rank], line=RANK_LINE[rank])
            d.box(x + 8 + width, y + 8, 184 - width, 20, "", fill=PADDING, dashed=True)
            d.text(x + 100, y + 46, f"{used} of {size} tokens active", anchor="middle", size=12, color=MUTED)
    d.text(20, 104, "rank 0", color=RANK_LINE[0])
    d.text(20, 188, "rank 1", color=RANK_LINE[1])
    d.text(20, 260, "A rank without work takes part with padding alone (step 1, rank 1).", color=MUTED)
    d.text(20, 280, "The ranks agree on the smallest graph that holds the busiest rank (step 2).", color=MUTED)
    return d


def grid_diagram() -> Drawing:
    """A token of rank 0 with experts on ranks 1, 2 and 3 of a 2 x 2 grid."""
    d = Drawing(860, 330, "A token's row crosses the network once per node and is relayed inside it")
    d.text(20, 28, "dispatch of a token of rank 0 whose experts are on ranks 1, 2 and 3", bold=True)
    box = {rank: (150 + 440 * (rank // 2), 80 + 110 * (rank % 2)) for rank in range(4)}
    for node in range(2):
        d.box(130 + 440 * node, 50, 160, 210, "", fill=PAPER, line=MUTED, dashed=True)
        d.text(210 + 440 * node, 70, f"node {node}", anchor="middle", color=MUTED)
    for rank, (x, y) in box.items():
        d.box(x, y, 120, 60, f"rank {rank}\n{'token' if rank == 0 else 'expert'}", fill=RANK_FILL[rank % 2])
    d.arrow(270, 100, 588, 100, color=RANK_LINE[0])
    d.text(430, 92, "1. rail of ranks 0 and 2: one row", anchor="middle", color=RANK_LINE[0])
    d.line(270, 220, 588, 220, dashed=True)
    d.text(430, 212, "rail of ranks 1 and 3", anchor="middle", color=MUTED)
    d.arrow(210, 140, 210, 188, color=GREEN_LINE)
    d.arrow(650, 140, 650, 188, color=GREEN_LINE)
    d.text(222, 169, "2. relay", color=GREEN_LINE)
    d.text(662, 169, "2. relay", color=GREEN_LINE)
    d.text(
        20, 290, "One row crosses the network for the experts on ranks 2 and 3. One level would send two.", color=MUTED
    )
    d.text(20, 310, "combine goes back: ranks 2 and 3 are summed on rank 2, which sends one row.", color=MUTED)
    return d


DIAGRAMS: dict[str, Callable[[], Drawing]] = {
    "backends": backends_diagram,
    "exchange": exchange_diagram,
    "grid": grid_diagram,
    "grouped_mm": grouped_mm_diagram,
    "layouts": layouts_diagram,
    "linear_maps": linear_maps_diagram,
    "low_latency": low_latency_diagram,
    "plan": plan_diagram,
    "serving": serving_diagram,
    "training": training_diagram,
    "warps": warps_diagram,
    "wire_rows": wire_rows_diagram,
}


def main(argv: Sequence[str] | None = None) -> None:
    IMAGES.mkdir(exist_ok=True)
    for name, draw in DIAGRAMS.items():
        (IMAGES / f"{name}.svg").write_text(draw().svg())
        print(IMAGES / f"{name}.svg")


if __name__ == "__main__":
    main()
