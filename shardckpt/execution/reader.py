"""Read from shards: whole blocks, verified as they come, several windows at a time.

A shard is read in windows at fixed places. Within a window, neighbouring blocks that are
needed are one read, which scatters large runs straight into their destination and the
rest into a buffer; each block's digest is checked over where its bytes have landed, and
what lies in the buffer is copied from there.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait

import torch
import xxhash

from shardckpt import knobs
from shardckpt.errors import CorruptionError
from shardckpt.execution.buffers import Buffer, view_at
from shardckpt.execution.workers import stalled, workers
from shardckpt.format.digests import BLOCK_BYTES
from shardckpt.format.manifest import Manifest, ShardEntry
from shardckpt.planning.reads import WINDOW_BYTES, CopyRead, DirectRead, Read
from shardckpt.storage.base import CheckpointFiles

__all__ = ["bad_blocks", "check_size", "damaged_blocks", "read_all", "tensors_in"]

DIRECT_BYTES = 128 << 10
"""A run shorter than this goes through the buffer: fewer, larger pieces for each system call."""

_POLL_S = 0.2


def read_all(
    files: CheckpointFiles,
    manifest: Manifest,
    reads: Iterable[Read],
    *,
    progress: Callable[[int], None] = lambda read_bytes: None,
) -> int:
    """Carry out reads; every block touched is verified. Returns the bytes read.

    Destinations are complete only if this returns. Raises CorruptionError for a shard that
    is missing, cut or changed, naming the file, the block and the tensors hurt.
    """
    windows = _by_window(reads)
    for shard in {shard for shard, _ in windows}:
        check_size(files, manifest.shards[shard])
    threads = max(1, min(knobs.READ_THREADS, len(windows)))
    queue = iter(sorted(windows))  # next() on it is atomic: the workers share it
    stop = threading.Event()
    read_bytes = [0] * threads

    def work(worker: int, buffer: Buffer) -> None:
        for window in queue:
            if stop.is_set():
                return
            read_bytes[worker] += _read_window(files, manifest, window, windows[window], buffer)

    with workers(threads, "shardckpt-read", buffers=threads) as (pool, buffers):
        pending = {pool.submit(work, *job) for job in enumerate(buffers)}
        try:
            last, since = 0, time.monotonic()
            while pending:
                done, pending = wait(pending, _POLL_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if sum(read_bytes) != last:
                    last, since = sum(read_bytes), time.monotonic()
                    progress(last)
                elif pending and time.monotonic() - since > knobs.STALL_DEADLINE_S:
                    raise stalled("Reading", files.path)
        finally:
            stop.set()
    return sum(read_bytes)


def check_size(files: CheckpointFiles, shard: ShardEntry) -> None:
    """Raise CorruptionError for a shard that is missing or of another size than was saved."""
    found = files.size_bytes(shard.name)
    if found != shard.size_bytes:
        raise CorruptionError(
            "A shard is cut, or something was appended to it",
            path=f"{files.path}/{shard.name}",
            expected=f"{shard.size_bytes} bytes",
            actual=f"{found} bytes",
            remedy="load another checkpoint; `shardckpt verify` lists all damage in this one",
        )


def _by_window(reads: Iterable[Read]) -> dict[tuple[int, int], list[Read]]:
    """Reads by (shard, number of the window); direct ones are cut at the borders."""
    windows: dict[tuple[int, int], list[Read]] = defaultdict(list)
    for read in reads:
        first, last = read.begin // WINDOW_BYTES, (read.end - 1) // WINDOW_BYTES
        if first == last or isinstance(read, CopyRead):
            windows[read.shard, first].append(read)
            continue
        for number in range(first, last + 1):
            begin = max(read.begin, number * WINDOW_BYTES)
            end = min(read.end, (number + 1) * WINDOW_BYTES)
            address = read.address + begin - read.begin
            windows[read.shard, number].append(DirectRead(read.shard, begin, end, address))
    return windows


def _read_window(
    files: CheckpointFiles,
    manifest: Manifest,
    window: tuple[int, int],
    reads: list[Read],
    buffer: Buffer,
) -> int:
    """Read, verify and place all reads of one window; the bytes read."""
    shard = manifest.shards[window[0]]
    reads.sort(key=lambda read: (read.begin, read.end))
    total = 0
    start = 0
    while start < len(reads):
        low = _floor(reads[start].begin)
        high = 0
        stop = start
        while stop < len(reads) and (stop == start or _floor(reads[stop].begin) <= high):
            border = -(-reads[stop].end // BLOCK_BYTES) * BLOCK_BYTES
            high = max(high, min(border, shard.size_bytes))
            stop += 1
        _read_run(files, manifest, window, (low, high), reads[start:stop], buffer)
        total += high - low
        start = stop
    return total


def _floor(offset: int) -> int:
    return offset // BLOCK_BYTES * BLOCK_BYTES


def _read_run(
    files: CheckpointFiles,
    manifest: Manifest,
    window: tuple[int, int],
    span: tuple[int, int],
    reads: list[Read],
    buffer: Buffer,
) -> None:
    """Read the bytes of a span, which are whole blocks, and serve `reads` from them."""
    shard, base = manifest.shards[window[0]], window[1] * WINDOW_BYTES
    low, high = span
    pieces: list[memoryview] = []
    later: list[Read] = []
    at = low
    # Bytes that two reads want can land in one place only: then all go through the buffer.
    apart = all(a.end <= b.begin for a, b in itertools.pairwise(reads))
    for read in reads:
        size = read.end - read.begin
        if not apart or size < DIRECT_BYTES or isinstance(read, CopyRead):
            later.append(read)
            continue
        if read.begin > at:
            pieces.append(buffer.view[at - base : read.begin - base])
        pieces.append(view_at(read.address, size))
        at = read.end
    if at < high:
        pieces.append(buffer.view[at - base : high - base])
    files.readinto(shard.name, pieces, offset=low)
    bad = bad_blocks(shard, low, pieces)
    if bad:
        raise damaged_blocks(manifest, bad, shard=window[0], path=files.path)
    for read in later:
        offset = read.begin - base
        if isinstance(read, DirectRead):
            ctypes.memmove(read.address, buffer.address + offset, read.end - read.begin)
            continue
        count = (read.end - read.begin) // read.dtype.itemsize
        held = torch.frombuffer(buffer.view, dtype=read.dtype, count=count, offset=offset)
        read.into.copy_(held.as_strided(read.sizes, read.strides))


def bad_blocks(shard: ShardEntry, low: int, pieces: Sequence[memoryview]) -> list[int]:
    """Numbers of the blocks whose digest differs; the pieces hold whole blocks from `low` on."""
    bad: list[int] = []
    digest = xxhash.xxh3_64()
    number, room = low // BLOCK_BYTES, BLOCK_BYTES
    for index, piece in enumerate(pieces):
        at, last = 0, index == len(pieces) - 1
        while at < len(piece):
            take = min(room, len(piece) - at)
            digest.update(piece[at : at + take])
            at, room = at + take, room - take
            if room == 0 or (last and at == len(piece)):
                if digest.intdigest() != int(shard.digests[number]):
                    bad.append(number)
                digest.reset()
                number, room = number + 1, BLOCK_BYTES
    return bad


def damaged_blocks(
    manifest: Manifest, blocks: Sequence[int], *, shard: int, path: str
) -> CorruptionError:
    """The error for blocks whose bytes are not those that were saved."""
    ranges = [(number * BLOCK_BYTES, (number + 1) * BLOCK_BYTES) for number in blocks]
    hurt = tensors_in(manifest, ranges, shard=shard)
    return CorruptionError(
        "A shard's bytes are not those that were saved",
        path=f"{path}/{manifest.shards[shard].name}",
        tensor=", ".join(hurt) or None,
        expected=f"the digests of the manifest for block {', '.join(map(str, blocks[:8]))}",
        actual="other bytes",
        remedy="load another checkpoint; `shardckpt verify` lists all damage in this one",
    )


def tensors_in(manifest: Manifest, ranges: Sequence[tuple[int, int]], *, shard: int) -> list[str]:
    """Names of the tensors with bytes in any of the [begin, end) ranges of a shard's file."""
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
