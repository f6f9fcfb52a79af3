"""Validation runs the model over all samples, and ends early when it must."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from torch.utils.data import Dataset

from tests.nn_handler.models import X, Y, make, train


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
