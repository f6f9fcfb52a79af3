"""The progress bar of training."""

from __future__ import annotations

import importlib
import sys
import time
import warnings
from typing import Any

import torch

from shardckpt.nn_handler.callback import Callback, Metrics
from shardckpt.nn_handler.loggers import as_text
from shardckpt.nn_handler.training_state import TrainingState

__all__ = ["ProgressBar"]


class ProgressBar(Callback):
    """Shows the progress of training on stderr, on rank 0.

    In a terminal and in a notebook it is a bar of tqdm: steps, rate, time left, loss. Each epoch
    then leaves a line with its metrics. In a log file, or without tqdm, there are only these lines.

    Args:
        batches_per_step: The number of batches for each step of the optimizer.
        limit_batches: The largest number of batches in an epoch.

    Example:
        >>> from shardckpt.nn_handler import ProgressBar
        >>> bar = ProgressBar()
    """

    def __init__(self, batches_per_step: int = 1, limit_batches: int | None = None) -> None:
        self.batches_per_step, self.limit_batches = batches_per_step, limit_batches
        self._bar: Any = None
        self._tqdm: Any = None
        self._started_at = self._shown_at = time.monotonic()

    def on_train_start(self, handler: TrainingState) -> None:
        """See Callback.on_train_start."""
        self._tqdm = _tqdm() if handler.rank == 0 else None
        self._started_at = time.monotonic()

    def on_step_end(self, handler: TrainingState, loss: torch.Tensor) -> None:
        """See Callback.on_step_end."""
        if self._tqdm is None:
            return
        if self._bar is None:
            self._open(handler)
        self._bar.update(1)
        if time.monotonic() - self._shown_at > 0.2:  # float(loss) waits for the device
            self._shown_at = time.monotonic()
            self._bar.set_postfix_str(f"loss {float(loss):.4g}", refresh=False)

    def on_validation_batch_start(self, handler: TrainingState, batch: Any, number: int) -> None:
        """See Callback.on_validation_batch_start."""
        if self._bar is not None:
            self._bar.set_description_str(
                f"epoch {handler.epoch + 1}, validation batch {number + 1}"
            )

    def on_validation_end(self, handler: TrainingState, metrics: Metrics) -> None:
        """See Callback.on_validation_end."""
        if self._bar is not None:
            self._bar.set_description_str(f"epoch {handler.epoch + 1}")

    def on_epoch_end(self, handler: TrainingState, metrics: Metrics) -> None:
        """See Callback.on_epoch_end."""
        self._close()
        if handler.rank == 0:
            took_s = time.monotonic() - self._started_at
            self._started_at = time.monotonic()
            text = f"epoch {handler.epoch}  {as_text(metrics)}  {took_s:.1f} s"
            print(text, file=sys.stderr, flush=True)

    def on_train_end(self, handler: TrainingState) -> None:
        """See Callback.on_train_end."""
        self._close()

    def on_exception(self, handler: TrainingState, error: BaseException) -> None:
        """See Callback.on_exception."""
        self._close()
        if handler.rank == 0 and isinstance(error, (KeyboardInterrupt, SystemExit)):
            print(f"training stops at step {handler.step}", file=sys.stderr, flush=True)

    def _open(self, handler: TrainingState) -> None:
        loader = handler.train_data.loader if handler.train_data is not None else None
        total, batches = None, _length(loader)
        if batches is not None:
            batches = min(batches, self.limit_batches or batches)
            total = -(-batches // self.batches_per_step)
        self._bar = self._tqdm(
            total=total,
            desc=f"epoch {handler.epoch + 1}",
            unit="step",
            leave=False,
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _length(loader: Any) -> int | None:
    """Return the number of batches. None for a stream, whose loader has a __len__ that raises."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _tqdm() -> Any:
    """Return the bar for a terminal or a notebook. None if stderr is a file, or without tqdm."""
    kernel = getattr(
        getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)(), "kernel", None
    )
    if kernel is None and not sys.stderr.isatty():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a notebook without widgets gets a bar of text
            return importlib.import_module("tqdm.auto").tqdm
    except ImportError:
        return None
