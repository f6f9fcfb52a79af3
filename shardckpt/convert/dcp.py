"""Reading checkpoints that torch.distributed.checkpoint (DCP) wrote, without running code.

DCP's `.metadata` is a pickle. It is read by an unpickler that knows the dozen classes of which
such metadata is made, and refuses any other name, so no function can be called. The tensors
lie in `.distcp` files as torch.save archives and are read with weights_only=True. Written for
the FileSystemWriter of torch 2.13.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
import xxhash
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from shardckpt.convert.sources import Foreign, foreign
from shardckpt.errors import (
    CheckpointNotFoundError,
    CorruptionError,
    CoverageError,
    NotACheckpointError,
    UnsupportedLeafError,
)
from shardckpt.format.tiling import find_gap
from shardckpt.state.local_chunks import box_slices
from shardckpt.storage.posix import translated

__all__ = ["DcpCheckpoint", "is_dcp"]

_METADATA = ".metadata"
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": (
        "Size",
        *(n for n in dir(torch) if isinstance(getattr(torch, n), (torch.dtype, torch.layout))),
    ),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}


class _Unpickler(pickle.Unpickler):
    """Knows the classes of DCP's metadata alone."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in DCP's metadata")
        return super().find_class(module, name)


def is_dcp(path: str) -> bool:
    """Whether a directory looks like one of DCP's."""
    return os.path.isfile(os.path.join(path, _METADATA))


