"""Read and write the manifest: JSON that lists shards, tensors and values."""

from __future__ import annotations

import itertools
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
from xxhash import xxh3_128_digest

from shardckpt.errors import FormatVersionError, NotACheckpointError
from shardckpt.format.digests import BLOCK_BYTES, digests_from_hex, digests_to_hex, text_digest
from shardckpt.format.dtype_names import check_supported, is_supported, itemsize
from shardckpt.format.entries import FORMAT_VERSION, Manifest, ShardEntry, TensorEntry
from shardckpt.format.number_lists import Ints, parse_lists
from shardckpt.format.validation import Columns, check_chunks, check_references, refuse, shard_sizes

__all__ = [
    "LARGE_BYTES",
    "MANIFEST_HEAD",
    "MOST_DIMS",
    "ShardText",
    "TensorText",
    "check_text",
    "columns_of",
    "decode_document",
    "digest_tail",
    "encode_tensors",
    "entries_of",
    "from_bytes",
    "is_shard_name",
    "manifest_of",
    "shard_entries",
    "to_bytes",
]

_SHARD_NAME = re.compile(r"shard-\d{5,}-of-\d{5,}(-[a-z0-9]+)?\.safetensors")
MOST_DIMS = 64
"""The dimensions of a tensor, at most: the limit of torch and numpy."""
MANIFEST_HEAD = b'{"format":"shardckpt"'
"""The first bytes of every manifest."""

_HEAD = f'{{"format":"shardckpt","version":{FORMAT_VERSION},'.encode()
_NOT_CANONICAL = ("canonical JSON with unique keys", "JSON that is not canonical")
LARGE_BYTES = 4 << 20
"""The bytes of a large manifest. Its chunks are parsed as columns: Python's ints would take many
times the memory of their text."""
_SHORT_RUN = 64  # chunks
_BATCH_BYTES = 512 << 10  # of a large manifest, encoded or parsed at a time


class ShardText(msgspec.Struct, forbid_unknown_fields=True):
    """The JSON object of a shard in a manifest."""

    name: str
    size: int
    digests: str


# A list of ints. In a large manifest it is Raw, and decoded a few tensors at a time.
_Chunks = TypeVar("_Chunks", list[int], msgspec.Raw)


class TensorText(msgspec.Struct, Generic[_Chunks], forbid_unknown_fields=True, gc=False):
    """The JSON object of a tensor in a manifest."""

    dtype: str
    shape: tuple[int, ...]
    chunks: _Chunks


class Document(msgspec.Struct, Generic[_Chunks], forbid_unknown_fields=True):
    """The JSON object of a manifest."""

    format: str
    version: int
    id: str
    created: str
    library: str
    world_size: int
    shards: list[ShardText]
    tensors: dict[str, TensorText[_Chunks]]
    state: Any
    per_rank: list[Any]
    notes: dict[str, str]
    digest: str


class _Head(msgspec.Struct):
    format: str = ""
    version: int = 0


# The decoders are built at import, so that the first load does not have to.
_decode_small: Callable[[bytes], Document[Any]] = msgspec.json.Decoder(Document[list[int]]).decode
_decode_large: Callable[[bytes], Document[Any]] = msgspec.json.Decoder(Document[msgspec.Raw]).decode
_decode_head = msgspec.json.Decoder(_Head).decode
_decode_lists = msgspec.json.Decoder(list[list[int]]).decode


def to_bytes(manifest: Manifest, *, tensors: bytes | None = None) -> bytes:
    """Encode a manifest as canonical JSON: no white space, a fixed order of members, digest last.

    `tensors` is the encoded member `tensors`, if the caller has it already.
    """
    if tensors is None:
        tensors = encode_tensors(manifest.tensors.items())
    document: Document[Any] = Document(
        format="shardckpt",
        version=manifest.format_version,
        id=manifest.checkpoint_id,
        created=manifest.created,
        library=manifest.library,
        world_size=manifest.world_size,
        shards=[
            ShardText(shard.name, shard.size_bytes, digests_to_hex(shard.digests))
            for shard in manifest.shards
        ],
        tensors={},
        state=manifest.state,
        per_rank=list(manifest.per_rank),
        notes=manifest.notes,
        digest="",
    )
    head, member, tail = _encode(document).partition(b'"tensors":')  # strings have no bare quotes
    body = head, member, tensors, tail[len(b"{}") : -len(b',"digest":""}')]
    return b"".join((*body, digest_tail(*body)))  # a large text is copied once


