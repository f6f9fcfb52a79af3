"""A sample of the grid of ranks that fail; scripts/torture runs all of it."""

from __future__ import annotations

import random
from dataclasses import astuple

import pytest

from tests.faults import rank_faults
from tests.faults.rank_faults import Case

pytestmark = pytest.mark.ranks

SAMPLE = random.Random(7).sample(rank_faults.CASES, 3)


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: "-".join(map(str, astuple(case))))
def test_the_other_ranks_raise_when_one_fails(tmp_path, case):
    rank_faults.attempt(case, str(tmp_path), most_s=40)


def test_a_fault_that_nobody_notices_would_be_seen(tmp_path):
    """A planted fault: a rank that does not fail, where the others should say that it did."""
    with pytest.raises(AssertionError, match="nothing"):
        rank_faults.attempt(Case(2, "save", "plan", 1, "nothing"), str(tmp_path))
