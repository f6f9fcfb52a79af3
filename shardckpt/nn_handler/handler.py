"""NNHandler: the calls that train, save and load what its parts make up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from shardckpt.convert.single_files import FileFormat
from shardckpt.errors import StateError
from shardckpt.logs import warn
from shardckpt.nn_handler import saving
from shardckpt.nn_handler.auto_saver import AutoSaver
from shardckpt.nn_handler.batch import call_model, to_device
from shardckpt.nn_handler.callbacks import ModelCheckpoint
from shardckpt.nn_handler.components import Components
from shardckpt.nn_handler.data import ValData
from shardckpt.nn_handler.initializing import fill_weights
from shardckpt.nn_handler.loading import LoadOptions, load, open_source, restore
from shardckpt.nn_handler.parallel import Parallel, largest
from shardckpt.nn_handler.prediction import is_data, predictions
from shardckpt.nn_handler.summary import summary
from shardckpt.nn_handler.train_options import NanGuard, Precision, TrainOptions, matmul_precision
from shardckpt.nn_handler.trainer import Trainer
from shardckpt.nn_handler.validation import validate
from shardckpt.plan.device_map import DeviceMap
from shardckpt.storage.paths import local_path
from shardckpt.storage.resolve import resolve

__all__ = ["NNHandler"]

Path = str | os.PathLike[str]


class NNHandler(Components):
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
        tolerate: int = 3,
    ) -> None:
        """Save while training; see SavePlan and AutoSaver for the arguments.

        The name's fields are `epoch`, `step`, `loss`, `lr`, `val_loss`, and every metric, also
        as `val_<metric>`; saves within an epoch are named `step<step>`.
        """
        arguments = {key: value for key, value in locals().items() if key != "self"}
        self.auto_saver = AutoSaver(**arguments)
        self.proposed.pop("auto_saver", None)

    def train(
        self,
        epochs: int | None = None,
        validate_every: int = 1,
        gradient_accumulation_steps: int = 1,
        use_amp: bool = False,
        gradient_clipping_norm: float | None = None,
        ema_decay: float = 0.0,
        seed: int | None = None,
        progress_bar: bool = True,
        save_on_last_epoch: bool = True,
        *,
        max_steps: int | None = None,
        validate_every_steps: int | None = None,
        limit_train_batches: int | None = None,
        limit_val_batches: int | None = None,
        precision: Precision | None = None,
        nan_guard: NanGuard | None = None,
        fast_dev_run: bool = False,
    ) -> dict[str, list[float]]:
        """Train for so many epochs or steps more; collective.

        With auto_save(resume="auto") a script that runs again does what is left of its calls.

        Args:
            epochs: So many epochs more; may be left out with max_steps.
            validate_every: Validate after so many epochs; 0: never.
            gradient_accumulation_steps: Batches per step of the optimizer.
            use_amp: float16 with a gradient scaler on CUDA, bfloat16 on the CPU.
            gradient_clipping_norm: The largest norm of all gradients together.
            ema_decay: Above 0 keeps an average of the weights (`ema`); an average that was loaded
                goes on in any case.
            seed: See `seed`.
            progress_bar: Show progress on stderr, on rank 0.
            save_on_last_epoch: Let auto_save save after the last epoch in any case.
            max_steps: End after so many steps of the optimizer, if epochs does not end it before.
            validate_every_steps: Validate after so many steps too; the results are in
                `validations`, and go to the hook on_validation_end.
            limit_train_batches: End each epoch after so many batches of each rank.
            limit_val_batches: End each validation after so many batches of each rank.
            precision: "bf16", "fp16" (with a gradient scaler), "tf32" or "fp32", by name.
            nan_guard: What to do if the loss of a step is not finite: "stop" with an error before
                the weights change, or "skip" the step.
            fast_dev_run: Try one batch of training and one of validation. Nothing is saved, and
                callbacks that write files are left out.

        Returns:
            The history: metric -> its values by epoch.

        Raises:
            StateError: Something is missing or contradicts itself.
            RankFailedError: Another rank has failed.

        Example:
            >>> history = handler.train(epochs=2, precision="bf16")
        """
        options = TrainOptions(
            epochs=1 if fast_dev_run else epochs,
            max_steps=max_steps,
            validate_every=validate_every,
            validate_every_steps=None if fast_dev_run else validate_every_steps,
            gradient_accumulation_steps=1 if fast_dev_run else gradient_accumulation_steps,
            limit_train_batches=1 if fast_dev_run else limit_train_batches,
            limit_val_batches=1 if fast_dev_run else limit_val_batches,
            use_amp=use_amp,
            precision=precision,
            gradient_clipping_norm=gradient_clipping_norm,
            ema_decay=ema_decay,
            nan_guard=nan_guard,
            progress_bar=progress_bar,
            save_on_last_epoch=save_on_last_epoch,
            fast_dev_run=fast_dev_run,
        )
        self._warn_unconfirmed()
        trainer = Trainer(self, options)
        if seed is not None and not self.replaying():
            self.seed(seed)
        with matmul_precision(options.precision):
            trainer.run()
        return self.history

    def _warn_unconfirmed(self) -> None:
        waiting = [text for text in self.unconfirmed if text not in self.warned]
        if waiting and self.rank == 0:
            self.warned.update(waiting)
            warn(
                "What came with the checkpoint does nothing until you confirm it, by "
                f"handler.confirm() or NNHandler.load(..., confirm=True): {'; '.join(waiting)}"
            )

    def evaluate(
        self, data: Any = None, *, ema: bool = False, **loader_options: Any
    ) -> dict[str, float]:
        """Loss and metrics over data, in evaluation mode; collective.

        Args:
            data: As set_val_loader takes it; None means the validation loader.
            ema: Measure the averaged weights.
            loader_options: Of a DataLoader, if data is a Dataset.

        Returns:
            Metric -> its value over all ranks' samples, without `val_`.

        Raises:
            StateError: There is no data, or ema=True without an average.

        Example:
            >>> accuracy = handler.evaluate(test_set, batch_size=32)["accuracy"]
        """
        self.check_given()
        found = self.val_data if data is None else ValData(data, loader_options, self.layout)
        if found is None:
            raise StateError(
                "There is nothing to evaluate on", remedy="give data, or set_val_loader"
            )
        with self._weights(ema):
            return validate(self, found, guard=lambda act: act(), agree=self._any_rank)

    @torch.no_grad()
    def predict(self, inputs: Any, *, ema: bool = False, **loader_options: Any) -> Any:
        """The model's outputs, in evaluation mode.

        Args:
            inputs: A batch for the model; or a Dataset, with a DataLoader's options, or a loader.
                Of batches that are pairs the model gets the first item.
            ema: Use the averaged weights.
            loader_options: Of a DataLoader, if inputs is a Dataset.

        Returns:
            The outputs; of a Dataset or loader those of all batches and ranks, on the CPU, one
            after another in the order of the samples. Collective for data that is divided, and for
            a sharded model.

        Example:
            >>> outputs = handler.predict(test_set, batch_size=32)
        """
        with self._weights(ema):
            self.model.eval()
            try:
                if not is_data(inputs):
                    return call_model(self.model, to_device(inputs, self.device), self.module)
                return predictions(self, ValData(inputs, loader_options, self.layout))
            finally:
                self.train_mode()

    def _any_rank(self, more: bool) -> int:
        return largest([int(more)], self.device)[0]

    @contextmanager
    def _weights(self, ema: bool) -> Iterator[None]:
        if ema and self.ema is None:
            raise StateError("There are no averaged weights", remedy="train with ema_decay=0.999")
        with self.ema_weights() if ema else nullcontext():
            yield

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside the with block the model has its averaged weights, if there are any. Training
        inside it is refused."""
        before, self.averaging = self.averaging, self.ema is not None
        try:
            with self.ema.applied(self.model) if self.ema is not None else nullcontext():
                yield
        finally:
            self.averaging = before

    def count_parameters(self, *, trainable: bool = False) -> int:
        """The number of the model's parameters, or of those that are trained; not collective."""
        found = self.module.parameters()
        return sum(p.numel() for p in found if p.requires_grad or not trainable)

    @property
    def best_path(self) -> str | None:
        """Where the best checkpoint so far lies, of the first ModelCheckpoint or the auto-saver
        with keep_best."""
        return next((saver.best_path for saver in self._savers() if saver.best_path), None)

    @property
    def best_score(self) -> float | None:
        """The monitored metric of `best_path`."""
        return next((saver.best_score for saver in self._savers() if saver.best_path), None)

    def _savers(self) -> list[AutoSaver]:
        own = [c.saver for c in self.callbacks if isinstance(c, ModelCheckpoint)]
        return own + ([self.auto_saver] if self.auto_saver is not None else [])

    def __repr__(self) -> str:
        return summary(self)

    def save(self, path: Path, *, overwrite: bool = True) -> None:
        """Save everything; collective. A path that ends in .pth, .pt or .safetensors is one file,
        written by rank 0; any other is a sharded checkpoint, written by all ranks."""
        saving.save(self, resolve(path).path, overwrite=overwrite)

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
        found = load(cls, resolve(path).path, options)
        assert isinstance(found, cls)
        return found

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
        path = resolve(path).path
        handler = cls(model_class, device, parallel=parallel, **model_kwargs)
        fill_weights(handler, path, strict=strict, prefix=prefix, ema=ema)
        return handler

    def restore(self, path: Path) -> None:
        """Fill this handler, whose parts are set, with everything in a checkpoint; collective."""
        restore(self, open_source(resolve(path).path))
