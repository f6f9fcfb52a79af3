"""The cache keeps the newest plans, and few large ones."""

from __future__ import annotations

from shardckpt.plan.plan_cache import KnownPlan, PlanCache
from shardckpt.plan.save_plan import RankWrites, global_plan
from tests.plan.plans import replicated


def test_the_newest_plans_are_kept():
    cache = PlanCache()
    plans = replicated([4], 1)
    plan = global_plan(plans)
    writes = RankWrites.of(plans[0], plan.shares[0])
    for number in range(9):
        cache.plan("0")
        cache.writes(("0",))
        cache.add_plan(str(number), KnownPlan(plan))
        cache.add_writes((str(number),), f"plan {number}", writes)
    kept = [number for number in range(9) if cache.plan(str(number))]
    assert kept == [number for number in range(9) if cache.writes((str(number),))]
    assert kept == [0, 2, 3, 4, 5, 6, 7, 8]
    cache.add_writes(("8",), "another", writes)
    assert cache.writes(("8",)) == ("another", writes)


def test_large_plans_make_room(monkeypatch):
    monkeypatch.setattr("shardckpt.plan.plan_cache._LIMIT_BYTES", 1)
    cache = PlanCache()
    for name in "ab":
        cache.add_plan(name, KnownPlan(global_plan(replicated([4], 1))))
    assert cache.plan("a") is None
    assert cache.plan("b") is not None
