"""When to save, under which name, and what becomes of the saves before: pure logic."""

from __future__ import annotations

import pytest

from shardckpt import errors
from shardckpt.manager import KeepBest, KeepLast
from shardckpt.nn_handler.trainer_saving import SavePlan, checkpoint_name


def epochs(count: int, *, save_last: bool = True, **options) -> list[int]:
    plan = SavePlan(**options)
    return [
        epoch
        for epoch in range(1, count + 1)
        if plan.due_after_epoch(epoch, last=epoch == count, save_last=save_last)
    ]


def test_after_which_epochs():
    assert epochs(5, interval=2) == [2, 4, 5]
    assert epochs(5, interval=2, save_last=False) == [2, 4]
    assert epochs(3, interval=-1) == [3]
    assert epochs(3, interval=-1, save_last=False) == [3]
    assert epochs(3, interval=0) == epochs(3, interval=None) == []


def test_within_epochs():
    plan = SavePlan(every_steps=3, every_minutes=1.5)
    assert [step for step in range(1, 8) if plan.due_at_step(step, saved_at=0)] == [3, 6]
    assert not plan.due_at_step(3, saved_at=3)
    assert not plan.due_by_time(1.4)
    assert plan.due_by_time(1.5)
    assert not SavePlan().due_at_step(3, saved_at=0)
    assert not SavePlan().due_by_time(1e9)


def test_what_stays():
    assert SavePlan().policies() == []
    assert SavePlan(overwrite=True).policies() == [KeepLast(1)]
    plan = SavePlan(keep_last=2, keep_best=3, monitor="loss", mode="max")
    assert plan.policies() == [KeepLast(2), KeepBest(3, "loss", "max")]


def test_names():
    metrics = {"epoch": 3, "val_loss": 0.12345, "run": "a/b"}
    assert checkpoint_name("e{epoch}_{val_loss:.2f}", metrics) == "e3_0.12"
    assert checkpoint_name("{run}", metrics) == "a_b"  # makes no folder
    for name in ("{nothing}", "{epoch", "../e{epoch}", "a/b", "", ".", ".hidden", "{epoch:q}"):
        with pytest.raises(errors.StateError):
            checkpoint_name(name, metrics)
    SavePlan(name="{val_acc}").check_names({"val_acc"})
    assert SavePlan(name="{val_acc}").needs_validation()
    assert not SavePlan(name="{acc}").needs_validation()
