"""find_gap against counting every element."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.format import boxes
from shardckpt.format.boxes import find_gap


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
def test_agrees_when_the_grid_is_taken_slab_by_slab(case):
    shape, tiles = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boxes, "_GRID_CELLS", 0)
        assert (find_gap(shape, *as_arrays(shape, tiles)) is None) == truly_tiles(shape, tiles)


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
