"""Replicated chunks are divided among the ranks that hold them, by bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.plan import replica_assignment as replicas
from shardckpt.plan.local_plan import (
    TensorSpec,
)
from shardckpt.plan.save_plan import global_plan
from tests.plan.plans import a_plan, replicated


def bytes_by_rank(plan):
    sizes = plan.chunks.boxes[:, 1].prod(axis=1)
    totals = np.concatenate([[0], np.cumsum(sizes)])
    return np.diff(totals[plan.bounds]).tolist()


def filled(loads, amount):
    """Bytes poured in one by one, each where there is least."""
    loads = list(loads)
    for _ in range(amount):
        loads[loads.index(min(loads))] += 1
    return loads


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8),
    st.lists(st.integers(1, 60), min_size=1, max_size=6),
    st.integers(1, 6),
)
def test_bytes_are_divided_as_evenly_as_can_be(sizes, solo, ranks):
    solo = solo[:ranks]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "SPLIT_BYTES", 0)
        found = bytes_by_rank(global_plan(replicated(sizes, ranks, solo)))
    expected = filled([*solo, *[0] * (ranks - len(solo))], sum(sizes))
    assert sum(found) == sum(expected)
    for a, b in zip(sorted(found), sorted(expected), strict=True):
        assert abs(a - b) <= ranks  # bounds are rounded to whole bytes, each once


def test_small_chunks_are_not_divided_and_large_ones_are_cut_by_rows():
    big = replicas.SPLIT_BYTES * 4
    plan = global_plan(replicated([100, big, 100], 2))
    assert [len(plan.of_rank(rank)) for rank in range(2)] == [2, 2]
    assert bytes_by_rank(plan) == [big // 2 + 100, big // 2 + 100]


def test_each_of_many_sets_of_replicas_is_written_once():
    """Every pair of neighbours shares its own chunk."""
    ranks = 40
    common = [TensorSpec(f"t{i}", "U8", (8,)) for i in range(ranks // 2)]
    plans = [a_plan(common, (), [(rank // 2, (0,), (8,), True)]) for rank in range(ranks)]
    plan = global_plan(plans)
    assert sorted(bytes_by_rank(plan)) == [0] * 20 + [8] * 20
    assert plan.group.tolist() == [rank // 2 for rank in range(ranks)]


def test_equal_rows_are_grouped_in_the_order_of_their_first_occurrence():
    keys = np.array([[5, 1], [2, 9], [5, 1], [0, 0], [2, 9]])
    first, group = replicas.group_equal(keys)
    assert first.tolist() == [0, 1, 3]
    assert group.tolist() == [0, 1, 0, 2, 1]
    assert [part.tolist() for part in replicas.group_equal(keys[:0])] == [[], []]


@given(st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=2), min_size=1, max_size=30))
def test_rows_are_in_one_group_if_and_only_if_they_are_equal(keys):
    first, group = replicas.group_equal(np.array(keys))
    for index, number in enumerate(group.tolist()):
        assert keys.index(keys[index]) == first[number]


def rows(*held):
    """Rows of (rank, tensor, bytes): 1-D boxes of bytes."""
    rank, tensor, size = np.array(held, dtype=np.int64).T
    boxes = np.stack([np.zeros_like(size), size], axis=1)[:, :, None]
    index = np.arange(len(rank))
    return replicas.Rows(rank=rank, row=index, tensor=tensor, boxes=boxes, size_bytes=size)


def test_a_rank_that_already_writes_more_gets_less():
    loads = np.array([600.0, 0.0])
    held = rows(*[(rank, tensor, 100) for tensor in range(10) for rank in range(2)])
    divided = replicas.assign_replicas(held, held.tensor, loads)
    assert np.bincount(divided.rank, divided.size_bytes).tolist() == [200, 800]
    assert loads.tolist() == [800, 800]
    assert sorted(divided.tensor.tolist()) == list(range(10))


def test_a_chunk_goes_only_to_a_rank_that_holds_it():
    held = rows((0, 0, 100), (1, 0, 100), (1, 1, 100), (2, 1, 100))
    divided = replicas.assign_replicas(held, held.tensor, np.zeros(3))
    holders = {0: {0, 1}, 1: {1, 2}}
    written = zip(divided.tensor.tolist(), divided.rank.tolist(), strict=True)
    assert all(rank in holders[tensor] for tensor, rank in written)
    assert divided.size_bytes.sum() == 200


def test_joined_tables_keep_their_order():
    one, other = rows((0, 1, 10)), rows((1, 2, 20), (2, 3, 30))
    table = replicas.concatenate_rows([one, one.take(np.arange(0)), other])
    assert table.tensor.tolist() == [1, 2, 3]
    assert len(replicas.concatenate_rows([one.take(np.arange(0))])) == 0
