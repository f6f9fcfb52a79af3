"""An open checkpoint: list its entries, read parts of tensors, verify, build the saved state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from shardckpt.errors import CorruptionError, StateError
from shardckpt.format.dtypes import DTYPES
from shardckpt.format.entries import Manifest, TensorEntry
from shardckpt.format.lazy_manifest import LazyManifest
from shardckpt.format.typed_json import TensorRef
from shardckpt.io.devices import free_memory
from shardckpt.io.gc_pause import collector_paused, ends_pauses
from shardckpt.loading.lazy_tensor import MappedFiles, disk_tensor
from shardckpt.loading.shard_reader import read_all, read_box
from shardckpt.maintenance.verify import verify_shards
from shardckpt.plan.device_map import DeviceMap, resolve_device_map
from shardckpt.plan.page_cache_policy import ALWAYS
from shardckpt.plan.read_plan import plan_reads
from shardckpt.reports import CheckpointMetadata, TensorMetadata, VerifyReport
from shardckpt.state.derived import DerivedEntry, expanded
from shardckpt.state.local_chunks import LocalChunk
from shardckpt.state.materialize import Builder
from shardckpt.state.saved_tree import Renaming, SavedState, Select
from shardckpt.storage.opened import OpenedCheckpoint
from shardckpt.transforms import Transforms, transformed

__all__ = ["Checkpoint", "SavedTensor"]


class SavedTensor:
    """A lazy tensor of an open checkpoint. Indexing reads, and verifies, the blocks of that part.

    `tensor[...]` reads all of it; `tensor[0:8]` and `tensor[3, :, 5:7]` read a part. Indices are
    integers, slices of step 1 and `...`. The result is a new CPU tensor. Not collective.

    Args:
        checkpoint: The open checkpoint. `checkpoint[name]` creates the SavedTensor.
        name: The name of the entry.
        source: The name of the tensor in the manifest. Tied tensors share one.

    Attributes:
        name: The name of the entry.
        shape: The global shape.
        dtype: The saved dtype.
        size_bytes: The bytes of the full tensor.

    Example:
        >>> import torch, shardckpt
        >>> _ = shardckpt.save({"weight": torch.arange(6.0).reshape(3, 2)}, "run/step-1")
        >>> with shardckpt.open_checkpoint("run/step-1") as checkpoint:
        ...     weight = checkpoint["weight"]
        ...     weight.shape, weight[1]
        (torch.Size([3, 2]), tensor([2., 3.]))
    """

    def __init__(self, checkpoint: Checkpoint, name: str, source: str) -> None:
        _, entry = checkpoint._described(source)
        self.name = name
        self.shape = torch.Size(entry.shape)
        self.dtype = DTYPES[entry.dtype]
        self.size_bytes = entry.size_bytes
        self._checkpoint = checkpoint
        self._source = source

    def __repr__(self) -> str:
        return f"SavedTensor({self.name!r}, {self.dtype}, shape={list(self.shape)})"

    @property
    def shards(self) -> frozenset[int]:
        """The numbers of the shards that hold this tensor."""
        return frozenset(self._checkpoint._described(self._source)[1].chunks[:, 0].tolist())

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Read a part as a new CPU tensor, with the shape that indexing a tensor gives."""
        box = _box(index, tuple(self.shape))
        if box is None:
            torch.empty(self.shape, device="meta")[index]  # raises torch's error, if any
            raise IndexError(
                f"{self.name}: expected integers, slices of step 1 and ... as an index, got "
                f"{index!r}. Read the full tensor with [...] and index the result."
            )
        offsets, sizes, shape = box
        return self._checkpoint.read_box(self._source, offsets, sizes).reshape(shape)


