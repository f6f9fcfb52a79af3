"""Hooks into training. A plain function of (handler, metrics) is called after each epoch."""

from __future__ import annotations

import csv
import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from shardckpt.errors import DependencyError, StateError
from shardckpt.nn_handler.auto_saver import AutoSaver
from shardckpt.storage.atomic_write import appearing

if TYPE_CHECKING:
    from shardckpt.nn_handler.handler import NNHandler

__all__ = [
    "CSVLogger",
    "Callback",
    "EarlyStopping",
    "Hook",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ProgressBar",
    "TensorBoardLogger",
]

Metrics = Mapping[str, float]


class Callback:
    """Base of callbacks: override what you need. Every rank calls each hook at the same point.

    The constructor's arguments are noted and saved with a checkpoint, as are what state_dict
    returns (plain data, the same on all ranks); load makes each instance anew from them.
    `handler.stop_training = True` ends training after the step or epoch. An exception ends
    training, after a save if auto_save is set so.
    """

    arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Callback:
        """Note the constructor's arguments."""
        made = super().__new__(cls)
        made.arguments = args, kwargs
        return made

    def on_train_start(self, handler: NNHandler) -> None:
        """Before the first epoch of a call of train, after a resume."""

    def on_epoch_start(self, handler: NNHandler) -> None:
        """Before an epoch, not where one is gone on with."""

    def on_step_end(self, handler: NNHandler, loss: float) -> None:
        """After a step of the optimizer; `loss` is that of this rank's last batch."""

    def on_epoch_end(self, handler: NNHandler, metrics: Metrics) -> None:
        """After an epoch and its validation; before auto_save."""

    def on_train_end(self, handler: NNHandler) -> None:
        """After the last epoch of a call of train, or an early stop."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what state_dict returned."""


class Hook(Callback):
    """A plain function, called after each epoch."""

    def __init__(self, function: Callable[[NNHandler, Metrics], Any]) -> None:
        self.function = function

    def on_epoch_end(self, handler: NNHandler, metrics: Metrics) -> None:
        """Call it."""
        self.function(handler, metrics)


def _better(value: float, best: float, mode: str, min_delta: float) -> bool:
    return value < best - min_delta if mode == "min" else value > best + min_delta


class EarlyStopping(Callback):
    """Stops when a metric has not become better, by more than `min_delta`, for `patience` epochs
    that brought it. NaN is never better."""

    def __init__(
        self,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
    ) -> None:
        if mode not in ("min", "max"):
            raise StateError("Unknown value for mode", expected='"min" or "max"', actual=repr(mode))
        self.monitor, self.mode = monitor, mode
        self.patience, self.min_delta = patience, min_delta
        self.best = math.inf if mode == "min" else -math.inf
        self.waited = 0

    def on_train_start(self, handler: NNHandler) -> None:
        """Check that the metric will appear."""
        check_monitor(self.monitor, handler)

    def on_epoch_end(self, handler: NNHandler, metrics: Metrics) -> None:
        """Compare, and stop."""
        if self.monitor not in metrics:
            return
        if _better(metrics[self.monitor], self.best, self.mode, self.min_delta):
            self.best, self.waited = float(metrics[self.monitor]), 0
        else:
            self.waited += 1
            if self.waited >= self.patience:
                handler.stop_training = True

    def state_dict(self) -> dict[str, Any]:
        """The best value, and for how many epochs it has been that."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See state_dict."""
        self.best, self.waited = state["best"], state["waited"]


def check_monitor(monitor: str, handler: NNHandler) -> None:
    """Raise StateError for a metric that training never brings."""
    if monitor not in handler.metric_names():
        raise StateError(
            "The monitored metric never appears",
            expected=f"one of {', '.join(sorted(handler.metric_names()))}",
            actual=monitor,
            remedy="correct monitor, or add the metric; val_ ones need a validation loader",
        )


