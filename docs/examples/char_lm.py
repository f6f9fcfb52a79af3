"""A character language model on text that Python itself ships, on any number of ranks.

    python char_lm.py train OUT                        # one process
    torchrun --nproc-per-node 2 char_lm.py train OUT   # FSDP2; stop it, and run it again
    python char_lm.py write OUT                        # lets the best one write

The text is the licence and the help pages that come with the interpreter: nothing is downloaded.
"""

from __future__ import annotations

import pydoc_data.topics
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from shardckpt import CheckpointManager, NNHandler

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
CONTEXT = 64


class CharLM(nn.Module):
    """A small causal transformer over characters."""

    def __init__(self, width: int = 48, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), width)
        self.position = nn.Parameter(torch.zeros(CONTEXT, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.1, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        """Return logits [N, T, characters] for the successor of each character [N, T] (int64)."""
        length = characters.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=characters.device)
        hidden = self.embedding(characters) + self.position[:length]
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        return self.head(self.norm(hidden))


class Text(Dataset):
    """Pieces of a text, each with itself shifted by one character as the target."""

    def __init__(self, text: str) -> None:
        known = {character: number for number, character in enumerate(ALPHABET)}
        self.numbers = torch.tensor([known[c] for c in text if c in known])

    def __len__(self) -> int:
        return (len(self.numbers) - 1) // CONTEXT

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        piece = self.numbers[index * CONTEXT : (index + 1) * CONTEXT + 1]
        return piece[:-1], piece[1:]


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Nats a character."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def text(size: int) -> str:
    """So many characters of the interpreter's licence and help pages."""
    licence = Path(pydoc_data.topics.__file__).parents[1] / "LICENSE.txt"
    pages = [licence.read_text()] if licence.exists() else []
    return "\n".join([*pages, *pydoc_data.topics.topics.values()])[:size]


def train(out: Path, size: int) -> None:
    """Train until three epochs are complete."""
    characters = text(size)
    cut = len(characters) * 9 // 10
    handler = NNHandler(CharLM, parallel="fsdp", save_model_code=True)
    handler.set_optimizer(torch.optim.AdamW, lr=3e-3)
    handler.set_scheduler(
        torch.optim.lr_scheduler.CosineAnnealingLR, interval="step", T_max=3000, eta_min=1e-4
    )
    handler.set_loss_fn(cross_entropy)
    handler.set_train_loader(Text(characters[:cut]), batch_size=16, shuffle=True)
    handler.set_val_loader(Text(characters[cut:]), batch_size=32)
    handler.auto_save(
        save_path=out, every_steps=50, keep_last=1, keep_best=1, monitor="val_loss", resume="auto"
    )
    handler.train(epochs=3, gradient_clipping_norm=1.0, ema_decay=0.99, seed=1)


def write(out: Path, length: int = 200) -> str:
    """Return text by the model with the lowest validation loss."""
    saved = CheckpointManager(out, label=None).checkpoints()
    best = min(saved, key=lambda checkpoint: checkpoint.metrics.get("val_loss", float("inf")))
    handler = NNHandler.load(best.path, parallel="none")
    torch.manual_seed(0)
    characters = [0]
    with handler.ema_weights():
        for _ in range(length):
            logits = handler.predict(torch.tensor([characters[-CONTEXT:]]))[0, -1]
            characters.append(int(torch.multinomial(logits.softmax(-1), 1)))
    return "".join(ALPHABET[number] for number in characters)


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 200_000)
    else:
        print(write(Path(sys.argv[2])))
