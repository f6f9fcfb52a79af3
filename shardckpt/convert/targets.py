"""Files and directories in other formats, written by several ranks; they appear whole or not at
all."""

from __future__ import annotations

import filecmp
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from shardckpt.config import current
from shardckpt.convert.foreign_file import read_small
from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.deadlines import poll
from shardckpt.errors import DirectoryNotSharedError
from shardckpt.storage.atomic_write import AtomicWrite, atomic_write
from shardckpt.storage.deletion import exists
from shardckpt.storage.posix import System, translated

__all__ = ["Folder", "Target"]

_COPY_LIMIT_BYTES = 128 << 20  # of a configuration or tokenizer


class Target:
    """Base of what writes a file in another format; see shardckpt.maintenance.reshard.Rewriting."""

    index = ""

    def __init__(self, path: str, *, overwrite: bool, system: System | None = None) -> None:
        self.path, self.overwrite, self.system = path, overwrite, system or System()
        self.temporary = ""
        self._writing = ExitStack()

    def begin(self, payloads: list[bytes]) -> bytes:
        """See Rewriting.begin."""
        self._write = self._writing.enter_context(
            atomic_write(
                self.path,
                overwrite=self.overwrite,
                index=self.index,
                foreign=self.foreign,
                system=self.system,
            )
        )
        self.temporary = self._write.path
        with translated(self.temporary):
            self.make(self._write)
        return os.fsencode(self.temporary)

    def foreign(self, names: Sequence[str]) -> Sequence[str]:
        """Of the names in a folder that is to be replaced, those that must stay."""
        return ()

    def make(self, write: AtomicWrite) -> None:
        """Make an empty one."""
        write.create(direct=False).discard()

    def join(self, token: str) -> bytes:
        """See Rewriting.join."""
        self.temporary = token
        if not poll(lambda: exists(self.system, token), current().shared_deadline_s):
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
            self.finish(self._write, payloads)
            self._writing.close()
        return b""

    def finish(self, write: AtomicWrite, payloads: list[bytes]) -> None:
        """Write what is missing, from what the ranks' `write` returned."""
        raise NotImplementedError

    def abandon(self) -> None:
        """See Rewriting.abandon."""
        self._writing.__exit__(*sys.exc_info())

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
        self,
        path: str,
        *,
        overwrite: bool,
        copied: Mapping[str, str] | None = None,
        system: System | None = None,
    ) -> None:
        super().__init__(path, overwrite=overwrite, system=system)
        self.copied = copied or {}

    def copy(self, write: AtomicWrite) -> None:
        """Copy those files into the new directory."""
        for name, path in self.copied.items():
            write.add_bytes(read_small(path, limit_bytes=_COPY_LIMIT_BYTES), name)

    def make(self, write: AtomicWrite) -> None:
        """See Target.make."""
        write.make_folder()

    def foreign(self, names: Sequence[str]) -> Sequence[str]:
        """See Target.foreign."""
        return [n for n in names if not re.fullmatch(self.names, n) and not self._is_copied(n)]

    def _is_copied(self, name: str) -> bool:
        """Whether a file of the old directory is in the new one as well, to the byte."""
        old, new = os.path.join(self.path, name), self.copied.get(name)
        return new is not None and os.path.isfile(old) and filecmp.cmp(old, new, shallow=False)
