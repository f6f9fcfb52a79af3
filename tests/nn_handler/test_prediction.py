"""The outputs of a model for a data set."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader, TensorDataset

from shardckpt import NNHandler
from tests.nn_handler.models import DS, TwoInputs, X, Y, make


def test_predict_divides_a_list_of_samples_into_batches():
    handler, samples = make(), [DS[number] for number in range(10)]
    inputs = torch.stack([sample[0] for sample in samples])
    found = handler.predict(samples, batch_size=4)
    assert torch.equal(found, handler.predict(inputs))


def test_predict_takes_batches_of_two_inputs():
    torch.manual_seed(0)
    handler, scale = NNHandler(TwoInputs, device="cpu"), torch.rand(96)
    expected = handler.model(X, scale)
    for batches in (
        TensorDataset(X, scale),
        TensorDataset(X, scale, Y),
        [((X, scale), Y)],
        [((X, scale),)],
        [{"inputs": X, "scale": scale}],
    ):
        options = {} if isinstance(batches, list) else {"batch_size": 7}
        found = handler.predict(DataLoader(batches, **options or {"batch_size": None}))
        assert torch.allclose(found, expected)
