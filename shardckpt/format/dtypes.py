"""The dtypes of torch by their names in the format."""

from __future__ import annotations

import torch

from shardckpt.errors import UnsupportedLeafError
from shardckpt.format.dtype_names import NOT_COPYABLE, OPAQUE_NAMES, TORCH_NAMES, lacking
from shardckpt.torch_compat import find_dtype

__all__ = [
    "DTYPES",
    "OPAQUE",
    "SAVED",
    "dtype_name",
    "memory_dtype",
    "memory_view",
    "torch_dtype",
]


_AVAILABLE = {name: find_dtype(torch_name) for name, torch_name in TORCH_NAMES.items()}
DTYPES = {name: dtype for name, dtype in _AVAILABLE.items() if dtype is not None}
"""Name -> torch dtype, for the dtypes that the installed torch has."""

SAVED = frozenset(DTYPES.values())
"""The torch dtypes that can be saved."""

OPAQUE = {DTYPES[name] for name in DTYPES if name in OPAQUE_NAMES}
"""Torch dtypes without arithmetic. They are never converted."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype, *, tensor: str) -> str:
    """Return the name of a torch dtype.

    Raises:
        UnsupportedLeafError: The dtype can't be saved. The error names the tensor.
    """
    name = _NAMES.get(dtype)
    if name is None:
        raise UnsupportedLeafError(
            "The dtype of a tensor can't be saved",
            tensor=tensor,
            expected="one of " + ", ".join(str(known).removeprefix("torch.") for known in _NAMES),
            actual=str(dtype).removeprefix("torch."),
            remedy="save tensor.view(torch.uint8), or tensor.dequantize()",
        )
    return name


def torch_dtype(torch_name: str) -> torch.dtype:
    """Return the dtype that torch calls by this name, for a value of a state.

    Raises:
        CheckpointError: The installed torch does not have it, but later versions do.
        KeyError: The dtype is unknown.
    """
    found = find_dtype(torch_name)
    if found is not None:
        return found
    if torch_name in TORCH_NAMES.values():
        raise lacking(torch_name)
    raise KeyError(torch_name)


def memory_dtype(name: str) -> torch.dtype:
    """Return the torch dtype for copies of elements. Torch can't copy integers of 1 to 7 bits."""
    return torch.uint8 if name in NOT_COPYABLE else DTYPES[name]


def memory_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of the tensor with its memory_dtype."""
    if tensor.dtype in OPAQUE and _NAMES[tensor.dtype] in NOT_COPYABLE:
        return tensor.view(torch.uint8)
    return tensor
