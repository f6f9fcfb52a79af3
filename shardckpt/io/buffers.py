"""Reusable buffers on huge pages for disk I/O, and copies between addresses.

One request to a disk has a limited number of memory segments. With pages of 4 KiB a request has
less than a megabyte, and O_DIRECT is slower than the page cache. With huge pages a request is as
large as the disk allows.
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

from shardckpt.errors import StalledError

__all__ = [
    "BUFFER_BYTES",
    "HUGE_PAGE_BYTES",
    "Buffer",
    "copy_bytes",
    "have_huge_pages",
    "huge_pages",
    "lease",
    "page_locked",
    "private_memory",
    "request_huge_pages",
    "view_at",
]

BUFFER_BYTES = 8 << 20
HUGE_PAGE_BYTES = 2 << 20


def private_memory(size_bytes: int) -> memoryview:
    """Allocate private memory, aligned to a huge page. Forked children do not inherit it."""
    spare = HUGE_PAGE_BYTES - mmap.PAGESIZE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, size_bytes + spare, flags=flags)
    _advise(memory, "MADV_DONTFORK")
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE_BYTES
    return memoryview(memory)[begin : begin + size_bytes]


def request_huge_pages(memory: memoryview) -> None:
    """Ask the system for huge pages for `private_memory`.

    Pages that are touched later are huge at once. The kernel converts the other pages later.
    """
    _advise(memory.obj, "MADV_HUGEPAGE")


def huge_pages(size_bytes: int) -> memoryview:
    """Allocate private memory, on huge pages if the system supports them."""
    memory = private_memory(size_bytes)
    request_huge_pages(memory)
    return memory


def _advise(memory: Any, advice: str) -> None:
    if hasattr(mmap, advice):
        with suppress(OSError):  # the kernel may lack support
            memory.madvise(getattr(mmap, advice))


@functools.cache
def have_huge_pages() -> bool:
    """Whether the system grants huge pages on request (madvise)."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled", encoding="ascii") as file:
            return hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in file.read()
    except OSError:
        return False


class Buffer:
    """Memory for copies: a memoryview and its address."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(view))


def page_locked(size_bytes: int) -> Buffer:
    """Allocate memory that the accelerator copies from and to by itself, while the CPU goes on.

    Memory of ours is locked in place, as torch may round its own up to a power of two. If nothing
    can be locked, for example because of a limit, the memory is ordinary and copies are slower.
    """
    from shardckpt.io.devices import accelerator, page_lock  # inspect and ls need no torch

    of_torch: Any = accelerator.page_locked_tensor(size_bytes)
    if of_torch is not None:
        return Buffer(memoryview(of_torch.numpy()))
    buffer = Buffer(huge_pages(size_bytes))
    page_lock(buffer.view, buffer.address, owner=buffer)
    return buffer


_free: list[Buffer] = []
_free_locked: list[Buffer] = []
_abandoned: list[list[Buffer]] = []
_lock = threading.Lock()
_KEEP = 16


def _forget() -> None:
    """Forget the buffers in a forked child, which does not inherit their memory."""
    global _lock
    _lock = threading.Lock()
    _free.clear()
    _free_locked.clear()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def lease(count: int, *, locked: bool = False) -> Iterator[list[Buffer]]:
    """Lend `count` buffers of BUFFER_BYTES for the with block. Their content is undefined.

    `locked` asks for page-locked ones.
    """
    free = _free_locked if locked else _free
    with _lock:
        taken = [free.pop() for _ in range(min(count, len(free)))]
    for _ in range(count - len(taken)):
        taken.append(page_locked(BUFFER_BYTES) if locked else Buffer(huge_pages(BUFFER_BYTES)))
    try:
        yield taken
    except StalledError:  # something may still use them, now or later
        _abandoned.append(taken)
        taken = []
        raise
    finally:
        with _lock:
            free.extend(taken[: max(0, _KEEP - len(free))])


# A ctypes array would do, but creating its type takes 10 us for each new length.
_memory_at = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_at.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_memory_at.restype = ctypes.py_object
_WRITABLE = 0x200  # PyBUF_WRITE


def view_at(address: int, size_bytes: int) -> memoryview:
    """Return a view of the memory at an address. Its owner must outlive the view."""
    view: memoryview = _memory_at(address, size_bytes, _WRITABLE)
    return view


_move_in_between = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)
_SHORT_BYTES = 64 << 10  # a shorter copy takes less time than to reacquire the GIL


def copy_bytes(target: int, source: int, size_bytes: int) -> None:
    """Copy between addresses. Long copies release the GIL."""
    if size_bytes < _SHORT_BYTES:
        _move_in_between(target, source, size_bytes)
    else:
        ctypes.memmove(target, source, size_bytes)
