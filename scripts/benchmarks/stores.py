"""The cases of an object store: SeaweedFS on this machine, with the interface of S3."""

from __future__ import annotations

import os
import platform
import shutil
from typing import Any

import torch

from benchmarks.bench import Bench, slug
from benchmarks.peers import Dcp, Peer, Shardckpt
from benchmarks.ranks import Place
from benchmarks.rounds import Contestant, Results, compete
from benchmarks.states import Check, state_of, trained
from benchmarks.table import Row, Target, row

ROOT = "s3://tests"


class DcpFsspec(Dcp):
    """torch.distributed.checkpoint with its writer for fsspec, over s3fs."""

    name = "DCP, s3fs"
    package = "s3fs"

    def writer(self, path: str) -> Any:
        """See Dcp."""
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        return FsspecWriter(path)

    def reader(self, path: str) -> Any:
        """Return the reader of a load."""
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

        return FsspecReader(path)

    def load(self, path: str) -> None:
        """See Peer."""
        import torch.distributed.checkpoint as dcp

        dcp.load(self.state, storage_reader=self.reader(path))


class DcpConnector(DcpFsspec):
    """torch.distributed.checkpoint with the writer of s3torchconnector."""

    name = "DCP, s3torchconnector"
    package = "s3torchconnector"

    def _connected(self, kind: str, path: str) -> Any:
        from s3torchconnector import S3ClientConfig, dcp
        from s3torchconnector._s3client import S3Client
        from s3torchconnector.dcp.s3_file_system import S3FileSystem

        region = os.environ["AWS_REGION"]
        settings = S3ClientConfig(force_path_style=True)
        made = getattr(dcp, kind)(region, path, s3client_config=settings)
        made.fs = S3FileSystem(
            region,
            s3_client=S3Client(
                region, endpoint=os.environ["AWS_ENDPOINT_URL"], s3client_config=settings
            ),
            **({"reader_constructor": made._reader_constructor} if "Reader" in kind else {}),
        )
        return made

    def writer(self, path: str) -> Any:
        """See Dcp."""
        return self._connected("S3StorageWriter", path)

    def reader(self, path: str) -> Any:
        """See DcpFsspec."""
        return self._connected("S3StorageReader", path)


def _peers(place: Place, state: Any) -> list[Peer]:
    found: list[Peer] = [Shardckpt(place, state)]
    for kind in (DcpFsspec, DcpConnector):
        if reason := kind.missing():
            if place.rank == 0:
                print(f"not compared: {kind.name}: {reason}", flush=True)
            continue
        found.append(kind(place, state))
    return found


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
    state = state_of(*trained(bench.store_bytes, sharded=True))
    check = Check(state)
    contestants = []
    for peer in _peers(place, state):
        url = f"{ROOT}/{slug(peer.name)}"
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


def _replicas(place: Place, bench: Bench, variables: dict[str, str]) -> Results:
    """Every rank loads the complete state, as under DDP, as if on a machine of its own."""
    import shardckpt

    os.environ.update(variables)
    torch.manual_seed(0)
    state = state_of(*trained(bench.store_bytes, sharded=False))
    check = Check(state)
    url = f"{ROOT}/replicas"
    _clear(place, url)
    size_bytes = shardckpt.save(state, url).total_bytes
    name = f"machine{place.rank}"
    platform.node = lambda: name

    def load(read_once: bool) -> dict[str, float]:
        with shardckpt.options(read_once=read_once):
            report = shardckpt.load(state, url)
        return {"of the unique bytes": report.bytes_read / size_bytes}

    return compete(
        place,
        [
            Contestant(
                name=title,
                before=lambda: check.wipe(state),
                run=lambda once=once: load(once),
                after=lambda: check.verify(state),
            )
            for title, once in (("shardckpt", True), ("each rank reads", False))
        ],
        rounds=bench.rounds,
    )


def _tiers(place: Place, bench: Bench, variables: dict[str, str]) -> Results:
    """A save that returns when the local disk has it, while the copy to the store has to wait."""
    import shardckpt

    os.environ.update(variables)
    torch.manual_seed(0)
    state = state_of(*trained(bench.store_bytes, sharded=True))
    folder = os.path.join(bench.root, "tiers")

    def clear() -> None:
        tiers.wait()
        place.barrier()
        if place.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            os.sync()
        _clear(place, f"{ROOT}/tiers/step-1")

    def save_to_tiers() -> dict[str, float]:
        nonlocal tiers
        tiers = shardckpt.TieredStorage(folder, f"{ROOT}/tiers")
        shardckpt.save(state, "step-1", storage=tiers)
        return {}

    def save_locally() -> dict[str, float]:
        shardckpt.save(state, f"{folder}/step-1")
        return {}

    tiers = shardckpt.TieredStorage(folder, f"{ROOT}/tiers")
    found = compete(
        place,
        [
            Contestant(name="shardckpt", before=clear, run=save_to_tiers),
            Contestant(name="raw", before=clear, run=save_locally),
        ],
        rounds=bench.rounds,
    )
    tiers.wait()
    return found


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
        Row(
            title="its peak memory, all ranks",
            unit="MB",
            figures=peaks,
            targets=[Target(against="limit", factor=800)],
        ),
        row("load from it, 4 ranks", "s", loaded, goal),
    ]


def store_replicas(bench: Bench) -> list[Row]:
    """Load replicas on 4 ranks from an object store: read once, or by each rank."""
    from tests.object_server import object_server

    with object_server(volumes=400) as variables:
        loaded = bench.run("store, replicas", 4, _replicas, variables)
    once = {name: loaded.median(name, "of the unique bytes") for name in loaded.samples}
    return [
        row(
            "load replicas from an object store, 4 ranks",
            "s",
            loaded,
            Target(against="each rank reads", factor=1),
        ),
        Row(
            title="bytes read, of the unique bytes",
            unit="",
            figures=once,
            targets=[Target(against="limit", factor=1.05)],
        ),
    ]


def store_tiers(bench: Bench) -> list[Row]:
    """Save to a local disk in front of an object store, beside a save to the disk alone."""
    from tests.object_server import object_server

    with object_server(volumes=400) as variables:
        saved = bench.run("store, tiers", 4, _tiers, variables)
    return [row("save to tiers, 4 ranks", "s", saved, Target(against="raw", factor=1.05))]
