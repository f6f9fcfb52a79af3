"""Read from shards: whole blocks, verified as they come, several windows at a time.

A shard is read in windows at fixed places. Within a window, neighbouring blocks that are
needed and not in the page cache are one read past it, into a buffer. Else each block is a
read, which scatters large runs straight into their destination and the rest into a buffer.
Each block's digest is checked over where its bytes have landed, and what lies in the buffer
is copied from there.
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
from shardckpt.errors import CorruptionError
from shardckpt.format.digests import BLOCK_BYTES, block_digest
from shardckpt.format.dtypes import DTYPES, memory_view
from shardckpt.format.entries import Manifest, ShardEntry, TensorEntry
from shardckpt.format.lazy_manifest import Outline
from shardckpt.io.buffers import Buffer, copy_bytes, have_huge_pages, lease, view_at
from shardckpt.io.gc_pause import collector_paused
from shardckpt.io.threads import stalled, workers
from shardckpt.plan.page_cache_policy import ALWAYS, NEVER
from shardckpt.plan.read_plan import WINDOW_BYTES, CopyRead, Reads, plan_reads
from shardckpt.state.local_chunks import LocalChunk
from shardckpt.storage.base import CheckpointFiles, WouldWait

__all__ = ["bad_blocks", "check_size", "damaged_blocks", "read_all", "read_box", "tensors_in"]

DIRECT_BYTES = 128 << 10
"""A run shorter than this goes through the buffer: fewer, larger pieces for each system call."""

STEP_BYTES = BLOCK_BYTES // 2
"""As much is read from the page cache before the digest takes it up: where it came from and where
it went are then still in the processor's own cache."""

_POLL_S = 0.2


def read_all(
    files: CheckpointFiles,
    manifest: Manifest | Outline,
    reads: Reads,
    *,
    past_cache: float = NEVER,
    progress: Callable[[int], None] = lambda read_bytes: None,
) -> int:
    """Carry out reads and verify every block that they touch. Not collective.

    Args:
        files: The checkpoint.
        manifest: Its manifest.
        reads: The reads. Their destinations are complete only if this returns.
        past_cache: A block that is not in the page cache is read past it, which is faster, if at
            least this part of it is wanted. See plan/page_cache_policy.
        progress: Called with the bytes read so far.

    Returns:
        The bytes read.

    Raises:
        CorruptionError: A shard is missing, truncated or changed. It names the file, the block and
            the tensors that it affects.
    """
    with collector_paused():
        windows = _windows(reads)
    if not windows:  # values alone were asked for: no thread, no buffer
        return 0
    for shard in {window.shard for window in windows}:
        check_size(files, manifest.shards[shard])
    if len(windows) == 1:  # from the page cache it comes in less time than a thread starts
        with suppress(WouldWait), lease(1) as (buffer,):
            return _read_window(_Source(files, manifest, wait=False), windows[0], buffer)
    if not (current().read_past_cache and have_huge_pages()):
        past_cache = NEVER
    source = _Source(files, manifest, past_cache=past_cache)
    # What comes from the page cache keeps a processor busy; what comes from the disk does not.
    threads = min(current().read_threads * (1 if past_cache == NEVER else 2), len(windows))
    queue = iter(windows)  # next() on it is atomic: the workers share it
    stop = threading.Event()
    read_bytes = [0] * threads

    def work(worker: int, buffer: Buffer) -> None:
        for window in queue:
            if stop.is_set():
                return
            read_bytes[worker] += _read_window(source, window, buffer)

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
                elif pending and time.monotonic() - since > current().stall_deadline_s:
                    raise stalled("Reading", files.path)
        finally:
            stop.set()
    return sum(read_bytes)


def read_box(
    files: CheckpointFiles,
    manifest: Manifest | Outline,
    entry: TensorEntry,
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
) -> torch.Tensor:
    """Read the box (offsets, sizes) of a tensor of the manifest, as a new CPU tensor."""
    with torch.inference_mode(False):
        part = torch.empty(sizes, dtype=DTYPES[entry.dtype], device="cpu")
    read_all(files, manifest, plan_reads([(entry, LocalChunk(offsets, sizes, memory_view(part)))]))
    return part


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


@dataclass(frozen=True, slots=True)
class _Source:
    """Where to read from, and how: what of it past the page cache (see read_all), and whether to
    wait or raise WouldWait."""

    files: CheckpointFiles
    manifest: Manifest | Outline
    past_cache: float = NEVER
    wait: bool = True


_Read = Sequence[Any]
"""(begin, end, address or CopyRead) of a read in its shard's file."""


@dataclass(slots=True)
class _Window:
    """The reads of one window of a shard, by their begin; `base` is where it begins."""

    shard: int
    base: int
    reads: list[_Read]


