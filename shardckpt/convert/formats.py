"""The names of the formats that convert writes."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["FORMATS", "Format"]

Format = Literal["shardckpt", "dcp", "hf", "lightning", "safetensors", "torch"]
FORMATS: tuple[Format, ...] = get_args(Format)
