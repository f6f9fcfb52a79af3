"""Exchanges between ranks deliver messages, and each error names its rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt import errors
from shardckpt.coordination.exchange import attempt, exchange
from shardckpt.coordination.resolve import operation
from shardckpt.coordination.single import SingleCoordinator
from tests.ranks import run_ranks


def test_one_rank_exchanges_with_itself():
    alone = SingleCoordinator()
    assert exchange(alone, "p", lambda: b"x", lambda payloads: payloads[0] * 2) == b"xx"
    assert exchange(alone, "p", lambda: b"x", lambda payloads: payloads) == b"x"
    with pytest.raises(ZeroDivisionError):
        exchange(alone, "p", lambda: bytes(1 // 0), lambda payloads: b"")
    with pytest.raises(errors.CoverageError) as caught:
        exchange(alone, "p", raises(errors.CoverageError("no", tensor="t")), lambda payloads: b"")
    assert (caught.value.rank, caught.value.facts["phase"]) == ((0,), "p")


def raises(error):
    def call(*_):
        raise error

    return call


def test_a_stage_that_fails_is_reported_by_the_next_exchange():
    ran = []
    failed = attempt(raises(KeyboardInterrupt())).then(ran.append)
    with pytest.raises(KeyboardInterrupt):
        exchange(SingleCoordinator(), "p", failed.get, lambda payloads: b"")
    assert ran == []
    assert attempt(int, "7").then(pow, 2).then(str).get() == "49"


def test_a_group_that_is_none():
    with pytest.raises(errors.CoordinationError, match="not initialized"):
        shardckpt.save({"a": 1}, "/nowhere/at/all", process_group=object())


def talk() -> None:
    rank = dist.get_rank()
    with operation("talk") as coordinator:
        large = bytes([rank]) * (9 << 20)  # more than the store takes at once

        def check(payloads):
            assert [payload[0] for payload in payloads] == [0, 1, 2]
            assert {len(payload) for payload in payloads} == {9 << 20}
            return [payload[:1] * (10 << 20) for payload in payloads]

        answer = exchange(coordinator, "large", lambda: large, check)
        assert answer == bytes([rank]) * (10 << 20)
        assert exchange(coordinator, "empty", lambda: b"", lambda payloads: b"") == b""
        for kind, culprit in ((errors.NoSpaceError, 1), (KeyError, 2)):
            with pytest.raises(Exception) as caught:
                planted = kind("planted", errno=28) if kind is errors.NoSpaceError else kind("p")
                part = raises(planted) if rank == culprit else bytes
                exchange(coordinator, "fails", part, lambda payloads: b"")
            told = errors.RankFailedError if kind is KeyError and rank != culprit else kind
            assert type(caught.value) is told, caught.value
            if told is not KeyError:
                assert caught.value.rank == (culprit,)
        with pytest.raises(errors.StateError, match="decided"):  # rank 0's decision reaches all
            exchange(coordinator, "decides", bytes, raises(errors.StateError("decided")))
        assert exchange(coordinator, "goes on", bytes, lambda payloads: b"yes") == b"yes"
    with operation("one", channel="a") as one, operation("other", channel="b") as other:
        assert exchange(other, "x", bytes, lambda payloads: b"other") == b"other"
        assert exchange(one, "x", bytes, lambda payloads: b"one") == b"one"


def groups(folder: str) -> None:
    """Some ranks save as a group. A rank outside of the group gets an error."""
    rank = dist.get_rank()
    group = dist.new_group([0, 2])
    alone = dist.new_group([1])
    if rank == 1:
        with pytest.raises(errors.CoordinationError, match="not a member"):
            shardckpt.save({"a": 1}, f"{folder}/x", process_group=group)
        report = shardckpt.save({"a": 1}, f"{folder}/alone", process_group=alone)
        assert report.world_size == 1
        return
    state = {"t": torch.arange(4.0), "mine": shardckpt.PerRank(rank)}
    assert shardckpt.save(state, f"{folder}/two", process_group=group).world_size == 2
    state["t"].zero_()
    shardckpt.load(state, f"{folder}/two", process_group=group)
    assert state["t"].tolist() == [0, 1, 2, 3]
    assert state["mine"].value == rank


def talk_and_save(folder: str) -> None:
    talk()
    groups(folder)


@pytest.mark.ranks
def test_three_ranks_exchange_messages(tmp_path):
    run_ranks(3, talk_and_save, str(tmp_path), timeout_s=110)
    assert shardckpt.load_state(tmp_path / "two")["mine"] == [0, 2]
