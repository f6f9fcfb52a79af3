"""Launchers are recognized by the environment; MPI that can't be used is an error."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

import shardckpt
from shardckpt import NNHandler, errors
from shardckpt.cli.main import main
from shardckpt.coordination.mpi.launch import first_host, mpi_launch, slurm_launch
from shardckpt.coordination.resolve import operation
from tests.coordination.mpi.fake import Comm, fake_mpi

pytestmark = pytest.mark.usefixtures("launched_by")

OPENMPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
MPICH = {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALRANKID": "1"}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]",
}


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [(OPENMPI, "mpirun"), (MPICH, "mpiexec"), ({**SRUN, "PMIX_RANK": "3"}, "srun")],
)
def test_launchers_of_mpi(launched_by, variables, launcher):
    launched_by(variables)
    found = mpi_launch()
    assert found is not None
    assert (found.launcher, found.rank, found.world_size, found.local_rank) == (launcher, 3, 4, 1)
    launched_by({"TORCHELASTIC_RUN_ID": "none"})  # torchrun, below mpirun
    assert mpi_launch() is None


def test_srun_without_mpi(launched_by):
    assert slurm_launch() is None
    launched_by({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"})  # the batch script itself
    assert slurm_launch() is None
    launched_by(SRUN)
    assert mpi_launch() is None
    found = slurm_launch()
    assert found is not None
    assert (found.rank, found.world_size, found.local_rank, found.host) == (3, 4, 1, "gpu07")


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


def test_a_shell_of_srun(tmp_path, launched_by):
    launched_by({**SRUN, "SLURM_PROCID": "0", "SLURM_PTY_PORT": "44361"})
    assert slurm_launch() is None
    assert shardckpt.save({"step": 1}, tmp_path / "c").world_size == 1


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("login", "login"),
        ("a-1,b[2-3]", "a-1"),
        ("node[001-003,7]", "node001"),
        ("node[3]", "node3"),
        ("r1.rack,r2.rack", "r1.rack"),
        ("10.0.0.[5-6]", "10.0.0.5"),
        ("rack[0-1]node[03-04]", "rack0node03"),
        ("gpu[07-09,12],login", "gpu07"),
        ("n[1,5]-ib,m", "n1-ib"),
        ("", None),
    ],
)
def test_the_first_host(hosts, first):
    assert first_host(hosts) == first


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
