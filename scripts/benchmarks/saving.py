"""Cases that save."""

from __future__ import annotations

from benchmarks.bench import Bench, raw_writers, savers, slug
from benchmarks.files import disk_bytes
from benchmarks.ranks import Place
from benchmarks.rounds import RAW, Results, compete
from benchmarks.states import local_bytes, state_of, trained
from benchmarks.table import Row, Target, row


def _save_job(place: Place, bench: Bench, replicated: bool) -> Results:
    state = state_of(*trained(bench.size_bytes, sharded=not replicated))
    size = local_bytes(state) // (place.world_size if replicated else 1)
    contestants = savers(place, bench, state, replicated=replicated)
    contestants += raw_writers(place, f"{bench.root}/raw", size)
    results = compete(place, contestants, rounds=bench.rounds)
    for contestant in contestants:  # what the last round left
        if contestant.name in results.samples and not contestant.name.startswith("raw"):
            path = f"{bench.root}/{slug(contestant.name)}"
            results.disk_bytes[contestant.name] = disk_bytes(path)
    return results


def save(bench: Bench) -> list[Row]:
    """Save of a sharded state, 4 ranks, durable: time, processor time, memory, disk."""
    results = bench.run("save", 4, _save_job, False)
    return [
        row(
            "save, 4 ranks",
            "s",
            results,
            Target(against="DCP", factor=1.7),
            Target(against="raw", factor=1.2),
        ),
        row(
            "its processor time, all ranks",
            "s",
            results,
            Target(against="DCP", factor=2),
            of="cpu_seconds",
        ),
        Row(
            title="its peak memory, all ranks",
            unit="MB",
            figures={
                name: peak / 1e6
                for name, peak in results.peak_bytes().items()
                if not name.startswith(RAW)
            },
        ),
        Row(
            title="bytes on disk",
            unit="MB",
            figures={name: size / 1e6 for name, size in results.disk_bytes.items()},
        ),
    ]


def save_replicated(bench: Bench) -> list[Row]:
    """Save of a replicated state (DDP), 4 ranks, durable."""
    results = bench.run("save-replicated", 4, _save_job, True)
    return [
        row(
            "save, replicated state, 4 ranks",
            "s",
            results,
            Target(against="DCP", factor=2),
            Target(against="raw", factor=1.2),
        )
    ]
