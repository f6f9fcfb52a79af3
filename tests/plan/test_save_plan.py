"""The global plan equals that of a slow reference, chunk by chunk."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.errors import CoverageError
from shardckpt.format.dtype_names import itemsize
from shardckpt.plan import replica_assignment as replicas
from shardckpt.plan import save_plan
from shardckpt.plan.local_plan import ChunkTable, TensorSpec
from shardckpt.plan.save_plan import RankWrites, global_plan
from shardckpt.plan.shard_layout import layout_digests
from shardckpt.state import file_groups as kinds
from tests.plan.plans import a_plan, travelled, worlds


def writes_of(plans, plan):
    return [RankWrites.of(own, share) for own, share in zip(plans, plan.shares, strict=True)]


def elements(spec, offsets, sizes):
    ranges = [range(a, a + n) for a, n in zip(offsets, sizes, strict=True)]
    return list(itertools.product(*ranges)) or ([()] if not spec.shape else [])


@given(worlds(), st.sampled_from([1, 8, 1 << 20]))
def test_every_element_is_written_once_by_a_rank_that_holds_it(plans, split_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "SPLIT_BYTES", split_bytes)
        plan = global_plan(travelled(plans))
    written, empty = {}, {}
    for rank, writes in enumerate(writes_of(plans, plan)):
        local = plans[rank]
        specs = (*local.common, *local.rank_only)
        for row, box in zip(writes.row.tolist(), writes.boxes.tolist(), strict=True):
            index = int(local.chunks.tensor[row])
            spec, dims = specs[index], len(specs[index].shape)
            held = local.chunks.boxes[row, :, :dims].tolist()
            inside = elements(spec, *held)
            for element in elements(spec, box[0][:dims], box[1][:dims]):
                assert element in inside
                assert written.setdefault((spec.name, element), rank) == rank
                written[spec.name, element] = -1  # so that a second time would be seen
            empty[spec.name] = empty.get(spec.name, 0) + (0 in spec.shape)
    everything = (*plans[0].common, *(spec for own in plans for spec in own.rank_only))
    expected = {
        (spec.name, element)
        for spec in everything
        for element in elements(spec, (0,) * len(spec.shape), spec.shape)
    }
    assert written.keys() == expected
    assert plan.specs == everything
    for spec in everything:  # an empty tensor is one empty chunk, wherever it is replicated
        assert 0 not in spec.shape or empty[spec.name] >= 1


def with_own_order(plan, data):
    """The plan of a rank that has its tensors in another order, without some that it lacks."""
    lacks = set(range(len(plan.common))) - set(plan.chunks.tensor.tolist())
    dropped = data.draw(st.sets(st.sampled_from(sorted(lacks)))) if lacks else set()
    kept = [index for index in range(len(plan.common)) if index not in dropped]
    order = data.draw(st.permutations(kept))
    rank_only = range(len(plan.common), len(plan.common) + len(plan.rank_only))
    at = {index: number for number, index in enumerate([*order, *rank_only])}
    return dataclasses.replace(
        plan,
        common=tuple(plan.common[index] for index in order),
        file_group=plan.file_group[[*order, *rank_only]],
        chunks=dataclasses.replace(
            plan.chunks, tensor=np.array([at[i] for i in plan.chunks.tensor.tolist()], np.int64)
        ),
    )


@given(worlds(), st.data())
def test_rank_0_and_ranks_with_other_tensors_agree(plans, data):
    plans = [with_own_order(plan, data) for plan in plans]
    plan = global_plan(plans, [own.common for own in plans])
    for rank, writes in enumerate(writes_of(plans, plan)):
        local, whole = plans[rank], plan.of_rank(rank)
        specs = (*local.common, *local.rank_only)
        names = [specs[index].name for index in local.chunks.tensor[writes.row].tolist()]
        assert names == [plan.specs[index].name for index in whole.tensor.tolist()]
        dims = writes.boxes.shape[2]
        assert whole.boxes[:, :, :dims].tolist() == writes.boxes.tolist()
        own = ChunkTable(tensor=local.chunks.tensor[writes.row], boxes=writes.boxes)
        bounds = [0, len(own)]
        digest = layout_digests(specs, own, bounds)
        assert digest == layout_digests(plan.specs, whole, bounds)


@given(worlds(), st.sampled_from([0, 20, 1 << 20]))
def test_rank_0_and_the_ranks_agree(plans, file_bytes):
    """Each finds the same chunks, files and order, by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "FROZEN_FILE_BYTES", file_bytes)
        patch.setattr(kinds, "OPTIMIZER_FILE_BYTES", file_bytes)
        patch.setattr(save_plan, "SMALL_BYTES", 20)
        plan = global_plan(travelled(plans))
        writes_by_rank = writes_of(plans, plan)
    base = len(plans[0].common)
    for rank, writes in enumerate(writes_by_rank):
        local, whole = plans[rank], plan.of_rank(rank)
        index = local.chunks.tensor[writes.row]
        index = np.where(index < len(local.common), index, index - len(local.common) + base)
        base += len(local.rank_only)
        assert whole.tensor.tolist() == index.tolist()
        for row, box in zip(writes.boxes.tolist(), whole.boxes.tolist(), strict=True):
            assert same_box(row, box)
        assert sum(count for _, count in writes.files) == len(whole)
        assert [kind for kind, _ in writes.files] == sorted({kind for kind, _ in writes.files})
        at = 0
        for kind, count in writes.files:
            part = whole.tensor[at : at + count].tolist()
            widths = [itemsize(plan.specs[i].dtype) for i in part]
            small = [
                int(np.prod(box[1])) * width < 20
                for box, width in zip(whole.boxes[at : at + count], widths, strict=True)
            ]
            order = [(-width, each) for width, each in zip(widths, small, strict=True)]
            assert order == sorted(order)  # aligned, and the small ones side by side
            if file_bytes == 0:  # nothing is too small for a file of its own
                common = {i: int(k) for i, k in enumerate(plans[0].file_group[: len(local.common)])}
                assert {common[i] for i in part if i in common} <= {kind}
            at += count


