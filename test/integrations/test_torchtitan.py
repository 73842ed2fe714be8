"""torchtitan: its debug model trains with torch_ep's dispatcher as with its own."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.harness import World, same_bits, seeded
from support.torchtitan_on_cpu import (
    BATCH,
    OVERRIDES,
    SELECTIVE_AC,
    STEPS,
    TOKEN_DISPATCHER,
    import_for_cpu,
    make_trainer,
    train,
)
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("torchtitan", reason="expected torchtitan 0.3.0: pip install torchtitan==0.3.0 triton")
pytest.importorskip("triton", reason="expected triton, which torchtitan imports: pip install triton")

NUM_EXPERTS = 8  # of the debug model
EXCHANGES = ("ep::plan", "ep::dispatch", "ep::combine")


@pytest.fixture(scope="module")
def ranks() -> Iterator[World]:
    """Ranks of their own: torchtitan disables the garbage collector, and changes Dynamo's configuration."""
    own = World(2)
    yield own
    own.close()


def _losses(rank: int, world_size: int, imports: tuple, steps: int, **options: Any) -> list[float]:
    trainer = make_trainer(rank, world_size, imports, **options)
    losses = train(trainer, steps)
    trainer.close()
    return losses


def test_losses_are_bitwise_those_of_the_standard_dispatcher(ranks: World) -> None:
    """Of two experts per token: a sum of two is the same in any order. On all ranks, over 20 steps."""
    standard = ranks.run(_losses, (), STEPS, num_topk=2)
    assert ranks.run(_losses, OVERRIDES, STEPS, num_topk=2) == standard
    assert standard[0][-1] < standard[0][0] - 0.1


def test_losses_of_three_experts_per_token_in_bfloat16_are_close(ranks: World) -> None:
    """torchtitan sums in bfloat16, torch_ep in float32."""
    standard = ranks.run(_losses, (), STEPS, dtype="bfloat16")
    torch.testing.assert_close(ranks.run(_losses, OVERRIDES, STEPS, dtype="bfloat16"), standard, rtol=0, atol=0.01)


def test_losses_of_a_compiled_model_are_bitwise_those_of_the_standard_dispatcher(ranks: World) -> None:
    """torchtitan compiles each block with fullgraph=True, recomputation included."""
    options = {"num_topk": 2, "num_layers": 2, "compile_backend": "aot_eager"}
    assert ranks.run(_losses, OVERRIDES, STEPS, **options) == ranks.run(_losses, (), STEPS, **options)


def test_losses_of_a_model_compiled_by_inductor_are_close(ranks: World) -> None:
    options = {"num_topk": 2, "num_layers": 2}
    eager = ranks.run(_losses, OVERRIDES, 5, **options)
    compiled = ranks.run(_losses, OVERRIDES, 5, compile_backend="inductor", **options)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0.001)


@pytest.mark.parametrize(
    ("num_ranks", "options"),
    [
        (2, {"tensor_parallel": 2}),  # tokens are spread over the ranks of the tensor-parallel group
        (4, {"expert_parallel": 2}),  # two groups that share the experts
    ],
    ids=["tensor_parallel", "two_groups"],
)
def test_other_parallelisms(num_ranks: int, options: dict[str, int]) -> None:
    own = World(num_ranks)
    try:
        standard = own.run(_losses, (), 3, num_topk=2, num_layers=2, **options)
        assert own.run(_losses, OVERRIDES, 3, num_topk=2, num_layers=2, **options) == standard
    finally:
        own.close()


