"""A Trainer of transformers that saves and resumes with shardckpt.

    from shardckpt.integrations.transformers_trainer import Trainer

It takes the place of `transformers.Trainer`. For a subclass such as those of TRL:
`class MyTrainer(Shardckpt, SFTTrainer): ...`. Tested with transformers 5.24.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch
import transformers

from shardckpt import api
from shardckpt.coordination.exchange import exchange
from shardckpt.coordination.resolve import operation
from shardckpt.errors import NotACheckpointError
from shardckpt.integrations.transformers import load_pretrained, save_pretrained
from shardckpt.state.markers import PerRank
from shardckpt.state.mismatches import mismatch_remedy
from shardckpt.state.random_state import random_state, set_random_state
from shardckpt.storage.base import MANIFEST_NAME

__all__ = ["Shardckpt", "Trainer"]

_STATE = "trainer_state.json"
_OTHER_MODEL = (
    "build the Trainer with the model and the optimizer that were saved; or load the matching "
    'weights before a new training: shardckpt.load({"model": model}, path, strict=False)'
)


class Shardckpt:
    """Makes a Trainer save and resume with shardckpt: a base class to put before the Trainer's.

    `checkpoint-N` is a checkpoint of shardckpt: model, optimizer, scheduler, gradient scaler and
    the random-number state of every rank, beside the Trainer's trainer_state.json. Any number of
    ranks resumes it. For a PEFT model it holds the base too. `save_steps`, `save_total_limit`,
    `load_best_model_at_end` and `resume_from_checkpoint` work as before. With `save_only_model`,
    `checkpoint-N` is a folder of save_pretrained, as is the folder of `save_model`.
    """

    model: Any
    model_wrapped: Any
    args: Any
    state: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    processing_class: Any
    data_collator: Any

    def train(self, resume_from_checkpoint: Any = None, **options: Any) -> Any:
        """See Trainer.train. `resume_from_checkpoint=True` takes the newest complete checkpoint in
        `output_dir`. Without one, training begins anew."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = _newest(self.args.output_dir)
        self._random: Any = None
        return super().train(resume_from_checkpoint or None, **options)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See Trainer.save_model. Collective. Writes the files of save_pretrained. A folder that
        holds other files keeps them."""
        if _internal_call and output_dir is not None and not self.args.save_only_model:
            # for checkpoint-N, which must exist before the Trainer looks for the best one
            api.save(self._state(), output_dir, overwrite=True)
            return
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        folder = os.path.abspath(output_dir or self.args.output_dir)

        def is_shared(payloads: list[bytes]) -> bytes:
            return b"shared" if os.path.isdir(folder) and os.listdir(folder) else b""

        with operation(f"save_model {folder}") as ranks:
            shared = exchange(ranks, "begin", lambda: b"", is_shared)
        target = os.path.join(folder, ".saving") if shared else folder
        save_pretrained(self._in_ddp(), target, tokenizer, overwrite=True)
        if shared:
            with operation(f"save_model {folder}") as ranks:
                exchange(ranks, "commit", lambda: b"", lambda _: _move(target, folder))

    def _in_ddp(self) -> Any:
        """Return the model in its wrapper of DDP, which says that buffers of rank 0 are saved:
        those of batch norms differ between ranks."""
        is_ddp = isinstance(self.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        return self.model_wrapped if is_ddp else self.model

    def _state(self, *, optimizer: bool = True) -> dict[str, Any]:
        state: dict[str, Any] = {"model": self._in_ddp()}
        if not optimizer:
            return state
        scaler = getattr(self.accelerator, "scaler", None)
        return {
            **state,
            "optimizer": getattr(self.optimizer, "optimizer", self.optimizer),
            "scheduler": self.lr_scheduler,
            "scaler": scaler if scaler is not None else {},
            "random": PerRank(random_state()),
        }

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Do nothing: save_model has saved them."""

    def _save_scaler(self, output_dir: str) -> None:
        """Do nothing: save_model has saved it."""

    def _save_rng_state(self, output_dir: str) -> None:
        """Do nothing: save_model has saved it."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not _is_ours(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        elif not os.path.isfile(os.path.join(resume_from_checkpoint, _STATE)):
            raise NotACheckpointError(
                "The Trainer had not completed this checkpoint when it ended",
                path=resume_from_checkpoint,
                expected=f"a checkpoint of shardckpt and {_STATE}",
                actual=f"no {_STATE}",
                remedy="resume from an earlier one; resume_from_checkpoint=True finds it",
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not _is_ours(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        state = self._state()
        with mismatch_remedy(_OTHER_MODEL):
            api.load(state, checkpoint)
        random = state["random"]
        self._random = random.value if isinstance(random, PerRank) else random

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not _is_ours(checkpoint):
            super()._load_scaler(checkpoint)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or not _is_ours(checkpoint):
            super()._load_rng_state(checkpoint)  # type: ignore[misc]
        elif self._random is not None:
            set_random_state(self._random)

    def _load_best_model(self) -> None:
        path = self.state.best_model_checkpoint
        if _is_ours(path):
            with mismatch_remedy(_OTHER_MODEL):
                api.load(self._state(optimizer=False), path)
        elif self.args.save_only_model:
            load_pretrained(self.model, path)
        else:
            super()._load_best_model()  # type: ignore[misc]


class Trainer(Shardckpt, transformers.Trainer):
    """transformers' Trainer, which saves and resumes with shardckpt; see Shardckpt.

    Example:
        >>> from transformers import TrainingArguments
        >>> trainer = Trainer(model, TrainingArguments("run", save_steps=100), train_dataset=data)
        >>> trainer.train(resume_from_checkpoint=True)  # doctest: +SKIP
    """


def _is_ours(path: str) -> bool:
    return os.path.isfile(os.path.join(path, MANIFEST_NAME))


def _newest(folder: str) -> str | None:
    """Return the newest complete checkpoint of a Trainer."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    steps = sorted((int(n[11:]) for n in names if re.fullmatch(r"checkpoint-\d+", n)), reverse=True)
    paths = (os.path.join(folder, f"checkpoint-{step}") for step in steps)
    return next((path for path in paths if os.path.isfile(os.path.join(path, _STATE))), None)


def _move(source: str, target: str) -> bytes:
    """Move the files of save_pretrained into a folder, in place of those of an earlier save."""
    new = os.listdir(source)
    weights = r"(adapter_)?model(-\d{5,}-of-\d{5,})?\.safetensors(\.index\.json)?"
    for name in os.listdir(target):
        if re.fullmatch(weights, name) and name not in new:
            os.unlink(os.path.join(target, name))
    for name in sorted(new, key=lambda name: name.endswith(".index.json")):
        os.replace(os.path.join(source, name), os.path.join(target, name))
    os.rmdir(source)
    return b""
