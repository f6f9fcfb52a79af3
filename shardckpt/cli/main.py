"""shardckpt inspect, verify, rescue, reshard and convert."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from shardckpt._version import __version__
from shardckpt.api import open_checkpoint
from shardckpt.checkpoint import Checkpoint
from shardckpt.cli.convert import add_convert
from shardckpt.cli.inspect import facts, page
from shardckpt.cli.multiprocess import say, shared
from shardckpt.cli.progress import progress_bar, size_text
from shardckpt.errors import CorruptionError, NotACheckpointError, ShardckptError, printable
from shardckpt.maintenance.rescue import explain_manifest, rescue
from shardckpt.maintenance.reshard import reshard
from shardckpt.maintenance.verify import verify_shards
from shardckpt.storage.base import MANIFEST_NAME
from shardckpt.storage.local import LocalStorage

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code: 0, 2 for a wrong call, else that of the error's family."""
    options = _parser().parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    options.rank = 0
    try:
        options.run(options)
        sys.stdout.flush()
    except ShardckptError as error:
        if options.rank:  # rank 0 has the same error, and tells it
            return error.exit_code
        print(f"shardckpt {options.command}: {type(error).__name__}: {error}", file=sys.stderr)
        if isinstance(error, NotACheckpointError):
            print(printable(_checkpoints_below(error.path)), end="", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    except KeyboardInterrupt:
        return 130
    return 0


def _checkpoints_below(path: str | None) -> str:
    """A hint for who gave the folder of a run: the checkpoints in it."""
    try:
        names = sorted(os.listdir(path or "."))
    except OSError:
        return ""
    found = [n for n in names if os.path.isfile(os.path.join(path or ".", n, MANIFEST_NAME))]
    return f"  checkpoints in it: {', '.join(found[:20])}\n" if found else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "shardckpt", description="Look at, check and change checkpoints."
    )
    parser.add_argument("--version", action="version", version=f"shardckpt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="what is in a checkpoint")
    inspect.add_argument("path")
    inspect.add_argument("--json", action="store_true", help="as JSON")
    inspect.add_argument("--all", action="store_true", help="a line for each tensor")
    inspect.add_argument(
        "--keys", nargs="+", metavar="NAME", help="these alone: prefixes of names, or patterns"
    )
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
    for command in (verify, change, add_convert(commands)):
        command.add_argument(
            "--jobs", type=_positive, help="processes; by default one for each GiB, up to the cores"
        )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("a number of at least 1 is expected")
    return int(text)


def _inspect(options: argparse.Namespace) -> None:
    with open_checkpoint(options.path) as checkpoint:
        if options.json:
            print(json.dumps(facts(checkpoint, keys=options.keys), indent=2))
        else:
            for line in page(checkpoint, keys=options.keys, everything=options.all):
                print(printable(line))


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError("N/T with N from 1 to T is expected, as in 2/7")
    return int(part), int(parts)


def _verify(options: argparse.Namespace) -> None:
    def opened() -> Checkpoint:
        try:
            return open_checkpoint(options.path)
        except CorruptionError as error:
            explain_manifest(error, options.path, storage=LocalStorage())
            raise

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
        for word, names in (("hurt", report.corrupted), ("whole", report.intact)):
            if report.errors:
                say(coordinator, "\n".join(f"{word:6} {name}" for name in names))
        report.raise_if_corrupted()
        part = "" if options.subset == (1, 1) else f" (part {'/'.join(map(str, options.subset))})"
        say(
            coordinator,
            f"{options.path}: {len(checkpoint.manifest.shards)} shards, "
            f"{len(checkpoint.manifest.tensors)} tensors, {size_text(report.checked_bytes)}: "
            f"whole{part}",
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
    for bit in report.repaired:
        print(printable(f"repaired {bit}"))
    for name, why in report.lost.items():
        print(printable(f"lost   {name}: {why}"))
    summary = f"{options.target}: {len(report.saved)} tensors saved, {len(report.lost)} lost"
    print(printable(summary))
    if report.rebuilt:
        print(
            "The manifest was rebuilt from the shards' headers: values are lost, and nothing could "
            "be verified. Look at what you load."
        )


def _reshard(options: argparse.Namespace) -> None:
    def opened() -> Checkpoint:
        return open_checkpoint(options.source)

    with shared(options, options.source, opened) as (coordinator, checkpoint):
        total = sum(entry.size_bytes for entry in checkpoint.manifest.tensors.values())
        own = total // coordinator.world_size
        with progress_bar("reshard", total_bytes=own, shown=options.rank == 0) as bar:
            reshard(
                checkpoint,
                options.target,
                shards=options.world_size,
                storage=LocalStorage(),
                coordinator=coordinator,
                overwrite=options.overwrite,
                progress=bar.reach,
            )
        say(coordinator, f"{options.target}: {options.world_size} shards, {size_text(total)}")
