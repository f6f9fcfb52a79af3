"""The `.metadata` of torch.distributed.checkpoint (DCP), read without running code.

It is a pickle. The unpickler here knows the classes that DCP's metadata is made of, by the names
that torch 1.13 to 2.13 gave them. Any other name stands for an inert object: nothing that the file
names is imported or called. So metadata by a newer torch, or of a class that a library derived
from DCP's, as Megatron-Core's MCoreMetadata, is read as far as it is what DCP's is; `unknown` is
the rest.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

__all__ = ["ReadMetadata", "Unknown", "read_metadata"]


class Unknown:
    """Stands for an object of a class that is not loaded; `fields` is what it was filled with."""

    class_name = ""

    def __new__(cls, *_: Any, **__: Any) -> Any:  # noqa: D102
        made = object.__new__(cls)
        made.fields = {}
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        self.fields: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.fields.update(state)

    def __call__(self, *_: Any, **__: Any) -> Unknown:
        """As a function has it: what it would make is as unknown."""
        return self

    def append(self, item: Any) -> None:
        """As a list has it: a pickle may fill any object so."""

    def __setitem__(self, key: Any, item: Any) -> None:
        pass


class _Properties:
    """TensorProperties: torch has given it five values, and may give it more."""

    def __init__(self, dtype: torch.dtype = torch.float32, *_: Any) -> None:
        self.dtype = dtype

    def __setstate__(self, state: Any) -> None:
        dtype = state.get("dtype") if isinstance(state, dict) else state[0]
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("TensorProperties without a dtype")
        self.dtype = dtype


def _ignored(*_: Any) -> None:
    """Stands for layouts and memory formats, of which nothing is needed."""


_CLASSES = {
    kind.__name__: kind
    for kind in (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorStorageMetadata,
        _StorageInfo,
    )
} | {"TensorProperties": _Properties}
_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed._shard.sharded_tensor.metadata",
    "torch.distributed._shard.checkpoint.metadata",
    "torch.distributed._shard.checkpoint.filesystem",
)
_TORCH = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)} | {
    "Size": torch.Size
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.names: dict[str, type[Unknown]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module in _MODULES and name in _CLASSES:
            return _CLASSES[name]
        if module == "torch" and name in _TORCH:
            return _TORCH[name]
        if module == "collections" and name == "OrderedDict":
            return dict
        if name == "_get_layout" or "MEM_FORMAT_ENCODING" in name:
            return _ignored
        full = f"{module}.{name}"
        if full not in self.names:
            self.names[full] = type("Unknown", (Unknown,), {"class_name": full})
        return self.names[full]


@dataclass(frozen=True, slots=True)
class ReadMetadata:
    """DCP's metadata; `writer` is the class it was of, if that is not DCP's own, and `unknown` the
    fields and entries that are not DCP's: name -> what they are."""

    metadata: Metadata
    writer: str | None = None
    unknown: dict[str, str] = field(default_factory=dict)


def read_metadata(data: bytes) -> ReadMetadata:
    """Read the metadata in a file's bytes. Raises TypeError, or what pickle raises."""
    found = _Unpickler(data).load()
    writer, unknown = None, {}
    known = {item.name for item in fields(Metadata)}
    if (
        isinstance(found, Unknown)
        and {"state_dict_metadata", "storage_data"} <= found.fields.keys()
    ):
        writer, values = found.class_name, found.fields
        found = Metadata(**{name: values[name] for name in known & values.keys()})
    elif isinstance(found, Metadata):
        values = vars(found)
    else:
        name = getattr(type(found), "class_name", type(found).__name__)
        raise TypeError(f"{name} in place of Metadata")
    if not isinstance(found.storage_data, dict) or not isinstance(found.state_dict_metadata, dict):
        raise TypeError("Metadata without its entries and where they lie")
    for name in sorted(map(str, values.keys() - known)):
        if values[name]:
            unknown[f".metadata: {name}"] = f"of {writer or 'a newer torch'}, not of the state"
    entries: dict[str, Any] = found.state_dict_metadata
    for name, entry in list(entries.items()):
        if not isinstance(entry, (TensorStorageMetadata, BytesStorageMetadata)):
            described = getattr(type(entry), "class_name", type(entry).__name__)
            unknown[name] = f"is described by {described}, which shardckpt does not know"
            del entries[name]
    return ReadMetadata(found, writer, unknown)
