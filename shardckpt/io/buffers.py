"""Memory on huge pages for the disk to read and write, reused from save to save; bytes by address.

A request to a disk holds a limited number of pieces of memory. Of pages of 4 KiB that is less
than a megabyte, and O_DIRECT is then slower than the page cache; of huge pages it is as much
as the disk takes.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from shardckpt.io.tensor_memory import check_memory

__all__ = [
    "BUFFER_BYTES",
    "HUGE_PAGE_BYTES",
    "Buffer",
    "ask_for_huge_pages",
    "contiguous_parts",
    "copy_bytes",
    "have_huge_pages",
    "huge_pages",
    "lease",
    "private_memory",
    "view_at",
]

BUFFER_BYTES = 8 << 20
HUGE_PAGE_BYTES = 2 << 20


def private_memory(size_bytes: int) -> memoryview:
    """Fresh private memory that begins where a huge page may; not there after a fork."""
    spare = HUGE_PAGE_BYTES - mmap.PAGESIZE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, size_bytes + spare, flags=flags)
    _advise(memory, "MADV_DONTFORK")
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE_BYTES
    return memoryview(memory)[begin : begin + size_bytes]


def ask_for_huge_pages(memory: memoryview) -> None:
    """Let private_memory lie on huge pages where the system has them: what is touched from now on
    at once, all else as the kernel comes to move it."""
    _advise(memory.obj, "MADV_HUGEPAGE")


def huge_pages(size_bytes: int) -> memoryview:
    """Fresh private memory, on huge pages where the system has them."""
    memory = private_memory(size_bytes)
    ask_for_huge_pages(memory)
    return memory


def _advise(memory: Any, advice: str) -> None:
    if hasattr(mmap, advice):
        with suppress(OSError):  # a kernel built without it
            memory.madvise(getattr(mmap, advice))


@functools.cache
def have_huge_pages() -> bool:
    """Whether this system gives memory on huge pages to those who ask."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled", encoding="ascii") as file:
            return hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in file.read()
    except OSError:
        return False


class Buffer:
    """BUFFER_BYTES of memory on huge pages: `view` to slice, `address` to copy to."""

    def __init__(self) -> None:
        self.view = huge_pages(BUFFER_BYTES)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.view))


_free: list[Buffer] = []
_lock = threading.Lock()
_KEEP = 16


def _forget() -> None:
    """In a forked child, where the memory is not."""
    global _lock
    _lock = threading.Lock()
    _free.clear()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def lease(count: int) -> Iterator[list[Buffer]]:
    """`count` buffers for the length of a with block; their content is whatever it was."""
    with _lock:
        taken = [_free.pop() for _ in range(min(count, len(_free)))]
    taken += [Buffer() for _ in range(count - len(taken))]
    try:
        yield taken
    finally:
        with _lock:
            _free.extend(taken[: max(0, _KEEP - len(_free))])


# A ctypes array of that length would do too, but its type is made anew each time: 10 us.
_memory_at = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_at.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_memory_at.restype = ctypes.py_object
_WRITABLE = 0x200  # PyBUF_WRITE


def view_at(address: int, size_bytes: int) -> memoryview:
    """The memory at an address; whoever owns it must outlive the view."""
    view: memoryview = _memory_at(address, size_bytes, _WRITABLE)
    return view


_move_in_between = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)
_SHORT_BYTES = 64 << 10  # copied before the interpreter's lock, once given up, is there again


def copy_bytes(target: int, source: int, size_bytes: int) -> None:
    """Copy from one address to another; without the interpreter's lock if that pays."""
    (_move_in_between if size_bytes < _SHORT_BYTES else ctypes.memmove)(target, source, size_bytes)


def contiguous_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor's elements in row-major order, as contiguous CPU tensors.

    A contiguous CPU tensor comes back as it is. Any other is copied in parts of at most
    BUFFER_BYTES, so that a view costs a buffer and never its whole storage. Raises
    UnsupportedLeafError for a tensor that has no memory of its own.
    """
    check_memory(tensor)
    if tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        yield tensor
        return
    tensor, size_bytes = tensor.detach(), tensor.nbytes
    if size_bytes <= BUFFER_BYTES or tensor.dim() == 0:
        copied = tensor.resolve_conj().resolve_neg().to("cpu").contiguous()
        check_memory(copied)
        yield copied
        return
    rows = max(1, BUFFER_BYTES * tensor.shape[0] // size_bytes)
    for part in torch.split(tensor, rows):
        yield from contiguous_parts(part[0] if part.shape[0] == 1 else part)
