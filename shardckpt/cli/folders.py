"""The commands ls, cp, rm, prune and du, on local folders, object stores and tiers.

ls, rm and du do not import torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import click

from shardckpt.cli.inspect import table
from shardckpt.cli.parameters import JSON, OVERWRITE, path_argument
from shardckpt.cli.progress import count_text, progress_bar, size_text
from shardckpt.errors import CheckpointError, NotACheckpointError, StateError, printable_line
from shardckpt.storage.copying import copy_checkpoint
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.opened import OpenedCheckpoint, age, checkpoints_in
from shardckpt.storage.resolve import Location, resolve

__all__ = ["COMMANDS"]


def _size(checkpoint: OpenedCheckpoint) -> int:
    return sum(shard.size_bytes for shard in checkpoint.manifest.shards)


def _ls(options: SimpleNamespace) -> None:
    storage = resolve(options.path).storage
    aged = []
    for name, checkpoint in checkpoints_in(options.path, OpenedCheckpoint):
        facts = {
            "name": name,
            "path": checkpoint.path,
            "size_bytes": _size(checkpoint),
            "created": checkpoint.manifest.created,
            "world_size": checkpoint.manifest.world_size,
            "tiers": storage.tiers(checkpoint.path),
        }
        aged.append((age(checkpoint), facts))
    found = [facts for _, facts in sorted(aged, key=lambda pair: pair[0])]
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for line in table([tuple(_row(one)) for one in found], right=(1,)):
        print(printable_line(line))


def _row(one: dict[str, Any]) -> Iterator[str]:
    yield from (one["name"], size_text(one["size_bytes"]), one["created"])
    yield count_text(one["world_size"], "rank")
    for path, state in one["tiers"].items():
        yield f"{state} in {path.rpartition('/')[0]}"


def _cp(options: SimpleNamespace) -> None:
    from shardckpt.maintenance.verify import verify_shards

    target, given = resolve(options.target), resolve(options.source)
    with OpenedCheckpoint(given.path, storage=given.storage) as source:
        total = _size(source)
        present = _has(target, source.manifest.checkpoint_id)
        if present and not options.json:
            print(printable_line(f"{target.path}: has this checkpoint already"))
        if not present:
            with progress_bar("copy", total_bytes=total) as bar:
                copy_checkpoint(
                    source.files,
                    target.storage,
                    target.path,
                    overwrite=options.overwrite,
                    progress=bar.advance,
                )
    with (
        OpenedCheckpoint(target.path, storage=target.storage) as copy,
        progress_bar("verify", total_bytes=total) as bar,
    ):
        report = verify_shards(copy.files, copy.manifest, progress=bar.advance)
    report.raise_if_corrupted()
    if options.json:
        print(json.dumps({"path": target.path, "size_bytes": total, "copied": not present}))
    else:
        print(printable_line(f"{target.path}: {size_text(total)}, intact"))


def _has(place: Location, identity: str) -> bool:
    try:
        with OpenedCheckpoint(place.path, storage=place.storage) as checkpoint:
            return checkpoint.manifest.checkpoint_id == identity
    except CheckpointError:
        return False


def _rm(options: SimpleNamespace) -> None:
    removed: list[str] = []
    places = list(map(resolve, dict.fromkeys(options.paths)))
    for place in places:
        _check_removable(place)
    for place in places:
        place.storage.remove(place.path)
        removed.append(place.path)
        if not options.json:
            print(printable_line(f"removed {place.path}"))
    if options.json:
        print(json.dumps({"removed": removed}, indent=2))


def _check_removable(place: Location) -> None:
    """Raise an error for a path without a checkpoint, and for a link to a checkpoint elsewhere."""
    with OpenedCheckpoint(place.path, storage=place.storage):
        pass
    link = place.path.rstrip("/")
    if isinstance(place.storage, LocalStorage) and os.path.islink(link):
        raise StateError(
            "This path is a symbolic link to a checkpoint",
            path=place.path,
            expected="the directory of a checkpoint",
            actual=f"a link to {os.readlink(link)}",
            remedy=f"pass the checkpoint itself, {os.path.realpath(link)}; a link is removed "
            "without its checkpoint by `unlink`",
        )


def _prune(options: SimpleNamespace) -> None:
    from shardckpt.manager import CheckpointManager, KeepBest, KeepLast
    from shardckpt.manager.retention import Retention, ranked, to_remove

    policies: list[Retention] = []
    if options.keep_last is not None:
        policies.append(KeepLast(options.keep_last))
    if options.keep_best is not None:
        if options.monitor is None:
            raise StateError("--keep-best needs a metric", remedy="add --monitor METRIC")
        policies.append(KeepBest(options.keep_best, options.monitor, options.mode))
    if not policies:
        raise StateError(
            "No option chooses the checkpoints to keep", remedy="add --keep-last N or --keep-best N"
        )
    storage, folder = resolve(options.path)
    manager = CheckpointManager(folder, label=None, storage=storage)
    saved = manager.checkpoints()
    if not saved:
        raise NotACheckpointError(
            "This folder holds no checkpoints of a CheckpointManager",
            path=folder,
            remedy="remove single checkpoints with `shardckpt rm`",
        )
    if options.keep_best is not None and not ranked(saved, options.monitor, options.mode):
        metrics = sorted({metric for checkpoint in saved for metric in checkpoint.metrics})
        raise StateError(
            f"No checkpoint in this folder has the metric {options.monitor!r}",
            path=folder,
            expected="a metric with which a checkpoint was saved",
            actual=", ".join(metrics) or "checkpoints without metrics",
            remedy="correct --monitor, or choose with --keep-last N",
        )
    removed = to_remove(saved, policies)
    for checkpoint in removed:
        if not options.dry_run:
            storage.remove(checkpoint.path)
        word = "would remove" if options.dry_run else "removed"
        if not options.json:
            print(printable_line(f"{word} {checkpoint.path}"))
    if options.json:
        paths = [checkpoint.path for checkpoint in removed]
        kept = [checkpoint.path for checkpoint in saved if checkpoint not in removed]
        facts = {"removed": paths, "kept": kept, "dry_run": options.dry_run}
        print(json.dumps(facts, indent=2))
    else:
        print(f"kept {count_text(len(saved) - len(removed), 'checkpoint')}")


def _du(options: SimpleNamespace) -> None:
    storage = resolve(options.path).storage
    files: dict[Any, int] = {}
    sizes: dict[str, int] = {}
    for name, checkpoint in checkpoints_in(options.path, OpenedCheckpoint):
        sizes[name] = _size(checkpoint)
        for shard in checkpoint.manifest.shards:
            path = f"{checkpoint.path}/{shard.name}"
            key: Any = path
            if isinstance(storage, LocalStorage):  # linked files are stored once
                with suppress(OSError):
                    found = os.stat(path)
                    key = found.st_dev, found.st_ino
            files[key] = shard.size_bytes
    total = sum(files.values())
    if options.json:
        print(json.dumps({"checkpoints": sizes, "size_bytes": total}, indent=2))
        return
    rows = [(size_text(size), name) for name, size in sizes.items()]
    rows.append((size_text(total), "in all, each linked file once"))
    for line in table(rows, right=(0,)):
        print(printable_line(line))


_PATH = path_argument("path")

COMMANDS = (
    ("ls", _ls, [_PATH, JSON]),
    (
        "cp",
        _cp,
        [path_argument("source"), path_argument("target"), OVERWRITE, JSON],
    ),
    (
        "rm",
        _rm,
        [path_argument("paths", several=True), JSON],
    ),
    (
        "prune",
        _prune,
        [
            _PATH,
            click.Option(["--keep-last"], type=click.IntRange(min=1), help="Keep the newest N."),
            click.Option(["--keep-best"], type=click.IntRange(min=1), help="Keep the best N."),
            click.Option(["--monitor"], help="The metric of --keep-best."),
            click.Option(
                ["--mode"],
                type=click.Choice(["min", "max"]),
                default="min",
                help="Whether small or large values of the metric are best.",
            ),
            click.Option(["--dry-run"], is_flag=True, help="Print what would be removed."),
            JSON,
        ],
    ),
    ("du", _du, [_PATH, JSON]),
)
