"""The cases, by name; each gives rows for the table."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import raw
from benchmarks.files import bytes_read, disk_bytes, drop_cache, files_under, fill_cache
from benchmarks.peers import Dcp, Peer, Safetensors, Shardckpt, TorchSave, present
from benchmarks.ranks import Place, run_ranks
from benchmarks.rounds import Contestant, Results, compete
from benchmarks.states import (
    Check,
    fill_from,
    flat_tensors,
    local_bytes,
    small_tensors,
    state_of,
    trained,
    whole_of,
)
from benchmarks.table import Row, Target, row
from shardckpt.format.digests import BLOCK_BYTES


@dataclass(slots=True, kw_only=True)
class Bench:
    """What all cases share: where to write, how much, how often; and what they found."""

    root: str
    size_bytes: float
    rounds: int
    small: int
    raw_results: dict[str, Any] = field(default_factory=dict)
    saved: bool = False

    def run(self, title: str, world_size: int, job: Callable[..., Results], *args: Any) -> Results:
        """Run a job on ranks; keep every sample."""
        results = run_ranks(world_size, job, self, *args)[0]
        self.raw_results[title] = results.as_json()
        for name, reason in results.failures.items():
            print(f"{title}: {name} is out: {reason}", flush=True)
        return results

    def checkpoint(self, name: str) -> str:
        """The path of a peer's checkpoint of 4 ranks."""
        return os.path.join(self.root, "saved", name.replace(" ", "-"))

    @property
    def whole(self) -> str:
        """The path of the same state in one torch file, and of its tensors in one safetensors."""
        return os.path.join(self.root, "saved", "whole")

    def save_once(self) -> None:
        """Save a sharded state with every peer, and unsharded, for the cases that load."""
        if not self.saved:
            run_ranks(4, _save_once, self)
            self.saved = True


def _remove(place: Place, path: str) -> None:
    if place.rank == 0:
        shutil.rmtree(path, ignore_errors=True)
        os.sync()


def _save_once(place: Place, bench: Bench) -> None:
    state = state_of(*trained(bench.size_bytes, sharded=True))
    for kind in present()[0]:
        try:
            peer = kind(place, state)
            peer.save(bench.checkpoint(peer.name))
            peer.close()
        except Exception as error:
            print(f"{kind.name} can't save: {error}")
    whole = whole_of(state)
    if place.rank == 0:
        os.makedirs(bench.whole)
        torch.save(whole, f"{bench.whole}/state.pt")
        from safetensors.torch import save_file

        save_file(flat_tensors(whole), f"{bench.whole}/state.safetensors")
        os.sync()


def _raw_writers(place: Place, path: str, size_bytes: int) -> list[Contestant]:
    source = raw.Memory(raw.PIECE_BYTES)
    return [
        Contestant(
            name=f"raw, O_DIRECT, {threads} threads a rank",
            before=lambda: _remove(place, path),
            run=lambda threads=threads: raw.write(
                f"{path}/{place.rank}", size_bytes, source, threads=threads
            ),
        )
        for threads in (1, 2)
    ]


def _savers(place: Place, bench: Bench, state: Any, *, replicated: bool) -> list[Contestant]:
    found = []
    for kind in present()[0]:
        try:
            peer = kind(place, state, replicated=replicated)
        except Exception as error:
            print(f"{kind.name} can't save: {error}")
            continue
        path = f"{bench.root}/{peer.name.replace(' ', '-')}"

        def run(peer: Peer = peer, path: str = path) -> None:
            peer.save(path)

        found.append(
            Contestant(name=peer.name, run=run, before=lambda path=path: _remove(place, path))
        )
    return found


def _save_job(place: Place, bench: Bench, replicated: bool) -> Results:
    state = state_of(*trained(bench.size_bytes, sharded=not replicated))
    size = local_bytes(state) // (place.world_size if replicated else 1)
    contestants = _savers(place, bench, state, replicated=replicated)
    contestants += _raw_writers(place, f"{bench.root}/raw", size)
    results = compete(place, contestants, rounds=bench.rounds)
    for contestant in contestants:  # what the last round left
        if contestant.name in results.samples and not contestant.name.startswith("raw"):
            path = f"{bench.root}/{contestant.name.replace(' ', '-')}"
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
        row("its peak memory, all ranks", "MB", results, of="peak_bytes", raw=False),
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


