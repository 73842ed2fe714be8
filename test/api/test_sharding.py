"""Names, states and gradient norms of experts that are spread over ranks; data parallelism around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.devices import Ranks
from support.harness import world
from support.moe_cases import SHAPE, make_layer, make_x
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import torch_ep
from torch_ep.nn import MoE, clip_grad_norm_, expert_parameter_names, full_state_dict, gather_experts, shard_experts


class Model(nn.Module):
    """A layer below the root, so that its parameters' names have a prefix."""

    def __init__(self, group: Any = None) -> None:
        super().__init__()
        self.before = nn.Linear(8, 8, dtype=torch.float64)
        self.moe = MoE(**SHAPE, selection_bias=True, shared_intermediate=4, group=group, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(self.before(x))[0]


def _full_state(rank: int, world_size: int, device: str) -> dict[str, Tensor]:
    torch.manual_seed(21)
    model = Model().to(device)
    model.moe.selection_bias += torch.arange(8, device=device) / 100
    return {name: t.cpu() for name, t in full_state_dict(model).items()}


def _loaded_output(rank: int, world_size: int, device: str, state: dict[str, Tensor]) -> tuple[Tensor, int]:
    torch.manual_seed(rank)
    model = Model().to(device)
    model.load_state_dict(state)
    with torch.no_grad():
        return model(make_x(device, 77, 6, 8)).cpu(), model.moe.gate_proj.shape[0]


def _states(device: str, world_size: int) -> list[dict[str, Tensor]]:
    return [_full_state(0, 1, device)] if world_size == 1 else Ranks(device, world_size).run(_full_state, device)


@pytest.mark.parametrize("world_size", [2, 4])
def test_same_seed_same_parameters_whatever_the_world_size(device: str, world_size: int) -> None:
    want = _full_state(0, 1, device)
    for state in _states(device, world_size):
        assert list(state) == list(want)
        for name in want:
            assert torch.equal(state[name], want[name]), name


@pytest.mark.parametrize("saved", [1, 2, 4])
@pytest.mark.parametrize("loaded", [1, 2, 4])
def test_state_loads_at_any_world_size(device: str, saved: int, loaded: int) -> None:
    state = _states(device, saved)[-1]
    want, _ = _loaded_output(0, 1, device, _full_state(0, 1, device))
    if loaded == 1:
        results = [_loaded_output(0, 1, device, state)]
    else:
        results = Ranks(device, loaded).run(_loaded_output, device, state)
    for got, num_local_experts in results:
        assert num_local_experts == SHAPE["num_experts"] // loaded
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def _own_state_round_trip(rank: int, world_size: int, device: str) -> bool:
    torch.manual_seed(1)
    model, other = Model().to(device), Model().to(device)
    other.load_state_dict(model.state_dict())
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_ranks_own_state_loads_again(device: str) -> None:
    assert all(Ranks(device, 2).run(_own_state_round_trip, device))


def _shapes_after_load(rank: int, world_size: int, device: str) -> list[tuple[int, ...]]:
    layer = make_layer(device)
    state = full_state_dict(layer)
    layer._load_from_state_dict(state, "", {}, True, [], [], [])
    return [tuple(state[name].shape) for name in layer.EXPERT_PARAMETERS]


def test_loading_leaves_the_callers_dict_alone(device: str) -> None:
    assert Ranks(device, 2).run(_shapes_after_load, device) == [[(8, 8, 6), (8, 8, 6), (8, 6, 8)]] * 2


def _sharded(rank: int, world_size: int, device: str) -> tuple[Tensor, Tensor]:
    everything = torch.arange(24.0, device=device).view(8, 3)
    mine = shard_experts(everything)
    return mine.cpu(), gather_experts(mine).cpu()


def test_shard_and_gather_are_inverse(device: str) -> None:
    for rank, (mine, whole) in enumerate(Ranks(device, 2).run(_sharded, device)):
        assert torch.equal(mine, torch.arange(24.0).view(2, 4, 3)[rank])
        assert torch.equal(whole, torch.arange(24.0).view(8, 3))


def test_one_rank_needs_no_group() -> None:
    assert make_layer().group_name == ""
    assert torch_ep.comm.resolve(None) == ("", 1)


# --- data parallelism -------------------------------------------------------------------------------------------------

MESHES = {"dp 1, ep 2": (1, 2), "dp 2, ep 1": (2, 1), "dp 2, ep 2": (2, 2)}
each_mesh = pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES.keys())
EXPERTS_OF_MODEL = ["moe.gate_proj", "moe.up_proj", "moe.down_proj"]
MAX_NORM = 0.1


@contextmanager
def _mesh(shape: tuple[int, int]) -> Iterator[DeviceMesh]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "ep"))
    communicator = torch_ep.init(mesh["ep"])
    try:
        yield mesh
    finally:
        if communicator.group_name not in ("", dist.group.WORLD.group_name):
            torch_ep.destroy(mesh["ep"])


