"""A training step around the layer: the bias of replicas, scaled gradients, checkpointing, FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.harness import world
from support.moe_cases import SHAPE, make_layer, make_x
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import torch_ep
from torch_ep.nn import GradScaler, MoE, RouterStats, clip_grad_norm_, full_state_dict, grouped_mm

E = SHAPE["num_experts"]

# --- the bias of replicas ---------------------------------------------------------------------------------------------


def _bias(rank: int, world_size: int, shape: tuple[int, ...], names: tuple[str, ...], arguments: str) -> list[float]:
    """The bias after one update, where each rank found another expert busy."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    communicator = torch_ep.init(mesh["ep"])
    layer = make_layer(group=mesh["ep"], selection_bias=True)
    layer.selection_bias.zero_()
    load = torch.zeros(E, dtype=torch.int64)
    load[rank] = 100
    group = {
        "none": {},
        "mesh": {"group": mesh["dp"]} if "dp" in names else {"group": mesh},
        "group": {"group": mesh["dp"].get_group()} if "dp" in names else {"group": dist.group.WORLD},
        "all ranks": {"group": None},
        "no replicas": {"group": ""},
    }[arguments]
    layer.update_selection_bias(load, rate=0.25, **group)
    assert load[rank] == 100
    if communicator.group_name not in ("", dist.group.WORLD.group_name):
        torch_ep.destroy(mesh["ep"])
    return layer.selection_bias.tolist()


def _against(busy: range | list[int]) -> list[float]:
    return [-0.25 if expert in busy else 0.25 for expert in range(E)]


@pytest.mark.parametrize("arguments", ["none", "mesh", "group", "all ranks"])
@pytest.mark.parametrize("shape", [(2, 1), (2, 2), (4, 1)], ids=str)
def test_replicas_keep_one_bias(shape: tuple[int, int], arguments: str) -> None:
    world_size = math.prod(shape)
    biases = world(world_size).run(_bias, shape, ("dp", "ep"), arguments)
    assert biases == [_against(range(world_size))] * world_size


def test_replicas_of_several_dimensions_keep_one_bias() -> None:
    names = ("dp_replicate", "ep", "dp_shard")
    for arguments in ("none", "mesh", "group"):
        assert world(4).run(_bias, (2, 1, 2), names, arguments) == [_against(range(4))] * 4


def test_layers_of_other_dimensions_keep_biases_of_their_own() -> None:
    biases = world(4).run(_bias, (2, 2), ("pp", "ep"), "none")
    assert biases == [_against([0, 1])] * 2 + [_against([2, 3])] * 2
    assert world(2).run(_bias, (2, 1), ("dp", "ep"), "no replicas") == [_against([0]), _against([1])]


# --- scaled gradients -------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
}


def _scaled_steps(rank: int, world_size: int, name: str, where: str, unscale: bool) -> tuple[float, Tensor, bool]:
    """Scale and router after two steps, of which the second overflows on rank 1; whether the second changed it."""
    torch.manual_seed(0)
    layer = MoE(8, 8, E, 3)
    parameters = [getattr(layer, name) for name in layer.EXPERT_PARAMETERS]
    optimizer = OPTIMIZERS[name]([layer.router, *parameters])
    scaler = GradScaler("cpu", init_scale=2.0**10)
    for step in range(2):
        before = layer.router.detach().clone()
        optimizer.zero_grad()
        y, _ = layer(make_x("cpu", rank, 6, 8).float())
        scaler.scale(y.square().mean()).backward()
        dist.all_reduce(layer.router.grad)
        if step == 1 and where == "none at all" and rank == 0:
            optimizer.zero_grad()
        if step == 1 and where != "nowhere" and rank == 1:
            parameters[0].grad[0, 0, 0] = float("inf")
        if unscale:
            scaler.unscale_(optimizer)
            clip_grad_norm_(layer, 1.0)
        scaler.step(optimizer)
        scaler.update()
    return scaler.get_scale(), layer.router.detach(), not torch.equal(before, layer.router)


