"""Read checkpoints of torch.distributed.checkpoint (DCP), without running code.

`.distcp` files hold tensors and values as torch.save archives. They are read with
weights_only=True, and inert stand-ins replace objects. For the FileSystemWriter of torch 2.13.
"""

from __future__ import annotations

import math
import os
import pickle
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
import xxhash
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from shardckpt.convert.boxes import ReadBox
from shardckpt.convert.dcp_metadata import ReadMetadata, parse_metadata
from shardckpt.convert.foreign_file import check_regular, file_in, mapped
from shardckpt.convert.layouts import left_beside, writer_of
from shardckpt.convert.pickle_scan import Readable
from shardckpt.convert.refusals import plain_text, refusal
from shardckpt.convert.sources import Foreign, Origin, foreign
from shardckpt.convert.torch_objects import ObjectsLoader, StandIn, stand_in, why
from shardckpt.convert.torch_reader import LoadTorch, load_torch, load_torch_bytes
from shardckpt.convert.torch_sources import read_objects
from shardckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptionError,
    CoverageError,
    NotACheckpointError,
)
from shardckpt.format.tiling import find_gap
from shardckpt.state.local_chunks import box_slices, shared_box
from shardckpt.storage.posix import translated

__all__ = ["DcpCheckpoint", "fsdp_folders", "is_dcp", "open_fsdp"]

_METADATA = ".metadata"
_SIDE_STATES = ("meta.pt", "common.pt")
"""Torch files with the rest of the state, of Lightning (epoch, callbacks, ...) and of
Megatron-Core."""

_MOST_ABSENT = 1 << 12  # items of a list, so that a small file does not fill the memory


def is_dcp(path: str) -> bool:
    """Whether a folder looks like a checkpoint of DCP."""
    return os.path.isfile(os.path.join(path, _METADATA))


