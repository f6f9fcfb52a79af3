"""An AutoSaver saves while a handler trains, keeps what its options say, and resumes."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

import shardckpt
from shardckpt import NNHandler, errors
from shardckpt.errors import StoreUnavailableError
from shardckpt.nn_handler import AutoSaver, Callback, LogFile, ModelCheckpoint, auto_saver
from shardckpt.storage.memory import MemoryStorage
from tests.nn_handler.models import a_handler, make, same, train, weights, with_data


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


def begun(folder, **options) -> tuple[AutoSaver, NNHandler]:
    saver, handler = AutoSaver(save_path=folder, **options), make()
    assert not saver.begin(handler)
    return saver, handler


def test_a_saver_that_has_not_begun_has_no_checkpoints(tmp_path):
    saver = AutoSaver(save_path=tmp_path / "new", monitor="loss")
    assert (saver.best_path, saver.best_score, saver.take_fresh()) == (None, None, [])
    assert saver.folder == str(tmp_path / "new")
    assert (saver.on_exception, saver.on_signal, saver.one_file) == (True, True, False)
    assert os.listdir(tmp_path) == []


def test_the_description_makes_the_same_saver(tmp_path):
    saver = AutoSaver(save_path=tmp_path, name="e{epoch}.pth", every_steps=3, on_signal=False)
    again = AutoSaver(**saver.description())
    assert again.description() == saver.description()
    assert (again.schedule, again.one_file, again.on_signal) == (saver.schedule, True, False)


def test_steps_are_saved_when_they_are_due_and_once(tmp_path):
    saver, handler = begun(tmp_path, every_steps=2, interval=None)
    for handler.step in (1, 2):
        assert saver.due(handler) == (handler.step == 2)
        saver.within_epoch(handler, now=False)
    saver.within_epoch(handler, now=True)
    assert saver.take_fresh() == [str(tmp_path / "step2")]
    assert saver.take_fresh() == []
    handler.step = 3
    saver.within_epoch(handler, now=True)
    assert sorted(os.listdir(tmp_path)) == ["step2", "step3"]


def test_epochs_are_saved_under_names_with_their_metrics(tmp_path):
    saver, handler = begun(tmp_path, interval=2, name="e{epoch}_{loss:.1f}", keep_last=1)
    for epoch in (1, 2, 3):
        handler.epoch, handler.step = epoch, 6 * epoch
        saver.after_epoch(handler, {"loss": epoch / 4}, last=epoch == 3, save_last=True)
        assert os.listdir(tmp_path) == {1: [], 2: ["e2_0.5"], 3: ["e3_0.8"]}[epoch]


def test_the_best_checkpoint_is_known_by_its_metric(tmp_path):
    saver, handler = begun(tmp_path, monitor="val_loss", mode="max", keep_best=1)
    for epoch, value in enumerate((0.25, 0.75, 0.5), 1):
        handler.epoch, handler.step = epoch, epoch
        saver.after_epoch(handler, {"val_loss": value}, last=False, save_last=False)
    assert (saver.best_path, saver.best_score) == (str(tmp_path / "epoch2"), 0.75)


def test_minutes_are_counted_from_the_last_save(tmp_path, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: clock.now_s, now_s=0.0)
    monkeypatch.setattr(auto_saver, "time", clock)
    saver, handler = begun(tmp_path, every_minutes=2, interval=None)
    clock.now_s = 119.0
    assert not saver.minutes_due()
    clock.now_s = 120.0
    assert saver.minutes_due()
    handler.step = 1
    saver.within_epoch(handler, now=True)
    assert not saver.minutes_due()


def test_the_newest_intact_checkpoint_is_the_one_to_go_back_to(tmp_path):
    saver, handler = begun(tmp_path, every_steps=1, interval=None)
    loaded = []
    assert not saver.go_back(loaded.append)
    for handler.step in (1, 2):
        saver.within_epoch(handler, now=False)
    assert saver.go_back(loaded.append)
    assert loaded == [str(tmp_path / "step2")]


def test_an_emergency_is_saved_under_the_name_of_its_step(tmp_path):
    for name, found in (("e{epoch}", "step7"), ("e{epoch}.pth", "step7.pth")):
        saver, handler = begun(tmp_path / found, interval=-1, name=name)
        handler.step = 7
        saver.emergency(handler)
        assert os.listdir(tmp_path / found) == [found]


def test_a_resume_begins_only_before_the_first_step(tmp_path):
    saver, handler = begun(tmp_path)
    handler.step = 4
    saver.save(handler, {}, name="step4")
    loaded: list[str] = []
    again, other = AutoSaver(save_path=tmp_path, resume="auto"), make()
    assert again.begin(other, restore=loaded.append)
    assert loaded == [str(tmp_path / "step4")]
    other.step = 4
    assert not again.begin(other, restore=loaded.append)
    assert not AutoSaver(save_path=tmp_path).begin(make(), restore=loaded.append)
    assert len(loaded) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"resume": "yes"}, "Invalid value for resume"),
        ({"tolerate": 1.5}, "Invalid tolerate for saving"),
        ({"links": 1}, "Invalid links for saving"),
        ({"overwrite": None}, "Invalid overwrite for saving"),
        ({"save_last": True, "name": "last"}, "that of a link, or of save_last"),
        ({"links": True, "monitor": "loss", "name": "best"}, "that of a link, or of save_last"),
        ({"name": "c.safetensors", "asynchronous": True}, "not saved in the background"),
    ],
)
def test_options_that_exclude_each_other_are_refused(tmp_path, options, text):
    with pytest.raises(errors.StateError, match=text):
        AutoSaver(save_path=tmp_path, **options)


def test_the_name_best_is_free_without_a_monitor(tmp_path):
    assert AutoSaver(save_path=tmp_path, links=True, name="best").schedule.name == "best"
