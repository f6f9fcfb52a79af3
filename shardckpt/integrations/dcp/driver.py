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
from shardckpt.state.optimizer_state import plain_state
from shardckpt.storage.resolve import Location
from shardckpt.torch_compat import dcp_save

__all__ = ["save_with_planner"]


def save_with_planner(
    state: Any,
    place: Location,
    *,
    planner: Any,
    overwrite: bool,
    process_group: Any,
    comm: Any,
    check_replicas: bool,
    base: Location | Checkpoint | None,
    verify_base: bool,
) -> SaveReport:
    """Save a state with a DCP SavePlanner. Collective; see shardckpt.save."""
    storage, path = place
    group_for_dcp(path, comm=comm)
    alone = process_group is None and (is_alone() or not dist.is_initialized())
    if alone:
        check_launcher()
    check_comparable(planner, check_replicas=check_replicas)
    start = time.perf_counter()
    writer = ShardWriter(
        path,
        overwrite=overwrite,
        check_replicas=check_replicas,
        storage=storage,
    )
    writer.base, writer.verify_base = base, verify_base
    try:
        dcp_save(
            plain_state(state), writer, planner=planner, process_group=process_group, alone=alone
        )
    except CheckpointException as failure:  # a BaseException
        writer.abandon()
        raise _first_error(failure, path) from failure
    except BaseException:
        writer.abandon()
        raise
    files, manifest = open_manifest(storage, path)
    manifest_bytes = len(files.manifest())
    files.close()
    return SaveReport(
        path=path,
        checkpoint_id=manifest.checkpoint_id,
        world_size=manifest.world_size,
        bytes_by_rank=tuple(
            sum(shard.size_bytes for shard in shards)
            for _, shards in itertools.groupby(
                manifest.shards, lambda shard: shard.name.partition("-of-")[0]
            )
        ),
        manifest_bytes=manifest_bytes,
        seconds={"save": time.perf_counter() - start},
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
