"""A lock beside a checkpoint: one process at a time saves there, or removes it."""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from shardckpt.errors import CheckpointBusyError
from shardckpt.storage.posix import UNSUPPORTED, System

__all__ = ["Lock"]


class Lock:
    """A lock file, held until released. Where the file system has no locks, `held` is false."""

    def __init__(self, system: System, path: str) -> None:
        self.system = system
        self.path = path
        self.held = True
        while True:
            self.fd = system.open(path, os.O_CREAT | os.O_RDWR)
            try:
                system.lock(self.fd)
                if system.fstat(self.fd).st_ino == system.stat(path).st_ino:
                    return
            except BlockingIOError as error:
                system.close(self.fd)
                raise CheckpointBusyError(
                    "Another save to this path is under way",
                    errno=errno.EAGAIN,
                    path=path,
                    remedy="wait for it, or save to another path",
                ) from error
            except FileNotFoundError:
                pass  # removed by its holder, as below
            except OSError as error:
                if error.errno in (*UNSUPPORTED, errno.ENOLCK):
                    self.held = False
                    return
                system.close(self.fd)
                raise
            system.close(self.fd)  # its holder removed it in the meantime: once more

    def release(self) -> None:
        """Remove and unlock it; never raises OSError."""
        with suppress(OSError):
            self.system.unlink(self.path)
        with suppress(OSError):
            self.system.unlock(self.fd)
        with suppress(OSError):
            self.system.close(self.fd)
