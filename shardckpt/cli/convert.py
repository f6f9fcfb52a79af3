"""The commands convert and extract: from and to other formats."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import click

from shardckpt.cli.multiprocess import say, say_json, shared
from shardckpt.cli.parameters import FORMAT, JOBS, JSON, KEYS, OVERWRITE, RENAME, path_argument
from shardckpt.cli.progress import count_text, progress_bar, size_text
from shardckpt.convert.convert import convert_source
from shardckpt.convert.opening import open_source
from shardckpt.reports import ConvertReport
from shardckpt.state.saved_tree import SavedState
from shardckpt.storage.resolve import resolve
from shardckpt.transforms import Rename

__all__ = ["COMMANDS", "report_lines"]

_MOST_LINES = 40  # for each of the lists of copied, changed and left out entries
_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B|)", text.upper())
    if found is None or found[2] not in _UNITS or not float(found[1]):
        raise click.BadParameter("expected a size, such as 5GB, 500MB or 2GiB")
    return int(float(found[1]) * _UNITS[found[2]])


def _convert(options: SimpleNamespace) -> None:
    _write(
        options,
        keys=options.keys,
        rename=dict(each for each in options.rename or () if "*" not in each[0]) or None,
        transforms=[Rename(*each) for each in options.rename or () if "*" in each[0]],
        like=options.like,
    )


def _extract(options: SimpleNamespace) -> None:
    names = list(options.names)
    rename = None
    if len(names) == 1 and not re.search(r"[*?\[]", names[0]):
        with open_source(options.source, check=False) as source:
            is_entry = names[0] in SavedState(source.manifest).leaves
        rename = None if is_entry else {names[0]: ""}
    _write(options, keys=names, rename=rename)


def _write(options: SimpleNamespace, **choice: Any) -> None:
    """Write the entries of the source that `choice` selects: arguments of open_source."""

    def opened() -> Any:
        check = options.rank == 0  # only one rank checks
        return open_source(options.source, dtype=options.dtype, check=check, **choice)

    target = resolve(options.target)
    with shared(options, options.source, opened) as (coordinator, source):
        total = sum(entry.size_bytes for entry in source.manifest.tensors.values())
        rank_bytes = total // coordinator.world_size
        with progress_bar(options.command, total_bytes=rank_bytes, shown=options.rank == 0) as bar:
            report = convert_source(
                source,
                target,
                to=options.format,
                shards=options.shards,
                file_bytes=options.max_file_size,
                overwrite=options.overwrite,
                coordinator=coordinator,
                progress=bar.reach,
            )
        if options.json:
            say_json(coordinator, dataclasses.asdict(report))
        else:
            say(coordinator, *report_lines(report))


def report_lines(report: ConvertReport) -> Iterator[str]:
    """Yield the lines of the report: a summary, then each entry that was copied, changed or left
    out.
    """
    values = f", {count_text(len(report.values), 'value')}" if report.values else ""
    size = size_text(report.size_bytes)
    yield f"{report.path}: {count_text(len(report.tensors), 'tensor')}{values}, {size}"
    writer = f", written by {report.writer}" if report.writer else ""
    yield f"  from {report.source}: {report.source_format}{writer}"
    listed = {
        "copied": [(name, "") for name in report.copied],
        "changed": list(report.changed.items()),
        "left": list(report.left_out.items()),
    }
    for word, entries in listed.items():
        for name, why in entries[:_MOST_LINES]:
            yield f"  {word:7}  {name}{': ' if why else ''}{why}"
        if len(entries) > _MOST_LINES:
            yield f"  {word:7}  and {len(entries) - _MOST_LINES} more: --json lists all"


_SHARDS = click.Option(["--shards"], type=int, help="The number of shards, or of files of dcp.")
_FILE_SIZE = click.Option(
    ["--max-file-size"],
    type=_size,
    metavar="SIZE",
    help="The size of files of hf, such as 500MB or 2GiB. The default is 5GB.",
)
_DTYPE = click.Option(
    ["--dtype"],
    type=click.Choice(["float64", "float32", "float16", "bfloat16"]),
    help="The dtype of all floating-point tensors of 16 bits and more.",
)
_LIKE = click.Option(
    ["--like"],
    type=click.Path(readable=False),
    metavar="PATH",
    help="A checkpoint whose tensors the target has: the same names, shapes and "
    "dtypes. With --format hf, configuration and tokenizer are copied from it.",
)
_SOURCE, _TARGET = path_argument("source"), path_argument("target")

COMMANDS = (
    (
        "convert",
        _convert,
        [
            *(_SOURCE, _TARGET, FORMAT, _SHARDS, _FILE_SIZE, KEYS, RENAME, _DTYPE, _LIKE),
            *(OVERWRITE, JSON, JOBS),
        ],
    ),
    (
        "extract",
        _extract,
        [
            *(_SOURCE, click.Argument(["names"], nargs=-1, required=True), _TARGET),
            *(FORMAT, _SHARDS, _FILE_SIZE, _DTYPE, OVERWRITE, JSON, JOBS),
        ],
    ),
)
