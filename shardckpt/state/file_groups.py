"""File groups: tensors that change alike between saves share a file.

An incremental save links a file whose bytes have not changed (docs/adr/0006). So frozen weights and
optimizer state have files of their own if a rank holds enough of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from shardckpt.state.module_state import canonical_names

Ints = NDArray[np.int64]

__all__ = [
    "FROZEN",
    "GROUP_COUNT",
    "MAIN",
    "OPTIMIZER",
    "file_suffix",
    "files_of",
    "frozen_entries",
    "group_in_name",
    "frozen_group",
]

MAIN, OPTIMIZER, FROZEN = 0, 1, 2
"""The file groups: trained weights and tensors about which nothing is known; optimizer state; and
from FROZEN on the frozen weights of one module each, because one module may be trained again (or
be an average that is updated by hand) while another stays frozen."""

_LAST = FROZEN + 7  # for all further modules: a rank has at most ten files
GROUP_COUNT = _LAST + 1

FROZEN_FILE_BYTES = 4 << 20
"""A frozen module with fewer bytes on a rank goes to the main file: one more file takes as long as
writing some MiB."""

OPTIMIZER_FILE_BYTES = 256 << 20
"""Optimizer state changes with the weights. A file of its own, which a copy for inference can leave
out, must take almost no time: so it and the main file both have at least this many bytes."""

_SMALL_BUFFER_BYTES = 64 << 10


def file_suffix(file_group: int) -> str:
    """Return the part of a file's name after shard-RRRRR-of-WWWWW."""
    if file_group < FROZEN:
        return ("", "-optimizer")[file_group]
    return f"-frozen{file_group - FROZEN or ''}"


def group_in_name(name: str) -> int:
    """Return the file group in the name of a file; MAIN for any other name."""
    for file_group in range(_LAST, MAIN, -1):
        if name.endswith(f"{file_suffix(file_group)}.safetensors"):
            return file_group
    return MAIN


def frozen_group(module_number: int) -> int:
    """Return the file group of the frozen weights of a module; modules count from 0."""
    return min(FROZEN + module_number, _LAST)


def files_of(file_group: Ints, size_bytes: Ints, rank: Ints | None = None) -> Ints:
    """Return the file that each chunk goes to, as the file group that names it. Pure.

    Args:
        file_group: The file group of each chunk [m].
        size_bytes: The size of each chunk [m].
        rank: The rank of each chunk [m]; None if all are on one rank.
    """
    at = file_group if rank is None else rank * GROUP_COUNT + file_group
    ranks = 1 if len(file_group) == 0 else int(at.max()) // GROUP_COUNT + 1
    total = np.bincount(at, weights=size_bytes, minlength=ranks * GROUP_COUNT).reshape(
        ranks, GROUP_COUNT
    )
    least = np.full(GROUP_COUNT, FROZEN_FILE_BYTES)
    least[[MAIN, OPTIMIZER]] = OPTIMIZER_FILE_BYTES
    merged = total < least
    merged[:, OPTIMIZER] |= merged[:, MAIN]
    files: Ints = np.where(merged.ravel()[at], MAIN, file_group)
    return files


def frozen_entries(module: nn.Module) -> set[str]:
    """Return the canonical names of the parameters and buffers that probably don't change.

    An incremental save compares the bytes: a wrong guess only makes it write a file.
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
