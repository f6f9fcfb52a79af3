"""NNHandler does what users of Lightning, Keras or the Trainer of transformers expect."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import logging
import os
import signal
import threading
import time
import types
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import shardckpt
from shardckpt import NNHandler
from shardckpt.errors import CheckpointError, LoadMismatchError, StateError
from shardckpt.nn_handler import Callback, EarlyStopping, ModelCheckpoint
from shardckpt.nn_handler.batch import batch_size, to_device
from tests.nn_handler.models import NormNet, accuracy, data, same, weights

X = torch.randn(96, 4, generator=torch.Generator().manual_seed(3))
Y = X[:, :3].argmax(1)
DS = TensorDataset(X, Y)


class Body(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, width), nn.ReLU())
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.body(x))


def make(model=Body, **kwargs) -> NNHandler:
    torch.manual_seed(0)
    handler = NNHandler(model, device="cpu", **kwargs)
    handler.set_optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    handler.set_train_loader(DS, batch_size=16)
    handler.set_val_loader(DS, batch_size=16)
    return handler


def train(handler: NNHandler, epochs: int | None = 1, **options) -> NNHandler:
    handler.train(epochs, progress_bar=False, **options)
    return handler


# Freezing


def frozen_by_module(handler):
    handler.freeze_module("body")


def frozen_by_hand(handler):
    handler.module.body.requires_grad_(False)


def one_frozen_by_hand(handler):
    handler.module.body[0].bias.requires_grad = False


@pytest.mark.parametrize("freeze", [frozen_by_module, frozen_by_hand, one_frozen_by_hand])
@pytest.mark.parametrize("unfreeze", [False, True])
def test_what_is_frozen_comes_back(tmp_path, freeze, unfreeze):
    handler = NNHandler(Body, device="cpu")
    freeze(handler)
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    handler.set_train_loader(DS, batch_size=16)
    train(handler)
    if unfreeze:
        handler.module.requires_grad_(True)
    handler.save(tmp_path / "a")
    loaded = NNHandler.load(tmp_path / "a")
    flags = [p.requires_grad for p in loaded.module.parameters()]
    assert flags == [p.requires_grad for p in handler.module.parameters()]
    assert len(loaded.optimizer.param_groups[0]["params"]) == len(
        handler.optimizer.param_groups[0]["params"]
    )


class Unfreeze(Callback):
    def __init__(self, how: str) -> None:
        self.how = how

    def on_epoch_start(self, handler):
        if handler.epoch == 1:
            handler.freeze_module("body", freeze=False)
            if self.how == "anew":
                handler.set_optimizer(torch.optim.SGD, lr=0.1)
            else:
                body = handler.module.body.parameters()
                handler.optimizer.add_param_group({"params": list(body), "lr": 0.01})


@pytest.mark.parametrize("how", ["anew", "group"])
def test_gradual_unfreezing_resumes(tmp_path, how):
    def job(folder, epochs):
        torch.manual_seed(0)
        handler = NNHandler(Body, device="cpu")
        handler.freeze_module("body")
        handler.set_optimizer(torch.optim.SGD, lr=0.1)
        handler.set_loss_fn(nn.CrossEntropyLoss())
        handler.set_train_loader(DS, batch_size=16)
        handler.add_callback(Unfreeze(how))
        handler.auto_save(interval=1, save_path=folder, resume="auto")
        return train(handler, epochs)

    job(tmp_path / "a", 2)
    resumed, never = job(tmp_path / "a", 3), job(tmp_path / "b", 3)
    assert resumed.epoch == 3
    assert same(weights(resumed), weights(never))
    assert len(resumed.optimizer.param_groups) == len(never.optimizer.param_groups)


def test_unfrozen_parameters_that_no_optimizer_holds_are_named():
    handler = NNHandler(Body, device="cpu")
    handler.freeze_module("body")
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    handler.set_train_loader(DS, batch_size=16)
    train(handler)
    handler.freeze_module("body", freeze=False)
    with pytest.warns(UserWarning, match=r"body\.0\.weight"):
        train(handler)


# Data in the forms that users pass


class Seen(Dataset):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index):
        self.seen.append(index)
        return X[index], Y[index]


def loaders(dataset):
    def g(seed):
        return torch.Generator().manual_seed(seed)

    return {
        "replacement": lambda s: DataLoader(
            dataset,
            16,
            sampler=RandomSampler(dataset, replacement=True, num_samples=320, generator=g(s)),
        ),
        "generator": lambda s: DataLoader(dataset, 16, shuffle=True, generator=g(s)),
        "weighted": lambda s: DataLoader(
            dataset, 16, sampler=WeightedRandomSampler([1.0] * 96, 40, generator=g(s))
        ),
        "batch sampler": lambda s: DataLoader(
            dataset, batch_sampler=BatchSampler(RandomSampler(dataset, generator=g(s)), 10, False)
        ),
    }


@pytest.mark.parametrize("kind", loaders(DS))
def test_a_loader_gives_the_samples_that_it_gives_by_itself(kind):
    for seed in (1, 2):
        own, used = Seen(), Seen()
        list(loaders(own)[kind](seed))
        handler = make()
        handler.set_train_loader(loaders(used)[kind](seed))
        train(handler)
        assert used.seen == own.seen


@pytest.mark.parametrize("kind", loaders(DS))
def test_a_loader_of_its_own_order_resumes_within_an_epoch(tmp_path, kind):
    def job(folder, stop):
        handler = make()
        handler.set_train_loader(loaders(DS)[kind](5))
        handler.add_callback(StopAt(stop))
        handler.auto_save(interval=-1, save_path=tmp_path / folder, resume="auto")
        return handler

    never = train(job("never", 0), 2)
    with pytest.raises(KeyError):
        train(job("c", 2), 2)
    assert same(weights(train(job("c", 0), 2)), weights(never))


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, handler, loss):
        if handler.step == self.step:
            raise KeyError("planted")


class Epochs:
    def __init__(self) -> None:
        self.epoch, self.seen = -1, []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Batches(Epochs):
    def __len__(self) -> int:
        return 6

    def __iter__(self):
        self.seen.append(self.epoch)
        return iter([list(range(16 * i, 16 * i + 16)) for i in range(6)])


class Stream(Epochs, IterableDataset):
    def __iter__(self):
        self.seen.append(self.epoch)
        return zip(X, Y, strict=True)


class OfEpochs(Epochs, Dataset):
    def __getitem__(self, index):
        return DS[index]


def test_set_epoch_is_called_wherever_it_exists():
    batches, stream = Batches(), Stream()
    handler = make()
    handler.set_train_loader(DS, batch_sampler=batches)
    handler.set_val_loader(stream, batch_size=16)
    train(handler, 2)
    assert (batches.seen, stream.seen) == ([0, 1], [0, 1])
    inner = OfEpochs()
    handler.set_train_loader(ConcatDataset([Subset(inner, range(32)), DS]), batch_size=16)
    train(handler)
    assert inner.epoch == 2


class Mine(DataLoader):
    pass


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(DS, 16, sampler=SubsetRandomSampler(range(10))),
        lambda: DataLoader(Stream(), 16),
        lambda: Mine(DS, 16),
        lambda: types.SimpleNamespace(__iter__=None) and [(X[:8], Y[:8]), (X[8:16], Y[8:16])],
    ],
)
def test_validation_takes_what_training_takes(loader):
    handler = make()
    if isinstance(loader(), list):
        handler.set_val_loader(DataLoader(loader(), batch_size=None))
    else:
        handler.set_val_loader(loader())
    assert train(handler).history["val_loss"][0] > 0


Pair = collections.namedtuple("Pair", "a b")


class Two(Body):
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
        (Two, lambda i: ((X[i], X[i]), Y[i])),
        (Two, lambda i: (X[i], X[i], Y[i])),
        (TwoAtMost, lambda i: (X[i], X[i], Y[i])),
        (AnyNumber, lambda i: (X[i], X[i], Y[i])),
        (Two, lambda i: ({"a": X[i], "b": X[i]}, Y[i])),
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


@pytest.mark.parametrize("kind", ["nothing", "generator"])
def test_an_epoch_without_batches_is_an_error(kind):
    handler = make()
    batches = [(X[:8], Y[:8]), (X[8:16], Y[8:16])]
    handler.set_train_loader([] if kind == "nothing" else (batch for batch in batches))
    with pytest.raises(StateError, match="gave no batch"):
        train(handler, 2)
    assert handler.epoch == (kind == "generator")


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


def two_terms(outputs, targets):
    ce = nn.functional.cross_entropy(outputs, targets)
    return {"loss": ce + 1.0, "ce": ce}


def test_the_terms_of_a_loss_are_in_the_history():
    handler = make()
    handler.set_loss_fn(two_terms)
    history = train(handler).history
    assert history["loss"][0] == pytest.approx(history["ce"][0] + 1.0)
    assert "val_ce" in history


class Scaled(nn.Module):
    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.scale = scale / 2
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets) * self.scale * self.factor


@pytest.mark.parametrize("first", ["optimizer", "loss"])
def test_a_loss_with_parameters_is_trained_saved_and_rebuilt(tmp_path, first):
    handler = NNHandler(Body, device="cpu")
    for what in (first, {"optimizer": "loss", "loss": "optimizer"}[first]):
        if what == "loss":
            handler.set_loss_fn(Scaled(4.0))
        else:
            handler.set_optimizer(torch.optim.Adam, lr=0.1)
    handler.set_train_loader(DS, batch_size=16)
    train(handler)
    assert handler.loss_fn.factor != 1.0
    handler.save(tmp_path / "a")
    with shardckpt.open_checkpoint(tmp_path / "a") as checkpoint:
        saved = {name for name in checkpoint.tensors() if name.endswith(".exp_avg")}
    # the names in the state, which are the same under DDP and FSDP2
    places = {f"model.{name}" for name in weights(handler)} | {"loss_fn.factor"}
    assert saved == {f"optimizer.state.{place}.exp_avg" for place in places}
    loaded = NNHandler.load(tmp_path / "a")
    assert loaded.loss_fn.scale == 2.0  # its argument was 4.0
    assert torch.equal(loaded.loss_fn.factor, handler.loss_fn.factor)
    held = [id(p) for group in loaded.optimizer.param_groups for p in group["params"]]
    assert id(loaded.loss_fn.factor) in held


def test_a_copied_loss_is_not_guessed(tmp_path):
    handler = make()
    handler.set_loss_fn(copy.deepcopy(Scaled(4.0)))
    with pytest.warns(UserWarning, match="loss_fn"):
        handler.save(tmp_path / "a")


# Arguments of models


@dataclasses.dataclass
class Config:
    width: int = 8


class OfConfig(Body):
    def __init__(self, config, log=None) -> None:
        super().__init__(config.width)


class Wrap(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(
    "config", [Config(), types.SimpleNamespace(width=8), type("Own", (), {"width": 8})()]
)
def test_a_model_with_a_config_object_trains_and_is_asked_for_at_load(tmp_path, config):
    handler = make(OfConfig, config=config, log=logging.getLogger("x"))
    with pytest.warns(UserWarning, match=r"model\.kwargs"):
        train(handler).save(tmp_path / "a")
    given = {"model.kwargs.config": config, "model.kwargs.log": None}
    loaded = NNHandler.load(tmp_path / "a", objects=given)
    assert same(weights(loaded), weights(handler))


class Keeps(Body):
    def __init__(self, argument) -> None:
        super().__init__()
        self.argument = argument


class Last(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


@pytest.mark.parametrize(
    "body",
    [
        lambda: nn.Linear(4, 3),
        lambda: nn.Sequential(nn.Linear(4, 3)),
        lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3, bias=False)),
        lambda: Body(width=5),
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, 0.0), nn.Linear(4, 3)),
        lambda: Last(nn.LSTM(4, 3, num_layers=2, batch_first=True)),
        lambda: Last(nn.GRU(4, 3, bias=False)),
    ],
)
def test_modules_as_arguments_come_back(tmp_path, body):
    handler = make(Wrap, body=body())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handler.save(tmp_path / "a")
    assert same(weights(NNHandler.load(tmp_path / "a")), weights(handler))


@pytest.mark.parametrize(
    "argument",
    [
        functools.partial(nn.LayerNorm, eps=1e-3),
        functools.partial(nn.functional.leaky_relu, negative_slope=0.5),
        collections.OrderedDict(b=1, a=nn.ReLU),
        [(1, 2), {"a": None}],
    ],
)
def test_values_as_arguments_come_back(tmp_path, argument):
    handler = make(Keeps, argument=argument)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handler.save(tmp_path / "a")
    found = NNHandler.load(tmp_path / "a").module.argument
    assert type(found) is type(argument)
    if isinstance(argument, functools.partial):
        x = torch.tensor([-1.0, 2.0])
        made = [one(2) if one.func is nn.LayerNorm else one for one in (found, argument)]
        assert torch.equal(made[0](x), made[1](x))
    else:
        assert found == argument


@pytest.mark.parametrize(
    "argument",
    [
        collections.defaultdict(int, a=1),
        collections.UserDict(a=1),
        torch.Generator(),
        functools.partial(lambda x: x, 2),
        Pair(1, 2),
    ],
)
def test_values_that_a_checkpoint_can_not_hold_are_named(tmp_path, argument):
    handler = make(Keeps, argument=argument)
    with pytest.warns(UserWarning, match=r"model\.kwargs\.argument"):
        handler.save(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"model\.kwargs\.argument"):
        NNHandler.load(tmp_path / "a")


def test_a_partial_as_a_loss(tmp_path):
    handler = make()
    handler.set_loss_fn(functools.partial(nn.functional.cross_entropy, label_smoothing=0.3))
    handler.save(tmp_path / "a")
    loaded = NNHandler.load(tmp_path / "a")
    outputs = handler.predict(X)
    assert loaded.loss_fn(outputs, Y) == handler.loss_fn(outputs, Y)


def test_the_dtype_of_a_model_comes_back(tmp_path):
    handler = make()
    handler.model.double()
    handler.set_train_loader(TensorDataset(X.double(), Y), batch_size=16)
    handler.val_data = None
    train(handler, ema_decay=0.9).save(tmp_path / "a")
    loaded = NNHandler.load(tmp_path / "a")
    assert loaded.module.head.weight.dtype == torch.float64
    assert same(weights(loaded), weights(handler))


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LazyLinear(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


def test_a_lazy_model(tmp_path):
    handler = make(Lazy)
    handler.val_data = None
    train(handler).save(tmp_path / "a")
    assert same(weights(NNHandler.load(tmp_path / "a")), weights(handler))


class Growing(Body):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0, 4))

    def forward(self, x):
        if self.training:
            self.seen = torch.cat([self.seen, x])[-32:]
        return super().forward(x)


def test_an_average_follows_a_buffer_that_grows():
    handler = train(make(Growing), ema_decay=0.9)
    assert torch.equal(handler.ema.weights["seen"], handler.module.seen)


def test_an_argument_that_torch_extends_comes_back(tmp_path):
    handler = make(Wrap, body=nn.AdaptiveLogSoftmaxWithLoss(16, 20, cutoffs=[5, 10]))
    handler.save(tmp_path / "a")
    loaded = NNHandler.load(tmp_path / "a")
    assert loaded.module.body.cutoffs == handler.module.body.cutoffs
    assert same(weights(loaded), weights(handler))


# Savers, names, resumes


def minus_epoch(outputs, targets):
    return float(-Count.epoch)


class Count(Callback):
    epoch = 0

    def on_epoch_start(self, handler):
        Count.epoch = handler.epoch


def test_two_checkpoints_in_one_folder_keep_their_own_best(tmp_path):
    handler = make()
    handler.add_callback(Count())
    handler.add_metric("m", minus_epoch)
    handler.add_callback(ModelCheckpoint(tmp_path, monitor="val_loss"))
    handler.add_callback(ModelCheckpoint(tmp_path, monitor="val_m", mode="max"))
    train(handler, 4)
    by_loss, by_m = (c.saver.best_path for c in handler.callbacks[1:])
    assert (NNHandler.load(by_loss).epoch, NNHandler.load(by_m).epoch) == (4, 1)
    assert handler.best_path == by_loss
    assert handler.best_score == min(handler.history["val_loss"])


@pytest.mark.parametrize(
    "name",
    ["a/{epoch}", "../x{epoch}", ".h{epoch}", "e{val_loss:d}", "e{epoch:.2q}", "", "{loss.x}"],
)
def test_an_impossible_name_is_an_error_before_the_first_step(tmp_path, name):
    handler = make()
    with pytest.raises(StateError):
        handler.auto_save(interval=1, save_path=tmp_path, name=name)
        train(handler)
    assert handler.step == 0


def one(outputs, targets):
    return 1.0


def test_a_metric_that_is_added_before_a_resume_counts_its_own_samples(tmp_path):
    def job(stop):
        handler = make()
        handler.add_callback(StopAt(stop))
        handler.auto_save(interval=1, save_path=tmp_path, resume="auto")
        return handler

    with pytest.raises(KeyError):
        train(job(3))
    handler = job(0)
    handler.add_metric("one", one)
    assert train(handler).history["one"] == [1.0]


def test_a_warning_names_changed_options_and_set_hyperparameters_changes_them(tmp_path):
    def job(epochs, change=False, **options):
        handler = make()
        handler.set_optimizer(torch.optim.SGD, momentum=0.9, **options)
        if change:
            handler.set_hyperparameters(lr=0.5)
        handler.auto_save(interval=1, save_path=tmp_path, resume="auto")
        return train(handler, epochs)

    job(1, lr=0.1)
    with pytest.warns(UserWarning, match="optimizer lr: 0.1"):
        assert job(2, lr=0.5).history["lr"] == [0.1, 0.1]
    changed = job(3, change=True, lr=0.1)
    assert changed.history["lr"] == [0.1, 0.1, 0.5]
    assert changed.optimizer.state


def test_a_changed_rate_is_set_once_and_then_follows_the_schedule(tmp_path):
    def job(epochs):
        handler = make()
        handler.set_optimizer(torch.optim.SGD, lr=0.1)
        handler.set_scheduler(
            torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=10, monitor="loss"
        )
        handler.set_hyperparameters(lr=0.5)
        handler.auto_save(interval=1, save_path=tmp_path, resume="auto")
        return train(handler, epochs)

    job(2)
    assert job(4).history["lr"] == pytest.approx([0.5, 0.05, 0.005, 0.0005])


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (torch.optim.lr_scheduler.OneCycleLR, {"max_lr": 0.1, "total_steps": 30}),
        (torch.optim.lr_scheduler.CyclicLR, {"base_lr": 0.1, "max_lr": 0.3, "step_size_up": 4}),
        (torch.optim.lr_scheduler.CosineAnnealingLR, {"T_max": 5}),
    ],
)
def test_a_changed_rate_scales_the_full_schedule(scheduler, options):
    rates = []
    for changed in (0.1, 0.2):
        handler = make()
        handler.set_optimizer(torch.optim.SGD, lr=0.1)
        handler.set_scheduler(scheduler, interval="step", **options)
        train(handler)
        handler.set_hyperparameters(lr=changed)
        rates.append(torch.tensor(train(handler, 2).history["lr"][1:]))
    assert torch.allclose(2 * rates[0], rates[1])


def test_a_warning_names_changed_options_of_a_group(tmp_path):
    def job(epochs, rate):
        handler = make()
        handler.set_optimizer(torch.optim.SGD, lr=0.1, groups={"head": {"lr": rate}})
        handler.auto_save(interval=1, save_path=tmp_path, resume="auto")
        return train(handler, epochs)

    job(1, 0.5)
    with pytest.warns(UserWarning, match="optimizer group 1 lr: 0.5 in the checkpoint, 0.3 in"):
        assert job(2, 0.3).history["lr_1"] == [0.5, 0.5]


def test_a_load_that_is_not_strict_says_what_it_skips(tmp_path):
    other = torch.nn.Linear(8, 5)
    weights = {"body.0.weight": torch.ones(8, 4), "head.bias": other.bias, "neck": torch.ones(1)}
    torch.save(weights, tmp_path / "w.ckpt")
    with pytest.warns(UserWarning, match="skipped") as caught:
        handler = NNHandler.initialize_from_checkpoint(tmp_path / "w.ckpt", Body, strict=False)
    assert torch.equal(handler.module.body[0].weight, weights["body.0.weight"])
    text = str(caught[0].message)
    assert "not in the checkpoint: model.body.0.bias, model.head.weight" in text
    assert "of another shape: model.head.bias (saved" in text
    assert "not in the handler: model.neck" in text
    torch.save({"neck": torch.ones(1)}, tmp_path / "none.ckpt")
    with pytest.raises(LoadMismatchError, match="prefix= chooses"):
        NNHandler.initialize_from_checkpoint(tmp_path / "none.ckpt", Body, strict=False)
    make().save(tmp_path / "a")
    kwargs = {"width": 8, "extra": True}
    for device_map in (None, "cpu"):
        with pytest.warns(UserWarning, match=r"not in the checkpoint: (model\.)?extra"):
            NNHandler.load(
                tmp_path / "a",
                device_map=device_map,
                strict=False,
                model_class=Extended,
                objects={"model.kwargs": kwargs},
                skip_optimizer=True,
            )


def test_remedies_of_a_mismatch_name_arguments_that_there_are(tmp_path):
    make().save(tmp_path / "a")
    with pytest.raises(LoadMismatchError, match="model_class=") as caught:
        NNHandler.load(tmp_path / "a", objects={"model.kwargs": {"width": 9}})
    assert "keys=" not in caught.value.remedy
    with pytest.raises(LoadMismatchError, match="create the model with the arguments"):
        make(width=9).restore(tmp_path / "a")
    with pytest.raises(LoadMismatchError, match="prefix="):
        NNHandler.initialize_from_checkpoint(tmp_path / "a", Body, width=9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_are_converted(tmp_path, dtype):
    saved = Body().to(dtype).state_dict()
    torch.save(saved, tmp_path / "w.pt")
    found = NNHandler.initialize_from_checkpoint(tmp_path / "w.pt", Body).module.state_dict()
    assert all(torch.equal(found[name], saved[name].float()) for name in saved)


class Batch(NamedTuple):
    inputs: torch.Tensor
    scale: torch.Tensor


def test_a_named_tuple_of_inputs():
    handler, batch = NNHandler(Two, device="cpu"), Batch(X, torch.rand(96))
    assert torch.equal(handler.predict(batch), handler.model(*batch))
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    handler.set_train_loader([(batch, Y)])
    assert train(handler).step == 1


def test_a_value_that_is_logged_too_late_is_an_error():
    handler = make()
    handler.add_callback(lambda handler, metrics: handler.log("late", 1.0))
    with pytest.raises(StateError, match="outside of an epoch"):
        train(handler)


class Extended(Body):
    def __init__(self, width: int, extra: bool) -> None:
        super().__init__(width)
        self.extra = nn.Parameter(torch.zeros(int(extra)))


def test_a_typo_in_a_device_map_is_an_error(tmp_path):
    make().save(tmp_path / "a")
    with pytest.raises(StateError, match="bdoy"):
        NNHandler.load(tmp_path / "a", device_map={"": "cpu", "bdoy": "disk"})
    assert not NNHandler.load(tmp_path / "a", device_map="cpu").model.training


def test_a_model_argument_without_its_name_is_an_error():
    with pytest.raises(StateError, match="by name"):
        NNHandler(Body, "cpu", 32)


def test_predict_divides_a_list_of_samples_into_batches():
    handler, samples = make(), [DS[number] for number in range(10)]
    inputs = torch.stack([sample[0] for sample in samples])
    found = handler.predict(samples, batch_size=4)
    assert torch.equal(found, handler.predict(inputs))


def test_a_save_inside_ema_weights_is_refused(tmp_path):
    handler = train(make(), ema_decay=0.5)
    own = {name: tensor.clone() for name, tensor in handler.module.state_dict().items()}
    for name in ("a", "a.pth"):
        with handler.ema_weights(), pytest.raises(StateError, match="ema=True"):
            handler.save(tmp_path / name)
    assert os.listdir(tmp_path) == []
    handler.save(tmp_path / "a")
    loaded = NNHandler.load(tmp_path / "a").module.state_dict()
    assert all(torch.equal(loaded[name], own[name]) for name in own)


def test_the_rates_of_a_scheduler():
    handler = make()
    handler.set_scheduler(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    begun = handler.scheduler.get_last_lr()
    train(handler)
    assert handler.scheduler.get_last_lr() == [rate / 2 for rate in begun]


def test_training_inside_ema_weights_is_refused():
    handler = train(make(), ema_decay=0.9)
    with handler.ema_weights(), pytest.raises(StateError, match="ema_weights"):
        train(handler)
    train(handler)


# Messages


@pytest.mark.parametrize(
    "call",
    [
        lambda h: h.set_optimizer(torch.optim.Adam(h.model.parameters())),
        lambda h: h.set_scheduler(torch.optim.lr_scheduler.StepLR(h.optimizer, 1)),
        lambda h: h.set_loss_fn(nn.CrossEntropyLoss),
        lambda h: h.set_loss_fn(None),
        lambda h: h.add_metric("a", nn.L1Loss),
        lambda h: h.add_metric("a", None),
        lambda h: h.set_train_loader(None),
        lambda h: h.set_val_loader(None),
        lambda h: h.set_train_loader(TensorDataset),
        lambda h: NNHandler(Body, 32),
        lambda h: NNHandler(Body, "gpu"),
        lambda h: NNHandler(Body, "cuda:99"),
        lambda h: NNHandler(None),
        lambda h: (h.set_loss_fn(lambda o, t: (o.sum(), 1)), train(h)),
        lambda h: (h.set_loss_fn(lambda o, t: o), train(h)),
        lambda h: h.train(progress_bar=False),
        lambda h: h.train(1, precision="bf61"),
        lambda h: h.log("a", 1),
        lambda h: h.add_metric(3, accuracy),
        lambda h: h.set_optimizer(torch.optim.SGD, lrr=1),
        lambda h: h.set_optimizer(lambda groups: 3),
        lambda h: h.set_scheduler(torch.optim.lr_scheduler.StepLR, stepsize=1),
        lambda h: h.set_scheduler(nn.MSELoss),
        lambda h: h.set_hyperparameters(optimizer="other", lr=1.0),
        lambda h: h.set_train_loader(DS, bath_size=1),
        lambda h: h.set_val_loader(DS, batch_size=0),
        lambda h: h.set_train_loader("data"),
        lambda h: h.seed("3"),
        lambda h: EarlyStopping(patience=0),
        lambda h: (h.module.requires_grad_(False), train(h)),
        lambda h: h.remove_callback(Callback),
    ],
)
def test_a_wrong_argument_is_a_state_error(call):
    with pytest.raises(StateError):
        call(make())


# Ctrl-C in validation


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


# Verbs


def test_evaluate_and_predict():
    handler = make()
    handler.add_metric("accuracy", accuracy)
    train(handler, ema_decay=0.9)
    found = handler.evaluate()
    assert found["loss"] == pytest.approx(handler.history["val_loss"][-1])
    assert handler.evaluate(DS, batch_size=7)["accuracy"] == pytest.approx(found["accuracy"])
    outputs = handler.predict(DS, batch_size=7)
    assert torch.allclose(outputs, handler.predict(X))
    averaged = handler.predict(DataLoader(DS, 5), ema=True)
    assert not torch.allclose(outputs, averaged)
    assert averaged.shape == outputs.shape
    assert handler.model.training


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


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs, scale):
        return self.layer(inputs) * scale[:, None]


def test_predict_takes_batches_of_two_inputs():
    torch.manual_seed(0)
    handler, scale = NNHandler(Two, device="cpu"), torch.rand(96)
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


def test_steps_limits_and_validation_by_steps():
    handler = train(make(), None, max_steps=8, validate_every_steps=3)
    assert (handler.step, handler.epoch) == (8, 1)
    assert [found["step"] for found in handler.validations] == [3.0, 6.0]
    handler = train(make(), 2, limit_train_batches=2, limit_val_batches=1)
    assert (handler.step, handler.epoch) == (4, 2)
    handler = make()
    handler.auto_save(save_path="/proc/nowhere")
    assert train(handler, 5, fast_dev_run=True).step == 0  # undone


def test_max_steps_resumes(tmp_path):
    def job(stop, steps=8):
        handler = make()
        handler.add_callback(StopAt(stop))
        handler.auto_save(interval=-1, save_path=tmp_path, resume="auto")
        return train(handler, None, max_steps=steps)

    assert job(0, 0).step == 0
    with pytest.raises(KeyError):
        job(7)
    assert job(0).step == 8
    assert job(0).step == 8
    assert job(0, 15).step == 15  # a script that asks for more


def own_step(handler, batch):
    inputs, targets = batch
    outputs = handler.model(inputs)
    handler.log("size", len(inputs))
    loss = nn.functional.cross_entropy(outputs, targets)
    return {"loss": loss, "outputs": outputs, "targets": targets}


def test_a_training_step_of_ones_own(tmp_path):
    handler, usual = make(), train(make())
    handler.set_training_step(own_step)
    handler.will_log.add("size")
    train(handler)
    assert same(weights(handler), weights(usual))
    assert handler.history["size"] == [16.0]
    handler.save(tmp_path / "a")
    loaded = NNHandler.load(tmp_path / "a")
    loaded.set_train_loader(DS, batch_size=16)
    with pytest.raises(StateError, match="set_training_step"):
        train(loaded)


def explodes(outputs, targets):
    return outputs.sum() * (float("nan") if Count.epoch == 0 else 1.0)


def test_the_nan_guard():
    Count.epoch = 0
    handler = make()
    handler.set_loss_fn(explodes)
    before = weights(handler)
    with pytest.warns(UserWarning, match="not finite"):
        train(handler, nan_guard="skip")
    assert same(before, weights(handler))
    with pytest.raises(StateError, match="not finite"):
        train(handler, nan_guard="stop")


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32", "fp32"])
def test_precision_by_name(precision):
    handler = train(make(), precision=precision)
    assert (handler.scaler is not None) == (precision == "fp16")


class Counts:
    """As the metrics of torchmetrics behave."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.right = self.all = 0

    def update(self, outputs, targets) -> None:
        self.right += int((outputs.argmax(1) == targets).sum())
        self.all += len(targets)

    def compute(self) -> float:
        return self.right / self.all


