"""A source with transformed tensors, and a source with another dtype."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from dataclasses import replace

import msgspec
import torch

from shardckpt.errors import StateError
from shardckpt.format.dtypes import DTYPES, dtype_name, memory_view
from shardckpt.maintenance.rewritable import Source
from shardckpt.state.derived import DerivedEntry
from shardckpt.state.local_chunks import box_slices
from shardckpt.transforms import Transforms, transformed

__all__ = ["FLOATS", "Cast", "Transformed", "float_dtype"]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that are converted into each other."""


def float_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a dtype of floating-point numbers, which `convert` writes.

    Raises:
        StateError: Another dtype, or another name.
    """
    name = re.sub(r"^torch\.", "", str(dtype))
    for known in FLOATS:
        if name == str(known).removeprefix("torch."):
            return known
    raise StateError(
        "convert does not write this dtype",
        expected=", ".join(str(known).removeprefix("torch.") for known in FLOATS),
        actual=name,
    )


class Transformed(AbstractContextManager["Transformed"]):
    """A source whose tensors `transforms` change; see shardckpt.transforms. Not collective."""

    def __init__(self, source: Source, transforms: Transforms) -> None:
        self.path, self.source = source.path, source
        self.manifest = transformed(source.manifest, transforms, path=source.path)

    def read_box(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """See Source.read_box."""
        entry = self.manifest.tensors[name]
        if not isinstance(entry, DerivedEntry):
            return self.source.read_box(name, offsets, sizes)
        made = torch.empty(sizes, dtype=DTYPES[entry.dtype], device="cpu")
        target = memory_view(made)
        for piece in entry.pieces:
            part = piece.within(offsets, sizes)
            if part is None:
                continue
            view = target[box_slices(offsets, part.offsets, part.sizes)]
            if part.entry is None:
                view.fill_(part.value)
            else:
                read = self.source.read_box(part.name, part.source, part.source_sizes())
                view.copy_(memory_view(read).permute(part.order))
        return made

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """See Source.close."""
        self.source.close()


class Cast(AbstractContextManager["Cast"]):
    """A source whose floating-point tensors have another dtype.

    Floats of 8 bits and less keep theirs, as their scales are separate tensors.
    """

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self.path, self.source, self.dtype = source.path, source, dtype
        name = dtype_name(dtype, tensor="")
        self.manifest = replace(
            source.manifest,
            tensors={
                key: msgspec.structs.replace(entry, dtype=name)
                if DTYPES[entry.dtype] in FLOATS
                else entry
                for key, entry in source.manifest.tensors.items()
            },
        )

    def read_box(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """See Source.read_box."""
        read = self.source.read_box(name, offsets, sizes)
        return read.to(self.dtype) if read.dtype in FLOATS else read

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """See Source.close."""
        self.source.close()
