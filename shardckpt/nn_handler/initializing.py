"""A new handler with the weights of any checkpoint that the package can read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import shardckpt
from shardckpt.convert.dcp import DcpCheckpoint, is_dcp
from shardckpt.loading.memory_checkpoint import MemoryStorage
from shardckpt.nn_handler.loading import open_source
from shardckpt.state.module_state import canonical_names
from shardckpt.storage.base import Storage

if TYPE_CHECKING:
    from shardckpt.nn_handler.handler import NNHandler

__all__ = ["fill_weights", "weight_names"]

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def fill_weights(
    handler: NNHandler, path: str, *, strict: bool, prefix: str | None, ema: bool
) -> None:
    """Fill a handler's model from a checkpoint; collective."""
    own = set(canonical_names(handler.model).values())
    if ema:
        prefix = "ema.weights"
    storage: Storage
    if is_dcp(path):
        dcp = DcpCheckpoint(path)
        targets = weight_names(dcp.tensors, own, prefix=prefix)
        storage = MemoryStorage(dcp.read(targets))
        leaves = set(targets)
    else:
        storage = open_source(path).storage
        with shardckpt.open_checkpoint(path, storage=storage) as checkpoint:
            targets = weight_names(checkpoint.tensors(), own, prefix=prefix)
            leaves = set(checkpoint)

    def rename(name: str) -> str:
        if name in targets:
            return f"model.{targets[name]}"
        return f"other.{name}" if name in leaves else name

    shardckpt.load({"model": handler.model}, path, strict=strict, rename=rename, storage=storage)


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
