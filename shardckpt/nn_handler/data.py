"""The samples of each rank, in their order, from any position of an epoch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
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
from shardckpt.state.random_state import random_state, set_random_state

__all__ = ["Position", "TrainData", "ValData", "set_epoch"]


@dataclass(slots=True, kw_only=True)
class Position:
    """The position of training in an epoch.

    Attributes:
        samples: The number of samples that all ranks together have used.
        batches: The number of batches that this rank has used.
        length: The length of the dataset; 0 if it is unknown.
        seed: The seed of the order.
        random: The state of the generators at the start of the epoch.
    """

    samples: int = 0
    batches: int = 0
    length: int = 0
    seed: int = 0
    random: dict[str, Any] | None = None


class EpochSampler(Sampler[int]):
    """The part of an epoch's order that this rank uses, from a position on.

    The order depends only on the seed and the epoch. Ranks take samples from it in turn. So the
    samples that were used are always the first ones of the order, and any number of ranks can
    continue. The last turn repeats samples if there are too few for all ranks.
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
    """The data to train on; see NNHandler.set_train_loader.

    A dataset, and the dataset of a plain DataLoader, is divided among the ranks, and continues from
    any position. A DataLoader is plain if it uses each sample once, in order or shuffled. All other
    loaders are used as they are: those with a sampler, a batch sampler or a generator of their own,
    those of a subclass, streams. They must divide the data among the ranks themselves. To find a
    position again, their batches are drawn and dropped, with the random numbers of the start of the
    epoch.
    """

    def __init__(self, data: Any, options: dict[str, Any], layout: Layout) -> None:
        self.sampler: EpochSampler | None = None
        self.layout = layout
        taken = dataset_and_options(data, options)
        if taken is None:
            self.loader = unchanged_loader(data, options, layout)
            return
        dataset, options = taken
        if options.get("batch_size", 1) is None:
            raise StateError("A train loader needs batches", remedy="give batch_size")
        shuffle = bool(options.pop("shuffle", False))
        self.sampler = EpochSampler(len(dataset), shuffle=shuffle, layout=layout)
        # A loader draws a number when it is iterated. Its own generator keeps this from changing
        # the random numbers of training.
        self.loader = create_loader(
            dataset, sampler=self.sampler, generator=torch.Generator(), **options
        )
        if len(self.loader) == 0:
            raise StateError(
                "A train loader has no batch",
                actual=f"{len(dataset)} samples, {self.sampler.places} ranks, {options}",
                remedy="give more samples, a smaller batch_size, or leave out drop_last",
            )

    def fits(self, position: Position) -> bool:
        """Whether the epoch of a position can continue: the dataset has the same length."""
        return self.sampler is None or position.length in (0, self.sampler.length)

    def random_now(self) -> dict[str, Any]:
        """Return the state of all generators on which the batches of an epoch depend."""
        generators = _generators(self.loader) if self.sampler is None else []
        own = {"loader": [g.get_state() for g in generators]} if generators else {}
        return {**random_state(), **own}

    def set_random(self, state: dict[str, Any]) -> None:
        """Restore the state that random_now returned."""
        set_random_state(state)
        for generator, own in zip(_generators(self.loader), state.get("loader", ()), strict=False):
            generator.set_state(own)

    def batches(self, epoch: int, position: Position) -> Iterator[Any]:
        """Return the batches of an epoch, counted from 0, from a position on."""
        set_epoch(self.loader, epoch)
        if self.sampler is not None:
            self.sampler.seed = position.seed + epoch
            self.sampler.start = position.samples
            cast(torch.Generator, self.loader.generator).manual_seed(position.seed + epoch)
            return iter(self.loader)
        if position.batches and position.random is not None:
            self.set_random(position.random)
        found: Iterator[Any] = iter(self.loader)
        for _ in itertools.islice(found, position.batches):
            pass
        return found

    def advance(self, position: Position, batches: int) -> None:
        """Note that each rank has used so many more batches."""
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


def create_loader(dataset: Any, **options: Any) -> DataLoader[Any]:
    """Create a DataLoader. Raises StateError for options that it does not take."""
    try:
        return DataLoader(dataset, **options)
    except (TypeError, ValueError) as error:
        raise StateError(
            "A DataLoader does not take these options",
            expected="the arguments of torch.utils.data.DataLoader",
            actual=f"{type(error).__name__}: {error}",
        ) from error


def unchanged_loader(data: Any, options: dict[str, Any], layout: Layout) -> Any:
    """Return a loader that is used unchanged. Warns if the ranks would use the same samples."""
    loader = data
    if _is_batches(data, options):
        loader = data
    elif isinstance(data, Dataset) or hasattr(data, "__getitem__"):
        loader = create_loader(data, **options)
    elif options:
        raise _with_options(data, options)
    if layout.data[1] > 1 and not any(map(_divides, _parts(loader))):
        warn(
            f"{type(loader).__name__} is used as it is on each of {layout.data[1]} ranks. Unless "
            "its data or its sampler differ by rank, all ranks use the same samples. Pass a "
            "Dataset, or a DistributedSampler, to divide them"
        )
    return loader


