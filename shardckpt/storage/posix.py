"""The system calls of storage, and the conversion of their errors to StorageErrors.

Each system call is one method of `System`, so that tests can inject faults.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import sys
import weakref
from collections.abc import Sequence

import numpy as np

from shardckpt.errors import NoSpaceError, ShardckptError, StorageError, StoragePermissionError

__all__ = ["UNSUPPORTED", "System", "translated"]

UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY)
"""The errnos with which file systems answer calls that they don't support."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CACHESTAT = ctypes.c_long(451)  # asm-generic/unistd.h; its structs are in linux/mman.h
_Cachestat, _CachestatRange = ctypes.c_uint64 * 5, ctypes.c_uint64 * 2
_FICLONERANGE = 0x4020940D  # linux/fs.h, with its struct file_clone_range
_CloneRange = struct.Struct("=qQQQ")  # source_fd, source offset, size, target offset


class System:
    """The operating system. All methods raise OSError, as the functions of `os` do."""

    def open(self, path: str, flags: int, *, dir_fd: int | None = None) -> int:
        """Open a file without following a symlink. Child processes don't inherit it."""
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666, dir_fd=dir_fd)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def write(self, fd: int, data: memoryview, *, offset: int) -> int:
        """Write some of `data` at an offset. Returns the number of bytes written."""
        return os.pwrite(fd, data, offset)

    def read(
        self, fd: int, buffers: Sequence[memoryview], *, offset: int, wait: bool = True
    ) -> int:
        """Read into buffers from an offset.

        Args:
            fd: The file.
            buffers: The buffers, filled in order.
            offset: The offset of the first byte in the file.
            wait: If false, read from the page cache only. Raises OSError if the cache has no byte
                of the range, or if the system does not support such reads.

        Returns:
            The number of bytes read, 0 at the end of the file.
        """
        if wait:
            return os.preadv(fd, buffers, offset)
        if not hasattr(os, "RWF_NOWAIT"):
            raise OSError(errno.EOPNOTSUPP, "no RWF_NOWAIT on this system")
        return os.preadv(fd, buffers, offset, os.RWF_NOWAIT)

    def cached(self, fd: int, *, offset: int, size_bytes: int) -> bool:
        """Whether at least 7 of 8 pages of a range are in the page cache.

        `offset` is the beginning of a page. Also true if the system does not say, as some systems
        answer only processes that may write to the file.
        """
        pages = -(-size_bytes // mmap.PAGESIZE)
        held = self._cachestat(fd, offset, size_bytes)
        if held is None:
            held = self._mincore(fd, offset, size_bytes)
        return held is None or 8 * held >= 7 * pages

    def _cachestat(self, fd: int, offset: int, size_bytes: int) -> int | None:
        """Count the pages of a range in the page cache. None before Linux 6.5."""
        if sys.platform != "linux":
            return None
        counts = _Cachestat()
        failed = _libc.syscall(_CACHESTAT, fd, _CachestatRange(offset, size_bytes), counts, 0)
        return None if failed else counts[0]

    def _mincore(self, fd: int, offset: int, size_bytes: int) -> int | None:
        """Count the same pages through a map of the file, which takes ten times as long."""
        if not hasattr(_libc, "mincore"):
            return None
        try:
            pages = mmap.mmap(
                fd, size_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=offset
            )
        except (OSError, ValueError):  # the file system has no maps, or the file is shorter
            return None
        mapped = np.frombuffer(pages, np.uint8)
        held = np.zeros(-(-size_bytes // mmap.PAGESIZE), np.uint8)
        at, into = (ctypes.c_void_p(array.ctypes.data) for array in (mapped, held))
        failed = _libc.mincore(at, ctypes.c_size_t(size_bytes), into)
        return None if failed else int((held & 1).sum())

    def allocate(self, fd: int, *, size_bytes: int) -> None:
        """Allocate space with fallocate(2), without the emulation of posix_fallocate."""
        if not hasattr(_libc, "fallocate"):
            raise OSError(errno.EOPNOTSUPP, "no fallocate on this system")
        while _libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size_bytes)):
            if ctypes.get_errno() != errno.EINTR:  # Python repeats only its own calls after EINTR
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def truncate(self, fd: int, *, size_bytes: int) -> None:
        """Set the size of a file."""
        os.ftruncate(fd, size_bytes)

    def direct(self, fd: int, *, on: bool) -> None:
        """Turn O_DIRECT on or off."""
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)

    def fsync(self, fd: int) -> None:
        """Write a file or directory to the disk."""
        os.fsync(fd)

    def lock(self, fd: int) -> None:
        """Lock a file against other descriptors. Raises BlockingIOError if it is locked."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def unlock(self, fd: int) -> None:
        """Unlock a file, also for child processes that inherited the descriptor."""
        fcntl.flock(fd, fcntl.LOCK_UN)

    def map(self, fd: int, *, size_bytes: int) -> memoryview:
        """Map a file into memory, copied on write.

        The `mmap` of Python is not used, because it keeps a descriptor open.
        """
        access = mmap.PROT_READ | mmap.PROT_WRITE
        size = ctypes.c_size_t(size_bytes)
        address = _libc.mmap(None, size, access, mmap.MAP_PRIVATE, fd, ctypes.c_int64(0))
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        pages = (ctypes.c_char * size_bytes).from_address(address)
        unmap = weakref.finalize(pages, _libc.munmap, ctypes.c_void_p(address), size)
        unmap.atexit = False  # other views of the map may be used until the process ends
        return memoryview(pages).cast("B")

    def dup(self, fd: int) -> int:
        """Duplicate a descriptor."""
        return os.dup(fd)

    def mkdir(self, path: str) -> None:
        """Make a directory."""
        os.mkdir(path)

    def rename(self, source: str, target: str) -> None:
        """Rename a file or directory. A directory can replace only an empty directory."""
        os.rename(source, target)

    def exchange(self, one: str, other: str) -> None:
        """Exchange two names in one step. Fails with ENOSYS or EINVAL if that is unsupported."""
        if not hasattr(_libc, "renameat2"):
            raise OSError(errno.ENOSYS, "no renameat2 on this system")
        names = os.fsencode(one), os.fsencode(other)
        if _libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), one, None, other)

    def link(self, name: str, target: str, *, dir_fd: int) -> None:
        """Make a hard link `target` to the file `name` in an open directory.

        A symlink is linked, not followed.
        """
        os.link(name, target, src_dir_fd=dir_fd, follow_symlinks=False)

    def clone(
        self, source_fd: int, target_fd: int, *, offset: int = 0, size_bytes: int = 0
    ) -> None:
        """Share a range of another file with a file, copied on write (FICLONERANGE).

        Args:
            source_fd: The other file.
            target_fd: The file.
            offset: The offset of the range in both files.
            size_bytes: The size of the range; 0 for all bytes up to the end of the other file.
        """
        span = _CloneRange.pack(source_fd, offset, size_bytes, offset)
        fcntl.ioctl(target_fd, _FICLONERANGE, span)

    def unlink(self, path: str) -> None:
        """Remove a file."""
        os.unlink(path)

    def rmdir(self, path: str) -> None:
        """Remove an empty directory."""
        os.rmdir(path)

    def listdir(self, path: str | int) -> list[str]:
        """List the names in a directory, given as a path or a descriptor."""
        return os.listdir(path)

    def stat(self, path: str) -> os.stat_result:
        """Return the status of a path, without following a symlink."""
        return os.lstat(path)

    def fstat(self, fd: int) -> os.stat_result:
        """Return the status of an open file."""
        return os.fstat(fd)


class translated:
    """Raise each OSError of the with block as a StorageError with a path and a remedy.

    This is a class, because a generator would slow down every read.
    """

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, cls: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, OSError) or isinstance(error, ShardckptError):
            return
        raised, remedy = _BY_ERRNO.get(error.errno or 0, (StorageError, _LOOK))
        raise raised(
            f"The file system refused: {error.strerror}",
            errno=error.errno,
            path=error.filename if os.path.isabs(str(error.filename)) else self.path,
            remedy=remedy,
        ) from error


_LOOK = "look at the path, and at the messages of its file system in the system's log"
_ALLOW = "ask for the right to read and write there, or choose another path"
_FREE = "free some space or raise the quota; earlier checkpoints are unchanged"
_BY_ERRNO: dict[int, tuple[type[StorageError], str]] = {
    errno.EACCES: (StoragePermissionError, _ALLOW),
    errno.EPERM: (StoragePermissionError, _ALLOW),
    errno.EROFS: (StoragePermissionError, _ALLOW),
    errno.ENOSPC: (NoSpaceError, _FREE),
    errno.EDQUOT: (NoSpaceError, _FREE),
    errno.EFBIG: (NoSpaceError, "raise the limit on file sizes (ulimit -f)"),
    errno.EIO: (StorageError, "look at the disk: it reports an error"),
    errno.EMFILE: (StorageError, "raise the limit on open files (ulimit -n)"),
    errno.ENOTDIR: (StorageError, "move the file out of the way, or choose another path"),
    errno.ENAMETOOLONG: (StorageError, "choose a shorter name"),
}
