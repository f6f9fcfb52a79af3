"""The case of an object store: SeaweedFS on this machine, with the interface of S3."""

from __future__ import annotations

import os
from typing import Any

import torch

from benchmarks.bench import Bench, slug
from benchmarks.peers import Dcp, Peer, Shardckpt
from benchmarks.ranks import Place
from benchmarks.rounds import Contestant, Results, compete
from benchmarks.states import Check, state_of, trained
from benchmarks.table import Row, Target, row


class DcpFsspec(Dcp):
    """torch.distributed.checkpoint with its writer for fsspec, over s3fs."""

    name = "DCP, s3fs"

    def writer(self, path: str) -> Any:
        """See Dcp."""
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        return FsspecWriter(path)

    def load(self, path: str) -> None:
        """See Peer."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

        dcp.load(self.state, storage_reader=FsspecReader(path))


def _peers(place: Place, state: Any) -> list[Peer]:
    found: list[Peer] = [Shardckpt(place, state)]
    try:
        import s3fs  # noqa: F401
    except ImportError:
        if place.rank == 0:
            print("not compared: DCP, s3fs: pip install s3fs", flush=True)
        return found
    return [*found, DcpFsspec(place, state)]


def _clear(place: Place, url: str) -> None:
    """Delete a checkpoint."""
    if place.rank == 0:
        from shardckpt.storage.resolve import resolve

        objects, prefix = resolve(url).storage.at(url)  # type: ignore[attr-defined]
        objects.delete([found.key for found in objects.list(prefix)])
    place.barrier()


def _job(place: Place, bench: Bench, variables: dict[str, str], load: bool) -> Results:
    os.environ.update(variables)
    torch.manual_seed(0)
    state = state_of(*trained(bench.size_bytes, sharded=True))
    check = Check(state)
    contestants = []
    for peer in _peers(place, state):
        url = f"s3://tests/{slug(peer.name)}"
        if load:
            _clear(place, url)
            peer.save(url)
        contestants.append(
            Contestant(
                name=peer.name,
                before=lambda url=url: check.wipe(state) if load else _clear(place, url),
                run=lambda peer=peer, url=url: (peer.load if load else peer.save)(url),
                after=lambda: check.verify(state),
            )
        )
    return compete(place, contestants, rounds=bench.rounds)


def store(bench: Bench) -> list[Row]:
    """Save to and load from an object store on this machine, 4 ranks."""
    from tests.object_server import object_server

    goal = Target(against="DCP, s3fs", factor=2)
    with object_server(volumes=400) as variables:
        saved = bench.run("store, save", 4, _job, variables, False)
        loaded = bench.run("store, load", 4, _job, variables, True)
    peaks = {name: peak / 1e6 for name, peak in saved.peak_bytes().items()}
    return [
        row("save to an object store, 4 ranks", "s", saved, goal),
        Row(title="its peak memory, all ranks", unit="MB", figures=peaks),
        row("load from it, 4 ranks", "s", loaded, goal),
    ]
