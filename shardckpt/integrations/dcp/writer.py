"""ShardWriter: DCP's StorageWriter over shardckpt's format and commit."""

from __future__ import annotations

import gc
import io
import os
import threading
import weakref
import zipfile
from typing import Any

import msgspec
import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from shardckpt.checkpoint import Checkpoint
from shardckpt.coordination.process_group import group_for_dcp
from shardckpt.coordination.resolve import check_launcher
from shardckpt.errors import (
    CheckpointBusyError,
    CoverageError,
    RankMismatchError,
    StateError,
    UnsupportedLeafError,
)
from shardckpt.format import typed_json as values
from shardckpt.format.dtypes import dtype_name, memory_view
from shardckpt.format.manifest import encode_tensors
from shardckpt.integrations.dcp.planners import ShardSavePlanner, ShardStorageMeta
from shardckpt.plan.consistency import compare_replicas
from shardckpt.plan.local_plan import ChunkTable, TensorSpec, flat_boxes, pad_boxes, widen_boxes
from shardckpt.plan.plan_cache import KnownPlan
from shardckpt.plan.save_plan import check_coverage, layout_order
from shardckpt.plan.shard_layout import tensor_entries
from shardckpt.saving.agreement import new_id
from shardckpt.saving.commit import commit_manifest, file_table
from shardckpt.saving.incremental import Base, check_verify_base, open_base
from shardckpt.saving.rank_writer import RankShards, ShardResult, write_rank
from shardckpt.saving.replicas import replica_digests
from shardckpt.state.file_groups import MAIN
from shardckpt.state.local_chunks import check_dense
from shardckpt.state.module_state import instances_in
from shardckpt.storage.base import Storage, WriteTransaction
from shardckpt.storage.resolve import Location, resolve
from shardckpt.torch_compat import caches_plans

__all__ = ["ShardWriter", "check_comparable"]


class _Written(msgspec.Struct, array_like=True):
    """The message of a rank that wrote the items of another planner than ShardSavePlanner."""

    result: ShardResult
    specs: tuple[TensorSpec, ...]
    chunks: bytes
    values: dict[str, Any]


_writers: weakref.WeakSet[ShardWriter] = weakref.WeakSet()
"""The writers that have begun a save."""


