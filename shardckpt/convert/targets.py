"""Files and directories in other formats, written by several ranks; they appear whole or not at
all."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack

from shardckpt.config import current
from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.deadlines import poll
from shardckpt.errors import DirectoryNotSharedError, NotACheckpointError
from shardckpt.storage.atomic_write import appearing
from shardckpt.storage.posix import translated

__all__ = ["Folder", "Target"]


class Target:
    """Base of what writes a file in another format; see shardckpt.maintenance.reshard.Rewriting."""

    index = ""

    def __init__(self, path: str, *, overwrite: bool) -> None:
        self.path, self.overwrite = path, overwrite
        self.temporary = ""
        self._appearing = ExitStack()

    def begin(self, payloads: list[bytes]) -> bytes:
        """See Rewriting.begin."""
        making = appearing(self.path, overwrite=self.overwrite, index=self.index)
        self.temporary = self._appearing.enter_context(making)
        with translated(self.temporary):
            self.make()
        return os.fsencode(self.temporary)

    def make(self) -> None:
        """Make an empty one at the temporary path."""
        os.close(os.open(self.temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))

    def join(self, token: str) -> bytes:
        """See Rewriting.join."""
        self.temporary = token
        if not poll(lambda: os.path.exists(token), current().shared_deadline_s):
            raise DirectoryNotSharedError(
                "This rank does not see the directory that rank 0 writes to",
                path=self.path,
                expected=token,
                actual="nothing there",
                remedy="write to a file system that all ranks share, under the same path",
            )
        return b""

    def write(self, ranks: Coordinator, progress: Callable[[int], None]) -> bytes:
        """See Rewriting.write."""
        raise NotImplementedError

    def commit(self, payloads: list[bytes]) -> bytes:
        """See Rewriting.commit."""
        with translated(self.temporary):
            self.finish(payloads)
            self._appearing.close()
        return b""

    def finish(self, payloads: list[bytes]) -> None:
        """Write what is missing, from what the ranks' `write` returned."""
        raise NotImplementedError

    def abandon(self) -> None:
        """See Rewriting.abandon."""
        self._appearing.__exit__(*sys.exc_info())

    def close(self) -> None:
        """See Rewriting.close."""


class Folder(Target):
    """Base of what writes a directory.

    `index` is the file that tells of the others, `names` the pattern of the files' names: a
    directory is replaced only if it holds nothing else.
    """

    names: str

    def begin(self, payloads: list[bytes]) -> bytes:
        """See Rewriting.begin."""
        if self.overwrite and os.path.isdir(self.path):
            self._check_names()
        return super().begin(payloads)

    def make(self) -> None:
        """See Target.make."""
        os.mkdir(self.temporary)

    def _check_names(self) -> None:
        with translated(self.path):
            others = [n for n in os.listdir(self.path) if not re.fullmatch(self.names, n)]
        if others:
            raise NotACheckpointError(
                "overwrite=True would remove files that are none of the checkpoint's",
                path=self.path,
                expected=f"files that a conversion writes, as {self.index}",
                actual=", ".join(sorted(others)[:8]),
                remedy="convert to another path, and move the files that you want",
            )
