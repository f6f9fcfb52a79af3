"""An exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shardckpt.errors import StateError
from shardckpt.state.module_state import canonical_names, module_state

__all__ = ["EMA", "check_decay"]


def check_decay(decay: float) -> None:
    """Raise StateError unless 0 <= decay < 1."""
    if not isinstance(decay, (int, float)) or not 0 <= decay < 1:
        raise StateError(
            "train was given a bad ema_decay",
            expected="a number from 0 up to, not including, 1",
            actual=repr(decay),
        )


class EMA:
    """`weights`: canonical name -> average, laid out as the model's own tensors.

    Each update makes an average `decay * average + (1 - decay) * weight`; buffers, and what is
    no floating point number, are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        check_decay(decay)
        self.decay = float(decay)
        self.weights = {name: _copy(tensor) for name, tensor in _tensors(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step of the optimizer. Not collective."""
        names = canonical_names(model)
        averaged = {names[raw] for raw, _ in model.named_parameters()}
        for name, tensor in _tensors(model).items():
            average, own = _local(self.weights[name]), _local(tensor)
            if name in averaged and average.is_floating_point():
                average.lerp_(own, 1 - self.decay)
            else:
                average.copy_(own)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged weights inside the with block, and its own after it."""
        tensors = _tensors(model)
        own = {name: _copy(tensor) for name, tensor in tensors.items()}
        try:
            _fill(tensors, self.weights)
            yield
        finally:
            _fill(tensors, own)


def _tensors(model: nn.Module) -> dict[str, Any]:
    return {n: t for n, t in module_state(model).items() if isinstance(t, torch.Tensor)}


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()


@torch.no_grad()
def _fill(tensors: dict[str, Any], values: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        _local(tensor).copy_(_local(values[name]))
