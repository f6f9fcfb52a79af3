"""Tensors that stay on the disk until they are used."""

from __future__ import annotations

import functools
import hashlib
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import xxhash

from shardckpt.errors import CheckpointError
from shardckpt.format.dtypes import DTYPES
from shardckpt.format.entries import Manifest, TensorEntry
from shardckpt.loading.shard_reader import check_size, read_all
from shardckpt.plan.page_cache_policy import ALWAYS
from shardckpt.plan.read_plan import plan_reads
from shardckpt.state.local_chunks import LocalChunk
from shardckpt.storage.base import CheckpointFiles, OnFilled
from shardckpt.storage.cache import cached
from shardckpt.torch_compat import map_instances, wrapper_tensor

__all__ = ["DiskTensor", "MappedFiles", "disk_tensor"]


class MappedFiles(CheckpointFiles):
    """The shards of a checkpoint in memory maps, which stay valid when the checkpoint is closed or
    removed.

    Pages that are not in memory yet are read past the page cache, while the files exist. Shards on
    another machine are not mapped, but read.
    """

    def __init__(self, files: CheckpointFiles) -> None:
        self.path = files.path
        self.remote = files.remote
        self._files = files.duplicate()
        self._maps: dict[str, memoryview] = {}
        weakref.finalize(self, self._files.close)

    def map(self, name: str) -> memoryview:
        """See CheckpointFiles.map."""
        if name not in self._maps:
            self._maps[name] = self._files.map(name)
        return self._maps[name]

    def size_bytes(self, name: str) -> int:
        """See CheckpointFiles.size_bytes."""
        return len(self._maps[name]) if name in self._maps else self._files.size_bytes(name)

    def read(self, name: str, buffer: memoryview, *, offset: int) -> None:
        """See CheckpointFiles.read."""
        if self.remote:
            self._files.read(name, buffer, offset=offset)
        else:
            buffer[:] = self.map(name)[offset : offset + len(buffer)]

    def readinto(
        self,
        name: str,
        buffers: Sequence[memoryview],
        *,
        offset: int,
        on_filled: OnFilled = lambda buffer: None,
        wait: bool = True,
    ) -> None:
        """See CheckpointFiles.readinto."""
        reader = self._files.readinto if self.remote else super().readinto
        reader(name, buffers, offset=offset, on_filled=on_filled, wait=wait)

    def copies(self) -> Sequence[CheckpointFiles]:
        """See CheckpointFiles.copies."""
        return self._files.copies() if self.remote else ()

    def read_past_cache(
        self, name: str, buffer: memoryview, *, offset: int, size_bytes: int
    ) -> bool:
        """See CheckpointFiles.read_past_cache."""
        try:
            return self._files.read_past_cache(name, buffer, offset=offset, size_bytes=size_bytes)
        except CheckpointError:  # removed or replaced; the map still has the bytes
            return False

    @functools.cached_property
    def manifest_digest(self) -> str:
        """The SHA-256 of the manifest, which no other checkpoint has."""
        return hashlib.sha256(self.manifest()).hexdigest()

    def manifest(self) -> bytes:
        """See CheckpointFiles.manifest."""
        return self._files.manifest()

    def duplicate(self) -> MappedFiles:
        """See CheckpointFiles.duplicate."""
        return MappedFiles(self._files)

    def close(self) -> None:
        """See CheckpointFiles.close. The maps stay valid."""
        self._files.close()


def disk_tensor(
    files: MappedFiles, manifest: Manifest, name: str, entry: TensorEntry
) -> torch.Tensor:
    """Return a saved tensor without reading it.

    A tensor in one chunk is mapped: pages are read when they are used, without verification, and
    changes stay in memory. A tensor in several chunks or on another machine becomes a DiskTensor.
    """
    if 0 in entry.shape:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="cpu")
    if files.remote:
        return DiskTensor(files, manifest, name, entry)
    for shard in entry.chunks[:, 0].tolist():  # mapped now, as the files may be closed later
        check_size(files, manifest.shards[shard])
        files.map(manifest.shards[shard].name)
    if len(entry.chunks) > 1:
        return DiskTensor(files, manifest, name, entry)
    shard, begin, end = entry.chunks[0, :3].tolist()
    data = torch.frombuffer(
        files.map(manifest.shards[shard].name), dtype=torch.uint8, count=end - begin, offset=begin
    )
    return data.view(DTYPES[entry.dtype]).reshape(entry.shape)


class DiskTensor(torch.Tensor):
    """A CPU tensor in several chunks on the disk, or on another machine.

    The first operation on it reads and verifies it, and the data is kept from then on. Bytes from
    another machine are kept in a file of the cache directory, see storage/cache. Operations return
    plain tensors.
    """

    @staticmethod
    def __new__(
        cls, files: MappedFiles, manifest: Manifest, name: str, entry: TensorEntry
    ) -> DiskTensor:
        """Create a tensor without memory, of the saved shape and dtype."""
        made: DiskTensor = wrapper_tensor(cls, entry.shape, DTYPES[entry.dtype])
        return made

    def __init__(
        self, files: MappedFiles, manifest: Manifest, name: str, entry: TensorEntry
    ) -> None:
        self._source = files, manifest, name, entry
        self._tensor: torch.Tensor | None = None

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DiskTensor({self._source[2]!r}, {self.dtype}, shape={list(self.shape)})"

    def read(self) -> torch.Tensor:
        """Return the plain tensor, which the first call reads."""
        if self._tensor is None:
            files, _, name, entry = self._source
            if files.remote:
                pages = cached(
                    files.manifest_digest,
                    xxhash.xxh3_128_hexdigest(name.encode()),
                    size_bytes=entry.size_bytes,
                    download=lambda view: self._fill(torch.frombuffer(view, dtype=torch.uint8)),
                )
                flat = torch.frombuffer(pages, dtype=torch.uint8)
                self._tensor = flat.view(self.dtype).reshape(entry.shape)
            else:
                tensor = torch.empty(entry.shape, dtype=self.dtype, device="cpu")
                self._fill(tensor)
                self._tensor = tensor
        return self._tensor

    def _fill(self, tensor: torch.Tensor) -> None:
        """Read into a tensor of the shape, or of its bytes in order."""
        files, manifest, _, entry = self._source
        if tensor.dtype != self.dtype or tensor.shape != entry.shape:
            tensor = tensor.view(self.dtype).reshape(entry.shape)
        whole = LocalChunk((0,) * tensor.dim(), entry.shape, tensor)
        read_all(files, manifest, plan_reads([(entry, whole)]), past_cache=ALWAYS)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = map_instances(DiskTensor, DiskTensor.read, (args, kwargs or {}))
        return func(*args, **kwargs)
