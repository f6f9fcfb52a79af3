"""A fast tier that is a disk of each machine: each of these ranks has a folder of its own."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import shardckpt
from shardckpt import LocalStorage, TieredStorage
from shardckpt.errors import NotACheckpointError, StateError
from shardckpt.integrations.dcp import ShardWriter
from shardckpt.storage import tiers as module
from shardckpt.storage.resolve import Location
from tests.ranks import on_world_sizes, run_ranks

pytestmark = pytest.mark.ranks
DEADLINE_S = 60
ROWS, COLUMNS = 4096, 257  # 4.2 MB


class OwnDisk(LocalStorage):
    """Checkpoints in a folder of this machine. Their paths are the same text on all machines."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = str(folder)

    def full_path(self, path):
        return path or "disk://run"

    def _at(self, path: str) -> str:
        return os.path.join(self._folder, path.removeprefix("disk://run").strip("/"))

    def begin(self, path, **options):
        return super().begin(self._at(path), **options)

    def join(self, path, **options):
        return super().join(self._at(path), **options)

    def open(self, path):
        return super().open(self._at(path))

    def names(self, folder):
        return super().names(self._at(folder))

    def exists(self, path):
        return super().exists(self._at(path))

    def version(self, path):
        return super().version(self._at(path))

    def remove(self, path):
        super().remove(self._at(path))

    def sweep(self, folder):
        super().sweep(self._at(folder))


def tiers_of(folder: Path, machine: int, slow: object = None, **options) -> TieredStorage:
    return TieredStorage(OwnDisk(folder / f"disk-{machine}"), slow or folder / "slow", **options)


def state_of(fill: bool):
    torch.manual_seed(3)
    full = torch.randn(ROWS, COLUMNS)
    small = torch.arange(70.0)
    if not fill:
        full, small = torch.zeros_like(full), torch.zeros_like(small)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        "rows": distribute_tensor(full.clone(), mesh, [Shard(0)]),
        "columns": distribute_tensor(full.clone(), mesh, [Shard(1)]),
        "replicated": distribute_tensor(full.clone(), mesh, [Replicate()]),
        "small": small.clone(),
        "step": 7 if fill else 0,
    }


def is_saved(state) -> None:
    expected = state_of(True)
    for name in ("rows", "columns", "replicated"):
        assert torch.equal(state[name].to_local(), expected[name].to_local()), name
    assert torch.equal(state["small"], expected["small"])
    assert state["step"] == 7


def save_on_own_disks(folder: Path) -> None:
    rank = dist.get_rank()
    tiers = tiers_of(folder, rank)
    report = shardckpt.save(state_of(True), "step-7", storage=tiers)
    assert report.tiers["disk://run/step-7"] == "durable"
    mine = sorted(path.name for path in (folder / f"disk-{rank}/step-7").iterdir())
    assert "manifest.json" in mine
    shards = [name for name in mine if name != "manifest.json"]
    assert shards
    assert all(name.startswith(f"shard-{rank:05d}-of-00004") for name in shards)
    tiers.wait(DEADLINE_S)
    shardckpt.verify(folder / "slow/step-7")
    assert set(tiers.tiers("step-7").values()) == {"durable"}
    dist.barrier()


