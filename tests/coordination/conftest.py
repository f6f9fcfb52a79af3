"""Connections to a store, and the variables of launchers, for the tests of this folder."""

from __future__ import annotations

import datetime
import os

import pytest
import torch.distributed as dist

RANKS = 7


@pytest.fixture(params=["tcp", "file"])
def connect(request, tmp_path):
    """A function that connects to a store. The store in a file has no requests for many keys."""
    if request.param == "file":
        return lambda: dist.FileStore(str(tmp_path / "store"), RANKS)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    timeout = datetime.timedelta(seconds=60)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timeout)


@pytest.fixture
def launched_by(monkeypatch):
    """A function that sets the variables of a launcher; none are set before."""
    for name in list(os.environ):
        if name.startswith(("OMPI_", "PMI", "SLURM_", "MPI_", "TORCHELASTIC_", "RANK", "WORLD_")):
            monkeypatch.delenv(name)

    def launch(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch
