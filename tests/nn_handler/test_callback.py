"""Callbacks and plain functions are called at the points that their hooks name."""

from __future__ import annotations

import inspect
import os

import pytest

from shardckpt import NNHandler
from shardckpt.nn_handler import Callback
from shardckpt.nn_handler.callback import Hook
from tests.nn_handler.models import FailAt, a_handler, data, make, train, with_data


class Hooks(Callback):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_batch_start(self, handler, batch, number):
        self.seen.append(f"batch {number}")

    def on_validation_start(self, handler):
        self.seen.append("validation")

    def on_validation_end(self, handler, metrics):
        self.seen.append(",".join(metrics))

    def on_save(self, handler, path):
        self.seen.append(os.path.basename(path))

    def on_exception(self, handler, error):
        self.seen.append(type(error).__name__)


def test_hooks_and_remove_callback(tmp_path):
    handler, hooks = make(), Hooks()
    handler.add_callback(hooks)
    handler.add_callback(FailAt(3))
    handler.set_train_loader(data(16), batch_size=8)
    handler.auto_save(save_path=tmp_path)
    with pytest.raises(KeyError):
        train(handler, 2, gradient_accumulation_steps=1)
    assert hooks.seen == ["batch 0"] * 2 + [
        "validation",
        "val_loss",
        "epoch1",
        "batch 0",
        "KeyError",
    ]
    handler.remove_callback(hooks)
    handler.remove_callback(FailAt)
    assert handler.callbacks == []


def note(handler, metrics):
    handler.noted = [*getattr(handler, "noted", []), metrics["loss"]]


def test_a_plain_function_as_a_callback(tmp_path):
    handler = a_handler()
    handler.add_callback(note)
    train(handler, 2)
    assert handler.noted == handler.history["loss"]
    handler.save(tmp_path / "c")
    assert train(with_data(NNHandler.load(tmp_path / "c"))).noted


class Base(Callback):
    """A callback that does not call the constructor of its base class."""

    def __init__(self, width, *, height=2):
        self.width = width


class Derived(Base):
    def __init__(self):
        super().__init__(5)


def test_the_arguments_of_the_constructor_are_noted_as_they_were_given():
    assert Base(3, height=4).constructor_arguments == ((3,), {"height": 4})
    assert Base(width=3).constructor_arguments == ((), {"width": 3})
    assert Derived().constructor_arguments == ((), {})
    assert Hook(note).constructor_arguments == ((note,), {})


def test_a_callback_without_hooks_does_nothing_and_has_no_state():
    one = Callback()
    hooks = [name for name in dir(Callback) if name.startswith("on_")]
    assert len(hooks) == 12
    for name in hooks:
        hook = getattr(one, name)
        assert hook(*[None] * len(inspect.signature(hook).parameters)) is None
    assert one.state_dict() == {}
    assert one.load_state_dict({"a": 1}) is None
    assert (one.writes_files, one.confirmed) == (False, True)


def test_a_function_is_called_after_each_epoch_alone():
    seen = []
    hook = Hook(lambda handler, metrics: seen.append((handler, metrics)))
    hook.on_train_start("handler")
    hook.on_epoch_end("handler", {"loss": 1.0})
    assert seen == [("handler", {"loss": 1.0})]
