"""Save: from a state to a committed checkpoint.

    flatten -> plan -> agree -> write -> commit

Each stage takes what the stage before it returned. An error on any rank ends the save on all of
them in the next exchange, and nothing appears at the path. In the background, async_save stages
the plan (see saving/async_save) before the ranks agree.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.exchange import attempt
from shardckpt.io.gc_pause import collector_paused
from shardckpt.logs import logger
from shardckpt.plan.local_plan import LocalPlan, local_plan
from shardckpt.reports import SaveReport, Stopwatch
from shardckpt.saving.agreement import Target, agree
from shardckpt.saving.commit import commit
from shardckpt.saving.incremental import Base
from shardckpt.saving.rank_writer import write_agreed
from shardckpt.state.flatten import flatten

__all__ = ["plan_state", "run_save"]


def plan_state(state: Any, coordinator: Coordinator) -> LocalPlan:
    """Flatten a state and plan what this rank holds of it. Not collective."""
    return local_plan(flatten(state, rank=coordinator.rank), world_size=coordinator.world_size)


def run_save(
    plan: Callable[[], LocalPlan],
    target: Target,
    *,
    coordinator: Coordinator,
    base: AbstractContextManager[Base | None],
    check_replicas: bool,
    staged: bool = False,
) -> SaveReport:
    """Save what this rank's plan holds; collective. See shardckpt.save.

    Args:
        plan: Returns this rank's plan: plan_state, or one that waits until the plan is staged.
        target: Where the checkpoint goes.
        coordinator: The ranks.
        base: Opens the base of an incremental save.
        check_replicas: Compare replicas of any size.
        staged: Nothing changes the plan's data while it is written.
    """
    watch, work = Stopwatch(), Stopwatch()
    with watch.phase("plan"):
        with work.phase("plan"), collector_paused():
            local = attempt(plan)
        agreement = agree(coordinator, local, target, work)
    with agreement, watch.phase("write"):
        options = {"check_replicas": check_replicas, "staged": staged}
        written = attempt(write_agreed, agreement, coordinator, base, work, **options)
        committed, profile = commit(coordinator, written, agreement, work)
    report = SaveReport(
        path=target.path,
        world_size=coordinator.world_size,
        seconds=watch.seconds,
        profile=profile,
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
