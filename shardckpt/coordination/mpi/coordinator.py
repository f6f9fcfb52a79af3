"""The coordinator of an mpi4py communicator, with the semantics of the coordinator of a store.

The ranks meet as `coordination.rendezvous` describes. Each phase is then one message from each rank
to rank 0, and one answer to each. All ranks send heartbeats meanwhile.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from shardckpt.config import current
from shardckpt.coordination.deadlines import poll
from shardckpt.coordination.heartbeat import HeartbeatCoordinator, beat_interval_s
from shardckpt.coordination.mpi.link import Inbox, Link, Message, load_mpi, mpi_errors
from shardckpt.coordination.rendezvous import decide, follow, never_called, too_late
from shardckpt.errors import CoordinationError, RankFailedError

__all__ = ["MpiCoordinator", "check_communicator", "mpi_coordinator"]

_ROLL_CALL_S = 5.0
"""The additional time of rank 0, which knows the missing ranks, to inform the others."""

_LAST_WORDS_S = 0.5


def check_communicator(comm: Any, *, channel: str) -> int:
    """Return the number of ranks of a communicator.

    Raises:
        CoordinationError: The communicator can't be used.
    """
    mpi = load_mpi()
    if not isinstance(comm, mpi.Comm):
        raise _unusable("an intracommunicator of mpi4py", repr(comm))
    if mpi.Is_finalized():
        raise _unusable("MPI that runs", "MPI that was finalized")
    if comm == mpi.COMM_NULL:
        raise _unusable("an open communicator", "one that was freed, or does not hold this rank")
    if not isinstance(comm, mpi.Intracomm):
        raise _unusable("an intracommunicator", "an intercommunicator")
    try:
        size = int(comm.Get_size())
    except mpi.Exception as error:
        raise _unusable("an open communicator", str(error)) from error
    needed = mpi.THREAD_MULTIPLE if channel == "async" else mpi.THREAD_SERIALIZED
    if size > 1 and mpi.Query_thread() < needed:
        level = "multiple" if channel == "async" else "serialized"
        raise _unusable(
            f'MPI with thread level "{level}", since a background thread calls it too',
            f"a lower level, {mpi.Query_thread()}",
        )
    return size


def _unusable(expected: str, actual: str) -> CoordinationError:
    return CoordinationError(
        "This communicator can't be used",
        expected=expected,
        actual=actual,
        remedy="pass an open communicator that includes this rank, by default MPI.COMM_WORLD, and "
        "do not change mpi4py.rc.thread_level",
    )


@contextmanager
def mpi_coordinator(link: Link, *, channel: str, subject: str) -> Iterator[MpiCoordinator]:
    """Connect the ranks of a link for one operation. Collective.

    The link is claimed for the operation, and released at its end. `subject` describes the
    operation and is the same on all ranks. Operations of different channels may run at the same
    time. Operations of one channel begin one after another.
    """
    try:
        with mpi_errors("begin"):
            identity = _begin(link, channel, subject)
            link.all_here()
        coordinator = MpiCoordinator(link, identity)
        try:
            yield coordinator
        finally:
            coordinator.close()
    finally:
        link.release()


def _begin(link: Link, channel: str, subject: str) -> str:
    """Meet the other ranks. Returns the id of the operation."""
    patience_s = current().arrival_deadline_s
    if not poll(lambda: link.ready() or link.summoned, patience_s):
        patience_s = min(patience_s, _ROLL_CALL_S)
        if not link.rank:
            _send(link, range(1, link.world_size), Message("summons"))
    try:
        if link.rank:
            return _ask(link, channel, subject, patience_s + _ROLL_CALL_S)
        return _gather_calls(link, channel, subject, patience_s)
    finally:
        link.summoned = False


def _send(link: Link, ranks: Iterable[int], message: Message) -> None:
    for rank in ranks:
        link.send(rank, message)


def _ask(link: Link, channel: str, subject: str, patience_s: float) -> str:
    """Ask rank 0 to take part. Returns the id of the operation."""
    link.pump()
    if link.late.pop(channel, None) == subject:
        raise too_late(link.rank)
    nonce = uuid.uuid4().hex
    link.asked[nonce] = channel
    link.send(0, Message("call", channel, text=f"{nonce} {subject}"))

    def answered() -> bool:
        link.pump()
        return nonce in link.verdicts or link.late.get(channel) == subject

    try:
        came = poll(answered, patience_s)
    finally:
        link.asked.pop(nonce)
        if nonce not in link.verdicts:
            link.send(0, Message("withdraw", channel, text=nonce))
    if nonce not in link.verdicts:
        if came:
            del link.late[channel]
            raise too_late(link.rank)
        link.give_up([0])
        raise never_called([0])
    try:
        return follow(link.verdicts.pop(nonce), subject, rank=link.rank)
    except RankFailedError as error:
        link.give_up(list(error.rank) if isinstance(error.rank, tuple) else [])
        raise


def _gather_calls(link: Link, channel: str, subject: str, patience_s: float) -> str:
    """Wait for all ranks to call with this subject. Returns the id of the operation."""

    def all_called() -> bool:
        link.pump()
        return len(link.calls.get(channel, ())) == link.world_size - 1

    poll(all_called, patience_s)
    calls = link.take_calls(channel)
    subjects = {rank: text for rank, (_, text) in calls.items()}
    decision = decide(subjects, subject, world_size=link.world_size)
    if decision.error is None:
        link.inboxes[decision.identity] = Inbox()
    for rank, (nonce, _) in calls.items():
        link.send(rank, Message("verdict", nonce, text=decision.answer))
    if decision.late:
        link.inform_late(decision.late, channel, subject)
        link.give_up(decision.late)
    if decision.error is not None:
        raise decision.error
    return decision.identity


class MpiCoordinator(HeartbeatCoordinator):
    """The Coordinator of an MPI communicator; see Coordinator."""

    def __init__(self, link: Link, identity: str) -> None:
        super().__init__(link.rank, link.world_size)
        self._link = link
        self._identity = identity
        self._inbox = link.inboxes[identity]
        self._partners = [0] if self.rank else list(range(1, self.world_size))
        self._phases = itertools.count()
        self._phase = 0
        self._alone = False
        self._pulse.start()

    def watch(self, work: Callable[[], None], *, phase: str) -> None:
        """Run `work`, as Coordinator.watch does. Only collectives of torch need watching, and MPI
        ranks use none."""
        work()

    def gather(self, payload: bytes, *, phase: str) -> list[bytes] | None:
        """See Coordinator.gather."""
        self._phase = next(self._phases)
        with mpi_errors(phase):
            if self.rank:
                message = Message("part", self._identity, self._phase, payload=payload)
                self._link.send(0, message)
                return None
            parts = self._receive(phase, "part")
            return [payload, *(parts[rank] for rank in self._partners)]

    def scatter(self, payloads: Sequence[bytes] | None, *, phase: str) -> bytes:
        """See Coordinator.scatter."""
        with mpi_errors(phase):
            if payloads is None:
                return self._receive(phase, "answer")[0]
            for rank in self._partners:
                message = Message("answer", self._identity, self._phase, payload=payloads[rank])
                self._link.send(rank, message, until_taken=True)
            return payloads[0]

    def close(self) -> None:
        """Stop the heartbeat once the last messages are sent, and forget the operation."""
        with suppress(Exception):
            # Nothing drives MPI after this returns, so all messages must be sent by then.
            self._link.flush(self._identity, _LAST_WORDS_S if self._alone else current().deadline_s)
        self._stopped.set()
        self._pulse.join(timeout=current().deadline_s)
        self._link.inboxes.pop(self._identity, None)

    def _receive(self, phase: str, topic: str) -> dict[int, bytes]:
        """Receive the messages of all partners in this phase."""
        messages: dict[int, bytes] = {}

        def missing() -> list[int]:
            return [rank for rank in self._partners if rank not in messages]

        def all_came() -> bool:
            self._link.pump()
            for rank in missing():
                if (key := (topic, self._phase, rank)) in self._inbox.received:
                    messages[rank] = self._inbox.received.pop(key)
            return len(messages) == len(self._partners)

        self._wait(phase, all_came, missing)
        return messages

    def _signs(self, ranks: Sequence[int]) -> list[tuple[int, int]]:
        heard, progress = self._inbox.heard, self._inbox.progress
        return [(heard.get(rank, 0), progress.get(rank, 0)) for rank in ranks]

    def _given_up(self) -> list[int]:
        return [int(rank) for rank in self._inbox.given_up.split(",") if rank]

    def _give_up(self, ranks: list[int]) -> None:
        self._alone = True
        if not self.rank:
            message = Message("given-up", self._identity, text=",".join(map(str, ranks)))
            _send(self._link, self._partners, message)
        self._link.give_up([rank for rank in ranks if rank != self.rank])

    def _beat_until_stopped(self) -> None:
        while not self._stopped.wait(beat_interval_s()):
            with suppress(Exception):  # a failed heartbeat must not end the later ones
                _send(self._link, self._partners, Message("beat", self._identity, self._progress))
                self._link.pump()
