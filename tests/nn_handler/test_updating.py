"""The features that users of Lightning, Keras and the Trainer expect beside training itself."""

from __future__ import annotations

import csv
import io
import math
import os
import sys
import types

import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

import shardckpt
from shardckpt import NNHandler, errors
from shardckpt.nn_handler import (
    Callback,
    CSVLogger,
    ExperimentLogger,
    LearningRateMonitor,
    LogFile,
    ModelCheckpoint,
    TensorBoardLogger,
    progress,
)
from tests.nn_handler.models import NormNet, a_handler, accuracy, data, same, weights, with_data


def quiet(handler: NNHandler, epochs: int | None = 1, **options) -> NNHandler:
    handler.train(epochs, progress_bar=False, **options)
    return handler


def resumed_alike(handler: NNHandler, path, *prepare, **options) -> NNHandler:
    """Load a handler, train both for an epoch, and compare them bit by bit."""
    handler.save(path)
    loaded = with_data(NNHandler.load(path))
    for act in prepare:
        act(loaded)
    continued_alike(handler, loaded, **options)
    return loaded


def continued_alike(handler: NNHandler, loaded: NNHandler, **options) -> None:
    """Train both, from the random numbers that the load has set, and compare them."""
    random = torch.get_rng_state()
    for each in (handler, loaded):
        torch.set_rng_state(random)
        quiet(each, **options)
    assert same(weights(loaded), weights(handler))
    assert loaded.history == handler.history


# Several optimizers


