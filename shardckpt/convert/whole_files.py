"""A whole state in files for interchange: one torch or safetensors file, or one for each component.

Torch files open with torch.load(weights_only=True), safetensors files with the safetensors library:
tensors by name, all else as typed JSON in the metadata. Files appear under their name at once,
when they are durable. Both are verified when they are read: torch files by the CRC-32 of each of
their records, safetensors files by a digest that the metadata holds.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import msgspec
import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from shardckpt.errors import (
    CheckpointNotFoundError,
    CorruptionError,
    NotACheckpointError,
    ShardckptError,
    StateError,
    UnsupportedLeafError,
)
from shardckpt.format import typed_json as values
from shardckpt.format.digests import BLOCK_BYTES, block_digest, text_digest
from shardckpt.state.flatten import flatten
from shardckpt.state.sharded_array import ShardedArray
from shardckpt.storage.atomic_write import appearing
from shardckpt.storage.posix import translated

__all__ = [
    "DIGEST",
    "INDEX",
    "TREE",
    "UNSEALED",
    "FileFormat",
    "check_loads",
    "damaged",
    "check_sealed",
    "errors_of",
    "is_one_file",
    "read_many",
    "read_one",
    "seal",
    "write_many",
    "write_one",
]

FileFormat = Literal["torch", "safetensors"]
INDEX = "components.json"
_SUFFIXES: dict[str, str] = {"torch": ".pth", "safetensors": ".safetensors"}
TREE, DIGEST = "shardckpt.state", "shardckpt.digest"
"""What the metadata of a safetensors file holds: all but the tensors, and the file's digest: the
xxh3-128 of the xxh3-64 digests (8 bytes, little-endian) of each MiB of the file, in which the
digest itself stands as UNSEALED."""
UNSEALED = "0" * 32


def is_one_file(path: str) -> bool:
    """Whether a path means one file."""
    return path.endswith((".pth", ".pt", ".safetensors"))


def write_one(state: Mapping[str, Any], path: str, *, overwrite: bool) -> None:
    """Write a nested state of plain CPU tensors as one file; its suffix says of which format."""
    with appearing(path, overwrite=overwrite) as temporary:
        _write(state, temporary, path)


def read_one(path: str, *, check: bool = True) -> Any:
    """The state in one file, on the CPU; of a file that others wrote, its content.

    With `check` every byte is read now, and verified; else when it is used.
    """
    with errors_of(path, "load another checkpoint; pickled objects are never loaded"):
        if path.endswith(".safetensors"):
            return _read_safetensors(path, check=check)
        archive = zipfile.is_zipfile(path)  # as all torch files are but those of before torch 1.6
        if archive and check:
            _check_records(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)


def write_many(
    state: Mapping[str, Any], folder: str, file_format: FileFormat, *, overwrite: bool
) -> None:
    """Write a directory with a file for each item of the state, and an index with their digests."""
    with appearing(folder, overwrite=overwrite, index=INDEX) as temporary:
        os.mkdir(temporary)
        files = {}
        for key, item in state.items():
            name = f"{key}{_SUFFIXES[file_format]}"
            path = os.path.join(temporary, name)
            _write({key: item}, path, os.path.join(folder, name))
            files[key] = {"name": name, "xxh3_128": _digest(path)}
        with open(os.path.join(temporary, INDEX), "x") as index:
            json.dump({"format": file_format, "files": files}, index, indent=1)


def read_many(folder: str) -> dict[str, Any]:
    """The state that write_many wrote; every file is checked against its digest."""
    state: dict[str, Any] = {}
    with errors_of(folder, "load another checkpoint"), open(os.path.join(folder, INDEX)) as file:
        index = json.load(file)
        for key, entry in index["files"].items():
            path = os.path.join(folder, os.path.basename(entry["name"]))
            found = _digest(path)
            if found != entry["xxh3_128"]:
                raise damaged(path, f"digest {entry['xxh3_128']}", f"digest {found}")
            state[key] = read_one(path)[key]
    return state


def _contiguous(tensor: torch.Tensor | ShardedArray, name: str) -> torch.Tensor:
    if isinstance(tensor, torch.Tensor):
        return tensor.contiguous()
    raise StateError(
        "A single file can't hold a part of an array",
        tensor=name,
        expected="whole tensors",
        actual=repr(tensor),
        remedy="save to a path without .safetensors: every rank then writes its part",
    )


def _write(state: Mapping[str, Any], path: str, target: str) -> None:
    if target.endswith(".safetensors"):
        flat = flatten(state, rank=0)
        tree = msgspec.json.encode(flat.tree).decode()
        tensors = {name: _contiguous(tensor, name) for name, tensor in flat.tensors.items()}
        save_file(tensors, path, {"format": "pt", TREE: tree, DIGEST: UNSEALED})
        seal(path)
    else:
        torch.save(dict(state), path)
        check_loads(path, target)


def check_loads(file: Any, path: str) -> None:
    """What torch.load would refuse must be known now, not when it is needed."""
    try:
        torch.load(file, weights_only=True, map_location="cpu", mmap=isinstance(file, str))
    except Exception as error:
        raise UnsupportedLeafError(
            "The state holds a value that torch.load(weights_only=True) refuses",
            path=path,
            actual=_refused(error),
            remedy="save to a path without .pth or .pt, or leave the value out",
        ) from error


def _refused(error: Exception) -> str:
    """The class that torch.load would not make, out of a page of advice."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return found[1] if found else str(error).splitlines()[0]


