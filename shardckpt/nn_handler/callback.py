"""The base class of callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["Callback", "Hook", "Metrics"]

Metrics = Mapping[str, float]


class Callback:
    """The base class of callbacks: override the hooks that you need.

    Every rank calls each hook at the same point. A checkpoint holds the arguments of the
    constructor, and the result of `state_dict`, for each instance. To end training after the
    current step or epoch, set `handler.stop_training = True`. An exception in a hook ends training
    on all ranks, after a save if auto_save has `on_exception`.

    A callback that writes files sets `writes_files = True`, and writes only while `confirmed` is
    True. A load sets `confirmed` to False until `handler.confirm()` is called.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from shardckpt import NNHandler
        >>> from shardckpt.nn_handler import Callback
        >>> class Count(Callback):
        ...     def __init__(self):
        ...         self.steps = 0
        ...
        ...     def on_step_end(self, handler, loss):
        ...         self.steps += 1
        >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
        >>> handler.set_optimizer(torch.optim.SGD, lr=0.1)
        >>> handler.set_loss_fn(nn.MSELoss())
        >>> handler.set_train_loader([(torch.ones(8, 4), torch.ones(8, 2))] * 3)
        >>> count = Count()
        >>> handler.add_callback(count)
        >>> _ = handler.train(2, progress_bar=False)
        >>> count.steps
        6
    """

    constructor_arguments: tuple[tuple[Any, ...], dict[str, Any]]
    writes_files = False
    confirmed = True

    def __new__(cls, *args: Any, **kwargs: Any) -> Callback:
        """Note the arguments of the constructor."""
        made = super().__new__(cls)
        made.constructor_arguments = args, kwargs
        return made

    def on_train_start(self, handler: Any) -> None:
        """Called before the first epoch of a call of train, after a resume.

        Args:
            handler: The handler.
        """

    def on_epoch_start(self, handler: Any) -> None:
        """Called before each epoch, except one that a resume continues.

        Args:
            handler: The handler.
        """

    def on_batch_start(self, handler: Any, batch: Any, number: int) -> None:
        """Called before each batch of training.

        Args:
            handler: The handler.
            batch: The batch, as the loader returned it.
            number: The number of the batch within the step of the optimizer, from 0.
        """

    def on_step_end(self, handler: Any, loss: torch.Tensor) -> None:
        """Called after each step of the optimizer.

        Args:
            handler: The handler.
            loss: The loss of the last batch on this rank, on the device. `float(loss)` waits for
                the device.
        """

    def on_validation_start(self, handler: Any) -> None:
        """Called before validation.

        Args:
            handler: The handler.
        """

    def on_validation_batch_start(self, handler: Any, batch: Any, number: int) -> None:
        """Called before each batch of validation.

        Args:
            handler: The handler.
            batch: The batch, as the loader returned it.
            number: The number of the batch, from 0.
        """

    def on_validation_end(self, handler: Any, metrics: Metrics) -> None:
        """Called after validation.

        Args:
            handler: The handler.
            metrics: The results, with the prefix `val_`.
        """

    def on_epoch_end(self, handler: Any, metrics: Metrics) -> None:
        """Called after each epoch and its validation, before auto_save.

        Args:
            handler: The handler.
            metrics: The metrics of the epoch, as in the history.
        """

    def on_train_end(self, handler: Any) -> None:
        """Called after the last epoch of a call of train, or an early stop.

        Args:
            handler: The handler.
        """

    def on_save(self, handler: Any, path: str) -> None:
        """Called after a save by auto_save or ModelCheckpoint, or after its start if asynchronous.

        Args:
            handler: The handler.
            path: The path of the checkpoint.
        """

    def on_save_failed(self, handler: Any, path: str, error: Exception) -> None:
        """Called after a save that failed because of the storage, if auto_save tolerates it.

        `handler.failed_saves` counts them. If a save in the background failed, this is called with
        the next one.

        Args:
            handler: The handler.
            path: The path of the checkpoint that does not exist.
            error: The error. Its class is the same on all ranks.
        """

    def on_exception(self, handler: Any, error: BaseException) -> None:
        """Called when an error, Ctrl-C or SIGTERM ends training, before it is saved.

        Args:
            handler: The handler.
            error: The error.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of this callback.

        Returns:
            Plain data, the same on all ranks.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: The result of `state_dict`.
        """


class Hook(Callback):
    """A plain function as a callback, called after each epoch."""

    def __init__(self, function: Callable[[Any, Metrics], Any]) -> None:
        self.function = function

    def on_epoch_end(self, handler: Any, metrics: Metrics) -> None:
        """See Callback.on_epoch_end."""
        self.function(handler, metrics)
