"""Checkpoints of other libraries as sources for reshard, and selections of entries."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import torch

from shardckpt.convert.layouts import left_beside
from shardckpt.convert.transformed import Cast, Transformed
from shardckpt.errors import LoadMismatchError, StateError
from shardckpt.format import typed_json as values
from shardckpt.format.digests import text_digest
from shardckpt.format.dtypes import dtype_name
from shardckpt.format.entries import Manifest, TensorEntry
from shardckpt.format.typed_json import TensorRef
from shardckpt.format.validation import check_references
from shardckpt.maintenance.rewritable import Source
from shardckpt.state.flatten import flatten
from shardckpt.state.local_chunks import box_slices
from shardckpt.state.markers import PerRank
from shardckpt.state.saved_tree import Renaming, SavedState, Select, children, rebuilt
from shardckpt.storage.base import MANIFEST_NAME

__all__ = [
    "Foreign",
    "LazyTensor",
    "Origin",
    "Selected",
    "foreign",
    "origin_of",
    "plain_tree",
    "state_in_memory",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The origin of a source: its format, the library that wrote it, and the unconverted entries.

    `left_out`: entry or file -> why it is not converted. `changed`: entry -> its new form. `files`:
    the files that were read, if the folder holds others too. `companions`: files of the folder to
    copy to a folder in the layout of Hugging Face. `home`: the folder of the companions, if it is
    not the source.
    """

    format: str
    writer: str | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    changed: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()
    home: str | None = None


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is read on demand. `read` takes the offsets and sizes of a box."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[tuple[int, ...], tuple[int, ...]], torch.Tensor]


