"""How many steps lie between two agreements of the ranks."""

from __future__ import annotations

import math
from unittest import mock

from torch.distributed import HashStore

from shardckpt.nn_handler import agreement
from shardckpt.nn_handler.agreement import TrainingAgreement


def distances(most: int, slowest_us: list[int]) -> list[int]:
    """The number of steps before each agreement, where the slowest step takes as long."""
    times = iter(slowest_us)
    found = []
    with (
        mock.patch.object(agreement.dist, "is_initialized", return_value=True),
        mock.patch.object(agreement.dist, "get_world_size", return_value=2),
        mock.patch.object(agreement, "largest", lambda numbers: [*numbers[:-1], next(times)]),
        mock.patch.object(agreement, "_LATE_S", math.inf),
    ):
        one = TrainingAgreement(most)
        for _ in slowest_us:
            steps = 0
            while not one.due():
                steps += 1
            found.append(steps)
            assert one.largest([3, -1]) == [3, -1]
    return found


def test_the_distance_doubles_up_to_the_limit():
    assert distances(8, [100] * 6) == [0, 0, 1, 3, 7, 7]
    assert distances(1, [100] * 4) == [0, 0, 0, 0]


def test_slow_steps_shorten_the_distance():
    assert distances(8, [100] * 4 + [60_000, 5_000_000, 100, 100]) == [0, 0, 1, 3, 7, 2, 0, 1]


def test_one_rank_agrees_with_itself_before_each_step():
    one = TrainingAgreement(8)
    for _ in range(5):
        assert one.due()
        assert one.largest([1, 2]) == [1, 2]


def test_ranks_that_are_all_late_agree_a_step_later():
    """Three ranks take turns in each step; the numbers are the steps before which they agree."""
    store = HashStore()
    with (
        mock.patch.object(agreement, "dist") as dist,
        mock.patch.object(agreement, "group_store", return_value=store),
        mock.patch.object(agreement, "largest", lambda numbers: numbers),
        mock.patch.object(agreement, "_PERIOD_S", 1e6),
    ):
        dist.get_world_size.return_value = 3
        dist.get_rank.return_value = 0
        ranks = [TrainingAgreement(8) for _ in range(3)]
        for one in ranks:
            one._name = ranks[0]._name  # of one training, rather than of three in this process
        found: list[int] = []
        late = {10: [0], 20: [0, 1, 2], 21: [0, 1, 2]}
        for step in range(32):
            due = []
            for rank, one in enumerate(ranks):
                with mock.patch.object(
                    agreement, "_LATE_S", -1.0 if rank in late.get(step, []) else math.inf
                ):
                    due.append(one.due())
            assert len(set(due)) == 1
            if due[0]:
                found.append(step)
                for one in ranks:
                    one.largest([0])
    # by number: 0, 1, 3, 7, 15, 23, 31; without the vote of all ranks before step 20
    assert found == [0, 1, 3, 7, 15, 21, 29]
    assert store.num_keys() == 0
