"""A source with the names, shapes and dtypes of the tensors of another checkpoint."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from shardckpt.convert.sources import Origin, origin_of
from shardckpt.convert.transformed import FLOATS
from shardckpt.errors import LoadMismatchError
from shardckpt.format import typed_json as values
from shardckpt.format.dtypes import DTYPES
from shardckpt.format.entries import TensorEntry
from shardckpt.format.typed_json import TensorRef
from shardckpt.maintenance.rewritable import Source
from shardckpt.state.saved_tree import SavedState

__all__ = ["Like"]

_MOST_NAMED = 8  # tensors in an error


class Like(AbstractContextManager["Like"]):
    """The tensors of a source that a model checkpoint has too, as the model checkpoint has them.

    Floating-point tensors get the dtype of the model checkpoint. Other entries of the source are
    left out, and listed in `origin`. The companions are those of the model checkpoint. Not
    collective.

    Raises:
        LoadMismatchError: The source lacks a tensor, or has another shape or dtype.
    """

    def __init__(self, source: Source, model: Source) -> None:
        self.path, self.source = source.path, source
        have, wanted = _tensors(source), _tensors(model)
        unlike = [
            f"{name}: {_form(have[name][1]) if name in have else 'absent'}, not {_form(entry)}"
            for name, (_, entry) in wanted.items()
            if name not in have or not _fits(have[name][1], entry)
        ]
        if unlike:
            more = len(unlike) - _MOST_NAMED
            raise LoadMismatchError(
                "The source does not have the tensors of the checkpoint that `like` names",
                path=source.path,
                expected=f"the tensors of {model.path}",
                actual="; ".join(unlike[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else ""),
                remedy="correct the names with rename= or transforms=, or leave out like=",
            )
        self._names = {ref: have[name][0] for name, (ref, _) in wanted.items()}
        nodes = [(name, {"$tensor": ref}) for name, (ref, _) in wanted.items()]
        self.manifest = replace(
            source.manifest,
            tensors=dict(wanted.values()),
            state=values.mapping(nodes, at=""),
            per_rank=(),
        )
        origin = origin_of(source)
        left = dict.fromkeys(
            (name for name in SavedState(source.manifest).leaves if name not in wanted),
            f"{model.path} has no such entry",
        )
        self.origin: Origin = replace(
            origin,
            left_out={**origin.left_out, **left},
            companions=origin_of(model).companions,
            home=model.path,
        )

    def read_box(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """See Source.read_box."""
        read = self.source.read_box(self._names[name], offsets, sizes)
        return read.to(DTYPES[self.manifest.tensors[name].dtype])

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """See Source.close."""
        self.source.close()


def _tensors(source: Source) -> dict[str, tuple[str, TensorEntry]]:
    """Return the name in the manifest, and the entry, of each tensor."""
    return {
        name: (node.name, source.manifest.tensors[node.name])
        for name, node in SavedState(source.manifest).leaves.items()
        if isinstance(node, TensorRef) and node.ref_type != "per_rank"
    }


def _fits(entry: TensorEntry, wanted: TensorEntry) -> bool:
    floats = DTYPES[entry.dtype] in FLOATS and DTYPES[wanted.dtype] in FLOATS
    return entry.shape == wanted.shape and (floats or entry.dtype == wanted.dtype)


def _form(entry: TensorEntry) -> str:
    return f"{str(DTYPES[entry.dtype]).removeprefix('torch.')} {list(entry.shape)}"
