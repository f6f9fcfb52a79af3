"""Blocks that several ranks need are read once, and sent. Each rank acts as on its own machine."""

from __future__ import annotations

import errno
import os
import platform
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import shardckpt
from shardckpt import LocalStorage, errors
from shardckpt.storage.posix import System
from tests.ranks import run_ranks, start_ranks

pytestmark = pytest.mark.ranks
ROWS, COLUMNS = 5000, 1024  # 20.5 MB


class Counting(System):
    """Counts the bytes that this process reads from shards, and can fail."""

    read_bytes = 0
    fail_after: float = float("inf")
    shrinks = False  # whether this process alone sees shards of another size

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def fstat(self, fd):
        found = super().fstat(fd)
        shorter = self.shrinks and found.st_size > 1 << 20
        return os.stat_result([*found[:6], found[6] - 1, *found[7:]]) if shorter else found

    def read(self, fd, buffers, *, offset, wait=True):
        if self.read_bytes > self.fail_after:
            raise OSError(errno.EIO, "the disk failed")
        count = super().read(fd, buffers, offset=offset, wait=wait)
        with self._lock:
            self.read_bytes += count
        return count


def tensors():
    torch.manual_seed(1)
    return {
        "model": {"weight": torch.randn(ROWS, COLUMNS), "bias": torch.randn(777)},
        "half": torch.randn(1000, 999).to(torch.bfloat16),
        "count": torch.arange(3),
    }


def act_as_machine(number: int) -> None:
    platform.node = lambda: f"machine{number}"


def total(number: int) -> int:
    numbers = [0] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    return sum(numbers)


def empty_like(state):
    if isinstance(state, dict):
        return {key: empty_like(value) for key, value in state.items()}
    return torch.zeros_like(state)


def is_equal(one, other) -> bool:
    if isinstance(one, dict):
        return all(is_equal(one[key], other[key]) for key in other)
    return torch.equal(one, other)


def load_replicas(path: str, machines: int) -> None:
    rank = dist.get_rank()
    act_as_machine(rank % machines)
    system = Counting()
    state = empty_like(tensors())
    report = shardckpt.load(state, path, storage=LocalStorage(system))
    assert is_equal(state, tensors())
    shards = list(Path(path).glob("*.safetensors"))
    unique = sum(shard.stat().st_size for shard in shards)
    manifest = os.path.getsize(f"{path}/manifest.json")
    read = total(system.read_bytes - manifest)
    if machines > 1:
        assert read <= 1.05 * unique
        assert total(report.bytes_read) <= 1.05 * unique
        assert unique / 4 - (6 << 20) < report.bytes_read < unique / 4 + (6 << 20), "balanced"
    else:
        assert read > 3.9 * unique, "on one machine the page cache does this"


@pytest.mark.parametrize("machines", [4, 2, 1])
def test_replicas_are_read_once(tmp_path, machines):
    path = str(tmp_path / "saved")
    shardckpt.save(tensors(), path)
    run_ranks(4, load_replicas, path, machines)


def load_meshes(path: str) -> None:
    rank = dist.get_rank()
    act_as_machine(rank)
    full = tensors()["model"]["weight"]
    shardckpt.save(
        {"weight": distribute_tensor(full, init_device_mesh("cpu", (4,)), [Shard(0)])}, path
    )
    for shape, placements in (
        ((2, 2), [Replicate(), Shard(0)]),  # HSDP
        ((2, 2), [Shard(0), Replicate()]),
        ((4,), [Shard(1)]),  # each rank needs a part of each block
        ((4,), [Shard(0)]),  # nothing is shared
    ):
        mesh = init_device_mesh("cpu", shape)
        state = {"weight": distribute_tensor(torch.zeros_like(full), mesh, placements)}
        system = Counting()
        shardckpt.load(state, path, storage=LocalStorage(system))
        assert torch.equal(state["weight"].full_tensor(), full)
        assert total(system.read_bytes) <= 1.05 * full.nbytes + 4 * os.path.getsize(
            f"{path}/manifest.json"
        ), placements


def test_replicas_of_parts_are_read_once(tmp_path):
    run_ranks(4, load_meshes, str(tmp_path / "saved"))


def load_in_groups(path: str) -> None:
    rank = dist.get_rank()
    act_as_machine(rank)
    groups = [dist.new_group([0, 3]), dist.new_group([1, 2])]
    for _ in range(3):
        state = empty_like(tensors())
        report = shardckpt.load(state, path, process_group=groups[rank in (1, 2)])
        assert is_equal(state, tensors())
        assert report.bytes_read < 14 << 20, "half of it"


def test_groups_share_apart_from_each_other(tmp_path):
    path = str(tmp_path / "saved")
    shardckpt.save(tensors(), path)
    run_ranks(4, load_in_groups, path)


def fail_on_one_rank(path: str, how: str) -> None:
    rank = dist.get_rank()
    act_as_machine(rank)
    system = Counting()
    if rank == 2 and how == "disk":
        system.fail_after = 2 << 20
    system.shrinks = rank == 2 and how == "size"
    expected = errors.StorageError if how == "disk" else errors.CorruptionError
    began = time.monotonic()
    with pytest.raises(expected) as caught:
        shardckpt.load(empty_like(tensors()), path, storage=LocalStorage(system))
    assert time.monotonic() - began < 60
    if how == "size":
        return
    if how == "disk":
        assert caught.value.rank == (2,)
        state = empty_like(tensors())  # the ranks can load again
        shardckpt.load(state, path)
        assert is_equal(state, tensors())
    else:
        assert "block 7" in str(caught.value)


@pytest.mark.parametrize("how", ["disk", "damage", "size"])
def test_a_reader_that_fails_is_an_error_on_all_ranks(tmp_path, how):
    path = tmp_path / "saved"
    shardckpt.save(tensors(), path)
    if how == "damage":
        (shard,) = path.glob("*.safetensors")
        data = bytearray(shard.read_bytes())
        data[(7 << 20) + 5] ^= 4
        shard.write_bytes(data)
    run_ranks(4, fail_on_one_rank, str(path), how)


class Dying(Counting):
    """Ends the process in the middle of a read."""

    def read(self, fd, buffers, *, offset, wait=True):
        if self.read_bytes > self.fail_after:
            os._exit(1)
        return super().read(fd, buffers, offset=offset, wait=wait)


def die_on_one_rank(path: str) -> str:
    rank = dist.get_rank()
    act_as_machine(rank)
    system = Dying()
    if rank == 2:
        system.fail_after = 2 << 20
    with (
        shardckpt.options(deadline_s=4),
        pytest.raises(errors.RankFailedError) as caught,
    ):
        shardckpt.load(empty_like(tensors()), path, storage=LocalStorage(system))
    assert caught.value.rank == (2,)
    return "failed as expected"


def test_a_reader_that_dies_is_an_error_on_all_other_ranks(tmp_path):
    path = str(tmp_path / "saved")
    shardckpt.save(tensors(), path)
    results = start_ranks(4, die_on_one_rank, path).wait(90, ending=3)
    alive = [result for rank, result in enumerate(results) if rank != 2]
    assert alive == [(True, "failed as expected")] * 3
