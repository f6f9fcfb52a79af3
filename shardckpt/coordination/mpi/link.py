"""Messages between the ranks of an MPI communicator. No call can block.

They use a duplicate of the communicator, so that no receive of the program can take them. The first
operation creates it without waiting (MPI_Comm_idup), and it is kept with the communicator. Until it
is ready, the few messages that find out which rank is missing use the communicator itself, with a
tag of their own.

Every call of MPI returns immediately, and a lock admits one thread at a time.
"""

from __future__ import annotations

import atexit
import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from shardckpt.config import current
from shardckpt.coordination.deadlines import poll
from shardckpt.errors import CoordinationError, DependencyError, RankFailedError
from shardckpt.logs import logger

__all__ = ["Inbox", "Link", "Message", "link_of", "load_mpi", "mpi_errors"]

_TAG = 32_712  # every MPI supports tags up to 32,767

_lock = threading.RLock()
_keyval: int | None = None
_lost: set[int] = set()


class Message(msgspec.Struct, array_like=True):
    """A message from one rank to another.

    topic       from, to    about           number    text             payload
    call        r, 0        channel                   nonce subject
    withdraw    r, 0        channel                   nonce
    verdict     0, r        nonce                     see coordinator
    late        0, r        channel                   subject
    noted       r, 0        channel
    summons     0, r
    part        r, 0        operation       phase                      the payload of the rank
    answer      0, r        operation       phase                      the answer of rank 0
    beat        both        operation       progress
    given-up    0, r        operation                 ranks
    """

    topic: str
    about: str = ""
    number: int = 0
    text: str = ""
    payload: bytes = b""


@dataclass(slots=True)
class Inbox:
    """The messages received for one operation.

    Attributes:
        received: Payloads by (type, phase, rank).
        heard: The number of messages of each rank.
        progress: The latest progress of each rank.
        given_up: The ranks that rank 0 has given up.
    """

    received: dict[tuple[str, int, int], bytes] = field(default_factory=dict)
    heard: dict[int, int] = field(default_factory=dict)
    progress: dict[int, int] = field(default_factory=dict)
    given_up: str = ""

    def take(self, source: int, message: Message) -> None:
        """Store a message for the waiting thread."""
        self.heard[source] = self.heard.get(source, 0) + 1
        if message.topic == "given-up":
            self.given_up = message.text
        elif message.topic != "beat":
            self.received[message.topic, message.number, source] = message.payload
        else:
            self.progress[source] = message.number


def load_mpi() -> Any:
    """Import mpi4py.MPI, which starts MPI.

    Raises:
        DependencyError: mpi4py or an MPI library is missing.
    """
    try:
        return importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        raise DependencyError(
            "This process is a rank of an MPI job, but mpi4py can't be used",
            expected="mpi4py, and the MPI library that belongs to mpirun",
            actual=str(error).splitlines()[0],
            remedy='pip install "shardckpt[mpi]"; or start a process group of torch.distributed',
        ) from error


@contextmanager
def mpi_errors(phase: str) -> Iterator[None]:
    """Raise errors of MPI as RankFailedError."""
    mpi = load_mpi()
    try:
        yield
    except mpi.Exception as error:
        raise RankFailedError(
            "MPI reports an error",
            phase=phase,
            expected="a communicator whose ranks are all alive",
            actual=str(error),
            remedy="read the logs of the other ranks and of mpirun; nothing was committed",
        ) from error


def link_of(comm: Any) -> Link:
    """Return the link of a communicator. The first call creates it. Not collective."""
    global _keyval
    mpi = load_mpi()
    with _lock:
        if _keyval is None:
            _keyval = mpi.Comm.Create_keyval(delete_fn=_forget)
        link: Link | None = comm.Get_attr(_keyval)
        if link is None:
            link = Link(comm)
            comm.Set_attr(_keyval, link)
        return link


def _forget(comm: Any, keyval: int, link: Link) -> None:
    link.free()


def _abort_if_ranks_are_lost() -> None:
    """Abort the job if ranks were given up.

    MPI ends a process only when all ranks have ended, which the lost ranks never do. mpirun reports
    the abort.
    """
    if _lost and not (mpi := load_mpi()).Is_finalized():
        sys.stdout.flush()
        logger.error("rank %s does not answer; MPI_Abort", ", ".join(map(str, sorted(_lost))))
        mpi.COMM_WORLD.Abort(CoordinationError.exit_code)


