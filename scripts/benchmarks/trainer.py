"""What NNHandler.train costs a step, beside a bare loop over the same loader; one rank and two.

    PYTHONPATH=scripts:. python -m benchmarks.trainer [--steps 300] [--rounds 9]

Epochs of the bare loop and of the trainer take turns, so that both see the machine in one state.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from shardckpt import NNHandler
from tests.ranks import run_ranks

BATCH, WIDTH = 64, 256


class Net(nn.Sequential):
    """A tiny model: a step takes a millisecond or two."""

    def __init__(self) -> None:
        layers = [nn.Linear(WIDTH, WIDTH), nn.ReLU()] * 3
        super().__init__(*layers, nn.Linear(WIDTH, 10))


def bare_loop(loader: DataLoader, ranks: int) -> Callable[[], None]:
    """An epoch as people write it by hand."""
    model: nn.Module = Net()
    if ranks > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
    loss_fn = nn.CrossEntropyLoss()

    def epoch() -> None:
        total = torch.zeros(())
        for inputs, targets in loader:
            loss = loss_fn(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        float(total)

    return epoch


def trainer(dataset: TensorDataset) -> Callable[[], None]:
    handler = NNHandler(Net, device="cpu")
    handler.set_optimizer(torch.optim.AdamW, lr=0.001)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    handler.set_train_loader(dataset, batch_size=BATCH)
    return lambda: handler.train(1, progress_bar=False) and None


def measure(steps: int, rounds: int, ranks: int) -> list[float]:
    """(bare, trained) milliseconds a step, each a median, and the median of their ratio."""
    torch.set_num_threads(1)
    if ranks == 1:
        dist.destroy_process_group()
    count = BATCH * steps
    dataset = TensorDataset(torch.randn(count, WIDTH), torch.randint(0, 10, (count,)))
    loader = DataLoader(dataset, batch_size=BATCH)
    whole = TensorDataset(*(t.repeat(ranks, *[1] * (t.dim() - 1)) for t in dataset.tensors))
    contestants = {"bare": bare_loop(loader, ranks), "trained": trainer(whole)}
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, epoch in contestants.items():
            if ranks > 1:
                dist.barrier()
            begun = time.perf_counter()
            epoch()
            if number:  # the first one warms up
                taken[name].append((time.perf_counter() - begun) / steps * 1000)
    ratios = [b / a for a, b in zip(taken["bare"], taken["trained"], strict=True)]
    return [*(statistics.median(times) for times in taken.values()), statistics.median(ratios)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    for ranks in (1, 2):
        found = run_ranks(ranks, measure, options.steps, options.rounds, ranks, timeout_s=600)
        bare, trained, ratio = found[0]
        print(
            f"{ranks} ranks: bare loop {bare:.3f} ms a step, NNHandler {trained:.3f} ms, "
            f"{100 * (ratio - 1):+.1f}%",
            flush=True,
        )


if __name__ == "__main__":
    main()
