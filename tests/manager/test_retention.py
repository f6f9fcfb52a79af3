"""Retention policies choose the checkpoints of a job that are kept."""

from __future__ import annotations

from shardckpt import (
    KeepBest,
    KeepEveryHours,
    KeepEverySteps,
    KeepLast,
)
from shardckpt.manager.retention import SavedCheckpoint, to_remove


def saved(*steps: int, **metrics: list[float]) -> list[SavedCheckpoint]:
    return [
        SavedCheckpoint(
            path=f"c{step}",
            step=step,
            metrics={name: values[i] for name, values in metrics.items()},
            saved_at=step * 3600.0,
        )
        for i, step in enumerate(steps)
    ]


def kept(found: list[SavedCheckpoint], *policies) -> list[int]:
    gone = {c.path for c in to_remove(found, policies)}
    return [c.step for c in found if c.path not in gone]


def test_policies_choose_the_checkpoints_to_keep():
    four = saved(1, 2, 3, 4, loss=[0.3, 0.1, float("nan"), 0.2])
    assert kept(four) == [1, 2, 3, 4]
    assert kept(four, KeepLast(2)) == [3, 4]
    assert kept(four, KeepBest(1, "loss")) == [2, 4]  # the newest always stays
    assert kept(four, KeepBest(1, "loss", "max")) == [1, 4]
    assert kept(four, KeepBest(1, "nothing")) == [4]
    assert kept(four, KeepEverySteps(3)) == [3, 4]
    assert kept(four, KeepEveryHours(2)) == [1, 3, 4]
    assert kept(four, KeepLast(1), KeepBest(2, "loss")) == [2, 4]
    assert kept(four, lambda found: found[:1]) == [1, 4]
    assert kept([], KeepLast(1)) == []
