"""Validation runs the model over all samples, and ends early when it must."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from shardckpt.errors import StateError
from shardckpt.nn_handler.data import ValData
from shardckpt.nn_handler.parallel import Layout
from shardckpt.nn_handler.validation import each_batch, validate
from tests.nn_handler.models import NormNet, X, Y, make, train


class Slow(Dataset):
    def __len__(self) -> int:
        return 400

    def __getitem__(self, index):
        if index == 0:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        time.sleep(0.05)
        return X[0], Y[0]


def test_a_signal_stops_validation_within_a_batch(tmp_path):
    handler = make()
    handler.set_val_loader(Slow(), batch_size=2)
    handler.auto_save(interval=1, save_path=tmp_path, resume="auto")
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train(handler, sanity_val_batches=0)
    assert time.monotonic() - begun < 15
    assert os.listdir(tmp_path) == ["step6"]


def calls(loader, rounds: int, *, counted=None, limit=None) -> list[tuple]:
    """The calls for a rank whose ranks go on for so many rounds, or for as long as it has data."""
    found: list[tuple] = []
    data = SimpleNamespace(loader=loader, counted=counted)

    def agree(more: bool) -> int:
        return int(more or len(found) < rounds)

    each_batch(
        data, 0, lambda batch, counts: found.append((batch, counts)), limit=limit, agree=agree
    )
    return found


def test_each_batch_counts_once():
    assert calls("abc", 0) == [("a", True), ("b", True), ("c", True)]
    assert calls("abc", 0, limit=2) == [("a", True), ("b", True)]
    assert calls("", 0) == []


def test_a_rank_with_fewer_batches_repeats_its_last_one_which_does_not_count():
    assert calls("ab", 4) == [("a", True), ("b", True), ("b", False), ("b", False)]
    assert calls("ab", 0, counted=1) == [("a", True), ("b", False)]


def test_a_rank_without_any_batch_can_not_take_part():
    with pytest.raises(StateError, match="no batch to validate on"):
        calls("", 1)


def run(handler, data=None, **options) -> dict[str, float]:
    return validate(handler, data, guard=lambda act: act(), agree=lambda more: int(more), **options)


def test_the_loss_is_the_mean_over_samples():
    handler = make()
    data = ValData([(X[:6], Y[:6]), (X[6:8], Y[6:8])], {}, Layout(mode="none", device=X.device))
    expected = nn.functional.cross_entropy(handler.module(X[:8]), Y[:8])
    assert run(handler, data)["loss"] == pytest.approx(float(expected))
    assert run(handler, data, limit=1)["loss"] != pytest.approx(float(expected))


class Noise(nn.Module):
    def forward(self, outputs, targets):
        assert not torch.is_grad_enabled()
        return outputs.sum() + torch.rand(())


def test_validation_leaves_modes_sums_and_random_numbers_as_they_were():
    handler = make(NormNet)
    handler.set_loss_fn(Noise())
    handler.module.head.eval()
    handler.sums = sums = object()
    before = torch.get_rng_state()
    seen = []
    found = run(
        handler, on_batch=lambda batch, number: seen.append((number, handler.model.training))
    )
    assert seen == [(number, False) for number in range(6)]
    assert torch.equal(torch.get_rng_state(), before)
    assert run(handler) == found
    assert handler.sums is sums
    assert (handler.module.body.training, handler.module.head.training) == (True, False)
    assert handler.module.body[1].num_batches_tracked == 0


def test_an_error_in_validation_leaves_them_too():
    handler = make()
    handler.sums = sums = object()

    def fails(batch, number):
        torch.rand(1)
        raise KeyError("planted")

    before = torch.get_rng_state()
    with pytest.raises(KeyError, match="planted"):
        run(handler, on_batch=fails)
    assert handler.sums is sums
    assert handler.model.training
    assert torch.equal(torch.get_rng_state(), before)
