"""The stages of a save, from a state to a committed checkpoint.

    flatten -> plan -> agree -> write -> commit

Each stage takes the result of the stage before it. An error on any rank ends the save on all ranks
in the next exchange, and the path stays as it was. For async_save, the plan is staged before the
ranks agree (saving/async_save), or only this rank's part of it (saving/staged_part).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.exchange import attempt
from shardckpt.io.gc_pause import collector_paused, ends_pauses
from shardckpt.logs import logger, reported
from shardckpt.plan.local_plan import LocalPlan, local_plan
from shardckpt.reports import SaveReport, Stopwatch
from shardckpt.saving.agreement import SaveTarget, agree
from shardckpt.saving.commit import commit
from shardckpt.saving.incremental import Base
from shardckpt.saving.rank_writer import write_agreed
from shardckpt.saving.staged_part import StagedPart
from shardckpt.state.flatten import flatten

__all__ = ["plan_state", "run_save"]


def plan_state(state: Any, coordinator: Coordinator) -> LocalPlan:
    """Flatten a state, and plan the boxes of this rank. Not collective."""
    return local_plan(flatten(state, rank=coordinator.rank), world_size=coordinator.world_size)


@reported("save", lambda plan, target, *, coordinator, **_: (target.path, coordinator.rank))
@ends_pauses
def run_save(
    plan: Callable[[], LocalPlan],
    target: SaveTarget,
    *,
    coordinator: Coordinator,
    base: AbstractContextManager[Base | None],
    check_replicas: bool,
    staged: bool = False,
    part: Callable[[], StagedPart | None] = lambda: None,
) -> SaveReport:
    """Save the boxes of this rank's plan. Collective. See shardckpt.save.

    Args:
        plan: Returns this rank's plan: `plan_state`, or a function that waits for the staged plan.
        target: The target of the save.
        coordinator: The ranks.
        base: Opens the base of an incremental save.
        check_replicas: Compare replicas of any size.
        staged: The plan's data does not change while it is written.
        part: Returns the data that this rank writes, if only they were staged. Called after `plan`.

    Returns:
        The report of the save.
    """
    watch, work = Stopwatch(), Stopwatch()
    with watch.phase("plan"):
        with work.phase("plan"), collector_paused():
            local = attempt(plan)
        agreement = agree(coordinator, local, target, work)
    with agreement, watch.phase("write"):
        options = {"check_replicas": check_replicas, "staged": staged, "part": part()}
        written = attempt(write_agreed, agreement, coordinator, base, work, **options)
        committed, profile = commit(coordinator, written, agreement, work)
    report = SaveReport(
        path=target.path,
        world_size=coordinator.world_size,
        seconds=watch.seconds,
        profile=profile,
        tiers=dict(agreement.transaction.tiers),
        **committed.report(),
    )
    logger.info(
        "saved %s: %d bytes by %d ranks in %.2f s",
        target.path,
        report.total_bytes,
        report.world_size,
        sum(watch.seconds.values()),
    )
    return report
