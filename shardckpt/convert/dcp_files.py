"""Directories of torch.distributed.checkpoint (DCP), written by its own FileSystemWriter.

It is given plans and a planner that reads each item when it is to be written, so that no more than
a file's worth of tensors is in memory. Tried with torch 2.13.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
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

from shardckpt.convert.sources import state_of
from shardckpt.convert.targets import Folder
from shardckpt.coordination.base import Coordinator
from shardckpt.format import typed_json as values
from shardckpt.format.dtypes import DTYPES
from shardckpt.format.typed_json import TensorRef
from shardckpt.integrations.dcp.reader import dcp_entries
from shardckpt.maintenance.reshard import even_plan
from shardckpt.maintenance.rewritable import Source
from shardckpt.state.saved_tree import SavedState

__all__ = ["DcpFolder"]


class _Written(msgspec.Struct, array_like=True):
    """Where an item has been written: what DCP's WriteResult says, to travel between ranks."""

    name: str
    offset: tuple[int, ...] | None
    file: str
    begin: int
    size_bytes: int


class DcpFolder(Folder):
    """Writes a source as a directory that dcp.load reads: `files` .distcp files of even size. Names
    and nesting are those that DCP gives such a state, values are what it pickles; numpy arrays are
    tensors, which need no unpickling."""

    index = ".metadata"
    names = r"\.metadata|__\d+_\d+\.distcp"

    def __init__(self, source: Source, path: str, *, files: int, overwrite: bool) -> None:
        super().__init__(path, overwrite=overwrite)
        self.source, self.files = source, files
        self.plan = even_plan(source, files)[1]
        self.paths: dict[str, tuple[Any, ...]] = {}
        self.values: dict[str, Any] = {}
        self.tied: dict[str, list[str]] = {}
        for entry_path, node in dcp_entries(SavedState(source.manifest).tree, ()):
            name = ".".join(map(str, entry_path))
            self.paths[name] = entry_path
            if isinstance(node, TensorRef) and node.kind != "per_rank":
                self.tied.setdefault(node.name, []).append(name)
            else:
                self.values[name] = node
        self.tensors = {name: saved for saved, names in self.tied.items() for name in names}

    def write(self, ranks: Coordinator, progress: Callable[[int], None]) -> bytes:
        """See Rewriting.write."""
        writer = FileSystemWriter(self.temporary)
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

    def _items(self, number: int) -> list[WriteItem]:
        """What goes into a file."""
        chunks = self.plan.of_rank(number)
        items = []
        for index, box in zip(chunks.tensor.tolist(), chunks.boxes.tolist(), strict=True):
            spec = self.plan.specs[index]
            chunk, size = _chunk(box, len(spec.shape)), torch.Size(spec.shape)
            whole = chunk.sizes == size
            for name in self.tied.get(spec.name, ()):
                items.append(
                    WriteItem(
                        index=MetadataIndex(name, chunk.offsets),
                        type=WriteItemType.TENSOR if whole else WriteItemType.SHARD,
                        tensor_data=TensorWriteData(chunk, _properties(spec.dtype), size),
                    )
                )
        if number == 0:
            items += [WriteItem(MetadataIndex(n), WriteItemType.BYTE_IO) for n in self.values]
        return items

    def finish(self, payloads: list[bytes]) -> None:
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
                storage_data=_StorageInfo(w.file, w.begin, w.size_bytes),
            )
            for payload in payloads
            for w in msgspec.msgpack.decode(payload, type=list[_Written])
        ]
        ordered = {name: described[name] for name in self.paths}
        FileSystemWriter(self.temporary).finish(
            Metadata(state_dict_metadata=ordered, planner_data=self.paths), [results]
        )


class _Planner(DefaultSavePlanner):
    """Reads what DCP's writer asks for."""

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
            torch.save(state_of(folder.source, node), buffer)
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