class ShardWriter(StorageWriter):
    """Writes a checkpoint of shardckpt for dcp.save and dcp.async_save, atomically.

    Collective: every rank passes one to dcp.save. With ShardSavePlanner the guarantees of
    shardckpt.save hold. Other planners choose the items to write; before the commit the writer
    checks that these cover every tensor exactly once. Under mpirun and srun, create the writer on
    every rank: it calls init_from_mpi() unless a process group exists.

    Args:
        path: See `shardckpt.save`. Leave it out if you pass `checkpoint_id` to dcp.save.
        overwrite: Replace a checkpoint at the path.
        check_replicas: See `shardckpt.save`. Needs ShardSavePlanner.
        base: See `shardckpt.save`.
        verify_base: See `shardckpt.save`.
        storage: See `shardckpt.save`.

    Attributes:
        checkpoint_id: The path.
        save_id: After a save, the id of the checkpoint.

    Raises:
        StateError: The path is invalid.
        CoordinationError: The ranks are not connected.

    Example:
        >>> import torch, shardckpt
        >>> import torch.distributed.checkpoint as dcp
        >>> writer = shardckpt.ShardWriter("run/step-1")
        >>> _ = dcp.save(
        ...     {"weight": torch.ones(3)},
        ...     storage_writer=writer,
        ...     planner=shardckpt.ShardSavePlanner(),
        ... )
        >>> shardckpt.load_state("run/step-1")
        {'weight': tensor([1., 1., 1.])}
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        overwrite: bool = False,
        check_replicas: bool = False,
        base: str | os.PathLike[str] | Checkpoint | None = None,
        verify_base: bool = False,
        storage: Storage | None = None,
    ) -> None:
        self.checkpoint_id: str | None = None
        self.save_id: str | None = None
        self.storage = storage
        if path is not None:
            self._find(path)
        group_for_dcp(self.checkpoint_id)
        self.overwrite = overwrite
        self.check_replicas = check_replicas
        check_verify_base(base, verify_base=verify_base)
        self.base: Location | Checkpoint | None
        if base is None or isinstance(base, Checkpoint):
            self.base = base
        else:
            self.base = resolve(base, storage, fixed=True)
        self.verify_base = verify_base
        self._transaction: WriteTransaction | None = None
        self._planner: SavePlanner | None = None
        self._meta = ShardStorageMeta()
        self._rank = 0
        self._thread = 0  # that has begun the last save

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """See StorageWriter.reset."""
        if checkpoint_id:
            self._find(checkpoint_id)

    def _find(self, path: str | os.PathLike[str]) -> None:
        self._place = resolve(path, self.storage, fixed=True)
        self.checkpoint_id = self._place.path

    def storage_meta(self) -> StorageMeta:
        """See StorageWriter.storage_meta. ShardSavePlanner accepts no other writer."""
        self._meta = ShardStorageMeta(checkpoint_id=self.checkpoint_id)
        return self._meta

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """See StorageWriter.set_up_storage_writer. (DCP requires the name `kwargs`.)"""
        check_launcher()
        self._rank = int(kwargs.get("rank", 0))
        self._meta.rank = self._rank
        if not self.checkpoint_id:
            raise StateError(
                "ShardWriter has no path",
                rank=self._rank,
                remedy="call ShardWriter(path), or dcp.save(..., checkpoint_id=path)",
            )
        if not kwargs.get("use_collectives", True):
            raise StateError(
                "ShardWriter needs a global plan",
                rank=self._rank,
                expected="use_collectives=True",
                actual="use_collectives=False",
                remedy="leave use_collectives at its default",
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """See StorageWriter.prepare_local_plan. Returns the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """See StorageWriter.prepare_global_plan. Begins the checkpoint on the coordinator."""
        storage, path = self._place
        identity = new_id()
        self._begin_in_thread()
        try:
            transaction = storage.begin(path, checkpoint_id=identity, overwrite=self.overwrite)
        except CheckpointBusyError:
            gc.collect()  # a writer whose save has failed may be in a cycle with its error
            transaction = storage.begin(path, checkpoint_id=identity, overwrite=self.overwrite)
        self._transaction = transaction
        # DCP does not tell the writer about a failed save: remove its files with the writer.
        weakref.finalize(self, transaction.abandon)
        order = (transaction.token, len(plans))
        return [
            SavePlan(plan.items, storage_data=(rank, *order), planner_data=plan.planner_data)
            for rank, plan in enumerate(plans)
        ]

    def _begin_in_thread(self) -> None:
        """Abandon the saves of this thread to this path, which have failed if they did not end."""
        self.abandon()
        self._thread = threading.get_ident()
        begun = (self._thread, self.checkpoint_id)
        for writer in [each for each in _writers if (each._thread, each.checkpoint_id) == begun]:
            writer.abandon()
        _writers.add(self)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """See StorageWriter.write_data. On return the shard of this rank is durable."""
        check_comparable(planner, check_replicas=self.check_replicas, rank=self._rank)
        if caches_plans(planner):
            raise StateError(
                "ShardWriter does not support DCP's cache of plans, which ignores dtypes",
                rank=self._rank,
                remedy="pass enable_plan_caching=False, or use ShardSavePlanner",
            )
        rank, token, world_size = plan.storage_data
        self.save_id = token
        self._planner = planner
        if self._transaction is None:
            transaction = self._place.storage.join(self._place.path, token=token)
        else:
            transaction = self._transaction
        try:
            with open_base(self.base, verify=self.verify_base) as base:
                if isinstance(planner, ShardSavePlanner):
                    written = self._write_planned(
                        planner, transaction, base, rank=rank, world_size=world_size
                    )
                else:
                    written = _write_items(
                        plan, planner, transaction, base, rank=rank, world_size=world_size
                    )
        except BaseException:
            transaction.abandon()
            raise
        # DCP passes the results between ranks, and does not read them.
        result = WriteResult(index=None, size_in_bytes=0, storage_data=written)  # type: ignore[arg-type]
        future: Future[list[WriteResult]] = Future()
        future.set_result([result])
        return future

    def _write_planned(
        self,
        planner: ShardSavePlanner,
        transaction: WriteTransaction,
        base: Base | None,
        *,
        rank: int,
        world_size: int,
    ) -> bytes:
        local, writes = planner.local, planner.writes
        result = write_rank(
            transaction, RankShards.of(local, writes, rank=rank, world_size=world_size), base=base
        )
        result.replicas = replica_digests(
            local, writes, everything=self.check_replicas, sampled=planner.merging
        )
        result.per_rank_trees = local.per_rank_trees
        return msgspec.msgpack.encode(result)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """See StorageWriter.finish. Commits the checkpoint on the coordinator."""
        assert self._transaction is not None
        payloads: list[bytes] = [result[0].storage_data for result in results]
        planner = self._planner
        if isinstance(planner, ShardSavePlanner):
            shards = [msgspec.msgpack.decode(payload, type=ShardResult) for payload in payloads]
            plan = planner.global_writes
            compare_replicas(plan, [np.frombuffer(s.replicas, dtype="<u8") for s in shards])
            facts: dict[str, Any] = {
                "tensors": KnownPlan(plan).encoded_tensors(file_table(shards)),
                "results": shards,
                "tree": planner.tree,
            }
        else:
            written = [msgspec.msgpack.decode(payload, type=_Written) for payload in payloads]
            facts = _union(written, metadata.planner_data)
        identity = self._transaction.token
        commit_manifest(self._transaction, checkpoint_id=identity, **facts)
        self._transaction.close()
        self._transaction = None

    def abandon(self) -> None:
        """Remove the files of a failed save, which otherwise remain until the writer is deleted."""
        transaction, self._transaction = self._transaction, None
        if transaction is not None:
            transaction.abandon()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """See StorageWriter.validate_checkpoint_id."""
        try:
            return bool(resolve(checkpoint_id))
        except StateError:
            return False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_transaction": None, "_planner": None}


