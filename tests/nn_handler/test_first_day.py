"""The calls that new users of NNHandler tried on their first day."""

from __future__ import annotations

import functools
import io
import os
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from shardckpt import NNHandler
from shardckpt.errors import (
    CheckpointError,
    LoadMismatchError,
    NotACheckpointError,
    StateError,
    StorageError,
)
from shardckpt.nn_handler import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from tests.nn_handler.models import DS, Body, X, Y, make, same, train, weights


@pytest.fixture(autouse=True)
def no_warning_is_missed():
    """A warning that a test does not expect is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def again(path, **options) -> NNHandler:
    handler = NNHandler.load(path, **options)
    handler.set_train_loader(DS, batch_size=16)
    handler.set_val_loader(DS, batch_size=16)
    return handler


# Modules among the arguments of callbacks, losses and metrics


class Holds(Callback):
    def __init__(self, *parts) -> None:
        self.parts = parts


class Penalty(nn.Module):
    """A loss that looks at the weights of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, outputs, targets):
        penalty = self.model.head.weight.square().sum()
        return nn.functional.cross_entropy(outputs, targets) + 0.01 * penalty


def distilled(outputs, targets, teacher):
    with torch.no_grad():
        taught = teacher(torch.ones(len(targets), 4))
    return nn.functional.cross_entropy(outputs, targets) + (outputs - taught).square().mean()


@pytest.mark.parametrize("name", ["a", "a.pth"])
def test_a_callback_gets_the_parts_of_the_loaded_handler(tmp_path, name):
    handler = make()
    handler.set_scheduler(lr_scheduler.StepLR, step_size=1)
    body, weight = handler.module.body, handler.module.head.weight
    handler.add_callback(Holds(handler, handler.model, [body, weight], handler.optimizer))
    handler.add_callback(Holds(handler.scheduler))
    train(handler).save(tmp_path / name)
    loaded = NNHandler.load(tmp_path / name)
    whole, model, (body, weight), optimizer = loaded.callbacks[0].parts
    assert whole is loaded
    assert model is loaded.model
    assert body is loaded.module.body
    assert weight is loaded.module.head.weight
    assert optimizer is loaded.optimizer
    assert loaded.callbacks[1].parts[0] is loaded.scheduler


class Script(Callback):
    def __init__(self, arguments) -> None:
        self.arguments = {"of the script": arguments}


def test_an_attribute_does_not_hide_the_arguments_of_a_callback(tmp_path):
    handler = make()
    handler.add_callback(Script(3))
    handler.save(tmp_path / "a")
    assert NNHandler.load(tmp_path / "a").callbacks[0].arguments == {"of the script": 3}


def test_a_callback_of_a_part_that_is_left_out_is_an_error(tmp_path):
    handler = make()
    handler.add_callback(Holds(handler.optimizer))
    handler.save(tmp_path / "a")
    with pytest.raises(CheckpointError, match="skip_callbacks=True"):
        NNHandler.load(tmp_path / "a", skip_optimizer=True)
    assert not NNHandler.load(tmp_path / "a", skip_optimizer=True, skip_callbacks=True).callbacks


def test_a_module_with_tensors_of_its_own_is_asked_for(tmp_path):
    teacher = Body()
    partial = functools.partial(distilled, teacher=teacher)
    places = {
        "loss_fn.arguments.keywords.teacher": lambda h: h.set_loss_fn(partial),
        "loss_arguments.teacher": lambda h: h.set_loss_fn(distilled, teacher=teacher),
        "metrics.far.arguments.keywords.teacher": lambda h: h.add_metric("far", partial),
        "callbacks.0.args.0": lambda h: h.add_callback(Holds(teacher)),
    }
    for number, (place, act) in enumerate(places.items()):
        handler = make()
        act(handler)
        with pytest.warns(UserWarning, match=f"{place} is not in the checkpoint: Body"):
            handler.save(tmp_path / str(number))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = NNHandler.load(tmp_path / str(number), objects={place: teacher})
        held = [
            *getattr(loaded.loss_fn, "keywords", {}).values(),
            *loaded.loss_arguments.values(),
            *(m.keywords["teacher"] for m in loaded.metrics.values()),  # and no other metric
            *(part for c in loaded.callbacks for part in c.parts),
        ]
        assert held == [teacher]


