"""AutoSaver: saves a training while it runs, and resumes it from its checkpoints."""

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
from shardckpt.errors import ShardckptError, StateError, StorageError
from shardckpt.logs import warn
from shardckpt.manager import CheckpointManager, SavedCheckpoint
from shardckpt.manager.retention import ranked
from shardckpt.nn_handler.save_schedule import SaveSchedule, checkpoint_name
from shardckpt.nn_handler.saving import (
    OneFile,
    check_config,
    check_suffix,
    is_one_file,
    link,
    state_on_all,
)
from shardckpt.nn_handler.training_state import TrainingState
from shardckpt.storage.base import MANIFEST_NAME, Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.posix import translated
from shardckpt.storage.resolve import resolve

__all__ = ["AutoSaver"]


class AutoSaver:
    """Saves a handler while it trains; see NNHandler.auto_save.

    It removes only checkpoints that this run, or the run that it resumed, has saved.

    Args:
        save_path: See NNHandler.auto_save.
        save_last: See NNHandler.auto_save.
        on_exception: See NNHandler.auto_save.
        on_signal: See NNHandler.auto_save.
        asynchronous: See NNHandler.auto_save.
        resume: See NNHandler.auto_save.
        links: See NNHandler.auto_save.
        tolerate: See NNHandler.auto_save.
        label: Distinguishes the checkpoints of several savers in one folder.
        schedule: The other arguments of NNHandler.auto_save.

    Raises:
        StateError: An argument is invalid.

    Example:
        >>> from shardckpt.nn_handler import AutoSaver
        >>> AutoSaver(save_path="runs", every_steps=100, keep_last=2).schedule.keep_last
        2
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
        links: bool = False,
        tolerate: int = 3,
        label: str = "auto_save",
        **schedule: Any,
    ) -> None:
        flags = {
            "save_last": save_last,
            "on_exception": on_exception,
            "on_signal": on_signal,
            "asynchronous": asynchronous,
            "links": links,
        }
        _check_flags(**flags, overwrite=schedule.get("overwrite", False))
        _check_options(save_last=save_last, links=links, resume=resume, tolerate=tolerate)
        self.schedule = SaveSchedule(**schedule)
        self.label = label
        self.one_file = is_one_file(self.schedule.name)
        possible = {"last": label == "auto_save", "best": self.schedule.monitor is not None}
        self._links = [name for name in possible if links and possible[name]]
        taken = [*self._links, *(["last"] if save_last else [])]
        _check_name(self.schedule.name, taken, asynchronous=asynchronous)
        # raises for an invalid path here, rather than in the first save
        self._storage, _ = resolve(save_path, LocalStorage() if self.one_file else None)
        folder = save_path.full_path("") if isinstance(save_path, Storage) else os.fspath(save_path)
        self.options: dict[str, Any] = {
            "save_path": folder,
            **flags,
            "resume": resume,
            "tolerate": tolerate,
        }
        self._suffix = os.path.splitext(self.schedule.name)[1] if self.one_file else ""
        self._manager: CheckpointManager | None = None
        self._last: CheckpointManager | None = None
        self._fresh: list[str] = []
        self._failed: list[tuple[str, ShardckptError]] = []
        self._number = 0
        self._handler: TrainingState | None = None
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
        if self._manager is None or self.schedule.monitor is None:
            return None
        found = ranked(self._manager.checkpoints(), self.schedule.monitor, self.schedule.mode)
        return found[0] if found else None

    @property
    def best_path(self) -> str | None:
        """The path of the best checkpoint by `monitor`; None before the first."""
        best = self._best()
        return None if best is None else best.path

    @property
    def best_score(self) -> float | None:
        """The monitored metric of `best_path`."""
        best = self._best()
        return None if best is None else best.metrics[self.schedule.monitor or ""]

    def take_fresh(self) -> list[str]:
        """Internal. Return the paths saved to since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def take_failed(self) -> list[tuple[str, ShardckptError]]:
        """Internal. Return the path and the error of each tolerated failure since the last call."""
        failed, self._failed = self._failed, []
        return failed

    def description(self) -> dict[str, Any]:
        """Internal. Return the arguments as plain data."""
        return {**self.options, **asdict(self.schedule)}

    def begin(
        self,
        handler: TrainingState,
        *,
        number: int = 0,
        restore: Callable[[str], None] | None = None,
    ) -> bool:
        """Internal. Prepare for training, and resume with `restore`. Returns whether it resumed.

        Collective. `number` counts the savers with the same label before this one.
        """
        self._number, self._handler = number, handler
        self.schedule.check_names(handler.metric_names())
        if self.schedule.saves() or self.options["save_last"]:
            self._make_folder()
        if self.one_file:
            check_config(handler, self.schedule.name)  # raises here, rather than in the first save
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
            if found is None:
                self._warn_of_others(handler)
        elif restore is not None and self.options["resume"] and handler.run_id is None:
            self._warn_of_progress(handler)
        if handler.run_id is None:
            with operation("NNHandler: the id of this run") as coordinator:
                fresh = uuid.uuid4().hex.encode()
                handler.run_id = exchange(
                    coordinator, "id", lambda: b"", lambda payloads: fresh
                ).decode()
        self._manager = CheckpointManager(
            self.folder,
            keep=self.schedule.policies(),
            asynchronous=bool(self.options["asynchronous"]),
            label=self._label(handler),
            **self._place(),
        )
        if self.options["save_last"]:
            label = f"{self.label} last {handler.run_id}"
            self._last = CheckpointManager(self.folder, label=label, **self._place())
        self._saved_step, self._saved_at = handler.step, time.monotonic()
        return resumed

    def _warn_of_progress(self, handler: TrainingState) -> None:
        if handler.rank == 0:
            warn(
                'resume="auto" has no effect: the handler has trained before this call, to step '
                f"{handler.step}. Call auto_save before the first call of train"
            )

    def _warn_of_others(self, handler: TrainingState) -> None:
        """Warn of checkpoints in the folder that have another format than the name."""
        local = isinstance(self._storage, LocalStorage) and os.path.isdir(self.folder)
        if handler.rank or not local:
            return
        names = [name for name in sorted(os.listdir(self.folder)) if not name.startswith(".")]
        sharded = [n for n in names if os.path.isfile(f"{self.folder}/{n}/{MANIFEST_NAME}")]
        others = sharded if self.one_file else list(filter(is_one_file, names))
        if others:
            warn(
                f'resume="auto" found no checkpoint of the format of name={self.schedule.name!r} '
                f"in {self.folder}, but {', '.join(others[:8])}: training begins anew. The suffix "
                "of the name chooses the format"
            )

    def _make_folder(self) -> None:
        """Create the folder, or raise StorageError before training. Collective."""
        if not isinstance(self._storage, LocalStorage):
            return

        def make(payloads: list[bytes]) -> bytes:
            with translated(self.folder):
                os.makedirs(self.folder, exist_ok=True)
                if not os.access(self.folder, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, "No permission to write", self.folder)
                for name in self._links:
                    path = os.path.join(self.folder, name + self._suffix)
                    if os.path.lexists(path) and not os.path.islink(path):
                        raise FileExistsError(errno.EEXIST, "The name of a link is taken", path)
            return b""

        with operation(f"NNHandler: the folder {self.folder}") as coordinator:
            exchange(coordinator, "make", lambda: b"", make)

    def _label(self, handler: TrainingState) -> str:
        number = f" {self._number}" if self._number else ""
        return f"{self.label}{number} {handler.run_id}"

    def _place(self) -> dict[str, Any]:
        """Return the arguments that all managers share: storage, backend, tolerated failures."""
        return {
            "storage": self._storage,
            "backend": OneFile() if self.one_file else None,
            "tolerate": self.options["tolerate"],
            "on_failure": lambda path, error: self._failed.append((path, error)),
        }

    def minutes_due(self) -> bool:
        """Internal. Whether `every_minutes` have passed, by the clock of this process."""
        return self.schedule.due_by_time((time.monotonic() - self._saved_at) / 60)

    def due(self, handler: TrainingState) -> bool:
        """Internal. Whether to save at the current step. The same on all ranks."""
        return self.schedule.due_at_step(handler.step, saved_at=self._saved_step)

    def within_epoch(self, handler: TrainingState, *, now: bool) -> None:
        """Internal. Save between two steps if a save is due, or `now`. Collective."""
        if (now and handler.step != self._saved_step) or self.due(handler):
            self.save(handler, {}, name=f"step{handler.step}{self._suffix}")

    def after_epoch(
        self, handler: TrainingState, results: Mapping[str, float], *, last: bool, save_last: bool
    ) -> None:
        """Internal. Save after an epoch if a save is due. Collective."""
        if self.schedule.due_after_epoch(handler.epoch, last=last, save_last=save_last):
            metrics = {"epoch": handler.epoch, "step": handler.step, **results}
            self.save(handler, results, name=checkpoint_name(self.schedule.name, metrics))
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
        """Internal. Save now. Collective."""
        assert self._manager is not None, "begin comes first"
        saved = self._manager.save(
            handler.step,
            state_on_all(handler),
            metrics=metrics,
            name=name,
            if_exists="overwrite" if self.schedule.overwrite else "number",
        )
        self._saved_at = time.monotonic()
        if all(path != saved.path for path, _ in self._failed):
            self._saved_step = handler.step
            self._fresh.append(saved.path)
        self._link(handler)
        return saved

    def _link(self, handler: TrainingState) -> None:
        """Point the links `last` and `best` at the newest and the best complete checkpoint."""
        local = isinstance(self._storage, LocalStorage)
        if handler.rank or not self._links or self._manager is None or not local:
            return
        newest = self._manager.checkpoints()[-1:]
        targets = {"last": newest[0] if newest else None, "best": self._best()}
        for name in self._links:
            if (checkpoint := targets[name]) is not None:
                try:
                    link(self.folder, name + self._suffix, os.path.basename(checkpoint.path))
                except StorageError as error:  # on rank 0 alone: an error would leave the others
                    warn(f"The link {name} in {self.folder} was not made: {error.message}")

    def emergency(self, handler: TrainingState, *, process_group: Any = None) -> None:
        """Internal. Save before training ends, and wait for the save. Collective.

        `process_group` is a group of one rank if the others can't take part.
        """
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
            # the module itself: of a DDP model only the buffers of rank 0 are saved
            state = {**state_on_all(handler, process_group), "model": handler.module}
            manager.save(handler.step, state, name=name, if_exists="number")

    def go_back(self, load: Callable[[str], None]) -> bool:
        """Internal. Load the newest intact checkpoint of this run. Returns whether there is one."""
        assert self._manager is not None, "begin comes first"
        return self._manager.first_that_loads(load) is not None

    def wait_staged(self) -> None:
        """Internal. Wait until the state of a save in the background may change."""
        if self._manager is not None:
            self._manager.wait_staged()

    def close(self) -> None:
        """Internal. Wait for a save in the background. Collective."""
        if self._manager is not None:
            self._manager.close()
            if self._handler is not None:
                self._link(self._handler)


