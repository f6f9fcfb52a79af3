"""Checkpoints in an object store. No step needs locks, renames, or complete lists.

A checkpoint with the URL s3://bucket/run/step-7 and the id ID has these objects:

    run/step-7/manifest.json    the manifest, or TOMBSTONE while a removed checkpoint is deleted
    run/step-7/ID/shard-...     its shards
    run/step-7/ID/begun         exists while the save runs; the other ranks wait for it

The commit is one conditional put of the manifest: it fails if the manifest is not the one that
`begin` read. One of several saves to one path wins; each loser deletes its own objects. Keys are
never used again, so no reader ever sees the bytes of two checkpoints.

The objects of a save that died have an id that no manifest names. They are deleted once the newest
of them is older than the option `leftover_age_s`.
"""

from __future__ import annotations

import errno
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from typing import NoReturn

from shardckpt.config import current
from shardckpt.errors import (
    CheckpointBusyError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptionError,
    DirectoryNotSharedError,
    NotACheckpointError,
    ShardckptError,
    StateError,
    StorageError,
    StoreUnavailableError,
)
from shardckpt.format.manifest import MANIFEST_HEAD, is_shard_name
from shardckpt.storage.base import (
    MANIFEST_NAME,
    CheckpointFiles,
    OnFilled,
    Storage,
    WouldWait,
    WritableFile,
    WriteTransaction,
)
from shardckpt.storage.objects import (
    ConditionFailedError,
    NoObjectError,
    ObjectInfo,
    Objects,
    Upload,
)

__all__ = ["TOMBSTONE", "ObjectFiles", "ObjectStorage"]

TOMBSTONE = b'{"format":"removed"}\n'
"""The content of the manifest of a checkpoint that is being removed."""

_BEGUN = "begun"
_URL = re.compile(r"(?P<bucket>[a-z][a-z0-9+.-]*://[^/]+)(?:/(?P<prefix>.*))?", re.DOTALL)
_ID = re.compile(r"[0-9a-f]{32}")
_ID_IN_MANIFEST = re.compile(rb'"id":"([0-9a-f]{32})"')
_HEAD_BYTES = 200  # of a manifest; its id is among them
_OTHERS = 5  # objects that an error lists
_POLL_S = 0.05
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 5.0