def test_the_arguments_of_a_module_may_be_all_its_tensors(tmp_path):
    handler = make()
    handler.add_metric("weighted", nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])))
    handler.save(tmp_path / "a")
    assert NNHandler.load(tmp_path / "a").metrics["weighted"].weight.tolist() == [1.0, 2.0, 3.0]


def test_a_loss_may_hold_the_model(tmp_path):
    def job(folder, epochs):
        handler = make()
        handler.set_loss_fn(Penalty(handler.model))
        assert len(handler.optimizer.param_groups) == 1
        handler.auto_save(save_path=folder, resume="auto")
        return train(handler, epochs, gradient_clipping_norm=0.1)

    job(tmp_path / "a", 1)
    resumed, never = job(tmp_path / "a", 2), job(tmp_path / "b", 2)
    assert same(weights(resumed), weights(never))
    loaded = again(tmp_path / "b" / "epoch2")
    assert loaded.loss_fn.model is loaded.model
    assert loaded.evaluate() == never.evaluate()
    plain = make()  # the gradients of the model count once in their norm
    plain.set_loss_fn(lambda outputs, targets: Penalty(plain.model)(outputs, targets))
    assert same(weights(train(plain, 2, gradient_clipping_norm=0.1)), weights(never))


# Resuming


def test_a_trial_leaves_no_trace(tmp_path):
    def job(trial):
        handler = make()
        handler.set_train_loader(DS, batch_size=16, shuffle=True)
        handler.set_scheduler(lr_scheduler.OneCycleLR, max_lr=0.5, total_steps=24)
        handler.add_callback(EarlyStopping("loss", patience=9))
        handler.add_callback(LearningRateMonitor())
        options = {"ema_decay": 0.9, "precision": "bf16", "seed": 3}
        for _ in range(trial):
            found = handler.train(9, progress_bar=False, fast_dev_run=True, **options)
            assert (len(found["loss"]), handler.epoch, handler.step) == (1, 0, 0)
            assert handler.history == {}
            assert handler.ema is None
        return train(handler, 2, **options)

    tried, never = job(2), job(0)
    assert same(weights(tried), weights(never))
    assert tried.history == never.history
    assert tried.callbacks[1].rates == never.callbacks[1].rates


def test_a_trial_does_not_hinder_a_resume(tmp_path):
    def job():
        handler = make()
        handler.auto_save(save_path=tmp_path, resume="auto")
        train(handler, fast_dev_run=True)
        return train(handler, 2)

    job()
    assert job().epoch == 2
    assert sorted(os.listdir(tmp_path)) == ["epoch1", "epoch2"]


def test_a_warning_says_that_nothing_was_resumed(tmp_path):
    handler = train(make())
    handler.auto_save(save_path=tmp_path, resume="auto", name="e{epoch}.pth")
    with pytest.warns(UserWarning, match='resume="auto" has no effect: .* to step 6'):
        train(handler)
    train(handler)  # the next call of a run continues
    other = make()
    other.auto_save(save_path=tmp_path, resume="auto")
    with pytest.warns(UserWarning, match="but e2.pth, e3.pth: training begins anew"):
        train(other)
    other = make()
    other.auto_save(save_path=tmp_path, resume="auto", name="e{epoch}.pth")
    assert train(other, 3).history == handler.history


def test_the_names_of_links_are_checked_before_training(tmp_path):
    for options in ({"links": True}, {"save_last": True}):
        with pytest.raises(StateError, match="that of a link"):
            make().auto_save(name="last.pth", **options)
    with pytest.raises(StateError, match="that of a link"):
        ModelCheckpoint(tmp_path, name="best", links=True)
    train(make()).save(tmp_path / "last")
    handler = make()
    handler.auto_save(save_path=tmp_path, links=True)
    with pytest.raises(StorageError, match="The name of a link is taken"):
        train(handler)
    assert handler.step == 0


def test_a_link_that_fails_does_not_end_training(tmp_path, monkeypatch):
    def refused(*arguments):
        raise PermissionError("planted")

    handler = make()
    handler.auto_save(save_path=tmp_path, links=True)
    monkeypatch.setattr(os, "symlink", refused)
    with pytest.warns(UserWarning, match="The link last in .* was not made"):
        train(handler)
    assert os.listdir(tmp_path) == ["epoch1"]


