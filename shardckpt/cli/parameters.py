"""Options that several commands share, and the types of their values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import click

from shardckpt.convert.formats import FORMATS

__all__ = [
    "FORMAT",
    "JOBS",
    "JSON",
    "KEYS",
    "OVERWRITE",
    "RENAME",
    "SUBSET",
    "path_argument",
    "separate",
]

_SEVERAL = ("--keys", "--rename")


def separate(arguments: Sequence[str]) -> list[str]:
    """Repeat an option for each of its values: `--keys a b` becomes `--keys a --keys b`."""
    return list(_separated(arguments))


def _separated(arguments: Sequence[str]) -> Iterator[str]:
    option, values = "", 0
    for index, argument in enumerate(arguments):
        if option and (argument.startswith("-") and argument != "-"):
            if not values:
                yield option  # an option without a value, which is an error
            option = ""
        if argument == "--":
            yield from arguments[index:]
            return
        if argument in _SEVERAL:
            option, values = argument, 0
        elif option:
            yield from (option, argument)
            values += 1
        else:
            yield argument
    if option and not values:
        yield option


def path_argument(name: str, *, several: bool = False) -> click.Argument:
    """Return an argument that is a path or a URL. Shells complete file names in its place."""
    number: dict[str, Any] = {"nargs": -1, "required": True} if several else {}
    return click.Argument([name], type=click.Path(readable=False), **number)


def _subset(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise click.BadParameter("expected N/T with N from 1 to T, such as 2/7")
    return int(part), int(parts)


def _rename(text: str) -> tuple[str, str]:
    old, sign, new = text.partition("=")
    if not sign:
        raise click.BadParameter("expected OLD=NEW")
    return old, new


def _given(context: click.Context, parameter: click.Parameter, values: tuple[Any, ...]) -> Any:
    return list(values) or None


FORMAT = click.Option(
    ["--format"],
    type=click.Choice(FORMATS),
    help="The format of the target. The default follows from its suffix.",
)
JSON = click.Option(["--json"], is_flag=True, help="Print JSON.")
KEYS = click.Option(
    ["--keys"],
    multiple=True,
    callback=_given,
    metavar="NAME ...",
    help="Only entries with these name prefixes, or that match these patterns.",
)
RENAME = click.Option(
    ["--rename"],
    multiple=True,
    callback=_given,
    type=_rename,
    metavar="OLD=NEW ...",
    help="Rename prefixes: model= removes a prefix, =model adds one. In convert also patterns: "
    "*.gamma=*.weight.",
)
OVERWRITE = click.Option(["--overwrite"], is_flag=True, help="Replace the target.")
SUBSET = click.Option(
    ["--subset"],
    type=_subset,
    default="1/1",
    metavar="N/T",
    help="Verify the N-th of T parts. T runs verify everything.",
)
JOBS = click.Option(
    ["--jobs"],
    type=click.IntRange(min=1),
    help="The number of processes; by default one for each GiB, up to the number of processors.",
)