@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale_, step"])
@pytest.mark.parametrize("where", ["nowhere", "rank 1", "none at all"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ranks_skip_steps_together(name: str, where: str, unscale: bool) -> None:
    first, second = world(2).run(_scaled_steps, name, where, unscale)
    assert first[0] == second[0] == (2.0**10 if where == "nowhere" else 2.0**9)
    assert torch.equal(first[1], second[1])
    assert first[2] == second[2] == (where == "nowhere")


def test_the_scaler_of_one_rank_is_torchs() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], lr=0.5)
    scaler = GradScaler("cpu", init_scale=4.0)
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert p.tolist() == [0.5] * 3
    assert not GradScaler("cpu", enabled=False).is_enabled()


# --- parameters on the CPU, a group for CUDA alone --------------------------------------------------------------------


def _cpu_offloaded(rank: int, world_size: int) -> list[str]:
    layer = make_layer(selection_bias=True)
    want = [float(clip_grad_norm_(layer, 1.0)), full_state_dict(layer), layer.selection_bias.clone()]
    layer.group_name = dist.new_group(backend="cuda:gloo").group_name
    said = []
    for use in (
        lambda: float(clip_grad_norm_(layer, 1.0)) == want[0],
        lambda: all(torch.equal(t, want[1][name]) for name, t in full_state_dict(layer).items()),
        lambda: layer.update_selection_bias(torch.zeros(E)) is None,
    ):
        try:
            said.append(str(use()))
        except (AssertionError, RuntimeError) as error:
            said.append(str(error))
    return said


def test_parameters_on_the_cpu_and_a_group_for_cuda() -> None:
    for said in world(2).run(_cpu_offloaded):
        if torch.cuda.is_available():
            assert said == ["True"] * 3
        else:  # sums wanted to travel by CUDA
            assert all("CUDA" in message and "device type cpu" not in message for message in said), said


# --- activation checkpointing -----------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, result: Callable[[Tensor, RouterStats], Any], **options: Any) -> None:
        super().__init__()
        self.before = nn.Linear(8, 8, dtype=torch.float64)
        self.moe = make_layer(**options)
        self.result = result

    def forward(self, x: Tensor) -> Any:
        y, stats = self.moe(self.before(x))
        return self.result(y, stats)


RESULTS: dict[str, tuple[Callable[[Tensor, RouterStats], Any], Callable[[Any], Tensor]]] = {
    "stats": (lambda y, stats: (y, stats), lambda out: out[1].aux_loss),
    "loss": (lambda y, stats: (y, stats.aux_loss), lambda out: out[1]),
    "loss of a loss": (lambda y, stats: (y, 2 * stats.aux_loss + 1), lambda out: out[1]),
    "unpacked": (lambda y, stats: (y, *stats), lambda out: out[1]),
    "unpacked outside": (lambda y, stats: (y, stats), lambda out: next(iter(out[1]))),
}


