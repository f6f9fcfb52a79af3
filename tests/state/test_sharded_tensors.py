"""Tensors that describe which shards of a global tensor they hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

import shardckpt
from shardckpt import errors
from shardckpt.state.sharded_tensors import carry_layout, describes_itself, materialized, shards_of
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


def test_the_shards_are_those_that_the_attributes_describe():
    local = described(
        torch.arange(6.0).reshape(3, 2),
        global_offsets=((1, 0), (3, 0)),
        local_offsets=((0, 0), (2, 0)),
        local_sizes=((2, 2), (1, 2)),
    )
    shards = shards_of(local, name="w")
    assert (shards.shape, shards.dtype, shards.source) == ((4, 2), torch.float32, local)
    found = [(chunk.offsets, chunk.sizes, chunk.data.tolist()) for chunk in shards.chunks]
    assert found == [((1, 0), (2, 2), [[0, 1], [2, 3]]), ((3, 0), (1, 2), [[4, 5]])]
    shards.chunks[0].data.zero_()
    assert local[0].tolist() == [0, 0]


def test_shards_without_elements_are_left_out():
    local = described(torch.empty(0, 2), local_sizes=((0, 2),))
    assert shards_of(local, name="w").chunks == []


class OnMethods(torch.Tensor):
    """A local tensor that describes itself with the methods of DCP."""

    def __create_chunk_list__(self):
        return [ChunkStorageMetadata(torch.Size([2, 0]), torch.Size([2, 2]))]

    def __get_tensor_shard__(self, index):
        return self.as_subclass(torch.Tensor)[2:]


def test_the_shards_are_those_of_the_methods():
    tensor = torch.arange(8.0).reshape(4, 2).as_subclass(OnMethods)
    assert describes_itself(tensor)
    (chunk,) = shards_of(tensor, name="w").chunks
    assert (chunk.offsets, chunk.sizes) == ((2, 0), (2, 2))
    assert chunk.data.tolist() == [[4, 5], [6, 7]]


class Broken(OnMethods):
    def __create_chunk_list__(self):
        raise KeyError("layout")


def test_an_error_of_the_methods_of_a_tensor_names_the_tensor():
    with pytest.raises(errors.StateError, match="inconsistently") as caught:
        shards_of(torch.ones(4, 2).as_subclass(Broken), name="layer.w")
    assert caught.value.tensor == "layer.w"
    assert "KeyError" in caught.value.actual


def test_plain_tensors_do_not_describe_shards():
    assert not describes_itself(torch.ones(2))
    assert not describes_itself(nn.Parameter(torch.ones(2)))
    assert describes_itself(described(torch.ones(4, 2)))


def test_a_copy_carries_the_layout_of_its_source():
    source = described(torch.ones(4, 2))
    copied = carry_layout(source, source.clone())
    assert (copied.global_shape, copied.local_sizes) == ((4, 2), ((4, 2),))
    assert not hasattr(carry_layout(torch.ones(1), torch.ones(1)), "global_shape")


def test_a_tensor_on_meta_gets_memory_unless_its_shards_are_elsewhere():
    made = materialized(described(torch.ones(4, 2, device="meta")), "w")
    assert (made.device.type, made.global_shape) == ("cpu", (4, 2))
    with pytest.raises(errors.StateError, match="describes its own shards") as caught:
        materialized(torch.ones(4, 2, device="meta").as_subclass(OnMethods), "w")
    assert caught.value.tensor == "w"
