"""Callbacks for early stopping, saves and learning rates."""

from __future__ import annotations

import math
import os
from typing import Any, Literal

import torch

from shardckpt.errors import StateError
from shardckpt.manager.retention import check_mode
from shardckpt.nn_handler.auto_saver import AutoSaver
from shardckpt.nn_handler.callback import Callback, Metrics
from shardckpt.nn_handler.training_state import TrainingState

__all__ = ["EarlyStopping", "LearningRateMonitor", "ModelCheckpoint"]


def _better(value: float, best: float, mode: str, min_delta: float) -> bool:
    return value < best - min_delta if mode == "min" else value > best + min_delta


class EarlyStopping(Callback):
    """Ends training when a metric no longer improves.

    NaN is never an improvement. Epochs without the metric do not count.

    Args:
        monitor: The metric.
        mode: Whether "min" or "max" is better.
        patience: The number of epochs without an improvement after which training ends.
        min_delta: The smallest improvement that counts.

    Raises:
        StateError: An argument is invalid; or, at the start of training, the metric never appears.

    Example:
        >>> from torch import nn
        >>> from shardckpt import NNHandler
        >>> from shardckpt.nn_handler import EarlyStopping
        >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
        >>> handler.add_callback(EarlyStopping("val_loss", patience=3))
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
    ) -> None:
        check_mode(mode)
        if type(patience) is not int or patience < 1 or not min_delta >= 0:
            raise StateError(
                "Invalid patience or min_delta",
                expected="an int from 1, and a number from 0",
                actual=f"patience={patience!r}, min_delta={min_delta!r}",
            )
        self.monitor, self.mode = monitor, mode
        self.patience, self.min_delta = patience, min_delta
        self.best = math.inf if mode == "min" else -math.inf
        self.waited = 0

    def on_train_start(self, handler: TrainingState) -> None:
        """See Callback.on_train_start."""
        handler.check_monitor(self.monitor)

    def on_epoch_end(self, handler: TrainingState, metrics: Metrics) -> None:
        """See Callback.on_epoch_end."""
        if self.monitor not in metrics:
            return
        if _better(metrics[self.monitor], self.best, self.mode, self.min_delta):
            self.best, self.waited = float(metrics[self.monitor]), 0
        else:
            self.waited += 1
            if self.waited >= self.patience:
                handler.stop_training = True

    def state_dict(self) -> dict[str, Any]:
        """See Callback.state_dict."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Callback.load_state_dict."""
        self.best, self.waited = float(state["best"]), int(state["waited"])


class ModelCheckpoint(Callback):
    """Saves after epochs, and keeps the best checkpoints by a metric.

    It runs after all other callbacks, so that the checkpoint holds their state of the same epoch.
    The best value so far is `best`.

    Args:
        save_path: The folder of the checkpoints.
        monitor: The metric.
        mode: Whether "min" or "max" is better.
        keep_best: The number of checkpoints to keep.
        name: The template of the names; see NNHandler.auto_save.
        interval: Save every so many epochs.
        links: Keep a symlink `best` to the best checkpoint.

    Raises:
        StateError: An argument is invalid.

    Example:
        >>> from torch import nn
        >>> from shardckpt import NNHandler
        >>> from shardckpt.nn_handler import ModelCheckpoint
        >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
        >>> handler.add_callback(ModelCheckpoint("runs/best", monitor="val_loss", keep_best=2))
    """

    writes_files = True

    def __init__(
        self,
        save_path: str | os.PathLike[str],
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        keep_best: int = 1,
        name: str = "best_epoch{epoch}",
        interval: int = 1,
        links: bool = False,
    ) -> None:
        if type(interval) is not int or interval < 1:
            raise StateError("Invalid interval", expected="an int from 1", actual=repr(interval))
        self.monitor, self.mode = monitor, mode
        self.best = math.inf if mode == "min" else -math.inf
        self.saver = AutoSaver(
            save_path=save_path,
            interval=interval,
            name=name,
            keep_best=keep_best,
            monitor=monitor,
            mode=mode,
            links=links,
            label=f"ModelCheckpoint {name} {monitor} {mode} {keep_best} {interval}",
        )

    def on_train_start(self, handler: TrainingState) -> None:
        """See Callback.on_train_start."""
        if not self.confirmed:
            return
        others = [c.saver for c in handler.callbacks if isinstance(c, ModelCheckpoint)]
        alike = [saver for saver in others if saver.label == self.saver.label]
        self.saver.begin(handler, number=alike.index(self.saver) if self.saver in alike else 0)

    def on_epoch_end(self, handler: TrainingState, metrics: Metrics) -> None:
        """See Callback.on_epoch_end."""
        if self.monitor not in metrics:
            return
        if _better(metrics[self.monitor], self.best, self.mode, 0.0):
            self.best = float(metrics[self.monitor])
        if self.confirmed:
            self.saver.after_epoch(handler, metrics, last=False, save_last=False)

    def state_dict(self) -> dict[str, Any]:
        """See Callback.state_dict."""
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Callback.load_state_dict."""
        self.best = float(state["best"])


class LearningRateMonitor(Callback):
    """Keeps the learning rate of every parameter group after each step, in `rates`.

    The history holds the rates of each epoch without it.

    Example:
        >>> from torch import nn
        >>> from shardckpt import NNHandler
        >>> from shardckpt.nn_handler import LearningRateMonitor
        >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
        >>> handler.add_callback(LearningRateMonitor())
    """

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_step_end(self, handler: TrainingState, loss: torch.Tensor) -> None:
        """See Callback.on_step_end."""
        self.rates.append([rate for one in handler.optimizations.values() for rate in one.rates])

    def state_dict(self) -> dict[str, Any]:
        """See Callback.state_dict."""
        return {"rates": self.rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Callback.load_state_dict."""
        self.rates = [[float(rate) for rate in rates] for rates in state["rates"]]
