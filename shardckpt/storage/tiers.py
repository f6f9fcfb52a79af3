"""Checkpoints in two or more places: a save returns when the first one, the fastest, has it.

A thread of the process that committed copies the checkpoint to the other tiers, repeats what fails,
and removes there what a manager removes. It never blocks or ends a save. A process that starts
again copies what an earlier one has not.

The path of a tiered checkpoint is `tiers://A/step-7,s3://bucket/B/step-7`: its paths in all tiers.
"""

from __future__ import annotations

import atexit
import functools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

from shardckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptionError,
    NotACheckpointError,
    ShardckptError,
    StateError,
    StorageError,
)
from shardckpt.format.manifest import check_text
from shardckpt.logs import logger
from shardckpt.storage.base import (
    CheckpointFiles,
    OnFilled,
    Storage,
    WouldWait,
    WritableFile,
    WriteTransaction,
)
from shardckpt.storage.copying import copy_checkpoint, id_in
from shardckpt.storage.resolve import Location, resolve

__all__ = ["TieredStorage", "open_url"]

_SCHEME = "tiers://"
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 60.0
_BROKEN = (CheckpointError, StorageError)


class TieredStorage(Storage):
    """Checkpoints in a fast place, from where they are copied to slower ones in the background.

    A save returns when the first tier has the checkpoint. A load takes each block from the first
    tier that has it intact. All ranks must see the first tier: one machine, or a shared file
    system.

    Args:
        *tiers: The folders of the tiers, the fastest first: paths, URLs, or storages with a root.
        keep_fast: The number of checkpoints in the first tier, apart from those that are not
            copied yet. The oldest are removed from it once the other tiers have them. None keeps
            all. Policies of a CheckpointManager remove from all tiers.

    Raises:
        StateError: There are fewer than two tiers, or `keep_fast` is below 1.

    Example:
        >>> import torch, shardckpt
        >>> tiers = shardckpt.TieredStorage("run", "memory://bucket/run")
        >>> report = shardckpt.save({"weight": torch.ones(3)}, "step-1", storage=tiers)
        >>> tiers.wait()
        >>> list(tiers.tiers("step-1").values())
        ['durable', 'durable']
        >>> with shardckpt.CheckpointManager(tiers) as manager:
        ...     _ = manager.save(2, {"weight": torch.ones(3)})
    """

    def __init__(self, *tiers: Any, keep_fast: int | None = None) -> None:
        if len(tiers) < 2 or (keep_fast is not None and keep_fast < 1):
            raise StateError(
                "Invalid arguments of a TieredStorage",
                expected="two or more tiers, and keep_fast of at least 1",
                actual=f"{len(tiers)} tiers, keep_fast={keep_fast!r}",
            )
        self._roots = [resolve(tier, fixed=True) for tier in tiers]
        self._keep_fast = keep_fast
        self._drain = _Drain()
        self._resumed: set[str] = set()
        self._slow_names: dict[str, set[str]] = {}
        self._listed: set[str] = set()

    def full_path(self, path: str) -> str:
        """See Storage.full_path. A path without `tiers://` is below the folders of the tiers."""
        if path.startswith(_SCHEME):
            return path
        parts = [part for part in path.split("/") if part]
        if path.startswith("/") or any(part in (".", "..") for part in parts):
            raise StateError(
                "Invalid path of a tiered checkpoint",
                expected="a path below the folders of the tiers, such as step-7",
                actual=repr(path),
            )
        places = self._roots
        for part in parts:
            places = [Location(s, s.child(p, part)) for s, p in places]
        return _joined(places)

    def child(self, folder: str, name: str) -> str:
        """See Storage.child."""
        return _joined([Location(s, s.child(p, name)) for s, p in self._places(folder)])

    def _places(self, path: str) -> list[Location]:
        """The path in each tier."""
        texts = self.full_path(path).removeprefix(_SCHEME).split(",")
        if len(texts) != len(self._roots):
            raise StateError(
                "This path has another number of tiers",
                path=path,
                expected=f"{len(self._roots)} paths, separated by commas",
                actual=f"{len(texts)}",
            )
        pairs = zip(self._roots, texts, strict=True)
        return [Location(root.storage, unquote(text)) for root, text in pairs]

    def open(self, path: str) -> TieredFiles:
        """See Storage.open. The checkpoint is that of the first tier with an intact manifest."""
        path = self.full_path(path)
        errors: list[ShardckptError] = []
        for number, place in enumerate(places := self._places(path)):
            try:
                files = place.storage.open(place.path)
            except _BROKEN as error:
                errors.append(error)
                continue
            try:
                text = files.manifest()
                check_text(text, path=files.path)
            except _BROKEN as error:
                files.close()
                errors.append(error)
                continue
            return TieredFiles(path, text, places[number:], first=files)
        # A damaged tier tells more than one where the checkpoint is missing.
        raise next((e for e in errors if not isinstance(e, CheckpointNotFoundError)), errors[0])

    def begin(self, path: str, *, checkpoint_id: str, overwrite: bool) -> WriteTransaction:
        """See Storage.begin. Only the first tier is asked."""
        path = self.full_path(path)
        place = self._places(path)[0]
        transaction = place.storage.begin(
            place.path, checkpoint_id=checkpoint_id, overwrite=overwrite
        )
        return _TieredTransaction(path, transaction, lambda: self._copy_later(path))

    def join(self, path: str, *, token: str) -> WriteTransaction:
        """See Storage.join."""
        path = self.full_path(path)
        place = self._places(path)[0]
        return _TieredTransaction(path, place.storage.join(place.path, token=token), lambda: None)

    def _copy_later(self, path: str) -> None:
        fast, *slower = self._places(path)

        def copy(place: Location) -> None:
            _copy(fast, place)
            folder, _, name = place.path.rpartition("/")
            self._slow_names.setdefault(folder, set()).add(name)

        for number, place in enumerate(slower, start=1):
            self._drain.add((path, number), functools.partial(copy, place))
        if self._keep_fast is not None:
            self._drain.add((path, "keep_fast"), lambda: self._thin_out(fast))

    def _thin_out(self, newest: Location) -> None:
        """Remove from the first tier what the others have, beyond `keep_fast`."""
        assert self._keep_fast is not None
        storage, path = newest
        folder = path.rpartition("/")[0]
        aged = []
        for name in storage.names(folder):
            with suppress(*_BROKEN):
                files = storage.open(storage.child(folder, name))
                text = files.manifest()
                files.close()
                created = text[:1000].partition(b'"created":"')[2][:25]
                aged.append((created, name, id_in(text)))
        aged.sort()
        for _, name, identity in aged[: -self._keep_fast]:
            places = self._places(self.full_path(name)) if folder == self._roots[0].path else []
            if places and all(_holds(place, identity) for place in places[1:]):
                storage.remove(storage.child(folder, name))

    def names(self, folder: str) -> list[str]:
        """See Storage.names: the names in all tiers. The slower tiers are listed once."""
        fast, *slower = self._places(folder)
        found = set(fast.storage.names(fast.path))
        for storage, path in slower:
            if path not in self._listed:
                with suppress(StorageError):  # a store that is down has none for now
                    self._slow_names.setdefault(path, set()).update(storage.names(path))
                    self._listed.add(path)
            found |= self._slow_names.get(path, set())
        return sorted(found)

    def exists(self, path: str) -> bool:
        """See Storage.exists. Only the first tier is asked."""
        fast = self._places(path)[0]
        return fast.storage.exists(fast.path)

    def version(self, path: str) -> Hashable:
        """See Storage.version: that of the first tier with a checkpoint at the path."""
        errors = []
        for number, (storage, where) in enumerate(self._places(path)):
            try:
                return number, storage.version(where)
            except _BROKEN as error:
                errors.append(error)
        raise errors[0]

    def remove(self, path: str) -> None:
        """See Storage.remove. In the first tier now, in the others in the background."""
        path = self.full_path(path)
        fast, *slower = self._places(path)
        self._drain.forget(path)
        if fast.storage.exists(fast.path):
            fast.storage.remove(fast.path)
        for number, (storage, where) in enumerate(slower, start=1):
            folder, _, name = where.rpartition("/")
            self._slow_names.get(folder, set()).discard(name)
            self._drain.add((path, number), functools.partial(storage.remove, where))

    def sweep(self, folder: str) -> None:
        """See Storage.sweep. Copies that an earlier process left are made now."""
        folder = self.full_path(folder)
        fast, *slower = self._places(folder)
        fast.storage.sweep(fast.path)
        for storage, path in slower:
            self._drain.add((folder, path), functools.partial(storage.sweep, path))
        if folder not in self._resumed:
            self._resumed.add(folder)
            self.resume(folder)

    def resume(self, folder: str = "") -> None:
        """Copy the checkpoints of a folder that the slower tiers lack. Not collective.

        A CheckpointManager calls it with its first save.

        Args:
            folder: The folder; by default that of the tiers.
        """
        fast = self._places(folder)[0]
        for name in fast.storage.names(fast.path):
            path = self.child(self.full_path(folder), name)
            with suppress(*_BROKEN):
                first = self._places(path)[0]
                first.storage.version(first.path)
                self._copy_later(path)

    def tiers(self, path: str) -> dict[str, str]:
        """See Storage.tiers."""
        path = self.full_path(path)
        found: dict[str, str] = {}
        for number, (storage, where) in enumerate(self._places(path)):
            if self._drain.waits((path, number)):
                found[where] = "pending"
                continue
            try:
                storage.version(where)
                found[where] = "durable"
            except _BROKEN:
                found[where] = "missing"
        return found

    def wait_for_tier(self, path: str, tier: int, timeout: float | None = None) -> None:
        """See Storage.wait_for_tier."""
        if not 0 <= tier < len(self._roots):
            raise StateError(
                "There is no such tier",
                expected=f"a number from 0 to {len(self._roots) - 1}",
                actual=repr(tier),
            )
        self._drain.wait((self.full_path(path), tier) if tier else None, timeout)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until all tiers hold all checkpoints that this process has saved. Not collective.

        Args:
            timeout: Seconds to wait; None waits without a limit.

        Raises:
            TimeoutError: Copies are left.
        """
        self._drain.wait_all(timeout)


class _TieredTransaction(WriteTransaction):
    """A transaction in the first tier."""

    def __init__(self, path: str, fast: WriteTransaction, committed: Callable[[], None]) -> None:
        self.path, self.token = path, fast.token
        self.shares_files, self.resumes = fast.shares_files, fast.resumes
        self._fast, self._committed = fast, committed

    def create(self, name: str, *, size_bytes: int, shared: bool = False) -> WritableFile:
        """See WriteTransaction.create."""
        return self._fast.create(name, size_bytes=size_bytes, shared=shared)

    def has(self, name: str, *, size_bytes: int) -> bool:
        """See WriteTransaction.has."""
        return self._fast.has(name, size_bytes=size_bytes)

    def link(self, name: str, source: CheckpointFiles) -> bool:
        """See WriteTransaction.link."""
        if isinstance(source, TieredFiles):
            source = source.nearest
        return self._fast.link(name, source)

    def commit(self, manifest: bytes) -> None:
        """See WriteTransaction.commit."""
        self._fast.commit(manifest)
        self._committed()

    def abandon(self) -> None:
        """See WriteTransaction.abandon."""
        self._fast.abandon()

    def close(self) -> None:
        """See WriteTransaction.close."""
        self._fast.close()


class TieredFiles(CheckpointFiles):
    """A checkpoint in several tiers, of which the first has an intact manifest."""

    def __init__(
        self,
        path: str,
        manifest: bytes,
        places: Sequence[Location],
        *,
        first: CheckpointFiles | None,
    ) -> None:
        self.path = path
        self._manifest = manifest
        self._places = places
        identity = id_in(manifest)
        self._tiers = [_TierFiles(place, identity) for place in places]
        self._tiers[0].opened = first

    @property
    def nearest(self) -> CheckpointFiles:
        """The files of the first tier."""
        return self._tiers[0].files()

    def manifest(self) -> bytes:
        """See CheckpointFiles.manifest."""
        return self._manifest

    def _first(self, call: Callable[[CheckpointFiles], Any]) -> Any:
        """The result of a call in the first tier where it succeeds."""
        errors: list[ShardckptError] = []
        for tier in self._tiers:
            try:
                return call(tier.files())
            except _BROKEN as error:
                errors.append(error)
        raise errors[0]

    def size_bytes(self, name: str) -> int:
        """See CheckpointFiles.size_bytes: the largest, since a shard may be truncated in a tier."""
        size: int = self._first(lambda files: files.size_bytes(name))
        return size

    def read(self, name: str, buffer: memoryview, *, offset: int) -> None:
        """See CheckpointFiles.read."""
        self._first(lambda files: files.read(name, buffer, offset=offset))

    def readinto(
        self,
        name: str,
        buffers: Sequence[memoryview],
        *,
        offset: int,
        on_filled: OnFilled = lambda buffer: None,
        wait: bool = True,
    ) -> None:
        """See CheckpointFiles.readinto."""
        if not wait:
            raise WouldWait(name)
        self._first(lambda files: files.readinto(name, buffers, offset=offset))
        for buffer in buffers:
            on_filled(buffer)

    def map(self, name: str) -> memoryview:
        """See CheckpointFiles.map."""
        mapped: memoryview = self._first(lambda files: files.map(name))
        return mapped

    def names(self) -> list[str]:
        """See CheckpointFiles.names."""
        return self.nearest.names()

    def copies(self) -> Sequence[CheckpointFiles]:
        """See CheckpointFiles.copies."""
        return self._tiers

    def bytes_read(self) -> dict[str, int]:
        """See CheckpointFiles.bytes_read."""
        return {tier.path: tier.verified_bytes for tier in self._tiers if tier.verified_bytes}

    def duplicate(self) -> TieredFiles:
        """See CheckpointFiles.duplicate."""
        return TieredFiles(self.path, self._manifest, self._places, first=None)

    def close(self) -> None:
        """See CheckpointFiles.close."""
        for tier in self._tiers:
            tier.close()


class _TierFiles(CheckpointFiles):
    """The files of one tier, opened when they are first needed."""

    def __init__(self, place: Location, identity: str) -> None:
        self.path = place.path
        self.opened: CheckpointFiles | None = None
        self.verified_bytes = 0
        self._place, self._identity = place, identity
        self._lock = threading.Lock()

    def files(self) -> CheckpointFiles:
        """The files. Raises CheckpointError if this tier has another checkpoint, or none."""
        with self._lock:
            if self.opened is None:
                opened = self._place.storage.open(self.path)
                try:
                    text = opened.manifest()
                    check_text(text, path=self.path)
                    if id_in(text) != self._identity:
                        raise CorruptionError(
                            "This tier has another checkpoint",
                            path=self.path,
                            expected=self._identity,
                            actual=id_in(text),
                            remedy="wait until it is copied",
                        )
                except BaseException:
                    opened.close()
                    raise
                self.opened = opened
            return self.opened

    def count_verified(self, size_bytes: int) -> None:
        """See CheckpointFiles.count_verified."""
        with self._lock:
            self.verified_bytes += size_bytes

    def manifest(self) -> bytes:
        """See CheckpointFiles.manifest."""
        return self.files().manifest()

    def size_bytes(self, name: str) -> int:
        """See CheckpointFiles.size_bytes."""
        return self.files().size_bytes(name)

    def read(self, name: str, buffer: memoryview, *, offset: int) -> None:
        """See CheckpointFiles.read."""
        self.files().read(name, buffer, offset=offset)

    def close(self) -> None:
        """See CheckpointFiles.close."""
        with self._lock:
            opened, self.opened = self.opened, None
        if opened is not None:
            opened.close()


class _Drain:
    """A thread that works through tasks, and repeats those that fail.

    It ends when nothing is left. At the end of the program it finishes what can be done, and gives
    up what fails.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tasks: deque[tuple[Hashable, Callable[[], None]]] = deque()
        self._running: Hashable = None
        self._thread: threading.Thread | None = None
        self._ending = False
        _drains.add(self)

    def finish(self) -> None:
        """Wait until what can be done is done, and give up what fails."""
        self._ending = True
        self.wait_all(None)

    def add(self, key: Hashable, task: Callable[[], None]) -> None:
        """Queue a task. A task with the same key that has not begun is replaced."""
        with self._changed:
            self._tasks = deque(one for one in self._tasks if one[0] != key)
            self._tasks.append((key, task))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="shardckpt-drain")
                self._thread.start()
            self._changed.notify_all()

    def forget(self, path: str) -> None:
        """Drop the tasks of a path that have not begun."""
        with self._changed:
            self._tasks = deque(
                one for one in self._tasks if not isinstance(one[0], tuple) or one[0][0] != path
            )
            self._changed.notify_all()

    def waits(self, key: Hashable) -> bool:
        """Whether a task has not ended."""
        with self._changed:
            return self._waits(key)

    def _waits(self, key: Hashable) -> bool:
        return key is not None and (
            key == self._running or any(one[0] == key for one in self._tasks)
        )

    def wait(self, key: Hashable, timeout: float | None) -> None:
        """Wait until a task has ended."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._waits(key), timeout):
                raise TimeoutError(f"{key} is not copied after {timeout} s")

    def wait_all(self, timeout: float | None) -> None:
        """Wait until nothing is left."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._thread is None, timeout):
                raise TimeoutError(f"{len(self._tasks)} tasks are left after {timeout} s")

    def _work(self) -> None:
        wait_s = _FIRST_WAIT_S
        while True:
            with self._changed:
                if not self._tasks:
                    self._thread = None
                    self._changed.notify_all()
                    return
                self._running, task = self._tasks.popleft()
            key = self._running
            try:
                task()
                failed, wait_s = False, _FIRST_WAIT_S
            except NotACheckpointError as error:
                logger.warning("%s is not copied: %s", key, error)
                failed = False
            except Exception as error:
                # Whatever it is, training goes on.
                logger.warning("%s: tried again in %g s: %s", key, wait_s, error)
                failed = not isinstance(error, CheckpointError)
            with self._changed:
                self._running = None
                if failed and not any(one[0] == key for one in self._tasks):
                    self._tasks.append((key, task))
                self._changed.notify_all()
            if failed and not self._pause(wait_s):
                return
            if failed:
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _pause(self, wait_s: float) -> bool:
        """Wait before the next attempt. False at the end of the program."""
        give_up_at = time.monotonic() + wait_s
        while time.monotonic() < give_up_at and not self._ending:
            time.sleep(min(0.1, wait_s))
        if self._ending:
            with self._changed:
                self._thread = None
                self._changed.notify_all()
        return not self._ending


