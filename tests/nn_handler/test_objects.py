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
from shardckpt.nn_handler.bounds import Bounds
from shardckpt.nn_handler.objects import NameResolver, absent, describe, making, warn_of_absent
from shardckpt.nn_handler.trust import Slot
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


def resolver(**given) -> NameResolver:
    return NameResolver(given, Bounds(list, path="c"), path="c")


def made(described, slot: Slot = Slot.ARGUMENT, **given):
    names = resolver(**given)
    tree = names.resolve(described, "a", slot)
    names.raise_missing()
    return names.make(tree, "a")


@pytest.mark.parametrize(
    "value",
    [
        3,
        [1, (2.0, "x", None)],
        {"a": {"b": torch.float16}},
        nn.ReLU,
        functional.relu,
        range(7),
        Path("a/b"),
        collections.OrderedDict(b=1, a=[2]),
    ],
)
def test_plain_values_and_names_come_back_from_their_description(value):
    found = made(describe(value))
    assert (type(found), found) == (type(value), value)


def test_a_pure_path_becomes_a_path_of_this_system():
    assert describe(Path("a") / "b") == {"shardckpt.import": "pathlib:Path", "arguments": ["a/b"]}


def test_a_partial_comes_back_with_its_arguments():
    found = made(describe(functools.partial(nn.Linear, 2, bias=False)))
    assert (found.func, found.args, found.keywords) == (nn.Linear, (2,), {"bias": False})


@pytest.mark.parametrize("value", [lambda: 3, object(), torch.Generator(), {1, 2}.union])
def test_what_has_no_description_is_absent(value):
    found = describe({"x": [value]})
    (text,) = absent(found, "").values()
    assert set(absent(found, "")) == {"x.0"}
    assert text == " ".join(repr(value).split())[:200]


def test_the_handlers_own_parts_are_described_by_their_names():
    model = nn.Linear(2, 2)
    own = {id(model): "module", id(model.weight): "module.weight"}
    assert describe([model, model.weight], own) == [
        {"shardckpt.own": "module"},
        {"shardckpt.own": "module.weight"},
    ]
    names = resolver()
    names.own_part = {"module": model}.get
    assert names.make(names.resolve({"shardckpt.own": "module"}, "a"), "a") is model
    with pytest.raises(CheckpointError, match="does not have") as caught:
        names.make(names.resolve({"shardckpt.own": "neck"}, "callbacks.0"), "callbacks.0")
    assert caught.value.actual == "'neck'"
    assert caught.value.remedy == "load with skip_callbacks=True"


def test_a_module_with_tensors_beside_its_arguments_is_absent_unless_they_are_saved():
    weighted = nn.CrossEntropyLoss(weight=torch.ones(3))
    assert "arguments" in describe(weighted)
    linear = nn.Linear(2, 2)
    assert list(absent(describe(linear), "a")) == ["a"]
    arguments = describe(linear, holds_tensors=True)["arguments"]
    assert arguments == {"in_features": 2, "out_features": 2, "bias": True}


def test_an_absent_object_is_warned_of_once():
    known: set[str] = set()
    described = describe({"a": lambda: 1})
    with pytest.warns(UserWarning, match=r"objects=\{'a': \.\.\.\}"):
        warn_of_absent(described, known)
    assert known == {"a"}
    warn_of_absent(described, known)


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ({"shardckpt.import": 3}, 'a name as "module:class"'),
        ({"shardckpt.import": "torch.nn:ReLU", "more": 1}, 'a name as "module:class"'),
        ({"shardckpt.import": "torch.nn:ReLU", "arguments": 3}, "arguments in a dict or a list"),
        ({"shardckpt.import": "pathlib:Path", "arguments": ["a", "b"]}, "a path as one str"),
        ({"shardckpt.import": "functools:partial", "arguments": []}, "function, args, keywords"),
        ({"shardckpt.import": "collections:OrderedDict", "arguments": [1]}, "a list of pairs"),
        ({"shardckpt.own": 3}, "the name of a part of the handler"),
        (range(1 << 40), "a range of at most 1048576 numbers"),
    ],
)
def test_a_malformed_description_is_refused(described, expected):
    with pytest.raises(CheckpointError, match="malformed") as caught:
        resolver().resolve({"b": described}, "a")
    assert expected in caught.value.expected
    assert caught.value.tensor == "config.a.b"
    assert caught.value.remedy == "give it to load: objects={'a.b': ...}"


