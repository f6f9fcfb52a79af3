"""The states of ranks become one state: tensors of several ranks, and values that differ."""

from __future__ import annotations

import pytest
import torch

from shardckpt import PerRank, errors
from shardckpt.convert.dtensor_layout import Placement, Sharding
from shardckpt.convert.rank_states import RankStates
from shardckpt.convert.torch_objects import ObjectsLoader
from shardckpt.convert.torch_structure import LocalTensor
from shardckpt.state.local_chunks import box_slices


def local(data, sharding=None, checksum=None):
    """Return the tensor of a rank."""
    tensor = torch.tensor(data)

    def read(offsets, sizes):
        return tensor[box_slices((0,) * tensor.dim(), offsets, sizes)]

    shape = tuple(tensor.shape)
    return LocalTensor(tensor.dtype, shape, read, id(tensor), checksum, sharding)


def rows(count, placement):
    """Return the sharding of a tensor of rows on two ranks."""
    return Sharding((count,), (2,), (0, 1), (placement,), (0,)).check()


def missing(name, rank):
    """Return the error for a rank without its part."""
    return errors.CorruptionError("The file of a rank lacks its part", tensor=name, rank=rank)


def merged(*states):
    """Merge the states of all ranks. Returns the state, and the RankStates."""
    ranks = RankStates("path", len(states), missing)
    by_rank = {rank: (state, ObjectsLoader()) for rank, state in enumerate(states)}
    return ranks.merged("item", by_rank), ranks


def full(state, ranks, name):
    """Read a tensor of a merged state."""
    tensor = state[name]
    return ranks.reads[id(tensor)]((0,) * tensor.dim(), tuple(tensor.shape)).tolist()


def test_equal_values_stay_and_others_become_per_rank():
    state, ranks = merged({"step": 7, "seed": 1}, {"step": 7, "seed": 2})
    assert state["step"] == 7
    assert isinstance(state["seed"], PerRank)
    assert ranks.per_rank() == [{"item.seed": 1}, {"item.seed": 2}]


def test_the_parts_of_a_tensor_become_one_tensor():
    state, ranks = merged(
        {"w": local([0, 1], rows(3, Placement(0)))}, {"w": local([2], rows(3, Placement(0)))}
    )
    assert full(state, ranks, "w") == [0, 1, 2]


def test_a_replica_with_other_bytes_is_listed():
    replicated = rows(2, Placement())
    state, ranks = merged(
        {"w": local([1, 2], replicated, checksum=1)}, {"w": local([3, 4], replicated, checksum=2)}
    )
    assert full(state, ranks, "w") == [1, 2]
    assert ranks.left_out == {"item.w of rank 1": "a replica with other bytes"}


def test_plain_tensors_that_differ_become_per_rank():
    state, _ = merged({"noise": local([1])}, {"noise": local([2])})
    assert isinstance(state["noise"], PerRank)


def test_a_buffer_that_differs_beside_a_shared_tensor_is_that_of_the_first_rank():
    state, ranks = merged(
        {"w": local([5], checksum=5), "mean": local([1])},
        {"w": local([5], checksum=5), "mean": local([2])},
    )
    assert full(state, ranks, "mean") == [1]
    assert ranks.left_out == {"item.mean of rank 1": "a tensor that differs by rank"}


def test_a_part_that_no_rank_has_is_an_error():
    with pytest.raises(errors.CorruptionError) as caught:
        merged({"w": local([0, 1], rows(3, Placement(0)))}, {})
    assert (caught.value.tensor, caught.value.rank) == ("item.w", 1)


def test_a_local_part_of_another_size_is_an_error():
    with pytest.raises(errors.CorruptionError, match="placements"):
        merged({"w": local([0], rows(3, Placement(0)))}, {"w": local([2], rows(3, Placement(0)))})
