"""A file or directory that appears under its name at once, when it is durable."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from shardckpt.errors import CheckpointExistsError, NotACheckpointError
from shardckpt.storage.deletion import sync_directory
from shardckpt.storage.posix import System, translated

__all__ = ["appearing"]


@contextmanager
def appearing(path: str, *, overwrite: bool, index: str = "") -> Iterator[str]:
    """A temporary path beside `path`, on which the with block makes a file or a directory; at
    its end that is synced, and takes the name. If the block raises nothing is left of it.

    A directory is replaced only by another, and only if it holds a file named `index`. Raises
    CheckpointExistsError, NotACheckpointError or StorageError. Not collective.
    """
    path = os.path.abspath(path)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.part-{uuid.uuid4().hex}")
    with translated(path):
        _check_target(path, overwrite=overwrite, index=index)
        os.makedirs(folder, exist_ok=True)
        try:
            yield temporary
            _sync(temporary)
            if os.path.isdir(path):
                System().exchange(temporary, path)  # the old one has the temporary name now
            else:
                os.replace(temporary, path)
            sync_directory(System(), folder)
        finally:
            _remove(temporary)


def _check_target(path: str, *, overwrite: bool, index: str) -> None:
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise CheckpointExistsError(
            "There is something at this path already", path=path, remedy="pass overwrite=True"
        )
    if os.path.isdir(path) and not (index and os.path.exists(os.path.join(path, index))):
        raise NotACheckpointError(
            "overwrite=True replaces a checkpoint of the same kind, and nothing else",
            path=path,
            expected=f"a file, or a directory with {index}" if index else "a file",
            actual="another directory",
            remedy="move it out of the way, or save to another path",
        )


def _sync(path: str) -> None:
    if os.path.isdir(path):
        for name in os.listdir(path):
            _sync(os.path.join(path, name))
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: str) -> None:
    remove: Callable[[str], None] = shutil.rmtree if os.path.isdir(path) else os.unlink
    with suppress(FileNotFoundError):
        remove(path)