class DcpCheckpoint:
    """A DCP checkpoint directory. Not collective.

    `tensors`: name -> shape of its tensors. Raises CheckpointNotFoundError, NotACheckpointError,
    or CorruptionError where the metadata can't be read, or names what it should not.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        if not is_dcp(path):
            kind = NotACheckpointError if os.path.lexists(path) else CheckpointNotFoundError
            raise kind(
                "There is no DCP checkpoint at this path",
                path=path,
                expected=f"a directory with {_METADATA}",
            )
        with translated(path), open(os.path.join(path, _METADATA), "rb") as file:
            data = file.read()
        self._metadata = self._unpickled(data)
        self._identity = xxhash.xxh3_128(data).hexdigest()
        self._current, self._loaded = "", dict[tuple[int, ...], torch.Tensor]()
        self.tensors: dict[str, torch.Size] = {
            name: entry.size
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._check_size()

    def _unpickled(self, data: bytes) -> Metadata:
        try:
            found = _Unpickler(io.BytesIO(data)).load()
            if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
                raise TypeError(f"{type(found).__name__} in place of Metadata")
        except Exception as error:
            raise CorruptionError(
                "The metadata of this DCP checkpoint can't be read",
                path=os.path.join(self.path, _METADATA),
                actual=str(error).splitlines()[0] if str(error) else type(error).__name__,
                remedy="load another checkpoint; what is no metadata is not unpickled",
            ) from error
        return found

    def _check_size(self) -> None:
        """Before memory is taken: no tensors are larger than the files that hold them."""
        declared = sum(
            math.prod(size) * self._entry(name).properties.dtype.itemsize
            for name, size in self.tensors.items()
        )
        infos = self._metadata.storage_data.values()
        paths = {self._file(info) for info in infos}
        there = sum(os.path.getsize(path) for path in paths if os.path.isfile(path))
        if declared > there:
            raise CorruptionError(
                "The files of this DCP checkpoint are smaller than its tensors",
                path=self.path,
                expected=f"at least {declared} bytes",
                actual=f"{there} bytes in {len(paths)} files",
                remedy="load another checkpoint",
            )

    def source(self) -> Foreign:
        """All of it, to be converted: values are read now, tensors a box at a time.

        Raises UnsupportedLeafError for a value that only unpickling could read.
        """
        entries: dict[str, Any] = {}
        reads = {}
        for name in self._metadata.state_dict_metadata:
            if name in self.tensors:  # a tensor without memory stands for it
                dtype = self._entry(name).properties.dtype
                entries[name] = torch.empty((), dtype=dtype).expand(self.tensors[name])
                reads[id(entries[name])] = partial(self.read_box, name)
            else:
                entries[name] = self._value(name)
        state = _nested(entries, self._metadata.planner_data or {})
        return foreign(self.path, "DCP", state, reads=reads, identity=self._identity)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Whole tensors by name, on the CPU. Raises CoverageError for one that has holes."""
        return {
            name: self.read_box(name, (0,) * len(self.tensors[name]), tuple(self.tensors[name]))
            for name in names
        }

    def read_box(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """A box of a tensor, on the CPU. The parts that it lies in are kept in memory until
        another tensor is asked for. Raises CoverageError for a tensor that has holes."""
        if name != self._current:
            self._check_coverage(name)
            self._current, self._loaded = name, {}
        box = torch.empty(sizes, dtype=self._entry(name).properties.dtype)
        for chunk in self._entry(name).chunks:
            begin = tuple(map(max, offsets, chunk.offsets))
            ends = [
                min(o + s, at + size)
                for o, s, at, size in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)
            ]
            inner = tuple(end - low for low, end in zip(begin, ends, strict=True))
            if all(size > 0 for size in inner):
                part = self._loaded_part(name, chunk)
                box[box_slices(offsets, begin, inner)] = part[
                    box_slices(chunk.offsets, begin, inner)
                ]
        return box

    def _entry(self, name: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        return entry

    def _check_coverage(self, name: str) -> None:
        entry = self._entry(name)
        shape = len(entry.chunks), len(entry.size)
        offsets = np.array([c.offsets for c in entry.chunks], dtype=np.int64).reshape(shape)
        sizes = np.array([c.sizes for c in entry.chunks], dtype=np.int64).reshape(shape)
        if (gap := find_gap(tuple(entry.size), offsets, sizes)) is not None:
            raise CoverageError(
                "The chunks of a DCP checkpoint don't cover a tensor exactly once",
                path=self.path,
                tensor=name,
                expected="every element in one chunk",
                actual=str(gap),
                remedy="load another checkpoint",
            )

    def _loaded_part(self, name: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        place = tuple(chunk.offsets)
        if place not in self._loaded:
            part = self._read(MetadataIndex(name, chunk.offsets))
            if not isinstance(part, torch.Tensor) or part.shape != chunk.sizes:
                raise CorruptionError(
                    "A part of a tensor is not what the metadata says",
                    path=self.path,
                    tensor=name,
                    expected=f"a tensor of shape {list(chunk.sizes)}",
                    actual=str(list(getattr(part, "shape", [type(part).__name__]))),
                    remedy="load another checkpoint",
                )
            self._loaded[place] = part
        return self._loaded[place]

    def _value(self, name: str) -> Any:
        try:
            return self._read(MetadataIndex(name))
        except CorruptionError as error:
            if not isinstance(error.__cause__, pickle.UnpicklingError):
                raise
            raise UnsupportedLeafError(
                "A value of this DCP checkpoint is a pickled object, which is never loaded",
                path=self.path,
                tensor=name,
                actual=error.actual,
                remedy="choose other entries with keys, or save the checkpoint without it",
            ) from error

    def _file(self, info: Any) -> str:
        return os.path.join(self.path, os.path.basename(str(getattr(info, "relative_path", ""))))

    def _read(self, index: MetadataIndex) -> Any:
        """What DCP has written as one item."""
        infos = self._metadata.storage_data
        info = infos.get(index, infos.get(MetadataIndex(index.fqn)))
        path = self._file(info)
        try:
            if info is None:
                raise KeyError(f"{index.fqn} at {index.offset} is in no file")
            with open(path, "rb") as file:
                file.seek(info.offset)
                data = io.BytesIO(file.read(info.length))
            return torch.load(data, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CorruptionError(
                "An entry of a DCP checkpoint can't be read",
                path=path,
                tensor=index.fqn,
                actual=f"{type(error).__name__}: {error}".splitlines()[0],
                remedy="load another checkpoint",
            ) from error


def _nested(flat: dict[str, Any], paths: dict[str, tuple[str | int, ...]]) -> dict[Any, Any]:
    """The state of which DCP has made names; `paths` of dicts' keys (str) and places in lists."""
    root: dict[Any, Any] = {}
    for name, value in flat.items():
        *above, last = paths.get(name, (name,))
        node = root
        for key in above:
            node = node.setdefault(key, {})
        node[last] = value
    return {key: _with_lists(node) for key, node in root.items()}


def _with_lists(node: Any) -> Any:
    if type(node) is not dict:
        return node
    items = {key: _with_lists(item) for key, item in node.items()}
    if items and all(isinstance(key, int) for key in items):
        return [items[key] for key in sorted(items)]
    return items
