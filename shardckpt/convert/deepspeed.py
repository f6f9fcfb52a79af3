"""Read checkpoints of DeepSpeed, without running code: ZeRO stages 1 to 3, and universal ones.

Each rank saves its part of the parameters and of the optimizer's state as flat tensors, one after
another in the order of `param_shapes`. In stages 1 and 2 the ranks divide all parameters of a group
as one flat tensor, in which padding may follow each parameter; in stage 3 they divide each
parameter. A universal checkpoint has a folder for each parameter. For the files of DeepSpeed 0.19,
which are read with weights_only=True.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from shardckpt.convert.boxes import ReadBox, read_rows
from shardckpt.convert.foreign_file import file_in, read_small
from shardckpt.convert.layouts import left_beside, names_in
from shardckpt.convert.single_files import read_one
from shardckpt.convert.sources import Foreign, Origin, foreign
from shardckpt.convert.torch_objects import ObjectsLoader
from shardckpt.convert.torch_sources import read_objects
from shardckpt.errors import CorruptionError, NotACheckpointError, ShardckptError
from shardckpt.storage.posix import translated

__all__ = ["deepspeed_folder", "open_deepspeed"]

_UNIVERSAL, _OPTIONS = "zero", "optimizer_state.pt"
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OTHER_FILE = re.compile(r"(layer_\d+|expp_rank_\d+).*_states\.pt")
_LATEST = ("latest", "latest_universal")
_LATEST_LIMIT_BYTES = 4096
_INTERNAL = {
    "module", "optimizer", "buffer_names", "param_shapes", "frozen_param_shapes",
    "frozen_param_fragments", "shared_params", "sparse_tensor_module_names",
    "csr_tensor_module_names", "universal_checkpoint_info",
}  # fmt: skip
"""Entries beside the weights that only the engine of DeepSpeed needs."""
_INVALID = (ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError)


def deepspeed_folder(path: str) -> str | None:
    """Return the folder with the files of a DeepSpeed checkpoint: `path`, or the folder below it
    that its file `latest` names. None for other folders."""
    if not os.path.isdir(path):
        return None
    if _has_states(path):
        return path
    for name in _LATEST:
        if os.path.isfile(os.path.join(path, name)):
            text = read_small(file_in(path, name), limit_bytes=_LATEST_LIMIT_BYTES)
            tag = text.decode("utf-8", "replace").strip()
            below = os.path.join(path, tag)
            if tag and "\0" not in tag and _has_states(below):
                return file_in(path, tag)
    return None


def _has_states(folder: str) -> bool:
    if not os.path.isdir(folder):
        return False
    names = names_in(folder)
    return any(_MODEL_FILE.fullmatch(name) or _OPTIMIZER_FILE.fullmatch(name) for name in names)


def open_deepspeed(path: str, folder: str, *, check: bool) -> Foreign:
    """Open a checkpoint of DeepSpeed as a source. `folder` is that of deepspeed_folder.

    The state has the entries `model`, with the float32 copies of the optimizer, and `optimizer`,
    whose state has the names of the parameters. `check`: verify the checksums of the files.

    Raises:
        NotACheckpointError: The checkpoint has several ranks of model parallelism, or experts.
        CorruptionError: A file is invalid or missing.
    """
    try:
        with translated(folder):
            saved = _Saved(folder, check=check)
            saved.read()
    except ShardckptError:
        raise
    except _INVALID as error:
        raise _invalid(folder, f"{type(error).__name__}: {error}") from error
    version = saved.state.get("ds_version")
    writer = f"DeepSpeed {version}" if type(version) is str else "DeepSpeed"
    beside = {} if path == folder else left_beside(path, {os.path.basename(folder), *_LATEST})
    used = {name.partition("/")[0] for name in saved.files}
    origin = Origin(
        format=saved.layout,
        writer=writer,
        left_out={**beside, **left_beside(folder, used), **saved.left_out},
        changed=saved.objects.changed,
        files=tuple(sorted(saved.files)),
    )
    sizes = [os.path.getsize(os.path.join(folder, name)) for name in sorted(saved.files)]
    return foreign(path, "DeepSpeed", saved.state, reads=saved.reads, identity=sizes, origin=origin)


class _Piece(NamedTuple):
    """A part of a flat tensor."""

    flat: torch.Tensor
    begin: int
    size: int


@dataclass(slots=True)
class _Rank:
    """The flat tensors of a rank: the parameters of each group, and the optimizer's state."""

    weights: list[torch.Tensor]
    states: list[dict[str, Any]]
    options: list[dict[str, Any]]


