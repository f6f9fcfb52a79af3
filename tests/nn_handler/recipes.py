"""Training recipes that people use NNHandler for, and their runs with kills and resumes.

Each recipe makes a handler and the options of `train`. tests/nn_handler/test_recipes.py runs a
short form, tests/frameworks/test_recipes.py every recipe in every layout with every signal.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from shardckpt import NNHandler
from shardckpt.nn_handler import Callback
from tests.nn_handler.models import GAN, accuracy, gan_step
from tests.ranks import start_ranks

EPOCHS = 2
Recipe = Callable[[str], tuple[NNHandler, dict[str, Any]]]


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# A convolutional network: BatchNorm, dropout, an average, mixed precision, ReduceLROnPlateau


class ConvNet(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.1), nn.Flatten()
        )
        self.head = nn.Linear(width * 36, 3)

    def forward(self, images):
        return self.head(self.body(images))


def conv(parallel: str) -> tuple[NNHandler, dict[str, Any]]:
    handler = NNHandler(ConvNet, parallel=parallel)
    handler.set_optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    handler.set_scheduler(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.5)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    handler.add_metric("accuracy", accuracy)
    images = numbers(64, 1, 8, 8)
    dataset = TensorDataset(images, images.flatten(1)[:, :3].argmax(1))
    handler.set_train_loader(dataset, batch_size=4, shuffle=True)
    handler.set_val_loader(dataset, batch_size=8)
    return handler, {"use_amp": True, "ema_decay": 0.9, "gradient_clipping_norm": 1.0}


# A language model of transformers: batches are dicts, the loss is part of the outputs


def small_llama(hidden: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        attn_implementation="eager",
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


class Texts(Dataset):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        self.tokens = torch.randint(0, 32, (48, 8), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index):
        tokens = self.tokens[index]
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def llama(parallel: str) -> tuple[NNHandler, dict[str, Any]]:
    handler = NNHandler(small_llama, parallel=parallel, hidden=16)
    handler.set_optimizer(
        torch.optim.AdamW, lr=0.01, groups={"*norm.weight": {"weight_decay": 0.0}}
    )
    handler.set_scheduler(
        torch.optim.lr_scheduler.OneCycleLR, max_lr=0.01, total_steps=EPOCHS * 24 + 1
    )
    handler.set_train_loader(Texts(), batch_size=2, shuffle=True)
    handler.set_val_loader(Texts(), batch_size=8)
    return handler, {"gradient_accumulation_steps": 2, "precision": "bf16"}


# A GAN: two optimizers, and a training step of one's own


def gan(parallel: str) -> tuple[NNHandler, dict[str, Any]]:
    handler = NNHandler(GAN, parallel=parallel)
    handler.set_optimizer(torch.optim.Adam, params="generator", lr=0.01)
    handler.set_optimizer(torch.optim.Adam, name="discriminator", params="discriminator", lr=0.01)
    handler.set_scheduler(torch.optim.lr_scheduler.StepLR, optimizer="discriminator", step_size=1)
    handler.set_training_step(gan_step)
    real = numbers(64, 4)
    handler.set_train_loader(TensorDataset(real, real), batch_size=4, shuffle=True)
    return handler, {"ema_decay": 0.9}


# A ranker: two inputs, and a loss module with a parameter that compares the batch with itself


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.item = nn.Linear(4, 8), nn.Linear(6, 8)

    def forward(self, query, item):
        return nn.functional.normalize(self.query(query)), nn.functional.normalize(self.item(item))


class InBatchLoss(nn.Module):
    def __init__(self, scale: float = 5.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, outputs, targets):
        query, item = outputs
        logits = self.scale * query @ item.T
        return nn.functional.cross_entropy(logits, torch.arange(len(query), device=query.device))


def ranker(parallel: str) -> tuple[NNHandler, dict[str, Any]]:
    handler = NNHandler(Towers, parallel=parallel)
    handler.set_loss_fn(InBatchLoss())
    handler.set_optimizer(torch.optim.AdamW, lr=0.01)
    dataset = TensorDataset(numbers(64, 4), numbers(64, 6, seed=3), torch.arange(64))
    handler.set_train_loader(dataset, batch_size=8, shuffle=True)
    handler.set_val_loader(dataset, batch_size=8)
    return handler, {}


RECIPES: dict[str, Recipe] = {"conv": conv, "llama": llama, "gan": gan, "ranker": ranker}


class Tell(Callback):
    """Tells the process that started the ranks how far they are, and goes slowly enough for it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_step_end(self, handler, loss):
        if handler.rank == 0:
            Path(self.path).write_text(str(handler.step))
            time.sleep(0.03)


def job(recipe: str, parallel: str, folder: str) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint in the folder if there is one."""
    torch.manual_seed(0)
    if parallel == "none":
        dist.destroy_process_group()
    handler, options = RECIPES[recipe](parallel)
    handler.add_callback(Tell(f"{folder}.step"))
    handler.auto_save(save_path=folder, every_steps=2, keep_last=3, resume="auto")
    handler.train(EPOCHS, seed=3, progress_bar=False, **options)
    found = {"history": handler.history, "step": handler.step, "epoch": handler.epoch}
    tensors = {**handler.module.state_dict(), **(handler.ema.weights if handler.ema else {})}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found[name] = whole.tolist()
    return found


def run(recipe: str, parallel: str, folder: Path, ranks: int) -> dict[str, Any]:
    """The result of a job that nobody kills."""
    results = start_ranks(ranks, job, recipe, parallel, str(folder)).wait(120)
    assert all(ok for ok, _ in results), results
    return results[0][1]


def kill(
    recipe: str, parallel: str, folder: Path, ranks: int, *, by: signal.Signals, at_step: int
) -> int:
    """Start a job and end it: every rank by SIGKILL, or one of them by SIGTERM; the last step."""
    tell = Path(f"{folder}.step")
    tell.unlink(missing_ok=True)
    job_ranks = start_ranks(ranks, job, recipe, parallel, str(folder))
    give_up_at = time.monotonic() + 100
    while not tell.exists() or int(tell.read_text() or 0) < at_step:
        assert time.monotonic() < give_up_at, "the job does not reach the step"
        assert any(process.is_alive() for process in job_ranks.processes), job_ranks.wait(1)
        time.sleep(0.005)
    for process in job_ranks.processes if by == signal.SIGKILL else job_ranks.processes[-1:]:
        os.kill(process.pid, by)
    results = job_ranks.wait(60)
    assert not any(ok for ok, _ in results), "the job ended before the signal"
    return int(tell.read_text())
