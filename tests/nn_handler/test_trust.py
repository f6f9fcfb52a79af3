"""Names in a handler's checkpoint are data. They resolve by rules, and some parts wait for
confirm()."""

from __future__ import annotations

import copy
import os
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import shardckpt
from shardckpt import NNHandler, errors
from shardckpt.loading.memory_checkpoint import StateStorage
from shardckpt.nn_handler import Callback, CSVLogger, ModelCheckpoint, loading, trust
from shardckpt.nn_handler.handler_source import HandlerSource
from shardckpt.nn_handler.objects import describe
from tests.faults import handler_attacks as attacks
from tests.nn_handler.models import Net, a_handler, data, same, weights, with_data


def ours(name: str) -> str:
    return f"{__name__}:{name}"


@pytest.fixture
def untrusted(monkeypatch):
    """This process as it began, before the tests trusted anything."""
    monkeypatch.setattr(trust, "_prefixes", set())
    monkeypatch.setattr(trust, "_objects", {})


class Block(nn.Module):
    def __init__(self, activation=functional.relu) -> None:
        super().__init__()
        self.activation = activation
        self.linear = nn.Linear(4, 3)

    def forward(self, inputs):
        return self.activation(self.linear(inputs))


class Wrapper(nn.Module):
    def __init__(self, body: nn.Module, kind: type = nn.ReLU) -> None:
        super().__init__()
        self.body, self.end = body, kind()

    def forward(self, inputs):
        return self.end(self.body(inputs))


