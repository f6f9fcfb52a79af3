"""Read from shards: whole blocks, verified as they are read, several windows at a time.

A shard is read in windows of a fixed size. In a window, neighbouring blocks that are needed and are
not in the page cache become one read that bypasses the page cache, into a buffer. Otherwise each
block is one read, which places large runs directly into their destination and all other bytes into
a buffer. The digest of each block is checked after its bytes have been read. Then the bytes in the
buffer are copied to their destinations. Blocks that another rank reads arrive in the buffer too.
Devices copy from one buffer of a thread while the thread fills another one.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from shardckpt.config import current
from shardckpt.errors import CheckpointError, CorruptionError, ShardckptError, StorageError
from shardckpt.format.digests import BLOCK_BYTES, block_digest
from shardckpt.format.dtypes import DTYPES, memory_view
from shardckpt.format.entries import Manifest, ShardEntry, TensorEntry
from shardckpt.format.lazy_manifest import LazyManifest
from shardckpt.io.buffers import Buffer, copy_bytes, have_huge_pages, lease, view_at
from shardckpt.io.gc_pause import collector_paused
from shardckpt.io.threads import stalled, workers
from shardckpt.loading.sharing import Sharing, TransferError
from shardckpt.loading.uploads import Uploads, elements_at
from shardckpt.plan.page_cache_policy import ALWAYS, NEVER
from shardckpt.plan.read_plan import WINDOW_BYTES, CopyRead, Reads, plan_reads
from shardckpt.plan.shared_reads import Unit
from shardckpt.state.local_chunks import LocalChunk
from shardckpt.storage.base import CheckpointFiles, WouldWait

__all__ = [
    "affected_tensors",
    "check_size",
    "corrupted_blocks",
    "corruption_error",
    "read_all",
    "read_box",
]

DIRECT_BYTES = 128 << 10
"""Shorter runs are read into the buffer, so that a system call has fewer and larger pieces."""

STEP_BYTES = BLOCK_BYTES // 2
"""The number of bytes that are read before they are hashed. Source and target then still fit into
the processor's cache.
"""

_LEAST_REMOTE_READS = 8
"""Requests to another machine wait for its answer most of the time."""

_LEAST_SHARED_READS = 16
"""The windows that a rank reads, receives or sends at the same time. All ranks go through the
windows in the same order, so that each rank reads only a few of these."""

_POLL_S = 0.2


def read_all(
    files: CheckpointFiles,
    manifest: Manifest | LazyManifest,
    reads: Reads,
    *,
    past_cache: float = NEVER,
    progress: Callable[[int], None] = lambda read_bytes: None,
    sharing: Sharing | None = None,
) -> int:
    """Perform reads, and verify every block that they touch. Collective only with `sharing`.

    Args:
        files: The checkpoint.
        manifest: Its manifest.
        reads: The reads. If this call raises, their destinations are undefined.
        past_cache: The fraction of a block that must be needed, so that the block is read past the
            page cache if it is not in it. See plan/page_cache_policy.
        progress: Called with the number of bytes read so far.
        sharing: The blocks that ranks read for others.

    Returns:
        The number of bytes read, without those that were received from other ranks.

    Raises:
        CorruptionError: A shard is missing, truncated or corrupted. The error names the file, the
            block and the affected tensors.
        TransferError: Another rank did not send blocks that only its disk has.
    """
    with collector_paused():
        windows = _windows(reads, sharing.windows() if sharing else ())
    if not windows:  # only values are loaded: start no threads
        return 0
    if not files.remote and not files.copies():
        for shard in {window.shard for window in windows}:
            check_size(files, manifest.shards[shard])
    uploads = Uploads(reads.copies)
    # A read from the page cache takes less time than starting a thread.
    if len(windows) == 1 and not files.copies() and not sharing:
        with suppress(WouldWait), lease(1, locked=uploads.needed) as (buffer,):
            try:
                source = _Source(files, manifest, uploads, wait=False)
                return _read_window(source, windows[0], buffer)
            finally:
                uploads.wait(buffer)
    if not (current().read_past_cache and have_huge_pages()):
        past_cache = NEVER
    source = _Source(files, manifest, uploads, past_cache=past_cache, sharing=sharing)
    # Reads from the page cache keep a processor busy. Reads from the disk do not.
    threads = current().read_threads * (1 if past_cache == NEVER else 2)
    if files.remote:
        threads = max(threads, _LEAST_REMOTE_READS)
    if sharing:
        threads = max(threads, _LEAST_SHARED_READS)
    threads = min(threads, len(windows))
    queue = iter(windows)  # next() on it is atomic: the workers share it
    stop = threading.Event()
    read_bytes = [0] * threads

    def work(worker: int, own: list[Buffer]) -> None:
        ring = itertools.cycle(own)
        try:
            for window in queue:
                if stop.is_set():
                    return
                buffer = next(ring)
                uploads.wait(buffer)
                read_bytes[worker] += _read_window(source, window, buffer)
        finally:  # the tensors are filled, and the buffers are free again
            for buffer in own:
                uploads.wait(buffer)

    each = 2 if uploads.needed else 1  # devices copy from one buffer while the other is filled
    with workers(threads, "shardckpt-read", buffers=threads * each, locked=uploads.needed) as (
        pool,
        buffers,
    ):
        pending = {pool.submit(work, n, buffers[n::threads]) for n in range(threads)}
        try:
            last, since = 0, time.monotonic()
            while pending:
                done, pending = wait(pending, _POLL_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                moved = sum(read_bytes) + (sharing.signs_of_life if sharing else 0)
                if moved != last:
                    last, since = moved, time.monotonic()
                    progress(sum(read_bytes))
                elif pending and time.monotonic() - since > current().stall_deadline_s:
                    raise stalled("Reading", files.path)
        except BaseException:
            if sharing:
                sharing.stop()
            raise
        finally:
            stop.set()
    return sum(read_bytes) - (sharing.received_bytes if sharing else 0)


def read_box(
    files: CheckpointFiles,
    manifest: Manifest | LazyManifest,
    entry: TensorEntry,
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
) -> torch.Tensor:
    """Read the box (offsets, sizes) of a tensor of the manifest into a new CPU tensor."""
    with torch.inference_mode(False):
        part = torch.empty(sizes, dtype=DTYPES[entry.dtype], device="cpu")
    read_all(files, manifest, plan_reads([(entry, LocalChunk(offsets, sizes, memory_view(part)))]))
    return part


def check_size(files: CheckpointFiles, shard: ShardEntry) -> None:
    """Raise CorruptionError if a shard is missing or does not have the saved size.

    A shard that is still on another machine is not checked.
    """
    if files.elsewhere(shard.name):
        return
    actual_bytes = files.size_bytes(shard.name)
    if actual_bytes != shard.size_bytes:
        raise CorruptionError(
            "A shard does not have the saved size",
            path=f"{files.path}/{shard.name}",
            expected=f"{shard.size_bytes} bytes",
            actual=f"{actual_bytes} bytes",
            remedy="load another checkpoint; `shardckpt verify` lists all corrupted files",
        )


@dataclass(frozen=True, slots=True)
class _Source:
    """The source of reads, and how to read: see `past_cache` and `sharing` of read_all, and `wait`
    of readinto."""

    files: CheckpointFiles
    manifest: Manifest | LazyManifest
    uploads: Uploads
    past_cache: float = NEVER
    wait: bool = True
    sharing: Sharing | None = None


_Read = Sequence[Any]
"""(begin, end, address or CopyRead) of a read. Begin and end are offsets in the shard."""


@dataclass(slots=True)
class _Window:
    """The reads of one window of a shard, sorted by offset. `base` is the offset of the window."""

    shard: int
    base: int
    reads: list[_Read]


def _windows(reads: Reads, more: Sequence[tuple[int, int]] = ()) -> list[_Window]:
    """Group reads into windows, in the order of the files. Direct reads are split at borders.

    `more` has the shard and the number of windows that may have no reads.
    """
    if len(reads.direct) == 1 and not reads.copies and not more:  # a slice of a tensor
        index, low, high, into = reads.direct[0].tolist()
        window_number = low // WINDOW_BYTES
        if (high - 1) // WINDOW_BYTES == window_number:
            return [_Window(index, window_number * WINDOW_BYTES, [(low, high, into)])]
    shard, begin, end, address = reads.direct.T
    first, parts = begin // WINDOW_BYTES, (end - 1) // WINDOW_BYTES - begin // WINDOW_BYTES + 1
    row = np.repeat(np.arange(len(begin)), parts)
    number = first[row] + np.arange(len(row)) - (np.cumsum(parts) - parts)[row]
    low = np.maximum(begin[row], number * WINDOW_BYTES)
    high = np.minimum(end[row], (number + 1) * WINDOW_BYTES)
    into = address[row] + low - begin[row]
    order = np.lexsort((high, low, shard[row]))
    by_key: dict[tuple[int, int], _Window] = {}
    keys = np.column_stack([shard[row], number])[order]
    cuts = np.flatnonzero((keys[1:] != keys[:-1]).any(axis=1)) + 1
    rows = np.column_stack([low, high, into])[order].tolist()
    for at, to in itertools.pairwise([0, *cuts.tolist(), len(rows)] if rows else []):
        index, window_number = keys[at].tolist()
        base = window_number * WINDOW_BYTES
        by_key[index, window_number] = _Window(index, base, rows[at:to])
    for copy in reads.copies:
        key = copy.shard, copy.begin // WINDOW_BYTES
        window = by_key.setdefault(key, _Window(copy.shard, key[1] * WINDOW_BYTES, []))
        window.reads.append((copy.begin, copy.end, copy))
    if reads.copies:
        for window in by_key.values():
            window.reads.sort(key=lambda read: (read[0], read[1]))
    for key in more:
        by_key.setdefault(key, _Window(key[0], key[1] * WINDOW_BYTES, []))
    return [by_key[key] for key in sorted(by_key)]


def _read_window(source: _Source, window: _Window, buffer: Buffer) -> int:
    """Perform all reads of one window. Returns the number of bytes read."""
    if source.sharing and (
        units := source.sharing.units(window.shard, window.base // WINDOW_BYTES)
    ):
        return _read_shared_window(source, window, source.sharing, units, buffer)
    size_bytes = source.manifest.shards[window.shard].size_bytes
    total = 0
    run: list[_Read] = []
    low = high = 0
    gap = BLOCK_BYTES if source.files.remote else 0
    for read in window.reads:
        if run and read[0] > high + gap and _floor(read[0]) > high + gap:  # most are adjacent
            _read_run(source, window, (low, high), run, buffer)
            total += high - low
            run = []
        if not run:
            low, high = _floor(read[0]), 0
        if read[1] > high:
            high = min(-(-read[1] // BLOCK_BYTES) * BLOCK_BYTES, size_bytes)
        run.append(read)
    _read_run(source, window, (low, high), run, buffer)
    return total + high - low


def _floor(offset: int) -> int:
    return offset // BLOCK_BYTES * BLOCK_BYTES


def _read_run(
    source: _Source, window: _Window, span: tuple[int, int], reads: list[_Read], buffer: Buffer
) -> None:
    """Read the blocks of a span, verify them, and copy bytes to the destinations of `reads`."""
    files, shard, base = source.files, source.manifest.shards[window.shard], window.base
    low, high = span
    if copies := files.copies():
        bad, later = _read_copies(copies, shard, low, buffer.view[low - base : high - base]), reads
    elif _passes_cache(source, span, reads) and files.read_past_cache(
        shard.name, buffer.view[low - base :], offset=low, size_bytes=high - low
    ):
        bad, later = corrupted_blocks(shard, low, buffer.view[low - base : high - base]), reads
    else:
        pieces, later = _scattered(base, span, reads, buffer)
        bad = _read_checked(source, shard, span, pieces)
    if bad:
        raise corruption_error(source.manifest, bad, shard=window.shard, path=files.path)
    _copy_from(buffer, base, later, source.uploads)


def _read_shared_window(
    source: _Source, window: _Window, sharing: Sharing, units: Sequence[Unit], buffer: Buffer
) -> int:
    """Read, receive and send the blocks of a window. Returns the number of bytes in all."""
    shard, base = source.manifest.shards[window.shard], window.base
    needed = {
        number
        for begin, end, _ in window.reads
        for number in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES))
    }
    runs: list[tuple[int, int, Unit | None]] = [(unit.first, unit.end, unit) for unit in units]
    needed.difference_update(*(range(first, end) for first, end, _ in runs))
    runs += [(run[0], run[-1] + 1, None) for run in _consecutive(sorted(needed))]
    offered: list[Unit] = []
    total = 0
    try:
        for first, end, unit in runs:
            low = first * BLOCK_BYTES
            view = buffer.view[low - base : min(end * BLOCK_BYTES, shard.size_bytes) - base]
            if not (unit and _received(source, shard, unit, low, view)) and (
                bad := _read_blocks(source, shard, low, view)
            ):
                path = source.files.path
                raise corruption_error(source.manifest, bad, shard=window.shard, path=path)
            if unit:
                sharing.offer(unit, view)
                offered.append(unit)
            total += len(view)
        _copy_from(buffer, base, window.reads, source.uploads)
    finally:
        for unit in offered:  # then the buffer is free again
            sharing.withdraw(unit)
    return total


def _received(source: _Source, shard: ShardEntry, unit: Unit, low: int, view: memoryview) -> bool:
    """Get the blocks of a unit from another rank, if one reads it, and verify them."""
    sharing = source.sharing
    assert sharing is not None
    sender = unit.source(sharing.rank)
    if sender is None:
        return False
    if sharing.receive(unit, view) and not corrupted_blocks(shard, low, view):
        return True
    if source.files.elsewhere(shard.name):
        raise TransferError(f"rank {sender} did not send blocks of {shard.name}")
    return False


def _read_blocks(source: _Source, shard: ShardEntry, low: int, view: memoryview) -> list[int]:
    """Read whole blocks from byte `low` on. Returns the numbers of the corrupted ones."""
    if copies := source.files.copies():
        return _read_copies(copies, shard, low, view)
    return _read_checked(source, shard, (low, low + len(view)), [view])


def _copy_from(buffer: Buffer, base: int, reads: list[_Read], uploads: Uploads) -> None:
    """Copy bytes of a buffer, which begins at byte `base` of a shard, to their destinations.

    Copies to devices have not ended when this returns.
    """
    held_at = buffer.address - base
    to_devices: list[CopyRead] = []
    for begin, end, target in reads:
        if type(target) is int:
            copy_bytes(target, held_at + begin, end - begin)
        elif target.into.is_cpu:
            with torch.inference_mode():  # the views need no autograd
                held = elements_at(buffer, begin - base, target)
                target.into.copy_(held.as_strided(target.sizes, target.strides))
        else:
            to_devices.append(target)
    if to_devices:
        uploads.begin(buffer, base, to_devices)


def _read_copies(
    copies: Sequence[CheckpointFiles], shard: ShardEntry, low: int, view: memoryview
) -> list[int]:
    """Read the blocks from byte `low` on: each from the first copy where it is intact.

    Returns the numbers of the blocks that no copy has. Raises the error of the first copy if no
    copy can be read.
    """
    wanted = list(range(low // BLOCK_BYTES, -(-(low + len(view)) // BLOCK_BYTES)))
    errors: list[ShardckptError] = []
    for files in copies:
        bad: list[int] = []
        for run in _consecutive(wanted):
            begin = run[0] * BLOCK_BYTES - low
            part = view[begin : (run[-1] + 1) * BLOCK_BYTES - low]
            try:
                files.readinto(shard.name, [part], offset=low + begin)
                found = corrupted_blocks(shard, low + begin, part)
            except (CheckpointError, StorageError) as error:
                errors.append(error)
                found = run
            bad += found
            files.count_verified(len(part) * (len(run) - len(found)) // len(run))
        wanted = bad
        if not wanted:
            return []
    if len(errors) >= len(copies):
        raise errors[0]
    return wanted


def _consecutive(numbers: list[int]) -> list[list[int]]:
    """Divide sorted numbers into runs without gaps."""
    runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    return [[number for _, number in run] for _, run in runs]


def _passes_cache(source: _Source, span: tuple[int, int], reads: list[_Read]) -> bool:
    if source.past_cache in (ALWAYS, NEVER):
        return source.past_cache == ALWAYS
    wanted_bytes: int = sum(end - begin for begin, end, _ in reads)
    return wanted_bytes >= source.past_cache * (span[1] - span[0])


def _scattered(
    base: int, span: tuple[int, int], reads: list[_Read], buffer: Buffer
) -> tuple[list[memoryview], list[_Read]]:
    """Choose the destination of each byte of a span: large runs are read directly.

    Returns:
        The memory for the bytes of the span, in order, and the reads to copy from the buffer.
    """
    low, high = span
    large = [read for read in reads if read[1] - read[0] >= DIRECT_BYTES]
    # If two reads need the same bytes, all bytes are read into the buffer.
    if not large or any(a[1] > b[0] for a, b in itertools.pairwise(reads)):
        return [buffer.view[low - base : high - base]], reads
    pieces: list[memoryview] = []
    later: list[_Read] = []
    at = low
    for read in reads:
        begin, end, target = read
        if end - begin < DIRECT_BYTES or isinstance(target, CopyRead):
            later.append(read)
            continue
        if begin > at:
            pieces.append(buffer.view[at - base : begin - base])
        pieces.append(view_at(target, end - begin))
        at = end
    if at < high:
        pieces.append(buffer.view[at - base : high - base])
    return pieces, later


def _read_checked(
    source: _Source, shard: ShardEntry, span: tuple[int, int], pieces: list[memoryview]
) -> list[int]:
    """Read a span of whole blocks into memory. Returns the numbers of the corrupted blocks."""
    at, high = span
    steps: list[memoryview] = []
    for piece in pieces:
        while piece:
            room = STEP_BYTES - at % STEP_BYTES
            steps.append(piece[:room])
            at, piece = at + len(steps[-1]), piece[room:]
    at, bad, digest = span[0], [], xxhash.xxh3_64()

    def check(step: memoryview) -> None:
        nonlocal at
        digest.update(step)
        at += len(step)
        if at % BLOCK_BYTES == 0 or at == high:
            number = (at - 1) // BLOCK_BYTES
            if digest.intdigest() != int(shard.digests[number]):
                bad.append(number)
            digest.reset()

    source.files.readinto(shard.name, steps, offset=at, on_filled=check, wait=source.wait)
    return bad


def corrupted_blocks(shard: ShardEntry, low: int, blocks: memoryview) -> list[int]:
    """Return the numbers of the corrupted blocks among whole blocks that begin at offset `low`."""
    return [
        number
        for number, at in enumerate(range(0, len(blocks), BLOCK_BYTES), low // BLOCK_BYTES)
        if block_digest(blocks[at : at + BLOCK_BYTES]) != int(shard.digests[number])
    ]


def corruption_error(
    manifest: Manifest | LazyManifest, blocks: Sequence[int], *, shard: int, path: str
) -> CorruptionError:
    """Return the error for corrupted blocks."""
    ranges = [(number * BLOCK_BYTES, (number + 1) * BLOCK_BYTES) for number in blocks]
    affected = affected_tensors(manifest, ranges, shard=shard)
    return CorruptionError(
        "A shard is corrupted",
        path=f"{path}/{manifest.shards[shard].name}",
        tensor=", ".join(affected) or None,
        expected=f"the digests of the manifest for block {', '.join(map(str, blocks[:8]))}",
        actual="other digests",
        remedy="load another checkpoint; `shardckpt verify` lists all corrupted files",
    )


def affected_tensors(
    manifest: Manifest | LazyManifest, ranges: Sequence[tuple[int, int]], *, shard: int
) -> list[str]:
    """Return the names of the tensors with bytes in any of the [begin, end) ranges of a shard."""
    return [
        name
        for name, entry in manifest.tensors.items()
        if any(
            (
                (entry.chunks[:, 0] == shard)
                & (entry.chunks[:, 1] < end)
                & (entry.chunks[:, 2] > begin)
            ).any()
            for begin, end in ranges
        )
    ]
