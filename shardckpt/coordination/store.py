"""The coordinator of a process group, over the key-value store of the group.

It does not use the collectives of the group: the store needs no group of its own, does not
interfere with the training, survives a timeout, and shows which rank is missing. See docs/adr.

Keys below the name of the group and the channel:

    join/RANK       "nonce subject" of a rank that calls; rank 0 removes it
    answer/NONCE    the answer of rank 0; see rendezvous
    late/RANK       the subject of a call that rank 0 did not receive in time

Keys below the id of an operation, which is unique:

    beat/RANK       "beats:progress", updated while the rank takes part
    PHASE/n         how many ranks have sent
    PHASE/s/RANK    the payload of a rank
    PHASE/a         the answer of rank 0 to all; empty if each rank has its own
    PHASE/a/RANK    the answer of rank 0 to this rank
    PHASE/broken    set by a rank on which the work of this phase raised an error
    given-up        the ranks that rank 0 has given up
"""

from __future__ import annotations

import functools
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
from shardckpt.coordination.store_connection import StoreConnections
from shardckpt.coordination.store_keys import all_there, batches, get_many, set_many
from shardckpt.errors import RankFailedError, StalledError
from shardckpt.torch_compat import clone_store, group_store, store_host

__all__ = ["StoreCoordinator", "store_coordinator"]

_ANSWER_S = 2.0
_PIECE_BYTES = 4 << 20  # TCPStore refuses values of more than 8 MiB

# Keys of the last operation, which other ranks may still read after this one has ended it.
_traces: dict[tuple[str, str], list[str]] = {}
# The ranks that may not know yet that rank 0 has given them up, by prefix.
_unread: dict[str, set[int]] = {}
# The connections of each process group.
_connections: weakref.WeakKeyDictionary[Any, StoreConnections] = weakref.WeakKeyDictionary()
os.register_at_fork(after_in_child=_connections.clear)  # a forked child has none of the threads


def store_coordinator(
    group: Any, *, channel: str, subject: str
) -> AbstractContextManager[StoreCoordinator]:
    """Connect the ranks of a process group for one operation. Entering it is collective.

    Once entered, the group itself is not needed. `subject` describes the operation and is the same
    on all ranks. Operations of different channels may run at the same time. Operations of one
    channel run one after another.
    """
    if group not in _connections:
        _connections[group] = StoreConnections(functools.partial(clone_store, group_store(group)))
        weakref.finalize(group, _connections[group].close)
    return _operation(
        _connections[group],
        f"shardckpt/{group.group_name}/{channel}",
        subject,
        rank=dist.get_rank(group),
        world_size=dist.get_world_size(group),
        host=store_host(group_store(group)),
    )


@contextmanager
def _operation(
    connections: StoreConnections,
    prefix: str,
    subject: str,
    *,
    rank: int,
    world_size: int,
    host: str | None = None,
) -> Iterator[StoreCoordinator]:
    with _network("begin"), connections.connection() as connection:
        store = connection.below(prefix)
        if rank:
            identity = _ask(store, subject, rank=rank)
        else:
            unread = _unread.setdefault(prefix, set())
            identity = _gather_calls(store, subject, unread, world_size=world_size)
    coordinator = StoreCoordinator(
        connections, f"{prefix}/{identity}", rank=rank, world_size=world_size
    )
    coordinator.host = host
    try:
        yield coordinator
    finally:
        with suppress(Exception):
            store = coordinator.connection.below(prefix)
            for old in _traces.pop((prefix, str(rank)), ()):  # no rank reads them any more
                store.delete_key(old)
        coordinator.close()
        _traces[prefix, str(rank)] = [f"{identity}/{key}" for key in coordinator.traces()]


def _ask(store: Any, subject: str, *, rank: int) -> str:
    """Ask rank 0 to take part. Returns the id of the operation."""
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
        # Rank 0 knows which ranks are missing: give it a little longer to answer.
        if not poll(lambda: bool(store.check([answer])), current().arrival_deadline_s + _ANSWER_S):
            raise never_called([0])
        text = store.get(answer).decode()
    except BaseException:
        store.delete_key(f"join/{rank}")
        raise
    store.delete_key(answer)
    return follow(text, subject, rank=rank)


def _gather_calls(store: Any, subject: str, unread: set[int], *, world_size: int) -> str:
    """Wait for all ranks to call with this subject. Returns the id of the operation."""
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
    subjects = {rank: text for rank, (_, _, text) in calls.items()}
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
    """Whether a rank called just after rank 0 had given it up. If so, answer the call."""
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
            expected="an answer of the store, whose server runs in rank 0 or the launcher",
            actual=str(error).splitlines()[0],
            remedy="read the logs of rank 0 and the launcher; nothing was committed",
        ) from error


def _stalled(phase: str) -> StalledError:
    return StalledError(
        "The ranks are alive, but their collective work makes no progress",
        phase=phase,
        expected=f"progress within {current().stall_deadline_s:g} s",
        remedy="check where each rank waits: one may be in another collective; the option "
        "stall_deadline_s sets the time",
    )


def _pieces(key: str, payload: bytes) -> dict[str, bytes]:
    """Split a payload into values that the store accepts. The first has their number."""
    cuts = range(0, max(len(payload), 1), _PIECE_BYTES)
    pieces = [payload[at : at + _PIECE_BYTES] for at in cuts]
    pieces[0] = len(pieces).to_bytes(4, "little") + pieces[0]
    return {f"{key}/{at}" if at else key: piece for at, piece in enumerate(pieces)}


class StoreCoordinator(HeartbeatCoordinator):
    """A Coordinator whose keys are below `prefix`, which is unique to the operation."""

    def __init__(
        self, connections: StoreConnections, prefix: str, *, rank: int, world_size: int
    ) -> None:
        super().__init__(rank, world_size)
        self._connections = connections
        self._prefix = prefix
        self._moved = 0.0  # the time of the last call of `progress`
        self._keys: list[str] = []
        self._later: list[str] = []
        self._phases = itertools.count()
        with _network("begin"):
            self.connection = connections.take()
            self._store = self.connection.below(prefix)
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
            key = f"{shared}/{self.rank}"
            (answer,) = self._get([key])
            self._keys += _pieces(key, answer)
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
        """Stop the heartbeat, and remove keys that no rank reads any more."""
        self._stopped.set()
        # A thread inside the C++ code of the store would abort the process when Python ends.
        self._pulse.join(timeout=0 if self.connection.hangs else current().deadline_s)
        with suppress(Exception):
            for key in self._keys:
                self._store.delete_key(key)
        self._connections.give_back(self.connection)

    def traces(self) -> list[str]:
        """Return the keys to remove when every rank has ended this operation."""
        return [f"beat/{self.rank}", *self._later, *([] if self.rank else ["given-up"])]

    def _put(self, key: str, payload: bytes) -> list[str]:
        """Set a key. Further pieces of its payload are set first. Returns all keys."""
        pieces = _pieces(key, payload)
        for piece_key, piece in reversed(pieces.items()):
            self._store.set(piece_key, piece)
        return list(pieces)

    def _get(self, keys: list[str]) -> list[bytes]:
        """Return the payloads of the keys."""
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
        """Return the ranks that have not sent yet."""
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
        with self._connections.connection() as connection:
            store = connection.below(self._prefix)
            for number in itertools.count(1):
                self._beat(number, store)
                if self._stopped.wait(beat_interval_s()):
                    return
