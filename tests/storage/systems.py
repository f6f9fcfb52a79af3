"""File systems that lack a feature, or on which a call fails."""

from __future__ import annotations

import errno
import fcntl
import os

from shardckpt.storage.posix import System


class Plain(System):
    """A file system without O_DIRECT, locks, fallocate, exchange of names, or fsync of folders."""

    def direct(self, fd, *, on):
        raise OSError(errno.EINVAL, "no direct input and output here")

    def lock(self, fd):
        raise OSError(errno.ENOLCK, "no locks here")

    def allocate(self, fd, *, size_bytes):
        raise OSError(errno.EOPNOTSUPP, "no fallocate here")

    def exchange(self, one, other):
        raise OSError(errno.EINVAL, "no exchange here")


class Cold(System):
    """Nothing is ever in the page cache; `past` counts the reads past it. From number `at` on they
    fail with `error`; none gives more than `most_bytes`."""

    def __init__(self, error=None, *, at=1, most_bytes=1 << 30):
        self.error, self.at, self.most_bytes, self.past = error, at, most_bytes, 0

    def cached(self, fd, *, offset, size_bytes):
        return False

    def read(self, fd, buffers, *, offset, wait=True):
        if not wait:
            raise OSError(errno.EAGAIN, "not in the page cache")
        if not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            return super().read(fd, buffers, offset=offset)
        self.past += 1
        if offset % 4096:
            raise OSError(errno.EINVAL, "as disks with sectors of 4096 bytes say")
        if self.error and self.past >= self.at:
            raise OSError(self.error, "planted")
        return min(super().read(fd, buffers, offset=offset), self.most_bytes)


class Failing(System):
    """Call number `at` fails; `calls` counts them."""

    def __init__(self, at=None, code=0, name=None):
        self.at, self.code, self.name = at, code, name
        self.calls = []

    def _maybe(self, name):
        self.calls.append(name)
        if len(self.calls) - 1 == self.at:
            raise OSError(self.code, os.strerror(self.code))


def _failing(name):
    def call(self, *arguments, **named):
        if name == "close":  # Linux closes a descriptor even where it reports an error
            System.close(self, *arguments)
        self._maybe(name)
        return None if name == "close" else getattr(System, name)(self, *arguments, **named)

    return call


for method in [name for name in vars(System) if not name.startswith("_")]:
    setattr(Failing, method, _failing(method))


def descriptors():
    return len(os.listdir("/proc/self/fd"))
