"""CheckpointManager: the checkpoints of one job in one directory."""

from __future__ import annotations

import os
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
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
    NotACheckpointError,
    ShardckptError,
    StateError,
    StorageError,
)
from shardckpt.manager.backends import RECORD, Format, Sharded
from shardckpt.manager.retention import KeepBest, Retention, SavedCheckpoint, ranked, to_remove
from shardckpt.reports import LoadReport
from shardckpt.saving.async_save import SaveHandle
from shardckpt.storage.paths import absolute, local_path

__all__ = ["CheckpointManager", "Restored"]

T = TypeVar("T")
BROKEN = (CheckpointNotFoundError, CorruptionError, NotACheckpointError, StorageError)
"""What makes a restore turn to another checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What was restored: a checkpoint, the report of its load, and the paths of those that were
    tried before and are broken."""

    checkpoint: SavedCheckpoint
    report: LoadReport
    skipped: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """The step that was given to save."""
        return self.checkpoint.step

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics that were given to save."""
        return self.checkpoint.metrics


class CheckpointManager(AbstractContextManager["CheckpointManager"]):
    """Saves a job's state by step into a directory, keeps what its policies say, and restores.

    `keep`: policies (KeepLast, KeepBest, KeepEverySteps, KeepEveryHours, or your own function);
    a checkpoint stays if any of them keeps it; without policies all stay. `name` makes the
    names, by `step`. Nothing is removed before the newest checkpoint that stays, and every
    other that a policy counts, has been verified: each once, by reading it whole, or with
    check="quick" by its manifest and the sizes of its shards. Checkpoints that are found to be
    broken are neither counted nor removed. With `asynchronous` a save goes on in the
    background, see async_save; the next save, `wait` or `close` raises what went wrong.
    Files that have not changed since the newest checkpoint are linked, not written. Each save
    begins with the removal of what dead ones have left in the folder.
    Managers with different `label` share a directory and don't see each other's checkpoints; one
    with label None sees all of them. A manager removes only what a manager of the same owner has
    saved: the owner is the label or, by default, follows from `name` and the policies without their
    counts. Of what another process saves under the same owner at the same time it removes nothing.

    What says so is collective over `process_group`, as shardckpt.save is.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: Sequence[Retention] = (),
        name: str = "step-{step}",
        asynchronous: bool = False,
        check: Literal["full", "quick"] = "full",
        label: str | None = "",
        process_group: Any = None,
        format: Format | None = None,
    ) -> None:
        if check not in ("full", "quick"):
            raise StateError(
                "Unknown value for check", expected='"full" or "quick"', actual=repr(check)
            )
        self.folder = absolute(local_path(folder))
        _checked_name(_name_of(name, step=0))
        self.keep = tuple(keep)
        self.label = label
        self.owner = label or _owner(name, self.keep)
        self._identity = uuid.uuid4().hex
        self._made_at = time.time()
        self._name = name
        self._asynchronous = asynchronous
        self._check = check
        self._group = process_group
        self._format: Format = format or Sharded()
        self._pending: SaveHandle | None = None
        self._records: dict[str, tuple[Any, _Record | None]] = {}
        self._verified: dict[str, bool] = {}

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
        name: str | None = None,
        if_exists: Literal["error", "replace", "number"] = "error",
    ) -> SavedCheckpoint:
        """Save a state under a step; collective. Then removes what no policy keeps.

        `state` as for shardckpt.save, a dict. `name` stands in for the manager's own template.
        Where its path is taken: "error" raises CheckpointExistsError, "replace" replaces the
        checkpoint there, "number" appends `-v1`, `-v2` and so on. Names, metrics and time are
        those of rank 0.
        """
        if not isinstance(step, int) or step < 0:
            raise StateError("This is no step", expected="an int from 0", actual=repr(step))
        if if_exists not in ("error", "replace", "number"):
            raise StateError(
                "Unknown value for if_exists",
                expected='"error", "replace" or "number"',
                actual=repr(if_exists),
            )
        if not isinstance(state, Mapping) or RECORD in state:
            raise StateError(
                "This is no state for a CheckpointManager",
                expected=f"a dict without the key {RECORD!r}",
                actual=type(state).__name__,
            )
        self.wait()
        found = {key: float(value) for key, value in (metrics or {}).items()}
        checkpoint, base, manager = self._agree(
            f"save step {step} in {self.folder}", step, found, name, if_exists
        )
        record = {
            "label": self.label,
            "owner": self.owner,
            "manager": manager,
            "step": step,
            "metrics": dict(checkpoint.metrics),
            "saved_at": checkpoint.saved_at,
        }
        self._pending = self._format.save(
            {**state, RECORD: record},
            checkpoint.path,
            overwrite=if_exists == "replace",
            asynchronous=self._asynchronous,
            process_group=self._group,
            base=base,
        )
        if not self._asynchronous:
            self._prune()
        return checkpoint

    def _agree(
        self, subject: str, step: int, metrics: dict[str, float], name: str | None, if_exists: str
    ) -> tuple[SavedCheckpoint, str | None, str]:
        """Where the checkpoint goes, the one that its unchanged files are taken from, and which
        manager says so: rank 0's."""

        def decide(payloads: list[bytes]) -> bytes:
            self._format.sweep(self.folder)
            wanted = os.path.join(
                self.folder, _checked_name(name or _name_of(self._name, step=step))
            )
            path, number = wanted, 0
            stem, suffix = os.path.splitext(wanted)
            if suffix not in (".pth", ".pt", ".safetensors"):
                stem, suffix = wanted, ""
            while if_exists == "number" and self._format.exists(path):
                number += 1
                path = f"{stem}-v{number}{suffix}"
            if if_exists == "error" and self._format.exists(path):
                raise CheckpointExistsError(
                    "There is something at this path already",
                    path=path,
                    remedy='give another step or name, or if_exists="replace"',
                )
            # Files of one that is broken may be those of older ones: then all is written anew.
            newest = self.checkpoints()[-1:]
            base = next((c.path for c in newest if self._verified.get(_key(c), True)), None)
            taken = base and os.fsencode(base)
            facts = [os.fsencode(path), step, metrics, time.time(), taken, self._identity]
            return msgspec.msgpack.encode(facts)

        with operation(f"CheckpointManager: {subject}", self._group) as coordinator:
            answer = exchange(coordinator, "name", lambda: b"", decide)
        path, step, metrics, saved_at, base, manager = msgspec.msgpack.decode(answer)
        checkpoint = SavedCheckpoint(
            path=os.fsdecode(path), step=step, metrics=metrics, saved_at=saved_at
        )
        return checkpoint, base and os.fsdecode(base), manager

    def wait(self) -> None:
        """Wait for the save in the background, if there is one, and prune; collective."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
            self._prune()

    def staged(self) -> None:
        """Wait until the state of a save in the background may change; see SaveHandle.staged."""
        if self._pending is not None:
            self._pending.staged()

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """As wait."""
        self.wait()

    def checkpoints(self) -> list[SavedCheckpoint]:
        """The checkpoints of this manager that look whole, oldest first. Not collective: reads
        the directory."""
        return self._scan()[0]

    def _scan(self) -> tuple[list[SavedCheckpoint], list[tuple[str, str]]]:
        """The checkpoints that look whole, oldest first; (path, what is wrong) of the others."""
        found, broken = [], []
        for name in self._format.names(self.folder):
            path = os.path.join(self.folder, name)
            try:
                checkpoint = self._look(path)
            except (CorruptionError, FormatVersionError) as error:
                broken += [] if self._is_alias(path) else [(path, error.message)]
            else:
                found += [checkpoint] if checkpoint and not self._is_alias(path) else []
        return sorted(found, key=lambda c: (c.step, c.saved_at)), broken

    def _is_alias(self, path: str) -> bool:
        """Whether it is a symlink to another name in the folder, such as `latest` to `step-7`:
        that would count twice, and be removed under a name that was not to stay."""
        real, folder = os.path.realpath(path), os.path.realpath(self.folder)
        return os.path.dirname(real) == folder and os.path.basename(real) != os.path.basename(path)

    def all_steps(self) -> list[int]:
        """The steps of the checkpoints that look whole, ascending. Not collective."""
        return sorted({checkpoint.step for checkpoint in self.checkpoints()})

    def restore_latest(self, state: Any, *, strict: bool = True) -> Restored | None:
        """Load the newest checkpoint into a state, in place; collective. None if there is none.

        One that turns out to be broken is passed over for the one before, with a warning.
        """
        return self._restore(state, lambda found: found[::-1], strict=strict)

    def restore_best(
        self,
        state: Any,
        metric: str | None = None,
        mode: Literal["min", "max"] | None = None,
        *,
        strict: bool = True,
    ) -> Restored | None:
        """As restore_latest, the best by a metric first: by default that of the KeepBest policy."""
        best = next((policy for policy in self.keep if isinstance(policy, KeepBest)), None)
        if best is None and metric is None:
            raise StateError("Best by which metric?", remedy="give metric=, or a KeepBest policy")
        if mode not in (None, "min", "max"):
            raise StateError("Unknown value for mode", expected='"min" or "max"', actual=repr(mode))
        by = metric or (best.metric if best else "")
        better = mode or (best.mode if best and metric in (None, best.metric) else "min")
        return self._restore(state, lambda found: ranked(found, by, better), strict=strict)

    def _restore(
        self,
        state: Any,
        order: Callable[[list[SavedCheckpoint]], list[SavedCheckpoint]],
        *,
        strict: bool,
    ) -> Restored | None:
        found = self.first_that_loads(
            lambda path: self._format.load(state, path, strict=strict, process_group=self._group),
            order,
        )
        if found is None:
            return None
        checkpoint, report, skipped = found
        return Restored(checkpoint=checkpoint, report=report, skipped=skipped)

    def first_that_loads(
        self,
        load: Callable[[str], T],
        order: Callable[[list[SavedCheckpoint]], list[SavedCheckpoint]] = lambda found: found[::-1],
    ) -> tuple[SavedCheckpoint, T, tuple[str, ...]] | None:
        """The first checkpoint, in an order, that a collective function loads; what that returned;
        and the paths of the broken ones before it. Collective."""
        self.wait()

        def listed(payloads: list[bytes]) -> bytes:
            found, broken = self._scan()
            for path, message in broken:
                _pass_over(path, message)
            facts = [
                [os.fsencode(c.path), c.step, dict(c.metrics), c.saved_at] for c in order(found)
            ]
            return msgspec.msgpack.encode([facts, [os.fsencode(path) for path, _ in broken]])

        with operation(f"CheckpointManager: restore from {self.folder}", self._group) as ranks:
            rank = ranks.rank
            answer = exchange(ranks, "list", lambda: b"", listed)
        candidates, broken = msgspec.msgpack.decode(answer)
        skipped = [os.fsdecode(path) for path in broken]
        last: ShardckptError | None = None
        for encoded, step, metrics, saved_at in candidates:
            path = os.fsdecode(encoded)
            try:
                loaded = load(path)
            except BROKEN as error:
                if rank == 0:
                    _pass_over(path, error.message)
                skipped.append(path)
                last = error
                continue
            checkpoint = SavedCheckpoint(path=path, step=step, metrics=metrics, saved_at=saved_at)
            return checkpoint, loaded, tuple(skipped)
        if last is not None:
            raise CorruptionError(
                "None of the checkpoints can be loaded",
                path=self.folder,
                actual=", ".join(skipped),
                remedy="the state may be partly overwritten: make it anew before going on",
            ) from last
        return None

    def _prune(self) -> None:
        """Remove what no policy keeps; collective, rank 0 does it."""
        if not self.keep:
            return
        with operation(f"CheckpointManager: prune {self.folder}", self._group) as coordinator:

            def remove() -> bytes:
                if coordinator.rank == 0:
                    for checkpoint in self._condemned(coordinator):
                        self._remove(checkpoint)
                return b""

            exchange(coordinator, "prune", remove, lambda payloads: b"")

    def _remove(self, checkpoint: SavedCheckpoint) -> None:
        try:
            self._format.remove(checkpoint.path)
        except StorageError as error:
            # The save is done. The next one tries again.
            warnings.warn(f"{checkpoint.path} can't be removed: {error.message}", stacklevel=6)

    def _condemned(self, coordinator: Coordinator) -> list[SavedCheckpoint]:
        saved = [
            checkpoint
            for checkpoint in self.checkpoints()
            if self._verified.get(_key(checkpoint), True) and self._may_remove(checkpoint)
        ]
        while condemned := to_remove(saved, self.keep):
            paths = {checkpoint.path for checkpoint in condemned}
            broken = next(
                (
                    c
                    for c in reversed(saved)
                    if c.path not in paths and not self._intact(c, coordinator)
                ),
                None,
            )
            if broken is None:
                return condemned
            saved.remove(broken)
        return []

    def _may_remove(self, checkpoint: SavedCheckpoint) -> bool:
        """Whether this manager saved a checkpoint, or one of the same owner before this one was
        made."""
        record = self._records[checkpoint.path][1]
        return record is not None and (
            record.manager == self._identity
            or (record.owner == self.owner and checkpoint.saved_at < self._made_at)
        )

    def _intact(self, checkpoint: SavedCheckpoint, coordinator: Coordinator) -> bool:
        key = _key(checkpoint)
        if key not in self._verified:
            try:
                self._format.verify(
                    checkpoint.path, quick=self._check == "quick", progress=coordinator.progress
                )
                self._verified[key] = True
            except BROKEN as error:
                warnings.warn(
                    f"{checkpoint.path} is broken, and does not count: {error.message}",
                    stacklevel=7,
                )
                self._verified[key] = False
        return self._verified[key]

    def _look(self, path: str) -> SavedCheckpoint | None:
        """The checkpoint at a path, if it is one of this manager's; raises if it is broken."""
        try:
            signature = self._format.signature(path)
            if self._records.get(path, (None, None))[0] != signature:
                self._records[path] = signature, _record(path, self._format.record(path))
        except (NotACheckpointError, CheckpointNotFoundError, OSError):
            return None
        record = self._records[path][1]
        ours = record is not None and (self.label is None or record.label == self.label)
        return record.checkpoint if ours and record is not None else None


