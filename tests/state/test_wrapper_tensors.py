"""Tensors that wrap others, that describe their shards, or that have no memory."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.two_tensor import TwoTensor

import shardckpt
from shardckpt import errors
from shardckpt.io.tensor_memory import owns_memory
from shardckpt.state.flatten import flatten
from tests.ranks import run_ranks


def test_wrappers_that_differ_are_mismatches(tmp_path):
    a, b = torch.ones(2), torch.full((2,), 5.0)
    shardckpt.save({"w": TwoTensor(a, b), "plain": a}, tmp_path / "c")
    state = shardckpt.load_state(tmp_path / "c")
    assert torch.equal(state["w"]["b"], b)
    target = TwoTensor(torch.zeros(3), torch.zeros(3))
    with pytest.raises(errors.LoadMismatchError, match="shape of w"):
        shardckpt.load({"w": target}, tmp_path / "c")
    with pytest.raises(errors.LoadMismatchError, match=r"plain.*TwoTensor"):
        shardckpt.load({"plain": TwoTensor(a.clone(), a.clone())}, tmp_path / "c")
    with pytest.raises(errors.LoadMismatchError, match="w"):
        shardckpt.load({"w": torch.zeros(2)}, tmp_path / "c")
    with pytest.raises(errors.LoadMismatchError, match=r"missing.*other"):
        shardckpt.load({"other": TwoTensor(a, b)}, tmp_path / "c")
    for odd in (3, None, {}, {"shape": 7, "class": [1]}):
        shardckpt.save({"w": {"a": a, "b": b, "@wrapper": odd}}, tmp_path / "odd", overwrite=True)
        with pytest.raises(errors.LoadMismatchError, match="w"):
            shardckpt.load({"w": TwoTensor(a, b)}, tmp_path / "odd")
    on_meta = TwoTensor(a.to("meta"), b.to("meta"))
    state = {"w": on_meta}
    shardckpt.load(state, tmp_path / "c")
    assert isinstance(state["w"], TwoTensor)
    assert torch.equal(state["w"].b, b)


class Rows(TwoTensor):
    checkpoint_rows = ("a", "b")


def test_a_class_that_lists_its_rows_is_not_asked_to_list_them():
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        mesh, empty = init_device_mesh("cpu", (2,)), Rows(torch.zeros(0, 3), torch.zeros(0, 3))
        shape = {"shape": torch.Size((1, 3)), "stride": (3, 1)}
        sharded = DTensor.from_local(empty, mesh, [Shard(0)], run_check=False, **shape)
        with pytest.raises(errors.UnsupportedLeafError, match="holds no rows") as caught:
            flatten({"w": sharded}, rank=1)
        assert "checkpoint_rows" not in caught.value.remedy
        sharded = DTensor.from_local(Rows(torch.zeros(2, 3), torch.zeros(2, 3)), mesh, [Shard(1)])
        with pytest.raises(errors.UnsupportedLeafError, match="placements") as caught:
            flatten({"w": sharded}, rank=1)
        assert "Shard(0)" in caught.value.remedy
    finally:
        dist.destroy_process_group()


def test_frozen_wrappers_are_frozen_inside():
    layer = nn.Module()
    layer.weight = nn.Parameter(TwoTensor(torch.ones(4), torch.ones(4)), requires_grad=False)
    layer.lora = nn.Parameter(torch.ones(2))
    kinds = flatten({"model": layer}, rank=0).file_groups
    assert set(kinds) == {"model.weight.a", "model.weight.b"}


@pytest.mark.parametrize("wrapper", [torch.vmap, torch.func.grad])
def test_tensors_inside_transforms_are_refused(wrapper, tmp_path):
    def save(x: torch.Tensor) -> torch.Tensor:
        assert not owns_memory(x)
        with pytest.raises(errors.UnsupportedLeafError, match="x"):
            shardckpt.save({"x": x}, tmp_path / "c")
        with pytest.raises(errors.UnsupportedLeafError, match="x"):
            shardckpt.async_save({"x": x}, tmp_path / "c").result(60)
        return x.sum()

    wrapper(save)(torch.ones(2, 3) if wrapper is torch.vmap else torch.ones(3))


def _loads_are_seen(folder: str, sharded: bool) -> None:
    def put(tensor: torch.Tensor) -> torch.Tensor:
        mesh = init_device_mesh("cpu", (1,))
        return distribute_tensor(tensor, mesh, [Shard(0)]) if sharded else tensor

    weight = nn.Parameter(put(torch.ones(3)))
    inference = torch.inference_mode()(lambda: torch.ones(2))()
    shardckpt.save({"w": weight, "i": inference, "pair": TwoTensor(weight, weight)}, folder)
    for target in (weight, weight.detach()):
        loss = (weight * weight).sum()
        shardckpt.load({"w": target, "i": inference}, folder)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    holder = nn.Module()
    holder.weight = weight
    loss = (weight * weight).sum()
    shardckpt.save({"m": holder}, f"{folder}-m")
    shardckpt.load({"m": holder}, f"{folder}-m")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("sharded", [False, True])
def test_autograd_sees_what_a_load_has_changed(sharded, tmp_path):
    run_ranks(1, _loads_are_seen, str(tmp_path / "c"), sharded)


def test_opaque_dtypes_are_never_converted(tmp_path):
    codes = torch.arange(4, dtype=torch.uint8)
    shardckpt.save({"w": codes.view(torch.uint4), "v": codes}, tmp_path / "c")
    for template in (
        {"w": torch.zeros(4)},
        {"v": torch.zeros(4, dtype=torch.uint8).view(torch.uint4)},
    ):
        with pytest.raises(errors.LoadMismatchError):
            shardckpt.load(template, tmp_path / "c", dtype="cast")
