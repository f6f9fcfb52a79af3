"""The coordinator for an operation: one process, or the ranks of a process group."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.single import SingleCoordinator
from shardckpt.errors import CoordinationError

__all__ = ["Operation", "operation"]


@dataclass(slots=True)
class Operation:
    """One operation of several ranks. Entering it is collective, and gives its Coordinator;
    that may happen in another thread, and after the process group has been destroyed."""

    rank: int
    world_size: int
    scope: AbstractContextManager[Coordinator]

    def __enter__(self) -> Coordinator:
        return self.scope.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.scope.__exit__(*error)


def operation(subject: str, process_group: Any = None, *, channel: str = "main") -> Operation:
    """An operation of the ranks that take part in it, to be entered.

    `subject` says what it is about, alike on all ranks. They are those of `process_group`, by
    default of torch.distributed's default group; where there is none, this process alone.
    """
    if not dist.is_available() or not dist.is_initialized():
        if process_group is not None:
            raise CoordinationError(
                "A process group was given, but torch.distributed is not initialised",
                remedy="call torch.distributed.init_process_group() first",
            )
        return Operation(0, 1, nullcontext(SingleCoordinator()))
    group = process_group if process_group is not None else dist.group.WORLD
    if dist.get_rank(group) < 0:
        raise CoordinationError(
            "This rank is no member of the process group",
            rank=dist.get_rank(),
            remedy="call this on the members of the group alone",
        )
    if dist.get_world_size(group) == 1:
        return Operation(0, 1, nullcontext(SingleCoordinator()))
    from shardckpt.coordination.torch_store import store_coordinator

    scope = store_coordinator(group, channel=channel, subject=subject)
    return Operation(dist.get_rank(group), dist.get_world_size(group), scope)
