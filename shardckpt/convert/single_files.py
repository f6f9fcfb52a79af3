"""Read and write a full state as a torch or safetensors file, or as one file for each component.

Torch files open with torch.load(weights_only=True). Safetensors files open with the safetensors
library: tensors by name, all other entries as typed JSON in the metadata. Files appear under their
name when they are durable. Both formats are verified when they are read: torch files by the CRC-32
of each record, safetensors files by a digest in the metadata.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import msgspec
import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from shardckpt.convert.foreign_file import (
    check_regular,
    file_in,
    open_regular,
    read_small,
    utf8_path,
)
from shardckpt.convert.refusals import plain_text, refusal, refused_name
from shardckpt.convert.torch_reader import LoadTorch, load_torch, load_torch_file
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
from shardckpt.format.dtype_names import plain_form
from shardckpt.format.dtypes import dtype_name
from shardckpt.format.safetensors_header import build_header, header_bytes, unique_keys
from shardckpt.format.validation import check_references
from shardckpt.saving.shard_writer import write_shard
from shardckpt.state.flatten import flatten
from shardckpt.state.local_chunks import AnyTensor
from shardckpt.storage.atomic_write import AtomicWrite, atomic_write, stream_to
from shardckpt.storage.base import WritableFile
from shardckpt.storage.posix import System, translated

__all__ = [
    "DIGEST",
    "INDEX",
    "TREE",
    "UNSEALED",
    "FileFormat",
    "check_loads",
    "check_records",
    "check_sealed",
    "check_suffix",
    "corrupted",
    "errors_of",
    "is_one_file",
    "is_sealed",
    "is_single_file",
    "read_many",
    "read_metadata",
    "read_one",
    "save_torch",
    "seal",
    "write_many",
    "write_one",
]

FileFormat = Literal["torch", "safetensors"]


INDEX = "components.json"
_SUFFIXES: dict[str, str] = {"torch": ".pth", "safetensors": ".safetensors"}
TREE, DIGEST = "shardckpt.state", "shardckpt.digest"
"""The keys of the metadata of a safetensors file: the tree of the state without its tensors, and
the digest of the file. The digest is the xxh3-128 of the xxh3-64 digests (8 bytes, little-endian)
of each MiB of the file, computed with UNSEALED in place of the digest itself."""
UNSEALED = "0" * 32
_MARK = f'"{DIGEST}":"'.encode()  # occurs at most once: inside JSON strings quotes are escaped


def is_one_file(path: str) -> bool:
    """Whether the suffix of a path is that of a single file."""
    return path.endswith((".pth", ".pt", ".safetensors"))


_SUFFIX = re.compile(r"\.[A-Za-z]\w*$")


def check_suffix(path: str, *, remedy: str = "change the suffix, or leave it out") -> None:
    """Raise StateError for a path that seems to name a file of a kind that is not written."""
    suffix = _SUFFIX.search(path)
    if suffix is not None and not is_one_file(path):
        raise StateError(
            "Unknown suffix",
            path=path,
            expected=".pth, .pt or .safetensors for one file, no suffix for a sharded checkpoint",
            actual=suffix[0],
            remedy=remedy,
        )


def is_single_file(path: str) -> bool:
    """Whether to read a path as a single file. True for any file, whatever its suffix. False for
    directories: sharded checkpoints of Lightning are directories named `.ckpt`."""
    return os.path.isfile(path) or (is_one_file(path) and not os.path.isdir(path))


def write_one(
    state: Mapping[str, Any],
    path: str,
    *,
    overwrite: bool,
    system: System | None = None,
    progress: Callable[[int], None] = lambda written_bytes: None,
) -> None:
    """Write a nested state of plain CPU tensors as one file. The suffix decides its format."""
    with atomic_write(path, overwrite=overwrite, system=system) as write:
        _write(state, write, "", path, progress)


def read_one(path: str, *, check: bool = True, load: LoadTorch = load_torch) -> Any:
    """Read the state in one file, on the CPU. The file may come from another program.

    With `check` every byte is read and verified now, otherwise when it is used. `load` reads torch
    files.
    """
    with errors_of(path, "load another checkpoint; pickled objects are never loaded"):
        if path.endswith(".safetensors"):
            return _read_safetensors(path, check=check)
        found = load_torch_file(path, load)
        if check:
            check_records(path)
        return found


def write_many(
    state: Mapping[str, Any],
    folder: str,
    file_format: FileFormat,
    *,
    overwrite: bool,
    system: System | None = None,
    progress: Callable[[int], None] = lambda written_bytes: None,
) -> None:
    """Write a folder with a file for each item of the state, and an index with their digests."""
    with atomic_write(
        folder,
        overwrite=overwrite,
        index=(INDEX,),
        foreign=lambda names: _not_indexed(folder, names, system or System()),
        system=system,
    ) as write:
        write.make_folder()
        files = {}
        for key, item in state.items():
            name = f"{key}{_SUFFIXES[file_format]}"
            _write({key: item}, write, name, os.path.join(folder, name), progress)
            digest = _digest(os.path.join(write.path, name), write.system)
            files[key] = {"name": name, "xxh3_128": digest}
        index = json.dumps({"format": file_format, "files": files}, indent=1)
        write.add_bytes(index.encode(), INDEX)


def _not_indexed(folder: str, names: Sequence[str], system: System) -> list[str]:
    """Return the names in a folder of components that are not in its index."""
    try:
        index = json.loads(b"".join(_blocks(os.path.join(folder, INDEX), system)))
        known = {INDEX, *(entry["name"] for entry in index["files"].values())}
        return [name for name in names if name not in known]
    except (ValueError, LookupError, TypeError, AttributeError):
        return [n for n in names if n != INDEX and not n.endswith(tuple(_SUFFIXES.values()))]


class _Component(msgspec.Struct):
    name: str
    xxh3_128: str


class _Components(msgspec.Struct):
    files: dict[str, _Component]


def read_many(folder: str) -> dict[str, Any]:
    """Read the state that write_many wrote, and verify every file."""
    state: dict[str, Any] = {}
    with errors_of(folder, "load another checkpoint"):
        index = msgspec.json.decode(read_small(file_in(folder, INDEX)), type=_Components)
        for key, entry in index.files.items():
            path = file_in(folder, entry.name)
            check_regular(path)
            item = read_one(path, check=False)  # do not read a file that declares too much
            found = _digest(path)
            if found != entry.xxh3_128:
                raise corrupted(path, f"digest {entry.xxh3_128}"[:200], f"digest {found}")
            state[key] = item[key]
    return state


def _full_tensor(tensor: AnyTensor, name: str) -> torch.Tensor:
    if isinstance(tensor, torch.Tensor):
        plain_form(dtype_name(tensor.dtype, tensor=name), tensor.shape, tensor=name)
        return tensor
    raise StateError(
        "A single file can't hold a part of an array",
        tensor=name,
        expected="full tensors",
        actual=repr(tensor),
        remedy="save to a path without .safetensors: then every rank writes its part",
    )


def _write(
    state: Mapping[str, Any],
    write: AtomicWrite,
    name: str,
    target: str,
    progress: Callable[[int], None],
) -> None:
    if target.endswith(".safetensors"):
        _write_safetensors(state, write, name, progress)
        return
    check_loads(state, target)
    with stream_to(write.create(name, direct=False), progress) as stream:
        save_torch(dict(state), stream, target)


def save_torch(value: Any, file: Any, path: str) -> None:
    """Call torch.save. Raises UnsupportedLeafError for a value that can't be pickled."""
    try:
        torch.save(value, file)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise UnsupportedLeafError(
            "The state holds a value that torch.save refuses",
            path=path,
            actual=str(error).splitlines()[0],
            remedy="leave the value out with keys=, or write a checkpoint of shardckpt",
        ) from error


