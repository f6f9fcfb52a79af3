"""Write one shard: copy, hash and write, as a pipeline over a few large buffers.

The calling thread copies tensors to a page-aligned buffer, and hashes each block while it is in the
processor's cache. Other threads write full buffers, with O_DIRECT if the file supports it. All
three steps release the GIL. Staged data that has the order of the file is written without another
copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch
from numpy.typing import NDArray

from shardckpt.config import current
from shardckpt.format.digests import BLOCK_BYTES, block_digest
from shardckpt.format.safetensors_header import HEADER_ALIGN
from shardckpt.io.buffers import BUFFER_BYTES, Buffer, copy_bytes, view_at
from shardckpt.io.tensor_memory import contiguous_pieces, plain_address
from shardckpt.io.threads import stalled, workers
from shardckpt.storage.base import WritableFile
from shardckpt.torch_compat import storage_id

__all__ = ["WriteBlocks", "write_shard"]

WriteBlocks = Callable[[memoryview, int, Sequence[int]], None]
"""A function that writes blocks to the file: their bytes, the offset of the first one, and the
digest of each."""

_BUFFERS = 3
_THREADS = 2


def write_shard(
    file: WritableFile,
    *,
    header: bytes,
    tensors: Iterable[torch.Tensor],
    begin: int = 0,
    staged: bool = False,
    progress: Callable[[int], None] = lambda written_bytes: None,
    write: WriteBlocks | None = None,
) -> tuple[int, NDArray[np.uint64]]:
    """Write a shard's header and its tensors, in order. The file stays open.

    Args:
        file: The file.
        header: The header. If `begin` is above 0, the rest of the header from there on.
        tensors: The tensors that follow.
        begin: The offset of the first byte to write, a multiple of the block size.
        staged: The tensors do not change while they are written, so large ones are not copied.
        progress: Called with the number of bytes written so far.
        write: Writes the blocks, from several threads; by default with `file.write`.

    Returns:
        The offset at which the written bytes end, and the digest of each block.

    Raises:
        StorageError: The file system refused a write. No thread writes any more.
    """
    with workers(_THREADS, "shardckpt-write", buffers=_BUFFERS) as (pool, buffers):
        stream = _Stream(file, buffers, pool, progress, begin, write)
        head = [torch.frombuffer(bytearray(header), dtype=torch.uint8)] if header else []
        joined = list(_runs(tensors)) if staged else tensors
        for tensor in itertools.chain(head, joined):
            address = plain_address(tensor)
            if address and not (tensor.is_neg() or tensor.is_conj()):  # most tensors
                stream.put(address, tensor.nbytes, staged=staged)
                continue
            for piece in contiguous_pieces(tensor):
                stream.put(piece.data_ptr(), piece.nbytes, staged=staged)
        return stream.finish()


def _runs(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the bytes of the tensors. Neighbours in one storage are joined to one tensor."""
    begin = end = 0
    storage: torch.UntypedStorage | None = None
    identity = 0
    for tensor in tensors:
        at = int(tensor.storage_offset()) * tensor.element_size()
        joins = storage is not None and storage_id(tensor) == identity and at == end
        if not tensor.is_cpu or not tensor.is_contiguous() or not joins:
            if storage is not None:
                yield _bytes_of(storage, begin, end)
            storage = None
            if not tensor.is_cpu or not tensor.is_contiguous():
                yield tensor
                continue
            storage, identity, begin = tensor.untyped_storage(), storage_id(tensor), at
        end = at + tensor.numel() * tensor.element_size()
    if storage is not None:
        yield _bytes_of(storage, begin, end)


def _bytes_of(storage: torch.UntypedStorage, begin: int, end: int) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(
        storage, begin, (end - begin,), (1,)
    )


class _Stream:
    """A ring of buffers: one is filled while the others are written."""

    def __init__(
        self,
        file: WritableFile,
        buffers: list[Buffer],
        pool: ThreadPoolExecutor,
        progress: Callable[[int], None],
        begin: int,
        write: WriteBlocks | None,
    ) -> None:
        self.file = file
        self.write = write or (lambda view, offset, digests: file.write(view, offset=offset))
        self.begin = begin
        self.buffers = buffers
        self.pool = pool
        self.progress = progress
        self.pending: list[Future[None] | None] = [None] * len(buffers)
        self.current = 0
        self.filled = 0  # bytes in the current buffer
        self.hashed = 0  # bytes in the current buffer whose block has a digest
        self.submitted = begin  # the end of the bytes that were given to the threads
        self.digests: list[int] = []

    def put(self, address: int, size_bytes: int, *, staged: bool) -> None:
        """Append the bytes at an address."""
        while size_bytes:
            take = self.hashed + BLOCK_BYTES - self.filled
            if size_bytes < take:
                take = size_bytes
            elif (
                staged
                and size_bytes >= BUFFER_BYTES
                and take == BLOCK_BYTES  # `submitted` is always the beginning of a block
                and not address % HEADER_ALIGN
            ):
                if self.filled:
                    self.flush()
                self.write_from(address)
                address += BUFFER_BYTES
                size_bytes -= BUFFER_BYTES
                continue
            copy_bytes(self.buffers[self.current].address + self.filled, address, take)
            address += take
            size_bytes -= take
            self.filled += take
            if self.filled == self.hashed + BLOCK_BYTES:
                self.hash_block()
                if self.filled == BUFFER_BYTES:
                    self.flush()

    def write_from(self, address: int) -> None:
        """Append BUFFER_BYTES from an address, without a copy."""
        view = view_at(address, BUFFER_BYTES)
        for begin in range(0, BUFFER_BYTES, BLOCK_BYTES):
            self.digests.append(block_digest(view[begin : begin + BLOCK_BYTES]))
        self.submit(view, BUFFER_BYTES)

    def hash_block(self) -> None:
        view = self.buffers[self.current].view
        self.digests.append(block_digest(view[self.hashed : self.filled]))
        self.hashed = self.filled

    def flush(self) -> None:
        """Give the current buffer to the threads, and wait until the next one is free."""
        size = self.filled
        view = self.buffers[self.current].view
        if self.file.direct and size % HEADER_ALIGN:
            padded = size + -size % HEADER_ALIGN
            view[size:padded] = bytes(padded - size)
            size = padded
        self.submit(view[:size], self.filled)

    def submit(self, view: memoryview, size_bytes: int) -> None:
        digests = self.digests[(self.submitted - self.begin) // BLOCK_BYTES :]
        self.pending[self.current] = self.pool.submit(self.write, view, self.submitted, digests)
        self.submitted += size_bytes
        self.progress(self.submitted - self.begin)
        self.current = (self.current + 1) % len(self.buffers)
        self.filled = self.hashed = 0
        self.settle(self.current)

    def settle(self, index: int) -> None:
        pending, self.pending[index] = self.pending[index], None
        if pending is None:
            return
        if not wait([pending], timeout=current().stall_deadline_s).done:
            raise stalled("A write")
        pending.result()

    def finish(self) -> tuple[int, NDArray[np.uint64]]:
        if self.filled > self.hashed:
            self.hash_block()
        if self.filled:
            self.flush()
        for index in range(len(self.buffers)):
            self.settle(index)
        return self.submitted, np.array(self.digests, dtype=np.uint64)
