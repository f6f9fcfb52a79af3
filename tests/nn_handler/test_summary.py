"""A handler as text."""

from __future__ import annotations

import torch
from torch import nn

from shardckpt import NNHandler
from shardckpt.nn_handler import EarlyStopping
from shardckpt.nn_handler.summary import summary
from tests.nn_handler.models import a_handler, accuracy, make, train


def test_a_summary_and_the_number_of_parameters():
    handler = make()
    handler.freeze_module("body")
    assert handler.count_parameters() == 67
    assert handler.count_parameters(trainable=True) == 27
    assert "head" in repr(handler)
    assert "67 parameters, 27 trainable" in repr(handler)


def test_a_new_handler_lists_its_model_alone():
    text = summary(NNHandler(nn.Linear, device="cpu", in_features=1024, out_features=1024))
    assert text.splitlines() == [
        "NNHandler(Linear, cpu, parallel=none)",
        f"  {'all':<41} 1,049,600 parameters, 1,049,600 trainable, 4.00 MiB",
        "  epoch 0, step 0",
    ]


def test_every_part_of_a_handler_has_its_line(tmp_path):
    handler = train(a_handler(), ema_decay=0.9)
    handler.add_callback(EarlyStopping("loss"))
    handler.auto_save(save_path=tmp_path)
    lines = summary(handler).splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["layers", "ModuleList"],
        ["head", "Linear"],
        ["dropout", "Dropout"],
    ]
    assert lines[5:] == [
        "  optimizer: Adam",
        "  scheduler: StepLR",
        "  loss: CrossEntropyLoss",
        "  metrics: accuracy",
        "  callbacks: EarlyStopping",
        "  ema: decay 0.9",
        f"  auto_saver: {tmp_path}",
        "  epoch 1, step 6",
    ]


def test_a_function_as_a_loss_has_its_own_name():
    handler = NNHandler(nn.Linear, device="cpu", in_features=1, out_features=1)
    handler.set_loss_fn(accuracy)
    handler.set_optimizer(torch.optim.SGD, params="weight", lr=0.1)
    handler.set_optimizer(torch.optim.Adam, name="rest", lr=0.1)
    text = summary(handler)
    assert "  optimizer: SGD, Adam\n" in text
    assert "  loss: accuracy\n" in text
    assert "scheduler" not in text
