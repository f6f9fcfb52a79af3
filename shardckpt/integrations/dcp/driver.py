"""shardckpt.save with a DCP planner: dcp.save with ShardWriter, and the errors of shardckpt."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from shardckpt.checkpoint import Checkpoint
from shardckpt.coordination.process_group import group_for_dcp
from shardckpt.coordination.resolve import check_launcher, is_alone
from shardckpt.errors import RankFailedError, ShardckptError
from shardckpt.integrations.dcp.writer import ShardWriter, check_comparable
from shardckpt.loading.agreement import open_manifest
from shardckpt.reports import SaveReport
from shardckpt.saving.agreement import SaveTarget
from shardckpt.state.optimizer_state import plain_state
from shardckpt.storage.resolve import Location
from shardckpt.torch_compat import dcp_save

__all__ = ["save_with_planner"]


def save_with_planner(
    state: Any,
    target: SaveTarget,
    *,
    planner: Any,
    process_group: Any,
    comm: Any,
    check_replicas: bool,
    base: Location | Checkpoint | None,
    verify_base: bool,
) -> SaveReport:
    """Save a state with a DCP SavePlanner. Collective; see shardckpt.save."""
    group_for_dcp(target.path, comm=comm)
    alone = process_group is None and (is_alone() or not dist.is_initialized())
    if alone:
        check_launcher()
    check_comparable(planner, check_replicas=check_replicas)
    start = time.perf_counter()
    writer = ShardWriter(
        target.path,
        overwrite=target.overwrite,
        check_replicas=check_replicas,
        storage=target.storage,
    )
    writer.base, writer.verify_base = base, verify_base
    try:
        dcp_save(
            plain_state(state), writer, planner=planner, process_group=process_group, alone=alone
        )
    except CheckpointException as failure:  # a BaseException
        writer.abandon()
        raise _first_error(failure, target.path) from failure
    except BaseException:
        writer.abandon()
        raise
    return _report(target, seconds=time.perf_counter() - start)


def _report(target: SaveTarget, *, seconds: float) -> SaveReport:
    """Return the report of a save, from its manifest."""
    files, manifest = open_manifest(target.storage, target.path)
    manifest_bytes = len(files.manifest())
    files.close()
    by_rank = itertools.groupby(manifest.shards, lambda shard: shard.name.partition("-of-")[0])
    return SaveReport(
        path=target.path,
        checkpoint_id=manifest.checkpoint_id,
        world_size=manifest.world_size,
        bytes_by_rank=tuple(sum(shard.size_bytes for shard in shards) for _, shards in by_rank),
        manifest_bytes=manifest_bytes,
        seconds={"save": seconds},
    )


def _first_error(failure: CheckpointException, path: str) -> Exception:
    rank, (error, _) = min(failure.failures.items())
    if isinstance(error, ShardckptError):
        error.rank = rank if error.rank is None else error.rank
        return error
    return RankFailedError(
        "The planner or a rank failed",
        path=path,
        rank=tuple(failure.failures),
        actual=f"{type(error).__name__}: {error}",
        remedy="read the log of that rank; nothing was committed",
    )