class Calls(nn.Module):
    def __init__(self, init=None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.value = init()


class Weighted(nn.Module):
    """A loss that has a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def forward(self, outputs, targets):
        return functional.cross_entropy(outputs, targets) * self.scale


class Config:
    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self) -> None:
        raise AssertionError


@dataclass
class Clamp:
    """An activation that is an object, made of plain values."""

    least: float

    def __call__(self, inputs):
        return inputs.clamp(min=self.least)


class Configured(Net):
    def __init__(self, config) -> None:
        super().__init__(config.width)


def activation(inputs):
    return inputs.clamp(min=0)


def number():
    return 1


def to_trust(outputs, targets):
    return functional.cross_entropy(outputs, targets)


def test_a_function_needs_trust(tmp_path, untrusted):
    handler = a_handler()
    handler.set_loss_fn(to_trust)
    handler.save(tmp_path / "c")
    waiting = with_data(NNHandler.load(tmp_path / "c"))
    assert waiting.loss_fn is None
    with pytest.raises(errors.StateError, match=r"set_loss_fn\(...\), add_metric"):
        waiting.train(1)
    waiting.save(tmp_path / "c")  # its name goes on
    shardckpt.trust(__name__)
    assert NNHandler.load(tmp_path / "c").loss_fn is to_trust
    trust._prefixes.clear()
    shardckpt.trust(to_trust)
    assert NNHandler.load(tmp_path / "c").loss_fn is to_trust
    assert NNHandler.load(tmp_path / "c", loss_fn=number).loss_fn is number


def test_a_prefix_ends_with_a_name():
    assert not trust._is_trusted(types.FunctionType(number.__code__, {"__name__": "tests2"}))


@pytest.mark.parametrize("bad", ["", "a b", "os:system", 3, "a..b", len])
def test_what_can_not_be_trusted(bad):
    with pytest.raises(errors.StateError, match="trusted"):
        shardckpt.trust(bad)


def test_an_argument_that_can_not_be_recorded_is_asked_for(tmp_path, untrusted):
    with pytest.warns(UserWarning, match=r"model\.kwargs\.config"):
        NNHandler(Configured, config=Config(5)).save(tmp_path / "c")
    with pytest.raises(errors.CheckpointError, match=r"model\.kwargs\.config") as caught:
        NNHandler.load(tmp_path / "c")
    assert "objects={'model.kwargs.config': ...}" in caught.value.remedy
    with pytest.raises(errors.CheckpointError) as caught:
        NNHandler.load(tmp_path / "c", objects={"model.kwargs.confg": Config(5), "loss_fn": len})
    assert "model.kwargs.confg, which the checkpoint does not have" in caught.value.actual
    given = NNHandler.load(tmp_path / "c", objects={"model.kwargs.config": Config(5)})
    assert given.module.head.in_features == 5


def test_an_object_as_an_argument_needs_trust(tmp_path, untrusted):
    NNHandler(Block, activation=Clamp(0.5)).save(tmp_path / "c")
    with pytest.raises(errors.CheckpointError, match=r"model\.kwargs\.activation") as caught:
        NNHandler.load(tmp_path / "c")
    assert f"shardckpt.trust({__name__!r})" in caught.value.remedy
    shardckpt.trust(Clamp)
    assert NNHandler.load(tmp_path / "c").module.activation == Clamp(0.5)
    trust._objects.clear()
    shardckpt.trust(__name__)
    assert NNHandler.load(tmp_path / "c").module.activation == Clamp(0.5)


def test_one_error_lists_all_names(tmp_path, untrusted):
    state = attacks.base().state()
    for path in ("config.model.class", "config.optimizer.class"):
        attacks.put(path, attacks.name(f"not_imported.{path[7:12]}:Thing"))(state)
    attacks.put("config.callbacks.0.args.0", attacks.name(ours("number")))(state)
    shardckpt.save(state, tmp_path / "c")
    with pytest.raises(errors.CheckpointError) as caught:
        NNHandler.load(tmp_path / "c")
    assert caught.value.tensor == "model.class, optimizer.class, callbacks.0.args.0"
    for text in ("model_class=", "skip_optimizer=True", "skip_callbacks=True", "objects={"):
        assert text in caught.value.remedy
    assert "import not_imported.model" in caught.value.remedy
    loaded = NNHandler.load(
        tmp_path / "c",
        model_class=nn.Linear,
        objects={"optimizer.class": torch.optim.SGD},
        skip_callbacks=True,
    )
    assert loaded.optimizer is not None


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


def test_no_function_is_called_while_loading(tmp_path):
    NNHandler(Calls, init=number).save(tmp_path / "c")
    with pytest.raises(errors.CheckpointError, match="was about to be called"):
        NNHandler.load(tmp_path / "c")
    given = {"model.kwargs.init": number}
    assert NNHandler.load(tmp_path / "c", objects=given).module.value == 1


def test_the_model_class_can_be_given(tmp_path, monkeypatch):
    NNHandler(Net, width=5).save(tmp_path / "c")
    monkeypatch.delattr("tests.nn_handler.models.Net")
    with pytest.raises(errors.CheckpointError, match=r"model\.class: tests.*:Net"):
        NNHandler.load(tmp_path / "c")
    assert NNHandler.load(tmp_path / "c", model_class=Net).module.head.in_features == 5


@pytest.mark.parametrize("at", ["modell.class", "callbacks.3", "optimizer.options.nothing", "loss"])
def test_what_is_given_for_nothing(tmp_path, at):
    a_handler().save(tmp_path / "c")
    with pytest.raises(errors.StateError, match="does not have"):
        NNHandler.load(tmp_path / "c", objects={at: number})


def test_an_instance_is_no_model_class(tmp_path):
    a_handler().save(tmp_path / "c")
    with pytest.raises(errors.StateError, match="class was expected"):
        NNHandler.load(tmp_path / "c", model_class=Net())


class Property(nn.Linear):
    @property
    def part(self):
        raise AssertionError("a property of the model was read")


def test_the_names_of_frozen_modules_are_data(tmp_path):
    state = NNHandler(Property, in_features=2, out_features=2).state()
    state["config"]["frozen"] = ["part"]
    shardckpt.save(state, tmp_path / "c")
    with pytest.raises(errors.CheckpointError, match="frozen"):
        NNHandler.load(tmp_path / "c")


def test_a_size_is_bounded_without_strict_too(tmp_path):
    state = NNHandler(nn.Linear, in_features=2, out_features=2).state()
    state["config"]["model"]["kwargs"] = {"in_features": 10**6, "out_features": 10**6}
    shardckpt.save(state, tmp_path / "c")
    for options in ({}, {"strict": False}, {"model_class": nn.Linear}, {"device_map": "cpu"}):
        with pytest.raises(errors.CheckpointError, match="larger module than its tensors"):
            NNHandler.load(tmp_path / "c", **options)


def test_a_model_of_other_sizes_on_a_device_map(tmp_path):
    state = NNHandler(nn.Linear, in_features=2, out_features=2).state()
    state["config"]["model"]["kwargs"] = {"in_features": 3, "out_features": 2}
    shardckpt.save(state, tmp_path / "c")
    with pytest.raises(errors.LoadMismatchError):
        NNHandler.load(tmp_path / "c", device_map="cpu")


def test_the_tensors_of_a_loss_wait_for_it(tmp_path, untrusted):
    class Local(Weighted):
        pass

    handler = a_handler()
    handler.set_loss_fn(Local())
    handler.loss_fn.scale.fill_(7.0)
    with pytest.warns(UserWarning, match="loss_fn"):
        handler.save(tmp_path / "c")
    with pytest.warns(UserWarning, match="loss_fn"):
        NNHandler.load(tmp_path / "c").save(tmp_path / "again")
    loaded = NNHandler.load(tmp_path / "again")
    loaded.set_loss_fn(Local())
    assert loaded.loss_fn.scale == 7.0


class Remembers(Callback):
    writes_files = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, handler):
        if self.confirmed:
            Path(self.path).touch()


def test_what_came_with_a_checkpoint_writes_nothing_before_it_is_confirmed(tmp_path):
    out = tmp_path / "out"
    handler = a_handler()
    handler.auto_save(save_path=out / "auto", overwrite=True)
    for callback in (
        ModelCheckpoint(out / "best"),
        CSVLogger(out / "log.csv"),
        Remembers(out / "mark"),
    ):
        handler.add_callback(callback)
    handler.compile_model(backend="eager")
    handler.save(tmp_path / "c")
    loaded = with_data(NNHandler.load(tmp_path / "c"))
    assert len(loaded.unconfirmed) == 5
    with pytest.warns(UserWarning, match="until you confirm"):
        loaded.train(1, progress_bar=False)
    loaded.train(1, progress_bar=False)  # warned of once
    assert not out.exists()
    out.mkdir()
    loaded.confirm()
    assert loaded.unconfirmed == []
    loaded.train(1, progress_bar=False)
    assert sorted(os.listdir(out)) == ["auto", "best", "log.csv", "mark"]
    assert (out / "log.csv").read_text().count("\n") == 4  # the rows of before are not lost


def test_a_part_of_a_checkpoint_can_be_left_out(tmp_path):
    state = a_handler().state()
    state["config"] |= {"auto_saver": {"x": 1}, "compile": {"options": {"cpp.cxx": ["sh"]}}}
    shardckpt.save(state, tmp_path / "c")
    with pytest.raises(errors.CheckpointError, match="auto_saver") as caught:
        NNHandler.load(tmp_path / "c")
    assert 'objects={"auto_saver": None}' in caught.value.remedy
    left_out = {"auto_saver": None}
    with pytest.raises(errors.CheckpointError, match="compile"):
        NNHandler.load(tmp_path / "c", objects=left_out)
    loaded = NNHandler.load(tmp_path / "c", objects={**left_out, "compile": None})
    assert loaded.unconfirmed == []


def leaves(value, at=()):
    """The places of everything in a state, outer ones first."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*at, key)
        if isinstance(item, (dict, list, tuple)):
            yield from leaves(item, (*at, key))


WRONG = [None, -1, 3.5, "x", [1], {"x": 1}, torch.ones(2), 1 << 90]


def test_every_field_of_a_wrong_type_is_a_typed_error(monkeypatch):
    """Every value in what is not a tensor, removed, and replaced by two others."""
    whole = attacks.base().state()
    small = {k: whole[k] for k in ("config", "progress", "callbacks", "scheduler", "scaler")}
    ranks = [whole["ranks"].value]
    ranks[0]["random"]["python"] = ranks[0]["random"]["numpy"] = "x"  # not each of 600 numbers
    kinds = set()
    for number, place in enumerate(leaves(small)):
        for wrong in (..., WRONG[number % 8], WRONG[(3 * number + 1) % 8]):
            changed = copy.deepcopy(small)
            *outer, last = place
            found = changed
            for key in outer:
                found = found[key]
            if isinstance(found, tuple):
                continue
            if wrong is ...:
                del found[last]
            else:
                found[last] = wrong
            state = {**{k: v for k, v in whole.items() if k != "ranks"}, **changed}
            source = HandlerSource(path="c", storage=StateStorage(state), ranks=ranks)
            monkeypatch.setattr(loading, "open_handler", lambda path, source=source: source)
            try:
                NNHandler.load("c", device="cpu")
            except errors.ShardckptError as error:
                assert error.tensor or isinstance(error, errors.NotACheckpointError), (place, wrong)
                kinds.add(type(error))
            else:
                raise AssertionError("the random numbers are malformed")
    assert errors.CheckpointError in kinds


def test_no_getattr_of_a_module_or_class_runs(tmp_path):
    from tests.faults import handler_bait

    shardckpt.save({"n": 1}, tmp_path / "c")
    manifest = (tmp_path / "c" / "manifest.json").read_text()
    for module, name in (
        ("tests.faults.handler_bait", "something"),
        ("tests.faults.handler_bait", "Holder.attribute"),
        ("tests.faults.handler_lazy", "something"),
    ):
        node = f'{{"$enum":["{module}","{name}","x"]}}'
        body = manifest.rpartition(',"digest"')[0].replace('"n":1', f'"n":{node}')
        from tests.faults.hostile import seal_text

        (tmp_path / "c" / "manifest.json").write_bytes(seal_text(body))
        handler_bait.called.clear()
        with pytest.raises(errors.CheckpointError, match="enum"):
            shardckpt.load_state(tmp_path / "c")
        assert handler_bait.called == []
    assert "tests.faults.handler_lazy" in sys.modules


def test_a_script_s_own_functions_are_resolved():
    main = sys.modules["__main__"]
    main.own = types.FunctionType(number.__code__, vars(main), "own")
    try:
        main.own.__module__ = "__main__"
        main.alias = number
        slot = trust.Slot.FUNCTION
        assert trust.resolve_name("__main__:own", slot, instance=False) is main.own
        assert trust.resolve_name("__main__:own", slot, instance=True) is None
        # a partial would call it with arguments of the checkpoint
        assert trust.resolve_name("__main__:own", slot, instance=False, with_arguments=True) is None
        assert trust.resolve_name("__main__:own", trust.Slot.MODEL, instance=False) is None
        trusted, trust._prefixes = trust._prefixes, set()
        assert trust.resolve_name("__main__:alias", slot, instance=False) is None
        trust._prefixes = trusted
    finally:
        del main.own, main.alias
    assert data(3)
