"""A proxy before a real object server, whose answers fail: what tests/faults/stores.py does to the
requests of our code, this does to those of the client library, with multipart uploads.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import itertools
import os
import random
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock
from urllib.parse import urlsplit

import torch

import shardckpt
from shardckpt.errors import CheckpointNotFoundError, NotACheckpointError, ShardckptError
from shardckpt.storage import object_store
from shardckpt.storage.resolve import resolve

KINDS = (
    "503",  # SlowDown: nothing is done
    "500",
    "409",  # another request for the same key is under way
    "412",  # a condition does not hold, although it does
    "reset",  # the connection is closed, and nothing is done
    "late",  # it is done, and the connection is closed
    "twice",  # it is done twice
    "cut",  # half of the body
    "stale",  # the answer that the same request got before
    "torn",  # the last request of a multipart upload answers 200 with an error, and nothing is done
)
KILLS = ("killed", "killed late")
"""The process that asks is killed: and nothing is done, or when it is done."""

ELEMENTS = 2_400_000  # 9.6 MB: a multipart upload of two parts
Answer = tuple[int, list[tuple[str, str]], bytes]


class Proxy(http.server.ThreadingHTTPServer):
    """Forwards requests, of which number `at` fails in one way, or all from there on."""

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(endpoint).netloc
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.Lock()
        self.seen: Counter[str] = Counter()
        self.running = 0
        self.kill: Callable[[], None] = lambda: None
        self.answers: dict[tuple[str, str], Answer] = {}
        self.restart()

    def restart(self) -> None:
        """Begin to count anew; no request fails."""
        self.kind, self.at, self.for_ever, self.requests = "", -1, False, 0

    def fault(self) -> str:
        """The way in which the next request fails, if it does."""
        with self.lock:
            number, self.requests = self.requests, self.requests + 1
            fails = number == self.at or (self.for_ever and number > self.at >= 0)
            self.seen[self.kind] += fails
            return self.kind if fails else ""

    @contextlib.contextmanager
    def one_more(self) -> Iterator[None]:
        """Count the requests that are under way."""
        with self.lock:
            self.running += 1
        try:
            yield
        finally:
            with self.lock:
                self.running -= 1


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Write nothing."""

    def handle_one_request(self) -> None:
        with contextlib.suppress(OSError):
            super().handle_one_request()

    def do(self) -> None:
        with self.server.one_more():
            self.respond()

    def respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        conditional = "if-match" in self.headers or "if-none-match" in self.headers
        completes = self.command == "POST" and "uploadId=" in self.path
        fault = self.server.fault() if completes or self.server.kind != "torn" else ""
        if fault in ("409", "412") and not conditional:
            fault = "503"
        if fault in ("503", "500", "409", "412"):
            code = {"503": "SlowDown", "409": "ConditionalRequestConflict"}.get(fault, "Failed")
            return self.answer(int(fault), [], f"<Error><Code>{code}</Code></Error>".encode())
        if fault == "torn":
            return self.answer(200, [], b"<Error><Code>InternalError</Code></Error>")
        if fault == "killed":
            self.server.kill()
        if fault in ("reset", "killed"):
            self.close_connection = True
            return None
        before = self.server.answers.get((self.command, self.path))
        found = self.forward(body)
        if fault == "twice":
            found = self.forward(body)
        self.server.answers[self.command, self.path] = found
        if fault == "killed late":
            self.server.kill()
        if fault in ("late", "killed late"):
            self.close_connection = True
            return None
        # A get that finds nothing although there is something breaks what a store must promise.
        if fault == "stale" and before is not None and self.command == "GET" and before[0] == 200:
            found = before
        return self.answer(*found, cut=fault == "cut")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do

    def forward(self, body: bytes) -> Answer:
        connection = http.client.HTTPConnection(self.server.target, timeout=30)
        with contextlib.closing(connection):
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            response = connection.getresponse()
            hidden = ("transfer-encoding", "connection", "date", "server")
            headers = [one for one in response.getheaders() if one[0].lower() not in hidden]
            return response.status, headers, response.read()

    def answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, text in headers:
            self.send_header(name, text)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut and body:
            self.close_connection = True


