"""What the environment tells of a launcher, and MPI that can't be used."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

import shardckpt
from shardckpt import errors
from shardckpt.coordination.mpi import coordinator
from shardckpt.coordination.mpi.launch import first_host, mpi_launch, slurm_launch
from shardckpt.coordination.resolve import operation

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


@pytest.fixture(autouse=True)
def launched_by(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("OMPI_", "PMI", "SLURM_", "MPI_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)

    def launch(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


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
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")  # what the error advises, where they are strangers
    assert shardckpt.save({"step": 1}, tmp_path / "c").world_size == 1


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


class Comm:
    def __init__(self, size):
        self.size = size

    def Get_size(self):
        return self.size


def fake_mpi(*, size, level=3):
    """An MPI that sees so many ranks, started with a thread level."""
    return SimpleNamespace(
        Comm=Comm,
        Intracomm=Comm,
        COMM_NULL=None,
        COMM_WORLD=Comm(size),
        Exception=ZeroDivisionError,
        THREAD_SERIALIZED=2,
        THREAD_MULTIPLE=3,
        Query_thread=lambda: level,
        Is_initialized=lambda: True,
        Is_finalized=lambda: False,
        Get_library_version=lambda: "Open MPI v5.0.11, and more",
    )


def test_mpirun_of_another_mpi(tmp_path, launched_by, monkeypatch):
    """Each rank believes to be alone: four saves of the same path, if nobody notices."""
    launched_by(OPENMPI)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", fake_mpi(size=1))
    with pytest.raises(errors.CoordinationError, match=r"4 ranks(.|\n)*Open MPI v5.0.11"):
        shardckpt.save({"step": 1}, tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(("channel", "level"), [("main", 1), ("async", 2)])
def test_mpi_without_threads(monkeypatch, channel, level):
    mpi = fake_mpi(size=2, level=level)
    monkeypatch.setattr(coordinator, "load_mpi", lambda: mpi)
    with (
        pytest.raises(errors.CoordinationError, match="thread level"),
        operation("save", comm=Comm(2), channel=channel),
    ):
        pass
    with operation("save", comm=Comm(1), channel=channel) as ranks:
        assert ranks.world_size == 1


def test_init_from_mpi_outside_of_mpi():
    with pytest.raises(errors.CoordinationError, match="neither mpirun nor srun"):
        shardckpt.init_from_mpi()