def check_comparable(planner: object, *, check_replicas: bool, rank: int | None = None) -> None:
    """Raise StateError if `check_replicas` is set and the planner removes replicas."""
    if check_replicas and not isinstance(planner, ShardSavePlanner):
        raise StateError(
            "check_replicas needs ShardSavePlanner",
            rank=rank,
            expected="shardckpt.ShardSavePlanner",
            actual=f"{type(planner).__qualname__}, which assigns each replica to one rank",
            remedy="leave out check_replicas, or pass planner=ShardSavePlanner()",
        )


def _write_items(
    plan: SavePlan,
    planner: SavePlanner,
    transaction: WriteTransaction,
    base: Base | None,
    *,
    rank: int,
    world_size: int,
) -> bytes:
    """Write the items of any planner. Returns the message for `finish`."""
    specs: dict[str, TensorSpec] = {}
    rows: list[int] = []
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    data: list[torch.Tensor] = []
    encoded: dict[str, Any] = {}
    for item in plan.items:
        name = item.index.fqn
        if item.type == WriteItemType.BYTE_IO:
            encoded[name] = _value(planner, item)
            continue
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, torch.Tensor)
        check_dense(tensor, name=name)
        assert item.tensor_data is not None
        shape = tuple(item.tensor_data.size)
        spec = TensorSpec(name, dtype_name(tensor.dtype, tensor=name), shape)
        specs.setdefault(name, spec)
        rows.append(list(specs).index(name) if specs[name] is not spec else len(specs) - 1)
        chunk = item.tensor_data.chunk
        boxes.append((tuple(chunk.offsets), tuple(chunk.sizes)))
        data.append(memory_view(tensor.detach()))
    table, index = pad_boxes(boxes), np.array(rows, dtype=np.int64)
    names = tuple(specs.values())
    _check_written_once(names, ChunkTable(tensor=index, boxes=table))
    order = layout_order(names, ChunkTable(tensor=index, boxes=table))
    chunks = ChunkTable(tensor=index[order], boxes=table[order])
    shards = RankShards(
        rank=rank,
        world_size=world_size,
        specs=names,
        chunks=chunks,
        files=((MAIN, len(data)),),
        data=lambda rows: [data[at] for at in order[rows].tolist()],
    )
    result = write_rank(transaction, shards, base=base)
    return msgspec.msgpack.encode(_Written(result, names, chunks.pack(), encoded))


def _check_written_once(specs: tuple[TensorSpec, ...], chunks: ChunkTable) -> None:
    """Raise CoverageError for a chunk that a planner gives to this rank several times."""
    rows = np.column_stack([chunks.tensor, flat_boxes(chunks.boxes)])
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    for (number, *box), count in zip(distinct.tolist(), counts.tolist(), strict=True):
        if count > 1:
            dims = len(box) // 2
            raise CoverageError(
                "A planner writes a chunk of a tensor several times",
                tensor=specs[number].name,
                expected="each chunk once",
                actual=f"{count} times offsets {box[:dims]}, sizes {box[dims:]}",
                remedy="correct the planner's create_global_plan",
            )