class ModelCheckpoint(Callback):
    """Saves after epochs and keeps the best `keep_best` by a metric; see AutoSaver.

    It runs after all other callbacks, so what it saves has their state. `best` is the best
    value so far.
    """

    def __init__(
        self,
        save_path: str | os.PathLike[str],
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        keep_best: int = 1,
        name: str = "best_epoch{epoch}",
        interval: int = 1,
    ) -> None:
        self.monitor, self.mode = monitor, mode
        self.best = math.inf if mode == "min" else -math.inf
        self.saver = AutoSaver(
            save_path=save_path,
            interval=interval,
            name=name,
            keep_best=keep_best,
            monitor=monitor,
            mode=mode,
            label=f"ModelCheckpoint {name}",
        )

    def on_train_start(self, handler: NNHandler) -> None:
        """Check the name and the metric."""
        self.saver.begin(handler)

    def on_epoch_end(self, handler: NNHandler, metrics: Metrics) -> None:
        """Save if it is due, and the metric is there."""
        if self.monitor not in metrics:
            return
        if _better(metrics[self.monitor], self.best, self.mode, 0.0):
            self.best = float(metrics[self.monitor])
        self.saver.after_epoch(handler, metrics, last=False, save_last=False)

    def state_dict(self) -> dict[str, Any]:
        """The best value."""
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See state_dict."""
        self.best = state["best"]


class LearningRateMonitor(Callback):
    """Keeps the learning rate of every parameter group after each step, in `rates`."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_step_end(self, handler: NNHandler, loss: float) -> None:
        """Note the rates."""
        if handler.optimizer is not None:
            self.rates.append([float(group["lr"]) for group in handler.optimizer.param_groups])

    def state_dict(self) -> dict[str, Any]:
        """All rates so far."""
        return {"rates": self.rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See state_dict."""
        self.rates = list(state["rates"])


class CSVLogger(Callback):
    """Writes the metrics of each epoch as a row of a CSV file, on rank 0.

    Its columns are those of the first epoch, and `val_` ones. After a resume, rows of epochs that
    are trained again are replaced.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.rows: list[dict[str, Any]] = []

    def on_epoch_end(self, handler: NNHandler, metrics: Metrics) -> None:
        """Write the file anew."""
        self.rows.append({"epoch": handler.epoch, "step": handler.step, **metrics})
        if handler.rank:
            return
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        with (
            appearing(self.path, overwrite=True) as temporary,
            open(temporary, "w", newline="") as file,
        ):
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)

    def state_dict(self) -> dict[str, Any]:
        """All rows."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See state_dict."""
        self.rows = list(state["rows"])


class TensorBoardLogger(Callback):
    """Writes the metrics of each epoch for TensorBoard, on rank 0; needs shardckpt[tensorboard]."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.fspath(folder)
        self._writer: Any = None

    def on_train_start(self, handler: NNHandler) -> None:
        """Open the log; what epochs that are trained again had written is dropped."""
        if handler.rank:
            return
        try:
            tensorboard = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise DependencyError(
                "TensorBoardLogger needs an extra that is not installed",
                remedy='pip install "shardckpt[tensorboard]"',
            ) from error
        self._writer = tensorboard.SummaryWriter(self.folder, purge_step=handler.epoch + 1)

    def on_epoch_end(self, handler: NNHandler, metrics: Metrics) -> None:
        """Write the metrics."""
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, handler.epoch)
            self._writer.flush()

    def on_train_end(self, handler: NNHandler) -> None:
        """Close the log."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class ProgressBar(Callback):
    """Prints a line after each epoch and, on a terminal, the progress within it; on rank 0."""

    def __init__(self) -> None:
        self._shown = 0.0

    def on_step_end(self, handler: NNHandler, loss: float) -> None:
        """Ten times a second at most."""
        if handler.rank == 0 and sys.stderr.isatty() and time.monotonic() - self._shown > 0.1:
            self._shown = time.monotonic()
            print(
                f"\repoch {handler.epoch + 1}  step {handler.step}  loss {loss:.4g}\x1b[K",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def on_epoch_end(self, handler: NNHandler, metrics: Metrics) -> None:
        """The metrics."""
        if handler.rank == 0:
            clear = "\r\x1b[K" if sys.stderr.isatty() else ""
            text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            print(f"{clear}epoch {handler.epoch}  {text}", file=sys.stderr, flush=True)
