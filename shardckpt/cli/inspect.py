"""The command inspect: text for people, or JSON for programs.

It imports torch only for checkpoints of other libraries.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shardckpt.cli.parameters import JSON, KEYS, path_argument
from shardckpt.cli.progress import count_text, size_text
from shardckpt.errors import NotACheckpointError, printable_line
from shardckpt.format import typed_json as values
from shardckpt.format.dtype_names import TORCH_NAMES
from shardckpt.format.entries import Manifest, TensorEntry
from shardckpt.format.typed_json import TensorRef
from shardckpt.state.saved_tree import SavedState, Select, below, children, enums_as_text
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.opened import OpenedCheckpoint
from shardckpt.storage.resolve import resolve

if TYPE_CHECKING:
    from shardckpt.convert.sources import Foreign

__all__ = ["COMMANDS", "facts", "page", "table"]

_VALUE_WIDTH = 80
_MANY = 40  # from this number of tensors on, equal tensors of numbered layers share a line


def _inspect(options: SimpleNamespace) -> None:
    with _opened(options.path) as checkpoint:
        if options.json:
            print(json.dumps(facts(checkpoint, keys=options.keys), indent=2))
        else:
            for line in page(checkpoint, keys=options.keys, everything=options.all):
                print(printable_line(line))


def _opened(path: str) -> OpenedCheckpoint | Foreign:
    """Open a checkpoint of shardckpt, or one of another library on a local disk."""
    storage, full_path = resolve(path)
    try:
        return OpenedCheckpoint(full_path, storage=storage)
    except NotACheckpointError:
        if not isinstance(storage, LocalStorage):
            raise
    from shardckpt.convert.opening import open_source

    source: Any = open_source(full_path, check=False)
    return source  # type: ignore[no-any-return]


def facts(checkpoint: OpenedCheckpoint | Foreign, *, keys: Select = None) -> dict[str, Any]:
    """Return all facts about a checkpoint as JSON. Values are typed JSON."""
    manifest = checkpoint.manifest
    saved = _saved(checkpoint, keys)
    about: dict[str, Any] = {"path": checkpoint.path}
    if isinstance(checkpoint, OpenedCheckpoint):
        about |= {
            "id": manifest.checkpoint_id,
            "created": manifest.created,
            "library": manifest.library,
            "format_version": manifest.format_version,
            "world_size": manifest.world_size,
            "shards": [{"name": s.name, "size_bytes": s.size_bytes} for s in manifest.shards],
        }
    else:
        origin = checkpoint.origin
        about |= {"format": origin.format, "library": origin.writer}
        about |= {"changed": dict(origin.changed), "left_out": dict(origin.left_out)}
    return about | {
        "tensors": {
            name: {
                "dtype": _dtype(entry),
                "shape": list(entry.shape),
                "size_bytes": entry.size_bytes,
                "shards": _shards(entry),
                "tied_to": source if source != name else None,
            }
            for name, source, entry in _tensors(saved)
        },
        "values": {name: values.encode(value, at=name) for name, value in _values(saved, manifest)},
        "notes": manifest.notes if isinstance(checkpoint, OpenedCheckpoint) else {},
    }


def page(
    checkpoint: OpenedCheckpoint | Foreign, *, keys: Select = None, everything: bool = False
) -> Iterator[str]:
    """Yield the lines of a page about a checkpoint.

    If there are many tensors, those that differ only in the numbers of their layers share a line,
    unless `keys` or `everything` is given.
    """
    manifest = checkpoint.manifest
    saved = _saved(checkpoint, keys)
    tensors = list(_tensors(saved))
    yield checkpoint.path
    yield from _origin(checkpoint)
    sums = _sizes_by_first_key(tensors)
    if len(sums) > 1:
        yield from ("", "sums by the first key", *table(sums, right=(1, 2)))
    if tensors:
        fold = len(tensors) >= _MANY and not everything and keys is None
        rows = _folded(tensors) if fold else [_row(*tensor) for tensor in tensors]
        yield from ("", "tensors", *table(rows, right=(3,)))
        if len(rows) < len(tensors):
            lines = count_text(len(rows), "line")
            yield f"  ({count_text(len(tensors), 'tensor')} on {lines}: --all)"
    texts = [(name, _cut(_text(value))) for name, value in _values(saved, manifest)]
    if texts:
        yield from ("", "values", *table(texts))
    if keys is None and manifest.shards:
        shards = [(shard.name, size_text(shard.size_bytes)) for shard in manifest.shards]
        yield from ("", "shards", *table(shards, right=(1,)))


def _origin(checkpoint: OpenedCheckpoint | Foreign) -> Iterator[str]:
    """Yield lines about the save, or about the file of another library."""
    manifest = checkpoint.manifest
    tensors = count_text(len(manifest.tensors), "tensor")
    if isinstance(checkpoint, OpenedCheckpoint):
        ranks = count_text(manifest.world_size, "rank")
        yield f"  saved {manifest.created} by {manifest.library} on {ranks}"
        total = sum(shard.size_bytes for shard in manifest.shards)
        yield f"  {tensors}, {size_text(total)} in {count_text(len(manifest.shards), 'shard')}"
        yield f"  format {manifest.format_version}, id {manifest.checkpoint_id}"
        for name, text in manifest.notes.items():
            first, *more = text.split("\n")
            yield from (f"  {name}: {first}", *(f"    {line}" for line in more))
        return
    origin = checkpoint.origin
    yield f"  {origin.format}{f', written by {origin.writer}' if origin.writer else ''}"
    total = sum(entry.size_bytes for entry in manifest.tensors.values())
    yield f"  {tensors}, {size_text(total)}"
    yield from (f"  changed: {name}: {form}" for name, form in origin.changed.items())
    yield from (f"  left out: {name}: {why}" for name, why in origin.left_out.items())


def _saved(checkpoint: OpenedCheckpoint | Foreign, keys: Select) -> SavedState:
    """Return the saved names. Enums become text, as their classes need not be importable."""
    manifest = checkpoint.manifest
    state, *per_rank = map(enums_as_text, (manifest.state, *manifest.per_rank))
    plain = dataclasses.replace(manifest, state=state, per_rank=tuple(per_rank))
    return SavedState(plain, keys=keys).check_used(path=checkpoint.path)


def _tensors(saved: SavedState) -> Iterator[tuple[str, str, TensorEntry]]:
    """Yield (name, saved name, entry) of each tensor and array. The names differ for tied
    tensors.
    """
    for name, node in saved.leaves.items():
        if isinstance(node, TensorRef) and node.ref_type != "per_rank":
            yield name, node.name, saved.manifest.tensors[node.name]


def _values(saved: SavedState, manifest: Manifest) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of each value.

    A list or tuple without tensors or dicts is one value. A PerRank is a list of the values of all
    ranks.
    """
    stack = [("", saved.tree)]
    while stack:
        name, node = stack.pop()
        items = children(node)
        if isinstance(node, TensorRef):
            if node.ref_type == "per_rank":
                every = [saved.per_rank(node, rank=rank) for rank in range(manifest.world_size)]
                yield name, every
        elif not items or not (isinstance(node, dict) or any(map(_holds_more, node))):
            yield name, node
        else:
            stack.extend((below(name, key), item) for key, item in reversed(items))


