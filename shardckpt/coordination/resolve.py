"""Choose the coordinator of an operation: for one process, a process group, or MPI."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.mpi.launch import Launch, mpi_launch, several_ranks, torch_launch
from shardckpt.coordination.single import SingleCoordinator
from shardckpt.errors import CoordinationError

if dist.is_available():  # imported here, as the first async_save must return quickly
    from shardckpt.coordination.store import store_coordinator

__all__ = ["Operation", "alone", "check_launcher", "is_alone", "operation", "over_store"]

_alone_here: ContextVar[bool] = ContextVar("shardckpt.alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Make save, load and CheckpointManager use only this process inside a with block.

    Use it if one rank saves a checkpoint under a path that no other rank uses, and if a launcher
    starts processes that do not work together. Calls with `process_group=` or `comm=` still use
    those ranks. Not collective.

    Example:
        >>> import shardckpt
        >>> with shardckpt.alone():
        ...     report = shardckpt.save({"step": 7}, "run/rank-0")
        >>> report.world_size
        1
    """
    before = _alone_here.set(True)
    try:
        yield
    finally:
        _alone_here.reset(before)


def is_alone() -> bool:
    """Whether this code runs inside a with block of `alone`."""
    return _alone_here.get()


@dataclass(slots=True)
class Operation:
    """An operation of several ranks. Entering it is collective, and returns its Coordinator.

    It may be entered in another thread, and after the process group was destroyed.
    """

    rank: int
    world_size: int
    scope: AbstractContextManager[Coordinator]

    def __enter__(self) -> Coordinator:
        return self.scope.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.scope.__exit__(*error)


def operation(
    subject: str, process_group: Any = None, *, comm: Any = None, channel: str = "main"
) -> Operation:
    """Prepare an operation of the ranks that call this.

    The ranks are those of `comm`, an mpi4py communicator, or of `process_group`. By default they
    are those of the default group of torch.distributed, otherwise of MPI.COMM_WORLD if mpirun
    started this process, otherwise this process alone. Inside `alone` the default is this process
    alone.

    `subject` describes the operation, and is the same on all ranks. Raises CoordinationError if a
    launcher started several ranks that are not connected.
    """
    if comm is not None and process_group is not None:
        raise CoordinationError(
            "Both a communicator and a process group were given",
            remedy="pass either comm= or process_group=, with the ranks that make this call",
        )
    initialized = dist.is_available() and dist.is_initialized()
    if comm is None and process_group is None:
        if is_alone():
            return _alone()
        if not initialized:
            comm = _world()
            check_launcher(comm)
    if comm is not None:
        return _of_communicator(comm, subject, channel)
    if initialized:
        group = process_group if process_group is not None else dist.group.WORLD
        return _of_group(group, subject, channel)
    if process_group is not None:
        raise CoordinationError(
            "A process group was given, but torch.distributed is not initialized",
            remedy="call torch.distributed.init_process_group() first",
        )
    return _alone()


def over_store(comm: Any = None) -> bool:
    """Whether the ranks of an operation are connected by a process group, and not by MPI."""
    return comm is None and not is_alone() and dist.is_available() and dist.is_initialized()


def check_launcher(comm: Any = None) -> None:
    """Raise CoordinationError if torchrun started several ranks without a process group.

    Without the check each rank would act as the only one.
    """
    launch = torch_launch()
    connected = dist.is_available() and dist.is_initialized()
    if launch is None or launch.world_size == 1 or connected or is_alone():
        return
    if comm is None or comm.Get_size() == 1:
        raise CoordinationError(
            "This process is one of several ranks, but no process group connects them",
            rank=launch.rank,
            expected="a process group of torch.distributed",
            actual=f"RANK={launch.rank} and WORLD_SIZE={launch.world_size}, without a group",
            remedy="call torch.distributed.init_process_group() first; if this rank has a "
            "checkpoint of its own, make this call inside `with shardckpt.alone():`",
        )


def _alone() -> Operation:
    return Operation(0, 1, nullcontext(SingleCoordinator()))


def _of_group(group: Any, subject: str, channel: str) -> Operation:
    if dist.get_rank(group) < 0:
        raise CoordinationError(
            "This rank is not a member of the process group",
            rank=dist.get_rank(),
            remedy="make this call only on the members of the group",
        )
    if dist.get_world_size(group) == 1:
        return _alone()
    scope = store_coordinator(group, channel=channel, subject=subject)
    return Operation(dist.get_rank(group), dist.get_world_size(group), scope)


def _of_communicator(comm: Any, subject: str, channel: str) -> Operation:
    from shardckpt.coordination.mpi.coordinator import check_communicator, mpi_coordinator
    from shardckpt.coordination.mpi.link import link_of

    if check_communicator(comm, channel=channel) == 1:
        return _alone()
    link = link_of(comm)  # here, in the thread of the program, in the order of its collectives
    link.claim()
    scope = mpi_coordinator(link, channel=channel, subject=subject)
    return Operation(link.rank, link.world_size, scope)


def _world() -> Any:
    """Return MPI.COMM_WORLD if mpirun started several ranks or the program has started MPI, or
    None.
    """
    launch = several_ranks()
    loaded = sys.modules.get("mpi4py.MPI")
    started = loaded is not None and loaded.Is_initialized() and not loaded.Is_finalized()
    if launch is None and not started:
        return None
    if not started and mpi_launch() is None:
        raise _unconnected_tasks(launch)
    from shardckpt.coordination.mpi.link import load_mpi

    mpi = load_mpi()
    size = mpi.COMM_WORLD.Get_size()
    if launch is None or launch.world_size == size:
        return mpi.COMM_WORLD
    if size == 1 and mpi_launch() is None:
        raise _unconnected_tasks(launch)
    raise CoordinationError(
        f"{launch.launcher} and mpi4py don't belong to the same MPI",
        expected=f"{launch.world_size} ranks, as {launch.launcher} started",
        actual=f"{size} in MPI.COMM_WORLD",
        remedy="use the mpirun of the MPI that mpi4py has loaded: "
        + str(mpi.Get_library_version()).split(",")[0].splitlines()[0],
    )


def _unconnected_tasks(launch: Launch | None) -> CoordinationError:
    """Return the error for tasks of srun that are not connected. Each would act as the only one."""
    return CoordinationError(
        "srun started several tasks, but nothing connects them",
        expected="MPI (srun --mpi=pmix), or a process group of torch.distributed",
        actual=f"{launch.world_size if launch else 1} tasks, without either",
        remedy="call shardckpt.init_from_mpi() first, which needs no MPI here; if this task has a "
        "checkpoint of its own, make this call inside `with shardckpt.alone():`",
    )
