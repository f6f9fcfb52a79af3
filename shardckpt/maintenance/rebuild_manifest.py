"""Rebuild a lost manifest from the headers of the shards."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shardckpt._version import __version__
from shardckpt.errors import CorruptionError
from shardckpt.format import typed_json as values
from shardckpt.format.digests import BLOCK_BYTES, block_digest
from shardckpt.format.dtype_names import shard_form
from shardckpt.format.dtypes import DTYPES
from shardckpt.format.entries import Manifest, ShardEntry, TensorEntry
from shardckpt.format.manifest import is_shard_name
from shardckpt.format.safetensors_header import ShardTensor, parse_chunk_name, parse_header
from shardckpt.format.tiling import find_gap
from shardckpt.format.typed_json import TensorRef
from shardckpt.maintenance.verify import read_header
from shardckpt.storage.base import CheckpointFiles

__all__ = ["rebuild_manifest"]

_Piece = tuple[int, ShardTensor, tuple[int, ...] | None]
"""(shard number, tensor in the shard, offsets of its box or None for a full tensor)"""


def rebuild_manifest(files: CheckpointFiles) -> tuple[Manifest, dict[str, str]]:
    """Rebuild a manifest.

    The digests are those of the current bytes. The nesting of the state follows the dots in the
    names.

    Returns:
        The manifest, and the reason for each tensor or file that could not be included.
    """
    names = sorted(name for name in files.names() if is_shard_name(name))
    lost: dict[str, str] = {}
    shards: list[ShardEntry] = []
    pieces: dict[str, list[_Piece]] = defaultdict(list)
    for name in names:
        try:
            shard, tensors = _read_shard(files, name)
        except CorruptionError as error:
            lost[name] = f"{error.message.lower()}: {error.expected} expected, {error.actual} found"
            continue
        for tensor in tensors:
            tensor_name, box = parse_chunk_name(tensor.name)
            if tensor.end > shard.size_bytes:
                lost[tensor_name] = f"{name} is truncated"
            pieces[tensor_name].append((len(shards), tensor, box[0] if box else None))
        shards.append(shard)
    complete = _all_files(names) and not lost
    tensors_found: dict[str, TensorEntry] = {}
    for name, found in sorted(pieces.items()):
        if name in lost:
            continue
        entry = _entry(found, complete=complete)
        if isinstance(entry, str):
            lost[name] = entry
        else:
            tensors_found[name] = entry
    manifest = Manifest(
        checkpoint_id="0" * 32,
        created="",
        library=f"shardckpt {__version__}",
        world_size=max(len(shards), 1),
        shards=tuple(shards),
        tensors=tensors_found,
        state=values.encode(_nested(list(tensors_found)), at=""),
    )
    return manifest, lost


def _read_shard(files: CheckpointFiles, name: str) -> tuple[ShardEntry, list[ShardTensor]]:
    size_bytes = files.size_bytes(name)
    header = read_header(files, name, size_bytes=size_bytes)
    tensors, facts = parse_header(header, file_size_bytes=None, path=f"{files.path}/{name}")
    tensors = [_as_saved(tensor, _dtypes(facts)) for tensor in tensors]
    digests = []
    for low in range(0, size_bytes, BLOCK_BYTES):
        block = bytearray(min(BLOCK_BYTES, size_bytes - low))
        files.readinto(name, [memoryview(block)], offset=low)
        digests.append(block_digest(block))
    entry = ShardEntry(name=name, size_bytes=size_bytes, digests=np.array(digests, np.uint64))
    return entry, tensors


def _dtypes(facts: dict[str, str]) -> dict[str, str]:
    """Return the dtype of each tensor that is stored as another dtype."""
    try:
        return msgspec.json.decode(facts.get("dtypes", "{}"), type=dict[str, str])
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return {}


def _as_saved(tensor: ShardTensor, dtypes: dict[str, str]) -> ShardTensor:
    dtype = dtypes.get(parse_chunk_name(tensor.name)[0], tensor.dtype)
    for shape in (tensor.shape, tensor.shape[:-1]):
        if dtype in DTYPES and shard_form(dtype, shape) == (tensor.dtype, tensor.shape):
            return dataclasses.replace(tensor, dtype=dtype, shape=shape)
    return tensor


def _all_files(names: list[str]) -> bool:
    """Whether no file is missing: every rank has one, and all ranks have the same file groups."""
    parts = [name.removesuffix(".safetensors").split("-", 4) for name in names]
    files = {(int(part[1]), *part[4:]) for part in parts}
    groups = {tuple(part[4:]) for part in parts}
    sizes = {int(part[3]) for part in parts}
    return len(sizes) == 1 and len(files) == len(groups) * max(sizes)


def _entry(pieces: list[_Piece], *, complete: bool) -> TensorEntry | str:
    """Return the tensor that these pieces form, or the reason why they do not form one."""
    dtypes = {tensor.dtype for _, tensor, _ in pieces}
    dims = {len(tensor.shape) for _, tensor, _ in pieces}
    if len(dtypes) > 1 or len(dims) > 1:
        return "its pieces are of several dtypes or dimensions"
    if not complete and any(offsets is not None for _, _, offsets in pieces):
        return "it is in pieces, and a shard is missing"
    rows = [
        [shard, tensor.begin, tensor.end, *(offsets or (0,) * len(tensor.shape)), *tensor.shape]
        for shard, tensor, offsets in pieces
    ]
    (ndim,) = dims
    chunks: NDArray[np.int64] = np.array(rows, dtype=np.int64)
    starts, sizes = chunks[:, 3 : 3 + ndim], chunks[:, 3 + ndim :]
    shape = tuple((starts + sizes).max(axis=0).tolist())
    gap = find_gap(shape, starts, sizes)
    if gap is not None:
        return f"its pieces have a {gap[0]} at offsets {list(gap[1])}"
    (dtype,) = dtypes
    return TensorEntry(dtype=dtype, shape=shape, chunks=chunks)


def _nested(names: list[str]) -> dict[str, Any]:
    """Nest references to the tensors by their names. References with conflicts stay at the top."""
    tree: dict[str, Any] = {}
    for name in names:
        *above, last = name.split(".")
        node: Any = tree
        for part in above:
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if isinstance(node, dict) and last not in node:
            node[last] = TensorRef(name, "tensor")
        else:
            tree[name] = TensorRef(name, "tensor")
    return tree