class GAN(nn.Module):
    """A container of two networks, without a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def gan_step(handler, batch):
    real, _ = batch
    model, entropy = handler.module, nn.functional.binary_cross_entropy_with_logits
    made = model.generator(torch.randn(len(real), 2, device=real.device))
    ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
    true, false = model.discriminator(real), model.discriminator(made.detach())
    handler.update(entropy(true, ones) + entropy(false, zeros), "discriminator")
    handler.update(entropy(model.discriminator(made), ones))


def a_gan(parallel: str = "auto") -> NNHandler:
    torch.manual_seed(0)
    handler = NNHandler(GAN, parallel=parallel)
    handler.set_optimizer(torch.optim.Adam, params="generator", lr=0.01)
    handler.set_optimizer(torch.optim.SGD, name="discriminator", params="discriminator", lr=0.1)
    handler.set_scheduler(
        torch.optim.lr_scheduler.StepLR, optimizer="discriminator", step_size=1, gamma=0.5
    )
    handler.set_training_step(gan_step)
    return with_data(handler)


@pytest.mark.parametrize("name", ["c", "c.pth", "c.safetensors"])
def test_a_gan_trains_two_optimizers_and_resumes(tmp_path, name):
    handler = quiet(a_gan(), ema_decay=0.9, gradient_clipping_norm=1.0)
    assert set(handler.history) >= {"loss", "loss_discriminator", "val_loss", "lr_discriminator"}
    handler.save(tmp_path / name)
    loaded = with_data(NNHandler.load(tmp_path / name))
    with pytest.raises(errors.StateError, match="set_training_step"):
        quiet(loaded)
    loaded.set_training_step(gan_step)
    continued_alike(handler, loaded, epochs=2)
    assert handler.history["lr_discriminator"] == [0.1, 0.05, 0.025]


def named_step(handler, batch):
    """Both optimizers have names of their own."""
    inputs, targets = batch
    loss = nn.functional.cross_entropy(handler.module(inputs), targets)
    handler.update(loss, "first")
    handler.update(nn.functional.cross_entropy(handler.module(inputs), targets), "second")


def test_optimizers_of_which_none_is_the_main_one(tmp_path):
    handler = a_handler()
    handler.optimizations.clear()
    handler.set_optimizer(torch.optim.SGD, name="first", params="layers", lr=0.1)
    handler.set_optimizer(torch.optim.SGD, name="second", params="head", lr=0.1)
    handler.set_training_step(named_step)
    handler.metrics.clear()
    handler.auto_save(save_path=tmp_path, keep_best=1, monitor="val_loss_second")
    history = quiet(handler, 2).history
    losses = {"loss_first", "loss_second"}
    assert set(history) == losses | {f"val_{n}" for n in losses} | {"lr_first", "lr_second"}
    assert all(math.isfinite(value) for values in history.values() for value in values)
    assert handler.best_path.endswith("epoch2")


def test_a_resume_of_two_optimizers_compares_them(tmp_path):
    handler = a_gan()
    handler.auto_save(save_path=tmp_path, resume="auto")
    quiet(handler)
    again = a_gan()
    again.auto_save(save_path=tmp_path, resume="auto")
    assert quiet(again, 2).epoch == 2
    other = a_gan()
    with pytest.warns(UserWarning, match="scheduler starts again"):
        other.set_optimizer(torch.optim.Adam, name="discriminator", params="discriminator")
    other.auto_save(save_path=tmp_path, resume="auto")
    with pytest.raises(errors.LoadMismatchError, match="another optimizer"):
        quiet(other, 2)


def test_a_step_of_ones_own_that_does_nothing_is_an_error():
    handler = a_gan()
    handler.set_training_step(lambda handler, batch: None)
    with pytest.raises(errors.StateError, match=r"did not call handler\.update"):
        quiet(handler)
    handler.set_training_step(lambda handler, batch: gan_step(handler, batch) or torch.ones(()))
    with pytest.raises(errors.StateError, match="returned a loss too"):
        quiet(handler)
    handler.set_training_step(gan_step)
    with pytest.raises(errors.StateError, match="accumulate"):
        quiet(handler, gradient_accumulation_steps=2)
    with pytest.raises(errors.StateError, match="outside of training"):
        handler.update(torch.ones(()))
    with pytest.raises(errors.StateError, match="no optimizer of this name"):
        handler.update(torch.ones(()), "critic")


def test_muon_beside_adamw(tmp_path):
    handler = a_handler()
    handler.optimizations.clear()
    handler.set_optimizer(
        torch.optim.Muon, params=lambda name, p: p.ndim == 2 and "head" not in name, lr=0.02
    )
    handler.set_optimizer(
        torch.optim.AdamW, name="rest", groups={"*.bias": {"weight_decay": 0.0}}, lr=0.01
    )
    assert [len(g["params"]) for g in handler.optimizers["rest"].param_groups] == [1, 3]
    with pytest.raises(errors.StateError, match="Two optimizers would hold"):
        handler.set_optimizer(torch.optim.SGD, name="third", params="head", lr=0.1)
    with pytest.raises(errors.StateError, match="would have no parameter"):
        handler.set_optimizer(torch.optim.SGD, name="third", lr=0.1)
    quiet(handler)
    loaded = resumed_alike(handler, tmp_path / "c")
    assert set(loaded.optimizers) == {"main", "rest"}
    assert set(loaded.history) >= {"lr", "lr_rest", "lr_rest_1"}
    loaded.set_optimizer(torch.optim.AdamW, name="rest", lr=0.5)
    with pytest.warns(UserWarning, match=r"rest\.optimizer lr"):
        loaded.restore(tmp_path / "c")


def test_lbfgs_trains_and_resumes(tmp_path):
    handler = a_handler()
    handler.optimizations.clear()
    handler.set_optimizer(torch.optim.LBFGS, lr=0.5, max_iter=4)
    before = float(quiet(handler).history["loss"][0])
    resumed_alike(handler, tmp_path / "c")
    assert handler.history["loss"][-1] < before
    assert handler.step == 12
    with pytest.raises(errors.StateError, match="a nan_guard"):
        quiet(handler, nan_guard="skip")


# Losses, modules and metrics


def scaled(outputs, targets, scale=1.0, epoch=None):
    factor = scale if epoch is None else scale * (epoch + 1)
    return factor * nn.functional.cross_entropy(outputs, targets)


def test_arguments_of_the_loss_and_the_epoch(tmp_path):
    handler = a_handler()
    handler.set_loss_fn(scaled, scale=2.0, pass_epoch_to_loss=True)
    plain = handler.evaluate(data(15), batch_size=4)["loss"]
    quiet(handler)
    loaded = resumed_alike(handler, tmp_path / "c")
    assert (loaded.loss_arguments, loaded.passes_epoch) == ({"scale": 2.0}, True)
    handler = a_handler()
    handler.set_loss_fn(scaled)
    assert plain == pytest.approx(2 * handler.evaluate(data(15), batch_size=4)["loss"])


def test_a_module_that_is_kept_in_evaluation(tmp_path):
    handler = NNHandler(NormNet)
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    handler.keep_eval_on_module("body.1")
    quiet(with_data(handler))
    assert handler.module.body[1].num_batches_tracked == 0
    loaded = resumed_alike(handler, tmp_path / "c")
    assert loaded.module.body[1].num_batches_tracked == 0
    assert loaded.module.body[1].weight.requires_grad
    loaded.keep_eval_on_module("body.1", keep=False)
    assert quiet(loaded).module.body[1].num_batches_tracked > 0
    with pytest.raises(errors.StateError, match="no such module"):
        loaded.keep_eval_on_module("neck")


def f1(outputs, targets):
    guessed, true = outputs.argmax(1) == 1, targets == 1
    return 2 * (guessed & true).sum() / (guessed.sum() + true.sum()).clamp(min=1)


class Stop(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, handler, loss):
        if handler.step == self.step:
            raise ValueError("planted")


def test_a_metric_of_a_whole_epoch_gets_all_outputs_at_once(tmp_path):
    def job(folder, stop):
        handler = a_handler()
        handler.add_metric("f1", f1, whole_epoch=True)
        handler.add_callback(Stop(stop))
        handler.auto_save(save_path=folder, interval=-1, resume="auto")
        return handler

    never = quiet(job(tmp_path / "a", 0), 2)
    inputs, targets = data(15).tensors
    assert never.history["val_f1"][-1] == pytest.approx(float(f1(never.predict(inputs), targets)))
    with pytest.raises(ValueError, match="planted"):
        quiet(job(tmp_path / "b", 9), 2)
    resumed = quiet(job(tmp_path / "b", 0), 2)  # in the middle of an epoch
    assert resumed.history == never.history
    loaded = NNHandler.load(tmp_path / "a" / "epoch2")
    assert loaded.whole_epoch == ["f1"]


class OwnObject:
    """A metric with update, compute and reset, without support for several ranks."""

    def __init__(self) -> None:
        self.reset()

    def reset(self):
        self.seen = 0

    def update(self, outputs, targets):
        self.seen += len(targets)

    def compute(self):
        return self.seen


# Guards


class NotFinite(nn.Module):
    """The loss of the fifth call is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, outputs, targets):
        self.calls += 1
        factor = math.nan if self.calls == 5 else 1.0
        return nn.functional.cross_entropy(outputs, targets) * factor