class ObjectStorage(Storage):
    """Checkpoints in buckets of an object store.

    Args:
        open_bucket: Takes the URL of a bucket, such as `s3://bucket`; returns its objects.
    """

    def __init__(self, open_bucket: Callable[[str], Objects]) -> None:
        self._open_bucket = open_bucket

    def full_path(self, path: str) -> str:
        """See Storage.full_path. A `/` at the end is removed."""
        found = _URL.fullmatch(path.rstrip("/"))
        parts = (found["prefix"] or "").split("/") if found else ["."]
        if any(part in (".", "..") for part in parts) or ("" in parts and len(parts) > 1):
            raise StateError(
                "Invalid URL of a checkpoint",
                expected="scheme://bucket/path, without empty parts, . and ..",
                actual=repr(path),
            )
        return path.rstrip("/")

    def at(self, path: str) -> tuple[Objects, str]:
        """Return the bucket of a path, and the prefix of its keys: empty, or ending in `/`."""
        found = _URL.fullmatch(self.full_path(path))
        assert found is not None
        return self._open_bucket(found["bucket"]), f"{found['prefix']}/" if found["prefix"] else ""

    def open(self, path: str) -> ObjectFiles:
        """See Storage.open. The manifest is read now."""
        path = self.full_path(path)
        objects, prefix = self.at(path)
        text = _get(objects, prefix + MANIFEST_NAME)[0]
        if text is None and not any(True for _ in objects.list(prefix)):
            raise CheckpointNotFoundError(
                "The store has no object at this path",
                path=path,
                expected="a checkpoint",
                actual="no object with this prefix",
                remedy="check the URL; a save that did not return leaves nothing",
            )
        return ObjectFiles(objects, path, prefix, text)

    def begin(self, path: str, *, checkpoint_id: str, overwrite: bool) -> ObjectTransaction:
        """See Storage.begin."""
        path = self.full_path(path)
        objects, prefix = self.at(path)
        others: list[str] = []
        with suppress(StorageError):
            others = _collect(objects, prefix)
        text, version = _get(objects, prefix + MANIFEST_NAME)
        if text is not None and not overwrite:
            raise _exists(path)
        _check_outside(objects, path, prefix)
        if others:
            raise _in_the_way(path, others, overwrite=overwrite)
        if text is not None and not text.startswith(MANIFEST_HEAD):
            raise NotACheckpointError(
                "overwrite=True replaces only a checkpoint",
                path=path,
                expected=f"a {MANIFEST_NAME} of shardckpt",
                actual="another object",
                remedy="delete it, or save to another path",
            )
        transaction = ObjectTransaction(objects, path, prefix, checkpoint_id, leads=True)
        transaction.replaces = version
        transaction.old = text
        transaction.overwrite = overwrite
        _put_marker(objects, f"{prefix}{checkpoint_id}/{_BEGUN}")
        return transaction

    def join(self, path: str, *, token: str) -> ObjectTransaction:
        """See Storage.join."""
        path = self.full_path(path)
        objects, prefix = self.at(path)
        give_up_at = time.monotonic() + current().shared_deadline_s
        while objects.head(f"{prefix}{token}/{_BEGUN}") is None:
            if time.monotonic() > give_up_at:
                raise DirectoryNotSharedError(
                    "This rank does not see the object that rank 0 put",
                    path=path,
                    expected=f"{objects.url}/{prefix}{token}/{_BEGUN}",
                    actual="no such object",
                    remedy="use the same bucket and endpoint on all ranks",
                )
            time.sleep(_POLL_S)
        return ObjectTransaction(objects, path, prefix, token, leads=False)

    def assemble(self, path: str, *, checkpoint_id: str, overwrite: bool) -> ObjectTransaction:
        """See Storage.assemble."""
        transaction = self.begin(path, checkpoint_id=checkpoint_id, overwrite=overwrite)
        transaction.assembles = True
        return transaction

    def names(self, folder: str) -> list[str]:
        """See Storage.names."""
        objects, prefix = self.at(folder)
        return sorted(name for name in objects.folders(prefix) if not name.startswith("."))

    def exists(self, path: str) -> bool:
        """See Storage.exists. Objects without a manifest do not count."""
        objects, prefix = self.at(path)
        found = objects.head(prefix + MANIFEST_NAME)
        if found is None or found.size_bytes != len(TOMBSTONE):
            return found is not None
        return _get(objects, prefix + MANIFEST_NAME)[0] is not None

    def version(self, path: str) -> Hashable:
        """See Storage.version: the version of the manifest, from one request."""
        objects, prefix = self.at(path)
        found = objects.head(prefix + MANIFEST_NAME)
        if found is None:
            raise CheckpointNotFoundError(
                "The store has no checkpoint at this path", path=path, remedy="check the URL"
            )
        return found.version

    def remove(self, path: str) -> None:
        """See Storage.remove. A manifest that another save replaces at the same time stays."""
        path = self.full_path(path)
        objects, prefix = self.at(path)
        key = prefix + MANIFEST_NAME
        text, version = _get(objects, key)
        if text is None or version is None:
            return
        for _ in _attempts():
            try:
                objects.put_if(key, TOMBSTONE, replaces=version)
                break
            except ConditionFailedError as error:
                if _get(objects, key)[0] is None:
                    break  # an earlier attempt has put it
                raise CheckpointBusyError(
                    "Another save has replaced the checkpoint that was to be removed",
                    errno=errno.EAGAIN,
                    path=path,
                    remedy="remove it again, if the new checkpoint is to be removed too",
                ) from error
            except StoreUnavailableError as error:
                unavailable = error
        else:
            raise unavailable
        _delete_shards(objects, prefix, text)
        _delete_tombstone(objects, prefix)

    def sweep(self, folder: str) -> None:
        """See Storage.sweep."""
        with suppress(OSError, CheckpointError):
            objects, prefix = self.at(folder)
            _collect(objects, prefix, below=True)