def _load_job(place: Place, bench: Bench, cold: bool) -> Results:
    state = state_of(*trained(bench.size_bytes, sharded=True))
    whole = torch.load(f"{bench.whole}/state.pt", mmap=True, weights_only=True)
    fill_from(state, whole)
    check = Check(state)
    contestants = []
    for kind in present()[0]:
        if place.world_size != 4 and not kind.reshards:
            continue
        peer, path = kind(place, state), bench.checkpoint(kind.name)

        def before(path: str = path) -> None:
            check.wipe(state)
            _page_cache(place, path, cold=cold)

        def run(peer: Peer = peer, path: str = path) -> None:
            peer.load(path)

        contestants.append(
            Contestant(name=peer.name, before=before, run=run, after=lambda: check.verify(state))
        )
    shards = _shards(bench)
    contestants += _raw_loaders(place, shards, local_bytes(state), cold=cold)
    return compete(place, contestants, rounds=bench.rounds)


def _shards(bench: Bench) -> list[str]:
    files = files_under(bench.checkpoint(Shardckpt.name))
    return [file for file in files if file.endswith(".safetensors")]


def _page_cache(place: Place, path: str, *, cold: bool) -> None:
    if place.rank == 0:
        (drop_cache if cold else fill_cache)(path)


def _raw_loaders(
    place: Place, shards: list[str], size_bytes: int, *, cold: bool
) -> list[Contestant]:
    target = raw.Memory(size_bytes)
    if cold:
        spans = raw.share(shards, rank=place.rank, world_size=place.world_size)
        return [
            Contestant(
                name=f"raw, {name}",
                before=lambda: _page_cache(place, os.path.dirname(shards[0]), cold=True),
                run=lambda way=way: way(spans, target),
            )
            for name, way in raw.read_ways().items()
        ]
    source = raw.Memory(size_bytes)
    threads = [1] if place.world_size > 1 else [1, 2]
    return [
        Contestant(
            name=f"raw, memcpy, {count} threads a rank",
            run=lambda count=count: raw.copy(size_bytes, source, target, threads=count),
        )
        for count in threads
    ]


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

        def after(name: str = name) -> None:
            found = held.pop()
            if name == Safetensors.name:  # flat, and in alphabetical order
                found = {key: found[key] for key in flat_tensors(whole)}
            check.verify(found)

        def before(path: str = path) -> None:
            _page_cache(place, path, cold=cold)

        contestants.append(Contestant(name=name, before=before, run=run, after=after))
    contestants += _raw_loaders(place, _shards(bench), local_bytes(whole), cold=cold)
    if not cold:
        contestants.append(_fresh_copy(local_bytes(whole)))
    return compete(place, contestants, rounds=bench.rounds)


def _fresh_copy(size_bytes: int) -> Contestant:
    source = raw.Memory(size_bytes)
    held: list[raw.Memory] = []

    def run() -> None:
        held.append(raw.Memory(size_bytes, touched=False))
        raw.copy(size_bytes, source, held[0], threads=1)

    return Contestant(name="fresh memcpy", run=run, after=held.clear)


def process(bench: Bench) -> list[Row]:
    """The whole state in one CPU process, warm and cold; and from the disk when touched."""
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
    disk = bench.run("disk", 1, _disk_job)
    return [
        *rows,
        row("one CPU process, cold", "s", cold, *COLD),
        row(
            'device_map="disk" to the first tensor', "ms", disk, Target(against="limit", factor=50)
        ),
    ]


def _disk_job(place: Place, bench: Bench) -> Results:
    import shardckpt

    name = "embedding.weight"

    def own() -> None:
        shardckpt.load_state(bench.checkpoint("shardckpt"), device_map="disk")["model"][name][
            0
        ].sum()

    def torch_file() -> None:
        torch.load(f"{bench.whole}/state.pt", mmap=True, weights_only=True)["model"][name][0].sum()

    return compete(
        place,
        [
            Contestant(
                name=kind,
                before=lambda path=path: _page_cache(place, path, cold=True),
                run=run,
            )
            for kind, path, run in (
                ("shardckpt", bench.checkpoint("shardckpt"), own),
                ("torch.load, mmap", bench.whole, torch_file),
            )
        ],
        rounds=bench.rounds,
    )


