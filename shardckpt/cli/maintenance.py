"""The commands verify, rescue and reshard."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import click

from shardckpt.analysis.entries import pieces
from shardckpt.api import open_checkpoint
from shardckpt.checkpoint import Checkpoint
from shardckpt.cli.multiprocess import say, say_json, shared
from shardckpt.cli.parameters import JOBS, JSON, OVERWRITE, SUBSET, path_argument
from shardckpt.cli.progress import count_text, progress_bar, size_text
from shardckpt.convert.opening import open_source
from shardckpt.convert.sources import origin_of
from shardckpt.coordination.exchange import exchange
from shardckpt.errors import (
    CorruptionError,
    NotACheckpointError,
    ShardckptError,
    printable_line,
)
from shardckpt.maintenance.rescue import explain_manifest, rescue
from shardckpt.maintenance.reshard import reshard
from shardckpt.maintenance.verify import verify_shards
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.opened import OpenedCheckpoint
from shardckpt.storage.resolve import resolve

__all__ = ["COMMANDS"]


def _verify(options: SimpleNamespace) -> None:
    def opened() -> Checkpoint:
        try:
            return open_checkpoint(options.path)
        except CorruptionError as error:
            explain_manifest(error, resolve(options.path))
            raise

    if _is_foreign(options.path):
        _verify_foreign(options)
        return
    with shared(options, options.path, opened) as (coordinator, checkpoint):
        total = sum(shard.size_bytes for shard in checkpoint.manifest.shards)
        parts = options.subset[1] * coordinator.world_size
        with progress_bar("verify", total_bytes=total // parts, shown=options.rank == 0) as bar:
            report = verify_shards(
                checkpoint.files,
                checkpoint.manifest,
                subset=options.subset,
                progress=bar.advance,
                coordinator=coordinator,
            )
        if options.json:
            facts = {**dataclasses.asdict(report), "errors": [str(e) for e in report.errors]}
            say_json(coordinator, {**facts, "subset": options.subset})
            options.printed = True
            report.raise_if_corrupted()
            return
        for word, names in (("corrupted", report.corrupted), ("intact", report.intact)):
            if report.errors:
                say(coordinator, *(f"{word:9} {name}" for name in names))
        report.raise_if_corrupted()
        part = "" if options.subset == (1, 1) else f" (part {'/'.join(map(str, options.subset))})"
        say(
            coordinator,
            f"{options.path}: {count_text(len(checkpoint.manifest.shards), 'shard')}, "
            f"{count_text(len(checkpoint.manifest.tensors), 'tensor')}, "
            f"{size_text(report.checked_bytes)}: "
            f"intact{part}",
        )


def _is_foreign(path: str) -> bool:
    """Whether a local path holds no checkpoint of shardckpt."""
    storage, full_path = resolve(path)
    try:
        OpenedCheckpoint(full_path, storage=storage).close()
    except NotACheckpointError:
        return isinstance(storage, LocalStorage)
    except ShardckptError:
        pass  # verify opens it again and raises the error
    return False


def _verify_foreign(options: SimpleNamespace) -> None:
    """Read every tensor of a checkpoint of another library. The processes divide the tensors."""
    with shared(options, options.path, lambda: open_source(options.path)) as (coordinator, source):
        tensors = source.manifest.tensors
        total = sum(entry.size_bytes for entry in tensors.values())
        with progress_bar("verify", total_bytes=total, shown=options.rank == 0) as bar:

            def read() -> bytes:
                for name in list(tensors)[coordinator.rank :: coordinator.world_size]:
                    shape = tensors[name].shape
                    for offsets, sizes in pieces(source, name, (0,) * len(shape), shape):
                        source.read_box(name, offsets, sizes)
                    bar.advance(tensors[name].size_bytes)
                return b""

            exchange(coordinator, "verify", read, lambda payloads: b"")
        source_format = origin_of(source).format
        if options.json:
            facts = {"path": source.path, "format": source_format, "checked_bytes": total}
            say_json(coordinator, {**facts, "readable": list(tensors)})
            return
        found = f"{count_text(len(tensors), 'tensor')}, {size_text(total)}"
        say(coordinator, f"{options.path}: {source_format}, {found}: readable")


def _rescue(options: SimpleNamespace) -> None:
    with progress_bar("rescue", total_bytes=0) as bar:
        report = rescue(
            resolve(options.source),
            resolve(options.target),
            overwrite=options.overwrite,
            progress=bar.reach,
        )
    if options.json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
        return
    for bit in report.repaired:
        print(printable_line(f"repaired {bit}"))
    for name, why in report.lost.items():
        print(printable_line(f"lost     {name}: {why}"))
    saved = count_text(len(report.saved), "tensor")
    print(printable_line(f"{options.target}: {saved} saved, {len(report.lost)} lost"))
    if report.rebuilt:
        print(
            "The manifest was rebuilt from the headers of the shards. All values are lost, and no "
            "tensor could be verified: check the tensors that you load."
        )


def _reshard(options: SimpleNamespace) -> None:
    def opened() -> Checkpoint:
        return open_checkpoint(options.source)

    target = resolve(options.target)
    with shared(options, options.source, opened) as (coordinator, checkpoint):
        total = sum(entry.size_bytes for entry in checkpoint.manifest.tensors.values())
        rank_bytes = total // coordinator.world_size
        with progress_bar("reshard", total_bytes=rank_bytes, shown=options.rank == 0) as bar:
            reshard(
                checkpoint,
                target.path,
                shards=options.shards,
                storage=target.storage,
                coordinator=coordinator,
                overwrite=options.overwrite,
                progress=bar.reach,
            )
        if options.json:
            facts = {"path": target.path, "shards": options.shards, "size_bytes": total}
            say_json(coordinator, facts)
            return
        shards = count_text(options.shards, "shard")
        say(coordinator, f"{options.target}: {shards}, {size_text(total)}")


COMMANDS = (
    (
        "verify",
        _verify,
        [path_argument("path"), SUBSET, JOBS, JSON],
    ),
    (
        "rescue",
        _rescue,
        [path_argument("source"), path_argument("target"), OVERWRITE, JSON],
    ),
    (
        "reshard",
        _reshard,
        [
            path_argument("source"),
            path_argument("target"),
            click.Option(["--shards"], type=int, required=True, help="The number of shards."),
            OVERWRITE,
            JOBS,
            JSON,
        ],
    ),
)
