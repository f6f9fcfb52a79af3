"""The weights of any checkpoint that the package can read, for a new handler."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from shardckpt import api
from shardckpt.convert.opening import open_source
from shardckpt.errors import LoadMismatchError, printable
from shardckpt.format.typed_json import TensorRef
from shardckpt.loading.memory_checkpoint import StateStorage
from shardckpt.logs import warn
from shardckpt.maintenance.rewritable import Source
from shardckpt.nn_handler.training_state import TrainingState
from shardckpt.reports import LoadReport
from shardckpt.state.module_state import canonical_names
from shardckpt.state.saved_tree import SavedState
from shardckpt.storage.base import MANIFEST_NAME, Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.resolve import resolve

__all__ = ["fill_weights", "skipped_entries", "warn_of_skipped", "weight_names", "with_remedy"]

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def fill_weights(
    handler: TrainingState, path: str, *, strict: bool, prefix: str | None, ema: bool
) -> None:
    """Fill the model of a handler from a checkpoint. Collective."""
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
            leaves = set(refs)

    if prefix is not None and not targets:
        raise LoadMismatchError(
            "The checkpoint has no averaged weights"
            if ema
            else "The checkpoint has no weights with this prefix",
            path=path,
            expected=None if ema else f"names that begin with {prefix}",
            actual=printable(", ".join(sorted(leaves)[:8])),
            remedy="leave out ema=True" if ema else "correct prefix, or leave it out",
        )

    def rename(name: str) -> str:
        if name in targets:
            return f"model.{targets[name]}"
        return f"other.{name}" if name in leaves else name

    if not own & set(targets.values()):
        strict = True  # otherwise nothing would be loaded
    with with_remedy("strict=False loads what fits; prefix= chooses the weights in the checkpoint"):
        report = api.load(
            {"model": handler.model},
            path,
            strict=strict,
            dtype="cast",
            rename=rename,
            storage=storage,
        )
    if not strict:
        warn_of_skipped(path, handler.rank, **skipped_entries(report))


@contextmanager
def with_remedy(text: str) -> Iterator[None]:
    """Give a LoadMismatchError the remedy that the called function offers."""
    try:
        yield
    except LoadMismatchError as error:
        error.remedy = text
        raise


def skipped_entries(report: LoadReport) -> dict[str, Any]:
    """Return the arguments of warn_of_skipped, after a load with strict=False."""
    return {
        "missing": report.missing,
        "unexpected": [name for name in report.unexpected if name.startswith("model.")],
        "wrong_shape": report.wrong_shape,
        "wrong_dtype": report.wrong_dtype,
    }


def warn_of_skipped(
    path: str,
    rank: int,
    *,
    missing: Sequence[str] = (),
    unexpected: Sequence[str] = (),
    wrong_shape: Sequence[tuple[str, object, object]] = (),
    wrong_dtype: Sequence[tuple[str, object, object]] = (),
) -> None:
    """Warn on rank 0 of what a load with strict=False left as it was, or did not use."""
    parts = {
        "not in the checkpoint": missing,
        "of another shape": [f"{name} (saved {saved})" for name, _, saved in wrong_shape],
        "of another dtype": [f"{name} (saved {saved})" for name, _, saved in wrong_dtype],
        "not in the handler": unexpected,
    }
    texts = [
        f"{text}: {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if names[8:] else "")
        for text, names in parts.items()
        if names
    ]
    if texts and rank == 0:
        warn(printable(f"strict=False skipped tensors of {path}. {'; '.join(texts)}"))


def _whole(source: Source, name: str) -> torch.Tensor:
    shape = source.manifest.tensors[name].shape
    return source.read_box(name, (0,) * len(shape), shape)


def weight_names(
    saved: Iterable[str], own: set[str], *, prefix: str | None = None
) -> dict[str, str]:
    """Map the saved names below `prefix` to the names in the model.

    Without a prefix, the one with the most names of the model is chosen, such as `model.`,
    `state_dict.` or the empty one. Names lose the prefixes of wrappers: `module.`, `_orig_mod.`.
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
