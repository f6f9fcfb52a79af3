"""The manifest: what a checkpoint holds and where, as JSON. Its presence is the commit."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import msgspec
import numpy as np
from numpy.typing import NDArray

from shardckpt.errors import CorruptionError, FormatVersionError, NotACheckpointError
from shardckpt.format.bitflips import find_flipped_bit_of_text
from shardckpt.format.boxes import find_gap
from shardckpt.format.digests import BLOCK_BYTES, digests_from_hex, digests_to_hex, text_digest
from shardckpt.format.dtypes import DTYPES, itemsize

__all__ = [
    "FORMAT_VERSION",
    "Manifest",
    "ShardEntry",
    "TensorEntry",
    "from_bytes",
    "is_shard_name",
    "mend",
    "to_bytes",
]

FORMAT_VERSION = 1
_SHARD_NAME = re.compile(r"shard-\d{5,}-of-\d{5,}(-[a-z0-9]+)?\.safetensors")
_MAX_DIMS = 64  # as torch and numpy have it
_REFERENCES = {"$tensor", "$ndarray", "$per_rank"}
_MENDED_BYTES = 128 << 10
_MAX_DEPTH = 300  # of typed JSON: a dict with odd keys has three levels


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """A shard: its file name, its size, and one xxh3-64 for each block of the file."""

    name: str
    size_bytes: int
    digests: NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """A saved tensor. `chunks` [n, 3 + 2 * ndim], int64: number of the shard, begin and end of the
    bytes in its file (header counted), offsets [ndim], sizes [ndim]; row-major data."""

    dtype: str
    shape: tuple[int, ...]
    chunks: NDArray[np.int64]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A manifest. `state` is the typed JSON of the saved state, `per_rank` that of each rank's
    PerRank values (empty if there were none); `notes` are free texts of tools."""

    checkpoint_id: str
    created: str
    library: str
    world_size: int
    shards: tuple[ShardEntry, ...]
    tensors: dict[str, TensorEntry]
    state: Any
    per_rank: tuple[Any, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


class _Shard(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    size: int
    digests: str


class _Tensor(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    chunks: list[int]


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    version: int
    id: str
    created: str
    library: str
    world_size: int
    shards: list[_Shard]
    tensors: dict[str, _Tensor]
    state: Any
    per_rank: list[Any]
    notes: dict[str, str]
    digest: str


class _Head(msgspec.Struct):
    format: str = ""
    version: int = 0


def to_bytes(manifest: Manifest) -> bytes:
    """The manifest as canonical JSON: no white space, members in this order, its digest last."""
    document = _Document(
        format="shardckpt",
        version=manifest.format_version,
        id=manifest.checkpoint_id,
        created=manifest.created,
        library=manifest.library,
        world_size=manifest.world_size,
        shards=[
            _Shard(shard.name, shard.size_bytes, digests_to_hex(shard.digests))
            for shard in manifest.shards
        ],
        tensors={
            name: _Tensor(entry.dtype, list(entry.shape), entry.chunks.ravel().tolist())
            for name, entry in manifest.tensors.items()
        },
        state=manifest.state,
        per_rank=list(manifest.per_rank),
        notes=manifest.notes,
        digest="",
    )
    body = msgspec.json.encode(document).removesuffix(b',"digest":""}')
    return body + _tail(body)


def _tail(body: bytes | memoryview) -> bytes:
    return f',"digest":"{text_digest(body)}"}}\n'.encode()


def from_bytes(data: bytes, *, path: str) -> Manifest:
    """Parse and check a manifest; `path` is named in errors.

    Raises NotACheckpointError for what is no manifest at all, FormatVersionError for a newer
    format, CorruptionError for one that is damaged or breaks any rule of docs/format.md.
    """
    _check_head(data, path)
    try:
        document = msgspec.json.decode(data, type=_Document)
        again = msgspec.json.encode(document) + b"\n"
    except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError) as error:
        _refuse(path, "the members of format version 1", str(error)[:200])
    body = memoryview(data)[: -len(_tail(b""))]
    if data[len(body) :] != _tail(body):
        _refuse(path, "the digest at its end", "other bytes than were saved")
    if again != data:
        _refuse(path, "canonical JSON, each key once", "another spelling of it")
    shards = tuple(_shards(document.shards, path))
    tensors = _tensors(document.tensors, path)
    _check_chunks(tensors, shards, path)
    if document.world_size < 1:
        _refuse(path, "a world size of 1 or more", document.world_size)
    if document.per_rank and len(document.per_rank) != document.world_size:
        _refuse(path, f"values of {document.world_size} ranks", f"of {len(document.per_rank)}")
    _check_references(document, tensors, path)
    return Manifest(
        checkpoint_id=document.id,
        created=document.created,
        library=document.library,
        world_size=document.world_size,
        shards=shards,
        tensors=tensors,
        state=document.state,
        per_rank=tuple(document.per_rank),
        notes=document.notes,
    )


def is_shard_name(name: str) -> bool:
    """Whether a file of this name is a shard."""
    return _SHARD_NAME.fullmatch(name) is not None


def mend(data: bytes) -> tuple[bytes, int, int] | None:
    """A manifest with its one flipped bit turned back, and the byte and bit that it was; None if
    that is not what is wrong, or not to be told in some seconds (more than 128 KiB)."""
    body, tail = data[: -len(_tail(b""))], data[-len(_tail(b"")) :]
    if tail == _tail(body) or len(data) > _MENDED_BYTES:
        return None
    at = find_flipped_bit_of_text(body, tail[11:43].decode("ascii", "replace"))
    right = _tail(body)
    if at is None:  # the flipped bit may be one of the digest's
        flips = [(i, a ^ b) for i, (a, b) in enumerate(zip(tail, right, strict=False)) if a != b]
        if len(tail) != len(right) or len(flips) != 1 or flips[0][1].bit_count() != 1:
            return None
        return body + right, len(body) + flips[0][0], flips[0][1].bit_length() - 1
    mended = bytearray(body)
    mended[at[0]] ^= 1 << at[1]
    return bytes(mended) + tail, *at


def _check_head(data: bytes, path: str) -> None:
    try:
        head = msgspec.json.decode(data, type=_Head)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        if data.startswith(b'{"format":"shardckpt"'):
            _refuse(path, "a whole JSON document", str(error)[:200])
        head = _Head()
    if head.format != "shardckpt":
        raise NotACheckpointError(
            "The manifest is not one of shardckpt's",
            path=path,
            expected='JSON that begins with {"format":"shardckpt"',
            actual=repr(data[:40]),
            remedy="give the directory that shardckpt.save wrote",
        )
    if head.version > FORMAT_VERSION:
        raise FormatVersionError(
            "The checkpoint was written by a newer shardckpt",
            path=path,
            expected=f"format version {FORMAT_VERSION}",
            actual=f"format version {head.version}",
            remedy="upgrade shardckpt",
        )
    if head.version != FORMAT_VERSION:
        _refuse(path, f"a format version from 1 to {FORMAT_VERSION}", head.version)


def _refuse(path: str, expected: object, actual: object, tensor: str | None = None) -> NoReturn:
    raise CorruptionError(
        "The manifest is damaged, or breaks a rule of the format",
        path=path,
        tensor=tensor,
        expected=expected,
        actual=actual,
        remedy="load another checkpoint",
    )


def _shards(entries: list[_Shard], path: str) -> Iterator[ShardEntry]:
    seen: set[str] = set()
    for entry in entries:
        if not _SHARD_NAME.fullmatch(entry.name) or entry.name in seen:
            _refuse(path, "shard-<rank>-of-<world size>.safetensors, each once", entry.name)
        seen.add(entry.name)
        try:
            digests = digests_from_hex(entry.digests)
        except ValueError as error:
            _refuse(path, str(error), entry.digests[:40])
        if entry.size < 8 or len(digests) != -(-entry.size // BLOCK_BYTES):
            _refuse(
                path,
                "one digest for each block of 1 MiB",
                f"{len(digests)} digests for the {entry.size} bytes of {entry.name}",
            )
        yield ShardEntry(name=entry.name, size_bytes=entry.size, digests=digests)


def _tensors(entries: dict[str, _Tensor], path: str) -> dict[str, TensorEntry]:
    """Entries with their chunks as arrays: one conversion for all tensors of equal ndim."""
    by_dims: dict[int, list[str]] = {}
    for name, entry in entries.items():
        dims = len(entry.shape)
        if dims > _MAX_DIMS or entry.dtype not in DTYPES:
            _refuse(path, "a known dtype and at most 64 dimensions", entry.dtype, name)
        if any(size < 0 for size in entry.shape) or math.prod(entry.shape) >= 1 << 60:
            _refuse(path, "a shape of fewer than 2**60 elements", entry.shape, name)
        if len(entry.chunks) % (3 + 2 * dims):
            _refuse(path, f"{3 + 2 * dims} numbers a chunk", len(entry.chunks), name)
        by_dims.setdefault(dims, []).append(name)
    tensors: dict[str, TensorEntry] = {}
    for dims, names in by_dims.items():
        lists = [entries[name].chunks for name in names]
        ends = list(itertools.accumulate(map(len, lists)))
        try:
            flat = np.fromiter(itertools.chain.from_iterable(lists), np.int64, ends[-1])
        except OverflowError:
            _refuse(path, "numbers of 64 bits", "a larger one")
        rows = flat.reshape(-1, 3 + 2 * dims)
        for name, begin, end in zip(names, [0, *ends[:-1]], ends, strict=True):
            tensors[name] = TensorEntry(
                dtype=entries[name].dtype,
                shape=tuple(entries[name].shape),
                chunks=rows[begin // (3 + 2 * dims) : end // (3 + 2 * dims)],
            )
    return {name: tensors[name] for name in entries}


def _check_chunks(
    tensors: dict[str, TensorEntry], shards: tuple[ShardEntry, ...], path: str
) -> None:
    """Every chunk in its shard, of the size that its box has, over no other; boxes tile tensors."""
    names = list(tensors)
    counts = [len(entry.chunks) for entry in tensors.values()]
    owner = np.repeat(np.arange(len(names)), counts)
    places = [entry.chunks[:, :3] for entry in tensors.values()]
    place = np.concatenate(places) if places else np.empty((0, 3), np.int64)
    size_bytes = np.array([shard.size_bytes for shard in shards], dtype=np.int64)

    def refuse(wrong: NDArray[np.bool_], expected: str) -> None:
        if wrong.any():
            index = int(wrong.argmax())
            shard, begin, end = place[index].tolist()
            actual = f"shard {shard}, bytes {begin} to {end}"
            _refuse(path, expected, actual, names[int(owner[index])])

    shard, begin, end = place.T
    refuse((shard < 0) | (shard >= len(shards)), f"a shard from 0 to {len(shards) - 1}")
    refuse((begin < 8) | (end < begin) | (end > size_bytes[shard]), "bytes within the shard")
    items = np.array([itemsize(entry.dtype) for entry in tensors.values()], dtype=np.int64)
    refuse(begin % items[owner] != 0, "a chunk aligned to its element size")
    order = np.lexsort((end, begin, shard))
    over = np.zeros(len(place), dtype=bool)
    over[order[1:]] = (shard[order[1:]] == shard[order[:-1]]) & (begin[order[1:]] < end[order[:-1]])
    refuse(over, "chunks that don't overlap in the file")
    for name, entry in tensors.items():
        _check_tensor(name, entry, path)


def _check_tensor(name: str, entry: TensorEntry, path: str) -> None:
    chunks, dims, shape = entry.chunks, len(entry.shape), entry.shape
    if len(chunks) == 1:
        _, begin, end, *box = chunks[0].tolist()
        if not any(box[:dims]) and tuple(box[dims:]) == shape and end - begin == entry.size_bytes:
            return
    offsets, sizes = chunks[:, 3 : 3 + dims], chunks[:, 3 + dims :]
    gap = find_gap(shape, offsets, sizes)
    if gap is not None:
        kind, at, extent = gap
        actual = f"{kind} at offsets {list(at)}, sizes {list(extent)}"
        _refuse(path, f"chunks that make up shape {list(shape)}", actual, name)
    volumes = sizes.prod(axis=1) * itemsize(entry.dtype)
    wrong = chunks[:, 2] - chunks[:, 1] != volumes
    if wrong.any():
        index = int(wrong.argmax())
        found = int(chunks[index, 2] - chunks[index, 1])
        _refuse(path, f"{int(volumes[index])} bytes in a chunk", f"{found} bytes", name)


def _check_references(document: _Document, tensors: dict[str, TensorEntry], path: str) -> None:
    """Every reference in the typed JSON has its target, and nothing is nested too deeply."""
    level: list[Any] = [document.state, document.per_rank]
    depth = 0
    while level:
        nodes = [node for node in level if isinstance(node, dict)]
        for tag, body in ((tag, node[tag]) for node in nodes for tag in node.keys() & _REFERENCES):
            if not isinstance(body, str) or not (
                _in_each_rank(document.per_rank, body) if tag == "$per_rank" else body in tensors
            ):
                found = f"{tag} {body!r}"[:200]
                _refuse(path, "values that refer to tensors of the manifest", found)
        depth += 1
        if depth > _MAX_DEPTH:
            _refuse(path, f"at most {_MAX_DEPTH} levels of nesting", "more")
        inner = [item for node in nodes for item in node.values()]
        inner += [item for node in level if isinstance(node, list) for item in node]
        level = [item for item in inner if isinstance(item, (dict, list))]


def _in_each_rank(per_rank: list[Any], index: str) -> bool:
    return bool(per_rank) and all(
        isinstance(values, list) and index in map(str, range(len(values))) for values in per_rank
    )
