"""Copy a checkpoint from one storage to another, with the same id, and verify each block.

`copy_checkpoint` copies all shards of a checkpoint. `copy_part` copies the shards that one machine
has, and commits once the copies of all machines are there. It goes on where an earlier copy ended.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from shardckpt.errors import CheckpointError, CorruptionError, StateError
from shardckpt.format.digests import BLOCK_BYTES, block_digest
from shardckpt.format.entries import ShardEntry
from shardckpt.format.lazy_manifest import LazyManifest
from shardckpt.format.manifest import check_text
from shardckpt.io.buffers import BUFFER_BYTES, lease
from shardckpt.storage.base import CheckpointFiles, Storage, WriteTransaction

__all__ = ["copy_checkpoint", "copy_part", "created_in", "has_checkpoint", "id_in"]

_SHARDS_AT_ONCE = 4
_ALIGN = 4096  # of what a direct file takes
_ID = re.compile(rb'"id":"([0-9a-f]{32})"')


def id_in(manifest: bytes) -> str:
    """Return the id in a manifest whose digest has been checked."""
    found = _ID.search(manifest[:200])
    assert found is not None, "every manifest has an id"
    return found[1].decode()


def created_in(manifest: bytes) -> str:
    """Return the time in a manifest whose digest has been checked, as text that can be compared."""
    return manifest[:1000].partition(b'"created":"')[2][:25].decode()


def copy_checkpoint(
    files: CheckpointFiles,
    storage: Storage,
    path: str,
    *,
    overwrite: bool,
    progress: Callable[[int], None] = lambda copied_bytes: None,
) -> None:
    """Copy an open checkpoint to a path. Not collective. Memory: a buffer for each of 4 shards.

    Args:
        files: The checkpoint.
        storage: The storage of the path.
        path: The path of the copy.
        overwrite: Replace a checkpoint at the path.
        progress: Called with the bytes copied since its last call, from several threads.

    Raises:
        CorruptionError: A block of the source is corrupted. Nothing appears at the path.
        StorageError: A storage refused an operation.
    """
    manifest, shards = _read(files)
    transaction = storage.begin(path, checkpoint_id=id_in(manifest), overwrite=overwrite)
    try:
        _copy_all(files, shards, transaction, progress)
        transaction.commit(manifest)
    except BaseException:
        if not transaction.resumes:
            transaction.abandon()
        raise
    finally:
        transaction.close()


def copy_part(
    files: CheckpointFiles, storage: Storage, path: str, *, may_lack: bool = False
) -> bool:
    """Copy the shards of an open checkpoint that the path lacks. Not collective.

    An earlier checkpoint at the path is replaced.

    Args:
        files: The checkpoint.
        storage: The storage of the path.
        path: The path of the copy.
        may_lack: Whether `files` may lack shards, which other processes copy.

    Returns:
        Whether the checkpoint is at the path. False while other processes have shards to copy.

    Raises:
        CorruptionError: A block of the source is corrupted, or a shard is missing.
        StateError: The storage does not take shards from several processes.
        StorageError: A storage refused an operation.
    """
    manifest, shards = _read(files)
    identity = id_in(manifest)
    if has_checkpoint(storage, path, identity):
        return True
    transaction = storage.assemble(path, checkpoint_id=identity, overwrite=True)
    try:
        # Another process may have committed it before this one began.
        if has_checkpoint(storage, path, identity):
            return True
        if may_lack and not transaction.resumes:
            raise StateError(
                "This storage can't assemble a checkpoint from several machines",
                path=path,
                expected="a folder, an object store, or a storage that defines assemble",
                actual=type(storage).__qualname__,
                remedy="use a fast tier that all ranks share",
            )
        here = [shard for shard in shards if not may_lack or _has_shard(files, shard.name)]
        _copy_all(files, here, transaction, lambda copied_bytes: None)
        names = {shard.name for shard in here}
        rest = (shard for shard in shards if shard.name not in names)
        if not all(transaction.has(shard.name, size_bytes=shard.size_bytes) for shard in rest):
            return False
        files.manifest()  # raises CheckpointNotFoundError if the source was removed meanwhile
        transaction.commit(manifest)
        return True
    except BaseException:
        if not transaction.resumes:
            transaction.abandon()
        raise
    finally:
        transaction.close()


def has_checkpoint(storage: Storage, path: str, identity: str) -> bool:
    """Whether a path has the checkpoint of an id."""
    try:
        files = storage.open(path)
    except CheckpointError:
        return False
    try:
        return id_in(files.manifest()) == identity
    except (CheckpointError, AssertionError):
        return False
    finally:
        files.close()


def _has_shard(files: CheckpointFiles, name: str) -> bool:
    with suppress(CorruptionError):
        files.size_bytes(name)
        return True
    return False


def _read(files: CheckpointFiles) -> tuple[bytes, Sequence[ShardEntry]]:
    """Return the manifest of a checkpoint, and its shards."""
    manifest = files.manifest()
    check_text(manifest, path=files.path)
    return manifest, LazyManifest(manifest, path=files.path).all_shards()


def _copy_all(
    files: CheckpointFiles,
    shards: Sequence[ShardEntry],
    transaction: WriteTransaction,
    progress: Callable[[int], None],
) -> None:
    with ThreadPoolExecutor(_SHARDS_AT_ONCE, "shardckpt-copy") as pool:
        copies = [pool.submit(_copy, files, shard, transaction, progress) for shard in shards]
        try:
            for copy in copies:
                copy.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _copy(
    files: CheckpointFiles,
    shard: ShardEntry,
    transaction: WriteTransaction,
    progress: Callable[[int], None],
) -> None:
    if transaction.has(shard.name, size_bytes=shard.size_bytes):
        progress(shard.size_bytes)
        return
    file = transaction.create(shard.name, size_bytes=shard.size_bytes)
    try:
        with lease(1) as (buffer,):
            for low in range(0, shard.size_bytes, BUFFER_BYTES):
                view = buffer.view[: min(BUFFER_BYTES, shard.size_bytes - low)]
                files.readinto(shard.name, [view], offset=low)
                _check(files, shard, low, view)
                size = len(view) + (-len(view) % _ALIGN if file.direct else 0)
                file.write(buffer.view[:size], offset=low)
                progress(len(view))
        file.close(size_bytes=shard.size_bytes)
    except BaseException:
        file.discard()
        raise


def _check(files: CheckpointFiles, shard: ShardEntry, low: int, view: memoryview) -> None:
    for at in range(0, len(view), BLOCK_BYTES):
        number = (low + at) // BLOCK_BYTES
        if block_digest(view[at : at + BLOCK_BYTES]) != int(shard.digests[number]):
            raise CorruptionError(
                "A shard is corrupted, and was not copied",
                path=f"{files.path}/{shard.name}",
                expected=f"the digest in the manifest for block {number}",
                actual="different bytes",
                remedy="copy another checkpoint, or rescue the intact tensors: `shardckpt rescue`",
            )