def _small_save_job(place: Place, bench: Bench) -> Results:
    state = small_tensors(bench.small)
    contestants = _savers(place, bench, state, replicated=False)
    contestants += _raw_writers(place, f"{bench.root}/raw", local_bytes(state))
    return compete(place, contestants, rounds=bench.rounds)


def _small_load_job(place: Place, bench: Bench) -> Results:
    state = small_tensors(bench.small)
    check = Check(state)
    contestants = []
    for kind in present()[0]:
        peer, path = kind(place, state), f"{bench.root}/{kind.name.replace(' ', '-')}"
        contestants.append(
            Contestant(
                name=peer.name,
                before=lambda: check.wipe(state),
                run=lambda peer=peer, path=path: peer.load(path),
                after=lambda: check.verify(state),
            )
        )
    contestants += _raw_loaders(place, [], local_bytes(state), cold=False)
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


def _slice_job(place: Place, bench: Bench) -> Results:
    import torch.distributed.checkpoint as dcp
    from safetensors import safe_open

    import shardckpt

    whole = torch.load(f"{bench.whole}/state.pt", weights_only=True)
    name = "embedding.weight"
    expected = whole["model"][name][:8].clone()
    shape = whole["model"][name].shape
    held: list[torch.Tensor] = []

    def own() -> torch.Tensor:
        with shardckpt.open_checkpoint(bench.checkpoint("shardckpt")) as checkpoint:
            return checkpoint[f"model.{name}"][0:8]

    def by_dcp() -> torch.Tensor:
        state = {"model": {name: torch.empty(shape)}}
        dcp.load(state, checkpoint_id=bench.checkpoint("DCP"))
        return state["model"][name][:8]

    def by_safetensors() -> torch.Tensor:
        with safe_open(f"{bench.whole}/state.safetensors", "pt") as file:
            return file.get_slice(f"model.{name}")[0:8]

    def by_torch() -> torch.Tensor:
        state = torch.load(f"{bench.whole}/state.pt", mmap=True, weights_only=True)
        return state["model"][name][:8].clone()

    def by_hand() -> torch.Tensor:
        into = torch.empty_like(expected)
        with open(_shards(bench)[0], "rb", buffering=0) as file:
            file.readinto(into.numpy().data.cast("B"))
        return expected

    def measured(function: Callable[[], torch.Tensor]) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            before = bytes_read()
            held.append(function())
            return {"bytes_read": bytes_read() - before}

        return run

    def after() -> None:
        assert torch.equal(held.pop(), expected)

    ways = {
        "shardckpt": own,
        Dcp.name: by_dcp,
        Safetensors.name: by_safetensors,
        TorchSave.name: by_torch,
        "raw, pread": by_hand,
    }
    contestants = [
        Contestant(name=key, run=measured(way), after=after) for key, way in ways.items()
    ]
    return compete(place, contestants, rounds=max(bench.rounds, 5))


def slices(bench: Bench) -> list[Row]:
    """8 rows of one weight: time, and bytes asked for in read calls (mapped pages are not)."""
    bench.save_once()
    results = bench.run("slice", 1, _slice_job)
    manifest = os.path.getsize(f"{bench.checkpoint('shardckpt')}/manifest.json")
    allowed = results.median("raw, pread", "bytes_read") + BLOCK_BYTES + manifest
    within = Target(against="limit", factor=allowed * 1e-3)
    return [
        row("8 rows of one weight, warm", "ms", results, Target(against="DCP", factor=20)),
        row("the bytes it reads", "KB", results, within, of="bytes_read"),
    ]


CASES: dict[str, Callable[[Bench], list[Row]]] = {
    "save": save,
    "save-replicated": save_replicated,
    "load": load,
    "reshard": reshard,
    "process": process,
    "small": small,
    "slice": slices,
}
"""Every case by the name that the command line takes."""
