"""Callbacks that log metrics: CSV, TensorBoard, experiment trackers, text."""

from __future__ import annotations

import csv
import importlib
import io
import os
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any

import torch

from shardckpt.errors import DependencyError, StateError
from shardckpt.nn_handler.callback import Callback, Metrics
from shardckpt.nn_handler.training_state import TrainingState
from shardckpt.storage.atomic_write import write_file
from shardckpt.storage.paths import local_path
from shardckpt.storage.posix import translated

__all__ = ["CSVLogger", "ExperimentLogger", "LogFile", "TensorBoardLogger", "as_text"]


class _Logger(Callback, ABC):
    """Passes metrics to `_record` on rank 0: those of each epoch, and loss and rates by steps."""

    def __init__(self, every_steps: int | None) -> None:
        if every_steps is not None and (type(every_steps) is not int or every_steps < 1):
            raise StateError(
                "Invalid every_steps", expected="None or an int from 1", actual=repr(every_steps)
            )
        self.every_steps = every_steps

    @abstractmethod
    def _record(self, handler: TrainingState, metrics: Metrics, *, step: bool) -> None:
        """Log metrics on rank 0; `step`: in the middle of an epoch."""

    def on_step_end(self, handler: TrainingState, loss: torch.Tensor) -> None:
        """See Callback.on_step_end."""
        if self.every_steps and handler.step % self.every_steps == 0 and self._logs(handler):
            self._record(handler, {"loss": float(loss), **handler.rates}, step=True)

    def on_epoch_end(self, handler: TrainingState, metrics: Metrics) -> None:
        """See Callback.on_epoch_end."""
        if self._logs(handler):
            self._record(handler, metrics, step=False)

    def _logs(self, handler: TrainingState) -> bool:
        return handler.rank == 0 and self.confirmed


class _FileLogger(_Logger):
    """A logger that writes to a path."""

    writes_files = True

    def __init__(self, path: str | os.PathLike[str], every_steps: int | None = None) -> None:
        super().__init__(every_steps)
        self.path = local_path(path)


class CSVLogger(_FileLogger):
    """Writes the metrics of each epoch as a row of a CSV file, on rank 0.

    After a resume, the rows of epochs and steps that are trained again are replaced.

    Args:
        path: The file.
        every_steps: Also write the loss of rank 0 and the learning rates after every so many
            steps, to a second file: `log.steps.csv` beside `log.csv`.

    Example:
        >>> from torch import nn
        >>> from shardckpt import NNHandler
        >>> from shardckpt.nn_handler import CSVLogger
        >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
        >>> handler.add_callback(CSVLogger("log.csv", every_steps=100))
    """

    def __init__(self, path: str | os.PathLike[str], every_steps: int | None = None) -> None:
        super().__init__(path, every_steps)
        self.rows: list[dict[str, Any]] = []  # of epochs; those of steps are on rank 0 alone
        self._steps: list[dict[str, Any]] = []

    @property
    def steps_path(self) -> str:
        """The file of the rows of steps."""
        return os.path.splitext(self.path)[0] + ".steps.csv"

    def on_train_start(self, handler: TrainingState) -> None:
        """See Callback.on_train_start."""
        self._steps = []
        if self.every_steps and self._logs(handler) and handler.step:
            with suppress(FileNotFoundError), open(self.steps_path, newline="") as file:
                rows = list(csv.DictReader(file))
                self._steps = [row for row in rows if int(row["step"]) <= handler.step]

    def _record(self, handler: TrainingState, metrics: Metrics, *, step: bool) -> None:
        """Keep a row of a step; files are written at the end of epochs."""
        if step:
            self._steps.append({"step": handler.step, **metrics})

    def on_epoch_end(self, handler: TrainingState, metrics: Metrics) -> None:
        """See Callback.on_epoch_end."""
        self.rows.append({"epoch": handler.epoch, "step": handler.step, **metrics})
        self._write(handler)

    def on_train_end(self, handler: TrainingState) -> None:
        """See Callback.on_train_end."""
        self._write(handler)

    def on_exception(self, handler: TrainingState, error: BaseException) -> None:
        """See Callback.on_exception."""
        self._write(handler)

    def _write(self, handler: TrainingState) -> None:
        if self._logs(handler):
            for path, rows in ((self.path, self.rows), (self.steps_path, self._steps)):
                if rows:
                    write_file(path, _table(rows), overwrite=True)

    def state_dict(self) -> dict[str, Any]:
        """See Callback.state_dict."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Callback.load_state_dict."""
        self.rows = [dict(row) for row in state["rows"]]


