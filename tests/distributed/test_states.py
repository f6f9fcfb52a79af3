"""States that only several ranks can have, and entries that differ between ranks."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import shardckpt
from shardckpt import PerRank, errors
from shardckpt.storage.local import LocalStorage
from tests.ranks import on_world_sizes, run_ranks

pytestmark = pytest.mark.ranks


def sharded(tensor, mesh, *placements):
    return distribute_tensor(tensor, mesh, list(placements), src_data_rank=None)


def odd_layouts(world_size: int, folder: str) -> None:
    """Save layouts of every kind on the first world size, load them on the others."""
    mesh = init_device_mesh("cpu", (world_size,))
    tensors = {
        "uneven": (torch.arange(35.0).reshape(7, 5), Shard(0)),
        "empty on some ranks": (torch.arange(4.0).reshape(2, 2), Shard(0)),
        "other dim": (torch.arange(30.0).reshape(2, 3, 5), Shard(2)),
        "replicated": (torch.arange(6.0), Replicate()),
        "scalar": (torch.tensor(3.0), Replicate()),
        "no elements": (torch.empty(0, 4), Shard(0)),
    }
    saving = world_size == 4
    state = {
        name: sharded(tensor if saving else torch.full_like(tensor, -1), mesh, placement)
        for name, (tensor, placement) in tensors.items()
    }
    if saving:
        shardckpt.save(state, f"{folder}/c")
        return
    shardckpt.load(state, f"{folder}/c")
    for name, (tensor, _) in tensors.items():
        assert torch.equal(state[name].full_tensor(), tensor), name


def test_uneven_and_empty_shards(tmp_path):
    run_ranks(4, on_world_sizes, (4, 3, 2, 1), odd_layouts, str(tmp_path))
    whole = shardckpt.load_state(tmp_path / "c")
    assert torch.equal(whole["uneven"], torch.arange(35.0).reshape(7, 5))
    assert whole["no elements"].shape == (0, 4)


def sharded_tensors(folder: str) -> None:
    rank = dist.get_rank()
    spec = ChunkShardingSpec(dim=0, placements=[f"rank:{r}/cpu" for r in range(3)])
    tensor = sharded_tensor.zeros(spec, 8, 3)
    for shard in tensor.local_shards():
        first = shard.metadata.shard_offsets[0]
        shard.tensor.copy_(torch.arange(24.0).reshape(8, 3)[first : first + len(shard.tensor)])
    shardckpt.save({"t": tensor}, f"{folder}/c")
    again = sharded_tensor.zeros(spec, 8, 3)
    shardckpt.load({"t": again}, f"{folder}/c")
    for mine, theirs in zip(tensor.local_shards(), again.local_shards(), strict=True):
        assert torch.equal(mine.tensor, theirs.tensor)
    mesh = init_device_mesh("cpu", (3,))
    other = sharded(torch.zeros(8, 3), mesh, Shard(1))
    shardckpt.load({"t": other}, f"{folder}/c")
    assert torch.equal(other.to_local()[:, 0], torch.arange(24.0).reshape(8, 3)[:, rank])


def test_sharded_tensors_with_several_shards_are_saved(tmp_path):
    run_ranks(3, sharded_tensors, str(tmp_path))
    whole = shardckpt.load_state(tmp_path / "c")["t"]
    assert torch.equal(whole, torch.arange(24.0).reshape(8, 3))


def meshes_of_some_ranks(folder: str) -> None:
    """Tensors that live on a part of the ranks: each rank saves what it holds."""
    rank = dist.get_rank()
    halves = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]
    state = {
        f"half{index}": DTensor.from_local(
            torch.full((2,), float(rank)), mesh, [Shard(0)], run_check=False
        )
        for index, mesh in enumerate(halves)
    }
    shardckpt.save(state, f"{folder}/c")
    for tensor in state.values():
        tensor.to_local().zero_()
    shardckpt.load(state, f"{folder}/c")
    mine = state[f"half{rank // 2}"].to_local()
    assert mine.tolist() == [rank, rank]


def test_meshes_of_some_ranks(tmp_path):
    run_ranks(4, meshes_of_some_ranks, str(tmp_path))
    whole = shardckpt.load_state(tmp_path / "c")
    assert whole["half0"].tolist() == [0, 0, 1, 1]
    assert whole["half1"].tolist() == [2, 2, 3, 3]


def per_rank(world_size: int, folder: str) -> None:
    rank = dist.get_rank()

    def state(value):
        return {
            "keep": PerRank(value),
            "wrap": PerRank({"t": torch.tensor([float(value)])}, on_resize="wrap"),
            "mine": PerRank([value], on_resize=lambda saved: [sum(part[0] for part in saved)]),
        }

    if world_size == 4:
        shardckpt.save(state(rank + 10), f"{folder}/c")
        same = state(-1)
        shardckpt.load(same, f"{folder}/c")
        assert same["keep"].value == rank + 10
        assert same["wrap"].value["t"].item() == rank + 10
        assert same["mine"].value == [rank + 10]
        return
    other = state(-1)
    report = shardckpt.load(other, f"{folder}/c")
    assert report.kept == ("keep",)
    assert other["keep"].value == -1
    assert other["wrap"].value["t"].item() == rank % 4 + 10
    assert other["mine"].value == [10 + 11 + 12 + 13]
    with pytest.raises(errors.StateError):
        shardckpt.load({"keep": PerRank(0, on_resize="error")}, f"{folder}/c")


def test_per_rank_on_other_numbers_of_ranks(tmp_path):
    run_ranks(4, on_world_sizes, (4, 2, 3, 1), per_rank, str(tmp_path))
    assert shardckpt.load_state(tmp_path / "c")["keep"] == [10, 11, 12, 13]


def partial(folder: str) -> tuple[str, str | None]:
    mesh = init_device_mesh("cpu", (2,))
    tensor = DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False)
    try:
        shardckpt.save({"a": {"b": tensor}}, f"{folder}/c")
    except errors.ShardckptError as error:
        return type(error).__name__, error.tensor
    return "saved", None


def test_partial_sums_are_refused(tmp_path):
    assert run_ranks(2, partial, str(tmp_path)) == [("PartialPlacementError", "a.b")] * 2
    assert os.listdir(tmp_path) == []


def a_third(folder: str) -> int:
    mesh = init_device_mesh("cpu", (3,))
    state = {"t": sharded(torch.zeros(3072, 1024), mesh, Shard(0))}
    report = shardckpt.load(state, f"{folder}/c")
    rank = dist.get_rank()
    expected = torch.arange(3072 * 1024, dtype=torch.float32).reshape(3, 1024, 1024)[rank]
    assert torch.equal(state["t"].to_local(), expected)
    return report.bytes_read


def test_a_rank_that_needs_a_third_reads_a_third(tmp_path):
    tensor = torch.arange(3072 * 1024, dtype=torch.float32).reshape(3072, 1024)
    shardckpt.save({"t": tensor}, tmp_path / "c")
    for read in run_ranks(3, a_third, str(tmp_path)):
        assert 4 << 20 <= read <= 5 << 20  # 4 MiB, and the block that the header shifts it into


def replicas(folder: str) -> tuple[int, ...]:
    report = shardckpt.save({"t": torch.ones(4096, 1024), "small": torch.ones(5)}, f"{folder}/c")
    return report.bytes_by_rank


def test_replicas_are_divided_among_ranks(tmp_path):
    sizes = run_ranks(4, replicas, str(tmp_path))[0]
    assert sum(sizes) < (16 << 20) + 4 * 4096 + 100
    assert max(sizes) - min(sizes) <= 8192


class Elsewhere(LocalStorage):
    """A rank whose path is a directory of its own."""

    def join(self, path, *, token):
        return super().join(f"{path}-of-this-node", token=token)

    def open(self, path):
        return super().open(f"{path}-of-this-node")


def not_shared(folder: str) -> list[tuple[str, object]]:
    found = []
    storage = Elsewhere() if dist.get_rank() in (1, 2) else None
    shardckpt_calls = (
        lambda: shardckpt.save({"t": torch.ones(3)}, f"{folder}/c", storage=storage),
        lambda: shardckpt.load({"t": torch.ones(3)}, f"{folder}/old", storage=storage),
    )
    for call in shardckpt_calls:
        try:
            call()
        except errors.ShardckptError as error:
            found.append((type(error).__name__, error.rank))
    return found


def test_a_directory_that_is_not_shared(tmp_path):
    shardckpt.save({"t": torch.zeros(3)}, tmp_path / "old")
    shardckpt.save({"t": torch.zeros(3)}, tmp_path / "old-of-this-node")
    expected = [("DirectoryNotSharedError", (1, 2))] * 2
    assert run_ranks(3, not_shared, str(tmp_path)) == [expected] * 3
    assert not (tmp_path / "c").exists()


def asynchronous(folder: str) -> None:
    rank = dist.get_rank()
    handles = []
    for number in range(3):
        state = {"t": torch.full((4,), float(number)), "mine": PerRank(rank + number)}
        handles.append(shardckpt.async_save(state, f"{folder}/{number}"))
        handles[-1].wait_staged()
        state["t"].zero_()
        dist.all_reduce(torch.ones(1))  # training goes on with its own group
    for number, handle in enumerate(handles):
        assert handle.result(30).world_size == 2, number


def test_saves_in_the_background_on_several_ranks(tmp_path):
    run_ranks(2, asynchronous, str(tmp_path))
    for number in range(3):
        state = shardckpt.load_state(tmp_path / str(number))
        assert state["t"].tolist() == [number] * 4
        assert state["mine"] == [number, number + 1]
