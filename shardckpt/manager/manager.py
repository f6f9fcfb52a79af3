"""CheckpointManager: saves, prunes and restores the checkpoints of one job in one folder."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec

from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.exchange import exchange
from shardckpt.coordination.resolve import operation
from shardckpt.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptionError,
    FormatVersionError,
    NoSpaceError,
    NotACheckpointError,
    ShardckptError,
    StalledError,
    StateError,
    StorageError,
    StoreUnavailableError,
)
from shardckpt.logs import warn
from shardckpt.manager.backends import RECORD, CheckpointBackend, ShardedBackend
from shardckpt.manager.retention import (
    KeepBest,
    Retention,
    SavedCheckpoint,
    check_mode,
    ranked,
    to_remove,
)
from shardckpt.reports import LoadReport
from shardckpt.saving.async_save import SaveHandle
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.resolve import resolve

__all__ = ["CheckpointManager", "Restored"]

T = TypeVar("T")
PASSING = (NoSpaceError, StalledError, StoreUnavailableError)
"""The errors of a storage after which the same save may succeed later."""

_BROKEN = (CheckpointNotFoundError, CorruptionError, NotACheckpointError, StorageError)
"""The errors after which a restore tries the next checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """The result of a restore.

    Attributes:
        checkpoint: The checkpoint that was loaded.
        report: The report of the load.
        skipped: The paths of corrupted checkpoints that were tried before.

    Example:
        >>> import torch, shardckpt
        >>> manager = shardckpt.CheckpointManager("run")
        >>> state = {"weight": torch.ones(3)}
        >>> _ = manager.save(7, state)
        >>> manager.restore_latest(state).step
        7
    """

    checkpoint: SavedCheckpoint
    report: LoadReport
    skipped: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """The step of the checkpoint."""
        return self.checkpoint.step

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of the checkpoint."""
        return self.checkpoint.metrics


class CheckpointManager(AbstractContextManager["CheckpointManager"]):
    """Saves the state of a job by step into a folder, prunes by policies, and restores.

    Before it prunes, the manager verifies the newest checkpoint that it keeps, and each other one
    that a policy counts: once each. Corrupted checkpoints are neither counted nor removed. Files
    that have not changed since the newest checkpoint are linked, not written; blocks are cloned if
    the file system can. Each save first removes the leftovers of failed saves from the folder.

    A manager removes only checkpoints with its own owner: the label or, without a label, the
    template `name` with the policies but not their counts. It never removes a checkpoint that
    another process saves at the same time. Methods marked collective must be called on every rank
    of `process_group`.

    Args:
        folder: The folder of the checkpoints: a path, a URL such as `s3://bucket/run`, or a storage
            that has a root, such as TieredStorage. The first save creates it.
        keep: The retention policies: KeepLast, KeepBest, KeepEverySteps, KeepEveryHours, or your
            own function. A checkpoint is kept if any policy keeps it. Without policies, all
            checkpoints are kept.
        name: The template of the names, with the field `{step}`.
        asynchronous: Save in the background, see `async_save`. The next `save`, `wait` or `close`
            raises the error of a failed save.
        check: How to verify before pruning: "full" reads all bytes, "quick" reads the manifest and
            compares the sizes of the shards.
        label: Managers with different labels can share a folder. They don't see each other's
            checkpoints. A manager with label None sees all checkpoints.
        process_group: The ranks; see `save`.
        tolerate: The number of saves in a row that may fail without an error, because the storage
            is full, does not answer or throttles. Such a save is tried once more, then a warning is
            issued. With `asynchronous` it is not tried again: its state is gone. Other errors are
            always raised.
        on_failure: Called on every rank with the path and the error of each tolerated failure.
        storage: The storage of the folder; see `save`.
        backend: How checkpoints are stored; by default as shards. With a backend of your own the
            folder is a local path.

    Raises:
        StateError: An argument is invalid.

    Example:
        >>> import torch, shardckpt
        >>> keep = [shardckpt.KeepLast(2), shardckpt.KeepBest(1, "loss")]
        >>> with shardckpt.CheckpointManager("run", keep=keep) as manager:
        ...     for step, loss in enumerate([0.3, 0.1, 0.4, 0.2]):
        ...         state = {"weight": torch.full((3,), loss)}
        ...         _ = manager.save(step, state, metrics={"loss": loss})
        ...     print(manager.all_steps())
        ...     print(manager.restore_best(state).step)
        [1, 2, 3]
        1
    """

    _passing: tuple[type[ShardckptError], ...] = PASSING

    def __init__(
        self,
        folder: str | os.PathLike[str] | Storage,
        *,
        keep: Sequence[Retention] = (),
        name: str = "step-{step}",
        asynchronous: bool = False,
        check: Literal["full", "quick"] = "full",
        label: str | None = "",
        process_group: Any = None,
        tolerate: int = 0,
        on_failure: Callable[[str, ShardckptError], object] = lambda path, error: None,
        storage: Storage | None = None,
        backend: CheckpointBackend | None = None,
    ) -> None:
        if check not in ("full", "quick"):
            raise StateError(
                "Invalid value for check", expected='"full" or "quick"', actual=repr(check)
            )
        self.keep = tuple(keep) if isinstance(keep, Iterable) else ()
        if not isinstance(keep, Iterable) or not all(map(callable, self.keep)):
            raise StateError(
                "Invalid value for keep",
                expected="a list of retention policies",
                actual=repr(keep),
                remedy="pass a list, such as keep=[shardckpt.KeepLast(2)]",
            )
        if backend is not None and storage is None:
            storage = LocalStorage()
        self._storage, self.folder = resolve(folder, storage, fixed=True)
        _checked_name(_name_of(name, step=0))
        self.label = label
        self.owner = label or _owner(name, self.keep)
        self._identity = uuid.uuid4().hex
        self._created_at = time.time()
        self._name = name
        self._asynchronous = asynchronous
        self._check = check
        self._group = process_group
        self._backend: CheckpointBackend = backend or ShardedBackend(self._storage)
        self._pending: SaveHandle | None = None
        self._tolerate = tolerate
        self._on_failure = on_failure
        self._failures = 0
        self._records: dict[str, tuple[Hashable, _Record | None]] = {}
        self._verified: dict[str, bool] = {}
        self._absent_metrics: set[str] = set()

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
        name: str | None = None,
        if_exists: Literal["error", "overwrite", "number"] = "error",
    ) -> SavedCheckpoint:
        """Save a state, then remove the checkpoints that no policy keeps. Collective.

        Step, name, metrics and time are those of rank 0.

        Args:
            step: The step of the training, 0 or above.
            state: See `shardckpt.save`; a dict.
            metrics: Metrics by name, for KeepBest and restore_best.
            name: The name of this checkpoint, in place of the template.
            if_exists: If the path exists: "error" raises an error, "overwrite" replaces the
                checkpoint, and "number" appends `-v1`, `-v2` and so on to the name. The functions
                of the engine have `overwrite=` instead, as they never choose another path.

        Returns:
            The checkpoint, with its path and time. With `asynchronous` it is not complete yet.
            After a failure that is tolerated it does not exist.

        Raises:
            StateError: An argument or the state is invalid.
            CheckpointExistsError: The path exists, and `if_exists` is "error".
            StorageError: The file system refused an operation.
            CoordinationError: A rank failed.
        """
        if not isinstance(step, int) or step < 0:
            raise StateError("Invalid step", expected="an int, 0 or above", actual=repr(step))
        if if_exists not in ("error", "overwrite", "number"):
            raise StateError(
                "Invalid value for if_exists",
                expected='"error", "overwrite" or "number"',
                actual=repr(if_exists),
            )
        if not isinstance(state, Mapping) or RECORD in state:
            raise StateError(
                "Invalid state for a CheckpointManager",
                expected=f"a dict without the key {RECORD!r}",
                actual=type(state).__name__,
            )
        self.wait()
        floats = {key: float(value) for key, value in (metrics or {}).items()}
        wanted = self._storage.child(self.folder, name or _name_of(self._name, step=step))
        saved = self._tried(
            wanted,
            lambda: self._save(step, state, floats, name, if_exists),
            attempts=1 if self._asynchronous else 2,
        )
        if saved is None:
            return SavedCheckpoint(path=wanted, step=step, metrics=floats, saved_at=time.time())
        if not self._asynchronous:
            self._prune()
        return saved

    def _save(
        self,
        step: int,
        state: Mapping[str, Any],
        metrics: dict[str, float],
        name: str | None,
        if_exists: str,
    ) -> SavedCheckpoint:
        """Save, or begin to save in the background. Collective."""
        checkpoint, base, manager = self._agree(
            f"save step {step} in {self.folder}", step, metrics, name, if_exists
        )
        record = {
            "label": self.label,
            "owner": self.owner,
            "manager": manager,
            "step": step,
            "metrics": dict(checkpoint.metrics),
            "saved_at": checkpoint.saved_at,
        }
        self._pending = self._backend.save(
            {**state, RECORD: record},
            checkpoint.path,
            overwrite=if_exists == "overwrite",
            asynchronous=self._asynchronous,
            process_group=self._group,
            base=base,
        )
        return checkpoint

    def _tried(self, path: str, save: Callable[[], T], *, attempts: int) -> T | None:
        """Carry out a save, or wait for one. Collective. None after a failure that is tolerated."""
        for attempt in range(attempts):
            try:
                result = save()
            except ShardckptError as error:
                if not self._tolerate or not self._may_pass(path, error):
                    raise
                if attempt + 1 < attempts:
                    continue
                self._failures += 1
                if self._failures > self._tolerate:
                    raise
                warn(f"{path} was not saved, failure {self._failures} in a row: {error.message}")
                self._on_failure(path, error)
                return None
            self._failures = 0
            return result
        return None

    def _may_pass(self, path: str, error: ShardckptError) -> bool:
        """Return whether all ranks have an error of a storage that may recover. Collective."""
        own = "storage" if isinstance(error, self._passing) else type(error).__name__

        def decide(payloads: list[bytes]) -> bytes:
            # RankFailedError is the error of the ranks that only heard of another one.
            causes = {payload.decode() for payload in payloads} - {"RankFailedError"}
            return b"yes" if causes == {"storage"} else b""

        with operation(f"CheckpointManager: a failed save to {path}", self._group) as ranks:
            return bool(exchange(ranks, "failure", own.encode, decide))

    def _agree(
        self, subject: str, step: int, metrics: dict[str, float], name: str | None, if_exists: str
    ) -> tuple[SavedCheckpoint, str | None, str]:
        """Let rank 0 decide on the new checkpoint. Collective.

        Returns:
            The new checkpoint, the path of its base, and the identity of rank 0's manager.
        """

        def decide(payloads: list[bytes]) -> bytes:
            self._backend.sweep(self.folder)
            wanted = self._storage.child(
                self.folder, _checked_name(name or _name_of(self._name, step=step))
            )
            path, number = wanted, 0
            stem, suffix = os.path.splitext(wanted)
            if suffix not in (".pth", ".pt", ".safetensors"):
                stem, suffix = wanted, ""
            while if_exists == "number" and self._backend.exists(path):
                number += 1
                path = f"{stem}-v{number}{suffix}"
            if if_exists == "error" and self._backend.exists(path):
                raise CheckpointExistsError(
                    "The path exists already",
                    path=path,
                    expected="a free path",
                    actual="a checkpoint of this name",
                    remedy='pass another step or name, or if_exists="overwrite"',
                )
            # A corrupted checkpoint must not be the base, as its files would be linked again.
            newest = self.checkpoints()[-1:]
            base = next((c.path for c in newest if self._verified.get(_key(c), True)), None)
            encoded_base = base and os.fsencode(base)
            facts = [os.fsencode(path), step, metrics, time.time(), encoded_base, self._identity]
            return msgspec.msgpack.encode(facts)

        with operation(f"CheckpointManager: {subject}", self._group) as coordinator:
            answer = exchange(coordinator, "name", lambda: b"", decide)
        path, step, metrics, saved_at, base, manager = msgspec.msgpack.decode(answer)
        checkpoint = SavedCheckpoint(
            path=os.fsdecode(path), step=step, metrics=metrics, saved_at=saved_at
        )
        return checkpoint, base and os.fsdecode(base), manager

    def wait(self) -> None:
        """Wait for the save in the background, if there is one, and prune. Collective.

        Raises:
            ShardckptError: The save failed; see `shardckpt.save`.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        report = self._tried(pending.path, lambda: pending.result(), attempts=1)
        if report is not None:
            self._prune()

    def wait_staged(self) -> None:
        """Wait until the state of a save in the background may change. Not collective.

        See SaveHandle.wait_staged.
        """
        if self._pending is not None:
            self._pending.wait_staged()

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.close()
        else:
            self._complete()

    def _complete(self) -> None:
        """Wait for the save in the background after an error, which other ranks may not have."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:
            warn(f"{pending.path} was not saved: {error}")

    def close(self) -> None:
        """Wait for the save in the background, as `wait` does. Collective."""
        self.wait()

    def checkpoints(self) -> list[SavedCheckpoint]:
        """List the checkpoints of this manager, oldest first. Not collective.

        Checkpoints with a corrupted manifest, or with missing or truncated shards, are left out.
        Blocks are not verified.

        Returns:
            The checkpoints, sorted by step and time.

        Raises:
            StorageError: The folder can't be read.
        """
        return self._scan()[0]

    def _scan(self) -> tuple[list[SavedCheckpoint], list[tuple[str, str]]]:
        """List the complete checkpoints, oldest first, and (path, message) of corrupted ones."""
        complete, corrupted = [], []
        for name in self._backend.names(self.folder):
            path = self._storage.child(self.folder, name)
            try:
                checkpoint = self._look(path)
            except (CorruptionError, FormatVersionError) as error:
                corrupted.append((path, error.message))
            else:
                complete += [checkpoint] if checkpoint else []
        return sorted(complete, key=lambda c: (c.step, c.saved_at)), corrupted

    def all_steps(self) -> list[int]:
        """List the steps of `checkpoints()`. Not collective.

        Returns:
            The steps, ascending.
        """
        return sorted({checkpoint.step for checkpoint in self.checkpoints()})

    def restore_latest(self, state: Any, *, strict: bool = True) -> Restored | None:
        """Load the newest checkpoint into a state, in place. Collective.

        If a checkpoint is corrupted, a warning is issued and the next older one is tried.

        Args:
            state: See `shardckpt.load`.
            strict: See `shardckpt.load`.

        Returns:
            The checkpoint and its report. None if the folder has no checkpoint.

        Raises:
            LoadMismatchError: State and checkpoint differ.
            CorruptionError: All checkpoints are corrupted.
            CoordinationError: A rank failed.
        """
        return self._restore(state, lambda saved: saved[::-1], strict=strict)

    def restore_best(
        self,
        state: Any,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        *,
        strict: bool = True,
    ) -> Restored | None:
        """Load the best checkpoint by a metric into a state, in place. Collective.

        If a checkpoint is corrupted, a warning is issued and the next best one is tried.

        Args:
            state: See `shardckpt.load`.
            monitor: The metric; by default that of the first KeepBest policy.
            mode: Whether "min" or "max" is best; by default that of the policy, otherwise "min".
            strict: See `shardckpt.load`.

        Returns:
            The checkpoint and its report, or None if no checkpoint has the metric.

        Raises:
            StateError: `mode` is invalid, or there is neither a `monitor` nor a KeepBest policy.
            LoadMismatchError: State and checkpoint differ.
            CorruptionError: All checkpoints with the metric are corrupted.
            CoordinationError: A rank failed.
        """
        best = next((policy for policy in self.keep if isinstance(policy, KeepBest)), None)
        if best is None and monitor is None:
            raise StateError(
                "restore_best needs a metric", remedy="pass monitor=, or a KeepBest policy"
            )
        if mode is not None:
            check_mode(mode)
        by = monitor or (best.monitor if best else "")
        better = mode or (best.mode if best and monitor in (None, best.monitor) else "min")
        return self._restore(state, lambda saved: ranked(saved, by, better), strict=strict)

    def _restore(
        self,
        state: Any,
        order: Callable[[list[SavedCheckpoint]], list[SavedCheckpoint]],
        *,
        strict: bool,
    ) -> Restored | None:
        result = self.first_that_loads(
            lambda path: self._backend.load(state, path, strict=strict, process_group=self._group),
            order,
        )
        if result is None:
            return None
        checkpoint, report, skipped = result
        return Restored(checkpoint=checkpoint, report=report, skipped=skipped)

    def first_that_loads(
        self,
        load: Callable[[str], T],
        order: Callable[[list[SavedCheckpoint]], list[SavedCheckpoint]] = lambda saved: saved[::-1],
    ) -> tuple[SavedCheckpoint, T, tuple[str, ...]] | None:
        """Load checkpoints in an order until one loads. Collective.

        Args:
            load: Called with a path; collective.
            order: Takes the checkpoints, oldest first, and returns them in the order of attempts.

        Returns:
            The checkpoint, what `load` returned, and the paths of the corrupted ones before it.
            None if the folder has no checkpoint.

        Raises:
            CorruptionError: All checkpoints are corrupted.
        """
        self.wait()

        def listed(payloads: list[bytes]) -> bytes:
            complete, corrupted = self._scan()
            for path, message in corrupted:
                warn(f"{path} is corrupted and was skipped: {message}")
            facts = [
                [os.fsencode(c.path), c.step, dict(c.metrics), c.saved_at] for c in order(complete)
            ]
            return msgspec.msgpack.encode([facts, [os.fsencode(path) for path, _ in corrupted]])

        with operation(f"CheckpointManager: restore from {self.folder}", self._group) as ranks:
            rank = ranks.rank
            answer = exchange(ranks, "list", lambda: b"", listed)
        candidates, corrupted = msgspec.msgpack.decode(answer)
        skipped = [os.fsdecode(path) for path in corrupted]
        last: ShardckptError | None = None
        for encoded, step, metrics, saved_at in candidates:
            path = os.fsdecode(encoded)
            try:
                loaded = load(path)
            except _BROKEN as error:
                if rank == 0:
                    warn(f"{path} is corrupted and was skipped: {error.message}")
                skipped.append(path)
                last = error
                continue
            checkpoint = SavedCheckpoint(path=path, step=step, metrics=metrics, saved_at=saved_at)
            return checkpoint, loaded, tuple(skipped)
        if last is not None:
            raise CorruptionError(
                "All checkpoints are corrupted",
                path=self.folder,
                actual=", ".join(skipped),
                remedy="create the state again before you continue: it may be partly overwritten",
            ) from last
        return None

    def _prune(self) -> None:
        """Remove the checkpoints that no policy keeps. Collective.

        Rank 0 removes them. If each machine has a part of them, each rank then removes its own.
        """
        if not self.keep:
            return
        with operation(f"CheckpointManager: prune {self.folder}", self._group) as coordinator:

            def remove() -> bytes:
                if coordinator.rank:
                    return b""
                removed = filter(self._remove, self._to_prune(coordinator))
                return msgspec.msgpack.encode([os.fsencode(one.path) for one in removed])

            answer = exchange(coordinator, "prune", remove, lambda payloads: payloads[0])
            for path in msgspec.msgpack.decode(answer) if coordinator.rank else ():
                self._storage.remove_part(os.fsdecode(path))

    def _remove(self, checkpoint: SavedCheckpoint) -> bool:
        """Remove a checkpoint. Returns whether it was removed."""
        try:
            self._backend.remove(checkpoint.path)
        except StorageError as error:
            # The save has succeeded, and the next one tries again.
            warn(f"{checkpoint.path} can't be removed: {error.message}")
            return False
        return True

    def _to_prune(self, coordinator: Coordinator) -> list[SavedCheckpoint]:
        saved = [
            checkpoint
            for checkpoint in self.checkpoints()
            if self._verified.get(_key(checkpoint), True) and self._may_remove(checkpoint)
        ]
        while removable := to_remove(saved, self.keep):
            paths = {checkpoint.path for checkpoint in removable}
            corrupted = next(
                (
                    c
                    for c in reversed(saved)
                    if c.path not in paths and not self._intact(c, coordinator)
                ),
                None,
            )
            if corrupted is None:
                self._warn_of_absent_metrics(saved)
                return removable
            saved.remove(corrupted)
        return []

    def _warn_of_absent_metrics(self, saved: list[SavedCheckpoint]) -> None:
        """Warn once of each metric that a policy monitors and no checkpoint has."""
        names = {name for checkpoint in saved for name in checkpoint.metrics}
        monitored = {policy.monitor for policy in self.keep if isinstance(policy, KeepBest)}
        for metric in sorted(monitored - names - self._absent_metrics) if names else ():
            self._absent_metrics.add(metric)
            warn(
                f"KeepBest keeps no checkpoint in {self.folder}: it monitors the metric "
                f"{metric!r}, and the saved metrics are {', '.join(sorted(names))}"
            )

    def _may_remove(self, checkpoint: SavedCheckpoint) -> bool:
        """Whether this manager saved a checkpoint, or an earlier manager of the same owner."""
        record = self._records[checkpoint.path][1]
        return record is not None and (
            record.manager == self._identity
            or (record.owner == self.owner and checkpoint.saved_at < self._created_at)
        )

    def _intact(self, checkpoint: SavedCheckpoint, coordinator: Coordinator) -> bool:
        key = _key(checkpoint)
        if key not in self._verified:
            try:
                self._backend.verify(
                    checkpoint.path, quick=self._check == "quick", progress=coordinator.progress
                )
                self._verified[key] = True
            except _BROKEN as error:
                warn(f"{checkpoint.path} is corrupted and does not count: {error.message}")
                self._verified[key] = False
        return self._verified[key]

    def _look(self, path: str) -> SavedCheckpoint | None:
        """Return the checkpoint at a path if this manager sees it. Raises CorruptionError."""
        try:
            version = self._backend.version(path)
            if self._records.get(path, (None, None))[0] != version:
                self._records[path] = version, _record(path, self._backend.record(path))
        except (NotACheckpointError, CheckpointNotFoundError, OSError):
            return None
        record = self._records[path][1]
        if record is None or self.label not in (None, record.label):
            return None
        return record.checkpoint


def _key(checkpoint: SavedCheckpoint) -> str:
    return f"{checkpoint.path} {checkpoint.saved_at}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """The entry RECORD of a checkpoint. Earlier versions saved a label in place of an owner."""

    label: str | None
    owner: str | None
    manager: str | None
    checkpoint: SavedCheckpoint


class _Facts(msgspec.Struct, kw_only=True):
    """The entry RECORD as it is saved."""

    label: str | None
    step: int
    metrics: dict[str, float]
    saved_at: float
    owner: str | None = None
    manager: str | None = None


def _record(path: str, record: Any) -> _Record | None:
    """Convert the entry RECORD. Returns None if no manager saved the checkpoint."""
    try:
        facts = msgspec.convert(record, _Facts)
    except msgspec.ValidationError:
        return None
    return _Record(
        label=facts.label,
        owner=facts.label if facts.owner is None else facts.owner,
        manager=facts.manager,
        checkpoint=SavedCheckpoint(
            path=path, step=facts.step, metrics=facts.metrics, saved_at=facts.saved_at
        ),
    )


def _name_of(template: str, *, step: int) -> str:
    try:
        return template.format(step=step)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise StateError(
            "Invalid template for the names of checkpoints",
            expected='a string with the field {step}, such as "step-{step}"',
            actual=f"{template!r}: {type(error).__name__}: {error}",
        ) from error


def _checked_name(name: str) -> str:
    """Check that the manager can save and find a name in its folder. Raises StateError."""
    if not name or "/" in name or "\0" in name or name.startswith("."):
        raise StateError(
            "Invalid name for a checkpoint",
            expected="the name of a directory in the manager's folder, without a leading dot",
            actual=repr(name),
            remedy="create another manager to save in another folder",
        )
    return name


def _owner(name: str, keep: Sequence[Retention]) -> str:
    """Return the owner of a manager without a label: its template and policies without counts."""
    policies = [
        f"KeepBest {policy.monitor} {policy.mode}"
        if isinstance(policy, KeepBest)
        else getattr(policy, "__qualname__", type(policy).__name__)
        for policy in keep
    ]
    return " | ".join([name, *sorted(policies)])
