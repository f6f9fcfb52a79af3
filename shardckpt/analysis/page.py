"""One HTML page about the checkpoints of a run, which needs no network."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.resources import files as package_files
from typing import Any

from shardckpt.analysis.entries import saved_entries, tensors_of, values_of
from shardckpt.analysis.stats import tensor_stats
from shardckpt.api import Path
from shardckpt.checkpoint import Checkpoint
from shardckpt.convert.opening import open_source
from shardckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    NotACheckpointError,
    StateError,
    printable,
)
from shardckpt.format.dtypes import DTYPES
from shardckpt.format.entries import TensorEntry
from shardckpt.maintenance.rewritable import Source
from shardckpt.maintenance.verify import verify_shards
from shardckpt.storage.atomic_write import atomic_write
from shardckpt.storage.base import Storage
from shardckpt.storage.opened import age, checkpoints_in
from shardckpt.storage.paths import local_path
from shardckpt.storage.resolve import Location, resolve

__all__ = ["write_report"]

_DATA = "{{data}}"


def write_report(
    paths: Path | Sequence[Path],
    html: str | os.PathLike[str],
    *,
    norms: bool = False,
    verify: bool = False,
    timings: Sequence[str | os.PathLike[str]] = (),
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda path: None,
) -> str:
    """Write an HTML page about one or more checkpoints. Not collective.

    The page shows the size of each checkpoint, and the tensors of the newest one: dtype, shape,
    bytes, and the ranks that hold them. It lists the checkpoints of a folder that can't be read. It
    is one file without links to other files. Names in a checkpoint are shown as text and never as
    HTML.

    Args:
        paths: Checkpoints of any format, folders of checkpoints, or URLs; also a single path.
        html: The file to write.
        norms: Also read all tensors, and show their norms in each checkpoint.
        verify: Also verify all blocks, and show which tensors are corrupted.
        timings: JSON files with the `profile` of a SaveReport or LoadReport, as
            `json.dump(dataclasses.asdict(report), file)` writes them. The page shows the seconds
            of each rank and phase.
        overwrite: Replace an existing file.
        progress: Called with the path of each checkpoint before it is read.

    Returns:
        The path of the page.

    Raises:
        CheckpointError: A checkpoint can't be read; with `norms` alone, also if it is corrupted.
        StateError: A file of `timings` has another form.
        StorageError: The file system refused an operation, or the file exists.

    Example:
        >>> import torch, shardckpt
        >>> for step in (1, 2):
        ...     report = shardckpt.save({"weight": torch.ones(3)}, f"run/step-{step}")
        >>> shardckpt.write_report(["run"], "run.html")
        'run.html'
    """
    several = [paths] if isinstance(paths, (str, os.PathLike, Storage)) else paths
    with atomic_write(local_path(html), overwrite=overwrite) as write:  # checks the path first
        phases = [_timing(path) for path in timings]
        data = {**_data(several, norms, verify, progress), "timings": phases}
        template = (package_files("shardckpt.analysis") / "page.html").read_text(encoding="utf-8")
        write.add_bytes(template.replace(_DATA, _embedded(data)).encode())
    return os.fspath(html)


def _data(
    paths: Sequence[Path], norms: bool, verify: bool, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Read the checkpoints. With both `norms` and `verify`, corrupted tensors have no norm."""
    checkpoints: list[dict[str, Any]] = []
    unreadable: list[dict[str, str]] = []
    tensors: dict[str, Any] = {}

    def left_out(name: str, error: CheckpointError) -> None:
        unreadable.append({"name": name, "error": str(error)})

    for source in _sources(paths, left_out):
        progress(source.path)
        facts, tensors = _facts(source)
        corrupted: tuple[str, ...] = ()
        if verify and isinstance(source, Checkpoint):
            report = verify_shards(source.files, source.manifest)
            corrupted = report.corrupted
            errors = [str(error) for error in report.errors]
            facts["damage"] = {"corrupted": list(corrupted), "errors": errors}
        if norms:
            found = tensor_stats(source, saved_entries(source), skip=corrupted)
            facts["norms"] = {name: _finite(one.norm) for name, one in found.items()}
        checkpoints.append(facts)
    return {"checkpoints": checkpoints, "unreadable": unreadable, "tensors": tensors}


def _embedded(data: Any) -> str:
    """Encode JSON for a script element, which `</` and `<!--` would end."""
    return json.dumps(_shown(data), separators=(",", ":")).replace("<", "\\u003c")


