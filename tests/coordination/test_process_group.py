"""A process group of torch is started from the ranks of MPI or SLURM."""

from __future__ import annotations

import pytest

import shardckpt
from shardckpt import errors

pytestmark = pytest.mark.usefixtures("launched_by")


def test_init_from_mpi_outside_of_mpi():
    with pytest.raises(errors.CoordinationError, match="Neither mpirun nor srun"):
        shardckpt.init_from_mpi()