def _whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def _sharded_full_state(rank: int, world_size: int, shape: tuple[int, int]) -> dict[str, Tensor]:
    with _mesh(shape) as mesh:
        torch.manual_seed(21)
        model = Model(mesh["ep"])
        model.moe.selection_bias += torch.arange(8) / 100
        return full_state_dict(fully_shard(model, mesh=mesh["dp"]))


@each_mesh
def test_full_state_of_a_layer_that_fsdp_has_sharded(shape: tuple[int, int]) -> None:
    want = _full_state(0, 1, "cpu")
    for state in world(shape[0] * shape[1]).run(_sharded_full_state, shape):
        assert list(state) == list(want)
        for name in want:
            assert type(state[name]) is Tensor
            assert torch.equal(state[name], want[name]), name


def _loaded_into_shards(rank: int, world_size: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
    with _mesh((1, 2) if world_size == 2 else (2, 2)) as mesh:
        torch.manual_seed(rank)
        model = Model(mesh["ep"])
        fully_shard(model, mesh=mesh["dp"])
        set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))
        return full_state_dict(model)


@pytest.mark.parametrize("world_size", [2, 4])
def test_full_state_loads_into_a_layer_that_fsdp_has_sharded(world_size: int) -> None:
    want = _full_state(0, 1, "cpu")
    for state in world(world_size).run(_loaded_into_shards, want):
        for name in want:
            assert torch.equal(state[name], want[name]), name


SHAPES = {"router": (8, 8), "gate_proj": (8, 8, 6), "up_proj": (8, 8, 6), "down_proj": (8, 6, 8)}


def _shapes_of_two_names(rank: int, world_size: int, device: str) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    layer = make_layer(device)
    module = nn.ModuleDict({"first": layer, "again": layer})
    state = full_state_dict(module)
    return expert_parameter_names(module), {name: tuple(t.shape) for name, t in state.items()}


def test_state_of_a_layer_with_two_names(device: str) -> None:
    expected = {f"{prefix}.{name}": shape for prefix in ("first", "again") for name, shape in SHAPES.items()}
    for names, shapes in Ranks(device, 2).run(_shapes_of_two_names, device):
        assert shapes == expected
        assert names == [name for name in expected if "router" not in name]


def _wrapped_state(rank: int, world_size: int) -> dict[str, tuple[int, ...]]:
    state = full_state_dict(nn.Sequential(checkpoint_wrapper(make_layer())))
    assert not any(t.requires_grad for t in state.values())
    return {name: tuple(t.shape) for name, t in state.items()}


def test_state_of_a_wrapped_layer() -> None:
    want = {f"0.{name}": shape for name, shape in SHAPES.items()}
    assert world(2).run(_wrapped_state) == [want, want]


def _loss(model: nn.Module, rank: int) -> Tensor:
    return model(make_x("cpu", rank, 4 + rank, 8)).square().sum()


def _reduced_by_ddp(model: Model, mesh: DeviceMesh, rank: int) -> None:
    experts = expert_parameter_names(model)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, experts)
    replicated = DistributedDataParallel(model)  # which reduces for as long as it lives
    _loss(replicated, rank).backward()
    for name in experts:
        grad = model.get_parameter(name).grad
        dist.all_reduce(grad, group=mesh["dp"].get_group())
        grad /= mesh.size()


def _reduced_by_fsdp(sharded: nn.Module, mesh: DeviceMesh, rank: int, model: nn.Module | None = None) -> None:
    """`sharded` is all of the model, or the part of it that is sharded over "dp"."""
    experts = expert_parameter_names(sharded)
    fully_shard(sharded, mesh=mesh["dp"])
    _loss(model or sharded, rank).backward()
    for name, p in sharded.named_parameters():
        grad = p.grad.to_local()
        if name not in experts:
            dist.all_reduce(grad, group=mesh["ep"].get_group())
        grad /= mesh["ep"].size()


def _reduced_by_fsdp_over_two_meshes(model: Model, mesh: DeviceMesh, rank: int) -> None:
    fully_shard(model.before, mesh=init_device_mesh("cpu", (mesh.size(),)))
    _reduced_by_fsdp(model.moe, mesh, rank, model)


def _reduced_by_hand_beside_fsdp(model: Model, mesh: DeviceMesh, rank: int) -> None:
    fully_shard(model.before, mesh=init_device_mesh("cpu", (mesh.size(),)))
    _loss(model, rank).backward()
    experts = expert_parameter_names(model.moe)
    for name, p in model.moe.named_parameters():
        dist.all_reduce(p.grad, group=mesh["dp"].get_group() if name in experts else None)
        p.grad /= mesh.size()


REDUCED = {
    "DDP": _reduced_by_ddp,
    "FSDP2": _reduced_by_fsdp,
    "FSDP2 over two meshes": _reduced_by_fsdp_over_two_meshes,
    "by hand beside FSDP2": _reduced_by_hand_beside_fsdp,
}


