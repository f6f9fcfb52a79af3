"""Open files of other programs: only regular files, and small ones if they are read completely.

The path that a caller passes may be a symbolic link. Files in a folder may be links to files of the
same folder, and in a snapshot of the cache of Hugging Face to the blobs of that cache.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from shardckpt.errors import CorruptionError, NotACheckpointError

__all__ = [
    "JSON_LIMIT_BYTES",
    "check_regular",
    "file_in",
    "indexed_file",
    "mapped",
    "open_regular",
    "read_small",
    "utf8_path",
]

JSON_LIMIT_BYTES = 64 << 20
_DISTRUST = "load another checkpoint; this one was not made by a program that saves checkpoints"
_TYPES = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: str) -> os.stat_result:
    """Return the status of a regular file. Raises NotACheckpointError for any other file.

    The file is not opened, as opening a pipe would wait, and opening a device may have effects.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise NotACheckpointError(
            "The path is not a regular file",
            path=path,
            expected="a regular file",
            actual=_TYPES.get(stat.S_IFMT(status.st_mode), "another file"),
            remedy="check the path; if it is right, load another checkpoint",
        )
    return status


def open_regular(path: str) -> BinaryIO:
    """Open a regular file for reading, without waiting for a pipe. Raises NotACheckpointError."""
    check_regular(path)
    file = open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # the file was replaced meanwhile
        file.close()
        check_regular(path)
        raise OSError(errno.EAGAIN, "the file was replaced while it was opened", path)
    return file


def read_small(path: str, *, limit_bytes: int = JSON_LIMIT_BYTES) -> bytes:
    """Read a regular file. Raises CorruptionError if it is larger than the limit."""
    with open_regular(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > limit_bytes:
            raise CorruptionError(
                "A file of the checkpoint is too large",
                path=path,
                expected=f"at most {limit_bytes} bytes",
                actual=f"{size_bytes} bytes",
                remedy=_DISTRUST,
            )
        return file.read(size_bytes)  # read allocates what it is asked for


@contextmanager
def mapped(path: str) -> Iterator[mmap.mmap | bytes]:
    """Map a regular file into memory."""
    with open_regular(path) as file:
        if not os.fstat(file.fileno()).st_size:
            yield b""
            return
        found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            yield found
        finally:
            with suppress(BufferError):  # the traceback of an error may still refer to a part of it
                found.close()


@contextmanager
def utf8_path(path: str) -> Iterator[str]:
    """Yield a path that opens the same file, for libraries that need paths in UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        with open_regular(path) as file:
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        yield path


def file_in(folder: str, name: object) -> str:
    """Return the path of a file that the index of a folder names.

    Raises:
        CorruptionError: The name leads out of the folder, by its parts or by a symbolic link. Links
            to blobs of the cache of the hub are allowed.
    """
    if type(name) is not str or name in ("", ".", "..") or set(name) & {"/", "\0", os.sep}:
        raise CorruptionError(
            "The index of this checkpoint names a file outside its directory",
            path=folder,
            expected="names of files in the directory, without /",
            actual=repr(name)[:200],
            remedy=_DISTRUST,
        )
    path, home = os.path.join(folder, name), os.path.realpath(folder)
    target = os.path.realpath(path)
    if os.path.islink(path) and os.path.dirname(target) not in (home, _hub_blobs(home)):
        raise CorruptionError(
            "A file of this checkpoint is a symbolic link that leads out of its folder",
            path=path,
            expected="a regular file, or a link to one in the same directory",
            actual=f"a link to {target}",
            remedy="if the link is yours, replace it with a copy of the file; otherwise load "
            "another checkpoint",
        )
    return path


def indexed_file(folder: str, name: object, index: str) -> str:
    """Return the path of a file that the file `index` of a folder names.

    Raises:
        CorruptionError: The name leads out of the folder, or the file is missing.
    """
    path = file_in(folder, name)
    if not os.path.exists(path):
        raise CorruptionError(
            "A file of these weights is missing",
            path=path,
            expected=f"a file, which {index} names",
            actual="no such file",
            remedy="download or copy the missing file",
        )
    return path


def _hub_blobs(home: str) -> str | None:
    """Return models--x/blobs for the folder models--x/snapshots/REVISION of the cache of the
    hub.
    """
    above, revisions = os.path.split(os.path.dirname(home))
    return os.path.join(above, "blobs") if revisions == "snapshots" else None
