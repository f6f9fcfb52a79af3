"""The interface of checkpoints that can be rewritten: any format, read in pieces of a buffer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from shardckpt.format.dtype_names import itemsize
from shardckpt.format.entries import Manifest
from shardckpt.io.buffers import BUFFER_BYTES
from shardckpt.plan.local_plan import ChunkTable, TensorSpec

__all__ = ["Source", "cut_box", "read_chunks"]


class Source(Protocol):
    """A checkpoint whose tensors are read by boxes."""

    @property
    def path(self) -> str:
        """The path of the checkpoint."""

    @property
    def manifest(self) -> Manifest:
        """The entries of the checkpoint. Shards, and chunks of tensors, may be empty."""

    def read_box(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """Read a box of a tensor of the manifest, as a contiguous CPU tensor."""

    def close(self) -> None:
        """Close the files."""


def read_chunks(
    source: Source,
    specs: Sequence[TensorSpec],
    chunks: ChunkTable,
    *,
    begin: int = 0,
    end: int | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the elements of chunks in order, at most a buffer at a time. `begin` and `end` select a
    range of their bytes."""
    at = 0
    for index, box in zip(chunks.tensor.tolist(), chunks.boxes.tolist(), strict=True):
        spec = specs[index]
        dims, item = len(spec.shape), itemsize(spec.dtype)
        for offsets, sizes in cut_box(box[0][:dims], box[1][:dims], BUFFER_BYTES // item):
            size = math.prod(sizes) * item
            low, high = max(begin - at, 0), size if end is None else min(end - at, size)
            at += size
            if low >= high:
                continue
            piece = source.read_box(spec.name, offsets, sizes)
            complete = high - low == size
            yield piece if complete else piece.reshape(-1).view(torch.uint8)[low:high]
        if end is not None and at >= end:
            return


def cut_box(
    offsets: Sequence[int], sizes: Sequence[int], most: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Divide a box into row-major pieces of at most `most` elements."""
    if math.prod(sizes) <= most:
        yield tuple(offsets), tuple(sizes)
        return
    dim = next(index for index, size in enumerate(sizes) if size > 1)
    step = max(1, most // math.prod(sizes[dim + 1 :]))
    for at in range(0, sizes[dim], step):
        low, size = list(offsets), list(sizes)
        low[dim], size[dim] = offsets[dim] + at, min(step, sizes[dim] - at)
        yield from cut_box(low, size, most)
