"""Models, losses and data with importable names, as checkpoints need them."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from shardckpt import NNHandler, trust

trust("tests.nn_handler")  # losses and metrics by name, also in ranks that tests start


class Net(nn.Module):
    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, width), nn.Linear(width, width)])
        self.head = nn.Linear(width, 3)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

    def forward(self, inputs):
        for layer in self.layers:
            inputs = self.dropout(torch.tanh(layer(inputs)) * self.scale)
        return self.head(inputs)


class NormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(self.body(inputs))


def accuracy(outputs, targets):
    return (outputs.argmax(1) == targets).float().mean()


def data(count: int = 48) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(count, 4, generator=generator)
    return TensorDataset(inputs, (inputs.sum(1) > 0).long() + (inputs[:, 0] > 1).long())


class Noisy(Dataset):
    """Data with random noise, drawn when a sample is fetched; `seen` are the samples fetched."""

    def __init__(self, count: int = 48) -> None:
        self.inner = data(count)
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index):
        self.seen.append(index)
        inputs, target = self.inner[index]
        return inputs + 0.1 * torch.randn(4), target


def decay(epoch: int) -> float:
    return 0.9**epoch


def schedule(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)


def a_handler(parallel: str = "auto", *, dropout: float = 0.0, **options) -> NNHandler:
    torch.manual_seed(0)
    handler = NNHandler(Net, parallel=parallel, width=6, dropout=dropout, **options)
    handler.set_optimizer(torch.optim.Adam, lr=0.01)
    handler.set_scheduler(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
    handler.set_loss_fn(nn.CrossEntropyLoss(label_smoothing=0.1))
    handler.add_metric("accuracy", accuracy)
    return with_data(handler)


def with_data(handler: NNHandler) -> NNHandler:
    handler.set_train_loader(data(), batch_size=8, shuffle=True)
    handler.set_val_loader(data(15), batch_size=4)
    return handler


def weights(handler: NNHandler) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in handler.module.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found[name] = whole.detach().clone()
    return found


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