def _holds_more(node: Any) -> bool:
    """Whether a node is a tensor or dict, or a list or tuple that contains one."""
    if isinstance(node, (list, tuple)):
        return any(map(_holds_more, node))
    return isinstance(node, (dict, TensorRef))


def _text(value: Any) -> str:
    """Return a value as Python prints it, with the names of tensors."""
    if isinstance(value, TensorRef):
        return f"<tensor {value.name}>"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_text(item)}" for key, item in value.items()) + "}"
    if type(value) in (list, tuple):
        text = ", ".join(map(_text, value))
        return f"[{text}]" if isinstance(value, list) else f"({text})"
    return repr(value)


def _cut(text: str) -> str:
    return text if len(text) <= _VALUE_WIDTH else f"{text[: _VALUE_WIDTH - 3]}..."


def _shards(entry: TensorEntry) -> list[int]:
    return sorted(set(entry.chunks[:, 0].tolist()))


def _dtype(entry: TensorEntry) -> str:
    return TORCH_NAMES[entry.dtype]


def _ranges(numbers: Sequence[int]) -> str:
    """Format sorted numbers as ranges, such as 0-3,7."""
    runs = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        first, *rest = [number for _, number in run]
        runs.append(f"{first}-{rest[-1]}" if rest else str(first))
    return ",".join(runs)


