"""Save and load sharded models of transformers and PEFT in the layout of Hugging Face.

    save_pretrained(model, "folder", tokenizer)
    load_pretrained(model, "folder")

Names and shapes on disk are those of the hub: transformers' own rules convert them, such as the
fused experts of a mixture-of-experts model. Tested with transformers 5.24 and peft 0.21.
"""

from __future__ import annotations

import copy
import math
import os
import re
import shutil
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from shardckpt import api
from shardckpt.convert.opening import open_source
from shardckpt.convert.safetensors_files import HuggingFace
from shardckpt.convert.source_loading import load_source
from shardckpt.convert.sources import Foreign, LazyTensor, Origin
from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.exchange import Attempt, attempt, exchange
from shardckpt.coordination.resolve import operation
from shardckpt.errors import LoadMismatchError, StateError
from shardckpt.format import typed_json as values
from shardckpt.format.dtypes import DTYPES
from shardckpt.format.typed_json import TensorRef
from shardckpt.integrations.adapters import (
    adapter_weights,
    check_loadable,
    class_before_sharding,
    is_adapter,
    save_adapter_config,
    set_adapter_weights,
)
from shardckpt.integrations.key_conversion import Conversion, hub_names, model_names, unchanged
from shardckpt.maintenance.reshard import rewrite
from shardckpt.maintenance.rewritable import Source
from shardckpt.reports import LoadReport
from shardckpt.state.local_chunks import box_slices
from shardckpt.state.matching import DtypePolicy, casts
from shardckpt.state.mismatches import Mismatches
from shardckpt.state.module_state import ModuleState, ddp_rank0_buffers, named_state
from shardckpt.state.saved_tree import SavedState
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.resolve import resolve
from shardckpt.torch_compat import is_dtensor

__all__ = ["load_pretrained", "save_pretrained", "weights_of", "working_folder"]