def _write_safetensors(
    state: Mapping[str, Any], write: AtomicWrite, name: str, progress: Callable[[int], None]
) -> None:
    """Write tensors by falling item size, so that each is aligned. The digest is written at the
    end."""
    flat = flatten(state, rank=0)
    tree = msgspec.json.encode(flat.tree).decode()
    tensors = {
        key: _full_tensor(tensor, key)
        for key, tensor in sorted(flat.tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    }
    header = build_header(
        [
            (key, *plain_form(dtype_name(t.dtype, tensor=key), t.shape, tensor=key), t.nbytes)
            for key, t in tensors.items()
        ],
        {"format": "pt", TREE: tree, DIGEST: UNSEALED},
    )
    size_bytes = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    file = write.create(name, size_bytes=size_bytes)
    try:
        end, digests = write_shard(file, header=header, tensors=tensors.values(), progress=progress)
        assert end == size_bytes
        seal(file, header, digests)
        file.close(size_bytes=size_bytes)
    except BaseException:
        file.discard()
        raise


def check_loads(state: Mapping[str, Any], path: str) -> None:
    """Raise UnsupportedLeafError for a value that torch.load would refuse. The data of tensors are
    left out."""
    error = _load_error(light := _without_data(dict(state)))
    if error is not None:
        raise UnsupportedLeafError(
            "The state holds a value that torch.load(weights_only=True) refuses",
            path=path,
            tensor=_first_refused(light, ""),
            expected="tensors, numbers, text, bytes, and dicts, lists, tuples and sets of them",
            actual=refused_name(error) or plain_text(error),
            remedy="save to a path without .pth or .pt, or leave the value out",
        ) from error


def _load_error(value: Any) -> Exception | None:
    """Return the error with which torch.load refuses a value, or None."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True, map_location="cpu")
    except Exception as error:
        return error
    return None


def _first_refused(value: Any, name: str) -> str:
    """Return the name of the first entry that torch.load refuses in a refused value."""
    items = enumerate(value) if type(value) in (list, tuple) else ()
    for key, item in value.items() if type(value) is dict else items:
        if _load_error(item) is not None:
            return _first_refused(item, f"{name}.{key}" if name else str(key))
    return name


def _without_data(value: Any) -> Any:
    if type(value) is torch.Tensor and value.layout is torch.strided and not value.is_quantized:
        return torch.empty(0, dtype=value.dtype, device="cpu")
    if type(value) is dict:
        return {key: _without_data(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_without_data, value))
    return value


def check_records(path: str) -> None:
    """Raise an error if the records of a torch file do not match their checksums, which torch.load
    does not check. Without checksums (torch.serialization.set_crc32_options) all of them are 0."""
    if not zipfile.is_zipfile(path):  # true for all torch files, except of torch before 1.6
        return
    with zipfile.ZipFile(path) as archive:
        if any(record.CRC for record in archive.infolist()):
            bad_record = archive.testzip()
            if bad_record is not None:
                raise corrupted(path, "records that agree with their checksums", bad_record)


def _read_safetensors(path: str, *, check: bool) -> Any:
    metadata = read_metadata(path)
    with utf8_path(path) as name:
        tensors = load_file(name)
    if not is_sealed(path, metadata):
        return tensors
    if check:
        check_sealed(path)
    tree = msgspec.json.decode(metadata[TREE])
    check_references(tree, [], tensors, path)
    return values.decode(
        tree,
        tensor=lambda ref: (
            tensors[ref.name].numpy() if ref.ref_type == "numpy" else tensors[ref.name]
        ),
    )


def read_metadata(path: str) -> dict[str, str]:
    """Read the metadata of a safetensors file.

    It checks rules that the safetensors library does not check: a regular file, a header within the
    file, and unique keys.
    """
    with open_regular(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = header_bytes(head, file_size_bytes=size_bytes, path=path) - 8
        text = file.read(1)
        if text != b"{":
            raise corrupted(path, 'a header that begins with "{"', repr(text))
        header = json.loads(text + file.read(length - 1), object_pairs_hook=unique_keys)
    return msgspec.convert(header.get("__metadata__", {}), dict[str, str])


def is_sealed(path: str, metadata: Mapping[str, str]) -> bool:
    """Whether shardckpt wrote a safetensors file. Raises CorruptionError if it has only some of the
    marks: then a bit in the keys of the metadata changed."""
    ours = {key for key in metadata if key.startswith("shardckpt.")}
    if ours and ours != {TREE, DIGEST}:
        raise corrupted(path, f"metadata with {TREE} and {DIGEST}", ", ".join(sorted(ours))[:200])
    return bool(ours)


def corrupted(path: str, expected: str, actual: str) -> CorruptionError:
    """Return the error for a file with another digest."""
    return CorruptionError(
        "A file of the checkpoint is corrupted",
        path=path,
        expected=expected,
        actual=actual,
        remedy="load another checkpoint",
    )


def seal(file: WritableFile, header: bytes, digests: NDArray[np.uint64]) -> None:
    """Write the digest into a safetensors file whose header holds UNSEALED in its place. `digests`
    are those of its blocks."""
    offset = header.index(_MARK) + len(_MARK)
    file.write(memoryview(_digest_of(digests).encode()), offset=offset)


def check_sealed(path: str) -> None:
    """Read a safetensors file of shardckpt completely. Raises CorruptionError if its digest does
    not match."""
    offset = _offset_of_digest(path)
    with open(path, "rb") as file:
        file.seek(offset)
        expected = file.read(len(UNSEALED)).decode("latin-1")
    actual = _file_digest(path, offset)
    if expected != actual:
        raise corrupted(path, f"digest {expected}", f"digest {actual}")


def _offset_of_digest(path: str) -> int:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        found = file.read(length).find(_MARK)
    if found < 0:
        raise corrupted(path, f"its digest, {DIGEST}", "none")
    return 8 + found + len(_MARK)


def _file_digest(path: str, offset: int) -> str:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[offset : offset + len(UNSEALED)] = UNSEALED.encode()
        with memoryview(mapped) as view:
            blocks = range(0, len(view), BLOCK_BYTES)
            digests = [block_digest(view[at : at + BLOCK_BYTES]) for at in blocks]
    return _digest_of(np.array(digests, dtype=np.uint64))


def _digest_of(digests: NDArray[np.uint64]) -> str:
    return text_digest(digests.astype("<u8").tobytes())


def _digest(path: str, system: System | None = None) -> str:
    digest = xxhash.xxh3_128()
    for block in _blocks(path, system or System()):
        digest.update(block)
    return digest.hexdigest()


def _blocks(path: str, system: System) -> Iterator[bytes]:
    block, at = memoryview(bytearray(1 << 20)), 0
    fd = system.open(path, os.O_RDONLY)
    try:
        while size := system.read(fd, [block], offset=at):
            yield bytes(block[:size])
            at += size
    finally:
        system.close(fd)


@contextmanager
def errors_of(path: str, remedy: str) -> Iterator[None]:
    """Convert errors of torch, safetensors and the file system to typed errors with the path."""
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
            "The path does not exist", path=path, remedy="check the path"
        ) from error
    except IsADirectoryError as error:
        raise NotACheckpointError(
            "The path is a directory, not a file", path=path, remedy="check the path"
        ) from error
    except PermissionError:
        with translated(path):
            raise
    except (Exception, SafetensorError) as error:
        found = refusal(path, error)
        if type(found) is CorruptionError and not isinstance(error, pickle.UnpicklingError):
            found.remedy = remedy
        raise found from error
