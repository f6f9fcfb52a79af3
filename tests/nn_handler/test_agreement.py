"""How many steps lie between two agreements of the ranks."""

from __future__ import annotations

from unittest import mock

from shardckpt.nn_handler import agreement
from shardckpt.nn_handler.agreement import Agreement


def distances(most: int, slowest_us: list[int]) -> list[int]:
    """The number of steps before each agreement, where the slowest step takes as long."""
    times = iter(slowest_us)
    found = []
    with (
        mock.patch.object(agreement.dist, "is_initialized", return_value=True),
        mock.patch.object(agreement.dist, "get_world_size", return_value=2),
        mock.patch.object(agreement, "largest", lambda numbers: [*numbers[:-1], next(times)]),
    ):
        one = Agreement(most)
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
    one = Agreement(8)
    for _ in range(5):
        assert one.due()
        assert one.largest([1, 2]) == [1, 2]
