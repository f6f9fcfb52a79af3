"""The boxes of global tensors that a rank holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parameter import UninitializedParameter
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.two_tensor import TwoTensor

from shardckpt.errors import PartialPlacementError, StateError, UnsupportedLeafError
from shardckpt.state.local_chunks import (
    addressed_chunk,
    box_slices,
    check_dense,
    has_file_layout,
    local_chunks,
    local_layout,
    local_tensor,
    may_have_replicas,
    shared_box,
)
from shardckpt.state.sharded_array import ShardedArray
from shardckpt.torch_compat import spec_of


@pytest.fixture
def rank_of_four():
    """A function that makes this process a rank of four, whose messages go nowhere."""

    def become(rank):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())

    yield become
    dist.destroy_process_group()


def a_dtensor(local, mesh, placements, shape):
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def boxes(tensor):
    return [(chunk.offsets, chunk.sizes) for chunk in local_chunks(tensor, name="w")]


@pytest.mark.parametrize("shape", [(), (3, 2), (0, 2)])
def test_a_plain_tensor_is_one_box_even_without_elements(shape):
    tensor = torch.zeros(shape)
    (chunk,) = local_chunks(tensor, name="w")
    assert (chunk.offsets, chunk.sizes) == ((0,) * len(shape), shape)
    assert chunk.data is tensor


def test_each_rank_holds_its_rows_and_the_last_rank_may_hold_none(rank_of_four):
    expected = {0: ((0, 0), (2, 3)), 2: ((4, 0), (1, 3)), 3: None}
    for rank, box in expected.items():
        rank_of_four(rank)
        mesh = init_device_mesh("cpu", (4,))
        rows = box[1][0] if box else 0
        tensor = a_dtensor(torch.zeros(rows, 3), mesh, [Shard(0)], (5, 3))
        assert boxes(tensor) == ([box] if box else [])
        assert not may_have_replicas(tensor, world_size=4)


def test_a_process_that_returns_as_another_rank_gets_the_boxes_of_that_rank(rank_of_four):
    found = []
    for rank in (1, 2):
        rank_of_four(rank)
        mesh = init_device_mesh("cpu", (4,))
        found += boxes(a_dtensor(torch.zeros(2), mesh, [Shard(0)], (8,)))
    assert found == [((2,), (2,)), ((4,), (2,))]


def test_a_mesh_of_two_dimensions_replicates_and_shards(rank_of_four):
    rank_of_four(3)
    mesh = init_device_mesh("cpu", (2, 2))
    tensor = a_dtensor(torch.zeros(4, 3), mesh, [Replicate(), Shard(1)], (4, 6))
    assert boxes(tensor) == local_layout(tensor) == [((0, 3), (4, 3))]
    assert may_have_replicas(tensor, world_size=4)
    both = a_dtensor(torch.zeros(2, 3), mesh, [Shard(0), Shard(1)], (4, 6))
    assert boxes(both) == [((2, 3), (2, 3))]
    assert not may_have_replicas(both, world_size=4)
    assert may_have_replicas(both, world_size=8)  # another mesh may hold the same boxes


def test_one_dimension_that_two_mesh_dimensions_shard_is_cut_in_turn(rank_of_four):
    rank_of_four(2)
    mesh = init_device_mesh("cpu", (2, 2))
    tensor = a_dtensor(torch.zeros(2), mesh, [Shard(0), Shard(0)], (7,))
    assert boxes(tensor) == [((4,), (2,))]


def test_the_flat_view_of_columns_is_a_run_of_each_row(rank_of_four):
    rank_of_four(1)
    mesh = init_device_mesh("cpu", (4,))
    columns = [_StridedShard(0, split_factor=3)]  # a view of Shard(1) of 3 rows
    flat = a_dtensor(torch.arange(6), mesh, columns, (24,))
    assert boxes(flat) == [((2,), (2,)), ((10,), (2,)), ((18,), (2,))]
    data = [chunk.data.tolist() for chunk in local_chunks(flat, name="w")]
    assert data == [[0, 1], [2, 3], [4, 5]]


def test_the_mesh_dimensions_divide_a_tensor_in_the_order_of_its_spec(rank_of_four):
    rank_of_four(2)
    mesh = init_device_mesh("cpu", (2, 2))
    tensor = a_dtensor(torch.zeros(2), mesh, [Shard(0), Shard(0)], (7,))
    spec = spec_of(tensor)
    if getattr(spec, "shard_order", None) is None:
        pytest.skip("torch has no other order than that of the mesh")
    (first,) = spec.shard_order
    spec.shard_order = (first._replace(mesh_dims=(1, 0)),)
    assert boxes(tensor) == [((2,), (2,))]
    assert boxes(a_dtensor(torch.zeros(2), mesh, [Shard(0), Shard(0)], (7,))) == [((4,), (2,))]


def test_a_rank_outside_the_mesh_holds_nothing(rank_of_four):
    rank_of_four(3)
    mesh = dist.device_mesh.DeviceMesh("cpu", [0, 1])
    tensor = a_dtensor(torch.zeros(0), mesh, [Shard(0)], (4,))
    assert boxes(tensor) == local_layout(tensor) == []


def test_partial_sums_are_refused_by_name(rank_of_four):
    rank_of_four(0)
    tensor = a_dtensor(torch.zeros(4), init_device_mesh("cpu", (4,)), [Partial()], (4,))
    with pytest.raises(PartialPlacementError) as caught:
        local_chunks(tensor, name="layer.w")
    assert caught.value.tensor == "layer.w"


@pytest.mark.parametrize("local", [torch.zeros(1, 3), torch.zeros(3, 3), torch.zeros(3, 2)])
def test_a_local_part_of_another_size_than_its_box_is_refused_by_name(rank_of_four, local):
    """DTensor.from_local does not check sizes. Reads would otherwise write past the memory."""
    rank_of_four(1)
    tensor = a_dtensor(local, init_device_mesh("cpu", (4,)), [Shard(0)], (8, 3))
    assert addressed_chunk(tensor, tuple(tensor.shape)) is None
    with pytest.raises(StateError, match="size") as raised:
        local_chunks(tensor, name="layer.weight")
    assert raised.value.tensor == "layer.weight"
    assert "[2, 3]" in str(raised.value)


def test_a_tensor_in_one_run_of_memory_is_one_box_with_its_address(rank_of_four):
    rank_of_four(1)
    mesh, local = init_device_mesh("cpu", (4,)), torch.zeros(2, 3)
    chunk = addressed_chunk(a_dtensor(local, mesh, [Shard(0)], (8, 3)), (8, 3))
    assert (chunk.offsets, chunk.sizes, chunk.address) == ((2, 0), (2, 3), local.data_ptr())
    plain = addressed_chunk(local, (2, 3))
    assert addressed_chunk(local, (3, 2)) is None
    assert (plain.offsets, plain.sizes, plain.address) == ((0, 0), (2, 3), local.data_ptr())
    others = [
        local.T,
        local[:0],
        local.to("meta"),
        a_dtensor(local, mesh, [Partial()], (2, 3)),
        a_dtensor(local.T, mesh, [Shard(0)], (12, 2)),
        TwoTensor(local, local),
    ]
    assert [addressed_chunk(tensor, tuple(tensor.shape)) for tensor in others] == [None] * len(
        others
    )


def test_the_local_part_of_a_dtensor_is_its_data(rank_of_four):
    rank_of_four(1)
    local = torch.arange(4.0)
    tensor = a_dtensor(local, init_device_mesh("cpu", (4,)), [Shard(0)], (16,))
    assert local_tensor(tensor).data_ptr() == local.data_ptr()
    (chunk,) = local_chunks(tensor, name="w")
    assert chunk.data.data_ptr() == local.data_ptr()


def test_a_part_of_an_array_is_its_box_and_has_no_replicas():
    part = ShardedArray(np.zeros((2, 3)), global_shape=(9, 3), offsets=(4, 0)).check("a")
    assert boxes(part) == [((4, 0), (2, 3))]
    assert not may_have_replicas(part, world_size=4)
    assert may_have_replicas(torch.zeros(2), world_size=4)
    empty = ShardedArray(np.zeros((0, 3)), global_shape=(9, 3), offsets=(9, 0)).check("a")
    assert boxes(empty) == []


def test_opaque_dtypes_are_copied_as_bytes():
    (chunk,) = local_chunks(torch.zeros(3, dtype=torch.uint8).view(torch.uint4), name="w")
    assert chunk.data.dtype == torch.uint8


@pytest.mark.parametrize(
    ("tensor", "dtype", "expected"),
    [
        (torch.zeros(2, 3), "F32", True),
        (torch.zeros(2, 3), "F64", False),
        (torch.zeros(3, 2).t(), "F32", False),
        (torch.zeros(2, device="meta"), "F32", False),
        (torch.zeros(2, dtype=torch.complex64).conj(), "C64", False),
        (torch.zeros(2, dtype=torch.complex64).conj().imag.clone(), "F32", True),
    ],
)
def test_only_dense_rows_of_the_saved_dtype_lie_as_saved(tensor, dtype, expected):
    assert has_file_layout(tensor, dtype) == expected


def test_a_box_is_cut_out_relative_to_the_box_around_it():
    tensor = torch.arange(12).reshape(3, 4)
    cut = tensor[box_slices((10, 20), (11, 21), (2, 3))]
    assert cut.tolist() == [[5, 6, 7], [9, 10, 11]]
    assert box_slices((), (), ()) == ()


REFUSED = {
    "sparse": lambda: torch.eye(2).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "lazy": UninitializedParameter,
    "a wrapper": lambda: TwoTensor(torch.ones(2), torch.ones(2)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_a_tensor_that_is_not_dense_is_refused_by_name(name):
    with pytest.raises(UnsupportedLeafError) as caught:
        check_dense(REFUSED[name](), name="layer.w")
    assert caught.value.tensor == "layer.w"
    assert caught.value.remedy


def test_dense_tensors_and_tensors_on_meta_are_accepted():
    for tensor in (torch.ones(2), torch.ones(2, device="meta"), torch.ones(4)[::2]):
        check_dense(tensor, name="w")


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        (((0, 0), (4, 4)), ((2, 1), (4, 2)), ((2, 1), (2, 2))),
        (((2, 1), (4, 2)), ((0, 0), (4, 4)), ((2, 1), (2, 2))),
        (((0, 0), (2, 4)), ((2, 0), (2, 4)), None),
        (((0, 0), (0, 4)), ((0, 0), (2, 4)), None),
        (((), ()), ((), ()), ((), ())),
    ],
)
def test_two_boxes_share_a_box_or_nothing(one, other, shared):
    assert shared_box(*one, *other) == shared
