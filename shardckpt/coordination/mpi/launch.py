"""Read from the environment how the launcher started this process: mpirun, srun or torchrun."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

__all__ = ["Launch", "mpi_launch", "several_ranks", "slurm_launch", "torch_launch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """The rank of this process among the processes of a launcher.

    `host` is the host of rank 0, if known.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int | None = None
    host: str | None = None


# launcher, world size, rank, rank on this host; the first row whose variables are set
_MPI = (
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpiexec", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    ("srun", "SLURM_STEP_NUM_TASKS", "PMIX_RANK", "SLURM_LOCALID"),
)


def mpi_launch() -> Launch | None:
    """Return the MPI job of this process, which mpirun, mpiexec or srun --mpi=... started.

    Returns None for other processes, and under torchrun, even if MPI started torchrun itself.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return None
    for launcher, size, rank, local_rank in _MPI:
        if _number(size) is not None and _number(rank) is not None:
            return Launch(
                launcher=launcher,
                rank=_number(rank) or 0,
                world_size=_number(size) or 1,
                local_rank=_number(local_rank),
            )
    return None


def slurm_launch() -> Launch | None:
    """Return the job step of this process, which srun started with or without MPI, or None.

    Outside a step, such as in a batch script, SLURM_STEP_NUM_TASKS is not set. It is set in a shell
    that srun --pty opened, although only the shell runs.
    """
    size, rank = _number("SLURM_STEP_NUM_TASKS"), _number("SLURM_PROCID")
    other = {"TORCHELASTIC_RUN_ID", "SLURM_PTY_PORT"} & os.environ.keys()
    if size is None or rank is None or other:
        return None
    return Launch(
        launcher="srun",
        rank=rank,
        world_size=size,
        local_rank=_number("SLURM_LOCALID"),
        host=first_host(os.environ.get("SLURM_STEP_NODELIST", "")),
    )


def torch_launch() -> Launch | None:
    """Return the job of this process, started by torchrun or a launcher that sets RANK and
    WORLD_SIZE.

    Returns None for other processes.
    """
    size, rank = _number("WORLD_SIZE"), _number("RANK")
    if size is None or rank is None:
        return None
    local_rank = _number("LOCAL_RANK")
    return Launch(launcher="torchrun", rank=rank, world_size=size, local_rank=local_rank)


def several_ranks() -> Launch | None:
    """Return the job of this process if mpirun or srun started several ranks, or None."""
    launch = mpi_launch() or slurm_launch()
    return launch if launch is not None and launch.world_size > 1 else None


def first_host(hosts: str) -> str | None:
    """Return the first host of a compressed list of SLURM: "gpu[07-09,12],login" gives gpu07."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", found[0]) if found else None


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else None
