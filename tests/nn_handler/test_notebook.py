"""NNHandler in a notebook that a real kernel runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

CELLS = [
    """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from shardckpt import NNHandler
torch.set_num_threads(1)
""",
    """
class Cell(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.linear = nn.Linear(4, width)
    def forward(self, x):
        return self.linear(x)
""",
    "%time print('a command of IPython')",
    """
def new(**options):
    handler = NNHandler(Cell, width=3, device="cpu", **options)
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    handler.set_train_loader(TensorDataset(inputs, inputs[:, :3].argmax(1)), batch_size=8)
    return handler
handler = new(save_model_code=True)
history = handler.train(2)
""",
    "handler",
    "%matplotlib inline\nfigure = handler.plot_losses(); figure",
    "handler.save('c'); assert NNHandler.load('c').epoch == 2",
]


@pytest.fixture
def kernel_spec(tmp_path, monkeypatch):
    """The kernel of this environment, wherever Jupyter is configured to look."""
    from ipykernel.kernelspec import install

    install(prefix=str(tmp_path / "jupyter"), kernel_name="here")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter" / "share" / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", str(Path(__file__).parents[2])]))
    return "here"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_notebook_trains_shows_and_saves(tmp_path, kernel_spec):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS])
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(
        book, timeout=200, kernel_name=kernel_spec, resources=resources
    ).execute()
    printed = ["".join(str(output) for output in cell.outputs) for cell in book.cells]
    assert "epoch 2  loss" in printed[3]
    assert "step/s" in printed[3] or "step [" in printed[3] or "epoch 1:" in printed[3]  # the bar
    assert "NNHandler(Cell" in printed[4]
    assert "image/png" in printed[5]
    assert "defined in a notebook" in printed[6]

    from shardckpt import NNHandler

    loaded = NNHandler.load(tmp_path / "c", device="cpu", trust_code=True)
    assert type(loaded.module).__name__ == "Cell"
    assert loaded.module.linear.out_features == 3
    assert "%time" not in loaded.model_code["__main__"]
    assert "handler = new" not in loaded.model_code["__main__"]