def _gradients(
    name: str, reentrant: bool | None, compile: Callable[[nn.Module], Any] = lambda block: block, **options: Any
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    result, loss = RESULTS[name]
    block = Block(result, **options)
    run = compile(block)
    x = make_x("cpu", 0, 9, 8).requires_grad_()
    out = run(x) if reentrant is None else checkpoint(run, x, use_reentrant=reentrant)
    (out[0].square().mean() + 10 * loss(out)).backward()
    return {"x": x.grad, **{name: p.grad for name, p in block.named_parameters()}}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", RESULTS)
def test_the_auxiliary_loss_has_its_gradient_under_checkpointing(name: str, reentrant: bool) -> None:
    want = _gradients(name, None)
    for key, grad in _gradients(name, reentrant).items():
        assert torch.equal(grad, want[key]), key


@pytest.mark.parametrize("capacity", [None, 27], ids=["graph break", "fullgraph"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["stats", "loss of a loss"])
def test_the_auxiliary_loss_of_a_compiled_block_has_its_gradient(
    name: str, reentrant: bool, capacity: int | None
) -> None:
    torch._dynamo.reset()
    want = _gradients(name, None, capacity=capacity)
    got = _gradients(
        name,
        reentrant,
        lambda block: torch.compile(block, backend="aot_eager", fullgraph=capacity is not None),
        capacity=capacity,
    )
    for key, grad in got.items():
        torch.testing.assert_close(grad, want[key], msg=lambda m, key=key: f"{key}: {m}")
    torch._dynamo.reset()


def test_a_loss_that_a_compiled_block_cuts_off_raises() -> None:
    block = torch.compile(Block(lambda y, stats: (y, [stats])), backend="eager")
    _, (stats,) = checkpoint(block, make_x("cpu", 0, 9, 8).requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="reentrant checkpoint"):
        _ = stats.aux_loss
    torch._dynamo.reset()


def test_stats_of_a_reentrant_checkpoint_have_their_fields() -> None:
    layer = make_layer()
    x = make_x("cpu", 0, 9, 8).requires_grad_()
    _, want = layer(x)
    _, got = checkpoint(layer, x, use_reentrant=True)
    assert torch.equal(got.aux_loss, want.aux_loss)
    assert torch.equal(got.tokens_per_expert, want.tokens_per_expert)
    assert torch.equal(got.num_dropped, want.num_dropped)
    assert type(2 * got.aux_loss) is Tensor


@pytest.mark.parametrize("nested", [list, tuple, lambda stats: {"stats": stats[0]}], ids=["list", "tuple", "dict"])
def test_a_loss_that_a_reentrant_checkpoint_cuts_off_raises(nested: Callable) -> None:
    block = Block(lambda y, stats: (y, nested([stats])))
    x = make_x("cpu", 0, 9, 8).requires_grad_()
    _, stats = checkpoint(block, x, use_reentrant=True)
    stats = stats["stats"] if isinstance(stats, dict) else stats[0]
    message = r"torch_ep\.nn\.MoE: expected aux_loss with a gradient, .* reentrant checkpoint .* use_reentrant=False"
    with pytest.raises(RuntimeError, match=message):
        _ = stats.aux_loss
    with torch.no_grad():
        assert stats.aux_loss > 0
    assert stats.tokens_per_expert.sum() == 27


def test_a_frozen_router_needs_no_gradient_of_the_loss() -> None:
    block = Block(lambda y, stats: (y, [stats]))
    block.moe.router.requires_grad_(False)
    _, (stats,) = checkpoint(block, make_x("cpu", 0, 9, 8).requires_grad_(), use_reentrant=True)
    assert not stats.aux_loss.requires_grad


def test_stats_are_a_tuple_elsewhere() -> None:
    layer = make_layer()
    x = make_x("cpu", 0, 9, 8).requires_grad_()
    kinds = [layer(x)[1], checkpoint(layer, x, use_reentrant=False)[1]]
    compiled = torch.compile(layer, backend="eager")
    kinds.append(compiled(x)[1])
    with torch.no_grad():
        kinds += [layer(x)[1], compiled(x)[1]]
    assert [type(stats) for stats in kinds] == [RouterStats] * 5


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def _counted(fn: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["expert_major", "rank_major"])
def test_flops_of_the_layer(layout: str, dtype: torch.dtype) -> None:
    layer = MoE(16, 32, 16, 2, layout=layout, dtype=dtype)
    x = torch.randn(32, 16, dtype=dtype)
    experts, router = 3 * 2 * 64 * 16 * 32, 2 * 32 * 16 * 16
    assert _counted(lambda: layer(x)) == experts + router
    # x wants no gradient, so the router has one product in backward, and each expert's weight two.
    assert _counted(lambda: layer(x)[0].sum().backward()) == 3 * experts + 2 * router


def test_flops_of_each_overload() -> None:
    a, b, offsets = torch.ones(9, 8), torch.ones(3, 8, 16), torch.tensor([2, 5, 9], dtype=torch.int32)
    want = 2 * 9 * 8 * 16
    assert _counted(lambda: grouped_mm(a, b, offsets)) == want
    assert _counted(lambda: torch.ops.ep.grouped_mm.transpose(a, torch.ones(9, 16), offsets)) == want
