"""From any kind of checkpoint that can be read to any kind that can be written."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal, get_args

from shardckpt.checkpoint import Checkpoint
from shardckpt.convert.dcp import DcpCheckpoint, fsdp_parts, is_dcp, open_fsdp
from shardckpt.convert.dcp_files import DcpFolder
from shardckpt.convert.layouts import WEIGHTS, raise_unreadable
from shardckpt.convert.safetensors_files import (
    HuggingFace,
    SafetensorsFile,
    open_hugging_face,
    open_safetensors,
)
from shardckpt.convert.sources import Foreign, Selected, foreign, origin_of, state_of
from shardckpt.convert.torch_files import open_torch_file, open_torch_folder
from shardckpt.convert.whole_files import (
    INDEX,
    is_one_file,
    is_one_file_there,
    read_many,
    write_one,
)
from shardckpt.coordination.base import Coordinator, exchange
from shardckpt.coordination.single import SingleCoordinator
from shardckpt.errors import StateError
from shardckpt.execution.reshard import reshard, rewrite
from shardckpt.execution.source import Source
from shardckpt.format.values import TensorRef
from shardckpt.planning.saved import Rename, SavedState, Select
from shardckpt.reports import ConvertReport
from shardckpt.storage.base import MANIFEST_NAME
from shardckpt.storage.local import LocalStorage

__all__ = ["FORMATS", "Format", "convert", "convert_source", "open_source"]

Format = Literal["shardckpt", "dcp", "hf", "safetensors", "torch"]
FORMATS: tuple[Format, ...] = get_args(Format)

_TORCH_SUFFIXES = (".ckpt", ".bin")  # of files, though Lightning has folders of that name too
_BYTES_PER_FILE = 1 << 30
_HUGGING_FACE_BYTES = 5_000_000_000  # as transformers has it


def convert(
    source: str,
    target: str,
    *,
    to: Format | None = None,
    keys: Select = None,
    rename: Rename = None,
    shards: int | None = None,
    file_bytes: int = _HUGGING_FACE_BYTES,
    overwrite: bool = False,
) -> ConvertReport:
    """Convert the checkpoint at `source`, of whatever kind, to `target`. Not collective.

    Values stay what they are, bit for bit; PerRank values become a list of every rank's wherever
    the target has no such thing. Objects of classes, and files beside the weights, that have no
    place in a checkpoint are left out, and the report lists them. Memory: some buffers; the whole
    state for "torch", a file for "dcp". Nothing is at `target` before all is there.

    Args:
        source: A checkpoint of shardckpt or of torch.distributed.checkpoint (DCP), a torch file,
            which is read with weights_only=True, a safetensors file, a directory in Hugging Face's
            layout, or one of an NNHandler with a file for each component.
        target: Where the new one is to be.
        to: Its format; by default told by the suffix of `target`: .pt, .pth, .ckpt, .bin or
            .safetensors, else "shardckpt".
        keys: Choose saved entries, as in load_state.
        rename: Gives them other names, as in load_state.
        shards: Of a checkpoint, or files of DCP; by default one for each GiB.
        file_bytes: At most so many in a file of "hf", but for a larger tensor.
        overwrite: Replace what is at `target`.

    Returns:
        What was read, taken, copied and left out.

    Raises:
        CheckpointError: The source can't be read.
        StateError: The target can't hold it.
        StorageError: The file system refused.

    Example:
        >>> report = convert("last.ckpt", "step-100")  # doctest: +SKIP
        >>> report.left  # doctest: +SKIP
        {'hyper_parameters.loss': 'holds an object of my_project.Loss'}
    """
    with open_source(source, keys=keys, rename=rename) as opened:
        return convert_source(
            opened,
            target,
            to=to,
            shards=shards,
            file_bytes=file_bytes,
            overwrite=overwrite,
        )


def open_source(
    path: str, *, keys: Select = None, rename: Rename = None, check: bool = True
) -> Checkpoint | Foreign | Selected:
    """A checkpoint of any kind as a Source, to be closed. `check`: read single files whole, and
    verify them where they say what they should be. Raises CheckpointError."""
    opened: Checkpoint | Foreign | Selected = _open(path, check=check)
    try:
        if keys is not None:
            opened = Selected(opened, keys=keys)
        if rename is not None:
            opened = Selected(opened, rename=rename)
    except BaseException:
        opened.close()
        raise
    return opened


def _open(path: str, *, check: bool) -> Checkpoint | Foreign:
    if is_one_file_there(path):
        if path.endswith(".safetensors"):
            return open_safetensors(path, check=check)
        return open_torch_file(path, check=check)
    if os.path.isfile(os.path.join(path, INDEX)):
        return foreign(path, "files of components", read_many(path))
    if not os.path.isfile(os.path.join(path, MANIFEST_NAME)):
        if is_dcp(path):
            return DcpCheckpoint(path).source()
        for weights in WEIGHTS:
            if os.path.isfile(os.path.join(path, weights)):
                if ".safetensors" in weights:
                    return open_hugging_face(path, weights)
                return open_torch_folder(path, weights, check=check)
        if fsdp_parts(path):
            return open_fsdp(path)
        raise_unreadable(path)
    return Checkpoint(path, storage=LocalStorage())


def convert_source(
    source: Source,
    target: str,
    *,
    to: Format | None,
    shards: int | None,
    file_bytes: int,
    overwrite: bool,
    coordinator: Coordinator | None = None,
    progress: Callable[[int], None] = lambda written_bytes: None,
) -> ConvertReport:
    """See convert; collective over the coordinator's ranks, which divide the bytes, or the files of
    DCP. `progress` is called with the bytes that this rank has written."""
    ranks = coordinator or SingleCoordinator()
    kind = _format_of(target, to)
    if shards is None:
        total = sum(entry.size_bytes for entry in source.manifest.tensors.values())
        shards = max(ranks.world_size, -(-total // _BYTES_PER_FILE))
    if kind == "shardckpt":
        reshard(
            source,
            target,
            shards=shards,
            storage=LocalStorage(),
            overwrite=overwrite,
            coordinator=ranks,
            progress=progress,
        )
    elif kind == "dcp":
        rewrite(DcpFolder(source, target, files=shards, overwrite=overwrite), ranks, progress)
    elif kind == "hf":
        folder = HuggingFace(source, target, file_bytes=file_bytes, overwrite=overwrite)
        rewrite(folder, ranks, progress)
    elif kind == "safetensors":
        rewrite(SafetensorsFile(source, target, overwrite=overwrite), ranks, progress)
    else:

        def alone() -> bytes:
            if ranks.rank == 0:
                write_one(state_of(source, source.manifest.state), target, overwrite=overwrite)
            return b""

        exchange(ranks, "write", alone, lambda payloads: b"")
    return _report(source, target, kind)


def _report(source: Source, target: str, kind: Format) -> ConvertReport:
    origin, manifest = origin_of(source), source.manifest
    leaves = SavedState(manifest).leaves
    tensors = {
        name
        for name, node in leaves.items()
        if isinstance(node, TensorRef) and node.kind != "per_rank"
    }
    copied = origin.companions if kind == "hf" else ()
    changed = dict(origin.changed)
    if kind != "shardckpt":
        for name, node in leaves.items():
            if isinstance(node, TensorRef) and node.kind == "per_rank":
                changed[name] = "a value for each rank, taken as the list of all"
    return ConvertReport(
        path=target,
        target_format=kind,
        source=source.path,
        source_format=origin.format,
        writer=origin.writer,
        size_bytes=sum(entry.size_bytes for entry in manifest.tensors.values()),
        tensors=tuple(name for name in leaves if name in tensors),
        values=tuple(name for name in leaves if name not in tensors),
        files=origin.files,
        copied=copied,
        changed=changed,
        left={name: why for name, why in origin.left.items() if name not in copied},
    )


def _format_of(target: str, to: Format | None) -> Format:
    """The format to convert to; files tell it by their suffix."""
    by_suffix: Format = "shardckpt"
    if is_one_file(target):
        by_suffix = "safetensors" if target.endswith(".safetensors") else "torch"
    if to is None:
        return "torch" if target.endswith(_TORCH_SUFFIXES) else by_suffix
    if to == "torch" and target.endswith(_TORCH_SUFFIXES):
        return to
    if to not in FORMATS or (to != by_suffix and {to, by_suffix} & {"torch", "safetensors"}):
        raise StateError(
            "This path does not go with this format",
            path=target,
            expected=f"one of {', '.join(FORMATS)}; a path in .pt, .pth, .ckpt or .bin for torch, "
            "in .safetensors for safetensors, in none of them for the others",
            actual=repr(to),
        )
    return to
