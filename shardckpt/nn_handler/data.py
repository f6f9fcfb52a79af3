"""Which samples a rank sees, in which order, from any position of an epoch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from shardckpt.errors import StateError
from shardckpt.logs import warn
from shardckpt.nn_handler.parallel import Layout
from shardckpt.nn_handler.random_state import random_state, set_random_state

__all__ = ["Position", "TrainData", "ValData", "set_epoch"]


@dataclass(slots=True, kw_only=True)
class Position:
    """Where in an epoch training is: so many samples of the epoch's order seen by all ranks
    together, so many batches by this one, of a dataset of `length` (0: not known). `seed` makes the
    order; `random` are the generators as the epoch began."""

    samples: int = 0
    batches: int = 0
    length: int = 0
    seed: int = 0
    random: dict[str, Any] | None = None


class EpochSampler(Sampler[int]):
    """This rank's part of an epoch's order, from a position on.

    The order follows from seed and epoch alone. Ranks take turns in it, so what they have seen is
    always a beginning of the order, and any number of ranks can go on from there. The last turn
    repeats samples where there are too few for all ranks.
    """

    def __init__(self, length: int, *, shuffle: bool, layout: Layout) -> None:
        self.length = length
        self.shuffle = shuffle
        self.place, self.places = layout.data
        self.start = 0
        self.seed = 0

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.length))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(self.length, generator=generator, device="cpu").tolist()
        rest = order[self.start :]
        while rest and len(rest) % self.places:
            rest += rest[: self.places - len(rest) % self.places]
        return iter(rest[self.place :: self.places])

    def __len__(self) -> int:
        return math.ceil(max(self.length - self.start, 0) / self.places)


class TrainData:
    """What to train on: a Dataset with a DataLoader's options, a DataLoader, or any iterable of
    batches.

    A dataset is divided among the ranks, and goes on from any position. So is the one of a plain
    DataLoader, whose order is none or a shuffle of each sample once. Everything else is used as
    it is: a loader with a sampler, a batch sampler or a generator of its own, one of a subclass, a
    stream. Its ranks divide the data themselves, and to find a position again its batches are
    drawn and dropped, with the random numbers of the epoch's beginning.
    """

    def __init__(self, data: Any, options: dict[str, Any], layout: Layout) -> None:
        self.sampler: EpochSampler | None = None
        self.layout = layout
        taken = take_apart(data, options)
        if taken is None:
            self.loader = as_it_is(data, options, layout)
            return
        dataset, options = taken
        if options.get("batch_size", 1) is None:
            raise StateError("A train loader needs batches", remedy="give batch_size")
        shuffle = bool(options.pop("shuffle", False))
        self.sampler = EpochSampler(len(dataset), shuffle=shuffle, layout=layout)
        # Its own generator: a loader draws a number when it is iterated, which must not change
        # those that training sees.
        self.loader = DataLoader(
            dataset, sampler=self.sampler, generator=torch.Generator(), **options
        )
        if len(self.loader) == 0:
            raise StateError(
                "A train loader has no batch",
                actual=f"{len(dataset)} samples, {self.sampler.places} ranks, {options}",
                remedy="give more samples, a smaller batch_size, or leave out drop_last",
            )

    def fits(self, position: Position) -> bool:
        """Whether an epoch that was begun can be gone on with: not on other data."""
        return self.sampler is None or position.length in (0, self.sampler.length)

    def random_now(self) -> dict[str, Any]:
        """The state of every generator that an epoch's batches follow from."""
        generators = _generators(self.loader) if self.sampler is None else []
        own = {"loader": [g.get_state() for g in generators]} if generators else {}
        return {**random_state(), **own}

    def batches(self, epoch: int, position: Position) -> Iterator[Any]:
        """The batches of an epoch (counted from 0) from a position on."""
        set_epoch(self.loader, epoch)
        if self.sampler is not None:
            self.sampler.seed = position.seed + epoch
            self.sampler.start = position.samples
            cast(torch.Generator, self.loader.generator).manual_seed(position.seed + epoch)
            return iter(self.loader)
        if position.batches and position.random is not None:
            set_random_state(position.random)
            own = zip(_generators(self.loader), position.random.get("loader", ()), strict=False)
            for generator, state in own:
                generator.set_state(state)
        found: Iterator[Any] = iter(self.loader)
        for _ in itertools.islice(found, position.batches):
            pass
        return found

    def advance(self, position: Position, batches: int) -> None:
        """Note batches that this rank has seen, and each other one too."""
        position.batches += batches
        if self.sampler is not None:
            size = cast(int, self.loader.batch_size)
            seen = position.samples + batches * size * self.layout.data[1]
            position.samples = min(seen, self.sampler.length)
            position.length = self.sampler.length

    @property
    def even(self) -> bool:
        """Whether all ranks are known to have as many batches."""
        return self.sampler is not None


