"""Page-aligned buffers, reused from save to save, and bytes by address."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["BUFFER_BYTES", "Buffer", "contiguous_parts", "lease", "view_at"]

BUFFER_BYTES = 8 << 20


class Buffer:
    """BUFFER_BYTES of memory that begins on a page: `view` to slice, `address` to copy to."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, BUFFER_BYTES)
        self.view = memoryview(self._memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))


_free: list[Buffer] = []
_lock = threading.Lock()
_KEEP = 16


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


def view_at(address: int, size_bytes: int) -> memoryview:
    """The memory at an address; whoever owns it must outlive the view."""
    return memoryview((ctypes.c_char * size_bytes).from_address(address)).cast("B")


def contiguous_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor's elements in row-major order, as contiguous CPU tensors.

    A contiguous CPU tensor comes back as it is. Any other is copied in parts of at most
    BUFFER_BYTES, so that a view costs a buffer and never its whole storage.
    """
    if tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        yield tensor
        return
    tensor, size_bytes = tensor.detach(), tensor.nbytes
    if size_bytes <= BUFFER_BYTES or tensor.dim() == 0:
        yield tensor.resolve_conj().resolve_neg().to("cpu").contiguous()
        return
    rows = max(1, BUFFER_BYTES * tensor.shape[0] // size_bytes)
    for part in torch.split(tensor, rows):
        yield from contiguous_parts(part[0] if part.shape[0] == 1 else part)
