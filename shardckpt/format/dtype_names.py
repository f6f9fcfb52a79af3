"""The names of the dtypes of the format: those of safetensors, and others that are stored as these.

This module does not need torch. Source of the names:
https://github.com/huggingface/safetensors/blob/main/safetensors/src/tensor.rs
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from shardckpt.errors import CheckpointError, UnsupportedLeafError

__all__ = [
    "COMPLEX",
    "NOT_COPYABLE",
    "OPAQUE_NAMES",
    "TORCH_NAMES",
    "check_supported",
    "is_supported",
    "itemsize",
    "lacking",
    "plain_form",
    "shard_form",
]

_KNOWN = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "BF16": ("bfloat16", 2),
    "F16": ("float16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
    "C32": ("complex32", 4),
    "C128": ("complex128", 16),
    "F4X2": ("float4_e2m1fn_x2", 1),
    "BITS8": ("bits8", 1),
    "BITS16": ("bits16", 2),
    "BITS1X8": ("bits1x8", 1),
    "BITS2X4": ("bits2x4", 1),
    "BITS4X2": ("bits4x2", 1),
    **{f"UINT{bits}": (f"uint{bits}", 1) for bits in range(1, 8)},
    **{f"INT{bits}": (f"int{bits}", 1) for bits in range(1, 8)},
}
"""Name -> name in torch, bytes of an element."""

TORCH_NAMES = {name: torch_name for name, (torch_name, _) in _KNOWN.items()}
"""Name -> name in torch. The names are those of safetensors, if it has the dtype."""

_ITEMSIZES = {name: item_bytes for name, (_, item_bytes) in _KNOWN.items()}

COMPLEX = {"C32", "C64", "C128"}
"""The names of complex dtypes."""
_PAIRS = {"C32": "F16", "C128": "F64"}  # stored as real and imaginary parts
NOT_COPYABLE = {name for name in TORCH_NAMES if name.startswith(("UINT", "INT"))}
"""The names of dtypes that torch can't copy: integers of 1 to 7 bits."""
OPAQUE_NAMES = {name for name in TORCH_NAMES if name.startswith(("F4X2", "BITS", "UINT", "INT"))}
"""The names of dtypes without arithmetic. They are never converted."""


def is_supported(name: str) -> bool:
    """Whether the format and the installed torch have a dtype. Any torch, if none is imported."""
    torch = sys.modules.get("torch")
    return name in TORCH_NAMES and (torch is None or TORCH_NAMES[name] in vars(torch))


def check_supported(name: str, *, tensor: str, path: str) -> None:
    """Raise CheckpointError for a dtype of the format that the installed torch does not have."""
    if name in TORCH_NAMES and not is_supported(name):
        raise lacking(TORCH_NAMES[name], tensor, path)


def lacking(torch_name: str, tensor: str | None = None, path: str | None = None) -> Exception:
    """Return the error for a dtype that the installed torch does not have."""
    return CheckpointError(
        "The installed torch lacks a dtype of this checkpoint",
        path=path,
        tensor=tensor,
        expected=f"a torch with {torch_name}",
        actual=f"torch {sys.modules['torch'].__version__}",
        remedy="install a later torch, and load or convert the checkpoint there",
    )


def itemsize(name: str) -> int:
    """Return the bytes of one element of the dtype with this name."""
    return _ITEMSIZES[name]


def shard_form(name: str, sizes: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return the safetensors dtype and shape of a chunk in its shard."""
    if name in _PAIRS:
        return _PAIRS[name], (*sizes, 2)
    if name in OPAQUE_NAMES:
        return "U16" if name == "BITS16" else "U8", sizes
    return name, sizes


def plain_form(name: str, shape: Sequence[int], *, tensor: str) -> tuple[str, tuple[int, ...]]:
    """Return the dtype and shape of a tensor in a safetensors file, as the safetensors library
    writes it. Raises UnsupportedLeafError if safetensors lacks the dtype."""
    if name == "F4X2" and shape:  # a byte has two elements of the last dimension
        return "F4", (*shape[:-1], 2 * shape[-1])
    if shard_form(name, ()) != (name, ()):
        raise UnsupportedLeafError(
            "A safetensors file can't hold a tensor of this dtype",
            tensor=tensor,
            expected="a dtype of safetensors",
            actual=TORCH_NAMES[name],
            remedy="save a checkpoint of shards or a .pth file, or convert the tensor first",
        )
    return name, tuple(shape)
