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
from shardckpt.nn_handler.random_state import random_state, set_random_state
from shardckpt.nn_handler.training_state import TrainingState

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
) -> dict[str, float]:
    """Loss and metrics over all ranks' samples; collective. Random numbers go on as if there had
    been no validation. `agree` tells the ranks whether any has a batch, before each one."""
    data = data or handler.val_data
    assert data is not None
    before = random_state()
    sums, training, handler.sums = EpochSums(handler, validation=True), handler.sums, None
    handler.sums = sums
    handler.model.eval()
    try:
        each_batch(
            data,
            handler.epoch,
            lambda batch, counts: _measure(handler, batch, counts, autocast, sums, guard),
            limit=limit,
            agree=agree,
        )
        return sums.means()
    finally:
        handler.train_mode()
        handler.sums = training
        set_random_state(before)


def _measure(
    handler: TrainingState, batch: Any, counts: bool, autocast: Any, sums: EpochSums, guard: Any
) -> None:
    result = forward(handler, batch, autocast)
    if counts and result is not None:
        guard(lambda: sums.add(result))


def each_batch(
    data: ValData,
    epoch: int,
    act: Callable[[Any, bool], None],
    *,
    limit: int | None = None,
    agree: Callable[[bool], int],
) -> None:
    """act(batch, whether it counts) for each batch of this rank. A rank that has no more goes on
    with its last one, which does not count, while others have some: a sharded model's forward
    needs every rank."""
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
                remedy="give a Dataset, whose samples are divided evenly",
            )
        counts = batch is not None and (data.counted is None or number < data.counted)
        last = last if batch is None else batch
        act(last, counts)
