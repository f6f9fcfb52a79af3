"""The dtypes of the format: those of safetensors, and others that are stored as one of these.

Source: https://github.com/huggingface/safetensors/blob/main/safetensors/src/tensor.rs
"""

from __future__ import annotations

import torch

from shardckpt.errors import CheckpointError, UnsupportedLeafError
from shardckpt.torch_compat import find_dtype

__all__ = [
    "COMPLEX",
    "DTYPES",
    "NOT_COPYABLE",
    "OPAQUE",
    "SAVED",
    "check_supported",
    "dtype_name",
    "itemsize",
    "memory_dtype",
    "memory_view",
    "plain_dtype",
    "shard_form",
    "torch_dtype",
]

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "C32": "complex32",
    "C128": "complex128",
    "F4X2": "float4_e2m1fn_x2",
    "BITS8": "bits8",
    "BITS16": "bits16",
    "BITS1X8": "bits1x8",
    "BITS2X4": "bits2x4",
    "BITS4X2": "bits4x2",
    **{f"UINT{bits}": f"uint{bits}" for bits in range(1, 8)},
    **{f"INT{bits}": f"int{bits}" for bits in range(1, 8)},
}
"""Name -> name in torch. The names are those of safetensors, if it has the dtype."""

_AVAILABLE = {name: find_dtype(torch_name) for name, torch_name in _TORCH_NAMES.items()}
DTYPES = {name: dtype for name, dtype in _AVAILABLE.items() if dtype is not None}
"""Name -> torch dtype, for the dtypes that the installed torch has."""

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


def check_supported(name: str, *, tensor: str, path: str) -> None:
    """Raise CheckpointError for a dtype of the format that the installed torch does not have."""
    if name in _TORCH_NAMES and name not in DTYPES:
        raise _lacking(_TORCH_NAMES[name], tensor, path)


def torch_dtype(torch_name: str) -> torch.dtype:
    """Return the dtype that torch calls by this name, for a value of a state.

    Raises:
        CheckpointError: The installed torch does not have it, but later versions do.
        KeyError: There is no such dtype.
    """
    found = find_dtype(torch_name)
    if found is not None:
        return found
    if torch_name in _TORCH_NAMES.values():
        raise _lacking(torch_name)
    raise KeyError(torch_name)


def _lacking(torch_name: str, tensor: str | None = None, path: str | None = None) -> Exception:
    return CheckpointError(
        "The installed torch lacks a dtype of this checkpoint",
        path=path,
        tensor=tensor,
        expected=f"a torch with {torch_name}",
        actual=f"torch {torch.__version__}",
        remedy="install a later torch, and load or convert the checkpoint there",
    )


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
