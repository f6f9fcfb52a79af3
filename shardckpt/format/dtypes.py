"""The dtypes of the format: those of safetensors, by the names that it gives them.

Source: https://github.com/huggingface/safetensors/blob/main/safetensors/src/tensor.rs
"""

from __future__ import annotations

import torch

from shardckpt.errors import UnsupportedLeafError

__all__ = ["DTYPES", "dtype_name", "itemsize"]

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
}
"""safetensors name -> torch dtype."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ITEMSIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype, *, tensor: str) -> str:
    """The safetensors name of a torch dtype; UnsupportedLeafError, naming the tensor, if none."""
    name = _NAMES.get(dtype)
    if name is None:
        raise UnsupportedLeafError(
            "A tensor of this dtype can't be saved",
            tensor=tensor,
            expected="one of " + ", ".join(str(known).removeprefix("torch.") for known in _NAMES),
            actual=str(dtype).removeprefix("torch."),
            remedy="save view(torch.uint8), or for complex128 torch.view_as_real(tensor)",
        )
    return name


def itemsize(name: str) -> int:
    """Bytes of one element."""
    return _ITEMSIZES[name]
