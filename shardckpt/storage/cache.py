"""The cache directory: files with bytes that were downloaded when they were first used.

It is `shardckpt` in the directory that XDG_CACHE_HOME names, by default ~/.cache. Nothing in it is
needed: remove files or the whole directory at any time.
"""

from __future__ import annotations

import mmap
import os
import uuid
from collections.abc import Callable
from contextlib import suppress

from shardckpt.storage.posix import System, translated

__all__ = ["cache_folder", "cached"]


def cache_folder() -> str:
    """Return the cache directory."""
    return os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "shardckpt"
    )


def cached(
    digest: str, name: str, *, size_bytes: int, download: Callable[[memoryview], None]
) -> memoryview:
    """Map a file of the cache directory into private memory. Not collective.

    Args:
        digest: The SHA-256 of the manifest that the bytes belong to. An id alone can be forged.
        name: The name of the file.
        size_bytes: Its size, at least 1.
        download: Fills the memory of the file, if the directory does not have it. An error leaves
            no file.

    Returns:
        The map, which stays valid when the file is removed. Changes are not written to the file.

    Raises:
        StorageError: The file can't be written or read.
    """
    folder = os.path.join(cache_folder(), digest)
    path = os.path.join(folder, name)
    system = System()
    with translated(path):
        os.makedirs(folder, exist_ok=True)
        with suppress(FileNotFoundError):
            return _map(system, path, size_bytes)
        unfinished = f"{path}.{uuid.uuid4().hex}"
        try:
            _write(unfinished, size_bytes, download)
            os.rename(unfinished, path)
            return _map(system, path, size_bytes)
        finally:
            with suppress(OSError):
                os.unlink(unfinished)


def _map(system: System, path: str, size_bytes: int) -> memoryview:
    """Map a file. Raises FileNotFoundError if it does not have the size."""
    fd = os.open(path, os.O_RDONLY)
    try:
        if os.fstat(fd).st_size != size_bytes:
            raise FileNotFoundError(path)
        return system.map(fd, size_bytes=size_bytes)
    finally:
        os.close(fd)


def _write(path: str, size_bytes: int, download: Callable[[memoryview], None]) -> None:
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(fd, 0, size_bytes)  # a full disk is an error here, not in the map
        with mmap.mmap(fd, size_bytes) as pages, memoryview(pages) as view:
            download(view)
            pages.flush()
        os.fsync(fd)
    finally:
        os.close(fd)