def as_it_is(data: Any, options: dict[str, Any], layout: Layout) -> Any:
    """A loader that is not taken apart; a warning where ranks would see the same samples."""
    loader = data
    if isinstance(data, Dataset) or hasattr(data, "__getitem__"):
        loader = DataLoader(data, **options)
    elif options:
        raise _with_options(data, options)
    if layout.data[1] > 1 and not any(map(_divides, _parts(loader))):
        warn(
            f"{type(loader).__name__} is used as it is on each of {layout.data[1]} ranks: unless "
            "its data or its sampler differ by rank, all of them see the same samples. Give a "
            "Dataset, or a DistributedSampler, to divide them"
        )
    return loader


def _divides(part: Any) -> bool:
    return hasattr(part, "num_replicas") or isinstance(part, IterableDataset)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the epoch to every part of a loader that wants to know it."""
    for part in _parts(loader):
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)


def _parts(loader: Any) -> list[Any]:
    """A loader with its dataset, sampler and batch sampler, each once."""
    inner = getattr(loader, "batch_sampler", None)
    parts = [loader, getattr(loader, "dataset", None), getattr(loader, "sampler", None)]
    parts += [inner, getattr(inner, "sampler", None)]
    found = {id(part): part for part in parts if part is not None}
    return list(found.values())


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators of a loader and its samplers, each once."""
    owned = [getattr(part, "generator", None) for part in _parts(loader)]
    return list({id(g): g for g in owned if isinstance(g, torch.Generator)}.values())


def _has_order(dataset: Any) -> bool:
    # every Dataset has a __getitem__, if only one that raises
    indexed = hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)
    return indexed and isinstance(dataset, Sized)


_KEPT = (
    "batch_size",
    "num_workers",
    "collate_fn",
    "pin_memory",
    "drop_last",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)


def take_apart(data: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """The dataset and the options of a DataLoader for it, whose order this module may make; None
    for what must be used as it is."""
    _check_data(data, options)
    if not isinstance(data, DataLoader):
        own = any(options.get(n) is not None for n in ("sampler", "batch_sampler", "generator"))
        return None if own or not _has_order(data) else (data, dict(options))
    sampler = data.sampler
    plain = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == len(sampler.data_source)
        and sampler.generator is None
    )
    whole = getattr(sampler, "data_source", None) is data.dataset
    inner: Any = data.batch_sampler
    batched = type(inner) is BatchSampler and inner.sampler is sampler
    usual = type(data) is DataLoader and data.generator is None and _has_order(data.dataset)
    if not (plain and whole and batched and usual):
        return None
    found = {name: getattr(data, name) for name in _KEPT if hasattr(data, name)}
    return data.dataset, {**found, "shuffle": type(sampler) is RandomSampler}


def _check_data(data: Any, options: dict[str, Any]) -> None:
    if isinstance(data, DataLoader) and options:
        raise _with_options(data, options)
    if isinstance(data, type) or not (
        isinstance(data, Dataset) or hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    ):
        raise StateError(
            "Invalid data for a loader",
            expected="a Dataset, a DataLoader, or an iterable of batches",
            actual=f"the class {data.__name__}" if isinstance(data, type) else repr(data)[:200],
            remedy="give one, as in set_train_loader(dataset, batch_size=32)",
        )


def _with_options(data: Any, options: dict[str, Any]) -> StateError:
    return StateError(
        f"A {type(data).__name__} was given together with options for a DataLoader",
        actual=", ".join(options),
        remedy="give a Dataset with options, or a loader without",
    )


class _EveryNth(Sampler[list[int]]):
    """Batches of the samples place, place + places, ...: each sample once over all ranks.

    Ranks that have a batch less than others get one more, of sample 0, which is not counted:
    a sharded model's forward needs every rank.
    """

    def __init__(self, length: int, batch_size: int, layout: Layout) -> None:
        place, places = layout.data
        own = range(place, length, places)
        self.batches = [list(own[at : at + batch_size]) for at in range(0, len(own), batch_size)]
        self.counted = len(self.batches)
        most = math.ceil(math.ceil(length / places) / batch_size)
        self.batches += [[0]] * (most - self.counted)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class ValData:
    """What to validate or predict on: every sample of a Dataset on one rank, once, or a loader as
    it is (see TrainData). `counted`: so many of the loader's batches count; None: all do.
    `length`: the number of samples where they are divided."""

    def __init__(self, data: Any, options: dict[str, Any], layout: Layout) -> None:
        self.layout = layout
        self.counted: int | None = None
        self.length: int | None = None
        taken = take_apart(data, options)
        if taken is None or taken[1].get("batch_size", 1) is None:
            self.loader = as_it_is(data, options, layout)
            return
        dataset, options = taken
        if len(dataset) == 0:
            raise StateError(
                "The validation set is empty",
                expected="at least one sample",
                actual=f"a {type(dataset).__name__} of length 0",
                remedy="give other data, or leave the validation loader out",
            )
        batch_size = options.pop("batch_size", 1)
        for name in ("shuffle", "drop_last"):
            options.pop(name, None)
        batches = _EveryNth(len(dataset), batch_size, layout)
        self.counted, self.length = batches.counted, len(dataset)
        self.loader = DataLoader(
            dataset,
            batch_sampler=batches,
            generator=torch.Generator().manual_seed(0),
            **options,
        )
