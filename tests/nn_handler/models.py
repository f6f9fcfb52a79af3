"""Models, losses and data with importable names, as checkpoints need them."""

from __future__ import annotations

import collections

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from shardckpt import NNHandler, trust
from shardckpt.nn_handler import Callback

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


class Body(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, width), nn.ReLU())
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.body(x))


X = torch.randn(96, 4, generator=torch.Generator().manual_seed(3))


Y = X[:, :3].argmax(1)


DS = TensorDataset(X, Y)


def train(handler: NNHandler, epochs: int | None = 1, **options) -> NNHandler:
    handler.train(epochs, progress_bar=False, **options)
    return handler


def make(model=Body, **kwargs) -> NNHandler:
    torch.manual_seed(0)
    handler = NNHandler(model, device="cpu", **kwargs)
    handler.set_optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    handler.set_train_loader(DS, batch_size=16)
    handler.set_val_loader(DS, batch_size=16)
    return handler


def number():
    return 1


class FailAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, handler, loss):
        if handler.step == self.step:
            raise KeyError("planted")


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


Pair = collections.namedtuple("Pair", "a b")


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs, scale):
        return self.layer(inputs) * scale[:, None]


def f1(outputs, targets):
    guessed, true = outputs.argmax(1) == 1, targets == 1
    return 2 * (guessed & true).sum() / (guessed.sum() + true.sum()).clamp(min=1)


class Scaled(nn.Module):
    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.scale = scale / 2
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets) * self.scale * self.factor


def continued_alike(handler: NNHandler, loaded: NNHandler, **options) -> None:
    """Train both, from the random numbers that the load has set, and compare them."""
    random = torch.get_rng_state()
    for each in (handler, loaded):
        torch.set_rng_state(random)
        train(each, **options)
    assert same(weights(loaded), weights(handler))
    assert loaded.history == handler.history


def resumed_alike(handler: NNHandler, path, *prepare, **options) -> NNHandler:
    """Load a handler, train both for an epoch, and compare them bit by bit."""
    handler.save(path)
    loaded = with_data(NNHandler.load(path))
    for act in prepare:
        act(loaded)
    continued_alike(handler, loaded, **options)
    return loaded


def activation(inputs):
    return inputs.clamp(min=0)


class Block(nn.Module):
    def __init__(self, activation=functional.relu) -> None:
        super().__init__()
        self.activation = activation
        self.linear = nn.Linear(4, 3)

    def forward(self, inputs):
        return self.activation(self.linear(inputs))


class Count(Callback):
    epoch = 0

    def on_epoch_start(self, handler):
        Count.epoch = handler.epoch


def gan_step(handler, batch):
    real, _ = batch
    model, entropy = handler.module, nn.functional.binary_cross_entropy_with_logits
    made = model.generator(torch.randn(len(real), 2, device=real.device))
    ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
    true, false = model.discriminator(real), model.discriminator(made.detach())
    handler.update(entropy(true, ones) + entropy(false, zeros), "discriminator")
    handler.update(entropy(model.discriminator(made), ones))


class GAN(nn.Module):
    """A container of two networks, without a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


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
