"""Waits with a deadline, and the errors for missing ranks."""

from __future__ import annotations

import pytest

from shardckpt.coordination import deadlines
from shardckpt.coordination.deadlines import SHORTEST_WAIT_S, next_wait, poll, rank_failed


@pytest.fixture
def clock(monkeypatch):
    """A clock that only sleeping moves; the list has the sleeps."""
    sleeps = []
    monkeypatch.setattr(deadlines.time, "monotonic", lambda: sum(sleeps))
    monkeypatch.setattr(deadlines.time, "sleep", sleeps.append)
    return sleeps


def test_a_wait_ends_when_it_is_ready(clock):
    assert poll(lambda: sum(clock) >= 1, 5.0)
    assert 1 <= sum(clock) < 1.01


def test_a_wait_ends_at_its_deadline(clock):
    assert not poll(lambda: False, 0.5)
    assert 0.5 <= sum(clock) < 0.51


def test_a_wait_that_is_ready_at_once_does_not_sleep_even_without_time(clock):
    assert poll(lambda: True, 0.0)
    assert clock == []


def test_sleeps_grow_to_a_limit_that_depends_on_the_number_of_ranks():
    few, many = [SHORTEST_WAIT_S], [SHORTEST_WAIT_S]
    for _ in range(40):
        few.append(next_wait(few[-1]))
        many.append(next_wait(many[-1], ranks=1000))
    assert few == sorted(few)
    assert few[1] == SHORTEST_WAIT_S * 1.5
    assert few[-1] == 0.002
    assert many[-1] == 0.02


def test_the_error_for_failed_ranks_names_them_and_the_phase():
    error = rank_failed(iter([2, 5]), "write", "no sign of life")
    assert error.rank == (2, 5)
    assert error.facts["phase"] == "write"
    assert "Rank 2, 5 failed in phase 'write'" in str(error)
    assert error.actual == "no sign of life"


@pytest.mark.parametrize(
    ("subject", "expected"),
    [("save a", "save a, as on rank 0"), (None, "the call of rank 0")],
)
def test_the_error_for_different_calls_names_both_calls(subject, expected):
    error = deadlines.ranks_disagree(3, "load b", subject)
    assert (error.rank, error.expected, error.actual) == (3, expected, "load b")