@contextlib.contextmanager
def proxy(variables: dict[str, str]) -> Iterator[Proxy]:
    """A proxy before the S3 server of these variables, which this process then uses."""
    server = Proxy(variables["AWS_ENDPOINT_URL"])
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        with (
            mock.patch.dict(os.environ, {**variables, "AWS_ENDPOINT_URL": server.url}),
            mock.patch.object(object_store, "_FIRST_WAIT_S", 0.01),
        ):
            yield server
    finally:
        server.shutdown()
        server.server_close()


def state_of(version: int) -> dict[str, object]:
    return {"w": torch.full((ELEMENTS,), float(version)), "version": version}


def found(url: str) -> int | None:
    """The version at a path. Raises for a checkpoint in part."""
    try:
        state = shardckpt.load_state(url)
    except (CheckpointNotFoundError, NotACheckpointError):
        return None
    assert state["w"].eq(state["version"]).all()
    assert state["w"].numel() == ELEMENTS
    return int(state["version"])


def creates(url: str) -> None:
    shardckpt.save(state_of(2), f"{url}/b")


def replaces(url: str) -> None:
    shardckpt.save(state_of(2), f"{url}/a", overwrite=True)


def loads(url: str) -> None:
    assert shardckpt.load_state(f"{url}/a")["version"] == 1


def removes(url: str) -> None:
    resolve(f"{url}/a").storage.remove(f"{url}/a")


OPERATIONS = {
    # operation: the path that changes, what an error may leave there, what a success leaves
    creates: ("b", {None, 2}, 2),
    replaces: ("a", {1, 2}, 2),
    loads: ("a", {1}, 1),
    removes: ("a", {1, None}, None),
}


def fail(server: Proxy, operation, kind: str, at: int, *, for_ever: bool) -> bool:
    """One trial; whether the operation made so many requests."""
    server.restart()
    url = f"s3://tests/{uuid.uuid4().hex}"
    shardckpt.save(state_of(1), f"{url}/a")
    before = server.seen.total()
    server.requests, server.kind, server.at, server.for_ever = 0, kind, at, for_ever
    done = True
    try:
        # Only what meets the faults gives up early: a busy server may answer 500 for a while.
        with shardckpt.options(store_deadline_s=0.5, shared_deadline_s=0.5):
            operation(url)
    except ShardckptError:
        done = False
    server.restart()
    what = f"{operation.__name__}, request {at} {kind}{' for ever' if for_ever else ''}"
    path, outcomes, success = OPERATIONS[operation]
    now = found(f"{url}/{path}")
    assert now in outcomes, f"{what}: {now}"
    assert not done or now == success, f"{what}: {now} after success"
    assert path == "a" or found(f"{url}/a") == 1, f"{what}: another checkpoint is lost"
    shardckpt.save(state_of(9), f"{url}/{path}", overwrite=True)
    assert found(f"{url}/{path}") == 9, what
    for name in "ab":
        resolve(url).storage.remove(f"{url}/{name}")
    return server.seen.total() > before


def every_fault(
    variables: dict[str, str], kinds=KINDS, operations=tuple(OPERATIONS), *, step=1, begin=0
) -> Counter[str]:
    """Each kind at each request of each operation, once and for ever; the faults by kind."""
    with proxy(variables) as server:
        for operation, kind, for_ever in itertools.product(operations, kinds, (False, True)):
            for at in itertools.count(begin, step):
                if not fail(server, operation, kind, at, for_ever=for_ever):
                    break
        return server.seen


def trial(seed: int) -> int:
    """For tests.faults.torture: a part of all faults."""
    from tests.object_server import object_server

    with object_server() as variables:
        dice = random.Random(seed)
        return every_fault(variables, step=7, begin=dice.randrange(7)).total()
