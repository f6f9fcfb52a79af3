"""The local plan of a rank, as tables that can be sent between ranks.

The boxes of all tensors are in one int64 array [n, 2, D] of offsets and sizes, where D is the
largest number of dimensions. Unused dimensions have offset 0 and size 1, so that volumes and
comparisons need no special cases.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from shardckpt.errors import RankMismatchError, UnsupportedLeafError
from shardckpt.format.digests import text_digest
from shardckpt.format.dtype_names import NOT_COPYABLE
from shardckpt.format.dtypes import dtype_name, memory_view
from shardckpt.format.entries import Box
from shardckpt.format.manifest import MOST_DIMS
from shardckpt.format.number_lists import Ints
from shardckpt.state.flatten import FlatState, placeholder
from shardckpt.state.local_chunks import PLAIN, AnyTensor, local_chunks, may_have_replicas

__all__ = [
    "ChunkTable",
    "LocalPlan",
    "Offer",
    "TensorSpec",
    "filled",
    "flat_boxes",
    "local_plan",
    "pack_columns",
    "pad_boxes",
    "pad_shapes",
    "unpack_columns",
    "widen_boxes",
]


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A global tensor: its name, the name of its dtype, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTable:
    """A table of n chunks: `tensor` [n] indexes a list of TensorSpec; `boxes` [n, 2, D]."""

    tensor: Ints
    boxes: Ints

    def __len__(self) -> int:
        return len(self.tensor)

    def pack(self) -> bytes:
        """Encode the table as bytes."""
        return pack_columns(np.column_stack([self.tensor, flat_boxes(self.boxes)]))

    @classmethod
    def unpack(cls, data: bytes) -> ChunkTable:
        """Decode the bytes of `pack`."""
        return cls.unpack_all([data])[0]

    @classmethod
    def unpack_all(cls, packed: Sequence[bytes]) -> list[ChunkTable]:
        """Decode the bytes of `pack` of several ranks. Many tables are decoded at once."""
        tables: dict[int, ChunkTable] = {}
        for rows, columns in _unpack_alike(packed):
            count, length, width = columns.shape
            boxes = columns[:, :, 1:].reshape(count, length, 2, (width - 1) // 2)
            tensor = np.ascontiguousarray(columns[:, :, 0])
            for index, row in enumerate(rows):
                tables[row] = cls(tensor=tensor[index], boxes=boxes[index])
        return [tables[row] for row in range(len(packed))]


_BATCH_RANKS = 64
_TYPES = {1: "u1", 2: "<u2", 4: "<u4", 8: "<i8"}


def pack_columns(columns: Ints) -> bytes:
    """Encode columns [n, k] as few bytes: each in its narrowest type, then compressed. The boxes of
    a rank are similar, and rank 0 receives those of all ranks."""
    parts = []
    for column in columns.T:
        low, high = (int(column.min()), int(column.max())) if len(column) else (0, 0)
        width = next((w for w in (1, 2, 4) if low >= 0 and high >> 8 * w == 0), 8)
        parts.append((width, column.astype(_TYPES[width]).tobytes()))
    head = struct.pack("<Q", len(columns)) + bytes(width for width, _ in parts)
    body = zlib.compress(b"".join(data for _, data in parts), 1)
    return struct.pack("<I", len(parts)) + head + body


def unpack_columns(data: bytes) -> Ints:
    """Decode the bytes of `pack_columns`: columns [n, k]."""
    ((_, columns),) = _unpack_alike([data])
    only: Ints = columns[0]
    return only


def _unpack_alike(packed: Sequence[bytes]) -> Iterator[tuple[list[int], Ints]]:
    """Decode columns of several ranks: some of equal length and types are decoded at once.

    Yields:
        The numbers of these ranks, and their columns [ranks, n, k].
    """
    alike: dict[bytes, list[int]] = {}
    for number, data in enumerate(packed):
        alike.setdefault(data[: 12 + int.from_bytes(data[:4], "little")], []).append(number)
    batches = [
        (head, every[low : low + _BATCH_RANKS])  # whose columns fit in the cache of a processor
        for head, every in alike.items()
        for low in range(0, len(every), _BATCH_RANKS)
    ]
    for head, numbers in batches:
        count, length = struct.unpack_from("<IQ", head)
        bodies = b"".join([zlib.decompress(packed[number][len(head) :]) for number in numbers])
        table = np.frombuffer(bodies, np.uint8).reshape(len(numbers), sum(head[12:]) * length)
        columns = np.empty((len(numbers), length, count), dtype=np.int64)
        at = 0
        for index, width in enumerate(head[12:]):
            column = np.ascontiguousarray(table[:, at : at + width * length])
            columns[:, :, index] = column.view(_TYPES[width])
            at += width * length
        yield numbers, columns


def pad_boxes(boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Ints:
    """Combine (offsets, sizes) pairs of any ndim into one array [n, 2, D]."""
    ndim = np.array([len(offsets) for offsets, _ in boxes], dtype=np.int64)
    dims = int(ndim.max(initial=0))
    table = np.empty((len(boxes), 2, dims), dtype=np.int64)
    table[:, 0], table[:, 1] = 0, 1
    for n in np.unique(ndim).tolist():
        rows = np.flatnonzero(ndim == n)
        these = map(boxes.__getitem__, rows.tolist())
        numbers = itertools.chain.from_iterable(itertools.chain.from_iterable(these))
        columns = np.fromiter(numbers, np.int64, 2 * n * len(rows))
        table[rows, :, :n] = columns.reshape(len(rows), 2, n)
    return table


def pad_shapes(shapes: Sequence[Sequence[int]], *, dims: int) -> Ints:
    """Combine shapes into one array [n, dims]. Unused dimensions have size 1."""
    ones = (1,) * dims
    rows = [(*shape, *ones[len(shape) :]) for shape in shapes]
    return np.array(rows, dtype=np.int64).reshape(len(rows), dims)


def flat_boxes(boxes: Ints) -> Ints:
    """Reshape boxes [n, 2, D] into rows [n, 2 * D]."""
    return boxes.reshape(len(boxes), 2 * boxes.shape[2])


def widen_boxes(boxes: Ints, *, dims: int) -> Ints:
    """Add unused dimensions to boxes [n, 2, d], giving [n, 2, dims]."""
    if boxes.shape[2] == dims:
        return boxes
    wide = np.empty((len(boxes), 2, dims), dtype=np.int64)
    wide[:, 0], wide[:, 1] = 0, 1
    wide[:, :, : boxes.shape[2]] = boxes
    return wide


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """The part of a local plan that ranks compare; its fields are those of LocalPlan."""

    common: tuple[TensorSpec, ...]
    tree: bytes
    unions: tuple[str, ...]
    empty_ties: tuple[TensorSpec, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPlan:
    """The tensors and values of one rank.

    Attributes:
        common: The tensors that every rank knows.
        rank_only: The tensors of this rank alone.
        file_group: The file group of each tensor, of `common` and then of `own`.
        chunks: The boxes held here. Their tensor numbers count through `common` and then `own`.
        shared: Whether other ranks may hold the same box, for each of the chunks.
        tree: The typed JSON of the state, encoded.
        per_rank_trees: The typed JSON of the PerRank values, encoded.
        data: The elements of each of the chunks. They never leave the rank.
        rank0_trees: On rank 0, name -> the typed JSON of each FromRank0 value, encoded.
        unions: The names of the dicts in a Union marker.
        empty_ties: The tensors that seem tied on this rank, which holds none of their elements.
    """

    common: tuple[TensorSpec, ...]
    rank_only: tuple[TensorSpec, ...]
    file_group: Ints
    chunks: ChunkTable
    shared: NDArray[np.bool_]
    tree: bytes
    per_rank_trees: bytes
    data: tuple[torch.Tensor, ...] = ()
    rank0_trees: Mapping[str, bytes] = field(default_factory=dict)
    unions: tuple[str, ...] = ()
    empty_ties: tuple[TensorSpec, ...] = ()

    def offer(self, *, tensors: bool) -> Offer:
        """Return the part of the plan that ranks compare. Without `tensors`, it has only the
        values.
        """
        return Offer(self.common if tensors else (), self.tree, self.unions, self.empty_ties)

    def digests(self) -> tuple[str, str, str]:
        """Return the digests of the structure (names, dtypes, shapes), of the values, and of the
        boxes.
        """
        structure = text_digest(msgspec.msgpack.encode(self.common))
        tensor, boxes = self.chunks.tensor, self.chunks.boxes
        rank_only_specs = msgspec.msgpack.encode((boxes.shape, self.rank_only))
        columns = (tensor, boxes, self.shared, self.file_group)
        rows = [rank_only_specs, *(column.tobytes() for column in columns)]
        return structure, text_digest(self.tree), text_digest(b"".join(rows))

    def pack(self, *, complete: bool) -> bytes:
        """Encode the plan for rank 0. If `complete`, include the part that ranks compare."""
        return msgspec.msgpack.encode(
            {
                "rank_only": self.rank_only,
                "file_group": pack_columns(self.file_group.reshape(-1, 1)),
                "chunks": self.chunks.pack(),
                "shared": np.packbits(self.shared).tobytes(),
                "common": self.common if complete else (),
                "tree": self.tree if complete else b"",
                "per_rank_trees": self.per_rank_trees,
                "unions": self.unions if complete else (),
                "empty_ties": self.empty_ties if complete else (),
            }
        )

    @classmethod
    def unpack(cls, data: bytes) -> LocalPlan:
        """Decode the bytes of `pack`. The plan has no data."""
        return cls.unpack_all([data])[0]

    @classmethod
    def unpack_all(cls, payloads: Sequence[bytes]) -> list[LocalPlan]:
        """Decode the bytes of `pack` of all ranks."""
        packed = [_decode(payload) for payload in payloads]
        tables = ChunkTable.unpack_all([plan.chunks for plan in packed])
        return [
            cls(
                common=plan.common,
                rank_only=plan.rank_only,
                file_group=_file_groups(plan.file_group),
                chunks=chunks,
                shared=_mask(plan.shared, len(chunks)),
                tree=plan.tree,
                per_rank_trees=plan.per_rank_trees,
                unions=plan.unions,
                empty_ties=plan.empty_ties,
            )
            for plan, chunks in zip(packed, tables, strict=True)
        ]


class _Packed(msgspec.Struct):
    rank_only: tuple[TensorSpec, ...]
    file_group: bytes
    chunks: bytes
    shared: bytes
    common: tuple[TensorSpec, ...]
    tree: bytes
    per_rank_trees: bytes
    unions: tuple[str, ...] = ()
    empty_ties: tuple[TensorSpec, ...] = ()


_decode = msgspec.msgpack.Decoder(_Packed).decode


@lru_cache(maxsize=16)
def _file_groups(data: bytes) -> Ints:
    """Decode the file groups, which are mostly equal on all ranks. Do not modify the result."""
    return unpack_columns(data)[:, 0]


@lru_cache(maxsize=16)
def _mask(data: bytes, count: int) -> NDArray[np.bool_]:
    """Decode a mask, which is mostly equal on all ranks. Do not modify the result."""
    return np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=count).astype(np.bool_)


def local_plan(flat: FlatState, *, world_size: int) -> LocalPlan:
    """Make the local plan of a flattened state. Not collective."""
    specs: list[TensorSpec] = []
    owner: list[int] = []
    shared: list[bool] = []
    boxes: list[Box] = []
    data: list[torch.Tensor] = []
    groups: tuple[tuple[Mapping[str, AnyTensor], bool], ...] = (
        (flat.tensors, True),
        (flat.rank_only, False),
    )
    with torch.no_grad():  # then to_local() and detach() cost nothing
        for tensors, common in groups:
            for name, tensor in tensors.items():
                # Most tensors are plain.
                if type(tensor) in PLAIN and name not in flat.saved_elsewhere:
                    shape = tuple(tensor.shape)
                    owner.append(len(specs))
                    shared.append(common)
                    boxes.append(((0,) * len(shape), shape))
                    dtype = dtype_name(tensor.dtype, tensor=name)
                    data.append(memory_view(tensor) if dtype in NOT_COPYABLE else tensor)  # type: ignore[arg-type]
                    specs.append(TensorSpec(name, dtype, shape))
                    continue
                chunks = [] if name in flat.saved_elsewhere else local_chunks(tensor, name=name)
                replicated = common and may_have_replicas(tensor, world_size=world_size)
                for chunk in chunks:
                    owner.append(len(specs))
                    shared.append(replicated)
                    boxes.append((chunk.offsets, chunk.sizes))
                    data.append(chunk.data)
                dtype = dtype_name(tensor.dtype, tensor=name)
                specs.append(TensorSpec(name, dtype, tuple(tensor.shape)))
    many = next((spec for spec in specs if len(spec.shape) > MOST_DIMS), None)
    if many is not None:
        raise UnsupportedLeafError(
            "A tensor has too many dimensions",
            tensor=many.name,
            expected=f"at most {MOST_DIMS}",
            actual=len(many.shape),
            remedy="reshape it",
        )
    count = len(flat.tensors)
    return LocalPlan(
        common=tuple(specs[:count]),
        rank_only=tuple(specs[count:]),
        file_group=np.array([flat.file_groups.get(spec.name, 0) for spec in specs], dtype=np.int64),
        chunks=ChunkTable(tensor=np.array(owner, dtype=np.int64), boxes=pad_boxes(boxes)),
        shared=np.array(shared, dtype=np.bool_),
        tree=msgspec.json.encode(flat.tree),
        per_rank_trees=msgspec.json.encode(flat.per_rank_trees),
        data=tuple(data),
        rank0_trees={name: msgspec.json.encode(own) for name, own in flat.rank0_trees.items()},
        unions=tuple(flat.unions),
        empty_ties=tuple(
            TensorSpec(name, dtype_name(tensor.dtype, tensor=name), tuple(tensor.shape))
            for name, tensor in flat.empty_ties.items()
        ),
    )


def filled(tree: bytes, rank0_trees: Mapping[str, bytes]) -> bytes:
    """Return the tree with rank 0's values in place of FromRank0.

    Raises:
        RankMismatchError: Rank 0 lacks such a value.
    """
    for name, own in rank0_trees.items():
        # These bytes occur nowhere else: inside a JSON string, quotation marks are escaped.
        tree = tree.replace(msgspec.json.encode(placeholder(name)), own)
    if b'{"$from_rank0":' in tree:
        missing = tree.partition(b'{"$from_rank0":')[2].partition(b"}")[0]
        raise RankMismatchError(
            "An entry that is marked with FromRank0 is missing on rank 0",
            rank=0,
            tensor=msgspec.json.decode(missing),
            remedy="pass FromRank0(...) under the same name on every rank",
        )
    return tree