def _table(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


class TensorBoardLogger(_FileLogger):
    """Writes metrics for TensorBoard, on rank 0; needs the extra `tensorboard`.

    Metrics of an epoch have the number of the epoch; those of a step are named `step/...` and have
    the number of the step.

    Args:
        path: The folder of the log.
        every_steps: Also write the loss of rank 0 and the learning rates after every so many
            steps.

    Example:
        >>> from torch import nn
        >>> from shardckpt import NNHandler
        >>> from shardckpt.nn_handler import TensorBoardLogger
        >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
        >>> handler.add_callback(TensorBoardLogger("runs/tensorboard"))
    """

    def __init__(self, path: str | os.PathLike[str], every_steps: int | None = None) -> None:
        super().__init__(path, every_steps)
        self._writer: Any = None

    def on_train_start(self, handler: TrainingState) -> None:
        """See Callback.on_train_start. A resume drops the lines of later epochs."""
        if not self._logs(handler):
            return
        try:
            tensorboard = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise DependencyError(
                "TensorBoardLogger needs an extra that is not installed",
                remedy='pip install "shardckpt[tensorboard]"',
            ) from error
        purge = None if self.every_steps else handler.epoch + 1  # steps count on another scale
        self._writer = tensorboard.SummaryWriter(self.path, purge_step=purge)

    def _record(self, handler: TrainingState, metrics: Metrics, *, step: bool) -> None:
        """Write metrics."""
        if self._writer is not None:
            for name, value in metrics.items():
                number = handler.step if step else handler.epoch
                self._writer.add_scalar(f"step/{name}" if step else name, value, number)
            if not step:
                self._writer.flush()

    def on_train_end(self, handler: TrainingState) -> None:
        """See Callback.on_train_end."""
        self._close()

    def on_exception(self, handler: TrainingState, error: BaseException) -> None:
        """See Callback.on_exception."""
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class ExperimentLogger(_Logger):
    """Passes metrics to an experiment tracker, on rank 0.

    A checkpoint can't hold the tracker. A load asks for it by its place, for example
    `objects={"callbacks.0.args.0": run}`.

    Args:
        tracker: A run of Weights & Biases, with a method `log(metrics, step=)`. Or MLflow, its
            client or a logger of Lightning, with a function `log_metrics(metrics, step=)`.
        every_steps: Also log the loss of rank 0 and the learning rates after every so many steps.

    Example:
        >>> from torch import nn
        >>> from shardckpt import NNHandler
        >>> from shardckpt.nn_handler import ExperimentLogger
        >>> class Tracker:
        ...     def log(self, metrics, step):
        ...         print(step, metrics)
        >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
        >>> handler.add_callback(ExperimentLogger(Tracker()))
    """

    def __init__(self, tracker: Any, every_steps: int | None = None) -> None:
        super().__init__(every_steps)
        self._log = getattr(tracker, "log_metrics", None) or getattr(tracker, "log", None)
        if not callable(self._log):
            raise StateError(
                "ExperimentLogger needs an experiment tracker",
                expected="an object with a method log or log_metrics",
                actual=type(tracker).__name__,
            )

    def _logs(self, handler: TrainingState) -> bool:
        return handler.rank == 0  # the program gave the tracker, to load too

    def _record(self, handler: TrainingState, metrics: Metrics, *, step: bool) -> None:
        """Pass metrics on."""
        assert self._log is not None
        named = {f"step/{name}": value for name, value in metrics.items()} if step else metrics
        self._log({"epoch": handler.epoch, **named}, step=handler.step)


class LogFile(_FileLogger):
    """Appends a line of text to a file for each epoch, save and error, on rank 0.

    Args:
        path: The file.
        every_steps: Also write the loss of rank 0 and the learning rates after every so many
            steps.

    Example:
        >>> from torch import nn
        >>> from shardckpt import NNHandler
        >>> from shardckpt.nn_handler import LogFile
        >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
        >>> handler.add_callback(LogFile("train.log"))
    """

    def on_train_start(self, handler: TrainingState) -> None:
        """See Callback.on_train_start."""
        self._write(handler, f"training starts\n{handler}")

    def _record(self, handler: TrainingState, metrics: Metrics, *, step: bool) -> None:
        """Write a line."""
        self._write(handler, as_text(metrics))

    def on_save(self, handler: TrainingState, path: str) -> None:
        """See Callback.on_save."""
        self._write(handler, f"saved {path}")

    def on_save_failed(self, handler: TrainingState, path: str, error: Exception) -> None:
        """See Callback.on_save_failed."""
        self._write(handler, f"not saved: {path}: {str(error).splitlines()[0]}")

    def on_exception(self, handler: TrainingState, error: BaseException) -> None:
        """See Callback.on_exception."""
        self._write(handler, f"ended by {type(error).__name__}: {error}")

    def on_train_end(self, handler: TrainingState) -> None:
        """See Callback.on_train_end."""
        self._write(handler, "training ends")

    def _write(self, handler: TrainingState, text: str) -> None:
        if self._logs(handler):
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            with translated(self.path):
                os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(f"{now}  epoch {handler.epoch}  step {handler.step}  {text}\n")


def as_text(metrics: Metrics) -> str:
    """Metrics as one line of text."""
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
