"""Handwritten digits: trained on several ranks, resumed on fewer, used by one process.

    torchrun --nproc-per-node 4 digits.py train  OUT   # FSDP2, saves itself after each epoch
    torchrun --nproc-per-node 2 digits.py resume OUT   # the same job on two ranks
    python digits.py predict OUT                       # no process group

OUT is a folder; checkpoints are the folders in it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from shardckpt import NNHandler, open_checkpoint


class DigitNet(nn.Module):
    """A small convolutional network for images of 8 x 8."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.Linear(2 * width * 16, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [N, 10] of images [N, 1, 8, 8]."""
        return self.head(self.features(images).flatten(1))


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,797 real scans that come with scikit-learn: 1,500 to train on, the rest to test."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    targets = torch.tensor(labels)
    return TensorDataset(pixels[:1500], targets[:1500]), TensorDataset(
        pixels[1500:], targets[1500:]
    )


def accuracy(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """The share of right answers."""
    return (logits.argmax(1) == targets).float().mean().item()


def newest(out: Path) -> Path:
    """The checkpoint of the latest epoch."""
    return max(out.glob("epoch*"), key=lambda path: int(path.name.removeprefix("epoch")))


def main(task: str, out: Path) -> None:
    """Train, resume or predict."""
    torch.set_num_threads(1)  # the same order of additions everywhere: the same bits
    train_set, test_set = digits()
    images, targets = test_set.tensors
    reference = out / "logits.pt"
    start = time.perf_counter()
    if task == "train":
        handler = NNHandler(DigitNet, parallel="fsdp")
        handler.set_optimizer(torch.optim.AdamW, lr=2e-3)
        handler.set_loss_fn(nn.CrossEntropyLoss())
        handler.add_metric("accuracy", accuracy)
        handler.auto_save(interval=1, save_path=out, name="epoch{epoch}", overwrite=True)
    else:
        path = newest(out)
        resumes = task == "resume"  # and continues to save, with the settings of the checkpoint
        handler = NNHandler.load(path, parallel="fsdp" if resumes else "none", confirm=resumes)
        say(handler, f"loaded {path.name} in {time.perf_counter() - start:.2f} s")
        same = torch.equal(handler.predict(images), torch.load(reference, weights_only=True))
        say(handler, f"logits identical to those of the ranks that saved: {same}")
        if not same:
            sys.exit("the logits differ")
    if task == "predict":
        say(handler, f"accuracy {accuracy(handler.predict(images), targets):.4f}")
        with open_checkpoint(newest(out)) as checkpoint:
            say(
                handler,
                f"first row of the last layer, read alone: "
                f"{checkpoint['model.head.2.weight'][0, :4].tolist()}",
            )
        return
    handler.set_train_loader(train_set, batch_size=16, shuffle=True)
    handler.set_val_loader(test_set, batch_size=64)
    start = time.perf_counter()
    handler.train(epochs=4 if task == "train" else 2, progress_bar=True)
    say(handler, f"trained and saved in {time.perf_counter() - start:.2f} s")
    logits = handler.predict(images)
    say(handler, f"accuracy {accuracy(logits, targets):.4f}")
    if handler.rank == 0:
        torch.save(logits, reference)


def say(handler: NNHandler, text: str) -> None:
    """Print on one rank."""
    if handler.rank == 0:
        print(f"  {text}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
