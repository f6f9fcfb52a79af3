"""What users call."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

from shardckpt.checkpoint import Checkpoint
from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.resolve import operation
from shardckpt.errors import StateError
from shardckpt.loading.pipeline import run_load
from shardckpt.plan.device_map import DeviceMap
from shardckpt.plan.local_plan import LocalPlan, local_plan
from shardckpt.reports import LoadReport, SaveReport
from shardckpt.saving import async_save as background
from shardckpt.saving.async_save import SaveHandle
from shardckpt.saving.incremental import check_verify_base
from shardckpt.saving.pipeline import run_save
from shardckpt.state.flatten import flatten
from shardckpt.state.saved_tree import Rename, Select
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage, checkpoint_path

__all__ = ["async_save", "load", "load_state", "open_checkpoint", "save"]

Path = str | os.PathLike[str]


def _base(
    base: Path | Checkpoint | None, storage: Storage | None, *, verify: bool
) -> str | Checkpoint | None:
    check_verify_base(base, verify_base=verify)
    if base is None or isinstance(base, Checkpoint):
        return base
    return checkpoint_path(base, storage, fixed=True)


def _plan(state: Any, coordinator: Coordinator) -> LocalPlan:
    flat = flatten(state, rank=coordinator.rank)
    return local_plan(flat, world_size=coordinator.world_size)


def save(
    state: Any,
    path: Path,
    *,
    overwrite: bool = False,
    planner: Any = None,
    process_group: Any = None,
    comm: Any = None,
    check_replicas: bool = False,
    base: Path | Checkpoint | None = None,
    verify_base: bool = False,
    storage: Storage | None = None,
) -> SaveReport:
    """Save a state; every rank writes its shard, and all of it appears at once.

    Collective over `process_group` (by default torch.distributed's default group) or over
    `comm`, an mpi4py communicator (by default MPI.COMM_WORLD, under mpirun without a process
    group); else this process alone: every rank gives the same path. When it
    returns, the checkpoint is whole and durable; when it raises, nothing has appeared, and
    what was at `path` is still there.

    `state`: nested dicts (lists, tuples) of tensors (plain, DTensor, ShardedTensor; docs/tensors.md
    lists all kinds), numpy arrays, Python values, modules, optimizers, and objects with state_dict
    and load_state_dict. Tensors are neither moved nor copied as a whole. `overwrite` replaces a
    checkpoint at `path`, which stays loadable until the new one is there. `planner`: a DCP
    SavePlanner, which then decides what is saved. `check_replicas` compares replicated
    tensors of any size between ranks; values and tensors up to 64 KiB always are. With a planner it
    needs ShardSavePlanner: others leave each replica to one rank, and nothing is there to compare.

    Ranks may hold different tensors, as pipeline stages do: the checkpoint has those of all ranks.
    It is an error if a rank lacks tensors that another one has, and has none that this one lacks.
    Values are the same on every rank, but for what is marked with PerRank, Union or FromRank0.

    `base` is an earlier checkpoint, a path or an open one: of its files those that would be
    the same are linked, not written, so that a job with frozen weights (requires_grad False, in
    modules) writes only what it trains. Both stay whole when either is removed. What can't be
    linked is written; a base that is missing or damaged fails nothing, and the report says so.
    One block in 16 of what is linked is read back and checked; `verify_base`, which needs a base,
    checks all.

    Raises StateError for what can't be saved, StorageError where the file system refuses,
    CoordinationError for ranks that fail; each names path, rank and tensor.
    """
    target = checkpoint_path(path, storage)
    if planner is not None:
        from shardckpt.integrations.dcp import save_with_planner

        return save_with_planner(
            state,
            target,
            planner=planner,
            overwrite=overwrite,
            process_group=process_group,
            comm=comm,
            check_replicas=check_replicas,
            base=_base(base, storage, verify=verify_base),
            verify_base=verify_base,
            storage=storage or LocalStorage(),
        )
    with operation(f"save {target}", process_group, comm=comm) as coordinator:
        return run_save(
            lambda: _plan(state, coordinator),
            target,
            coordinator=coordinator,
            storage=storage or LocalStorage(),
            overwrite=overwrite,
            check_replicas=check_replicas,
            base=_base(base, storage, verify=verify_base),
            verify_base=verify_base,
        )


def async_save(
    state: Any,
    path: Path,
    *,
    overwrite: bool = False,
    process_group: Any = None,
    comm: Any = None,
    check_replicas: bool = False,
    base: Path | Checkpoint | None = None,
    verify_base: bool = False,
    storage: Storage | None = None,
) -> SaveHandle:
    """Save in the background: returns at once, and training goes on.

    Collective, as save is, and with the same arguments. Parameters, optimizer state and large
    tensors are copied to CPU memory while forward and backward run; the next step of any torch
    optimizer waits for that by itself, and who changes the state otherwise calls
    `handle.staged()` first. All else is copied before this returns. Saves are written one after
    another, in the order of the calls, by a thread that uses neither the training's process
    group nor its streams; see docs/async.md.

    `handle.result()` waits and returns the SaveReport, or raises what the save did. An error
    that nobody has asked for is raised by the next async_save, which begins its own save first.
    """
    target = checkpoint_path(path, storage, fixed=True)
    earlier = _base(base, storage, verify=verify_base)
    ranks = operation(f"async_save {path}", process_group, comm=comm, channel="async")

    def save_staged(staged: Callable[[], LocalPlan]) -> SaveReport:
        with ranks as coordinator:
            return run_save(
                staged,
                target,
                coordinator=coordinator,
                storage=storage or LocalStorage(),
                overwrite=overwrite,
                check_replicas=check_replicas,
                base=earlier,
                verify_base=verify_base,
                staged=True,
            )

    return background.start(
        state, target, rank=ranks.rank, world_size=ranks.world_size, save=save_staged
    )


def load(
    state: Any,
    path: Path,
    *,
    strict: bool = True,
    dtype: Literal["strict", "cast"] = "strict",
    keys: Select = None,
    rename: Rename = None,
    process_group: Any = None,
    comm: Any = None,
    storage: Storage | None = None,
) -> LoadReport:
    """Load a checkpoint into a state, in place; onto any world size and any layout.

    Collective over `process_group` or `comm`, as save is. Tensors are filled where they are,
    on their devices, each rank reading its own part; other leaves are replaced in the dicts and
    lists that hold them; modules and optimizers take what was saved under their name. Modules
    on the meta device get memory. Every block that is read is verified.

    `strict`: everything asked for must be there with its shape and dtype, and a module or
    optimizer must take all that was saved under its name; else one LoadMismatchError lists
    every entry. With strict=False what agrees is loaded, and the report tells the rest.
    `dtype="cast"` converts. `keys`: prefixes or shell patterns of the names to load.
    `rename`: saved prefix -> prefix in the state, or a function of a name.

    A damaged shard raises CorruptionError; tensors may then be partly overwritten, so load
    another checkpoint before going on. All other errors come before anything is changed.
    """
    if dtype not in ("strict", "cast"):
        raise StateError(
            "Unknown value for dtype", expected='"strict" or "cast"', actual=repr(dtype)
        )
    target = checkpoint_path(path, storage)
    background.wait_until_staged()
    with operation(f"load {target}", process_group, comm=comm) as coordinator:
        return run_load(
            state,
            target,
            coordinator=coordinator,
            storage=storage or LocalStorage(),
            strict=strict,
            cast=dtype == "cast",
            keys=keys,
            rename=rename,
        )


def load_state(
    path: Path,
    *,
    device_map: DeviceMap = "cpu",
    keys: Select = None,
    rename: Rename = None,
    storage: Storage | None = None,
) -> Any:
    """Build the saved state anew, without a template: nested dicts of whole plain tensors.

    Not collective: any single process can call it, whatever the world size of the save.
    `device_map`: "cpu"; a device; a dict of name prefixes to these (the longest wins);
    "auto" and "balanced" over the visible devices by free memory; "meta"; "disk"
    (memory-mapped: nothing is read until touched). PerRank entries come back as a list of
    every rank's value. `keys` and `rename` as for load. Tied tensors are tied again.
    """
    with open_checkpoint(path, storage=storage) as checkpoint:
        return checkpoint.load_state(device_map=device_map, keys=keys, rename=rename)


def open_checkpoint(path: Path, *, storage: Storage | None = None) -> Checkpoint:
    """Open a checkpoint to look into it: a mapping of names to lazy tensors and values.

    Not collective. Reads the manifest alone. Raises CheckpointNotFoundError,
    NotACheckpointError, FormatVersionError or CorruptionError.
    """
    return Checkpoint(checkpoint_path(path, storage), storage=storage or LocalStorage())
