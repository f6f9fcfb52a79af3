"""The outputs of a model for a data set, gathered from all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from shardckpt.nn_handler.batch import (
    Several,
    binds,
    call_model,
    concatenated_batches,
    is_column,
    kept_outputs,
    like,
    to_device,
)
from shardckpt.nn_handler.data import ValData
from shardckpt.nn_handler.parallel import gathered, largest
from shardckpt.nn_handler.training_state import TrainingState
from shardckpt.nn_handler.validation import each_batch

__all__ = ["is_data", "predictions"]


def is_data(value: Any) -> bool:
    """Whether a value is a source of batches, and not itself a batch."""
    return isinstance(value, (Dataset, DataLoader, Iterator)) or (
        hasattr(value, "__iter__") and hasattr(value, "dataset")
    )


def predictions(handler: TrainingState, data: ValData) -> Any:
    """Return the outputs for all of the data, concatenated on the CPU. Collective."""
    found: list[Any] = []

    def act(batch: Any, counts: bool) -> None:
        inputs = to_device(_inputs(batch, handler.module), handler.device)
        outputs = kept_outputs(call_model(handler.model, inputs, handler.module))
        if counts:
            found.append(outputs)

    each_batch(
        data,
        handler.epoch,
        act,
        agree=lambda more: largest([int(more)])[0],
    )
    own = concatenated_batches(found) if found else None
    there = [outputs for outputs in gathered(own, data.layout) if outputs is not None]
    if data.length is None or len(there) == 1:
        return concatenated_batches(there)
    return _interleaved(there, data.length)


def _inputs(batch: Any, module: nn.Module) -> Any:
    """Return the inputs of a batch, without its last item if that is likely the targets."""
    if not isinstance(batch, (tuple, list)):
        return batch
    nested = isinstance(batch[0], (tuple, list, Mapping))  # (inputs, targets)
    takes_all, takes_most = binds(module, batch), binds(module, batch[:-1])
    if len(batch) == 2 and takes_all and not takes_most and not nested:
        return Several(batch)
    if len(batch) > 2 and takes_most:
        return Several(batch[:-1])
    return batch[0] if len(batch) in (1, 2) else batch


def _interleaved(parts: list[Any], length: int) -> Any:
    """Return the outputs of all ranks, whose samples alternate, in the order of the samples."""
    outputs = concatenated_batches(parts)
    places = len(parts)
    order = [index for place in range(places) for index in range(place, length, places)]
    back = torch.empty(length, dtype=torch.int64, device="cpu")
    back[torch.tensor(order, device="cpu")] = torch.arange(length, device="cpu")
    return _taken(outputs, back)


def _taken(value: Any, order: torch.Tensor) -> Any:
    """Return the items of a value in an order. A value for each batch is returned unchanged."""
    if isinstance(value, torch.Tensor):
        return value[order] if len(value) == len(order) else value
    if is_column(value):
        return [value[at] for at in order.tolist()]
    if isinstance(value, Mapping):
        return like(value, {key: _taken(item, order) for key, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(_taken(item, order) for item in value)
    if isinstance(value, (list, tuple)):
        return type(value)(_taken(item, order) for item in value)
    return value