DtypeOf = Callable[[Conversion, torch.dtype], torch.dtype]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def save_pretrained(
    model: Any,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    max_shard_size: int | str = "50GB",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Save a model as transformers' save_pretrained does, from all ranks and without gathering it.

    Collective. The folder has the weights under the names of the hub, the configuration, the
    generation configuration and the tokenizer, and appears when it is complete. Tied weights are
    saved under one name, and buffers that transformers ignores are left out. For a PEFT model only
    the adapter is saved. The ranks first write the weights beside the folder. Then each writes an
    equal part of the files, so that no rank needs memory for more than a few weights. The file
    system needs room for the weights twice.

    Args:
        model: A PreTrainedModel or a PeftModel, plain or under DDP, FSDP2 or tensor parallelism.
        folder: The new folder.
        tokenizer: A tokenizer or processor, which is saved to the folder too.
        max_shard_size: The largest size of a file, in bytes or as text such as "5GB".
        dtype: The dtype of floating-point weights on disk. By default they keep theirs. Weights
            that transformers loads in float32 when it is given this dtype, such as the routers of
            DeepSeek-V3 and the balancing biases of Zaya, are saved in float32.
        overwrite: Replace a folder that save_pretrained made.

    Raises:
        StateError: The model can't be saved.
        StorageError: The file system refused an operation.
        CoordinationError: A rank failed, or the ranks are not connected.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...                     intermediate_size=16, vocab_size=30)
        >>> save_pretrained(BertModel(config), "bert")
        >>> model = BertModel.from_pretrained("bert")
    """
    path, file_bytes = _local(folder), _size_bytes(max_shard_size)
    _check_dtype(dtype)
    weights_to_save = _state_to_save(model)
    with working_folder(path) as work:
        weights = os.path.join(work, "weights")
        api.save(weights_to_save, weights)
        subject = f"save_pretrained {path}"
        with operation(subject) as ranks, api.open_checkpoint(weights) as checkpoint:
            files = exchange(
                ranks, "begin", lambda: b"", lambda _: _describe(model, tokenizer, work, dtype)
            )
            source = _exported(model, checkpoint, work, files.decode().split("/"), dtype)
            target = _Pretrained(
                source,
                path,
                file_bytes=file_bytes,
                overwrite=overwrite,
                adapter=is_adapter(_inner(model)),
            )
            rewrite(target, ranks, lambda written_bytes: None)


def load_pretrained(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    strict: bool = True,
    dtype: DtypePolicy = "cast",
) -> LoadReport:
    """Load weights of the hub into a model, each rank its own shards.

    Collective. The model is built and sharded before: `AutoModel.from_config(config)`, also on the
    meta device, then fully_shard, tensor parallelism or DDP. A weight that differs from the file
    only in its name is read in parts. Weights that transformers joins or splits, such as experts,
    are read in full by every rank, one layer at a time.

    Args:
        model: A PreTrainedModel, or a PeftModel, which loads an adapter.
        folder: A folder in the layout of Hugging Face, or a checkpoint into which it was converted.
        strict: Require that the folder has all weights of the model and no others. Names that
            transformers ignores for this model, and tied weights, may be missing. With
            strict=False, mismatched weights keep their values, and the report lists them.
        dtype: "cast" converts to the dtype of the model; "strict" refuses another dtype.

    Returns:
        The differences between model and folder.

    Raises:
        LoadMismatchError: The weights don't fit the model. Nothing has been changed.
        CheckpointError: The folder can't be read.
        CoordinationError: A rank failed, or the ranks are not connected.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...                     intermediate_size=16, vocab_size=30)
        >>> save_pretrained(BertModel(config), "bert")
        >>> load_pretrained(BertModel(config), "bert").missing
        ()
    """
    path, cast, inner = resolve(folder).path, casts(dtype), _checked(model)
    adapter = is_adapter(inner)
    if adapter:
        own = adapter_weights(inner)
        check_loadable(inner, own)
    else:
        _fill_unsaved(inner)
        own = named_state(model).by_name()

    def imported(source: Source) -> Source:
        tensors = _forms(source)
        plan = unchanged(tensors) if adapter else model_names(inner, own, tensors)
        return _imported(source, plan, own, ranks)

    def excuse(mismatches: Mismatches) -> None:
        _excuse_tied(own, mismatches)
        if not adapter:
            _excuse_ignored(inner, mismatches)

    with operation(f"load_pretrained {path}") as ranks:
        opened: Attempt[Source] = attempt(open_source, path, check=False)
        source: Attempt[Source] = opened.then(imported)
        try:
            state = own if adapter else model
            report = load_source(
                state, path, source, ranks, strict=strict, cast=cast, excuse=excuse
            )
            if adapter:
                set_adapter_weights(inner, own)
            return report
        except LoadMismatchError as error:
            error.remedy = _remedy(error)
            raise
        finally:
            if opened.value is not None:
                opened.value.close()


def weights_of(model: Any) -> dict[str, Any]:
    """Return the weights of a model that belong into a file, by name. They alias the model's.

    For a PEFT model, these are the weights of the active adapter.
    """
    inner = _inner(model)
    if is_adapter(inner):
        return {name: tensor.detach() for name, tensor in adapter_weights(inner).items()}
    tensors = named_state(model).by_name()
    ignored = set(getattr(inner, "_keys_to_ignore_on_save", None) or ())
    tied = getattr(inner, "all_tied_weights_keys", None) or {}
    kept = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    firsts = {id(tensor) for name, tensor in kept.items() if name not in tied}
    return {
        name: tensor.detach()
        for name, tensor in kept.items()
        if name not in tied or id(tensor) not in firsts
    }


def _local(folder: str | os.PathLike[str]) -> str:
    """Return the absolute path of a folder."""
    place = resolve(folder)
    if not isinstance(place.storage, LocalStorage):
        raise StateError(
            "The layout of Hugging Face is written to a local path only",
            path=place.path,
            expected="a local path",
            actual=f"a path of {type(place.storage).__qualname__}",
            remedy="save to a local path, and copy the folder",
        )
    return os.path.abspath(place.path)


def _checked(model: Any) -> Any:
    """Return the model inside its wrappers, which must be one of transformers or PEFT."""
    from transformers import PreTrainedModel

    inner = _inner(model)
    if not (isinstance(inner, PreTrainedModel) or is_adapter(inner)):
        raise StateError(
            "The layout of Hugging Face is that of a model of transformers or PEFT",
            expected="a PreTrainedModel or PeftModel, or one under DDP or torch.compile",
            actual=type(inner).__qualname__,
            remedy="pass the PreTrainedModel inside, or use shardckpt.save and shardckpt.load",
        )
    return inner


def _check_dtype(dtype: object) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise StateError(
            "Invalid value for dtype",
            expected="a floating-point torch.dtype, or None to keep that of each weight",
            actual=repr(dtype),
        )


def _state_to_save(model: Any) -> ModuleState:
    if getattr(_checked(model), "hf_quantizer", None) is not None:
        raise StateError(
            "A quantized model can't be saved in the layout of Hugging Face",
            expected="weights in a floating-point dtype",
            actual=f"{type(_inner(model)).__name__} with a quantizer",
            remedy="save it with shardckpt.save, or dequantize it first",
        )
    weights = weights_of(model)
    return ModuleState(weights, set(), ddp_rank0_buffers(model) & weights.keys())


def _inner(model: Any) -> Any:
    """Return the model inside the wrappers of DDP and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None) or (
            model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else None
        )
        if inner is None:
            return model
        model = inner


