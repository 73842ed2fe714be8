"""States of a layer and of its optimizer, saved and loaded in every way that torch offers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from support.harness import world
from support.moe_cases import SHAPE, make_layer, make_x
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import torch_ep
from torch_ep.nn import (
    MoE,
    clip_grad_norm_,
    distribute_experts,
    expert_parameter_names,
    full_state_dict,
    grouped_mm,
)

E = SHAPE["num_experts"]
NAMES = [f"moe.{name}" for name in MoE.EXPERT_PARAMETERS]


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


# --- states -----------------------------------------------------------------------------------------------------------

FULL = {"full_state_dict": True}
BROADCAST = {"full_state_dict": True, "broadcast_from_rank0": True}


def _whole_state() -> dict[str, Tensor]:
    torch.manual_seed(7)
    model = Model("")
    model.moe.selection_bias += torch.arange(E) / 100
    return {name: t.clone() for name, t in model.state_dict().items()}


def _plain(mesh: DeviceMesh) -> nn.Module:
    return Model(mesh["ep"])


def _distributed_model(mesh: DeviceMesh) -> nn.Module:
    model = Model(mesh["ep"])
    distribute_experts(model, mesh["ep"])
    return model


def _fsdp(mesh: DeviceMesh) -> nn.Module:
    return fully_shard(Model(mesh["ep"]), mesh=mesh["dp"])


def _distributed_fsdp(mesh: DeviceMesh) -> nn.Module:
    return fully_shard(_distributed_model(mesh), mesh=mesh["dp"])


KINDS: dict[str, Callable[[DeviceMesh], nn.Module]] = {
    "plain": _plain,
    "distributed": _distributed_model,
    "fsdp": _fsdp,
    "distributed, fsdp": _distributed_fsdp,
}
FSDP_ALONE = "to be sharded over their group before FSDP2 shards them"
MESHES = [(1, 2), (2, 2)]


def _model(mesh: DeviceMesh, kind: str, *, seed: int = 1, meta: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    with torch.device("meta" if meta else "cpu"):
        return KINDS[kind](mesh)


def _trained(mesh: DeviceMesh, kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """All of `_whole_state`, after a step with gradients that tell experts apart."""
    model = _model(mesh, kind, meta=True)
    set_model_state_dict(model, _whole_state(), options=StateDictOptions(**FULL))
    optimizer = _optimizer(model)
    experts = torch.arange(1.0, E + 1)[:, None, None]
    for name, p in model.named_parameters():
        p.grad = torch.ones_like(p)
        if name in NAMES:
            whole = experts.expand(E, *p.shape[1:]).contiguous()
            own = whole if p.shape[0] == E else whole.chunk(mesh["ep"].size())[mesh["ep"].get_local_rank()]
            p.grad = own.clone()
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(own, p.device_mesh, p.placements, src_data_rank=None)
    optimizer.step()
    return model, optimizer


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def _whole_optimizer_state() -> dict[str, Any]:
    model = Model("")
    model.load_state_dict(_whole_state())
    optimizer = _optimizer(model)
    experts = torch.arange(1.0, E + 1)[:, None, None]
    for name, p in model.named_parameters():
        p.grad = torch.ones_like(p) * (experts if name in NAMES else 1)
    optimizer.step()
    return get_optimizer_state_dict(model, optimizer)


def _differences(got: dict[str, Tensor], want: dict[str, Tensor]) -> list[str]:
    return [
        name
        for name in {**got, **want}
        if name not in got or type(got[name]) is not Tensor or not torch.equal(got[name], want[name])
    ]


def _moments(state: dict[str, Any]) -> dict[str, Tensor]:
    return {f"{name}.{key}": t for name, of in state["state"].items() for key, t in of.items()}


def _larger(mesh: DeviceMesh, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[str]:
    """Experts whose memory, or that of their moments, is of more than this rank's experts."""
    numel = SHAPE["hidden"] * SHAPE["intermediate"] * E // mesh["ep"].size()
    found = []
    for name, p in model.named_parameters():
        moments = [] if optimizer is None else [t for t in optimizer.state[p].values() if t.dim()]
        for t in map(_local, (p, *moments)):
            if name in NAMES and (t.numel() > numel or t.untyped_storage().nbytes() > t.nbytes):
                found.append(name)
    return found


