"""The arguments of train are checked, and choose the precision."""

from __future__ import annotations

import math

import pytest
import torch

from shardckpt import errors
from shardckpt.nn_handler.train_options import TrainOptions, matmul_precision
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


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", 1.0, "an int from 0"),
        ("epochs", True, "an int from 0"),
        ("max_steps", -1, "an int from 0"),
        ("validate_every", None, "an int from 0"),
        ("validate_every_steps", 0, "an int from 1"),
        ("limit_train_batches", 0, "an int from 1"),
        ("agree_every", 0, "an int from 1"),
        ("use_amp", 1, "True or False"),
        ("progress_bar", None, "True or False"),
        ("gradient_clipping_norm", 0, "None, or a number above 0"),
        ("gradient_clipping_norm", "1", "None, or a number above 0"),
        ("precision", "fp8", "None, or one of fp32, tf32, bf16, fp16"),
        ("nan_guard", True, "None, or one of stop, skip, restore"),
        ("ema_decay", 1, "a number from 0 up to, not including, 1"),
    ],
)
def test_the_error_names_the_argument(name, value, expected):
    with pytest.raises(errors.StateError, match=f"Invalid {name} for train") as caught:
        TrainOptions(**{"epochs": 1, name: value})
    assert (caught.value.expected, caught.value.actual) == (expected, repr(value))


def test_training_has_an_end():
    assert TrainOptions(epochs=None, max_steps=0).max_steps == 0
    with pytest.raises(errors.StateError, match="Invalid epochs") as caught:
        TrainOptions(epochs=None)
    assert caught.value.expected == "an int from 0, or max_steps"


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_amp_excludes_full_precision(precision):
    with pytest.raises(errors.StateError, match="Invalid precision") as caught:
        TrainOptions(epochs=1, use_amp=True, precision=precision)
    assert caught.value.actual == repr(precision)


def test_a_trial_is_one_batch_of_one_epoch():
    options = TrainOptions(
        epochs=9, fast_dev_run=True, gradient_accumulation_steps=4, validate_every_steps=2
    )
    assert (options.epochs, options.gradient_accumulation_steps) == (1, 1)
    assert (options.limit_train_batches, options.limit_val_batches) == (1, 1)
    assert (options.validate_every_steps, options.sanity_val_batches) == (None, 0)


@pytest.mark.parametrize(
    ("arguments", "device", "dtype", "scales"),
    [
        ({}, CUDA, None, False),
        ({"precision": "tf32"}, CUDA, None, False),
        ({"use_amp": True}, CPU, torch.bfloat16, False),
        ({"use_amp": True}, CUDA, torch.float16, True),
        ({"use_amp": True, "precision": "bf16"}, CUDA, torch.bfloat16, False),
        ({"precision": "bf16"}, CPU, torch.bfloat16, False),
        ({"precision": "fp16"}, CPU, torch.float16, True),
    ],
)
def test_the_precision_and_the_device_choose_autocast_and_the_scaler(
    arguments, device, dtype, scales, monkeypatch
):
    made = []
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype: made.append((kind, dtype)) or "made")
    options = TrainOptions(epochs=1, **arguments)
    assert options.autocast(device) == (None if dtype is None else "made")
    assert made == ([] if dtype is None else [(device.type, dtype)])
    assert options.scales(device) is scales


@pytest.mark.parametrize(
    ("precision", "within"), [("tf32", "high"), ("fp32", "highest"), ("bf16", "medium")]
)
def test_the_precision_of_products_comes_back_after_an_error(precision, within):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(ValueError, match="planted"), matmul_precision(precision):
            assert torch.get_float32_matmul_precision() == within
            raise ValueError("planted")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
