"""Batches of many forms reach the device, the model and the loss."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import Dataset

from shardckpt import NNHandler
from shardckpt.nn_handler.batch import Result, batch_size, to_device
from shardckpt.nn_handler.epoch_metrics import EpochSums
from tests.nn_handler.models import Body, Net, Pair, TwoInputs, X, Y, make, train


class SumOfTwo(Body):
    def forward(self, a, b):
        return super().forward(a + b)


class OfPair(Body):
    def forward(self, pair):
        return super().forward(pair[0] + pair[1])


class ByName(Body):
    def forward(self, x, scale=None, **extra):
        return super().forward(x if scale is None else x * scale[:, None].float())


class TwoAtMost(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, a, b=None):
        return self.layer(a if b is None else a + b)


class AnyNumber(TwoAtMost):
    def forward(self, *inputs):
        return self.layer(sum(inputs[:2]))


class ListOf(Dataset):
    def __init__(self, make_sample) -> None:
        self.make_sample = make_sample

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i):
        return self.make_sample(i)


@pytest.mark.parametrize(
    ("model", "sample"),
    [
        (OfPair, lambda i: (Pair(X[i], X[i]), Y[i])),
        (OfPair, lambda i: ((X[i], X[i]), Y[i])),
        (SumOfTwo, lambda i: ((X[i], X[i]), Y[i])),
        (SumOfTwo, lambda i: (X[i], X[i], Y[i])),
        (TwoAtMost, lambda i: (X[i], X[i], Y[i])),
        (AnyNumber, lambda i: (X[i], X[i], Y[i])),
        (SumOfTwo, lambda i: ({"a": X[i], "b": X[i]}, Y[i])),
        (ByName, lambda i: ({"x": X[i], "scale": 2.0}, Y[i])),
    ],
)
def test_several_inputs_reach_the_model(model, sample):
    handler = make(model)
    handler.set_train_loader(ListOf(sample), batch_size=16)
    handler.set_val_loader(ListOf(sample), batch_size=16)
    assert train(handler).step == 2
    if model is not AnyNumber:  # it takes the targets too
        assert handler.predict(ListOf(sample), batch_size=5).shape == (32, 3)


class WithLoss(Body):
    def forward(self, x, labels=None):
        logits = super().forward(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_dict_batch_and_the_loss_of_the_outputs():
    handler = NNHandler(WithLoss, device="cpu")
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_train_loader(ListOf(lambda i: {"x": X[i], "labels": Y[i]}), batch_size=16)
    assert train(handler).history["loss"][0] > 0


def test_containers_keep_their_types_on_the_way_to_the_device():
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    value = {"p": Pair(packed, torch.ones(1)), "d": collections.OrderedDict(a=torch.ones(2))}
    moved = to_device(value, torch.device("meta"))
    assert type(moved["p"]) is Pair
    assert type(moved["p"].a) is PackedSequence
    assert moved["p"].a.data.is_meta
    assert type(moved["d"]) is collections.OrderedDict
    assert batch_size(packed) == 2


class Batch(NamedTuple):
    inputs: torch.Tensor
    scale: torch.Tensor


def test_a_named_tuple_of_inputs():
    handler, batch = NNHandler(TwoInputs, device="cpu"), Batch(X, torch.rand(96))
    assert torch.equal(handler.predict(batch), handler.model(*batch))
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    handler.set_train_loader([(batch, Y)])
    assert train(handler).step == 1


@dataclasses.dataclass
class Output(collections.OrderedDict):
    """As the outputs of transformers are."""

    logits: Any = None
    loss: Any = None
    past_key_values: Any = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is not None:
                self[field.name] = value

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __reduce__(self):
        values = tuple(getattr(self, field.name) for field in dataclasses.fields(self))
        return type(self), values

    def update(self, *args, **kwargs):
        raise TypeError("no such method")


class Language(Body):
    """A model whose outputs hold its loss, and a cache that can't be concatenated."""

    def forward(self, inputs, labels=None):
        logits = super().forward(inputs)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return Output(logits=logits, loss=loss, past_key_values=object())


class Named(Dataset):
    def __len__(self) -> int:
        return 21

    def __getitem__(self, index):
        return {"inputs": X[index], "labels": Y[index], "id": f"sample {index}"}


def share_of_zero(outputs, batch):
    assert [f"sample {index}" for index in range(len(batch["id"]))] == sorted(
        batch["id"], key=lambda text: int(text.split()[1])
    )
    assert torch.equal(batch["labels"], torch.stack([Y[int(n.split()[1])] for n in batch["id"]]))
    return (outputs.logits.argmax(1) == 0).float().mean()


def test_outputs_like_those_of_transformers(tmp_path):
    def job(folder, *, stop_at=None):
        torch.manual_seed(0)
        handler = NNHandler(Language, device="cpu")
        handler.set_optimizer(torch.optim.SGD, lr=0.1)
        handler.set_train_loader(Named(), batch_size=4, shuffle=True)
        handler.set_val_loader(Named(), batch_size=4)
        handler.add_metric("zeros", share_of_zero, whole_epoch=True)
        handler.auto_save(save_path=tmp_path / folder, resume="auto")
        return train(handler, 2 if stop_at is None else None, max_steps=stop_at, seed=1)

    handler = job("never")
    outputs = handler.predict(Named(), batch_size=4)
    assert torch.allclose(outputs.logits, handler.model(X[:21]).logits)
    assert "past_key_values" not in outputs
    assert handler.evaluate()["zeros"] == handler.history["val_zeros"][-1]
    job("stopped", stop_at=2)
    assert job("stopped").history == handler.history


def test_a_batch_of_targets_in_a_container():
    assert batch_size({"box": torch.ones(6, 4), "label": torch.ones(6)}) == 6
    assert batch_size([{"box": torch.ones(3, 4)}] * 2) == 2  # one an image
    assert batch_size(torch.tensor(1.0)) == 1
    sums = EpochSums(NNHandler(Net))
    for size in (6, 2, 1):
        sums.add(Result(loss=torch.tensor(2.0), size=size))
    assert sums.means()["loss"] == 2.0
