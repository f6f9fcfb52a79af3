"""The arguments of train are checked, and choose the precision."""

from __future__ import annotations

import math

import pytest
import torch

from shardckpt import errors
from tests.nn_handler.models import a_handler, make, train


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32", "fp32"])
def test_precision_by_name(precision):
    handler = train(make(), precision=precision)
    assert (handler.scaler is not None) == (precision == "fp16")


def test_amp_on_the_cpu_is_bfloat16():
    kinds = []
    handler = a_handler()
    handler.add_metric("kind", lambda outputs, targets: kinds.append(outputs.dtype) or 0.0)
    train(handler, use_amp=True)
    assert set(kinds) == {torch.bfloat16}
    assert handler.scaler is None
    assert math.isfinite(handler.history["loss"][0])


@pytest.mark.parametrize(
    ("options", "text"),
    [({"epochs": -1}, "epochs"), ({"epochs": 1, "gradient_accumulation_steps": 0}, "accumulation")],
)
def test_bad_arguments_of_train(options, text):
    with pytest.raises(errors.StateError, match=text):
        a_handler().train(**options)