def same_box(a, b):
    """Unused dimensions apart."""
    width = min(len(a[0]), len(b[0]))
    rest = [n for one in (a, b) for n in (*one[0][width:], *(size - 1 for size in one[1][width:]))]
    return [part[:width] for part in a] == [part[:width] for part in b] and not any(rest)


@given(worlds())
def test_compared_are_the_chunks_that_several_ranks_hold(plans):
    plan = global_plan(travelled(plans))
    holders = {}
    for rank, local in enumerate(plans):
        for row in np.flatnonzero(local.shared).tolist():
            index = int(local.chunks.tensor[row])
            box = local.chunks.boxes[row, :, : len(local.common[index].shape)]
            key = index, str(box.tolist())
            holders.setdefault(key, []).append((rank, row))
    several = [held for held in holders.values() if len(held) > 1]
    found, at = {}, 0
    for rank, writes in enumerate(writes_of(plans, plan)):
        assert plan.compared[rank] == len(writes.compare)
        for row in writes.compare.tolist():
            group = int(plan.group[at])
            found.setdefault(group, []).append((rank, row))
            index = int(plans[rank].chunks.tensor[row])
            assert plan.specs[plan.replicated[group]] == plans[rank].common[index]
            at += 1
    assert sorted(found.values()) == sorted(several)


@pytest.mark.parametrize("harm", ["hole", "overlap", "out of bounds", "nobody"])
def test_what_does_not_tile_is_refused(harm):
    common = [TensorSpec("fine", "F32", (2,)), TensorSpec("w", "F32", (4, 3))]
    second = {"hole": (3, 1), "overlap": (1, 3), "out of bounds": (2, 3), "nobody": None}[harm]
    plans = []
    for rows in [(0, 2) if second else None, second]:
        held = [(0, (0,), (2,), True)]
        if rows:
            held.append((1, (rows[0], 0), (rows[1], 3), False))
        plans.append(a_plan(common, (), held))
    with pytest.raises(CoverageError) as caught:
        global_plan(plans)
    assert caught.value.tensor == "w"
    box = {"hole": "[2, 0], sizes [1, 3]", "overlap": "[1, 0], sizes [1, 3]"}.get(harm, "")
    assert f"{'hole' if harm == 'nobody' else harm} at offsets {box}" in str(caught.value)
    assert caught.value.rank == {"overlap": (0, 1), "out of bounds": (1,)}.get(harm)