def _check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise StateError(
                f"Invalid {name} for saving", expected="True or False", actual=repr(value)
            )


def _check_options(*, save_last: bool, links: bool, resume: object, tolerate: object) -> None:
    """Raise StateError for an invalid option."""
    if type(tolerate) is not int or tolerate < 0:
        raise StateError(
            "Invalid tolerate for saving", expected="an int from 0", actual=repr(tolerate)
        )
    if links and save_last:
        raise StateError(
            "save_last=True saves a checkpoint under the name of the link `last`",
            remedy="leave out save_last or links",
        )
    if resume not in (None, "auto"):
        raise StateError("Invalid value for resume", expected='"auto" or None', actual=repr(resume))


def _check_name(name: str, taken: list[str], *, asynchronous: bool) -> None:
    """Raise StateError for a template of names that the other options exclude."""
    check_suffix(name)
    if os.path.splitext(name)[0] in taken:
        raise StateError(
            "The name of the checkpoints is that of a link, or of save_last",
            actual=name,
            remedy='choose another name, such as name="epoch{epoch}"',
        )
    if is_one_file(name) and asynchronous:
        raise StateError(
            "A single file is not saved in the background",
            actual=name,
            remedy="leave .pth, .pt or .safetensors out of the name, or asynchronous=True",
        )


def _newest_first(found: list[SavedCheckpoint]) -> list[SavedCheckpoint]:
    return sorted(found, key=lambda checkpoint: checkpoint.saved_at, reverse=True)
