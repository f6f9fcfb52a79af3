"""find_gap and first_gap agree with a count of every element."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.format import tiling as boxes
from shardckpt.format.tiling import find_gap, first_gap, stable_order


@st.composite
def shapes_and_boxes(draw):
    """A shape, and boxes that tile it, of which some may then be dropped, doubled or moved."""
    shape = draw(st.lists(st.integers(1, 5), min_size=0, max_size=3))
    tiles = [([0] * len(shape), list(shape))]
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(tiles) - 1))
        if not shape:
            break
        dim = draw(st.integers(0, len(shape) - 1))
        offsets, sizes = tiles[at]
        if sizes[dim] < 2:
            continue
        cut = draw(st.integers(1, sizes[dim] - 1))
        left, right, begin = list(sizes), list(sizes), list(offsets)
        left[dim], right[dim], begin[dim] = cut, sizes[dim] - cut, offsets[dim] + cut
        tiles[at : at + 1] = [(offsets, left), (begin, right)]
    harm = draw(st.sampled_from(["none", "drop", "double", "move"]))
    at = draw(st.integers(0, len(tiles) - 1))
    if harm == "drop":
        tiles.pop(at)
    elif harm == "double":
        tiles.append(tiles[at])
    elif harm == "move" and shape:
        dim = draw(st.integers(0, len(shape) - 1))
        tiles[at][0][dim] += draw(st.sampled_from([-1, 1]))
    return shape, draw(st.permutations(tiles))


def as_arrays(shape, tiles):
    offsets = np.array([tile[0] for tile in tiles], dtype=np.int64).reshape(len(tiles), len(shape))
    sizes = np.array([tile[1] for tile in tiles], dtype=np.int64).reshape(len(tiles), len(shape))
    return offsets, sizes


def truly_tiles(shape, tiles):
    counts = np.zeros(shape, dtype=int)
    for offsets, sizes in tiles:
        if any(a < 0 or a + n > whole for a, n, whole in zip(offsets, sizes, shape, strict=True)):
            return False
        counts[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))] += 1
    return bool((counts == 1).all())


@given(shapes_and_boxes())
def test_agrees_with_counting(case):
    shape, tiles = case
    assert (find_gap(shape, *as_arrays(shape, tiles)) is None) == truly_tiles(shape, tiles)


@given(shapes_and_boxes())
def test_agrees_when_the_boxes_are_taken_slab_by_slab(case):
    shape, tiles = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boxes, "_CORNERS", 0)
        patch.setattr(boxes, "_FEW_DIMS", 0)
        assert (find_gap(shape, *as_arrays(shape, tiles)) is None) == truly_tiles(shape, tiles)


@given(shapes_and_boxes())
def test_names_the_first_wrong_element(case):
    shape, tiles = case
    counts = np.zeros(shape, dtype=int)
    for offsets, sizes in tiles:
        counts[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))] += 1
    gap = find_gap(shape, *as_arrays(shape, tiles))
    if gap is not None and gap[0] != "out of bounds":
        assert gap[1] == tuple(np.argwhere(counts != 1)[0].tolist())
        assert gap[0] == ("overlap" if counts[gap[1]] else "hole")
        assert min(gap[2], default=1) > 0


def bricks(count):
    """Row i is cut at column i, so that the boxes have as many borders as there are rows."""
    at = np.arange(1, count)
    left = np.stack([at, 0 * at, 0 * at + 1, at], axis=1)
    right = np.stack([at, at, 0 * at + 1, count - at], axis=1)
    return np.concatenate([[[0, 0, 1, count]], left, right])


def test_many_boxes_that_are_no_grid_are_quick_enough_to_check():
    """If each row were checked alone, this would take minutes."""
    size = 200_000
    rows = bricks(size)
    assert find_gap([size, size], rows[:, :2], rows[:, 2:]) is None
    rows = rows[:-1]
    gap = find_gap([size, size], rows[:, :2], rows[:, 2:])
    assert gap == ("hole", (size - 1, size - 1), (1, 1))


def test_names_the_place():
    offsets, sizes = as_arrays([4, 6], [([0, 0], [4, 2]), ([0, 3], [4, 3])])
    assert find_gap([4, 6], offsets, sizes) == ("hole", (0, 2), (4, 1))
    offsets, sizes = as_arrays([4], [([0], [3]), ([2], [2])])
    assert find_gap([4], offsets, sizes) == ("overlap", (2,), (1,))
    offsets, sizes = as_arrays([4], [([0], [5])])
    assert find_gap([4], offsets, sizes) == ("out of bounds", (0,), (5,))


def test_many_boxes_are_quick_enough_to_check():
    grid = np.stack(np.meshgrid(np.arange(300), np.arange(300), indexing="ij"), -1).reshape(-1, 2)
    assert find_gap([300, 300], grid, np.ones_like(grid)) is None
    assert find_gap([300, 300], grid[:-1], np.ones_like(grid[:-1])) == ("hole", (299, 299), (1, 1))


def test_offsets_near_the_limit_do_not_wrap():
    far = np.array([[2**63 - 1]])
    assert find_gap([4], far, np.array([[2]])) == ("out of bounds", (2**63 - 1,), (2,))


def as_one(cases):
    """Many tensors and their boxes as first_gap takes them."""
    dims = max(len(shape) for shape, _ in cases)
    shapes = np.array([[*shape, *[1] * (dims - len(shape))] for shape, _ in cases], dtype=np.int64)
    offsets, sizes = [], []
    for shape, tiles in cases:
        low, size = as_arrays(shape, tiles)
        blank = np.zeros((len(tiles), dims - len(shape)), dtype=np.int64)
        offsets.append(np.hstack([low, blank]))
        sizes.append(np.hstack([size, blank + 1]))
    bounds = np.cumsum([0, *(len(tiles) for _, tiles in cases)])
    return shapes.reshape(len(cases), dims), bounds, np.vstack(offsets), np.vstack(sizes)


def grid(shape, cuts):
    """The cells of a grid, in any order."""
    parts = [
        list(itertools.pairwise(sorted({0, whole, *(c % whole for c in own)})))
        for whole, own in zip(shape, cuts, strict=False)
    ]
    cells = itertools.product(*parts)
    return [([a for a, _ in cell], [b - a for a, b in cell]) for cell in cells]


@st.composite
def grids(draw):
    shape = draw(st.lists(st.integers(1, 5), max_size=3))
    cuts = [draw(st.lists(st.integers(0, 4), max_size=3)) for _ in shape]
    tiles = draw(st.permutations(grid(shape, cuts)))
    harm = draw(st.sampled_from(["none", "none", "drop", "double", "swap"]))
    if harm == "drop":
        tiles = tiles[1:]
    elif harm == "double":
        tiles = [*tiles, tiles[0]]
    elif harm == "swap":  # as many boxes as cells, one of them twice
        tiles = [tiles[-1], *tiles[1:]]
    return shape, tiles


@given(st.lists(st.one_of(grids(), shapes_and_boxes()), min_size=1, max_size=5))
def test_many_tensors_at_once(cases):
    wrong = [i for i, (shape, tiles) in enumerate(cases) if not truly_tiles(shape, tiles)]
    found = first_gap(*as_one(cases))
    assert (found[0] if found else None) == (wrong[0] if wrong else None)


@given(st.lists(grids(), min_size=1, max_size=5))
def test_grids_pass_without_a_closer_look(cases):
    good = boxes._are_grids(*as_one(cases))
    assert good.tolist() == [truly_tiles(shape, tiles) for shape, tiles in cases]


def test_numbers_that_wrap():
    """Offsets and sizes that overflow when they are added."""
    for low, size in ((2**63 - 1, 2), (2, 2**63 - 1), (-(2**63), 2**63 - 1)):
        offsets, sizes = as_arrays([4], [([0], [2]), ([low], [size])])
        found = first_gap(np.array([[4]]), np.array([0, 2]), offsets, sizes)
        assert found is not None
        assert found[1][0] == "out of bounds"


@given(st.lists(st.integers(0, 1 << 17), max_size=20), st.sampled_from([1 << 16, 1 << 20]))
def test_stable_order_sorts_as_numpy_does(keys, below):
    keys = np.array([key % below for key in keys], dtype=np.int64)
    assert stable_order(keys, below=below).tolist() == np.argsort(keys, kind="stable").tolist()