class ObjectTransaction(WriteTransaction):
    """A checkpoint being written; see the head of this module.

    Attributes:
        replaces: The version of the manifest that the commit replaces; None for a new one.
        old: The manifest that is replaced.
        overwrite: See Storage.begin.
        assembles: Other processes write objects of the same checkpoint, and may commit it.
    """

    shares_files = False
    resumes = True
    replaces: str | None = None
    old: bytes | None = None
    overwrite = False
    assembles = False

    def __init__(
        self, objects: Objects, path: str, prefix: str, token: str, *, leads: bool
    ) -> None:
        self.path = path
        self.token = token
        self._objects = objects
        self._prefix = prefix
        self._folder = f"{prefix}{token}/"
        self._may_delete = leads
        self._names: set[str] = set()

    def create(self, name: str, *, size_bytes: int, shared: bool = False) -> ObjectFile:
        """See WriteTransaction.create. A shared file is written by one rank alone."""
        self._take_name(name)
        return ObjectFile(self._objects, self._folder + name, size_bytes=size_bytes)

    def _take_name(self, name: str) -> None:
        if name in self._names:
            raise StorageError(
                "The file exists already", errno=errno.EEXIST, path=f"{self.path}/{name}"
            )
        self._names.add(name)

    def has(self, name: str, *, size_bytes: int) -> bool:
        """See WriteTransaction.has. An object appears complete."""
        found = self._objects.head(self._folder + name)
        if found is None or found.size_bytes != size_bytes:
            return False
        self._names.add(name)
        return True

    def link(self, name: str, source: CheckpointFiles) -> bool:
        """See WriteTransaction.link. The store copies the object, so that none is shared."""
        if not isinstance(source, ObjectFiles) or source.objects.url != self._objects.url:
            return False
        try:
            self._objects.copy(source.key(name), self._folder + name)
            found = self._objects.head(self._folder + name)
            if found is None or found.size_bytes != source.size_bytes(name):
                return False
        except (NoObjectError, ShardckptError):
            return False
        self._names.add(name)
        return True

    def commit(self, manifest: bytes) -> None:
        """See WriteTransaction.commit."""
        key = self._prefix + MANIFEST_NAME
        self._may_delete = False  # until it is known that the manifest will never appear
        unavailable: StoreUnavailableError | None = None
        for _ in _attempts():
            try:
                self._objects.put_if(key, manifest, replaces=self.replaces)
                break
            except ConditionFailedError as error:
                try:
                    found, version = _get(self._objects, key)
                except StoreUnavailableError as no_answer:
                    unavailable = no_answer
                    continue
                if found == manifest:
                    break  # put by an earlier attempt, or by a request that was repeated on its way
                # If this is still what `begin` has read, the answer or the refusal is wrong.
                self._may_delete = unavailable is None and version not in (None, self.replaces)
                raise self._lost() from error
            except StoreUnavailableError as error:
                unavailable = error
        else:
            assert unavailable is not None
            unavailable.message = (
                "It is unknown whether the checkpoint was committed: the store did not answer. "
                + unavailable.message
            )
            unavailable.remedy = "load it to find out; or save again with overwrite=True"
            raise unavailable
        with suppress(StorageError):
            self._objects.delete([self._folder + _BEGUN])
            if self.old is not None:
                _delete_shards(self._objects, self._prefix, self.old)

    def _lost(self) -> StorageError:
        if not self.overwrite:
            return _exists(self.path)
        return CheckpointBusyError(
            "Another save to this path was committed first",
            errno=errno.EAGAIN,
            path=self.path,
            remedy="save to another path, or again after the other save",
        )

    def abandon(self) -> None:
        """See WriteTransaction.abandon. Rank 0 deletes the objects of all ranks.

        Objects that appear later are deleted as leftovers.
        """
        if self._may_delete and not self.assembles:
            self._may_delete = False
            with suppress(StorageError):
                self._objects.delete([found.key for found in self._objects.list(self._folder)])


