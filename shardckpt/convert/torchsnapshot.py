"""Read checkpoints of torchsnapshot, without running code.

`.snapshot_metadata` is JSON. It lists the entries of each rank, and the files with their data.
Tensors are raw bytes, or torch files, as objects are; torch files are read with weights_only=True.
For the files of torchsnapshot 0.1.0.
"""

from __future__ import annotations

import base64
import math
import os
import struct
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import unquote

import msgspec
import numpy as np
import torch

from shardckpt.convert.foreign_file import JSON_LIMIT_BYTES, file_in, mapped, read_small
from shardckpt.convert.sources import Foreign, Origin, foreign
from shardckpt.convert.torch_objects import ObjectsLoader, StandIn, why
from shardckpt.convert.torch_reader import LoadTorch, load_torch, load_torch_bytes
from shardckpt.errors import CorruptionError, CoverageError, NotACheckpointError, ShardckptError
from shardckpt.format.digests import text_digest
from shardckpt.format.tiling import find_gap
from shardckpt.state.local_chunks import box_slices, shared_box
from shardckpt.storage.posix import translated
from shardckpt.torch_compat import find_dtype

__all__ = ["SNAPSHOT_METADATA", "open_torchsnapshot"]

SNAPSHOT_METADATA = ".snapshot_metadata"
_CONTAINERS = ("dict", "OrderedDict", "list")
_LEFT_OUT = object()
_INVALID = (
    msgspec.MsgspecError, ValueError, KeyError, TypeError, IndexError, ArithmeticError,
    AttributeError, RecursionError, struct.error,
)  # fmt: skip


class _Document(msgspec.Struct):
    version: str
    world_size: int
    manifest: dict[str, dict[str, Any]]


class _Tensor(msgspec.Struct):
    location: str
    serializer: str
    dtype: str
    shape: list[int]
    byte_range: list[int] | None = None


class _Part(msgspec.Struct):
    offsets: list[int]
    sizes: list[int]
    tensor: _Tensor


