"""A checkpoint creates no module that is far larger than its tensors."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import shardckpt
from shardckpt import NNHandler, errors
from shardckpt.nn_handler import bounds
from shardckpt.nn_handler.bounds import Bounds


def test_a_size_is_bounded_without_strict_too(tmp_path):
    state = NNHandler(nn.Linear, in_features=2, out_features=2).state()
    state["config"]["model"]["kwargs"] = {"in_features": 10**6, "out_features": 10**6}
    shardckpt.save(state, tmp_path / "c")
    for options in ({}, {"strict": False}, {"model_class": nn.Linear}, {"device_map": "cpu"}):
        with pytest.raises(errors.CheckpointError, match="larger module than its tensors"):
            NNHandler.load(tmp_path / "c", **options)


def limits(*shapes: tuple[int, ...]) -> Bounds:
    return Bounds(lambda: list(shapes), path="c")


class Wide(nn.Module):
    """A module of the user, with one parameter and one buffer."""

    def __init__(self, parameter: int, buffer: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(parameter))
        self.register_buffer("other", torch.empty(buffer))


class MakesOthers(nn.Module):
    """Another thread creates a wide module while this one is created."""

    def __init__(self, parameter: int) -> None:
        super().__init__()
        thread = threading.Thread(target=Wide, args=(parameter,))
        thread.start()
        thread.join()


def test_the_limits_are_the_tensors_of_the_checkpoint_and_a_few_more():
    found = limits((2, 3), (), (4,))
    assert found.elements == (1 << 16) + 6 + 1 + 4
    assert found.tensors == 64 + 3


def test_what_is_not_a_module_is_called():
    assert limits().construct(dict, [], {"a": 1}) == {"a": 1}
    assert limits().construct(lambda *args: args, [1, 2], {}) == (1, 2)


def test_a_module_of_torch_may_fill_the_checkpoint_and_no_more():
    found = limits((1000, 1000)).construct(
        nn.Linear, [], {"in_features": 1000, "out_features": 999}
    )
    assert found.weight.shape == (999, 1000)
    assert not found.weight.is_meta
    with pytest.raises(errors.CheckpointError, match="larger module") as caught:
        limits((1000, 1000)).construct(nn.Linear, [], {"in_features": 1000, "out_features": 1066})
    assert caught.value.path == "c"
    assert caught.value.expected == "at most 1065536 elements in 65 tensors"
    assert caught.value.actual == "1066000 elements in 1 tensors, or more"
    assert "initialize_from_checkpoint" in caught.value.remedy


def test_the_number_of_tensors_is_limited_too():
    body = [nn.Linear(1, 1) for _ in range(2)]
    assert len(limits().construct(nn.Sequential, body, {})) == 2
    small = {"input_size": 1, "hidden_size": 1, "num_layers": 17}
    with pytest.raises(errors.CheckpointError, match="larger module") as caught:
        limits().construct(nn.LSTM, [], small)
    assert caught.value.actual.endswith("in 65 tensors, or more")


@pytest.mark.parametrize("layers", [10**9, 65, 50])
def test_copies_of_a_layer_are_counted_before_they_are_made(layers):
    """65 layers are too many tensors, 50 of these too many elements."""
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=16)
    arguments = {"encoder_layer": layer, "num_layers": layers, "enable_nested_tensor": False}
    with pytest.raises(errors.CheckpointError, match="larger module") as caught:
        limits().construct(nn.TransformerEncoder, [], arguments)
    assert caught.value.actual == f"{layers} layers"


def test_arguments_of_modules_of_torch_have_names():
    with pytest.raises(TypeError, match="expected keyword arguments"):
        limits().construct(nn.Linear, [2, 2], {})


def test_a_device_among_the_arguments_takes_no_memory_before_the_check():
    with pytest.raises(errors.CheckpointError, match="larger module"):
        limits().construct(
            nn.Linear, [], {"in_features": 10**7, "out_features": 10**7, "device": "cpu"}
        )
    arguments = {"in_features": 2, "out_features": 2, "device": "cpu"}
    assert not limits().construct(nn.Linear, [], arguments).weight.is_meta


def test_a_parameter_of_a_users_class_may_not_be_far_larger(monkeypatch):
    monkeypatch.setattr(bounds, "_MANY_ELEMENTS", 10)
    most = 16 * (1 << 16)
    assert limits().construct(Wide, [most], {}).weight.numel() == most
    with pytest.raises(errors.CheckpointError, match="larger module") as caught:
        limits().construct(Wide, [], {"parameter": most + 1})
    assert caught.value.actual == f"a parameter of shape {(most + 1,)}"
    assert limits().construct(Wide, [most + 1], {}, given=True).weight.numel() == most + 1
    assert limits().construct(Wide, [1, most + 1], {}).other.numel() == most + 1
    assert isinstance(limits().construct(MakesOthers, [most + 1], {}), MakesOthers)


def test_no_limit_is_left_after_an_error():
    with pytest.raises(errors.CheckpointError, match="larger module"):
        limits().construct(nn.Linear, [], {"in_features": 1000, "out_features": 1000})
    assert nn.Linear(1000, 1000).weight.numel() == 10**6
