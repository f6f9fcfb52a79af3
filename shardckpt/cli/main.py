"""The parser, errors and exit codes. Each command is in another module of this folder."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import click
from click.shell_completion import CompletionItem

from shardckpt._version import __version__
from shardckpt.cli.parameters import separate
from shardckpt.errors import (
    NotACheckpointError,
    ShardckptError,
    StorageError,
    printable,
    printable_line,
)
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
    output = sys.stdout
    try:
        code: int = _group.main(
            separate(given), prog_name="shardckpt", standalone_mode=False, obj=given
        )
    except click.ClickException as error:
        text = io.StringIO()
        error.show(file=text)
        _print_error(printable(text.getvalue()))
        raise SystemExit(2) from None
    except click.Abort:
        return 130
    except SystemExit:
        if sys.stdout is not output:  # click replaces a stream whose reader has closed it
            return 0
        raise
    except OSError as error:
        return _output_failed("shardckpt", error)
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
        text = f"shardckpt {options.command}: {type(error).__name__}: {text}\n"
        if isinstance(error, NotACheckpointError):
            text += _checkpoints_below(error.path)
        _print_error(text)
        with suppress(OSError):  # the reader of the output has closed it
            if getattr(options, "json", False) and not options.printed:
                print(json.dumps({"error": _facts(error, parameters)}, indent=2), flush=True)
        return error.exit_code
    except BrokenPipeError:  # the reader of the output has closed it, such as `head`
        _drop_output()
        return 0
    except OSError as error:  # all other errors of files are ShardckptErrors
        return _output_failed(f"shardckpt {options.command}", error)
    return code or 0


def _output_failed(program: str, error: OSError) -> int:
    _drop_output()
    _print_error(f"{program}: StorageError: The output can't be written: {error.strerror}\n")
    return StorageError.exit_code


def _print_error(text: str) -> None:
    if sys.stderr is not None:  # print would write to the output instead
        with suppress(OSError):  # its reader has closed it
            print(text, end="", file=sys.stderr, flush=True)


def _drop_output() -> None:
    """Let the flush at exit succeed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _facts(error: ShardckptError, parameters: Sequence[click.Parameter]) -> dict[str, Any]:
    """Return an error as JSON: its class, its message and its facts as text."""
    names = ("message", "path", "rank", "tensor", "expected", "actual", "remedy")
    facts = {name: getattr(error, name) for name in names} | error.facts
    if isinstance(error.rank, tuple):
        facts["rank"] = ", ".join(map(str, error.rank))
    texts = {name: str(fact) for name, fact in facts.items() if fact is not None}
    for name in texts.keys() - {"path", "tensor"}:
        texts[name] = _with_options(texts[name], parameters)
    return {"type": type(error).__name__, **texts, "exit_code": error.exit_code}


def _with_options(text: str, parameters: Sequence[click.Parameter]) -> str:
    """Replace the Python arguments that an error names by the options of the command.

    Paths and names of entries, which may look the same, are unchanged.
    """
    options = {each.name: each.opts[0] for each in parameters if isinstance(each, click.Option)}
    options = {"keys": "NAMES", **options, "file_bytes": "--max-file-size", "to": "--format"}

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        return options[name] if value == "True" else f"{options[name]} {value}".rstrip()

    argument = re.compile(rf"\b({'|'.join(options)})=(\w+|['\"]\w*['\"]|)")
    return "\n".join(
        line if line.startswith(("  path:", "  tensor:")) else argument.sub(option, line)
        for line in text.split("\n")
    )


def _checkpoints_below(path: str | None) -> str:
    """Return a hint that lists the checkpoints in a folder, or "" for a folder without any."""
    found = []
    with suppress(ShardckptError):
        storage, folder = resolve(path)
        for name in storage.names(folder):
            with suppress(ShardckptError):
                storage.version(storage.child(folder, name))
                found.append(name)
    return printable_line(f"  checkpoints in it: {', '.join(found[:20])}") + "\n" if found else ""