@dataclass(slots=True)
class _Saved:
    """The state of a folder, and the functions that read its tensors."""

    folder: str
    check: bool
    layout: str = "DeepSpeed"
    state: dict[Any, Any] = field(default_factory=dict)
    reads: dict[int, ReadBox] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    objects: ObjectsLoader = field(default_factory=ObjectsLoader)

    def read(self) -> None:
        """Read the files of the folder."""
        names = names_in(self.folder)
        optimizer_files = self._by_rank(names, _OPTIMIZER_FILE)
        model_files = self._by_rank(names, _MODEL_FILE)
        if other := [name for name in names if _OTHER_FILE.fullmatch(name)]:
            raise _refused(self.folder, other[0])
        first = self._load(model_files[min(model_files)], self.objects)
        self.left_out = {
            name: why
            for name, why in self.objects.left_out.items()
            if name.partition(".")[0] not in _INTERNAL - {"module"}
        }
        model = dict(first["module"])
        self.state = {"model": model}
        self.state |= {key: item for key, item in first.items() if key not in _INTERNAL}
        if os.path.isdir(os.path.join(self.folder, _UNIVERSAL)):
            self.layout = "DeepSpeed, universal"
            self._read_universal(model, first, model_files)
        elif optimizer_files:
            self._read_zero(model, first, optimizer_files, model_files)
        elif first.get("optimizer") is not None:
            self.state["optimizer"] = first["optimizer"]
        shared: Mapping[Any, Any] = first.get("shared_params") or {}
        for name, other in shared.items():
            if other in model:
                model[name] = model[other]

    def _by_rank(self, names: Sequence[str], pattern: re.Pattern[str]) -> dict[int, str]:
        """Return the files that match a pattern, by the data-parallel rank that wrote them."""
        found = {}
        for name in names:
            if match := pattern.fullmatch(name):
                if int(match[2]):
                    raise _refused(self.folder, name)
                found[int(match[1] or 0)] = name
        return found

    def _load(self, name: str, objects: ObjectsLoader) -> dict[Any, Any]:
        self.files.add(name)
        return read_objects(file_in(self.folder, name), objects, check=self.check)

    # ---- ZeRO

    def _read_zero(
        self,
        model: dict[Any, Any],
        first: dict[Any, Any],
        optimizer_files: dict[int, str],
        model_files: dict[int, str],
    ) -> None:
        objects = ObjectsLoader()
        loaded = [
            self._load(optimizer_files[rank], objects)["optimizer_state_dict"]
            for rank in sorted(optimizer_files)
        ]
        if why := objects.left_out.get("optimizer_state_dict.loss_scaler"):
            self.left_out["loss_scaler"] = why
        stage = loaded[0].get("zero_stage", 1)  # the optimizer for bfloat16 does not save it
        if stage not in (1, 2, 3):
            raise ValueError(f"the ZeRO stage {stage}")
        counts = loaded[0]["partition_count"]
        count = max(counts) if isinstance(counts, (list, tuple)) else counts
        if len(optimizer_files) != count or max(optimizer_files) != count - 1:
            expected = f"{count} files of optimizer states"
            raise _invalid(self.folder, f"{len(optimizer_files)} of {expected}")
        if isinstance(counts, (list, tuple)) and min(counts) != count:
            raise _refused(self.folder, "experts, which fewer ranks divide")
        self.layout = f"DeepSpeed, ZeRO stage {stage}"
        ranks = [_rank(item, stage) for item in loaded]
        keys = [state.keys() for state in ranks[0].states]
        if any([state.keys() for state in rank.states] != keys for rank in ranks):
            raise ValueError("ranks that have other states of the optimizer")
        groups = [_shapes(shapes) for shapes in first["param_shapes"]]
        paddings = loaded[0].get("param_alignment_paddings") or [[0] * len(g) for g in groups]
        if any(type(n) is not int or n < 0 for padding in paddings for n in padding):
            raise ValueError("invalid param_alignment_paddings")
        weights, states = {}, {}
        for name, group, locate in _locations(ranks, groups, paddings, stage):
            shape = groups[group][name]
            if name in weights:
                raise ValueError(f"the parameter {name} occurs twice")
            weights[name] = self._tensor(shape, locate([rank.weights for rank in ranks]))
            states[name] = {
                key: self._state_of(key, shape, group, ranks, locate)
                for key in ranks[0].states[group]
            }
        model.update(weights)
        if stage == 3:
            self._read_stage_3_model(model, first, model_files, set(weights))
        self.state["optimizer"] = {
            "state": states,
            "param_groups": _param_groups(ranks[0].options, groups),
        }

    def _state_of(
        self, key: str, shape: tuple[int, ...], group: int, ranks: list[_Rank], locate: Any
    ) -> Any:
        """Return the optimizer's state of a parameter: a tensor like it, or a value of the
        group."""
        value = ranks[0].states[group][key]
        if not _is_flat(value):
            return _copied(value)
        return self._tensor(shape, locate([_flats_of(key, rank) for rank in ranks]))

    def _read_stage_3_model(
        self,
        model: dict[Any, Any],
        first: dict[Any, Any],
        model_files: dict[int, str],
        trained: set[str],
    ) -> None:
        """Keep the buffers of the module, and add the frozen parameters, which ranks divide."""
        frozen = _shapes(first.get("frozen_param_shapes") or {})
        buffers = set(first.get("buffer_names") or ())
        for name in [name for name in model if name not in trained and name not in buffers]:
            del model[name]
        if not frozen:
            self.files |= set(model_files.values())
            return
        parts = [first["frozen_param_fragments"]]
        for rank in sorted(model_files)[1:]:
            parts.append(self._load(model_files[rank], ObjectsLoader())["frozen_param_fragments"])
        for name, shape in frozen.items():
            flats = [part[name].reshape(-1) for part in parts]
            model[name] = self._tensor(shape, list(_cut(flats, 0, math.prod(shape))))

    # ---- universal

    def _read_universal(
        self, model: dict[Any, Any], first: dict[Any, Any], model_files: dict[int, str]
    ) -> None:
        """Read the folder of each parameter."""
        home = file_in(self.folder, _UNIVERSAL)
        weights: dict[str, torch.Tensor] = {}
        states: dict[str, dict[str, Any]] = {}
        for name in names_in(home):
            if not os.path.isdir(inner := file_in(home, name)):
                continue
            files = [file for file in names_in(inner) if file.endswith(".pt")]
            found = {
                file.removesuffix(".pt"): self._of_universal(
                    file_in(inner, file), f"{_UNIVERSAL}/{name}/{file}"
                )
                for file in files
            }
            weights[name] = found.pop("fp32")
            if not isinstance(weights[name], torch.Tensor):
                raise TypeError(f"{type(weights[name]).__name__} in place of the weight {name}")
            if found:  # frozen weights and buffers have no state
                states[name] = found
        options = self._of_universal(file_in(home, _OPTIONS), f"{_UNIVERSAL}/{_OPTIONS}")
        groups = [_shapes(shapes) for shapes in first["param_shapes"]]
        if options["zero_stage"] == 3:
            _restore_stage_3(weights, states, groups, options["optimizer_state_dict"]["state"])
            self._read_stage_3_model(model, first, model_files, set(weights))
        model.update(weights)
        kept = [dict(group) for group in options["param_groups"]]
        self.state["optimizer"] = {"state": states, "param_groups": _param_groups(kept, groups)}

    def _of_universal(self, path: str, name: str) -> Any:
        self.files.add(name)
        objects = ObjectsLoader()
        value = objects.plain(read_one(path, check=self.check, load=objects.load), "")
        return value["param"] if isinstance(value, dict) and "param" in value else value

    # ---- tensors

    def _tensor(self, shape: tuple[int, ...], pieces: list[_Piece]) -> torch.Tensor:
        """Return a placeholder of a tensor, whose data `reads` reads from the pieces."""
        dtypes = {piece.flat.dtype for piece in pieces}
        if len(dtypes) > 1:
            raise TypeError(f"a tensor in parts of {len(dtypes)} dtypes")
        dtype = dtypes.pop() if dtypes else torch.float32
        placeholder = torch.empty((), dtype=dtype, device="cpu").expand(shape)
        self.reads[id(placeholder)] = partial(_read_box, pieces, shape, dtype)
        return placeholder


