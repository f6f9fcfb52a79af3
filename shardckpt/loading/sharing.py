"""Blocks that one rank reads and sends to others, over TCP connections of their own.

A rank that needs blocks connects to the rank that has them, proves that it belongs to the load, and
asks for them: one connection for each unit, so that no unit waits for another one. While the blocks
are being read, the answer is a sign of life from time to time. A rank that gets no answer in time
reads the blocks itself.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import socketserver
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from shardckpt.config import current
from shardckpt.format.digests import BLOCK_BYTES
from shardckpt.io.sockets import receive_exactly
from shardckpt.logs import logger
from shardckpt.plan.read_plan import WINDOW_BYTES
from shardckpt.plan.shared_reads import Unit

__all__ = ["TOKEN_BYTES", "Sharing", "TransferError"]

TOKEN_BYTES = 32
_REQUEST = struct.Struct("<IQ")  # the rank that asks, and the tag of the unit
_GONE = (1 << 64) - 1  # in place of a tag: the rank asks for nothing any more
_WAIT, _READY = b"w", b"r"
_CONNECT_S = 10.0
_FAREWELL_S = 5.0  # for all ranks together
_WINDOW_BLOCKS = WINDOW_BYTES // BLOCK_BYTES


class TransferError(Exception):
    """Another rank did not send blocks that this rank can't read."""


