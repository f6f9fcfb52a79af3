"""Cases that load a whole state."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import raw
from benchmarks.bench import Bench, page_cache, peers, raw_loaders, shards
from benchmarks.peers import Peer, Safetensors, Shardckpt, present
from benchmarks.ranks import Place
from benchmarks.rounds import Contestant, Results, compete
from benchmarks.states import Check, fill_from, flat_tensors, local_bytes, state_of, trained
from benchmarks.table import Row, Target, row


def _load_job(place: Place, bench: Bench, cold: bool) -> Results:
    state = state_of(*trained(bench.size_bytes, sharded=True))
    whole = torch.load(f"{bench.whole}/state.pt", mmap=True, weights_only=True)
    fill_from(state, whole)
    check = Check(state)
    contestants = []
    for peer in peers(place, state):
        if place.world_size != 4 and not peer.reshards:
            continue
        path = bench.checkpoint(peer.name)

        def before(path: str = path) -> None:
            check.wipe(state)
            page_cache(place, path, cold=cold)

        def run(peer: Peer = peer, path: str = path) -> None:
            peer.load(path)

        contestants.append(
            Contestant(name=peer.name, before=before, run=run, after=lambda: check.verify(state))
        )
    contestants += raw_loaders(place, shards(bench), local_bytes(state), cold=cold)
    return compete(place, contestants, rounds=bench.rounds)


def load(bench: Bench) -> list[Row]:
    """Load on the 4 ranks that saved, warm and cold."""
    bench.save_once()
    warm = bench.run("load, warm", 4, _load_job, False)
    cold = bench.run("load, cold", 4, _load_job, True)
    fast, near = Target(against="DCP", factor=2.8), Target(against="raw", factor=1.5)
    return [
        row("load, same layout, 4 ranks, warm", "s", warm, fast, near),
        row("load, same layout, 4 ranks, cold", "s", cold, *COLD),
    ]


COLD = (Target(against="DCP", factor=1.3), Target(against="raw", factor=1.1))


def reshard(bench: Bench) -> list[Row]:
    """Load on 2 and on 3 ranks what 4 have saved, warm and cold."""
    bench.save_once()
    rows = []
    for world_size, factor in ((2, 2.2), (3, 3.0)):
        for cold in (False, True):
            title = f"reshard 4 to {world_size}, {'cold' if cold else 'warm'}"
            results = bench.run(title, world_size, _load_job, cold)
            warm = (Target(against="DCP", factor=factor), Target(against="raw", factor=1.5))
            rows.append(row(title, "s", results, *(COLD if cold else warm)))
    return rows


def _empty_like(whole: Any) -> Any:
    from torch.utils._pytree import tree_map

    return tree_map(lambda x: torch.empty_like(x) if isinstance(x, torch.Tensor) else x, whole)


def _whole_loaders(place: Place, bench: Bench, whole: Any) -> dict[str, tuple[str, Any]]:
    """How each library builds the whole state in one process: path, and a function."""
    from safetensors.torch import load_file

    import shardckpt

    loaders: dict[str, tuple[str, Any]] = {
        "shardckpt": (bench.checkpoint("shardckpt"), shardckpt.load_state),
        "safetensors": (bench.whole, lambda path: load_file(f"{path}/state.safetensors")),
        "torch.save": (
            bench.whole,
            lambda path: torch.load(f"{path}/state.pt", weights_only=True),
        ),
    }

    def in_place(kind: type[Peer], path: str) -> Any:
        state = _empty_like(whole)
        kind(place, state).load(path)
        return state

    for kind in present()[0]:
        if kind.reshards and kind is not Shardckpt:
            path = bench.checkpoint(kind.name)
            loaders[kind.name] = (path, lambda path, kind=kind: in_place(kind, path))
    return loaders


def _process_job(place: Place, bench: Bench, cold: bool) -> Results:
    whole = torch.load(f"{bench.whole}/state.pt", weights_only=True)
    check = Check(whole)
    held: list[Any] = []
    contestants = []
    for name, (path, function) in _whole_loaders(place, bench, whole).items():

        def run(function: Any = function, path: str = path) -> None:
            held.append(function(path))
            _touch(held[0])

        def after(name: str = name) -> None:
            found = held.pop()
            if name == Safetensors.name:  # flat, and in alphabetical order
                found = {key: found[key] for key in flat_tensors(whole)}
            check.verify(found)

        def before(path: str = path) -> None:
            page_cache(place, path, cold=cold)

        contestants.append(Contestant(name=name, before=before, run=run, after=after))
    contestants += raw_loaders(place, shards(bench), local_bytes(whole), cold=cold)
    if not cold:
        contestants.append(_fresh_copy(local_bytes(whole)))
    return compete(place, contestants, rounds=bench.rounds)


def _touch(state: Any) -> None:
    """Look at a byte of every page: a library may have mapped a file that it has not read."""
    for tensor in flat_tensors(state).values():
        tensor.reshape(-1).view(torch.uint8)[:: raw.PAGE_BYTES].sum()


def _fresh_copy(size_bytes: int) -> Contestant:
    source = raw.Memory(size_bytes)
    held: list[raw.Memory] = []

    def run() -> None:
        held.append(raw.Memory(size_bytes, touched=False))
        raw.copy(size_bytes, source, held[0], threads=1)

    return Contestant(name="fresh memcpy", run=run, after=held.clear)


def process(bench: Bench) -> list[Row]:
    """The whole state in one CPU process, warm and cold."""
    bench.save_once()
    warm = bench.run("one process, warm", 1, _process_job, False)
    cold = bench.run("one process, cold", 1, _process_job, True)
    first = row("one CPU process, warm", "s", warm, Target(against="DCP", factor=1.5))
    fresh = first.figures.pop("fresh memcpy", None)
    rows = [first]
    if fresh is not None:
        own = {k: v for k, v in first.figures.items() if k == "shardckpt"}
        rows.append(
            Row(
                title="the same, beside one memcpy into fresh memory",
                unit="s",
                figures={**own, "raw": fresh},
                targets=[Target(against="raw", factor=1)],
            )
        )
    return [*rows, row("one CPU process, cold", "s", cold, *COLD)]