def _row(name: str, source: str, entry: TensorEntry) -> tuple[str, ...]:
    shards = f"shard {_ranges(_shards(entry))}" if len(entry.chunks) else ""
    location = shards if source == name else f"tied to {source}"
    return name, _dtype(entry), str(list(entry.shape)), size_text(entry.size_bytes), location


def _sizes_by_first_key(tensors: Sequence[tuple[str, str, TensorEntry]]) -> list[tuple[str, ...]]:
    """List the number and the bytes of the tensors below each key at the top. Ties count once."""
    by_key: dict[str, dict[str, int]] = {}
    for name, source, entry in tensors:
        by_key.setdefault(name.split(".", 1)[0], {})[source] = entry.size_bytes
    return [
        (name, count_text(len(sizes), "tensor"), size_text(sum(sizes.values())))
        for name, sizes in by_key.items()
    ]


def _folded(tensors: Sequence[tuple[str, str, TensorEntry]]) -> list[tuple[str, ...]]:
    """Return the rows of the table. Equal tensors whose names differ only in numbers share a
    row.
    """
    groups: dict[tuple[Any, ...], list[tuple[str, str, TensorEntry]]] = {}
    for name, source, entry in tensors:
        form = re.sub(r"(?<![^.])\d+(?![^.])", "#", name)
        key = (form, entry.dtype, entry.shape, source == name)
        groups.setdefault(key, []).append((name, source, entry))
    rows = []
    for (form, _, shape, _), members in groups.items():
        indices = [tuple(map(int, re.findall(r"(?<![^.])\d+(?![^.])", m[0]))) for m in members]
        columns = [sorted(set(column)) for column in zip(*indices, strict=True)]
        if len(members) < 2 or math.prod(map(len, columns)) != len(members):
            rows += [_row(*member) for member in members]
            continue
        texts = iter(_ranges(column) for column in columns)
        shown = re.sub("#", lambda _, texts=texts: _braced(next(texts)), form)  # type: ignore[misc]
        shards = _ranges(sorted({shard for member in members for shard in _shards(member[2])}))
        size = f"{len(members)} x {size_text(members[0][2].size_bytes)}"
        rows.append(
            (
                shown,
                _dtype(members[0][2]),
                str(list(shape)),
                size,
                f"shard {shards}" if shards else "",
            )
        )
    return rows


def _braced(text: str) -> str:
    return text if text.isdigit() else f"{{{text}}}"


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> Iterator[str]:
    """Yield the rows as aligned lines. Control characters in them are escaped."""
    rows = [tuple(map(printable_line, row)) for row in rows]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for column in range(len(rows[0])):
        table.add_column(justify="right" if column in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    widths = (max(map(cell_len, column)) + 2 for column in zip(*rows, strict=True))
    console = Console(width=sum(widths), color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    yield from (f"  {line}".rstrip() for line in capture.get().splitlines())


COMMANDS = (
    (
        "inspect",
        _inspect,
        [
            path_argument("path"),
            JSON,
            click.Option(["--all"], is_flag=True, help="Print a line for each tensor."),
            KEYS,
        ],
    ),
)