class Watch(Callback):
    """Keeps the weights after each step."""

    def __init__(self) -> None:
        self.seen = {}

    def on_step_end(self, handler, loss):
        self.seen[handler.step] = weights(handler)


def test_the_nan_guard_goes_back_to_the_last_checkpoint(tmp_path):
    handler = a_handler()
    handler.set_loss_fn(NotFinite())
    with pytest.raises(errors.StateError, match="needs checkpoints"):
        quiet(handler, nan_guard="restore")
    handler.auto_save(save_path=tmp_path, every_steps=3)
    handler.set_scheduler(torch.optim.lr_scheduler.StepLR, interval="step", step_size=1, gamma=0.5)
    rate = LearningRateMonitor()
    handler.add_callback(rate)
    watch = Watch()
    handler.add_callback(watch)
    with pytest.warns(UserWarning, match="the weights of the last checkpoint are loaded"):
        quiet(handler, nan_guard="restore", validate_every=0)
    assert handler.step == 6
    assert same(watch.seen[5], watch.seen[3])  # of step 3, which was saved
    assert not same(watch.seen[6], watch.seen[5])
    steps = [0.01 * 0.5**step for step in (1, 2, 3, 4, 4, 5)]  # the fifth step was skipped
    assert [found for (found,) in rate.rates] == pytest.approx(steps)
    assert all(torch.isfinite(w).all() for w in weights(handler).values())


class Damaged(TensorDataset):
    """Some samples are NaN."""

    def __init__(self, samples: list[int]) -> None:
        inputs, targets = data().tensors
        inputs[samples] = math.nan
        super().__init__(inputs, targets)


def a_norm_net(dataset) -> NNHandler:
    torch.manual_seed(0)
    handler = NNHandler(NormNet)
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    handler.add_metric("accuracy", accuracy)
    handler.set_train_loader(dataset, batch_size=8)
    return handler


@pytest.mark.parametrize("batches", [1, 2])
def test_a_step_that_is_skipped_leaves_no_trace(batches):
    """As if its batches were not there, whichever of them is not finite."""
    handler, options = a_norm_net(Damaged([17])), {"gradient_accumulation_steps": batches}
    with pytest.warns(UserWarning, match="the step is skipped"):
        quiet(handler, nan_guard="skip", ema_decay=0.9, **options)
    left = [sample for sample in range(48) if not 16 <= sample < 16 + 8 * batches]
    without = quiet(a_norm_net(Subset(data(), left)), **options)
    assert same(weights(handler), weights(without))
    assert handler.history == without.history
    assert all(torch.isfinite(average).all() for average in handler.ema.weights.values())


