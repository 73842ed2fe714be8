"""The benchmark: a tiny run from command line to figure, and that its checks and its count of memory can be trusted."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import LIMIT_S, random_topk, seeded, world

import torch_ep
from torch_ep import reference

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
RANKS, TOKENS, HIDDEN, TOPK = 2, [16, 32], 24, 2
MIB = 2**20


def module(name: str) -> Any:
    """A module of the benchmark, which is no package. Also called on the ranks."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_script("bench.py", *arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("bench") / "new" / "tiny"
    sizes = f"--hidden {HIDDEN} --topk {TOPK} --experts 4 --iterations 3".split()
    arguments = [
        "--device",
        "cpu",
        "--ranks",
        str(RANKS),
        "--tokens",
        *map(str, TOKENS),
        *sizes,
        "--output",
        str(output),
    ]
    done = bench(*arguments)
    assert done.returncode == 0, done.stderr
    return {"stdout": done.stdout, "results": json.loads(output.with_suffix(".json").read_text()), "output": output}


def test_results_have_a_row_for_every_case(run: dict[str, Any]) -> None:
    got = [(row["ranks"], row["tokens"], row["op"]) for row in run["results"]["rows"]]
    ops = ["dispatch", "dispatch, cached plan", "combine"]
    assert got == [(RANKS, tokens, op) for tokens in TOKENS for op in ops]


def test_table_shows_the_rows_of_the_results(run: dict[str, Any]) -> None:
    for row in run["results"]["rows"]:
        start = f"{row['tokens']:>6} {row['ranks']:>5} {row['op']:<21} |"
        (line,) = (line for line in run["stdout"].splitlines() if line.startswith(start))
        assert f"| {row['ratio']:6.2f} |" in line


STATISTICS = {"median_us", "p5_us", "p95_us", "min_us", "max_us"}


def test_results_keep_summaries(run: dict[str, Any]) -> None:
    for row in run["results"]["rows"]:
        assert row["iterations"] == 3
        assert row["ratio"] == pytest.approx(row["ours"]["median_us"] / row["baseline"]["median_us"], rel=0.01)
        for side in ("ours", "baseline"):
            assert row[side].keys() == STATISTICS | {"logical_bytes", "wire_bytes", "peak_bytes"}
            ordered = [row[side][f"{name}_us"] for name in ("min", "p5", "median", "p95", "max")]
            assert ordered == sorted(ordered)


@pytest.mark.parametrize("count", [1, 2, 101])
def test_statistics_of_times(count: int) -> None:
    times = module("ranks").statistics_of([float(us) for us in range(count)])
    last = count - 1
    want = {"median_us": last / 2, "p5_us": last / 20, "p95_us": 0.95 * last, "min_us": 0, "max_us": last}
    assert times == pytest.approx(want, abs=0.051)  # rounded to a tenth


def test_every_row_of_the_results_has_a_line(tmp_path: Path) -> None:
    results = {"commit": None, "rows": [{"tokens": 1}, {"tokens": 2}], "overlap": []}
    path = module("ranks").write_results(tmp_path / "new" / "some", results)
    assert path == tmp_path / "new" / "some.json"
    assert json.loads(path.read_text()) == results
    assert {'  {"tokens": 1},', '  {"tokens": 2}'} <= set(path.read_text().splitlines())


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("*.json")), ids=lambda path: path.name)
def test_kept_results_are_summaries(path: Path) -> None:
    results = json.loads(path.read_text())
    assert {"command", "commit", "date", "torch", "hardware", "settings"} <= results.keys()
    for row in results["rows"] + results.get("overlap", []):
        sides = [value for value in row.values() if isinstance(value, dict)]
        assert sides and all(side.keys() >= STATISTICS and "times_us" not in side for side in sides)


def test_results_say_how_they_came_about(run: dict[str, Any]) -> None:
    results = run["results"]
    assert {"command", "commit", "date", "torch", "hardware", "settings"} <= results.keys()
    assert results["command"].startswith("python benchmarks/bench.py --device cpu --ranks 2 --tokens 16 32")
    assert results["hardware"]["cores"] > 0
    assert results["hardware"]["cpu"]


