"""A new handler with the weights of any checkpoint that the package can read."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from shardckpt import api
from shardckpt.convert.convert import open_source
from shardckpt.format.typed_json import TensorRef
from shardckpt.loading.memory_checkpoint import StateStorage
from shardckpt.maintenance.rewritable import Source
from shardckpt.nn_handler.training_state import TrainingState
from shardckpt.state.module_state import canonical_names
from shardckpt.state.saved_tree import SavedState
from shardckpt.storage.base import MANIFEST_NAME, Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.resolve import resolve

__all__ = ["fill_weights", "weight_names"]

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def fill_weights(
    handler: TrainingState, path: str, *, strict: bool, prefix: str | None, ema: bool
) -> None:
    """Fill a handler's model from a checkpoint; collective."""
    own = set(canonical_names(handler.model).values())
    if ema:
        prefix = "ema.weights"
    storage: Storage = resolve(path).storage
    is_local = isinstance(storage, LocalStorage)
    if not is_local or os.path.isfile(os.path.join(path, MANIFEST_NAME)):
        with api.open_checkpoint(path, storage=storage) as checkpoint:
            targets = weight_names(checkpoint.tensors(), own, prefix=prefix)
            leaves = set(checkpoint)
    else:
        with open_source(path) as source:
            refs = {
                name: node.name
                for name, node in SavedState(source.manifest).leaves.items()
                if isinstance(node, TensorRef)
            }
            targets = weight_names(refs, own, prefix=prefix)
            storage = StateStorage({name: _whole(source, refs[name]) for name in targets})
            leaves = set(targets)

    def rename(name: str) -> str:
        if name in targets:
            return f"model.{targets[name]}"
        return f"other.{name}" if name in leaves else name

    api.load({"model": handler.model}, path, strict=strict, rename=rename, storage=storage)


def _whole(source: Source, name: str) -> torch.Tensor:
    shape = source.manifest.tensors[name].shape
    return source.read_box(name, (0,) * len(shape), shape)


def weight_names(
    saved: Iterable[str], own: set[str], *, prefix: str | None = None
) -> dict[str, str]:
    """Saved name -> name in the model, of the tensors below `prefix`; pure.

    Without a prefix it is the one, as in `model.`, `state_dict.` or none at all, below which the
    most names are the model's own. Names lose what wrappers put into them: `module.`,
    `_orig_mod.`.
    """
    saved = list(saved)
    module_is_ours = any(name.startswith("module.") for name in own)

    def clean(name: str) -> str:
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        return name if module_is_ours else name.removeprefix("module.")

    def below(start: str) -> dict[str, str]:
        start = f"{start}." if start else ""
        return {n: clean(n[len(start) :]) for n in saved if n.startswith(start)}

    if prefix is not None:
        return below(prefix.rstrip("."))
    likely = ["", "model", "state_dict", "model_state_dict", "module"]
    best = max(likely, key=lambda start: len(own & set(below(start).values())))
    if own - set(below(best).values()):
        probe = max(own, key=len, default="")
        nests = {n[: -len(probe)].rstrip(".") for n in saved if n.endswith(f".{probe}")}
        best = max([best, *sorted(nests)], key=lambda s: len(own & set(below(s).values())))
    return below(best)
