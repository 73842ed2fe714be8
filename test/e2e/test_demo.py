"""examples/train_moe.py: what it measures against, that no restart and no world size changes a run, and its results."""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # also in the ranks, which import this file

import train_moe as demo  # noqa: E402
from support.compiling import InductorGraphs  # noqa: E402
from support.harness import LIMIT_S, world  # noqa: E402

import torch_ep  # noqa: E402

TINY = ["--eager", "--device=cpu", "--threads=1", "--layers=2", "--dim=32", "--heads=2", "--experts=4"]
TINY += ["--intermediate=16", "--context=32", "--batch=8", "--validations=2", "--validation-batches=2"]
TINY += ["--sample-bytes=12"]


def tiny(out: Path, *flags: str) -> argparse.Namespace:
    return demo.parse([*TINY, "--out", str(out), *flags])


def run_demo(out: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / "train_moe.py"), *TINY, "--out", str(out), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment())


def environment() -> dict[str, str]:
    paths = [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


# --- text and baselines -----------------------------------------------------------------------------------------------


def test_baselines_of_a_toy_text() -> None:
    train = torch.tensor(list(b"abab"), dtype=torch.uint8)
    before, after = torch.tensor([[ord("a"), ord("z")]]), torch.tensor([[ord("b"), ord("a")]])
    p = (2 + 1) / (4 + 256)  # of "a" and of "b"
    unigram = -math.log(p)
    # "a" was followed by "b" twice; "z" never came, which leaves the unigrams.
    bigram = -(math.log((2 + p) / (2 + 1)) + math.log(p)) / 2
    assert demo.baselines(train, before, after) == pytest.approx((unigram, bigram))


def test_a_new_file_moves_no_other_between_training_and_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.sysconfig, "get_path", lambda name: str(tmp_path))
    for i in range(100):
        (tmp_path / f"m{i}.py").write_text(f"<{i}>")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text("<skipped>")

    def split() -> list[set[str]]:
        return [set(bytes(half.tolist()).decode().split()) for half in demo.standard_library()[:2]]

    train, validation = split()
    (tmp_path / "a_new_one.py").write_text("<new>")
    new_train, new_validation = split()
    assert train | validation == {f"<{i}>" for i in range(100)} and not train & validation
    assert train <= new_train and validation <= new_validation


@pytest.mark.parametrize("layout, factor, rows", [("expert_major", 2, 200), ("rank_major", 3, 250)])
def test_capacity_is_a_multiple_of_an_even_load(layout: str, factor: float, rows: int) -> None:
    # 2 of 4 experts, 2 ranks of 50 tokens: 100 (token, expert) pairs a rank; of the 6 choices of experts one misses a
    # rank, so that 100 * 5/6 tokens visit it.
    assert demo.capacity_rows(demo.ModelConfig(experts=4, topk=2), layout, factor, 50, 2) == rows


@pytest.mark.parametrize("flags", ["", "--capacity 4", "--layout rank_major", "--layout rank_major --capacity 4"])
def test_no_call_exceeds_the_limits_of_init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    passed: dict[str, list[int]] = {name: [] for name in ("max_tokens_per_rank", "hidden", "num_topk", "num_experts")}
    make_plan, dispatch = torch_ep.nn.moe.plan, torch_ep.nn.moe.dispatch

    def spy_plan(topk_idx: torch.Tensor, num_experts: int, *args: Any, **kwargs: Any) -> torch_ep.Plan:
        sizes = (topk_idx.shape[0], topk_idx.shape[1], num_experts)
        for name, size in zip(("max_tokens_per_rank", "num_topk", "num_experts"), sizes, strict=True):
            passed[name].append(size)
        return make_plan(topk_idx, num_experts, *args, **kwargs)

    def spy_dispatch(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        passed["hidden"].append(x.shape[1])
        return dispatch(x, *args, **kwargs)

    monkeypatch.setattr(torch_ep.nn.moe, "plan", spy_plan)
    monkeypatch.setattr(torch_ep.nn.moe, "dispatch", spy_dispatch)
    args = tiny(tmp_path, "--ranks", "1", "--layers", "1", *flags.split())
    trainer = demo.Trainer(args, demo.Ranks())
    trainer.train_step()
    trainer.validate()
    trainer.sample(b"def ", 2 * args.context)
    assert {name: max(sizes) for name, sizes in passed.items()} == demo.limits(args)


def test_each_of_several_ranks_makes_room_for_its_share(tmp_path: Path) -> None:
    assert demo.limits(tiny(tmp_path, "--ranks", "4"))["max_tokens_per_rank"] == 8 * 32 // 4


# --- the same run whatever the ranks ----------------------------------------------------------------------------------


def steps(rank: int, world_size: int, args: argparse.Namespace, count: int, save: bool = False) -> tuple[int, float]:
    """Trains `count` steps more; the step reached and the validation loss."""
    trainer = demo.Trainer(args, demo.Ranks(rank, world_size))
    for _ in range(count):
        trainer.train_step()
    if save:
        trainer.save()
    return trainer.step, trainer.validate()


def on(world_size: int, *args: Any, **kwargs: Any) -> tuple[int, float]:
    if world_size == 1:
        return steps(0, 1, *args, **kwargs)
    return world(world_size).run(steps, *args, **kwargs)[0]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, float]:
    """Six steps on one rank, without a process group."""
    return on(1, tiny(tmp_path_factory.mktemp("whole"), "--steps", "6"), 6)


