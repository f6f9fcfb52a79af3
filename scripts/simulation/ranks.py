"""One rank of a save, with the library's own driver; what the others send is made up beforehand."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import msgspec

Others = Callable[[str], list[bytes]]


@dataclass
class Phase:
    """Seconds of processor time and bytes of one exchange, as this rank sees them.

    Planning is one thread that waits for nothing: on a machine that does nothing else these are
    the seconds on the clock.
    """

    name: str
    own_s: float = 0.0  # its own part, before it sends
    decide_s: float = 0.0  # rank 0 alone: with what all ranks have sent
    sent_bytes: int = 0
    received_bytes: int = 0


@dataclass
class Recorder:
    """A Coordinator of one rank; see shardckpt.coordination.base.

    `others(phase)` are the payloads of ranks 1, 2, ... for rank 0; `answers[phase]` what rank 0
    answers another rank. `answered` keeps what rank 0 answered rank `watched`.
    """

    rank: int
    world_size: int
    others: Others = lambda phase: []
    answers: dict[str, bytes] = field(default_factory=dict)
    watched: int = 0
    answered: dict[str, bytes] = field(default_factory=dict)
    phases: list[Phase] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._since = time.process_time()

    def gather(self, payload: bytes, *, phase: str) -> list[bytes] | None:
        """See Coordinator.gather."""
        now = Phase(phase, own_s=time.process_time() - self._since, sent_bytes=len(payload))
        self.phases.append(now)
        if self.rank:
            return None
        payloads = [payload, *(record(other) for other in self.others(phase))]
        now.received_bytes = sum(map(len, payloads[1:]))
        now.sent_bytes = 0
        self._since = time.process_time()
        return payloads

    def scatter(self, payloads: Sequence[bytes] | None, *, phase: str) -> bytes:
        """See Coordinator.scatter."""
        now = self.phases[-1]
        if payloads is None:
            answer = self.answers[phase]
            now.received_bytes = len(answer)
        else:
            now.decide_s = time.process_time() - self._since
            # An answer that is alike for all ranks is in the store once (StoreCoordinator).
            alike = all(other is payloads[0] for other in payloads)
            now.sent_bytes = len(payloads[0]) if alike else sum(map(len, payloads[1:]))
            self.answered[phase] = payloads[self.watched]
            answer = payloads[0]
        self._since = time.process_time()
        return answer

    def progress(self, amount: int) -> None:
        """See Coordinator.progress."""


def record(payload: bytes) -> bytes:
    """A payload as an exchange sends it."""
    return msgspec.msgpack.encode((payload, None))


class Nowhere:
    """A Storage that keeps the manifest alone, and is its own transaction, file and reader."""

    direct = commits_part = False
    path = token = "nowhere"
    tiers: ClassVar[dict[str, str]] = {}

    def __init__(self) -> None:
        self.kept = b""

    def begin(self, path: str, *, checkpoint_id: str, overwrite: bool) -> Nowhere:
        """See Storage.begin."""
        return self

    def join(self, path: str, *, token: str) -> Nowhere:
        """See Storage.join."""
        return self

    join_part = join

    def open(self, path: str) -> Nowhere:
        """See Storage.open."""
        return self

    def create(self, name: str, *, size_bytes: int) -> Nowhere:
        """See WriteTransaction.create."""
        return self

    def write(self, data: memoryview, *, offset: int) -> None:
        """See WritableFile.write."""

    def commit(self, manifest: bytes) -> None:
        """See WriteTransaction.commit."""
        self.kept = manifest

    def manifest(self) -> bytes:
        """See CheckpointFiles.manifest."""
        return self.kept

    def abandon(self) -> None:
        """See WriteTransaction.abandon."""

    def discard(self) -> None:
        """See WritableFile.discard."""

    def close(self, *, size_bytes: int = 0) -> None:
        """See WritableFile.close."""
