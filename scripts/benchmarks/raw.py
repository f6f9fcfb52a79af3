"""The limit of the machine: the same bytes written, copied and read with nothing around it."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

PIECE_BYTES = 8 << 20
PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20


class Memory:
    """Aligned memory, touched unless said otherwise. On huge pages a disk takes more of it in one
    request."""

    def __init__(self, size_bytes: int, *, touched: bool = True, huge: bool = False) -> None:
        size_bytes += -size_bytes % PAGE_BYTES + PIECE_BYTES
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.map = mmap.mmap(-1, size_bytes + HUGE_PAGE_BYTES, flags=flags)
        if huge:
            self.map.madvise(mmap.MADV_HUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        begin = -start % HUGE_PAGE_BYTES
        self.address = start + begin
        self.view = memoryview(self.map)[begin : begin + size_bytes]
        if touched:
            ctypes.memset(self.address, 7, size_bytes)


class Span(NamedTuple):
    """Bytes [begin, end) of a file."""

    file: str
    begin: int
    end: int


class Piece(NamedTuple):
    """At most PIECE_BYTES of a span, and where they go in memory."""

    file: int
    begin: int
    size: int
    at: int


def share(files: Sequence[str], *, rank: int, world_size: int) -> list[Span]:
    """The spans of files, laid end to end, that are one rank's when all read equally much."""
    sizes = [os.path.getsize(file) for file in files]
    low, high = (sum(sizes) * number // world_size for number in (rank, rank + 1))
    spans, start = [], 0
    for file, size in zip(files, sizes, strict=True):
        begin, end = max(low - start, 0), min(high - start, size)
        if begin < end:
            spans.append(Span(file, begin // PAGE_BYTES * PAGE_BYTES, end))
        start += size
    return spans


def _pieces(spans: Iterable[Span]) -> list[Piece]:
    pieces, at = [], 0
    for index, span in enumerate(spans):
        for begin in range(span.begin, span.end, PIECE_BYTES):
            size = min(PIECE_BYTES, span.end - begin)
            pieces.append(Piece(index, begin, size, at))
            at += size + -size % PAGE_BYTES
    return pieces


def _each(work: Callable[[Piece], object], pieces: Sequence[Piece], threads: int) -> None:
    if threads == 1:
        for piece in pieces:
            work(piece)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, pieces))


def write(file: str, size_bytes: int, source: Memory, *, threads: int) -> None:
    """Write a new file past the page cache from one aligned buffer, durably."""
    os.makedirs(os.path.dirname(file), exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
    padded = size_bytes + -size_bytes % PAGE_BYTES
    os.posix_fallocate(descriptor, 0, padded)
    _each(
        lambda piece: os.pwrite(descriptor, source.view[: piece.size], piece.begin),
        _pieces([Span(file, 0, padded)]),
        threads,
    )
    os.fsync(descriptor)
    os.close(descriptor)


def copy(size_bytes: int, source: Memory, target: Memory, *, threads: int) -> None:
    """Copy memory."""
    _each(
        lambda piece: ctypes.memmove(
            target.address + piece.at, source.address + piece.at, piece.size
        ),
        _pieces([Span("", 0, size_bytes)]),
        threads,
    )


Way = Callable[[Sequence[Span], Memory], None]


def _read_piece(descriptor: int, view: memoryview, at: int) -> None:
    while view:
        count = os.preadv(descriptor, [view], at)
        if not count:
            return  # the padding behind the end of the file
        view, at = view[count:], at + count


def _reading(flags: int, advice: int, threads: int) -> Way:
    def run(spans: Sequence[Span], target: Memory) -> None:
        files = [os.open(span.file, os.O_RDONLY | flags) for span in spans]
        for descriptor, span in zip(files, spans, strict=True):
            os.posix_fadvise(descriptor, span.begin, span.end - span.begin, advice)
        unit = PAGE_BYTES if flags & os.O_DIRECT else 1

        def read(piece: Piece) -> None:
            end = piece.at + piece.size + -piece.size % unit
            _read_piece(files[piece.file], target.view[piece.at : end], piece.begin)

        _each(read, _pieces(spans), threads)
        for descriptor in files:
            os.close(descriptor)

    return run


def _mapping(advice: int, threads: int) -> Way:
    def run(spans: Sequence[Span], target: Memory) -> None:
        maps, addresses = [], []
        for span in spans:
            with open(span.file, "rb") as opened:
                pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            pages.madvise(advice, span.begin, span.end - span.begin)
            maps.append(pages)
            addresses.append(ctypes.addressof(ctypes.c_char.from_buffer(pages)))
        _each(
            lambda piece: ctypes.memmove(
                target.address + piece.at, addresses[piece.file] + piece.begin, piece.size
            ),
            _pieces(spans),
            threads,
        )

    return run


def read_ways() -> dict[str, Way]:
    """Ways to read from files into memory; which is fastest when cold, only measuring tells."""
    advice = {
        "no advice": os.POSIX_FADV_NORMAL,
        "sequential": os.POSIX_FADV_SEQUENTIAL,
        "willneed": os.POSIX_FADV_WILLNEED,
    }
    ways = {
        f"buffered, {name}, {threads} threads": _reading(0, advised, threads)
        for (name, advised), threads in itertools.product(advice.items(), (1, 2))
    }
    ways["buffered, no advice, 8 threads"] = _reading(0, os.POSIX_FADV_NORMAL, 8)
    for threads in (1, 2, 8):
        ways[f"O_DIRECT, {threads} threads"] = _reading(os.O_DIRECT, os.POSIX_FADV_NORMAL, threads)
    ways["mmap, sequential, 2 threads"] = _mapping(mmap.MADV_SEQUENTIAL, 2)
    ways["mmap, willneed, 2 threads"] = _mapping(mmap.MADV_WILLNEED, 2)
    return ways
