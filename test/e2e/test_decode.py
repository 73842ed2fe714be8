"""Decoding writes the bytes that the model would without a cache, however prompts and experts lie on the ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.compiling import InductorGraphs, artifacts, inductor_cache
from support.devices import CUDA, Ranks, needs_cuda, one_rank_on
from support.harness import LIMIT_S, seeded, world
from torch import Tensor

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # also in the ranks, which import this file

import decode_moe  # noqa: E402
import train_moe as demo  # noqa: E402

import torch_ep  # noqa: E402
from torch_ep.nn import MoE, gather_experts  # noqa: E402

CONFIG = demo.ModelConfig(layers=2, dim=32, heads=2, experts=4, topk=2, intermediate=16, context=24)
PROMPTS = (b"def f(x):", b"a", b"import ")
STEPS = 12
SEED = 7

# --- the layer --------------------------------------------------------------------------------------------------------

TOKENS = (5, 0, 3, 1)  # of each rank
ROOM = 6
HIDDEN = 160  # one group of channels that share a scale, and a shorter one
ROOM_OF_ONE_RANK = {"hidden": 2 * HIDDEN, "low_latency_tokens": ROOM}  # room of two bytes an element; these have four
OPTIONS = {
    "softmax": {},
    "biased choice": {"score": "sigmoid", "selection_bias": True, "route_scale": 0.5},
    "shared expert": {"shared_intermediate": 5},
}


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """As that of conftest.py, with room for these tests."""
    with one_rank_on(request.param, **ROOM_OF_ONE_RANK):
        yield request.param


def make_layer(device: str, **options: Any) -> MoE:
    torch.manual_seed(5)
    layer = MoE(HIDDEN, 24, num_experts=8, num_topk=3, **options).requires_grad_(False)
    if layer.selection_bias is not None:
        layer.selection_bias.copy_(torch.linspace(-0.5, 0.5, layer.num_experts))
    return layer.to(device)


def make_x(device: str, rank: int) -> Tensor:
    # Rows and groups of channels of very different sizes, so that a scale of the wrong one shows.
    x = torch.randn(TOKENS[rank], HIDDEN, generator=seeded(rank, 4))
    x[:, 128:] *= 100
    return (x * torch.logspace(-2, 1, len(x))[:, None]).to(device)


def assert_rows_close(got: Tensor, want: Tensor) -> None:
    """In float32, whose errors grow with the largest element of a row."""
    largest = want.abs().amax(1, keepdim=True).clamp_min(1e-6)
    torch.testing.assert_close(got / largest, want / largest, rtol=0, atol=1e-5)


def on(device: str, world_size: int, fn: Any, *args: Any) -> list[Any]:
    """`fn(rank, world_size, *args)` of every rank, here for one."""
    return [fn(0, 1, *args)] if world_size == 1 else Ranks(device, world_size).run(fn, *args)


def _decode_and_forward(rank: int, world_size: int, device: str, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    layer, x = make_layer(device, **options), make_x(device, rank)
    return layer.decode(x, ROOM).cpu(), layer(x)[0].cpu()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_decode_equals_forward(device: str, world_size: int, name: str) -> None:
    for decoded, forward in on(device, world_size, _decode_and_forward, device, OPTIONS[name]):
        assert_rows_close(decoded, forward)


def through_fp8(x: Tensor, powers_of_two: bool) -> Tensor:
    """x as it arrives, and as a wide number again."""
    parts = []
    for group in x.split(128, 1):
        largest = group.abs().amax(1, keepdim=True).clamp_min(1e-4)
        scale, factor = largest / 448, 448 / largest
        if powers_of_two:
            scale = 2 ** scale.log2().ceil()
            factor = 1 / scale
        parts.append((group * factor).to(torch.float8_e4m3fn).float() * scale)
    return torch.cat(parts, 1)


def _quantized(rank: int, world_size: int, device: str, quantize: Any) -> tuple[Tensor, Tensor]:
    """Returns the result of decode, and that of every expert alone for the rows as they arrive."""
    layer, x = make_layer(device), make_x(device, rank)
    topk_idx, topk_weights, _, _ = layer.route(x)
    gate, up, down = (gather_experts(getattr(layer, name), layer.group_name) for name in layer.EXPERT_PARAMETERS)
    rows = through_fp8(x, quantize != "fp8")
    want = torch.zeros_like(x)
    for token, slot in torch.cartesian_prod(torch.arange(len(x)), torch.arange(topk_idx.shape[1])).tolist():
        expert, row = topk_idx[token, slot], rows[token]
        want[token] += topk_weights[token, slot] * ((F.silu(row @ gate[expert]) * (row @ up[expert])) @ down[expert])
    return layer.decode(x, ROOM, quantize=quantize).cpu(), want.cpu()


@pytest.mark.parametrize("quantize", ["fp8", "fp8_pow2", "fp8_ue8m0"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_experts_get_quantized_rows_widened(device: str, world_size: int, quantize: str) -> None:
    for decoded, want in on(device, world_size, _quantized, device, quantize):
        assert_rows_close(decoded, want)


def test_compiled_they_get_the_incomplete_group_too(device: str) -> None:
    """In the simple form Inductor leaves channels out: see `_dequantize`."""
    layer, x = make_layer(device), make_x(device, 0)
    with inductor_cache(artifacts()):
        y = torch.compile(layer.decode, fullgraph=True)(x, ROOM, quantize="fp8_ue8m0")
    assert_rows_close(y, layer.decode(x, ROOM, quantize="fp8_ue8m0"))


def test_idle_tokens_visit_the_shared_expert_alone(device: str) -> None:
    layer, x = make_layer(device, shared_intermediate=5), make_x(device, 0)
    active = torch.tensor([True, False, True, False, False], device=device)
    counted = torch_ep.LowLatencyStatistics.zeros(layer.num_experts, device=device)
    y = layer.decode(x[:, None], ROOM, active=active[:, None], statistics=counted)[:, 0]
    shared = layer.shared_expert(x)
    assert_rows_close(y, torch.where(active[:, None], layer.decode(x, ROOM), shared))
    assert counted.tokens_per_expert.sum() == 2 * layer.num_topk


def test_decode_is_for_inference_only() -> None:
    layer = make_layer("cpu").requires_grad_(True)
    with pytest.raises(RuntimeError, match="inference only"):
        layer.decode(make_x("cpu", 0), ROOM)


# --- the loop ---------------------------------------------------------------------------------------------------------


def make_model(layers: int = CONFIG.layers) -> demo.MoETransformer:
    torch.manual_seed(3)
    model = demo.MoETransformer(replace(CONFIG, layers=layers)).requires_grad_(False)
    for layer in model.moe_layers():
        layer.selection_bias.copy_(torch.linspace(-0.1, 0.1, CONFIG.experts))
    return model


def without_cache(temperature: float, layers: int = CONFIG.layers) -> dict[int, bytes]:
    """Every byte of each text by the forward pass of training over all those before it, on one rank."""
    model = make_model(layers)
    texts = {}
    for number, prompt in enumerate(PROMPTS):
        text = list(prompt)
        noise = temperature * decode_moe.gumbel(SEED * 1_000_003 + number, CONFIG.context)
        for _ in range(STEPS):
            logits = model(torch.tensor([text])).logits[0, -1]
            text.append(int((logits + noise[len(text) - 1]).argmax()))
        texts[number] = bytes(text)
    return texts


def make_decoder(rank: int, world_size: int, device: str, num_prompts: int, **options: Any) -> decode_moe.Decoder:
    prompts = PROMPTS[:num_prompts]
    slots = -(-num_prompts // world_size)
    model = make_model().to(device)
    decoder = decode_moe.Decoder(model, decode_moe.share(prompts, rank, world_size), slots, seed=SEED, **options)
    decoder.prefill(max(map(len, prompts)) - 1)
    return decoder


def _decoded(
    rank: int, world_size: int, device: str, num_prompts: int, temperature: float, compiler: dict[str, Any] | None
) -> dict[int, bytes]:
    decoder = make_decoder(rank, world_size, device, num_prompts, temperature=temperature)
    step = decoder if compiler is None else torch.compile(decoder, fullgraph=True, dynamic=False, **compiler)
    for _ in range(STEPS):
        step()
    return decoder.texts()


def joined(texts: list[dict[int, bytes]]) -> dict[int, bytes]:
    return {number: text for part in texts for number, text in part.items()}


SHARES = {"one rank": (1, 3), "uneven": (2, 3), "a rank without prompts": (2, 1), "more ranks without": (4, 2)}


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, None) for name in SHARES), ("one rank", "aot_eager"), ("more ranks without", "aot_eager")],
)
def test_greedy_bytes_are_those_without_a_cache(device: str, name: str, backend: str | None) -> None:
    world_size, num_prompts = SHARES[name]
    want = dict(list(without_cache(0.0).items())[:num_prompts])
    compiler = None if backend is None else {"backend": backend}
    assert joined(on(device, world_size, _decoded, device, num_prompts, 0.0, compiler)) == want


@pytest.mark.parametrize("name", ["one rank", "uneven"])
def test_drawn_bytes_are_those_without_a_cache(device: str, name: str) -> None:
    want = without_cache(0.5)
    assert all(len(set(text)) > STEPS // 2 for text in want.values())  # more than a loop of a byte or two
    assert joined(on(device, SHARES[name][0], _decoded, device, len(PROMPTS), 0.5, None)) == want


def test_noise_draws_from_the_softmax() -> None:
    logits = torch.full((demo.VOCABULARY,), -99.0)
    logits[:3] = torch.tensor([1.0, 2.0, 3.0])
    draws = (logits / 2 + decode_moe.gumbel(0, 20_000)).argmax(-1)
    shares = torch.bincount(draws, minlength=len(logits))[:3] / len(draws)
    torch.testing.assert_close(shares, (logits / 2).softmax(0)[:3], rtol=0, atol=0.02)


def test_a_restart_leads_to_the_same_text() -> None:
    decoder = make_decoder(0, 1, "cpu", len(PROMPTS), temperature=0.5, count=True)
    texts = []
    for _ in range(2):
        for _ in range(STEPS):
            decoder()
        texts.append(decoder.texts())
        decoder.restart()
    assert texts[0] == texts[1]
    assert not decoder.tokens_per_expert.any() and list(decoder.texts().values()) == list(PROMPTS)


def _counted(rank: int, world_size: int) -> dict[str, Any]:
    decoder = make_decoder(rank, world_size, "cpu", len(PROMPTS), count=True)
    for _ in range(STEPS):
        decoder()
    return decode_moe.statistics(decoder, demo.Ranks(rank, world_size))


def test_statistics_are_of_the_steps_and_of_all_ranks() -> None:
    counted = world(2).run(_counted)
    assert counted[0] == counted[1]
    tokens, waits = torch.tensor(counted[0]["tokens_per_expert"]), counted[0]["wait_ms"]
    assert tokens.shape == (CONFIG.layers, CONFIG.experts)
    assert tokens.sum(1).tolist() == [STEPS * len(PROMPTS) * CONFIG.topk] * CONFIG.layers
    assert [len(of_rank) for of_rank in waits] == [2, 2] and all(ms >= 0 for of_rank in waits for ms in of_rank)


def _graphs(rank: int, world_size: int) -> list[list[str]]:
    backend = InductorGraphs()
    decoder = make_decoder(rank, world_size, "cpu", 1, temperature=0.5, count=True)
    torch.compile(decoder, backend=backend, fullgraph=True, dynamic=False)()
    return [[str(n.target) for n in gm.graph.nodes if n.op == "call_function"] for gm in backend.graphs]


def test_a_step_is_one_graph_with_its_exchanges_and_no_wait() -> None:
    exchanges = ["ep.low_latency_dispatch.default", "ep.low_latency_combine.default"] * CONFIG.layers
    for graphs in world(2).run(_graphs):
        (graph,) = graphs
        assert [name for name in graph if name.startswith("ep.")] == exchanges
        assert not [name for name in graph if "_local_scalar_dense" in name or "nonzero" in name]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", ["one rank", "a rank without prompts"])
def test_a_step_is_a_cuda_graph(name: str) -> None:
    world_size, num_prompts = SHARES[name]
    want = dict(list(without_cache(0.5).items())[:num_prompts])
    with one_rank_on("cuda", **ROOM_OF_ONE_RANK):
        got = on("cuda", world_size, _decoded_by_replays, num_prompts)
    assert joined([texts for texts, _ in got]) == want
    assert [skips for _, skips in got] == [0] * world_size


def _decoded_by_replays(rank: int, world_size: int, num_prompts: int) -> tuple[dict[int, bytes], int]:
    torch._dynamo.utils.counters.clear()
    texts = _decoded(rank, world_size, "cuda", num_prompts, 0.5, {"mode": "reduce-overhead"})
    return texts, torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


# --- the program ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / demo.CHECKPOINT
    model = make_model(layers=1)  # half the time to compile
    state = torch_ep.nn.full_state_dict(model)
    torch.save({"format": demo.CHECKPOINT_FORMAT, "config": asdict(model.config), "model": state}, path)
    return path


def test_the_program_compiles_and_writes_texts_and_figures(tmp_path: Path, checkpoint: Path) -> None:
    """Cold, so that it takes most of the time of these tests; one rank has no prompt."""
    command = [sys.executable, str(EXAMPLES / "decode_moe.py"), "--device=cpu", "--ranks=2", "--threads=1"]
    command += [f"--checkpoint={checkpoint}", f"--out={tmp_path}", f"--prompt={PROMPTS[0].decode()}"]
    command += [f"--steps={STEPS}", "--temperature=0.5", f"--seed={SEED}", "--statistics"]
    paths = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": paths, "TORCHINDUCTOR_CACHE_DIR": artifacts()}
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment)
    assert done.returncode == 0, done.stderr

    figures = json.loads((tmp_path / decode_moe.FIGURES).read_text())
    text = without_cache(0.5, layers=1)[0].decode("utf-8", "replace")
    assert [t["prompt"] + t["continuation"] for t in figures["texts"]] == [text]
    assert text in done.stdout
    assert (figures["world_size"], figures["prompts_per_rank"], figures["compiled"]) == (2, [1, 0], True)
    assert len(figures["latencies_ms"]) == figures["steps"] == STEPS
    assert min(figures["latencies_ms"]) <= figures["latency_ms"]["median"] <= figures["latency_ms"]["p99"]
    tokens = torch.tensor(figures["statistics"]["tokens_per_expert"])
    assert tokens.sum(1).tolist() == [STEPS * CONFIG.topk]

    from matplotlib.image import imread

    pixels = imread(tmp_path / decode_moe.LATENCIES)
    assert len({tuple(p) for p in pixels[::3, ::3, :3].reshape(-1, 3)}) > 20


def test_latencies_are_those_of_the_slowest_rank() -> None:
    latencies = decode_moe.slowest([[1.0, 5.0, 2.0], [3.0, 4.0, 1.0]])
    assert latencies == [3.0, 5.0, 2.0]
    figures = decode_moe.latency_figures(latencies, num_prompts=4)
    assert (figures["latency_ms"]["median"], figures["latency_ms"]["max"]) == (3.0, 5.0)
    assert figures["tokens_per_second"] == pytest.approx(3 * 4 / 10e-3)


def test_prompts_are_repeated_to_fill_the_batch(checkpoint: Path) -> None:
    args = decode_moe.parse([f"--checkpoint={checkpoint}", "--prompt=a", "--prompt=bc", "--batch=3", "--ranks=2"])
    assert args.prompts == [b"a", b"bc", b"a"]
    assert [decode_moe.share(args.prompts, rank, 2) for rank in range(2)] == [{0: b"a", 2: b"a"}, {1: b"bc"}]
    assert args.steps == CONFIG.context - 2
    limits = decode_moe.limits(args)
    assert (limits["max_tokens_per_rank"], limits["low_latency_tokens"]) == (2, 2)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--ranks 3", "--ranks: expected to divide the checkpoint's 4 experts, got 3"),
        (f"--prompt {'x' * 24}", "--prompt: expected less than the checkpoint's context of 24 bytes, got 24"),
        ("--prompt=", "--prompt: expected at least one byte, got none"),
        ("--prompt four --steps 21", "--steps: expected at most 20 behind a prompt of 4 bytes, got 21"),
        ("--prompt x --batch 0", "--batch: expected a positive number, got 0"),
        ("--prompt x --temperature -1", "--temperature: expected 0 or more, got -1.0"),
    ],
)
def test_bad_flags_are_named(checkpoint: Path, capsys: pytest.CaptureFixture, flags: str, message: str) -> None:
    with pytest.raises(SystemExit):
        decode_moe.parse([f"--checkpoint={checkpoint}", *flags.split()])
    assert message in capsys.readouterr().err


def test_a_missing_checkpoint_raises_with_the_command_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for flags, command in (
        ([], "examples/train_moe.py first"),
        (["--checkpoint=x/c.pt"], "train_moe.py --out x first"),
    ):
        with pytest.raises(SystemExit):
            decode_moe.parse(flags)
        assert command in capsys.readouterr().err


def test_an_interrupt_exits_with_status_130(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(args: Any, ranks: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(decode_moe, "decode", interrupted)
    flags = [f"--checkpoint={checkpoint}", f"--out={tmp_path}", "--prompt=x", "--ranks=1", "--threads=1"]
    assert decode_moe.main([*flags, "--device=cpu"]) == 130
