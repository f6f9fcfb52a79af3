"""Read checkpoints of torch_checkpointing, without running code.

Each rank writes a file for each item of the state, such as `model_0.pt`. `metadata.pkl` exists if
an item has a resharder. It is a pickle of plain values, which lists the files and how the ranks
divide each tensor. Files without metadata are those of torch.save, and DTensors describe
themselves. For the files of torch_checkpointing 0.1.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import xxhash

from shardckpt.convert.dtensor_layout import LocalBox, Placement, Sharding
from shardckpt.convert.foreign_file import file_in, mapped, open_regular
from shardckpt.convert.layouts import left_beside, names_in
from shardckpt.convert.pickle_scan import PickleStructure, scan
from shardckpt.convert.rank_states import RankStates
from shardckpt.convert.safetensors_files import lazy_tensors
from shardckpt.convert.single_files import check_records, errors_of
from shardckpt.convert.sources import Foreign, Origin, foreign
from shardckpt.convert.torch_objects import ObjectsLoader
from shardckpt.convert.torch_structure import LocalTensor, read_local_state
from shardckpt.errors import CorruptionError, NotACheckpointError, ShardckptError
from shardckpt.storage.posix import translated

__all__ = ["has_metadata", "has_rank_files", "open_torch_checkpointing"]

_METADATA = "metadata.pkl"
_MARK, _END_BYTES = b"world_size", 4096
_FILE = re.compile(r"([A-Za-z0-9_-]+)_(0|[1-9]\d{0,6})\.pt")
_ZIP, _HEAD_BYTES, _STREAM = b"PK\x03\x04", 512, "archive"
"""torch.save names the folder in an archive after the file, unless it writes to a stream."""
_MOST_RANKS = 1 << 20
_REMEDY = "load another checkpoint, or load this one with torch_checkpointing"
_INVALID = (
    msgspec.MsgspecError, ValueError, KeyError, TypeError, IndexError, ArithmeticError,
    AttributeError, RecursionError, StopIteration, struct.error, zipfile.BadZipFile,
    pickle.UnpicklingError,
)  # fmt: skip

_KeyPath = tuple[Any, ...]
"""The keys that lead to an entry of an item."""


def has_metadata(path: str) -> bool:
    """Whether a folder has the metadata of torch_checkpointing."""
    file = os.path.join(path, _METADATA)
    if not os.path.isfile(file):
        return False
    with translated(file), mapped(file) as data:
        ends = bytes(data[:_END_BYTES]) + bytes(data[-_END_BYTES:])
    return ends.startswith(b"\x80") and _MARK in ends


def has_rank_files(path: str) -> bool:
    """Whether a folder has files that torch_checkpointing wrote."""
    return os.path.isdir(path) and any(_is_rank_file(path, name) for name in names_in(path))


def _is_rank_file(path: str, name: str) -> bool:
    return _FILE.fullmatch(name) is not None and _archive_folder(path, name) == _STREAM


def _archive_folder(path: str, name: str) -> str | None:
    """Return the folder in an archive of torch.save. None for another file."""
    file = os.path.join(path, name)
    if not os.path.isfile(file):
        return None
    with translated(file), open_regular(file) as opened:
        head = opened.read(_HEAD_BYTES)
    return head[30:].split(b"/")[0].decode("latin-1") if head.startswith(_ZIP) else None


# ---- metadata.pkl


class _Format(msgspec.Struct):
    type: Literal["TorchSerialization", "SafetensorsSerialization"]  # others hold no tensors


class _Layout(msgspec.Struct):
    file_path: str
    serialization_format: _Format


class _Packed(msgspec.Struct):
    type: str
    data: dict[str, Any]


class _Group(msgspec.Struct):
    sharding_metadata: _Packed
    ranks: list[int]


class _Item(msgspec.Struct):
    nested_path_to_metadata: dict[str, list[_Group]]
    rank_to_layout_info: dict[int, _Layout | None]


class _Metadata(msgspec.Struct):
    metadata: dict[str, _Item]
    world_size: int


class _OldMetadata(msgspec.Struct):
    """Version 1.0, by path, which torch_checkpointing 0.1 still reads."""

    metadata: dict[str, list[_Group]]
    rank_to_layout_info_mappings: dict[int, dict[str, _Layout | None]]
    world_size: int


class _Placement(msgspec.Struct):
    type: Literal["Shard", "StridedShard", "Replicate"]
    dim: int | None = None
    split_factor: int = 0


class _Mesh(msgspec.Struct):
    mesh_shape: list[int]
    mesh_data: list[int]


class _DTensor(msgspec.Struct):
    global_shape: list[int]
    dtype: str
    mesh_spec: _Mesh
    placements: list[_Placement]


class _Boxes(msgspec.Struct):
    global_shape: list[int]
    global_offsets: list[list[int]]
    local_offsets: list[list[int]]
    local_sizes: list[list[int]]
    dtype: str


@dataclass(frozen=True, slots=True)
class _Described:
    """The facts about a tensor in the metadata: its dtype, and its sharding or the boxes of a
    rank."""

    dtype: str
    sharding: Sharding | None
    boxes: tuple[tuple[int, ...], list[LocalBox]] | None


def _read_metadata(path: str) -> tuple[_Metadata, str]:
    """Return the metadata of a folder, and their digest."""
    file = file_in(path, _METADATA)
    with _errors(file), translated(file), mapped(file) as data:
        if scan(data) != len(data):
            raise ValueError("bytes after the end of the pickle")
        found = PickleStructure(data, allowed=lambda name: False).load()
        digest = xxhash.xxh3_128(data).hexdigest()
        if type(found) is dict and "rank_to_layout_info_mappings" in found:
            found = _of_old(msgspec.convert(found, _OldMetadata))
        else:
            found = msgspec.convert(found, _Metadata)
        if not 0 < found.world_size <= _MOST_RANKS:
            raise ValueError(f"a job of {found.world_size} ranks")
        return found, digest


def _of_old(old: _OldMetadata) -> _Metadata:
    items: dict[str, _Item] = {}
    for text, groups in old.metadata.items():
        key, *inner = json.loads(text)
        layouts = {
            rank: by_item.get(key) for rank, by_item in old.rank_to_layout_info_mappings.items()
        }
        item = items.setdefault(key, _Item({}, layouts))
        item.nested_path_to_metadata[json.dumps(inner)] = groups
    return _Metadata(items, old.world_size)


def _described(group: _Group) -> _Described | None:
    """Return what a group says. None for a class that torch_checkpointing does not have."""
    packed = group.sharding_metadata
    if packed.type == "DTensorShardingMetadata":
        found = msgspec.convert(packed.data, _DTensor)
        placements = tuple(Placement(p.dim, p.split_factor) for p in found.placements)
        sharding = Sharding(
            tuple(found.global_shape),
            tuple(found.mesh_spec.mesh_shape),
            tuple(found.mesh_spec.mesh_data),
            placements,
            tuple(range(len(placements))),
        )
        return _Described(found.dtype, sharding.check(), None)
    if packed.type == "default_tensor_v1":
        parts = msgspec.convert(packed.data, _Boxes)
        boxes = [
            LocalBox(tuple(offsets), tuple(sizes), tuple(local))
            for offsets, sizes, local in zip(
                parts.global_offsets, parts.local_sizes, parts.local_offsets, strict=True
            )
        ]
        return _Described(parts.dtype, None, (tuple(parts.global_shape), boxes))
    return None


# ---- the files


@dataclass(slots=True)
class _Files:
    """The files of an item by rank, as (path in the folder, format), also those that metadata name
    but that are missing; and the descriptions of its tensors by path and rank."""

    named: dict[int, str] = field(default_factory=dict)
    files: dict[int, tuple[str, str]] = field(default_factory=dict)
    described: dict[_KeyPath, list[tuple[_Described | None, frozenset[int]]]] = field(
        default_factory=dict
    )

    def of(self, path: _KeyPath, rank: int) -> _Described | None:
        """Return the description of a tensor on a rank."""
        groups = self.described.get(path, ())
        return next((found for found, ranks in groups if rank in ranks), None)


def open_torch_checkpointing(path: str, *, check: bool) -> Foreign:
    """Open a folder of torch_checkpointing as a source. Objects in it are left out and listed.

    `check`: verify the checksums of the torch files.

    Raises:
        CorruptionError: A file is invalid, or the file of a rank is missing.
        CoverageError: The parts of a tensor don't cover it.
    """
    with _errors(path), translated(path):
        saved = _Saved(path, check=check)
        state = saved.state()
    origin = Origin(
        format="torch_checkpointing",
        left_out={**_beside(path, saved.used), **saved.states.left_out},
        changed=saved.states.changed,
        files=tuple(sorted(saved.used)),
    )
    sizes = [os.path.getsize(os.path.join(path, name)) for name in sorted(saved.used)]
    return foreign(
        path,
        "torch_checkpointing",
        state,
        reads=saved.states.reads,
        per_rank=saved.states.per_rank(),
        identity=[saved.digest, sizes],
        origin=origin,
    )


def _beside(path: str, used: set[str]) -> dict[str, str]:
    """Return the files of a folder, and of folders with files of items, that are not read."""
    found = left_beside(path, {name.partition("/")[0] for name in used})
    for folder in sorted({os.path.dirname(name) for name in used} - {""}):
        for name in names_in(os.path.join(path, folder)):
            full = f"{folder}/{name}"
            if not any(each == full or each.startswith(f"{full}/") for each in used):
                found[full] = "the metadata do not list it: an item without a resharder"
    return found


class _Saved:
    """The items of a folder."""

    def __init__(self, path: str, *, check: bool) -> None:
        self.path, self.check = path, check
        self.digest = ""
        self.used: set[str] = set()
        self.items: dict[str, _Files] = {}
        world_size = 0
        if os.path.lexists(os.path.join(path, _METADATA)):
            metadata, self.digest = _read_metadata(path)
            self.used.add(_METADATA)
            world_size = metadata.world_size
            for key, item in metadata.metadata.items():
                self.items[key] = self._of_metadata(key, item, world_size)
        described = {name for item in self.items.values() for name, _ in item.files.values()}
        for name in names_in(path):
            found = _FILE.fullmatch(name)
            if found is None or name in described:
                continue
            if _archive_folder(path, name) == name.removesuffix(".pt"):
                continue  # torch.save of another program
            key, rank = found[1], int(found[2])
            if (key in self.items and self.items[key].described) or (
                world_size and rank >= world_size
            ):
                continue  # a file that the metadata do not list
            self.items.setdefault(key, _Files()).files[rank] = name, "TorchSerialization"
        ranks = {rank for item in self.items.values() for rank in item.files}
        self.world_size = world_size or max(ranks, default=0) + 1
        if not ranks:
            raise NotACheckpointError(
                "This folder of torch_checkpointing has no files of items",
                path=path,
                expected="files such as model_0.pt",
                actual=", ".join(names_in(path)[:8]),
                remedy="check the path",
            )
        self.states = RankStates(path, self.world_size, self._missing)

    def _of_metadata(self, key: str, item: _Item, world_size: int) -> _Files:
        found = _Files()
        for text, groups in item.nested_path_to_metadata.items():
            found.described[tuple(json.loads(text))] = [
                (_described(group), frozenset(group.ranks)) for group in groups
            ]
        for rank in range(world_size):
            layout = item.rank_to_layout_info.get(rank)
            name = found.named[rank] = layout.file_path if layout else f"{key}_{rank}.pt"
            if os.path.lexists(self._file(name)):
                kind = layout.serialization_format.type if layout else "TorchSerialization"
                found.files[rank] = name, kind
        return found

    def _missing(self, name: str, rank: int) -> ShardckptError:
        """Return the error for a tensor of which a rank's part is missing."""
        key = name.partition(".")[0]
        item = self.items[key]
        if rank in item.files:
            return CorruptionError(
                "The file of a rank lacks its part of a tensor",
                path=os.path.join(self.path, item.files[rank][0]),
                rank=rank,
                tensor=name,
                expected="the part of each rank in the mesh of the tensor",
                actual="no entry of this name",
                remedy=_REMEDY,
            )
        lost = item.named.get(rank, f"{key}_{rank}.pt")
        return CorruptionError(
            "The file of a rank is missing",
            path=os.path.join(self.path, lost),
            rank=rank,
            tensor=name,
            expected="a file of each rank in the mesh of the tensor",
            actual="files of the ranks " + ", ".join(map(str, sorted(item.files)[:16])),
            remedy="copy the missing file; a save that did not end has no complete set of files",
        )

    def _file(self, name: str) -> str:
        """Return the path of a file in the folder, which may be in folders below it."""
        *folders, last = name.split("/")
        folder = self.path
        for part in folders:
            folder = file_in(folder, part)
        return file_in(folder, last)

    def state(self) -> dict[str, Any]:
        """Return the state of all ranks. Tensors are placeholders, whose data `reads` reads."""
        return {
            key: self.states.merged(
                key, {rank: self._read(item, rank) for rank in sorted(item.files)}
            )
            for key, item in self.items.items()
        }

    def _read(self, item: _Files, rank: int) -> tuple[Any, ObjectsLoader]:
        """Read the file of a rank: a state with LocalTensors."""
        name, kind = item.files[rank]
        file = self._file(name)
        self.used.add(name)
        with errors_of(file, _REMEDY), _errors(file):
            if kind == "SafetensorsSerialization":
                return self._read_safetensors(file, item, rank), ObjectsLoader()
            structure = read_local_state(file, rank=rank)
            if self.check:
                check_records(file)
            for path, tensor in _tensors(structure.root, ()):
                self._describe(tensor, item, path, rank)
            return structure.root, ObjectsLoader(structure.containers)

    def _read_safetensors(self, file: str, item: _Files, rank: int) -> dict[Any, Any]:
        """Read a safetensors file, which has names with dots in place of nested keys."""
        paths = {".".join(map(str, path)): path for path in item.described}
        root: dict[Any, Any] = {}
        tensors, _, left_out = lazy_tensors(file)
        self.states.left_out.update(left_out)
        for name, lazy in tensors.items():
            *above, last = path = paths.get(name, (name,))
            node = root
            for key in above:
                node = node.setdefault(key, {})
            tensor = LocalTensor(lazy.dtype, lazy.shape, lazy.read, identity=name)
            self._describe(tensor, item, path, rank)
            node[last] = tensor
        return root

    def _describe(self, tensor: LocalTensor, item: _Files, path: _KeyPath, rank: int) -> None:
        """Add the facts in the metadata to a tensor. A DTensor in the file has more of them."""
        found = item.of(path, rank)
        if found is None or tensor.absent:
            return
        if found.dtype != str(tensor.dtype):
            raise ValueError(f"{path}: {found.dtype} in the metadata, {tensor.dtype} in the file")
        if tensor.sharding is None:
            tensor.sharding, tensor.boxes = found.sharding, found.boxes
        elif found.sharding is not None and not _agree(tensor.sharding, found.sharding):
            raise ValueError(f"{path}: another sharding in the metadata than in the file")


