"""Variables of launchers, and stand-ins for mpi4py: one has a size, one has threads as ranks."""

from __future__ import annotations

import collections
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


class Threads:
    """An MPI whose ranks are threads of this process. `world[rank]` is the communicator of a rank.

    A message arrives when it is sent. With `mute`, no message from those ranks arrives.
    """

    BYTE = ANY_SOURCE = COMM_NULL = None
    Exception = ZeroDivisionError

    class Status:
        def Get_count(self, datatype):
            return len(self.data)

        def Get_source(self):
            return self.source

    class Group:
        @staticmethod
        def Translate_ranks(group, ranks, other):
            return ranks

    def __init__(self, world_size):
        self.mute = set()
        self.world = [ThreadComm(self, rank, world_size) for rank in range(world_size)]
        for comm in self.world:
            comm.world = self.world
        self.COMM_WORLD = self.world[0]


class ThreadComm:
    def __init__(self, mpi, rank, size):
        self.mpi, self.rank, self.size = mpi, rank, size
        self.queue = collections.deque()

    def Get_rank(self):
        return self.rank

    def Get_size(self):
        return self.size

    def Get_group(self):
        return None

    def Idup(self):
        return self, Done()

    def Isend(self, message, rank, tag):
        if self.rank not in self.mpi.mute:
            self.world[rank].queue.append((self.rank, bytes(message[0])))
        return Done()

    Issend = Isend

    def Improbe(self, source, tag, status):
        if not self.queue:
            return None
        status.source, status.data = self.queue.popleft()
        return SimpleNamespace(Irecv=lambda buffer: receive(buffer[0], status.data))


class Done:
    def Test(self):
        return True


def receive(buffer, data):
    buffer[:] = data
    return Done()


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
