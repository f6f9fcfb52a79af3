"""Whether all ranks have come to the same point when training fails on some."""

from __future__ import annotations

import time
from contextlib import suppress

import torch.distributed as dist

from shardckpt import knobs

__all__ = ["meet"]


def meet(where: str) -> bool:
    """Wait for all ranks to fail too, and whether they do so at the same point; collective.

    A rank that fails within a collective leaves the others waiting in it: its connections are
    cut, so that they fail as well. All then talk through the store of the process group. Those
    that have not come within the deadline (knobs.DEADLINE_S) are not waited for.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    group = dist.group.WORLD
    assert group is not None
    with suppress(Exception):  # not every backend knows how
        group.abort()
    store, size = group.get_group_store(), dist.get_world_size()
    store.set(f"shardckpt/emergency/{dist.get_rank()}", where)
    keys = [f"shardckpt/emergency/{rank}" for rank in range(size)]
    give_up_at = time.monotonic() + knobs.DEADLINE_S
    while not store.check(keys):
        if time.monotonic() > give_up_at:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            raise TimeoutError(f"ranks {missing} did not stop as well")
        time.sleep(0.05)
    places = {store.get(key).decode() for key in keys}
    if len(places) > 1:
        raise RuntimeError(f"the ranks stopped at different points: {sorted(places)}")
    return True
