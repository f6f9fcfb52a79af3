"""One batch: to the device, through the model and the loss."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from shardckpt.errors import StateError

if TYPE_CHECKING:
    from shardckpt.nn_handler.handler import NNHandler

__all__ = ["forward", "to_device"]


def forward(handler: NNHandler, batch: Any, *, use_amp: bool) -> tuple[torch.Tensor, Any, Any]:
    """(loss, outputs, targets) of a batch, which is a pair of inputs and targets."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise StateError(
            "A batch is not what training needs",
            expected="(inputs, targets)",
            actual=type(batch).__name__,
            remedy="give the loader a dataset of pairs, or a collate_fn that makes them",
        )
    assert handler.loss_fn is not None
    inputs, targets = (to_device(part, handler.device) for part in batch)
    kind = handler.device.type
    dtype = torch.float16 if kind == "cuda" else torch.bfloat16
    with torch.autocast(kind, dtype=dtype) if use_amp else nullcontext():
        outputs = handler.model(inputs)
        return handler.loss_fn(outputs, targets), outputs, targets


def to_device(value: Any, device: torch.device) -> Any:
    """A nested value with its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    return value