def _check_records(path: str) -> None:
    """Raise if the records of a torch file don't agree with their checksums, at which torch.load
    does not look. Without checksums (torch.serialization.set_crc32_options) all of them are 0."""
    with zipfile.ZipFile(path) as archive:
        if any(record.CRC for record in archive.infolist()):
            hurt = archive.testzip()
            if hurt is not None:
                raise damaged(path, "records that agree with their checksums", hurt)


def _read_safetensors(path: str, *, check: bool) -> Any:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    tree, tensors = metadata.get(TREE), load_file(path)
    if tree is None:
        return tensors
    if check:
        check_sealed(path)
    return values.decode(
        msgspec.json.decode(tree),
        tensor=lambda ref: tensors[ref.name].numpy() if ref.kind == "numpy" else tensors[ref.name],
    )


def damaged(path: str, expected: str, actual: str) -> CorruptionError:
    """The error for a file whose digest is another one."""
    return CorruptionError(
        "A file of the checkpoint is not what was written",
        path=path,
        expected=expected,
        actual=actual,
        remedy="load another checkpoint",
    )


def seal(path: str, digests: NDArray[np.uint64] | None = None) -> None:
    """Put its digest into a safetensors file that holds UNSEALED in its place. `digests`: those of
    its blocks, where they are known."""
    place = _place_of_digest(path)
    digest = _file_digest(path, place) if digests is None else _digest_of(digests)
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(digest.encode())


def check_sealed(path: str) -> None:
    """Read a safetensors file of ours whole; CorruptionError if it is not what was written."""
    place = _place_of_digest(path)
    with open(path, "rb") as file:
        file.seek(place)
        told = file.read(len(UNSEALED)).decode("latin-1")
    found = _file_digest(path, place)
    if told != found:
        raise damaged(path, f"digest {told}", f"digest {found}")


def _place_of_digest(path: str) -> int:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        mark = f'"{DIGEST}":"'.encode()  # once at most: within JSON's strings quotes are escaped
        found = file.read(length).find(mark)
    if found < 0:
        raise damaged(path, f"its digest, {DIGEST}", "none")
    return 8 + found + len(mark)


def _file_digest(path: str, place: int) -> str:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[place : place + len(UNSEALED)] = UNSEALED.encode()
        with memoryview(mapped) as view:
            blocks = range(0, len(view), BLOCK_BYTES)
            digests = [block_digest(view[at : at + BLOCK_BYTES]) for at in blocks]
    return _digest_of(np.array(digests, dtype=np.uint64))


def _digest_of(digests: NDArray[np.uint64]) -> str:
    return text_digest(digests.astype("<u8").tobytes())


def _digest(path: str) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def errors_of(path: str, remedy: str) -> Iterator[None]:
    """Errors of torch, safetensors and the file system as typed ones, that name a path."""
    try:
        yield
    except ShardckptError:
        raise
    except FileNotFoundError as error:
        if os.path.isdir(path):
            raise NotACheckpointError(
                "A file of the checkpoint is missing", path=path, actual=str(error), remedy=remedy
            ) from error
        raise CheckpointNotFoundError(
            "There is nothing at this path", path=path, remedy="check the path"
        ) from error
    except IsADirectoryError as error:
        raise NotACheckpointError(
            "This is a directory, where a file was expected", path=path, remedy="check the path"
        ) from error
    except PermissionError:
        with translated(path):
            raise
    except (Exception, SafetensorError) as error:
        raise CorruptionError(
            "This file can't be read",
            path=path,
            actual=f"{type(error).__name__}: {error}".splitlines()[0],
            remedy=remedy,
        ) from error