def test_one_step_is_saved_once(tmp_path):
    handler = make()
    handler.auto_save(None, tmp_path, every_steps=4)
    train(handler, None, max_steps=8)
    assert sorted(os.listdir(tmp_path)) == ["step4", "step8"]


def test_a_warning_names_other_tensors_of_a_loss(tmp_path):
    def job(epochs, *values):
        handler = make()
        handler.set_loss_fn(nn.CrossEntropyLoss(weight=torch.tensor(values)))
        handler.auto_save(save_path=tmp_path, resume="auto")
        return train(handler, epochs)

    job(1, 1.0, 2.0, 3.0)
    with pytest.warns(UserWarning, match="gets its tensors from the checkpoint: weight"):
        job(2, 5.0, 5.0, 5.0)
    given = nn.CrossEntropyLoss(weight=torch.tensor([5.0, 5.0, 5.0]))
    with pytest.warns(UserWarning, match="gets its tensors from the checkpoint: weight"):
        NNHandler.load(tmp_path / "epoch2", loss_fn=given)
    assert job(3, 1.0, 2.0, 3.0).epoch == 3


def test_an_option_that_the_state_replaces_is_refused(tmp_path):
    handler = make()
    handler.set_scheduler(lr_scheduler.StepLR, step_size=1)
    handler.save(tmp_path / "a")
    with pytest.raises(StateError, match=r"set_hyperparameters\(lr=...\)"):
        NNHandler.load(tmp_path / "a", objects={"optimizer.options.lr": 0.5})
    with pytest.raises(StateError, match="skip_scheduler=True"):
        NNHandler.load(tmp_path / "a", objects={"scheduler.options.step_size": 2})


# Arguments


def test_a_warning_names_options_of_groups_that_the_optimizer_lacks():
    handler = make()
    with pytest.warns(UserWarning, match="does not use these options of a group: learning_rate"):
        handler.set_optimizer(torch.optim.Adam, groups={"head": {"learning_rate": 1.0}})
    handler.set_optimizer(torch.optim.Adam, groups={"head": {"lr": 1.0, "name": "head"}})
    for groups in ("head", {"head": 0.1}, [0.1]):
        with pytest.raises(StateError, match="Invalid groups"):
            handler.set_optimizer(torch.optim.Adam, groups=groups)


def test_a_wrong_hyperparameter_changes_nothing():
    handler = make()
    for wrong in ({"learning_rate": 1.0}, {"lr": "fast"}, {"lr": -1.0}):
        with pytest.raises(StateError):
            handler.set_hyperparameters(**wrong)
    handler.set_hyperparameters(lr=0.5)
    assert handler.hyperparameters == {"main": {"lr": 0.5}}


def test_schedulers_are_pairs():
    handler = make()
    made = lr_scheduler.StepLR(handler.optimizer, 1)
    with pytest.raises(StateError, match="not a pair"):
        handler.set_scheduler(lr_scheduler.SequentialLR, schedulers=[made, made], milestones=[1])
    with pytest.raises(StateError, match="Invalid value for interval"):
        handler.set_scheduler(lr_scheduler.StepLR, step_size=1, interval="batch")


@pytest.mark.parametrize("name", ["use_amp", "fast_dev_run", "save_on_last_epoch", "progress_bar"])
def test_flags_of_train(name):
    with pytest.raises(StateError, match=f"Invalid {name} for train"):
        make().train(1, **{name: 3})


@pytest.mark.parametrize(
    "name", ["overwrite", "save_last", "on_exception", "on_signal", "asynchronous", "links"]
)
def test_flags_of_auto_save(name):
    with pytest.raises(StateError, match=f"Invalid {name} for saving"):
        make().auto_save(**{name: "yes"})
    with pytest.raises(StateError, match="Invalid tolerate"):
        make().auto_save(tolerate=-1)


def test_train_inside_of_train():
    handler = make()
    handler.add_callback(lambda handler, metrics: train(handler))
    with pytest.raises(StateError, match="inside of train"):
        train(handler)
    handler.callbacks.clear()
    assert train(handler).epoch == 2


