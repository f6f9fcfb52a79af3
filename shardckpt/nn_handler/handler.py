"""NNHandler: the calls that train, save and load what its parts make up."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from shardckpt.convert.single_files import FileFormat
from shardckpt.nn_handler import saving
from shardckpt.nn_handler.auto_saver import AutoSaver
from shardckpt.nn_handler.batch import to_device
from shardckpt.nn_handler.components import Parts
from shardckpt.nn_handler.initializing import fill_weights
from shardckpt.nn_handler.loading import LoadOptions, load, open_source, restore
from shardckpt.nn_handler.parallel import Parallel
from shardckpt.nn_handler.trainer import Trainer, TrainOptions
from shardckpt.plan.device_map import DeviceMap
from shardckpt.storage.paths import local_path

__all__ = ["NNHandler"]

Path = str | os.PathLike[str]


class NNHandler(Parts):
    """A model with its optimizer, scheduler, loss, loaders, metrics and callbacks.

    The same script runs under python and torchrun: `parallel` is "auto" (DDP where a launcher
    started several processes), "none", "ddp" or "fsdp" (FSDP2). `device_mesh` has a dimension
    "dp", "tp" or both, and `tp_plan` is that of parallelize_module. All ranks begin with rank
    0's weights. `device` is by default "cuda" where there is one. With `save_model_code`
    checkpoints hold the model's source (`model_code`).

    What a checkpoint holds is plain data: classes and functions are saved by their import
    names. What has none is warned of when saving, and asked for when loading, or training.
    """

    def auto_save(
        self,
        interval: int | None = 1,
        save_path: Path = "checkpoints",
        name: str = "epoch{epoch}",
        overwrite: bool = False,
        *,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        keep_last: int | None = None,
        keep_best: int | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_last: bool = False,
        on_exception: bool = True,
        on_signal: bool = True,
        asynchronous: bool = False,
        resume: Literal["auto"] | None = None,
    ) -> None:
        """Save while training; see SavePlan and AutoSaver for the arguments.

        The name's fields are `epoch`, `step`, `loss`, `lr`, `val_loss`, and every metric, also
        as `val_<metric>`; saves within an epoch are named `step<step>`.
        """
        arguments = {key: value for key, value in locals().items() if key != "self"}
        self.auto_saver = AutoSaver(**arguments)
        self._proposed.pop("auto_saver", None)

    def train(
        self,
        epochs: int,
        validate_every: int = 1,
        gradient_accumulation_steps: int = 1,
        use_amp: bool = False,
        gradient_clipping_norm: float | None = None,
        ema_decay: float = 0.0,
        seed: int | None = None,
        progress_bar: bool = True,
        save_on_last_epoch: bool = True,
    ) -> dict[str, list[float]]:
        """Train for so many epochs more; collective. Returns the history: metric -> values.

        `use_amp`: float16 with a gradient scaler on CUDA, bfloat16 on the CPU. `ema_decay` above
        0 keeps an average of the weights (`ema`); an average that was loaded goes on in any
        case. With auto_save(resume="auto") a script that runs again does what is left of its
        calls of train.
        """
        options = TrainOptions(
            epochs=epochs,
            validate_every=validate_every,
            gradient_accumulation_steps=gradient_accumulation_steps,
            use_amp=use_amp,
            gradient_clipping_norm=gradient_clipping_norm,
            ema_decay=ema_decay,
            progress_bar=progress_bar,
            save_on_last_epoch=save_on_last_epoch,
        )
        self._warn_unconfirmed()
        trainer = Trainer(self, options)
        if seed is not None and not self.replaying():
            self.seed(seed)
        trainer.run()
        return self.history

    def _warn_unconfirmed(self) -> None:
        waiting = [text for text in self.unconfirmed if text not in self._warned]
        if waiting and self.rank == 0:
            self._warned.update(waiting)
            warnings.warn(
                "What came with the checkpoint does nothing until you confirm it, by "
                f"handler.confirm() or NNHandler.load(..., confirm=True): {'; '.join(waiting)}",
                stacklevel=3,
            )

    @torch.no_grad()
    def predict(self, inputs: Any) -> Any:
        """The model's outputs, in evaluation mode; collective for a sharded model."""
        self.model.eval()
        try:
            return self.model(to_device(inputs, self.device))
        finally:
            self.train_mode()

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside the with block the model has its averaged weights, if there are any."""
        with self.ema.applied(self.model) if self.ema is not None else nullcontext():
            yield

    def save(self, path: Path, *, overwrite: bool = True) -> None:
        """Save everything; collective. A path that ends in .pth, .pt or .safetensors is one file,
        written by rank 0; any other is a sharded checkpoint, written by all ranks."""
        saving.save(self, local_path(path), overwrite=overwrite)

    def save_single_file(self, path: Path, *, overwrite: bool = True) -> None:
        """Save everything in one torch (.pth, .pt) or safetensors file; collective."""
        saving.save_single_file(self, local_path(path), overwrite=overwrite)

    def save_multi_files(
        self, folder: Path, file_format: FileFormat = "torch", *, overwrite: bool = True
    ) -> None:
        """Save the components in files of their own, in a directory; collective."""
        saving.save_multi_files(self, local_path(folder), file_format, overwrite=overwrite)

    @staticmethod
    def save_multi_from_single(
        path: Path, folder: Path, file_format: FileFormat = "torch", *, overwrite: bool = False
    ) -> None:
        """Turn a single file into a directory of several. Not collective."""
        saving.save_multi_from_single(
            local_path(path), local_path(folder), file_format, overwrite=overwrite
        )

    @staticmethod
    def save_single_from_multi(folder: Path, path: Path, *, overwrite: bool = False) -> None:
        """Turn a directory of several files into a single one. Not collective."""
        saving.save_single_from_multi(local_path(folder), local_path(path), overwrite=overwrite)

    @classmethod
    def load(
        cls,
        path: Path,
        device: str | torch.device | None = None,
        device_map: DeviceMap = None,
        strict: bool = True,
        skip_optimizer: bool = False,
        skip_scheduler: bool = False,
        skip_history: bool = False,
        skip_callbacks: bool = False,
        skip_ema: bool = False,
        *,
        parallel: Parallel = "auto",
        device_mesh: Any = None,
        tp_plan: Mapping[str, Any] | None = None,
        model_class: Callable[..., nn.Module] | None = None,
        loss_fn: Callable[..., Any] | None = None,
        metrics: Mapping[str, Callable[..., Any]] | None = None,
        objects: Mapping[str, Any] | None = None,
        trust_code: bool = False,
        confirm: bool = False,
    ) -> NNHandler:
        """Rebuild a handler from what any of its saves wrote, on any number of ranks; collective.

        Loaders are given anew. A name in the checkpoint is data: it stands for a class of torch,
        for a callback of shardckpt, or for a model, optimizer, scheduler or callback whose module
        the program has imported (see `trust` and docs/security.md). Nothing is imported, and no
        function is called. A loss or metric that is not found is to be given before training;
        anything else is an error that lists all names. `model_class`, `loss_fn`, `metrics` and
        `objects` (by position, as in {"model.kwargs.block": Block}) stand in for names. With
        `trust_code` the model is made by the source in the checkpoint, which is run.

        The auto-saver, callbacks that write files and the compilation of the model do nothing
        before `handler.confirm()`; `confirm=True` is for checkpoints of your own.

        With `device_map` the handler is for inference in this process alone: the model's tensors
        go where the map says (see load_state; its prefixes are names in the model), inputs
        follow them, and optimizer, scheduler and average are left out.
        """
        given = dict(objects or {})
        given.update({f"metrics.{name}": metric for name, metric in (metrics or {}).items()})
        given.update({"model.class": model_class} if model_class is not None else {})
        given.update({"loss_fn": loss_fn} if loss_fn is not None else {})
        skipped = {
            "optimizer": skip_optimizer,
            "scheduler": skip_scheduler or skip_optimizer,
            "history": skip_history,
            "callbacks": skip_callbacks,
            "ema": skip_ema,
        }
        options = LoadOptions(
            device=device,
            device_map=device_map,
            strict=strict,
            skip={name for name, skip in skipped.items() if skip},
            parallel=parallel,
            device_mesh=device_mesh,
            tp_plan=tp_plan,
            objects=given,
            trust_code=trust_code,
            confirm=confirm,
        )
        return load(cls, local_path(path), options)

    @classmethod
    def initialize_from_checkpoint(
        cls,
        path: Path,
        model_class: Callable[..., nn.Module],
        device: str | torch.device | None = None,
        *,
        strict: bool = True,
        prefix: str | None = None,
        ema: bool = False,
        parallel: Parallel = "auto",
        **model_kwargs: Any,
    ) -> NNHandler:
        """A new handler with the weights alone of any checkpoint: what a handler saved, another
        sharded checkpoint, a torch or safetensors file, a directory of DCP's; collective.

        The weights are found below `prefix`, by default below the one that fits best, and names
        lose what DDP and torch.compile put into them. `ema`: a handler's averaged weights.
        """
        path = local_path(path)
        handler = cls(model_class, device, parallel=parallel, **model_kwargs)
        fill_weights(handler, path, strict=strict, prefix=prefix, ema=ema)
        return handler

    def restore(self, path: Path) -> None:
        """Fill this handler, whose parts are set, with everything in a checkpoint; collective."""
        restore(self, open_source(local_path(path)))