def _value(planner: SavePlanner, item: WriteItem) -> Any:
    """Return a byte item as typed JSON.

    DCP passes the item as bytes of torch.save, which are read with weights_only=True.
    """
    stream = planner.resolve_data(item)
    assert isinstance(stream, io.BytesIO)
    stream.seek(0)
    try:
        value = torch.load(stream, weights_only=True)
    except Exception as error:
        lookup = getattr(planner, "lookup_object", None)
        if lookup is None or not zipfile.is_zipfile(stream):  # bytes of the planner's own format
            raise UnsupportedLeafError(
                "A value of this planner can't be saved without pickle",
                tensor=item.index.fqn,
                expected="a value that torch.load(weights_only=True) accepts",
                actual=str(error).splitlines()[0],
                remedy="remove it from the state, or convert it to plain values",
            ) from error
        value = lookup(item.index)
    if any(instances_in(value, torch.Tensor)):
        raise UnsupportedLeafError(
            "This planner saves a tensor as a part of a value",
            tensor=item.index.fqn,
            expected="tensors as entries of their own",
            actual=type(value).__name__,
            remedy="leave flatten_state_dict of DCP's planner at True and use a list or dict in "
            "place of a tuple, or use ShardSavePlanner",
        )
    return values.encode(value, at=item.index.fqn)


def _union(written: list[_Written], paths: dict[str, tuple[Any, ...]] | None) -> dict[str, Any]:
    """Return the arguments of commit, from the messages of all ranks."""
    numbers: dict[str, int] = {}
    specs: list[TensorSpec] = []
    shards: list[ChunkTable] = []
    for rank, message in enumerate(written):
        for spec in message.specs:
            number = numbers.setdefault(spec.name, len(specs))
            if number == len(specs):
                specs.append(spec)
            if specs[number] != spec:
                raise RankMismatchError(
                    "Two ranks wrote a tensor with different dtypes or shapes",
                    rank=rank,
                    tensor=spec.name,
                    expected=f"{specs[number].dtype} {list(specs[number].shape)}",
                    actual=f"{spec.dtype} {list(spec.shape)}",
                    remedy="correct the planner",
                )
        table = ChunkTable.unpack(message.chunks)
        renumber = np.array([numbers[spec.name] for spec in message.specs], dtype=np.int64)
        shards.append(ChunkTable(tensor=renumber[table.tensor], boxes=table.boxes))
    dims = max((table.boxes.shape[2] for table in shards), default=0)
    chunks = ChunkTable(
        tensor=np.concatenate([table.tensor for table in shards]),
        boxes=np.concatenate([widen_boxes(table.boxes, dims=dims) for table in shards]),
    )
    check_coverage(specs, chunks, np.repeat(np.arange(len(shards)), list(map(len, shards))))
    leaves = {name: {"$tensor": name} for name in numbers}
    for message in written:
        leaves.update(message.values)
    results = [message.result for message in written]
    files = file_table(results)
    bounds = np.cumsum(np.append(0, files[:, 1]))
    entries = tensor_entries(specs, chunks, bounds=bounds, header_bytes=files[:, 2])
    return {
        "tensors": encode_tensors(entries),
        "results": results,
        "tree": msgspec.json.encode(_nest(leaves, paths or {})),
    }


def _nest(leaves: dict[str, Any], paths: dict[str, tuple[Any, ...]]) -> Any:
    """Nest encoded leaves by their paths. As in DCP, ints in paths are indices of lists."""
    root: dict[Any, Any] = {}
    for name, leaf in leaves.items():
        *above, last = paths.get(name, (name,))
        node = root
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf

    def settle(node: Any) -> Any:
        if not isinstance(node, dict) or not any(node is known for known in inner):
            return node
        items = {key: settle(value) for key, value in node.items()}
        if items and all(isinstance(key, int) for key in items):
            return [items.get(index) for index in range(max(items) + 1)]
        if any(not isinstance(key, str) or key.startswith("$") for key in items):
            return {"$dict": [[values.encode(key, at=""), item] for key, item in items.items()]}
        return items

    inner: list[Any] = []
    stack: list[Any] = [root]
    ends = [id(leaf) for leaf in leaves.values()]
    while stack:
        node = stack.pop()
        inner.append(node)
        stack += [v for v in node.values() if isinstance(v, dict) and id(v) not in ends]
    return settle(root)
