"""Callbacks and plain functions are called at the points that their hooks name."""

from __future__ import annotations

import os

import pytest

from shardckpt import NNHandler
from shardckpt.nn_handler import Callback
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
