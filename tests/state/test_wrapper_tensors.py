"""Tensors that wrap others, that say how they are sharded, or that have no memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.testing._internal.two_tensor import TwoTensor

import shardckpt
from shardckpt import errors
from shardckpt.format.entries import TensorEntry
from shardckpt.io.buffers import contiguous_parts
from shardckpt.io.tensor_memory import owns_memory
from shardckpt.plan.local_plan import local_plan
from shardckpt.plan.read_plan import plan_reads
from shardckpt.saving.staging import StagingBuffer, stage, staged_bytes
from shardckpt.state.flatten import flatten
from shardckpt.state.local_chunks import LocalChunk
from tests.ranks import run_ranks


def described(local: torch.Tensor, **facts) -> torch.Tensor:
    layout = {
        "global_shape": (4, 2),
        "global_offsets": ((0, 0),),
        "local_offsets": ((0, 0),),
        "local_sizes": ((4, 2),),
    }
    for name, value in {**layout, **facts}.items():
        if value is not None:
            setattr(local, name, value)
    return local


UNCLEAR = {
    "one attribute of four": {"local_sizes": None},
    "lists of several lengths": {"local_sizes": ((4, 2), (4, 2))},
    "beyond the local tensor": {"local_offsets": ((1, 0),)},
    "beyond the global shape": {"global_offsets": ((1, 0),)},
    "negative": {"local_offsets": ((-1, 0),)},
    "of other dimensions": {"global_shape": (8,)},
    "no numbers": {"global_offsets": (("a", "b"),)},
    "no lists": {"global_offsets": 3},
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_layouts_that_do_not_fit_are_refused_by_name(name, tmp_path):
    shardckpt.save({"w": torch.ones(4, 2)}, tmp_path / "plain")
    tensor = described(torch.zeros(4, 2), **UNCLEAR[name])
    for action in (
        lambda: shardckpt.save({"w": tensor}, tmp_path / "c"),
        lambda: shardckpt.async_save({"w": tensor}, tmp_path / "c").result(60),
        lambda: shardckpt.load({"w": tensor}, tmp_path / "plain"),
    ):
        with pytest.raises(errors.StateError) as caught:
            action()
        assert caught.value.tensor == "w"
        assert not tensor.any()


def test_overlapping_shards_are_refused(tmp_path):
    half = {"local_sizes": ((2, 2),) * 2, "local_offsets": ((0, 0), (2, 0))}
    tensor = described(torch.ones(4, 2), global_offsets=((0, 0), (1, 0)), **half)
    with pytest.raises(errors.CoverageError, match="w"):
        shardckpt.save({"w": tensor}, tmp_path / "c")


class Halves(nn.Module):
    """A module whose parameter holds rows of a larger one."""

    def __init__(self, rows: slice, value: float) -> None:
        super().__init__()
        whole = torch.arange(8.0).reshape(4, 2) * value
        self.w = nn.Parameter(whole[rows].clone())
        size = (rows.stop - rows.start, 2)
        offsets = ((rows.start, 0),)
        described(self.w, global_offsets=offsets, local_sizes=(size,))


def _module_in_halves(folder: str) -> None:
    rank = torch.distributed.get_rank()
    rows = slice(2 * rank, 2 * rank + 2)
    for number, save in enumerate(
        (shardckpt.save, lambda state, path: shardckpt.async_save(state, path).result(60))
    ):
        model = Halves(rows, 1.0)
        optimizer = torch.optim.AdamW(model.parameters())
        (model.w * torch.arange(1.0, 5.0).reshape(2, 2)).sum().backward()
        optimizer.step()
        save({"model": model, "optimizer": optimizer}, f"{folder}/{number}")
        whole = shardckpt.load_state(f"{folder}/{number}")
        assert torch.equal(whole["model"]["w"][rows], model.w.detach())
        moments = whole["optimizer"]["state"]["w"]["exp_avg"]
        assert torch.equal(moments[rows], optimizer.state[model.w]["exp_avg"])
        other = Halves(rows, 0.0)
        fresh = torch.optim.AdamW(other.parameters())
        shardckpt.load({"model": other, "optimizer": fresh}, f"{folder}/{number}")
        assert torch.equal(other.w, model.w)
        assert torch.equal(fresh.state[other.w]["exp_avg"], moments[rows])


def test_a_module_and_its_optimizer_in_halves(tmp_path):
    run_ranks(2, _module_in_halves, str(tmp_path))


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


def test_memory_that_is_freed_after_planning_is_not_touched():
    tensor = torch.ones(1 << 18)
    part = tensor[:4]
    plan = local_plan(flatten({"w": tensor}, rank=0), world_size=1)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(errors.UnsupportedLeafError, match="w"):
        stage(plan, StagingBuffer(staged_bytes(plan), pinned=False), {})
    with pytest.raises(errors.UnsupportedLeafError):
        list(contiguous_parts(tensor))
    entry = TensorEntry(dtype="F32", shape=(4,), chunks=np.array([[0, 0, 16, 0, 4]]))
    with pytest.raises(errors.UnsupportedLeafError):
        plan_reads([(entry, LocalChunk((0,), (4,), part))])


def test_frozen_wrappers_are_frozen_inside():
    layer = nn.Module()
    layer.weight = nn.Parameter(TwoTensor(torch.ones(4), torch.ones(4)), requires_grad=False)
    layer.lora = nn.Parameter(torch.ones(2))
    kinds = flatten({"model": layer}, rank=0).kinds
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


def test_a_conjugate_beside_its_base_is_staged_as_itself(tmp_path):
    base = torch.complex(torch.ones(2), torch.ones(2))
    state = {"base": base, "conjugate": base.conj(), "negative": base.conj().imag}
    shardckpt.async_save(state, tmp_path / "c").result(60)
    found = shardckpt.load_state(tmp_path / "c")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


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
