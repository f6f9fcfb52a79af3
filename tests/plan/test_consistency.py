"""The digests of replicas are compared, and differing tensors are named."""

from __future__ import annotations

import numpy as np
import pytest

from shardckpt.errors import ReplicaMismatchError
from shardckpt.plan.consistency import compare_replicas
from shardckpt.plan.save_plan import global_plan
from tests.plan.plans import replicated

PLAN = global_plan(replicated([8, 8, 8], 3))


def digests(*by_rank):
    return [np.array(of_rank, np.uint64) for of_rank in by_rank]


def test_equal_replicas_are_accepted():
    compare_replicas(PLAN, digests([5, 6, 7], [5, 6, 7], [5, 6, 7]))


def test_a_plan_without_replicas_has_nothing_to_compare():
    compare_replicas(global_plan(replicated([], 2, solo=(4, 4))), digests([], []))


def test_the_error_names_the_first_tensor_that_differs_and_its_ranks():
    with pytest.raises(ReplicaMismatchError) as caught:
        compare_replicas(PLAN, digests([5, 6, 7], [5, 9, 7], [5, 9, 8]))
    error = caught.value
    assert error.tensor == "t1"
    assert error.rank == (1, 2)
    assert error.expected == "the bytes of rank 0"
    assert "2 tensors differ" in error.actual


def test_a_replica_that_one_rank_did_not_compare_differs():
    with pytest.raises(ReplicaMismatchError) as caught:
        compare_replicas(PLAN, digests([0, 6, 7], [5, 6, 7], [0, 6, 7]))
    assert (caught.value.tensor, caught.value.rank) == ("t0", (1,))
