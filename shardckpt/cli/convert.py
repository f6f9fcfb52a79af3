"""shardckpt convert: from and to the formats of others."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

from shardckpt.cli.multiprocess import say, shared
from shardckpt.cli.progress import progress_bar, size_text
from shardckpt.convert.convert import FORMATS, convert_source, open_source
from shardckpt.reports import ConvertReport

__all__ = ["add_convert"]

_MOST_LINES = 40  # of what was left out, changed or copied
_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}


def add_convert(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the others."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "convert",
        help="write a checkpoint in another format",
        description="SOURCE: a checkpoint of shardckpt or of torch.distributed.checkpoint (dcp), "
        "also one of Lightning's or Megatron-Core's; a torch file (.pt, .pth, .ckpt, .bin, ...), a "
        "safetensors file, or a directory of Hugging Face (hf). What has no place in TARGET is "
        "left out, and listed.",
    )
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument(
        "--format", choices=FORMATS, help="of the target; by default as its suffix says"
    )
    parser.add_argument("--world-size", type=int, help="how many shards, or files of dcp")
    parser.add_argument(
        "--max-file-size",
        type=_size,
        metavar="SIZE",
        help="of hf: 500MB, 2GiB ...; by default 5GB",
    )
    parser.add_argument(
        "--keys", nargs="+", metavar="NAME", help="these alone: prefixes of names, or patterns"
    )
    parser.add_argument(
        "--rename",
        nargs="+",
        type=_rename,
        metavar="OLD=NEW",
        help="prefixes of names: model= takes it away, =model puts it before all",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is at the target")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=_convert)
    return parser


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B|)", text.upper())
    if found is None or found[2] not in _UNITS or not float(found[1]):
        raise argparse.ArgumentTypeError("a size is expected, as 5GB, 500MB or 2GiB")
    return int(float(found[1]) * _UNITS[found[2]])


def _rename(text: str) -> tuple[str, str]:
    old, sign, new = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError("OLD=NEW is expected")
    return old, new


def _convert(options: argparse.Namespace) -> None:
    def opened() -> Any:
        return open_source(
            options.source,
            keys=options.keys,
            rename=dict(options.rename) if options.rename else None,
            check=options.rank == 0,  # once is enough
        )

    with shared(options, options.source, opened) as (coordinator, source):
        total = sum(entry.size_bytes for entry in source.manifest.tensors.values())
        own = total // coordinator.world_size
        with progress_bar("convert", total_bytes=own, shown=options.rank == 0) as bar:
            report = convert_source(
                source,
                options.target,
                to=options.format,
                shards=options.world_size,
                file_bytes=options.max_file_size,
                overwrite=options.overwrite,
                coordinator=coordinator,
                progress=bar.reach,
            )
        if options.json:
            say(coordinator, json.dumps(dataclasses.asdict(report), indent=2))
        else:
            say(coordinator, "\n".join(_lines(report)))


def _lines(report: ConvertReport) -> Iterator[str]:
    """The report for people: what was taken, then each thing that was not, or not as it is."""
    values = f", {len(report.values)} values" if report.values else ""
    size = size_text(report.size_bytes)
    yield f"{report.path}: {len(report.tensors)} tensors{values}, {size}"
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
