"""Copy a checkpoint from one storage to another, with the same id, and verify each block.

A copy to an object store that was interrupted goes on: the shards that are there stay.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from shardckpt.errors import CorruptionError
from shardckpt.format.digests import BLOCK_BYTES, block_digest
from shardckpt.format.entries import ShardEntry
from shardckpt.format.lazy_manifest import LazyManifest
from shardckpt.format.manifest import check_text
from shardckpt.io.buffers import BUFFER_BYTES, lease
from shardckpt.storage.base import CheckpointFiles, Storage, WriteTransaction

__all__ = ["copy_checkpoint", "id_in"]

_SHARDS_AT_ONCE = 4
_ALIGN = 4096  # of what a direct file takes
_ID = re.compile(rb'"id":"([0-9a-f]{32})"')


def id_in(manifest: bytes) -> str:
    """The id in a manifest whose digest has been checked."""
    found = _ID.search(manifest[:200])
    assert found is not None, "every manifest has an id"
    return found[1].decode()


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
    manifest = files.manifest()
    check_text(manifest, path=files.path)
    shards = list(LazyManifest(manifest, path=files.path).all_shards())
    transaction = storage.begin(path, checkpoint_id=id_in(manifest), overwrite=overwrite)
    try:
        with ThreadPoolExecutor(_SHARDS_AT_ONCE, "shardckpt-copy") as pool:
            copies = [pool.submit(_copy, files, shard, transaction, progress) for shard in shards]
            try:
                for copy in copies:
                    copy.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        transaction.commit(manifest)
    except BaseException:
        if not transaction.resumes:
            transaction.abandon()
        raise
    finally:
        transaction.close()


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