def test_bytes_count_a_row_a_rank_for_us_and_a_row_a_pair_for_them(run: dict[str, Any]) -> None:
    for row in run["results"]["rows"]:
        if row["op"] == "combine":
            pairs = row["tokens"] * TOPK
            assert row["baseline"]["logical_bytes"] == pairs * HIDDEN * 4
            assert row["tokens"] * HIDDEN * 4 <= row["ours"]["logical_bytes"] <= pairs * HIDDEN * 4
        for side in ("ours", "baseline"):
            assert 0 < row[side]["wire_bytes"] < row[side]["logical_bytes"]


def test_figure_is_a_readable_png(run: dict[str, Any]) -> None:
    import matplotlib.image

    picture = matplotlib.image.imread(run["output"].with_suffix(".png"))
    assert min(picture.shape[:2]) > 600
    assert picture[..., :3].std() > 0.01  # not blank


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ranks", "3"], "expected a multiple of the 3 ranks, got 64"),
        (["--ranks", "1"], "expected at least 2, got 1"),
        (["--topk", "65"], "expected at most the 64 experts, got 65"),
        (["--tokens", "0"], "expected a positive number, got 0"),
        (["--seconds", "0"], "expected a positive number, got 0"),
    ],
    ids=["experts", "ranks", "topk", "tokens", "seconds"],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module("bench").parse(["--device", "cpu", *arguments])
    assert message in capsys.readouterr().err


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the command line see so many GPUs."""
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    "count, device, ranks, tokens",
    [
        (0, "cpu", [2, 4], 8192),
        (1, "cpu", [2, 4], 8192),
        (3, "cuda", [2], 4096),  # 256 experts over 3 ranks do not work out
        (4, "cuda", [4], 4096),
        (8, "cuda", [8], 4096),
    ],
)
def test_defaults_are_those_of_the_host(
    gpus: Callable[[int], None], count: int, device: str, ranks: list[int], tokens: int
) -> None:
    gpus(count)
    args = module("bench").parse([])
    assert (args.device, args.ranks, args.tokens[-1]) == (device, ranks, tokens)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "cpu", "--ops", "plan"], "--ops: not an option of --device cpu"),
        (["--device", "cuda", "--layout", "rank_major"], "--layout: not an option of --device cuda"),
        (["--device", "cuda", "--ranks", "8"], "expected at most one per GPU, of which there are 4, got 8"),
        (["--device", "cuda", "--hidden", "100"], "expected a multiple of 128"),
        (["--link-gbs", "0"], "expected a positive number, got 0"),
    ],
    ids=["cpu", "cuda", "ranks", "hidden", "link"],
)
def test_bad_arguments_are_refused_for_gpus(
    gpus: Callable[[int], None], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus(4)
    with pytest.raises(SystemExit):
        module("bench").parse(arguments)
    assert message in capsys.readouterr().err


def test_layer_takes_every_number_of_gpus_that_shares_out_the_experts(gpus: Callable[[int], None]) -> None:
    gpus(8)
    assert module("layer").parse([]).ranks == [2, 4, 8]
    assert module("layer").parse(["--experts", "60"]).ranks == [2, 3, 4, 5, 6]


def _one_fails(rank: int, ranks: int, port: int, args: Namespace, results: Any) -> None:
    if rank == 1:
        raise ValueError("made to fail")
    time.sleep(600)


def test_a_rank_that_fails_ends_the_run_with_its_error() -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="made to fail"):
        module("ranks").run_ranks(_one_fails, 3, Namespace())


def _peak(rank: int, world_size: int) -> int:
    # Above 32 MiB glibc takes every block from the system: what tests before have freed does not count.
    def call() -> torch.Tensor:
        first = torch.ones(40 * MIB, dtype=torch.uint8)
        second = torch.ones(48 * MIB, dtype=torch.uint8)
        del first
        third = torch.ones(56 * MIB, dtype=torch.uint8)
        del second
        return third

    platform = module("platforms").PLATFORMS["cpu"]
    platform.prepare_peak()
    platform.peak_bytes(call)  # so that what it needs only once is there
    return platform.peak_bytes(call)


def test_peak_counts_memory_in_use_at_one_time() -> None:
    for peak in world(RANKS).run(_peak):
        # The kernel counts resident pages for each core apart and adds them up late: some MiB with many cores.
        assert peak == pytest.approx(104 * MIB, abs=4 * MIB)


def _sides(rank: int, layout: str, dtype: torch.dtype) -> tuple[Any, Any]:
    cases = module("cases")
    inputs = cases.random_inputs(rank, 12, 16, 3, 8, dtype, torch.device("cpu"))
    return cases.TorchEP(inputs, layout), cases.make_baseline(inputs, layout)


def _check(rank: int, world_size: int, layout: str, dtype: torch.dtype) -> None:
    module("cases").check_equal(*_sides(rank, layout, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["expert_major", "rank_major"])
def test_both_sides_give_the_same(layout: str, dtype: torch.dtype) -> None:
    world(RANKS).run(_check, layout, dtype)


def _check_with_a_wrong_side(rank: int, world_size: int, layout: str, step: str) -> str:
    ours, baseline = _sides(rank, layout, torch.float32)
    right = getattr(baseline, step)

    def wrong(*args: Any) -> Any:
        result = right(*args)
        (result.rows if step == "dispatch" else result)[-1, -1] += 1
        return result

    setattr(baseline, step, wrong)
    try:
        module("cases").check_equal(ours, baseline)
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("step", ["dispatch", "combine"])
@pytest.mark.parametrize("layout", ["expert_major", "rank_major"])
def test_a_side_that_is_wrong_in_one_number_is_not_timed(layout: str, step: str) -> None:
    for error in world(RANKS).run(_check_with_a_wrong_side, layout, step):
        assert error.startswith(f"{step}:")


def _gpu_case(rank: int, world_size: int) -> Any:
    args = Namespace(hidden=256, topk=3, experts=8)
    return module("gpu").Case(rank, world_size, 12, args, torch.device("cpu"))


def _check_gpu_case(rank: int, world_size: int) -> None:
    module("gpu").check(_gpu_case(rank, world_size))


def test_the_baseline_for_gpus_gives_the_same_result() -> None:
    world(RANKS).run(_check_gpu_case)


def _run_with_and_without_capacity(rank: int, world_size: int, op: str) -> tuple[int, int]:
    """(rows that this rank received, rows of its result with a capacity)"""
    ops, case = module("gpu").OPS, _gpu_case(rank, world_size)
    exact, fixed = (ops[name].prepare(case).ours() for name in (op, f"{op}-capacity"))
    for got, want in zip(fixed, exact, strict=True):
        assert torch.equal(got[: len(want)].view(torch.uint8), want.view(torch.uint8))
    return len(exact[0]), len(fixed[0])


@pytest.mark.parametrize("op", ["dispatch", "dispatch-fp8", "dispatch-expert"])
def test_capacity_is_the_rows_that_the_busiest_gpu_receives(op: str) -> None:
    received, rows = zip(*world(RANKS).run(_run_with_and_without_capacity, op), strict=True)
    assert set(rows) == {max(received)}


def _check_wrong_gpu_case(rank: int, world_size: int, wrong: int) -> str:
    case = _gpu_case(rank, world_size)
    right = case.dispatch_fp8

    def dispatch_fp8(plan: Any) -> list[torch.Tensor]:
        results = [t.clone() for t in right(plan)]
        results[wrong].view(torch.int32)[-1, -1] ^= 1
        return results

    case.dispatch_fp8 = dispatch_fp8
    try:
        module("gpu").check(case)
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("wrong, name", [(0, "rows"), (2, "scales")], ids=["rows", "scales"])
def test_a_wrong_bit_of_fp8_is_not_timed(wrong: int, name: str) -> None:
    for error in world(RANKS).run(_check_wrong_gpu_case, wrong):
        assert error == f"dispatch-fp8: the two sides returned different {name}"


def test_quantized_rows_are_the_rows_up_to_rounding() -> None:
    x = torch.randn(6, 256, generator=seeded(0)).to(torch.bfloat16)
    fp8, scales = module("gpu").quantize(x)
    back = fp8.float() * scales.repeat_interleave(128, 1)
    assert scales.shape == (6, 2)
    torch.testing.assert_close(back, x.float(), rtol=2**-3, atol=1e-2)


def test_counted_rows_are_those_of_the_busiest_direction_of_the_reference_plan() -> None:
    ranks, experts = 3, 6
    idx = [random_topk(20 + 5 * r, 3, experts, seeded(r)) for r in range(ranks)]
    # visits[s][d]: tokens of rank s that have an expert on rank d
    visits = torch.tensor([[int((t // 2 == d).any(1).sum()) for d in range(ranks)] for t in idx])
    for rank, plan in enumerate(reference.plan(idx, experts, layout="rank_major")):
        got = module("gpu").busiest(plan.send_counts.tolist(), plan.recv_counts.tolist(), rank)
        own = int(visits[rank, rank])
        most = max(int(visits[rank].sum()), int(visits[:, rank].sum()))
        assert got == (most, most - own)


def test_floor_is_the_time_of_the_remote_bytes_on_the_link() -> None:
    gpu = module("gpu")
    assert gpu.floor_us(345_000_000, 345.0) == pytest.approx(1000)
    # 4096 tokens that visit 2.71 remote ranks on average: the floors of the reference host, fp8 with its scales.
    rows = round(4096 * 2.71)
    for op, us in (("dispatch", 461), ("combine", 461), ("dispatch-fp8", 238)):
        assert gpu.floor_us(rows * gpu.OPS[op].row_bytes(7168), gpu.LINK_GBS) == pytest.approx(us, abs=0.5)


def _gpu_results() -> dict[str, Any]:
    """Made up, as a run on 4 GPUs would write them."""
    gpu = module("gpu")
    rows = []
    for tokens in (64, 4096):
        for n, name in enumerate(gpu.ops_for(tokens, list(gpu.OPS))):
            op = gpu.OPS[name]
            logical, wire = (int(tokens * visits * op.exchanges * op.row_bytes(7168)) for visits in (3.61, 2.71))
            base = 20 + wire / 300e3
            sides = {"ours": base + n, "baseline": 3 * base, **({"nccl": 1.2 * base} if wire else {})}
            times = {side: module("ranks").statistics_of([us - 1, us, us + 2]) for side, us in sides.items()}
            rows.append(gpu.row(name, 4, tokens, logical, wire, 345.0, times))
    hardware = {"gpus": ["GPU"] * 4, "driver": "1.2", "cuda": "13.0", "nccl": "2.28.9", "cores": 8}
    settings = {"hidden": 7168, "topk": 8, "experts": 256, "num_sms": 24}
    return json.loads(json.dumps({"torch": "2.11.0", "hardware": hardware, "settings": settings, "rows": rows}))


def test_rates_and_ratios_of_a_gpu_row_follow_from_its_times() -> None:
    for row in _gpu_results()["rows"]:
        us = row["ours"]["median_us"]
        assert row["ratio"] == pytest.approx(us / row["baseline"]["median_us"], rel=0.01)
        if row["op"].startswith("plan"):
            assert {row["floor_us"], row["floor_ratio"], row["wire_gbs"], row["nccl_ratio"]} == {None}
        else:
            assert row["wire_gbs"] == pytest.approx(row["wire_bytes"] / us / 1e3, abs=0.1)
            assert row["floor_ratio"] == pytest.approx(us / (row["wire_bytes"] / 345e3), rel=0.01)


def test_gpu_table_has_the_columns_of_its_head() -> None:
    gpu = module("gpu")
    bars = [i for i, c in enumerate(gpu.HEAD.splitlines()[1]) if c == "|"]
    for row in _gpu_results()["rows"]:
        assert [i for i, c in enumerate(gpu.line(row)) if c == "|"] == bars


def test_only_small_batches_are_replayed_from_a_graph() -> None:
    ops = [(row["tokens"], row["op"]) for row in _gpu_results()["rows"]]
    assert (64, "graph") in ops and (4096, "graph") not in ops


def test_gpu_figure_is_a_readable_png(tmp_path: Path) -> None:
    import matplotlib.image

    module("gpu").draw(_gpu_results(), tmp_path / "gpu.png")
    picture = matplotlib.image.imread(tmp_path / "gpu.png")
    assert min(picture.shape[:2]) > 600
    assert picture[..., :3].std() > 0.01  # not blank


def _check_layers(rank: int, world_size: int, factor: float) -> str:
    import torch_ep

    layer = module("layer")
    layers: dict[str, Any] = {}
    for side, kind in (("ours", torch_ep.nn.MoE), ("baseline", layer.BaselineMoE)):
        torch.manual_seed(0)
        layers[side] = kind(32, 48, 8, 3)
    with torch.no_grad():
        layers["baseline"].down_proj.mul_(factor)
    x = torch.randn(20, 32, generator=seeded(rank), requires_grad=True)
    try:
        layer.check_same(layers, x, torch.randn(20, 32, generator=seeded(rank, 1)))
    except RuntimeError as error:
        return str(error)
    return "the same"


@pytest.mark.parametrize("factor, want", [(1.0, "the same"), (1.1, "output: expected the same from both layers")])
def test_baseline_layer_has_the_same_output_and_gradients(factor: float, want: str) -> None:
    for got in world(RANKS).run(_check_layers, factor):
        assert got.startswith(want)


def _low_latency_args(arguments: str = "") -> Namespace:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 4)
        return module("low_latency").parse(arguments.split())


def test_low_latency_takes_all_gpus_that_share_out_the_experts() -> None:
    assert _low_latency_args().ranks == [4]
    assert _low_latency_args("--experts 9").ranks == [3]
    assert _low_latency_args("--overlap-tokens").overlap_tokens == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--ranks 5", "--ranks: expected 2 to the number of GPUs, 4, got 5"),
        ("--ranks 3", "--experts: expected a multiple of the 3 ranks, got 256"),
        ("--experts 251", "expected at least 2 GPUs that share out 251 experts evenly, got 4"),
        ("--topk 257", "--topk: expected at most the 256 experts, got 257"),
        ("--hidden 100", "--hidden: expected a multiple of 128"),
        ("--tokens 8 --max-tokens-per-rank 16", "--max-tokens-per-rank: expected at least the 512 tokens"),
        ("--repetitions 0", "expected a positive number, got 0"),
    ],
    ids=["ranks", "experts", "uneven", "topk", "hidden", "room", "repetitions"],
)
def test_low_latency_refuses_bad_arguments(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _low_latency_args(arguments)
    assert message in capsys.readouterr().err


class HostEvent:
    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        return (end.at - self.at) * 1e3


class HostGraphs:
    """Stands for `low_latency.Graphs` where there is no GPU."""

    event = HostEvent

    def capture(self, call: Callable[[], Any]) -> Callable[[], Any]:
        return call

    def cold_us(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6

    warm_us = cold_us

    def pause(self) -> None:
        time.sleep(1e-3)

    def nothing(self) -> None:
        pass


def _measure_low_latency(rank: int, world_size: int, arguments: str) -> list[tuple[str, dict[str, Any]]]:
    args, found = _low_latency_args(arguments), []

    def report(table: str, row: dict[str, Any]) -> None:
        found.append((table, row))

    low_latency = module("low_latency")
    with pytest.MonkeyPatch.context() as patch:  # to be done sooner
        patch.setattr(module("gpu"), "WARM_UP", 1)
        patch.setattr(low_latency, "WIDEST", 512)
        low_latency.measure_all(rank, world_size, args, torch.device("cpu"), HostGraphs(), report)
    return found


@pytest.mark.parametrize("options", ["", " --gemm 3 5 7 --max-tokens-per-rank 6"], ids=["own", "given"])
def test_low_latency_measures_every_case_the_same_on_all_ranks(options: str) -> None:
    low_latency = module("low_latency")
    shape = "--tokens 1 5 --hidden 128 --topk 3 --experts 8 --overlap-tokens 5 --repetitions 2 --iterations 2"
    first, *others = world(RANKS).run(_measure_low_latency, shape + options)
    assert all(other == first for other in others)
    cases = [("rows", tokens, op) for tokens in (1, 5) for op in low_latency.OPS]
    cases += [("overlap", 5, op) for op in low_latency.OVERLAPPED_OPS]
    assert [(table, row["tokens"], row["op"]) for table, row in first] == cases
    for table, row in first:
        if table == "rows":
            assert ("send" in row) == ("recv" in row) == ("split" in row) == (not row["op"].startswith("pair"))
            assert 0 < row["wire_bytes"] < row["logical_bytes"]
        else:
            m, n, k = row["shape"]
            assert [m, n, k] == [3, 5, 7] if options else (m, n % 128, k) == (5, 0, 128)


def _check_wrong_low_latency(rank: int, world_size: int, wrong: str) -> str:
    low_latency = module("low_latency")
    args = _low_latency_args("--hidden 128 --topk 3 --experts 8 --repetitions 2")
    case = low_latency.Case(rank, world_size, 6, args, torch.device("cpu"))
    right, right_pair = case.dispatch, case.pair

    def dispatch(i: int, quantize: Any = None) -> Any:
        result, plan = right(i, quantize)
        rows, scales = (result, None) if quantize is None else result
        of = {"rows": None if quantize else rows, "fp8": rows if quantize else None, "scales": scales}
        touched = plan.row_weights if wrong == "weights" else of.get(wrong)
        if touched is not None and i == 1:
            last = (plan.recv_pair >= 0).nonzero()[-1]
            touched[last[0], last[1]] = 3 * touched[last[0], last[1]].float() + 1
        return result, plan

    case.dispatch = dispatch
    case.pair = lambda i: right_pair(i) + (wrong == "sums")
    try:
        low_latency.check(case)
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    "wrong, error",
    [
        ("nothing", "no error"),
        ("rows", "low_latency_dispatch, quantize=None: other rows"),
        ("weights", "low_latency_dispatch, quantize=None: other weights"),
        ("fp8", "low_latency_dispatch, quantize=fp8: other rows"),
        ("scales", "low_latency_dispatch, quantize=fp8: other scales"),
        ("sums", "low_latency_combine:"),
    ],
    ids=["nothing", "rows", "weights", "fp8", "scales", "sums"],
)
def test_low_latency_results_that_are_wrong_are_not_timed(wrong: str, error: str) -> None:
    for got in world(RANKS).run(_check_wrong_low_latency, wrong):
        assert got.startswith(error)


@pytest.mark.parametrize("part", ["nothing", "undefined", "rows", "scales", "weights", "counts", "sums"])
def test_low_latency_replays_differ_only_in_undefined_values(part: str) -> None:
    import torch_ep

    x, idx = torch.randn(3, 128, generator=seeded(0)), random_topk(3, 2, 4, seeded(1))
    (rows, scales), plan = torch_ep.low_latency_dispatch(
        x, idx, num_experts=4, max_tokens_per_rank=5, topk_weights=torch.rand(3, 2), quantize="fp8"
    )
    bits = rows.view(torch.uint8)
    touched = {"rows": bits[idx[0, 0], 0], "undefined": bits[:, 4], "scales": scales[idx[0, 0], 0], "sums": x[2:]}
    touched |= {"weights": plan.row_weights[idx[0, 0], :1], "counts": plan.tokens_per_expert}
    result = x if part == "sums" else ((rows, scales), plan)
    before = copy.deepcopy(result)
    if part in touched:
        touched[part][-1] += 1
    if part in ("nothing", "undefined"):
        module("low_latency").expect_same("replay", result, before)
    else:
        with pytest.raises(RuntimeError, match="replay returned something else than the eager call"):
            module("low_latency").expect_same("replay", result, before)


@pytest.mark.parametrize("fixed, each", [(0.0, 0.01), (5.0, 0.002), (30.0, 0.001)], ids=["even", "steep", "too-slow"])
def test_width_of_a_gemm_is_fitted_to_the_time_of_the_exchange(fixed: float, each: float) -> None:
    low_latency = module("low_latency")
    width = low_latency.fit_width(lambda n: fixed + each * n, 20.0)
    assert width % low_latency.WIDTH_STEP == 0
    if fixed < 20:
        assert fixed + each * width == pytest.approx(20.0, abs=each * low_latency.WIDTH_STEP)
    else:
        assert width < low_latency.FIRST_WIDTH / 4


def _times(us: float) -> dict[str, Any]:
    return module("ranks").statistics_of([us - 0.5, us, us + 1])


def _low_latency_results() -> dict[str, Any]:
    """Made up, as a run on 2 and on 4 GPUs would write them."""
    low_latency, gpu = module("low_latency"), module("gpu")
    args = _low_latency_args()
    rows, overlap = [], []
    for ranks in (2, 4):
        for tokens in args.tokens:
            for n, (name, op) in enumerate(low_latency.OPS.items()):
                logical, *wire = (
                    round(tokens * 2.71 * row_bytes(7168)) for row_bytes in (gpu.bf16_bytes, *op.row_bytes)
                )
                base = len(wire) * 5 + sum(wire) / 250e3 + n / 4
                sides = {"ours": base, "cold": base + 6, "throughput": 3 * base, "nccl": base + 15}
                if op.send:
                    sides |= {"split": base + 1, "send": base / 2, "recv": base / 3}
                times = {side: _times(us) for side, us in sides.items()}
                rows.append(low_latency.row(name, ranks, tokens, logical * 4 // 3, wire, args, times))
        for tokens in args.overlap_tokens:
            for name in low_latency.OVERLAPPED_OPS:
                us = {"exchange": tokens / 8, "gemm": tokens / 10, "sequential": tokens / 4.5, "overlapped": tokens / 6}
                times = {key: _times(value) for key, value in us.items()}
                overlap.append(low_latency.overlap_row(name, ranks, tokens, (tokens, 4096, 7168), times))
    hardware = {"gpus": ["GPU"] * 4, "driver": "1.2", "cuda": "13.0", "nccl": "2.28.9", "cores": 8}
    settings = {"hidden": 7168, "topk": 8, "experts": 256}
    results = {"torch": "2.11.0", "hardware": hardware, "settings": settings, "rows": rows, "overlap": overlap}
    return json.loads(json.dumps(results))


def test_floor_of_low_latency_is_that_of_the_link_and_of_a_signal_each_way() -> None:
    links = {"dispatch": 14.4, "dispatch-fp8": 7.4, "combine": 14.4, "pair": 28.8, "pair-fp8": 21.9}
    for row in _low_latency_results()["rows"]:
        if row["tokens"] == 128:
            assert row["link_us"] == pytest.approx(links[row["op"]], abs=0.05)
            assert row["floor_us"] == pytest.approx(row["link_us"] + (2 if "pair" in row["op"] else 1) * 2.35)
        assert row["floor_ratio"] == pytest.approx(row["ours"]["median_us"] / row["floor_us"], rel=0.01)


def test_goals_are_those_of_four_gpus_and_the_shape_they_are_for() -> None:
    low_latency = module("low_latency")
    found = {(r["op"], r["tokens"]): r for r in _low_latency_results()["rows"] if r["goal_us"] is not None}
    assert {row["ranks"] for row in found.values()} == {4}
    assert {key: row["goal_us"] for key, row in found.items()} == low_latency.GOALS
    for row in found.values():
        assert row["goal_ratio"] == pytest.approx(row["ours"]["median_us"] / row["goal_us"], abs=1e-3)
    assert low_latency.goal_us("combine", 4, 128, _low_latency_args("--hidden 4096")) is None


def test_overlap_is_the_share_of_the_shorter_that_is_hidden() -> None:
    times = {"exchange": 20.0, "gemm": 30.0, "sequential": 51.0, "overlapped": 36.0}
    row = module("low_latency").overlap_row("combine", 4, 8, (8, 4096, 7168), {k: _times(t) for k, t in times.items()})
    assert row["fraction"] == 0.75


def test_verdict_of_low_latency_counts_slower_cases_and_goals() -> None:
    low_latency, rows = module("low_latency"), _low_latency_results()["rows"]
    reached = sum(row["goal_ratio"] <= 1 for row in rows if row["goal_ratio"])
    assert 0 < reached < 5
    want = f"100 rows: slower than plan with capacity in 0, than NCCL in 0; {reached} of 5 goals reached"
    assert low_latency.verdict(rows) == want
    rows[0]["nccl_ratio"] = rows[1]["throughput_ratio"] = rows[2]["throughput_ratio"] = 1.1
    two = [row for row in rows if row["ranks"] == 2]
    assert low_latency.verdict(two) == "50 rows: slower than plan with capacity in 2, than NCCL in 1"


def _bars(text: str) -> list[int]:
    return [i for i, c in enumerate(text) if c == "|"]


def test_low_latency_tables_have_the_columns_of_their_heads() -> None:
    low_latency, results = module("low_latency"), _low_latency_results()
    tables = [
        (low_latency.HEAD, low_latency.line, "rows"),
        (low_latency.OVERLAP_HEAD, low_latency.overlap_line, "overlap"),
    ]
    for head, line, table in tables:
        first, second = head.splitlines()
        for row in results[table]:
            assert _bars(line(row)) == _bars(second) == _bars(first)


@pytest.mark.parametrize("without", [None, "overlap", "pairs"])
def test_low_latency_figure_is_a_readable_png(tmp_path: Path, without: str | None) -> None:
    import matplotlib.image

    results = _low_latency_results()
    if without == "overlap":
        results["overlap"] = []
    elif without == "pairs":
        results["rows"] = [row for row in results["rows"] if not row["op"].startswith("pair")]
    module("figure").draw_low_latency(results, tmp_path / "low_latency.png")
    picture = matplotlib.image.imread(tmp_path / "low_latency.png")
    assert min(picture.shape[:2]) > 600
    assert picture[..., :3].std() > 0.01  # not blank


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_run_on_gpus_has_a_row_for_every_case(tmp_path: Path) -> None:
    sizes = ["--tokens", "1", "600", "--hidden", "512", "--experts", "16", "--iterations", "3"]
    done = bench("--device", "cuda", "--ranks", "2", *sizes, "--output", str(tmp_path / "gpu"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    gpu = module("gpu")
    assert [(row["tokens"], row["op"]) for row in rows] == [
        (tokens, op) for tokens in (1, 600) for op in gpu.ops_for(tokens, list(gpu.OPS))
    ]
    assert (tmp_path / "gpu.png").stat().st_size > 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_low_latency_run_on_gpus_has_a_row_for_every_case(tmp_path: Path) -> None:
    shape = ["--tokens", "1", "40", "--hidden", "512", "--experts", "16", "--overlap-tokens", "40", "--iterations", "3"]
    done = run_script("low_latency.py", "--ranks", "2", *shape, "--output", str(tmp_path / "gpu"))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    low_latency = module("low_latency")
    cases = [(tokens, op) for tokens in (1, 40) for op in low_latency.OPS]
    assert [(row["tokens"], row["op"]) for row in results["rows"]] == cases
    assert [row["op"] for row in results["overlap"]] == list(low_latency.OVERLAPPED_OPS)
    assert (tmp_path / "gpu.png").stat().st_size > 0


def test_torch_gives_the_same_on_one_rank() -> None:
    one_rank = module("one_rank")
    g = seeded(1)
    x, weights = torch.randn(20, 8, generator=g), torch.rand(20, 3, generator=g)
    idx = random_topk(20, 3, 6, g, holes=0.0)
    gather = one_rank.TorchGather(x, idx, weights, 6)
    routing = gather.plan()
    plan = torch_ep.plan(idx, 6, "")
    rows, row_weights = torch_ep.dispatch(x, plan, topk_weights=weights)
    assert torch.equal(gather.dispatch(routing), rows)
    assert torch.equal(routing.offsets.int(), plan.offsets)
    torch.testing.assert_close(gather.combine(rows, routing), torch_ep.combine(rows, plan, row_weights=row_weights))


def test_one_rank_table_has_the_columns_of_its_head() -> None:
    one_rank = module("one_rank")
    times = module("ranks").statistics_of([float(us) for us in range(101)])
    row = {"shape": (4096, 7168, 8, 256), "op": "plan, capacity", "floor_us": None, "ours": times}
    assert _bars(one_rank.line(row)) == _bars(one_rank.HEAD)


def test_one_rank_refuses_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module("one_rank").parse(["--shape", "4", "8", "5", "2"])
    assert "expected at most the 2 experts per token, got 5" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_one_rank_run_has_a_row_for_every_case(tmp_path: Path) -> None:
    done = run_script(
        "one_rank.py", "--shape", "40", "64", "3", "6", "--iterations", "3", "--output", str(tmp_path / "out")
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["op"] for row in rows] == ["plan", "plan, capacity", "dispatch", "combine"]
    assert all({"ours", "with init"} <= row.keys() for row in rows)
