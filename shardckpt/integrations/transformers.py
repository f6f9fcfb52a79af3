"""Save and load sharded models of transformers and PEFT in the layout of Hugging Face.

    save_pretrained(model, "folder", tokenizer)
    load_pretrained(model, "folder")

Names and shapes on disk are those of the hub: transformers' own rules convert them, such as the
fused experts of a mixture-of-experts model. Tested with transformers 5.24 and peft 0.21.
"""

from __future__ import annotations

import copy
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
from shardckpt.coordination.exchange import Attempt, attempt, exchange
from shardckpt.coordination.resolve import operation
from shardckpt.errors import StateError
from shardckpt.format import typed_json as values
from shardckpt.format.dtypes import DTYPES
from shardckpt.format.typed_json import TensorRef
from shardckpt.integrations.key_conversion import Conversion, hub_names, model_names, unchanged
from shardckpt.maintenance.reshard import rewrite
from shardckpt.maintenance.rewritable import Source
from shardckpt.reports import LoadReport
from shardckpt.state.local_chunks import box_slices
from shardckpt.state.matching import DtypePolicy, casts
from shardckpt.state.mismatches import Mismatches
from shardckpt.state.module_state import named_state
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
            DeepSeek-V3, are saved in float32.
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
    with working_folder(path) as work:
        weights = os.path.join(work, "weights")
        api.save(_state_to_save(model), weights)
        subject = f"save_pretrained {path}"
        with operation(subject) as ranks, api.open_checkpoint(weights) as checkpoint:
            files = exchange(
                ranks, "begin", lambda: b"", lambda _: _describe(model, tokenizer, work, dtype)
            )
            source = _exported(model, checkpoint, work, files.decode().split("/"), dtype)
            target = _Pretrained(
                source, path, file_bytes=file_bytes, overwrite=overwrite, adapter=_is_adapter(model)
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
    path, cast = os.fspath(folder), casts(dtype)
    with operation(f"load_pretrained {path}") as ranks:
        opened: Attempt[Source] = attempt(open_source, path, check=False)
        try:
            if _is_adapter(model):
                return load_source(
                    _adapter_to_fill(model), path, opened, ranks, strict=strict, cast=cast
                )
            _fill_unsaved(_inner(model))
            return load_source(
                model,
                path,
                opened.then(lambda source: _imported(model, source)),
                ranks,
                strict=strict,
                cast=cast,
                excuse=lambda mismatches: _excuse(model, mismatches),
            )
        finally:
            if opened.value is not None:
                opened.value.close()


def weights_of(model: Any) -> dict[str, Any]:
    """Return the weights of a model that belong into a file, by name. They alias the model's.

    For a PEFT model, these are the weights of the active adapter.
    """
    if _is_adapter(model):
        from peft import get_peft_model_state_dict

        inner = _inner(model)
        return dict(get_peft_model_state_dict(inner, adapter_name=_adapter_name(inner)))
    inner = _inner(model)
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


def _adapter_to_fill(model: Any) -> dict[str, Any]:
    weights = weights_of(model)
    for name, weight in weights.items():
        if weight.is_meta:
            raise StateError(
                "An adapter on the meta device can't be loaded",
                tensor=name,
                expected="weights with memory",
                actual="device meta",
                remedy="build the adapter outside of torch.device('meta')",
            )
    return weights


def _state_to_save(model: Any) -> dict[str, Any]:
    if getattr(_inner(model), "hf_quantizer", None) is not None:
        raise StateError(
            "A quantized model can't be saved in the layout of Hugging Face",
            expected="weights in a floating-point dtype",
            actual=f"{type(_inner(model)).__name__} with a quantizer",
            remedy="save it with shardckpt.save, or dequantize it first",
        )
    return weights_of(model)


def _inner(model: Any) -> Any:
    """Return the model inside the wrappers of DDP and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None) or (
            model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else None
        )
        if inner is None:
            return model
        model = inner


def _is_adapter(model: Any) -> bool:
    return bool(getattr(_inner(model), "peft_config", None))


def _adapter_name(inner: Any) -> str:
    active = inner.active_adapters
    names: list[str] = active() if callable(active) else active
    if len(names) != 1:
        raise StateError(
            "Only one adapter can be saved or loaded at a time",
            expected="one active adapter",
            actual=", ".join(names) or "none",
            remedy="call model.set_adapter(name) first",
        )
    return names[0]


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
    if _is_adapter(model):
        inner.peft_config[_adapter_name(inner)].save_pretrained(work)
    else:
        config = copy.deepcopy(inner.config)
        config.dtype = _dtype_name(dtype or inner.dtype)
        if dtype is not None:
            _set_dtype_below(config, _dtype_name(dtype))
        config.architectures = [type(inner).__name__.removeprefix("FSDP")]
        if inner.is_remote_code():
            from transformers.dynamic_module_utils import custom_object_save

            custom_object_save(inner, work, config=config)
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
    plan = unchanged(tensors) if _is_adapter(model) else hub_names(_inner(model), tensors)
    origin = Origin(format="shardckpt", companions=tuple(files))
    return _converted(source, plan, path, dtype=_dtype_policy(model, dtype), origin=origin)


def _dtype_policy(model: Any, dtype: torch.dtype | None) -> DtypeOf:
    """Return the function that chooses the dtype of weights, as from_pretrained(dtype=) does."""
    inner = _inner(model)
    if dtype is None:
        return lambda conversion, own: own
    patterns = {} if _is_adapter(model) else inner._get_dtype_plan(dtype)
    if not patterns:
        return lambda conversion, own: dtype if own.is_floating_point else own
    from transformers.core_model_loading import build_glob_alternation

    pattern, names, _ = build_glob_alternation(list(patterns))

    def choose(conversion: Conversion, own: torch.dtype) -> torch.dtype:
        if not own.is_floating_point:
            return own
        found = next(filter(None, map(pattern.search, conversion.sources)), None)
        return patterns[names[found.lastgroup]] if found else dtype

    return choose


def _imported(model: Any, source: Source) -> Foreign:
    """Return weights of the hub as a source with the names of a model."""
    inner, own = _inner(model), named_state(model).by_name()
    plan = model_names(inner, own, _forms(source))
    made = {name for conversion in plan for name in conversion.targets}
    tied = getattr(inner, "all_tied_weights_keys", None) or {}
    twice = {n for n, first in tied.items() if first in made and own.get(n) is own.get(first)}
    plan = [conversion for conversion in plan if not twice.issuperset(conversion.targets)]
    return _converted(source, plan, source.path)


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


def _excuse(model: Any, mismatches: Mismatches) -> None:
    """Remove the mismatches that transformers ignores when it loads this model, and weights on the
    meta device that are tied to one that the file has."""
    inner, own = _inner(model), named_state(model).by_name()
    tied = getattr(inner, "all_tied_weights_keys", None) or {}
    lacking = set(mismatches.missing)
    lacking -= {n for n in lacking if tied.get(n, n) not in lacking and own[n] is own[tied[n]]}
    keys = types.SimpleNamespace(missing_keys=lacking, unexpected_keys=set(mismatches.unexpected))
    inner._adjust_missing_and_unexpected_keys(keys)
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
