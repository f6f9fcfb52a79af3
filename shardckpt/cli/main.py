"""shardckpt inspect, verify, rescue and reshard."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from shardckpt._version import __version__
from shardckpt.api import open_checkpoint
from shardckpt.checkpoint import Checkpoint, SavedTensor
from shardckpt.cli.progress import progress_bar, size_text
from shardckpt.errors import CorruptionError, ShardckptError
from shardckpt.execution.rescue import explain_manifest, rescue
from shardckpt.execution.reshard import reshard
from shardckpt.storage.local import LocalStorage

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code: 0, 2 for a wrong call, else that of the error's family."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except ShardckptError as error:
        print(f"shardckpt {options.command}: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        sys.stdout = None
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "shardckpt", description="Look at, check and change checkpoints."
    )
    parser.add_argument("--version", action="version", version=f"shardckpt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="what is in a checkpoint")
    inspect.add_argument("path")
    inspect.add_argument("--json", action="store_true", help="as JSON")
    inspect.set_defaults(run=_inspect)
    verify = commands.add_parser("verify", help="check every byte of a checkpoint")
    verify.add_argument("path")
    verify.add_argument(
        "--subset",
        type=_part,
        default=(1, 1),
        metavar="N/T",
        help="the N-th of T parts: T scrubs check everything",
    )
    verify.set_defaults(run=_verify)
    save = commands.add_parser("rescue", help="write a new checkpoint of all that still verifies")
    save.add_argument("source")
    save.add_argument("target")
    save.add_argument("--overwrite", action="store_true", help="replace what is at the target")
    save.set_defaults(run=_rescue)
    change = commands.add_parser("reshard", help="write a checkpoint as another number of shards")
    change.add_argument("source")
    change.add_argument("target")
    change.add_argument("--world-size", type=int, required=True, help="how many shards")
    change.add_argument("--overwrite", action="store_true", help="replace what is at the target")
    change.set_defaults(run=_reshard)
    return parser


def _inspect(options: argparse.Namespace) -> None:
    with open_checkpoint(options.path) as checkpoint:
        if options.json:
            print(json.dumps(_facts(checkpoint), indent=2))
        else:
            print("\n".join(_lines(checkpoint)))


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    manifest = checkpoint.manifest
    tensors, other = _entries(checkpoint)
    return {
        "path": checkpoint.path,
        "id": manifest.checkpoint_id,
        "created": manifest.created,
        "library": manifest.library,
        "format_version": manifest.format_version,
        "world_size": manifest.world_size,
        "shards": [{"name": s.name, "size_bytes": s.size_bytes} for s in manifest.shards],
        "tensors": {
            name: {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "size_bytes": tensor.size_bytes,
                "shards": sorted(tensor.shards),
            }
            for name, tensor in tensors.items()
        },
        "values": other,
        "notes": manifest.notes,
    }


def _entries(checkpoint: Checkpoint) -> tuple[dict[str, SavedTensor], dict[str, Any]]:
    """Tensors by name, and values as typed JSON."""
    tensors = checkpoint.tensors()
    return tensors, {name: checkpoint.encoded(name) for name in checkpoint if name not in tensors}


def _lines(checkpoint: Checkpoint) -> list[str]:
    facts = _facts(checkpoint)
    total = sum(shard["size_bytes"] for shard in facts["shards"])
    lines = [
        f"{facts['path']}",
        f"  id {facts['id']}, {facts['created']}, by {facts['library']}, "
        f"format {facts['format_version']}",
        f"  {facts['world_size']} ranks, {len(facts['shards'])} shards, {size_text(total)}",
        "",
        "tensors",
    ]
    rows = [
        (
            name,
            tensor["dtype"],
            str(tensor["shape"]),
            size_text(tensor["size_bytes"]),
            "shard " + ",".join(map(str, tensor["shards"])) if tensor["shards"] else "",
        )
        for name, tensor in facts["tensors"].items()
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    for name, dtype, shape, size, shards in rows:
        lines.append(
            f"  {name:{widths[0]}}  {dtype:{widths[1]}}  {shape:{widths[2]}}  "
            f"{size:>{widths[3]}}  {shards}".rstrip()
        )
    lines += ["", "values"]
    width = max(map(len, facts["values"]), default=0)
    for name, value in facts["values"].items():
        text = json.dumps(value)
        lines.append(f"  {name:{width}}  {text if len(text) <= 80 else text[:77] + '...'}")
    lines += [
        "",
        "shards",
        *(f"  {s['name']}  {size_text(s['size_bytes'])}" for s in facts["shards"]),
    ]
    return lines


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError("N/T with N from 1 to T is expected, as in 2/7")
    return int(part), int(parts)


def _verify(options: argparse.Namespace) -> None:
    try:
        opened = open_checkpoint(options.path)
    except CorruptionError as error:
        explain_manifest(error, options.path, storage=LocalStorage())
        raise
    with opened as checkpoint:
        total = sum(shard.size_bytes for shard in checkpoint.manifest.shards)
        with progress_bar("verify", total_bytes=total // options.subset[1]) as bar:
            report = checkpoint.survey(subset=options.subset, progress=bar.advance)
        for word, names in (("hurt", report.hurt), ("whole", report.whole)):
            if report.damage:
                print("\n".join(f"{word:6} {name}" for name in names))
        report.raise_damage()
        part = "" if options.subset == (1, 1) else f" (part {'/'.join(map(str, options.subset))})"
        print(
            f"{options.path}: {len(checkpoint.manifest.shards)} shards, "
            f"{len(checkpoint.manifest.tensors)} tensors, {size_text(report.checked_bytes)}: "
            f"whole{part}"
        )


def _rescue(options: argparse.Namespace) -> None:
    with progress_bar("rescue", total_bytes=0) as bar:
        report = rescue(
            options.source,
            options.target,
            storage=LocalStorage(),
            overwrite=options.overwrite,
            progress=bar.reach,
        )
    for bit in report.mended:
        print(f"mended {bit}")
    for name, why in report.lost.items():
        print(f"lost   {name}: {why}")
    print(f"{options.target}: {len(report.saved)} tensors saved, {len(report.lost)} lost")
    if report.rebuilt:
        print(
            "The manifest was rebuilt from the shards' headers: values are lost, and nothing could "
            "be verified. Look at what you load."
        )


def _reshard(options: argparse.Namespace) -> None:
    with open_checkpoint(options.source) as checkpoint:
        total = sum(entry.size_bytes for entry in checkpoint.manifest.tensors.values())
        with progress_bar("reshard", total_bytes=total) as bar:
            reshard(
                checkpoint,
                options.target,
                shards=options.world_size,
                storage=LocalStorage(),
                overwrite=options.overwrite,
                progress=bar.reach,
            )
    print(f"{options.target}: {options.world_size} shards, {size_text(total)}")


if __name__ == "__main__":
    sys.exit(main())