class Foreign(AbstractContextManager["Foreign"]):
    """A checkpoint of another library as a Source. Not collective.

    `tree` is the typed JSON of its state, as in a manifest, and `per_rank` that of the PerRank
    values of each rank. `identity` distinguishes it from others. Raises CorruptionError if the tree
    refers to a missing tensor, UnsupportedLeafError for a dtype that a shard can't hold.
    """

    def __init__(
        self,
        path: str,
        source_format: str,
        tree: Any,
        tensors: Mapping[str, LazyTensor],
        *,
        per_rank: Sequence[Any] = (),
        identity: object = None,
        close: Callable[[], None] = lambda: None,
        origin: Origin | None = None,
    ) -> None:
        check_references(tree, list(per_rank), tensors, path)
        self.origin = origin or Origin(format=source_format)
        self.path, self._tensors, self._close = path, tensors, close
        entries = {
            name: TensorEntry(
                dtype=dtype_name(lazy.dtype, tensor=name),
                shape=lazy.shape,
                chunks=np.empty((0, 3 + 2 * len(lazy.shape)), dtype=np.int64),
            )
            for name, lazy in tensors.items()
        }
        facts = [
            tree,
            per_rank,
            [(name, e.dtype, e.shape) for name, e in entries.items()],
            str(identity),
        ]
        self.manifest = Manifest(
            checkpoint_id=text_digest(msgspec.json.encode(facts)),
            created="",
            library=source_format,
            world_size=max(1, len(per_rank)),
            shards=(),
            tensors=entries,
            state=tree,
            per_rank=tuple(per_rank),
            notes={"converted": f"from {source_format}"},
        )

    def read_box(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """See Source.read_box."""
        return self._tensors[name].read(offsets, sizes).detach().contiguous()

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """See Source.close."""
        self._close()


def foreign(
    path: str,
    source_format: str,
    state: Any,
    *,
    reads: Mapping[int, Callable[[tuple[int, ...], tuple[int, ...]], torch.Tensor]] | None = None,
    per_rank: Sequence[Mapping[str, Any]] = (),
    identity: object = None,
    origin: Origin | None = None,
    close: Callable[[], None] = lambda: None,
) -> Foreign:
    """Make a source of a nested state of CPU tensors.

    `reads` has a function that reads boxes of a tensor, by the id of the tensor. `per_rank` are the
    values of each rank, by the names of the PerRank in the state, and in their order. `close` is
    called when the source is closed.
    """
    try:
        flat = flatten(state, rank=0)
        tensors, trees = {**flat.tensors, **flat.rank_only}, [flat.per_rank_trees]
        for rank, own in enumerate(per_rank[1:], 1):
            other = flatten({name: PerRank(value) for name, value in own.items()}, rank=rank)
            tensors |= other.rank_only
            trees.append(other.per_rank_trees)
    except StateError as error:  # two entries of one name, say
        error.path = path
        raise
    lazy = {}
    for name, tensor in tensors.items():
        assert isinstance(tensor, torch.Tensor)
        read = (reads or {}).get(id(tensor)) or functools.partial(_cut, tensor.detach())
        lazy[name] = LazyTensor(tensor.dtype, tuple(tensor.shape), read)
    return Foreign(
        path,
        source_format,
        flat.tree,
        lazy,
        per_rank=trees if per_rank else (),
        identity=identity,
        close=close,
        origin=origin,
    )


def _cut(tensor: torch.Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    part: torch.Tensor = tensor[box_slices((0,) * len(sizes), offsets, sizes)]
    return part


class Selected(AbstractContextManager["Selected"]):
    """The entries of a source that `keys` select, with names that `rename` changes; see load.

    Raises LoadMismatchError if a key or a prefix names no entry or nothing is selected, StateError
    if two names become equal.
    """

    def __init__(self, source: Source, *, keys: Select = None, rename: Renaming = None) -> None:
        saved = SavedState(source.manifest, keys=keys, rename=rename)
        saved.check_used(path=source.path)
        if not saved.leaves:
            raise LoadMismatchError(
                "No entry of this checkpoint is selected",
                path=source.path,
                expected="keys= that selects an entry",
                actual=repr(keys),
                remedy="list all names with `shardckpt inspect`",
            )
        refs = {name: node for name, node in saved.leaves.items() if isinstance(node, TensorRef)}
        self.path, self.source = source.path, source
        self._names: dict[str, str] = {}  # name in the source -> name here
        for name, node in refs.items():
            if node.ref_type != "per_rank":
                self._names.setdefault(node.name, name)
        kept = {int(node.name) for node in refs.values() if node.ref_type == "per_rank"}
        per_rank = tuple(
            [item if index in kept else None for index, item in enumerate(rank_values)]
            for rank_values in source.manifest.per_rank
        )
        for rank_values in per_rank:
            values.decode(
                rank_values, tensor=lambda ref: self._names.setdefault(ref.name, ref.name)
            )
        self._sources = {name: source for source, name in self._names.items()}
        tensors = source.manifest.tensors
        self.manifest = replace(
            source.manifest,
            tensors={name: tensors[source] for source, name in self._names.items()},
            state=values.encode(self._renamed(saved.tree), at=""),
            per_rank=per_rank if kept else (),
        )

    def _renamed(self, node: Any) -> Any:
        if isinstance(node, TensorRef) and node.ref_type != "per_rank":
            return TensorRef(self._names[node.name], node.ref_type)
        items = children(node)
        return rebuilt(node, ((k, self._renamed(item)) for k, item in items)) if items else node

    def read_box(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """See Source.read_box."""
        return self.source.read_box(self._sources[name], offsets, sizes)

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """See Source.close."""
        self.source.close()


def origin_of(source: Source) -> Origin:
    """Return the origin of a source."""
    if isinstance(source, (Selected, Transformed, Cast)):
        return origin_of(source.source)
    if isinstance(origin := getattr(source, "origin", None), Origin):
        return origin
    used = {MANIFEST_NAME, *(shard.name for shard in source.manifest.shards)}
    left = left_beside(source.path, used) if os.path.isdir(source.path) else {}
    return Origin(format="shardckpt", writer=source.manifest.library, left_out=left)


def plain_tree(manifest: Manifest, node: Any) -> Any:
    """Return the typed JSON of the state, with lists in place of PerRank values.

    A list has the values of all ranks.
    """
    if isinstance(node, list):
        return [plain_tree(manifest, item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.keys() == {"$per_rank"}:
        return [
            plain_tree(manifest, rank_values[int(node["$per_rank"])])
            for rank_values in manifest.per_rank
        ]
    return {key: plain_tree(manifest, item) for key, item in node.items()}


def state_in_memory(source: Source, node: Any) -> Any:
    """Build the values of typed JSON in memory.

    PerRank values become lists, as in plain_tree. numpy arrays become tensors, which torch loads
    without unpickling.
    """
    made: dict[str, torch.Tensor] = {}

    def tensor(ref: TensorRef) -> torch.Tensor:
        if ref.name not in made:
            shape = source.manifest.tensors[ref.name].shape
            made[ref.name] = source.read_box(ref.name, (0,) * len(shape), shape)
        return made[ref.name]

    plain = plain_tree(source.manifest, node)
    return values.decode(plain, tensor=tensor, record=lambda type_name, fields: fields)
