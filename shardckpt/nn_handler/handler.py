"""NNHandler: a model with its optimizers, loss and data, and the calls to train, save and load."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from shardckpt.nn_handler.handler_source import open_handler
from shardckpt.nn_handler.initializing import fill_weights
from shardckpt.nn_handler.loading import HandlerLoadOptions, load_handler, restore
from shardckpt.nn_handler.parallel import Buffers, Parallel, largest
from shardckpt.nn_handler.plots import plot
from shardckpt.nn_handler.prediction import is_data, predictions
from shardckpt.nn_handler.summary import summary
from shardckpt.nn_handler.train_options import NanGuard, Precision, TrainOptions, matmul_precision
from shardckpt.nn_handler.trainer import Trainer
from shardckpt.nn_handler.trial import undone
from shardckpt.nn_handler.validation import validate
from shardckpt.plan.device_map import DeviceMap
from shardckpt.storage.paths import local_path
from shardckpt.storage.resolve import resolve

__all__ = ["NNHandler"]

FilePath = str | os.PathLike[str]


class NNHandler(Components):
    """A model with its optimizers, schedulers, loss, loaders, metrics and callbacks.

    The same script runs under python, torchrun and mpirun. A checkpoint holds plain data: classes
    and functions are saved by their import names. `save` warns about an object without one, and it
    must be passed to `load`.

    Args:
        model_class: The class of the model, or a function that creates it. All ranks start with
            the weights of rank 0.
        device: Where the model and its inputs go; by default the accelerator, if there is
            one. Under several ranks, "cuda" is the GPU of LOCAL_RANK.
        save_model_code: Save the source of the model in checkpoints; see `load` for `trust_code`.
        parallel: "none", "ddp", "fsdp" (FSDP2), or "auto": DDP if a launcher started several
            processes, FSDP2 with a device mesh.
        device_mesh: A DeviceMesh with the dimension "dp", "tp" or both, for FSDP2.
        tp_plan: The plan of parallelize_module, for the dimension "tp".
        parallel_options: Options of DistributedDataParallel, such as `find_unused_parameters`, or
            of fully_shard, such as `mp_policy`. For FSDP2 also `wrap`: the classes of the modules
            to shard, instead of the items of every ModuleList and Sequential.
        buffers: How buffers that differ by rank, such as the running means of BatchNorm, are made
            equal after each step: "rank0" or "mean".
        model_kwargs: The arguments of `model_class`.

    Attributes:
        model: The model, under DDP or FSDP2 if it is parallel.
        module: The model without DDP.
        optimizer: The main optimizer; `optimizers` holds all by name.
        history: The values of each metric by epoch; `history_epochs` the numbers of these epochs.
        epoch: The number of completed epochs.
        step: The number of completed optimizer steps.
        stop_training: Set to True to end training after the current step.

    Raises:
        StateError: An argument is invalid.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> from shardckpt import NNHandler
        >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
        >>> handler.set_optimizer(torch.optim.AdamW, lr=0.01)
        >>> handler.set_loss_fn(nn.MSELoss())
        >>> dataset = TensorDataset(torch.randn(16, 4), torch.randn(16, 2))
        >>> handler.set_train_loader(dataset, batch_size=4, shuffle=True)
        >>> history = handler.train(epochs=3, progress_bar=False)
        >>> handler.save("models/final")
        >>> NNHandler.load("models/final").epoch
        3
    """

    def auto_save(
        self,
        interval: int | None = 1,
        save_path: FilePath = "checkpoints",
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
        links: bool = False,
        tolerate: int = 3,
    ) -> None:
        """Save while training. Not collective.

        Only checkpoints of this run, or of the run that it resumed, are ever removed.

        Args:
            interval: Save after every so many epochs. -1 saves after the last epoch or an early
                stop; 0 or None turns this off.
            save_path: The folder of the checkpoints.
            name: The template of their names, with the fields `epoch`, `step`, `loss`, `lr`,
                `val_loss` and every metric, also as `val_<metric>`. The suffix chooses the format,
                as in `save`. Saves within an epoch are named `step<step>`.
            overwrite: Keep only the newest checkpoint.
            every_steps: Also save after every so many steps.
            every_minutes: Also save after so many minutes.
            keep_last: The number of the newest checkpoints to keep.
            keep_best: The number of the best checkpoints to keep, by `monitor`.
            monitor: A metric.
            mode: Whether "min" or "max" of the metric is best.
            save_last: After each epoch also save `last`, which replaces the previous one.
            on_exception: Save before an exception ends training.
            on_signal: Save before SIGTERM or Ctrl-C ends training.
            asynchronous: Continue training while a checkpoint is written.
            resume: "auto" lets `train` start with the newest checkpoint in the folder that loads.
            links: Keep symlinks `last` and, with a `monitor`, `best` in the folder.
            tolerate: The number of saves in a row that may fail because the storage is full, does
                not answer or throttles. Training goes on after a warning. See CheckpointManager.

        Raises:
            StateError: An argument is invalid.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from torch.utils.data import TensorDataset
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.auto_save(
            ...     interval=1, save_path="runs/a", keep_last=2, keep_best=1, monitor="val_loss"
            ... )
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
        sanity_val_batches: int = 1,
        precision: Precision | None = None,
        nan_guard: NanGuard | None = None,
        agree_every: int = 8,
        fast_dev_run: bool = False,
    ) -> dict[str, list[float]]:
        """Train for more epochs or steps. Collective.

        With auto_save(resume="auto"), a script that runs again completes the calls of `train` that
        it made before it was stopped.

        Args:
            epochs: The number of additional epochs. Optional with `max_steps`.
            validate_every: Validate after every so many epochs; 0: never.
            gradient_accumulation_steps: The number of batches for each step of the optimizer.
            use_amp: Use float16 with a gradient scaler on CUDA, and bfloat16 on the CPU.
            gradient_clipping_norm: The largest norm of all gradients together.
            ema_decay: Above 0, keep an exponential moving average of the weights; see
                `ema_weights`. An average that was loaded continues without it.
            seed: See `seed`.
            progress_bar: Show the progress on stderr, on rank 0; see ProgressBar.
            save_on_last_epoch: Let auto_save save after the last epoch, whatever its interval.
            max_steps: End after so many additional steps, if `epochs` does not end training before.
            validate_every_steps: Also validate after every so many steps. The results are appended
                to `validations`, and passed to the hook on_validation_end.
            limit_train_batches: End each epoch after so many batches on each rank.
            limit_val_batches: End each validation after so many batches on each rank.
            sanity_val_batches: Validate on so many batches before training, to find mistakes
                early. The results are dropped. Only on a Dataset, and not after a resume.
            precision: "bf16", "fp16" (with a gradient scaler), "tf32" or "fp32".
            nan_guard: The answer to a loss or a gradient that is not finite: "stop" raises an
                error before the weights change, "skip" skips the step, and "restore" loads the
                weights and the optimizers of the last checkpoint of this run, keeps the rates, and
                continues with the next batch. The batches of such a step count in no metric.
            agree_every: The largest number of steps between two agreements of the ranks on
                signals, failures and `stop_training`. The ranks agree more often if steps take
                longer than 0.025 seconds or become slow, and before each save. Ignored on one rank.
            fast_dev_run: Try one batch of training and one of validation, and then undo this step.
                Nothing is saved, and callbacks that write files are not called.

        Returns:
            The history: the values of each metric by epoch. With fast_dev_run, that of the trial.

        Raises:
            StateError: An argument is invalid, or a part of the handler is missing.
            RankFailedError: Training failed on another rank.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from torch.utils.data import TensorDataset
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.set_optimizer(torch.optim.SGD, lr=0.1)
            >>> handler.set_loss_fn(nn.MSELoss())
            >>> dataset = TensorDataset(torch.randn(16, 4), torch.randn(16, 2))
            >>> handler.set_train_loader(dataset, batch_size=4)
            >>> history = handler.train(epochs=2, precision="bf16", progress_bar=False)
            >>> len(history["loss"])
            2
        """
        arguments = {
            name: value for name, value in locals().items() if name not in ("self", "seed")
        }
        options = TrainOptions(**arguments)
        self._warn_unconfirmed()
        trainer = Trainer(self, options)
        with undone(self) if fast_dev_run else nullcontext():
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
                "These parts of the checkpoint are inactive until you confirm them with "
                f"handler.confirm() or NNHandler.load(..., confirm=True): {'; '.join(waiting)}"
            )

    def evaluate(
        self, data: Any = None, *, ema: bool = False, **loader_options: Any
    ) -> dict[str, float]:
        """Compute the loss and the metrics, in evaluation mode and without autocast. Collective.

        Args:
            data: See set_val_loader; by default the validation data.
            ema: Use the averaged weights.
            loader_options: The arguments of a DataLoader, if `data` is a Dataset.

        Returns:
            The value of each metric over the samples of all ranks, without the prefix `val_`.

        Raises:
            StateError: The handler has no validation data, or no averaged weights.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from torch.utils.data import TensorDataset
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.set_loss_fn(nn.MSELoss())
            >>> dataset = TensorDataset(torch.zeros(6, 4), torch.zeros(6, 2))
            >>> sorted(handler.evaluate(dataset, batch_size=2))
            ['loss']
        """
        self.check_given()
        found = self.val_data if data is None else ValData(data, loader_options, self.layout)
        if found is None:
            raise StateError(
                "The handler has no validation data",
                remedy="pass data, or call set_val_loader first",
            )
        with self._weights(ema):
            return validate(self, found, guard=lambda act: act(), agree=self._any_rank)

    @torch.no_grad()
    def predict(self, inputs: Any, *, ema: bool = False, **loader_options: Any) -> Any:
        """Compute the outputs of the model, in evaluation mode.

        Collective for data that is divided among the ranks, and for a sharded model.

        Args:
            inputs: A batch for the model, or a Dataset, a loader or an iterator of batches. If its
                batches are pairs, the model gets their first items, unless its forward needs both.
                Arrays of numpy become tensors of their dtypes.
            ema: Use the averaged weights.
            loader_options: The arguments of a DataLoader, if `inputs` is a Dataset or a list of
                samples.

        Returns:
            The outputs for the batch. For a Dataset or loader, the outputs of all batches and
            ranks, concatenated on the CPU in the order of the samples.

        Raises:
            StateError: The handler has no averaged weights, or the outputs can't be concatenated.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from torch.utils.data import TensorDataset
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.predict(TensorDataset(torch.zeros(6, 4)), batch_size=4).shape
            torch.Size([6, 2])
        """
        with self._weights(ema), self.evaluating():
            if not (is_data(inputs) or loader_options):
                return call_model(self.model, to_device(inputs, self.device), self.module)
            return predictions(self, ValData(inputs, loader_options, self.layout))

    def _any_rank(self, more: bool) -> int:
        return largest([int(more)])[0]

    @contextmanager
    def _weights(self, ema: bool) -> Iterator[None]:
        if ema and self.ema is None:
            raise StateError(
                "The handler has no averaged weights", remedy="train with ema_decay=0.999 first"
            )
        with self.ema_weights() if ema else nullcontext():
            yield

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Give the model its averaged weights, if there are any, inside a with block.

        Training inside the block raises an error. Not collective.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from torch.utils.data import TensorDataset
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.set_optimizer(torch.optim.SGD, lr=0.1)
            >>> handler.set_loss_fn(nn.MSELoss())
            >>> dataset = TensorDataset(torch.randn(16, 4), torch.randn(16, 2))
            >>> handler.set_train_loader(dataset, batch_size=4)
            >>> _ = handler.train(epochs=1, ema_decay=0.9, progress_bar=False)
            >>> with handler.ema_weights():
            ...     outputs = handler.predict(torch.zeros(1, 4))
        """
        before, self.averaging = self.averaging, self.ema is not None
        try:
            with self.ema.applied(self.model) if self.ema is not None else nullcontext():
                yield
        finally:
            self.averaging = before

    def count_parameters(self, *, trainable: bool = False) -> int:
        """Count the parameters of the model. Not collective.

        Args:
            trainable: Count only those that need gradients.

        Returns:
            The number of elements.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from torch.utils.data import TensorDataset
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.count_parameters()
            10
        """
        found = self.module.parameters()
        return sum(p.numel() for p in found if p.requires_grad or not trainable)

    def plot_history(self, path: FilePath | None = None, names: Sequence[str] | None = None) -> Any:
        """Plot metrics by epoch, each beside its validation. Needs the extra `plot`.

        Not collective.

        Args:
            path: Also save the plot to this file; the suffix chooses the format.
            names: The metrics, without the prefix `val_`; by default all.

        Returns:
            A matplotlib Figure.

        Raises:
            StateError: The history has no such metric.
            DependencyError: matplotlib is not installed.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from torch.utils.data import TensorDataset
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.set_optimizer(torch.optim.SGD, lr=0.1)
            >>> handler.set_loss_fn(nn.MSELoss())
            >>> dataset = TensorDataset(torch.randn(16, 4), torch.randn(16, 2))
            >>> handler.set_train_loader(dataset, batch_size=4)
            >>> _ = handler.train(epochs=2, progress_bar=False)
            >>> figure = handler.plot_history("history.png")
        """
        return plot(
            self.history, self.history_epochs, names, None if path is None else local_path(path)
        )

    def plot_losses(self, path: FilePath | None = None) -> Any:
        """Plot the losses of training and validation. Needs the extra `plot`. Not collective.

        Args:
            path: Also save the plot to this file; the suffix chooses the format.

        Returns:
            A matplotlib Figure.

        Example:
            >>> from torch import nn
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.history = {"loss": [0.9, 0.4], "val_loss": [0.8, 0.5]}
            >>> handler.history_epochs = {"loss": [1, 2], "val_loss": [1, 2]}
            >>> figure = handler.plot_losses("losses.png")
        """
        return self.plot_history(path, ["loss"])

    @property
    def best_path(self) -> str | None:
        """The best checkpoint of the first ModelCheckpoint, or of auto_save with `monitor`."""
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

    def save(self, path: FilePath, *, overwrite: bool = True) -> None:
        """Save everything. Collective.

        Args:
            path: A path that ends in .pth or .pt is a torch file, one that ends in .safetensors a
                safetensors file; rank 0 writes it. A path without a suffix is a sharded checkpoint,
                which all ranks write.
            overwrite: Replace an existing checkpoint. It stays until the new one is complete.

        Raises:
            StateError: The path has another suffix, or a part of the handler can't be saved.
            CheckpointExistsError: The path exists, and `overwrite` is False.
            StorageError: The file system refused an operation.
            CoordinationError: A rank failed.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from torch.utils.data import TensorDataset
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.save("models/final")
            >>> handler.save("models/final.pth")
        """
        saving.save_handler(self, resolve(path).path, overwrite=overwrite)

    def save_single_file(self, path: FilePath, *, overwrite: bool = True) -> None:
        """Save everything in one file. Collective.

        Args:
            path: A path that ends in .pth, .pt or .safetensors.
            overwrite: Replace an existing file.

        Raises:
            StateError: The path has another suffix.
            CheckpointExistsError: The path exists, and `overwrite` is False.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from torch.utils.data import TensorDataset
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.save_single_file("models/final.safetensors")
        """
        saving.save_single_file(self, local_path(path), overwrite=overwrite)

    def save_multi_files(
        self,
        folder: FilePath,
        file_format: FileFormat = "torch",
        *,
        overwrite: bool = True,
        keys_to_save: Collection[str] | None = None,
    ) -> None:
        """Save each component in a file of its own. Collective.

        Args:
            folder: The directory.
            file_format: "torch" or "safetensors".
            overwrite: Replace an existing directory.
            keys_to_save: The components to save, such as ["model", "ema"]; by default all. With
                some of them only initialize_from_checkpoint reads the directory.

        Raises:
            StateError: An argument is invalid.
            CheckpointExistsError: The directory exists, and `overwrite` is False.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from torch.utils.data import TensorDataset
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.save_multi_files("models/parts")
            >>> handler.save_multi_files("models/weights", "safetensors", keys_to_save=["model"])
        """
        saving.save_multi_files(
            self,
            local_path(folder),
            file_format,
            overwrite=overwrite,
            keys_to_save=keys_to_save,
        )

    @staticmethod
    def save_multi_from_single(
        path: FilePath,
        folder: FilePath,
        file_format: FileFormat = "torch",
        *,
        overwrite: bool = False,
    ) -> None:
        """Turn a single file into a directory with a file for each component. Not collective.

        Args:
            path: The file.
            folder: The directory.
            file_format: "torch" or "safetensors".
            overwrite: Replace an existing directory.

        Raises:
            CheckpointExistsError: The directory exists, and `overwrite` is False.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from torch.utils.data import TensorDataset
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.save("models/final.pth")
            >>> NNHandler.save_multi_from_single("models/final.pth", "models/split")
        """
        saving.save_multi_from_single(
            local_path(path), local_path(folder), file_format, overwrite=overwrite
        )

    @staticmethod
    def save_single_from_multi(
        folder: FilePath, path: FilePath, *, overwrite: bool = False
    ) -> None:
        """Turn a directory with a file for each component into a single file. Not collective.

        Args:
            folder: The directory.
            path: The file.
            overwrite: Replace an existing file.

        Raises:
            CheckpointExistsError: The file exists, and `overwrite` is False.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from torch.utils.data import TensorDataset
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.save_multi_files("models/parts")
            >>> NNHandler.save_single_from_multi("models/parts", "models/joined.pth")
        """
        saving.save_single_from_multi(local_path(folder), local_path(path), overwrite=overwrite)

    @classmethod
    def load(
        cls,
        path: FilePath,
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
        parallel_options: Mapping[str, Any] | None = None,
        buffers: Buffers = "rank0",
        model_class: Callable[..., nn.Module] | None = None,
        loss_fn: Callable[..., Any] | None = None,
        metrics: Mapping[str, Callable[..., Any]] | None = None,
        objects: Mapping[str, Any] | None = None,
        trust_code: bool = False,
        confirm: bool = False,
    ) -> NNHandler:
        """Create a handler from a checkpoint that a handler saved, on any number of ranks.

        Collective, unless `device_map` is given. Set the loaders again after it. A name in a
        checkpoint resolves to a class of torch, to a callback of shardckpt, or to a model,
        optimizer, scheduler or callback that the program has imported; see `shardckpt.trust`.
        Nothing is imported, and no function that a checkpoint names is called during the load.

        Args:
            path: Any path that a handler saved to.
            device: See NNHandler.
            device_map: For inference in this process: the devices of the model's tensors, as in
                load_state, with prefixes of names in the model. The handler is in evaluation mode,
                without optimizers and schedulers. Averaged weights stay on the disk until
                `ema_weights` or `predict(..., ema=True)` uses them.
            strict: Raise an error if the names of the model's tensors differ from the checkpoint.
                With False, a warning lists the differences.
            skip_optimizer: Leave out the optimizers and their schedulers.
            skip_scheduler: Leave out the schedulers.
            skip_history: Leave out the history.
            skip_callbacks: Leave out the callbacks.
            skip_ema: Leave out the averaged weights.
            parallel: See NNHandler. A checkpoint does not hold this and the next four arguments.
            device_mesh: See NNHandler.
            tp_plan: See NNHandler.
            parallel_options: See NNHandler.
            buffers: See NNHandler.
            model_class: The class of the model, in place of the saved name.
            loss_fn: The loss, in place of the saved one.
            metrics: Metrics by name, in place of the saved ones.
            objects: Other objects by their place in the checkpoint, as an error or a warning names
                it: {"optimizer.class": Lion, "model.kwargs.config": config}.
            trust_code: Create the model from the source in the checkpoint. That code can do
                everything that you can.
            confirm: Activate the auto-saver, callbacks that write files, and the compilation of the
                model. For checkpoints of your own; see `confirm`.

        Returns:
            The handler.

        Raises:
            CheckpointNotFoundError: The path does not exist.
            NotACheckpointError: The path is not a checkpoint of a handler.
            CheckpointError: A name does not resolve, or a part can't be created.
            LoadMismatchError: The model differs from the checkpoint.
            CorruptionError: A digest differs.
            StateError: An argument is invalid.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from torch.utils.data import TensorDataset
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.save("models/final")
            >>> loaded = NNHandler.load("models/final", device="cpu")
            >>> loaded.module.out_features
            2
        """
        arguments = {name: value for name, value in locals().items() if name not in ("cls", "path")}
        found = load_handler(cls, resolve(path).path, HandlerLoadOptions(**arguments))
        assert isinstance(found, cls)
        return found

    @classmethod
    def initialize_from_checkpoint(
        cls,
        path: FilePath,
        model_class: Callable[..., nn.Module],
        device: str | torch.device | None = None,
        *,
        strict: bool = True,
        prefix: str | None = None,
        ema: bool = False,
        parallel: Parallel = "auto",
        device_mesh: Any = None,
        tp_plan: Mapping[str, Any] | None = None,
        parallel_options: Mapping[str, Any] | None = None,
        buffers: Buffers = "rank0",
        save_model_code: bool = False,
        **model_kwargs: Any,
    ) -> NNHandler:
        """Create a new handler with only the weights of a checkpoint. Collective.

        Names lose the prefixes of wrappers: `module.` and `_orig_mod.`. Tensors are converted to
        the dtypes of the model.

        Args:
            path: A checkpoint of a handler, another sharded checkpoint, a torch file (.pth, .pt,
                .ckpt, .bin), a safetensors file, or a folder of Hugging Face or DCP.
            model_class: See NNHandler.
            device: See NNHandler.
            strict: Raise an error if names or shapes differ. With False, a warning lists the
                differences; an error is raised only if no name fits.
            prefix: The prefix of the weights in the checkpoint; by default the best match.
            ema: Use the averaged weights of a handler's checkpoint.
            parallel: See NNHandler.
            device_mesh: See NNHandler.
            tp_plan: See NNHandler.
            parallel_options: See NNHandler.
            buffers: See NNHandler.
            save_model_code: See NNHandler.
            model_kwargs: See NNHandler.

        Returns:
            The handler.

        Raises:
            CheckpointNotFoundError: The path does not exist.
            NotACheckpointError: The format is unknown.
            LoadMismatchError: The model differs from the checkpoint.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from torch.utils.data import TensorDataset
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> torch.save(handler.module.state_dict(), "weights.ckpt")
            >>> fresh = NNHandler.initialize_from_checkpoint(
            ...     "weights.ckpt", nn.Linear, in_features=4, out_features=2
            ... )
        """
        path = resolve(path).path
        handler = cls(
            model_class,
            device,
            save_model_code,
            parallel=parallel,
            device_mesh=device_mesh,
            tp_plan=tp_plan,
            parallel_options=parallel_options,
            buffers=buffers,
            **model_kwargs,
        )
        fill_weights(handler, path, strict=strict, prefix=prefix, ema=ema)
        return handler

    def restore(self, path: FilePath) -> None:
        """Load a checkpoint into this handler, whose parts are already set. Collective.

        Args:
            path: Any path that a handler saved to.

        Raises:
            LoadMismatchError: Optimizers, schedulers, callbacks or the model differ from the
                checkpoint.
            CorruptionError: A digest differs.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from torch.utils.data import TensorDataset
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.save("models/final")
            >>> handler.restore("models/final")
        """
        restore(self, open_handler(resolve(path).path))
