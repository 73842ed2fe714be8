"""Marks of experts: what keeps them, what uses them, and which wrappers they refuse."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.harness import world
from support.moe_cases import SHAPE, make_layer
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize, prune

from torch_ep.nn import (
    MoE,
    clip_grad_norm_,
    expert_parameter_names,
    full_state_dict,
    gather_experts,
    grouped_mm,
    mark_expert_parameters,
)

FIRST = MoE.EXPERT_PARAMETERS[0]
E, W = SHAPE["num_experts"], 2


class Adapter(nn.Module):
    """Low-rank, one for each expert of the weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        experts, rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(experts, rows, 2, dtype=weight.dtype))
        self.b = nn.Parameter(torch.randn(experts, 2, columns, dtype=weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.a @ self.b


class Linear(nn.Module):
    """A linear module with an adapter beside it, as adapter libraries put in its place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.adapter = base, nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)


class Sum(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        return self["base"](x)[0] + self["b"](self["a"](x))


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8, dtype=torch.float64), make_layer())


def adapted(rank: int) -> nn.Module:
    torch.manual_seed(rank)
    model = make_model()
    parametrize.register_parametrization(model[1], FIRST, Adapter(getattr(model[1], FIRST)))
    return model


def pruned(rank: int) -> nn.Module:
    model = make_model()
    prune.random_unstructured(model[1], FIRST, 0.5)
    return model


def own_experts(rank: int) -> nn.Module:
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    mark_expert_parameters(model[1])
    return model


def own_experts_with_adapters(rank: int) -> nn.Module:
    model = own_experts(rank)
    model[1][0] = Linear(model[1][0])
    return model


def adapter_beside_the_layer(rank: int) -> nn.Module:
    model = Sum({"base": make_layer(), "a": nn.Linear(8, 2), "b": nn.Linear(2, 8)})
    mark_expert_parameters(model["a"])
    mark_expert_parameters(model["b"], names=["weight"], dim=1)
    return model


class OwnExperts(nn.Module):
    """Experts that a layer calls, and a scale that is the same on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E // W, 8, 8, dtype=torch.float64))
        self.scale = nn.LayerNorm(8, dtype=torch.float64)
        mark_expert_parameters(self.scale, "")

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        return grouped_mm(self.scale(rows), self.weight, offsets)


def experts_fn(rank: int) -> nn.Module:
    """A layer of the ranks from 0 to W - 1, whose group was another one when it was made."""
    torch.manual_seed(rank)
    model = nn.Sequential(
        nn.Linear(8, 8, dtype=torch.float64), MoE(8, None, E, 3, group=_twin(), experts_fn=OwnExperts())
    )
    model[1].set_group(None)
    return model


@functools.cache
def _twin() -> str:
    return dist.new_group(list(range(W))).group_name


OTHERS = [f"1.{name}" for name in MoE.EXPERT_PARAMETERS[1:]]
MODELS: dict[str, tuple[Callable[[int], nn.Module], list[str]]] = {
    "the layer": (lambda rank: make_model(), [f"1.{FIRST}", *OTHERS]),
    "parametrized": (
        adapted,
        [*OTHERS, *(f"1.parametrizations.{FIRST}.{name}" for name in ("original", "0.a", "0.b"))],
    ),
    "pruned": (pruned, [*OTHERS, f"1.{FIRST}_orig"]),
    "one's own": (own_experts, ["1.0.weight", "1.0.bias", "1.1.weight", "1.1.bias"]),
    "one's own, adapted": (
        own_experts_with_adapters,
        ["1.0.base.weight", "1.0.base.bias", "1.0.adapter.weight", "1.1.weight", "1.1.bias"],
    ),
    "experts_fn": (experts_fn, ["1.experts_fn.weight"]),
    "adapter beside": (
        adapter_beside_the_layer,
        [*(f"base.{name}" for name in MoE.EXPERT_PARAMETERS), "a.weight", "a.bias", "b.weight"],
    ),
}


def _unchanged(model: nn.Module) -> nn.Module:
    return model


def _cast(model: nn.Module) -> nn.Module:
    return model.to(torch.float32)


def _made_empty(model: nn.Module) -> nn.Module:
    return model.to("meta").to_empty(device="cpu")


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def _checkpointed(model: nn.Module) -> nn.Module:
    for name, child in list(model.named_children()):
        setattr(model, name, checkpoint_wrapper(child))
    return model


def _assigned(model: nn.Module) -> nn.Module:
    model.load_state_dict(full_state_dict(model), assign=True)
    return model


def _sharded(model: nn.Module) -> nn.Module:
    # Every rank is a data-parallel group of its own.
    return fully_shard(model, mesh=init_device_mesh("cpu", (1, W), mesh_dim_names=("dp", "ep"))["dp"])


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": _unchanged,
    "cast": _cast,
    "deepcopy": copy.deepcopy,
    "to_empty": _made_empty,
    "torch.compile": _compiled,
    "checkpoint_wrapper": _checkpointed,
    "load_state_dict(assign=True)": _assigned,
    "fully_shard": _sharded,
    "pickle": _pickled,
    "torch.save": _saved,
}


TORCH_REFUSES = [("parametrized", "pickle"), ("parametrized", "torch.save"), ("pruned", "deepcopy")]


def _without_wrappers(name: str) -> str:
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _marked_after(rank: int, world_size: int, model: str, change: str) -> tuple[list[str], list[tuple[str, float]]]:
    """Names of the experts; the names of what a full state has more of than the rank, and how much."""
    module = CHANGES[change](MODELS[model][0](rank))
    names = [_without_wrappers(name) for name in expert_parameter_names(module)]
    numel = {_without_wrappers(name): p.numel() for name, p in module.named_parameters()}
    state = {_without_wrappers(name): t for name, t in full_state_dict(module).items()}
    return names, [(name, state[name].numel() / n) for name, n in numel.items() if state[name].numel() != n]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("model", MODELS)
def test_marks_survive(model: str, change: str) -> None:
    if (model, change) in TORCH_REFUSES:
        pytest.skip("torch has no such copy")
    want = MODELS[model][1]
    for names, larger in world(W).run(_marked_after, model, change):
        assert names == want
        assert larger == [(name, W) for name in want]


def _state_round_trip(rank: int, world_size: int, model: str) -> bool:
    module, other = MODELS[model][0](rank), MODELS[model][0](rank)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(full_state_dict(module))
    return all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("model", MODELS)
def test_full_state_of_marked_experts_loads(model: str) -> None:
    assert world(W).run(_state_round_trip, model) == [True] * W


def _norm(rank: int, world_size: int, model: str) -> tuple[float, float]:
    """clip_grad_norm_'s, and that of all ranks' gradients."""
    module = MODELS[model][0](rank)
    names = expert_parameter_names(module)
    square = torch.zeros(())
    for name, p in module.named_parameters():
        p.grad = torch.full_like(p, 1 + rank if name in names else 1)
        square += sum((1 + r) ** 2 for r in range(world_size)) * p.numel() if name in names else p.numel()
    return float(clip_grad_norm_(module, 1.0)), float(square.sqrt())


@pytest.mark.parametrize("model", MODELS)
def test_norm_counts_marked_experts_of_every_rank(model: str) -> None:
    for got, want in world(W).run(_norm, model):
        assert got == pytest.approx(want)


def _unmarked(rank: int, world_size: int) -> tuple[list[str], list[str]]:
    model = adapted(rank)
    mark_expert_parameters(model[1].parametrizations[FIRST][0], "")  # the same adapter on every rank
    whole = own_experts(rank)
    mark_expert_parameters(whole[1][0], "")
    return expert_parameter_names(model), expert_parameter_names(whole)


def test_replicated_parameters_among_marked_ones() -> None:
    for names, of_own in world(W).run(_unmarked):
        assert names == [*OTHERS, f"1.parametrizations.{FIRST}.original"]
        assert of_own == ["1.1.weight", "1.1.bias"]


def test_marks_of_one_rank_change_nothing() -> None:
    model = nn.Sequential(make_layer(), nn.Linear(2, 2))
    mark_expert_parameters(model[1])
    assert expert_parameter_names(model) == []
    assert all(type(t) is Tensor for t in model.state_dict().values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["weigth"]}, r"got \['weigth'\]: it has \['bias', 'weight'\]"),
        ({"names": ["0.weight"]}, r"got \['0\.weight'\].*pass that module"),
        ({"dim": -1}, "expected dim of at least 0, got -1"),
    ],
    ids=["unknown", "of a module inside", "negative dim"],
)
def test_bad_marks(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mark_expert_parameters(nn.Linear(2, 2), **arguments)


def _gathered(rank: int, world_size: int) -> Tensor:
    return gather_experts(torch.full((2, 1), float(rank)), dim=1)


def test_experts_gathered_along_another_dimension() -> None:
    for t in world(W).run(_gathered):
        assert t.tolist() == [[0, 1], [0, 1]]


# --- wrappers that would make experts equal ---------------------------------------------------------------------------


def _ignoring(model: nn.Module) -> nn.Module:
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, expert_parameter_names(model))
    return model


