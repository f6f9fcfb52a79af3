"""Checkpoints of a training with torchft, in which one of the replica groups writes.

    save(ft_manager, {"model": model, "optimizer": optimizer}, "run/step-100")
    load(ft_manager, {"model": model, "optimizer": optimizer}, "run/step-100")

Replica groups hold equal state. They are separate jobs that join and leave, each with a process
group of its own. Tested with torchft 0.2.
"""

from __future__ import annotations

import os
from typing import Any

from shardckpt import api
from shardckpt.errors import StateError
from shardckpt.reports import LoadReport, SaveReport

__all__ = ["is_writer", "load", "save"]

_KEY = "torchft"


def is_writer(manager: Any) -> bool:
    """Whether this replica group is the one that saves in this step: the first that takes part.

    Not collective. Call it after `manager.start_quorum()` of a step, or after the step.

    Args:
        manager: The `torchft.Manager`.

    Returns:
        The same answer on all ranks of a replica group, and True in one group.

    Example:
        >>> if is_writer(manager):  # doctest: +SKIP
        ...     shardckpt.save(state, path)
    """
    return bool(manager.participating_rank() == 0)


def save(
    manager: Any, state: dict[str, Any], path: str | os.PathLike[str], **options: Any
) -> SaveReport | None:
    """Save a state from one replica group, with the step of the manager.

    Collective within each replica group. The other groups return at once, and go on with the next
    step: they don't wait for the save.

    Args:
        manager: The `torchft.Manager`.
        state: A dict, as for `shardckpt.save`.
        path: The new checkpoint. All groups pass the same path.
        **options: Arguments of `shardckpt.save`. The default process group must be that of the
            ranks of this replica group, otherwise pass it as `process_group`.

    Returns:
        The report of the save. None in groups that don't save.

    Raises:
        StateError: The state can't be saved.
        StorageError: The file system refused an operation.
        CoordinationError: A rank of this group failed.

    Example:
        >>> report = save(manager, {"model": model}, "run/step-100")  # doctest: +SKIP
    """
    _check(state)
    if not is_writer(manager):
        return None
    return api.save({**state, _KEY: manager.state_dict()}, path, **options)


def load(
    manager: Any, state: dict[str, Any], path: str | os.PathLike[str], **options: Any
) -> LoadReport:
    """Load a checkpoint of `save` into the state and the manager of this replica group.

    Collective within each replica group. Call it in every group before the first step. A group that
    joins later gets the state from another group, by torchft.

    Args:
        manager: The `torchft.Manager`.
        state: A dict, as for `shardckpt.load`.
        path: The checkpoint.
        **options: Arguments of `shardckpt.load`.

    Returns:
        The report of the load.

    Raises:
        LoadMismatchError: The checkpoint does not fit the state.
        CheckpointError: The checkpoint can't be read.
        CoordinationError: A rank of this group failed.

    Example:
        >>> report = load(manager, {"model": model}, "run/step-100")  # doctest: +SKIP
    """
    _check(state)
    loaded = {**state, _KEY: manager.state_dict()}
    report = api.load(loaded, path, **options)
    manager.load_state_dict(loaded[_KEY])
    state.update({key: value for key, value in loaded.items() if key != _KEY})
    return report


def _check(state: Any) -> None:
    if not isinstance(state, dict) or _KEY in state:
        raise StateError(
            "Invalid state for a checkpoint with torchft",
            expected=f"a dict without the key {_KEY!r}, which holds the manager's step",
            actual=f"a dict with {_KEY!r}" if isinstance(state, dict) else type(state).__name__,
            remedy="wrap the state in a dict, or rename the key",
        )
