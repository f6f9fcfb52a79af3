"""An open checkpoint: look into it, read parts of it, verify it, build its state anew."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from shardckpt.errors import CorruptionError
from shardckpt.format.dtypes import DTYPES
from shardckpt.format.entries import Manifest, TensorEntry
from shardckpt.format.lazy_manifest import Outline
from shardckpt.format.manifest import check_text, from_bytes
from shardckpt.format.typed_json import TensorRef
from shardckpt.io.devices import free_memory
from shardckpt.io.gc_pause import collector_paused
from shardckpt.loading.lazy_tensor import MappedFiles, disk_tensor
from shardckpt.loading.shard_reader import read_all, read_box
from shardckpt.maintenance.verify import verify_shards
from shardckpt.plan.device_map import DeviceMap, resolve_device_map
from shardckpt.plan.page_cache_policy import ALWAYS
from shardckpt.plan.read_plan import plan_reads
from shardckpt.reports import VerifyReport
from shardckpt.state.local_chunks import LocalChunk
from shardckpt.state.materialize import Builder
from shardckpt.state.saved_tree import Rename, SavedState, Select
from shardckpt.storage.base import CheckpointFiles, Storage

__all__ = ["Checkpoint", "SavedTensor"]


class SavedTensor:
    """A tensor in a checkpoint, not read yet: `shape`, `dtype`, `size_bytes`, and what indexing
    reads.

    `tensor[...]`, `tensor[0:8]`, `tensor[3, :, 5:7]` return new CPU tensors, and read only
    the blocks that hold the asked for part; those are verified. Slices have step 1.
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
        """The numbers of the shards that hold it."""
        return frozenset(self._checkpoint._described(self._source)[1].chunks[:, 0].tolist())

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Read a part, as a new CPU tensor of the shape that indexing a tensor would give."""
        box = _box(index, tuple(self.shape))
        if box is None:
            torch.empty(self.shape, device="meta")[index]  # an error of torch's own, if it is one
            raise IndexError(
                f"{self.name}: an index of integers, slices of step 1 and ... is expected, "
                f"found {index!r}; read the whole with [...] and index that"
            )
        offsets, sizes, shape = box
        return self._checkpoint.read_box(self._source, offsets, sizes).reshape(shape)


def _box(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...] | None:
    """Offsets and sizes of the part that an index means, and the shape that it comes in; None for
    an index that means none."""
    parts = list(index) if isinstance(index, tuple) else [index]
    dots = [at for at, part in enumerate(parts) if part is Ellipsis]
    if dots:  # of a second one nothing below can be made
        parts[dots[0] : dots[0] + 1] = [slice(None)] * (len(shape) - len(parts) + 1)
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
    return isinstance(node, TensorRef) and node.kind != "per_rank"


class Checkpoint(AbstractContextManager["Checkpoint"], Mapping[str, Any]):
    """An open checkpoint, as a mapping of names; a context manager that closes its files.

    `checkpoint[name]` is a SavedTensor (nothing is read), or the value. Names join the keys
    of the saved state with dots. Not collective. `manifest` tells everything else.

    Opening checks the digest of the manifest. Tensors asked for by name are found in its text;
    whatever needs more parses all of it, and checks every rule of the format.
    """

    def __init__(self, path: str, *, storage: Storage) -> None:
        self._files = storage.open(path)
        try:
            self._text = self._files.manifest()
            check_text(self._text, path=self._files.path)
        except BaseException:
            self._files.close()
            raise

    @functools.cached_property
    def manifest(self) -> Manifest:
        """All of the manifest. Raises CorruptionError if it breaks a rule of the format."""
        with collector_paused():
            return from_bytes(self._text, path=self.path)

    @functools.cached_property
    def _outline(self) -> Outline:
        return Outline(self._text, path=self.path)

    @functools.cached_property
    def _saved(self) -> SavedState:
        with collector_paused():
            return SavedState(self.manifest)

    @property
    def path(self) -> str:
        """Where the checkpoint lies."""
        return self._files.path

    @property
    def files(self) -> CheckpointFiles:
        """Its files, for tools that read shards by themselves."""
        return self._files

    def __repr__(self) -> str:
        return f"Checkpoint({self.path!r}, {len(self)} entries)"

    def __getitem__(self, name: str) -> Any:
        """The tensor or value of a name; a list with every rank's for a PerRank entry."""
        if "manifest" not in vars(self) and (source := self._outline.find(name)) is not None:
            return SavedTensor(self, name, source)
        if name not in self._saved.leaves:
            raise KeyError(name)
        node = self._saved.leaves[name]
        if _is_array(node):
            return SavedTensor(self, name, node.name)
        return self.read(lambda builder: builder.build(node, name))

    def tensors(self) -> dict[str, SavedTensor]:
        """All tensors and arrays by name, none of them read."""
        return {name: self[name] for name, node in self._saved.leaves.items() if _is_array(node)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._saved.leaves)

    def __len__(self) -> int:
        return len(self._saved.leaves)

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Tensors on "disk" that were made from them stay usable."""
        self._files.close()

    def verify(
        self,
        *,
        subset: tuple[int, int] = (1, 1),
        progress: Callable[[int], None] = lambda checked_bytes: None,
    ) -> None:
        """Read every shard and check every block, and that shards and manifest agree.

        `subset` (n, t): the n-th of t parts; t such scrubs check everything. `progress` is called,
        from several threads, with the bytes checked since its last call. Raises CorruptionError
        that names every damaged file and the tensors hurt, and tells a single flipped bit.
        """
        self.survey(subset=subset, progress=progress).raise_damage()

    def survey(
        self,
        *,
        subset: tuple[int, int] = (1, 1),
        progress: Callable[[int], None] = lambda checked_bytes: None,
    ) -> VerifyReport:
        """As verify, but damage is told in the report: which tensors are hurt, which whole."""
        return verify_shards(self._files, self.manifest, subset=subset, progress=progress)

    def load_state(
        self, *, device_map: DeviceMap = "cpu", keys: Select = None, rename: Rename = None
    ) -> Any:
        """Build the saved state anew; see shardckpt.load_state."""
        saved = self._saved
        if keys is not None or rename is not None:
            saved = SavedState(self.manifest, keys=keys, rename=rename)
        mapped = functools.cache(lambda: MappedFiles(self._files))
        # Saved tensor -> the first of its names: tied ones go to one device.
        sources: dict[str, str] = {}
        for name, node in saved.leaves.items():
            if _is_array(node):
                sources.setdefault(node.name, name)
        tensors = {name: self.manifest.tensors[source] for source, name in sources.items()}
        sizes = {name: entry.size_bytes for name, entry in tensors.items()}
        where = resolve_device_map(device_map, sizes, free_memory())

        def new(name: str, source: str, entry: TensorEntry) -> tuple[torch.Tensor, bool]:
            device = where(name) if name in tensors else torch.device("cpu")
            dtype = DTYPES[entry.dtype]
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
        """What `build` makes with a Builder, its tensors read."""
        pending: list[tuple[TensorEntry, LocalChunk]] = []
        builder = Builder(saved or self._saved, pending, **({"new": new} if new else {}))
        with collector_paused():
            value = build(builder)
            reads = plan_reads(pending)
        read_all(self._files, self.manifest, reads, past_cache=ALWAYS)
        return value

    def read_box(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """The box (offsets, sizes) of a tensor of the manifest, as a new CPU tensor."""
        manifest, entry = self._described(name)
        try:
            return read_box(self._files, manifest, entry, offsets, sizes)
        except CorruptionError:
            if manifest is self.manifest:
                raise
            # Again, to name every tensor that the damage affects.
            return read_box(self._files, self.manifest, entry, offsets, sizes)

    def _described(self, name: str) -> tuple[Manifest | Outline, TensorEntry]:
        """A tensor of the manifest, and what describes it: all of the manifest, if that is parsed
        or needs to be."""
        if "manifest" not in vars(self) and (entry := self._outline.tensor(name)) is not None:
            return self._outline, entry
        return self.manifest, self.manifest.tensors[name]
