"""Exchanges one after another, of random routings, sizes, layouts, modes and types, with ranks held up at random.

    python test/stress.py --exchanges 20000 --virtual 4    # ranks on one GPU
    python test/stress.py --exchanges 20000 --gpus 4       # a GPU a rank, over nvlink
    python test/stress.py --exchanges 500 --gloo 2         # without a GPU, to see that this program is right
    python test/stress.py --low-latency --gpus 4           # the low-latency pair: whole, in halves, two in flight

Every result is checked on the device against a computation of its own. A row says in its digits which token of which
rank it is, all values are small whole numbers and all weights powers of two, so sums are exact in every type; those of
the low-latency pair need not be, for the order of its sums is known. Ends with a line of what was done; exits with 1 if
a bit was wrong, or if memory grew.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import random
import sys
import time
from collections import Counter
from typing import Any, NamedTuple

import torch
from support import expected, low_latency_cases
from support.harness import same_bits
from support.virtual import HostedRanks, Ranks, meet, open_world
from torch import Tensor
from tqdm import tqdm

import torch_ep
from torch_ep import reference
from torch_ep.low_latency import Quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn)
HIDDEN = (8, 24, 5, 64, 515, 1000, 2880, 7168)
LOW_LATENCY_HIDDEN = (16, 48, 128, 272, 640, 1008, 2880, 4096, 7168)  # rows of 16 bytes, also where they are quantized
MIB = 2**20
# What may come and go outside of torch's allocator, in the driver and in other contexts.
SLACK_BYTES = 64 * MIB
EXCHANGES_PER_CHUNK = 250  # at most; memory is looked at after each
MOST_KINDS_NAMED = 8  # of tensors that are left over


class Summary(NamedTuple):
    exchanges: int
    rows: int  # received, over all ranks
    seconds: float
    grown_bytes: int  # of device memory, since the first chunk
    problems: list[str]


class Kind(NamedTuple):
    """Of a tensor on the device."""

    storage_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Memory(NamedTuple):
    allocated: int  # bytes in tensors
    used: int  # bytes of the device, in whatever
    tensors: Counter[Kind]  # how many there are, of those that Python knows


class Round(NamedTuple):
    """One plan and what is done with it, the same on every rank."""

    seed: int
    tokens: list[int]
    num_topk: int
    num_experts: int
    hidden: int
    dtype: torch.dtype
    options: dict[str, Any]
    payloads: bool  # whether weights and scales travel along
    gradient: bool
    repeats: int  # how often the plan is used


def draw(seed: int, number: int, world_size: int) -> Round:
    r = random.Random(f"{seed} {number}")
    hidden = r.choice(HIDDEN)
    most = r.choice((1, 16, 128, 600)) if hidden < 1024 else r.choice((1, 16, 64, 256))
    tokens = [r.randint(0, most) for _ in range(world_size)]
    if r.random() < 0.2:
        tokens[r.randrange(world_size)] = 0
    layout = r.choice(("rank_major", "expert_major"))
    alignment = r.choice((1, 8, 128)) if layout == "expert_major" else 1
    num_topk = r.choice((1, 2, 4, 8, 16))
    num_experts = r.choice((1, 2, 8, 32)) * world_size
    likely = sum(tokens) * (num_topk if layout == "expert_major" else 1) // world_size + alignment
    capacity = r.choice((None, None, 0.5, 1.0, 2.0, 4.0))
    return Round(
        seed=r.randrange(2**31),
        tokens=tokens,
        num_topk=num_topk,
        num_experts=num_experts,
        hidden=hidden,
        dtype=r.choice(DTYPES),
        options={
            "layout": layout,
            "alignment": alignment,
            "capacity": None if capacity is None else int(likely * capacity) // alignment * alignment,
        },
        payloads=r.random() < 0.6,
        gradient=r.random() < 0.3,
        repeats=r.choice((1, 1, 2, 3)),
    )


def choose_experts(a: Round | LowLatencyRound, rank: int) -> Tensor:
    """[tokens, num_topk] int64: from a token's first expert on in equal steps, so that all are different; some -1."""
    t = torch.arange(a.tokens[rank], device=DEVICE)[:, None]
    k = torch.arange(a.num_topk, device=DEVICE)
    step = next(s for s in range(1 + a.seed % a.num_experts, 2 * a.num_experts + 1) if math.gcd(s, a.num_experts) == 1)
    # Whole numbers below 2**63: the same on every device.
    noise = (t * 2654435 + rank * 40503 + a.seed) % 2147483647
    noise = noise * 48271 % 2147483647
    experts = (noise + k * step) % a.num_experts
    holes = (noise * 16807 % 2147483647 // 65536 + k * 7) % 5 == 0
    return torch.where(holes | (k >= a.num_experts), -1, experts)


def row_of(rank: Tensor, token: Tensor, hidden: int) -> Tensor:
    """[n, hidden] float32: the digits, to base 4, of which token this is, over and over."""
    code = rank * 4096 + token
    return ((code[:, None] >> (2 * (torch.arange(hidden, device=code.device) % 8))) & 3).float()


def power_of_two(exponent: Tensor) -> Tensor:
    """float32, for whole exponents of -8 and more. No torch.exp2: Note [Kernels that wait for other kernels]."""
    return (1 << (exponent + 8)).float() / 256


def weight_of(rank: Tensor, token: Tensor, slot: Tensor) -> Tensor:
    """Powers of two from 1/2 to 2."""
    return power_of_two((rank + token + slot) % 3 - 1)


def delay(r: random.Random) -> None:
    """Mostly nothing, at times up to 5 ms on the host, up to 1 ms on the device, and rarely up to 20 ms there."""
    if r.random() < 0.06:
        time.sleep(r.random() * 5e-3)
    if DEVICE == "cuda" and r.random() < 0.12:
        torch.cuda._sleep(r.randrange(30_000_000 if r.random() < 0.05 else 1_500_000))  # cycles


class Checked:
    """The expected result of one round on this rank; counts differences."""

    def __init__(self, a: Round, rank: int, problems: list[str]) -> None:
        self.a, self.rank, self.problems = a, rank, problems
        self.topk_idx = [choose_experts(a, r) for r in range(len(a.tokens))]
        self.routing = expected.route(self.topk_idx, a.num_experts, **a.options)
        self.own = self.routing.ranks[rank]
        num_topk = a.num_topk
        if self.own.plan.recv_pair is not None:
            slots = self.own.plan.recv_pair.long()
            self.wire, self.slot = slots // num_topk, slots % num_topk
            self.valid = slots >= 0
        else:
            self.wire = torch.arange(self.own.plan.num_rows, device=DEVICE)
            self.valid = self.wire < len(self.own.source)
        self.wire = torch.where(self.valid, self.wire, 0)

    def expect(self, name: str, got: Tensor, want: Tensor) -> None:
        if not same_bits(got.detach(), want):
            wrong = int((got.float() != want.float()).sum()) if got.shape == want.shape else -1
            self.problems.append(f"rank {self.rank}: {name}: {wrong} of {want.numel()} elements differ in {self.a}")

    def received(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """[R, n] of [wire rows, n]: where the result has them, zeros elsewhere."""
        if len(values) == 0:
            return torch.zeros(len(self.valid), values.shape[1], device=DEVICE).to(dtype)
        return torch.where(self.valid[:, None], values[self.wire], 0).to(dtype)

    def rows(self, dtype: torch.dtype) -> Tensor:
        return self.received(row_of(self.own.source, self.own.token, self.a.hidden), dtype)

    def weights(self) -> Tensor:
        own = self.own
        slots = torch.arange(self.a.num_topk, device=DEVICE)
        all_slots = weight_of(own.source[:, None], own.token[:, None], slots)
        if own.plan.recv_topk_idx is not None:
            here = own.plan.recv_topk_idx >= 0
            return torch.where(here, self.received(all_slots, torch.float32), 0)
        rows = self.received(all_slots, torch.float32)
        return rows.gather(1, torch.where(self.valid, self.slot, 0)[:, None]).reshape(-1)

    def factors(self, weighted: bool) -> Tensor:
        """[tokens] how much of a token's own row comes home: the rows that were kept for it, or their weights."""
        total = torch.zeros(self.a.tokens[self.rank], device=DEVICE)
        slots = torch.arange(self.a.num_topk, device=DEVICE)
        for r in self.routing.ranks:
            mine = r.source == self.rank
            kept, token = r.row_of[mine] >= 0, r.token[mine]
            if weighted:
                amount = torch.where(kept, weight_of(r.source[mine][:, None], token[:, None], slots), 0).sum(1)
            elif r.plan.recv_pair is None:
                amount = kept.any(1).float()
            else:
                amount = kept.sum(1).float()
            total.index_add_(0, token, amount)
        return total


def run_round(rank: int, group: str | None, a: Round, r: random.Random, problems: list[str]) -> tuple[int, int]:
    """Returns the exchanges and the rows that this rank received."""
    check = Checked(a, rank, problems)
    want = check.routing.plans[rank]
    delay(r)
    plan = torch_ep.plan(check.topk_idx[rank], a.num_experts, group, **a.options)
    exchanges = 1
    for name in plan._fields[:8]:
        got, wanted = getattr(plan, name), getattr(want, name)
        if wanted is not None:
            check.expect(name, got, wanted)
    if plan.num_rows != want.num_rows:
        problems.append(f"rank {rank}: expected {want.num_rows} rows, got {plan.num_rows} in {a}")
        return exchanges, 0

    here = torch.full((a.tokens[rank],), rank, device=DEVICE)
    token = torch.arange(a.tokens[rank], device=DEVICE)
    x = row_of(here, token, a.hidden)
    sum_type = torch.bfloat16 if a.dtype == torch.float8_e4m3fn else a.dtype
    # rows of fp8 come back as bfloat16
    for _ in range(a.repeats):
        delay(r)
        exchanges += 1
        if a.payloads:
            weights = weight_of(here[:, None], token[:, None], torch.arange(a.num_topk, device=DEVICE))
            codes = (here * 4096 + token).int()[:, None].expand(-1, 3).contiguous()
            rows, row_weights, scales = torch_ep.dispatch(x.to(a.dtype), plan, topk_weights=weights, scales=codes)
            check.expect("weights", row_weights, check.weights())
            own = check.own
            check.expect(
                "scales",
                scales,
                check.received((own.source * 4096 + own.token)[:, None], torch.int32).expand(-1, 3).contiguous(),
            )
        else:
            rows, row_weights = torch_ep.dispatch(x.to(a.dtype), plan), None
        check.expect("rows", rows, check.rows(a.dtype))

        delay(r)
        exchanges += 1
        weighted = row_weights is not None and row_weights.dim() == 1
        factors = check.factors(weighted)
        y = rows.to(sum_type)
        sums = torch_ep.combine(y, plan, row_weights=row_weights) if weighted else torch_ep.combine(y, plan)
        check.expect("sums", sums, (factors[:, None] * x).to(sum_type))

    if a.gradient:
        exchanges += 4
        xs = x.to(sum_type).requires_grad_()
        out = torch_ep.combine(torch_ep.dispatch(xs, plan), plan)
        delay(r)
        (grad,) = torch.autograd.grad(out, xs, x.to(sum_type))
        check.expect("gradient", grad, (check.factors(False)[:, None] * x).to(sum_type))
    return exchanges, int(want.recv_counts.sum())


class LowLatencyRound(NamedTuple):
    """One or two dispatches and combines, the same on every rank."""

    seed: int
    tokens: list[int]
    max_tokens: int
    num_topk: int
    num_experts: int
    hidden: int
    dtype: torch.dtype
    quantize: Quantize | None
    weighted: bool
    in_flight: int  # 0: whole operators

    @property
    def world_size(self) -> int:
        return len(self.tokens)


def draw_low_latency(seed: int, number: int, world_size: int) -> LowLatencyRound:
    r = random.Random(f"{seed} {number}, low latency")
    hidden, quantize = r.choice(LOW_LATENCY_HIDDEN), r.choice(low_latency_cases.QUANTIZE)
    dtype = r.choice((torch.bfloat16, torch.float16, torch.float32))
    if not low_latency_cases.fits(hidden, dtype):
        dtype = torch.bfloat16
    most = r.choice((1, 8, 32, 128) if hidden < 1024 else (1, 8, 32))
    num_local = min(r.choice((1, 2, 8, 32)), max(1, 2**21 // (world_size * most * hidden)))
    return LowLatencyRound(
        seed=r.randrange(2**31),
        tokens=[r.choice((0, most, r.randint(0, most))) for _ in range(world_size)],
        max_tokens=most,
        num_topk=r.choice((1, 2, 8, 9, 16)),
        num_experts=num_local * world_size,
        hidden=hidden,
        dtype=dtype,
        quantize=quantize,
        weighted=r.random() < 0.7,
        in_flight=r.choice((0, 0, 1, 2)),
    )


class LowLatencyChecked:
    """The expected result of one dispatch and its combine on this rank; counts differences."""

    def __init__(self, a: LowLatencyRound, rank: int, group: str | None, problems: list[str]) -> None:
        self.a, self.rank, self.group, self.problems = a, rank, group, problems
        self.topk_idx = choose_experts(a, rank)
        experts = [choose_experts(a, r) for r in range(a.world_size)]
        self.routing = low_latency_cases.route(
            low_latency_cases.pad(experts, a.max_tokens, -1), a.num_experts, a.world_size
        )
        token = torch.arange(a.world_size * a.max_tokens, device=DEVICE)
        source, token = token // a.max_tokens, token % a.max_tokens
        # Groups of channels, and tokens, of very different sizes.
        scale = power_of_two(token[:, None] % 16 - 8 + torch.arange(a.hidden, device=DEVICE) // 128 % 5)
        x = (row_of(source, token, a.hidden) * scale).to(a.dtype)
        self.weights = None
        if a.weighted:
            self.weights = (token[:, None] * 7 + source[:, None] + torch.arange(a.num_topk, device=DEVICE)) % 11 / 8
        self.own = slice(rank * a.max_tokens, rank * a.max_tokens + a.tokens[rank])
        self.x = x[self.own].clone()
        self.rows, self.scales = (x, None) if a.quantize is None else reference.quantize(x, a.quantize)
        row = torch.arange(a.num_experts // a.world_size * len(token), device=DEVICE)[:, None]
        number = row * 31 + torch.arange(a.hidden, device=DEVICE) * 7
        shape = (-1, len(token), a.hidden)
        self.y = [((number + r * 977) % 1021 / 64 - 8).to(a.dtype).view(shape) for r in range(a.world_size)]
        self.flight: Any = None

    def arguments(self) -> tuple[tuple, dict[str, Any]]:
        weights = None if self.weights is None else self.weights[self.own].contiguous()
        sizes = {"num_experts": self.a.num_experts, "max_tokens_per_rank": self.a.max_tokens, "group": self.group}
        return (self.x, self.topk_idx), {"topk_weights": weights, "quantize": self.a.quantize, **sizes}

    def send(self) -> None:
        given, options = self.arguments()
        self.flight = torch_ep.low_latency_dispatch_send(*given, **options)

    def receive(self) -> int:
        """All of the dispatch, if it was not sent. Returns the rows that this rank received."""
        if self.flight is None:
            given, options = self.arguments()
            result, plan = torch_ep.low_latency_dispatch(*given, **options)
        else:
            result, plan = torch_ep.low_latency_dispatch_recv(self.flight)
        self.flight, self.plan = None, plan
        want = low_latency_cases.plan(self.routing, self.rank, self.weights)
        filled = want["recv_pair"] >= 0
        moved = {"rows": (result, self.rows)} if self.scales is None else {}
        if self.scales is not None:
            moved = {"rows": (result[0], self.rows), "scales": (result[1], self.scales)}
        for name, (got, values) in moved.items():
            self.expect(name, got, low_latency_cases.dispatch(self.routing, self.rank, values), filled)
        for name, t in want.items():
            self.expect(name, getattr(plan, name), t, filled if name == "row_weights" else None)
        return int(want["tokens_per_expert"].sum())

    def send_sums(self) -> None:
        self.flight = torch_ep.low_latency_combine_send(self.y[self.rank], self.plan)

    def receive_sums(self) -> None:
        """All of the combine, if it was not sent."""
        if self.flight is None:
            got = torch_ep.low_latency_combine(self.y[self.rank], self.plan)
        else:
            got = torch_ep.low_latency_combine_recv(self.flight)
        want = low_latency_cases.combine(self.routing, self.rank, self.y, self.weights)
        self.expect("sums", got, want[: len(self.x)], None)

    def expect(self, name: str, got: Tensor, want: Tensor, filled: Tensor | None) -> None:
        """Only where `filled`, of the first dimensions."""
        if got.shape == want.shape and got.dtype == want.dtype and filled is not None:
            got = got.contiguous().unsqueeze(-1).view(torch.uint8)
            want = want.contiguous().unsqueeze(-1).view(torch.uint8)
            got = torch.where(filled.reshape(*filled.shape, *[1] * (got.dim() - filled.dim())), got, want)
        if not same_bits(got.contiguous(), want):
            wrong = int((got.float() != want.float()).sum()) if got.shape == want.shape else -1
            self.problems.append(f"rank {self.rank}: {name}: {wrong} of {want.numel()} elements differ in {self.a}")


def run_low_latency_round(
    rank: int, group: str | None, a: LowLatencyRound, r: random.Random, problems: list[str]
) -> tuple[int, int]:
    """Returns the exchanges and the rows that this rank received."""
    runs = [LowLatencyChecked(a._replace(seed=a.seed + i), rank, group, problems) for i in range(max(1, a.in_flight))]
    rows = 0
    for run in runs[: a.in_flight]:
        delay(r)
        run.send()
    for run in runs:
        delay(r)
        rows += run.receive()
        delay(r)
        if a.in_flight:
            run.send_sums()
    for run in runs:
        delay(r)
        run.receive_sums()
    return 2 * len(runs), rows


def run_chunk(
    rank: int, world_size: int, group: str | None, seed: int, first: int, exchanges: int, low_latency: bool
) -> tuple[int, int, int, list[str]]:
    """Rounds from `first` on, until `exchanges` are done: (next round, exchanges, rows, problems)."""
    r = random.Random(f"{seed} {first} of rank {rank}")
    done, rows, number = 0, 0, first
    problems: list[str] = []
    while done < exchanges:
        if low_latency:
            now, received = run_low_latency_round(rank, group, draw_low_latency(seed, number, world_size), r, problems)
        else:
            now, received = run_round(rank, group, draw(seed, number, world_size), r, problems)
        done, rows, number = done + now, rows + received, number + 1
    return number, done, rows, problems[:5]


def measure_memory(rank: int, world_size: int, group: str | None) -> Memory:
    if DEVICE != "cuda":
        return Memory(0, 0, Counter())
    # Who looks at the stacks of threads, as `virtual` does while ranks take long, makes a cycle of frames, and these
    # keep the tensors of their locals until the collector comes by. Ranks may share one process, in which one collects
    # and the others return from this at once: they all wait for that one.
    gc.collect()
    meet(group)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return Memory(torch.cuda.memory_allocated(), total - free, tensors_alive())


def tensors_alive() -> Counter[Kind]:
    # Of exactly these types: isinstance would wake proxies, and fake tensors have no memory.
    tensors = (t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter) and t.is_cuda)
    return Counter(Kind(t.untyped_storage().nbytes(), tuple(t.shape), t.dtype) for t in tensors)


def describe_left_over(was: Memory, now: Memory) -> str:
    """Largest first. A tensor that no Python object holds has no name."""
    kinds = sorted((now.tensors - was.tensors).items(), key=lambda item: item[0].storage_bytes, reverse=True)
    named = [f"{n} of {list(k.shape)} {k.dtype}, {k.storage_bytes} bytes" for k, n in kinds[:MOST_KINDS_NAMED]]
    if len(kinds) > MOST_KINDS_NAMED:
        named.append(f"and {len(kinds) - MOST_KINDS_NAMED} kinds more")
    held = "; ".join(named) or "none that Python knows"
    return f"{now.allocated - was.allocated} bytes of tensors are left over: {held}"


def run(
    ranks: Ranks,
    exchanges: int,
    seed: int,
    progress: bool = True,
    limit_s: float = 300,
    low_latency: bool = False,
) -> Summary:
    """At least `exchanges` of them, over the ranks; stops at the first chunk with something wrong.

    `limit_s`: of each chunk.
    """
    if low_latency and isinstance(ranks, HostedRanks):
        # Each kind of kernel has to have run alone, see Note [Kernels that wait for other kernels].
        open_world("virtual-1").run(run_chunk, seed, 0, 100, True, limit_s=limit_s)
    begun = time.monotonic()
    number = done = rows = grown = 0
    problems: list[str] = []
    baseline: list[Memory] | None = None
    bar: Any = tqdm(total=exchanges, unit="exchange", disable=not progress)
    with contextlib.closing(bar):
        while done < exchanges and not problems:
            chunk = min(EXCHANGES_PER_CHUNK, max(1, exchanges // 4), exchanges - done)
            answers = ranks.run(run_chunk, seed, number, chunk, low_latency, limit_s=limit_s)
            number, now, _, _ = answers[0]
            done += now
            rows += sum(answer[2] for answer in answers)
            problems += [problem for answer in answers for problem in answer[3]]
            bar.update(min(now, bar.total - bar.n))
            memory = ranks.run(measure_memory)
            baseline = baseline or memory
            for rank, (was, is_now) in enumerate(zip(baseline, memory, strict=True)):
                grown = max(grown, is_now.used - was.used)
                if is_now.allocated > was.allocated:
                    problems.append(f"rank {rank}: {describe_left_over(was, is_now)}")
                if is_now.used - was.used > SLACK_BYTES:
                    problems.append(f"rank {rank}: {(is_now.used - was.used) / MIB:.0f} MiB of device memory more")
    return Summary(done, rows, time.monotonic() - begun, grown, problems)


def main() -> int:
    parser = argparse.ArgumentParser(description="Random exchanges, every bit checked; see the top of this file.")
    parser.add_argument("--exchanges", type=int, default=20_000, help="plans, dispatches and combines (default 20000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other exchanges (default 0)")
    parser.add_argument("--low-latency", action="store_true", help="the low-latency pair instead of the other")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--virtual", type=int, metavar="N", help="N ranks on one GPU (default: 4)")
    where.add_argument("--gpus", type=int, metavar="N", help="N ranks on a GPU each")
    where.add_argument("--gloo", type=int, metavar="N", help="N ranks without a GPU")
    args = parser.parse_args()
    if args.exchanges <= 0:
        parser.error(f"expected a positive number of exchanges, got {args.exchanges}")
    if args.gpus is not None and args.gpus > torch.cuda.device_count():
        parser.error(f"expected at most {torch.cuda.device_count()} GPUs, got {args.gpus}")
    name = next((f"{kind}-{n}" for kind in ("virtual", "gpus", "gloo") if (n := getattr(args, kind))), "virtual-4")
    if not name.startswith("gloo") and not torch.cuda.is_available():
        parser.error("no CUDA device: pass --gloo N")
    summary = run(open_world(name), args.exchanges, args.seed, low_latency=args.low_latency)
    for problem in summary.problems:
        print(problem, file=sys.stderr)
    print(
        f"{name}, seed {args.seed}: {summary.exchanges} exchanges, {summary.rows} rows received, "
        f"{summary.seconds:.0f} s, {len(summary.problems)} problems, memory grew by {summary.grown_bytes / MIB:.1f} MiB"
    )
    return 1 if summary.problems else 0


if __name__ == "__main__":
    sys.exit(main())
