"""Ranks that talk through the key-value store of their torch process group.

Not through its collectives: the store needs no group of its own, never meets the training's
traffic, survives a timeout, and shows which rank is missing; docs/adr tells more.

Below the group's name and the channel:

    join/RANK       "nonce subject" of a rank that calls; rank 0 takes it away
    answer/NONCE    the id of the operation that it is let into, or why not
    late/RANK       the subject of a call for which rank 0 has waited in vain

and below the id of an operation, which no other one has:

    beat/RANK       "beats:progress", renewed while the rank takes part
    PHASE/n         how many ranks have sent
    PHASE/s/RANK    what a rank sent
    PHASE/a         rank 0's answer to all, or nothing where each has its own:
    PHASE/a/RANK    rank 0's answer to this rank
    PHASE/broken    set by a rank on which the work of this phase has raised
    given-up        the ranks that rank 0 has given up
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch.distributed as dist

from shardckpt.config import current
from shardckpt.coordination.base import WorkBroken
from shardckpt.coordination.deadlines import poll
from shardckpt.coordination.heartbeat import HeartbeatCoordinator, beat_interval_s
from shardckpt.coordination.rendezvous import decide, follow, never_called, too_late
from shardckpt.coordination.store_connection import Lines
from shardckpt.coordination.store_keys import all_there, batches, get_many, set_many
from shardckpt.errors import RankFailedError, StalledError

__all__ = ["StoreCoordinator", "store_coordinator"]

_ANSWER_S = 2.0
_PIECE_BYTES = 4 << 20  # TCPStore refuses values of more than 8 MiB

# Keys of the last operation that other ranks may still look at when this one has ended it.
_traces: dict[tuple[str, str], list[str]] = {}
# The ranks that may not have read yet that rank 0 has given them up, by prefix.
_unread: dict[str, set[int]] = {}
# By process group.
_lines: weakref.WeakKeyDictionary[Any, Lines] = weakref.WeakKeyDictionary()
os.register_at_fork(after_in_child=_lines.clear)  # whose threads are not there


def store_coordinator(
    group: Any, *, channel: str, subject: str
) -> AbstractContextManager[StoreCoordinator]:
    """The ranks of a process group for one operation. Entering it is collective, and needs the
    group no more.

    `subject` says what it is about, alike on all ranks. Operations of different channels may
    run at once; those of one channel follow each other.
    """
    if group not in _lines:
        _lines[group] = Lines(group.get_group_store().clone)
        weakref.finalize(group, _lines[group].close)
    return _operation(
        _lines[group],
        f"shardckpt/{group.group_name}/{channel}",
        subject,
        rank=dist.get_rank(group),
        world_size=dist.get_world_size(group),
    )


@contextmanager
def _operation(
    lines: Lines, prefix: str, subject: str, *, rank: int, world_size: int
) -> Iterator[StoreCoordinator]:
    with _network("begin"), lines.line() as line:
        store = line.below(prefix)
        if rank:
            identity = _ask(store, subject, rank=rank)
        else:
            unread = _unread.setdefault(prefix, set())
            identity = _let_in(store, subject, unread, world_size=world_size)
    coordinator = StoreCoordinator(lines, f"{prefix}/{identity}", rank=rank, world_size=world_size)
    try:
        yield coordinator
    finally:
        with suppress(Exception):
            store = coordinator.line.below(prefix)
            for old in _traces.pop((prefix, str(rank)), ()):  # all ranks are through with that
                store.delete_key(old)
        coordinator.close()
        _traces[prefix, str(rank)] = [f"{identity}/{key}" for key in coordinator.traces()]


def _ask(store: Any, subject: str, *, rank: int) -> str:
    """Ask rank 0 to let this rank in; the id of the operation."""
    late = f"late/{rank}"
    if store.check([late]):
        missed = store.get(late).decode()
        store.delete_key(late)
        if missed == subject:
            raise too_late(rank)
    nonce = uuid.uuid4().hex
    store.set(f"join/{rank}", f"{nonce} {subject}")
    answer = f"answer/{nonce}"
    try:
        # Rank 0, if it is there, knows who is missing: it gets a little longer to tell.
        if not poll(lambda: bool(store.check([answer])), current().arrival_deadline_s + _ANSWER_S):
            raise never_called([0])
        text = store.get(answer).decode()
    except BaseException:
        store.delete_key(f"join/{rank}")
        raise
    store.delete_key(answer)
    return follow(text, subject, rank=rank)


def _let_in(store: Any, subject: str, unread: set[int], *, world_size: int) -> str:
    """Wait for all ranks to call with this subject; the id of the operation."""
    ranks = range(1, world_size)
    keys = [f"join/{rank}" for rank in ranks]

    def all_called() -> bool:
        return all_there(store, keys) and not any(
            _gave_up_on_this_call(store, rank, unread) for rank in tuple(unread)
        )

    arrived = poll(all_called, current().arrival_deadline_s)
    late = [] if arrived else [rank for rank in ranks if not store.check([f"join/{rank}"])]
    here = [rank for rank in ranks if rank not in set(late)]
    joined = get_many(store, [f"join/{rank}" for rank in here])
    calls = {rank: call.decode().partition(" ") for rank, call in zip(here, joined, strict=True)}
    subjects = {rank: theirs for rank, (_, _, theirs) in calls.items()}
    decision = decide(subjects, subject, world_size=world_size)
    for rank in calls:
        store.delete_key(f"join/{rank}")
    answer = decision.answer.encode()
    set_many(store, {f"answer/{nonce}": answer for nonce, _, _ in calls.values()})
    for rank in decision.late:
        store.set(f"late/{rank}", subject)
    unread.update(decision.late)
    if decision.error is not None:
        raise decision.error
    return decision.identity


def _gave_up_on_this_call(store: Any, rank: int, unread: set[int]) -> bool:
    """Whether a rank came just as rank 0 had given it up, too late to read so: it is told now."""
    unread.discard(rank)
    if not store.check([f"late/{rank}"]):
        return False
    missed = store.get(f"late/{rank}").decode()
    store.delete_key(f"late/{rank}")
    nonce, _, subject = store.get(f"join/{rank}").decode().partition(" ")
    if subject != missed:
        return False
    store.delete_key(f"join/{rank}")
    store.set(f"answer/{nonce}", f"late {rank}")
    return True


@contextmanager
def _network(phase: str) -> Iterator[None]:
    try:
        yield
    except RankFailedError as error:
        error.facts.setdefault("phase", phase)
        raise
    except dist.DistError as error:
        raise RankFailedError(
            "The store of the process group does not answer",
            rank=0,
            phase=phase,
            expected="its server, which lives with rank 0 or the launcher",
            actual=str(error).splitlines()[0],
            remedy="look at the log of rank 0 and of the launcher; nothing was committed",
        ) from error


def _stalled(phase: str) -> StalledError:
    return StalledError(
        "The ranks are alive, but what they do together makes no progress",
        phase=phase,
        expected=f"progress within {current().stall_deadline_s:g} s",
        remedy="look where each rank is: one may wait for another collective; "
        "SHARDCKPT_STALL_DEADLINE_S sets the time",
    )


def _pieces(key: str, payload: bytes) -> dict[str, bytes]:
    """A payload as values that the store takes: the first one says how many there are."""
    cuts = range(0, max(len(payload), 1), _PIECE_BYTES)
    pieces = [payload[at : at + _PIECE_BYTES] for at in cuts]
    pieces[0] = len(pieces).to_bytes(4, "little") + pieces[0]
    return {f"{key}/{at}" if at else key: piece for at, piece in enumerate(pieces)}


class StoreCoordinator(HeartbeatCoordinator):
    """See Coordinator. The keys of this operation lie below `prefix`, which no other one has."""

    def __init__(self, lines: Lines, prefix: str, *, rank: int, world_size: int) -> None:
        super().__init__(rank, world_size)
        self._lines = lines
        self._prefix = prefix
        self._moved = 0.0  # when `progress` was called last
        self._keys: list[str] = []
        self._later: list[str] = []
        self._phases = itertools.count()
        with _network("begin"):
            self.line = lines.take()
            self._store = self.line.below(prefix)
            self._beat(0, self._store)
        self._pulse.start()

    def progress(self, amount: int) -> None:
        """See Coordinator.progress."""
        super().progress(amount)
        self._moved = time.monotonic()

    def gather(self, payload: bytes, *, phase: str) -> list[bytes] | None:
        """See Coordinator.gather."""
        self._phase = f"{next(self._phases)}-{phase}"
        with _network(phase):
            if self.rank:
                self._later += self._put(f"{self._phase}/s/{self.rank}", payload)
                self._store.add(f"{self._phase}/n", 1)
                return None
            others = range(1, self.world_size)
            self._keys.append(f"{self._phase}/n")
            self._wait(phase, lambda: self._count(f"{self._phase}/n") == len(others), self._missing)
            return [payload, *self._get([f"{self._phase}/s/{rank}" for rank in others])]

    def scatter(self, payloads: Sequence[bytes] | None, *, phase: str) -> bytes:
        """See Coordinator.scatter."""
        with _network(phase):
            shared = f"{self._phase}/a"
            if payloads is not None:
                alike = all(payload is payloads[0] for payload in payloads)
                if not alike:
                    ranks = range(1, self.world_size)
                    answers = [_pieces(f"{shared}/{r}", payloads[r]).items() for r in ranks]
                    set_many(self._store, dict(itertools.chain.from_iterable(answers)))
                self._later += self._put(shared, b"+" + payloads[0] if alike else b"")
                return payloads[0]
            self._wait(phase, lambda: bool(self._store.check([shared])), lambda: [0])
            (answer,) = self._get([shared])
            if answer:
                return answer[1:]
            own = f"{shared}/{self.rank}"
            (answer,) = self._get([own])
            self._keys += _pieces(own, answer)
            return answer

    def watch(self, work: Callable[[], None], *, phase: str) -> None:
        """See Coordinator.watch."""
        self._phase = f"{next(self._phases)}-{phase}"
        broken = f"{self._phase}/broken"
        self._later += [] if self.rank else [broken]
        task: Future[None] = Future()
        self._moved = time.monotonic()

        def run() -> None:
            try:
                work()
                task.set_result(None)
            except BaseException as error:
                task.set_exception(error)

        threading.Thread(target=run, daemon=True, name="shardckpt-work").start()

        def ended() -> bool:
            if time.monotonic() - self._moved > current().stall_deadline_s:
                raise _stalled(phase)
            return task.done() or bool(self._store.check([broken]))

        with _network(phase):
            others = list(range(1, self.world_size)) if self.rank == 0 else [0]
            self._wait(phase, ended, lambda: others)
        if not task.done():
            raise WorkBroken
        if task.exception() is not None:
            with suppress(RankFailedError, dist.DistError):
                self._store.set(broken, "")
            task.result()

    def close(self) -> None:
        """Stop the pulse, and remove from the store what nobody reads any more."""
        self._stopped.set()
        # A thread inside the store's C++ code when the interpreter ends would abort the process.
        self._pulse.join(timeout=0 if self.line.hangs else current().deadline_s)
        with suppress(Exception):
            for key in self._keys:
                self._store.delete_key(key)
        self._lines.give_back(self.line)

    def traces(self) -> list[str]:
        """Keys to remove once every rank has ended this operation."""
        return [f"beat/{self.rank}", *self._later, *([] if self.rank else ["given-up"])]

    def _put(self, key: str, payload: bytes) -> list[str]:
        """Set a key, and those of further pieces, which come first; all of them."""
        pieces = _pieces(key, payload)
        for own, piece in reversed(pieces.items()):
            self._store.set(own, piece)
        return list(pieces)

    def _get(self, keys: list[str]) -> list[bytes]:
        """What was put at each of the keys."""
        values = []
        for key, first in zip(keys, get_many(self._store, keys), strict=True):
            more = range(1, int.from_bytes(first[:4], "little"))
            rest = [self._store.get(f"{key}/{index}") for index in more]
            values.append(b"".join([first[4:], *rest]))
        return values

    def _count(self, key: str) -> int:
        return int(self._store.add(key, 0))

    def _given_up(self) -> list[int]:
        if not self._store.check(["given-up"]):
            return []
        return list(map(int, self._store.get("given-up").decode().split(",")))

    def _give_up(self, ranks: list[int]) -> None:
        if not self.rank:
            self._store.set("given-up", ",".join(map(str, ranks)))

    def _missing(self) -> list[int]:
        """The ranks that have not sent yet."""
        sent = [f"{self._phase}/s/{rank}" for rank in range(1, self.world_size)]
        missing = [
            key
            for some in batches(sent)
            if not self._store.check(list(some))
            for key in some
            if not self._store.check([key])
        ]
        return [int(key.rpartition("/")[2]) for key in missing]

    def _signs(self, ranks: Sequence[int]) -> list[tuple[int, int]]:
        keys = [f"beat/{rank}" for rank in ranks]
        if all_there(self._store, keys):
            beats = get_many(self._store, keys)
        else:
            beats = [self._store.get(k) if self._store.check([k]) else b"0:0" for k in keys]
        return [(int(beat), int(progress)) for beat, progress in (b.split(b":") for b in beats)]

    def _beat(self, number: int, store: Any) -> None:
        store.set(f"beat/{self.rank}", f"{number}:{self._progress}")

    def _beat_until_stopped(self) -> None:
        if self._stopped.wait(beat_interval_s()):
            return
        with self._lines.line() as line:
            store = line.below(self._prefix)
            for number in itertools.count(1):
                self._beat(number, store)
                if self._stopped.wait(beat_interval_s()):
                    return
