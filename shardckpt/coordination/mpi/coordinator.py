"""A Coordinator over an mpi4py communicator, with the semantics of the one over torch's store.

A rank calls rank 0; rank 0 answers each with a verdict:

    go ID             the operation that it is let into
    late RANKS        ranks that did not call in time
    other RANK TEXT   a rank that calls something else

Then every phase is a part from each rank and an answer to each. Meanwhile all beat.
"""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from shardckpt.config import current
from shardckpt.coordination.deadlines import (
    SHORTEST_WAIT_S,
    next_wait,
    poll,
    rank_failed,
    ranks_disagree,
)
from shardckpt.coordination.mpi.link import Inbox, Link, Message, load_mpi, mpi_errors
from shardckpt.errors import CoordinationError

__all__ = ["MpiCoordinator", "check_communicator", "mpi_coordinator"]

_ROLL_CALL_S = 5.0  # rank 0 knows who is missing: it gets so much longer to tell the others
_LAST_WORDS_S = 0.5


def check_communicator(comm: Any, *, channel: str) -> int:
    """The number of ranks of a communicator that can be used here; else CoordinationError."""
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
        remedy="give an open communicator that holds this rank, by default MPI.COMM_WORLD; and "
        "leave mpi4py.rc.thread_level as it is",
    )