def _command(
    name: str, body: Callable[[Any], int | None], text: str, parameters: Sequence[click.Parameter]
) -> click.Command:
    def callback(**values: Any) -> int:
        given = click.get_current_context().obj
        options = SimpleNamespace(command=name, rank=0, printed=False, **values)
        options.arguments = given
        return _run(body, options, parameters)

    return click.Command(name, callback=callback, help=text, params=list(parameters))


def _print_version(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"shardckpt {__version__}")
        context.exit()


_COMMANDS = {
    "inspect": ("inspect", "Print the tensors, values and shards of a checkpoint."),
    "verify": ("maintenance", "Read every block of a checkpoint and compare it with its digest."),
    "rescue": ("maintenance", "Write a new checkpoint of all tensors that verify."),
    "reshard": ("maintenance", "Write a checkpoint for another number of shards."),
    "convert": (
        "convert",
        "Write a checkpoint in another format. SOURCE is a checkpoint of shardckpt, of "
        "torch.distributed.checkpoint (dcp), of torch_checkpointing, of torchsnapshot, of "
        "DeepSpeed, of Lightning or of Megatron-Core, a torch file (.pt, .pth, .ckpt, .bin), a "
        "safetensors file, a file of numpy (.npz) or of llama.cpp (.gguf), or a directory of "
        "Hugging Face (hf). Entries that TARGET cannot hold are left out and listed.",
    ),
    "extract": (
        "convert",
        "Write some entries of a checkpoint of any format to a new one. A NAME is the name of an "
        "entry, a prefix of names, or a pattern such as `model.*.bias`. With a single prefix, the "
        "names in TARGET begin after it.",
    ),
    "diff": (
        "analysis",
        "Compare two checkpoints of any format. The exit code is 0 if they are equal, 1 if they "
        "differ. Two checkpoints of shardckpt are compared by digests, and only blocks that "
        "differ are read. --rename applies to the entries of FIRST, and --keys after it to both.",
    ),
    "stats": (
        "analysis",
        "Print the norm, range and mean of each tensor, and count its zeros, NaN and infinite "
        "elements.",
    ),
    "cat": (
        "analysis",
        "Print a tensor or a slice of it. TENSOR is a name, or a name with a slice, such as "
        "`model.weight[0:8, -1]`. Dtypes that numpy lacks are converted to float32 or complex64.",
    ),
    "merge": (
        "analysis",
        "Write the average of the tensors of several checkpoints of any format. The last path is "
        "the target. --keys and --rename apply to each checkpoint. Integers and other values come "
        "from the first checkpoint.",
    ),
    "report": (
        "analysis",
        "Write an HTML page about checkpoints. It shows their sizes, the tensors of the newest "
        "one, and the ranks that hold them. A path is a checkpoint or a folder of checkpoints.",
    ),
    "ls": ("folders", "List the checkpoints of shardckpt in a folder."),
    "cp": (
        "folders",
        "Copy a checkpoint to another path or URL, and verify the copy. Run it again to go on "
        "with a copy to an object store that was interrupted.",
    ),
    "rm": ("folders", "Remove checkpoints."),
    "prune": (
        "folders",
        "Remove the checkpoints that no option keeps. PATH is the folder of a CheckpointManager. "
        "The newest checkpoint stays.",
    ),
    "du": ("folders", "Print the size of each checkpoint of shardckpt in a folder."),
}
"""Command -> module, description. A module is imported when its command runs, as torch is slow."""


class _Group(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module_name, text = _COMMANDS[name]
        module = importlib.import_module(f"shardckpt.cli.{module_name}")
        return next(
            _command(name, body, text, parameters)
            for known, body, parameters in module.COMMANDS
            if known == name
        )

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        room = formatter.width - 6 - max(map(len, _COMMANDS))
        with formatter.section("Commands"):
            formatter.write_dl(
                [
                    (name, click.Command(name, help=text).get_short_help_str(room))
                    for name, (_, text) in _COMMANDS.items()
                ]
            )

    def shell_complete(self, context: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [name for name in _COMMANDS if name.startswith(incomplete)]
        found = [CompletionItem(name, help=_COMMANDS[name][1]) for name in names]
        return found if names else super().shell_complete(context, incomplete)


_group = _Group(
    "shardckpt",
    help="Inspect, compare, verify, convert, merge, list, copy and remove checkpoints.",
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
