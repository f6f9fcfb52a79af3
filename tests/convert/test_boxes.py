"""A box of a tensor is read from the rows that contain it."""

from __future__ import annotations

import pytest
import torch

from shardckpt.convert.boxes import read_rows


@pytest.mark.parametrize(
    ("shape", "offsets", "sizes"),
    [
        ((), (), ()),
        ((6,), (2,), (3,)),
        ((4, 3, 2), (1, 0, 1), (2, 3, 1)),
        ((4, 3), (2, 1), (0, 2)),
    ],
)
def test_only_the_rows_of_a_box_are_read(shape, offsets, sizes):
    full = torch.arange(torch.Size(shape).numel()).reshape(shape)
    ranges = []

    def read(begin, end):
        ranges.append((begin, end))
        return full.flatten()[begin:end]

    box = read_rows(shape, offsets, sizes, read)
    slices = tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
    assert torch.equal(box, full[slices])
    row = torch.Size(shape[1:]).numel()
    first, count = (offsets[0], sizes[0]) if shape else (0, 1)
    assert ranges == [(first * row, (first + count) * row)]
