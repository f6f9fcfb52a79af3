"""The cases by name."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.bench import Bench
from benchmarks.loading import load, process, reshard
from benchmarks.partial import disk, slices
from benchmarks.planning import planning
from benchmarks.repeated import blocks, frozen
from benchmarks.saving import save, save_replicated
from benchmarks.small import small
from benchmarks.stores import store, store_replicas, store_tiers
from benchmarks.table import Row
from benchmarks.trainer import trainer
from benchmarks.training import blocked, blocked_replicated, train

CASES: dict[str, Callable[[Bench], list[Row]]] = {
    "save": save,
    "save-replicated": save_replicated,
    "load": load,
    "reshard": reshard,
    "process": process,
    "disk": disk,
    "slice": slices,
    "small": small,
    "async": blocked,
    "async-replicated": blocked_replicated,
    "train": train,
    "trainer": trainer,
    "frozen": frozen,
    "blocks": blocks,
    "planning": planning,
    "store": store,
    "store-replicas": store_replicas,
    "store-tiers": store_tiers,
}
"""The cases by their names on the command line. A case returns rows of the table."""
