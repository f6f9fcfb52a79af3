"""The global plan equals that of a slow reference, chunk by chunk."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.errors import CoverageError
from shardckpt.format.dtypes import itemsize
from shardckpt.format.manifest import encode_tensors
from shardckpt.plan import replica_assignment as replicas
from shardckpt.plan import save_plan
from shardckpt.plan.local_plan import (
    LocalPlan,
    TensorSpec,
)
from shardckpt.plan.plan_cache import KnownPlan
from shardckpt.plan.save_plan import RankWrites, global_plan
from shardckpt.plan.shard_layout import tensor_entries
from shardckpt.state import file_groups as kinds
from tests.plan.plans import a_plan, replicated


@st.composite
def worlds(draw):
    """Local plans of up to 5 ranks: tensors replicated, sharded by rows, or both at once over a
    mesh of two dimensions, and tensors that one rank alone has."""
    ranks = draw(st.integers(1, 5))
    common, held = [], [[] for _ in range(ranks)]
    for index in range(draw(st.integers(0, 6))):
        dtype = draw(st.sampled_from(["F32", "BF16", "U8", "I64"]))
        shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
        common.append(TensorSpec(f"t{index}", dtype, shape))
        parts = draw(st.integers(1, ranks)) if shape and 0 not in shape else 1
        step = -(-shape[0] // parts) if shape and shape[0] else 0
        for rank in range(ranks):
            offsets, sizes = [0] * len(shape), list(shape)
            part = rank % parts
            if parts > 1:
                offsets[0] = min(part * step, shape[0])
                sizes[0] = min(step, shape[0] - offsets[0])
            if parts > 1 and 0 in sizes:
                continue
            held[rank].append((index, offsets, sizes, parts < ranks or draw(st.booleans())))
    own = [[] for _ in range(ranks)]
    for rank in range(ranks):
        for number in range(draw(st.integers(0, 2))):
            own[rank].append(TensorSpec(f"o{number}@rank{rank}", "F32", (3, number)))
            held[rank].append((len(common) + number, (0, 0), (3, number), False))
    plans = []
    for rank in range(ranks):
        count = len(common) + len(own[rank])
        kind = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
        plans.append(a_plan(common, own[rank], held[rank], kind))
    return plans


def travelled(plans):
    """What rank 0 gets of them."""
    return [LocalPlan.unpack(plan.pack(complete=rank == 0)) for rank, plan in enumerate(plans)]


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
        specs = (*local.common, *local.own)
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
    everything = (*plans[0].common, *(spec for own in plans for spec in own.own))
    expected = {
        (spec.name, element)
        for spec in everything
        for element in elements(spec, (0,) * len(spec.shape), spec.shape)
    }
    assert written.keys() == expected
    assert plan.specs == everything
    for spec in everything:  # an empty tensor is one empty chunk, wherever it is replicated
        assert 0 not in spec.shape or empty[spec.name] >= 1


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
        base += len(local.own)
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


def test_small_chunks_stay_whole_and_large_ones_are_cut_by_rows():
    big = replicas.SPLIT_BYTES * 4
    plan = global_plan(replicated([100, big, 100], 2))
    assert [len(plan.of_rank(rank)) for rank in range(2)] == [2, 2]
    assert bytes_by_rank(plan) == [big // 2 + 100, big // 2 + 100]


def test_many_sets_of_replicas():
    """Every pair of neighbours shares its own chunk."""
    ranks = 40
    common = [TensorSpec(f"t{i}", "U8", (8,)) for i in range(ranks // 2)]
    plans = [a_plan(common, (), [(rank // 2, (0,), (8,), True)]) for rank in range(ranks)]
    plan = global_plan(plans)
    assert sorted(bytes_by_rank(plan)) == [0] * 20 + [8] * 20
    assert plan.group.tolist() == [rank // 2 for rank in range(ranks)]


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


@given(worlds())
def test_entries_say_where_each_chunk_lies(plans):
    plan = global_plan(travelled(plans))
    headers = np.arange(1, len(plans) + 1) * 4096
    entries = tensor_entries(plan.specs, plan.chunks, bounds=plan.bounds, header_bytes=headers)
    expected = {spec.name: [] for spec in plan.specs}
    for rank in range(len(plans)):
        at, own = int(headers[rank]), plan.of_rank(rank)
        for index, box in zip(own.tensor.tolist(), own.boxes.tolist(), strict=True):
            spec = plan.specs[index]
            dims = len(spec.shape)
            size = int(np.prod(box[1])) * itemsize(spec.dtype)
            expected[spec.name].append([rank, at, at + size, *box[0][:dims], *box[1][:dims]])
            at += size
    for spec in plan.specs:
        entry = entries[spec.name]
        assert (entry.dtype, entry.shape) == (spec.dtype, spec.shape)
        rows = sorted(expected[spec.name], key=lambda row: row[3 : 3 + len(spec.shape)])
        assert entry.chunks.tolist() == rows
    known = KnownPlan(plan)
    files = np.column_stack([np.diff(plan.bounds), headers])
    assert known.encoded_tensors(files) == encode_tensors(entries)
    assert known.encoded_tensors(files) is known.encoded_tensors(files.copy())
    changed = known.encoded_tensors(files + np.array([0, 4096]))
    assert changed != encode_tensors(entries) or not len(plan.chunks)
