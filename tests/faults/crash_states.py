"""The states that a crash may leave of a simulated disk, with some of the unsynced changes."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tests.faults.disk import SECTOR_BYTES, Change, Content, Data, Disk, Mark, Sync


def crash_states(
    disk: Disk, *, per_prefix: int, rng: random.Random, since: int = 0
) -> Iterator[tuple[list[Mark], Content]]:
    """For every prefix of the log, from entry `since` on and from where the disk was settled: the
    marks in it, and contents that a crash then may leave.

    All of them where they are few; else `per_prefix` of them, nothing lost and all lost among
    them.
    """
    forced = disk.base.copy()
    pending: list[Change] = []
    marks: list[Mark] = []
    since = max(since, disk.settled)
    for number, entry in enumerate(disk.log):
        if isinstance(entry, Mark):
            marks.append(entry)
        elif isinstance(entry, Sync):
            for change in pending:
                if change.inode == entry.inode:
                    forced.apply(change)
            pending = [change for change in pending if change.inode != entry.inode]
        elif entry is not None:
            pending.append(entry)
        for kept in _subsets(pending, per_prefix, rng) if number >= since else ():
            content = forced.copy()
            for change in kept:
                content.apply(change)
            for names in list(content.directories.values()):
                for inode in names.values():  # a name may outlive the first content of its file
                    if disk.content.directories.get(inode) is not None:
                        content.directories.setdefault(inode, {})
                    else:
                        content.files.setdefault(inode, b"")
            yield list(marks), content


def _subsets(pending: list[Change], most: int, rng: random.Random) -> Iterator[list[Change]]:
    torn = any(isinstance(change, Data) for change in pending)
    if 1 << len(pending) <= most and not torn:
        for mask in range(1 << len(pending)):
            yield [change for bit, change in enumerate(pending) if mask >> bit & 1]
        return
    yield []
    yield pending
    inodes = sorted({change.inode for change in pending})
    for _ in range(most - 2):
        # Few lost, few kept, any, or all of some files and directories: bugs hide where one
        # change of many is missing, or one directory.
        if rng.random() < 0.4:
            chosen = {inode for inode in inodes if rng.random() < 0.5}
            yield [change for change in pending if change.inode in chosen]
            continue
        chance = rng.choice([0.1, 0.5, 0.9])
        kept = [change for change in pending if rng.random() < chance]
        yield [_torn(change, rng) if rng.random() < 0.3 else change for change in kept]


def _torn(change: Change, rng: random.Random) -> Change:
    """Some neighbouring sectors of a write."""
    if not isinstance(change, Data) or len(change.data) <= SECTOR_BYTES:
        return change
    sectors = -(-len(change.data) // SECTOR_BYTES)
    first = rng.randrange(sectors)
    begin = first * SECTOR_BYTES
    end = rng.randint(first + 1, sectors) * SECTOR_BYTES
    return Data(change.inode, change.offset + begin, change.data[begin:end])
