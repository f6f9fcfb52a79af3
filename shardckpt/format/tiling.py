"""Do boxes tile a tensor exactly? Vectorised, and exact for every arrangement.

`first_gap` takes the boxes of many tensors at once: those that are the cells of a grid, as nearly
all are, pass together; `find_gap` looks at the others one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["Gap", "find_gap", "first_gap", "stable_order"]

Ints = NDArray[np.int64]

Gap = tuple[str, tuple[int, ...], tuple[int, ...]]
"""("overlap" | "hole" | "out of bounds", offsets, sizes) of an offending box."""

_GRID_CELLS = 1 << 22  # a grid larger than this is taken slab by slab


def stable_order(keys: Ints, *, below: int) -> Ints:
    """The stable order of keys from 0 to `below`, all but the last; linear where they fit 16 bits,
    for which numpy has a radix sort."""
    narrow = keys.astype(np.uint16) if below <= 1 << 16 else keys
    return np.argsort(narrow, kind="stable")


def first_gap(shapes: Ints, bounds: Ints, offsets: Ints, sizes: Ints) -> tuple[int, Gap] | None:
    """The first tensor that its boxes don't tile, and where; None if there is none.

    `shapes` [t, d]; tensor i has the boxes in rows bounds[i] to bounds[i + 1] of `offsets` and
    `sizes`, each [n, d]. Dimensions that a tensor does not have are of size 1.
    """
    for index in np.flatnonzero(~_are_grids(shapes, bounds, offsets, sizes)).tolist():
        rows = slice(bounds[index], bounds[index + 1])
        gap = find_gap(shapes[index].tolist(), offsets[rows], sizes[rows])
        if gap is not None:
            return index, gap
    return None


def _are_grids(shapes: Ints, bounds: Ints, offsets: Ints, sizes: Ints) -> NDArray[np.bool_]:
    """For each tensor whether its boxes are the cells of a grid over it, each once: so it is where
    along each dimension the distinct intervals follow each other from end to end, and where there
    are as many boxes, all different, as cells."""
    counts = np.diff(bounds)
    of = np.repeat(np.arange(len(shapes)), counts)
    good = (counts > 0) & (shapes > 0).all(axis=1)
    cells = np.ones(len(shapes))
    cut_dims = np.zeros(len(shapes), dtype=np.int64)
    for dim in range(shapes.shape[1]):
        low, size = (np.ascontiguousarray(column[:, dim]) for column in (offsets, sizes))
        whole = np.repeat(shapes[:, dim], counts)
        parts = (low != 0) | (size != whole)
        if not parts.any():
            continue
        good[of[parts & ((low < 0) | (size <= 0) | (size > whole - low))]] = False
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
    if len(rows):  # along one dimension, as many intervals as boxes are different boxes already
        keys = [offsets[rows, dim] for dim in range(shapes.shape[1])]
        order = np.lexsort((*keys, of[rows]))
        again = _repeats(of[rows][order])
        for key in keys:
            again &= _repeats(key[order])
        good[of[rows][order][again]] = False
    return good


def _intervals(of: Ints, low: Ints, size: Ints, whole: Ints) -> tuple[NDArray[np.bool_], Ints]:
    """For each tensor (`whole` [t]) whether its distinct intervals follow each other from 0 to
    `whole`, and how many they are; `of` [n] are the tensors of the intervals."""
    high = low + size
    new = ~_repeats(of)
    if not _ascends(new, low, size):  # mostly ranks hold them in order
        order = np.lexsort((size, low, of))
        low, high = low[order], high[order]
    distinct = new | ~_repeats(low) | ~_repeats(high)
    before, last = np.zeros_like(high), np.ones_like(new)
    before[1:], last[:-1] = high[:-1], new[1:]
    before[new] = 0
    good = np.ones(len(whole), dtype=bool)
    good[of[(distinct & (low != before)) | (last & (high != whole[of]))]] = False
    return good, np.bincount(of[distinct], minlength=len(whole))


def _ascends(new: NDArray[np.bool_], low: Ints, size: Ints) -> bool:
    """Whether intervals are in order, by their begin, then by their size, from each `new` on."""
    step = np.diff(low)
    in_order = new[1:] | (step > 0) | ((step == 0) & (np.diff(size) >= 0))
    return bool(in_order.all())


def _repeats(column: Ints) -> NDArray[np.bool_]:
    """For each row whether it has the value of the row before."""
    same = np.zeros(len(column), dtype=bool)
    np.equal(column[1:], column[:-1], out=same[1:])
    return same


def find_gap(
    shape: Sequence[int], offsets: NDArray[np.int64], sizes: NDArray[np.int64]
) -> Gap | None:
    """The first place where boxes (`offsets` and `sizes`, each [n, d]) don't tile `shape`.

    None where every element lies in exactly one box. A tensor without elements may have
    boxes, or none.
    """
    whole = np.array(shape, dtype=np.int64)
    wrong = ((offsets < 0) | (sizes < 0) | (sizes > whole - offsets)).any(axis=1)
    if wrong.any():
        first = int(wrong.argmax())
        return "out of bounds", tuple(offsets[first].tolist()), tuple(sizes[first].tolist())
    if 0 in shape:
        return None
    filled = (sizes > 0).all(axis=1)
    offsets, sizes = offsets[filled], sizes[filled]
    found = _gap(whole, offsets, offsets + sizes, list(range(len(shape))))
    if found is None:
        return None
    kind, low, high = found
    return kind, tuple(low.tolist()), tuple((high - low).tolist())


_Found = tuple[str, NDArray[np.int64], NDArray[np.int64]]


def _gap(
    whole: NDArray[np.int64], low: NDArray[np.int64], high: NDArray[np.int64], dims: list[int]
) -> _Found | None:
    """As find_gap for boxes [low, high) that are alike outside `dims`."""
    if len(low) == 0:
        return "hole", np.zeros_like(whole), whole
    dims = [dim for dim in dims if (low[:, dim] > 0).any() or (high[:, dim] < whole[dim]).any()]
    if not dims:
        return ("overlap", low[1], high[1]) if len(low) > 1 else None
    if len(dims) == 1:
        return _gap_along(whole, low, high, dims[0])
    edges = [np.unique(np.concatenate([[0, whole[d]], low[:, d], high[:, d]])) for d in dims]
    if np.prod([float(len(edge)) for edge in edges]) <= max(_GRID_CELLS, 4 * len(low)):
        return _gap_in_grid(whole, low, high, dims, edges)
    fewest = min(range(len(dims)), key=lambda index: len(edges[index]))
    dim, rest = dims[fewest], [d for d in dims if d != dims[fewest]]
    for begin, end in zip(edges[fewest][:-1], edges[fewest][1:], strict=True):
        inside = (low[:, dim] < end) & (high[:, dim] > begin)
        found = _gap(whole, low[inside], high[inside], rest)
        if found is not None:
            kind, at, to = found[0], found[1].copy(), found[2].copy()
            at[dim], to[dim] = begin, end
            return kind, at, to
    return None


def _gap_along(
    whole: NDArray[np.int64], low: NDArray[np.int64], high: NDArray[np.int64], dim: int
) -> _Found | None:
    order = np.argsort(low[:, dim], kind="stable")
    begins = np.append(low[order, dim], whole[dim])
    ends = np.insert(high[order, dim], 0, 0)
    wrong = np.flatnonzero(begins != ends)
    if len(wrong) == 0:
        return None
    first = int(wrong[0])
    at, to = low[order[0]].copy(), high[order[0]].copy()
    at[dim], to[dim] = sorted((int(begins[first]), int(ends[first])))
    return ("hole" if begins[first] > ends[first] else "overlap"), at, to


def _gap_in_grid(
    whole: NDArray[np.int64],
    low: NDArray[np.int64],
    high: NDArray[np.int64],
    dims: list[int],
    edges: list[NDArray[np.int64]],
) -> _Found | None:
    """Count the boxes over each cell of the grid that all edges make, by differences at corners."""
    counts = np.zeros([len(edge) for edge in edges], dtype=np.int32)
    begins = [np.searchsorted(edge, low[:, d]) for d, edge in zip(dims, edges, strict=True)]
    ends = [np.searchsorted(edge, high[:, d]) for d, edge in zip(dims, edges, strict=True)]
    for corner in range(1 << len(dims)):
        at_end = [corner >> index & 1 for index in range(len(dims))]
        place = tuple(e if last else b for b, e, last in zip(begins, ends, at_end, strict=True))
        np.add.at(counts, place, -1 if sum(at_end) % 2 else 1)
    for axis in range(len(dims)):
        np.cumsum(counts, axis=axis, out=counts)
    inner = counts[tuple(slice(0, -1) for _ in dims)]
    if (inner == 1).all():
        return None
    cell = np.unravel_index(int((inner != 1).argmax()), inner.shape)
    at, to = low[0].copy(), high[0].copy()
    for index, dim in enumerate(dims):
        at[dim], to[dim] = edges[index][cell[index]], edges[index][cell[index] + 1]
    return ("hole" if inner[cell] == 0 else "overlap"), at, to
