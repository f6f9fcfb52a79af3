"""The outputs of a model for a whole data set, over all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from shardckpt.errors import StateError
from shardckpt.nn_handler.batch import call_model, to_device
from shardckpt.nn_handler.data import ValData
from shardckpt.nn_handler.parallel import largest
from shardckpt.nn_handler.training_state import TrainingState
from shardckpt.nn_handler.validation import each_batch

__all__ = ["is_data", "predictions"]


def is_data(value: Any) -> bool:
    """Whether a value is data to draw batches from, and not a batch."""
    return isinstance(value, (Dataset, DataLoader)) or (
        hasattr(value, "__iter__") and hasattr(value, "dataset")
    )


def predictions(handler: TrainingState, data: ValData) -> Any:
    """The outputs for all of the data, one after another on the CPU; collective."""
    found: list[Any] = []

    def act(batch: Any, counts: bool) -> None:
        one = isinstance(batch, (tuple, list)) and len(batch) in (1, 2)
        inputs = to_device(batch[0] if one else batch, handler.device)
        outputs = to_device(call_model(handler.model, inputs, handler.module), torch.device("cpu"))
        if counts:
            found.append(outputs)

    each_batch(
        data,
        handler.epoch,
        act,
        agree=lambda more: largest([int(more)], handler.device)[0],
    )
    own = _joined(found) if found else None
    _, places = data.layout.data
    if places == 1:
        return own
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    if data.layout.mesh is not None:  # ranks that see the same data give the same outputs
        by_place: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(by_place, data.layout.data[0])
        every = [every[by_place.index(place)] for place in range(places)]
    there = [outputs for outputs in every if outputs is not None]
    return _joined(there) if data.length is None else _woven(there, data.length)


def _joined(parts: list[Any]) -> Any:
    """Outputs of several batches as one, along their first dimension."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat([part if part.dim() else part.reshape(1) for part in parts])
    if isinstance(first, Mapping):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple) and hasattr(first, "_make"):
        return first._make(_joined(list(items)) for items in zip(*parts, strict=True))
    if isinstance(first, (list, tuple)):
        return type(first)(_joined(list(items)) for items in zip(*parts, strict=True))
    if first is None:
        return None
    raise StateError(
        "The outputs of the model can't be joined",
        expected="tensors, or tuples, lists and dicts of them",
        actual=type(first).__name__,
        remedy="call predict with one batch at a time",
    )


def _woven(parts: list[Any], length: int) -> Any:
    """Outputs of ranks that took turns in the samples, in the order of the samples."""
    joined = _joined(parts)
    places = len(parts)
    order = [index for place in range(places) for index in range(place, length, places)]
    back = torch.empty(length, dtype=torch.int64, device="cpu")
    back[torch.tensor(order, device="cpu")] = torch.arange(length, device="cpu")
    return _taken(joined, back)


def _taken(value: Any, order: torch.Tensor) -> Any:
    if isinstance(value, torch.Tensor):
        return value[order]
    if isinstance(value, Mapping):
        return {key: _taken(item, order) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(_taken(item, order) for item in value)
    if isinstance(value, (list, tuple)):
        return type(value)(_taken(item, order) for item in value)
    return value
