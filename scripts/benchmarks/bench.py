"""The common parts of the cases: folder, size, rounds, and the contestants of several cases."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import raw
from benchmarks.files import drop_cache, files_under, fill_cache
from benchmarks.peers import Peer, Shardckpt, present
from benchmarks.ranks import Place, run_ranks
from benchmarks.rounds import Contestant, Results
from benchmarks.states import flat_tensors, state_of, trained, whole_of


@dataclass(slots=True, kw_only=True)
class Bench:
    """The common arguments of all cases: folder, size, rounds; and their results."""

    root: str
    size_bytes: float
    store_bytes: float
    rounds: int
    small: int
    planning: tuple[int, int]  # ranks, tensors
    found: dict[str, Any] = field(default_factory=dict)  # every sample, by measurement
    saved: bool = False

    def run(self, title: str, world_size: int, job: Callable[..., Results], *args: Any) -> Results:
        """Run a job on ranks; keep every sample."""
        results = run_ranks(world_size, job, self, *args)[0]
        self.found[title] = results.as_json()
        for name, reason in results.failures.items():
            print(f"{title}: {name} is out: {reason}", flush=True)
        return results

    def checkpoint(self, name: str) -> str:
        """The path of a peer's checkpoint of 4 ranks."""
        return os.path.join(self.root, "saved", slug(name))

    @property
    def whole(self) -> str:
        """The path of the same state in one torch file, and of its tensors in one safetensors."""
        return os.path.join(self.root, "saved", "whole")

    def save_once(self) -> None:
        """Save a sharded state with every peer, and unsharded, for the cases that load."""
        if not self.saved:
            run_ranks(4, _save_once, self)
            self.saved = True


def remove(place: Place, path: str) -> None:
    """Remove an earlier checkpoint, and let the disk come to rest."""
    if place.rank == 0:
        shutil.rmtree(path, ignore_errors=True)
        os.sync()


def slug(name: str) -> str:
    """A contestant's name as that of a directory."""
    return name.replace(", ", "-").replace(" ", "-")


def peers(place: Place, state: Any, **options: bool) -> list[Peer]:
    """All peers that can be made ready for a state, shardckpt first."""
    found = []
    for kind in present()[0]:
        try:
            found.append(kind(place, state, **options))
        except Exception as error:
            print(f"{kind.name} is out: {error}", flush=True)
    return found


def _save_once(place: Place, bench: Bench) -> None:
    state = state_of(*trained(bench.size_bytes, sharded=True))
    for peer in peers(place, state):
        peer.save(bench.checkpoint(peer.name))
        peer.close()
    whole = whole_of(state)
    if place.rank == 0:
        os.makedirs(bench.whole)
        torch.save(whole, f"{bench.whole}/state.pt")
        from safetensors.torch import save_file

        save_file(flat_tensors(whole), f"{bench.whole}/state.safetensors")
        os.sync()


def raw_writers(place: Place, path: str, size_bytes: int) -> list[Contestant]:
    """The same number of bytes, written past the page cache and synced."""
    source = raw.Memory(raw.PIECE_BYTES, huge=True)
    return [
        Contestant(
            name=f"raw, O_DIRECT, {threads} threads a rank",
            before=lambda: remove(place, path),
            run=lambda threads=threads: raw.write(
                f"{path}/{place.rank}", size_bytes, source, threads=threads
            ),
        )
        for threads in (1, 2)
    ]


def savers(place: Place, bench: Bench, state: Any, **options: bool) -> list[Contestant]:
    """Each peer's save; the checkpoint of the round before is removed first."""
    found = []
    for peer in peers(place, state, **options):
        path = f"{bench.root}/{slug(peer.name)}"
        found.append(
            Contestant(
                name=peer.name,
                before=lambda path=path: remove(place, path),
                run=lambda peer=peer, path=path: peer.save(path),
            )
        )
    return found


def shards(bench: Bench) -> list[str]:
    """shardckpt's files: what cold raw reads read."""
    files = files_under(bench.checkpoint(Shardckpt.name))
    return [file for file in files if file.endswith(".safetensors")]


def page_cache(place: Place, path: str, *, cold: bool) -> None:
    """Drop a checkpoint from the page cache, or bring it in."""
    if place.rank == 0:
        (drop_cache if cold else fill_cache)(path)


def raw_loaders(
    place: Place, shards: list[str], size_bytes: int, *, cold: bool
) -> list[Contestant]:
    """The same bytes copied in memory, or read from the disk in every way."""
    target = raw.Memory(size_bytes, huge=True)
    if cold:
        spans = raw.share(shards, rank=place.rank, world_size=place.world_size)
        return [
            Contestant(
                name=f"raw, {name}",
                before=lambda: page_cache(place, os.path.dirname(shards[0]), cold=True),
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
