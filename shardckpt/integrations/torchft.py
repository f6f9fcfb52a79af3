"""Checkpoints of a training with torchft, which one of the replica groups writes.

    checkpoints = resume(manager, "checkpoints", {"model": model, "optimizer": optimizer})
    ...
    checkpoints.save(every=100)  # after each step

Replica groups hold equal state. They are separate jobs that join and leave, each with a process
group of its own. Tested with torchft 0.2.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from typing import Any

from shardckpt.errors import CheckpointBusyError, StateError
from shardckpt.manager.manager import PASSING, CheckpointManager, Restored
from shardckpt.manager.retention import SavedCheckpoint
from shardckpt.state.mismatches import mismatch_remedy
from shardckpt.storage.base import Storage
from shardckpt.storage.resolve import resolve

__all__ = ["ReplicaCheckpoints", "resume"]

_KEY = "torchft"
_OTHER_STATE = (
    "pass the state that was saved, or load the matching entries with shardckpt.load(state, path, "
    "strict=False), and pass a new folder"
)


def resume(
    manager: Any,
    folder: str | os.PathLike[str] | Storage,
    state: MutableMapping[str, Any],
    *,
    replica_id: str | int | None = None,
    replica_state: MutableMapping[str, Any] | None = None,
    **options: Any,
) -> ReplicaCheckpoints:
    """Load the newest checkpoint in a folder, if there is one, and return the object that saves.

    Collective within each replica group. Call it in every group before the first step. The steps of
    the manager continue at that of the checkpoint. If other groups have trained on, torchft then
    gives this group their state.

    Args:
        manager: The `torchft.Manager`.
        folder: The folder of the checkpoints. All groups pass the same one.
        state: The state that is equal in all groups; a dict, see `shardckpt.save`. The step of the
            manager is saved with it, under the key "torchft".
        replica_id: The name of this group among the groups, the same after a restart. Needed for
            `replica_state`.
        replica_state: A state that differs by group, such as the position in the data. Each group
            saves its own in the folder `replica-{replica_id}`, and gets the newest one that is not
            after the checkpoint.
        **options: Arguments of CheckpointManager, such as `keep`, `asynchronous` and `tolerate`.
            The ranks are those of `process_group`, by default of the default group of
            torch.distributed, which must have only the ranks of this replica group.

    Returns:
        The checkpoints of this group. Its attribute `restored` says what was loaded.

    Raises:
        StateError: An argument is invalid.
        LoadMismatchError: The checkpoint does not fit the state.
        CorruptionError: All checkpoints are corrupted.
        CoordinationError: A rank of this group failed.

    Example:
        >>> checkpoints = resume(manager, "run", {"model": model})  # doctest: +SKIP
        >>> while manager.current_step() < 1000:  # doctest: +SKIP
        ...     train_step()
        ...     checkpoints.save(every=100)
    """
    _check(state, replica_id, replica_state)
    place = resolve(folder, options.pop("storage", None), fixed=True)
    shared = _Checkpoints(place.path, storage=place.storage, **options)
    own = None
    if replica_state is not None:
        path = place.storage.child(place.path, f"replica-{replica_id}")
        own = _Checkpoints(path, storage=place.storage, **{**options, "asynchronous": False})
    saved = {**state, _KEY: manager}
    with mismatch_remedy(_OTHER_STATE):
        restored = shared.restore_latest(saved)
    state.update((key, saved[key]) for key in state)
    if own is not None and restored is not None:
        with mismatch_remedy(_OTHER_STATE):
            own.restore_at(restored.step, replica_state)
    return ReplicaCheckpoints(manager, state, shared, replica_state, own, restored)


class ReplicaCheckpoints:
    """Saves the checkpoints of a training with torchft; `resume` returns it.

    Attributes:
        restored: The checkpoint that was loaded. None if the folder had none.

    Example:
        >>> checkpoints = resume(manager, "run", {"model": model})  # doctest: +SKIP
        >>> checkpoints.restored.step  # doctest: +SKIP
        200
    """

    def __init__(
        self,
        manager: Any,
        state: Mapping[str, Any],
        shared: _Checkpoints,
        replica_state: Mapping[str, Any] | None,
        own: _Checkpoints | None,
        restored: Restored | None,
    ) -> None:
        self.restored = restored
        self._manager = manager
        self._state, self._shared = state, shared
        self._replica_state, self._own = replica_state, own
        self._seen = self._shared_step = self._own_step = restored.step if restored else 0

    def save(
        self, *, every: int = 1, metrics: Mapping[str, float] | None = None
    ) -> SavedCheckpoint | None:
        """Save if a checkpoint is due, from the first replica group of the quorum.

        Collective within each replica group. Call it in every group after each step, before the
        quorum of the next one is started. The other groups return at once. A step that was not
        committed is not saved. If the group that had to write has died, the next writer saves at
        once. A checkpoint of the same step is replaced: the group that wrote it had committed a
        step that the others then repeated.

        Args:
            every: The number of steps from one checkpoint to the next.
            metrics: Metrics by name, for KeepBest.

        Returns:
            The checkpoint, in the group that wrote it. With `asynchronous` it is not complete yet.

        Raises:
            StateError: An argument or the state is invalid.
            CheckpointBusyError: Another group still writes the same step. With `tolerate`, this
                group then leaves the step out.
            StorageError: The file system refused an operation.
            CoordinationError: A rank of this group failed.
        """
        if not isinstance(every, int) or every < 1:
            raise StateError("Invalid value for every", expected="1 or above", actual=repr(every))
        step = self._manager.current_step()
        if step == self._seen:  # not committed
            return None
        self._seen = step
        due = step - step % every
        saved = None
        if self._manager.participating_rank() == 0 and self._shared_step < due:
            self._shared_step = step
            if not self._shared.has_steps(due, step):
                state = {**self._state, _KEY: self._manager}
                saved = self._shared.save(step, state, metrics=metrics, if_exists="overwrite")
                self._shared.wait_staged()  # torchft may replace the state before the next step
        if self._own is not None and (saved or self._own_step < due):
            self._own_step = step
            own = self._replica_state or {}
            self._own.save(step, own, metrics=metrics, if_exists="overwrite")
        return saved

    def wait(self) -> None:
        """Wait for the save in the background, if there is one. Collective within the group.

        Raises:
            ShardckptError: The save failed; see `shardckpt.save`.
        """
        self._shared.wait()


class _Checkpoints(CheckpointManager):
    """A CheckpointManager in each replica group. Each may remove what another one has saved."""

    _passing = (*PASSING, CheckpointBusyError)

    def __init__(self, folder: Any, **options: Any) -> None:
        super().__init__(folder, **options)
        self._identity = _KEY

    def restore_at(self, step: int, state: Any) -> None:
        """Load the newest checkpoint that is not after a step, if there is one. Collective."""
        self._restore(state, lambda saved: [c for c in saved[::-1] if c.step <= step], strict=True)

    def has_steps(self, first: int, end: int) -> bool:
        """Whether there is a checkpoint of the steps from `first` to before `end`. Collective."""
        found = self.first_that_loads(
            lambda path: None, lambda saved: [c for c in saved if first <= c.step < end]
        )
        return found is not None


def _check(state: object, replica_id: object, replica_state: object) -> None:
    if not isinstance(state, MutableMapping) or _KEY in state:
        raise StateError(
            "Invalid state for checkpoints with torchft",
            expected=f"a dict without the key {_KEY!r}, which holds the step of the manager",
            actual=f"a dict with {_KEY!r}" if isinstance(state, Mapping) else type(state).__name__,
            remedy="wrap the state in a dict, or rename the key",
        )
    if (replica_id is None) != (replica_state is None):
        raise StateError(
            "The state of a replica group needs its name",
            expected="replica_id and replica_state, or neither",
            actual=f"replica_id={replica_id!r}, replica_state={type(replica_state).__name__}",
            remedy="pass the number of this replica group as replica_id",
        )
