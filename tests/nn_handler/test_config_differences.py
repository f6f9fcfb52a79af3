"""A resume refuses other parts than the checkpoint has, and warns of other options."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardckpt import NNHandler, errors
from shardckpt.nn_handler.config_differences import (
    check_components,
    optimizers_of,
    own_parts,
    place_of,
    warn_of_loss,
    warn_of_options,
)
from shardckpt.nn_handler.saved import Config, checked
from tests.nn_handler.models import Net, a_gan, a_handler, make, train, with_data


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


def test_a_warning_names_changed_options_of_a_group(tmp_path):
    def job(epochs, rate):
        handler = make()
        handler.set_optimizer(torch.optim.SGD, lr=0.1, groups={"head": {"lr": rate}})
        handler.auto_save(interval=1, save_path=tmp_path, resume="auto")
        return train(handler, epochs)

    job(1, 0.5)
    with pytest.warns(UserWarning, match="optimizer group 1 lr: 0.5 in the checkpoint, 0.3 in"):
        assert job(2, 0.3).history["lr_1"] == [0.5, 0.5]


def test_a_resume_of_two_optimizers_compares_them(tmp_path):
    handler = a_gan()
    handler.auto_save(save_path=tmp_path, resume="auto")
    train(handler)
    again = a_gan()
    again.auto_save(save_path=tmp_path, resume="auto")
    assert train(again, 2).epoch == 2
    other = a_gan()
    with pytest.warns(UserWarning, match="scheduler starts again"):
        other.set_optimizer(torch.optim.Adam, name="discriminator", params="discriminator")
    other.auto_save(save_path=tmp_path, resume="auto")
    with pytest.raises(errors.LoadMismatchError, match="another optimizer"):
        train(other, 2)


def without_scheduler() -> NNHandler:
    handler = NNHandler(Net, width=6)
    handler.set_optimizer(torch.optim.Adam, lr=0.01)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    return with_data(handler)


def other_optimizer() -> NNHandler:
    handler = a_handler()
    with pytest.warns(UserWarning, match="scheduler starts again"):
        handler.set_optimizer(torch.optim.SGD, lr=0.01)
    return handler


@pytest.mark.parametrize(
    ("before", "after", "part"),
    [
        (a_handler, without_scheduler, "scheduler"),
        (without_scheduler, a_handler, "scheduler"),
        (a_handler, other_optimizer, "optimizer"),
    ],
)
def test_no_part_is_dropped_or_mixed_up_by_a_resume(tmp_path, before, after, part):
    before().save(tmp_path / "c")
    handler = after()
    with pytest.raises(errors.LoadMismatchError, match=f"another {part}"):
        handler.restore(tmp_path / "c")


def saved(handler: NNHandler) -> Config:
    return checked(handler.config(), Config, "config", path="c")


def test_the_parts_of_a_handler_have_the_places_that_a_checkpoint_has():
    handler = a_gan()
    parts = own_parts(handler.config())
    assert set(parts) == {
        "optimizer",
        "optimizers.discriminator.optimizer",
        "optimizers.discriminator.scheduler",
    }
    assert set(optimizers_of(saved(handler))) == {"main", "discriminator"}
    assert place_of("main", "scheduler") == "scheduler"
    assert place_of("discriminator", "scheduler") == "optimizers.discriminator.scheduler"
    without = NNHandler(Net)
    assert optimizers_of(saved(without)) == own_parts(without.config()) == {}


def test_the_same_parts_fit():
    check_components(a_gan().config(), saved(a_gan()), "c")
    check_components(NNHandler(Net).config(), saved(NNHandler(Net)), "c")


def test_the_error_names_the_part_and_both_classes():
    other = a_gan()
    other.optimizations["discriminator"].scheduler = None
    with pytest.raises(errors.LoadMismatchError, match="another scheduler than") as caught:
        check_components(other.config(), saved(a_gan()), "c")
    assert caught.value.tensor == "optimizers.discriminator.scheduler"
    assert (caught.value.expected, caught.value.actual) == (
        "none",
        "torch.optim.lr_scheduler:StepLR",
    )
    assert "skip_scheduler=True" in caught.value.remedy
    with pytest.raises(errors.LoadMismatchError, match="another optimizer than") as caught:
        check_components(a_handler().config(), saved(NNHandler(Net)), "c")
    assert caught.value.tensor is None
    assert (caught.value.expected, caught.value.actual) == ("torch.optim.adam:Adam", "none")


def test_classes_without_a_name_are_not_compared():
    def local(name: str) -> NNHandler:
        handler = NNHandler(Net)
        handler.set_optimizer(type(name, (torch.optim.SGD,), {}), lr=0.1)
        return handler

    check_components(local("One").config(), saved(local("Other")), "c")
    other = NNHandler(Net)
    other.set_optimizer(torch.optim.SGD, lr=0.1)
    with pytest.raises(errors.LoadMismatchError, match="another optimizer"):
        check_components(local("One").config(), saved(other), "c")


def with_options(rate: float, decay: float, gamma: float) -> NNHandler:
    handler = NNHandler(Net)
    groups = {"head.bias": {"weight_decay": decay}}
    handler.set_optimizer(torch.optim.SGD, params="head", groups=groups, lr=0.1)
    handler.set_optimizer(torch.optim.SGD, name="rest", lr=rate)
    handler.set_scheduler(torch.optim.lr_scheduler.ExponentialLR, optimizer="rest", gamma=gamma)
    return handler


def test_options_that_the_checkpoint_replaces_are_listed():
    ours, theirs = with_options(0.5, 0.0, 0.9), with_options(0.25, 0.125, 0.8)
    with pytest.warns(UserWarning, match="The checkpoint's options are used") as caught:
        warn_of_options(own_parts(ours.config()), saved(theirs), ours)
    (text,) = (str(one.message) for one in caught)
    for part in (
        "optimizer group 1 weight_decay: 0.125 in the checkpoint, 0.0 in the script",
        "optimizers.rest.optimizer lr: 0.25 in the checkpoint, 0.5 in the script",
        "optimizers.rest.scheduler gamma: 0.8 in the checkpoint, 0.9 in the script",
    ):
        assert part in text
    assert text.count(" in the checkpoint, ") == 3


def test_options_that_the_script_sets_anew_or_has_not_changed_are_not_listed():
    ours, theirs = with_options(0.5, 0.0, 0.9), with_options(0.25, 0.0, 0.9)
    warn_of_options(own_parts(theirs.config()), saved(theirs), theirs)
    ours.set_hyperparameters(optimizer="rest", lr=0.5)
    warn_of_options(own_parts(ours.config()), saved(theirs), ours)


def test_an_option_that_one_side_lacks_has_its_default():
    ours, theirs = NNHandler(Net), NNHandler(Net)
    ours.set_optimizer(torch.optim.SGD, lr=0.1)
    theirs.set_optimizer(torch.optim.SGD, lr=0.1, momentum=0.5)
    with pytest.warns(UserWarning, match="momentum: 0.5 in the checkpoint, 'its default' in"):
        warn_of_options(own_parts(ours.config()), saved(theirs), ours)


def loss(*weight: float, scale: float = 1.0) -> dict:
    handler = NNHandler(Net)
    handler.set_loss_fn(nn.CrossEntropyLoss(weight=torch.tensor(weight), label_smoothing=scale))
    return handler.config()["loss_fn"]


def test_tensors_of_a_loss_that_the_checkpoint_replaces_are_named_on_one_rank():
    warn_of_loss(loss(1.0, 2.0), loss(1.0, 2.0, scale=0.5), 0)
    warn_of_loss(loss(1.0, 2.0), loss(1.0, 3.0), 1)
    for other in (loss(1.0, 3.0), loss(1.0, 2.0, 3.0)):
        with pytest.warns(UserWarning, match="gets its tensors from the checkpoint: weight"):
            warn_of_loss(loss(1.0, 2.0), other, 0)
    warn_of_loss(None, loss(1.0), 0)
