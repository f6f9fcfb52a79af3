"""The thread that copies to slower tiers: it repeats what fails, and ends."""

from __future__ import annotations

import multiprocessing
import threading

import pytest

from shardckpt.errors import CorruptionError
from shardckpt.storage import drain as module
from shardckpt.storage.drain import Drain, OthersCopyError

DEADLINE_S = 30


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_WAIT_S", 0.01)


def fails(times: int, error: Exception, done: list[str]):
    """A task that fails a few times."""
    left = [error] * times

    def task():
        if left:
            raise left.pop()
        done.append("done")

    return task


@pytest.mark.parametrize("error", [OthersCopyError(), OSError("busy"), ValueError("a bug")])
def test_a_task_that_fails_is_tried_again(hurried, error):
    drain, done = Drain(), []
    drain.add("a", fails(3, error, done))
    drain.wait("a", DEADLINE_S)
    assert done == ["done"]
    drain.wait_all(DEADLINE_S)
    assert not drain.waits("a")


def test_what_can_never_be_copied_is_dropped(hurried):
    drain, done = Drain(), []
    drain.add("a", fails(1, CorruptionError("damaged"), done))
    drain.wait_all(DEADLINE_S)
    assert done == []


def test_who_waits_for_what_is_dropped_gets_its_error(hurried):
    drain, done = Drain(), []
    for key in (("a", 1), ("b", 1)):
        drain.add(key, fails(1, CorruptionError("damaged"), done), wanted=key == ("a", 1))
    drain.wait(("b", 1), DEADLINE_S)
    for _ in range(2):
        with pytest.raises(CorruptionError):
            drain.wait(("a", 1), DEADLINE_S)
        with pytest.raises(CorruptionError):
            drain.wait_all(DEADLINE_S)
    drain.finish()  # the end of the program raises nothing
    drain.add(("a", 1), fails(0, OSError(), done))
    drain.wait_all(DEADLINE_S)
    drain.add(("a", 1), fails(1, CorruptionError("damaged"), done), wanted=True)
    with pytest.raises(CorruptionError):
        drain.wait(("a", 1), DEADLINE_S)
    drain.forget("a")
    drain.wait_all(DEADLINE_S)
    assert done == ["done"]


def test_a_task_that_fails_does_not_delay_another_one(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_WAIT_S", DEADLINE_S)
    drain, done, failed = Drain(), [], threading.Event()

    def fail():
        failed.set()
        raise OSError("down")

    drain.add("a", fail)
    assert failed.wait(DEADLINE_S)
    drain.add("b", fails(0, OSError(), done))
    drain.wait("b", DEADLINE_S / 2)
    assert done == ["done"]
    drain.forget("a")
    drain.finish()


def test_the_end_of_the_program_gives_up_only_what_fails(hurried):
    drain, done, begun = Drain(), [], threading.Event()

    def first():
        begun.set()
        raise OSError("down")

    for key in "abc":
        drain.add(key, first)
    assert begun.wait(DEADLINE_S)
    drain.add("d", fails(0, OSError(), done))
    drain.finish()
    assert done == ["done"]
    assert not any(map(drain.waits, "abcd"))


def test_a_forked_child_leaves_the_tasks_to_its_parent():
    """Workers of a DataLoader are forked like this while a checkpoint is copied."""
    drain, done, begun, hold = Drain(), [], threading.Event(), threading.Event()
    drain.add("x", lambda: (begun.set(), hold.wait(DEADLINE_S)))
    drain.add("y", lambda: done.append("done"))
    assert begun.wait(DEADLINE_S)

    def work():
        assert not drain.waits("y")
        drain.add("z", fails(0, OSError(), done))
        drain.wait("z", DEADLINE_S)
        assert done == ["done"]

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(DEADLINE_S)
    ended = child.exitcode
    child.kill()
    hold.set()
    drain.wait_all(DEADLINE_S)
    assert ended == 0
    assert done == ["done"]


def test_a_task_is_replaced_by_another_one_of_its_key(hurried):
    drain, done, hold = Drain(), [], threading.Event()
    drain.add("x", lambda: hold.wait(DEADLINE_S))
    drain.add(("p", 1), lambda: done.append("first"))
    drain.add(("p", 1), lambda: done.append("second"))
    drain.add(("q", 1), lambda: done.append("forgotten"))
    drain.forget("q")
    hold.set()
    drain.wait_all(DEADLINE_S)
    assert done == ["second"]
