"""safetensors files: one with a whole state, or several with an index, as Hugging Face has them.

Tensors that are tied are written once, and the metadata of their file says which names are theirs
as well, as safetensors.torch.save_model has it. Source of the index:
https://huggingface.co/docs/huggingface_hub/package_reference/serialization
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors import safe_open

from shardckpt.convert.folders import Folder
from shardckpt.convert.sources import Foreign, LazyTensor, plain_tree
from shardckpt.convert.whole_files import DIGEST, TREE, damaged, errors_of, state_digest
from shardckpt.coordination.base import Coordinator
from shardckpt.errors import CorruptionError, NotACheckpointError, StateError
from shardckpt.execution.reshard import Source, read_chunks
from shardckpt.execution.writer import write_shard
from shardckpt.format import values
from shardckpt.format.dtypes import DTYPES
from shardckpt.format.shard import build_header
from shardckpt.format.values import TensorRef
from shardckpt.planning.chunks import box_slices
from shardckpt.planning.save_plan import layout_order
from shardckpt.planning.saved import SavedState
from shardckpt.planning.table import ChunkTable, TensorSpec, pad_boxes
from shardckpt.storage.appearing import appearing
from shardckpt.storage.local import LocalFile
from shardckpt.storage.system import System

__all__ = [
    "HuggingFace",
    "is_hugging_face",
    "open_hugging_face",
    "open_safetensors",
    "write_safetensors",
]

_INDEX = "model.safetensors.index.json"
_ONE_FILE = "model.safetensors"
_REMEDY = "convert another checkpoint, or download the file again"


def is_hugging_face(path: str) -> bool:
    """Whether a directory holds weights in Hugging Face's layout."""
    return any(os.path.isfile(os.path.join(path, n)) for n in (_INDEX, _ONE_FILE))


def open_safetensors(path: str, *, check: bool) -> Foreign:
    """A safetensors file as a source; `check` that ours is what was written, by reading all."""
    with errors_of(path, _REMEDY):
        tensors, metadata = _tensors_in(path)
        kind, tree = "safetensors", _flat_tree(tensors, metadata)
        if TREE in metadata:
            tree = msgspec.json.decode(metadata[TREE])
        source = Foreign(path, kind, tree, tensors, identity=os.path.getsize(path))
        if check and TREE in metadata:
            found = _digest(source, metadata[TREE])
            if found != metadata.get(DIGEST):
                raise damaged(path, f"digest {metadata.get(DIGEST)}", f"digest {found}")
        return source


def open_hugging_face(path: str) -> Foreign:
    """A directory in Hugging Face's layout as a source: a flat state of tensors."""
    index = os.path.join(path, _INDEX)
    tensors: dict[str, LazyTensor] = {}
    metadata: dict[str, str] = {}
    sizes = []
    weight_map: dict[str, str] | None = None
    with errors_of(path, _REMEDY):
        if os.path.isfile(index):
            with open(index, "rb") as file:
                weight_map = msgspec.json.decode(file.read(), type=_Index).weight_map
        for name in sorted(set(weight_map.values())) if weight_map is not None else [_ONE_FILE]:
            file_path = os.path.join(path, os.path.basename(name))
            with errors_of(file_path, _REMEDY):
                found, own = _tensors_in(file_path)
            named = weight_map or dict.fromkeys(found, name)
            wanted = {tensor for tensor, file_name in named.items() if file_name == name}
            if wanted != found.keys():
                raise CorruptionError(
                    "The index and a file of these weights don't agree",
                    path=file_path,
                    tensor=min(wanted ^ found.keys()),
                    expected=f"the {len(wanted)} tensors that {_INDEX} names",
                    actual=f"{len(found)} tensors",
                    remedy=_REMEDY,
                )
            sizes.append(os.path.getsize(file_path))
            tensors.update(found)
            metadata.update(own)
        if weight_map is not None:
            tensors = {name: tensors[name] for name in weight_map}
        tree = _flat_tree(tensors, metadata)
        return Foreign(path, "Hugging Face", tree, tensors, identity=sizes)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _tensors_in(path: str) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of a file, in its order, and its metadata."""
    file: Any = safe_open(path, "pt")
    tensors = {}
    for name in file.keys():  # noqa: SIM118
        part = file.get_slice(name)
        dtype = DTYPES.get(part.get_dtype())
        if dtype is None:
            raise NotACheckpointError(
                "A tensor of a dtype that torch has not",
                path=path,
                tensor=name,
                expected="one of " + ", ".join(DTYPES),
                actual=part.get_dtype(),
                remedy="convert the file's other tensors: choose them with keys",
            )
        tensors[name] = LazyTensor(dtype, tuple(part.get_shape()), functools.partial(_read, part))
    return tensors, file.metadata() or {}


def _read(part: Any, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    found: torch.Tensor = part[box_slices((0,) * len(sizes), offsets, sizes) or ...]
    return found


def _flat_tree(tensors: dict[str, LazyTensor], metadata: dict[str, str]) -> Any:
    tied = {n: kept for n, kept in metadata.items() if kept in tensors and n not in tensors}
    names = {**{name: name for name in tensors}, **tied}
    return values.mapping(
        [(name, values.reference("tensor", kept)) for name, kept in names.items()], at=""
    )


def _whole(source: Source, name: str) -> Iterator[torch.Tensor]:
    """The elements of a tensor in order, a buffer's worth at a time."""
    entry = source.manifest.tensors[name]
    table = ChunkTable(
        tensor=np.zeros(1, dtype=np.int64),
        boxes=pad_boxes([((0,) * len(entry.shape), entry.shape)]),
    )
    return read_chunks(source, (TensorSpec(name, entry.dtype, entry.shape),), table, slice(None))


