"""Reading checkpoints that torch.distributed.checkpoint (DCP) wrote, without running code.

DCP's `.metadata` is a pickle. It is read by an unpickler that knows the dozen classes of which
such metadata is made, and refuses any other name, so no function can be called. The tensors
lie in `.distcp` files as torch.save archives and are read with weights_only=True. Written for
the FileSystemWriter of torch 2.13.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from shardckpt.errors import (
    CheckpointNotFoundError,
    CorruptionError,
    CoverageError,
    NotACheckpointError,
)
from shardckpt.format.boxes import find_gap
from shardckpt.storage.system import translated

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
            self._metadata = self._unpickled(file.read())
        self.tensors: dict[str, torch.Size] = {
            name: entry.size
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

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

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Whole tensors by name, on the CPU. Raises CoverageError for one that has holes."""
        return {name: self._tensor(name) for name in names}

    def _tensor(self, name: str) -> torch.Tensor:
        entry = self._metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        shape = (len(entry.chunks), whole.dim())
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
        for index, info in self._metadata.storage_data.items():
            if index.fqn == name:
                begin = index.offset or torch.Size([0] * whole.dim())
                part = self._part(info, name)
                box = tuple(slice(o, o + s) for o, s in zip(begin, part.shape, strict=True))
                whole[box] = part
        return whole

    def _part(self, info: Any, name: str) -> torch.Tensor:
        path = os.path.join(self.path, os.path.basename(str(info.relative_path)))
        try:
            with open(path, "rb") as file:
                file.seek(info.offset)
                data = io.BytesIO(file.read(info.length))
            found = torch.load(data, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CorruptionError(
                "A part of a tensor can't be read",
                path=path,
                tensor=name,
                actual=f"{type(error).__name__}: {error}".splitlines()[0],
                remedy="load another checkpoint",
            ) from error
        if not isinstance(found, torch.Tensor):
            raise CorruptionError("A tensor was expected", path=path, tensor=name)
        return found
