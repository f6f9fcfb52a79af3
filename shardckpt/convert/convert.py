"""Convert checkpoints between formats."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from shardckpt.convert.dcp_writer import DcpFolder
from shardckpt.convert.formats import FORMATS, Format
from shardckpt.convert.lightning import LIGHTNING_SUFFIX, lightning_state
from shardckpt.convert.opening import open_source
from shardckpt.convert.safetensors_files import HuggingFace, SafetensorsFile
from shardckpt.convert.single_files import check_suffix, is_one_file, write_one
from shardckpt.convert.sources import origin_of, state_in_memory
from shardckpt.convert.targets import Target
from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.exchange import exchange
from shardckpt.coordination.single import SingleCoordinator
from shardckpt.errors import StateError
from shardckpt.format.typed_json import TensorRef
from shardckpt.maintenance.reshard import reshard, rewrite
from shardckpt.maintenance.rewritable import Source
from shardckpt.reports import ConvertReport
from shardckpt.state.saved_tree import Renaming, SavedState, Select
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.posix import System
from shardckpt.storage.resolve import Location, resolve
from shardckpt.transforms import Transforms

__all__ = ["convert", "convert_source"]

_TORCH_SUFFIXES = (".ckpt", ".bin")
"""Suffixes of torch files. Lightning has folders with these names too."""

_ONE_FILE = {"lightning", "safetensors", "torch"}
_BYTES_PER_FILE = 1 << 30
_HUGGING_FACE_BYTES = 5_000_000_000  # the default of transformers


def convert(
    source: str | os.PathLike[str] | Storage,
    target: str | os.PathLike[str] | Storage,
    *,
    to: Format | None = None,
    keys: Select = None,
    rename: Renaming = None,
    transforms: Transforms | None = None,
    dtype: torch.dtype | str | None = None,
    like: str | os.PathLike[str] | None = None,
    shards: int | None = None,
    file_bytes: int | None = None,
    overwrite: bool = False,
    storage: Storage | None = None,
) -> ConvertReport:
    """Convert a checkpoint of any supported format. Not collective.

    Values keep every bit, without `transforms` and `dtype`. PerRank values become a list of the
    values of all ranks, unless the target is a checkpoint of shardckpt. Objects of classes, and
    files beside the weights, are left out if the target can't hold them, and the report lists them.
    Memory: a few buffers; for "torch" and "lightning" the full state, for "dcp" one file. The
    target appears when it is complete.

    Args:
        source: A checkpoint of shardckpt, of torch.distributed.checkpoint (DCP), of
            torch_checkpointing or of DeepSpeed; a torch file, which is read with weights_only=True;
            a safetensors file; a folder in the layout of Hugging Face; or a folder of an NNHandler
            with a file for each component.
        target: The new checkpoint.
        to: Its format. By default the suffix of `target` decides: .pt, .pth, .ckpt and .bin are
            "torch", .safetensors is "safetensors", and no suffix is "shardckpt". "lightning" is a
            torch file in .ckpt that Lightning resumes.
        keys: The saved names to convert, after `transforms`: prefixes or shell patterns.
        rename: New names of the entries that `keys` selects; see `load`.
        transforms: Changes of the tensors; see `load`. `keys` and `rename` apply after them.
        dtype: The dtype of all floating-point tensors of 16 bits and more: "float64", "float32",
            "float16" or "bfloat16". By default each keeps its dtype.
        like: A checkpoint whose tensors the target has: the same names, shapes and dtypes. Other
            entries are left out. For "hf", configuration and tokenizer are copied from it. Not with
            `dtype`.
        shards: The number of shards, or of files of DCP. By default one for each GiB. Only for
            "shardckpt" and "dcp".
        file_bytes: The largest size of a file, unless a tensor is larger. By default 5 GB. Only for
            "hf".
        overwrite: Replace a checkpoint at `target`.
        storage: The storage of both; see `save`. Formats other than "shardckpt" are read from and
            written to local files.

    Returns:
        The names that were converted, changed and left out.

    Raises:
        CheckpointError: The source can't be read.
        LoadMismatchError: `keys`, `rename` or `transforms` has a name that no saved entry has.
        StateError: The target can't hold an entry, or an argument is invalid.
        StorageError: The file system refused an operation.

    Example:
        >>> import torch, shardckpt
        >>> torch.save({"weight": torch.ones(3), "step": 7}, "last.pt")
        >>> report = shardckpt.convert("last.pt", "run/step-7")
        >>> report.tensors, report.values
        (('weight',), ('step',))
    """
    location = resolve(target, storage)
    options: Any = {"transforms": transforms, "dtype": dtype, "like": like}
    with open_source(source, keys=keys, rename=rename, storage=storage, **options) as opened:
        return convert_source(
            opened,
            location,
            to=to,
            shards=shards,
            file_bytes=file_bytes,
            overwrite=overwrite,
        )


def convert_source(
    source: Source,
    target: Location,
    *,
    to: Format | None,
    shards: int | None,
    file_bytes: int | None,
    overwrite: bool,
    coordinator: Coordinator | None = None,
    progress: Callable[[int], None] = lambda written_bytes: None,
) -> ConvertReport:
    """Convert an open source; see convert.

    Collective over the coordinator's ranks, which divide the bytes, or the files of DCP. `progress`
    is called with the bytes that this rank wrote so far.
    """
    ranks = coordinator or SingleCoordinator()
    storage, path = target
    target_format = _format_of(path, to)
    _check_options(path, target_format, shards=shards, file_bytes=file_bytes)
    if shards is None:
        total = sum(entry.size_bytes for entry in source.manifest.tensors.values())
        shards = max(ranks.world_size, -(-total // _BYTES_PER_FILE))
    if target_format == "shardckpt":
        reshard(
            source,
            path,
            shards=shards,
            storage=storage,
            overwrite=overwrite,
            coordinator=ranks,
            progress=progress,
        )
        return _report(source, path, target_format)
    options: Any = {"overwrite": overwrite, "system": _system_of(target, target_format)}
    if target_format in ("torch", "lightning"):
        _write_torch(source, path, target_format, ranks, progress, **options)
        return _report(source, path, target_format)
    writer: Target
    if target_format == "dcp":
        writer = DcpFolder(source, path, files=shards, **options)
    elif target_format == "hf":
        most = _HUGGING_FACE_BYTES if file_bytes is None else file_bytes
        writer = HuggingFace(source, path, file_bytes=most, **options)
    else:
        writer = SafetensorsFile(source, path, **options)
    rewrite(writer, ranks, progress)
    return _report(source, path, target_format)


def _system_of(target: Location, target_format: Format) -> System:
    """Return the system calls of a local target. Raises StateError for another storage."""
    if isinstance(target.storage, LocalStorage):
        return target.storage.system
    raise StateError(
        "Only checkpoints of shardckpt are written to a storage",
        path=target.path,
        expected="a local path",
        actual=f"a path of {type(target.storage).__qualname__}, and the format {target_format}",
        remedy="convert to a local path, and copy the files",
    )


def _report(source: Source, target: str, target_format: Format) -> ConvertReport:
    origin, manifest = origin_of(source), source.manifest
    leaves = SavedState(manifest).leaves
    tensors = {
        name
        for name, node in leaves.items()
        if isinstance(node, TensorRef) and node.ref_type != "per_rank"
    }
    copied = origin.companions if target_format == "hf" else ()
    changed = dict(origin.changed)
    if target_format in ("torch", "lightning"):
        for name, node in leaves.items():
            if _is_numpy_number(node):
                changed[name] = f"numpy.{type(node).__name__}, taken as a value of Python"
    if target_format != "shardckpt":
        for name, node in leaves.items():
            if isinstance(node, TensorRef) and node.ref_type == "per_rank":
                changed[name] = "a value for each rank, taken as the list of all"
    return ConvertReport(
        path=target,
        target_format=target_format,
        source=source.path,
        source_format=origin.format,
        writer=origin.writer,
        size_bytes=sum(entry.size_bytes for entry in manifest.tensors.values()),
        tensors=tuple(name for name in leaves if name in tensors),
        values=tuple(name for name in leaves if name not in tensors),
        files=origin.files,
        copied=copied,
        changed=changed,
        left_out={name: why for name, why in origin.left_out.items() if name not in copied},
    )


def _check_options(
    path: str, target_format: Format, *, shards: int | None, file_bytes: int | None
) -> None:
    """Raise StateError for an option that does not apply to the format."""
    excess = ""
    if shards is not None and target_format not in ("shardckpt", "dcp"):
        excess = "shards"
    elif file_bytes is not None and target_format != "hf":
        excess = "a size of files"
    if excess:
        raise StateError(
            f"A conversion to {target_format} has no number of shards or size of files",
            path=path,
            expected='shards= only for "shardckpt" and "dcp", file_bytes= only for "hf"',
            actual=f"{excess}, for {target_format}",
            remedy="leave the argument out",
        )


def _write_torch(
    source: Source,
    target: str,
    target_format: Format,
    ranks: Coordinator,
    progress: Callable[[int], None],
    *,
    overwrite: bool,
    system: System | None,
) -> None:
    def advance(written_bytes: int) -> None:
        ranks.progress(written_bytes)
        progress(written_bytes)

    def alone() -> bytes:
        if ranks.rank == 0:
            state = _plain_numbers(state_in_memory(source, source.manifest.state))
            if target_format == "lightning":
                state = lightning_state(state, source.path)
            write_one(state, target, overwrite=overwrite, system=system, progress=advance)
        return b""

    exchange(ranks, "write", alone, lambda payloads: b"")


def _is_numpy_number(value: Any) -> bool:
    """Whether a value is a number or a text of numpy, which torch.load refuses."""
    return isinstance(value, np.generic) and value.dtype.kind in "biufcSU"


def _plain_numbers(value: Any) -> Any:
    if type(value) is dict:
        return {key: _plain_numbers(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain_numbers, value))
    return value.item() if _is_numpy_number(value) else value


def _format_of(target: str, to: Format | None) -> Format:
    """Return the format of the target. The suffix of the path decides for single files."""
    by_suffix: Format = "shardckpt"
    if is_one_file(target):
        by_suffix = "safetensors" if target.endswith(".safetensors") else "torch"
    if to is None and target.endswith(_TORCH_SUFFIXES):
        return "torch"
    if to is None:
        check_suffix(target, remedy='change the suffix, or pass to="shardckpt", "dcp" or "hf"')
        return by_suffix
    if to == "torch" and target.endswith(_TORCH_SUFFIXES):
        return to
    if to == "lightning" and target.endswith(LIGHTNING_SUFFIX):
        return to
    if to not in FORMATS or (to != by_suffix and {to, by_suffix} & _ONE_FILE):
        raise StateError(
            "The target path does not match the format",
            path=target,
            expected=f"one of {', '.join(FORMATS)}; a path in .pt, .pth, .ckpt or .bin for torch, "
            "in .ckpt for lightning, in .safetensors for safetensors, in none of them for others",
            actual=repr(to),
            remedy="change the suffix of the path, or pass another format",
        )
    return to
