"""A process that is killed (SIGKILL) between any two of its requests to a real object server.

The proxy in front of the server (store_proxy) kills it before or after it forwards a request. Then
every acknowledged checkpoint must be complete, no other one may exist in part, the next save must
work, and the leftovers of the killed process must be collected.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import time
import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import shardckpt
from shardckpt.storage import object_store
from shardckpt.storage.object_store import ObjectStorage, ObjectTransaction
from shardckpt.storage.resolve import resolve
from tests.faults.store_proxy import KILLS, Proxy, found, proxy, state_of
from tests.ranks import PRELOAD

_DEADLINE_S = 60.0
Tell = Callable[[int], object]
"""Tells the test that a version was acknowledged."""


def creates(url: str, tell: Tell) -> None:
    shardckpt.save(state_of(2), f"{url}/step-2")
    tell(2)


def replaces(url: str, tell: Tell) -> None:
    shardckpt.save(state_of(2), f"{url}/step-1", overwrite=True)
    tell(2)


def with_base(url: str, tell: Tell) -> None:
    """The store copies the shard."""
    shardckpt.save({**state_of(1), "version": 1}, f"{url}/step-2", base=f"{url}/step-1")
    tell(1)


def prunes(url: str, tell: Tell) -> None:
    """A manager saves, and removes the checkpoint before."""
    keep = [shardckpt.KeepLast(1)]
    manager = shardckpt.CheckpointManager(url, keep=keep, label="job")
    for step in (2, 3):
        manager.save(step, state_of(step))
        tell(step)


def removes(url: str, tell: Tell) -> None:
    resolve(url).storage.remove(f"{url}/step-1")
    tell(0)


def loads(url: str, tell: Tell) -> None:
    assert shardckpt.load_state(f"{url}/step-1")["version"] == 1
    tell(1)


Found = tuple[int | None, int | None, int | None]
"""The versions at step-1, step-2 and step-3."""

OUTCOMES: dict[Callable[[str, Tell], None], list[list[Found]]] = {
    creates: [[(1, None, None), (1, 2, None)], [(1, 2, None)]],
    replaces: [[(1, None, None), (2, None, None)], [(2, None, None)]],
    with_base: [[(1, None, None), (1, 1, None)], [(1, 1, None)]],
    prunes: [
        [(1, None, None), (1, 2, None), (None, 2, None)],
        [(None, 2, None), (None, 2, 3), (None, None, 3)],
        [(None, None, 3)],
    ],
    removes: [[(1, None, None), (None, None, None)], [(None, None, None)]],
    loads: [[(1, None, None)], [(1, None, None)]],
}
"""The versions that a kill may leave, by the number of versions acknowledged before."""


def _work(variables: dict[str, str], operation: str, url: str, plant: str, told: Any) -> None:
    """The process that is killed."""
    os.environ.update(variables)
    if plant:
        PLANTED[plant]()
    globals()[operation](url, told.send)


def _die(child: Any) -> None:
    """Kill a process, and wait until it is dead."""
    child.kill()
    status = Path(f"/proc/{child.pid}/stat")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while status.read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.001)


def kill_at(
    server: Proxy, operation: Callable[[str, Tell], None], kind: str, at: int, *, plant: str = ""
) -> bool:
    """One trial: the process is killed at its request number `at`; whether it made so many."""
    server.restart()
    url = f"s3://tests/{uuid.uuid4().hex}"
    shardckpt.CheckpointManager(url, label="job").save(1, state_of(1))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "obstore", __name__])
    hears, told = context.Pipe(duplex=False)
    variables = {name: text for name, text in os.environ.items() if name.startswith("AWS_")}
    child = context.Process(target=_work, args=(variables, operation.__name__, url, plant, told))
    child.start()
    told.close()
    server.kill = lambda: _die(child)
    before = server.seen.total()
    server.requests, server.kind, server.at = 0, kind, at
    child.join(_DEADLINE_S)
    assert child.exitcode is not None, "it hangs"
    killed = server.seen.total() > before
    what = f"{operation.__name__}, {kind} at request {at}"
    assert child.exitcode == (-9 if killed else 0), f"{what}: exit code {child.exitcode}"
    server.restart()
    while server.running:  # requests that were under way are carried out
        time.sleep(0.01)
    acknowledged = []
    with contextlib.suppress(EOFError):
        while True:
            acknowledged.append(hears.recv())
    check(url, operation, acknowledged, what)
    return killed


def check(
    url: str, operation: Callable[[str, Tell], None], acknowledged: list[int], what: str
) -> None:
    """Look at the store after a kill."""
    now = tuple(found(f"{url}/step-{step}") for step in (1, 2, 3))
    allowed = OUTCOMES[operation][len(acknowledged)]
    assert now in allowed, f"{what}: {now} after {acknowledged} was acknowledged"
    for step in (1, 2, 3):
        shardckpt.save({"next": torch.ones(3)}, f"{url}/step-{step}", overwrite=True)
        assert shardckpt.load_state(f"{url}/step-{step}")["next"].sum() == 3, what
    storage = resolve(url).storage
    assert isinstance(storage, ObjectStorage)
    later = types.SimpleNamespace(**{**vars(time), "time": lambda: time.time() + 1e7})
    with mock.patch.object(object_store, "time", later):
        storage.sweep(url)
    objects, prefix = storage.at(url)
    keys = [one.key.removeprefix(prefix) for one in objects.list(prefix)]
    assert len(keys) == 6, f"{what}: leftovers: {keys}"
    objects.delete([prefix + key for key in keys])


def every_kill(
    variables: dict[str, str],
    operations=tuple(OUTCOMES),
    kinds=KILLS,
    *,
    step: int = 1,
    begin: int = 0,
    plant: str = "",
) -> int:
    """A kill at each request of each operation; how many."""
    kills = 0
    with proxy(variables) as server:
        for operation, kind in itertools.product(operations, kinds):
            for at in itertools.count(begin, step):
                if not kill_at(server, operation, kind, at, plant=plant):
                    break
                kills += 1
    return kills


def _shards_before_the_commit() -> None:
    """The shards that a save replaces are deleted first."""
    commit = ObjectTransaction.commit

    def early(self: ObjectTransaction, manifest: bytes) -> None:
        if self.old is not None:
            object_store._delete_shards(self._objects, self._prefix, self.old)
        commit(self, manifest)

    ObjectTransaction.commit = early  # type: ignore[method-assign]


def _shards_before_the_manifest() -> None:
    """A removal deletes the shards first."""
    remove = ObjectStorage.remove

    def shards_first(self: ObjectStorage, path: str) -> None:
        objects, prefix = self.at(path)
        text, _ = object_store._get(objects, f"{prefix}manifest.json")
        if text is not None:
            object_store._delete_shards(objects, prefix, text)
        remove(self, path)

    ObjectStorage.remove = shards_first  # type: ignore[method-assign]


PLANTED = {"commit": _shards_before_the_commit, "remove": _shards_before_the_manifest}


def trial(seed: int) -> int:
    """For tests.faults.torture: a part of all kills."""
    from tests.object_server import object_server

    with object_server() as variables:
        dice = random.Random(seed)
        return every_kill(variables, step=5, begin=dice.randrange(5))