def damage(path: Path) -> None:
    """Change a byte of each block of each shard, or remove it, or cut it."""
    for number, shard in enumerate(sorted(path.glob("*.safetensors"))):
        data = bytearray(shard.read_bytes())
        for at in range(1000, len(data), 1 << 20):
            data[at] ^= 1
        shard.write_bytes(data if number % 2 == 0 else data[: len(data) // 2])


def restore_subsets(world_size: int, folder: Path, numbers: Sequence[int]) -> None:
    rank = dist.get_rank()
    subsets = list(itertools.product([False, True], repeat=4))
    for number in numbers:
        lost = subsets[number]
        if rank == 0:
            for machine in range(4):
                disk = folder / f"disk-{machine}"
                shutil.rmtree(disk, ignore_errors=True)
                shutil.copytree(folder / f"kept/disk-{machine}", disk)
                if lost[machine] and (number + machine) % 2:
                    shutil.rmtree(disk)
                elif lost[machine]:
                    damage(disk / "step-7")
        dist.barrier()
        state = state_of(False)
        report = shardckpt.load(state, "step-7", storage=tiers_of(folder, rank))
        is_saved(state)
        slow_bytes = report.tiers.get(f"{folder}/slow/step-7", 0)
        if not any(lost) and world_size == 4:
            assert slow_bytes == 0, "what other ranks wrote comes from their disks"
        if world_size == 1:
            assert slow_bytes > 0
        dist.barrier()


@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    ("world_sizes", "numbers"),
    [
        pytest.param((1, 4), [0b0000, 0b0010, 0b0101, 0b1110, 0b1111], id="1 and 4, five subsets"),
        pytest.param((1, 4), range(16), marks=pytest.mark.long, id="1 and 4"),
        pytest.param((2, 3), range(16), marks=pytest.mark.long, id="2 and 3"),
    ],
)
def test_any_lost_or_damaged_disks_and_any_number_of_ranks(tmp_path, world_sizes, numbers):
    run_ranks(4, save_on_own_disks, tmp_path)
    for machine in range(4):
        shutil.copytree(tmp_path / f"disk-{machine}", tmp_path / f"kept/disk-{machine}")
    job = (restore_subsets, tmp_path, numbers)
    run_ranks(4, on_world_sizes, world_sizes, *job, timeout_s=400)


def load_before_it_is_copied(world_size: int, folder: Path) -> None:
    """The slower tier has nothing yet. Ranks send each other what only their disks have."""
    state = state_of(False)
    tiers = tiers_of(folder, dist.get_rank(), folder / "empty")
    report = shardckpt.load(state, "step-7", storage=tiers)
    is_saved(state)
    assert list(report.tiers) in ([], ["disk://run/step-7"])


@pytest.mark.timeout(300)
def test_shards_that_are_not_copied_come_from_the_machines_that_have_them(tmp_path):
    run_ranks(4, save_on_own_disks, tmp_path)
    run_ranks(4, load_before_it_is_copied, 4, tmp_path)


def steps_on(disk: Path) -> list[str]:
    return sorted(name for name in os.listdir(disk) if not name.startswith("."))


def keep_two(folder: Path) -> None:
    rank = dist.get_rank()
    tiers = tiers_of(folder, rank)
    keep = [shardckpt.KeepLast(2)]
    with shardckpt.CheckpointManager(tiers, keep=keep) as manager:
        for step in range(4):
            manager.save(step, state_of(True))
        if rank == 0:
            assert manager.all_steps() == [2, 3]
    assert steps_on(folder / f"disk-{rank}") == ["step-2", "step-3"]
    tiers.wait(DEADLINE_S)
    dist.barrier()
    if rank == 0:
        assert set(steps_on(folder / "slow")) >= {"step-2", "step-3"}
        for step in (2, 3):
            shardckpt.verify(folder / f"slow/step-{step}")
    dist.barrier()
    shutil.rmtree(folder / f"disk-{(rank + 1) % 2}/step-3", ignore_errors=True)  # of both
    dist.barrier()
    state = state_of(False)
    with shardckpt.CheckpointManager(tiers_of(folder, rank), keep=keep) as manager:
        assert manager.restore_latest(state).step == 3
    is_saved(state)


def keep_one_fast(folder: Path) -> None:
    rank = dist.get_rank()
    tiers = tiers_of(folder, rank, keep_fast=1)
    for step in range(3):
        shardckpt.save({"step": step, **state_of(True)}, f"step-{step}", storage=tiers)
        time.sleep(1.01)  # the time in a manifest is in seconds
    tiers.wait(DEADLINE_S)
    assert steps_on(folder / f"disk-{rank}") == ["step-2"]
    assert steps_on(folder / "slow") == ["step-0", "step-1", "step-2"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("job", [keep_two, keep_one_fast])
def test_retention_on_own_disks(tmp_path, job):
    run_ranks(2, job, tmp_path)


def save_twice(folder: Path) -> None:
    """Machine 1 is away while the checkpoint is replaced, and machine 2 takes its place."""
    rank = dist.get_rank()
    for number, machines in enumerate(([0, 1], [0, 2])):
        tiers = tiers_of(folder, machines[rank])
        state = {
            "n": number,
            "w": distribute_tensor(
                torch.full((600, 600), float(number)), init_device_mesh("cpu", (2,)), [Shard(0)]
            ),
        }
        shardckpt.save(state, "step-1", storage=tiers, overwrite=True)
        tiers.wait(DEADLINE_S)
        time.sleep(1.01)  # the time in a manifest is in seconds
        dist.barrier()
    for machines in ([0, 1], [1, 0], [5, 1], [1, 6]):
        state = {
            "n": -1,
            "w": distribute_tensor(
                torch.zeros(600, 600), init_device_mesh("cpu", (2,)), [Shard(0)]
            ),
        }
        if 0 not in machines and rank == 0:
            shutil.rmtree(
                folder / "disk-1", ignore_errors=True
            )  # otherwise all disks have the older checkpoint
        dist.barrier()
        shardckpt.load(state, "step-1", storage=tiers_of(folder, machines[rank]))
        assert state["n"] == 1
        assert (state["w"].to_local() == 1).all()


@pytest.mark.timeout(200)
def test_ranks_load_the_newest_checkpoint_that_any_of_them_finds(tmp_path):
    run_ranks(2, save_twice, tmp_path)


def save_without_copies(folder: Path) -> None:
    tiers = tiers_of(folder, dist.get_rank())
    if dist.get_rank() == 1:
        tiers._copy_later = lambda path, saved: None  # its process ends first
    with shardckpt.CheckpointManager(tiers) as manager:
        manager.save(1, state_of(True))
    if dist.get_rank() == 0:
        with pytest.raises(TimeoutError):
            tiers.wait(2)
        assert not (folder / "slow/step-1").exists()
    dist.barrier()


def save_again(folder: Path) -> None:
    tiers = tiers_of(folder, dist.get_rank())
    with shardckpt.CheckpointManager(tiers) as manager:
        manager.save(2, state_of(True))
    tiers.wait(DEADLINE_S)
    dist.barrier()
    for step in (1, 2):
        shardckpt.verify(folder / f"slow/step-{step}")
    assert steps_on(folder / "slow") == sorted(os.listdir(folder / "slow")), "nothing is left"


@pytest.mark.timeout(200)
def test_the_next_processes_copy_what_the_last_ones_did_not(tmp_path):
    run_ranks(2, save_without_copies, tmp_path)
    run_ranks(2, save_again, tmp_path)


class NoParts(LocalStorage):
    """A storage that does not assemble checkpoints, as the default is."""

    assemble = shardckpt.Storage.assemble


def save_to_a_storage_without_assemble(folder: Path) -> None:
    with pytest.raises(StateError, match="can't assemble"):
        module._copy(*copy_of_a_part(folder), saved=True)


def copy_of_a_part(folder: Path):
    """The places of a part of a checkpoint, and of its copy."""
    tiers = tiers_of(folder, dist.get_rank())
    tiers._copy_later = lambda path, saved: None
    shardckpt.save(state_of(True), "step-1", storage=tiers)
    fast = tiers._places("step-1")[0]
    return fast, Location(NoParts(), str(folder / f"other-{dist.get_rank()}/step-1"))


def test_a_slow_tier_must_assemble_parts(tmp_path):
    run_ranks(2, save_to_a_storage_without_assemble, tmp_path)


def fail_to_commit(folder: Path) -> None:
    rank = dist.get_rank()
    tiers = tiers_of(folder, rank)
    shardckpt.save(state_of(True), "step-1", storage=tiers)
    tiers.wait(DEADLINE_S)
    (folder / f"disk-{rank}/step-1/folder").mkdir()  # its checkpoint can't be replaced
    if rank == 0:
        (folder / "disk-0/step-1/folder").rmdir()
    with pytest.raises(NotACheckpointError) as caught:
        shardckpt.save({"n": 1}, "step-1", storage=tiers, overwrite=True)
    assert caught.value.rank == (1,) or rank == 1
    is_the_first = shardckpt.load_state("step-1", storage=tiers_of(folder, 0))
    assert is_the_first["step"] == 7
    assert not [name for name in os.listdir(folder / f"disk-{rank}") if ".tmp-" in name]


def test_a_machine_that_fails_fails_the_save(tmp_path):
    run_ranks(2, fail_to_commit, tmp_path)


def join_strictly(folder: Path) -> None:
    with pytest.raises(CheckpointException, match="does not see the directory"):
        dcp.save(
            {"w": torch.ones(3)},
            storage_writer=ShardWriter("step-1", storage=tiers_of(folder, dist.get_rank())),
        )


def test_planners_of_dcp_need_a_shared_tier(tmp_path):
    run_ranks(2, join_strictly, tmp_path)