def _shown(node: Any) -> Any:
    """Escape control characters in all texts, as those for text from right to left change names."""
    if isinstance(node, str):
        return printable(node)
    if isinstance(node, dict):
        return {printable(key): _shown(item) for key, item in node.items()}
    return list(map(_shown, node)) if isinstance(node, (list, tuple)) else node


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


_OnError = Callable[[str, CheckpointError], None]


def _sources(paths: Sequence[Path], on_error: _OnError) -> Iterator[Source]:
    """Yield each checkpoint, those of a folder by age. Each is closed before the next one."""
    for path in paths:
        for place in _places(path, on_error):
            source = open_source(place.path, storage=place.storage)
            try:
                yield source
            finally:
                source.close()


def _places(path: Path, on_error: _OnError) -> list[Location]:
    """Return the checkpoint at a path. For a folder of checkpoints, return all in it."""
    place = resolve(path)
    try:
        open_source(place.path, storage=place.storage, check=False).close()
    except (NotACheckpointError, CheckpointNotFoundError):
        found = []
        with suppress(CheckpointError):
            opened = checkpoints_in(path, Checkpoint, on_error=on_error)
            found = sorted(age(one) for _, one in opened)
        if not found:
            raise
        return [Location(place.storage, inside) for *_, inside in found]
    return [place]


def _facts(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the facts about a checkpoint, and its tensors as columns."""
    manifest = source.manifest
    saved = saved_entries(source)
    names = tensors_of(saved)
    ranks = [_rank(shard.name) for shard in manifest.shards]
    sizes: Counter[str] = Counter()
    columns: dict[str, list[Any]] = {key: [] for key in ("name", "dtype", "shape", "bytes")}
    columns |= {"layout": [], "ranks": [], "tied": []}
    seen: dict[str, str] = {}
    for name, saved_name in names.items():
        entry = manifest.tensors[saved_name]
        first = seen.setdefault(saved_name, name)
        size_bytes = entry.size_bytes if first == name else 0
        sizes[name.partition(".")[0]] += size_bytes
        columns["name"].append(name)
        columns["dtype"].append(str(DTYPES[entry.dtype]).removeprefix("torch."))
        columns["shape"].append(list(entry.shape))
        columns["bytes"].append(size_bytes)
        columns["layout"].append(_layout(entry))
        columns["ranks"].append(_held(entry, ranks) if first == name else [])
        columns["tied"].append("" if first == name else first)
    facts = {
        "name": os.path.basename(source.path.rstrip("/")),
        "path": source.path,
        "created": manifest.created,
        "library": manifest.library,
        "worldSize": manifest.world_size,
        "shards": len(manifest.shards),
        "values": len(values_of(saved)),
        "tensors": len(names),
        "parts": dict(sizes),
    }
    return facts, columns


def _rank(shard: str) -> int:
    """Return the rank that wrote a shard, which its name holds (docs/format.md)."""
    return int(shard.split("-")[1])


def _held(entry: TensorEntry, ranks: list[int]) -> list[tuple[int, int]]:
    """Return (rank, bytes) for each rank whose shards hold a part of a tensor."""
    held: Counter[int] = Counter()
    for shard, begin, end in entry.chunks[:, :3].tolist():
        held[ranks[shard]] += end - begin
    return sorted(held.items())


def _layout(entry: TensorEntry) -> str:
    """Describe how a tensor is divided: into how many parts along which dimensions."""
    count, dims = len(entry.chunks), len(entry.shape)
    if count <= 1:
        return "whole"
    starts = entry.chunks[:, 3 : 3 + dims]
    parts = [len(set(starts[:, dim].tolist())) for dim in range(dims)]
    if math.prod(parts) != count:
        return f"{count} chunks"
    divided = [f"{n} along dim {dim}" for dim, n in enumerate(parts) if n > 1]
    return " x ".join(divided)


def _timing(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the profile of a report from a JSON file."""
    try:
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
        profile = {
            int(rank): {str(phase): float(seconds) for phase, seconds in phases.items()}
            for rank, phases in report["profile"].items()
        }
        title = str(report["path"])
        if not all(math.isfinite(s) for phases in profile.values() for s in phases.values()):
            raise ValueError("seconds that are not finite")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise StateError(
            "A file of timings can't be read",
            path=os.fspath(path),
            expected="the JSON of a SaveReport or LoadReport, with `path` and `profile`",
            actual=f"{type(error).__name__}: {error}",
            remedy="write it with json.dump(dataclasses.asdict(report), file)",
        ) from error
    call = "load" if any("read" in phases for phases in profile.values()) else "save"
    return {"title": f"{call} {title}", "ranks": sorted(profile.items())}
