"""The callbacks that come with the package: early stopping, saving, logging, progress."""

from __future__ import annotations

import csv
import importlib
import io
import math
import os
import sys
import time
from typing import Any, Literal

from shardckpt.errors import DependencyError, StateError
from shardckpt.nn_handler.auto_saver import AutoSaver
from shardckpt.nn_handler.callback import Callback, Metrics
from shardckpt.nn_handler.training_state import TrainingState
from shardckpt.storage.atomic_write import write_file
from shardckpt.storage.paths import local_path

__all__ = [
    "CSVLogger",
    "EarlyStopping",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ProgressBar",
    "TensorBoardLogger",
]


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

    def on_train_start(self, handler: TrainingState) -> None:
        """Check that the metric will appear."""
        handler.check_monitor(self.monitor)

    def on_epoch_end(self, handler: TrainingState, metrics: Metrics) -> None:
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
        self.best, self.waited = float(state["best"]), int(state["waited"])


class ModelCheckpoint(Callback):
    """Saves after epochs and keeps the best `keep_best` by a metric; see AutoSaver.

    It runs after all other callbacks, so what it saves has their state. `best` is the best
    value so far.
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
            label=f"ModelCheckpoint {name} {monitor} {mode} {keep_best} {interval}",
        )

    def on_train_start(self, handler: TrainingState) -> None:
        """Check the name and the metric."""
        if not self.confirmed:
            return
        others = [c.saver for c in handler.callbacks if isinstance(c, ModelCheckpoint)]
        alike = [saver for saver in others if saver.label == self.saver.label]
        self.saver.begin(handler, number=alike.index(self.saver) if self.saver in alike else 0)

    def on_epoch_end(self, handler: TrainingState, metrics: Metrics) -> None:
        """Save if it is due, and the metric is there."""
        if self.monitor not in metrics:
            return
        if _better(metrics[self.monitor], self.best, self.mode, 0.0):
            self.best = float(metrics[self.monitor])
        if self.confirmed:
            self.saver.after_epoch(handler, metrics, last=False, save_last=False)

    def state_dict(self) -> dict[str, Any]:
        """The best value."""
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See state_dict."""
        self.best = float(state["best"])


class LearningRateMonitor(Callback):
    """Keeps the learning rate of every parameter group after each step, in `rates`."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_step_end(self, handler: TrainingState, loss: float) -> None:
        """Note the rates."""
        self.rates.append([rate for one in handler.optimizations.values() for rate in one.rates])

    def state_dict(self) -> dict[str, Any]:
        """All rates so far."""
        return {"rates": self.rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See state_dict."""
        self.rates = [[float(rate) for rate in rates] for rates in state["rates"]]


class CSVLogger(Callback):
    """Writes the metrics of each epoch as a row of a CSV file, on rank 0.

    Its columns are those of the first epoch, and `val_` ones. After a resume, rows of epochs that
    are trained again are replaced.
    """

    writes_files = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = local_path(path)
        self.rows: list[dict[str, Any]] = []

    def on_epoch_end(self, handler: TrainingState, metrics: Metrics) -> None:
        """Write the file anew."""
        self.rows.append({"epoch": handler.epoch, "step": handler.step, **metrics})
        if handler.rank or not self.confirmed:
            return
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(self.rows)
        write_file(self.path, text.getvalue().encode(), overwrite=True)

    def state_dict(self) -> dict[str, Any]:
        """All rows."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See state_dict."""
        self.rows = [dict(row) for row in state["rows"]]


class TensorBoardLogger(Callback):
    """Writes the metrics of each epoch for TensorBoard, on rank 0; needs shardckpt[tensorboard]."""

    writes_files = True

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = local_path(folder)
        self._writer: Any = None

    def on_train_start(self, handler: TrainingState) -> None:
        """Open the log; what epochs that are trained again had written is dropped."""
        if handler.rank or not self.confirmed:
            return
        try:
            tensorboard = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise DependencyError(
                "TensorBoardLogger needs an extra that is not installed",
                remedy='pip install "shardckpt[tensorboard]"',
            ) from error
        self._writer = tensorboard.SummaryWriter(self.folder, purge_step=handler.epoch + 1)

    def on_epoch_end(self, handler: TrainingState, metrics: Metrics) -> None:
        """Write the metrics."""
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, handler.epoch)
            self._writer.flush()

    def on_train_end(self, handler: TrainingState) -> None:
        """Close the log."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class ProgressBar(Callback):
    """Prints a line after each epoch and, on a terminal, the progress within it; on rank 0."""

    def __init__(self) -> None:
        self._shown = 0.0

    def on_step_end(self, handler: TrainingState, loss: float) -> None:
        """Ten times a second at most."""
        if handler.rank == 0 and sys.stderr.isatty() and time.monotonic() - self._shown > 0.1:
            self._shown = time.monotonic()
            print(
                f"\repoch {handler.epoch + 1}  step {handler.step}  loss {loss:.4g}\x1b[K",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def on_epoch_end(self, handler: TrainingState, metrics: Metrics) -> None:
        """The metrics."""
        if handler.rank == 0:
            clear = "\r\x1b[K" if sys.stderr.isatty() else ""
            text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            print(f"{clear}epoch {handler.epoch}  {text}", file=sys.stderr, flush=True)