def _divides(part: Any) -> bool:
    return hasattr(part, "num_replicas") or isinstance(part, IterableDataset)


def set_epoch(loader: Any, epoch: int) -> None:
    """Call set_epoch on every part of a loader that has it."""
    for part in _parts(loader):
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)


def _parts(loader: Any) -> list[Any]:
    """Return a loader with its samplers, its datasets and the datasets in these, each once."""
    found: dict[int, Any] = {}
    waiting = [loader]
    while waiting:
        part = waiting.pop(0)
        if part is None or id(part) in found:
            continue
        found[id(part)] = part
        waiting += [getattr(part, name, None) for name in ("dataset", "sampler", "batch_sampler")]
        several = getattr(part, "datasets", ())  # of a ConcatDataset or a ChainDataset
        waiting += several if isinstance(several, (list, tuple)) else ()
    return list(found.values())


def _generators(loader: Any) -> list[torch.Generator]:
    """Return the generators of a loader and its samplers, each once."""
    owned = [getattr(part, "generator", None) for part in _parts(loader)]
    return list({id(g): g for g in owned if isinstance(g, torch.Generator)}.values())


def _has_order(dataset: Any) -> bool:
    # every Dataset has a __getitem__, which may only raise
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


def dataset_and_options(data: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Return the dataset of a plain loader, and the options to create the loader again.

    Returns None for any other loader.
    """
    _check_data(data, options)
    if _is_batches(data, options):
        return None
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


def _is_batches(data: Any, options: dict[str, Any]) -> bool:
    """Whether data is a list of batches, rather than one of samples for a DataLoader."""
    return type(data) in (list, tuple) and not options


def _check_data(data: Any, options: dict[str, Any]) -> None:
    if isinstance(data, DataLoader) and options:
        raise _with_options(data, options)
    if isinstance(data, (type, str, bytes)) or not (
        isinstance(data, Dataset) or hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    ):
        raise StateError(
            "Invalid data for a loader",
            expected="a Dataset, a DataLoader, or an iterable of batches",
            actual=f"the class {data.__name__}" if isinstance(data, type) else repr(data)[:200],
            remedy="give one, as in set_train_loader(dataset, batch_size=32)",
        )
    if isinstance(data, Mapping) and not isinstance(data, Dataset):
        raise StateError(
            "A dict was given, where a dataset or a loader was expected",
            actual=f"a {type(data).__name__} of {', '.join(map(str, data))}"[:200],
            remedy="give one of its datasets, or a Dataset whose samples are dicts",
        )
    if type(data) in (list, tuple) and _are_columns(data, options):
        raise StateError(
            "Tensors were given, where a dataset was expected",
            expected="a Dataset, a list of samples with batch_size=, or a list of batches",
            actual=f"{len(data)} tensors of the shapes {[tuple(t.shape) for t in data]}",
            remedy="give TensorDataset(inputs, targets), of tensors; torch.as_tensor makes them "
            "from arrays",
        )


def _are_columns(data: Any, options: dict[str, Any]) -> bool:
    """Whether data are the inputs and the targets of all samples, as Keras takes them.

    Such tensors have one length. As batches they would have one number of dimensions, and as
    samples to collate one shape.
    """
    tensors = all(isinstance(part, (torch.Tensor, np.ndarray)) and part.ndim for part in data)
    if len(data) < 2 or not tensors or len({len(part) for part in data}) > 1:
        return False
    shapes = {tuple(part.shape) for part in data}
    collated = options.get("batch_size", 1) != 1 and options.get("collate_fn") is None
    return len({len(shape) for shape in shapes}) > 1 or (collated and len(shapes) > 1)


def _with_options(data: Any, options: dict[str, Any]) -> StateError:
    return StateError(
        f"A {type(data).__name__} was given together with options for a DataLoader",
        actual=", ".join(options),
        remedy="give a Dataset with options, or a loader without",
    )


class _EveryNth(Sampler[list[int]]):
    """Batches of the samples place, place + places, ...: one rank uses each sample, once.

    The forward pass of a sharded model needs every rank. So a rank with fewer batches gets one more
    of sample 0, which does not count.
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
    """The data to validate or predict on; see NNHandler.set_val_loader.

    Attributes:
        counted: The number of batches of the loader that count; None if all do.
        length: The number of samples, if they are divided among the ranks.
    """

    def __init__(self, data: Any, options: dict[str, Any], layout: Layout) -> None:
        self.layout = layout
        self.counted: int | None = None
        self.length: int | None = None
        taken = dataset_and_options(data, options)
        if taken is None or taken[1].get("batch_size", 1) is None:
            self.loader = unchanged_loader(data, options, layout)
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
        create_loader(dataset, batch_size=batch_size, **options)  # raises for invalid options
        for name in ("shuffle", "drop_last"):
            options.pop(name, None)
        batches = _EveryNth(len(dataset), batch_size, layout)
        self.counted, self.length = batches.counted, len(dataset)
        self.loader = create_loader(
            dataset,
            batch_sampler=batches,
            generator=torch.Generator().manual_seed(0),
            **options,
        )
