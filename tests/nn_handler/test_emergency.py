"""Ranks that fail report to each other. Threads over one store take the place of ranks."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from shardckpt.nn_handler import emergency

HERE = threading.local()


LATE = "after the others have given up"


@pytest.fixture
def meet(monkeypatch):
    """meet(delay of each rank, their places, whether each heard it from others) -> Failures.

    A delay is a number of seconds, LATE, or None for a rank that never comes.
    """
    monkeypatch.setattr(emergency, "_meetings", itertools.repeat(0))

    def run(delays_s, places=None, echoes=None, *, deadline_s=0.6):
        monkeypatch.setenv("SHARDCKPT_DEADLINE_S", str(deadline_s))
        store, size = dist.HashStore(), len(delays_s)
        world = SimpleNamespace(get_group_store=lambda: store)
        ranks = SimpleNamespace(
            group=SimpleNamespace(WORLD=world),
            get_rank=lambda: HERE.rank,
            get_world_size=lambda: size,
            is_initialized=lambda: True,
            DistError=dist.DistError,
        )
        monkeypatch.setattr(emergency, "dist", ranks)

        def rank(number):
            HERE.rank = number
            if delays_s[number] is None:
                return None
            if delays_s[number] == LATE:
                store.wait(["shardckpt/emergency/0/elected"])
            else:
                time.sleep(delays_s[number])
            place, consequence = (places or "a" * size)[number], (echoes or [False] * size)[number]
            return emergency.meet(place, consequence=consequence, patient=True)

        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(rank, range(size)))

    return run


def test_all_fail_at_one_step(meet):
    assert {f.at_one_point for f in meet([0, 0.02, 0], deadline_s=60.0)} == {True}


def test_they_fail_at_different_steps(meet):
    found = meet([0, 0, 0], places="aab", deadline_s=60.0)
    assert not any(f.at_one_point or f.may_save for f in found)
    assert "['a', 'b']" in found[0].problem


def test_one_fails_and_the_others_hear_of_it(meet):
    found = meet([LATE, 0, LATE], echoes=[True, False, True])
    assert [f.failed_ranks for f in found] == [(1,)] * 3
    assert [f.may_save for f in found] == [False, True, False]
    assert not any(f.at_one_point for f in found)


def test_one_dies_without_a_word(meet):
    first, _, last = meet([0, None, 0], echoes=[True] * 3)
    assert first.failed_ranks == last.failed_ranks == (1,)
    assert first.may_save != last.may_save
    assert isinstance(first.error(), emergency.RankFailedError)
    assert first.error().rank == (1,)


@pytest.mark.parametrize("delay_s", [0.15, 0.19, 0.2, 0.21, 0.25])
def test_one_that_comes_as_another_gives_up(meet, delay_s):
    one, other = meet([0, delay_s])
    assert one.at_one_point == other.at_one_point
    assert one.at_one_point or one.may_save != other.may_save