def _key(checkpoint: SavedCheckpoint) -> str:
    return f"{checkpoint.path} {checkpoint.saved_at}"


def _pass_over(path: str, message: str) -> None:
    warnings.warn(f"{path} is broken and passed over: {message}", stacklevel=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """What a checkpoint says under RECORD. Earlier versions saved a label in place of an owner."""

    label: str | None
    owner: str | None
    manager: str | None
    checkpoint: SavedCheckpoint


class _Facts(msgspec.Struct, kw_only=True):
    """The plain data of a record."""

    label: str | None
    step: int
    metrics: dict[str, float]
    saved_at: float
    owner: str | None = None
    manager: str | None = None


def _record(path: str, record: Any) -> _Record | None:
    """None for anything that no manager has saved."""
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
            expected='a text with the field {step}, as in "step-{step}"',
            actual=f"{template!r}: {type(error).__name__}: {error}",
        ) from error


def _checked_name(name: str) -> str:
    """Raises StateError for the name of a checkpoint that is not in the manager's folder, or that
    the manager would not find again."""
    if not name or "/" in name or "\0" in name or name.startswith("."):
        raise StateError(
            "Invalid name for a checkpoint",
            expected="the name of a directory in the manager's folder, without a leading dot",
            actual=repr(name),
            remedy="choose another folder= of the manager to save elsewhere",
        )
    return name


def _owner(name: str, keep: Sequence[Retention]) -> str:
    """What tells a manager without a label from others: its names and its kinds of policies."""
    kinds = [
        f"KeepBest {policy.metric} {policy.mode}"
        if isinstance(policy, KeepBest)
        else getattr(policy, "__qualname__", type(policy).__name__)
        for policy in keep
    ]
    return " | ".join([name, *sorted(kinds)])