def _restore_stage_3(
    weights: dict[str, torch.Tensor],
    states: dict[str, dict[str, Any]],
    groups: list[dict[str, tuple[int, ...]]],
    saved: Mapping[int, Mapping[str, Any]],
) -> None:
    """Restore the shapes of a universal checkpoint of stage 3, whose tensors are flat, and add the
    values of each group, such as `step`."""
    for group, shapes in enumerate(groups):
        values = {key: item for key, item in saved[group].items() if not _is_flat(item)}
        for name, shape in shapes.items():
            weights[name] = weights[name].reshape(shape)
            for key, item in states[name].items():
                states[name][key] = item.reshape(shape) if _is_flat(item) else item
            states[name] |= {key: _copied(item) for key, item in values.items()}


def _is_flat(item: Any) -> bool:
    return isinstance(item, torch.Tensor) and item.dim() > 0


def _copied(item: Any) -> Any:
    """Return a value that no other parameter shares."""
    return item.clone() if isinstance(item, torch.Tensor) else item


def _rank(saved: Mapping[str, Any], stage: int) -> _Rank:
    """Return the flat tensors in the optimizer's file of a rank."""
    stage_3 = stage == 3
    weights = saved["fp32_flat_groups" if stage_3 else "single_partition_of_fp32_groups"]
    base = saved["optimizer_state_dict" if stage_3 else "base_optimizer_state"]
    for flat in weights:
        if not isinstance(flat, torch.Tensor) or flat.dim() != 1:
            raise TypeError("parameters that are not flat tensors")
    states = [dict(base["state"].get(index, {})) for index in range(len(weights))]
    return _Rank(list(weights), states, [dict(group) for group in base["param_groups"]])


