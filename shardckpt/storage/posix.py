"""The system calls that storage makes, one method each: the seam where tests inject faults; and
their errors in shardckpt's terms."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import sys
import weakref
from collections.abc import Sequence

import numpy as np

from shardckpt.errors import NoSpaceError, ShardckptError, StorageError, StoragePermissionError

__all__ = ["UNSUPPORTED", "System", "translated"]

UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY)
"""What file systems say of calls that they don't know."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CACHESTAT = ctypes.c_long(451)  # asm-generic/unistd.h; its structs are in linux/mman.h
_Cachestat, _CachestatRange = ctypes.c_uint64 * 5, ctypes.c_uint64 * 2
_FICLONE = 0x40049409  # linux/fs.h


class System:
    """The operating system. Every method raises OSError as its namesake in os does."""

    def open(self, path: str, flags: int, *, dir_fd: int | None = None) -> int:
        """A descriptor that child processes don't inherit and that no symlink leads to."""
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666, dir_fd=dir_fd)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def write(self, fd: int, data: memoryview, *, offset: int) -> int:
        """Write some of `data` at an offset; how many bytes."""
        return os.pwrite(fd, data, offset)

    def read(
        self, fd: int, buffers: Sequence[memoryview], *, offset: int, wait: bool = True
    ) -> int:
        """Read into buffers from an offset; how many bytes, 0 at the end of the file. If `wait` is
        false, from the page cache alone: an OSError where that has nothing, or can't be asked."""
        if wait:
            return os.preadv(fd, buffers, offset)
        if not hasattr(os, "RWF_NOWAIT"):
            raise OSError(errno.EOPNOTSUPP, "no RWF_NOWAIT on this system")
        return os.preadv(fd, buffers, offset, os.RWF_NOWAIT)

    def cached(self, fd: int, *, offset: int, size_bytes: int) -> bool:
        """Whether a part of a file is in the page cache, but for an eighth of its pages at most;
        `offset` begins a page.

        Also where it can't be told: some systems tell only those who may write to the file.
        """
        pages = -(-size_bytes // mmap.PAGESIZE)
        held = self._cachestat(fd, offset, size_bytes)
        if held is None:
            held = self._mincore(fd, offset, size_bytes)
        return held is None or 8 * held >= 7 * pages

    def _cachestat(self, fd: int, offset: int, size_bytes: int) -> int | None:
        """How many pages are in the page cache; None before Linux 6.5."""
        if sys.platform != "linux":
            return None
        found = _Cachestat()
        failed = _libc.syscall(_CACHESTAT, fd, _CachestatRange(offset, size_bytes), found, 0)
        return None if failed else found[0]

    def _mincore(self, fd: int, offset: int, size_bytes: int) -> int | None:
        """The same by a map of the file, which takes ten times as long."""
        if not hasattr(_libc, "mincore"):
            return None
        try:
            pages = mmap.mmap(
                fd, size_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=offset
            )
        except (OSError, ValueError):  # a file system that maps none; a file that is shorter
            return None
        mapped = np.frombuffer(pages, np.uint8)
        held = np.zeros(-(-size_bytes // mmap.PAGESIZE), np.uint8)
        at, into = (ctypes.c_void_p(array.ctypes.data) for array in (mapped, held))
        failed = _libc.mincore(at, ctypes.c_size_t(size_bytes), into)
        return None if failed else int((held & 1).sum())

    def allocate(self, fd: int, *, size_bytes: int) -> None:
        """Set space aside, as fallocate(2) does: no emulation where the file system can't."""
        if not hasattr(_libc, "fallocate"):
            raise OSError(errno.EOPNOTSUPP, "no fallocate on this system")
        while _libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size_bytes)):
            if ctypes.get_errno() != errno.EINTR:  # Python makes its own calls again by itself
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def truncate(self, fd: int, *, size_bytes: int) -> None:
        """Cut a file to size."""
        os.ftruncate(fd, size_bytes)

    def direct(self, fd: int, *, on: bool) -> None:
        """Turn O_DIRECT on or off."""
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)

    def fsync(self, fd: int) -> None:
        """Make a file or directory durable."""
        os.fsync(fd)

    def lock(self, fd: int) -> None:
        """Lock a file against other processes and descriptors; BlockingIOError if it is locked."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def unlock(self, fd: int) -> None:
        """Unlock it, for children that inherited the descriptor as well."""
        fcntl.flock(fd, fcntl.LOCK_UN)

    def map(self, fd: int, *, size_bytes: int) -> memoryview:
        """The file in memory; writes to it stay private. Python's own maps keep a descriptor."""
        access = mmap.PROT_READ | mmap.PROT_WRITE
        size = ctypes.c_size_t(size_bytes)
        address = _libc.mmap(None, size, access, mmap.MAP_PRIVATE, fd, ctypes.c_int64(0))
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        pages = (ctypes.c_char * size_bytes).from_address(address)
        unmap = weakref.finalize(pages, _libc.munmap, ctypes.c_void_p(address), size)
        unmap.atexit = False  # others may look into it until the end
        return memoryview(pages).cast("B")

    def dup(self, fd: int) -> int:
        """Another descriptor for the same."""
        return os.dup(fd)

    def mkdir(self, path: str) -> None:
        """Make a directory."""
        os.mkdir(path)

    def rename(self, source: str, target: str) -> None:
        """Rename; a directory replaces an empty one, and no other."""
        os.rename(source, target)

    def exchange(self, one: str, other: str) -> None:
        """Swap two names in one step; ENOSYS or EINVAL where the system can't."""
        if not hasattr(_libc, "renameat2"):
            raise OSError(errno.ENOSYS, "no renameat2 on this system")
        names = os.fsencode(one), os.fsencode(other)
        if _libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), one, None, other)

    def link(self, name: str, target: str, *, dir_fd: int) -> None:
        """Make `target` another name of the file `name` in an open directory; a symlink is
        itself."""
        os.link(name, target, src_dir_fd=dir_fd, follow_symlinks=False)

    def clone(self, source_fd: int, target_fd: int) -> None:
        """Give a file the blocks of another one, each its own when written to (FICLONE)."""
        fcntl.ioctl(target_fd, _FICLONE, source_fd)

    def unlink(self, path: str) -> None:
        """Remove a file."""
        os.unlink(path)

    def rmdir(self, path: str) -> None:
        """Remove an empty directory."""
        os.rmdir(path)

    def listdir(self, path: str | int) -> list[str]:
        """The names in a directory, which a path or a descriptor gives."""
        return os.listdir(path)

    def stat(self, path: str) -> os.stat_result:
        """What stands at a path; a symlink is itself."""
        return os.lstat(path)

    def fstat(self, fd: int) -> os.stat_result:
        """What a descriptor refers to."""
        return os.fstat(fd)


class translated:
    """OSErrors of the with block as the StorageErrors of shardckpt. Every read goes through it: so
    it is no generator."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, OSError) or isinstance(error, ShardckptError):
            return
        raised, remedy = _KINDS.get(error.errno or 0, (StorageError, _LOOK))
        raise raised(
            f"The file system refused: {error.strerror}",
            errno=error.errno,
            path=error.filename if os.path.isabs(str(error.filename)) else self.path,
            remedy=remedy,
        ) from error


_LOOK = "look at the path, and at what the system's log says of its file system"
_ALLOW = "ask for the right to read and write there, or choose another path"
_FREE = "free some space or raise the quota; what was saved before is untouched"
_KINDS: dict[int, tuple[type[StorageError], str]] = {
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
