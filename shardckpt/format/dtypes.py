"""The dtypes of the format: those of safetensors, and others that are stored as one of these.

Source: https://github.com/huggingface/safetensors/blob/main/safetensors/src/tensor.rs
"""

from __future__ import annotations

import torch

from shardckpt.errors import UnsupportedLeafError

__all__ = [
    "COMPLEX",
    "DTYPES",
    "NOT_COPYABLE",
    "OPAQUE",
    "SAVED",
    "dtype_name",
    "itemsize",
    "memory_dtype",
    "memory_view",
    "plain_dtype",
    "shard_form",
]

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "C32": torch.complex32,
    "C128": torch.complex128,
    "F4X2": torch.float4_e2m1fn_x2,
    "BITS8": torch.bits8,
    "BITS16": torch.bits16,
    "BITS1X8": torch.bits1x8,
    "BITS2X4": torch.bits2x4,
    "BITS4X2": torch.bits4x2,
    **{f"UINT{bits}": getattr(torch, f"uint{bits}") for bits in range(1, 8)},
    **{f"INT{bits}": getattr(torch, f"int{bits}") for bits in range(1, 8)},
}
"""Name -> torch dtype. The names are those of safetensors, if it has the dtype."""

SAVED = frozenset(DTYPES.values())
"""The torch dtypes that can be saved."""

COMPLEX = {"C32", "C64", "C128"}
"""The names of complex dtypes."""
_PAIRS = {"C32": "F16", "C128": "F64"}  # stored as real and imaginary parts
NOT_COPYABLE = {name for name in DTYPES if name.startswith(("UINT", "INT"))}
"""The names of dtypes that torch can't copy: integers of 1 to 7 bits."""
OPAQUE = {DTYPES[name] for name in DTYPES if name.startswith(("F4X2", "BITS", "UINT", "INT"))}
"""Torch dtypes without arithmetic. They are never converted."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ITEMSIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


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


def itemsize(name: str) -> int:
    """Return the bytes of one element of the dtype with this name."""
    return _ITEMSIZES[name]


def shard_form(name: str, sizes: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return the safetensors dtype and shape of a chunk in its shard."""
    if name in _PAIRS:
        return _PAIRS[name], (*sizes, 2)
    if DTYPES[name] in OPAQUE:
        return "U16" if name == "BITS16" else "U8", sizes
    return name, sizes


def plain_dtype(name: str, *, tensor: str) -> str:
    """Return the name if safetensors has the dtype. Otherwise raises UnsupportedLeafError."""
    if shard_form(name, ()) != (name, ()):
        raise UnsupportedLeafError(
            "A safetensors file can't hold a tensor of this dtype",
            tensor=tensor,
            expected="a dtype of safetensors",
            actual=str(DTYPES[name]).removeprefix("torch."),
            remedy="save a checkpoint of shards or a .pth file, or convert the tensor first",
        )
    return name


def memory_dtype(name: str) -> torch.dtype:
    """Return the torch dtype for copies of elements. Torch can't copy integers of 1 to 7 bits."""
    return torch.uint8 if name in NOT_COPYABLE else DTYPES[name]


def memory_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of the tensor with its memory_dtype."""
    if tensor.dtype in OPAQUE and _NAMES[tensor.dtype] in NOT_COPYABLE:
        return tensor.view(torch.uint8)
    return tensor