class ObjectFile(WritableFile):
    """An object being uploaded. Bytes behind a gap are kept until the gap is filled."""

    def __init__(self, objects: Objects, key: str, *, size_bytes: int) -> None:
        self._path = f"{objects.url}/{key}"
        self._upload: Upload | None = objects.upload(key, size_bytes=size_bytes)
        self._lock = threading.Lock()
        self._end = 0
        self._early: dict[int, bytes] = {}

    def write(self, data: memoryview, *, offset: int) -> None:
        """See WritableFile.write."""
        with self._lock:
            if offset != self._end:
                self._early[offset] = bytes(data)
                return
            self._append(data)
            while (early := self._early.pop(self._end, None)) is not None:
                self._append(early)

    def _append(self, data: memoryview | bytes) -> None:
        assert self._upload is not None, "it is open"
        self._upload.write(data)
        self._end += len(data)

    def close(self, *, size_bytes: int) -> None:
        """See WritableFile.close."""
        if self._early or self._end != size_bytes or self._upload is None:
            self.discard()
            raise StorageError(
                "A part of a file was not written",
                path=self._path,
                expected=f"{size_bytes} bytes",
                actual=f"its first {self._end} bytes",
                remedy="save again",
            )
        self._upload.finish()
        self._upload = None

    def discard(self) -> None:
        """See WritableFile.discard."""
        upload, self._upload = self._upload, None
        self._early.clear()
        if upload is not None:
            upload.cancel()


class ObjectFiles(CheckpointFiles):
    """The files of a committed checkpoint in an object store."""

    def __init__(self, objects: Objects, path: str, prefix: str, manifest: bytes | None) -> None:
        self.path = path
        self.objects = objects
        self.in_memory = objects.in_memory
        self.remote = not objects.in_memory
        self._prefix = prefix
        self._manifest = manifest
        self._id = _id_of(manifest) if manifest is not None else None
        self._sizes: dict[str, int] = {}

    def manifest(self) -> bytes:
        """See CheckpointFiles.manifest."""
        if self._manifest is None:
            raise NotACheckpointError(
                "This URL is not that of a shardckpt checkpoint",
                path=self.path,
                expected=f"the object {MANIFEST_NAME} below it",
                actual="other objects",
                remedy="pass a URL that shardckpt.save wrote to",
            )
        return self._manifest

    def key(self, name: str) -> str:
        """Return the key of a shard."""
        if self._id is None:
            raise CorruptionError(
                "The manifest has no valid id",
                path=f"{self.path}/{MANIFEST_NAME}",
                expected="32 hexadecimal digits",
                actual=repr((self._manifest or b"")[:80]),
                remedy="load another checkpoint",
            )
        return f"{self._prefix}{self._id}/{name}"

    def names(self) -> list[str]:
        """See CheckpointFiles.names. Without a manifest, lists the shards of the newest save."""
        groups: dict[str, list[ObjectInfo]] = defaultdict(list)
        for found in self.objects.list(self._prefix):
            identity, _, name = found.key.removeprefix(self._prefix).partition("/")
            if _ID.fullmatch(identity) and is_shard_name(name):
                groups[identity].append(found)
        if self._id is None and groups:
            newest = max(groups, key=lambda one: max(f.modified_s for f in groups[one]))
            self._id = newest
        return sorted(f.key.rpartition("/")[2] for f in groups.get(self._id or "", ()))

    def size_bytes(self, name: str) -> int:
        """See CheckpointFiles.size_bytes. One list serves all shards."""
        key = self.key(name)
        if name not in self._sizes:
            for found in self.objects.list(f"{self._prefix}{self._id}/"):
                self._sizes[found.key.rpartition("/")[2]] = found.size_bytes
        if name not in self._sizes:
            one = self.objects.head(key)
            if one is None:
                self._missing(name)
            self._sizes[name] = one.size_bytes
        return self._sizes[name]

    def read(self, name: str, buffer: memoryview, *, offset: int) -> None:
        """See CheckpointFiles.read."""
        self.readinto(name, [buffer], offset=offset)

    def readinto(
        self,
        name: str,
        buffers: Sequence[memoryview],
        *,
        offset: int,
        on_filled: OnFilled = lambda buffer: None,
        wait: bool = True,
    ) -> None:
        """See CheckpointFiles.readinto. One request fills all buffers."""
        if not wait and not self.in_memory:
            raise WouldWait(name)
        wanted = sum(map(len, buffers))
        try:
            data = self.objects.read(self.key(name), offset=offset, size_bytes=wanted)
        except NoObjectError:
            self._missing(name)
        if len(data) < wanted:
            raise CorruptionError(
                "A shard is truncated",
                path=f"{self.path}/{name}",
                expected=f"{wanted} bytes from byte {offset} on",
                actual=f"{len(data)} bytes",
                remedy="load another checkpoint; `shardckpt verify` lists all corrupted files",
            )
        at = 0
        for buffer in buffers:
            buffer[:] = data[at : at + len(buffer)]
            at += len(buffer)
            on_filled(buffer)

    def _missing(self, name: str) -> NoReturn:
        now = _get(self.objects, self._prefix + MANIFEST_NAME)[0]
        if self._manifest is not None and now != self._manifest:
            raise CheckpointNotFoundError(
                "The checkpoint was replaced or removed while it was being read",
                path=self.path,
                expected=name,
                actual="another checkpoint" if now else "nothing",
                remedy="load again",
            )
        raise CorruptionError(
            "A shard is missing",
            path=f"{self.path}/{name}",
            expected="the object",
            actual="no such object",
            remedy="load another checkpoint; `shardckpt verify` lists all corrupted files",
        )


