"""The operations of the bench on files, and its calls to the kernel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


def files_under(path: str) -> list[str]:
    """All files of a checkpoint, sorted."""
    return sorted(str(file) for file in Path(path).rglob("*") if file.is_file())


def sync_tree(path: str, *, rank: int = 0, world_size: int = 1) -> None:
    """Make this rank's share of a checkpoint durable: what a library without fsync owes."""
    files = files_under(path)
    folders = {os.path.dirname(file) for file in files}
    for name in [*files[rank::world_size], *(sorted(folders) if rank == 0 else ())]:
        descriptor = os.open(name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def drop_cache(path: str) -> None:
    """Drop the page cache of a checkpoint's files."""
    for name in files_under(path):
        descriptor = os.open(name, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def fill_cache(path: str) -> None:
    """Bring a checkpoint's files into the page cache."""
    for name in files_under(path):
        with open(name, "rb", buffering=0) as file:
            while file.read(8 << 20):
                pass


def disk_bytes(path: str) -> int:
    """Bytes that a checkpoint's files take on the disk, each inode once."""
    found = {(stat.st_dev, stat.st_ino): stat for stat in map(os.stat, files_under(path))}
    return sum(stat.st_blocks * 512 for stat in found.values())


def _kernel_figure(file: str, key: str) -> int:
    with open(file) as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key))


def bytes_read() -> int:
    """Bytes that this process has asked for in read calls; mapped pages are not among them."""
    return _kernel_figure("/proc/self/io", "rchar:")


def bytes_written() -> int:
    """Bytes that this process has handed to write calls."""
    return _kernel_figure("/proc/self/io", "wchar:")


@dataclass
class Peak:
    """Bytes of memory that a with block added at its highest."""

    added_bytes: int = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure a Peak."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now what is resident
    before, peak = _kernel_figure("/proc/self/status", "VmRSS:"), Peak()
    yield peak
    peak.added_bytes = max(0, _kernel_figure("/proc/self/status", "VmHWM:") - before) * 1024