class DcpCheckpoint:
    """A checkpoint folder of DCP. Not collective.

    `tensors`: name -> shape. Raises CheckpointNotFoundError, NotACheckpointError, or
    CorruptionError if the metadata can't be read or are invalid.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        if not is_dcp(path):
            error_type = NotACheckpointError if os.path.lexists(path) else CheckpointNotFoundError
            raise error_type(
                "No DCP checkpoint exists at this path",
                path=path,
                expected=f"a directory with {_METADATA}",
            )
        with translated(path), mapped(file_in(path, _METADATA)) as data:
            self._read_metadata = self._parsed(data)
            self._metadata = self._read_metadata.metadata
            self.identity = xxhash.xxh3_128(data).hexdigest()
        self._current, self._loaded = "", dict[tuple[int, ...], torch.Tensor]()
        self._flattened = self._read_metadata.flattened
        self.tensors: dict[str, torch.Size] = {
            name: self._flattened.get(name, entry.size)
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._check_size()

    def _parsed(self, data: Readable) -> ReadMetadata:
        try:
            return parse_metadata(data)
        except Exception as error:
            raise CorruptionError(
                "The metadata of this DCP checkpoint can't be read",
                path=os.path.join(self.path, _METADATA),
                actual=str(error).splitlines()[0] if str(error) else type(error).__name__,
                remedy="load another checkpoint",
            ) from error

    def _check_size(self) -> None:
        """Check, before memory is allocated, that tensors are not larger than the files with their
        data."""
        declared = sum(
            math.prod(size) * self._entry(name).properties.dtype.itemsize
            for name, size in self.tensors.items()
        )
        names = {info.relative_path for info in self._metadata.storage_data.values()}
        paths = [file_in(self.path, name) for name in sorted(names)]
        actual = sum(check_regular(path).st_size for path in paths if os.path.lexists(path))
        if declared > actual:
            raise CorruptionError(
                "The files of this DCP checkpoint are smaller than its tensors",
                path=self.path,
                expected=f"at least {declared} bytes",
                actual=f"{actual} bytes in {len(paths)} files",
                remedy="load another checkpoint",
            )

    def source(self) -> Foreign:
        """Return the full checkpoint as a source to convert.

        Values are read now, and tensors one box at a time. Objects that only unpickling could read
        are left out, and listed in `origin`.

        Raises:
            CorruptionError: A value calls the operating system.
        """
        objects = ObjectsLoader()
        state, reads = self.state(objects)
        files = {info.relative_path for info in self._metadata.storage_data.values()}
        files |= {_METADATA} | self._add_side_states(state, objects)
        origin = Origin(
            format="DCP",
            writer=self._writer(state),
            left_out={**left_beside(self.path, files), **objects.left_out},
            changed=objects.changed,
            files=tuple(sorted(files)),
        )
        return foreign(self.path, "DCP", state, reads=reads, identity=self.identity, origin=origin)

    def state(self, objects: ObjectsLoader) -> tuple[dict[Any, Any], dict[int, ReadBox]]:
        """Return the nested state and, for the id of each tensor in it, the function that
        reads it.
        """
        entries: dict[str, Any] = {}
        reads: dict[int, ReadBox] = {}
        objects.left_out.update(self._read_metadata.unknown)
        for name in self._metadata.state_dict_metadata:
            if name in self.tensors:  # a tensor without memory represents it
                dtype = self._entry(name).properties.dtype
                entries[name] = torch.empty((), dtype=dtype, device="cpu").expand(
                    self.tensors[name]
                )
                reads[id(entries[name])] = partial(self.read_box, name)
            else:
                found = objects.plain(self._read(MetadataIndex(name), objects.load), name)
                if isinstance(found, StandIn):
                    objects.left_out[name] = why(found)
                entries[name] = found
        paths = self._metadata.planner_data
        lost = {name: stand_in(name) for name in self._read_metadata.unknown if name in paths}
        return _nested({**entries, **lost}, paths, objects.left_out), reads

    def _add_side_states(self, state: dict[Any, Any], objects: ObjectsLoader) -> set[str]:
        """Add the entries of a torch file beside the checkpoint. Returns the names of the files
        read. A file that can't be read is listed, and the weights are converted nevertheless."""
        read = set()
        for name in _SIDE_STATES:
            path = os.path.join(self.path, name)
            if not os.path.isfile(path):
                continue
            try:
                found = read_objects(path, objects)
            except CheckpointError as error:
                objects.left_out[name] = f"{error.message} ({error.actual})"
                continue
            read.add(name)
            for key, value in found.items():
                if key in state:
                    objects.left_out[f"{name}: {key}"] = "the data files hold an entry of this name"
                else:
                    state[key] = value
        return read

    def _writer(self, state: dict[Any, Any]) -> str | None:
        if (self._read_metadata.writer or "").startswith("megatron."):
            return "Megatron-Core"
        version = state.get("pytorch-lightning_version")
        return f"Lightning {version}" if version else writer_of(self.path)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read full tensors by name, on the CPU. Raises CoverageError for a tensor with holes."""
        return {
            name: self.read_box(name, (0,) * len(self.tensors[name]), tuple(self.tensors[name]))
            for name in names
        }

    def read_box(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """Read a box of a tensor, on the CPU. Its parts are kept in memory until another tensor is
        read. Raises CoverageError for a tensor with holes."""
        if name in self._flattened:
            return self._read_flattened(name, offsets, sizes)
        return self._read_saved(name, offsets, sizes)

    def _read_flattened(
        self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> torch.Tensor:
        """Read a box of a tensor that Megatron-Core divided into a grid of equal, flat parts."""
        shape, (*grid, count) = self._flattened[name], self._entry(name).size
        dims = range(len(shape))
        if 0 in sizes:
            return torch.empty(sizes, dtype=self._entry(name).properties.dtype, device="cpu")
        part = [n // parts for n, parts in zip(shape, grid, strict=True)]
        first = [offsets[d] // part[d] for d in dims]
        parts = [-(-(offsets[d] + sizes[d]) // part[d]) - first[d] for d in dims]
        saved = self._read_saved(name, (*first, 0), (*parts, count)).reshape(*parts, *part)
        order = [axis for d in dims for axis in (d, d + len(shape))]
        box = saved.permute(order).reshape([parts[d] * part[d] for d in dims])
        return box[box_slices([first[d] * part[d] for d in dims], offsets, sizes)]

    def _read_saved(
        self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> torch.Tensor:
        """Read a box of a tensor in the shape that its parts have."""
        if name != self._current:
            self._check_coverage(name)
            self._current, self._loaded = name, {}
        box = torch.empty(sizes, dtype=self._entry(name).properties.dtype, device="cpu")
        for chunk in self._entry(name).chunks:
            at = tuple(chunk.offsets)
            shared = shared_box(offsets, sizes, at, tuple(chunk.sizes))
            if shared is not None:
                part = self._loaded_chunk(name, chunk)
                box[box_slices(offsets, *shared)] = part[box_slices(at, *shared)]
        return box

    def _entry(self, name: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        return entry

    def _check_coverage(self, name: str) -> None:
        entry = self._entry(name)
        shape = len(entry.chunks), len(entry.size)
        offsets = np.array([c.offsets for c in entry.chunks], dtype=np.int64).reshape(shape)
        sizes = np.array([c.sizes for c in entry.chunks], dtype=np.int64).reshape(shape)
        if (gap := find_gap(tuple(entry.size), offsets, sizes)) is not None:
            raise CoverageError(
                "The chunks of a DCP checkpoint don't cover a tensor exactly once",
                path=self.path,
                tensor=name,
                expected="every element in one chunk",
                actual=str(gap),
                remedy="load another checkpoint",
            )

    def _loaded_chunk(self, name: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        place = tuple(chunk.offsets)
        if place not in self._loaded:
            part = self._read(MetadataIndex(name, chunk.offsets))
            if not isinstance(part, torch.Tensor) or part.shape != chunk.sizes:
                raise CorruptionError(
                    "A part of a tensor does not match the metadata",
                    path=self.path,
                    tensor=name,
                    expected=f"a tensor of shape {list(chunk.sizes)}",
                    actual=str(list(getattr(part, "shape", [type(part).__name__]))),
                    remedy="load another checkpoint",
                )
            self._loaded[place] = part
        return self._loaded[place]

    def _read(self, index: MetadataIndex, load: LoadTorch = load_torch) -> Any:
        """Read an item of DCP."""
        infos = self._metadata.storage_data
        info = infos.get(index, infos.get(MetadataIndex(index.fqn)))
        path = self.path
        try:
            if info is None:
                raise KeyError(f"{index.fqn} at {index.offset} is in no file")
            path = file_in(self.path, info.relative_path)
            with mapped(path) as data, memoryview(data) as view:
                end = info.offset + info.length
                if end > len(view):
                    raise ValueError(f"it ends at byte {end} of {len(view)}")
                with view[info.offset : end] as part:
                    try:
                        return load_torch_bytes(part, path, load)
                    except NotACheckpointError as error:  # a part of a data file is corrupted
                        raise ValueError(f"{error.message}, {error.actual}") from error
        except (CorruptionError, NotACheckpointError):
            raise
        except pickle.UnpicklingError as error:
            raise refusal(path, error, tensor=index.fqn) from error
        except Exception as error:
            raise CorruptionError(
                "An entry of a DCP checkpoint can't be read",
                path=path,
                tensor=index.fqn,
                actual=f"{type(error).__name__}: {plain_text(error)}",
                remedy="load another checkpoint",
            ) from error


def fsdp_folders(path: str) -> list[str]:
    """Return the DCP folders in which accelerate and transformers' Trainer store FSDP state.

    The list is empty for other folders.
    """
    parts = [n for n in ("pytorch_model_fsdp_0", "optimizer_0") if is_dcp(os.path.join(path, n))]
    return parts if parts[:1] == ["pytorch_model_fsdp_0"] else []


def open_fsdp(path: str) -> Foreign:
    """Open such a folder as a source: {"model": ..., "optimizer": ...}."""
    objects = ObjectsLoader()
    state: dict[Any, Any] = {}
    reads: dict[int, ReadBox] = {}
    identity = []
    parts = fsdp_folders(path)
    for name in parts:
        part = DcpCheckpoint(os.path.join(path, name))
        entries, part_reads = part.state(objects)
        state.update(entries)
        reads.update(part_reads)
        identity.append(part.identity)
    origin = Origin(
        format="DCP directories of FSDP",
        writer=writer_of(path),
        left_out={**left_beside(path, parts), **objects.left_out},
        changed=objects.changed,
        files=tuple(parts),
    )
    return foreign(path, "DCP", state, reads=reads, identity=identity, origin=origin)


def _nested(
    flat: dict[str, Any], paths: dict[str, tuple[str | int, ...]], left_out: dict[str, str]
) -> dict[Any, Any]:
    """Build the nested state from the names of DCP, without StandIns.

    `paths` have keys of dicts (str) and indices of lists (int).
    """
    root: dict[Any, Any] = {}
    for name, value in flat.items():
        *above, last = paths.get(name, (name,))
        node = root
        for key in above:
            node = node.setdefault(key, {})
        node[last] = value
    items = {key: _with_lists(node, key, left_out) for key, node in root.items()}
    return {key: item for key, item in items.items() if not isinstance(item, StandIn)}


def _with_lists(node: Any, name: str, left_out: dict[str, str]) -> Any:
    """Return a node with its lists and without its StandIns; a StandIn for a list with one."""
    if type(node) is not dict:
        return node
    items = {key: _with_lists(item, f"{name}.{key}", left_out) for key, item in node.items()}
    if items and all(isinstance(key, int) for key in items):
        if lost := next((item for item in items.values() if isinstance(item, StandIn)), None):
            left_out[name] = "an item of this list is left out"
            return lost
        count = max(items) + 1
        if min(items) < 0 or count > 2 * len(items) + _MOST_ABSENT:
            raise NotACheckpointError(
                "A list of this DCP checkpoint lacks most of its items",
                tensor=name,
                expected=f"{count} items",
                actual=f"{len(items)} items",
                remedy="load another checkpoint",
            )
        return [items.get(index, {}) for index in range(count)]  # DCP omits empty dicts
    items = {key: item for key, item in items.items() if not isinstance(item, StandIn)}
    if "state" in items and "param_groups" in items:
        items["state"] = _with_indices(items["state"], items["param_groups"])
    if "milestones" in items and "last_epoch" in items:
        items["milestones"] = _with_epochs(items["milestones"])
    return items


def _with_indices(states: Any, groups: Any) -> Any:
    """Return the state of an optimizer with the indices of its groups as keys, which DCP turned
    into texts. An optimizer ignores the state of a key that it does not know."""
    if type(states) is not dict or type(groups) is not list:
        return states
    params = [group.get("params") for group in groups if isinstance(group, dict)]
    lists = [each for each in params if isinstance(each, (list, tuple))]
    indices = {str(index): index for each in lists for index in each if type(index) is int}
    return {indices.get(key, key): item for key, item in states.items()}


def _with_epochs(milestones: Any) -> Any:
    """Return the milestones of MultiStepLR as it keeps them: with numbers as keys, which DCP turned
    into texts. It would never find the current epoch among texts."""
    if type(milestones) is not dict or not all(str(key).isdecimal() for key in milestones):
        return milestones
    return Counter({int(key): count for key, count in milestones.items()})
