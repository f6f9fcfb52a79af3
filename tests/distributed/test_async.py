"""async_save on several ranks, with training in between."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import shardckpt
from shardckpt import errors
from shardckpt.saving import async_save as background
from shardckpt.saving import shard_writer as writer
from shardckpt.storage.local import LocalStorage
from tests.distributed import jobs
from tests.ranks import run_ranks


def train_while_saving(kind: str, folder: str) -> bool:
    """Whether three saves under way during training hold the states of their calls."""
    stage = background.stage

    def late(*arguments):
        time.sleep(0.1)
        return stage(*arguments)

    background.stage = late
    model, optimizer = jobs.build(kind, 1)
    jobs.step(model, optimizer)
    kept, handles = [], []
    for number in range(3):
        kept.append(jobs.everything(model, optimizer))
        state = {"model": model, "optimizer": optimizer, "step": number}
        handles.append(shardckpt.async_save(state, f"{folder}/{number}"))
        jobs.step(model, optimizer)
    for handle in handles:
        handle.result(60)
    model, optimizer = jobs.build(kind, 2)
    jobs.step(model, optimizer)
    alike = []
    for number, expected in enumerate(kept):
        shardckpt.load({"model": model, "optimizer": optimizer}, f"{folder}/{number}")
        found = jobs.everything(model, optimizer)
        alike.append(all(torch.equal(found[name], expected[name]) for name in expected))
    return all(alike)


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_training_goes_on_while_ranks_save(tmp_path, kind):
    assert run_ranks(3, train_while_saving, kind, str(tmp_path)) == [True] * 3


def unhooked(kind: str, folder: str) -> str:
    background._Job.before_step = lambda job: None
    background.Snapshot.changed = lambda snapshot, flat: None
    try:
        return str(train_while_saving(kind, folder))
    except errors.ReplicaMismatchError:
        return "False"
    except RuntimeError as error:  # gloo: the other rank has met that error, and has gone
        if "Connection" not in str(error):
            raise
        return "left alone"


def test_ranks_that_do_not_wait_would_be_seen(tmp_path):
    assert "False" in run_ranks(2, unhooked, "fsdp", str(tmp_path))


def copied_once(folder: str) -> tuple[int, int]:
    """Bytes of a shard, and how many this rank copied again once they were staged."""
    writer.BUFFER_BYTES, copied, copy = 1 << 20, [], writer.copy_bytes
    writer.copy_bytes = lambda to, of, size: (copied.append(size), copy(to, of, size))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {}
    for index in range(3):  # of the counters, which all ranks hold, each writes some
        state[f"{index}"] = distribute_tensor(torch.randn(4096, 512), mesh, [Shard(0)])
        state[f"{index}.step"] = torch.tensor(float(index))
    report = shardckpt.async_save(state, f"{folder}/c").result(60)
    found = {key: torch.zeros_like(value) for key, value in state.items()}
    shardckpt.load(found, f"{folder}/c")
    assert all(torch.equal(found[key], value) for key, value in state.items())
    return report.bytes_by_rank[0], sum(copied)


def test_what_is_staged_is_written_from_there(tmp_path):
    for size_bytes, copied_bytes in run_ranks(2, copied_once, str(tmp_path)):
        assert copied_bytes <= size_bytes / 4


def group_is_gone(folder: str) -> int:
    class Slow(LocalStorage):
        def begin(self, path, **options):
            time.sleep(0.5)
            return super().begin(path, **options)

    rank = dist.get_rank()
    first = shardckpt.async_save({"own": shardckpt.PerRank(rank)}, f"{folder}/a", storage=Slow())
    second = shardckpt.async_save({"own": shardckpt.PerRank(rank)}, f"{folder}/b")
    dist.destroy_process_group()
    first.result(60)
    return second.result(60).world_size


def test_saves_outlive_the_process_group(tmp_path):
    assert run_ranks(2, group_is_gone, str(tmp_path)) == [2, 2]
    for name in "ab":
        assert shardckpt.load_state(tmp_path / name)["own"] == [0, 1]


def one_rank_fails(folder: str) -> list[str]:
    rank = dist.get_rank()
    found = []
    bad = object() if rank == 1 else 1
    handle = shardckpt.async_save(
        {"t": torch.ones(3), "own": shardckpt.PerRank(bad)}, f"{folder}/c"
    )
    while rank == 0 and not handle.done():  # rank 0 knows when it calls, rank 1 may not
        time.sleep(0.01)
    later = []
    for number in range(3):
        try:
            later.append(shardckpt.async_save({"t": torch.ones(3)}, f"{folder}/{number}"))
        except errors.UnsupportedLeafError as error:
            found.append(f"call {number}: rank {error.rank}")
    for handle in later:
        handle.result(60)
    background._background.finish()
    return found


def test_ranks_that_learn_of_an_error_at_different_times_stay_in_step(tmp_path):
    found = run_ranks(2, one_rank_fails, str(tmp_path))
    assert found[0] == ["call 0: rank (1,)"]
    assert all(text.endswith("rank (1,)") for text in found[1])
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "2"]