class _Executed(TorchDispatchMode):
    """Counts the operators that run. Those that selective checkpointing has saved do not come here."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.name().split(".")[0]
        if name in EXCHANGES:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def _count_exchanges(rank: int, world_size: int, imports: tuple, compile_backend: str | None) -> dict[str, int]:
    trainer = make_trainer(rank, world_size, imports, num_layers=2, compile_backend=compile_backend)
    if compile_backend is None:
        with _Executed() as executed:
            train(trainer, 1)
        counts = executed.counts
    else:  # Dynamo compiles nothing under a mode
        train(trainer, 1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            train(trainer, 1)
        counts = Counter(event.name for event in profile.events() if event.name in EXCHANGES)
    trainer.close()
    return dict(counts)


@pytest.mark.parametrize("compile_backend", [None, "aot_eager"])
def test_selective_ac_saves_exchanges(ranks: World, compile_backend: str | None) -> None:
    """Forward has a plan, a dispatch and a combine, and backward the transposes of two. Nothing else is exchanged."""
    saved = ranks.run(_count_exchanges, OVERRIDES, compile_backend)
    assert saved == [{"ep::plan": 1, "ep::dispatch": 2, "ep::combine": 2}] * 2
    if compile_backend is None:  # without the override they are repeated; a compiler may keep them by itself
        repeated = ranks.run(_count_exchanges, (TOKEN_DISPATCHER,), compile_backend)
        assert repeated == [{"ep::plan": 2, "ep::dispatch": 3, "ep::combine": 3}] * 2


@pytest.mark.parametrize("capacity_factor", [1.0, None])
def test_cuda_graphs_are_allowed_with_a_capacity(ranks: World, capacity_factor: float | None) -> None:
    """torchtitan checks the configuration, also on a CPU, where it then captures nothing."""
    standard = ranks.run(_losses, (), 3, num_topk=2)
    options = {"num_topk": 2, "comm_backend": "hybridep", "capacity_factor": capacity_factor, "cuda_graphs": True}
    if capacity_factor is None:
        with pytest.raises(AssertionError, match=r"CUDA graphs support only[^!]*TorchEPTokenDispatcher\.Config"):
            ranks.run(_losses, OVERRIDES, 3, **options)
    else:
        assert ranks.run(_losses, OVERRIDES, 3, **options) == standard


def _limits(rank: int, world_size: int, comm_backend: str) -> list[int]:
    import torch_ep.comm

    trainer = make_trainer(rank, world_size, OVERRIDES, comm_backend=comm_backend)
    dispatcher = trainer.model_parts[0].layers["1"].moe.routed_experts.token_dispatcher
    communicator = torch_ep.comm.communicators[dispatcher.group_name]
    trainer.close()
    return [communicator.max_tokens_per_rank, communicator.hidden, communicator.num_topk, communicator.num_experts]


@pytest.mark.parametrize("comm_backend", ["hybridep", "deepep"])
def test_limits_come_from_configurations_that_have_them(ranks: World, comm_backend: str) -> None:
    assert ranks.run(_limits, comm_backend) == [[BATCH * 32, 256, 3, NUM_EXPERTS]] * 2


def _layer(dispatcher: Any, x: Tensor, scores: Tensor, idx: Tensor, first_expert: int) -> dict[str, Tensor]:
    """Results and gradients of one dispatcher around experts that are matrices."""
    x, scores = (t.clone().requires_grad_() for t in (x, scores))
    num_local_tokens = torch.bincount(idx.flatten(), minlength=NUM_EXPERTS)
    rows, counts, metadata = dispatcher.dispatch(x, scores, idx, num_local_tokens)
    weights = torch.randn(NUM_EXPERTS, x.shape[1], x.shape[1], generator=seeded(3))[first_expert:].requires_grad_()
    groups = torch.split(rows[: int(counts.sum())], counts.tolist())
    results = [torch.tanh(group @ weight) for group, weight in zip(groups, weights)]  # noqa: B905 - of the local ones
    padding = rows.new_full((rows.shape[0] - int(counts.sum()), x.shape[1]), torch.nan)
    out = dispatcher.combine(torch.cat([*results, padding]), metadata, x)
    out.backward(torch.randn(out.shape, generator=seeded(4)))
    sums = torch.stack([group.sum(0) for group in groups])
    return {"out": out, "x.grad": x.grad, "scores.grad": scores.grad, "counts": counts, "rows": rows, "sums": sums}


def _dispatchers_agree(rank: int, world_size: int) -> str:
    import_for_cpu()
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    from torch_ep.integrations.torchtitan import TorchEPTokenDispatcher

    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("ep",))
    generator = seeded(rank)
    x = torch.randn(33, 16, generator=generator)
    scores = torch.rand(33, 2, generator=generator)
    idx = torch.stack([torch.randperm(NUM_EXPERTS - 1, generator=generator)[:2] for _ in range(33)])
    idx[idx == 2] = 7  # expert 2 has no tokens
    first = rank * NUM_EXPERTS // world_size

    sizes = {"num_experts": NUM_EXPERTS, "top_k": 2}
    standard = AllToAllTokenDispatcher.Config(**sizes).build()
    standard.wire_meshes(ep_mesh=mesh)
    want = _layer(standard, x, scores, idx, first)
    differences = []
    for alignment, factor in ((None, None), (16, None), (None, 1.0), (16, 1.0), (16, 0.75)):
        config = TorchEPTokenDispatcher.Config(
            **sizes, pad_multiple=alignment, non_blocking_capacity_factor=factor, hidden_dim=16
        )
        dispatcher = config.build()
        dispatcher.wire_meshes(ep_mesh=mesh)
        got = _layer(dispatcher, x, scores, idx, first)
        name = f"alignment {alignment}, factor {factor}"
        a = alignment or 1
        if got["counts"].tolist() != [-(-n // a) * a for n in want["counts"].tolist()]:
            differences.append(f"{name}: counts {got['counts']}")
        if factor is not None:
            num_rows = int(factor * world_size * 33 * 2) + NUM_EXPERTS // world_size * (a - 1)
            if got["rows"].shape[0] != -(-num_rows // a) * a:
                differences.append(f"{name}: {got['rows'].shape[0]} rows")
        if not torch.allclose(got["sums"], want["sums"]):  # padding is zero
            differences.append(f"{name}: sums of rows")
        for key in ("out", "x.grad", "scores.grad"):
            if not same_bits(got[key], want[key]):
                differences.append(f"{name}: {key} {(got[key] - want[key]).abs().max()}")
    if rank == 0 and int(want["counts"][2]) != 0:
        differences.append("expert 2 has tokens")
    return "\n".join(differences)


def test_dispatchers_agree_by_the_bit(ranks: World) -> None:
    """Results, gradients of tokens and scores, and padded counts; with an expert that has no tokens."""
    assert ranks.run(_dispatchers_agree) == ["", ""]


def test_one_rank_without_expert_parallelism_agrees() -> None:
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    from torch_ep.integrations.torchtitan import TorchEPTokenDispatcher

    x, scores = torch.randn(9, 16, generator=seeded(0)), torch.rand(9, 2, generator=seeded(1))
    idx = torch.stack([torch.randperm(NUM_EXPERTS, generator=seeded(2, i))[:2] for i in range(9)])
    standard = LocalTokenDispatcher.Config(num_experts=NUM_EXPERTS, top_k=2).build()
    dispatcher = TorchEPTokenDispatcher.Config(num_experts=NUM_EXPERTS, top_k=2).build()
    dispatcher.wire_meshes(ep_mesh=None)
    want, got = (_layer(d, x, scores, idx, 0) for d in (standard, dispatcher))
    for key in ("out", "x.grad", "scores.grad"):
        assert same_bits(got[key], want[key]), key
    assert got["counts"].tolist() == want["counts"].tolist()


def _configured(*arguments: str) -> Any:
    """The configuration of a command line, with its overrides."""
    from torchtitan.config import ConfigManager
    from torchtitan.config.override import apply_overrides

    config = ConfigManager().parse_args(
        ["--module", "deepseek_v3", "--parallelism.expert_parallel_degree=2", *arguments]
    )
    apply_overrides(config.override, config)
    return config


def test_the_command_line_activates_both_overrides() -> None:
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    from torch_ep.integrations.torchtitan import TorchEPSelectiveAC, TorchEPTokenDispatcher

    values = {"pad_multiple": 16, "hidden_dim": 256, "num_max_tokens_per_rank": 64}
    imports = ["--override.imports", f"{TOKEN_DISPATCHER}={json.dumps(values)}", SELECTIVE_AC]
    config = _configured("--config", "deepseek_v3_debugmodel", "--training.disable_cuda_graphs", *imports)
    found = [c for _, c, _, _ in config.model_spec.model.traverse(LocalTokenDispatcher.Config)]
    assert found == [TorchEPTokenDispatcher.Config(num_experts=NUM_EXPERTS, top_k=3, **values)] * 5
    assert config.activation_checkpoint == TorchEPSelectiveAC.Config()


def test_the_command_line_allows_cuda_graphs_from_the_configuration_of_hybridep() -> None:
    config = _configured("--config", "deepseek_v3_debugmodel_hybridep", "--override.imports", *OVERRIDES)
    assert not config.training.disable_cuda_graphs
    config._validate_cuda_graphs()


def test_an_unknown_field_raises() -> None:
    imports = ["--override.imports", TOKEN_DISPATCHER + '={"alignment": 16}']
    with pytest.raises(ValueError, match=r"fields not on TorchEPTokenDispatcher\.Config: \['alignment'\]"):
        _configured("--config", "deepseek_v3_debugmodel", "--training.disable_cuda_graphs", *imports)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"non_blocking_capacity_factor": 0.0}, r"expected non_blocking_capacity_factor in \(0, 1\], got 0.0: pass 1"),
        ({"non_blocking_capacity_factor": 1.5}, r"expected non_blocking_capacity_factor in \(0, 1\], got 1.5: pass 1"),
        ({"pad_multiple": 0}, "expected pad_multiple of at least 1, got 0: pass None for no padding"),
    ],
)
def test_bad_values_raise(values: dict, message: str) -> None:
    from torch_ep.integrations.torchtitan import TorchEPTokenDispatcher

    with pytest.raises(ValueError, match="TorchEPTokenDispatcher: " + message):
        TorchEPTokenDispatcher.Config(num_experts=NUM_EXPERTS, top_k=2, **values).build()


def test_a_missing_torchtitan_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch_ep.integrations.torchtitan", raising=False)
    monkeypatch.setitem(sys.modules, "torchtitan.config", None)
    with pytest.raises(ImportError, match=r"expected torchtitan 0\.3 and triton, got: .*pip install torchtitan==0\.3"):
        import torch_ep.integrations.torchtitan  # noqa: F401
