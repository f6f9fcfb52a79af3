"""Whether all ranks have come to the same point when training fails on some."""

from __future__ import annotations

import time

import torch.distributed as dist

from shardckpt import knobs

__all__ = ["meet"]


def meet(where: str) -> bool:
    """Wait for all ranks to fail too; True if they do so at the same point. Collective.

    The ranks talk through the store of the process group. One that fails alone, within a step,
    leaves the others waiting in a collective that nothing but its end can cut short (torch
    2.13: neither abort nor shutdown does with gloo). So it waits for them for a while, in which
    they come if they fail as well, tells them that it has given up, and ends; then they fail.

    Raises TimeoutError where ranks have not come, RuntimeError where they are at other points.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    group = dist.group.WORLD
    assert group is not None
    store, ranks = group.get_group_store(), range(dist.get_world_size())
    store.set(f"shardckpt/emergency/{dist.get_rank()}", where)
    keys = [f"shardckpt/emergency/{rank}" for rank in ranks]
    give_up_at = time.monotonic() + knobs.DEADLINE_S / 3
    while not store.check(keys):
        if time.monotonic() > give_up_at or store.check(["shardckpt/emergency/over"]):
            store.set("shardckpt/emergency/over", "")
            missing = [rank for rank in ranks if not store.check([keys[rank]])]
            raise TimeoutError(f"ranks {missing} have not failed at the same step")
        time.sleep(0.05)
    if store.check(["shardckpt/emergency/over"]):
        raise TimeoutError("another rank has given up")
    places = {store.get(key).decode() for key in keys}
    if len(places) > 1:
        raise RuntimeError(f"the ranks stopped at different points: {sorted(places)}")
    return True
