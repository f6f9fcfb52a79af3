"""The launcher of this process is recognized by the environment, and its first host found."""

from __future__ import annotations

import pytest

import shardckpt
from shardckpt.coordination.mpi.launch import first_host, mpi_launch, slurm_launch
from tests.coordination.mpi.stand_in import MPICH, OPENMPI, SRUN

pytestmark = pytest.mark.usefixtures("launched_by")


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
