"""Ranks that fail report to each other. Threads over one store take the place of ranks."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardckpt.errors import RankFailedError
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


def test_one_process_stops_at_one_point():
    found = emergency.meet("step 3", consequence=False, patient=True)
    assert (found.at_one_point, found.failed_ranks, found.may_save) == (True, (), False)


def test_the_error_of_other_ranks_names_those_that_failed():
    error = emergency.Failure(failed_ranks=(1, 3), problem="late").error()
    assert isinstance(error, RankFailedError)
    assert (error.rank, error.actual) == ((1, 3), "late")
    assert emergency.Failure().error().actual is None


@pytest.mark.parametrize(
    ("error", "follows"),
    [
        (dist.DistBackendError("broken"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("gloo/ is not a loss"), False),
    ],
)
def test_only_a_collective_that_broke_follows_from_another_rank(error, follows):
    assert emergency.is_consequence(error) is follows


class Counter(nn.Module):
    """A buffer that grows, beside one that is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.norm = nn.BatchNorm1d(2)

    def forward(self, inputs):
        self.seen = torch.cat([self.seen, torch.ones(1)])
        return self.norm(inputs)


def test_buffers_of_the_last_boundary_come_back():
    model = Counter()
    copies = emergency.BufferCopies(model)
    copies.note()
    model.norm(torch.ones(3, 2))
    copies.note()
    noted = {name: buffer.clone() for name, buffer in model.norm.named_buffers()}
    model.norm(torch.full((3, 2), 5.0))
    assert not torch.equal(model.norm.running_mean, noted["running_mean"])
    copies.put_back()
    assert all(torch.equal(b, noted[name]) for name, b in model.norm.named_buffers())


def test_a_buffer_of_another_shape_stays():
    model = Counter()
    copies = emergency.BufferCopies(model)
    copies.note()
    model(torch.ones(3, 2))
    copies.put_back()
    assert model.seen.tolist() == [0, 1]
    assert model.norm.num_batches_tracked == 0
    copies.note()
    model.seen.fill_(7)
    copies.put_back()
    assert model.seen.tolist() == [0, 1]


def test_only_buffers_that_changed_are_copied_again():
    model = Counter()
    copies = emergency.BufferCopies(model)
    copies.note()
    before = dict(copies.copies)
    model.seen.add_(1)
    copies.note()
    assert copies.copies[0] is not before[0]
    assert copies.copies[1] is before[1]
