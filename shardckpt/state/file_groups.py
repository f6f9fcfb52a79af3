"""File groups: tensors that change at the same saves share a file.

An incremental save links a file whose bytes have not changed (docs/adr/0006). Frozen weights and
optimizer state therefore have their own files, if a rank holds enough of them.
"""

from __future__ import annotations

import numpy as np
from torch import nn
from torch.nn.parameter import is_lazy

from shardckpt.format.number_lists import Ints
from shardckpt.state.module_state import canonical_names

__all__ = [
    "FROZEN",
    "GROUP_COUNT",
    "MAIN",
    "OPTIMIZER",
    "file_suffix",
    "files_of",
    "frozen_entries",
    "frozen_group",
    "group_in_name",
]

MAIN, OPTIMIZER, FROZEN = 0, 1, 2
"""The file groups. MAIN holds trained weights and all other tensors, and OPTIMIZER optimizer state.
FROZEN and the following groups each hold the frozen weights of one module, as one module may be
trained again, or be an average that is updated by hand, while another one stays frozen."""

_LAST = FROZEN + 7  # shared by all further modules, so that a rank has at most ten files
GROUP_COUNT = _LAST + 1

FROZEN_FILE_BYTES = 4 << 20
"""A frozen module with fewer bytes on a rank is written to the main file, as another file takes the
time of writing some MiB.
"""

OPTIMIZER_FILE_BYTES = 256 << 20
"""The least size of the optimizer's own file, and of the main file beside it.

Optimizer state changes with the weights. Its own file, which a copy for inference can leave out,
must take almost no time.
"""

_SMALL_BUFFER_BYTES = 64 << 10


def file_suffix(file_group: int) -> str:
    """Return the part of a file's name after shard-RRRRR-of-WWWWW."""
    if file_group < FROZEN:
        return ("", "-optimizer")[file_group]
    return f"-frozen{file_group - FROZEN or ''}"


def group_in_name(name: str) -> int:
    """Return the file group in the name of a file. MAIN for any other name."""
    for file_group in range(_LAST, MAIN, -1):
        if name.endswith(f"{file_suffix(file_group)}.safetensors"):
            return file_group
    return MAIN


def frozen_group(module_number: int) -> int:
    """Return the file group of the frozen weights of a module. Modules are numbered from 0."""
    return min(FROZEN + module_number, _LAST)


def files_of(file_group: Ints, size_bytes: Ints, rank: Ints | None = None) -> Ints:
    """Return the file that each chunk is written to, as the file group in its name. Pure.

    Args:
        file_group: The file group of each chunk [m].
        size_bytes: The size of each chunk [m].
        rank: The rank of each chunk [m]. None if all are on one rank.
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

    An incremental save compares the bytes, so a wrong guess only costs the writing of a file.
    """
    frozen = {
        name
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name, buffer in owner.named_buffers(recurse=False):
            if is_lazy(buffer):
                continue  # it has no size yet, and can't be saved
            # Counters and running statistics also change in modules without trained weights.
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
