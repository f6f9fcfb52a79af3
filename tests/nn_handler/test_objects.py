"""Classes, functions and objects are saved by name, and created again by load."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import logging
import os
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from shardckpt import NNHandler, errors
from shardckpt.errors import CheckpointError
from shardckpt.nn_handler import CSVLogger, ModelCheckpoint
from shardckpt.nn_handler.objects import describe
from tests.faults import handler_attacks as attacks
from tests.nn_handler.models import (
    Block,
    Body,
    Net,
    Pair,
    Scaled,
    X,
    Y,
    a_handler,
    activation,
    make,
    number,
    same,
    train,
    weights,
    with_data,
)


def test_a_copied_loss_is_not_guessed(tmp_path):
    handler = make()
    handler.set_loss_fn(copy.deepcopy(Scaled(4.0)))
    with pytest.warns(UserWarning, match="loss_fn"):
        handler.save(tmp_path / "a")


@dataclasses.dataclass
class Config:
    width: int = 8


class OfConfig(Body):
    def __init__(self, config, log=None) -> None:
        super().__init__(config.width)


@pytest.mark.parametrize(
    "config", [Config(), types.SimpleNamespace(width=8), type("Own", (), {"width": 8})()]
)
def test_a_model_with_a_config_object_trains_and_is_asked_for_at_load(tmp_path, config):
    handler = make(OfConfig, config=config, log=logging.getLogger("x"))
    with pytest.warns(UserWarning, match=r"model\.kwargs"):
        train(handler).save(tmp_path / "a")
    given = {"model.kwargs.config": config, "model.kwargs.log": None}
    loaded = NNHandler.load(tmp_path / "a", objects=given)
    assert same(weights(loaded), weights(handler))


class Wrap(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)


class Last(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


@pytest.mark.parametrize(
    "body",
    [
        lambda: nn.Linear(4, 3),
        lambda: nn.Sequential(nn.Linear(4, 3)),
        lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3, bias=False)),
        lambda: Body(width=5),
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, 0.0), nn.Linear(4, 3)),
        lambda: Last(nn.LSTM(4, 3, num_layers=2, batch_first=True)),
        lambda: Last(nn.GRU(4, 3, bias=False)),
    ],
)
def test_modules_as_arguments_come_back(tmp_path, body):
    handler = make(Wrap, body=body())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handler.save(tmp_path / "a")
    assert same(weights(NNHandler.load(tmp_path / "a")), weights(handler))


class Keeps(Body):
    def __init__(self, argument) -> None:
        super().__init__()
        self.argument = argument


@pytest.mark.parametrize(
    "argument",
    [
        functools.partial(nn.LayerNorm, eps=1e-3),
        functools.partial(nn.functional.leaky_relu, negative_slope=0.5),
        collections.OrderedDict(b=1, a=nn.ReLU),
        [(1, 2), {"a": None}],
    ],
)
def test_values_as_arguments_come_back(tmp_path, argument):
    handler = make(Keeps, argument=argument)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handler.save(tmp_path / "a")
    found = NNHandler.load(tmp_path / "a").module.argument
    assert type(found) is type(argument)
    if isinstance(argument, functools.partial):
        x = torch.tensor([-1.0, 2.0])
        made = [one(2) if one.func is nn.LayerNorm else one for one in (found, argument)]
        assert torch.equal(made[0](x), made[1](x))
    else:
        assert found == argument


@pytest.mark.parametrize(
    "argument",
    [
        collections.defaultdict(int, a=1),
        collections.UserDict(a=1),
        torch.Generator(),
        functools.partial(lambda x: x, 2),
        Pair(1, 2),
    ],
)
def test_values_that_a_checkpoint_can_not_hold_are_named(tmp_path, argument):
    handler = make(Keeps, argument=argument)
    with pytest.warns(UserWarning, match=r"model\.kwargs\.argument"):
        handler.save(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"model\.kwargs\.argument"):
        NNHandler.load(tmp_path / "a")


def test_a_partial_as_a_loss(tmp_path):
    handler = make()
    handler.set_loss_fn(functools.partial(nn.functional.cross_entropy, label_smoothing=0.3))
    handler.save(tmp_path / "a")
    loaded = NNHandler.load(tmp_path / "a")
    outputs = handler.predict(X)
    assert loaded.loss_fn(outputs, Y) == handler.loss_fn(outputs, Y)


def test_an_argument_that_torch_extends_comes_back(tmp_path):
    handler = make(Wrap, body=nn.AdaptiveLogSoftmaxWithLoss(16, 20, cutoffs=[5, 10]))
    handler.save(tmp_path / "a")
    loaded = NNHandler.load(tmp_path / "a")
    assert loaded.module.body.cutoffs == handler.module.body.cutoffs
    assert same(weights(loaded), weights(handler))


def test_a_value_that_can_not_be_saved_is_warned_of_and_asked_for(tmp_path):
    handler = NNHandler(Net)
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    with_data(handler)
    handler.model_kwargs = {"width": object()}
    train(handler)
    with pytest.warns(UserWarning, match=r"model\.kwargs\.width"):
        handler.save(tmp_path / "c.pth")
    with pytest.raises(errors.CheckpointError, match=r"objects=\{'model\.kwargs\.width'"):
        NNHandler.load(tmp_path / "c.pth")
    assert os.listdir(tmp_path) == ["c.pth"]


def test_a_model_class_that_can_not_be_imported(tmp_path):
    class Local(Net):
        pass

    handler = NNHandler(Local, width=4)
    with pytest.warns(UserWarning, match=r"model\.class"):
        handler.save(tmp_path / "c")
    with pytest.raises(errors.CheckpointError) as caught:
        NNHandler.load(tmp_path / "c")
    assert caught.value.tensor == "model.class"
    assert same(weights(NNHandler.load(tmp_path / "c", model_class=Local)), weights(handler))


@pytest.mark.parametrize("name", ["c", "c.pth", "c.safetensors"])
def test_paths_as_arguments(tmp_path, name):
    handler = a_handler()
    handler.add_callback(CSVLogger(tmp_path / "log.csv"))
    handler.add_callback(ModelCheckpoint(tmp_path / "best"))
    handler.save(tmp_path / name)
    loaded = NNHandler.load(tmp_path / name)
    assert loaded.callbacks[0].constructor_arguments == ((Path(tmp_path / "log.csv"),), {})


class CallableConfig:
    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self) -> None:
        raise AssertionError


class Configured(Net):
    def __init__(self, config) -> None:
        super().__init__(config.width)


def test_an_argument_that_can_not_be_recorded_is_asked_for(tmp_path, untrusted):
    with pytest.warns(UserWarning, match=r"model\.kwargs\.config"):
        NNHandler(Configured, config=CallableConfig(5)).save(tmp_path / "c")
    with pytest.raises(errors.CheckpointError, match=r"model\.kwargs\.config") as caught:
        NNHandler.load(tmp_path / "c")
    assert "objects={'model.kwargs.config': ...}" in caught.value.remedy
    with pytest.raises(errors.CheckpointError) as caught:
        NNHandler.load(
            tmp_path / "c", objects={"model.kwargs.confg": CallableConfig(5), "loss_fn": len}
        )
    assert "model.kwargs.confg, which the checkpoint does not have" in caught.value.actual
    given = NNHandler.load(tmp_path / "c", objects={"model.kwargs.config": CallableConfig(5)})
    assert given.module.head.in_features == 5


class Wrapper(nn.Module):
    def __init__(self, body: nn.Module, kind: type = nn.ReLU) -> None:
        super().__init__()
        self.body, self.end = body, kind()

    def forward(self, inputs):
        return self.end(self.body(inputs))


def test_modules_as_arguments(tmp_path):
    body = nn.Sequential(Block(activation), nn.Linear(3, 3, bias=False), nn.ModuleList())
    del body[2]
    handler = NNHandler(Wrapper, body=body, kind=nn.GELU)
    handler.save(tmp_path / "c")
    loaded = NNHandler.load(tmp_path / "c")
    assert same(weights(loaded), weights(handler))
    assert loaded.module.body[0].activation(torch.tensor(-1.0)) == 0  # after the load it is called
    assert describe(loaded.model_kwargs) == describe(handler.model_kwargs)
    loaded.save(tmp_path / "again")
    assert isinstance(NNHandler.load(tmp_path / "again").module.end, nn.GELU)
    assert describe(functional.gelu) == attacks.name("torch.nn.functional:gelu")


class Calls(nn.Module):
    def __init__(self, init=None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.value = init()


def test_no_function_is_called_while_loading(tmp_path):
    NNHandler(Calls, init=number).save(tmp_path / "c")
    with pytest.raises(errors.CheckpointError, match="was about to be called"):
        NNHandler.load(tmp_path / "c")
    given = {"model.kwargs.init": number}
    assert NNHandler.load(tmp_path / "c", objects=given).module.value == 1
