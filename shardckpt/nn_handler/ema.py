"""An exponential moving average of a model's weights."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from shardckpt.errors import StateError
from shardckpt.nn_handler.parallel import free_full_parameters
from shardckpt.state.module_state import canonical_names, module_state
from shardckpt.torch_compat import foreach_copy

__all__ = ["EMA", "check_decay"]


def check_decay(decay: float) -> None:
    """Raise StateError unless 0 <= decay < 1."""
    if not isinstance(decay, (int, float)) or not 0 <= decay < 1:
        raise StateError(
            "Invalid ema_decay for train",
            expected="a number from 0 up to, not including, 1",
            actual=repr(decay),
        )


class EMA:
    """`weights`: the average of each tensor by its canonical name, laid out as in the model.

    The averages of parameters are those of torch.optim.swa_utils: each update makes them
    `decay * average + (1 - decay) * weight`. Buffers and integers are copied. AveragedModel of
    swa_utils is not used: it copies the model with deepcopy, which fails for wrapped models, and
    its names are not those of the model.
    """

    def __init__(
        self, model: nn.Module, decay: float, weights: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Start from the weights of the model, or from averages that were saved."""
        check_decay(decay)
        self.decay = float(decay)
        own = _tensors(model)
        self.weights = {n: _copy(t) for n, t in own.items()} if weights is None else weights
        if {n: t.shape for n, t in self.weights.items()} != {n: t.shape for n, t in own.items()}:
            raise StateError("The averaged weights do not fit the model")
        self._tensors: list[torch.Tensor] = []  # for which the pairs below were found
        self._averaged: list[tuple[str, torch.Tensor]] = []
        self._copied: list[tuple[str, torch.Tensor]] = []

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the weights after a step of the optimizer. Not collective."""
        tensors = [*model.parameters(), *model.buffers()]
        if len(tensors) != len(self._tensors) or any(map(operator.is_not, tensors, self._tensors)):
            self._find_pairs(model)
            self._tensors = tensors
        if self._averaged:
            averages, own = self._locals(self._averaged)
            get_ema_multi_avg_fn(self.decay)(averages, own, None)  # type: ignore[no-untyped-call]
        if self._copied:
            foreach_copy(*self._locals(self._copied))

    def _find_pairs(self, model: nn.Module) -> None:
        """Find the name of the average of each tensor of the model."""
        names = canonical_names(model)
        parameters = {names[raw] for raw, _ in model.named_parameters()}
        self._averaged, self._copied = [], []
        for name, tensor in _tensors(model).items():
            if self.weights[name].shape != tensor.shape:  # a buffer that grows
                self.weights[name] = _copy(tensor)
            averaged = name in parameters and tensor.is_floating_point()
            (self._averaged if averaged else self._copied).append((name, tensor))

    def _locals(
        self, pairs: list[tuple[str, torch.Tensor]]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return (
            [_local(self.weights[name]) for name, _ in pairs],
            [_local(tensor) for _, tensor in pairs],
        )

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averaged weights inside the with block, and its own after it."""
        tensors = _tensors(model)
        own = {name: _copy(tensor) for name, tensor in tensors.items()}
        try:
            _fill(tensors, self.weights)
            yield
        finally:
            # Otherwise the next forward pass would use the averages that this one has gathered.
            free_full_parameters(model)
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
