"""The coordinator for an operation: one process, or the ranks of a process group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.single import SingleCoordinator
from shardckpt.errors import CoordinationError

__all__ = ["operation"]


@contextmanager
def operation(
    subject: str, process_group: Any = None, *, channel: str = "main"
) -> Iterator[Coordinator]:
    """The ranks that take part in one operation; collective over them.

    `subject` says what it is about, alike on all ranks. They are those of `process_group`, by
    default of torch.distributed's default group; where there is none, this process alone.
    """
    if not dist.is_available() or not dist.is_initialized():
        if process_group is not None:
            raise CoordinationError(
                "A process group was given, but torch.distributed is not initialised",
                remedy="call torch.distributed.init_process_group() first",
            )
        yield SingleCoordinator()
        return
    group = process_group if process_group is not None else dist.group.WORLD
    if dist.get_rank(group) < 0:
        raise CoordinationError(
            "This rank is no member of the process group",
            rank=dist.get_rank(),
            remedy="call this on the members of the group alone",
        )
    if dist.get_world_size(group) == 1:
        yield SingleCoordinator()
        return
    from shardckpt.coordination.torch_store import store_coordinator

    with store_coordinator(group, channel=channel, subject=subject) as coordinator:
        yield coordinator
