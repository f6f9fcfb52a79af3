"""Names of shards, sizes of chunks, and the position of each chunk in its shard."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from shardckpt.errors import ShardMismatchError
from shardckpt.format.dtype_names import itemsize
from shardckpt.format.manifest import encode_tensors
from shardckpt.plan.local_plan import ChunkTable, TensorSpec, pad_boxes, widen_boxes
from shardckpt.plan.plan_cache import KnownPlan
from shardckpt.plan.save_plan import global_plan
from shardckpt.plan.shard_layout import chunk_bytes, layout_digests, shard_name, tensor_entries
from shardckpt.state.file_groups import GROUP_COUNT, group_in_name
from tests.plan.plans import replicated, travelled, worlds


@given(worlds())
def test_entries_have_the_position_of_each_chunk(plans):
    plan = global_plan(travelled(plans))
    headers = np.arange(1, len(plans) + 1) * 4096
    table = tensor_entries(plan.specs, plan.chunks, bounds=plan.bounds, header_bytes=headers)
    entries = dict(table)
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
    digests = layout_digests(plan.specs, plan.chunks, plan.bounds.tolist())
    files = np.column_stack([np.arange(len(plans)), np.diff(plan.bounds), headers, digests])
    assert known.encoded_tensors(files) == encode_tensors(entries.items())
    assert known.encoded_tensors(files) is known.encoded_tensors(files.copy())
    changed = known.encoded_tensors(files + np.array([0, 0, 4096, 0]))
    assert changed != encode_tensors(entries.items()) or not len(plan.chunks)


def test_the_digest_of_a_file_is_that_of_its_chunks_in_order():
    specs = [TensorSpec("a", "F32", (4, 8)), TensorSpec("b", "F32", (4, 8))]
    other = [TensorSpec("b", "F32", (4, 8)), TensorSpec("a", "F32", (4, 8))]
    boxes = pad_boxes([((0, 0), (2, 8)), ((2, 0), (2, 8)), ((0, 0), (4, 8))])

    def digest(specs, tensor, boxes):
        chunks = ChunkTable(tensor=np.array(tensor), boxes=boxes)
        return layout_digests(specs, chunks, [0, len(tensor)])[0]

    same = [digest(specs, [0, 0, 1], boxes), digest(other, [1, 1, 0], boxes)]
    same.append(digest(specs, [0, 0, 1], widen_boxes(boxes, dims=3)))
    different = [
        digest(specs, [0, 0, 1], boxes[[1, 0, 2]]),
        digest(specs, [1, 1, 0], boxes),
        digest([TensorSpec("a", "I32", (4, 8)), specs[1]], [0, 0, 1], boxes),
        digest([TensorSpec("a", "F32", (4, 9)), specs[1]], [0, 0, 1], boxes),
        digest(specs, [0, 0, 1], boxes[:, ::-1]),
    ]
    assert len(set(same)) == 1
    assert len({*same, *different}) == 6


def test_chunks_that_are_not_those_of_the_plan():
    plan = global_plan(replicated([4, 5], 2))
    digests = layout_digests(plan.specs, plan.chunks, plan.bounds.tolist())
    files = np.column_stack([[0, 1], np.diff(plan.bounds), [4096, 4096], digests])
    for change in ([0, 1, 0, 0], [0, 0, 0, 1]):
        with pytest.raises(ShardMismatchError) as caught:
            KnownPlan(plan).encoded_tensors(files + np.array([[0, 0, 0, 0], change]))
        assert caught.value.rank == 1


def test_the_name_of_a_shard_has_the_rank_the_world_size_and_the_file_group():
    assert shard_name(rank=3, world_size=16) == "shard-00003-of-00016.safetensors"
    names = {shard_name(rank=3, world_size=16, file_group=group) for group in range(GROUP_COUNT)}
    assert len(names) == GROUP_COUNT
    for group in range(GROUP_COUNT):
        assert group_in_name(shard_name(rank=3, world_size=16, file_group=group)) == group


def test_the_size_of_a_chunk_is_that_of_its_box():
    specs = [
        TensorSpec("a", "F64", (9, 4)),
        TensorSpec("s", "BF16", ()),
        TensorSpec("b", "U8", (7,)),
    ]
    boxes = pad_boxes([((1, 0), (2, 4)), ((), ()), ((3,), (4,)), ((0, 0), (0, 4))])
    chunks = ChunkTable(tensor=np.array([0, 1, 2, 0]), boxes=boxes)
    assert chunk_bytes(specs, chunks).tolist() == [64, 2, 4, 0]


def test_the_chunks_of_a_tensor_are_sorted_by_their_offsets():
    spec = TensorSpec("w", "U8", (4, 2))
    boxes = pad_boxes([((2, 0), (2, 2)), ((0, 1), (2, 1)), ((0, 0), (2, 1))])
    table = ChunkTable(tensor=np.zeros(3, np.int64), boxes=boxes)
    bounds, header_bytes = np.array([0, 2, 3]), np.array([100, 200])
    ((_, entry),) = tensor_entries([spec], table, bounds=bounds, header_bytes=header_bytes)
    assert entry.chunks.tolist() == [
        [1, 200, 202, 0, 0, 2, 1],
        [0, 104, 106, 0, 1, 2, 1],
        [0, 100, 104, 2, 0, 2, 2],
    ]
