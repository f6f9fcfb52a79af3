"""Parts of arrays that a program divides itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shardckpt.errors import StateError, UnsupportedLeafError
from shardckpt.state.sharded_array import ShardedArray, fits_tensor, from_numpy


def a_part(local, **changes):
    facts = {"global_shape": (6, 4), "offsets": (2, 0), **changes}
    return ShardedArray(local, **facts)


def test_a_part_shares_the_memory_of_its_array():
    grid = np.zeros((4, 4))
    part = a_part(grid[1:3]).check("grid")
    part.tensor.fill_(5)
    assert grid.sum() == 40
    assert (part.array_type, part.dtype, part.is_meta) == ("numpy", torch.float64, False)
    tensor = a_part(torch.zeros(2, 4)).check("grid")
    assert (tensor.array_type, tensor.tensor.data_ptr()) == ("tensor", tensor.local.data_ptr())
    assert repr(part) == "ShardedArray([2, 4] at [2, 0] of [6, 4])"


@pytest.mark.parametrize(
    "changes",
    [
        {"offsets": (5, 0)},
        {"offsets": (-1, 0)},
        {"offsets": (2,)},
        {"global_shape": (6,)},
        {"offsets": (2.0, 0)},
        {"global_shape": (6, 3)},
    ],
)
def test_a_part_outside_its_global_array_is_refused_by_name(changes):
    with pytest.raises(StateError, match="does not lie inside") as caught:
        a_part(np.zeros((2, 4)), **changes).check("grid")
    assert caught.value.tensor == "grid"


@pytest.mark.parametrize("local", [[1, 2], torch.eye(2).to_sparse().values, "text"])
def test_another_type_than_an_array_or_a_tensor_is_refused(local):
    with pytest.raises(UnsupportedLeafError, match="local part"):
        a_part(local).check("grid")


def test_numbers_of_numpy_are_accepted_as_offsets():
    part = a_part(np.zeros((2, 4)), offsets=np.array([2, 0])).check("grid")
    assert part.offsets == (2, 0)
    assert all(type(number) is int for number in (*part.offsets, *part.shape))


def test_a_copy_has_its_own_data():
    for local in (np.zeros((2, 4)), torch.zeros(2, 4)):
        part = a_part(local)
        copied = part.copy()
        local += 1
        assert float(copied.local.sum()) == 0
        assert (copied.shape, copied.offsets) == (part.shape, part.offsets)


def test_a_read_only_array_can_be_saved_but_not_loaded_into():
    local = np.zeros((2, 4))
    local.flags.writeable = False
    part = a_part(local).check("grid")
    with pytest.raises(StateError, match="can't be written to") as caught:
        part.check_writeable("grid")
    assert caught.value.tensor == "grid"
    a_part(np.zeros((2, 4))).check_writeable("grid")


@pytest.mark.parametrize("order", ["<", ">"])
def test_loaded_data_reach_an_array_of_any_byte_order(order):
    part = a_part(np.zeros((2, 4), dtype=f"{order}f8")).check("grid")
    part.tensor.copy_(torch.arange(8.0).reshape(2, 4))
    part.loaded()
    assert part.local.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("dtype", "fits"),
    [("f4", True), (">i8", True), ("?", True), ("c8", True), ("U3", False), ("M8[s]", False)],
)
def test_only_numbers_are_tensors(dtype, fits):
    assert fits_tensor(np.dtype(dtype)) == fits


def test_arrays_that_would_lose_something_are_refused():
    with pytest.raises(UnsupportedLeafError, match="mask"):
        from_numpy(np.ma.masked_array([1, 2], [True, False]), name="a")
    with pytest.raises(UnsupportedLeafError, match="dtype") as caught:
        from_numpy(np.zeros(2, dtype=np.longdouble), name="a")
    assert caught.value.tensor == "a"


def test_the_field_of_a_structured_array_is_copied():
    records = np.array([(1, 2.5), (2, 3.5)], dtype=[("a", "i1"), ("b", "f8")])
    assert from_numpy(records["b"], name="a").tolist() == [2.5, 3.5]
