"""A sample of the grid of ranks that fail; scripts/torture runs all of it."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults import rank_faults
from tests.faults.rank_faults import Case

pytestmark = pytest.mark.ranks

SAMPLE = random.Random(7).sample(rank_faults.CASES, 3)


def test_ranks_fail(tmp_path):
    """Side by side: most of the time they wait for deadlines."""

    def attempt(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        rank_faults.attempt(SAMPLE[number], str(folder), most_s=40)

    with ThreadPoolExecutor(len(SAMPLE)) as pool:
        for done in [pool.submit(attempt, number) for number in range(len(SAMPLE))]:
            done.result()


def test_a_fault_that_nobody_notices_would_be_seen(tmp_path):
    """A planted fault: a rank that does not fail, where the others should say that it did."""
    with pytest.raises(AssertionError, match="nothing"):
        rank_faults.attempt(Case(2, "save", "plan", 1, "nothing"), str(tmp_path))
