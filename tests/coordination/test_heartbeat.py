"""Ranks without heartbeats have failed; ranks without progress have stalled."""

from __future__ import annotations

import pytest

import shardckpt
from shardckpt.coordination import heartbeat
from shardckpt.coordination.heartbeat import HeartbeatCoordinator, beat_interval_s
from shardckpt.errors import RankFailedError


class Scripted(HeartbeatCoordinator):
    """A coordinator to which `signs` reports (beat, progress) of a rank at a time."""

    def __init__(self, rank, signs, *, given_up=()):
        super().__init__(rank, 3)
        self.signs, self.given_up, self.lost = signs, list(given_up), []

    def _beat_until_stopped(self):
        raise AssertionError("the thread is not started")

    def _signs(self, ranks):
        now = heartbeat.time.monotonic()
        return [self.signs(rank, now) for rank in ranks]

    def _given_up(self):
        return self.given_up

    def _give_up(self, ranks):
        self.lost += ranks


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock that only sleeping moves, by a second at a time."""
    now = [1000.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(heartbeat.time, "sleep", lambda _: now.append(now.pop() + 1))
    with shardckpt.options(deadline_s=10, stall_deadline_s=50):
        yield now


def wait(coordinator, clock, until=2000.0):
    coordinator._wait("write", lambda: clock[0] >= until, lambda: [1, 2])


def test_ranks_that_live_and_progress_are_waited_for(clock):
    coordinator = Scripted(0, lambda rank, now: (int(now), int(now)))
    wait(coordinator, clock)
    assert clock[0] == 2000
    assert coordinator.lost == []


def test_a_rank_without_heartbeats_has_failed(clock):
    coordinator = Scripted(0, lambda rank, now: (7 if rank == 2 else int(now), int(now)))
    with pytest.raises(RankFailedError, match="no sign of life for about 10 s") as caught:
        wait(coordinator, clock)
    assert caught.value.rank == (2,)
    assert caught.value.facts["phase"] == "write"
    assert coordinator.lost == [2]
    assert 1010 <= clock[0] <= 1014


def test_a_rank_with_heartbeats_but_without_progress_has_stalled(clock):
    coordinator = Scripted(0, lambda rank, now: (int(now), 7 if rank == 1 else int(now)))
    with pytest.raises(RankFailedError, match="no progress for about 50 s") as caught:
        wait(coordinator, clock)
    assert caught.value.rank == (1,)
    assert 1050 <= clock[0] <= 1054


@pytest.mark.parametrize("later_s", [1, 2])
def test_ranks_that_fail_together_are_named_together(clock, later_s):
    """As after the death of a host. The last sign of rank 2 is seen later than that of rank 1."""
    end = {1: 1300, 2: 1300 + later_s}
    coordinator = Scripted(0, lambda rank, now: (int(min(now, end[rank])), int(now)))
    with pytest.raises(RankFailedError) as caught:
        wait(coordinator, clock)
    assert caught.value.rank == (1, 2)


def test_ranks_that_stall_together_are_named_together(clock):
    end = {1: 1300, 2: 1302}
    coordinator = Scripted(0, lambda rank, now: (int(now), int(min(now, end[rank]))))
    with pytest.raises(RankFailedError) as caught:
        wait(coordinator, clock)
    assert caught.value.rank == (1, 2)


def test_a_rank_that_is_only_late_is_not_named_with_one_that_failed(clock):
    coordinator = Scripted(0, lambda rank, now: (7 if rank == 1 else int(now) // 5, int(now)))
    with pytest.raises(RankFailedError) as caught:
        wait(coordinator, clock)
    assert caught.value.rank == (1,)


def test_a_wait_does_not_count_the_silence_before_it(clock):
    coordinator = Scripted(0, lambda rank, now: (7, 7) if now < 1500 else (int(now), int(now)))
    wait(coordinator, clock, until=1008)
    clock[0] = 1499.0
    wait(coordinator, clock, until=1600)
    assert coordinator.lost == []


def test_other_ranks_follow_what_rank_0_has_given_up(clock):
    alive = lambda rank, now: (int(now), int(now))  # noqa: E731
    with pytest.raises(RankFailedError, match="rank 0 has given them up") as caught:
        wait(Scripted(1, alive, given_up=[2]), clock)
    assert caught.value.rank == (2,)
    wait(Scripted(0, alive, given_up=[2]), clock)


def test_waiting_counts_as_progress(clock):
    coordinator = Scripted(0, lambda rank, now: (int(now), int(now)))
    coordinator.progress(100)
    before = coordinator._progress
    wait(coordinator, clock, until=clock[0] + 5)
    assert coordinator._progress == before + 5


@pytest.mark.parametrize(("deadline_s", "interval_s"), [(1.0, 0.2), (300.0, 1.0)])
def test_there_are_five_heartbeats_in_a_deadline_and_one_a_second(deadline_s, interval_s):
    with shardckpt.options(deadline_s=deadline_s):
        assert beat_interval_s() == pytest.approx(interval_s)
