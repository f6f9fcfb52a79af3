"""A trial of training, which is undone at its end."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from shardckpt.nn_handler.parallel import free_full_parameters
from shardckpt.nn_handler.training_state import TrainingState
from shardckpt.torch_compat import dtensor_local, is_dtensor

__all__ = ["undone"]

_PROGRESS = (
    "epoch",
    "step",
    "history",
    "history_epochs",
    "position",
    "boundary",
    "rates",
    "seed_value",
    "runs",
    "run_steps",
    "run_id",
    "replayed",
    "validations",
    "stop_training",
)


@contextmanager
def undone(handler: TrainingState) -> Iterator[None]:
    """Undo at the end of the with block what training changes. Not collective.

    Restores the tensors, the states of optimizers, schedulers and callbacks, the random numbers and
    the progress.
    """
    free_full_parameters(handler.module)
    tensors = [(tensor, _local(tensor).detach().clone()) for tensor in _tensors(handler)]
    parts: list[Any] = [*handler.optimizers.values(), *handler.schedulers.values()]
    parts += [*handler.callbacks, *([handler.scaler] if handler.scaler is not None else [])]
    states = [(part, copy.deepcopy(part.state_dict())) for part in parts]
    progress = {name: copy.deepcopy(getattr(handler, name)) for name in _PROGRESS}
    ema, decay, scaler = handler.ema, getattr(handler.ema, "decay", 0.0), handler.scaler
    random = handler.train_data.random_now() if handler.train_data is not None else None
    try:
        yield
    finally:
        free_full_parameters(handler.module)
        with torch.no_grad():
            for tensor, value in tensors:
                _local(tensor).copy_(value)
        for part, state in states:
            part.load_state_dict(state)
        for name, value in progress.items():
            setattr(handler, name, value)
        handler.ema, handler.scaler = ema, scaler
        if ema is not None:
            ema.decay = decay
        if handler.train_data is not None and random is not None:
            handler.train_data.set_random(random)


def _tensors(handler: TrainingState) -> list[Any]:
    """Return the tensors of the model, of the loss and of the averages."""
    modules = [handler.module]
    if isinstance(handler.loss_fn, torch.nn.Module):
        modules.append(handler.loss_fn)
    found = [tensor for one in modules for tensor in (*one.parameters(), *one.buffers())]
    averages = list(handler.ema.weights.values()) if handler.ema is not None else []
    return [tensor for tensor in [*found, *averages] if not is_lazy(tensor)]


def _local(tensor: Any) -> Any:
    return dtensor_local(tensor) if is_dtensor(tensor) else tensor