@pytest.mark.parametrize("first, second", [(2, 1), (4, 2)])
def test_resuming_with_other_ranks_goes_on_as_if_nothing_happened(
    tmp_path: Path, whole_run: tuple[int, float], first: int, second: int
) -> None:
    _, saved_loss = on(first, tiny(tmp_path, "--steps", "6"), 3, save=True)
    resumed = tiny(tmp_path, "--resume")
    assert on(second, resumed, 0) == (3, pytest.approx(saved_loss, abs=1e-5))
    assert on(second, resumed, 3) == (6, pytest.approx(whole_run[1], abs=1e-4))


@pytest.mark.parametrize("flags", ["--layout rank_major", "--capacity 4", "--layout rank_major --capacity 4"])
def test_layouts_and_ample_capacity_learn_the_same(tmp_path: Path, whole_run: tuple[int, float], flags: str) -> None:
    assert on(2, tiny(tmp_path, "--steps", "6", *flags.split()), 6) == (6, pytest.approx(whole_run[1], abs=1e-4))


def clip_ones(rank: int, world_size: int, args: argparse.Namespace) -> tuple[float, float]:
    trainer = demo.Trainer(args, demo.Ranks(rank, world_size))
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm = torch_ep.nn.clip_grad_norm_(trainer.model, 0.5)
    return norm.item(), max(p.grad.max().item() for p in trainer.model.parameters())


def test_clipping_counts_the_experts_of_all_ranks(tmp_path: Path) -> None:
    args = tiny(tmp_path)
    norm = math.sqrt(sum(p.numel() for p in demo.MoETransformer(demo.model_config(args)).parameters()))
    assert world(2).run(clip_ones, args) == [pytest.approx((norm, 0.5 / norm))] * 2


def compiled_steps(rank: int, world_size: int, args: argparse.Namespace) -> list[float]:
    """Compiled up to Inductor's code generation, which takes most of the time and is not what this tests."""
    args.eager = False
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=InductorGraphs())):
        trainer = demo.Trainer(args, demo.Ranks(rank, world_size))
    return [trainer.train_step()[0].item() for _ in range(2)]


def eager_steps(rank: int, world_size: int, args: argparse.Namespace) -> list[float]:
    trainer = demo.Trainer(args, demo.Ranks(rank, world_size))
    return [trainer.train_step()[0].item() for _ in range(2)]


def test_compiled_as_one_graph_learns_the_same(tmp_path: Path) -> None:
    args = tiny(tmp_path, "--steps", "2", "--layers", "1")
    eager = world(2).run(eager_steps, args)
    assert world(2).run(compiled_steps, args) == [pytest.approx(losses, abs=1e-4) for losses in eager]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = demo.Trainer(tiny(tmp_path, "--steps", "2"), demo.Ranks())
    trainer.train_step()
    trainer.save()

    def full_disk(checkpoint: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left")

    trainer.train_step()
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        trainer.save()
    assert demo.read_checkpoint(tmp_path / demo.CHECKPOINT)["step"] == 1


def test_a_checkpoint_is_enough_to_build_the_model(tmp_path: Path) -> None:
    trainer = demo.Trainer(tiny(tmp_path, "--steps", "1"), demo.Ranks())
    trainer.train_step()
    trainer.save()
    checkpoint = demo.read_checkpoint(tmp_path / demo.CHECKPOINT)
    model = demo.MoETransformer(demo.ModelConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    tokens = torch.arange(20).view(2, 10)
    assert torch.equal(model(tokens).logits, trainer.model(tokens).logits)


# --- command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--ranks 3", "--experts and --batch: expected multiples of the 3 ranks, got 4, 8"),
        ("--topk 5", "--topk: expected at most --experts, 4, got 5"),
        ("--dim 34", "--dim: expected an even multiple of --heads, 2, got 34"),
        ("--capacity 0", "--capacity: expected a positive factor, got 0.0"),
        ("--steps 0", "--steps: expected a positive number, got 0"),
        ("--resume", "--resume: no checkpoint at"),
    ],
)
def test_bad_flags_are_named(tmp_path: Path, capsys: pytest.CaptureFixture, flags: str, message: str) -> None:
    with pytest.raises(SystemExit) as error:
        tiny(tmp_path, *flags.split())
    assert message in f"{error.value.code} {capsys.readouterr().err}"


