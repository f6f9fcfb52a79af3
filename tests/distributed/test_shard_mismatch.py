"""A rank that writes a shard other than the manifest says: the save fails, and nothing is
committed. The faults were real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt import open_checkpoint
from shardckpt.coordination.resolve import operation
from shardckpt.maintenance.reshard import reshard
from shardckpt.plan import save_plan
from shardckpt.plan.plan_cache import PlanCache
from shardckpt.saving import agreement
from shardckpt.storage.local import LocalStorage
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks

SHARD_1 = "shard-00001-of-00003.safetensors"


def refused(call: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, ...] | None:
    """The facts of the error that a call raises on this rank."""
    try:
        call(*arguments, **options)
    except shardckpt.ShardMismatchError as error:
        where = Path(error.path or "").name
        return error.rank, where, error.tensor, error.expected, error.actual
    return None


def save_in_own_order(folder: str) -> list[object]:
    """Each rank writes its tensors in the order of its own state, not in that of rank 0."""
    rank, layout_order = dist.get_rank(), save_plan.layout_order
    state = {f"stage{rank}": torch.full((10,), float(rank)), "tied": torch.full((10,), 9.0)}
    state = {"m": shardckpt.Union(state)}
    shardckpt.save(state, f"{folder}/base")
    save_plan.layout_order = lambda *table, **_: layout_order(*table[:3])
    agreement._cache = PlanCache()
    calls = [
        lambda path: shardckpt.save(state, path),
        lambda path: shardckpt.save(state, path),  # by the plan in the cache
        lambda path: shardckpt.save(state, path, base=f"{folder}/base"),
        lambda path: shardckpt.async_save(state, path).result(),
    ]
    return [refused(call, f"{folder}/refused") for call in calls]


def test_ranks_that_write_in_their_own_order(tmp_path):
    results = run_ranks(3, save_in_own_order, str(tmp_path))
    path, (expected, actual) = SHARD_1, ("m.tied, F32 [10]", "m.stage1, F32 [10]")
    assert results == [[(1, path, "m.tied", expected, actual)] * 4] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def save_in_two_groups(folder: str) -> list[object]:
    """Plans are remembered without the rank, though a process may have another one in a group."""
    kept = {name: getattr(PlanCache, name) for name in ("writes", "add_writes")}

    def without_rank(name: str) -> Callable[..., Any]:
        return lambda cache, key, *rest: kept[name](cache, (*key[:2], key[2][-1]), *rest)

    for name in kept:
        setattr(PlanCache, name, without_rank(name))
    groups = {name: dist.new_group(ranks) for name, ranks in (("a", [0, 1]), ("b", [1, 2]))}
    state = {f"layer{number}": torch.full((64, 64), float(number)) for number in range(4)}
    wrong = []
    for number in (1, 2):
        for name, group in groups.items():
            if dist.get_rank(group) >= 0:
                found = refused(
                    shardckpt.save, state, f"{folder}/{name}{number}", process_group=group
                )
                wrong.append((f"{name}{number}", found and found[0]))
    return wrong


def test_a_part_of_a_plan_that_is_remembered_for_another_rank(tmp_path):
    results = run_ranks(3, save_in_two_groups, str(tmp_path))
    assert results == [
        [("a1", None), ("a2", 1)],
        [("a1", None), ("b1", None), ("a2", 1), ("b2", None)],
        [("b1", None), ("b2", None)],
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a1", "b1", "b2"]


def reshard_in_two_orders(folder: str) -> object:
    """Rank 1 lays the new files out in another order than rank 0."""
    if dist.get_rank() == 1:
        layout_order = save_plan.layout_order
        save_plan.layout_order = lambda *table: layout_order(*table)[::-1]
    with operation("reshard") as ranks, open_checkpoint(f"{folder}/old") as old:
        options = {"shards": 2, "storage": LocalStorage(), "coordinator": ranks}
        return refused(reshard, old, f"{folder}/new", **options)


def test_ranks_that_write_files_in_parallel(tmp_path):
    state = {f"layer{number}": torch.full((64, 64), float(number)) for number in range(4)}
    shardckpt.save(state, tmp_path / "old")
    results = run_ranks(2, reshard_in_two_orders, str(tmp_path))
    assert results[0] == results[1]
    assert results[0][0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