class Root(nn.Module):
    """Its loss is 0 in the first step, and the gradient is infinite or NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, inputs):
        return self.weight.abs().sqrt() + 0 * inputs[:, :1]


@pytest.mark.parametrize("guard", ["skip", "stop"])
def test_the_nan_guard_looks_at_gradients(guard):
    handler = NNHandler(Root)
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_loss_fn(nn.MSELoss())
    handler.set_train_loader(TensorDataset(torch.ones(8, 4), torch.zeros(8, 1)), batch_size=4)
    if guard == "skip":
        with pytest.warns(UserWarning, match=r"A gradient of step [12] is not finite"):
            quiet(handler, nan_guard=guard)
    else:
        with pytest.raises(errors.StateError, match="A gradient is not finite"):
            quiet(handler, nan_guard=guard)
    assert handler.module.weight.item() == 0


def test_mistakes_in_validation_show_before_training():
    handler = a_handler()
    handler.add_metric("wrong", lambda outputs, targets: 1 / int(handler.model.training))
    with pytest.raises(ZeroDivisionError):
        quiet(handler)
    assert handler.step == 0
    handler = a_handler()
    once = quiet(handler, sanity_val_batches=0)
    assert quiet(a_handler()).history == once.history  # nothing of it is left


# Loggers


def test_loggers_by_step_and_epoch(tmp_path):
    class Tracker:
        def __init__(self) -> None:
            self.logged = []

        def log(self, metrics, step):
            self.logged.append((step, set(metrics)))

    tracker = Tracker()
    handler = a_handler()
    handler.add_callback(CSVLogger(tmp_path / "log.csv", every_steps=2))
    handler.add_callback(TensorBoardLogger(tmp_path / "board", every_steps=3))
    handler.add_callback(LogFile(tmp_path / "train.log", every_steps=3))
    handler.add_callback(ExperimentLogger(tracker, every_steps=4))
    quiet(handler, 2)
    assert [step for step, _ in tracker.logged] == [4, 6, 8, 12, 12]
    assert tracker.logged[0][1] == {"epoch", "step/loss", "step/lr"}
    assert "val_accuracy" in tracker.logged[1][1]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "log.steps.csv").read_text())))
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8, 10, 12]
    text = (tmp_path / "train.log").read_text()
    assert text.count("val_loss") == 2
    assert "training ends" in text
    assert os.listdir(tmp_path / "board")
    with pytest.warns(UserWarning, match=r"callbacks\.3\.args\.0"):
        handler.save(tmp_path / "c")
    given = {"callbacks.3.args.0": tracker}
    loaded = with_data(NNHandler.load(tmp_path / "c", objects=given, confirm=True))
    quiet(loaded)
    assert tracker.logged[-1][0] == 18
    rows = list(csv.DictReader(io.StringIO((tmp_path / "log.steps.csv").read_text())))
    assert [int(row["step"]) for row in rows] == list(range(2, 19, 2))
    with pytest.raises(errors.StateError, match="log_metrics"):
        ExperimentLogger(object())


# Links, names and files


def test_links_to_the_last_and_the_best(tmp_path):
    handler = a_handler()
    handler.auto_save(
        save_path=tmp_path / "a", keep_best=1, keep_last=1, monitor="lr", mode="max", links=True
    )
    quiet(handler, 3)  # the highest rate is that of epochs 1 and 2
    assert sorted(os.listdir(tmp_path / "a")) == ["best", "epoch2", "epoch3", "last"]
    assert os.readlink(tmp_path / "a" / "last") == "epoch3"
    assert NNHandler.load(tmp_path / "a" / "best").epoch == 2
    assert handler.best_path == str(tmp_path / "a" / "epoch2")
    handler = a_handler()
    handler.add_callback(ModelCheckpoint(tmp_path / "b", name="e{epoch}.pth", links=True))
    quiet(handler, 2)
    assert os.path.realpath(tmp_path / "b" / "best.pth") == handler.best_path
    with pytest.raises(errors.StateError, match="save_last"):
        handler.auto_save(save_path=tmp_path, save_last=True, links=True)


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.onnx", "model.pth.tar"])
def test_an_unknown_suffix_is_an_error(tmp_path, name):
    handler = a_handler()
    for call in (
        lambda: handler.save(tmp_path / name),
        lambda: handler.auto_save(save_path=tmp_path, name=name),
    ):
        with pytest.raises(errors.StateError, match="Unknown suffix"):
            call()
    assert os.listdir(tmp_path) == []
    handler.save(tmp_path / "loss_0.1234")
    assert os.listdir(tmp_path) == ["loss_0.1234"]


def test_some_components_in_files(tmp_path):
    handler = quiet(a_handler(), ema_decay=0.5)
    handler.save_multi_files(tmp_path / "c", keys_to_save=["model", "ema"])
    assert sorted(os.listdir(tmp_path / "c")) == ["components.json", "ema.pth", "model.pth"]
    from tests.nn_handler.models import Net

    made = NNHandler.initialize_from_checkpoint(tmp_path / "c", Net, width=6)
    assert same(weights(made), weights(handler))
    for wrong in (["modell"], "model"):
        with pytest.raises(errors.StateError, match="keys_to_save"):
            handler.save_multi_files(tmp_path / "d", keys_to_save=wrong)
    with pytest.raises(errors.NotACheckpointError, match="NNHandler"):
        NNHandler.load(tmp_path / "c")


@pytest.mark.parametrize("name", ["weights.ckpt", "pytorch_model.bin", "folder"])
def test_weights_of_other_programs(tmp_path, name):
    handler = a_handler()
    state = handler.module.state_dict()
    if name == "weights.ckpt":  # as Lightning writes it
        torch.save({"state_dict": {f"model.{n}": t for n, t in state.items()}}, tmp_path / name)
    elif name == "folder":  # as Hugging Face does
        from safetensors.torch import save_file

        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, tmp_path / name)
    from tests.nn_handler.models import Net

    made = NNHandler.initialize_from_checkpoint(tmp_path / name, Net, width=6)
    assert same(weights(made), weights(handler))


# Plots, summaries and progress


def test_plots_show_each_metric_by_epoch(tmp_path):
    handler = quiet(a_handler(), 4, validate_every=2)
    assert handler.history_epochs["val_loss"] == [2, 4]
    figure = handler.plot_history(tmp_path / "all.png")
    assert [axis.get_title() for axis in figure.axes] == ["loss", "accuracy", "lr"]
    lines = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
    assert lines == {"training": [1, 2, 3, 4], "validation": [2, 4]}
    assert handler.plot_losses(tmp_path / "loss.svg").axes[0].get_title() == "loss"
    assert sorted(os.listdir(tmp_path)) == ["all.png", "loss.svg"]
    with pytest.raises(errors.StateError, match="no such metric"):
        handler.plot_history(names=["nothing"])
    handler.save(tmp_path / "c")
    assert NNHandler.load(tmp_path / "c").history_epochs == handler.history_epochs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_progress_bar_in_a_terminal_and_in_a_file(monkeypatch):
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        monkeypatch.setattr(sys, "stderr", stream)
        a_handler().train(2, gradient_accumulation_steps=2)
    assert "/3 [" in terminal.getvalue()  # 6 batches
    assert "validation batch" in terminal.getvalue()
    lines = file.getvalue().splitlines()
    assert [line.split()[:3] for line in lines] == [["epoch", "1", "loss"], ["epoch", "2", "loss"]]
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)  # not installed
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert progress._tqdm() is None


def test_the_bar_of_a_notebook_needs_no_terminal(monkeypatch):
    kernel = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: kernel))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert progress._tqdm() is not None
    assert shardckpt.__version__


def test_a_loss_that_a_loader_of_tensors_gives():
    """A list of batches is data too; rates of all groups are in the history."""
    handler = NNHandler(nn.Linear, in_features=4, out_features=3)
    handler.set_optimizer(torch.optim.SGD, lr=0.1, groups={"bias": {"lr": 0.2}})
    handler.set_loss_fn(nn.CrossEntropyLoss())
    handler.set_train_loader([TensorDataset(*data(8).tensors)[:]] * 2)
    handler.add_metric("seen", OwnObject())
    quiet(handler)
    assert (handler.history["lr"], handler.history["lr_1"]) == ([0.1], [0.2])
    assert handler.history["seen"] == [16.0]
