"""Runs a function on the ranks of mpirun; with Open MPI and with MPICH, where they are there.

MPICH's files have the names of Open MPI's, so it lies in a folder of its own, mpich/ in the
virtual environment: pip install --prefix .venv/mpich mpich, as scripts/test does.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardckpt.coordination.shutdown import destroy_groups

PREFIX = Path(sys.prefix)
WHOLE = np.arange(7 * 9, dtype=np.float64).reshape(7, 9)
FLAVOURS = ("openmpi", "mpich")


def flavours(*, long: Sequence[str] = ()) -> Any:
    """Parametrise `flavour`. Flavours that are not installed are skipped with a reason.

    `long`: the flavours for which the test is a long one.
    """
    marks = [
        pytest.param(name, marks=[needs(name), *[pytest.mark.long] * (name in long)])
        for name in FLAVOURS
    ]
    return pytest.mark.parametrize("flavour", marks)


def is_there(flavour: str) -> bool:
    """Whether an MPI is installed."""
    return importlib.util.find_spec("mpi4py") is not None and Path(_mpirun(flavour)).exists()


def needs(flavour: str) -> Any:
    """Skips a test where an MPI is not installed."""
    remedy = "scripts/test installs it"
    return pytest.mark.skipif(not is_there(flavour), reason=f"{flavour} is not installed; {remedy}")


def _mpirun(flavour: str) -> str:
    return str(PREFIX / ("bin/mpirun" if flavour == "openmpi" else "mpich/bin/mpiexec"))


def environment(flavour: str, **more: str) -> dict[str, str]:
    """The environment of a job: no launcher's variables but its own."""
    foreign = ("OMPI_", "PMI", "PRTE_", "SLURM_", "MPI_", "MPI4PY_", "TORCHELASTIC_")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign) and k not in names}
    root = str(Path(__file__).parents[2])
    kept |= {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if flavour == "mpich":
        kept |= {"LD_LIBRARY_PATH": str(PREFIX / "mpich/lib"), "MPI4PY_MPIABI": "mpich"}
    return {**kept, **more}


def command(flavour: str, ranks: int, *program: str) -> list[str]:
    """mpirun's command line."""
    options = ["--allow-run-as-root", "--oversubscribe"] if flavour == "openmpi" else []
    return [_mpirun(flavour), *options, "-n", str(ranks), *program]


class Outcome:
    """The result of a job: `values` by rank, None for a rank that did not return."""

    def __init__(self, folder: Path, ranks: int, done: Any, took_s: float) -> None:
        self.code = done.returncode
        self.output = done.stdout + done.stderr
        self.took_s = took_s
        self.values: list[Any] = [None] * ranks
        self.errors: list[str] = []
        for rank in range(ranks):
            if (file := folder / f"{rank}.json").exists():
                ok, value = json.loads(file.read_text())
                self.values[rank] = value if ok else None
                self.errors += [] if ok else [f"rank {rank}: {value}"]

    def checked(self) -> list[Any]:
        """The values of a job in which nothing failed."""
        assert not self.errors, "\n".join(self.errors)
        assert self.code == 0, self.output
        return self.values


def run_job(
    flavour: str,
    ranks: int,
    function: str,
    *arguments: Any,
    folder: Path,
    timeout_s: float = 400.0,
    **more: str,
) -> Outcome:
    """jobs.FUNCTION(*arguments) on every rank; it returns what JSON can hold. (Importing jobs
    here would start MPI here.)"""
    folder.mkdir(exist_ok=True)
    program = [sys.executable, "-m", "tests.mpi.launch", function, json.dumps(arguments)]
    program += [str(folder), str(timeout_s - 5)]
    begun = time.monotonic()
    done = subprocess.run(
        command(flavour, ranks, *program),
        env=environment(flavour, **more),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return Outcome(folder, ranks, done, time.monotonic() - begun)


def _main(name: str, arguments: str, folder: str, timeout_s: str) -> None:
    faulthandler.dump_traceback_later(float(timeout_s), exit=True)
    names = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "RANK")
    rank = next((os.environ[name] for name in names if name in os.environ), "0")
    try:
        function = getattr(importlib.import_module("tests.mpi.jobs"), name)
        result: tuple[bool, Any] = (True, function(*json.loads(arguments)))
    except BaseException:
        result = (False, traceback.format_exc())
    partial = Path(folder, f".{rank}.json")
    partial.write_text(json.dumps(result))
    partial.rename(Path(folder, f"{rank}.json"))
    if not result[0]:
        print(result[1], file=sys.stderr, flush=True)
        if "mpi4py.MPI" in sys.modules:  # the others may wait for this rank
            sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(1)
        sys.exit(1)
    if name not in (
        "stopped",
        "over_two_hosts",
    ):  # with a rank lost, a group may hang in its destructor
        destroy_groups()


if __name__ == "__main__":
    _main(*sys.argv[1:])