def _size_bytes(size: int | str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", str(size).upper().replace(" ", ""))
    size_bytes = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size_bytes < 1:
        raise StateError(
            "Invalid size of files", expected='bytes, or text such as "5GB"', actual=repr(size)
        )
    return size_bytes


@contextmanager
def working_folder(path: str) -> Iterator[str]:
    """Make a folder beside `path` that all ranks share, and remove it afterwards. Collective."""
    parent = os.path.dirname(path)

    def make(payloads: list[bytes]) -> bytes:
        os.makedirs(parent, exist_ok=True)
        return os.fsencode(tempfile.mkdtemp(prefix=".shardckpt-pretrained-", dir=parent))

    with operation(f"save_pretrained {path}") as ranks:
        work = os.fsdecode(exchange(ranks, "begin", lambda: b"", make))
        first = ranks.rank == 0
    try:
        yield work
    finally:
        if first:
            shutil.rmtree(work, ignore_errors=True)


def _describe(model: Any, tokenizer: Any, work: str, dtype: torch.dtype | None) -> bytes:
    """Write the files beside the weights. Returns their names."""
    inner = _inner(model)
    if is_adapter(inner):
        save_adapter_config(inner, work)
    else:
        config = copy.deepcopy(inner.config)
        config.dtype = _dtype_name(dtype or inner.dtype)
        if dtype is not None:
            _set_dtype_below(config, _dtype_name(dtype))
        own_class = class_before_sharding(inner)
        config.architectures = [own_class.__name__]
        if inner.is_remote_code():
            from transformers.dynamic_module_utils import custom_object_save

            custom_object_save(own_class.__new__(own_class), work, config=config)
        config.save_pretrained(work)
        if inner.can_generate() and inner.generation_config is not None:
            inner.generation_config.save_pretrained(work)
    if tokenizer is not None:
        tokenizer.save_pretrained(work)
    names = sorted(n for n in os.listdir(work) if os.path.isfile(os.path.join(work, n)))
    return "/".join(names).encode()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _set_dtype_below(config: Any, name: str) -> None:
    """Set the dtype of the configurations inside a configuration."""
    for key in config.sub_configs:
        inner = getattr(config, key, None)
        if inner is not None:
            inner.dtype = name
            _set_dtype_below(inner, name)


class _Pretrained(HuggingFace):
    """A folder of save_pretrained. Files beside the weights may replace others of their names."""

    def __init__(
        self, source: Source, path: str, *, file_bytes: int, overwrite: bool, adapter: bool
    ):
        super().__init__(source, path, file_bytes=file_bytes, overwrite=overwrite)
        if adapter:
            self.stem = "adapter_model"
            self.index = ("adapter_model.safetensors", "adapter_model.safetensors.index.json")
            self.names = self.names.replace("model", "adapter_model", 1)

    def foreign(self, names: Sequence[str]) -> Sequence[str]:
        """See Target.foreign."""
        return [n for n in names if not re.fullmatch(self.names, n) and n not in self.copied]


def _exported(
    model: Any, source: Source, path: str, files: Sequence[str], dtype: torch.dtype | None
) -> Foreign:
    """Return the saved weights of a model as a source with the names of the hub."""
    tensors = _forms(source)
    plan = unchanged(tensors) if is_adapter(_inner(model)) else hub_names(_inner(model), tensors)
    origin = Origin(format="shardckpt", companions=tuple(files))
    return _converted(source, plan, path, dtype=_dtype_policy(model, dtype), origin=origin)


def _dtype_policy(model: Any, dtype: torch.dtype | None) -> DtypeOf:
    """Return the function that chooses the dtype of weights, as from_pretrained(dtype=) does."""
    inner = _inner(model)
    if dtype is None:
        return lambda conversion, own: own
    if is_adapter(inner):
        return lambda conversion, own: dtype if own.is_floating_point else own
    from transformers.core_model_loading import build_glob_alternation

    patterns: dict[str, torch.dtype] = inner._get_dtype_plan(dtype)
    built = _built_dtypes(inner, dtype)
    pattern, names, _ = build_glob_alternation(list(patterns) or ["(?!)"])

    def choose(conversion: Conversion, own: torch.dtype) -> torch.dtype:
        if not own.is_floating_point:
            return own
        found = next(filter(None, map(pattern.search, conversion.sources)), None)
        if found:
            return patterns[names[found.lastgroup]]
        return next((built[name] for name in conversion.sources if name in built), dtype)

    return choose


def _built_dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtypes of the weights that a model built with a dtype has, by name. The code of
    some models builds weights in float32 with any dtype."""
    with torch.device("meta"):
        built = class_before_sharding(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    weights = named_state(built).by_name().items()
    return {name: weight.dtype for name, weight in weights if weight.is_floating_point()}


def _imported(
    source: Source, plan: Sequence[Conversion], own: Mapping[str, Any], ranks: Coordinator
) -> Foreign:
    """Return weights of the hub as a source with the names of a model, and each tied weight once.

    `own` has the tensors of the model, by name.
    """
    made: dict[int, str] = {}
    kept, again = [], []
    for conversion in plan:
        ids = {name: id(own.get(name, conversion)) for name in conversion.targets}
        if all(at in made for at in ids.values()):
            again += [(name, made[at]) for name, at in ids.items()]
        else:
            kept.append(conversion)
            made |= {at: name for name, at in ids.items()}
    _check_equal(_converted(source, plan, source.path), again, ranks)
    return _converted(source, kept, source.path)


def _check_equal(source: Foreign, pairs: Sequence[tuple[str, str]], ranks: Coordinator) -> None:
    """Check that pairs of tensors have equal values. Each rank reads a part of them."""
    for name, first in pairs:
        shape, other = (source.manifest.tensors[each].shape for each in (name, first))
        if shape != other or not all(
            _equal(source.read_box(name, *box), source.read_box(first, *box))
            for box in _row_boxes(shape, ranks)
        ):
            raise LoadMismatchError(
                "Two weights that are tied in the model have different values in the file",
                path=source.path,
                tensor=name,
                expected=f"the values of {first}",
                actual="other values",
                remedy="build the model without the tie: for embeddings, with "
                "config.tie_word_embeddings=False",
            )


def _row_boxes(
    shape: tuple[int, ...], ranks: Coordinator
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Divide this rank's share of a tensor into boxes of at most 16 million elements, or a row."""
    rows, *row = shape or (1,)
    first, end = (rows * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
    step = max(1, 2**24 // max(1, math.prod(row)))
    for at in range(first, end, step):
        yield (at, *(0,) * len(row))[: len(shape)], (min(step, end - at), *row)[: len(shape)]


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.to(torch.float64), b.to(torch.float64), rtol=0, atol=0, equal_nan=True)


def _names(source: Source) -> dict[str, str]:
    """Return the names of the tensors in a source, with their names in its manifest."""
    leaves = SavedState(source.manifest).leaves
    return {n: ref.name for n, ref in leaves.items() if isinstance(ref, TensorRef)}


def _forms(source: Source) -> dict[str, torch.Tensor]:
    """Return the tensors of a source by name, on the meta device."""
    entries = source.manifest.tensors
    return {
        name: torch.empty(entries[at].shape, dtype=DTYPES[entries[at].dtype], device="meta")
        for name, at in _names(source).items()
    }


def _converted(
    source: Source,
    plan: Sequence[Conversion],
    path: str,
    *,
    dtype: DtypeOf = lambda conversion, own: own,
    origin: Origin | None = None,
) -> Foreign:
    """Return a source that reads and converts the tensors of another one when they are needed.

    `dtype` chooses the dtype of a tensor that a conversion makes, from its own.
    """
    names, entries = _names(source), source.manifest.tensors
    latest: list[tuple[Conversion, Mapping[str, torch.Tensor]]] = []  # of the last layer, once

    def all_of(conversion: Conversion) -> Mapping[str, torch.Tensor]:
        assert conversion.run is not None
        if not latest or latest[0][0] is not conversion:
            latest.clear()
            shapes = {name: entries[names[name]].shape for name in conversion.sources}
            full = {n: source.read_box(names[n], (0,) * len(s), s) for n, s in shapes.items()}
            latest.append((conversion, conversion.run(full)))
        return latest[0][1]

    def reader(conversion: Conversion, name: str, to: torch.dtype) -> Any:
        def read(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
            if conversion.run is None:
                box = source.read_box(names[conversion.sources[0]], offsets, sizes)
            else:
                box = all_of(conversion)[name][box_slices((0,) * len(sizes), offsets, sizes)]
            return box.to(to)

        return read

    tensors = {}
    for conversion in plan:
        for name, form in conversion.targets.items():
            to = dtype(conversion, form.dtype)
            tensors[name] = LazyTensor(to, tuple(form.shape), reader(conversion, name, to))
    tree = values.mapping([(name, values.reference("tensor", name)) for name in tensors], at="")
    return Foreign(
        path, "Hugging Face", tree, tensors, identity=source.manifest.checkpoint_id, origin=origin
    )


def _remedy(error: LoadMismatchError) -> str | None:
    """Name the arguments of load_pretrained that help."""
    if "missing" not in error.facts:  # a tie; see _check_equal
        return error.remedy
    cast = "; dtype='cast' converts dtypes" if error.facts["wrong_dtype"] else ""
    return f"strict=False loads the matching weights{cast}"


def _excuse_tied(own: Mapping[str, Any], mismatches: Mismatches) -> None:
    """Remove the missing weights that are tied to one that the file has."""
    lacking = {*mismatches.missing, *(name for name, _, _ in mismatches.wrong_shape)}
    filled = {id(tensor) for name, tensor in own.items() if name not in lacking}
    mismatches.missing[:] = [n for n in mismatches.missing if id(own.get(n)) not in filled]


def _excuse_ignored(model: Any, mismatches: Mismatches) -> None:
    """Remove the mismatches that transformers ignores when it loads this model."""
    keys = types.SimpleNamespace(
        missing_keys={*mismatches.missing}, unexpected_keys={*mismatches.unexpected}
    )
    model._adjust_missing_and_unexpected_keys(keys)
    mismatches.missing[:] = [name for name in mismatches.missing if name in keys.missing_keys]
    mismatches.unexpected[:] = [n for n in mismatches.unexpected if n in keys.unexpected_keys]


def _fill_unsaved(model: Any) -> None:
    """Give memory and values to tensors on the meta device that files lack: buffers such as the
    frequencies of rotary embeddings, and weights that transformers does not save, such as fixed
    positions."""
    devices = (getattr(p, "device_mesh", p.device) for p in model.parameters())
    device = next((getattr(d, "device_type", d) for d in devices if str(d) != "meta"), "cpu")
    unsaved = re.compile("|".join(model._keys_to_ignore_on_load_missing or ()) or "(?!)")
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied_names = {*tied, *tied.values()}

    def is_unsaved(name: str, tensor: torch.Tensor) -> bool:
        return not (is_dtensor(tensor) or name in tied_names or unsaved.search(name) is None)

    initializers = {"": model}  # the innermost model around each module initializes it
    for name, module in model.named_modules():
        outer = initializers[name.rpartition(".")[0]] if name else model
        initializer = initializers[name] = module if hasattr(module, "_init_weights") else outer
        persistent, prefix = module.state_dict(), f"{name}." if name else ""
        lacking = {
            key: tensor
            for key, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None and tensor.is_meta
            if key not in persistent or is_unsaved(prefix + key, tensor)
        }
        for key, tensor in lacking.items():
            filled = torch.empty_like(tensor, device=device)
            if isinstance(tensor, torch.nn.Parameter):
                filled = torch.nn.Parameter(filled, requires_grad=tensor.requires_grad)
            setattr(module, key, filled)
        if lacking:
            initializer._init_weights(module)
