"""The base of callbacks. A plain function of (handler, metrics) is called after each epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Callback", "Hook", "Metrics"]

Metrics = Mapping[str, float]


class Callback:
    """Base of callbacks: override what you need. Every rank calls each hook at the same point.

    The constructor's arguments are noted and saved with a checkpoint, as are what state_dict
    returns (plain data, the same on all ranks); load makes each instance anew from them.
    `handler.stop_training = True` ends training after the step or epoch. An exception ends
    training, after a save if auto_save is set so.
    """

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    writes_files = False
    """Whether it writes where its arguments say: after a load the program must confirm that."""
    confirmed = True
    """False for one that a load has made, until handler.confirm(): it must write no files."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Callback:
        """Note the constructor's arguments."""
        made = super().__new__(cls)
        made.arguments = args, kwargs
        return made

    def on_train_start(self, handler: Any) -> None:
        """Before the first epoch of a call of train, after a resume."""

    def on_epoch_start(self, handler: Any) -> None:
        """Before an epoch, not where one is gone on with."""

    def on_batch_start(self, handler: Any, batch: Any, number: int) -> None:
        """Before a batch, the `number`th from 0 of a step of the optimizer."""

    def on_step_end(self, handler: Any, loss: float) -> None:
        """After a step of the optimizer; `loss` is that of this rank's last batch."""

    def on_validation_start(self, handler: Any) -> None:
        """Before validation."""

    def on_validation_end(self, handler: Any, metrics: Metrics) -> None:
        """After validation, with its metrics, named `val_...`."""

    def on_epoch_end(self, handler: Any, metrics: Metrics) -> None:
        """After an epoch and its validation; before auto_save."""

    def on_train_end(self, handler: Any) -> None:
        """After the last epoch of a call of train, or an early stop."""

    def on_save(self, handler: Any, path: str) -> None:
        """After the auto-saver has saved a checkpoint, or begun to in the background."""

    def on_exception(self, handler: Any, error: BaseException) -> None:
        """When an error, Ctrl-C or SIGTERM ends training, before the save of that."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what state_dict returned."""


class Hook(Callback):
    """A plain function, called after each epoch."""

    def __init__(self, function: Callable[[Any, Metrics], Any]) -> None:
        self.function = function

    def on_epoch_end(self, handler: Any, metrics: Metrics) -> None:
        """Call it."""
        self.function(handler, metrics)
