"""A nested state in memory that can be read like a checkpoint, such as the state of a torch
file.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from shardckpt.format.digests import BLOCK_BYTES, block_digest, text_digest
from shardckpt.format.entries import Manifest, ShardEntry, TensorEntry
from shardckpt.format.manifest import to_bytes
from shardckpt.io.buffers import view_at
from shardckpt.io.tensor_memory import contiguous_pieces
from shardckpt.plan.local_plan import local_plan
from shardckpt.plan.shard_layout import shard_name
from shardckpt.state.flatten import flatten
from shardckpt.storage.base import CheckpointFiles, Storage

__all__ = ["StateStorage"]

_HEAD = bytes(8)  # in place of the length of a header


class StateStorage(Storage):
    """A read-only storage of one checkpoint: a state of plain CPU tensors."""

    def __init__(self, state: Any) -> None:
        plan = local_plan(flatten(state, rank=0), world_size=1)
        self._shards: dict[str, tuple[memoryview, Any]] = {}
        entries, tensors = [], {}
        for index, (spec, data) in enumerate(zip(plan.common, plan.data, strict=True)):
            (whole,) = contiguous_pieces(data.detach().contiguous())
            view = view_at(whole.data_ptr(), whole.numel() * whole.element_size())
            name = shard_name(rank=index, world_size=len(plan.common))
            self._shards[name] = view, whole
            size_bytes = len(_HEAD) + len(view)
            chunk = [index, len(_HEAD), size_bytes, *(0 for _ in spec.shape), *spec.shape]
            entries.append(
                ShardEntry(name=name, size_bytes=size_bytes, digests=self._digests(view))
            )
            tensors[spec.name] = TensorEntry(
                dtype=spec.dtype, shape=spec.shape, chunks=np.array([chunk], dtype=np.int64)
            )
        # Ranks that hold the same state must have the same checkpoint id.
        identity = b"".join([plan.tree, *(entry.digests.tobytes() for entry in entries)])
        self._manifest = to_bytes(
            Manifest(
                checkpoint_id=text_digest(identity),
                created="",
                library="",
                world_size=1,
                shards=tuple(entries),
                tensors=tensors,
                state=msgspec.json.decode(plan.tree),
            )
        )

    def _digests(self, view: memoryview) -> np.ndarray[Any, np.dtype[np.uint64]]:
        size_bytes = len(_HEAD) + len(view)
        digests = []
        for low in range(0, size_bytes, BLOCK_BYTES):
            block = view[max(low - len(_HEAD), 0) : low + BLOCK_BYTES - len(_HEAD)]
            digests.append(block_digest(block if low else _HEAD + bytes(block)))
        return np.array(digests, dtype=np.uint64)

    def open(self, path: str) -> _MemoryFiles:
        """See Storage.open. `path` is the source of the state, for errors."""
        return _MemoryFiles(path, self._manifest, self._shards)


class _MemoryFiles(CheckpointFiles):
    in_memory = True

    def __init__(
        self, path: str, manifest: bytes, shards: dict[str, tuple[memoryview, Any]]
    ) -> None:
        self.path = path
        self._manifest = manifest
        self._shards = shards

    def manifest(self) -> bytes:
        """See CheckpointFiles.manifest."""
        return self._manifest

    def size_bytes(self, name: str) -> int:
        """See CheckpointFiles.size_bytes."""
        return len(_HEAD) + len(self._shards[name][0])

    def read(self, name: str, buffer: memoryview, *, offset: int) -> None:
        """See CheckpointFiles.read."""
        view, _ = self._shards[name]
        head = max(0, min(len(_HEAD) - offset, len(buffer)))
        buffer[:head] = bytes(head)
        start = offset + head - len(_HEAD)
        buffer[head:] = view[start : start + len(buffer) - head]
