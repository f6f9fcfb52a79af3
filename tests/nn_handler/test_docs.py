"""A script for NNHandler runs as it stands, with and without torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import run_script

EXAMPLE = """
import os
import torch
from torch import nn
from torch.utils.data import TensorDataset


class YourModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs):
        return self.layer(inputs)


inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
train_dataset = TensorDataset(inputs, inputs[:, :3].argmax(1))
val_dataset = train_dataset

from shardckpt import NNHandler

handler = NNHandler(model_class=YourModel,
                    device="cuda" if torch.cuda.is_available() else "cpu")
handler.set_optimizer(torch.optim.Adam, lr=0.001)
handler.set_loss_fn(torch.nn.CrossEntropyLoss())
handler.set_train_loader(train_dataset, batch_size=32)
handler.set_val_loader(val_dataset, batch_size=32)
handler.auto_save(interval=5, save_path="checkpoints",
                  name="model_epoch{epoch}_valloss{val_loss:.4f}",
                  overwrite=False)
handler.train(epochs=30, validate_every=1)
handler.save("models/final_model.pth")
loaded_handler = NNHandler.load(path="models/final_model.pth",
                                device="cuda" if torch.cuda.is_available() else "cpu")
assert loaded_handler.epoch == 30
assert loaded_handler.world_size == int(os.environ.get("WORLD_SIZE", "1"))
"""


def by_torchrun(ranks: int, script: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [*launch, str(ranks), script]
    done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [0, 1, pytest.param(2, marks=pytest.mark.long), 4])
def test_the_example_as_written(tmp_path, ranks):
    """torchrun itself starts 2; the others are forked, with its environment: importing torch
    takes longer than the training."""
    script = tmp_path / "script.py"
    script.write_text(EXAMPLE)
    if ranks == 2:
        by_torchrun(2, script)
    else:
        run_script(script, ranks=ranks)
    saved = sorted(p.name.partition("_valloss")[0] for p in (tmp_path / "checkpoints").iterdir())
    assert saved == sorted(f"model_epoch{epoch}" for epoch in range(5, 31, 5))