def _data_parallel_step(
    rank: int, world_size: int, shape: tuple[int, int], how: str, max_norm: float
) -> tuple[list[str], Tensor, dict[str, Tensor]]:
    """Names of the experts' parameters, the norm, and all gradients, clipped and whole."""
    with _mesh(shape) as mesh:
        torch.manual_seed(21)
        model = Model(mesh["ep"])
        names = expert_parameter_names(model)
        REDUCED[how](model, mesh, rank)
        norm = clip_grad_norm_(model, max_norm)
        grads = {name: _whole(p.grad) for name, p in model.named_parameters()}
        return (
            names,
            norm,
            {name: gather_experts(grad, mesh["ep"]) if name in names else grad for name, grad in grads.items()},
        )


@pytest.mark.parametrize("max_norm", [MAX_NORM, 1e9], ids=["clipped", "below"])
@pytest.mark.parametrize("how", REDUCED)
@each_mesh
def test_gradients_clipped_together_are_those_of_one_rank(shape: tuple[int, int], how: str, max_norm: float) -> None:
    world_size = shape[0] * shape[1]
    torch.manual_seed(21)
    model = Model()
    (sum(_loss(model, rank) for rank in range(world_size)) / world_size).backward()
    want_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    assert want_norm > 2 * MAX_NORM
    for names, norm, grads in world(world_size).run(_data_parallel_step, shape, how, max_norm):
        assert names == (EXPERTS_OF_MODEL if shape[1] > 1 else [])
        torch.testing.assert_close(norm, want_norm)
        for name, p in model.named_parameters():
            torch.testing.assert_close(grads[name], p.grad, msg=lambda m, name=name: f"{name}: {m}")


class Frozen(Model):
    """Rank 1 has no gradients of experts at all."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.before.weight.grad = torch.full((8, 8), 0.5, dtype=torch.float64)
        if rank == 0:
            self.moe.gate_proj.grad = torch.full_like(self.moe.gate_proj, 2)


def _clip_frozen(rank: int, world_size: int) -> tuple[float, float, float]:
    model = Frozen(rank)
    norm = clip_grad_norm_(model, 1.0)
    return float(norm), float(model.before.weight.grad[0, 0]), float(clip_grad_norm_(Model(), 1.0))


def test_ranks_without_gradients_clip_along() -> None:
    want = (64 * 0.5**2 + 4 * 8 * 6 * 2**2) ** 0.5
    for norm, element, of_none in world(2).run(_clip_frozen):
        assert norm == pytest.approx(want)
        assert element == pytest.approx(0.5 / want, rel=1e-5)
        assert of_none == 0


def test_norm_of_bfloat16_gradients_is_in_float32() -> None:
    layer = make_layer(dtype=torch.bfloat16)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    norm = clip_grad_norm_(layer, 1.0)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(sum(p.numel() for p in layer.parameters()) ** 0.5, rel=2**-7)


def _experts_after_ddp(rank: int, world_size: int) -> list[Tensor]:
    torch.manual_seed(21)
    model = Model()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, expert_parameter_names(model))
    DistributedDataParallel(model)
    return [model.get_parameter(name).detach() for name in EXPERTS_OF_MODEL]


def test_ddp_leaves_every_ranks_experts_alone() -> None:
    first, second = world(2).run(_experts_after_ddp)
    want = _full_state(0, 1, "cpu")
    for name, a, b in zip(EXPERTS_OF_MODEL, first, second, strict=True):
        assert torch.equal(torch.cat([a, b]), want[name])


def _gather_what_differs(rank: int, world_size: int, change: str) -> tuple[str, list[float]]:
    t = torch.ones(2, 4)
    if rank == 1:
        t = {"dtype": t.bfloat16(), "shape": torch.ones(2, 2, dtype=torch.float64), "dim": torch.ones(8)}[change]
    try:
        gather_experts(t)
        message = ""
    except dist.DistError as error:
        message = str(error)
    return message, gather_experts(torch.full((1,), float(rank))).tolist()


@pytest.mark.parametrize(
    ("change", "got"), [("dtype", "bfloat16 [2, 4]"), ("shape", "float64 [2, 2]"), ("dim", "float32 [8]")]
)
def test_gathered_tensors_must_agree_in_dtype_and_shape(change: str, got: str) -> None:
    op = "torch_ep.nn.gather_experts: expected tensors of one dtype and shape on every rank"
    (first, after), (second, _) = world(2).run(_gather_what_differs, change)
    assert first == f"{op}, got float32 [2, 4] on rank 0 and {got} on rank 1"
    assert second == f"{op}, got {got} on rank 1 and float32 [2, 4] on rank 0"
    assert after == [0.0, 1.0]


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_a_norm_that_is_none_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"clip_grad_norm_: expected max_norm of at least 0, got"):
        clip_grad_norm_(MoE(**SHAPE), bad)


def test_a_load_of_another_shape_is_refused() -> None:
    layer = MoE(**SHAPE, selection_bias=True)
    with pytest.raises(ValueError, match=r"expected tokens_per_expert of shape \[8\].*, got \[3\]"):
        layer.update_selection_bias(torch.ones(3))
