"""Run one command in several processes: the ranks of mpirun or srun, or --jobs processes here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from shardckpt.config import current
from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.deadlines import poll
from shardckpt.coordination.exchange import exchange
from shardckpt.coordination.mpi.launch import mpi_launch, several_ranks
from shardckpt.coordination.process_group import init_from_mpi
from shardckpt.coordination.resolve import operation
from shardckpt.coordination.single import SingleCoordinator
from shardckpt.coordination.store import StoreCoordinator
from shardckpt.coordination.store_connection import StoreConnections
from shardckpt.errors import CoordinationError, printable_line
from shardckpt.loading.agreement import same_checkpoint
from shardckpt.maintenance.rewritable import Source

__all__ = ["say", "say_json", "shared"]

_JOB = "SHARDCKPT_JOB"  # rank/number/port, in the environment of the processes started here
_BYTES_PER_JOB = 1 << 30


Opened = TypeVar("Opened", bound=Source)


@contextmanager
def shared(
    options: Any, path: str, open_it: Callable[[], Opened]
) -> Iterator[tuple[Coordinator, Opened]]:
    """Open the checkpoint at `path` in all processes of a command.

    Under mpirun or srun they are its ranks. Otherwise they are this process and `options.jobs` - 1
    others, which it starts.

    Yields:
        The coordinator of the processes, and the open checkpoint.
    """
    jobs = options.jobs
    if jobs is None:
        jobs = 1 if several_ranks() or os.environ.get(_JOB) else _jobs_for(open_it)
    subject = f"{options.command} {path}"
    opened: list[Opened] = []

    def identity() -> bytes:
        opened.append(open_it())
        return opened[0].manifest.checkpoint_id.encode()

    with _coordinator(subject, jobs=jobs, arguments=options.arguments) as coordinator:
        options.rank = coordinator.rank
        try:
            exchange(coordinator, "open", identity, same_checkpoint(path))
            yield coordinator, opened[0]
        finally:
            for checkpoint in opened:
                checkpoint.close()


def say(coordinator: Coordinator, *lines: str) -> None:
    """Print lines on rank 0."""
    if coordinator.rank == 0:
        for line in lines:
            print(printable_line(line))


def say_json(coordinator: Coordinator, facts: Any) -> None:
    """Print facts as JSON on rank 0."""
    if coordinator.rank == 0:
        print(json.dumps(facts, indent=2))


def _jobs_for(open_it: Callable[[], Source]) -> int:
    """Return the number of processes: one for each GiB, at most one for each processor."""
    with closing(open_it()) as source:
        size_bytes = sum(entry.size_bytes for entry in source.manifest.tensors.values())
    return max(1, min(os.cpu_count() or 1, size_bytes // _BYTES_PER_JOB))


@contextmanager
def _coordinator(subject: str, *, jobs: int, arguments: Sequence[str]) -> Iterator[Coordinator]:
    if job := os.environ.get(_JOB):
        rank, number, port = map(int, job.split("/"))
        _connect(port).set(f"up/{rank}", "")
        with _joined(port, rank=rank, number=number) as coordinator:
            yield coordinator
    elif several_ranks():
        if not mpi_launch():
            init_from_mpi()
        with operation(subject) as coordinator:
            yield coordinator
    elif jobs == 1:
        yield SingleCoordinator()
    else:
        with _started(jobs, arguments) as coordinator:
            yield coordinator


@contextmanager
def _started(jobs: int, arguments: Sequence[str]) -> Iterator[Coordinator]:
    store: Any = dist.TCPStore  # type: ignore[attr-defined]
    server = store("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, "-m", "shardckpt", *arguments]
    others = [
        subprocess.Popen(
            command,
            env={**os.environ, _JOB: f"{rank}/{jobs}/{server.port}"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # only this process prints
            stderr=subprocess.DEVNULL,
        )
        for rank in range(1, jobs)
    ]
    up = [f"up/{rank}" for rank in range(1, jobs)]
    try:
        poll(lambda: server.check(up) or _ended(others), current().arrival_deadline_s)
        if not server.check(up):
            raise CoordinationError(
                "A process for --jobs did not start",
                expected=f"{jobs - 1} processes: {' '.join(command[:3])}",
                actual=f"exit codes {[other.poll() for other in others]}",
                remedy="use --jobs 1",
            )
        with _joined(server.port, rank=0, number=jobs) as coordinator:
            yield coordinator
    finally:
        for other in others:
            if not poll(lambda other=other: other.poll() is not None, current().deadline_s):  # type: ignore[misc]
                other.kill()
            other.wait()


def _ended(processes: list[subprocess.Popen[bytes]]) -> bool:
    return any(process.poll() is not None for process in processes)


@contextmanager
def _joined(port: int, *, rank: int, number: int) -> Iterator[Coordinator]:
    connections = StoreConnections(lambda: _connect(port))
    coordinator = StoreCoordinator(connections, "", rank=rank, world_size=number)
    try:
        yield coordinator
    finally:
        coordinator.close()
        connections.close()


def _connect(port: int) -> Any:
    store: Any = dist.TCPStore  # type: ignore[attr-defined]
    return store("127.0.0.1", port, is_master=False, wait_for_workers=False)
