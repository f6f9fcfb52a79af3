"""The functions that users call: save, load, look inside, verify, rescue, reshard."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from shardckpt.checkpoint import Checkpoint
from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.resolve import operation, over_store
from shardckpt.coordination.single import SingleCoordinator
from shardckpt.loading.pipeline import LoadOptions, run_load
from shardckpt.maintenance.rescue import rescue as run_rescue
from shardckpt.maintenance.reshard import reshard as run_reshard
from shardckpt.maintenance.verify import verify_shards
from shardckpt.plan.device_map import DeviceMap
from shardckpt.plan.local_plan import LocalPlan
from shardckpt.reports import CheckpointMetadata, LoadReport, RescueReport, SaveReport, VerifyReport
from shardckpt.saving import async_save as background
from shardckpt.saving.agreement import SaveTarget
from shardckpt.saving.async_save import SaveHandle
from shardckpt.saving.incremental import check_verify_base, open_base
from shardckpt.saving.pipeline import plan_state, run_save
from shardckpt.saving.staged_part import StagedPart
from shardckpt.state.matching import DtypePolicy, casts
from shardckpt.state.saved_tree import Renaming, Select
from shardckpt.storage.base import Storage
from shardckpt.storage.resolve import Location, resolve
from shardckpt.transforms import Transforms

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.checkpoint.planner import SavePlanner

__all__ = [
    "async_save",
    "load",
    "load_state",
    "metadata",
    "open_checkpoint",
    "rescue",
    "reshard",
    "save",
    "verify",
]

Path = str | os.PathLike[str] | Storage
"""A path, a URL, or a storage with a root; see docs/how-to/storage.md."""


def _base(
    base: Path | Checkpoint | None, storage: Storage | None, *, verify: bool
) -> Location | Checkpoint | None:
    check_verify_base(base, verify_base=verify)
    if base is None or isinstance(base, Checkpoint):
        return base
    return resolve(base, storage, fixed=True)


def _ignore(size_bytes: int) -> None:
    pass


def _operation_or_alone(
    subject: str, process_group: ProcessGroup | None, comm: Any
) -> AbstractContextManager[Coordinator]:
    """Return the ranks of `process_group` or `comm`, or this process alone if both are None."""
    if process_group is None and comm is None:
        return nullcontext(SingleCoordinator())
    return operation(subject, process_group, comm=comm)


def save(
    state: Any,
    path: Path,
    *,
    overwrite: bool = False,
    planner: SavePlanner | None = None,
    process_group: ProcessGroup | None = None,
    comm: Any = None,
    check_replicas: bool = False,
    base: Path | Checkpoint | None = None,
    verify_base: bool = False,
    storage: Storage | None = None,
) -> SaveReport:
    """Save a state. Every rank writes its shards. The checkpoint appears complete or not at all.

    Collective: every rank calls it with the same path. When it returns, the checkpoint is complete
    and durable. When it raises, the path is as it was before. Tensors stay on their devices, and
    copying them takes a few buffers of memory.

    Ranks may hold different tensors, as pipeline stages do; the checkpoint has the tensors of all
    ranks. It is an error if a rank lacks tensors of another rank and has none of its own. Values
    must be equal on all ranks, unless PerRank, Union or FromRank0 marks them.

    Args:
        state: Nested dicts, lists and tuples. Their leaves are tensors (plain, DTensor,
            ShardedTensor; see docs/tensors.md), numpy arrays, Python values, modules, optimizers,
            and objects with state_dict and load_state_dict.
        path: The directory of the new checkpoint, or a URL such as `s3://bucket/run/step-7`.
            Missing parents are created.
        overwrite: Replace a checkpoint at `path`. The old one can be loaded until the new one
            is complete.
        planner: A DCP SavePlanner, which decides what is saved.
        process_group: The ranks that save. By default the default group of torch.distributed;
            without one, MPI.COMM_WORLD under mpirun; otherwise this process alone.
        comm: The ranks that save, as an mpi4py communicator.
        check_replicas: Compare the replicas of tensors of any size between ranks. Values and
            tensors of up to 64 KiB are always compared. With a planner it needs ShardSavePlanner.
        base: An earlier checkpoint, as a path or open. Files that would be the same are linked,
            not written; blocks that would be the same are cloned if the file system can. Either
            checkpoint can be removed, and the other stays complete. If the base is missing or
            corrupted, everything is written and the report lists the reason.
        verify_base: Read back and verify all linked and cloned blocks, instead of one block in 16.
            It needs a base.
        storage: The storage of `path` and `base`. By default the scheme of a URL decides, and a
            path without one is on the file system.

    Returns:
        Sizes in bytes and times in seconds.

    Raises:
        StateError: The state can't be saved.
        StorageError: The file system refused an operation.
        CoordinationError: A rank failed, or the ranks are not connected.
        DependencyError: The call needs an optional dependency that is not installed.

    Example:
        >>> import torch, shardckpt
        >>> model = torch.nn.Linear(4, 2)
        >>> report = shardckpt.save({"model": model, "step": 7}, "run/step-7")
        >>> report.world_size
        1
    """
    place, earlier = resolve(path, storage), _base(base, storage, verify=verify_base)
    target = SaveTarget(place.path, place.storage, overwrite)
    if planner is not None:
        from shardckpt.integrations.dcp import save_with_planner

        return save_with_planner(
            state,
            target,
            planner=planner,
            process_group=process_group,
            comm=comm,
            check_replicas=check_replicas,
            base=earlier,
            verify_base=verify_base,
        )
    with operation(f"save {place.path}", process_group, comm=comm) as coordinator:
        return run_save(
            lambda: plan_state(state, coordinator),
            target,
            coordinator=coordinator,
            base=open_base(earlier, verify=verify_base),
            check_replicas=check_replicas,
        )


def async_save(
    state: Any,
    path: Path,
    *,
    overwrite: bool = False,
    process_group: ProcessGroup | None = None,
    comm: Any = None,
    check_replicas: bool = False,
    base: Path | Checkpoint | None = None,
    verify_base: bool = False,
    storage: Storage | None = None,
) -> SaveHandle:
    """Save in the background. Training continues while the state is copied and written.

    Collective, as `save` is. Parameters, optimizer state and large tensors are copied to CPU memory
    while forward and backward run; the rest is copied before this returns. The next step of any
    torch optimizer waits until the copies are complete. If your program changes the state in
    another way, call `handle.wait_staged()` first. A thread writes the saves one after another, in
    the order of the calls; it uses neither the process group nor the streams of the training. See
    docs/async.md.

    Args:
        state: See `save`.
        path: See `save`.
        overwrite: See `save`.
        process_group: See `save`.
        comm: See `save`.
        check_replicas: See `save`.
        base: See `save`.
        verify_base: See `save`.
        storage: See `save`.

    Returns:
        A handle. Its `result()` waits for the save, and returns its report or raises its error.

    Raises:
        ShardckptError: An earlier save in the background failed, and its `result()` was never
            called. The new save is started nevertheless.
        CoordinationError: The ranks are not connected.

    Example:
        >>> import torch, shardckpt
        >>> state = {"weight": torch.ones(3)}
        >>> handle = shardckpt.async_save(state, "run/step-1")
        >>> handle.result().path.endswith("step-1")
        True
    """
    place = resolve(path, storage, fixed=True)
    earlier = _base(base, storage, verify=verify_base)
    ranks = operation(f"async_save {place.path}", process_group, comm=comm, channel="async")

    dividing = None
    if over_store(comm):  # MPI does not
        dividing = operation(f"divide {place.path}", process_group, channel="divide")

    def save_staged(
        plan: Callable[[], LocalPlan], *, part: Callable[[], StagedPart | None]
    ) -> SaveReport:
        with ranks as coordinator:
            return run_save(
                plan,
                SaveTarget(place.path, place.storage, overwrite),
                coordinator=coordinator,
                base=open_base(earlier, verify=verify_base),
                check_replicas=check_replicas,
                staged=True,
                part=part,
            )

    return background.start_save(
        state,
        place.path,
        ranks=ranks,
        dividing=dividing,
        check_replicas=check_replicas,
        save=save_staged,
        wait_for_tier=place.storage.wait_for_tier,
    )


def load(
    state: Any,
    path: Path,
    *,
    strict: bool = True,
    dtype: DtypePolicy = "strict",
    keys: Select = None,
    rename: Renaming = None,
    transforms: Transforms | None = None,
    process_group: ProcessGroup | None = None,
    comm: Any = None,
    storage: Storage | None = None,
) -> LoadReport:
    """Load a checkpoint into a state, in place, with any world size and any placement.

    Collective, as `save` is. Each rank reads its own part of each tensor. Bytes that ranks on
    several machines need, or several ranks from an object store, are read once and sent to the
    others. Tensors are filled where they are, on their devices; modules on the meta device get
    memory. Other leaves are replaced in the dicts and lists that hold them. Modules and optimizers
    load the entries under their names. Every block that is read is verified.

    Args:
        state: A state as `save` takes it. Its names choose the entries to load.
        path: The checkpoint.
        strict: Require every entry of the state in the checkpoint, with its shape and dtype, and
            load all entries of a module or optimizer, and an entry for each name of `keys` and
            `rename`. With strict=False, mismatched entries are skipped and listed in the report.
        dtype: "strict" refuses a saved dtype other than the dtype of the state; "cast" converts.
        keys: The names to load, after `rename`: prefixes, or shell patterns such as `"*.bias"`.
        rename: A dict from saved prefix to prefix in the state, or a function from saved name to
            name in the state.
        transforms: Splits, joins and other changes of the saved tensors, in order; see
            `shardckpt.transforms`. `keys` and `rename` apply to the names after them.
        process_group: The ranks that load; see `save`.
        comm: The ranks that load, as an mpi4py communicator.
        storage: See `save`.

    Returns:
        The bytes read, and the entries that were cast, skipped or missing.

    Raises:
        LoadMismatchError: State and checkpoint differ, or `keys`, `rename` or `transforms`
            has a name that no saved entry has. Nothing has been changed.
        CorruptionError: A shard is corrupted. Tensors may be partly overwritten: load another
            checkpoint before you continue. A corrupted manifest changes nothing.
        CheckpointError: The checkpoint can't be read. Nothing has been changed.
        StateError: The state can't be loaded into. Nothing has been changed, unless
            load_state_dict of an object refused the saved state: the error says so.
        CoordinationError: A rank failed, or the ranks are not connected.

    Example:
        >>> import torch, shardckpt
        >>> report = shardckpt.save({"weight": torch.ones(3)}, "run/step-1")
        >>> state = {"weight": torch.zeros(3)}
        >>> report = shardckpt.load(state, "run/step-1")
        >>> state["weight"]
        tensor([1., 1., 1.])
    """
    place = resolve(path, storage)
    options = LoadOptions(
        strict=strict, cast=casts(dtype), keys=keys, rename=rename, transforms=transforms
    )
    background.wait_until_staged()
    with operation(f"load {place.path}", process_group, comm=comm) as coordinator:
        return run_load(
            state,
            place.path,
            coordinator=coordinator,
            storage=place.storage,
            options=options,
        )


def load_state(
    path: Path,
    *,
    device_map: DeviceMap = "cpu",
    keys: Select = None,
    rename: Renaming = None,
    transforms: Transforms | None = None,
    strict: bool = True,
    storage: Storage | None = None,
) -> Any:
    """Build the saved state without a template: nested dicts and lists of full plain tensors.

    Not collective: one process can load a checkpoint of any world size. Tied tensors are tied
    again. A PerRank entry becomes a list with the value of every rank.

    Args:
        path: The checkpoint.
        device_map: The device of each tensor: `"cpu"` or another device; `"auto"`, which fills the
            visible devices in order by free memory, then CPU memory, then disk; `"balanced"`, which
            divides the tensors evenly over the visible devices; `"meta"`; `"disk"`, which maps
            files into memory; or a dict from prefixes of names to these. The longest prefix wins.
        keys: See `load`.
        rename: See `load`.
        transforms: See `load`. Transformed tensors can't stay on "disk".
        strict: Require an entry for each name of `keys` and `rename`.
        storage: See `save`.

    Returns:
        The state, with the structure that was saved.

    Raises:
        CheckpointError: The checkpoint can't be read, or is corrupted.
        LoadMismatchError: `strict`, and `keys` or `rename` has a name that no saved entry has.
        StateError: `device_map`, `keys` or `rename` is invalid.
        StorageError: The file system refused an operation.

    Example:
        >>> import torch, shardckpt
        >>> report = shardckpt.save({"weight": torch.ones(3), "step": 7}, "run/step-7")
        >>> shardckpt.load_state("run/step-7")
        {'weight': tensor([1., 1., 1.]), 'step': 7}
    """
    with open_checkpoint(path, storage=storage) as checkpoint:
        return checkpoint.load_state(
            device_map=device_map,
            keys=keys,
            rename=rename,
            transforms=transforms,
            strict=strict,
        )


def open_checkpoint(path: Path, *, storage: Storage | None = None) -> Checkpoint:
    """Open a checkpoint as a mapping of names to lazy tensors and values.

    Not collective. Only the manifest is read.

    Args:
        path: The checkpoint.
        storage: See `save`.

    Returns:
        The open checkpoint, a context manager.

    Raises:
        CheckpointNotFoundError: The path does not exist.
        NotACheckpointError: The path does not hold a checkpoint.
        FormatVersionError: A newer version of shardckpt wrote the checkpoint.
        CorruptionError: The manifest is corrupted.

    Example:
        >>> import torch, shardckpt
        >>> report = shardckpt.save({"weight": torch.arange(6.0)}, "run/step-1")
        >>> with shardckpt.open_checkpoint("run/step-1") as checkpoint:
        ...     checkpoint["weight"][2:4]
        tensor([2., 3.])
    """
    place = resolve(path, storage)
    return Checkpoint(place.path, storage=place.storage, newest=True)


def metadata(path: Path, *, storage: Storage | None = None) -> CheckpointMetadata:
    """Describe a checkpoint: names, shapes, dtypes, sizes. Only the manifest is read.

    Not collective.

    Args:
        path: The checkpoint.
        storage: See `save`.

    Returns:
        The description.

    Raises:
        CheckpointError: The checkpoint can't be read; see `open_checkpoint`.
        StorageError: The file system refused an operation.

    Example:
        >>> import torch, shardckpt
        >>> report = shardckpt.save({"weight": torch.ones(3, 2), "step": 7}, "run/step-7")
        >>> metadata = shardckpt.metadata("run/step-7")
        >>> metadata.tensors
        {'weight': TensorMetadata(shape=(3, 2), dtype=torch.float32)}
        >>> metadata.world_size, metadata.values
        (1, ('step',))
    """
    with open_checkpoint(path, storage=storage) as checkpoint:
        return checkpoint.metadata()


def verify(
    path: Path,
    *,
    strict: bool = True,
    subset: tuple[int, int] = (1, 1),
    process_group: ProcessGroup | None = None,
    comm: Any = None,
    storage: Storage | None = None,
    progress: Callable[[int], None] = _ignore,
) -> VerifyReport:
    """Read every block of a checkpoint and compare it with its digest.

    Not collective, unless you pass `process_group` or `comm`: then its ranks divide the bytes, and
    every rank gets the same result.

    Args:
        path: The checkpoint.
        strict: Raise an error if a shard is corrupted. With strict=False, the report lists the
            corrupted tensors and the errors. A corrupted manifest is always an error.
        subset: (n, t) verifies the n-th of t parts. All t parts together verify everything.
        process_group: The ranks that divide the work.
        comm: The ranks that divide the work, as an mpi4py communicator.
        storage: See `save`.
        progress: Called with the bytes verified since its last call, from several threads.

    Returns:
        The bytes verified, and the names of the intact tensors.

    Raises:
        CorruptionError: A shard or the manifest is corrupted. The error names the files, the
            tensors, and each single flipped bit.
        CheckpointError: The checkpoint can't be read.
        StateError: `subset` is invalid.
        StorageError: The file system refused an operation.

    Example:
        >>> import torch, shardckpt
        >>> report = shardckpt.save({"weight": torch.ones(3)}, "run/step-1")
        >>> shardckpt.verify("run/step-1").intact
        ('weight',)
    """
    with _operation_or_alone(f"verify {path}", process_group, comm) as ranks:  # noqa: SIM117
        with open_checkpoint(path, storage=storage) as checkpoint:
            report = verify_shards(
                checkpoint.files,
                checkpoint.manifest,
                subset=subset,
                progress=progress,
                coordinator=ranks,
            )
    if strict:
        report.raise_if_corrupted()
    return report


def reshard(
    source: Path,
    target: Path,
    *,
    shards: int,
    overwrite: bool = False,
    process_group: ProcessGroup | None = None,
    comm: Any = None,
    storage: Storage | None = None,
    progress: Callable[[int], None] = _ignore,
) -> None:
    """Rewrite a checkpoint with another number of shards, of even size.

    `load` reads any checkpoint with any world size, so you need this only to change the number of
    files. Not collective, unless you pass `process_group` or `comm`: then its ranks divide the
    bytes. All entries stay the same, including PerRank values and the saved world size. Memory: a
    few buffers.

    Args:
        source: The checkpoint to read.
        target: The path of the new checkpoint.
        shards: The number of shards, at least 1.
        overwrite: Replace a checkpoint at `target`.
        process_group: The ranks that divide the work.
        comm: The ranks that divide the work, as an mpi4py communicator.
        storage: See `save`.
        progress: Called with the bytes that this rank has written so far.

    Raises:
        CheckpointError: The source can't be read, or is corrupted.
        StateError: `shards` is below 1.
        StorageError: The file system refused an operation.
        CoordinationError: A rank failed.

    Example:
        >>> import torch, shardckpt
        >>> report = shardckpt.save({"weight": torch.ones(8)}, "run/step-1")
        >>> shardckpt.reshard("run/step-1", "run/step-1-of-4", shards=4)
        >>> len(shardckpt.metadata("run/step-1-of-4").shards)
        4
    """
    place = resolve(target, storage)
    with _operation_or_alone(f"reshard {place.path}", process_group, comm) as ranks:  # noqa: SIM117
        with open_checkpoint(source, storage=storage) as checkpoint:
            run_reshard(
                checkpoint,
                place.path,
                shards=shards,
                storage=place.storage,
                overwrite=overwrite,
                coordinator=ranks,
                progress=progress,
            )


def rescue(
    source: Path,
    target: Path,
    *,
    overwrite: bool = False,
    storage: Storage | None = None,
    progress: Callable[[int], None] = _ignore,
) -> RescueReport:
    """Write a new checkpoint with the intact tensors of a corrupted one. Not collective.

    Tensors whose blocks all verify are kept, and so are all values. References to a lost tensor are
    removed; in a list or tuple None replaces them. A single flipped bit in a block is repaired.
    If the manifest is lost, a new one is built from the headers of the shards: it has the tensors
    with their names, shapes and nesting, but no values, and nothing can be verified. The notes of
    the new checkpoint list what was lost and repaired.

    Args:
        source: The corrupted checkpoint. It is not changed.
        target: The path of the new checkpoint.
        overwrite: Replace a checkpoint at `target`.
        storage: See `save`.
        progress: Called with the bytes written so far.

    Returns:
        The tensors saved, lost and repaired.

    Raises:
        CorruptionError: Nothing can be rescued.
        CheckpointNotFoundError: The source does not exist.
        StorageError: The file system refused an operation.

    Example:
        >>> import torch, shardckpt
        >>> report = shardckpt.save({"weight": torch.ones(3)}, "run/step-1")
        >>> shardckpt.rescue("run/step-1", "run/rescued").saved
        ('weight',)
    """
    return run_rescue(
        resolve(source, storage),
        resolve(target, storage),
        overwrite=overwrite,
        progress=progress,
    )