def _placements(model: nn.Module) -> dict[str, Any]:
    return {name: (type(p), getattr(p, "placements", None)) for name, p in model.named_parameters()}


def _said(rank: int, world_size: int, fn: Callable, shape: tuple[int, int], *args: Any) -> Any:
    with _mesh(shape) as mesh:
        try:
            return fn(mesh, *args)
        except RuntimeError as error:
            return str(error)


def _saved(mesh: DeviceMesh, kind: str) -> list[str]:
    model, optimizer = _trained(mesh, kind)
    want = full_state_dict(model)
    assert list(want) == list(_whole_state())
    return [
        *_differences(get_model_state_dict(model, options=StateDictOptions(**FULL)), want),
        *_differences(
            _moments(get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**FULL))),
            _moments(_whole_optimizer_state()),
        ),
    ]


each_mesh = pytest.mark.parametrize("shape", MESHES, ids=str)


@pytest.mark.parametrize("kind", KINDS)
@each_mesh
def test_torch_saves_all_experts_and_their_moments(shape: tuple[int, int], kind: str) -> None:
    for answer in world(shape[0] * shape[1]).run(_said, _saved, shape, kind):
        if kind == "fsdp":
            assert FSDP_ALONE in answer
        else:
            assert answer == []


def _loaded(mesh: DeviceMesh, kind: str, options: dict[str, bool], meta: bool) -> tuple[list[str], bool, list[str]]:
    """Differences from the whole state; whether placements are those of before; experts with memory of others."""
    model = _model(mesh, kind, meta=meta)
    before = _placements(model)
    state = _whole_state() if dist.get_rank() == 0 or "broadcast_from_rank0" not in options else {}
    set_model_state_dict(model, state, options=StateDictOptions(**options))
    return _differences(full_state_dict(model), _whole_state()), _placements(model) == before, _larger(mesh, model)


@pytest.mark.parametrize("meta", [False, True], ids=["on the CPU", "on meta"])
@pytest.mark.parametrize("options", [FULL, BROADCAST], ids=["everywhere", "broadcast"])
@pytest.mark.parametrize("kind", KINDS)
@each_mesh
def test_torch_loads_all_experts(shape: tuple[int, int], kind: str, options: dict[str, bool], meta: bool) -> None:
    if kind == "fsdp" and options is BROADCAST and not meta:
        pytest.skip("torch raises: it takes all experts for the parameter of one rank's")
    for answer in world(shape[0] * shape[1]).run(_said, _loaded, shape, kind, options, meta):
        assert answer == ([], True, [])


def _broadcast_one_expert(mesh: DeviceMesh) -> None:
    """Two experts over two data-parallel ranks have the size of the shards of one."""
    layer = MoE(8, 8, 2, 1, group=mesh["ep"])
    state = full_state_dict(layer)
    fully_shard(layer, mesh=mesh["dp"])
    state = state if dist.get_rank() == 0 else {}
    set_model_state_dict(layer, state, options=StateDictOptions(**BROADCAST))


def test_experts_broadcast_as_copies_are_refused() -> None:
    for answer in world(4).run(_said, _broadcast_one_expert, (2, 2)):
        assert FSDP_ALONE in answer and "broadcast_from_rank0 takes the experts of all ranks for copies" in answer


def _load_state_dict(mesh: DeviceMesh, kind: str, assign: bool, meta: bool) -> tuple[list[str], bool, list[str]]:
    model = _model(mesh, kind, meta=meta)
    before = _placements(model)
    model.load_state_dict(_whole_state(), assign=assign)
    return _differences(full_state_dict(model), _whole_state()), _placements(model) == before, _larger(mesh, model)


