"""A stand-in for mpi4py."""

from __future__ import annotations

from types import SimpleNamespace


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
