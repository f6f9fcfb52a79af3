"""Data in the forms that users pass: its order, and its position within an epoch."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from shardckpt import NNHandler
from tests.nn_handler.models import (
    DS,
    FailAt,
    OwnObject,
    X,
    Y,
    a_handler,
    data,
    make,
    same,
    train,
    weights,
    with_data,
)


class Seen(Dataset):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index):
        self.seen.append(index)
        return X[index], Y[index]


def loaders(dataset):
    def g(seed):
        return torch.Generator().manual_seed(seed)

    return {
        "replacement": lambda s: DataLoader(
            dataset,
            16,
            sampler=RandomSampler(dataset, replacement=True, num_samples=320, generator=g(s)),
        ),
        "generator": lambda s: DataLoader(dataset, 16, shuffle=True, generator=g(s)),
        "weighted": lambda s: DataLoader(
            dataset, 16, sampler=WeightedRandomSampler([1.0] * 96, 40, generator=g(s))
        ),
        "batch sampler": lambda s: DataLoader(
            dataset, batch_sampler=BatchSampler(RandomSampler(dataset, generator=g(s)), 10, False)
        ),
    }


@pytest.mark.parametrize("kind", loaders(DS))
def test_a_loader_gives_the_samples_that_it_gives_by_itself(kind):
    for seed in (1, 2):
        own, used = Seen(), Seen()
        list(loaders(own)[kind](seed))
        handler = make()
        handler.set_train_loader(loaders(used)[kind](seed))
        train(handler)
        assert used.seen == own.seen


@pytest.mark.parametrize("kind", loaders(DS))
def test_a_loader_of_its_own_order_resumes_within_an_epoch(tmp_path, kind):
    def job(folder, stop):
        handler = make()
        handler.set_train_loader(loaders(DS)[kind](5))
        handler.add_callback(FailAt(stop))
        handler.auto_save(interval=-1, save_path=tmp_path / folder, resume="auto")
        return handler

    never = train(job("never", 0), 2)
    with pytest.raises(KeyError):
        train(job("c", 2), 2)
    assert same(weights(train(job("c", 0), 2)), weights(never))


class Epochs:
    def __init__(self) -> None:
        self.epoch, self.seen = -1, []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Batches(Epochs):
    def __len__(self) -> int:
        return 6

    def __iter__(self):
        self.seen.append(self.epoch)
        return iter([list(range(16 * i, 16 * i + 16)) for i in range(6)])


class Stream(Epochs, IterableDataset):
    def __iter__(self):
        self.seen.append(self.epoch)
        return zip(X, Y, strict=True)


class OfEpochs(Epochs, Dataset):
    def __getitem__(self, index):
        return DS[index]


def test_set_epoch_is_called_wherever_it_exists():
    batches, stream = Batches(), Stream()
    handler = make()
    handler.set_train_loader(DS, batch_sampler=batches)
    handler.set_val_loader(stream, batch_size=16)
    train(handler, 2)
    assert (batches.seen, stream.seen) == ([0, 1], [0, 1])
    inner = OfEpochs()
    handler.set_train_loader(ConcatDataset([Subset(inner, range(32)), DS]), batch_size=16)
    train(handler)
    assert inner.epoch == 2


class Mine(DataLoader):
    pass


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(DS, 16, sampler=SubsetRandomSampler(range(10))),
        lambda: DataLoader(Stream(), 16),
        lambda: Mine(DS, 16),
        lambda: types.SimpleNamespace(__iter__=None) and [(X[:8], Y[:8]), (X[8:16], Y[8:16])],
    ],
)
def test_validation_takes_what_training_takes(loader):
    handler = make()
    if isinstance(loader(), list):
        handler.set_val_loader(DataLoader(loader(), batch_size=None))
    else:
        handler.set_val_loader(loader())
    assert train(handler).history["val_loss"][0] > 0


def test_a_loss_that_a_loader_of_tensors_gives():
    """A list of batches is data too; rates of all groups are in the history."""
    handler = NNHandler(nn.Linear, in_features=4, out_features=3)
    handler.set_optimizer(torch.optim.SGD, lr=0.1, groups={"bias": {"lr": 0.2}})
    handler.set_loss_fn(nn.CrossEntropyLoss())
    handler.set_train_loader([TensorDataset(*data(8).tensors)[:]] * 2)
    handler.add_metric("seen", OwnObject())
    train(handler)
    assert (handler.history["lr"], handler.history["lr_1"]) == ([0.1], [0.2])
    assert handler.history["seen"] == [16.0]


class StreamOfSamples(IterableDataset):
    def __init__(self, count: int = 48) -> None:
        self.inner = data(count)

    def __iter__(self):
        return (self.inner[index] for index in range(len(self.inner)))


def test_a_stream_of_samples_resumes_within_an_epoch(tmp_path):
    handler = a_handler()
    handler.set_train_loader(StreamOfSamples(), batch_size=8)
    handler.auto_save(save_path=tmp_path, every_steps=4)
    handler.train(1, progress_bar=False)
    resumed = with_data(NNHandler.load(tmp_path / "step4", confirm=True))
    resumed.set_train_loader(StreamOfSamples(), batch_size=8)
    resumed.train(1, progress_bar=False)
    assert same(weights(resumed), weights(handler))
    assert resumed.history == handler.history
    handler.set_val_loader(StreamOfSamples(), batch_size=8)  # streams validate too


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