def test_a_part_of_the_handler_is_no_argument_of_the_model():
    with pytest.raises(CheckpointError, match="malformed"):
        resolver().resolve({"shardckpt.own": "model"}, "model.kwargs.a")


def test_what_the_caller_gives_replaces_a_description():
    names = NameResolver({"a.b": 3, "a.c": None}, Bounds(list, path="c"), path="c")
    tree = names.resolve({"b": {"shardckpt.absent": "x"}, "c": 5, "d": 6}, "a")
    assert names.make(tree, "a") == {"b": 3, "c": None, "d": 6}
    assert names.used == {"a.b", "a.c"}


def test_missing_names_are_listed_with_the_ways_to_give_them():
    names = resolver()
    names.resolve({"shardckpt.import": "mine.models:Net"}, "model.class", Slot.MODEL)
    names.resolve({"shardckpt.absent": "a\nlambda"}, "optimizers.rest.optimizer.options.f")
    with pytest.raises(CheckpointError, match="has not given, imported or trusted") as caught:
        names.raise_missing(["loss"])
    assert caught.value.tensor == "model.class, optimizers.rest.optimizer.options.f"
    assert "'a\\nlambda'" in caught.value.expected
    assert caught.value.actual == "objects= gives loss, which the checkpoint does not have"
    for way in ("model_class=...", "skip_optimizer=True", "import mine.models"):
        assert way in caught.value.remedy
    resolver().raise_missing(["loss"])  # nothing is missing


def test_no_more_than_fifty_missing_names_are_listed():
    names = resolver()
    names.resolve([{"shardckpt.absent": "x"}] * 60, "a")
    with pytest.raises(CheckpointError) as caught:
        names.raise_missing()
    assert caught.value.tensor.endswith("a.49, and 10 more")


def test_functions_can_be_called_when_the_load_has_ended():
    names = resolver()
    tree = names.resolve(describe({"f": number}), "a")
    held = names.make(tree, "a")["f"]
    with pytest.raises(CheckpointError, match="was about to be called") as caught:
        held()
    assert caught.value.tensor == "a.f"
    names.open()
    assert held() == 1
    assert describe(held) == describe(number)


def test_the_function_of_a_scheduler_gives_a_factor_of_one_while_loading():
    names = resolver()
    tree = names.resolve(describe(number), "scheduler.options.lr_lambda")
    held = names.make(tree, "a")
    assert held(3) == 1.0


@pytest.mark.parametrize(
    ("at", "remedy"),
    [
        ("optimizer", "load with skip_optimizer=True"),
        ("optimizers.rest.optimizer", "load with skip_optimizer=True"),
        ("metrics.f1", "give it to load: metrics={'f1': ...}"),
        ("compile", 'leave it out of the load: objects={"compile": None}'),
        ("frozen", "take the weights alone with NNHandler.initialize_from_checkpoint"),
    ],
)
def test_an_error_while_a_part_is_made_names_the_part_and_a_remedy(at, remedy):
    with pytest.raises(CheckpointError, match="can't be created") as caught, making(at, "c"):
        raise ValueError("planted\nsecond line")
    assert (caught.value.path, caught.value.tensor) == ("c", at)
    assert caught.value.actual == "ValueError: planted"
    assert caught.value.remedy == remedy


def test_errors_of_the_package_keep_their_type_while_a_part_is_made():
    with pytest.raises(errors.CorruptionError) as caught, making("ema", "c"):
        raise errors.CorruptionError("planted")
    assert caught.value.tensor == "ema"
    with pytest.raises(CheckpointError, match="can't be created") as other, making("ema", "c"):
        raise errors.StateError("planted")
    assert other.value.actual == "planted"