@pytest.mark.parametrize(("assign", "meta"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("kind", KINDS)
@each_mesh
def test_load_state_dict_of_all_experts(shape: tuple[int, int], kind: str, assign: bool, meta: bool) -> None:
    for answer in world(shape[0] * shape[1]).run(_said, _load_state_dict, shape, kind, assign, meta):
        if "fsdp" in kind:
            assert "which FSDP2 has sharded, got a plain tensor" in answer and "set_model_state_dict(" in answer
        else:
            assert answer == ([], True, [])


def _set_moments(mesh: DeviceMesh, kind: str, options: dict[str, bool]) -> tuple[list[str], list[str]]:
    model = _model(mesh, kind)
    optimizer = _optimizer(model)
    state = _whole_optimizer_state() if dist.get_rank() == 0 or "broadcast_from_rank0" not in options else {}
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(**options))
    got = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**FULL))
    return _differences(_moments(got), _moments(_whole_optimizer_state())), _larger(mesh, model, optimizer)


@pytest.mark.parametrize("options", [FULL, BROADCAST], ids=["everywhere", "broadcast"])
@pytest.mark.parametrize("kind", KINDS)
@each_mesh
def test_torch_loads_all_moments(shape: tuple[int, int], kind: str, options: dict[str, bool]) -> None:
    for answer in world(shape[0] * shape[1]).run(_said, _set_moments, shape, kind, options):
        if kind == "fsdp":
            assert FSDP_ALONE in answer
        else:
            assert answer == ([], [])


def _save_checkpoint(mesh: DeviceMesh, kind: str, path: str) -> None:
    model, optimizer = _trained(mesh, kind)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=path)


def _load_checkpoint(mesh: DeviceMesh, kind: str, path: str) -> tuple[list[str], list[str]]:
    """Differences in a model and its optimizer that have loaded it, from the trained ones."""
    model = _model(mesh, kind)
    optimizer = _optimizer(model)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    want = full_state_dict(_trained(mesh, "plain")[0])
    got = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**FULL))
    return (
        _differences(full_state_dict(model), want),
        _differences(_moments(got), _moments(_whole_optimizer_state())),
    )


@pytest.mark.parametrize(
    ("saved", "loaded"), [("plain", "plain"), ("plain", "distributed, fsdp"), ("distributed", "plain")]
)
@pytest.mark.parametrize(("before", "after"), [((1, 2), (1, 4)), ((1, 4), (1, 2)), ((2, 2), (2, 1))], ids=str)
def test_distributed_checkpoint_at_another_world_size(
    before: tuple[int, int], after: tuple[int, int], saved: str, loaded: str, tmp_path: Path
) -> None:
    loaded = "plain" if after[1] == 1 and "distributed" in loaded else loaded
    world(before[0] * before[1]).run(_said, _save_checkpoint, before, saved, str(tmp_path))
    for answer in world(after[0] * after[1]).run(_said, _load_checkpoint, after, loaded, str(tmp_path)):
        assert answer == ([], [])


def _resumed(mesh: DeviceMesh, kind: str, whole: bool) -> tuple[list[str], list[str]]:
    """An optimizer that loads before its first step: its own state, or that of one rank."""
    model, optimizer = _trained(mesh, kind)
    other = _model(mesh, kind)
    other.load_state_dict(model.state_dict())
    resumed = _optimizer(other)
    state = optimizer.state_dict()
    if whole:
        moments = _whole_optimizer_state()["state"]
        state["state"] = dict(enumerate(moments[name] for name, _ in model.named_parameters()))
    resumed.load_state_dict(copy.deepcopy(state))
    for p in other.parameters():
        p.grad = torch.zeros_like(p)
    resumed.step()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    got, want = (
        get_optimizer_state_dict(m, o, options=StateDictOptions(**FULL))
        for m, o in ((other, resumed), (model, optimizer))
    )
    return (
        _differences(_moments(got), _moments(want)) + _differences(full_state_dict(other), full_state_dict(model)),
        _larger(mesh, other, resumed),
    )


