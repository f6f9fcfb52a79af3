"""How tensors change between saves; those that change alike share a file.

A file whose bytes are those of an earlier checkpoint's need not be written again
(docs/adr/0006). So frozen weights and optimizer state have files of their own, wherever
there is enough of them on a rank to be worth a file.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from shardckpt.state.module_state import canonical_names

Ints = NDArray[np.int64]

__all__ = [
    "FROZEN",
    "KINDS",
    "MAIN",
    "OPTIMIZER",
    "file_suffix",
    "files_of",
    "frozen_entries",
    "kind_in",
    "kind_of",
]

MAIN, OPTIMIZER, FROZEN = 0, 1, 2
"""Kinds of tensors: trained weights and all that nothing is known of; an optimizer's state;
from FROZEN on the frozen weights of one module each, as one may thaw (or be an average that
is updated by hand) while another stays."""

_LAST = FROZEN + 7  # the kind of any more modules: a rank has ten files at the most
KINDS = _LAST + 1

FROZEN_FILE_BYTES = 4 << 20
"""Less than this of a frozen module on a rank is no file of its own: one more file costs as
much time as some MiB written."""

OPTIMIZER_FILE_BYTES = 256 << 20
"""Optimizer state changes with the weights. A file of its own, which a copy for inference can
leave out, must cost next to nothing: so both it and the main file have at least this."""

_SMALL_BUFFER_BYTES = 64 << 10


def file_suffix(kind: int) -> str:
    """What the file of a kind has after shard-RRRRR-of-WWWWW."""
    if kind < FROZEN:
        return ("", "-optimizer")[kind]
    return f"-frozen{kind - FROZEN or ''}"


def kind_in(name: str) -> int:
    """The kind in the name of a file; MAIN for what is none of ours."""
    for kind in range(_LAST, MAIN, -1):
        if name.endswith(f"{file_suffix(kind)}.safetensors"):
            return kind
    return MAIN


def kind_of(module_number: int) -> int:
    """The kind of the frozen weights of the state's module of this number, from 0."""
    return min(FROZEN + module_number, _LAST)


def files_of(kind: Ints, size_bytes: Ints, rank: Ints | None = None) -> Ints:
    """The file, named by its kind, that each of a rank's chunks goes into [m], or each of many
    ranks' if `rank` says whose they are. Pure."""
    at = kind if rank is None else rank * KINDS + kind
    ranks = 1 if len(kind) == 0 else int(at.max()) // KINDS + 1
    total = np.bincount(at, weights=size_bytes, minlength=ranks * KINDS).reshape(ranks, KINDS)
    least = np.full(KINDS, FROZEN_FILE_BYTES)
    least[[MAIN, OPTIMIZER]] = OPTIMIZER_FILE_BYTES
    merged = total < least
    merged[:, OPTIMIZER] |= merged[:, MAIN]
    files: Ints = np.where(merged.ravel()[at], MAIN, kind)
    return files


def frozen_entries(module: nn.Module) -> set[str]:
    """The canonical names of the parameters and buffers that may be taken to stay as they are.

    That they did is never taken for granted: a wrong guess costs a file written anew.
    """
    frozen = {
        name
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name, buffer in owner.named_buffers(recurse=False):
            # Counters and running statistics change in modules without trained weights as well.
            large = buffer.numel() * buffer.element_size() >= _SMALL_BUFFER_BYTES
            if (
                large
                and not (owner.training and buffer.is_floating_point())
                and not any(parameter.requires_grad for parameter in owner.parameters())
            ):
                frozen.add(f"{prefix}.{name}" if prefix else name)
    if not frozen:
        return frozen
    names = canonical_names(module)
    return {names[name] for name in frozen if name in names}
