"""Rank processes: started once for a case; they keep step by barriers."""

from __future__ import annotations

import datetime
import logging
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_DEADLINE_S = 1800


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a job runs: its rank, of how many."""

    rank: int
    world_size: int

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def run_ranks(world_size: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
    """job(place, *arguments) on each rank of a fresh gloo group; what each returned, in order.

    One rank alone has no group, and as many threads as torch gives it; ranks have one each.
    """
    import torch.distributed as dist

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.preload"])
    results = context.Queue()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        context.Process(target=_main, args=(rank, world_size, store.port, results, job, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < world_size:
            rank, value, failure = results.get(timeout=_DEADLINE_S)
            if failure:
                raise RuntimeError(f"rank {rank}: {failure}")
            found[rank] = value
    finally:
        for process in processes:
            process.join(5 if len(found) == world_size else 0)
            if process.is_alive():
                process.kill()
    return [found[rank] for rank in range(world_size)]


def _main(
    rank: int, world_size: int, port: int, results: Any, job: Any, arguments: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    try:
        if world_size > 1:
            torch.set_num_threads(1)
            dist.init_process_group(
                "gloo",
                store=dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False),
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=_DEADLINE_S),
            )
        value = job(Place(rank=rank, world_size=world_size), *arguments)
        results.put((rank, value, ""))
        if world_size > 1:
            dist.barrier()  # nobody's server goes before all are done
            dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)
