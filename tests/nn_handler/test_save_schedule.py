"""The schedule of an auto-saver: when it saves, under which name, and what it keeps."""

from __future__ import annotations

import pytest

from shardckpt import errors
from shardckpt.manager import KeepBest, KeepLast
from shardckpt.nn_handler.save_schedule import SaveSchedule, checkpoint_name


def epochs(count: int, *, save_last: bool = True, **options) -> list[int]:
    schedule = SaveSchedule(**options)
    return [
        epoch
        for epoch in range(1, count + 1)
        if schedule.due_after_epoch(epoch, last=epoch == count, save_last=save_last)
    ]


def test_the_interval_chooses_the_epochs():
    assert epochs(5, interval=2) == [2, 4, 5]
    assert epochs(5, interval=2, save_last=False) == [2, 4]
    assert epochs(3, interval=-1) == [3]
    assert epochs(3, interval=-1, save_last=False) == [3]
    assert epochs(3, interval=0) == epochs(3, interval=None) == []


def test_steps_and_minutes_choose_saves_within_epochs():
    schedule = SaveSchedule(every_steps=3, every_minutes=1.5)
    assert [step for step in range(1, 8) if schedule.due_at_step(step, saved_at=0)] == [3, 6]
    assert not schedule.due_at_step(3, saved_at=3)
    assert not schedule.due_by_time(1.4)
    assert schedule.due_by_time(1.5)
    assert not SaveSchedule().due_at_step(3, saved_at=0)
    assert not SaveSchedule().due_by_time(1e9)


def test_the_options_give_the_retention_policies():
    assert SaveSchedule().policies() == []
    assert SaveSchedule(overwrite=True).policies() == [KeepLast(1)]
    schedule = SaveSchedule(keep_last=2, keep_best=3, monitor="loss", mode="max")
    assert schedule.policies() == [KeepLast(2), KeepBest(3, "loss", "max")]


def test_a_checkpoint_name_is_filled_from_metrics():
    metrics = {"epoch": 3, "val_loss": 0.12345, "run": "a/b"}
    assert checkpoint_name("e{epoch}_{val_loss:.2f}", metrics) == "e3_0.12"
    assert checkpoint_name("{run}", metrics) == "a_b"  # makes no folder
    for name in ("{nothing}", "{epoch", "../e{epoch}", "a/b", "", ".", ".hidden", "{epoch:q}"):
        with pytest.raises(errors.StateError):
            checkpoint_name(name, metrics)
    SaveSchedule(name="{val_acc}").check_names({"val_acc"})
    assert SaveSchedule(name="{val_acc}").needs_validation()
    assert not SaveSchedule(name="{acc}").needs_validation()