def test_resuming_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trainer = demo.Trainer(tiny(tmp_path), demo.Ranks())
    trainer.train_step()
    trainer.save()
    with pytest.raises(SystemExit):
        tiny(tmp_path, "--resume", "--dim", "64")
    assert "the checkpoint has --dim 32, got 64" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    done = run_demo(out, "--steps", "4", "--ranks", "2")
    assert done.returncode == 0, done.stderr
    (out / "stdout").write_text(done.stdout)
    return out


def test_figures_are_those_of_the_run(finished: Path) -> None:
    figures = json.loads((finished / demo.FIGURES).read_text())
    assert (figures["world_size"], figures["steps"], figures["tokens_seen"]) == (2, 4, 4 * 8 * 32)
    loads = torch.tensor(figures["history"]["load"])
    assert loads.sum(2).eq(8 * 32 * 2).all() and loads.shape[1:] == (2, 4)  # each token's 2 experts, in each layer
    nats, bits = figures["validation_nats_per_byte"], figures["validation_bits_per_byte"]
    assert bits == pytest.approx({name: loss / math.log(2) for name, loss in nats.items()})
    assert nats["model"] == figures["history"]["validation_loss"][-1]
    assert figures["parameters"] == sum(
        p.numel() for p in demo.MoETransformer(demo.ModelConfig(**figures["model"])).parameters()
    )


def test_the_backend_is_printed_and_saved(finished: Path) -> None:
    assert "exchanges: over gloo" in (finished / "stdout").read_text().splitlines()
    figures = json.loads((finished / demo.FIGURES).read_text())
    assert (figures["backend"], figures["symmetric_bytes"]) == ("c10d", 0)


def test_a_backend_of_gpus_is_printed_with_its_reason_and_memory(tmp_path: Path) -> None:
    args = tiny(tmp_path)
    args.device = "cuda"
    nvlink = torch_ep.Communicator("", 0, 2, demo.PEER_TIMEOUT, backend="nvlink", reason="R", symmetric_bytes=3 << 19)
    assert demo.describe_exchanges(args, nvlink) == (
        "exchanges: backend nvlink (R), 1.5 MiB of symmetric memory per rank"
    )
    nccl = nvlink._replace(backend="c10d", symmetric_bytes=0)
    assert demo.describe_exchanges(args, nccl) == "exchanges: backend c10d (R)"


def test_the_curves_are_drawn(finished: Path) -> None:
    from matplotlib.image import imread

    pixels = imread(finished / demo.CURVES)
    half = pixels.shape[0] // 2
    assert all(
        len({tuple(p) for p in part[::3, ::3, :3].reshape(-1, 3)}) > 20 for part in (pixels[:half], pixels[half:])
    )


def test_a_sample_is_printed_and_kept(finished: Path) -> None:
    samples = (finished / demo.SAMPLE).read_text().split("\n\n-----\n\n")
    assert len(samples) == 2 and all(s.startswith("def ") and len(s.encode()) >= 16 for s in samples)
    assert samples[0] in (finished / "stdout").read_text()


def restore_sigint() -> None:
    """The parent of the tests may ignore interrupts, as background jobs of a shell do; a child would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupt_ends_every_rank(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "train_moe.py"), *TINY, "--out", str(tmp_path)]
    run = subprocess.Popen(
        [*command, "--steps", "100000", "--validations", "50000", "--ranks", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
        preexec_fn=restore_sigint,
    )
    try:
        for line in run.stdout:
            if line.startswith("step"):
                break
        os.kill(run.pid, signal.SIGINT)  # the first process alone
        _, errors = run.communicate(timeout=LIMIT_S)
        assert run.returncode == 130
        assert "interrupted; --resume goes on from" in errors
        give_up = time.monotonic() + LIMIT_S
        with pytest.raises(ProcessLookupError):
            while time.monotonic() < give_up:
                os.killpg(run.pid, 0)
                time.sleep(0.1)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
