"""The lock of a checkpoint: only one process at a time saves to its path or removes it.

The lock file is empty. A file with content belongs to the user, and is neither changed nor removed.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from shardckpt.errors import CheckpointBusyError
from shardckpt.storage.posix import UNSUPPORTED, System

__all__ = ["Lock"]


class Lock:
    """A lock file that this process holds until `release`.

    Attributes:
        held: Whether the file is locked. False if the file system does not support locks.
        fd: The descriptor of the lock file.
        path: The path of the lock file.

    Raises:
        CheckpointBusyError: Another process or another call holds the lock.
        OSError: The file system refused an operation.
    """

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
                    "Another save to this path is running",
                    errno=errno.EAGAIN,
                    path=path,
                    remedy="wait for it, or save to another path",
                ) from error
            except FileNotFoundError:
                pass  # The previous holder has removed the file, as in the case below.
            except OSError as error:
                if error.errno in (*UNSUPPORTED, errno.ENOLCK):
                    self.held = False
                    return
                system.close(self.fd)
                raise
            # This file is not the one at the path any more: try again with a new one.
            system.close(self.fd)

    def release(self) -> None:
        """Remove the lock file and unlock it. Never raises OSError."""
        with suppress(OSError):
            status = self.system.fstat(self.fd)
            if stat.S_ISREG(status.st_mode) and status.st_size == 0:
                self.system.unlink(self.path)
        with suppress(OSError):
            self.system.unlock(self.fd)
        with suppress(OSError):
            self.system.close(self.fd)