def test_other_wrong_arguments(tmp_path):
    handler = make()
    with pytest.raises(StateError, match="no such module"):
        handler.freeze_module(["body"])
    with pytest.raises(StateError, match="Invalid seed"):
        handler.seed(1 << 70)
    with pytest.raises(StateError, match="has no suffix"):
        handler.save_multi_files(tmp_path / "a.pth")
    handler.save(tmp_path / "b.pth")
    with pytest.raises(StateError, match="has no suffix"):
        NNHandler.save_multi_from_single(tmp_path / "b.pth", tmp_path / "c.safetensors")
    with pytest.raises(StateError, match="Unknown parallel_options for ddp"):
        NNHandler(Body, parallel_options={"find_unused": True})
    for wrong in ({"objects": 3}, {"metrics": [3]}, {"model_class": "Body"}):
        with pytest.raises(StateError):
            NNHandler.load(tmp_path / "b.pth", **wrong)
    with pytest.raises(StateError, match="Invalid interval"):
        ModelCheckpoint(tmp_path, interval=0)
    with pytest.raises(LoadMismatchError, match="no averaged weights"):
        NNHandler.initialize_from_checkpoint(tmp_path / "b.pth", Body, ema=True)
    with pytest.raises(LoadMismatchError, match="no weights with this prefix"):
        NNHandler.initialize_from_checkpoint(tmp_path / "b.pth", Body, prefix="encoder")


def test_plots_go_where_they_are_asked_to(tmp_path):
    pytest.importorskip("matplotlib")
    handler = train(make())
    handler.plot_history(tmp_path / "new" / "loss.svg", "loss")
    assert os.listdir(tmp_path / "new") == ["loss.svg"]
    with pytest.raises(StateError, match="does not write this format"):
        handler.plot_history(tmp_path / "loss.odd")


@pytest.mark.parametrize("name", ["loss", "lr", "epoch", "val_a", "", 3])
def test_names_of_logged_values(name):
    handler = make()
    handler.set_training_step(lambda handler, batch: handler.log(name, 1.0))
    with pytest.raises(StateError, match=r"name of (this|a) metric"):
        train(handler)
    handler.set_training_step(
        lambda handler, batch: {"loss": handler.model(batch[0]).mean(), name or "lr_a": 1.0}
    )
    if name != "loss":
        with pytest.raises(StateError, match=r"name of (this|a) metric"):
            train(handler)


def test_two_values_of_one_name():
    def loss(outputs, targets):
        found = nn.functional.cross_entropy(outputs, targets)
        return {"loss": found, "share": found}

    class Logs(Callback):
        def on_step_end(self, handler, loss):
            handler.log("share", loss)

    handler = make()
    handler.set_loss_fn(loss)
    handler.add_callback(Logs())
    with pytest.raises(StateError, match="'share' is a term of the loss and a logged value"):
        train(handler)
    handler.remove_callback(Logs)
    assert train(handler).history["share"] == handler.history["loss"]
    handler.add_metric("share", lambda outputs, targets: 0.5)
    with pytest.raises(StateError, match="'share' is a metric and a term of the loss"):
        train(handler)


class Moves(nn.Module):
    where = None

    def to(self, device):
        self.where = device
        return self


def test_arguments_of_a_loss_are_on_the_device():
    handler, part = make(), Moves()
    array = np.ones(2)
    handler.set_loss_fn(distilled, teacher=part, array=array)
    assert part.where == handler.device
    assert handler.loss_arguments["array"] is array


def test_a_warning_says_that_metrics_got_no_outputs():
    handler = make()
    handler.add_metric("share", lambda outputs, targets: 0.5)
    handler.set_training_step(lambda handler, batch: handler.model(batch[0]).mean())
    with pytest.warns(UserWarning, match="the metrics share are not computed"):
        train(handler)
    handler.warned.clear()
    handler.set_training_step(lambda handler, batch: handler.update(handler.model(batch[0]).mean()))
    with pytest.warns(UserWarning, match="the metrics share are not computed"):
        train(handler)


def test_a_warning_names_hooks_of_other_libraries():
    class Other(Callback):
        def on_train_epoch_end(self, trainer, module):
            raise AssertionError

    with pytest.warns(UserWarning, match="never called: on_train_epoch_end"):
        make().add_callback(Other())


# Data


