"""The schedule of an auto-saver: when it saves, under which name, and what it keeps."""

from __future__ import annotations

import pytest

from shardckpt import errors
from shardckpt.errors import StateError
from shardckpt.manager import KeepBest, KeepLast
from shardckpt.nn_handler.save_schedule import SaveSchedule, checkpoint_name
from tests.nn_handler.models import a_handler, make, train


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


@pytest.mark.parametrize(
    "name",
    ["a/{epoch}", "../x{epoch}", ".h{epoch}", "e{val_loss:d}", "e{epoch:.2q}", "", "{loss.x}"],
)
def test_an_impossible_name_is_an_error_before_the_first_step(tmp_path, name):
    handler = make()
    with pytest.raises(StateError):
        handler.auto_save(interval=1, save_path=tmp_path, name=name)
        train(handler)
    assert handler.step == 0


def test_names_of_checkpoints():
    metrics = {"epoch": 3, "val_loss": 0.12345, "odd": float("nan")}
    assert checkpoint_name("e{epoch}_{val_loss:.2f}", metrics) == "e3_0.12"
    for name in ("{nothing}", "{epoch", "{epoch:d!}", "../e{epoch}", "a/b", "", "."):
        with pytest.raises(errors.StateError):
            checkpoint_name(name, metrics)


@pytest.mark.parametrize("interval", [-2, 1.5, "1"])
def test_bad_intervals_are_refused(interval):
    with pytest.raises(errors.StateError, match="interval"):
        a_handler().auto_save(interval=interval)
