"""Saves and loads under mpirun, with Open MPI and MPICH, work as under torchrun."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import shardckpt
from shardckpt.convert.single_files import read_one
from tests.mpi.launch import WHOLE, flavours, run_job
from tests.ranks import run_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(500)]


def save_with_torch(folders: list[str]) -> None:
    """On 4 ranks of torch.distributed: an FSDP2 job, and arrays in parts."""
    from tests.distributed.jobs import build, step

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    begin, end = 9 * rank // size, 9 * (rank + 1) // size
    part = shardckpt.ShardedArray(WHOLE[:, begin:end], (7, 9), (0, begin))
    model, optimizer = build("fsdp", seed=0)
    step(model, optimizer)
    for folder in folders:
        shardckpt.save({"u": part, "w": torch.arange(10.0)}, f"{folder}/torch")
        shardckpt.save({"model": model, "optimizer": optimizer}, f"{folder}/trained")


def load_with_torch(folders: list[str]) -> list[object]:
    """And back, on 4 ranks: what MPI's ranks saved."""
    from tests.distributed.jobs import build

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    begin, end = 9 * rank // size, 9 * (rank + 1) // size
    model, optimizer = build("fsdp", seed=2)
    found: list[object] = []
    for folder in folders:
        part = np.zeros((7, end - begin))
        state = {"u": shardckpt.ShardedArray(part, (7, 9), (0, begin)), "w": torch.zeros(10)}
        shardckpt.load(state, f"{folder}/mpi")
        shardckpt.load({"model": model, "optimizer": optimizer}, f"{folder}/trained-on")
        found.append([np.array_equal(part, WHOLE[:, begin:end]), state["w"].tolist()])
    return found


@flavours(long=["mpich"])
def test_arrays_mistakes_failing_ranks_commands_and_groups_of_torch(tmp_path, flavour):
    """4 ranks of torch, then 3 of MPI, then one process; and back."""
    folder = tmp_path / flavour
    run_ranks(4, save_with_torch, [str(folder)])
    damage(folder)
    values = check_job(flavour, folder)
    for value in values:
        assert value["tools"] == [0, 0, 6, 5, 6, 0, 0, 0]
        assert value["torch_group"]["world"][:2] == [3, "3"]
        assert not value["torch_group"]["before"]
        assert value["torch_group"]["dcp"] == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert value["torch_group"]["handler"] == ["ddp", "fsdp"]
        check_digest(folder, value["torch_group"]["digest"])
    # MPI assigns the local ranks of a node in any order.
    assert sorted(value["torch_group"]["world"][2] for value in values) == ["0", "1", "2"]
    check_files(folder)
    check_files_of_commands(folder)
    loaded = [True, list(map(float, range(10)))]
    assert run_ranks(4, load_with_torch, [str(folder)]) == [[loaded]] * 4


def check_job(flavour, folder) -> list[dict]:
    values = run_job(flavour, 3, "all_of_it", str(folder), folder=folder / "out").checked()
    for rank, value in enumerate(values):
        check_plain(value["plain"], rank)
        check_wrong(value["wrong"])
    others = [[[1], "plan"], [[1], "divide"], [[1], "write"]]
    late = [[[1], "begin"], "saved"] * 2
    assert values[0]["failing"] == others + late
    assert values[1]["failing"] == ["own"] * 3 + late
    assert values[2]["failing"] == others + late
    return values


def damage(folder) -> None:
    state = {"w": torch.arange(3_000_000.0), "v": torch.arange(10.0)}
    shardckpt.save(state, folder / "damaged")
    (shard,) = (folder / "damaged").glob("*.safetensors")
    with open(shard, "r+b") as file:  # in the last block, a short one: flipped bits are looked for
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff")


def check_plain(found, rank: int) -> None:
    assert found["ranks"] == [3, 3, 3]
    assert found["async"] == [3, 3, 3]
    assert found["loaded"] == [True, list(map(float, range(10))), rank]
    assert found["step"] == [7, 3]
    assert found["torch"] == [True, True]


def check_wrong(found) -> None:
    assert found["path"] == ["RankMismatchError", 2, None]
    assert found["keys"] == ["RankMismatchError", 2, "b"]
    assert found["values"] == ["ReplicaMismatchError", 1, "a"]
    assert found["overlap"] == ["CoverageError", [0, 1], "u"]
    assert found["hole"] == ["CoverageError", None, "u"]
    assert found["beyond"] == ["StateError", [2], "u"]
    for name in ("dims", "fraction", "per rank"):
        assert found[name] == ["StateError", [0, 1, 2], "u"], name
    assert found["shapes"] == ["RankMismatchError", 2, "u"]
    assert found["kind"] == ["UnsupportedLeafError", [0, 1, 2], "u"]
    for name in ("freed", "no communicator", "null", "both", "planner"):
        assert found[name][0] == "CoordinationError", name
    assert [found[name] for name in ("half", "self", "fine")] == [None] * 3
    assert found["nothing there"] == ["CheckpointNotFoundError", [0, 1, 2], None]
    assert found["read-only"] == ["StateError", [0, 1, 2], "u"]
    assert found["strides"]


def check_files(folder) -> None:
    """Check the checkpoints from a process without a launcher."""
    for name in ("mpi", "async-0", "async-1", "async-2", "resharded", "converted"):
        state = shardckpt.load_state(folder / name)
        assert np.array_equal(np.asarray(state["u"]), WHOLE), name
        assert torch.equal(state["t"], torch.from_numpy(WHOLE.T[:7, :7].copy())), name
        assert torch.equal(state["w"], torch.arange(10.0)), name
        assert (state["rank"], state["step"]) == ([0, 1, 2], 7), name
    there = {"late-False-1", "late-True-1", "fine", "half-0", "half-1"}
    gone = {"never", "raised", "late-False-0", "late-True-0", "0", "1"}
    assert there <= set(os.listdir(folder))
    assert not gone & set(os.listdir(folder))
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def check_files_of_commands(folder) -> None:
    with shardckpt.open_checkpoint(folder / "resharded") as checkpoint:
        assert len(checkpoint.manifest.shards) == 5
        checkpoint.verify()
    assert torch.equal(read_one(f"{folder}/x.safetensors")["w"], torch.arange(10.0))
    with shardckpt.open_checkpoint(folder / "dcp-first") as checkpoint:
        assert checkpoint.manifest.world_size == 3
    assert {"handler", "handler.pth"} <= set(os.listdir(folder))


def check_digest(folder, digest) -> None:
    """Check that the ranks of MPI loaded the weights that those of torch saved."""
    trained = shardckpt.load_state(folder / "trained")
    weights = {name: tensor.double().sum().item() for name, tensor in trained["model"].items()}
    assert weights == {name: digest[name] for name in weights}


@flavours(long=["mpich"])
@pytest.mark.parametrize("fault", ["stop", pytest.param("kill", marks=pytest.mark.long)])
def test_a_rank_that_stops_or_dies(tmp_path, flavour, fault):
    """The others raise an error that names it, and the job ends: MPI alone would wait for ever."""
    job = run_job(flavour, 2, "stopped", str(tmp_path), fault, folder=tmp_path / "out")
    if fault == "stop":
        (ranks, phase, took_s), _ = job.values
        assert (ranks, phase) == ([1], "write")
        assert took_s < 60
        assert "rank 1 does not answer" in job.output
    assert job.code != 0
    assert not (tmp_path / "faulty").exists()
    assert shardckpt.load_state(tmp_path / "before")["w"].tolist() == list(range(10))