def _box(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...] | None:
    """Return offsets and sizes of the box that an index selects, and the shape of the result.

    Returns None for an index that selects no box.
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    ellipses = [at for at, part in enumerate(parts) if part is Ellipsis]
    if ellipses:  # a second ellipsis fails below
        parts[ellipses[0] : ellipses[0] + 1] = [slice(None)] * (len(shape) - len(parts) + 1)
    parts += [slice(None)] * (len(shape) - len(parts))
    if len(parts) > len(shape):
        return None
    offsets, sizes, kept = [], [], []
    for part, size in zip(parts, shape, strict=True):
        if isinstance(part, slice):
            start, stop, step = part.indices(size)
            if step != 1:
                return None
            offsets.append(start)
            sizes.append(max(0, stop - start))
            kept.append(sizes[-1])
        elif isinstance(part, int) and not isinstance(part, bool) and -size <= part < size:
            offsets.append(part % size)
            sizes.append(1)
        else:
            return None
    return tuple(offsets), tuple(sizes), tuple(kept)


def _is_array(node: Any) -> bool:
    return isinstance(node, TensorRef) and node.ref_type != "per_rank"


class Checkpoint(OpenedCheckpoint, Mapping[str, Any]):
    """An open checkpoint: a mapping of names to lazy tensors and values, and a context manager.

    Names join the keys of the saved state with dots. `checkpoint[name]` is a SavedTensor, which
    reads nothing until it is indexed, or the value. No method is collective.

    Opening verifies the digest of the manifest. Access to a tensor by its name searches the text of
    the manifest. Every other access parses the manifest and checks that it follows the format.

    Args:
        path: The checkpoint; see `open_checkpoint`.
        storage: The storage of the checkpoint.

    Attributes:
        path: The path of the checkpoint.
        manifest: The parsed manifest.
        files: The files, for tools that read shards themselves.

    Raises:
        CheckpointError: The checkpoint can't be read; see `open_checkpoint`.

    Example:
        >>> import torch, shardckpt
        >>> _ = shardckpt.save({"weight": torch.ones(3), "step": 7}, "run/step-7")
        >>> with shardckpt.open_checkpoint("run/step-7") as checkpoint:
        ...     list(checkpoint), checkpoint["step"], checkpoint["weight"].shape
        (['weight', 'step'], 7, torch.Size([3]))
    """

    @functools.cached_property
    def _lazy_manifest(self) -> LazyManifest:
        return LazyManifest(self._text, path=self.path)

    @functools.cached_property
    def _saved(self) -> SavedState:
        with collector_paused():
            return SavedState(self.manifest)

    def __repr__(self) -> str:
        return f"Checkpoint({self.path!r}, {len(self)} entries)"

    def __getitem__(self, name: str) -> Any:
        """Return the tensor or value of a name. A PerRank entry is a list of the values of all
        ranks.
        """
        if "manifest" not in vars(self) and (source := self._lazy_manifest.find(name)) is not None:
            return SavedTensor(self, name, source)
        if name not in self._saved.leaves:
            raise KeyError(f"{name}: not in {self.path}; list(checkpoint) returns the names")
        node = self._saved.leaves[name]
        if _is_array(node):
            return SavedTensor(self, name, node.name)
        return self.read(lambda builder: builder.build(node, name))

    def tensors(self) -> dict[str, SavedTensor]:
        """List all tensors and arrays. Nothing is read.

        Returns:
            The lazy tensors by name.
        """
        return {name: self[name] for name, node in self._saved.leaves.items() if _is_array(node)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._saved.leaves)

    def __len__(self) -> int:
        return len(self._saved.leaves)

    def close(self) -> None:
        """Close the files. Tensors that `load_state` placed on "disk" remain usable."""
        self._files.close()

    def metadata(self) -> CheckpointMetadata:
        """Describe the checkpoint: names, shapes, dtypes, sizes. No tensor is read.

        Returns:
            The description.

        Raises:
            CorruptionError: The manifest violates the format.
        """
        manifest = self.manifest
        tensors = self.tensors()
        return CheckpointMetadata(
            path=self.path,
            format_version=manifest.format_version,
            checkpoint_id=manifest.checkpoint_id,
            created=manifest.created,
            library=manifest.library,
            world_size=manifest.world_size,
            shards={shard.name: shard.size_bytes for shard in manifest.shards},
            tensors={
                name: TensorMetadata(tuple(tensor.shape), tensor.dtype)
                for name, tensor in tensors.items()
            },
            values=tuple(name for name in self if name not in tensors),
            notes=dict(manifest.notes),
            total_bytes=sum(shard.size_bytes for shard in manifest.shards) + len(self._text),
        )

    def verify(
        self,
        *,
        strict: bool = True,
        subset: tuple[int, int] = (1, 1),
        progress: Callable[[int], None] = lambda checked_bytes: None,
    ) -> VerifyReport:
        """Read every block and compare it with its digest, and shards with the manifest.

        Args:
            strict: Raise an error if a shard is corrupted. With strict=False, the report lists the
                corrupted tensors and the errors.
            subset: (n, t) verifies the n-th of t parts. All t parts together verify everything.
            progress: Called with the bytes verified since its last call, from several threads.

        Returns:
            The bytes verified, and the names of the corrupted and the intact tensors.

        Raises:
            CorruptionError: A shard or the manifest is corrupted. The error names the files, the
                tensors, and each single flipped bit.
            StateError: `subset` is invalid.
        """
        report = verify_shards(self._files, self.manifest, subset=subset, progress=progress)
        if strict:
            report.raise_if_corrupted()
        return report

    @ends_pauses
    def load_state(
        self,
        *,
        device_map: DeviceMap = "cpu",
        keys: Select = None,
        rename: Renaming = None,
        transforms: Transforms | None = None,
        strict: bool = True,
    ) -> Any:
        """Build the saved state without a template.

        Args:
            device_map: See `shardckpt.load_state`.
            keys: See `shardckpt.load`.
            rename: See `shardckpt.load`.
            transforms: See `shardckpt.load`. Transformed tensors can't stay on "disk".
            strict: See `shardckpt.load_state`.

        Returns:
            The state, with the structure that was saved.

        Raises:
            CorruptionError: A shard or the manifest is corrupted.
            LoadMismatchError: `strict`, and `keys` or `rename` has a name that no entry has.
            StateError: An argument is invalid.
        """
        saved = self._saved
        if keys is not None or rename is not None or transforms:
            manifest = transformed(self.manifest, transforms, path=self.path)
            saved = SavedState(manifest, keys=keys, rename=rename)
            if strict:
                saved.check_used(path=self.path)
        mapped = functools.cache(lambda: MappedFiles(self._files))
        # Saved tensor -> its first name. Tied tensors go to one device.
        sources: dict[str, str] = {}
        for name, node in saved.leaves.items():
            if _is_array(node):
                sources.setdefault(node.name, name)
        tensors = {name: saved.manifest.tensors[source] for source, name in sources.items()}
        sizes = {name: entry.size_bytes for name, entry in tensors.items()}
        where = resolve_device_map(device_map, sizes, free_memory())

        def new(name: str, source: str, entry: TensorEntry) -> tuple[torch.Tensor, bool]:
            device = where(name) if name in tensors else torch.device("cpu")
            dtype = DTYPES[entry.dtype]
            if device == "disk" and isinstance(entry, DerivedEntry):
                raise StateError(
                    "A transformed tensor can't stay on disk",
                    path=self.path,
                    tensor=name,
                    remedy="choose another device for it in device_map",
                )
            if device == "disk":
                return disk_tensor(mapped(), self.manifest, name, entry), False
            device = torch.device(device)
            return torch.empty(entry.shape, dtype=dtype, device=device), device.type != "meta"

        return self.read(lambda builder: builder.build(saved.tree, ""), saved=saved, new=new)

    def read(
        self,
        build: Callable[[Builder], Any],
        *,
        saved: SavedState | None = None,
        new: Any = None,
    ) -> Any:
        """Build a part of the saved state, and read its tensors.

        Args:
            build: Called with a Builder; returns the part, with tensors that are not read yet.
            saved: The saved state, with its selected names; by default all of it.
            new: Creates a tensor, and returns whether it must be read; see Builder.

        Returns:
            The result of `build`, with its tensors read.
        """
        pending: list[tuple[TensorEntry, LocalChunk]] = []
        builder = Builder(saved or self._saved, pending, **({"new": new} if new else {}))
        # The tensors outlive an inference_mode() of the caller.
        with collector_paused(), torch.inference_mode(False):
            value = build(builder)
            wanted, constants = expanded(pending)
            reads = plan_reads(wanted)
        read_all(self._files, self.manifest, reads, past_cache=ALWAYS)
        for write in constants:
            write()
        return value

    def read_box(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """Read a box of a tensor.

        Args:
            name: The name of the tensor in the manifest.
            offsets: The offset of the box in each dimension, in elements.
            sizes: The size of the box in each dimension, in elements.

        Returns:
            A new CPU tensor of the shape `sizes`.

        Raises:
            CorruptionError: A block of the box is corrupted.
        """
        manifest, entry = self._described(name)
        try:
            return read_box(self._files, manifest, entry, offsets, sizes)
        except CorruptionError:
            if manifest is self.manifest:
                raise
            # Read again, with the full manifest, so that the error names every affected tensor.
            return read_box(self._files, self.manifest, entry, offsets, sizes)

    def _described(self, name: str) -> tuple[Manifest | LazyManifest, TensorEntry]:
        """Return the entry of a tensor, with the outline, or with the manifest if it is parsed or
        needed.
        """
        if "manifest" not in vars(self) and (entry := self._lazy_manifest.tensor(name)) is not None:
            return self._lazy_manifest, entry
        return self.manifest, self.manifest.tensors[name]
