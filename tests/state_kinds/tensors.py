"""Rows: kinds of tensors."""

from __future__ import annotations

from typing import Any

import torch

from shardckpt.format.dtypes import DTYPES
from tests.state_kinds.registry import row


def _numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) + 100 * seed


def _of_dtype(dtype: torch.dtype) -> Any:
    def make(seed: int) -> torch.Tensor:
        raw = (torch.arange(12 * dtype.itemsize) + seed).to(torch.uint8)
        if dtype == torch.bool:
            raw = raw % 2
        return raw.view(dtype).reshape(3, 4)

    return make


for _name, _dtype in DTYPES.items():
    row(f"dtype {_name}")(_of_dtype(_dtype))
row("strided")(lambda seed: _numbers(seed, 4, 6).t()[1:5:2])
row("without dimensions")(lambda seed: torch.tensor(float(seed)))
row("without elements")(lambda seed: torch.empty(0, 3))
row("parameter")(lambda seed: torch.nn.Parameter(_numbers(seed, 2, 3)))


@row("inference tensor")
@torch.inference_mode()
def _(seed: int) -> torch.Tensor:
    return _numbers(seed, 3)


@row("conjugate")
def _(seed: int) -> torch.Tensor:
    return torch.complex(_numbers(seed, 3), _numbers(seed, 3)).conj()


@row("negated view")
def _(seed: int) -> torch.Tensor:
    return torch.complex(_numbers(seed, 3), _numbers(seed, 3)).conj().imag


row("sparse", refused=True)(lambda seed: torch.eye(2).to_sparse())
row("compressed sparse", refused=True)(lambda seed: torch.eye(2).to_sparse_csr())
row("mkldnn", refused=True)(lambda seed: torch.eye(2).to_mkldnn())
row("nested, strided", refused=True)(
    lambda seed: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
)
row("quantized", refused=True)(
    lambda seed: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
)
