"""Data in the forms that users pass: its order, and its position within an epoch."""

from __future__ import annotations

import types
from types import SimpleNamespace

import numpy as np
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
from shardckpt.errors import StateError
from shardckpt.nn_handler.data import (
    EpochSampler,
    Position,
    TrainData,
    ValData,
    dataset_and_options,
    set_epoch,
)
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


def rank(place: int, places: int = 1) -> SimpleNamespace:
    """The layout of one rank among several."""
    return SimpleNamespace(data=(place, places))


def samples(places: int, *, length: int = 10, start: int = 0, shuffle: bool = False) -> list[list]:
    """The samples of each rank."""
    found = []
    for place in range(places):
        sampler = EpochSampler(length, shuffle=shuffle, layout=rank(place, places))
        sampler.start, sampler.seed = start, 3
        found.append(list(sampler))
        assert len(found[-1]) == len(sampler)
    return found


def test_ranks_take_the_samples_of_an_epoch_in_turns():
    assert samples(1) == [list(range(10))]
    assert samples(2) == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    assert samples(3) == [[0, 3, 6, 9], [1, 4, 7, 0], [2, 5, 8, 1]]  # the last turn repeats some


def test_any_number_of_ranks_goes_on_with_the_rest_of_an_epoch():
    (order,) = samples(1, shuffle=True)
    assert sorted(order) == list(range(10))
    for places in (1, 2, 3):
        rest = samples(places, start=6, shuffle=True)
        turns = [sample for turn in zip(*rest, strict=True) for sample in turn]
        assert turns[:4] == order[6:]
    assert samples(3, start=9) == [[9], [9], [9]]
    assert samples(2, start=10) == samples(2, start=11) == [[], []]


def test_the_order_depends_on_the_seed_and_the_epoch():
    def order(seed: int, epoch: int) -> list[int]:
        found = TrainData(range(20), {"batch_size": 20, "shuffle": True}, rank(0))
        (batch,) = found.batches(epoch, Position(seed=seed))
        return batch.tolist()

    assert order(3, 1) == order(4, 0) != order(3, 0)


class Numbers(Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):
        return torch.tensor(index)


def test_a_position_counts_the_samples_of_all_ranks():
    found = TrainData(Numbers(10), {"batch_size": 2}, rank(1, 2))
    assert found.even
    position = Position()
    found.advance(position, 2)
    assert (position.samples, position.batches, position.length) == (8, 2, 10)
    found.advance(position, 1)
    assert (position.samples, position.batches) == (10, 3)
    assert found.fits(position)
    assert found.fits(Position())
    assert not found.fits(Position(length=11))


def test_a_stream_counts_its_batches_alone():
    found = TrainData([torch.ones(1), torch.ones(1)], {}, rank(0))
    position = Position()
    found.advance(position, 2)
    assert (position.samples, position.batches, position.length) == (0, 2, 0)
    assert not found.even
    assert found.fits(Position(length=11))


def test_the_batches_before_a_position_are_dropped_with_the_random_numbers_of_their_epoch():
    class Draws(IterableDataset):
        def __iter__(self):
            return (torch.rand(1).item() for _ in range(4))

    found = TrainData(DataLoader(Draws(), batch_size=None), {}, rank(0))
    random = found.random_now()
    expected = list(found.batches(0, Position()))
    position = Position(batches=3, random=random)
    assert list(found.batches(0, position)) == expected[3:]


def test_the_generators_of_a_loader_are_part_of_the_random_numbers():
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(Numbers(8), 8, sampler=RandomSampler(Numbers(8), generator=generator))
    found = TrainData(loader, {}, rank(0))
    before = found.random_now()
    assert len(before["loader"]) == 1
    (first,) = found.batches(0, Position())
    found.set_random(before)
    (again,) = found.batches(0, Position())
    assert torch.equal(first, again)