def encode_tensors(tensors: Iterable[tuple[str, TensorEntry]]) -> bytes:
    """Encode the member `tensors` of a manifest."""
    texts: dict[bytes, list[bytes]] = {}
    return _encode(
        {
            name: TensorText(entry.dtype, entry.shape, msgspec.Raw(_list_text(entry.chunks, texts)))
            for name, entry in tensors
        }
    )


def _list_text(chunks: Ints, texts: dict[bytes, list[bytes]]) -> bytes:
    """Encode a list of chunks.

    In a long list, many ranks in turn have written a chunk to the same bytes of their shards, as
    all ranks hold parts of the same sizes. The other numbers are often those of other tensors too.
    Therefore their text is kept in `texts`, in the pieces before and after the bytes.
    """
    cuts: list[int] = []
    if long := len(chunks) >= _SHORT_RUN:
        begin_steps, end_steps = np.diff(chunks[:, 1:3].T)
        cuts = (np.flatnonzero(begin_steps | end_steps) + 1).tolist()
    if not long or (len(cuts) + 1) * _SHORT_RUN > len(chunks):
        return _encode(chunks.ravel().tolist())
    parts = []
    for low, high in itertools.pairwise([0, *cuts, len(chunks)]):
        run = chunks[low:high].copy()
        begin, end = run[0, 1:3].tolist()
        run[:, 1:3] = -1  # no other number is negative
        key = xxh3_128_digest(run.data)
        if key not in texts:
            texts[key] = _encode(run.ravel().tolist())[1:-1].split(b",-1,-1")
        parts.append((b",%d,%d" % (begin, end)).join(texts[key]))
    return b"[" + b",".join(parts) + b"]"


_encode = msgspec.json.Encoder().encode


def digest_tail(*body: bytes | memoryview) -> bytes:
    """Return the last bytes of a manifest: the digest of all bytes before them, in parts."""
    return f',"digest":"{text_digest(*body)}"}}\n'.encode()


def from_bytes(data: bytes, *, path: str) -> Manifest:
    """Parse a manifest, and check all rules of docs/format.md.

    Args:
        data: The bytes of the file.
        path: The path for error messages.

    Returns:
        The parsed manifest.

    Raises:
        NotACheckpointError: The file is not a manifest.
        FormatVersionError: A newer version of shardckpt wrote the manifest.
        CorruptionError: The manifest is corrupted or violates the format.
    """
    document = decode_document(data, path)
    shards = tuple(shard_entries(document.shards, path))
    columns = list(columns_of(document.tensors, path))
    check_chunks(columns, shard_sizes(shards), path)
    return manifest_of(document, shards, entries_of(document.tensors, columns), path)


def decode_document(data: bytes, path: str) -> Document[Any]:
    """Decode the text of a manifest, and check its head, digest and canonical form."""
    large = len(data) > LARGE_BYTES
    try:
        document = (_decode_large if large else _decode_small)(data)
        # The text is canonical if encoding the document gives it again.
        canonical = _encodes_to(document, data) if large else _encode(document) + b"\n" == data
    except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError) as error:
        _check_head(data, path)
        refuse(path, "the members of format version 1", str(error)[:200])
    _check_version(document, data, path)
    _check_digest(data, path)
    if not canonical:
        refuse(path, *_NOT_CANONICAL)
    return document


def _encodes_to(document: Document[msgspec.Raw], data: bytes) -> bool:
    """Whether a text is the encoded document. Little of the text is in memory a second time."""
    without = msgspec.structs.replace(document, tensors={})
    head, _, tail = _encode(without).partition(b'"tensors":{')
    head += b'"tensors":{'
    if not data.startswith(head):
        return False
    at, names = len(head), list(document.tensors)
    for part in _batches([entry.chunks for entry in document.tensors.values()]):
        text = _encode({name: document.tensors[name] for name in names[part]})[1:-1]
        text = text if at == len(head) else b"," + text
        if not data.startswith(text, at):
            return False
        at += len(text)
    return data[at:] == tail + b"\n"


