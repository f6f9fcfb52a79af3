"""An AutoSaver saves while a handler trains, keeps what its options say, and resumes."""

from __future__ import annotations

import os

import pytest
import torch

import shardckpt
from shardckpt import NNHandler, errors
from shardckpt.errors import StoreUnavailableError
from shardckpt.nn_handler import Callback, LogFile, ModelCheckpoint
from shardckpt.storage.memory import MemoryStorage
from tests.nn_handler.models import a_handler, same, train, weights, with_data


def test_retention_after_a_resume(tmp_path):
    handler = a_handler()
    handler.auto_save(interval=1, save_path=tmp_path, keep_last=2)
    train(handler, 3)
    resumed = with_data(NNHandler.load(tmp_path / "epoch3", confirm=True))
    train(resumed, 2)
    assert sorted(os.listdir(tmp_path)) == ["epoch4", "epoch5"]
    other = a_handler()  # another run does not touch what this one saved
    other.auto_save(interval=1, save_path=tmp_path, overwrite=True, name="other{epoch}")
    train(other, 2)
    assert sorted(os.listdir(tmp_path)) == ["epoch4", "epoch5", "other2"]


def test_best_and_last(tmp_path):
    handler = a_handler()
    handler.auto_save(
        interval=1, save_path=tmp_path, keep_best=1, monitor="lr", mode="max", save_last=True
    )
    train(handler, 4)  # the highest rate is that of epochs 1 and 2
    assert sorted(os.listdir(tmp_path)) == ["epoch2", "epoch4", "last"]
    assert NNHandler.load(tmp_path / "last").epoch == 4


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_auto_resume_falls_back(tmp_path, how):
    handler = a_handler()
    handler.auto_save(interval=1, save_path=tmp_path)
    train(handler, 2)
    (shard,) = [p for p in (tmp_path / "epoch2").iterdir() if p.name.startswith("shard")][:1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] if how == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))
    resumed = a_handler()
    resumed.auto_save(interval=1, save_path=tmp_path, resume="auto")
    with pytest.warns(UserWarning, match="epoch2 is corrupted"):
        train(resumed, 2)
    assert same(weights(resumed), weights(handler))
    assert resumed.history == handler.history


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "{nothing}"}, "unknown field"),
        ({"name": "{val_nothing}"}, "unknown field"),
        ({"keep_best": 1, "monitor": "nothing"}, "never appears"),
    ],
)
def test_unknown_metrics_are_errors_before_the_first_epoch(tmp_path, options, text):
    handler = a_handler()
    handler.auto_save(save_path=tmp_path, **options)
    with pytest.raises(errors.StateError, match=text):
        train(handler)
    assert handler.step == 0


@pytest.mark.parametrize(
    "options",
    [
        {"every_steps": 0},
        {"every_minutes": -1},
        {"keep_last": 0},
        {"keep_best": 1},
        {"keep_best": "2", "monitor": "loss"},
        {"mode": "least"},
        {"resume": "yes"},
        {"overwrite": True, "keep_last": 2},
        {"name": "c.pth", "asynchronous": True},
        {"interval": True},
    ],
)
def test_bad_ways_to_save(options):
    with pytest.raises(errors.StateError):
        a_handler().auto_save(**options)


def test_links_to_the_last_and_the_best(tmp_path):
    handler = a_handler()
    handler.auto_save(
        save_path=tmp_path / "a", keep_best=1, keep_last=1, monitor="lr", mode="max", links=True
    )
    train(handler, 3)  # the highest rate is that of epochs 1 and 2
    assert sorted(os.listdir(tmp_path / "a")) == ["best", "epoch2", "epoch3", "last"]
    assert os.readlink(tmp_path / "a" / "last") == "epoch3"
    assert NNHandler.load(tmp_path / "a" / "best").epoch == 2
    assert handler.best_path == str(tmp_path / "a" / "epoch2")
    handler = a_handler()
    handler.add_callback(ModelCheckpoint(tmp_path / "b", name="e{epoch}.pth", links=True))
    train(handler, 2)
    assert os.path.realpath(tmp_path / "b" / "best.pth") == handler.best_path
    with pytest.raises(errors.StateError, match="save_last"):
        handler.auto_save(save_path=tmp_path, save_last=True, links=True)


class Down(MemoryStorage):
    """A store that does not answer in two of four epochs."""

    attempts = 0

    def begin(self, path, **options):
        if path.endswith(("epoch2", "epoch3")):
            self.attempts += 1
            raise StoreUnavailableError("503", path=path)
        return super().begin(path, **options)

    def full_path(self, path):
        return super().full_path(path or "memory://bucket/run")


class Told(Callback):
    """Notes the saves."""

    def __init__(self):
        self.saved, self.failed = [], []

    def on_save(self, handler, path):
        self.saved.append(path[-6:])

    def on_save_failed(self, handler, path, error):
        self.failed.append((path[-6:], type(error)))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_callbacks_hear_of_failed_saves(tmp_path, asynchronous):
    handler = shardckpt.NNHandler(torch.nn.Linear, device="cpu", in_features=2, out_features=2)
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_loss_fn(torch.nn.MSELoss())
    data = torch.utils.data.TensorDataset(torch.ones(4, 2), torch.ones(4, 2))
    handler.set_train_loader(torch.utils.data.DataLoader(data, batch_size=2))
    storage, told = Down(), Told()
    handler.add_callback(told)
    handler.add_callback(LogFile(tmp_path / "log"))
    handler.auto_save(save_path=storage, interval=1, asynchronous=asynchronous)
    with pytest.warns(UserWarning, match="was not saved"):
        handler.train(4, progress_bar=False)
    assert handler.epoch == 4
    assert told.failed == [(f"epoch{n}", StoreUnavailableError) for n in (2, 3)]
    assert handler.failed_saves == 2
    assert storage.attempts == (2 if asynchronous else 4)
    if not asynchronous:
        assert told.saved == ["epoch1", "epoch4"]
    assert (tmp_path / "log").read_text().count("not saved: ") == 2
    assert storage.names("memory://bucket/run") == ["epoch1", "epoch4"]