def _windows(reads: Reads) -> list[_Window]:
    """All windows that hold reads, in the order of the files; direct reads are cut at borders."""
    shard, begin, end, address = reads.direct.T
    first, parts = begin // WINDOW_BYTES, (end - 1) // WINDOW_BYTES - begin // WINDOW_BYTES + 1
    row = np.repeat(np.arange(len(begin)), parts)
    number = first[row] + np.arange(len(row)) - (np.cumsum(parts) - parts)[row]
    low = np.maximum(begin[row], number * WINDOW_BYTES)
    high = np.minimum(end[row], (number + 1) * WINDOW_BYTES)
    into = address[row] + low - begin[row]
    order = np.lexsort((high, low, shard[row]))
    found: dict[tuple[int, int], _Window] = {}
    places = np.column_stack([shard[row], number])[order]
    cuts = np.flatnonzero((places[1:] != places[:-1]).any(axis=1)) + 1
    rows = np.column_stack([low, high, into])[order].tolist()
    for at, to in itertools.pairwise([0, *cuts.tolist(), len(rows)] if rows else []):
        index, place = places[at].tolist()
        found[index, place] = _Window(index, place * WINDOW_BYTES, rows[at:to])
    for copy in reads.copies:
        key = copy.shard, copy.begin // WINDOW_BYTES
        window = found.setdefault(key, _Window(copy.shard, key[1] * WINDOW_BYTES, []))
        window.reads.append((copy.begin, copy.end, copy))
    if reads.copies:
        for window in found.values():
            window.reads.sort(key=lambda read: (read[0], read[1]))
    return [found[key] for key in sorted(found)]


def _read_window(source: _Source, window: _Window, buffer: Buffer) -> int:
    """Read, verify and place all reads of one window; the bytes read."""
    size_bytes = source.manifest.shards[window.shard].size_bytes
    total = 0
    run: list[_Read] = []
    low = high = 0
    for read in window.reads:
        if run and read[0] > high and _floor(read[0]) > high:
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
    """Read the bytes of a span, which are whole blocks, and serve `reads` from them."""
    files, shard, base = source.files, source.manifest.shards[window.shard], window.base
    low, high = span
    if _passes_cache(source, span, reads) and files.read_past_cache(
        shard.name, buffer.view[low - base :], offset=low, size_bytes=high - low
    ):
        bad, later = bad_blocks(shard, low, buffer.view[low - base : high - base]), reads
    else:
        pieces, later = _scattered(base, span, reads, buffer)
        bad = _read_checked(source, shard, span, pieces)
    if bad:
        raise damaged_blocks(source.manifest, bad, shard=window.shard, path=files.path)
    held_at = buffer.address - base
    for begin, end, place in later:
        if type(place) is int:
            copy_bytes(place, held_at + begin, end - begin)
            continue
        count = (end - begin) // place.dtype.itemsize
        held = torch.frombuffer(buffer.view, dtype=place.dtype, count=count, offset=begin - base)
        with torch.inference_mode():  # tensors made in it take nothing outside it
            place.into.copy_(held.as_strided(place.sizes, place.strides))


def _passes_cache(source: _Source, span: tuple[int, int], reads: list[_Read]) -> bool:
    if source.past_cache in (ALWAYS, NEVER):
        return source.past_cache == ALWAYS
    wanted_bytes: int = sum(end - begin for begin, end, _ in reads)
    return wanted_bytes >= source.past_cache * (span[1] - span[0])


def _scattered(
    base: int, span: tuple[int, int], reads: list[_Read], buffer: Buffer
) -> tuple[list[memoryview], list[_Read]]:
    """Where the bytes of a span go: large runs to their place, all others into the buffer; and the
    reads that are served from there."""
    low, high = span
    large = [read for read in reads if read[1] - read[0] >= DIRECT_BYTES]
    # Bytes that two reads want can land in one place only: then all go through the buffer.
    if not large or any(a[1] > b[0] for a, b in itertools.pairwise(reads)):
        return [buffer.view[low - base : high - base]], reads
    pieces: list[memoryview] = []
    later: list[_Read] = []
    at = low
    for read in reads:
        begin, end, place = read
        if end - begin < DIRECT_BYTES or isinstance(place, CopyRead):
            later.append(read)
            continue
        if begin > at:
            pieces.append(buffer.view[at - base : begin - base])
        pieces.append(view_at(place, end - begin))
        at = end
    if at < high:
        pieces.append(buffer.view[at - base : high - base])
    return pieces, later


def _read_checked(
    source: _Source, shard: ShardEntry, span: tuple[int, int], pieces: list[memoryview]
) -> list[int]:
    """Read a span, which is whole blocks, into pieces; numbers of the blocks whose digest
    differs."""
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


def bad_blocks(shard: ShardEntry, low: int, blocks: memoryview) -> list[int]:
    """Numbers of the blocks whose digest differs, of whole blocks from byte `low` on."""
    return [
        number
        for number, at in enumerate(range(0, len(blocks), BLOCK_BYTES), low // BLOCK_BYTES)
        if block_digest(blocks[at : at + BLOCK_BYTES]) != int(shard.digests[number])
    ]


def damaged_blocks(
    manifest: Manifest | Outline, blocks: Sequence[int], *, shard: int, path: str
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


def tensors_in(
    manifest: Manifest | Outline, ranges: Sequence[tuple[int, int]], *, shard: int
) -> list[str]:
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
