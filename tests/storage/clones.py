"""File systems that share ranges of files: one that copies, and real ones on loop devices."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from shardckpt.storage.posix import System

BLOCK_BYTES = 4096  # of the stand-in
MAKE = {"xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q"]}


class Clones(System):
    """A file system that shares ranges under the rules of FICLONERANGE, by copying them.

    Clones number `fails_at` and later ones fail with `code`. `shift` is a planted fault: clones
    take the bytes so much further behind.
    """

    def __init__(self, *, fails_at: int | None = None, code: int = 0, shift: int = 0) -> None:
        self.fails_at, self.code, self.shift = fails_at, code, shift
        self.lock_ = threading.Lock()
        self.clones = self.cloned_bytes = self.written_bytes = 0

    def link(self, name: str, target: str, *, dir_fd: int) -> None:
        raise OSError(errno.EPERM, "no links here", target)

    def clone(
        self, source_fd: int, target_fd: int, *, offset: int = 0, size_bytes: int = 0
    ) -> None:
        with self.lock_:
            number, self.clones = self.clones, self.clones + 1
            if self.fails_at is not None and number >= self.fails_at:
                raise OSError(self.code, os.strerror(self.code))
            end = os.fstat(source_fd).st_size
            size_bytes = size_bytes or end - offset
            ends_inside = offset + size_bytes < max(end, os.fstat(target_fd).st_size)
            if (
                offset % BLOCK_BYTES
                or offset + size_bytes > end
                or (ends_inside and size_bytes % BLOCK_BYTES)
            ):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            data = os.pread(source_fd, size_bytes, (offset + self.shift) % end)
            with open(f"/proc/self/fd/{target_fd}", "r+b") as target:  # without O_DIRECT
                target.seek(offset)
                target.write(data.ljust(size_bytes, b"\0"))
            self.cloned_bytes += size_bytes

    def write(self, fd: int, data: memoryview, *, offset: int) -> int:
        with self.lock_:
            self.written_bytes += len(data)
        return super().write(fd, data, offset=offset)


@contextlib.contextmanager
def mounted(
    kind: str, *, size_bytes: int = 1 << 30, folder: str | None = None
) -> Iterator[Path | str]:
    """A new file system of a kind, mounted for the with block; or why there is none. Its image is
    below `folder`, by default that of temporary files."""
    if os.geteuid():
        yield "only root can mount"
        return
    if shutil.which(MAKE[kind][0]) is None:
        yield f"{MAKE[kind][0]} is not installed"
        return
    made = Path(tempfile.mkdtemp(prefix=f"shardckpt-{kind}-", dir=folder))
    image, place = made / "image", made / "mounted"
    place.mkdir()
    with open(image, "wb") as file:
        file.truncate(size_bytes)
    try:
        for command in ([*MAKE[kind], image], ["mount", "-o", "loop", image, place]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            if done.returncode:
                yield f"{command[0]}: {done.stderr.strip()}"
                return
        try:
            yield place
        finally:
            subprocess.run(["umount", place], check=True, timeout=60)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def allocated_bytes(place: Path) -> int:
    """The bytes in use on a file system."""
    os.sync()
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def device_bytes(place: Path) -> int:
    """The bytes that were written to the device of a file system so far."""
    os.sync()
    device = os.stat(place).st_dev
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if line.split()[4] == str(place):
            device_name = line.split(" - ")[1].split()[1]
            stat = Path("/sys/class/block", os.path.basename(device_name), "stat")
            return int(stat.read_text().split()[6]) * 512
    raise AssertionError(f"{place} ({device}) is not mounted")
