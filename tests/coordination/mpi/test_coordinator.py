"""Communicators that can't be used are refused; the ranks of MPI meet and exchange messages."""

from __future__ import annotations

import pytest

from shardckpt import errors
from shardckpt.coordination.mpi import coordinator
from shardckpt.coordination.resolve import operation
from tests.coordination.mpi.fake import Comm, fake_mpi

pytestmark = pytest.mark.usefixtures("launched_by")


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