def _flats_of(key: str, rank: _Rank) -> list[torch.Tensor]:
    """Return the state `key` of all groups, with the weights in place of it for a group that lacks
    it. Padding at the end, which the weights lack, is left out."""
    flats = [
        state.get(key, weights) for state, weights in zip(rank.states, rank.weights, strict=True)
    ]
    for flat, weights in zip(flats, rank.weights, strict=True):
        if flat.dim() != 1 or len(flat) < len(weights):
            raise ValueError(f"the state {key} does not have the length of the parameters")
    return [flat[: len(weights)] for flat, weights in zip(flats, rank.weights, strict=True)]


def _shapes(saved: Mapping[Any, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of parameters by name."""
    shapes = {}
    for name, shape in saved.items():
        sizes = tuple(shape)
        if type(name) is not str or not all(type(n) is int and 0 <= n < 1 << 62 for n in sizes):
            raise TypeError(f"{str(shape)[:80]} in place of the shape of a parameter")
        shapes[name] = sizes
    return shapes


def _locations(
    ranks: list[_Rank],
    groups: list[dict[str, tuple[int, ...]]],
    paddings: list[list[int]],
    stage: int,
) -> Iterator[tuple[str, int, Callable[[list[list[torch.Tensor]]], list[_Piece]]]]:
    """For each parameter: its name, its group, and a function that finds its pieces in the flat
    tensors of all ranks, which it gets by rank and group."""
    if any(len(rank.weights) != len(groups) for rank in ranks):
        raise ValueError(f"{len(groups)} groups of parameters, and other numbers of flat tensors")
    begin = 0
    for group, (shapes, padding) in enumerate(zip(groups, paddings, strict=True)):
        begin = begin if stage == 3 else 0
        for (name, shape), behind in zip(shapes.items(), padding, strict=True):
            count = math.prod(shape)
            if stage == 3:
                part = -(-count // len(ranks))
                yield name, group, partial(_in_each_rank, begin=begin, part=part, count=count)
                begin += part
            else:
                yield name, group, partial(_in_group, group=group, begin=begin, count=count)
                begin += count + behind


def _in_each_rank(
    flats: list[list[torch.Tensor]], *, begin: int, part: int, count: int
) -> list[_Piece]:
    pieces: list[_Piece] = []
    for rank, flat in enumerate(flats):
        inner = max(0, min(part, count - rank * part))
        pieces += _cut(flat, begin, inner)
    return pieces


def _in_group(
    flats: list[list[torch.Tensor]], *, group: int, begin: int, count: int
) -> list[_Piece]:
    return list(_cut([flat[group] for flat in flats], begin, count))


def _cut(flats: Sequence[torch.Tensor], begin: int, count: int) -> Iterator[_Piece]:
    """Yield the parts of flat tensors that hold `count` elements from `begin` on, as if the tensors
    were one."""
    for flat in flats:
        inner = min(count, len(flat) - begin)
        if inner > 0:
            yield _Piece(flat, begin, inner)
            count -= inner
        begin = max(0, begin - len(flat))
    if count:
        raise ValueError(f"{count} elements of a parameter are missing")


def _read_box(
    pieces: list[_Piece],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
) -> torch.Tensor:
    """Read a box of a tensor from its pieces."""

    def read(begin: int, end: int) -> torch.Tensor:
        flat = torch.empty(end - begin, dtype=dtype, device="cpu")
        at = 0
        for piece in pieces:
            low, high = max(begin, at), min(end, at + piece.size)
            if low < high:
                start = piece.begin + low - at
                flat[low - begin : high - begin] = piece.flat[start : start + high - low]
            at += piece.size
        return flat

    return read_rows(shape, offsets, sizes, read)


def _param_groups(
    options: list[dict[str, Any]], groups: list[dict[str, tuple[int, ...]]]
) -> list[dict[str, Any]]:
    """Return the optimizer's groups with names of parameters. Its `params` are indices of
    `groups`."""
    kept = []
    for number, group in enumerate(options):
        indices = group.get("params") or ([number] if len(options) == len(groups) else [])
        names = [name for index in indices for name in groups[index]]
        kept.append({**group, "params": names})
    return kept


def _refused(folder: str, actual: str) -> NotACheckpointError:
    return NotACheckpointError(
        "Conversion of this DeepSpeed checkpoint is not supported",
        path=folder,
        expected="one rank of model parallelism, no pipeline stages and no experts",
        actual=actual,
        remedy="load it with DeepSpeed, and save the state with shardckpt.save",
    )


def _invalid(folder: str, actual: str) -> CorruptionError:
    return CorruptionError(
        "This DeepSpeed checkpoint is corrupted or of an unknown version",
        path=folder,
        expected="the files of DeepSpeed 0.19",
        actual=actual[:200],
        remedy="load another checkpoint, or merge this one with DeepSpeed's zero_to_fp32.py",
    )
