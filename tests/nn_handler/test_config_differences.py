"""A resume refuses other parts than the checkpoint has, and warns of other options."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardckpt import NNHandler, errors
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
