"""Derived tensors: pieces of saved tensors and constants, and the reads that fill their boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shardckpt.format.entries import TensorEntry
from shardckpt.state.derived import concatenated, cut, derived, expanded, padded, permuted
from shardckpt.state.local_chunks import LocalChunk, box_slices

SHAPE = (4, 3)
SAVED = torch.arange(12.0).reshape(SHAPE)
TENSOR = derived(TensorEntry(dtype="F32", shape=SHAPE, chunks=np.zeros((1, 7), np.int64)), "w")


def read(tensor, offsets, sizes):
    """Fill a box by the reads and constants of a derived tensor."""
    box = torch.full(sizes, torch.nan)
    reads, constants = expanded([(tensor, LocalChunk(offsets, sizes, box))])
    for _, chunk in reads:
        chunk.data.copy_(SAVED[box_slices((0, 0), chunk.offsets, chunk.sizes)])
    for fill in constants:
        fill()
    return box


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (TENSOR, SAVED),
        (cut(TENSOR, 0, [(3, 4), (0, 2)]), SAVED[[3, 0, 1]]),
        (concatenated([TENSOR, cut(TENSOR, 1, [(1, 2)])], 1), torch.cat([SAVED, SAVED[:, 1:2]], 1)),
        (permuted(TENSOR, (1, 0)), SAVED.T),
        (padded(TENSOR, 0, 6, 7.0), torch.cat([SAVED, torch.full((2, 3), 7.0)])),
        (permuted(padded(cut(TENSOR, 0, [(1, 3)]), 1, 5, 0.0), (1, 0)),
         torch.cat([SAVED[1:3], torch.zeros(2, 2)], 1).T),
    ],
)  # fmt: skip
def test_every_box_of_a_derived_tensor_is_filled(tensor, expected):
    assert tensor.shape == tuple(expected.shape)
    rows, columns = tensor.shape
    assert torch.equal(read(tensor, (0, 0), (rows, columns)), expected)
    for row in range(rows):
        for column in range(columns):
            assert read(tensor, (row, column), (1, 1)).item() == expected[row, column]


def test_only_the_pieces_in_a_box_are_read():
    tensor = concatenated([cut(TENSOR, 0, [(0, 1)]), cut(TENSOR, 0, [(2, 3)])], 0)
    data = torch.empty(1, 3)
    reads, constants = expanded([(tensor, LocalChunk((1, 0), (1, 3), data))])
    assert [(chunk.offsets, chunk.sizes) for _, chunk in reads] == [((2, 0), (1, 3))]
    assert constants == []
