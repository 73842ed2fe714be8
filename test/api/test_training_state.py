"""A layer keeps the dtype of its bias and its initial values through casts, materialization and resets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.harness import world
from support.moe_cases import SHAPE, make_layer
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import parametrize, prune

import torch_ep
from torch_ep.nn import MoE, distribute_experts, full_state_dict

E = SHAPE["num_experts"]


class Model(nn.Module):
    def __init__(self, group: Any = None) -> None:
        super().__init__()
        self.moe = MoE(**SHAPE, selection_bias=True, shared_intermediate=4, group=group)
        self.after = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.moe(x)[0])


@contextmanager
def _mesh(shape: tuple[int, int]) -> Iterator[DeviceMesh]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "ep"))
    communicator = torch_ep.init(mesh["ep"])
    try:
        yield mesh
    finally:
        if communicator.group_name not in ("", dist.group.WORLD.group_name):
            torch_ep.destroy(mesh["ep"])


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


# --- the bias stays in float32 ----------------------------------------------------------------------------------------

CASTS: dict[str, Callable[[nn.Module], Any]] = {
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "to": lambda module: module.to(torch.bfloat16),
    "to, device and dtype": lambda module: module.to("cpu", torch.bfloat16),
    "type": lambda module: module.type(torch.bfloat16),
    "inside a model": lambda module: nn.Sequential(nn.Sequential(module)).bfloat16(),
}


@pytest.mark.parametrize("name", CASTS)
def test_casts_leave_the_bias_in_float32(name: str) -> None:
    layer = make_layer(selection_bias=True, dtype=torch.float32)
    bias = torch.linspace(5.001, 5.004, E)  # equal in bfloat16
    layer.selection_bias.copy_(bias)
    CASTS[name](layer)
    assert layer.router.dtype != torch.float32
    assert torch.equal(layer.selection_bias, bias)
    for _ in range(1000):
        layer.update_selection_bias(torch.arange(E), rate=1e-3)
    want = bias + torch.tensor([1.0, -1.0]).repeat_interleave(E // 2)
    torch.testing.assert_close(layer.selection_bias, want, rtol=0, atol=1e-3)


def test_the_bias_moves_with_the_layer() -> None:
    layer = make_layer(selection_bias=True).to("meta", torch.bfloat16)
    assert (layer.selection_bias.device.type, layer.selection_bias.dtype) == ("meta", torch.float32)
    layer.to_empty(device="cpu")
    assert (layer.selection_bias.device.type, layer.selection_bias.dtype) == ("cpu", torch.float32)


def test_an_update_moves_a_bias_that_was_cast_by_other_means() -> None:
    layer = make_layer(selection_bias=True)
    layer.selection_bias = torch.zeros(E, dtype=torch.bfloat16)
    layer.update_selection_bias(torch.arange(E), rate=2.0**-10)
    assert layer.selection_bias.dtype == torch.float32

    layer.selection_bias = torch.ones(E, dtype=torch.bfloat16)
    assert layer.float().selection_bias.dtype == torch.float32


@pytest.mark.parametrize("assign", [False, True])
def test_a_bias_of_a_state_is_loaded_in_float32(assign: bool) -> None:
    layer = make_layer(selection_bias=True)
    state = {name: t.bfloat16() for name, t in layer.state_dict().items()}
    layer.load_state_dict(state, assign=assign)
    assert layer.selection_bias.dtype == torch.float32
    assert state["selection_bias"].dtype == torch.bfloat16


def _cast_under_fsdp(rank: int, world_size: int) -> tuple[torch.dtype, torch.dtype]:
    with _mesh((2, 1)) as mesh:
        model = fully_shard(Model(mesh["ep"]), mesh=mesh["dp"]).bfloat16()
        return model.moe.router.dtype, model.moe.selection_bias.dtype


def test_casts_of_a_sharded_layer_leave_the_bias_in_float32() -> None:
    assert world(2).run(_cast_under_fsdp) == [(torch.bfloat16, torch.float32)] * 2


# --- initial values ---------------------------------------------------------------------------------------------------


def _reset(model: nn.Module) -> None:
    """As torch's guides say, from memory that holds anything."""
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            _local(t).fill_(float("nan"))
    torch.manual_seed(7)
    for module in model.modules():
        if hasattr(type(module), "reset_parameters"):  # wrappers have those of what they wrap
            module.reset_parameters()


def _made(group: Any) -> nn.Module:
    torch.manual_seed(7)
    return Model(group)


def _materialized(mesh: DeviceMesh) -> nn.Module:
    with torch.device("meta"):
        model = Model(mesh["ep"])
    return model.to_empty(device="cpu")


