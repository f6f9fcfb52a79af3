"""The page docs/nn_handler.md: every block of code on it runs, as does the example."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "nn_handler.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_block_of_the_page_runs(tmp_path):
    python = [code for kind, code in BLOCKS if kind == "python"]
    assert len(python) == 13
    (tmp_path / "page.py").write_text("\n".join(python))
    assert "class Classifier" in run([sys.executable, "page.py"], tmp_path)


def torchrun(ranks: int, script: str, folder: Path) -> str:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return run([*launch, str(ranks), script], folder)


@pytest.mark.ranks
def test_the_script_for_several_ranks(tmp_path):
    python = [code for kind, code in BLOCKS if kind == "python"]
    (console,) = [code for kind, code in BLOCKS if kind == "console"]
    (main,) = [code for code in python if code.startswith("# train.py")]
    setup = python[0].rpartition("\n\nhandler = ")[0]
    (tmp_path / "train.py").write_text(f"{setup}\n\n{main}")
    assert console == "torchrun --nproc-per-node 2 train.py\n"
    torchrun(2, "train.py", tmp_path)
    assert [p.name for p in (tmp_path / "runs" / "c").iterdir()] == ["epoch2"]


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


inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
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


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [0, 1, 2, 4])
def test_the_example_as_written(tmp_path, ranks):
    (tmp_path / "script.py").write_text(EXAMPLE)
    if ranks:
        torchrun(ranks, "script.py", tmp_path)
    else:
        run([sys.executable, "script.py"], tmp_path)
    saved = sorted(p.name.partition("_valloss")[0] for p in (tmp_path / "checkpoints").iterdir())
    assert saved == sorted(f"model_epoch{epoch}" for epoch in range(5, 31, 5))
