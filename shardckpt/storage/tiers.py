"""Checkpoints in two or more places: a save returns when the first one, the fastest, has it.

A thread (storage/drain) copies the checkpoint to the other tiers, repeats what fails, and removes
there what a manager removes. It never blocks or ends a save. A process that starts again copies
what an earlier one has not.

The first tier may be a disk of each machine. Then each machine has a part of the checkpoint: the
manifest, and the shards of its ranks. One rank of each machine commits and copies its part. The
last one to copy commits the checkpoint in the slower tier.

The path of a tiered checkpoint is `tiers://A/step-7,s3://bucket/B/step-7`: its paths in all tiers.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

from shardckpt.errors import (
    CheckpointBusyError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    DirectoryNotSharedError,
    ShardckptError,
    StateError,
    StorageError,
)
from shardckpt.format.manifest import check_text
from shardckpt.logs import logger
from shardckpt.storage.base import CheckpointFiles, Storage, WritableFile, WriteTransaction
from shardckpt.storage.copying import copy_part, created_in, has_checkpoint, id_in
from shardckpt.storage.drain import Drain, OthersCopyError
from shardckpt.storage.resolve import Location, resolve
from shardckpt.storage.tiered_files import BROKEN, TieredFiles, was_saved_in_parts

__all__ = ["TieredStorage", "open_url"]

_SCHEME = "tiers://"


class TieredStorage(Storage):
    """Checkpoints in a fast place, from where they are copied to slower ones in the background.

    A save returns when the first tier has the checkpoint. A load takes each block from the first
    tier that has it intact. The first tier may be a shared file system, or a disk of each machine.
    All ranks must see the other tiers.

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

    in_parts = True

    def __init__(self, *tiers: Any, keep_fast: int | None = None) -> None:
        if len(tiers) < 2 or (keep_fast is not None and keep_fast < 1):
            raise StateError(
                "Invalid arguments of a TieredStorage",
                expected="two or more tiers, and keep_fast of at least 1",
                actual=f"{len(tiers)} tiers, keep_fast={keep_fast!r}",
            )
        self._roots = [resolve(tier, fixed=True) for tier in tiers]
        self._keep_fast = keep_fast
        self._drain = Drain()
        self._own_disk = False  # whether this machine was seen to have a first tier of its own
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
        """Return the path in each tier."""
        paths = _paths_in(self.full_path(path))
        if len(paths) != len(self._roots):
            raise StateError(
                "This path has another number of tiers",
                path=path,
                expected=f"{len(self._roots)} paths, separated by commas",
                actual=f"{len(paths)}",
            )
        pairs = zip(self._roots, paths, strict=True)
        return [Location(root.storage, one) for root, one in pairs]

    def open(self, path: str) -> TieredFiles:
        """See Storage.open. The checkpoint is that of the first tier with an intact manifest."""
        path = self.full_path(path)
        errors: list[ShardckptError] = []
        for number, place in enumerate(places := self._places(path)):
            try:
                files = place.storage.open(place.path)
            except BROKEN as error:
                errors.append(error)
                continue
            try:
                text = files.manifest()
                check_text(text, path=files.path)
            except BROKEN as error:
                files.close()
                errors.append(error)
                continue
            is_part = number == 0 and was_saved_in_parts(text)
            return TieredFiles(path, text, places[number:], first=files, is_part=is_part)
        # The error of a corrupted tier is more useful than that of a tier without the checkpoint.
        raise next((e for e in errors if not isinstance(e, CheckpointNotFoundError)), errors[0])

    def open_newest(self, path: str) -> TieredFiles:
        """See Storage.open_newest. Asks all tiers: the first one may have been away while the
        checkpoint was replaced. A tier that does not answer is left out."""
        files = self.open(path)
        manifest = newest = files.manifest()
        for place in self._places(files.path)[1:]:
            text = _manifest_at(place)
            if text is not None and created_in(text) > created_in(newest):
                newest = text
        if newest is manifest:
            return files
        files.close()
        return self.open_part(path, newest)

    def begin(self, path: str, *, checkpoint_id: str, overwrite: bool) -> WriteTransaction:
        """See Storage.begin. Raises CheckpointExistsError also if a slower tier is known to have a
        checkpoint."""
        path = self.full_path(path)
        place, *slower = self._places(path)
        if not overwrite and (held := next(filter(self._has, slower), None)):
            raise CheckpointExistsError(
                "A slower tier has a checkpoint at this path already",
                errno=errno.EEXIST,
                path=held.path,
                remedy="save to another path, or pass overwrite=True to replace it in all tiers",
            )
        fast = place.storage.begin(place.path, checkpoint_id=checkpoint_id, overwrite=overwrite)
        token = f"{checkpoint_id} {fast.token}"
        return _TieredTransaction(path, token, fast, lambda: self._copy_later(path, saved=True))

    def join(self, path: str, *, token: str) -> WriteTransaction:
        """See Storage.join. Raises DirectoryNotSharedError if the machine has its own disk."""
        path = self.full_path(path)
        place = self._places(path)[0]
        fast = place.storage.join(place.path, token=token.partition(" ")[2])
        return _TieredTransaction(path, token, fast, lambda: None)

    def join_part(self, path: str, *, token: str) -> WriteTransaction:
        """See Storage.join_part. The first call on a disk of its own takes `shared_deadline_s`."""
        if not self._own_disk:
            try:
                return self.join(path, token=token)
            except DirectoryNotSharedError:
                self._own_disk = True
        path = self.full_path(path)
        place = self._places(path)[0]
        identity = token.partition(" ")[0]
        try:
            fast = place.storage.begin(place.path, checkpoint_id=identity, overwrite=True)
        except CheckpointBusyError:
            # Another rank of this machine has begun it, with a token of its own.
            fast = place.storage.join(place.path, token=identity)
            return _TieredTransaction(path, token, fast, lambda: None)
        return _TieredTransaction(
            path, token, fast, lambda: self._part_committed(path), commits_part=True
        )

    def _part_committed(self, path: str) -> None:
        self._copy_later(path, saved=True)
        folders = [Location(s, p.rpartition("/")[0]) for s, p in self._places(path)]
        if (folder := _joined(folders)) not in self._resumed:
            self._resumed.add(folder)
            folders[0].storage.sweep(folders[0].path)
            self.resume(folder)

    def open_part(self, path: str, manifest: bytes) -> TieredFiles:
        """See Storage.open_part."""
        path = self.full_path(path)
        is_part = was_saved_in_parts(manifest)
        return TieredFiles(path, manifest, self._places(path), first=None, is_part=is_part)

    def remove_part(self, path: str) -> None:
        """See Storage.remove_part."""
        path = self.full_path(path)
        self._drain.forget(path)
        fast = self._places(path)[0]
        with suppress(StorageError):
            if fast.storage.exists(fast.path):
                fast.storage.remove(fast.path)

    def _copy_later(self, path: str, *, saved: bool) -> None:
        """Queue the copies of a checkpoint, which this process has `saved` or found."""
        fast, *slower = self._places(path)

        def copy(place: Location) -> None:
            _copy(fast, place, saved=saved)
            folder, _, name = place.path.rpartition("/")
            self._slow_names.setdefault(folder, set()).add(name)

        for number, place in enumerate(slower, start=1):
            self._drain.add((path, number), functools.partial(copy, place), wanted=saved)
        if self._keep_fast is not None:
            self._drain.add((path, "keep_fast"), functools.partial(self._thin_out, fast))

    def _thin_out(self, newest: Location) -> None:
        """Remove from the first tier what the others have, beyond `keep_fast`.

        Raises:
            OthersCopyError: More can be removed when it is copied.
        """
        assert self._keep_fast is not None
        storage, path = newest
        folder = path.rpartition("/")[0]
        aged = []
        for name in storage.names(folder):
            with suppress(*BROKEN):
                files = storage.open(storage.child(folder, name))
                text = files.manifest()
                files.close()
                aged.append((created_in(text), name, id_in(text)))
        aged.sort()
        waits = False
        for _, name, identity in aged[: -self._keep_fast] if folder == self._roots[0].path else ():
            full = self.full_path(name)
            if all(has_checkpoint(*place, identity) for place in self._places(full)[1:]):
                storage.remove(storage.child(folder, name))
            else:
                tiers = range(1, len(self._roots))
                waits = waits or any(self._drain.waits((full, tier)) for tier in tiers)
        if waits:
            raise OthersCopyError

    def names(self, folder: str) -> list[str]:
        """See Storage.names: the names in all tiers. The slower tiers are listed once."""
        fast, *slower = self._places(folder)
        return sorted(set(fast.storage.names(fast.path)).union(*map(self._known, slower)))

    def _known(self, folder: Location) -> set[str]:
        """Return the names in a folder of a slower tier.

        The first call lists them. If that fails, the thread lists them later.
        """
        path = folder.path
        if path not in self._listed:
            self._listed.add(path)
            try:
                self._list(folder)
            except StorageError as error:
                logger.warning("%s can't be listed now: %s", path, error)
                self._drain.add(("list", path), functools.partial(self._list, folder))
        return self._slow_names.get(path, set())

    def _list(self, folder: Location) -> None:
        found = folder.storage.names(folder.path)
        self._slow_names.setdefault(folder.path, set()).update(found)

    def _has(self, place: Location) -> bool:
        """Whether a slower tier is known to have a checkpoint. It is asked if it has the name."""
        folder, _, name = place.path.rpartition("/")
        return name in self._known(Location(place.storage, folder)) and place.storage.exists(
            place.path
        )

    def exists(self, path: str) -> bool:
        """See Storage.exists. The slower tiers are listed once."""
        fast, *slower = self._places(path)
        return fast.storage.exists(fast.path) or any(map(self._has, slower))

    def version(self, path: str) -> Hashable:
        """See Storage.version: that of the first tier with a checkpoint at the path."""
        errors = []
        for number, (storage, where) in enumerate(self._places(path)):
            try:
                return number, storage.version(where)
            except BROKEN as error:
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
            self._drain.add((path, number), functools.partial(_remove, Location(storage, where)))

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
            with suppress(*BROKEN):
                first = self._places(path)[0]
                first.storage.version(first.path)
                self._copy_later(path, saved=False)

    def tiers(self, path: str) -> dict[str, str]:
        """See Storage.tiers."""
        path = self.full_path(path)
        found: dict[str, str] = {}
        identity = ""
        for number, (storage, where) in enumerate(self._places(path)):
            if self._drain.waits((path, number)):
                found[where] = "pending"
                continue
            manifest = _manifest_at(Location(storage, where))
            held = id_in(manifest) if manifest else ""
            identity = identity or held  # a slower tier may still have what was replaced
            found[where] = "durable" if held and held == identity else "missing"
        return found

    def wait_for_tier(self, path: str, tier: int, timeout: float | None = None) -> None:
        """See Storage.wait_for_tier.

        Raises:
            TimeoutError: The tier does not hold it in time.
            ShardckptError: It can't be copied, for example because it is corrupted.
        """
        if not 0 <= tier < len(self._roots):
            raise StateError(
                "This storage does not have a tier with this number",
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
            ShardckptError: A checkpoint can't be copied, for example because it is corrupted.
        """
        self._drain.wait_all(timeout)


class _TieredTransaction(WriteTransaction):
    """A transaction in the first tier."""

    def __init__(
        self,
        path: str,
        token: str,
        fast: WriteTransaction,
        committed: Callable[[], None],
        *,
        commits_part: bool = False,
    ) -> None:
        self.path, self.token, self.commits_part = path, token, commits_part
        self.shares_files, self.resumes = fast.shares_files, fast.resumes
        self._fast, self._committed = fast, committed
        first, *slower = _paths_in(path)
        self.tiers = {first: "durable", **dict.fromkeys(slower, "pending")}

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

    def create_from(
        self, name: str, source: CheckpointFiles, *, size_bytes: int
    ) -> WritableFile | None:
        """See WriteTransaction.create_from."""
        if isinstance(source, TieredFiles):
            try:
                source = source.nearest
            except BROKEN:
                return None
        return self._fast.create_from(name, source, size_bytes=size_bytes)

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


def _remove(place: Location) -> None:
    if place.storage.exists(place.path):
        place.storage.remove(place.path)


def _manifest_at(place: Location) -> bytes | None:
    """Return the manifest of the checkpoint at a place. None if it can't be read."""
    with suppress(*BROKEN):
        files = place.storage.open(place.path)
        try:
            text = files.manifest()
            check_text(text, path=place.path)
            return text
        finally:
            files.close()
    return None


def _copy(source: Location, target: Location, *, saved: bool) -> None:
    """Copy a checkpoint, or this machine's part, unless the target has it.

    A checkpoint that this process has `saved` replaces any other one. One that it has found does
    not replace a newer one, which was saved while this machine was away.

    Raises:
        CheckpointNotFoundError: The source was removed.
        OthersCopyError: The shards of this machine are copied, and other shards are missing.
    """
    files = source.storage.open(source.path)
    try:
        manifest = files.manifest()
        if not saved and (held := _manifest_at(target)) and created_in(held) > created_in(manifest):
            return
        may_lack = was_saved_in_parts(manifest)
        if not copy_part(files, target.storage, target.path, may_lack=may_lack):
            raise OthersCopyError
    finally:
        files.close()


def _joined(places: Sequence[Location]) -> str:
    return _SCHEME + ",".join(_quoted(place.path) for place in places)


def _paths_in(joined: str) -> list[str]:
    """Return the paths in all tiers."""
    return [unquote(text) for text in joined.removeprefix(_SCHEME).split(",")]


def _quoted(path: str) -> str:
    """Return a path in which the separator of paths is quoted."""
    return path.replace("%", "%25").replace(",", "%2C")


def open_url(url: str) -> TieredStorage:
    """Return the storage of a URL of tiers."""
    return TieredStorage(*_paths_in(url))
