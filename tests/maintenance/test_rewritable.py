"""Chunks of a source are read in pieces of a buffer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shardckpt.maintenance import rewritable
from shardckpt.maintenance.rewritable import read_chunks
from shardckpt.plan.local_plan import ChunkTable, TensorSpec, pad_boxes

TENSORS = {"w": torch.arange(60, dtype=torch.int16).reshape(5, 3, 4), "s": torch.tensor(7.0)}
SPECS = [TensorSpec("w", "I16", (5, 3, 4)), TensorSpec("s", "F32", ())]
CHUNKS = ChunkTable(
    tensor=np.array([0, 1, 0]),
    boxes=pad_boxes([((1, 0, 0), (3, 3, 4)), ((), ()), ((0, 1, 2), (1, 2, 2))]),
)
EXPECTED = b"".join(
    part.contiguous().numpy().tobytes()
    for part in (TENSORS["w"][1:4], TENSORS["s"], TENSORS["w"][:1, 1:3, 2:4])
)


class Source:
    def __init__(self):
        self.asked = []

    def read_box(self, name, offsets, sizes):
        cut = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
        part = TENSORS[name][cut].contiguous()
        self.asked.append(part.nbytes)
        return part


def read(source=None, **options):
    pieces = read_chunks(source or Source(), SPECS, CHUNKS, **options)
    return b"".join(piece.numpy().tobytes() for piece in pieces)


@pytest.mark.parametrize("buffer_bytes", [4, 8, 10, 24, 1 << 20])
def test_no_piece_is_larger_than_a_buffer(monkeypatch, buffer_bytes):
    monkeypatch.setattr(rewritable, "BUFFER_BYTES", buffer_bytes)
    source = Source()
    assert read(source) == EXPECTED
    assert max(source.asked) <= buffer_bytes


@pytest.mark.parametrize("begin", [0, 1, 30, 72, 75, 83])
@pytest.mark.parametrize("end", [0, 1, 31, 72, 74, 84, None])
def test_a_range_of_the_bytes_is_read(monkeypatch, begin, end):
    monkeypatch.setattr(rewritable, "BUFFER_BYTES", 16)
    assert (
        read(begin=begin, end=end) == EXPECTED[begin : max(end, begin) if end is not None else end]
    )


def test_pieces_outside_the_range_are_not_read(monkeypatch):
    monkeypatch.setattr(rewritable, "BUFFER_BYTES", 8)
    source = Source()
    read(source, begin=24, end=40)
    assert sum(source.asked) == 16
