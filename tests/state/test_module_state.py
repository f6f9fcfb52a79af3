"""Modules as dicts with canonical names."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from shardckpt.errors import UnsupportedLeafError
from shardckpt.state.markers import Union
from shardckpt.state.module_state import (
    canonical_names,
    has_state,
    is_wrapped,
    module_state,
    modules_in,
    named_state,
    parameter_names,
)
from shardckpt.state.snapshot import take_snapshot


def a_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 40), nn.BatchNorm1d(40), nn.Linear(40, 5))
    model.register_buffer("big", torch.ones(999))
    return model


def test_what_is_known_of_a_module_is_forgotten_when_it_changes():
    model = a_model()
    assert take_snapshot({"m": model}, small_bytes=0)
    model[2] = nn.DataParallel(nn.Linear(40, 5))  # a wrapper of the same keys
    model[2].module.register_module("module", nn.Identity())
    assert set(module_state(model)) == set(a_model().state_dict())
    names = parameter_names(model)
    assert names[id(model[2].module.weight)] == "2.weight"
    model[2] = nn.Linear(40, 5)
    assert parameter_names(model)[id(model[2].weight)] == "2.weight"
    model.append(nn.Linear(5, 5))
    assert "3.weight" in module_state(model)
    model[3].weight = nn.Parameter(torch.zeros(5, 5))
    assert parameter_names(model)[id(model[3].weight)] == "3.weight"


def test_a_wrapper_that_takes_a_name_away_is_seen():
    inner = nn.Module()
    inner.module = nn.Linear(2, 2)
    whole = nn.Sequential(inner)
    assert set(module_state(whole)) == {"0.module.weight", "0.module.bias"}
    whole[0] = nn.DataParallel(inner.module)  # the keys stay what they were
    assert set(module_state(whole)) == {"0.weight", "0.bias"}
    assert set(canonical_names(whole).values()) == {"0.weight", "0.bias"}
    assert set(parameter_names(whole).values()) == {"0.weight", "0.bias"}


def test_the_prefixes_of_wrappers_are_not_part_of_a_name():
    inner = nn.Sequential(nn.Linear(2, 2))
    assert set(module_state(torch.compile(inner))) == {"0.weight", "0.bias"}
    assert set(module_state(nn.DataParallel(inner))) == {"0.weight", "0.bias"}
    wrapped = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)))
    assert set(module_state(wrapped)) == {"0.weight", "0.bias"}


def test_a_module_named_module_keeps_its_name():
    outer = nn.Module()
    outer.module = nn.Linear(2, 2)
    assert set(module_state(outer)) == {"module.weight", "module.bias"}
    assert not is_wrapped(outer, "module")
    assert is_wrapped(nn.DataParallel(nn.Linear(1, 1)), "module")


def test_a_shared_module_has_canonical_names_at_every_place():
    shared = torch.compile(nn.Linear(2, 2))
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert set(module_state(model)) == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_the_tensors_of_a_module_state_share_its_memory_without_gradients():
    layer = nn.Linear(2, 2)
    layer.weight.global_shape = (4, 2)
    state = module_state(layer)
    assert state["weight"].data_ptr() == layer.weight.data_ptr()
    assert not state["weight"].requires_grad
    assert state["weight"].global_shape == (4, 2)
    assert named_state(layer).by_name()["weight"] is layer.weight


def test_a_module_of_fsdp1_is_refused():
    class FullyShardedDataParallel(nn.Linear):
        pass

    with pytest.raises(UnsupportedLeafError, match="FSDP1") as caught:
        module_state(nn.Sequential(FullyShardedDataParallel(1, 1)))
    assert caught.value.tensor == "0"


def test_the_outermost_modules_of_a_state_are_found_once_and_in_order():
    layer = nn.Sequential(nn.Linear(1, 1))
    state = {"m": layer, "l": [3, {"n": nn.Linear(1, 1)}], "u": Union({"k": layer}), "t": ("x",)}
    state["again"] = state
    assert [name for name, _ in modules_in(state)] == ["m", "l.1.n", "u.k"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (nn.Linear(1, 1), True),
        (torch.optim.SGD([torch.ones(1)], lr=1), True),
        (nn.Linear, False),
        ({"state_dict": 1}, False),
        (torch.ones(1), False),
    ],
)
def test_only_objects_with_both_methods_have_state(value, expected):
    assert has_state(value) == expected
