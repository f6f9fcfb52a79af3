"""The commands, and their exit codes."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import click

from shardckpt._version import __version__
from shardckpt.api import open_checkpoint
from shardckpt.checkpoint import Checkpoint
from shardckpt.cli.analysis import COMMANDS as ANALYSIS_COMMANDS
from shardckpt.cli.convert import CONVERT_HELP, CONVERT_PARAMETERS, run_convert
from shardckpt.cli.folders import COMMANDS as FOLDER_COMMANDS
from shardckpt.cli.inspect import facts, page
from shardckpt.cli.multiprocess import say, shared
from shardckpt.cli.parameters import JOBS, JSON, KEYS, OVERWRITE, SUBSET, separate
from shardckpt.cli.progress import count_text, progress_bar, size_text
from shardckpt.errors import (
    CorruptionError,
    NotACheckpointError,
    ShardckptError,
    StorageError,
    printable,
)
from shardckpt.maintenance.rescue import explain_manifest, rescue
from shardckpt.maintenance.reshard import reshard
from shardckpt.maintenance.verify import verify_shards
from shardckpt.storage.resolve import resolve

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        arguments: The arguments of the command line without the name of the program.

    Returns:
        0, the exit code of the error's family, or 1 from `diff` for a difference.

    Raises:
        SystemExit: With code 2, for wrong arguments.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code: int = _group.main(
            separate(given), prog_name="shardckpt", standalone_mode=False, obj=given
        )
    except click.ClickException as error:
        error.show()
        raise SystemExit(2) from None
    except click.Abort:
        return 130
    return code


def _run(
    body: Callable[[Any], int | None],
    options: SimpleNamespace,
    parameters: Sequence[click.Parameter],
) -> int:
    try:
        code = body(options)
        if sys.stdout is not None:  # it is None if the caller has closed it
            sys.stdout.flush()
    except ShardckptError as error:
        if options.rank:  # rank 0 prints the same error
            return error.exit_code
        text = _with_options(str(error), parameters)
        print(f"shardckpt {options.command}: {type(error).__name__}: {text}", file=sys.stderr)
        if isinstance(error, NotACheckpointError):
            print(printable(_checkpoints_below(error.path)), end="", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of the output has closed it, such as `head`
        _drop_output()
        return 0
    except OSError as error:  # all other errors of files are ShardckptErrors
        _drop_output()
        text = f"The output can't be written: {error.strerror}"
        print(f"shardckpt {options.command}: StorageError: {text}", file=sys.stderr)
        return StorageError.exit_code
    return code or 0


def _drop_output() -> None:
    """Let the flush at exit succeed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _with_options(text: str, parameters: Sequence[click.Parameter]) -> str:
    """Replace the Python arguments that an error names by the options of the command."""
    options = {each.name: each.opts[0] for each in parameters if isinstance(each, click.Option)}
    options |= {"file_bytes": "--max-file-size", "to": "--format"}

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        return options[name] if value == "True" else f"{options[name]} {value}".rstrip()

    return re.sub(rf"\b({'|'.join(options)})=(\w+|['\"]\w*['\"]|)", option, text)


def _checkpoints_below(path: str | None) -> str:
    """Return a hint that lists the checkpoints in a folder. Empty if there are none."""
    found = []
    with suppress(ShardckptError):
        storage, folder = resolve(path)
        for name in storage.names(folder):
            with suppress(ShardckptError):
                storage.version(storage.child(folder, name))
                found.append(name)
    return f"  checkpoints in it: {', '.join(found[:20])}\n" if found else ""


def _command(
    name: str, body: Callable[[Any], int | None], text: str, parameters: Sequence[click.Parameter]
) -> click.Command:
    def callback(**values: Any) -> int:
        given = click.get_current_context().obj
        options = SimpleNamespace(command=name, rank=0, arguments=given, **values)
        return _run(body, options, parameters)

    return click.Command(name, callback=callback, help=text, params=list(parameters))


def _inspect(options: SimpleNamespace) -> None:
    with open_checkpoint(options.path) as checkpoint:
        if options.json:
            print(json.dumps(facts(checkpoint, keys=options.keys), indent=2))
        else:
            for line in page(checkpoint, keys=options.keys, everything=options.all):
                print(printable(line))


def _verify(options: SimpleNamespace) -> None:
    def opened() -> Checkpoint:
        try:
            return open_checkpoint(options.path)
        except CorruptionError as error:
            explain_manifest(error, resolve(options.path))
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
        for word, names in (("corrupted", report.corrupted), ("intact", report.intact)):
            if report.errors:
                say(coordinator, "\n".join(f"{word:9} {name}" for name in names))
        report.raise_if_corrupted()
        part = "" if options.subset == (1, 1) else f" (part {'/'.join(map(str, options.subset))})"
        say(
            coordinator,
            f"{options.path}: {count_text(len(checkpoint.manifest.shards), 'shard')}, "
            f"{count_text(len(checkpoint.manifest.tensors), 'tensor')}, "
            f"{size_text(report.checked_bytes)}: "
            f"intact{part}",
        )


def _rescue(options: SimpleNamespace) -> None:
    with progress_bar("rescue", total_bytes=0) as bar:
        report = rescue(
            resolve(options.source),
            resolve(options.target),
            overwrite=options.overwrite,
            progress=bar.reach,
        )
    for bit in report.repaired:
        print(printable(f"repaired {bit}"))
    for name, why in report.lost.items():
        print(printable(f"lost     {name}: {why}"))
    saved = count_text(len(report.saved), "tensor")
    print(printable(f"{options.target}: {saved} saved, {len(report.lost)} lost"))
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
        say(
            coordinator,
            f"{options.target}: {count_text(options.shards, 'shard')}, {size_text(total)}",
        )


def _print_version(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"shardckpt {__version__}")
        context.exit()


def _path(name: str) -> click.Argument:
    return click.Argument([name])


_group = click.Group(
    "shardckpt",
    help="Inspect, compare, verify, convert, merge, list, copy and remove checkpoints.",
    commands=[
        _command(
            "inspect",
            _inspect,
            "Print the tensors, values and shards of a checkpoint.",
            [
                _path("path"),
                JSON,
                click.Option(["--all"], is_flag=True, help="Print a line for each tensor."),
                KEYS,
            ],
        ),
        _command(
            "verify",
            _verify,
            "Read every block of a checkpoint and compare it with its digest.",
            [_path("path"), SUBSET, JOBS],
        ),
        _command(
            "rescue",
            _rescue,
            "Write a new checkpoint of all tensors that verify.",
            [_path("source"), _path("target"), OVERWRITE],
        ),
        _command(
            "reshard",
            _reshard,
            "Write a checkpoint for another number of shards.",
            [
                _path("source"),
                _path("target"),
                click.Option(["--shards"], type=int, required=True, help="The number of shards."),
                OVERWRITE,
                JOBS,
            ],
        ),
        _command(
            "convert",
            run_convert,
            CONVERT_HELP,
            [_path("source"), _path("target"), *CONVERT_PARAMETERS, JOBS],
        ),
        *(_command(*command) for command in (*ANALYSIS_COMMANDS, *FOLDER_COMMANDS)),
    ],
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_version,
            help="Print the version.",
        )
    ],
)
