"""The table of kinds of state: each is saved and loaded in every way, and comes back equal, or is
refused by a typed error that names its entry. No cell crashes, and none differs.

A row is a function of a seed, registered with @row. The state of seed 1 is saved, and loaded into
the state of seed 0. A process of its own carries the rows out, those that can be saved in
one checkpoint: if one raises or ends the process, each is carried out by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import os
import tempfile
import types
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor

import shardckpt
from shardckpt import PerRank, errors
from shardckpt.maintenance.reshard import reshard as write_anew
from shardckpt.state.module_state import module_state
from shardckpt.storage.local import LocalStorage
from tests.ranks import RankError, join_group, on_world_sizes, run_ranks
from tests.state_kinds import leaves, modules, tensors  # noqa: F401  (they register their rows)
from tests.state_kinds.registry import ROWS, Row

WAYS_TO_SAVE = ("save", "async_save", "dcp.save")
WAYS_TO_LOAD = ("load", "load_state", "dcp.load")


def plain(value: Any) -> Any:
    """Return the facts that are equal for equal states: bytes, numbers, names."""
    if isinstance(value, DTensor):
        local = value.to_local()
        wraps = hasattr(local, "local_shards") or hasattr(local, "__tensor_flatten__")
        return plain(local if wraps else value.full_tensor())
    if hasattr(value, "local_shards"):
        return [plain(getattr(shard, "tensor", shard)) for shard in value.local_shards()]
    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
        names = value.__tensor_flatten__()[0]
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().resolve_conj().resolve_neg().reshape(-1)
        return str(value.dtype), list(value.shape), bytes(data.view(torch.uint8).tolist()).hex()
    if isinstance(value, np.ndarray):
        native = np.ascontiguousarray(value.astype(value.dtype.newbyteorder("=")))
        return str(native.dtype), list(value.shape), native.tobytes().hex()
    if isinstance(value, (set, frozenset)):  # equal sets may have different orders
        return [type(value).__name__, sorted(map(repr, value))]
    if isinstance(value, memoryview):
        return plain(bytes(value))
    if isinstance(value, torch.Generator):
        return plain(value.get_state())
    if isinstance(value, nn.Module):
        return plain({**module_state(value), "twice": getattr(value, "twice", None)})
    if hasattr(value, "state_dict"):
        return plain(value.state_dict())
    if isinstance(value, (io.BytesIO, io.StringIO)):
        return [type(value).__name__, value.getvalue()]
    if isinstance(value, (types.SimpleNamespace, argparse.Namespace)):
        return plain(vars(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(vars(value))
    if isinstance(value, Counter):
        return repr(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if key != "@wrapper"}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return f"{type(value).__name__} {value!r}"


def _save(way: str, row: Row, path: str) -> None:
    state = {"leaf": row.make(1)}
    if way == "save":
        shardckpt.save(state, path)
    elif way == "async_save":
        shardckpt.async_save(state, path).result(60)
    else:
        writer = shardckpt.ShardWriter(path)
        dcp.save(state, storage_writer=writer, planner=shardckpt.ShardSavePlanner())


def _load(way: str, row: Row, path: str) -> Any:
    """The result of a way to load a checkpoint."""
    if way == "load_state":
        return shardckpt.load_state(path)["leaf"]
    state = {"leaf": row.make(0)}
    if way == "dcp.load":
        reader = shardckpt.ShardReader(path)
        dcp.load(state, storage_reader=reader, planner=shardckpt.ReshardLoadPlanner())
    else:
        shardckpt.load(state, path)
    return state["leaf"]


def _attempt(row: Row, action: Callable[[], Any], expected: Callable[[], Any]) -> str:
    """The verdict: equal, refused, or what is wrong."""
    try:
        value = action()
    except dcp.CheckpointException as failure:
        error: BaseException = next(iter(failure.failures.values()))[0]
    except Exception as raised:
        error = raised
    else:
        wanted = plain(expected())
        found = plain(value)
        return "equal" if found == wanted else f"differs: {found!r:.200} for {wanted!r:.200}"
    if isinstance(error, errors.ShardckptError) and row.names(str(error)):
        return "refused"
    return f"raised {type(error).__name__}: {error!s:.300}"


def _cells(row: Row, folder: str) -> dict[str, str]:
    """The verdicts of one row, by cell."""
    found: dict[str, str] = {}
    saved: list[tuple[str, str]] = []
    for way in WAYS_TO_SAVE:
        path = f"{folder}/{way}"
        state = partial(_save, way, row, path)
        found[way] = _attempt(row, state, lambda: None)
        if found[way] == "equal":
            saved.append((way, path))
    if row.refused and not row.replaced:  # what can't be saved can't be loaded into either
        path = f"{folder}/other"
        shardckpt.save({"leaf": torch.ones(3)}, path)
        for to in ("load", "dcp.load"):
            found[f"other > {to}"] = _attempt(row, partial(_load, to, row, path), lambda: None)
    for (way, path), to in itertools.product(saved, WAYS_TO_LOAD):
        expected = row.whole if to == "load_state" else row.make
        action = partial(_load, to, row, path)
        found[f"{way} > {to}"] = _attempt(row, action, partial(expected, 1))

    def reshard(world_size: int) -> None:
        for way, path in saved:
            anew = f"{path}-{world_size}-anew"
            with shardckpt.open_checkpoint(path) as source:
                write_anew(source, anew, shards=3, storage=LocalStorage())
            for place in (anew, path):
                cell = f"{way} > reshard {os.path.basename(place)}"
                action = partial(_load, "load", row, place)
                found[cell] = _attempt(row, action, partial(row.make, 1))

    if row.ranks > 1:
        on_world_sizes([1], reshard)
    else:
        reshard(1)
    return found


def _side_by_side(rows: list[Row], folder: str) -> dict[str, dict[str, str]]:
    """Row -> verdicts of rows that can be saved: in one checkpoint, or, where that raises, in
    checkpoints of ever fewer rows."""
    if len(rows) == 1:
        return {rows[0].name: _cells(rows[0], f"{folder}/{rows[0].file_name}")}
    every = Row("every", lambda seed: {row.name: row.make(seed) for row in rows})
    found: dict[str, dict[str, str]] = {row.name: {} for row in rows}
    try:
        for way in WAYS_TO_SAVE:
            path = tempfile.mkdtemp(dir=folder) + "/saved"
            _save(way, every, path)
            with shardckpt.open_checkpoint(path) as source:
                write_anew(source, f"{path}-anew", shards=3, storage=LocalStorage())
            for to, place in [*((to, path) for to in WAYS_TO_LOAD), ("load", f"{path}-anew")]:
                loaded = _load(to, every, place)
                for row in rows:
                    wanted = plain((row.whole if to == "load_state" else row.make)(1))
                    mine = plain(loaded[row.name])
                    found[row.name][f"{way} > {to} {os.path.basename(place)}"] = (
                        "equal" if mine == wanted else f"differs: {mine!r:.200} for {wanted!r:.200}"
                    )
    except Exception:
        half = len(rows) // 2
        return _side_by_side(rows[:half], folder) | _side_by_side(rows[half:], folder)
    return found


def _carry_out(names: list[str], folder: str, together: bool = False) -> None:
    """Within ranks: each row in turn; a file for each that is done. `together`: those that can be
    saved in one checkpoint first."""
    warnings.simplefilter("ignore")
    rank, ranks, known = dist.get_rank(), dist.get_world_size(), {}
    if together:
        known = _side_by_side([ROWS[name] for name in names if not ROWS[name].refused], folder)
    for name in names:
        place = f"{folder}/{ROWS[name].file_name}"
        cells = known.get(name) or _cells(ROWS[name], place)
        Path(f"{place}-rank{rank}.json").write_text(json.dumps(cells))
        if not dist.is_initialized():  # the row was loaded on other numbers of ranks
            join_group(rank, ranks, int(os.environ["TEST_STORE_PORT"]), name=f"after {name}")


def verdicts(rows: list[Row], folder: Path) -> dict[str, dict[str, str]]:
    """Row -> cell -> verdict of rows for one number of ranks."""
    for row in rows:
        (folder / row.file_name).mkdir()
    ranks = rows[0].ranks
    names = [row.name for row in rows]
    crashed: dict[str, str] = {}
    with contextlib.suppress(RankError):  # then one row ended the process: each by itself
        run_ranks(ranks, _carry_out, names, str(folder), ranks == 1, timeout_s=100)
    while names := [n for n in names if n not in crashed and not _done(n, folder)]:
        try:
            run_ranks(ranks, _carry_out, names, str(folder), timeout_s=100)
        except RankError as error:
            crashed[next(n for n in names if not _done(n, folder))] = str(error)[-600:]
    return {row.name: _verdicts(row, folder, crashed.get(row.name)) for row in rows}


def _done(name: str, folder: Path) -> bool:
    ranks = range(ROWS[name].ranks)
    return all((folder / f"{ROWS[name].file_name}-rank{rank}.json").exists() for rank in ranks)


def _verdicts(row: Row, folder: Path, crashed: str | None) -> dict[str, str]:
    if crashed is not None:
        return {"all": f"the process ended: {crashed}"}
    found = {}
    for rank in range(row.ranks):
        cells = json.loads((folder / f"{row.file_name}-rank{rank}.json").read_text())
        found |= {f"{cell} (rank {rank})": verdict for cell, verdict in cells.items()}
    return found


ALONE = [row for row in ROWS.values() if row.ranks == 1]
TABLES = [
    *(ALONE[first : first + 70] for first in range(0, len(ALONE), 70)),
    *(
        [row for row in ROWS.values() if row.ranks == ranks]
        for ranks in sorted({row.ranks for row in ROWS.values()} - {1})
    ),
]


@pytest.mark.parametrize("rows", TABLES, ids=lambda rows: f"{rows[0].name} to {rows[-1].name}")
def test_every_cell_is_equal_or_refused_by_name(rows, tmp_path):
    wrong = {}
    for name, cells in verdicts(rows, tmp_path).items():
        wanted = "refused" if ROWS[name].refused else "equal"
        wrong |= {f"{name}: {cell}": text for cell, text in cells.items() if text != wanted}
    assert not wrong


def test_the_table_finds_planted_faults(tmp_path):
    calls = itertools.count()
    differs = Row("differs", lambda seed: torch.tensor([next(calls)]))
    assert any(cell.startswith("differs") for cell in _cells(differs, str(tmp_path)).values())
    untyped = Row("untyped", lambda seed: 1 // 0)
    assert all(cell.startswith("raised") for cell in _cells(untyped, str(tmp_path)).values())
    nameless = Row("nameless", lambda seed: PerRank(PerRank(1)))
    nameless.names = lambda error: False  # type: ignore[method-assign]
    assert all(cell.startswith("raised") for cell in _cells(nameless, str(tmp_path)).values())
