"""The boxes that ranks hold of a DTensor, compared with the indices that DTensor's rules give."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from shardckpt.convert.dtensor_layout import Placement, Sharding


def chunks(indices: list[int], parts: int) -> list[list[int]]:
    """Divide indices as torch.chunk does, with empty parts at the end."""
    step = max(1, -(-len(indices) // parts))
    return [indices[part * step : (part + 1) * step] for part in range(parts)]


def held(size: int, steps: list[tuple[int, int, int]]) -> list[int]:
    """Return the indices of a rank, one by one."""
    indices = list(range(size))
    for parts, part, factor in steps:
        each = [chunks(piece, parts)[part] for piece in chunks(indices, factor or 1)]
        indices = list(itertools.chain(*each))
    return indices


@pytest.mark.parametrize("seed", range(20))
def test_boxes_are_the_indices_that_the_placements_give(seed):
    rng = random.Random(seed)
    mesh = tuple(rng.choice([1, 2, 3, 4]) for _ in range(rng.choice([1, 2, 3])))
    shape = tuple(rng.randrange(1, 20) for _ in range(rng.choice([1, 2])))
    placements = tuple(
        Placement(rng.choice([None, *range(len(shape))]), rng.choice([0, 0, 2, 3])) for _ in mesh
    )
    ranks = rng.sample(range(100), math.prod(mesh))
    order = tuple(rng.sample(range(len(mesh)), len(mesh)))
    sharding = Sharding(shape, mesh, tuple(ranks), placements, order).check()
    for right_to_left in (False, True):
        coordinates = itertools.product(*map(range, mesh))
        for rank, coordinate in zip(ranks, coordinates, strict=True):
            plain = [d for d in order if not (right_to_left and placements[d].split_factor)]
            strided = [d for d in order if d not in plain]
            expected = [
                held(
                    size,
                    [
                        (mesh[d], coordinate[d], 0 if right_to_left else placements[d].split_factor)
                        for d in plain + strided[::-1]
                        if placements[d].dim == dim
                    ],
                )
                for dim, size in enumerate(shape)
            ]
            local, boxes = sharding.local(rank, right_to_left=right_to_left)
            assert local == tuple(map(len, expected))
            found = {}
            for box in boxes:
                for at in itertools.product(*map(range, box.sizes)):
                    place = tuple(b + a for b, a in zip(box.local_offsets, at, strict=True))
                    found[place] = tuple(o + a for o, a in zip(box.offsets, at, strict=True))
            assert found == {
                place: tuple(e[p] for e, p in zip(expected, place, strict=True))
                for place in itertools.product(*map(range, local))
            }


def test_a_tensor_without_dimensions_is_one_box():
    sharding = Sharding((), (2,), (0, 1), (Placement(),), (0,)).check()
    assert sharding.local(1) == ((), [((), (), ())])


@pytest.mark.parametrize(
    "change",
    [
        {"mesh": (3,)},
        {"ranks": (0, 0)},
        {"ranks": (0, -1)},
        {"placements": (Placement(2),)},
        {"placements": (Placement(-1),)},
        {"placements": (Placement(0), Placement(0))},
        {"placements": (Placement(0, 1 << 40),)},
        {"order": (1,)},
        {"shape": (-1, 3)},
        {"shape": (1 << 63, 3)},
    ],
)
def test_numbers_that_do_not_fit_are_refused(change):
    sharding = Sharding((4, 3), (2,), (0, 1), (Placement(0),), (0,))
    sharding.check()
    with pytest.raises(ValueError, match="a mesh of"):
        sharding._replace(**change).check()


def test_a_tensor_in_too_many_boxes_is_refused_at_once():
    strided = Placement(0, 1 << 16), Placement(1, 1 << 16)
    sharding = Sharding((1 << 40, 1 << 40), (2, 2), (0, 1, 2, 3), strided, (0, 1))
    with pytest.raises(ValueError, match="more than"):
        sharding.check().local(0)