def _get(objects: Objects, key: str) -> tuple[bytes | None, str | None]:
    """Return a manifest and its version. The text of a removed manifest is None."""
    try:
        text, version = objects.get(key)
    except NoObjectError:
        return None, None
    return (None if text == TOMBSTONE else text), version


def _id_of(manifest: bytes) -> str | None:
    found = _ID_IN_MANIFEST.search(manifest[:_HEAD_BYTES])
    return found[1].decode() if found else None


def _delete_shards(objects: Objects, prefix: str, manifest: bytes) -> None:
    """Delete the shards of a manifest that was replaced or removed.

    It deletes the shards that the manifest names, as a list may lack them, and those in the list,
    as the manifest may be corrupted.
    """
    identity = _id_of(manifest)
    if identity is None:
        return
    names = {name.decode() for name in re.findall(rb'"name":"(shard-[a-z0-9.-]+)"', manifest)}
    keys = {f"{prefix}{identity}/{name}" for name in names if is_shard_name(name)}
    keys.update(found.key for found in objects.list(f"{prefix}{identity}/"))
    objects.delete(sorted(keys))


def _exists(path: str) -> CheckpointExistsError:
    return CheckpointExistsError(
        "There is a checkpoint at this path already",
        errno=errno.EEXIST,
        path=path,
        remedy="save to another path, or pass overwrite=True to replace it",
    )


def _check_outside(objects: Objects, path: str, prefix: str) -> None:
    """Raise an error if the folder of a new checkpoint is itself a checkpoint."""
    folder = prefix.rstrip("/").rpartition("/")[0]
    key = f"{folder}/{MANIFEST_NAME}" if folder else MANIFEST_NAME
    if not prefix or objects.head(key) is None:
        return
    text = _get(objects, key)[0]
    if text is not None and text.startswith(MANIFEST_HEAD):
        raise StateError(
            "A checkpoint can't be saved inside another checkpoint",
            path=path,
            expected="a prefix that holds checkpoints",
            actual=f"a checkpoint at {objects.url}/{folder}",
            remedy="save to a path beside it",
        )


