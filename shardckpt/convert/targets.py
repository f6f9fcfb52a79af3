"""Files and directories in other formats, written by several ranks; they appear whole or not at
all."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from shardckpt import knobs
from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.waiting import poll
from shardckpt.errors import DirectoryNotSharedError, NotACheckpointError
from shardckpt.storage.appearing import appearing
from shardckpt.storage.system import translated

__all__ = ["Folder", "Target"]


class Target:
    """Base of what writes a file in another format; see shardckpt.execution.reshard.Rewriting."""

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
        if not poll(lambda: os.path.exists(token), knobs.SHARED_DEADLINE_S):
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
    directory is replaced only if it holds nothing else. `copied`: name -> file of the source that
    the directory gets as well; the same file in the old one may go.
    """

    names: str

    def __init__(
        self, path: str, *, overwrite: bool, copied: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(path, overwrite=overwrite)
        self.copied = copied or {}

    def copy(self) -> None:
        """Copy those files into the new directory."""
        for name, file in self.copied.items():
            shutil.copyfile(file, os.path.join(self.temporary, name))

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
            others = [
                name
                for name in os.listdir(self.path)
                if not re.fullmatch(self.names, name) and not self._is_copied(name)
            ]
        if others:
            raise NotACheckpointError(
                "overwrite=True would remove files that are none of the checkpoint's",
                path=self.path,
                expected=f"files that a conversion writes, as {self.index}",
                actual=", ".join(sorted(others)[:8]),
                remedy="convert to another path, and move the files that you want",
            )

    def _is_copied(self, name: str) -> bool:
        """Whether a file of the old directory is in the new one as well, to the byte."""
        old, new = os.path.join(self.path, name), self.copied.get(name)
        return new is not None and os.path.isfile(old) and filecmp.cmp(old, new, shallow=False)
