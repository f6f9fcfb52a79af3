"""The ranks that take part in an operation; ranks that nothing connects are an error."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

import shardckpt
from shardckpt import NNHandler, errors
from shardckpt.cli.main import main
from shardckpt.coordination import resolve
from shardckpt.coordination.mpi.launch import Launch
from shardckpt.coordination.resolve import alone, check_launcher, is_alone, operation
from shardckpt.coordination.single import SingleCoordinator
from shardckpt.errors import CoordinationError
from tests.coordination.mpi.stand_in import OPENMPI, SRUN, Comm, fake_mpi


@pytest.fixture
def torchrun(monkeypatch):
    """The environment of rank 1 of 4 of torchrun."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")


def test_a_process_that_no_launcher_started_is_the_only_rank():
    made = operation("save a")
    assert (made.rank, made.world_size) == (0, 1)
    with made as coordinator:
        assert isinstance(coordinator, SingleCoordinator)


def test_a_rank_of_torchrun_without_a_group_is_refused(torchrun):
    with pytest.raises(CoordinationError, match="one of several ranks") as caught:
        operation("save a")
    assert caught.value.rank == 1
    assert caught.value.actual == "RANK=1 and WORLD_SIZE=4, without a group"
    assert "init_process_group" in caught.value.remedy


def test_inside_alone_a_rank_of_torchrun_is_the_only_rank(torchrun):
    with alone():
        assert is_alone()
        assert operation("save a").world_size == 1
        check_launcher()
    assert not is_alone()
    with pytest.raises(ZeroDivisionError), alone():
        raise ZeroDivisionError
    assert not is_alone()


def test_a_group_of_one_rank_needs_no_store(torchrun):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with operation("save a") as coordinator:
            assert isinstance(coordinator, SingleCoordinator)
    finally:
        dist.destroy_process_group()


def test_a_communicator_and_a_group_exclude_each_other():
    with pytest.raises(CoordinationError, match="Both a communicator and a process group"):
        operation("save a", object(), comm=object())


def test_a_group_without_torch_distributed_is_refused(tmp_path):
    with pytest.raises(CoordinationError, match="not initialized"):
        operation("save a", object())
    with pytest.raises(CoordinationError, match="not initialized"):
        shardckpt.save({"a": 1}, tmp_path / "c", process_group=object())


def test_tasks_of_srun_that_nothing_connects_are_refused(monkeypatch):
    launch = Launch(rank=1, world_size=4, local_rank=1, launcher="srun")
    monkeypatch.setattr(resolve, "several_ranks", lambda: launch)
    monkeypatch.setattr(resolve, "mpi_launch", lambda: None)
    monkeypatch.setattr(resolve.sys, "modules", {})
    with pytest.raises(CoordinationError, match="srun started several tasks") as caught:
        operation("save a")
    assert caught.value.actual == "4 tasks, without either"
    assert "init_from_mpi" in caught.value.remedy


@pytest.mark.parametrize("mpi", [None, "alone"])
def test_tasks_of_srun_without_mpi(tmp_path, launched_by, monkeypatch, mpi):
    """Each would be alone, and the last one to save would replace what the others had saved."""
    launched_by(SRUN)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", fake_mpi(size=1) if mpi else None)
    for call in (shardckpt.save, shardckpt.async_save, shardckpt.load):
        with pytest.raises(errors.CoordinationError, match=r"4 tasks(.|\n)*init_from_mpi"):
            call({"step": 1}, tmp_path / "c")
    assert os.listdir(tmp_path) == []
    with shardckpt.alone():  # what the error advises
        assert shardckpt.save({"step": 1}, tmp_path / "c").world_size == 1


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
STATE = {"step": 1}