@pytest.mark.parametrize(
    ("kind", "whole"),
    [("plain", False), ("plain", True), ("distributed", False), ("distributed", True), ("distributed, fsdp", False)],
)
def test_an_optimizer_resumes_before_its_first_step(kind: str, whole: bool) -> None:
    for answer in world(2).run(_said, _resumed, (1, 2), kind, whole):
        assert answer == ([], [])


# --- whose a state is -------------------------------------------------------------------------------------------------


def _saved_by(state: Any, rank: int) -> Any:
    """Loads on every rank the file that one rank has saved."""
    file = io.BytesIO()
    torch.save(state, file)
    files: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(files, file.getvalue())
    return torch.load(io.BytesIO(files[rank]))


OWN_STATES: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {
    "state_dict": lambda model: model.state_dict(),
    "values alone": lambda model: {name: t.cpu().clone() for name, t in model.state_dict().items()},
    "get_model_state_dict": get_model_state_dict,
    "parameters": lambda model: {name: p.detach() for name, p in model.state_dict(keep_vars=True).items()},
}


def _load_of_rank_0(rank: int, world_size: int, name: str) -> str:
    state = _saved_by(OWN_STATES[name](Model()), 0)
    try:
        Model().load_state_dict(state)
    except RuntimeError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("name", OWN_STATES)
def test_a_rank_does_not_load_another_ranks_state(name: str) -> None:
    first, second = world(2).run(_load_of_rank_0, name)
    if name == "parameters":
        for message in (first, second):
            assert "expected all 8 experts of 'moe." in message and "got a tensor of 4, which could be any" in message
    else:
        assert first == "loaded"
        assert "of this rank, at [1] of their mesh, got those of the rank at [0]" in second


def _own_file(rank: int, world_size: int) -> list[str]:
    torch.manual_seed(3)
    model, other = Model(), Model()
    states = [_saved_by(model.state_dict(), r) for r in range(world_size)]
    other.load_state_dict(states[rank])
    return _differences(full_state_dict(other), full_state_dict(model))


def test_a_rank_loads_its_own_file() -> None:
    assert world(2).run(_own_file) == [[], []]


