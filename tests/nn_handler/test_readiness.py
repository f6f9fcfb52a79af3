"""Wrong arguments, and changes between two runs, are reported early, and nothing is lost."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from shardckpt import NNHandler, errors
from shardckpt.nn_handler import Callback, CSVLogger, EarlyStopping, ModelCheckpoint
from shardckpt.nn_handler.batch import Result, batch_size
from shardckpt.nn_handler.epoch_metrics import EpochSums
from tests.nn_handler.models import Net, a_handler, data, same, weights, with_data


class Stream(IterableDataset):
    def __init__(self, count: int = 48) -> None:
        self.inner = data(count)

    def __iter__(self):
        return (self.inner[index] for index in range(len(self.inner)))


def test_a_stream_of_samples_resumes_within_an_epoch(tmp_path):
    handler = a_handler()
    handler.set_train_loader(Stream(), batch_size=8)
    handler.auto_save(save_path=tmp_path, every_steps=4)
    handler.train(1, progress_bar=False)
    resumed = with_data(NNHandler.load(tmp_path / "step4", confirm=True))
    resumed.set_train_loader(Stream(), batch_size=8)
    resumed.train(1, progress_bar=False)
    assert same(weights(resumed), weights(handler))
    assert resumed.history == handler.history
    handler.set_val_loader(Stream(), batch_size=8)  # streams validate too, each rank a part


@pytest.mark.parametrize("samples", [20, 100])
def test_other_data_within_an_epoch_begin_it_anew_aloud(tmp_path, samples):
    handler = a_handler()
    handler.auto_save(save_path=tmp_path, every_steps=4)
    handler.train(1, progress_bar=False)
    resumed = with_data(NNHandler.load(tmp_path / "step4"))
    resumed.auto_save(None)
    resumed.set_train_loader(data(samples), batch_size=4, shuffle=True)
    with pytest.warns(UserWarning, match="the epoch starts again"):
        resumed.train(1, progress_bar=False)
    assert (resumed.epoch, resumed.step) == (1, 4 + samples // 4)


class NotSaved(Callback):
    def state_dict(self):
        return {"function": lambda: 1}


def plateau_without_validation() -> NNHandler:
    handler = NNHandler(Net)
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_scheduler(torch.optim.lr_scheduler.ReduceLROnPlateau)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    handler.set_train_loader(data(), batch_size=8)
    return handler


def with_callback(callback: Callback) -> NNHandler:
    handler = a_handler()
    handler.add_callback(callback)
    return handler


def saving_into(folder) -> NNHandler:
    handler = a_handler()
    handler.auto_save(save_path=folder)
    return handler


@pytest.mark.parametrize(
    ("act", "kind", "text"),
    [
        (lambda p: NNHandler(Net()), errors.StateError, "class was expected"),
        (lambda p: a_handler().set_train_loader(data(0)), errors.StateError, "no batch"),
        (
            lambda p: a_handler().set_train_loader(data(5), batch_size=8, drop_last=True),
            errors.StateError,
            "no batch",
        ),
        (
            lambda p: a_handler().set_val_loader(data(0)),
            errors.StateError,
            "validation set is empty",
        ),
        (lambda p: plateau_without_validation().train(1), errors.StateError, "never appears"),
        (
            lambda p: with_callback(EarlyStopping()).train(1, validate_every=0),
            errors.StateError,
            "never appears",
        ),
        (
            lambda p: with_callback(NotSaved()).train(1),
            errors.UnsupportedLeafError,
            "can't be saved",
        ),
        (lambda p: saving_into(p / "file" / "x").train(1), errors.StorageError, "refused"),
    ],
)
def test_wrong_input_is_an_error_before_training(tmp_path, act, kind, text):
    (tmp_path / "file").touch()
    with pytest.raises(kind, match=text):
        act(tmp_path)


@pytest.mark.parametrize("value", [None, "high", torch.ones(2)])
def test_a_metric_that_is_no_number_is_named(value):
    handler = a_handler()
    handler.add_metric("odd", lambda outputs, targets: value)
    with pytest.raises(errors.StateError, match="'odd' returned no number"):
        handler.train(1, progress_bar=False)


def test_a_mean_over_no_sample_is_no_zero():
    assert math.isnan(EpochSums(a_handler()).means()["loss"])


def test_a_batch_of_targets_in_a_container():
    assert batch_size({"box": torch.ones(6, 4), "label": torch.ones(6)}) == 6
    assert batch_size([{"box": torch.ones(3, 4)}] * 2) == 2  # one an image
    assert batch_size(torch.tensor(1.0)) == 1
    sums = EpochSums(NNHandler(Net))
    for size in (6, 2, 1):
        sums.add(Result(loss=torch.tensor(2.0), size=size))
    assert sums.means()["loss"] == 2.0


def without_scheduler() -> NNHandler:
    handler = NNHandler(Net, width=6)
    handler.set_optimizer(torch.optim.Adam, lr=0.01)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    return with_data(handler)


def other_optimizer() -> NNHandler:
    handler = a_handler()
    with pytest.warns(UserWarning, match="scheduler starts again"):
        handler.set_optimizer(torch.optim.SGD, lr=0.01)
    return handler


@pytest.mark.parametrize(
    ("before", "after", "part"),
    [
        (a_handler, without_scheduler, "scheduler"),
        (without_scheduler, a_handler, "scheduler"),
        (a_handler, other_optimizer, "optimizer"),
    ],
)
def test_no_part_is_dropped_or_mixed_up_by_a_resume(tmp_path, before, after, part):
    before().save(tmp_path / "c")
    handler = after()
    with pytest.raises(errors.LoadMismatchError, match=f"another {part}"):
        handler.restore(tmp_path / "c")


def test_other_callbacks_are_no_reason_to_fall_back(tmp_path):
    for epochs in (1, 2):
        handler = a_handler()
        handler.auto_save(save_path=tmp_path, resume="auto")
        if epochs == 2:
            handler.add_callback(EarlyStopping())
            with pytest.raises(errors.LoadMismatchError, match="other callbacks"):
                handler.train(epochs, progress_bar=False)
        else:
            handler.train(epochs, progress_bar=False)


@pytest.mark.parametrize("name", ["c", "c.pth", "c.safetensors"])
def test_paths_as_arguments(tmp_path, name):
    handler = a_handler()
    handler.add_callback(CSVLogger(tmp_path / "log.csv"))
    handler.add_callback(ModelCheckpoint(tmp_path / "best"))
    handler.save(tmp_path / name)
    loaded = NNHandler.load(tmp_path / name)
    assert loaded.callbacks[0].constructor_arguments == ((Path(tmp_path / "log.csv"),), {})


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
def test_names_of_255_bytes(tmp_path, suffix):
    handler = NNHandler(nn.Linear, device="cpu", in_features=2, out_features=2)
    path = tmp_path / ("x" * (255 - len(suffix)) + suffix)
    for _ in range(2):
        handler.save(path)
    NNHandler.load(path)
    assert os.listdir(tmp_path) == [path.name]


def test_files_of_the_user_beside_components_stay(tmp_path):
    handler = NNHandler(nn.Linear, device="cpu", in_features=2, out_features=2)
    folder = tmp_path / "parts"
    handler.save_multi_files(folder)
    handler.save_multi_files(folder, "safetensors")
    (folder / "tokenizer.json").write_text("precious")
    for damage in (False, True):
        if damage:
            (folder / "components.json").write_text("[]")
        with pytest.raises(errors.NotACheckpointError, match="would remove files") as caught:
            handler.save_multi_files(folder)
        assert "tokenizer.json" in caught.value.actual
    assert (folder / "tokenizer.json").read_text() == "precious"


def test_two_checkpoint_callbacks_alike(tmp_path):
    """Two with the same arguments keep a checkpoint each, also when training goes on."""
    handler = a_handler()
    for _ in range(2):
        handler.add_callback(ModelCheckpoint(tmp_path, monitor="loss", mode="max"))
    handler.train(2, progress_bar=False)
    handler.train(2, progress_bar=False)
    epochs = sorted(NNHandler.load(tmp_path / name).epoch for name in os.listdir(tmp_path))
    assert epochs == [1, 1, 4, 4]
