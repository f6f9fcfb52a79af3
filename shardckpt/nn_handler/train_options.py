"""The arguments of NNHandler.train, checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from shardckpt.errors import StateError
from shardckpt.nn_handler.ema import check_decay

__all__ = ["NanGuard", "Precision", "TrainOptions", "matmul_precision"]

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
NanGuard = Literal["stop", "skip", "restore"]

_LEAST = {
    "epochs": 0,
    "max_steps": 0,
    "validate_every": 0,
    "validate_every_steps": 1,
    "gradient_accumulation_steps": 1,
    "limit_train_batches": 1,
    "limit_val_batches": 1,
    "sanity_val_batches": 0,
    "agree_every": 1,
}
_FLAGS = ("use_amp", "progress_bar", "save_on_last_epoch", "fast_dev_run")
_OPTIONAL = {"epochs", "max_steps", "validate_every_steps", "limit_train_batches"}
_OPTIONAL |= {"limit_val_batches"}
_TRIAL = {  # with fast_dev_run
    "epochs": 1,
    "validate_every_steps": None,
    "gradient_accumulation_steps": 1,
    "limit_train_batches": 1,
    "limit_val_batches": 1,
    "sanity_val_batches": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """See NNHandler.train."""

    epochs: int | None
    max_steps: int | None = None
    validate_every: int = 1
    validate_every_steps: int | None = None
    gradient_accumulation_steps: int = 1
    limit_train_batches: int | None = None
    limit_val_batches: int | None = None
    sanity_val_batches: int = 1
    use_amp: bool = False
    precision: Precision | None = None
    gradient_clipping_norm: float | None = None
    ema_decay: float = 0.0
    nan_guard: NanGuard | None = None
    progress_bar: bool = True
    save_on_last_epoch: bool = True
    agree_every: int = 8
    fast_dev_run: bool = False

    def __post_init__(self) -> None:
        for name, value in _TRIAL.items() if self.fast_dev_run else ():
            object.__setattr__(self, name, value)
        for name, least in _LEAST.items():
            number = getattr(self, name)
            if number is None and name in _OPTIONAL:
                continue
            if type(number) is not int or number < least:
                raise _bad(name, f"an int from {least}", number)
        if self.epochs is None and self.max_steps is None:
            raise _bad("epochs", "an int from 0, or max_steps", None)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise _bad(name, "True or False", getattr(self, name))
        norm = self.gradient_clipping_norm
        if norm is not None and not (isinstance(norm, (int, float)) and norm > 0):
            raise _bad("gradient_clipping_norm", "None, or a number above 0", norm)
        for name, choices in (("precision", Precision), ("nan_guard", NanGuard)):
            value = getattr(self, name)
            if value is not None and value not in get_args(choices):
                raise _bad(name, f"None, or one of {', '.join(get_args(choices))}", value)
        if self.use_amp and self.precision in ("fp32", "tf32"):
            raise _bad("precision", '"bf16", "fp16" or None beside use_amp=True', self.precision)
        check_decay(self.ema_decay)

    def autocast(self, device: torch.device) -> torch.autocast | None:
        """Return the context of a forward pass in a smaller precision, or None."""
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        usual = torch.float16 if device.type == "cuda" else torch.bfloat16
        dtype = dtypes.get(self.precision or "", usual if self.use_amp else None)
        return None if dtype is None else torch.autocast(device.type, dtype=dtype)

    def scales(self, device: torch.device) -> bool:
        """Whether gradients need a scaler."""
        implied = self.use_amp and self.precision is None and device.type == "cuda"
        return self.precision == "fp16" or implied


def _bad(name: str, expected: str, actual: Any) -> StateError:
    return StateError(f"Invalid {name} for train", expected=expected, actual=repr(actual))


@contextmanager
def matmul_precision(precision: Precision | None) -> Iterator[None]:
    """Set the precision of float32 products on CUDA to that of "tf32" or "fp32"."""
    before = torch.get_float32_matmul_precision()
    if precision in ("tf32", "fp32"):
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
