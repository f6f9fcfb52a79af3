"""Tensors that are put together from boxes of saved tensors.

A derived tensor is a list of pieces. Each piece is a box of it, and comes from a box of a saved
tensor with permuted dimensions, or is a constant. A read of a derived tensor becomes reads of the
saved tensors, so that a rank reads only its bytes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from shardckpt.format.entries import TensorEntry
from shardckpt.state.local_chunks import LocalChunk, box_slices, shared_box

__all__ = [
    "DerivedEntry",
    "Piece",
    "concatenated",
    "cut",
    "derived",
    "expanded",
    "padded",
    "permuted",
]

_Sizes: TypeAlias = tuple[int, ...]
BoxReads: TypeAlias = list[tuple[TensorEntry, LocalChunk]]


class Piece(NamedTuple):
    """A box of a derived tensor.

    Attributes:
        offsets: The offsets of the box in the derived tensor.
        sizes: Its sizes.
        name: The name of the saved tensor in the manifest. Empty for a constant.
        entry: The saved tensor. None for a constant.
        source: The offsets in the saved tensor of the first element, by dimension of the saved
            tensor.
        order: For each dimension of the derived tensor, the dimension of the saved tensor.
        value: The constant.
    """

    offsets: _Sizes
    sizes: _Sizes
    name: str = ""
    entry: TensorEntry | None = None
    source: _Sizes = ()
    order: _Sizes = ()
    value: float = 0

    def within(self, offsets: Sequence[int], sizes: Sequence[int]) -> Piece | None:
        """Return the part of the piece in a box of the derived tensor. None if it is empty."""
        shared = shared_box(self.offsets, self.sizes, offsets, sizes)
        if shared is None:
            return None
        low, size = shared
        source = list(self.source)
        for dim, of in enumerate(self.order):
            source[of] += low[dim] - self.offsets[dim]
        return self._replace(offsets=low, sizes=size, source=tuple(source))

    def source_sizes(self) -> _Sizes:
        """Return the sizes by dimension of the saved tensor."""
        return tuple(self.sizes[dim] for dim in self.to_source())

    def to_source(self) -> _Sizes:
        """Return the dimension of the derived tensor for each dimension of the saved tensor."""
        return tuple(self.order.index(dim) for dim in range(len(self.order)))


class DerivedEntry(TensorEntry, frozen=True, kw_only=True, eq=False, gc=False):
    """A tensor that a manifest does not have. Its pieces cover it exactly once.

    Attributes:
        pieces: The pieces.
    """

    pieces: tuple[Piece, ...]


def _entry(dtype: str, shape: _Sizes, pieces: Iterable[Piece]) -> DerivedEntry:
    chunks = np.empty((0, 3 + 2 * len(shape)), np.int64)
    return DerivedEntry(dtype=dtype, shape=shape, chunks=chunks, pieces=tuple(pieces))


def derived(entry: TensorEntry, name: str) -> DerivedEntry:
    """Return a saved tensor as a derived one, of a single piece."""
    if isinstance(entry, DerivedEntry):
        return entry
    start, dims = (0,) * len(entry.shape), tuple(range(len(entry.shape)))
    full = 0 not in entry.shape
    piece = Piece(start, entry.shape, name, entry, start, dims)
    return _entry(entry.dtype, entry.shape, [piece] if full else [])


def cut(tensor: DerivedEntry, dim: int, ranges: Sequence[tuple[int, int]]) -> DerivedEntry:
    """Return the parts [begin, end) of a dimension, one after the other."""
    pieces, at = [], 0
    for begin, end in ranges:
        offsets, sizes = [0] * len(tensor.shape), list(tensor.shape)
        offsets[dim], sizes[dim] = begin, end - begin
        for piece in tensor.pieces:
            if part := piece.within(offsets, sizes):
                pieces.append(_moved(part, dim, at - begin))
        at += end - begin
    return _entry(tensor.dtype, _resized(tensor.shape, dim, at), pieces)


def concatenated(tensors: Sequence[DerivedEntry], dim: int) -> DerivedEntry:
    """Return tensors of equal dtype and equal other sizes, one after the other."""
    pieces, at = [], 0
    for tensor in tensors:
        pieces += [_moved(piece, dim, at) for piece in tensor.pieces]
        at += tensor.shape[dim]
    return _entry(tensors[0].dtype, _resized(tensors[0].shape, dim, at), pieces)


def permuted(tensor: DerivedEntry, order: Sequence[int]) -> DerivedEntry:
    """Return a tensor with permuted dimensions, as torch.permute does."""

    def moved(sizes: _Sizes) -> _Sizes:
        return tuple(sizes[dim] for dim in order)

    pieces = [
        piece._replace(
            offsets=moved(piece.offsets),
            sizes=moved(piece.sizes),
            order=moved(piece.order) if piece.entry is not None else (),
        )
        for piece in tensor.pieces
    ]
    return _entry(tensor.dtype, moved(tensor.shape), pieces)


def padded(tensor: DerivedEntry, dim: int, size: int, value: float) -> DerivedEntry:
    """Return a tensor with a constant behind its end in a dimension."""
    shape, at = _resized(tensor.shape, dim, size), tensor.shape[dim]
    offsets = _resized((0,) * len(shape), dim, at)
    constant = Piece(offsets, _resized(shape, dim, size - at), value=value)
    pieces = tensor.pieces if 0 in constant.sizes else (*tensor.pieces, constant)
    return _entry(tensor.dtype, shape, pieces)


def _resized(sizes: _Sizes, dim: int, size: int) -> _Sizes:
    return (*sizes[:dim], size, *sizes[dim + 1 :])


def _moved(piece: Piece, dim: int, by: int) -> Piece:
    return piece._replace(offsets=_resized(piece.offsets, dim, piece.offsets[dim] + by))


def expanded(wanted: BoxReads) -> tuple[BoxReads, list[Callable[[], object]]]:
    """Replace the reads of derived tensors by reads of the saved ones.

    Args:
        wanted: Tensors, and the boxes of them to fill.

    Returns:
        The reads, and the functions that write the constants.
    """
    if DerivedEntry not in set(map(type, map(operator.itemgetter(0), wanted))):
        return wanted, []
    reads: BoxReads = []
    constants: list[Callable[[], object]] = []
    for entry, chunk in wanted:
        if not isinstance(entry, DerivedEntry):
            reads.append((entry, chunk))
            continue
        data = chunk.data.detach()
        for piece in entry.pieces:
            part = piece.within(chunk.offsets, chunk.sizes)
            if part is None:
                continue
            view = data[box_slices(chunk.offsets, part.offsets, part.sizes)]
            if part.entry is None:
                constants.append(_constant(view, part.value))
            else:
                view = view.permute(part.to_source())
                reads.append((part.entry, LocalChunk(part.source, part.source_sizes(), view)))
    return reads, constants


def _constant(view: torch.Tensor, value: float) -> Callable[[], object]:
    return lambda: view.fill_(value)