_drains: weakref.WeakSet[_Drain] = weakref.WeakSet()


def _at_exit() -> None:
    for drain in list(_drains):
        drain.finish()


# Before the executors of this process refuse work, which is before atexit. Private; tried with
# Python 3.11.
getattr(threading, "_register_atexit", atexit.register)(_at_exit)


def _copy(source: Location, target: Location) -> None:
    """Copy a checkpoint, unless the target has it, or the source has gone."""
    try:
        files = source.storage.open(source.path)
    except CheckpointNotFoundError:
        return
    try:
        text = files.manifest()
        check_text(text, path=files.path)
        if not _holds(target, id_in(text)):
            copy_checkpoint(files, target.storage, target.path, overwrite=True)
    finally:
        files.close()


def _holds(place: Location, identity: str) -> bool:
    """Whether a place has the checkpoint of an id."""
    try:
        files = place.storage.open(place.path)
    except CheckpointError:
        return False
    try:
        return id_in(files.manifest()) == identity
    except (CheckpointError, AssertionError):
        return False
    finally:
        files.close()


def _joined(places: Sequence[Location]) -> str:
    return _SCHEME + ",".join(_quoted(place.path) for place in places)


def _quoted(path: str) -> str:
    """A path in which the separator of paths is quoted."""
    return path.replace("%", "%25").replace(",", "%2C")


def open_url(url: str) -> TieredStorage:
    """The storage of a URL of tiers."""
    texts = [unquote(text) for text in url.removeprefix(_SCHEME).split(",")]
    return TieredStorage(*texts)
