"""The position of torchdata's StatefulDataLoader in a checkpoint.

    state = {"model": model, "loader": loader_position(loader)}

`shardckpt.save`, `shardckpt.load` and CheckpointManager take it. Tested with torchdata 0.11.
"""

from __future__ import annotations

import copy
from typing import Any

from torch.utils.data import BatchSampler, DistributedSampler, IterableDataset

from shardckpt.errors import StateError
from shardckpt.state.markers import PerRank

__all__ = ["loader_position"]

_REMEDY = "resume on as many ranks as saved; or leave the loader out and begin the epoch anew"


def loader_position(loader: Any) -> PerRank:
    """Mark a StatefulDataLoader as an entry of a state. Not collective.

    A load on the same number of ranks gives each rank its own position. On another number of ranks,
    a loader of a map-style dataset with a DistributedSampler or StatefulDistributedSampler, without
    worker processes, continues after the samples that all ranks together have taken. They must be a
    whole number of steps of the new ranks. Every other loader is refused: its position holds state
    that only the same rank can take.

    Args:
        loader: The StatefulDataLoader of this rank.

    Returns:
        The entry. A load on another number of ranks raises StateError if it refuses the loader.

    Example:
        >>> import torch
        >>> from torchdata.stateful_dataloader import StatefulDataLoader
        >>> loader = StatefulDataLoader(torch.arange(8), batch_size=2)
        >>> report = shardckpt.save({"loader": loader_position(loader)}, "run/step-1")
    """
    entry = _Loader(loader)
    return PerRank(entry, entry.take)


class _Loader:
    """A loader as an object with a state: its position, and how many samples a step takes."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def step(self) -> dict[str, int | None]:
        """Return the samples of a batch on one rank, and the ranks that divide the batches."""
        batches = self.loader.batch_sampler
        sampler = getattr(batches, "sampler", self.loader.sampler)
        return {
            "batch_size": getattr(batches, "batch_size", self.loader.batch_size),
            "replicas": getattr(sampler, "num_replicas", None),
        }

    def divides(self) -> bool:
        """Whether the samples of a step are a known part of those of all ranks. Other samplers and
        batch samplers may divide or order them in another way."""
        from torchdata.stateful_dataloader import sampler as stateful

        batches = self.loader.batch_sampler
        sampler = getattr(batches, "sampler", self.loader.sampler)
        known = (DistributedSampler.__iter__, stateful.StatefulDistributedSampler.__iter__)
        batched = (BatchSampler.__iter__, stateful.BatchSampler.__iter__)
        return type(sampler).__iter__ in known and (
            batches is None or type(batches).__iter__ in batched
        )

    def samples(self) -> int:
        """Return how many samples this rank takes in an epoch."""
        return len(getattr(self.loader.batch_sampler, "sampler", self.loader.sampler))

    def state_dict(self) -> dict[str, Any]:
        """Return the position of this rank."""
        return {**self.step(), "position": self.loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position of this rank."""
        if self.step() != {key: state[key] for key in self.step()}:
            self.take([state])
        else:
            self.loader.load_state_dict(state["position"])

    def take(self, saved: list[dict[str, Any]]) -> _Loader:
        """Continue where the ranks that saved have stopped together."""
        iterable = isinstance(self.loader.dataset, IterableDataset)
        position = _moved(saved, self.step(), iterable=iterable, divides=self.divides())
        sampler = position.get("_sampler_iter_state") or {}
        if "samples_yielded" in sampler:  # the last batch may be smaller
            sampler["samples_yielded"] = min(sampler["samples_yielded"], self.samples())
        self.loader.load_state_dict(position)
        return self


def _moved(
    saved: list[dict[str, Any]], step: dict[str, int | None], *, iterable: bool, divides: bool
) -> dict[str, Any]:
    """Return the position of a rank that takes `step`, from those of all ranks that saved."""
    position: dict[str, Any] = copy.deepcopy(saved[0]["position"])
    sampler = position.get("_sampler_iter_state") or {}
    taken = {each["position"].get("_num_yielded") for each in saved}
    divided = divides and None not in (step["replicas"], saved[0]["replicas"])
    reasons = {
        "worker processes": "_snapshot" in position,
        "an iterable dataset": iterable,
        "a dataset with a state": position.get("_dataset_state") is not None,
        "a sampler with a state of its own": "sampler_iter_state" in sampler,
        "a sampler or batch sampler other than those of torch and torchdata": not divided,
        "ranks that have taken different numbers of batches": len(taken) > 1,
    }
    for reason, applies in reasons.items():
        if applies:
            raise _refused(len(saved), step, reason)
    before = (saved[0]["batch_size"] or 1) * saved[0]["replicas"]
    after = (step["batch_size"] or 1) * (step["replicas"] or 1)
    samples = position["_num_yielded"] * before
    if samples % after:
        raise _refused(len(saved), step, f"{samples} samples taken, and {after} for each new step")
    batches = samples // after
    position["_num_yielded"] = position["_sampler_iter_yielded"] = batches
    if "samples_yielded" in sampler:
        sampler["samples_yielded"] = batches * (step["batch_size"] or 1)
    if "yielded" in sampler.get("sampler_state", {}):
        sampler["sampler_state"]["yielded"] = batches * (step["batch_size"] or 1)
    return position


def _refused(ranks: int, step: dict[str, int | None], reason: str) -> StateError:
    return StateError(
        "The position of a StatefulDataLoader does not fit these ranks",
        expected=f"the loader as {ranks} ranks saved it",
        actual=f"{reason}; batch_size={step['batch_size']}, num_replicas={step['replicas']}",
        remedy=_REMEDY,
    )