class Link:
    """The messages of a communicator; see the module. Only `pump`, which any thread may call,
    changes the fields."""

    def __init__(self, comm: Any) -> None:
        self._mpi = load_mpi()
        self.rank: int = comm.Get_rank()
        self.world_size: int = comm.Get_size()
        self.summoned = False
        self.calls: dict[str, dict[int, tuple[str, str]]] = {}
        self.asked: dict[str, str] = {}
        self.verdicts: dict[str, str] = {}
        self.late: dict[str, str] = {}
        self._not_noted: dict[tuple[str, int], str] = {}
        self.inboxes: dict[str, Inbox] = {}
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Message).decode
        self._raw: Any = comm  # None once the program has freed it
        self._group = comm.Get_group()
        self._claims = 0
        self._duplicate, self._request = comm.Idup()
        self._sending: list[tuple[Any, bytes, str]] = []
        self._arriving: list[tuple[int, Any, bytearray]] = []

    def ready(self) -> bool:
        """Whether all ranks have created the duplicate. Receives messages as `pump` does."""
        self.pump()
        return self._request is None

    def claim(self) -> None:
        """Claim the link for an operation, until `release`."""
        self._claims += 1

    def release(self) -> None:
        """Release the link after an operation."""
        with _lock:
            self._claims -= 1
            self._free_unused()

    def free(self) -> None:
        """Handle that all ranks free the communicator. Running operations continue."""
        gone = self._raw in (None, self._mpi.COMM_NULL)  # MPICH reports it after the last use
        if self._claims and self._request is not None and not gone:
            # Open MPI crashes if a communicator is freed while it is duplicated.
            poll(self.ready, current().deadline_s)
        with _lock:
            if self._raw != self._mpi.COMM_WORLD:
                self._raw = None
                self._free_unused()

    def _free_unused(self) -> None:
        if self._raw is None and self._request is None and not self._claims:
            self._duplicate.Free()

    def send(self, rank: int, message: Message, *, until_taken: bool = False) -> None:
        """Send without waiting. `until_taken`: `flush` waits until the message is received."""
        data = self._encode(message)
        with _lock:
            comm = self._duplicate if self._request is None else self._raw
            if comm is None:
                raise CoordinationError(
                    "The communicator was freed before all ranks had joined the operation",
                    remedy="free the communicator after result() of its saves",
                )
            start = comm.Issend if until_taken else comm.Isend
            request = start([data, self._mpi.BYTE], rank, _TAG)
            self._sending.append((request, data, message.about))

    def flush(self, about: str, deadline_s: float) -> None:
        """Wait until all messages about a subject are sent, or until the deadline."""

        def done() -> bool:
            self.pump()
            return all(of != about for _, _, of in self._sending)

        poll(done, deadline_s)

    def pump(self) -> None:
        """Receive all messages that have arrived, and drive those being sent."""
        with _lock:
            if self._request is not None and self._request.Test():
                self._request = None
            if self._raw == self._mpi.COMM_NULL:
                self._raw = None
            self._sending = [sent for sent in self._sending if not sent[0].Test()]
            for comm in (self._raw, self._duplicate) if self._request is None else (self._raw,):
                if comm is not None:
                    self._receive(comm)
            blocked: set[int] = set()  # messages of one rank are received in order
            waiting = []
            for source, request, data in self._arriving:
                if source not in blocked and request.Test():
                    self._deliver(source, self._decode(data))
                else:
                    blocked.add(source)
                    waiting.append((source, request, data))
            self._arriving = waiting

    def _receive(self, comm: Any) -> None:
        status = self._mpi.Status()
        while (found := comm.Improbe(self._mpi.ANY_SOURCE, _TAG, status)) is not None:
            data = bytearray(status.Get_count(self._mpi.BYTE))
            request = found.Irecv([data, self._mpi.BYTE])
            self._arriving.append((status.Get_source(), request, data))

    def _deliver(self, source: int, message: Message) -> None:
        if message.topic == "call":
            nonce, _, subject = message.text.partition(" ")
            # A rank that rank 0 has given up is informed already.
            if self._not_noted.get((message.about, source)) != subject:
                self.calls.setdefault(message.about, {})[source] = (nonce, subject)
        elif message.topic == "withdraw":
            calls = self.calls.setdefault(message.about, {})
            if calls.get(source, ("", ""))[0] == message.text:
                del calls[source]
        elif message.topic == "verdict":
            if message.about in self.asked:
                verdict, _, identity = message.text.partition(" ")
                if verdict == "go":  # before any other message of the operation can arrive
                    self.inboxes[identity] = Inbox()
                    self.late.pop(self.asked[message.about], None)
                self.verdicts[message.about] = message.text
        elif message.topic == "late":
            self.late[message.about] = message.text
            self.send(source, Message("noted", message.about))
        elif message.topic == "noted":
            self._not_noted.pop((message.about, source), None)
        elif message.topic == "summons":
            self.summoned = True
        elif message.about in self.inboxes:
            self.inboxes[message.about].take(source, message)

    def take_calls(self, channel: str) -> dict[int, tuple[str, str]]:
        """Remove and return the (nonce, subject) of every rank that has called."""
        with _lock:
            return self.calls.pop(channel, {})

    def inform_late(self, ranks: list[int], channel: str, subject: str) -> None:
        """Inform ranks that rank 0 has given up their call, which may still arrive."""
        with _lock:
            for rank in ranks:
                self._not_noted[channel, rank] = subject
                if self.calls.get(channel, {}).get(rank, ("", ""))[1] == subject:
                    del self.calls[channel][rank]
                self.send(rank, Message("late", channel, text=subject))

    def all_here(self) -> None:
        """Record that all ranks take part in an operation, so none is lost."""
        if _lost:
            _lost.difference_update(self._in_world(list(range(self.world_size))))

    def give_up(self, ranks: list[int]) -> None:
        """Remember ranks that do not respond, so that this process can end without them."""
        _lost.update(self._in_world(ranks))
        # Register it last, so that it is called first: a process group may wait for the lost rank
        # when it is destroyed.
        atexit.unregister(_abort_if_ranks_are_lost)
        atexit.register(_abort_if_ranks_are_lost)

    def _in_world(self, ranks: list[int]) -> list[int]:
        world = self._mpi.COMM_WORLD.Get_group()
        return list(self._mpi.Group.Translate_ranks(self._group, ranks, world))