def test_a_plain_loader_is_made_again_with_its_options():
    loader = DataLoader(Numbers(8), 3, shuffle=True, drop_last=True)
    dataset, options = dataset_and_options(loader, {})
    assert dataset is loader.dataset
    assert (options["batch_size"], options["shuffle"], options["drop_last"]) == (3, True, True)
    assert dataset_and_options(DataLoader(Numbers(8), generator=torch.Generator()), {}) is None
    assert dataset_and_options(Numbers(8), {"sampler": [1, 2]}) is None
    assert dataset_and_options([1, 2], {}) is None  # batches
    assert dataset_and_options([1, 2], {"batch_size": 2}) == ([1, 2], {"batch_size": 2})


def test_loaders_that_do_not_divide_their_data_are_warned_of():
    sampler = torch.utils.data.DistributedSampler(Numbers(8), num_replicas=2, rank=0)
    TrainData(DataLoader(Numbers(8), sampler=sampler), {}, rank(0, 2))
    TrainData(DataLoader(Stream(), 4), {}, rank(0, 2))
    with pytest.warns(UserWarning, match="all ranks use the same samples"):
        TrainData([torch.ones(1)], {}, rank(0, 2))


@pytest.mark.parametrize(
    ("given", "options", "text", "actual"),
    [
        (Numbers, {}, "Invalid data for a loader", "the class Numbers"),
        ("data", {}, "Invalid data for a loader", "'data'"),
        (3, {}, "Invalid data for a loader", "3"),
        (DataLoader(Numbers(3)), {"batch_size": 2}, "A DataLoader was given", "batch_size"),
        (iter([1]), {"batch_size": 2}, "iterator was given", "batch_size"),
        ({"train": 1, "val": 2}, {}, "A dict was given", "a dict of train, val"),
        (
            (np.ones((4, 2)), np.ones(4)),
            {"batch_size": 2},
            "Tensors were given",
            "2 tensors of the shapes [(4, 2), (4,)]",
        ),
        (Numbers(3), {"bath_size": 2}, "does not take these options", "TypeError"),
        (Numbers(3), {"batch_size": -1}, "does not take these options", "ValueError"),
        (Numbers(3), {"batch_size": None}, "needs batches", "None"),
        (Numbers(3), {"batch_size": 4, "drop_last": True}, "has no batch", "3 samples, 1 ranks"),
    ],
)
def test_wrong_data_are_refused(given, options, text, actual):
    with pytest.raises(StateError, match=text) as caught:
        TrainData(given, options, rank(0))
    assert str(caught.value.actual).startswith(actual)


def batches_of(data: ValData) -> list[list[int]]:
    return [batch.tolist() for batch in data.loader]


def test_each_sample_of_validation_is_used_by_one_rank():
    found = [ValData(Numbers(7), {"batch_size": 2}, rank(place, 3)) for place in range(3)]
    assert [batches_of(one) for one in found] == [[[0, 3], [6]], [[1, 4], [0]], [[2, 5], [0]]]
    assert [one.counted for one in found] == [2, 1, 1]  # the batches of sample 0 do not count
    assert found[0].length == 7


def test_validation_uses_all_samples_in_order():
    options = {"batch_size": 3, "shuffle": True, "drop_last": True}
    loader = DataLoader(Numbers(5), **options)
    for found in (ValData(Numbers(5), options, rank(0)), ValData(loader, {}, rank(0))):
        assert batches_of(found) == [[0, 1, 2], [3, 4]]


def test_an_empty_set_to_validate_on_is_refused():
    with pytest.raises(StateError, match="validation set is empty") as caught:
        ValData(Numbers(0), {"batch_size": 2}, rank(0))
    assert caught.value.actual == "a Numbers of length 0"


def test_other_loaders_of_validation_count_all_batches():
    found = ValData([torch.ones(1)] * 2, {}, rank(0))
    assert (found.counted, found.length, len(found.loader)) == (None, None, 2)
    one_by_one = ValData(Numbers(3), {"batch_size": None}, rank(0))
    assert (one_by_one.counted, list(one_by_one.loader)) == (None, [0, 1, 2])


def test_the_epoch_is_set_once_on_each_part():
    seen = []
    part = SimpleNamespace(set_epoch=seen.append)
    inner = SimpleNamespace(datasets=[part, SimpleNamespace(dataset=part), None])
    set_epoch(SimpleNamespace(dataset=inner, sampler=part, batch_sampler=3), 5)
    assert seen == [5]
