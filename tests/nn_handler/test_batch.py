"""Batches of many forms reach the device, the model and the loss."""

from __future__ import annotations

import collections
import dataclasses
import types
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import Dataset

from shardckpt import NNHandler
from shardckpt.errors import StateError
from shardckpt.nn_handler import batch as batches
from shardckpt.nn_handler.batch import (
    Result,
    Several,
    batch_size,
    binds,
    call_model,
    concatenated_batches,
    forward,
    is_column,
    kept_outputs,
    like,
    on_device,
    split,
    to_device,
)
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


META = torch.device("meta")


class Point:
    """An object with a method `to`, as BatchEncoding has."""

    where = None

    def to(self, device):
        self.where = device
        return self


@dataclasses.dataclass
class Boxes:
    box: torch.Tensor
    labels: list
    count: int = dataclasses.field(default=0, init=False)


def test_a_batch_is_a_pair_or_several_inputs_or_a_dict():
    module = TwoInputs()
    assert split((1, 2), module) == (1, 2)
    assert split([1, 2], module) == (1, 2)
    inputs, targets = split((1, 2, 3), module)
    assert (type(inputs), inputs, targets) == (Several, (1, 2), 3)
    both = {"a": 1}
    assert split(both, module) == (both, both)


@pytest.mark.parametrize(
    ("batch", "actual"), [((1, 2, 3, 4), "tuple of 4"), ([1], "list of 1"), (3, "int")]
)
def test_a_batch_of_an_unknown_form_is_refused(batch, actual):
    with pytest.raises(StateError, match="unknown form") as caught:
        split(batch, TwoInputs())
    assert caught.value.actual == actual
    assert "set_training_step" in caught.value.remedy


class TakesTwo(nn.Module):
    def forward(self, a, b=1):
        return a, b


class TakesOthers(nn.Module):
    def forward(self, a, **others):
        return a, others


def test_a_dict_is_passed_by_name_if_the_names_fit():
    given = {"a": 3, "b": 4, "c": 5}
    assert call_model(TakesTwo(), given, TakesTwo()) == (3, 4)
    assert call_model(TakesOthers(), given, TakesOthers()) == (3, {"b": 4, "c": 5})
    other = {"x": 3}
    assert call_model(TakesTwo(), other, TakesTwo()) == (other, 1)
    assert call_model(TakesOthers(), other, TakesOthers()) == (other, {})  # without the argument a


def test_a_tuple_is_passed_as_one_if_the_model_takes_one():
    assert call_model(TakesTwo(), (3, 4), TakesTwo()) == ((3, 4), 1)
    assert call_model(TakesTwo(), Several((3, 4)), TakesTwo()) == (3, 4)
    assert binds(TakesTwo(), (3, 4))
    assert not binds(TakesTwo(), (3, 4, 5))
    assert not binds(TakesTwo(), (), {"c": 1})


def test_a_forward_that_is_replaced_has_its_own_signature(monkeypatch):
    module = TakesTwo()
    assert binds(module, (1,))
    module.forward = lambda a, b, c: None
    assert not binds(module, (1,))
    assert binds(module, (1, 2, 3))
    del module.forward
    assert binds(module, (1,))
    monkeypatch.setattr(TakesTwo, "forward", lambda self, a, b, c: None)
    assert not binds(module, (1,))


def test_objects_and_dataclasses_go_to_the_device():
    moved = to_device({"point": Point(), "boxes": Boxes(torch.ones(2), ["a"]), "n": 3}, META)
    assert moved["point"].where == META
    assert moved["boxes"].box.is_meta
    assert (moved["boxes"].labels, moved["n"]) == (["a"], 3)


def test_arrays_of_numbers_become_tensors_unless_they_are_to_stay():
    value = [np.ones(2), np.array(["text"])]
    numbers, texts = to_device(value, META)
    assert numbers.is_meta
    assert texts is value[1]
    assert to_device(value, META, arrays=False)[0] is value[0]


def test_arguments_of_a_loss_go_to_the_device_if_they_are_tensors_or_modules():
    value = {"weight": torch.ones(1), "part": nn.Linear(1, 1), "nested": [torch.ones(1)]}
    moved = on_device(value, torch.device("cpu"))
    assert moved["nested"] is value["nested"]
    assert on_device(value, META) == value  # a model without memory has no loss to compute
    assert not on_device(value, META)["weight"].is_meta


def test_outputs_are_kept_without_their_graph_and_caches():
    outputs = {"logits": torch.ones(2, requires_grad=True) * 2, "past_key_values": 1, "n": None}
    kept = kept_outputs(outputs)
    assert kept.keys() == {"logits", "n"}
    assert not kept["logits"].requires_grad
    assert outputs["logits"].requires_grad


def test_the_size_of_a_batch_of_other_things_is_one():
    for value in (None, 3, "text", torch.tensor(3.0), [], {}):
        assert batch_size(value) == 1
    assert batch_size(["a", "b", "c"]) == 3
    assert batch_size((torch.ones(4, 2), torch.ones(4))) == 4
    assert batch_size([torch.ones(4), torch.ones(3)]) == 2


def test_columns_are_lists_with_a_value_for_each_sample():
    assert is_column(["a", None])
    assert is_column([1, 2.0])
    assert not is_column([])
    assert not is_column([torch.ones(1)])
    assert not is_column(("a",))


def test_outputs_of_several_batches_are_concatenated():
    assert concatenated_batches([torch.tensor(1), torch.tensor([2, 3])]).tolist() == [1, 2, 3]
    first, second = ({"a": ["x"], "b": (torch.ones(n), None)} for n in (1, 2))
    found = concatenated_batches([first, second])
    assert found["a"] == ["x", "x"]
    assert found["b"][0].tolist() == [1, 1, 1]
    assert found["b"][1] is None
    pair = concatenated_batches([Pair(torch.ones(1), torch.ones(2))] * 2)
    assert (type(pair), len(pair.b)) == (Pair, 4)
    with pytest.raises(StateError, match="outputs of the batches") as caught:
        concatenated_batches([torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 4)])
    assert caught.value.actual == "(2, 3), (2, 4)"
    with pytest.raises(StateError, match="outputs of the model") as caught:
        concatenated_batches([{1}, {2}])
    assert caught.value.actual == "set"


def test_a_mapping_keeps_its_type_and_attributes():
    original = collections.OrderedDict(a=1)
    original.note = "kept"
    changed = like(original, {"a": 2})
    assert (type(changed), changed["a"], changed.note) == (collections.OrderedDict, 2, "kept")
    assert original["a"] == 1
    assert like(types.MappingProxyType({"a": 1}), {"a": 2}) == {"a": 2}


@pytest.mark.parametrize(
    ("returned", "actual"),
    [
        (3.0, "float"),
        (torch.ones(2), "Tensor of shape (2,)"),
        ({"ce": torch.ones(())}, "dict"),
        ({"loss": torch.ones(2)}, "Tensor of shape (2,)"),
    ],
)
def test_a_loss_is_a_scalar_tensor(returned, actual):
    handler = make()
    handler.set_loss_fn(lambda outputs, targets: returned)
    with pytest.raises(StateError, match="not a scalar tensor") as caught:
        forward(handler, (X, Y))
    assert caught.value.actual == actual


def test_a_loss_of_one_element_becomes_a_scalar():
    handler = make()
    handler.set_loss_fn(lambda outputs, targets: {"loss": outputs.sum().reshape(1), "n": 2})
    result = forward(handler, (X[:5], Y[:5]))
    assert result.loss.shape == ()
    assert (result.size, result.terms) == (5, {"n": 2})
    assert batches.Result(loss=result.loss).size == 1
