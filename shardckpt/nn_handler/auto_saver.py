"""AutoSaver: a training run that saves itself, and resumes from what it saved."""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Literal

from shardckpt.coordination.exchange import exchange
from shardckpt.coordination.resolve import operation
from shardckpt.errors import StateError
from shardckpt.manager import CheckpointManager, SavedCheckpoint
from shardckpt.manager.retention import ranked
from shardckpt.nn_handler.saving import OneFile, check_config, is_one_file, state_on_all
from shardckpt.nn_handler.trainer_saving import SavePlan, checkpoint_name
from shardckpt.nn_handler.training_state import TrainingState
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.posix import translated
from shardckpt.storage.resolve import resolve

__all__ = ["AutoSaver"]


class AutoSaver:
    """Saves a handler while it trains, as a SavePlan says, through a CheckpointManager.

    `save_last`: after every epoch also `last`, which replaces the one before. `on_exception` and
    `on_signal` (SIGTERM, SIGINT): save before training ends so. `asynchronous`: training goes on
    while a save is written; those on exceptions and signals are waited for. `resume="auto"`:
    train begins with the newest checkpoint in the folder that loads. It removes only
    checkpoints that this very run, or the one that it resumed, has saved.
    """

    def __init__(
        self,
        *,
        save_path: str | os.PathLike[str] | Storage,
        save_last: bool = False,
        on_exception: bool = True,
        on_signal: bool = True,
        asynchronous: bool = False,
        resume: Literal["auto"] | None = None,
        tolerate: int = 3,
        label: str = "auto_save",
        **plan: Any,
    ) -> None:
        if resume not in (None, "auto"):
            raise StateError(
                "Unknown value for resume", expected='"auto" or None', actual=repr(resume)
            )
        self.plan = SavePlan(**plan)
        self.one_file = is_one_file(self.plan.name)
        if self.one_file and asynchronous:
            raise StateError(
                "A single file is not saved in the background",
                actual=self.plan.name,
                remedy="leave .pth, .pt or .safetensors out of the name, or asynchronous=True",
            )
        # A path that can't be one is told here, not by the first save.
        self._storage, _ = resolve(save_path, LocalStorage() if self.one_file else None)
        self.options: dict[str, Any] = {
            "save_path": save_path.full_path("")
            if isinstance(save_path, Storage)
            else os.fspath(save_path),
            "save_last": save_last,
            "on_exception": on_exception,
            "on_signal": on_signal,
            "asynchronous": asynchronous,
            "resume": resume,
            "tolerate": tolerate,
        }
        self.label = label
        self._suffix = os.path.splitext(self.plan.name)[1] if self.one_file else ""
        self._manager: CheckpointManager | None = None
        self._last: CheckpointManager | None = None
        self._fresh: list[str] = []
        self._number = 0
        self._saved_step = -1
        self._saved_at = time.monotonic()

    @property
    def folder(self) -> str:
        """The directory of the checkpoints."""
        return self._storage.full_path(self.options["save_path"])

    @property
    def on_exception(self) -> bool:
        """Whether to save before an exception ends training."""
        return bool(self.options["on_exception"])

    @property
    def on_signal(self) -> bool:
        """Whether to save on SIGTERM and SIGINT."""
        return bool(self.options["on_signal"])

    def _best(self) -> SavedCheckpoint | None:
        if self._manager is None or self.plan.monitor is None:
            return None
        found = ranked(self._manager.checkpoints(), self.plan.monitor, self.plan.mode)
        return found[0] if found else None

    @property
    def best_path(self) -> str | None:
        """The best of its checkpoints that are there, by `monitor`; None before the first."""
        best = self._best()
        return None if best is None else best.path

    @property
    def best_score(self) -> float | None:
        """The monitored metric of `best_path`."""
        best = self._best()
        return None if best is None else best.metrics[self.plan.monitor or ""]

    def take_fresh(self) -> list[str]:
        """The paths saved to since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def description(self) -> dict[str, Any]:
        """What makes it anew, as plain data."""
        return {**self.options, **asdict(self.plan)}

    def begin(
        self,
        handler: TrainingState,
        *,
        number: int = 0,
        restore: Callable[[str], None] | None = None,
    ) -> bool:
        """Before training; collective. `number`: of this one among those with the same label.
        Whether the handler was resumed from a checkpoint, by `restore`."""
        self._number = number
        self.plan.check_names(handler.metric_names())
        if self.plan.saves() or self.options["save_last"]:
            self._make_folder()
        if self.one_file:
            check_config(handler, self.plan.name)  # else the first save would tell, too late
        resumed = False
        if (
            restore is not None
            and self.options["resume"]
            and handler.step == 0
            and handler.epoch == 0
        ):
            every = CheckpointManager(self.folder, label=None, **self._place())
            found = every.first_that_loads(restore, _newest_first)
            resumed = found is not None
        if handler.run_id is None:
            with operation("NNHandler: the id of this run") as coordinator:
                fresh = uuid.uuid4().hex.encode()
                handler.run_id = exchange(
                    coordinator, "id", lambda: b"", lambda payloads: fresh
                ).decode()
        self._manager = CheckpointManager(
            self.folder,
            keep=self.plan.policies(),
            asynchronous=bool(self.options["asynchronous"]),
            label=self._label(handler),
            **self._place(),
        )
        if self.options["save_last"]:
            label = f"{self.label} last {handler.run_id}"
            self._last = CheckpointManager(self.folder, label=label, **self._place())
        self._saved_step, self._saved_at = handler.step, time.monotonic()
        return resumed

    def _make_folder(self) -> None:
        """A path that can't be written to is told before training; collective, on rank 0."""
        if not isinstance(self._storage, LocalStorage):
            return

        def make(payloads: list[bytes]) -> bytes:
            with translated(self.folder):
                os.makedirs(self.folder, exist_ok=True)
                if not os.access(self.folder, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, "No permission to write", self.folder)
            return b""

        with operation(f"NNHandler: the folder {self.folder}") as coordinator:
            exchange(coordinator, "make", lambda: b"", make)

    def _label(self, handler: TrainingState) -> str:
        number = f" {self._number}" if self._number else ""
        return f"{self.label}{number} {handler.run_id}"

    def _place(self) -> dict[str, Any]:
        """The storage and the backend of the managers, and how they take failures."""
        return {
            "storage": self._storage,
            "backend": OneFile() if self.one_file else None,
            "tolerate": self.options["tolerate"],
        }

    def minutes_due(self) -> bool:
        """Whether it is time to save, by this process's clock."""
        return self.plan.due_by_time((time.monotonic() - self._saved_at) / 60)

    def within_epoch(self, handler: TrainingState, *, now: bool) -> None:
        """Between two steps; collective. `now`: the time has come."""
        if now or self.plan.due_at_step(handler.step, saved_at=self._saved_step):
            self.save(handler, {}, name=f"step{handler.step}{self._suffix}")

    def after_epoch(
        self, handler: TrainingState, results: Mapping[str, float], *, last: bool, save_last: bool
    ) -> None:
        """After an epoch, with its metrics; collective."""
        if self.plan.due_after_epoch(handler.epoch, last=last, save_last=save_last):
            metrics = {"epoch": handler.epoch, "step": handler.step, **results}
            self.save(handler, results, name=checkpoint_name(self.plan.name, metrics))
        if self._last is not None:
            self._last.save(
                handler.step,
                state_on_all(handler),
                metrics=results,
                name="last" + self._suffix,
                if_exists="overwrite",
            )

    def save(
        self, handler: TrainingState, metrics: Mapping[str, float], *, name: str
    ) -> SavedCheckpoint:
        """Save now; collective."""
        assert self._manager is not None, "begin comes first"
        saved = self._manager.save(
            handler.step,
            state_on_all(handler),
            metrics=metrics,
            name=name,
            if_exists="overwrite" if self.plan.overwrite else "number",
        )
        self._saved_step, self._saved_at = handler.step, time.monotonic()
        self._fresh.append(saved.path)
        return saved

    def emergency(self, handler: TrainingState, *, process_group: Any = None) -> None:
        """Save because training ends; collective, or over a group of one. Waits until the
        checkpoint is there."""
        name = f"step{handler.step}{self._suffix}"
        if process_group is None:
            self.save(handler, {}, name=name)
            self.close()
        else:
            manager = CheckpointManager(
                self.folder,
                label=self._label(handler),
                **self._place(),
                process_group=process_group,
            )
            # the module itself: of DDP's buffers only rank 0's would count
            state = {**state_on_all(handler, process_group), "model": handler.module}
            manager.save(handler.step, state, name=name, if_exists="number")

    def wait_staged(self) -> None:
        """Wait until what is being saved in the background may change."""
        if self._manager is not None:
            self._manager.wait_staged()

    def close(self) -> None:
        """Wait for a save in the background; collective."""
        if self._manager is not None:
            self._manager.close()


def _newest_first(found: list[SavedCheckpoint]) -> list[SavedCheckpoint]:
    return sorted(found, key=lambda checkpoint: checkpoint.saved_at, reverse=True)
