"""A case for NNHandler.train: its steps beside those of a loop written by hand."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.bench import Bench
from benchmarks.ranks import Place
from benchmarks.rounds import RAW, Contestant, Results, compete
from benchmarks.table import Row, Target, row
from shardckpt import NNHandler

_STEPS, _BATCH, _WIDTH = 1000, 64, 256
_BY_HAND = f"{RAW}, a loop by hand"


class _Net(nn.Sequential):
    """A tiny model: a step takes a millisecond or two."""

    def __init__(self) -> None:
        layers = [layer for _ in range(3) for layer in (nn.Linear(_WIDTH, _WIDTH), nn.ReLU())]
        super().__init__(*layers, nn.Linear(_WIDTH, 10))


def _by_hand(place: Place, dataset: TensorDataset) -> Callable[[], object]:
    model: nn.Module = _Net()
    if place.world_size > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
    loss_fn = nn.CrossEntropyLoss()
    loader = DataLoader(dataset, batch_size=_BATCH)

    def epoch() -> float:
        total = torch.zeros(())
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return float(total)

    return epoch


def _trained(place: Place, dataset: TensorDataset) -> Callable[[], object]:
    whole = [
        tensor.repeat(place.world_size, *[1] * (tensor.dim() - 1)) for tensor in dataset.tensors
    ]
    handler = NNHandler(_Net, device="cpu")
    handler.set_optimizer(torch.optim.AdamW, lr=0.001)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    handler.set_train_loader(TensorDataset(*whole), batch_size=_BATCH)
    return lambda: handler.train(1, progress_bar=False)


def _job(place: Place, steps: int, rounds: int) -> Results:
    torch.set_num_threads(1)
    count = _BATCH * steps
    dataset = TensorDataset(torch.randn(count, _WIDTH), torch.randint(0, 10, (count,)))

    def measured(epoch: Callable[[], object]) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            start = time.perf_counter()
            epoch()
            return {"step_seconds": (time.perf_counter() - start) / steps}

        return run

    epochs = {_BY_HAND: _by_hand(place, dataset), "shardckpt": _trained(place, dataset)}
    contestants = [Contestant(name=name, run=measured(epoch)) for name, epoch in epochs.items()]
    return compete(place, contestants, rounds=rounds)


def trainer(bench: Bench) -> list[Row]:
    """NNHandler.train beside a loop by hand (raw), with a tiny model: a step on 1 rank and on 2."""
    rows = []
    for ranks in (1, 2):
        title = f"NNHandler.train: a step of a tiny model, {ranks} rank{'s' * (ranks > 1)}"
        results = bench.run(title, ranks, _job_of_bench)
        rows.append(row(title, "ms", results, Target(against=RAW, factor=1.05), of="step_seconds"))
    return rows


def _job_of_bench(place: Place, bench: Bench) -> Results:
    return _job(place, _STEPS, bench.rounds)
