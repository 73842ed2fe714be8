"""Pickled layers stay out of groups that happen to have the name of theirs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.harness import world
from support.moe_cases import make_layer, make_x
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import torch_ep
from torch_ep.nn import MoE, clip_grad_norm_, expert_parameter_names, full_state_dict

W = 2


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8, dtype=torch.float64), make_layer())


def _pickle(rank: int, world_size: int) -> bytes:
    return pickle.dumps(make_model())


USES: list[Callable[[nn.Module], Any]] = [
    lambda module: module[1](make_x("cpu", 0, 3, 8))[0].shape,
    lambda module: clip_grad_norm_(module, 1.0),
    lambda module: full_state_dict(module).keys(),
    lambda module: module[1].set_group(None),
]


def _say(use: Callable[[nn.Module], Any], module: nn.Module) -> str:
    try:
        return str(use(module))
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def _uses_of_pickled(rank: int, world_size: int, pickled: list[bytes]) -> list[str]:
    module = pickle.loads(pickled[rank])
    return [_say(use, module) for use in USES]


def _others_group(rank: int, world_size: int, pickled: bytes) -> list[str]:
    module = pickle.loads(pickled)
    return [_say(use, module) for use in (lambda module: module[1].group_name, USES[-1])]


def test_a_pickled_layer_stays_out_of_other_groups() -> None:
    pickled = world(W).run(_pickle)
    for said in world(W).run(_uses_of_pickled, pickled):  # where its group is
        assert not any("Error" in message for message in said)
    for rank, said in enumerate(world(4).run(_uses_of_pickled, [*pickled, *pickled])):
        for message in said[:3]:
            assert message.startswith("RuntimeError: torch_ep.nn: expected to be rank ")
            assert (
                f"of ranks [0, 1], where this module was pickled, got rank {rank} of a group of ranks [0, 1, 2, 3]"
                in message
            )
            assert "call layer.set_group" in message
        assert said[3].startswith("ValueError: torch_ep.nn.MoE.set_group: expected a group where this is rank ")
        assert "make a new layer" in said[3]


def test_a_pickled_layer_is_of_one_rank() -> None:
    first, second = world(W).run(_others_group, world(W).run(_pickle)[0])
    assert not any("Error" in message for message in first)
    assert "expected to be rank 0 of group" in second[0] and "got rank 1 of a group of ranks [0, 1]" in second[0]
    assert "Another rank's module has other experts" in second[0]
    assert second[1].startswith("ValueError: torch_ep.nn.MoE.set_group: expected a group where this is rank 0 of 2")


def _without_group(pickled: bytes) -> str:
    module = pickle.loads(pickled)
    with pytest.raises(RuntimeError) as error:
        module[1](make_x("cpu", 0, 3, 8))
    return str(error.value)


def test_a_pickled_layer_of_two_ranks_in_a_process_without_a_group() -> None:
    assert "got no such group" in _without_group(world(W).run(_pickle)[0])


def _moved_to_another_group(rank: int, world_size: int, pickled: list[bytes]) -> tuple[Tensor, Tensor]:
    """In a group of ranks 0 and 2, or 1 and 3, the outputs of the layer and of one that was made there."""
    group = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "dp"))["ep"]
    torch_ep.init(group)
    module = pickle.loads(pickled[group.get_local_rank()])
    module[1].set_group(group)
    x = make_x("cpu", rank, 3, 8)
    y, names = module(x)[0], expert_parameter_names(module)
    assert names == [f"1.{name}" for name in MoE.EXPERT_PARAMETERS]
    other = copy.deepcopy(make_layer(group=group))
    other.load_state_dict(full_state_dict(module[1]))
    want = other(module[0](x))[0]
    torch_ep.destroy(group)
    return y.detach(), want.detach()


def test_a_pickled_layer_takes_another_group_of_the_same_size() -> None:
    for y, want in world(4).run(_moved_to_another_group, world(W).run(_pickle)):
        torch.testing.assert_close(y, want)
