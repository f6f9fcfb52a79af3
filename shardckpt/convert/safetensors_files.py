"""Read and write safetensors files: one with a full state, or several with an index (Hugging Face).

Tied tensors are written once, and the metadata of their file list their other names, as in
safetensors.torch.save_model. Source of the index:
https://huggingface.co/docs/huggingface_hub/package_reference/serialization
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors import safe_open

from shardckpt.convert.foreign_file import file_in, indexed_file, read_small, utf8_path
from shardckpt.convert.layouts import companions, left_beside, writer_of
from shardckpt.convert.single_files import (
    DIGEST,
    TREE,
    UNSEALED,
    check_sealed,
    errors_of,
    is_sealed,
    read_metadata,
    seal,
)
from shardckpt.convert.sources import Foreign, LazyTensor, Origin, origin_of, plain_tree
from shardckpt.convert.targets import Folder, Target
from shardckpt.convert.torch_sources import Index
from shardckpt.coordination.base import Coordinator
from shardckpt.errors import CorruptionError, StateError
from shardckpt.format import typed_json as values
from shardckpt.format.dtype_names import check_supported, plain_form
from shardckpt.format.dtypes import DTYPES
from shardckpt.format.safetensors_header import build_header
from shardckpt.format.typed_json import TensorRef
from shardckpt.maintenance.parallel_write import NewFile, joined_files, write_ranges
from shardckpt.maintenance.rewritable import Source
from shardckpt.plan.local_plan import ChunkTable, TensorSpec, pad_boxes
from shardckpt.plan.save_plan import layout_order
from shardckpt.state.local_chunks import box_slices
from shardckpt.state.saved_tree import SavedState
from shardckpt.storage.atomic_write import AtomicWrite
from shardckpt.storage.local import LocalFile
from shardckpt.storage.posix import System

__all__ = [
    "HuggingFace",
    "SafetensorsFile",
    "open_hugging_face",
    "open_safetensors",
]

_INDEX = "model.safetensors.index.json"
_MOST_TEXTS = 100  # names of texts that a report lists
_REMEDY = "convert another checkpoint, or download the file again"


def open_safetensors(path: str, *, check: bool) -> Foreign:
    """Open a safetensors file as a source. `check`: verify the digest of a file of shardckpt, by
    reading it completely."""
    with errors_of(path, _REMEDY):
        tensors, metadata, left_out = lazy_tensors(path)
        layout, tree = "safetensors", _flat_tree(tensors, metadata)
        if sealed := is_sealed(path, metadata):
            tree = msgspec.json.decode(metadata[TREE])
        else:
            left_out = _texts(metadata, tensors) | left_out
        origin = Origin(format=layout, left_out=left_out)
        identity = os.path.getsize(path)
        source = Foreign(path, layout, tree, tensors, identity=identity, origin=origin)
        if check and sealed:
            check_sealed(path)
        return source


def open_hugging_face(path: str, weights: str) -> Foreign:
    """Open a folder in the layout of Hugging Face as a source: a flat state of tensors. `weights`
    is the file with the tensors, or the index."""
    tensors: dict[str, LazyTensor] = {}
    metadata: dict[str, str] = {}
    left_out: dict[str, str] = {}
    sizes = []
    weight_map: dict[str, str] | None = None
    with errors_of(path, _REMEDY):
        if weights.endswith(".json"):
            text = read_small(file_in(path, weights))
            weight_map = msgspec.json.decode(text, type=Index).weight_map
        names = sorted(set(weight_map.values())) if weight_map is not None else [weights]
        for name in names:
            file_path = indexed_file(path, name, weights)
            with errors_of(file_path, _REMEDY):
                found, file_metadata, left = lazy_tensors(file_path)
            in_file = {*found, *left}
            named = weight_map or dict.fromkeys(in_file, name)
            wanted = {tensor for tensor, file_name in named.items() if file_name == name}
            if wanted != in_file:
                raise CorruptionError(
                    "The index does not match a file of these weights",
                    path=file_path,
                    tensor=min(wanted ^ in_file),
                    expected=f"the {len(wanted)} tensors that {weights} names",
                    actual=f"{len(in_file)} tensors",
                    remedy=_REMEDY,
                )
            sizes.append(os.path.getsize(file_path))
            tensors.update(found)
            left_out.update(left)
            metadata.update(file_metadata)
        if weight_map is not None:
            tensors = {name: tensors[name] for name in weight_map if name in tensors}
        tree = _flat_tree(tensors, metadata)
        origin = Origin(
            format="Hugging Face's layout",
            writer=writer_of(path),
            left_out=left_beside(path, {*names, weights}) | _texts(metadata, tensors) | left_out,
            files=tuple(sorted({*names, weights})),
            companions=companions(path),
        )
        return Foreign(path, "Hugging Face", tree, tensors, identity=sizes, origin=origin)


def lazy_tensors(path: str) -> tuple[dict[str, LazyTensor], dict[str, str], dict[str, str]]:
    """Return the tensors of a file in order, its metadata, and the reasons why tensors are left out
    of dtypes that torch does not have."""
    metadata = read_metadata(path)
    with utf8_path(path) as openable:
        file: Any = safe_open(openable, "pt")
    tensors, left_out = {}, {}
    for name in file.keys():  # noqa: SIM118
        part = file.get_slice(name)
        saved, shape = part.get_dtype(), tuple(part.get_shape())
        read = functools.partial(_read, part)
        if saved == "F4":  # torch has two elements in a byte; the library does not slice them
            saved, shape = "F4X2", (*shape[:-1], shape[-1] // 2)
            read = functools.partial(_read_pairs, file, name)
        dtype = DTYPES.get(saved)
        if dtype is None:
            check_supported(saved, tensor=name, path=path)
            left_out[name] = f"a tensor of {saved}, which torch does not have"
        else:
            tensors[name] = LazyTensor(dtype, shape, read)
    return tensors, metadata, left_out


def _read(part: Any, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    with torch.device("cpu"):  # the library makes tensors on the default device
        found: torch.Tensor = part[box_slices((0,) * len(sizes), offsets, sizes) or ...]
    return found


def _read_pairs(
    file: Any, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> torch.Tensor:
    with torch.device("cpu"):
        found: torch.Tensor = file.get_tensor(name)
    return found[box_slices((0,) * len(sizes), offsets, sizes)]


def _texts(metadata: dict[str, str], tensors: dict[str, LazyTensor]) -> dict[str, str]:
    """Return the entry that names the texts of the metadata, which no target keeps."""
    names = [n for n in metadata if n != "format" and (n in tensors or metadata[n] not in tensors)]
    shown = ", ".join(names[:_MOST_TEXTS])
    return {"metadata": f"describes the file: {shown}"} if names else {}


def _flat_tree(tensors: dict[str, LazyTensor], metadata: dict[str, str]) -> Any:
    tied = {n: kept for n, kept in metadata.items() if kept in tensors and n not in tensors}
    names = {**{name: name for name in tensors}, **tied}
    return values.mapping(
        [(name, values.reference("tensor", kept)) for name, kept in names.items()], at=""
    )


class SafetensorsFile(Target):
    """Writes a source as one file, which read_one reads. Each rank writes a part."""

    def __init__(
        self, source: Source, path: str, *, overwrite: bool, system: System | None = None
    ) -> None:
        super().__init__(path, overwrite=overwrite, system=system)
        self.source = source

    def write(self, ranks: Coordinator, progress: Callable[[int], None]) -> bytes:
        """See Rewriting.write."""
        sizes = [sum(entry.size_bytes for entry in self.source.manifest.tensors.values())]
        return write_ranges(self.source, sizes, self._new_file, ranks, progress)

    def _new_file(self, number: int = 0) -> NewFile:
        tensors, tree = self.source.manifest.tensors, self.source.manifest.state
        text = msgspec.json.encode(plain_tree(self.source.manifest, tree)).decode()
        metadata = {"format": "pt", TREE: text, DIGEST: UNSEALED}
        return _new_file(self.source, list(tensors), metadata, self.temporary, self.system)

    def finish(self, write: AtomicWrite, payloads: list[bytes]) -> None:
        """See Target.finish."""
        (written,) = joined_files(payloads)
        new = self._new_file()
        file = new.create()
        try:
            seal(file, new.header, written.of_blocks())
            file.close(size_bytes=new.size_bytes)
        except BaseException:
            file.discard()
            raise


def _new_file(
    source: Source, names: list[str], metadata: dict[str, str], path: str, system: System
) -> NewFile:
    entries = {name: source.manifest.tensors[name] for name in names}
    specs = tuple(TensorSpec(name, entry.dtype, entry.shape) for name, entry in entries.items())
    boxes = pad_boxes([((0,) * len(spec.shape), spec.shape) for spec in specs])
    order = layout_order(specs, ChunkTable(tensor=np.arange(len(specs)), boxes=boxes))
    ordered = [names[index] for index in order.tolist()]
    header = build_header(
        [
            (n, *plain_form(entries[n].dtype, entries[n].shape, tensor=n), entries[n].size_bytes)
            for n in ordered
        ],
        metadata,
    )
    size_bytes = len(header) + sum(entry.size_bytes for entry in entries.values())
    return NewFile(
        header=header,
        size_bytes=size_bytes,
        specs=specs,
        chunks=ChunkTable(tensor=order, boxes=boxes[order]),
        create=functools.partial(LocalFile, system, path, size_bytes=size_bytes, shared=True),
    )


class HuggingFace(Folder):
    """Writes a source in the layout of Hugging Face: flat names, one safetensors file, or several
    of at most `file_bytes` and an index. Entries other than tensors raise StateError. Configuration
    and tokenizer of a source in the same layout are copied."""

    index = (_INDEX, "model.safetensors")
    stem = "model"
    names = r"model(-\d{5,}-of-\d{5,})?\.safetensors(\.index\.json)?"

    def __init__(
        self,
        source: Source,
        path: str,
        *,
        file_bytes: int,
        overwrite: bool,
        system: System | None = None,
    ) -> None:
        origin = origin_of(source)
        copied = {
            name: os.path.join(origin.home or source.path, name) for name in origin.companions
        }
        super().__init__(path, overwrite=overwrite, copied=copied, system=system)
        self.source = source
        self.tied: dict[str, list[str]] = {name: [] for name in source.manifest.tensors}
        saved = SavedState(source.manifest)
        for name, node in saved.leaves.items():
            if isinstance(node, TensorRef) and node.ref_type != "per_rank":
                self.tied[node.name] += [name] if name != node.name else []
            elif node not in ({}, [], ()):
                raise StateError(
                    "The layout of Hugging Face holds only tensors",
                    path=source.path,
                    tensor=name,
                    actual=f"{type(node).__name__}",
                    remedy="select the entries of the model: --keys model --rename model=",
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
        if len(self.files) == 1:
            return f"{self.stem}.safetensors"
        return f"{self.stem}-{number + 1:05}-of-{len(self.files):05}.safetensors"

    def write(self, ranks: Coordinator, progress: Callable[[int], None]) -> bytes:
        """See Rewriting.write."""
        tensors = self.source.manifest.tensors
        sizes = [sum(tensors[name].size_bytes for name in names) for names in self.files]
        return write_ranges(self.source, sizes, self._new_file, ranks, progress)

    def _new_file(self, number: int) -> NewFile:
        names = self.files[number]
        tied = {alias: name for name in names for alias in self.tied[name]}
        path = os.path.join(self.temporary, self._name(number))
        return _new_file(self.source, names, {"format": "pt", **tied}, path, self.system)

    def finish(self, write: AtomicWrite, payloads: list[bytes]) -> None:
        """See Target.finish."""
        if len(self.files) > 1:
            write.add_bytes(self._index_text(), f"{self.stem}.safetensors.index.json")
        self.copy(write)

    def _index_text(self) -> bytes:
        total = sum(entry.size_bytes for entry in self.source.manifest.tensors.values())
        places = {n: self._name(number) for number, names in enumerate(self.files) for n in names}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        return json.dumps(index, indent=2).encode()
