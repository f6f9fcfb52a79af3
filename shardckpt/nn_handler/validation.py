"""Validation: the model in evaluation mode over all samples of a loader."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from shardckpt.errors import StateError
from shardckpt.nn_handler.batch import forward
from shardckpt.nn_handler.data import ValData, set_epoch
from shardckpt.nn_handler.epoch_metrics import EpochSums
from shardckpt.nn_handler.training_state import TrainingState
from shardckpt.state.random_state import random_state, set_random_state

__all__ = ["each_batch", "validate"]


@torch.no_grad()
def validate(
    handler: TrainingState,
    data: ValData | None = None,
    *,
    autocast: Any = None,
    limit: int | None = None,
    guard: Callable[[Callable[[], Any]], None],
    agree: Callable[[bool], int],
    on_batch: Callable[[Any, int], None] = lambda batch, number: None,
) -> dict[str, float]:
    """Return the loss and the metrics over the samples of all ranks. Collective.

    The random numbers of training do not change. `agree` is called before each batch, and returns
    whether any rank has one. `guard` calls a metric, which may fail on this rank alone.
    """
    data = data or handler.val_data
    assert data is not None
    before = random_state()
    sums, training, handler.sums = EpochSums(handler, validation=True), handler.sums, None
    handler.sums = sums
    numbers = itertools.count()

    def act(batch: Any, counts: bool) -> None:
        on_batch(batch, next(numbers))
        result = forward(handler, batch, autocast)
        if counts and result is not None:
            guard(lambda: sums.add(result))

    try:
        with handler.evaluating():
            each_batch(data, handler.epoch, act, limit=limit, agree=agree)
        return sums.means()
    finally:
        handler.sums = training
        set_random_state(before)


def each_batch(
    data: ValData,
    epoch: int,
    act: Callable[[Any, bool], None],
    *,
    limit: int | None = None,
    agree: Callable[[bool], int],
) -> None:
    """Call act(batch, whether it counts) for each batch of this rank.

    The forward pass of a sharded model needs every rank. So a rank without batches repeats its last
    one, which does not count, while others have some.
    """
    set_epoch(data.loader, epoch)
    batches = itertools.islice(data.loader, limit)
    last: Any = None
    for number in itertools.count():
        batch = next(batches, None)
        if not agree(batch is not None):
            return
        if batch is None and last is None:
            raise StateError(
                "This rank has no batch to validate on, while others have some",
                remedy="give a Dataset, whose samples are divided evenly among the ranks",
            )
        counts = batch is not None and (data.counted is None or number < data.counted)
        last = last if batch is None else batch
        act(last, counts)
