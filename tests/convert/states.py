"""A state with every dtype, NaN, views, scalars and tied tensors, and its comparison to the bit."""

from __future__ import annotations

import torch

from shardckpt.format.dtype_names import shard_form
from shardckpt.format.dtypes import DTYPES

SAFETENSORS = {n: dtype for n, dtype in DTYPES.items() if shard_form(n, ()) == (n, ())}


def model() -> dict:
    """A state with every dtype, NaN, views, scalars, empty tensors and tied tensors."""
    raw = torch.arange(0, 6 * 16 * 7, 7).to(torch.uint8).reshape(6, 16)
    tensors = {name: raw.view(dtype) for name, dtype in SAFETENSORS.items() if name != "BOOL"}
    weight = torch.arange(400_000.0).reshape(500, 800)
    return {
        **tensors,
        "bool": raw > 99,
        "layers.0.weight": weight,
        "tied": weight,
        "turned": weight[:7].T,
        "scalar": torch.tensor(2.5),
        "nothing": torch.empty(0, 3),
    }


def whole_state() -> dict:
    moments = [{"m": torch.ones(3), "step": 1}, {"m": torch.zeros(3), "step": 2}]
    values = {"lr": float("-inf"), "betas": (0.9, 0.999), "name": "adam"}
    return {"model": model(), "optimizer": {"state": moments, **values}, "step": 7}


def bits(tensor: torch.Tensor) -> tuple:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), flat.numpy().tobytes()


def plain(value):
    """Comparable, to the bit; dicts without their order, which not every format keeps."""
    if isinstance(value, torch.Tensor):
        return bits(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return type(value), value


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return type(one) is type(other) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if type(one) in (list, tuple):
        return all(same(*pair) for pair in zip(one, other, strict=True))
    return type(one) is type(other) and one == other
