"""ShardReader: DCP's StorageReader over a shardckpt checkpoint."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.graph import increment_version
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from shardckpt.errors import ShardckptError, StateError
from shardckpt.format.dtypes import DTYPES, memory_view
from shardckpt.format.entries import Manifest, TensorEntry
from shardckpt.format.typed_json import TensorRef
from shardckpt.integrations.dcp.planners import (
    ReshardLoadPlanner,
    ShardMetadata,
    UnreadableMetadata,
)
from shardckpt.loading.agreement import open_manifest
from shardckpt.loading.shard_reader import read_all
from shardckpt.plan.read_plan import plan_reads
from shardckpt.state.local_chunks import LocalChunk, check_dense
from shardckpt.state.matching import DtypePolicy, casts
from shardckpt.state.materialize import Builder
from shardckpt.state.mismatches import Mismatches
from shardckpt.state.saved_tree import SavedState
from shardckpt.storage.base import CheckpointFiles, Storage
from shardckpt.storage.resolve import resolve
from shardckpt.torch_compat import dcp_version

__all__ = ["ShardReader", "dcp_entries"]


class ShardReader(StorageReader):
    """Reads a checkpoint of shardckpt for dcp.load, with any world size. Verifies what it reads.

    Collective: every rank passes one to dcp.load. It works with DCP's planners, with
    ReshardLoadPlanner and with your own.

    Args:
        path: The checkpoint. Leave it out if you pass `checkpoint_id` to dcp.load.
        dtype: "cast" converts saved dtypes to those of the state. With "strict", here and in
            ReshardLoadPlanner, another dtype raises LoadMismatchError.
        storage: See `shardckpt.save`.

    Attributes:
        checkpoint_id: The path.
        load_id: The id of this load, as in the `storage_meta` of the metadata.

    Raises:
        StateError: The path is invalid.

    Example:
        >>> import torch, shardckpt
        >>> import torch.distributed.checkpoint as dcp
        >>> _ = shardckpt.save({"weight": torch.ones(3)}, "run/step-1")
        >>> state = {"weight": torch.zeros(3)}
        >>> dcp.load(state, storage_reader=shardckpt.ShardReader("run/step-1"))
        >>> state["weight"]
        tensor([1., 1., 1.])
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        dtype: DtypePolicy = "strict",
        storage: Storage | None = None,
    ) -> None:
        self.checkpoint_id: str | None = None
        self.cast = casts(dtype)
        self.storage = storage
        self.load_id = uuid.uuid4().hex
        self._opened: tuple[CheckpointFiles, Manifest] | None = None
        self._failure: ShardckptError | None = None
        if path is not None:
            self._find(path)
        self._saved: SavedState | None = None
        self._nodes: dict[str, Any] = {}  # the saved leaf of each name in DCP

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """See StorageReader.reset."""
        if checkpoint_id:
            self._find(checkpoint_id)
        self.load_id = uuid.uuid4().hex
        self._close()

    def _find(self, path: str | os.PathLike[str]) -> None:
        self._place = resolve(path, self.storage)
        self.checkpoint_id = self._place.path

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """See StorageReader.read_metadata. Lists every tensor with its chunks, and every value."""
        if "rank" in kwargs and self._failure is not None:
            # DCP drops the first error, and asks for metadata of this rank alone.
            return UnreadableMetadata(self._failure)
        try:
            return self._read_metadata()
        except ShardckptError as error:
            self._failure = error
            raise

    def _read_metadata(self) -> Metadata:
        self._failure = None
        if not self.checkpoint_id:
            raise StateError(
                "ShardReader has no path",
                remedy="call ShardReader(path), or dcp.load(..., checkpoint_id=path)",
            )
        self._close()
        self._opened = open_manifest(*self._place, newest=True)
        manifest = self._opened[1]
        saved = self._saved = SavedState(manifest)
        described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        paths: dict[str, tuple[Any, ...]] = {}
        self._nodes = {}
        for path, node in dcp_entries(saved.tree, ()):
            # For DCP the name of an empty dict would show a checkpoint of PyTorch 2.3.
            if isinstance(node, dict) and not node:
                continue
            name = ".".join(map(str, path))
            self._nodes[name] = node
            paths[name] = path
            if isinstance(node, TensorRef) and node.ref_type == "tensor":
                described[name] = _describe(manifest.tensors[node.name])
            else:
                described[name] = BytesStorageMetadata()
        metadata = ShardMetadata(
            state_dict_metadata=described,
            planner_data=paths,
            storage_data={},
            storage_meta=StorageMeta(self.checkpoint_id, manifest.checkpoint_id, self.load_id),
            saved=saved,
            cast=self.cast,
        )
        metadata.version = dcp_version()
        return metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """See StorageReader.set_up_storage_reader. read_metadata has opened the checkpoint."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """See StorageReader.prepare_local_plan. Returns the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """See StorageReader.prepare_global_plan. Returns the plans unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """See StorageReader.read_data."""
        assert self._opened is not None, "read_metadata comes first"
        files, manifest = self._opened
        if isinstance(planner, ReshardLoadPlanner):
            read_all(files, manifest, plan_reads(planner.matched.reads))
            planner.matched.place()
        else:
            self._read_items(plan, planner)
        self._close()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_items(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        assert self._opened is not None
        assert self._saved is not None
        files, manifest = self._opened
        wanted: list[tuple[TensorEntry, LocalChunk]] = []
        tensors, loaded = [], []
        mismatches = Mismatches()
        builder = Builder(self._saved, wanted)
        for item in plan.items:
            node = self._nodes[item.storage_index.fqn]
            if item.type == LoadItemType.BYTE_IO:
                loaded.append((item, builder.build(node, item.storage_index.fqn)))
                continue
            target = planner.resolve_tensor(item)
            check_dense(target, name=item.dest_index.fqn)
            entry = manifest.tensors[node.name]
            chunk = item.storage_index.offset or (0,) * len(entry.shape)
            offsets = tuple(a + b for a, b in zip(chunk, item.storage_offsets, strict=True))
            data = memory_view(target.detach())
            wanted.append((entry, LocalChunk(offsets, tuple(item.lengths), data)))
            tensors.append((item, target))
            if target.dtype != DTYPES[entry.dtype] and not self.cast:
                dtypes = str(target.dtype), str(DTYPES[entry.dtype])
                mismatches.wrong_dtype.append((item.dest_index.fqn, *dtypes))
        error = mismatches.error(files.path)
        if error is not None:
            raise error
        read_all(files, manifest, plan_reads(wanted))
        increment_version([target for _, target in tensors if not target.is_inference()])
        for item, target in tensors:
            planner.commit_tensor(item, target)
        for item, value in loaded:
            stream = io.BytesIO()
            torch.save(value, stream)  # planners expect bytes of torch.save
            stream.seek(0)
            planner.load_bytes(item, stream)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """See StorageReader.validate_checkpoint_id."""
        try:
            return bool(resolve(checkpoint_id))
        except StateError:
            return False

    def _close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened[0].close()


def _describe(entry: TensorEntry) -> TensorStorageMetadata:
    dims = len(entry.shape)
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=DTYPES[entry.dtype]),
        size=torch.Size(entry.shape),
        chunks=[
            ChunkStorageMetadata(torch.Size(row[3 : 3 + dims]), torch.Size(row[3 + dims :]))
            for row in entry.chunks.tolist()
        ],
    )


def dcp_entries(node: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the leaves of a saved tree with their paths in DCP.

    A list or tuple without tensors or dicts is one value, and so is an empty dict.
    """
    if isinstance(node, dict) and node:
        items: Any = ((key, value) for key, value in node.items())
    elif isinstance(node, list) and any(map(_is_inner, node)):
        items = enumerate(node)
    else:
        yield path, node
        return
    for key, value in items:
        yield from dcp_entries(value, (*path, key if isinstance(node, list) else str(key)))


def _is_inner(node: Any) -> bool:
    if isinstance(node, list):
        return any(map(_is_inner, node))
    return isinstance(node, (dict, TensorRef))