def _first_step(model: nn.Module, make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
    parameters = list(model.parameters())
    optimizer = make_optimizer(parameters)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()


def _sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def _zero(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(parameters, torch.optim.SGD, lr=0.1)


def _fsdp(model: nn.Module, **options: Any) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


def _delayed(model: nn.Module) -> nn.Module:
    experts = [(name, p) for name, p in model.named_parameters() if name in expert_parameter_names(model)]
    return DistributedDataParallel(
        model, delay_all_reduce_named_params=experts, param_to_hook_all_reduce=model[0].weight
    )


IN_DDP = r"expected DistributedDataParallel to ignore experts \['1\."
IN_FSDP2 = r"sharded or replicated over ranks that hold the same experts, got a DTensor that is also on ranks \["
REFUSED: dict[str, tuple[Callable[[int], Any], str]] = {
    "DDP": (lambda rank: DistributedDataParallel(make_model()), IN_DDP),
    "DDP of adapters": (lambda rank: DistributedDataParallel(adapted(rank)), IN_DDP + r".*'1\.parametrizations\."),
    "DDP of one's own": (lambda rank: DistributedDataParallel(own_experts(rank)), IN_DDP + r"0\.weight"),
    "DDP that reduces them late": (lambda rank: _delayed(make_model()), IN_DDP),
    "DDP of the layer itself": (lambda rank: DistributedDataParallel(_ignoring(make_layer())), "put the layer into a"),
    "FSDP": (lambda rank: _fsdp(make_model()), "expected FullyShardedDataParallel to ignore experts"),
    "FSDP with its parameters": (
        lambda rank: _fsdp(make_model(), use_orig_params=True),
        "expected FullyShardedDataParallel to ignore experts",
    ),
    "FSDP2, names": (lambda rank: expert_parameter_names(fully_shard(make_model())), IN_FSDP2),
    "FSDP2, norm": (lambda rank: clip_grad_norm_(fully_shard(own_experts(rank)), 1.0), IN_FSDP2),
    "FSDP2, state": (lambda rank: full_state_dict(fully_shard(make_model())), IN_FSDP2),
    "FSDP2, first step": (lambda rank: _first_step(fully_shard(make_model()), _sgd), IN_FSDP2),
    "ZeRO": (lambda rank: _first_step(make_model(), _zero), "expected ZeroRedundancyOptimizer without experts"),
}


def _refusal(rank: int, world_size: int, name: str) -> str:
    dist.barrier()  # no rank may be ahead in an exchange that another one never begins
    try:
        REFUSED[name][0](rank)
    except ValueError as error:
        return str(error)
    return "made"


@pytest.mark.parametrize("name", REFUSED)
def test_wrappers_that_would_make_experts_equal_are_refused(name: str) -> None:
    for message in world(W).run(_refusal, name):
        assert re.search(REFUSED[name][1], message), message


def _right_wrappers(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (1, W), mesh_dim_names=("dp", "ep"))
    DistributedDataParallel(_ignoring(adapted(rank)))
    DistributedDataParallel(make_layer(), process_group=mesh["dp"].get_group())
    model = make_model()
    experts = [p for name, p in model.named_parameters() if name in expert_parameter_names(model)]
    _fsdp(model, ignored_states=experts, use_orig_params=True)
    model = make_model()
    _first_step(model, lambda parameters: _zero([model[0].weight]))


def test_wrappers_that_leave_experts_alone_are_not() -> None:
    world(W).run(_right_wrappers)
