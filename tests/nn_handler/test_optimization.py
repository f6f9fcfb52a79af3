"""Options of an optimizer change, and its schedule follows."""

from __future__ import annotations

import pytest
import torch

from tests.nn_handler.models import make, train


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