def manifest_of(
    document: Document[Any],
    shards: tuple[ShardEntry, ...],
    tensors: dict[str, TensorEntry],
    path: str,
) -> Manifest:
    """Check the remaining members of a document, and return the manifest."""
    if document.world_size < 1:
        refuse(path, "a world size of 1 or more", document.world_size)
    if document.per_rank and len(document.per_rank) != document.world_size:
        refuse(
            path,
            f"values of {document.world_size} ranks",
            f"values of {len(document.per_rank)} ranks",
        )
    check_references(document.state, document.per_rank, tensors, path)
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
    """Whether a name is the file name of a shard."""
    return _SHARD_NAME.fullmatch(name) is not None


def check_text(data: bytes, *, path: str) -> None:
    """Check head, version and digest of a manifest without parsing it. Raises as from_bytes."""
    if not data.startswith(_HEAD):
        _check_head(data, path)
    _check_digest(data, path)


def _check_digest(data: bytes, path: str) -> None:
    body = memoryview(data)[: -len(digest_tail(b""))]
    if data[len(body) :] != digest_tail(body):
        refuse(path, "the digest of the manifest at its end", "a digest that does not match")


def _check_head(data: bytes, path: str) -> None:
    try:
        head = _decode_head(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        if data.startswith(MANIFEST_HEAD):
            refuse(path, "a complete JSON document", str(error)[:200])
        head = _Head()
    _check_version(head, data, path)


def _check_version(head: _Head | Document[Any], data: bytes, path: str) -> None:
    if head.format != "shardckpt":
        raise NotACheckpointError(
            "The manifest was not written by shardckpt",
            path=path,
            expected='JSON that begins with {"format":"shardckpt"',
            actual=repr(data[:40]),
            remedy="pass the directory of a checkpoint that shardckpt.save wrote",
        )
    if head.version > FORMAT_VERSION:
        raise FormatVersionError(
            "A newer version of shardckpt wrote the checkpoint",
            path=path,
            expected=f"format version {FORMAT_VERSION}",
            actual=f"format version {head.version}",
            remedy="upgrade shardckpt",
        )
    if head.version != FORMAT_VERSION:
        refuse(path, f"a format version from 1 to {FORMAT_VERSION}", head.version)


def shard_entries(entries: Iterable[ShardText], path: str) -> Iterator[ShardEntry]:
    """Parse and check shards. Their names must differ."""
    seen: set[str] = set()
    for entry in entries:
        if not _SHARD_NAME.fullmatch(entry.name) or entry.name in seen:
            refuse(path, "shard-<rank>-of-<world size>.safetensors, each once", entry.name)
        seen.add(entry.name)
        try:
            digests = digests_from_hex(entry.digests)
        except ValueError as error:
            refuse(path, str(error), entry.digests[:40])
        if entry.size < 8 or len(digests) != -(-entry.size // BLOCK_BYTES):
            refuse(
                path,
                "one digest for each block of 1 MiB",
                f"{len(digests)} digests for the {entry.size} bytes of {entry.name}",
            )
        yield ShardEntry(name=entry.name, size_bytes=entry.size, digests=digests)


def columns_of(entries: dict[str, TensorText[Any]], path: str) -> Iterator[Columns]:
    """Arrange tensors in columns, one set of columns for each ndim. Checks dtypes and shapes."""
    by_dims: dict[int, list[str]] = {}
    for name, entry in entries.items():
        by_dims.setdefault(len(entry.shape), []).append(name)
    for dims, names in by_dims.items():
        group = [entries[name] for name in names]
        dtypes = [entry.dtype for entry in group]
        unknown = {dtype for dtype in set(dtypes) if not is_supported(dtype)}
        if dims > MOST_DIMS or unknown:
            wrong = next(n for n in names if dims > MOST_DIMS or entries[n].dtype in unknown)
            check_supported(entries[wrong].dtype, tensor=wrong, path=path)
            refuse(path, "a known dtype and at most 64 dimensions", entries[wrong].dtype, wrong)
        try:
            sizes = itertools.chain.from_iterable(entry.shape for entry in group)
            shapes = np.fromiter(sizes, np.int64, len(group) * dims).reshape(len(group), dims)
            counts, chunks = _numbers([entry.chunks for entry in group], path)
        except (OverflowError, struct.error):
            refuse(path, "numbers of 64 bits", "a larger one")
        odd = (shapes < 0).any(axis=1) | (shapes.astype(np.float64).prod(axis=1) >= 1 << 59)
        for index in np.flatnonzero(odd).tolist():
            if min(group[index].shape) < 0 or math.prod(group[index].shape) >= 1 << 60:
                expected = "a shape of fewer than 2**60 elements"
                refuse(path, expected, list(group[index].shape), names[index])
        width = 3 + 2 * dims
        if (counts % width).any():
            wrong = names[int((counts % width).argmax())]
            refuse(path, f"{width} numbers for each chunk", "another count", wrong)
        widths = {dtype: itemsize(dtype) for dtype in set(dtypes)}
        items = np.fromiter(map(widths.__getitem__, dtypes), np.int64, len(dtypes))
        yield Columns(names, items, shapes, counts // width, chunks.reshape(-1, width))


def _numbers(chunks: list[Any], path: str) -> tuple[Ints, Ints]:
    """Return the length of each tensor's list of chunks, and all numbers of the lists.

    Raises struct.error for numbers of more than 64 bits.
    """
    if type(chunks[0]) is list:
        return _packed(chunks)
    columns = []
    for part in _batches(chunks):
        columns.append(parse_lists(chunks[part]) or _packed(_decoded(chunks[part], path)))
    counts, numbers = zip(*columns, strict=True)
    return np.concatenate(counts), np.concatenate(numbers)


def _packed(lists: list[list[int]]) -> tuple[Ints, Ints]:
    counts = np.fromiter(map(len, lists), np.int64, len(lists))
    # four times as fast as numpy.array(list)
    packed = struct.pack(f"={counts.sum()}q", *itertools.chain.from_iterable(lists))
    return counts, np.frombuffer(packed, np.int64)


def _batches(texts: Sequence[msgspec.Raw]) -> Iterator[slice]:
    """Divide texts into batches of about _BATCH_BYTES."""
    sizes = np.fromiter((len(memoryview(text)) for text in texts), np.int64, len(texts))
    number = np.cumsum(sizes) // _BATCH_BYTES
    cuts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(texts)]
    yield from itertools.starmap(slice, itertools.pairwise(cuts))


def _decoded(raws: Sequence[msgspec.Raw], path: str) -> list[list[int]]:
    """Decode lists of any integers from JSON."""
    text = b"[" + b",".join(raws) + b"]"
    try:
        lists = _decode_lists(text)
    except (msgspec.MsgspecError, UnicodeError) as error:
        refuse(path, "lists of integers as chunks", str(error)[:200])
    if _encode(lists) != text:
        refuse(path, *_NOT_CANONICAL)
    return lists


def entries_of(
    entries: dict[str, TensorText[Any]], columns: list[Columns]
) -> dict[str, TensorEntry]:
    """Return the tensors that were arranged in columns."""
    tensors: dict[str, TensorEntry] = {}
    for group in columns:
        parts = list(group.chunks[:, None])  # most tensors have one chunk
        if len(parts) != len(group.names) or (group.counts != 1).any():
            ends = np.cumsum(group.counts).tolist()
            parts = [group.chunks[begin:end] for begin, end in itertools.pairwise([0, *ends])]
        tensors |= {
            name: TensorEntry(dtype=(entry := entries[name]).dtype, shape=entry.shape, chunks=part)
            for name, part in zip(group.names, parts, strict=True)
        }
    return {name: tensors[name] for name in entries} if len(columns) > 1 else tensors