class _Saved(NamedTuple):
    """A tensor: its dtype and shape, and its parts."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: list[_Part]


def open_torchsnapshot(path: str) -> Foreign:
    """Open a folder of torchsnapshot as a source. Objects in it are left out and listed.

    Entries of rank 0 are taken, sharded tensors of all ranks, and entries that only another rank
    has.

    Raises:
        CorruptionError: The metadata or a file is invalid.
    """
    text = read_small(file_in(path, SNAPSHOT_METADATA), limit_bytes=16 * JSON_LIMIT_BYTES)
    if text[:8] == b"version:":
        raise NotACheckpointError(
            "The metadata of this torchsnapshot checkpoint are YAML, which early versions wrote",
            path=os.path.join(path, SNAPSHOT_METADATA),
            expected="JSON, as torchsnapshot 0.1.0 writes it",
            remedy="restore it with torchsnapshot, and save the state with shardckpt.save",
        )
    try:
        document = msgspec.json.decode(text, type=_Document)
        snapshot = _Snapshot(path, document)
        with translated(path):
            state = snapshot.state()
    except ShardckptError:
        raise
    except _INVALID as error:
        raise _invalid(path, f"{type(error).__name__}: {error}") from error
    origin = Origin(
        format="torchsnapshot",
        writer=f"torchsnapshot {document.version}",
        left_out=snapshot.left_out,
        changed=snapshot.objects.changed,
    )
    identity = text_digest(text)
    return foreign(
        path, "torchsnapshot", state, reads=snapshot.reads, identity=identity, origin=origin
    )


class _Snapshot:
    def __init__(self, path: str, document: _Document) -> None:
        self.path = path
        self.objects = ObjectsLoader()
        self.left_out: dict[str, str] = self.objects.left_out
        self.reads: dict[int, Callable[[tuple[int, ...], tuple[int, ...]], torch.Tensor]] = {}
        self.entries: dict[str, dict[str, Any]] = {}
        self.shards: dict[str, list[_Part]] = {}
        self._current, self._loaded = "", dict[tuple[int, ...], torch.Tensor]()
        for key, entry in document.manifest.items():
            rank, _, name = key.partition("/")
            int(rank)
            if entry["type"] == "ShardedTensor":
                self.shards.setdefault(name, []).extend(
                    msgspec.convert(entry["shards"], list[_Part])
                )
            known = self.entries.setdefault(name, entry)
            if known is not entry and entry["type"] in _CONTAINERS and "keys" in entry:
                known["keys"] = list(dict.fromkeys([*known["keys"], *entry["keys"]]))
            elif known != entry and entry["type"] not in (*_CONTAINERS, "ShardedTensor"):
                self.left_out[f"{_plain(name)} of rank {rank}"] = "the entry of rank 0 is taken"

    def state(self) -> dict[Any, Any]:
        """Build the nested state. Tensors are placeholders, whose data `reads` reads."""
        root: dict[Any, Any] = {}
        containers: dict[str, Any] = {"": root}
        keys: dict[str, dict[str, Any]] = {  # text -> key, which may be an int
            name: {str(key): key for key in reversed(entry["keys"])}
            for name, entry in self.entries.items()
            if entry["type"] in _CONTAINERS and "keys" in entry
        }
        for name in sorted(self.entries, key=lambda name: name.count("/")):
            entry = self.entries[name]
            above, _, last = name.rpartition("/")
            key: Any = unquote(last)
            node = containers.get(above, root)
            if entry["type"] in _CONTAINERS:
                value: Any = {}
                containers[name] = value
            else:
                value = self._value(entry, name)
                if isinstance(value, StandIn):
                    self.left_out[_plain(name)] = why(value)
                if isinstance(value, StandIn) or value is _LEFT_OUT:
                    continue
            node[keys.get(above, {}).get(key, key)] = value
        lists = {
            id(containers[name]): self.entries[name]
            for name in containers
            if name and self.entries[name]["type"] == "list"
        }
        ordered = {
            id(containers[name]): self.entries[name]["keys"]
            for name in containers
            if name and "keys" in self.entries[name]
        }
        return dict(_settled(root, lists, ordered))

    def _value(self, entry: dict[str, Any], name: str) -> Any:
        kind = entry["type"]
        if kind in ("Tensor", "ChunkedTensor", "ShardedTensor"):
            return self._tensor(entry, name)
        if kind == "object":
            loaded = self._load(entry["location"], None, name, self.objects.load)
            return self.objects.plain(loaded, _plain(name))
        text = entry["serialized_value"]
        if kind == "float":
            return struct.unpack("d", base64.b64decode(text, validate=True))[0]
        if kind == "bytes":
            return base64.b64decode(text, validate=True)
        if kind == "bool":
            return {"True": True, "False": False}[text]
        if kind == "int":
            return int(text)
        if kind == "str":
            return str(text)
        raise ValueError(f"an entry of the unknown type {kind}")

    def _tensor(self, entry: dict[str, Any], name: str) -> Any:
        if entry["type"] == "Tensor":
            tensor = msgspec.convert(entry, _Tensor)
            parts = [_Part([0] * len(tensor.shape), tensor.shape, tensor)]
        elif entry["type"] == "ChunkedTensor":
            parts = msgspec.convert(entry["chunks"], list[_Part])
        else:
            parts = self.shards[name]
        dims = len(parts[0].sizes)
        ends = [[o + s for o, s in zip(p.offsets, p.sizes, strict=True)] for p in parts]
        shape = tuple(max(end[dim] for end in ends) for dim in range(dims))
        dtype = find_dtype(parts[0].tensor.dtype.removeprefix("torch."))
        if dtype is None or dtype in (torch.qint8, torch.quint8, torch.qint32):
            self.left_out[_plain(name)] = f"a tensor of {parts[0].tensor.dtype}"
            return _LEFT_OUT
        unique = {tuple(part.offsets): part for part in parts}  # replicas
        saved = _Saved(dtype, shape, list(unique.values()))
        self._check(saved, name)
        stand_in = torch.empty((), dtype=dtype, device="cpu").expand(shape)
        self.reads[id(stand_in)] = partial(self._read_box, saved, name)
        return stand_in

    def _check(self, saved: _Saved, name: str) -> None:
        rows = (len(saved.parts), len(saved.shape))
        offsets = np.array([part.offsets for part in saved.parts], dtype=np.int64).reshape(rows)
        sizes = np.array([part.sizes for part in saved.parts], dtype=np.int64).reshape(rows)
        if (offsets < 0).any() or (sizes < 0).any():
            raise ValueError("negative sizes")
        if (gap := find_gap(saved.shape, offsets, sizes)) is not None:
            raise CoverageError(
                "The parts of a torchsnapshot checkpoint don't cover a tensor exactly once",
                path=self.path,
                tensor=_plain(name),
                expected="every element in one part",
                actual=str(gap),
                remedy="load another checkpoint",
            )
        declared = math.prod(saved.shape) * saved.dtype.itemsize
        files = {self._file(part.tensor.location) for part in saved.parts}
        actual = sum(os.path.getsize(file) for file in files if os.path.exists(file))
        if declared > actual:
            raise ValueError(f"{_plain(name)} has {declared} bytes, its files have {actual}")

    def _read_box(
        self, saved: _Saved, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> torch.Tensor:
        if name != self._current:  # the parts of one tensor are kept for its next boxes
            self._current, self._loaded = name, {}
        box = torch.empty(sizes, dtype=saved.dtype, device="cpu")
        for part in saved.parts:
            at = tuple(part.offsets)
            shared = shared_box(offsets, sizes, at, tuple(part.sizes))
            if shared is not None:
                low, inner = shared
                if at not in self._loaded:
                    self._loaded[at] = self._part(part, saved.dtype, name)
                data = self._loaded[at]
                box[box_slices(offsets, low, inner)] = data[box_slices(at, low, inner)]
        return box

    def _part(self, part: _Part, dtype: torch.dtype, name: str) -> torch.Tensor:
        tensor = part.tensor
        if tensor.serializer == "torch_save":
            found = self._load(tensor.location, tensor.byte_range, name)
        elif tensor.serializer == "buffer_protocol":
            size_bytes = math.prod(part.sizes) * dtype.itemsize
            path = self._file(tensor.location)
            with translated(path), mapped(path) as data:
                begin, end = tensor.byte_range or (0, len(data))
                if not 0 <= begin <= end <= len(data) or end - begin != size_bytes:
                    raise _invalid(self.path, f"{_plain(name)} in bytes {begin} to {end}")
                raw = bytearray(data[begin:end])
            found = torch.frombuffer(raw or bytearray(dtype.itemsize), dtype=dtype)
            found = found[: math.prod(part.sizes)].reshape(part.sizes)
        else:
            raise _invalid(self.path, f"{_plain(name)} with the serializer {tensor.serializer}")
        if not isinstance(found, torch.Tensor) or list(found.shape) != part.sizes:
            raise _invalid(self.path, f"{_plain(name)}, whose data have another shape")
        return found

    def _load(self, location: str, byte_range: Any, name: str, load: LoadTorch = load_torch) -> Any:
        path = self._file(location)
        with translated(path), mapped(path) as data, memoryview(data) as view:
            begin, end = byte_range or (0, len(view))
            with view[begin:end] as part:
                try:
                    return load_torch_bytes(part, path, load)
                except (CorruptionError, NotACheckpointError):
                    raise
                except Exception as error:
                    raise _invalid(path, f"{_plain(name)}: {type(error).__name__}") from error

    def _file(self, location: str) -> str:
        """Return the path of a file in the folder, which may be in folders below it."""
        *folders, last = location.split("/")
        folder = self.path
        for name in folders:
            folder = file_in(folder, name)
        return file_in(folder, last)


def _settled(node: Any, lists: dict[int, Any], ordered: dict[int, list[Any]]) -> Any:
    """Return the state with lists in place of dicts of their items, and keys in their order."""
    if type(node) is not dict:
        return node
    items = {key: _settled(item, lists, ordered) for key, item in node.items()}
    if id(node) in lists:
        return [items[key] for key in sorted(items, key=int)]
    place = {key: number for number, key in enumerate(ordered.get(id(node), ()))}
    return {key: items[key] for key in sorted(items, key=lambda key: place.get(key, 0))}


def _plain(name: str) -> str:
    """Return the name of an entry with dots."""
    return ".".join(map(unquote, name.split("/")))


def _invalid(path: str, actual: str) -> CorruptionError:
    return CorruptionError(
        "This torchsnapshot checkpoint is corrupted or of an unknown version",
        path=path,
        expected="the files of torchsnapshot 0.1.0",
        actual=actual[:200],
        remedy="load another checkpoint, or restore this one with torchsnapshot",
    )
