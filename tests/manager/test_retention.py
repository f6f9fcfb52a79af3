"""Retention policies choose the checkpoints of a job that are kept."""

from __future__ import annotations

import dataclasses

import pytest

from shardckpt import (
    KeepBest,
    KeepEveryHours,
    KeepEverySteps,
    KeepLast,
    errors,
)
from shardckpt.manager.retention import SavedCheckpoint, ranked, to_remove


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


def test_the_first_of_the_saves_within_some_hours_is_kept():
    hourly = saved(*range(8))
    assert kept(hourly, KeepEveryHours(3)) == [0, 3, 6, 7]
    assert kept(hourly, KeepEveryHours(0.5)) == list(range(8))
    assert kept(hourly, KeepEveryHours(100)) == [0, 7]


def test_of_equal_checkpoints_the_newest_is_better():
    four = saved(1, 2, 3, 4, loss=[0.2, 0.1, 0.1, 0.3])
    assert [c.step for c in ranked(four, "loss", "min")] == [3, 2, 1, 4]
    assert [c.step for c in ranked(four, "loss", "max")] == [4, 1, 3, 2]
    assert ranked(four, "accuracy", "max") == []
    two = saved(5, 5, loss=[0.1, 0.1])
    two[1] = dataclasses.replace(two[1], path="again", saved_at=two[0].saved_at + 1)
    assert ranked(two, "loss", "min")[0].path == "again"


def test_policies_can_not_change_the_order_of_removal():
    three = saved(1, 2, 3)
    assert [c.step for c in to_remove(three, [lambda found: []])] == [1, 2]
    assert to_remove(three, iter(())) == []


@pytest.mark.parametrize(
    ("make", "message", "expected"),
    [
        (lambda: KeepLast(0), "Invalid count", "an integer above 0"),
        (lambda: KeepEverySteps(2.5), "Invalid number of steps", "an integer above 0"),
        (lambda: KeepEveryHours(float("nan")), "Invalid number of hours", "a number above 0"),
        (lambda: KeepBest(1, "x", "least"), "Invalid value for mode", '"min" or "max"'),
    ],
)
def test_an_invalid_policy_is_refused_when_it_is_made(make, message, expected):
    with pytest.raises(errors.StateError, match=message) as raised:
        make()
    assert raised.value.expected == expected