def _digest(source: Source, tree: str) -> str:
    tensors = sorted(source.manifest.tensors.items())
    return state_digest(
        tree, ((n, DTYPES[e.dtype], e.shape, _whole(source, n)) for n, e in tensors)
    )


def write_safetensors(
    source: Source, path: str, *, overwrite: bool, progress: Callable[[int], None]
) -> None:
    """Write a source as one file, which read_one reads; it is read twice, first for the digest.
    Not collective."""
    with appearing(path, overwrite=overwrite) as temporary:
        tree = msgspec.json.encode(plain_tree(source.manifest, source.manifest.state)).decode()
        metadata = {"format": "pt", TREE: tree, DIGEST: _digest(source, tree)}
        _write_file(source, list(source.manifest.tensors), metadata, temporary, progress)


def _write_file(
    source: Source,
    names: list[str],
    metadata: dict[str, str],
    path: str,
    progress: Callable[[int], None],
) -> None:
    entries = {name: source.manifest.tensors[name] for name in names}
    specs = tuple(TensorSpec(name, entry.dtype, entry.shape) for name, entry in entries.items())
    boxes = pad_boxes([((0,) * len(spec.shape), spec.shape) for spec in specs])
    order = layout_order(specs, ChunkTable(tensor=np.arange(len(specs)), boxes=boxes))
    chunks = ChunkTable(tensor=order, boxes=boxes[order])
    ordered = [names[index] for index in order.tolist()]
    header = build_header(
        [(n, entries[n].dtype, entries[n].shape, entries[n].size_bytes) for n in ordered], metadata
    )
    size_bytes = len(header) + sum(entry.size_bytes for entry in entries.values())
    file = LocalFile(System(), path, size_bytes=size_bytes)
    try:
        tensors = read_chunks(source, specs, chunks, slice(None))
        written_bytes, _ = write_shard(file, header=header, tensors=tensors, progress=progress)
        file.close(size_bytes=written_bytes)
    except BaseException:
        file.discard()
        raise


class HuggingFace(Folder):
    """Writes a source in Hugging Face's layout: flat names, safetensors files of at most
    `file_bytes`, an index. Each rank writes whole files. Anything but tensors is a StateError."""

    index = _INDEX
    names = r"model(-\d{5,}-of-\d{5,})?\.safetensors(\.index\.json)?"

    def __init__(self, source: Source, path: str, *, file_bytes: int, overwrite: bool) -> None:
        super().__init__(path, overwrite=overwrite)
        self.source = source
        self.tied: dict[str, list[str]] = {name: [] for name in source.manifest.tensors}
        saved = SavedState(source.manifest)
        for name, node in saved.leaves.items():
            if isinstance(node, TensorRef) and node.kind != "per_rank":
                self.tied[node.name] += [name] if name != node.name else []
            elif node not in ({}, [], ()):
                raise StateError(
                    "Hugging Face's layout holds tensors, and nothing else",
                    path=source.path,
                    tensor=name,
                    actual=f"{type(node).__name__}",
                    remedy="choose the model's entries: --keys model --rename model=",
                )
        self.files: list[list[str]] = [[]]
        room = file_bytes
        for name, entry in source.manifest.tensors.items():
            if entry.size_bytes > room and self.files[-1]:
                self.files.append([])
                room = file_bytes
            self.files[-1].append(name)
            room -= entry.size_bytes

    def _name(self, number: int) -> str:
        return f"model-{number + 1:05}-of-{len(self.files):05}.safetensors"

    def write(self, ranks: Coordinator, progress: Callable[[int], None]) -> bytes:
        """See Rewriting.write."""
        before = 0
        for number in range(ranks.rank, len(self.files), ranks.world_size):

            def written(size_bytes: int, before: int = before) -> None:
                ranks.progress(size_bytes)
                progress(before + size_bytes)

            names = self.files[number]
            tied = {alias: name for name in names for alias in self.tied[name]}
            path = os.path.join(self.temporary, self._name(number))
            _write_file(self.source, names, {"format": "pt", **tied}, path, written)
            before += sum(self.source.manifest.tensors[name].size_bytes for name in names)
        return b""

    def write_index(self, payloads: list[bytes]) -> None:
        """See Folder.write_index."""
        total = sum(entry.size_bytes for entry in self.source.manifest.tensors.values())
        places = {n: self._name(number) for number, names in enumerate(self.files) for n in names}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        with open(os.path.join(self.temporary, self.index), "x") as file:
            json.dump(index, file, indent=2)
