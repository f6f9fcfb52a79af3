"""Runs a function on several ranks: processes forked from a server that has torch imported."""

from __future__ import annotations

import contextlib
import datetime
import io
import multiprocessing
import os
import queue
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = [
    "torch",
    "torch._dynamo",  # which the first step of an optimizer imports
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "shardckpt.api",
    "shardckpt.integrations.dcp",
    "shardckpt.nn_handler",
]


FSDP2_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
"""In PyTorch 2.6, FSDP2 can't gather parameters on CPU ranks."""


class RankError(AssertionError):
    """The errors of ranks, as text."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120.0
) -> list[Any]:
    """function(*arguments) on each rank of a fresh gloo group; what each returned, in order."""
    results = start_ranks(world_size, function, *arguments).wait(timeout_s)
    failed = [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(results) if not ok]
    if failed:
        raise RankError("\n".join(failed))
    return [value for _, value in results]


class Ranks:
    """Ranks that run; `processes` to kill or stop them."""

    def __init__(self, processes: Sequence[Any], results: Any, store: Any) -> None:
        self.processes = processes
        self._results = results
        self._store = store  # its server lives here

    def wait(self, timeout_s: float, *, ending: int | None = None) -> list[tuple[bool, Any]]:
        """Return (True, result) or (False, error) for each rank, once so many have ended."""
        found: dict[int, tuple[bool, Any]] = {}
        give_up_at = time.monotonic() + timeout_s
        enough = len(self.processes) if ending is None else ending
        while len(found) < enough and time.monotonic() < give_up_at:
            try:
                rank, ok, value = self._results.get(timeout=0.1)
                found[rank] = (ok, value)
            except queue.Empty:
                if (
                    all(not process.is_alive() for process in self.processes)
                    and self._results.empty()
                ):
                    break
        for process in self.processes:
            process.join(timeout=2.0 if len(found) == len(self.processes) else 0.1)
            if process.is_alive():
                process.kill()
                process.join()
        return [
            found.get(rank, (False, f"no result, exit code {process.exitcode}"))
            for rank, process in enumerate(self.processes)
        ]


def start_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> Ranks:
    """As run_ranks, without waiting."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    results = context.Queue()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        context.Process(
            target=_main,
            args=(rank, world_size, store.port, results, function, arguments),
            daemon=True,
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return Ranks(processes, results, store)


def _main(
    rank: int, world_size: int, port: int, results: Any, function: Any, arguments: Any
) -> None:
    torch.set_num_threads(1)
    os.environ["TEST_STORE_PORT"] = str(port)
    try:
        join_group(rank, world_size, port, name="world")
        value = function(*arguments)
        results.put((rank, True, value))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    results.close()
    results.join_thread()
    # Groups that lost a rank may hang in their destructors, and any group before PyTorch 2.8.
    os._exit(0)


def join_group(rank: int, world_size: int, port: int, *, name: str) -> None:
    """Initialize torch.distributed over the store at a port."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(name, store),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    dist.barrier()  # a rank that leaves the group while others still connect would fail them


def on_world_sizes(sizes: Sequence[int], function: Callable[..., Any], *arguments: Any) -> None:
    """Within ranks: function(world size, *arguments) in groups of the first n ranks, one after
    another."""
    rank, port = dist.get_rank(), int(os.environ["TEST_STORE_PORT"])
    dist.barrier()
    dist.destroy_process_group()
    for number, size in enumerate(sizes):
        if rank < size:
            join_group(rank, size, port, name=f"group{number}")
            function(size, *arguments)
            dist.barrier()
            dist.destroy_process_group()


def like_torchrun(world_size: int) -> None:
    """Within a rank: no process group, and the environment that torchrun gives a script."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": os.environ["TEST_STORE_PORT"],
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }
    os.environ.update({name: str(value) for name, value in environment.items()})


def run_script(path: Any, *argument_lists: Sequence[Any], ranks: int = 0) -> list[str]:
    """Run a script in new processes, in its own directory, as python or torchrun do.

    Returns the output of rank 0. With several lists of arguments, the script runs once for each.
    """
    lists = [list(map(str, arguments)) for arguments in argument_lists] or [[]]
    return run_ranks(max(ranks, 1), _script, str(path), lists, ranks)[0]  # type: ignore[no-any-return]


def _script(path: str, argument_lists: list[list[str]], ranks: int) -> list[str]:
    if ranks:
        like_torchrun(ranks)
    else:
        dist.destroy_process_group()
    os.chdir(os.path.dirname(path))
    sys.path.insert(0, os.path.dirname(path))
    printed = []
    for arguments in argument_lists:
        sys.argv = [path, *arguments]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            runpy.run_path(path, run_name="__main__")
        printed.append(out.getvalue())
    return printed
