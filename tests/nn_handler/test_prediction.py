"""The outputs of a model for a data set."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from shardckpt import NNHandler
from shardckpt.errors import StateError
from shardckpt.nn_handler import prediction
from shardckpt.nn_handler.prediction import is_data
from tests.nn_handler.models import DS, Pair, TwoInputs, X, Y, make


def test_predict_divides_a_list_of_samples_into_batches():
    handler, samples = make(), [DS[number] for number in range(10)]
    inputs = torch.stack([sample[0] for sample in samples])
    found = handler.predict(samples, batch_size=4)
    batches = [handler.predict(inputs[at : at + 4]) for at in (0, 4, 8)]
    assert torch.equal(found, torch.cat(batches))  # on some CPUs, bits depend on the batch size


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


class Several(nn.Module):
    """Outputs in containers of several kinds."""

    def forward(self, x):
        return {"pair": Pair(x, 2 * x), "texts": [f"{int(n)}" for n in x[:, 0]], "none": None}


def test_sources_of_batches_are_not_batches():
    for source in (DS, DataLoader(DS), iter([X]), TensorDataset(X)):
        assert is_data(source)
    for batch in (X, [X, X], (X,), {"x": X}, X.numpy()):
        assert not is_data(batch)


def test_containers_of_outputs_are_concatenated_each_in_its_kind():
    handler = NNHandler(Several, device="cpu")
    inputs = torch.arange(5.0)[:, None]
    found = handler.predict(TensorDataset(inputs), batch_size=2)
    assert type(found["pair"]) is Pair
    assert torch.equal(found["pair"].b, 2 * inputs)
    assert found["texts"] == ["0", "1", "2", "3", "4"]
    assert found["none"] is None


def test_outputs_of_another_kind_are_refused():
    handler = make()
    handler.module.forward = lambda x: object()
    with pytest.raises(StateError, match="can't be concatenated") as caught:
        handler.predict(DS, batch_size=8)
    assert caught.value.actual == "object"


def test_the_outputs_of_ranks_are_put_in_the_order_of_the_samples():
    """Three ranks take the samples in turns, and each sends its outputs."""

    def of_rank(*numbers: int) -> dict:
        value = torch.tensor(numbers)
        return {
            "pair": Pair(value, [value]),
            "texts": [str(number) for number in numbers],
            "constant": torch.zeros(1),
        }

    parts = [of_rank(0, 3, 6), of_rank(1, 4, 7), of_rank(2, 5)]
    found = prediction._interleaved(parts, 8)
    assert found["pair"].a.tolist() == list(range(8))
    assert found["pair"].b[0].tolist() == list(range(8))
    assert found["texts"] == [str(number) for number in range(8)]
    assert found["constant"].shape == (3,)  # one for each rank, and not one for each sample
    two = prediction._interleaved([torch.tensor([0, 2, 4]), torch.tensor([1, 3])], 5)
    assert two.tolist() == list(range(5))


class OneOrTwo(nn.Module):
    def forward(self, a, b=None):
        return a if b is None else a + b


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((1.0,), 1.0),
        ((1.0, 2.0), 1.0),  # the second item is the targets
        ((1.0, 2.0, 4.0), 3.0),
    ],
)
def test_the_last_item_of_a_batch_is_left_out_if_it_is_likely_the_targets(batch, expected):
    handler = NNHandler(OneOrTwo, device="cpu")
    tensors = tuple(torch.tensor([value]) for value in batch)
    assert handler.predict(iter([tensors])).tolist() == [expected]