def _wrapped(mesh: DeviceMesh) -> nn.Module:
    with torch.device("meta"):
        model = Model(mesh["ep"])
    model.moe = checkpoint_wrapper(model.moe)
    return torch.compile(model.to_empty(device="cpu"), backend="eager")


def _sharded(mesh: DeviceMesh) -> nn.Module:
    with torch.device("meta"):
        model = Model(mesh["ep"])
    return fully_shard(model, mesh=mesh["dp"]).to_empty(device="cpu")


def _sharded_by_columns(mesh: DeviceMesh) -> nn.Module:
    with torch.device("meta"):
        model = Model(mesh["ep"])
    placements = {p: Shard(p.dim() - 1) for p in model.parameters() if p.dim() == 3}
    return fully_shard(model, mesh=mesh["dp"], shard_placement_fn=placements.get).to_empty(device="cpu")


def _distributed(mesh: DeviceMesh) -> nn.Module:
    with torch.device("meta"):
        model = Model(mesh["ep"])
    distribute_experts(model, mesh["ep"])
    return model.to_empty(device="cpu")


def _distributed_and_sharded(mesh: DeviceMesh) -> nn.Module:
    with torch.device("meta"):
        model = Model(mesh["ep"])
    distribute_experts(model, mesh["ep"])
    return fully_shard(model, mesh=mesh["dp"]).to_empty(device="cpu")


MAKERS: dict[str, Callable[[DeviceMesh], nn.Module]] = {
    "on the CPU": lambda mesh: _made(mesh["ep"]),
    "materialized": _materialized,
    "wrapped": _wrapped,
    "sharded": _sharded,
    "sharded by columns": _sharded_by_columns,
    "distributed": _distributed,
    "distributed and sharded": _distributed_and_sharded,
}


def _reset_state(rank: int, world_size: int, shape: tuple[int, int], name: str) -> tuple[list[str], list[str]]:
    """The names of all tensors, and of those that differ from a model that was made at once."""
    with _mesh(shape) as mesh:
        model = MAKERS[name](mesh)
        _reset(model)
        want = full_state_dict(_made(mesh["ep"]))
        got = {key.replace("_orig_mod.", ""): t for key, t in full_state_dict(model).items()}
        # torch draws shards of its own modules otherwise than their whole parameters.
        torchs_own = ("after.", "moe.shared_expert.") if "sharded" in name else ()
        differ = [key for key, t in want.items() if not key.startswith(torchs_own) and not torch.equal(got[key], t)]
        return [key for key in want if key in got], differ


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (2, 2)], ids=str)
def test_reset_gives_the_values_of_the_constructor(shape: tuple[int, int], name: str) -> None:
    if name.startswith("distributed") and shape[1] == 1:
        pytest.skip("no experts are spread")
    want = list(Model().state_dict())
    for names, differ in world(shape[0] * shape[1]).run(_reset_state, shape, name):
        assert names == want
        assert differ == []


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.shift


@pytest.mark.parametrize("name", ["router", MoE.EXPERT_PARAMETERS[0]])
def test_reset_of_parametrized_weights(name: str) -> None:
    torch.manual_seed(7)
    want = MoE(**SHAPE)
    layer = MoE(**SHAPE)
    parametrize.register_parametrization(layer, name, Scaled())
    torch.manual_seed(7)
    layer.reset_parameters()
    for each in ("router", *MoE.EXPERT_PARAMETERS):
        torch.testing.assert_close(getattr(layer, each), getattr(want, each))

    shifted = MoE(**SHAPE)
    parametrize.register_parametrization(shifted, name, Shifted())
    torch.manual_seed(7)
    shifted.reset_parameters()
    assert torch.equal(shifted.parametrizations[name].original, getattr(want, name))

    pruned = MoE(**SHAPE)
    prune.random_unstructured(pruned, name, 0.5)
    torch.manual_seed(7)
    pruned.reset_parameters()
    assert torch.equal(getattr(pruned, f"{name}_orig"), getattr(want, name))


def test_reset_of_weights_that_cannot_be_set() -> None:
    layer = MoE(**SHAPE)
    nn.utils.parametrizations.weight_norm(layer, MoE.EXPERT_PARAMETERS[0])
    layer.reset_parameters()
    layer.parametrizations[MoE.EXPERT_PARAMETERS[0]].append(Shifted())
    with pytest.raises(RuntimeError, match=r"torch_ep\.nn: expected a right_inverse of what parametrizes"):
        layer.reset_parameters()


def test_reset_of_a_used_layer_clears_the_bias() -> None:
    layer = make_layer(selection_bias=True)
    assert layer.selection_bias.any()
    layer.reset_parameters()
    assert not layer.selection_bias.any()
