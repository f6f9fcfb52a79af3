"""The case of many small tensors: what each costs by itself."""

from __future__ import annotations

from benchmarks.bench import Bench, peers, raw_loaders, raw_writers, savers, slug
from benchmarks.ranks import Place
from benchmarks.rounds import Contestant, Results, compete
from benchmarks.states import Check, local_bytes, small_tensors
from benchmarks.table import Row, Target, row


def _small_save_job(place: Place, bench: Bench) -> Results:
    state = small_tensors(bench.small)
    contestants = savers(place, bench, state)
    contestants += raw_writers(place, f"{bench.root}/raw", local_bytes(state))
    return compete(place, contestants, rounds=bench.rounds)


def _small_load_job(place: Place, bench: Bench) -> Results:
    state = small_tensors(bench.small)
    check = Check(state)
    contestants = []
    for peer in peers(place, state):
        path = f"{bench.root}/{slug(peer.name)}"
        contestants.append(
            Contestant(
                name=peer.name,
                before=lambda: check.wipe(state),
                run=lambda peer=peer, path=path: peer.load(path),
                after=lambda: check.verify(state),
            )
        )
    contestants += raw_loaders(place, [], local_bytes(state), cold=False)
    return compete(place, contestants, rounds=bench.rounds)


def small(bench: Bench) -> list[Row]:
    """20,000 tensors of 256 floats in one process, saved and loaded."""
    limit = Target(against="limit", factor=bench.small * 10e-6 * 1e3)
    saved = bench.run("small, save", 1, _small_save_job)
    loaded = bench.run("small, load", 1, _small_load_job)
    goals = (Target(against="DCP", factor=30), limit)
    return [
        row(f"{bench.small:,} small tensors, save", "ms", saved, *goals),
        row(f"{bench.small:,} small tensors, load, warm", "ms", loaded, *goals),
    ]
