"""Shards are written with the same bytes and digests, from staged data and by copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.format.digests import BLOCK_BYTES, block_digest
from shardckpt.io.buffers import BUFFER_BYTES
from shardckpt.saving import shard_writer as writer
from shardckpt.saving.staging import StagingBuffer


class File:
    """A file in memory that takes what O_DIRECT would take."""

    direct = True

    def __init__(self, size_bytes: int) -> None:
        self.data = bytearray(size_bytes + 4096)

    def write(self, view: memoryview, *, offset: int) -> None:
        assert offset % 4096 == 0
        assert len(view) % 4096 == 0
        assert np.frombuffer(view, dtype=np.uint8).ctypes.data % 4096 == 0
        self.data[offset : offset + len(view)] = view


IMAGE = StagingBuffer(32 << 20, locked=False)._bytes
IMAGE.copy_(torch.arange(IMAGE.numel()) % 251)


@settings(max_examples=25, deadline=None)
@given(
    pages=st.integers(1, 300),
    begin=st.integers(0, 3).map(lambda n: n * 4096) | st.integers(0, 9999),
    sizes=st.lists(st.integers(0, 9 << 20) | st.integers(0, 5000), max_size=5),
    gap=st.booleans(),
)
def test_staged_data_give_the_same_bytes_as_copies(pages, begin, sizes, gap):
    header = bytes(range(256)) * 16 * pages
    tensors = []
    for size in sizes:
        tensors.append(IMAGE[begin : begin + min(size, 6 << 20)])
        begin += len(tensors[-1]) + gap
    expected = header + b"".join(tensor.numpy().tobytes() for tensor in tensors)
    file = File(len(expected))
    size, digests = writer.write_shard(file, header=header, tensors=tensors, staged=True)
    assert size == len(expected)
    assert file.data[:size] == expected
    blocks = [expected[at : at + BLOCK_BYTES] for at in range(0, size, BLOCK_BYTES)]
    assert digests.tolist() == [block_digest(block) for block in blocks]


@pytest.mark.parametrize("staged", [True, False])
def test_only_staged_data_are_written_without_a_copy(staged, monkeypatch):
    copied = []
    copy = writer.copy_bytes
    monkeypatch.setattr(
        writer, "copy_bytes", lambda to, of, size: (copied.append(size), copy(to, of, size))
    )
    header, tensors = bytes(8192), IMAGE[: 3 * BUFFER_BYTES].split(1 << 20)
    writer.write_shard(
        File(len(header) + 3 * BUFFER_BYTES), header=header, tensors=tensors, staged=staged
    )
    total = len(header) + 3 * BUFFER_BYTES
    assert sum(copied) == (total - 2 * BUFFER_BYTES if staged else total)


def test_parts_of_other_tensors_are_written_as_well():
    tensors = [IMAGE[:4096].view(64, 64).t(), torch.ones(3), IMAGE[4096:8192], torch.tensor([])]
    expected = bytes(4096) + b"".join(t.contiguous().numpy().tobytes() for t in tensors)
    file = File(len(expected))
    size, _ = writer.write_shard(file, header=bytes(4096), tensors=tensors, staged=True)
    assert file.data[:size] == expected


def test_progress_is_reported_and_the_rest_of_a_shard_begins_at_its_offset():
    file, seen = File(3 << 20), []
    size, digests = writer.write_shard(
        file, header=b"", tensors=[IMAGE[: 1 << 20]], begin=2 << 20, progress=seen.append
    )
    assert size == 3 << 20
    assert seen == [1 << 20]
    assert digests.tolist() == [block_digest(IMAGE[: 1 << 20].numpy())]
    assert file.data[2 << 20 : 3 << 20] == IMAGE[: 1 << 20].numpy().tobytes()
    assert not any(file.data[: 2 << 20])


def test_the_error_of_a_write_is_raised_and_ends_the_shard():
    class Full(File):
        def write(self, view, *, offset):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="space"):
        writer.write_shard(Full(1 << 20), header=bytes(4096), tensors=[IMAGE[: 9 << 20]])