@contextmanager
def mpi_coordinator(link: Link, *, channel: str, subject: str) -> Iterator[MpiCoordinator]:
    """The ranks of a link for one operation; collective.

    The link is claimed for it, and released at its end.
    `subject` says what it is about, alike on all ranks. Operations of different channels may
    run at once; those of one channel begin one after another.
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
    """Meet the other ranks; the id of the operation."""
    patience_s = current().arrival_deadline_s
    if not poll(lambda: link.ready() or link.summoned, patience_s):
        patience_s = min(patience_s, _ROLL_CALL_S)
        if not link.rank:
            _send(link, range(1, link.world_size), Message("summons"))
    try:
        if link.rank:
            return _ask(link, channel, subject, patience_s + _ROLL_CALL_S)
        return _let_in(link, channel, subject, patience_s)
    finally:
        link.summoned = False


def _send(link: Link, ranks: Iterable[int], message: Message) -> None:
    for rank in ranks:
        link.send(rank, message)


def _ask(link: Link, channel: str, subject: str, patience_s: float) -> str:
    """Ask rank 0 to let this rank in; the id of the operation."""
    link.pump()
    if link.late.pop(channel, None) == subject:
        raise _too_late(link)
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
            raise _too_late(link)
        link.give_up([0])
        raise rank_failed([0], "begin", f"no call within {current().arrival_deadline_s:g} s")
    verdict, _, text = link.verdicts.pop(nonce).partition(" ")
    if verdict == "late":
        ranks = list(map(int, text.split(",")))
        link.give_up(ranks)
        raise rank_failed(ranks, "begin", "did not call in time")
    if verdict == "other":
        odd, _, theirs = text.partition(" ")
        raise ranks_disagree(int(odd), theirs, subject if int(odd) != link.rank else None)
    return text


def _too_late(link: Link) -> Exception:
    what = "this rank came too late: the others have given up"
    return rank_failed([link.rank], "begin", what)


def _let_in(link: Link, channel: str, subject: str, patience_s: float) -> str:
    """Wait for all ranks to call with this subject; the id of the operation."""

    def all_called() -> bool:
        link.pump()
        return len(link.calls.get(channel, ())) == link.world_size - 1

    poll(all_called, patience_s)
    calls = link.take_calls(channel)
    late = [rank for rank in range(1, link.world_size) if rank not in calls]
    odd = next((rank for rank, (_, theirs) in sorted(calls.items()) if theirs != subject), None)
    identity = uuid.uuid4().hex
    answer = f"go {identity}"
    if late:
        answer = f"late {','.join(map(str, late))}"
    elif odd is not None:
        answer = f"other {odd} {calls[odd][1]}"
    else:
        link.inboxes[identity] = Inbox()
    for rank, (nonce, _) in calls.items():
        link.send(rank, Message("verdict", nonce, text=answer))
    if late:
        link.tell_late(late, channel, subject)
        link.give_up(late)
        raise rank_failed(late, "begin", f"no call within {current().arrival_deadline_s:g} s")
    if odd is not None:
        raise ranks_disagree(odd, calls[odd][1], subject)
    return identity


class MpiCoordinator:
    """See Coordinator."""

    def __init__(self, link: Link, identity: str) -> None:
        self.rank = link.rank
        self.world_size = link.world_size
        self._link = link
        self._identity = identity
        self._inbox = link.inboxes[identity]
        self._partners = [0] if self.rank else list(range(1, self.world_size))
        self._progress = 0
        self._phases = itertools.count()
        self._phase = 0
        self._alone = False
        self._stopped = threading.Event()
        self._pulse = threading.Thread(target=self._keep_beating, daemon=True)
        self._pulse.start()

    def progress(self, amount: int) -> None:
        """See Coordinator.progress."""
        self._progress += 1

    def gather(self, payload: bytes, *, phase: str) -> list[bytes] | None:
        """See Coordinator.gather."""
        self._phase = next(self._phases)
        with mpi_errors(phase):
            if self.rank:
                message = Message("part", self._identity, self._phase, payload=payload)
                self._link.send(0, message)
                return None
            parts = self._wait(phase, "part")
            return [payload, *(parts[rank] for rank in self._partners)]

    def scatter(self, payloads: Sequence[bytes] | None, *, phase: str) -> bytes:
        """See Coordinator.scatter."""
        with mpi_errors(phase):
            if payloads is None:
                return self._wait(phase, "answer")[0]
            for rank in self._partners:
                message = Message("answer", self._identity, self._phase, payload=payloads[rank])
                self._link.send(rank, message, until_taken=True)
            return payloads[0]

    def close(self) -> None:
        """Stop the pulse once the last messages are out, and forget the operation."""
        with suppress(Exception):
            # Nothing drives MPI once this has returned: what is still here would stay here.
            self._link.flush(self._identity, _LAST_WORDS_S if self._alone else current().deadline_s)
        self._stopped.set()
        self._pulse.join(timeout=current().deadline_s)
        self._link.inboxes.pop(self._identity, None)

    def _wait(self, phase: str, kind: str) -> dict[int, bytes]:
        """Every partner's message of this phase; meanwhile look after those still to come."""
        begun = time.monotonic()
        pause, look_at = SHORTEST_WAIT_S, begun + self._interval()
        found: dict[int, bytes] = {}
        missing = list(self._partners)
        while True:
            self._link.pump()
            for rank in missing:
                if (key := (kind, self._phase, rank)) in self._inbox.received:
                    found[rank] = self._inbox.received.pop(key)
            missing = [rank for rank in missing if rank not in found]
            if not missing:
                return found
            self._progress += 1  # waiting has its own deadline: it is no stall
            if self._inbox.given_up:
                ranks = list(map(int, self._inbox.given_up.split(",")))
                self._give_up(ranks, phase, "rank 0 has given them up")
            if time.monotonic() >= look_at:
                self._look_after(missing, phase, begun)
                look_at = time.monotonic() + self._interval()
            time.sleep(pause)
            pause = next_wait(pause)

    def _look_after(self, ranks: list[int], phase: str, begun: float) -> None:
        now = time.monotonic()
        heard, progress = self._inbox.heard, self._inbox.progress
        silent = [r for r in ranks if now - max(begun, heard.get(r, begun)) > current().deadline_s]
        stalled = [
            rank
            for rank in ranks
            if now - max(begun, progress.get(rank, (0, begun))[1]) > current().stall_deadline_s
        ]
        for failed, what in (
            (silent, f"no sign of life for {current().deadline_s:g} s: dead, stopped or cut off"),
            (stalled, f"alive, but no progress for {current().stall_deadline_s:g} s"),
        ):
            if failed:
                if not self.rank:
                    told = Message("given-up", self._identity, text=",".join(map(str, failed)))
                    _send(self._link, self._partners, told)
                self._give_up(failed, phase, what)

    def _give_up(self, ranks: list[int], phase: str, what: str) -> None:
        self._alone = True
        self._link.give_up([rank for rank in ranks if rank != self.rank])
        raise rank_failed(ranks, phase, what)

    def _interval(self) -> float:
        return min(current().deadline_s / 5, 1.0)

    def _keep_beating(self) -> None:
        while not self._stopped.wait(self._interval()):
            with suppress(Exception):  # the working thread finds out by itself
                _send(self._link, self._partners, Message("beat", self._identity, self._progress))
                self._link.pump()
