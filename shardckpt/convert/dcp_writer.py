"""Write folders of torch.distributed.checkpoint (DCP) with its own FileSystemWriter.

The writer gets plans, and a planner that reads each item when it is written, so that the tensors of
at most one file are in memory. Tested with torch 2.13.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from shardckpt.convert.single_files import save_torch
from shardckpt.convert.sources import state_in_memory
from shardckpt.convert.targets import Folder
from shardckpt.coordination.base import Coordinator
from shardckpt.format import typed_json as values
from shardckpt.format.dtypes import DTYPES
from shardckpt.format.typed_json import TensorRef
from shardckpt.integrations.dcp.reader import dcp_entries
from shardckpt.maintenance.reshard import even_plan
from shardckpt.maintenance.rewritable import Source
from shardckpt.state.saved_tree import SavedState
from shardckpt.storage.atomic_write import AtomicWrite, stream_to
from shardckpt.storage.deletion import exists
from shardckpt.storage.local import LocalFile
from shardckpt.storage.posix import System
from shardckpt.torch_compat import storage_info

__all__ = ["DcpFolder"]


class _Written(msgspec.Struct, array_like=True):
    """The position of a written item: the content of a WriteResult of DCP, as a message between
    ranks."""

    name: str
    offset: tuple[int, ...] | None
    file: str
    begin: int
    size_bytes: int


class DcpFolder(Folder):
    """Writes a source as a folder that dcp.load can read, with `files` .distcp files of even size.
    Names and nesting are those of DCP, values are those that DCP pickles. Numpy arrays become
    tensors, which can be loaded without unpickling."""

    index = (".metadata",)
    names = r"\.metadata|__\d+_\d+\.distcp"

    def __init__(
        self,
        source: Source,
        path: str,
        *,
        files: int,
        overwrite: bool,
        system: System | None = None,
    ) -> None:
        super().__init__(path, overwrite=overwrite, system=system)
        self.source, self.files = source, files
        self.plan = even_plan(source, files)[1]
        self.paths: dict[str, tuple[Any, ...]] = {}
        self.values: dict[str, Any] = {}
        self.tied: dict[str, list[str]] = {}
        for entry_path, node in dcp_entries(SavedState(source.manifest).tree, ()):
            if not entry_path:
                continue  # an empty state has no entries
            name = ".".join(map(str, entry_path))
            self.paths[name] = entry_path
            if isinstance(node, TensorRef) and node.ref_type != "per_rank":
                self.tied.setdefault(node.name, []).append(name)
            else:
                self.values[name] = node
        self.tensors = {name: saved for saved, names in self.tied.items() for name in names}

    def write(self, ranks: Coordinator, progress: Callable[[int], None]) -> bytes:
        """See Rewriting.write."""
        writer = self._writer()
        planner = _Planner(self, ranks, progress)
        written = []
        for number in range(ranks.rank, self.files, ranks.world_size):
            plans = [SavePlan([]) for _ in range(number)] + [SavePlan(self._items(number))]
            plan = writer.prepare_global_plan(plans)[number]
            for result in writer.write_data(plan, planner).value():
                info, offset = result.storage_data, result.index.offset
                written.append(
                    _Written(
                        name=result.index.fqn,
                        offset=None if offset is None else tuple(offset),
                        file=info.relative_path,
                        begin=info.offset,
                        size_bytes=info.length,
                    )
                )
        return msgspec.msgpack.encode(written)

    def _writer(self) -> FileSystemWriter:
        writer = FileSystemWriter(self.temporary, sync_files=False)  # the writer syncs each file
        writer.fs = _Files(self.system)
        return writer

    def _items(self, number: int) -> list[WriteItem]:
        """List the items of a file."""
        chunks = self.plan.of_rank(number)
        items = []
        for index, box in zip(chunks.tensor.tolist(), chunks.boxes.tolist(), strict=True):
            spec = self.plan.specs[index]
            chunk, size = _chunk(box, len(spec.shape)), torch.Size(spec.shape)
            is_full = chunk.sizes == size
            for name in self.tied.get(spec.name, ()):
                items.append(
                    WriteItem(
                        index=MetadataIndex(name, chunk.offsets),
                        type=WriteItemType.TENSOR if is_full else WriteItemType.SHARD,
                        tensor_data=TensorWriteData(chunk, _properties(spec.dtype), size),
                    )
                )
        if number == 0:
            items += [WriteItem(MetadataIndex(n), WriteItemType.BYTE_IO) for n in self.values]
        return items

    def finish(self, write: AtomicWrite, payloads: list[bytes]) -> None:
        """See Target.finish."""
        described: dict[str, Any] = {}
        for spec in self.plan.specs:
            for name in self.tied.get(spec.name, ()):
                described[name] = TensorStorageMetadata(
                    properties=_properties(spec.dtype), size=torch.Size(spec.shape), chunks=[]
                )
        chunks = self.plan.chunks
        for index, box in zip(chunks.tensor.tolist(), chunks.boxes.tolist(), strict=True):
            spec = self.plan.specs[index]
            for name in self.tied.get(spec.name, ()):
                described[name].chunks.append(_chunk(box, len(spec.shape)))
        described |= {name: BytesStorageMetadata() for name in self.values}
        results = [
            WriteResult(
                index=MetadataIndex(w.name, None if w.offset is None else torch.Size(w.offset)),
                size_in_bytes=w.size_bytes,
                storage_data=storage_info(w.file, offset=w.begin, length=w.size_bytes),
            )
            for payload in payloads
            for w in msgspec.msgpack.decode(payload, type=list[_Written])
        ]
        ordered = {name: described[name] for name in self.paths}
        self._writer().finish(
            Metadata(state_dict_metadata=ordered, planner_data=self.paths), [results]
        )


class _Files(FileSystem):
    """The file system for the writer of DCP. Files are durable when they are closed."""

    def __init__(self, system: System) -> None:
        self._system = system

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        assert mode == "wb"
        file = LocalFile(self._system, os.fspath(path), size_bytes=0, direct=False)
        with stream_to(file) as stream:
            yield stream

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return exists(self._system, os.fspath(path))

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        self._system.rename(os.fspath(path), os.fspath(new_path))


class _Planner(DefaultSavePlanner):
    """Reads the items that the writer of DCP requests."""

    def __init__(
        self, folder: DcpFolder, ranks: Coordinator, progress: Callable[[int], None]
    ) -> None:
        super().__init__()
        self._folder, self._ranks, self._progress = folder, ranks, progress
        self._done_bytes = 0

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        folder, name = self._folder, write_item.index.fqn
        if write_item.tensor_data is None:
            buffer = io.BytesIO()
            node = values.encode(folder.values[name], at=name)
            save_torch(state_in_memory(folder.source, node), buffer, folder.path)
            return buffer
        chunk = write_item.tensor_data.chunk
        part = folder.source.read_box(
            folder.tensors[name], tuple(chunk.offsets), tuple(chunk.sizes)
        )
        self._done_bytes += part.nbytes
        self._ranks.progress(self._done_bytes)
        self._progress(self._done_bytes)
        return part


def _chunk(box: list[list[int]], dims: int) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box[0][:dims]), torch.Size(box[1][:dims]))


def _properties(dtype: str) -> TensorProperties:
    return TensorProperties(dtype=DTYPES[dtype])
