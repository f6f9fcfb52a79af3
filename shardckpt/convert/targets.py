"""Write files and folders in other formats, by several ranks."""

from __future__ import annotations

import filecmp
import os
import re
import sys
from abc import ABC, abstractmethod
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


class Target(ABC):
    """Base class of writers of a file in another format; see
    shardckpt.maintenance.reshard.Rewriting."""

    index: tuple[str, ...] = ()

    def __init__(self, path: str, *, overwrite: bool, system: System | None = None) -> None:
        self.path, self.overwrite, self.system = path, overwrite, system or System()
        self.temporary = ""
        self._writing = ExitStack()
        self._write: AtomicWrite | None = None

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
        """Return the names in a folder that must not be removed when the folder is replaced."""
        return ()

    def make(self, write: AtomicWrite) -> None:
        """Create an empty file or folder."""
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

    @abstractmethod
    def write(self, ranks: Coordinator, progress: Callable[[int], None]) -> bytes:
        """See Rewriting.write."""

    def commit(self, payloads: list[bytes]) -> bytes:
        """See Rewriting.commit."""
        assert self._write is not None  # begin was called on this rank
        with translated(self.temporary):
            self.finish(self._write, payloads)
            self._writing.close()
        return b""

    @abstractmethod
    def finish(self, write: AtomicWrite, payloads: list[bytes]) -> None:
        """Complete the target. `payloads` are the results of `write` on the ranks."""

    def abandon(self) -> None:
        """See Rewriting.abandon."""
        self._writing.__exit__(*sys.exc_info())

    def close(self) -> None:
        """See Rewriting.close."""
        self._write = None  # it refers back to this target, and so to the source


class Folder(Target):
    """Base class of writers of a folder.

    `index` has the files of which each folder has one, and `names` the pattern of file names: a
    folder is replaced only if it holds nothing else. `copied`: name -> file of the source that is
    copied to the folder; an equal file in the old folder may be replaced.
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
        """Copy the files of `copied` into the new folder."""
        for name, path in self.copied.items():
            write.add_bytes(read_small(path, limit_bytes=_COPY_LIMIT_BYTES), name)

    def make(self, write: AtomicWrite) -> None:
        """See Target.make."""
        write.make_folder()

    def foreign(self, names: Sequence[str]) -> Sequence[str]:
        """See Target.foreign."""
        return [n for n in names if not re.fullmatch(self.names, n) and not self._is_copied(n)]

    def _is_copied(self, name: str) -> bool:
        """Whether a file of the old folder is equal to a file of the new one."""
        old, new = os.path.join(self.path, name), self.copied.get(name)
        return new is not None and os.path.isfile(old) and filecmp.cmp(old, new, shallow=False)