@pytest.mark.parametrize("more", [{}, {"TORCHELASTIC_RUN_ID": "none"}])
@pytest.mark.parametrize("mpi", [None, "alone"])
def test_ranks_of_torchrun_without_a_group(tmp_path, launched_by, monkeypatch, mpi, more):
    """Each would be alone, and the last one to save would replace what the others had saved."""
    shardckpt.save(STATE, tmp_path / "before")
    launched_by({**TORCHRUN, **more})
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", fake_mpi(size=1) if mpi else None)
    path, before = tmp_path / "c", tmp_path / "before"
    manager = shardckpt.CheckpointManager(tmp_path / "managed")
    handler = NNHandler(nn.Linear, device="cpu", parallel="none", in_features=2, out_features=2)
    calls = {
        "save": lambda: shardckpt.save(STATE, path),
        "async_save": lambda: shardckpt.async_save(STATE, path).result(),
        "planner": lambda: shardckpt.save(STATE, path, planner=shardckpt.ShardSavePlanner()),
        "load": lambda: shardckpt.load(dict(STATE), before),
        "manager.save": lambda: manager.save(1, STATE),
        "manager.restore": lambda: manager.restore_latest(dict(STATE)),
        "NNHandler.save": lambda: handler.save(path),
        "NNHandler.save_single_file": lambda: handler.save(tmp_path / "c.pth"),
        "NNHandler.restore": lambda: handler.restore(tmp_path / "handler"),
    }
    with shardckpt.alone():
        handler.save(tmp_path / "handler")
    there = sorted(os.listdir(tmp_path))
    for call in calls.values():
        with pytest.raises(errors.CoordinationError, match=r"init_process_gr(.|\n)*alone") as told:
            call()
        assert told.value.rank == 1
    assert sorted(os.listdir(tmp_path)) == there
    for name, call in calls.items():
        with shardckpt.alone():
            call()
        shutil.rmtree(path, ignore_errors=True)
        assert name
    with pytest.raises(CheckpointException, match="CoordinationError: This process is one"):
        dcp.save(dict(STATE), storage_writer=shardckpt.ShardWriter(path))
    with shardckpt.alone():
        dcp.save(dict(STATE), storage_writer=shardckpt.ShardWriter(path))
    shutil.rmtree(path)
    shardckpt.load_state(before)
    shardckpt.open_checkpoint(before).verify()
    assert main(["verify", str(before)]) == 0
    NNHandler.load(tmp_path / "handler", device_map="cpu")
    assert shardckpt.save(STATE, path, comm=Comm(1)).world_size == 1 if mpi else True


def test_one_rank_of_torchrun(tmp_path, launched_by):
    launched_by({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"})
    assert shardckpt.save(STATE, tmp_path / "c").world_size == 1


def test_alone_ends_with_its_block(launched_by):
    launched_by(TORCHRUN)
    with pytest.raises(ZeroDivisionError), shardckpt.alone(), shardckpt.alone():
        raise ZeroDivisionError
    with pytest.raises(errors.CoordinationError), operation("save"):
        pass


def test_a_batch_script_saves_alone(tmp_path, launched_by):
    launched_by({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"})
    assert shardckpt.save({"step": 1}, tmp_path / "c").world_size == 1


def test_mpi4py_is_missing(tmp_path, launched_by, monkeypatch):
    launched_by(OPENMPI)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", None)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(errors.DependencyError, match=r"shardckpt\[mpi\]"):
        shardckpt.save({"step": 1}, tmp_path / "c")
    with pytest.raises(errors.DependencyError, match=r"shardckpt\[mpi\]"):
        shardckpt.save({"step": 1}, tmp_path / "c", comm=object())
    assert not (tmp_path / "c").exists()


def test_mpirun_of_another_mpi(tmp_path, launched_by, monkeypatch):
    """Each rank believes to be alone: four saves of the same path, if nobody notices."""
    launched_by(OPENMPI)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", fake_mpi(size=1))
    with pytest.raises(errors.CoordinationError, match=r"4 ranks(.|\n)*Open MPI v5.0.11"):
        shardckpt.save({"step": 1}, tmp_path / "c")
    assert not (tmp_path / "c").exists()
