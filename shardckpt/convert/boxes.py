"""Boxes of tensors: the box that two boxes share, and the rows that contain a box."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from shardckpt.state.local_chunks import box_slices

__all__ = ["read_rows", "shared_box"]

Sizes = tuple[int, ...]
"""One number for each dimension, in elements."""


def shared_box(
    offsets: Sizes, sizes: Sizes, other_offsets: Sizes, other_sizes: Sizes
) -> tuple[Sizes, Sizes] | None:
    """Return the offsets and sizes of the box that two boxes share. None if it is empty."""
    begin = tuple(map(max, offsets, other_offsets))
    ends = zip(offsets, sizes, other_offsets, other_sizes, strict=True)
    shared = tuple(
        min(at + n, other + m) - low for (at, n, other, m), low in zip(ends, begin, strict=True)
    )
    return (begin, shared) if all(size > 0 for size in shared) else None


def read_rows(
    shape: Sizes, offsets: Sizes, sizes: Sizes, read: Callable[[int, int], torch.Tensor]
) -> torch.Tensor:
    """Read a box of a tensor that is stored in row-major order: the rows that contain it.

    Args:
        shape: The shape of the tensor.
        offsets: The offsets of the box.
        sizes: The sizes of the box.
        read: Takes the begin and the end of the elements to read, and returns them as a flat
            tensor.

    Returns:
        The box.
    """
    if not shape:
        return read(0, 1).reshape(())
    row = math.prod(shape[1:])
    first, count = offsets[0], sizes[0]
    rows = read(first * row, (first + count) * row).reshape(count, *shape[1:])
    return rows[box_slices((first, *(0,) * (len(shape) - 1)), offsets, sizes)]
