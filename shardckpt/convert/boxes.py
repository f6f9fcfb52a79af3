"""Read boxes of tensors whose files hold complete rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from shardckpt.state.local_chunks import box_slices

__all__ = ["ReadBox", "read_rows"]

ReadBox = Callable[[tuple[int, ...], tuple[int, ...]], torch.Tensor]
"""A function that takes the offsets and sizes of a box, and returns its elements."""

_Sizes = tuple[int, ...]
"""One number for each dimension, in elements."""


def read_rows(
    shape: _Sizes, offsets: _Sizes, sizes: _Sizes, read: Callable[[int, int], torch.Tensor]
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