def _optimizer_of_rank_0(rank: int, world_size: int, stepped: bool) -> str:
    model = Model()
    optimizer = _optimizer(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = _saved_by(optimizer.state_dict(), 0)
    other = optimizer if stepped else _optimizer(model)
    try:
        other.load_state_dict(state)
        other.step()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("stepped", [False, True], ids=["before its first step", "after"])
def test_an_optimizer_does_not_take_another_ranks_moments(stepped: bool) -> None:
    first, second = world(2).run(_optimizer_of_rank_0, stepped)
    assert first == ""
    assert "expected experts 'exp_avg of " in second and "got those of the rank at [0]" in second


def _keep_vars(rank: int, world_size: int) -> bool:
    model = Model()
    state = model.state_dict(keep_vars=True)
    return all(state[name] is p for name, p in model.named_parameters())


def test_keep_vars_gives_the_parameters() -> None:
    assert all(world(2).run(_keep_vars))


def test_states_of_one_rank_are_plain() -> None:
    model = Model("")
    optimizer = _optimizer(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(type(t) is Tensor for t in model.state_dict().values())
    assert all(type(t) is Tensor for t in _moments(optimizer.state_dict()).values())
    assert list(model.state_dict()) == list(full_state_dict(model))


# --- distribute_experts -----------------------------------------------------------------------------------------------


def _step_of(mesh: DeviceMesh, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients and norm of a step."""
    model = _model(mesh, kind)
    y = model(make_x("cpu", mesh["ep"].get_local_rank(), 5, 8).float())
    y.square().sum().backward()
    norm = clip_grad_norm_(model, 1e9)
    names = expert_parameter_names(model)
    assert names == NAMES
    return {name: _local(p.grad) for name, p in model.named_parameters() if name in names}, norm


def _same_steps(mesh: DeviceMesh, kind: str) -> list[str]:
    got, want = _step_of(mesh, kind), _step_of(mesh, "plain")
    torch.testing.assert_close(got[1], want[1])
    return [name for name in want[0] if not torch.equal(got[0][name], want[0][name])]


@pytest.mark.parametrize("kind", ["distributed", "fsdp", "distributed, fsdp"])
def test_distributed_experts_compute_the_same(kind: str) -> None:
    assert world(2).run(_said, _same_steps, (1, 2), kind) == [[], []]


def _decoded(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    layer = make_layer(dtype=torch.float32).requires_grad_(False)
    x = make_x("cpu", rank, 3, 8).float()
    want = layer.decode(x, 3)
    distribute_experts(layer)
    return layer.decode(x, 3), want


def test_distributed_experts_decode() -> None:
    for got, want in world(2).run(_decoded):
        assert torch.equal(got, want)


class OwnExperts(nn.Module):
    """Computes the same as MoE's own experts, from the parameters of the same names."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        for name in MoE.EXPERT_PARAMETERS:
            setattr(self, name, nn.Parameter(getattr(layer, name).detach().clone()))

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        inner = F.silu(grouped_mm(rows, self.gate_proj, offsets)) * grouped_mm(rows, self.up_proj, offsets)
        return grouped_mm(inner, self.down_proj, offsets)


def _experts_fn_steps(rank: int, world_size: int) -> list[str]:
    """Names of the gradients that differ from those of MoE's own experts."""
    layer = make_layer()
    other = MoE(**{**SHAPE, "intermediate": None}, dtype=torch.float64, experts_fn=OwnExperts(layer))
    other.router = layer.router
    distribute_experts(other)
    grads = []
    for module, experts in ((layer, layer), (other, other.experts_fn)):
        layer.zero_grad()
        y, _ = module(make_x("cpu", rank, 5, 8))
        y.square().sum().backward()
        grads.append(
            {"router": layer.router.grad, **{name: getattr(experts, name).grad for name in MoE.EXPERT_PARAMETERS}}
        )
    assert isinstance(other.experts_fn.gate_proj, DTensor)
    return [name for name, want in grads[0].items() if not torch.equal(_local(grads[1][name]), want)]


def test_distributed_parameters_of_an_experts_fn() -> None:
    assert world(2).run(_experts_fn_steps) == [[], []]


def _by_hand(rank: int, world_size: int) -> tuple[list[str], list[str]]:
    """Experts that somebody else has made DTensors."""
    with _mesh((1, 2)) as mesh:
        torch.manual_seed(3)
        model = Model(mesh["ep"])
        want = full_state_dict(model)
        for name in MoE.EXPERT_PARAMETERS:
            t = DTensor.from_local(getattr(model.moe, name).detach(), mesh["ep"], [Shard(0)])
            setattr(model.moe, name, nn.Parameter(t))
        return _differences(full_state_dict(model), want), expert_parameter_names(model)


def test_full_state_of_experts_that_are_dtensors() -> None:
    assert world(2).run(_by_hand) == [([], NAMES)] * 2


def _distributed_wrongly(rank: int, world_size: int, after_fsdp: bool) -> str:
    with _mesh((2, 2)) as mesh:
        model = Model(mesh["ep"])
        if after_fsdp:
            fully_shard(model, mesh=mesh["dp"])
        with pytest.raises(ValueError, match=r"torch_ep\.nn\.distribute_experts") as error:
            distribute_experts(model, mesh["ep" if after_fsdp else "dp"])
        return str(error.value)


@pytest.mark.parametrize(
    ("after_fsdp", "message"),
    [(True, "call it before fully_shard"), (False, "expected a mesh of ranks [0, 1], over which 'moe.")],
    ids=["after fully_shard", "another mesh"],
)
def test_experts_that_cannot_be_distributed(after_fsdp: bool, message: str) -> None:
    assert message in world(4).run(_distributed_wrongly, after_fsdp)[0]