def _in_the_way(path: str, others: Sequence[str], *, overwrite: bool) -> ShardckptError:
    """Return the error for objects below a path that do not belong to its checkpoint."""
    actual = f"other objects: {', '.join(others)}"
    if not overwrite:
        return CheckpointExistsError(
            "The path exists already",
            errno=errno.EEXIST,
            path=path,
            expected="a prefix without objects",
            actual=actual,
            remedy="save to another path",
        )
    return NotACheckpointError(
        "overwrite=True replaces only a checkpoint, but there are other objects below the path",
        path=path,
        expected="objects of a checkpoint",
        actual=actual,
        remedy="move them to another place, or save to another path",
    )


def _put_marker(objects: Objects, key: str) -> None:
    upload = objects.upload(key, size_bytes=1)
    try:
        upload.write(memoryview(b"\n"))
        upload.finish()
    except BaseException:
        upload.cancel()
        raise


def _attempts() -> Iterable[int]:
    """Yield numbers of attempts until the option store_deadline_s has passed.

    It waits before each attempt but the first; each wait is twice as long, up to a limit.
    """
    give_up_at = time.monotonic() + current().store_deadline_s
    wait_s = _FIRST_WAIT_S
    attempt = 0
    while True:
        yield attempt
        if time.monotonic() + wait_s > give_up_at:
            return
        time.sleep(wait_s)
        attempt, wait_s = attempt + 1, min(2 * wait_s, _LONGEST_WAIT_S)


def _collect(objects: Objects, prefix: str, *, below: bool = False) -> list[str]:
    """Delete what dead saves and removals have left at a path, or at the paths below a folder.

    Returns the first few other objects, by their keys after the prefix.
    """
    oldest_s = time.time() - current().leftover_age_s
    saves: dict[str, dict[str, list[ObjectInfo]]] = defaultdict(lambda: defaultdict(list))
    manifests: set[str] = set()
    tombstones: list[str] = []
    others: list[str] = []
    for found in objects.list(prefix):
        parts = found.key.removeprefix(prefix).split("/")
        where = f"{prefix}{parts.pop(0)}/" if below and len(parts) > 1 else prefix
        if parts == [MANIFEST_NAME]:
            if found.size_bytes != len(TOMBSTONE):
                manifests.add(where)
            elif found.modified_s < oldest_s:
                tombstones.append(where)
        elif len(parts) == 2 and _ID.fullmatch(parts[0]) and _is_ours(parts[1]):
            saves[where][parts[0]].append(found)
        elif parts[-1] and len(others) < _OTHERS:  # some tools mark a folder with a key
            others.append(found.key.removeprefix(prefix))
    for where, by_id in saves.items():
        dead = {
            identity: group
            for identity, group in by_id.items()
            if max(found.modified_s for found in group) < oldest_s
        }
        if not dead or (where in manifests and len(by_id) == 1 and not _has_marker(by_id)):
            continue
        text = _get(objects, where + MANIFEST_NAME)[0]
        alive = _id_of(text) if text is not None else None
        if text is not None and alive is None:
            continue  # a manifest that can't be read may name any of them
        for identity, group in dead.items():
            keys = [f.key for f in group if identity != alive or f.key.endswith(f"/{_BEGUN}")]
            objects.delete(keys)
    for where in tombstones:
        _delete_tombstone(objects, where)
    return others


def _is_ours(name: str) -> bool:
    return name == _BEGUN or is_shard_name(name)


def _has_marker(by_id: dict[str, list[ObjectInfo]]) -> bool:
    return any(f.key.endswith(f"/{_BEGUN}") for group in by_id.values() for f in group)


def _delete_tombstone(objects: Objects, prefix: str) -> None:
    """Delete the manifest of a removed checkpoint, unless a save to its path has begun."""
    begun = any(found.key.endswith(f"/{_BEGUN}") for found in objects.list(prefix))
    if begun:
        return
    with suppress(NoObjectError):
        if objects.get(prefix + MANIFEST_NAME)[0] == TOMBSTONE:
            objects.delete([prefix + MANIFEST_NAME])