def _agree(own: Sharding, described: Sharding) -> bool:
    """Whether two shardings are equal, as far as torch_checkpointing 0.1.0 records them: it writes
    strided shards as plain ones."""
    dims = [[placement.dim for placement in each.placements] for each in (own, described)]
    return own[:3] == described[:3] and dims[0] == dims[1]


def _tensors(node: Any, path: _KeyPath) -> Iterator[tuple[_KeyPath, LocalTensor]]:
    """Yield the tensors of a state, with the paths that torch_checkpointing gives them."""
    if isinstance(node, LocalTensor):
        yield path, node
    elif isinstance(node, Mapping):
        for key, item in node.items():
            yield from _tensors(item, (*path, key))
    elif type(node) in (list, tuple):
        for index, item in enumerate(node):
            yield from _tensors(item, (*path, index))


@contextmanager
def _errors(path: str) -> Iterator[None]:
    """Turn the errors of invalid files to CorruptionError."""
    try:
        yield
    except ShardckptError:
        raise
    except _INVALID as error:
        raise CorruptionError(
            "This torch_checkpointing checkpoint is corrupted or of an unknown version",
            path=path,
            expected="the files of torch_checkpointing 0.1",
            actual=f"{type(error).__name__}: {error}"[:200],
            remedy=_REMEDY,
        ) from error
