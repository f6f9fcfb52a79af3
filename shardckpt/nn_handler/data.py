"""Which samples a rank sees, in which order, from any position of an epoch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from shardckpt.errors import StateError
from shardckpt.nn_handler.parallel import Layout
from shardckpt.nn_handler.random_state import set_random_state

__all__ = ["Position", "TrainData", "ValData"]


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
            order = torch.randperm(self.length, generator=generator).tolist()
        rest = order[self.start :]
        while rest and len(rest) % self.places:
            rest += rest[: self.places - len(rest) % self.places]
        return iter(rest[self.place :: self.places])

    def __len__(self) -> int:
        return math.ceil(max(self.length - self.start, 0) / self.places)


class TrainData:
    """What to train on: a Dataset with a DataLoader's options, or a DataLoader.

    A dataset that has an order is divided among the ranks, and goes on from any position. A
    loader with a sampler of its own, and a dataset that is only iterated, are used as they are:
    their ranks divide the data themselves, and to find a position again their batches are
    drawn and dropped, with the random numbers of the epoch's beginning.
    """

    def __init__(
        self, data: Dataset[Any] | DataLoader[Any], options: dict[str, Any], layout: Layout
    ) -> None:
        dataset, options = take_apart(data, options)
        self.sampler: EpochSampler | None = None
        self.layout = layout
        own = "sampler" in options or options.get("batch_sampler") is not None
        if own or not _has_order(dataset):
            self.loader = data if isinstance(data, DataLoader) else DataLoader(dataset, **options)
            return
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

    def batches(self, epoch: int, position: Position) -> Iterator[Any]:
        """The batches of an epoch (counted from 0) from a position on."""
        if self.sampler is not None:
            self.sampler.seed = position.seed + epoch
            self.sampler.start = position.samples
            cast(torch.Generator, self.loader.generator).manual_seed(position.seed + epoch)
            return iter(self.loader)
        if hasattr(self.loader.sampler, "set_epoch"):
            self.loader.sampler.set_epoch(epoch)
        if position.batches and position.random is not None:
            set_random_state(position.random)
        found = iter(self.loader)
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
)


def take_apart(
    data: Dataset[Any] | DataLoader[Any], options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The dataset and the options of a DataLoader for it, copied."""
    if not isinstance(data, DataLoader):
        options = dict(options)
        options.pop("generator", None)
        return data, options
    if options:
        raise StateError(
            "A DataLoader was given together with options for one",
            actual=", ".join(options),
            remedy="give a Dataset with options, or a DataLoader without",
        )
    found = {name: getattr(data, name) for name in _KEPT}
    if found["batch_size"] is None or type(data) is not DataLoader:
        return data.dataset, {**found, "batch_sampler": data.batch_sampler or data}
    if type(data.sampler) not in (RandomSampler, SequentialSampler):
        return data.dataset, {**found, "sampler": data.sampler}
    return data.dataset, {**found, "shuffle": isinstance(data.sampler, RandomSampler)}


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
    """What to validate on: every sample of a Dataset on one rank, once. `counted`: so many of
    the loader's batches count."""

    def __init__(
        self, data: Dataset[Any] | DataLoader[Any], options: dict[str, Any], layout: Layout
    ) -> None:
        dataset, options = take_apart(data, options)
        batch_size = options.pop("batch_size", 1)
        for name in ("shuffle", "drop_last"):
            options.pop(name, None)
        own = options.pop("sampler", None) or options.pop("batch_sampler", None)
        if own is not None or not _has_order(dataset) or len(dataset) == 0:
            raise StateError(
                "A validation set needs samples, a length and an order",
                expected="a Dataset with __getitem__ and __len__, which is not 0",
                actual=type(dataset).__name__,
                remedy="give the Dataset itself",
            )
        batches = _EveryNth(len(dataset), batch_size, layout)
        self.counted = batches.counted
        self.loader: DataLoader[Any] = DataLoader(
            cast(Dataset[Any], dataset),
            batch_sampler=batches,
            generator=torch.Generator().manual_seed(0),
            **options,
        )
