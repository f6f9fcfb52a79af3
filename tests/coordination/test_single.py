"""The coordinator of a single process."""

from __future__ import annotations

import pytest

from shardckpt.coordination.single import SingleCoordinator


def test_a_single_process_receives_its_own_payload():
    alone = SingleCoordinator()
    assert (alone.rank, alone.world_size) == (0, 1)
    assert alone.gather(b"x", phase="p") == [b"x"]
    assert alone.scatter([b"y"], phase="p") == b"y"


def test_work_runs_in_the_call_and_its_error_is_raised():
    alone, ran = SingleCoordinator(), []
    alone.watch(lambda: ran.append(1), phase="p")
    assert ran == [1]
    with pytest.raises(ZeroDivisionError):
        alone.watch(lambda: ran.append(1 // 0), phase="p")
