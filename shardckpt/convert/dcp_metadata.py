"""Read `.metadata` of torch.distributed.checkpoint (DCP), a pickle, without importing its classes.
Stand-ins replace them, and their fields are checked."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from shardckpt.convert.pickle_scan import Named, PickleStructure, Readable, scan
from shardckpt.torch_compat import storage_info

__all__ = ["ReadMetadata", "parse_metadata"]

_MOST_DIMS = 64
_FLATTENED = "nd_reformulated_orig_global_shape"


@dataclass(frozen=True, slots=True)
class ReadMetadata:
    """The metadata of DCP. `writer` is the class of the metadata if it is not that of DCP;
    `unknown` are fields and entries that DCP does not have: name -> description. `flattened` are
    the shapes of the tensors that Megatron-Core saved as a grid of flat parts, by name."""

    metadata: Metadata
    writer: str | None = None
    unknown: dict[str, str] = field(default_factory=dict)
    flattened: dict[str, torch.Size] = field(default_factory=dict)


def parse_metadata(data: Readable) -> ReadMetadata:
    """Parse the metadata in a pickle, also of classes derived from those of DCP, such as those of
    Megatron-Core. Raises UnpicklingError, TypeError or ValueError for other pickles."""
    if scan(data) != len(data):
        raise pickle.UnpicklingError("bytes after the end of the pickle")
    root = PickleStructure(data, allowed=lambda name: True).load()
    name = root.name if isinstance(root, Named) else type(root).__name__
    facts = _dict(root.state) if isinstance(root, Named) and root.state is not None else {}
    if not {"state_dict_metadata", "storage_data"} <= facts.keys():
        raise TypeError(f"{name} in place of Metadata")
    writer = None if name == f"{Metadata.__module__}.Metadata" else name
    known = {item.name for item in fields(Metadata)} | {"version"}
    unknown = {
        f".metadata: {extra}": f"of {writer or 'a newer torch'}, not of the state"
        for extra in sorted(map(str, facts.keys() - known))
        if facts[extra]
    }
    entries: dict[str, Any] = {}
    for entry_name, node in _dict(facts["state_dict_metadata"]).items():
        class_name = (
            node.name.rpartition(".")[2] if isinstance(node, Named) else type(node).__name__
        )
        if class_name in ("BytesStorageMetadata", "TensorStorageMetadata"):
            entries[_text(entry_name)] = _entry(node)
        else:
            described = getattr(node, "name", class_name)
            unknown[_text(entry_name)] = f"is described by {described}, which is not known here"
    flattened = _flattened(facts.get("mcore_data"), entries)
    if flattened.keys() == (facts.get("mcore_data") or {}).keys():
        unknown.pop(".metadata: mcore_data", None)
    metadata = Metadata(
        state_dict_metadata=entries,
        planner_data={
            _text(name): _path(path)
            for name, path in _dict(facts.get("planner_data") or {}).items()
        },
        storage_data={
            _index(index): _storage_location(location)
            for index, location in _dict(facts["storage_data"]).items()
        },
    )
    return ReadMetadata(metadata, writer, unknown, flattened)


def _flattened(saved: Any, entries: dict[str, Any]) -> dict[str, torch.Size]:
    """Return the shapes of the tensors of Megatron-Core that are divided into a grid of equal
    parts, each of which is saved flat, in an additional last dimension."""
    shapes = {}
    for name, facts in _dict(saved or {}).items():
        if not isinstance(facts, dict) or _FLATTENED not in facts:
            continue
        shape, entry = _sizes(facts[_FLATTENED]), entries[_text(name)]
        saved_size = list(getattr(entry, "size", ()))
        grid, part = saved_size[:-1], math.prod(saved_size[-1:])
        if len(grid) != len(shape) or any(n % parts for n, parts in zip(shape, grid, strict=True)):
            raise ValueError(f"{name} of shape {list(shape)} in a grid of {grid}")
        if math.prod(shape) != math.prod(grid) * part:
            raise ValueError(f"{name} of shape {list(shape)} in parts of {part} elements")
        shapes[name] = shape
    return shapes


def _facts(node: Any, class_name: str) -> dict[str, Any]:
    """Return the fields of a dataclass for which a stand-in was created."""
    name = node.name.rpartition(".")[2] if isinstance(node, Named) else type(node).__name__
    if name != class_name:
        raise TypeError(f"{name} in place of {class_name}")
    return _dict(node.state or {})


def _dict(node: Any) -> dict[Any, Any]:
    if not isinstance(node, dict):
        raise TypeError(f"{type(node).__name__} in place of a dict")
    return node


def _text(node: Any) -> str:
    if type(node) is not str:
        raise TypeError(f"{type(node).__name__} in place of a name")
    return node


def _sizes(node: Any, dims: int | None = None) -> torch.Size:
    """Convert a stand-in of a shape or of offsets."""
    if type(node) not in (tuple, list) or len(node) > _MOST_DIMS or dims not in (None, len(node)):
        raise ValueError(f"{str(node)[:80]} in place of {dims} sizes")
    return torch.Size([_number(n) for n in node])


def _number(node: Any) -> int:
    if type(node) is not int or not 0 <= node < 1 << 62:
        raise ValueError(f"{str(node)[:80]} in place of a size")
    return node


def _path(node: Any) -> tuple[str | int, ...]:
    if type(node) is not tuple or not all(type(key) in (str, int) for key in node) or not node:
        raise TypeError(f"{str(node)[:80]} in place of the path of an entry")
    return node


def _entry(node: Any) -> BytesStorageMetadata | TensorStorageMetadata:
    if isinstance(node, Named) and node.name.endswith(".BytesStorageMetadata"):
        return BytesStorageMetadata()
    facts = _facts(node, "TensorStorageMetadata")
    size, properties = _sizes(facts.get("size")), facts.get("properties")
    state = properties.state if isinstance(properties, Named) else None
    dtype = state[0] if type(state) is tuple and state else None
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{str(dtype)[:80]} in place of a dtype")
    chunks = [_facts(chunk, "ChunkStorageMetadata") for chunk in list(facts.get("chunks") or ())]
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=dtype),
        size=size,
        chunks=[
            ChunkStorageMetadata(
                offsets=_sizes(chunk.get("offsets"), len(size)),
                sizes=_sizes(chunk.get("sizes"), len(size)),
            )
            for chunk in chunks
        ],
    )


def _index(node: Any) -> MetadataIndex:
    facts = _facts(node, "MetadataIndex")
    offset = facts.get("offset")
    return MetadataIndex(_text(facts.get("fqn")), None if offset is None else _sizes(offset))


def _storage_location(node: Any) -> Any:
    facts = _facts(node, "_StorageInfo")
    return storage_info(
        _text(facts.get("relative_path")),
        offset=_number(facts.get("offset")),
        length=_number(facts.get("length")),
    )