class Sharing:
    """The units that this rank reads for others or gets from them, and their transfers.

    It listens from the beginning on, and sends after `begin`.

    Args:
        host: The address to listen on.
        rank: This rank.

    Attributes:
        rank: This rank.
        address: The host and port by which other ranks reach this one.
        received_bytes: The bytes that this rank has received.
        signs_of_life: How often ranks for which this one waits have answered that they still read.
    """

    def __init__(self, host: str, rank: int) -> None:
        self.rank = rank
        self.received_bytes = 0
        self.signs_of_life = 0
        self._server = _Server(host, self._answer)
        self.address = host, int(self._server.server_address[1])
        self._deadline_s = current().deadline_s
        self._units: dict[tuple[int, int], list[Unit]] = defaultdict(list)
        self._wanted: dict[int, set[int]] = defaultdict(set)  # tags by the rank that has them
        self._unreachable: set[int] = set()
        self._addresses: Sequence[tuple[str, int]] = ()
        self._token = b""
        # Guarded by the condition:
        self._changed = threading.Condition()
        self._held: dict[int, memoryview] = {}  # blocks that can be sent, by tag
        self._sending: Counter[int] = Counter()  # the number of transfers by tag
        self._expected: dict[int, set[int]] = {}  # the ranks that have yet to get a unit
        self._gone: set[int] = set()  # ranks that ask for nothing any more
        self._closed = False

    def begin(
        self, units: Sequence[Unit], addresses: Sequence[tuple[str, int]], token: bytes
    ) -> None:
        """Answer the requests of other ranks from now on.

        Args:
            units: All units.
            addresses: The `address` of each rank.
            token: The secret of the ranks of this load.
        """
        self._addresses, self._token = addresses, token
        for unit in units:
            if self.rank in unit.path:
                self._units[unit.shard, unit.first // _WINDOW_BLOCKS].append(unit)
                if (source := unit.source(self.rank)) is not None:
                    self._wanted[source].add(unit.tag)
        self._server.start()

    def windows(self) -> Sequence[tuple[int, int]]:
        """Return the shard and number of each window that has units of this rank."""
        return list(self._units)

    def units(self, shard: int, window: int) -> Sequence[Unit]:
        """Return the units of a window, in the same order on all ranks."""
        return self._units.get((shard, window), ())

    def receive(self, unit: Unit, view: memoryview) -> bool:
        """Fill a view with the blocks of a unit that another rank has.

        Returns:
            Whether they arrived. If not, that rank is not asked again.
        """
        source = unit.source(self.rank)
        assert source is not None, "another rank reads the unit"
        if source in self._unreachable:
            return False
        try:
            with self._ask(source, unit.tag, wait_s=self._deadline_s) as connection:
                sign = memoryview(bytearray(1))
                while receive_exactly(connection, sign) == _WAIT:
                    self.signs_of_life += 1
                    if self._closed:
                        raise ConnectionError("this rank has failed")
                receive_exactly(connection, view)
        except OSError as error:
            self._unreachable.add(source)
            logger.warning("rank %d sends no blocks, which are read instead: %s", source, error)
            return False
        with self._changed:
            self.received_bytes += len(view)
            self._wanted[source].discard(unit.tag)
        return True

    def offer(self, unit: Unit, view: memoryview) -> None:
        """Let the targets of a unit fetch its blocks. They must not change until `withdraw`."""
        with self._changed:
            self._held[unit.tag] = view
            self._expected[unit.tag] = set(unit.targets(self.rank))
            self._changed.notify_all()

    def withdraw(self, unit: Unit) -> None:
        """Wait until the targets have the blocks. One that does not fetch them in time is not
        waited for again."""

        def missing() -> set[int]:
            return self._expected[unit.tag] - self._gone

        with self._changed:
            self._changed.wait_for(lambda: self._closed or not missing(), self._deadline_s)
            self._gone |= missing()
            del self._held[unit.tag]
            self._changed.wait_for(lambda: not self._sending[unit.tag])  # it has a deadline

    def stop(self) -> None:
        """End the transfers, as this rank has failed. Others read for themselves."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """End the transfers, and tell the ranks that still wait for this one."""
        self.stop()
        self._server.close()
        wanted, self._wanted = self._wanted, defaultdict(set)
        give_up_at = time.monotonic() + _FAREWELL_S
        for source, tags in wanted.items():
            left_s = give_up_at - time.monotonic()
            if tags and source not in self._unreachable and left_s > 0:
                with suppress(OSError):  # it need not wait for this rank
                    self._ask(source, _GONE, wait_s=min(1.0, left_s)).close()

    def _ask(self, rank: int, tag: int, *, wait_s: float) -> socket.socket:
        """Connect to a rank, and ask for a unit."""
        connection = socket.create_connection(self._addresses[rank], min(wait_s, _CONNECT_S))
        try:
            connection.settimeout(wait_s)
            challenge = receive_exactly(connection, memoryview(bytearray(TOKEN_BYTES)))
            request = _REQUEST.pack(self.rank, tag)
            connection.sendall(self._proof(challenge, request) + request)
        except BaseException:
            connection.close()
            raise
        return connection

    def _proof(self, challenge: Any, request: Any) -> bytes:
        return hmac.digest(self._token, bytes(challenge) + bytes(request), "sha256")

    def _answer(self, connection: socket.socket) -> None:
        """Answer a request, in a thread of its own."""
        connection.settimeout(self._deadline_s)
        challenge = secrets.token_bytes(TOKEN_BYTES)
        connection.sendall(challenge)
        message = receive_exactly(connection, memoryview(bytearray(TOKEN_BYTES + _REQUEST.size)))
        proof, request = message[:TOKEN_BYTES], message[TOKEN_BYTES:]
        if not hmac.compare_digest(proof, self._proof(challenge, request)):
            logger.warning("a connection that does not belong to this load was refused")
            return
        rank, tag = _REQUEST.unpack(request)
        if tag == _GONE:
            with self._changed:
                self._gone.add(rank)
                self._changed.notify_all()
            return
        while (view := self._begin_to_send(tag)) is None:
            connection.sendall(_WAIT)
        try:
            connection.sendall(_READY)
            connection.sendall(view)
        finally:
            with self._changed:
                self._sending[tag] -= 1
                self._expected[tag].discard(rank)
                self._changed.notify_all()

    def _begin_to_send(self, tag: int) -> memoryview | None:
        """Return the blocks of a unit. None if this rank does not have them soon."""
        with self._changed:
            sign_s = min(1.0, self._deadline_s / 5)
            self._changed.wait_for(lambda: self._closed or tag in self._held, sign_s)
            if self._closed:
                raise ConnectionError("the load has ended")
            if tag in self._held:
                self._sending[tag] += 1
            return self._held.get(tag)


class _Server(socketserver.ThreadingTCPServer):
    """Listens on a free port, and calls a function with each connection, in a thread."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, host: str, answer: Any) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, 0), socketserver.BaseRequestHandler)
        self._answer = answer
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to accept connections."""
        self._thread = threading.Thread(
            target=self.serve_forever, args=(0.01,), daemon=True, name="shardckpt-blocks"
        )
        self._thread.start()

    def close(self) -> None:
        """Accept no more connections."""
        if self._thread is not None:
            self.shutdown()
        self.server_close()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """See socketserver.BaseServer."""
        with suppress(OSError):  # the other rank reads for itself
            self._answer(request)