def test_arrays_are_inputs():
    handler = make()
    expected = handler.predict(X[:5])
    arrays = X[:5].numpy()
    assert torch.equal(handler.predict(arrays), expected)
    assert torch.equal(handler.predict({"x": arrays}), expected)
    torch.testing.assert_close(handler.predict(arrays[::-1]), expected.flip(0))
    assert torch.equal(handler.predict(iter([arrays, arrays])), expected.repeat(2, 1))
    handler.set_train_loader([(X[:8].numpy(), Y[:8].numpy())] * 2)
    assert train(handler).step == 2

    def step(handler, batch):  # a step of one's own gets the batch as it is
        assert type(batch[0]) is np.ndarray
        return handler.model(torch.as_tensor(batch[0])).mean()

    handler.set_training_step(step)
    handler.val_data = None
    train(handler)


@pytest.mark.parametrize("options", [{}, {"batch_size": 8}])
def test_tensors_in_place_of_a_dataset(options):
    handler = make()
    for act in (handler.set_train_loader, handler.set_val_loader, handler.evaluate):
        for data in ((X, Y), [X.numpy(), Y.numpy()]):
            with pytest.raises(StateError, match="TensorDataset"):
                act(data, **options)
        with pytest.raises(StateError, match="A dict was given"):
            act({"train": DS}, **options)
    with pytest.raises(StateError, match="A dict was given"):
        handler.predict({"x": X}, batch_size=8)
    assert handler.predict([X[0], X[1]], batch_size=2).shape == (2, 3)
    images = [torch.ones(3, 4), torch.ones(3, 5)]  # of other sizes, one by one
    handler.set_val_loader(images, batch_size=1)


class Ragged(nn.Module):
    def forward(self, inputs):
        return inputs[:, : len(inputs)]


def test_outputs_of_several_shapes():
    handler = NNHandler(Ragged, device="cpu")
    with pytest.raises(StateError, match=r"\(2, 2\), \(1, 1\)"):
        handler.predict(TensorDataset(X[:3]), batch_size=2)


class Optional(nn.Module):
    """A model with arguments that may be left out."""

    def forward(self, x, scale=None, shift=None):
        return x * (1 if scale is None else scale) + (0 if shift is None else shift)


def test_targets_are_no_inputs_of_a_model_with_optional_arguments():
    handler = NNHandler(Optional, device="cpu")
    ones = torch.ones(96, 1)
    assert torch.equal(handler.predict(TensorDataset(X, Y), batch_size=7), X)
    assert torch.equal(handler.predict(TensorDataset(X, 2 * ones, Y), batch_size=7), 2 * X)
    found = handler.predict(TensorDataset(X, 2 * ones, ones, Y), batch_size=7)
    assert torch.equal(found, 2 * X + 1)


class Records(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x)


def of_dict(outputs, batch):
    return nn.functional.cross_entropy(outputs, batch["labels"])


def test_a_loss_gets_the_full_dict():
    samples = [{"x": x, "labels": y, "name": "a"} for x, y in DS]
    handler = NNHandler(Records, device="cpu")
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_loss_fn(of_dict)
    handler.set_train_loader(samples, batch_size=16)
    assert train(handler).step == 6


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


def test_streams_are_data():
    assert make().predict(Stream(), batch_size=5).shape == (96, 3)
    assert isinstance(make().predict(np.ones((2, 4), "float32")), torch.Tensor)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_stream_has_a_progress_bar(monkeypatch):
    pytest.importorskip("tqdm")
    handler = make()
    handler.set_train_loader(DataLoader(Stream(), batch_size=16))
    monkeypatch.setattr(sys, "stderr", Terminal())
    handler.train(1)
    assert "6step" in sys.stderr.getvalue()


# Paths


def test_a_folder_of_checkpoints_is_not_one(tmp_path):
    handler = make()
    handler.auto_save(save_path=tmp_path / "runs")
    train(handler, 2)
    os.utime(tmp_path / "runs" / "epoch1", (1, 1))
    acts = [NNHandler.load, handler.restore]
    for act in acts:
        with pytest.raises(NotACheckpointError, match="epoch1, epoch2") as error:
            act(tmp_path / "runs")
        assert str(tmp_path / "runs" / "epoch2") in error.value.remedy
    with pytest.raises(NotACheckpointError, match="pass one of them, such as"):
        NNHandler.initialize_from_checkpoint(tmp_path / "runs", Body)
    handler.save(tmp_path / "files" / "a.pth")
    with pytest.raises(NotACheckpointError, match=r"a\.pth"):
        NNHandler.load(tmp_path / "files")
