"""The commands diff, stats, cat, merge and report, on checkpoints of any format."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch

from shardckpt.analysis.diff import diff
from shardckpt.analysis.entries import saved_entries, tensors_of, values_of
from shardckpt.analysis.merge import merge
from shardckpt.analysis.page import write_report
from shardckpt.analysis.stats import stats
from shardckpt.cli.convert import report_lines
from shardckpt.cli.inspect import table
from shardckpt.cli.parameters import FORMAT, JSON, KEYS, OVERWRITE, RENAME, path_argument
from shardckpt.cli.progress import count_text, progress_bar
from shardckpt.convert.opening import open_source
from shardckpt.errors import LoadMismatchError, StateError, printable_line
from shardckpt.format.dtypes import OPAQUE
from shardckpt.reports import DiffReport, TensorDifference, TensorStats
from shardckpt.storage.atomic_write import write_file
from shardckpt.storage.paths import local_path

__all__ = ["COMMANDS"]

_SLICE = re.compile(r"(.*?)\[([-\d:, .]*)\]", re.DOTALL)


def _diff(options: SimpleNamespace) -> int:
    with progress_bar("diff", total_bytes=0) as bar:
        report = diff(
            options.first,
            options.second,
            rtol=options.rtol,
            atol=options.atol,
            keys=options.keys,
            rename=dict(options.rename) if options.rename else None,
            progress=bar.reach,
        )
    if options.json:
        print(json.dumps({**_plain(dataclasses.asdict(report)), "equal": report.equal}, indent=2))
    else:
        for line in _diff_lines(report):
            print(printable_line(line))
    return 0 if report.equal else 1


def _diff_lines(report: DiffReport) -> Iterator[str]:
    for path, names in ((report.first, report.only_first), (report.second, report.only_second)):
        yield from (f"only in {path}: {name}" for name in names)
    for name, (value, other) in report.values.items():
        yield f"{name}: {value!r} and {other!r}"
    for name, found in report.tensors.items():
        yield f"{name}: {_difference(found)}"
    for name, dtypes in report.dtypes.items():
        yield f"{name}: {_dtypes(dtypes)}, equal within the tolerance"
    same = f"{count_text(report.equal_tensors, 'tensor')} and "
    yield f"equal: {same}{count_text(report.equal_values, 'other value')}"


def _difference(found: TensorDifference) -> str:
    if found.shapes[0] != found.shapes[1]:
        return "shapes {} and {}".format(*map(list, found.shapes))
    if found.elements is None:
        return _dtypes(found.dtypes)
    largest = "" if found.largest is None else f", largest difference {found.largest:.6g}"
    text = f"{count_text(found.elements, 'element')} of {list(found.shapes[0])} differ{largest}"
    return text if found.dtypes[0] == found.dtypes[1] else f"{_dtypes(found.dtypes)}, {text}"


def _dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> str:
    return "dtypes {} and {}".format(*map(_dtype, dtypes))


def _stats(options: SimpleNamespace) -> None:
    with progress_bar("stats", total_bytes=0) as bar:
        found = stats(options.path, keys=options.keys, progress=bar.reach)
    if options.json:
        facts = {name: dataclasses.asdict(one) for name, one in found.items()}
        print(json.dumps(_plain(facts), indent=2))
        return
    title = ("name", "dtype", "shape", "norm", "min", "max", "mean", "zeros", "NaN", "Inf")
    rows = [title, *(_stats_row(name, one) for name, one in found.items())]
    for line in table(rows, right=tuple(range(3, len(title)))):
        print(printable_line(line))


def _stats_row(name: str, one: TensorStats) -> tuple[str, ...]:
    numbers = (one.norm, one.smallest, one.largest, one.mean)
    return (
        name,
        _dtype(one.dtype),
        str(list(one.shape)),
        *("" if number is None else f"{number:.4g}" for number in numbers),
        *(f"{count:,}" for count in (one.zeros, one.nan, one.inf)),
    )


def _cat(options: SimpleNamespace) -> None:
    if options.json and options.npy is not None:
        raise click.UsageError("--json and --npy exclude each other")
    with open_source(options.path) as source:
        entries = saved_entries(source)
        names, values = tensors_of(entries), values_of(entries)
        found = None if options.tensor in names else _SLICE.fullmatch(options.tensor)
        name, text = found.groups() if found else (options.tensor, None)
        if name not in names:
            known = ", ".join(list(names)[:8])
            raise LoadMismatchError(
                "The checkpoint has no such tensor",
                path=source.path,
                tensor=name,
                expected="the name of a tensor",
                actual=f"the value {values[name]!r}"[:200] if name in values else known,
                remedy="list the names with `shardckpt inspect`",
            )
        shape = source.manifest.tensors[names[name]].shape
        offsets, sizes, index = _box(name, shape, text)
        tensor = source.read_box(names[name], offsets, sizes)[index]
    array = _as_numpy(tensor, name)
    if options.json:
        facts = {"name": options.tensor, "dtype": _dtype(tensor.dtype), "shape": array.shape}
        print(json.dumps(_plain({**facts, "values": array.tolist()})))
    elif options.npy is not None:
        file = io.BytesIO()
        np.save(file, array, allow_pickle=False)
        write_file(local_path(options.npy), file.getvalue(), overwrite=options.overwrite)
    else:
        print(np.array2string(array, threshold=sys.maxsize if options.all else 1000))


def _as_numpy(tensor: torch.Tensor, name: str) -> Any:
    if tensor.dtype in OPAQUE:
        raise StateError(
            "A tensor of this dtype can't be printed",
            tensor=name,
            expected="a dtype that converts to float32",
            actual=_dtype(tensor.dtype),
            remedy="read it with shardckpt.load_state",
        )
    if tensor.dtype not in _NUMPY:
        tensor = tensor.to(torch.complex64 if tensor.dtype.is_complex else torch.float32)
    return tensor.numpy()


_NUMPY = {
    *(torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
}


def _box(
    name: str, shape: tuple[int, ...], text: str | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]:
    """Parse a slice, such as `0:8, -1`.

    Returns:
        The offsets and sizes of the box to read, and the index into it.
    """
    items = text.split(",") if text and text.strip() else []
    try:
        given = [_index(item) for item in items]
        filled = [*given, *[slice(None)] * (len(shape) - len(given))]
        boxes = [_range(item, size) for item, size in zip(filled, shape, strict=True)]
    except ValueError:
        raise _invalid_slice(name, shape, text) from None
    offsets, sizes, index = ([box[column] for box in boxes] for column in range(3))
    return tuple(offsets), tuple(sizes), tuple(index)


def _index(item: str) -> int | slice:
    """Parse an index or a slice. Raises ValueError."""
    if ":" not in item:
        return int(item)
    low, high, step, *more = [int(part) if part.strip() else None for part in f"{item}:".split(":")]
    if any(part is not None for part in more) or (step is not None and step < 1):
        raise ValueError(item)
    return slice(low, high, step)


def _range(item: int | slice, size: int) -> tuple[int, int, Any]:
    """Return the offset and size to read in a dimension, and the index into what was read."""
    if isinstance(item, int):
        if not -size <= item < size:
            raise ValueError(item)
        return item % size, 1, 0
    low, high, step = item.indices(size)
    return (low, high - low, slice(None, None, step)) if low < high else (0, 0, slice(None))


def _invalid_slice(name: str, shape: tuple[int, ...], text: str | None) -> StateError:
    return StateError(
        "Invalid slice",
        tensor=name,
        expected=f"indices within the shape {list(shape)}, or slices with steps above 0, "
        "separated by commas",
        actual=f"[{text}]",
        remedy=f'write, for example, "{name}[0:8]"',
    )


def _merge(options: SimpleNamespace) -> None:
    *sources, target = options.paths
    with progress_bar("merge", total_bytes=0) as bar:
        report = merge(
            sources,
            target,
            weights=options.weights,
            to=options.format,
            keys=options.keys,
            rename=dict(options.rename) if options.rename else None,
            overwrite=options.overwrite,
            progress=bar.reach,
        )
    if options.json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        for line in report_lines(report):
            print(printable_line(line))


def _report(options: SimpleNamespace) -> None:
    path = write_report(
        options.paths,
        options.html,
        norms=options.norms,
        verify=options.verify,
        timings=options.timings,
        overwrite=options.overwrite,
        progress=lambda path: print(printable_line(path), file=sys.stderr),
    )
    print(printable_line(path))


def _plain(node: Any) -> Any:
    """Return a node of JSON: dtypes, NaN, infinities and other values as text."""
    if isinstance(node, dict):
        return {str(key): _plain(item) for key, item in node.items()}
    if isinstance(node, (list, tuple)):
        return [_plain(item) for item in node]
    if isinstance(node, torch.dtype):
        return _dtype(node)
    exact = isinstance(node, (bool, int, str)) or (isinstance(node, float) and math.isfinite(node))
    return node if node is None or exact else repr(node)  # JSON lacks NaN and infinities


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _weights(context: click.Context, parameter: click.Parameter, text: str | None) -> Any:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter("expected numbers with commas, such as 0.9,0.1") from None


def _file(name: str, text: str, **facts: Any) -> click.Option:
    file = click.Path(readable=False)  # shells complete file names in its place
    return click.Option([name], type=file, metavar="FILE", help=text, **facts)


def _number(name: str, text: str) -> click.Option:
    return click.Option([name], type=float, metavar="NUMBER", help=text)


COMMANDS = (
    (
        "diff",
        _diff,
        [
            *(path_argument("first"), path_argument("second")),
            _number("--rtol", "The relative tolerance. Tensors may then have different dtypes."),
            _number("--atol", "The absolute tolerance. Tensors may then have different dtypes."),
            KEYS,
            RENAME,
            JSON,
        ],
    ),
    (
        "stats",
        _stats,
        [path_argument("path"), KEYS, JSON],
    ),
    (
        "cat",
        _cat,
        [
            path_argument("path"),
            click.Argument(["tensor"]),
            click.Option(["--all"], is_flag=True, help="Print more than 1,000 elements."),
            _file("--npy", "Write a file of numpy instead."),
            OVERWRITE,
            JSON,
        ],
    ),
    (
        "merge",
        _merge,
        [
            path_argument("paths", several=True),
            click.Option(
                ["--weights"],
                callback=_weights,
                metavar="W,W...",
                help="A weight for each checkpoint. By default all are equal.",
            ),
            FORMAT,
            KEYS,
            RENAME,
            OVERWRITE,
            JSON,
        ],
    ),
    (
        "report",
        _report,
        [
            path_argument("paths", several=True),
            _file("--html", "The file to write.", required=True),
            click.Option(["--norms"], is_flag=True, help="Also show the norm of each tensor."),
            click.Option(["--verify"], is_flag=True, help="Also verify all blocks."),
            _file(
                "--timings",
                "Show the phases of a SaveReport or LoadReport in a JSON file. May be repeated.",
                multiple=True,
            ),
            OVERWRITE,
        ],
    ),
)
