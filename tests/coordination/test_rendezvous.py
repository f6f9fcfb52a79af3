"""The decision of rank 0 about the ranks that call, and the errors of the other ranks."""

from __future__ import annotations

import pytest

from shardckpt.coordination.rendezvous import decide, follow, never_called, too_late
from shardckpt.errors import RankFailedError, RankMismatchError


def test_ranks_with_one_subject_take_part_in_one_operation():
    decision = decide({1: "save a", 2: "save a"}, "save a", world_size=3)
    assert decision.error is None
    assert decision.late == []
    assert follow(decision.answer, "save a", rank=2) == decision.identity
    again = decide({1: "save a", 2: "save a"}, "save a", world_size=3)
    assert again.identity != decision.identity


def test_ranks_that_did_not_call_are_named_on_every_rank():
    decision = decide({2: "save a"}, "save a", world_size=5)
    assert decision.late == [1, 3, 4]
    assert isinstance(decision.error, RankFailedError)
    assert decision.error.rank == (1, 3, 4)
    with pytest.raises(RankFailedError) as caught:
        follow(decision.answer, "save a", rank=2)
    assert caught.value.rank == (1, 3, 4)


def test_a_rank_with_another_subject_is_named_on_every_rank():
    decision = decide({2: "save b c", 1: "save a"}, "save a", world_size=3)
    assert isinstance(decision.error, RankMismatchError)
    assert (decision.error.rank, decision.error.actual) == (2, "save b c")
    with pytest.raises(RankMismatchError) as caught:
        follow(decision.answer, "save a", rank=1)
    assert (caught.value.rank, caught.value.actual) == (2, "save b c")
    assert caught.value.expected == "save a, as on rank 0"
    with pytest.raises(RankMismatchError) as caught:  # it does not know the subject of rank 0
        follow(decision.answer, "save b c", rank=2)
    assert caught.value.expected == "the call of rank 0"


def test_missing_ranks_are_reported_before_other_subjects():
    decision = decide({1: "save b"}, "save a", world_size=3)
    assert decision.late == [2]
    assert isinstance(decision.error, RankFailedError)


def test_the_errors_of_late_ranks_name_the_deadline_or_the_rank(monkeypatch):
    monkeypatch.setenv("SHARDCKPT_ARRIVAL_DEADLINE_S", "12.5")
    assert never_called([1, 4]).actual == "no call within 12.5 s"
    assert never_called([1, 4]).rank == (1, 4)
    assert too_late(3).rank == (3,)
