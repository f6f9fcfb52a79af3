"""Boxes of saved tensors become byte ranges of shards, and their targets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.errors import UnsupportedLeafError
from shardckpt.format.entries import TensorEntry
from shardckpt.io.buffers import view_at
from shardckpt.plan import read_plan
from shardckpt.plan.read_plan import WINDOW_BYTES, plan_reads
from shardckpt.state.local_chunks import LocalChunk, box_slices

ROWS, COLUMNS = 6, 5


def entry(tensor: torch.Tensor, *, begin: int = 64, cut: int | None = None) -> TensorEntry:
    """The entry of an F32 tensor: one chunk in shard 0, or one in each of shards 0 and 1."""
    rows, columns = tensor.shape
    parts = [(0, rows)] if cut is None else [(0, cut), (cut, rows - cut)]
    chunks = [
        [shard, begin, begin + count * columns * 4, at, 0, count, columns]
        for shard, (at, count) in enumerate(parts)
    ]
    return TensorEntry(dtype="F32", shape=(rows, columns), chunks=np.array(chunks, np.int64))


def perform(reads, shards: list[bytes]) -> None:
    """A slow reference: copies each planned read from shards in memory."""
    for shard, begin, end, address in reads.direct.tolist():
        view_at(address, end - begin)[:] = shards[shard][begin:end]
    for copy in reads.copies:
        assert copy.begin // WINDOW_BYTES == (copy.end - 1) // WINDOW_BYTES
        data = bytearray(shards[copy.shard][copy.begin : copy.end])
        held = torch.frombuffer(data, dtype=copy.dtype)
        copy.into.copy_(held.as_strided(copy.sizes, copy.strides))


def shards_of(tensor: torch.Tensor, begin: int, cut: int | None) -> list[bytes]:
    parts = [tensor] if cut is None else [tensor[:cut], tensor[cut:]]
    return [bytes(begin) + part.contiguous().numpy().tobytes() for part in parts]


@given(
    st.integers(0, ROWS - 1),
    st.integers(1, ROWS),
    st.integers(0, COLUMNS - 1),
    st.integers(1, COLUMNS),
    st.sampled_from([None, 1, 3]),
    st.booleans(),
    st.booleans(),
)
def test_every_element_of_a_box_is_read_to_its_place(row, rows, column, columns, cut, turned, cast):
    saved = torch.arange(float(ROWS * COLUMNS)).reshape(ROWS, COLUMNS)
    rows, columns = min(rows, ROWS - row), min(columns, COLUMNS - column)
    dtype = torch.float64 if cast else torch.float32
    shape = (columns, rows) if turned else (rows, columns)
    target = torch.full(shape, -1.0, dtype=dtype)
    view = target.t() if turned else target
    reads = plan_reads([(entry(saved, cut=cut), LocalChunk((row, column), (rows, columns), view))])
    perform(reads, shards_of(saved, 64, cut))
    assert torch.equal(view.float(), saved[row : row + rows, column : column + columns])


def test_a_tensor_in_the_layout_of_the_file_is_one_direct_read():
    target = torch.zeros(ROWS, COLUMNS)
    reads = plan_reads([(entry(target), LocalChunk((0, 0), (ROWS, COLUMNS), target))])
    assert reads.direct.tolist() == [[0, 64, 64 + target.nbytes, target.data_ptr()]]
    assert reads.copies == []


def test_rows_of_a_chunk_are_one_direct_read_and_columns_are_copied():
    saved = torch.zeros(ROWS, COLUMNS)
    rows, columns = torch.zeros(2, COLUMNS), torch.zeros(ROWS, 2)
    reads = plan_reads([(entry(saved), LocalChunk((1, 0), (2, COLUMNS), rows))])
    assert reads.direct.tolist() == [[0, 64 + 20, 64 + 60, rows.data_ptr()]]
    reads = plan_reads([(entry(saved), LocalChunk((0, 1), (ROWS, 2), columns))])
    assert len(reads.direct) == 0
    (copy,) = reads.copies
    assert (copy.begin, copy.end) == (64 + 4, 64 + 5 * 20 + 12)
    assert (copy.sizes, copy.strides) == ((ROWS, 2), (COLUMNS, 1))


def test_a_known_address_takes_the_place_of_the_tensor():
    target = torch.zeros(2, 2)
    chunk = LocalChunk((0, 0), (2, 2), target, address=12_345)
    assert plan_reads([(entry(target), chunk)]).direct[0, 3] == 12_345


def test_a_box_without_elements_needs_no_read():
    saved = torch.zeros(ROWS, COLUMNS)
    reads = plan_reads([(entry(saved), LocalChunk((0, 0), (0, COLUMNS), torch.zeros(0, COLUMNS)))])
    assert (len(reads.direct), reads.copies) == (0, [])
    assert len(plan_reads([]).direct) == 0


def test_a_copy_does_not_cross_the_border_of_a_window():
    saved = torch.zeros(5, 1000)
    begin = WINDOW_BYTES - 4 * 1500  # the border is in the middle of the second row
    target = torch.zeros(5, 1000, dtype=torch.float64)
    reads = plan_reads([(entry(saved, begin=begin), LocalChunk((0, 0), (5, 1000), target))])
    ranges = [(copy.begin, copy.end) for copy in reads.copies]
    assert len(ranges) > 1
    assert ranges[0][0] == begin
    assert ranges[-1][1] == begin + saved.nbytes
    assert all(low // WINDOW_BYTES == (high - 1) // WINDOW_BYTES for low, high in ranges)
    assert [high for _, high in ranges[:-1]] == [low for low, _ in ranges[1:]]
    assert sum(copy.into.numel() for copy in reads.copies) == saved.numel()


def test_a_target_without_memory_is_refused():
    target = torch.ones(8, 1)
    part = target[:4]
    target.untyped_storage().resize_(0)
    with pytest.raises(UnsupportedLeafError):
        plan_reads([(entry(part), LocalChunk((0, 0), (4, 1), part))])


def test_the_bytes_of_all_reads_are_counted():
    saved = torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS)
    target = torch.empty_like(saved)
    read = plan_reads([(entry(saved), LocalChunk((0, 0), (ROWS, COLUMNS), target))])
    cast = plan_reads([(entry(saved), LocalChunk((0, 0), (ROWS, COLUMNS), target.double()))])
    assert len(read.direct)
    assert cast.copies
    assert read.size_bytes() == cast.size_bytes() == saved.nbytes


@pytest.mark.parametrize("cut", [None, 1])
def test_a_complete_tensor_is_read_to_its_address(cut):
    saved = torch.arange(float(ROWS * COLUMNS)).reshape(ROWS, COLUMNS)
    target = torch.empty_like(saved)
    chunk = LocalChunk((0, 0), (ROWS, COLUMNS), target, target.data_ptr())
    reads = plan_reads([(entry(saved, cut=cut), chunk)])
    assert len(reads.direct) == (1 if cut is None else 2)
    perform(reads, shards_of(saved, 64, cut))
    assert torch.equal(target, saved)


@st.composite
def tilings(draw):
    """Boxes that tile a tensor of 12 x 10, in any order: columns that are divided by themselves."""
    boxes = []
    for left, right in itertools.pairwise([0, *sorted(draw(st.sets(st.integers(1, 9)))), 10]):
        rows = sorted(draw(st.sets(st.integers(1, 11))))
        for top, bottom in itertools.pairwise([0, *rows, 12]):
            boxes.append(((top, left), (bottom - top, right - left)))
    return draw(st.permutations(boxes))


@given(tilings(), tilings(), st.booleans())
def test_many_boxes_of_a_tensor_with_many_chunks_are_filled(held, wanted, turned):
    saved = torch.arange(120.0).reshape(12, 10)
    chunks, shard = [], b""
    for (top, left), (rows, columns) in held:
        data = saved[top : top + rows, left : left + columns].contiguous().numpy().tobytes()
        chunks.append([0, len(shard), len(shard) + len(data), top, left, rows, columns])
        shard += data
    one = TensorEntry(dtype="F32", shape=(12, 10), chunks=np.array(chunks, np.int64))
    found = torch.full((10, 12), -1.0).t() if turned else torch.full((12, 10), -1.0)
    boxes = [
        LocalChunk(offsets, sizes, found[box_slices((0, 0), offsets, sizes)])
        for offsets, sizes in wanted
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_plan, "_MANY_CHUNKS", 1)
        perform(plan_reads([(one, box) for box in boxes]), [shard])
    assert torch.equal(found, saved)


def test_boxes_and_chunks_are_not_compared_one_by_one():
    chunks = [[0, 8 * row, 8 * row + 8, row, 0, 1, 2] for row in range(1000)]
    one = TensorEntry(dtype="F32", shape=(1000, 2), chunks=np.array(chunks[::-1], np.int64))
    boxes = [(one, LocalChunk((row, 0), (2, 2), torch.zeros(2, 2))) for row in range(0, 1000, 2)]
    near = read_plan._near(boxes, [one.chunks] * 500, 2)
    assert [sorted(chunks[:, 3].tolist()) for chunks in near] == [
        [row, row + 1] for row in range(0, 1000, 2)
    ]
