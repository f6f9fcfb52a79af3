"""Check whether boxes tile a tensor: every element in exactly one box.

The check is vectorized, and exact for every arrangement of boxes. `first_gap` checks many tensors
at once: those whose boxes form a grid, as nearly all do, are checked together, and `find_gap`
checks the others one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shardckpt.format.number_lists import Ints

__all__ = ["Gap", "find_gap", "first_gap", "stable_order"]


Gap = tuple[str, tuple[int, ...], tuple[int, ...]]
"""("overlap" | "hole" | "out of bounds", offsets, sizes) of a box that is not tiled."""

# Boxes with more corners, in more dimensions, are checked slab by slab.
_CORNERS = 1 << 20
_FEW_DIMS = 4


def stable_order(keys: Ints, *, below: int) -> Ints:
    """Sort keys in range(below), and return the stable order.

    Takes linear time if the keys fit in 16 bits, as numpy then uses a radix sort.
    """
    narrow = keys.astype(np.uint16) if below <= 1 << 16 else keys
    return np.argsort(narrow, kind="stable")


def first_gap(shapes: Ints, bounds: Ints, offsets: Ints, sizes: Ints) -> tuple[int, Gap] | None:
    """Find the first tensor that its boxes do not tile.

    Args:
        shapes: The shapes of t tensors [t, d]. Missing dimensions have size 1.
        bounds: Tensor i has the boxes in rows bounds[i] to bounds[i + 1] [t + 1].
        offsets: The offsets of n boxes [n, d].
        sizes: The sizes of n boxes [n, d].

    Returns:
        The number of the tensor, with its gap; None if all tensors are tiled.
    """
    for index in np.flatnonzero(~_are_grids(shapes, bounds, offsets, sizes)).tolist():
        rows = slice(bounds[index], bounds[index + 1])
        gap = find_gap(shapes[index].tolist(), offsets[rows], sizes[rows])
        if gap is not None:
            return index, gap
    return None


def _are_grids(shapes: Ints, bounds: Ints, offsets: Ints, sizes: Ints) -> NDArray[np.bool_]:
    """Return, for each tensor, whether its boxes are the cells of a grid over it, each once.

    This holds if along each dimension the distinct intervals follow each other from end to end, and
    if the boxes differ and are as many as the cells.
    """
    counts = np.diff(bounds)
    of = np.repeat(np.arange(len(shapes)), counts)
    good = (counts > 0) & (shapes > 0).all(axis=1)
    cells = np.ones(len(shapes))
    cut_dims = np.zeros(len(shapes), dtype=np.int64)
    for dim in range(shapes.shape[1]):
        low, size = (np.ascontiguousarray(column[:, dim]) for column in (offsets, sizes))
        full = np.repeat(shapes[:, dim], counts)
        parts = (low != 0) | (size != full)
        if not parts.any():
            continue
        good[of[parts & ((low < 0) | (size <= 0) | (size > full - low))]] = False
        cut = np.zeros(len(shapes), dtype=bool)
        cut[of[parts]] = True
        cut &= good
        if cut.any():
            rows = slice(None) if cut.all() else np.flatnonzero(cut[of])
            chained, distinct = _intervals(of[rows], low[rows], size[rows], shapes[:, dim])
            good &= chained | ~cut
            cells[cut] *= distinct[cut]
            cut_dims += cut
    good &= cells == counts
    rows = np.flatnonzero((good & (cut_dims > 1))[of])
    if len(rows):  # with one cut dimension, equal counts imply that the boxes differ
        keys = [offsets[rows, dim] for dim in range(shapes.shape[1])]
        order = np.lexsort((*keys, of[rows]))
        again = _repeats(of[rows][order])
        for key in keys:
            again &= _repeats(key[order])
        good[of[rows][order][again]] = False
    return good


def _intervals(of: Ints, low: Ints, size: Ints, full: Ints) -> tuple[NDArray[np.bool_], Ints]:
    """Check, for each tensor, whether its distinct intervals follow each other from 0 to its full
    size.

    `full` [t] are the sizes of the tensors, `of` [n] the tensors of the intervals.

    Returns:
        The result for each tensor, and the number of its distinct intervals.
    """
    high = low + size
    new = ~_repeats(of)
    if not _ascends(new, low, size):  # usually they are in order
        order = np.lexsort((size, low, of))
        low, high = low[order], high[order]
    distinct = new | ~_repeats(low) | ~_repeats(high)
    before, last = np.zeros_like(high), np.ones_like(new)
    before[1:], last[:-1] = high[:-1], new[1:]
    before[new] = 0
    good = np.ones(len(full), dtype=bool)
    good[of[(distinct & (low != before)) | (last & (high != full[of]))]] = False
    return good, np.bincount(of[distinct], minlength=len(full))


def _ascends(new: NDArray[np.bool_], low: Ints, size: Ints) -> bool:
    """Whether intervals are sorted by begin and size in each group; `new` begins a group."""
    step = np.diff(low)
    in_order = new[1:] | (step > 0) | ((step == 0) & (np.diff(size) >= 0))
    return bool(in_order.all())


def _repeats(column: Ints) -> NDArray[np.bool_]:
    """Return, for each row, whether it equals the row before."""
    same = np.zeros(len(column), dtype=bool)
    np.equal(column[1:], column[:-1], out=same[1:])
    return same


def find_gap(
    shape: Sequence[int], offsets: NDArray[np.int64], sizes: NDArray[np.int64]
) -> Gap | None:
    """Find the first box that is covered twice or not at all, or that is out of bounds.

    Args:
        shape: The shape of the tensor [d].
        offsets: The offsets of n boxes [n, d].
        sizes: The sizes of n boxes [n, d].

    Returns:
        The gap, or None if every element lies in exactly one box. A tensor without elements may
        have any number of boxes.
    """
    full = np.array(shape, dtype=np.int64)
    wrong = ((offsets < 0) | (sizes < 0) | (sizes > full - offsets)).any(axis=1)
    if wrong.any():
        first = int(wrong.argmax())
        return "out of bounds", tuple(offsets[first].tolist()), tuple(sizes[first].tolist())
    if 0 in shape:
        return None
    filled = (sizes > 0).all(axis=1)
    offsets, sizes = offsets[filled], sizes[filled]
    gap = _gap(full, offsets, offsets + sizes, list(range(len(shape))))
    if gap is None:
        return None
    problem, low, high = gap
    return problem, tuple(low.tolist()), tuple((high - low).tolist())


_Range = tuple[str, NDArray[np.int64], NDArray[np.int64]]


def _gap(
    full: NDArray[np.int64], low: NDArray[np.int64], high: NDArray[np.int64], dims: list[int]
) -> _Range | None:
    """Find a gap among the boxes [low, high), which differ only in `dims`. See find_gap."""
    if len(low) == 0:
        return "hole", np.zeros_like(full), full
    dims = [dim for dim in dims if (low[:, dim] > 0).any() or (high[:, dim] < full[dim]).any()]
    if not dims:
        return ("overlap", low[1], high[1]) if len(low) > 1 else None
    if len(dims) == 1:
        return _gap_along(full, low, high, dims[0])
    if len(dims) <= _FEW_DIMS or len(low) << len(dims) <= _CORNERS:
        return _gap_at_corners(full, low, high, dims)
    edges = [np.unique(np.concatenate([[0, full[d]], low[:, d], high[:, d]])) for d in dims]
    fewest = min(range(len(dims)), key=lambda index: len(edges[index]))
    dim, rest = dims[fewest], [d for d in dims if d != dims[fewest]]
    for begin, end in zip(edges[fewest][:-1], edges[fewest][1:], strict=True):
        inside = (low[:, dim] < end) & (high[:, dim] > begin)
        gap = _gap(full, low[inside], high[inside], rest)
        if gap is not None:
            problem, at, to = gap[0], gap[1].copy(), gap[2].copy()
            at[dim], to[dim] = begin, end
            return problem, at, to
    return None


def _gap_along(
    full: NDArray[np.int64], low: NDArray[np.int64], high: NDArray[np.int64], dim: int
) -> _Range | None:
    order = np.argsort(low[:, dim], kind="stable")
    begins = np.append(low[order, dim], full[dim])
    ends = np.insert(high[order, dim], 0, 0)
    wrong = np.flatnonzero(begins != ends)
    if len(wrong) == 0:
        return None
    first = int(wrong[0])
    at, to = low[order[0]].copy(), high[order[0]].copy()
    at[dim], to[dim] = sorted((int(begins[first]), int(ends[first])))
    return ("hole" if begins[first] > ends[first] else "overlap"), at, to


def _gap_at_corners(
    full: NDArray[np.int64], low: NDArray[np.int64], high: NDArray[np.int64], dims: list[int]
) -> _Range | None:
    """Count the boxes over each element by differences at the corners of the boxes.

    Each box adds 1 or -1 at its corners, and the tensor itself takes away as much at its own. The
    sum over all corners at or before an element is then the number of boxes over it, less 1. So the
    boxes tile the tensor if the sum at each corner is 0. Otherwise the first other corner in
    row-major order is the first element with a wrong number of boxes.
    """
    begins = np.append(low[:, dims].T, np.zeros((len(dims), 1), np.int64), axis=1)
    ends = np.append(high[:, dims].T, full[dims, None], axis=1)
    signs = np.append(np.ones(len(low), np.int64), -1)
    choices = np.array(list(itertools.product([False, True], repeat=len(dims))))
    corners = np.concatenate([np.where(at[:, None], ends, begins) for at in choices], axis=1)
    signs = np.concatenate([-signs if at.sum() % 2 else signs for at in choices])
    order = np.lexsort(corners[::-1])
    corners, signs = corners[:, order], signs[order]
    new = np.flatnonzero(np.append(True, (corners[:, 1:] != corners[:, :-1]).any(axis=0)))
    sums = np.add.reduceat(signs, new)
    wrong = np.flatnonzero(sums)
    if len(wrong) == 0:
        return None
    at, to = low[0].copy(), high[0].copy()
    for dim, begin, edges in zip(
        dims, corners[:, new[wrong[0]]], np.append(begins, ends, axis=1), strict=True
    ):
        at[dim], to[dim] = begin, edges[edges > begin].min()
    return ("hole" if sums[wrong[0]] < 0 else "overlap"), at, to
