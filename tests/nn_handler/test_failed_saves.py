"""Saves that fail for the storage's sake, while training goes on."""

from __future__ import annotations

import pytest
import torch

import shardckpt
from shardckpt.errors import StoreUnavailableError
from shardckpt.nn_handler import Callback, LogFile
from shardckpt.storage.memory import MemoryStorage


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