def test_a_metric_object_computes_over_the_epoch():
    handler = make()
    handler.add_metric("counted", Counts())
    handler.add_metric("accuracy", accuracy)
    history = train(handler, 2).history
    assert history["counted"] == pytest.approx(history["accuracy"])
    assert history["val_counted"] == pytest.approx(history["val_accuracy"])


class Hooks(Callback):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_batch_start(self, handler, batch, number):
        self.seen.append(f"batch {number}")

    def on_validation_start(self, handler):
        self.seen.append("validation")

    def on_validation_end(self, handler, metrics):
        self.seen.append(",".join(metrics))

    def on_save(self, handler, path):
        self.seen.append(os.path.basename(path))

    def on_exception(self, handler, error):
        self.seen.append(type(error).__name__)


def test_hooks_and_remove_callback(tmp_path):
    handler, hooks = make(), Hooks()
    handler.add_callback(hooks)
    handler.add_callback(StopAt(3))
    handler.set_train_loader(data(16), batch_size=8)
    handler.auto_save(save_path=tmp_path)
    with pytest.raises(KeyError):
        train(handler, 2, gradient_accumulation_steps=1)
    assert hooks.seen == ["batch 0"] * 2 + [
        "validation",
        "val_loss",
        "epoch1",
        "batch 0",
        "KeyError",
    ]
    handler.remove_callback(hooks)
    handler.remove_callback(StopAt)
    assert handler.callbacks == []


def test_a_summary_and_the_number_of_parameters():
    handler = make()
    handler.freeze_module("body")
    assert handler.count_parameters() == 67
    assert handler.count_parameters(trainable=True) == 27
    assert "head" in repr(handler)
    assert "67 parameters, 27 trainable" in repr(handler)


def test_batch_norm_with_an_average_and_a_plateau(tmp_path):
    def job(epochs):
        handler = make(NormNet)
        handler.set_scheduler(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0)
        handler.auto_save(save_path=tmp_path, resume="auto")
        return train(handler, epochs, ema_decay=0.9, use_amp=True)

    job(1)
    assert job(2).epoch == 2
