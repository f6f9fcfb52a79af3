"""Names of shards, sizes of chunks, and the position of each chunk in its shard."""

from __future__ import annotations

import numpy as np
from hypothesis import given

from shardckpt.format.dtype_names import itemsize
from shardckpt.format.manifest import encode_tensors
from shardckpt.plan.local_plan import ChunkTable, TensorSpec, pad_boxes
from shardckpt.plan.plan_cache import KnownPlan
from shardckpt.plan.save_plan import global_plan
from shardckpt.plan.shard_layout import chunk_bytes, shard_name, tensor_entries
from shardckpt.state.file_groups import GROUP_COUNT, group_in_name
from tests.plan.plans import travelled, worlds


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
    entry = tensor_entries([spec], table, bounds=bounds, header_bytes=header_bytes)["w"]
    assert entry.chunks.tolist() == [
        [1, 200, 202, 0, 0, 2, 1],
        [0, 104, 106, 0, 1, 2, 1],
        [0, 100, 104, 2, 0, 2, 2],
    ]
