"""The cases of a state that is saved again and again while most of it does not change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.bench import Bench, peers, remove, slug
from benchmarks.files import bytes_written
from benchmarks.peers import Peer, Shardckpt
from benchmarks.ranks import Place
from benchmarks.rounds import Contestant, Results, compete
from benchmarks.states import Check, state_of, step, with_frozen_base
from benchmarks.table import Row, Target, row


class _Based(Shardckpt):
    """shardckpt, told of its save before."""

    base: str | None = None

    def save(self, path: str) -> None:
        """See Peer."""
        import shardckpt

        shardckpt.save(self.state, path, base=self.base)
        self.base = path


def _contestant(
    place: Place, peer: Peer, state: dict[str, Any], turns: list[str], change: Callable[[], object]
) -> Contestant:
    """A peer that saves to two paths in turn. `change` changes the state before each save."""

    def before() -> None:
        change()
        turns.reverse()  # the checkpoint before last makes room
        remove(place, turns[0])

    def run() -> dict[str, float]:
        count = bytes_written()
        peer.save(turns[0])
        return {"bytes_written": bytes_written() - count}

    def after() -> None:
        check = Check(state)
        check.wipe(state)
        peer.load(turns[0])
        check.verify(state)

    return Contestant(name=peer.name, before=before, run=run, after=after)


def _frozen_job(place: Place, bench: Bench) -> Results:
    model, optimizer = with_frozen_base(bench.size_bytes)
    state = state_of(model, optimizer)
    based = _Based(place, {"model": model, "optimizer": optimizer})  # it asks what is frozen
    contestants = []
    for peer in [based, *(peer for peer in peers(place, state) if peer.name != based.name)]:
        turns = [f"{bench.root}/{slug(peer.name)}-{turn}" for turn in (0, 1)]
        contestants.append(_contestant(place, peer, state, turns, lambda: step(optimizer)))
    return compete(place, contestants, rounds=bench.rounds)


def frozen(bench: Bench) -> list[Row]:
    """Repeated save on 4 ranks of a state of which 90% is frozen."""
    results = bench.run("frozen", 4, _frozen_job)
    fewer = Target(against="DCP", factor=5)
    return [
        row("repeated save, 90% frozen: bytes written", "MB", results, fewer, of="bytes_written"),
        row("repeated save, 90% frozen", "s", results),
    ]


_ROW_BYTES = 1 << 20


def _blocks_job(place: Place, bench: Bench, folder: str) -> Results:
    rows = max(40, round(bench.size_bytes / place.world_size / _ROW_BYTES))
    torch.manual_seed(place.rank)
    weight = torch.randn(rows, _ROW_BYTES // 4)
    mesh = init_device_mesh("cpu", (place.world_size,))
    state = {"weight": DTensor.from_local(weight, mesh, [Shard(0)])}

    def change() -> None:
        changed = rows // 10
        first = int(torch.randint(rows - changed, ()))
        weight[first : first + changed] += 1

    contestants = []
    for name, kind, changes in (
        ("shardckpt", _Based, change),  # once a round: the other one saves the same state
        ("without base=", Shardckpt, lambda: None),
    ):
        turns = [f"{folder}/{slug(name)}-{turn}" for turn in (0, 1)]
        contestant = _contestant(place, kind(place, state), state, turns, changes)
        contestants.append(dataclasses.replace(contestant, name=name))
    return compete(place, contestants, rounds=bench.rounds)


def blocks(bench: Bench) -> list[Row]:
    """Repeated save on 4 ranks of a tensor of which a tenth changes, on XFS and Btrfs."""
    from tests.storage.clones import mounted

    rows: list[Row] = []
    for kind in ("xfs", "btrfs"):
        size_bytes = int(5 * bench.size_bytes) + (1 << 30)
        with mounted(kind, size_bytes=size_bytes, folder=bench.root) as folder:
            if isinstance(folder, str):
                print(f"not measured: blocks on {kind}: {folder}", flush=True)
                continue
            results = bench.run(f"blocks, {kind}", 4, _blocks_job, str(folder))
        title = f"repeated save, a tenth of a tensor changed, {kind}"
        fewer = Target(against="without base=", factor=8)
        rows += [
            row(f"{title}: bytes written", "MB", results, fewer, of="bytes_written"),
            row(title, "s", results),
        ]
    return rows
