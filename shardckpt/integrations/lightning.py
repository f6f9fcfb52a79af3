"""Strategies and a callback for Lightning, which save and resume with shardckpt.

    Trainer(strategy=ShardckptStrategy())                     # DDP
    Trainer(strategy=ShardckptModelParallelStrategy())        # FSDP2, tensor parallelism
    Trainer(strategy=ShardckptFSDPStrategy())                 # FSDP1

ModelCheckpoint, `trainer.save_checkpoint` and `ckpt_path=` work as before. Tested with lightning
2.6.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from shardckpt import api
from shardckpt.errors import StateError
from shardckpt.manager.manager import CheckpointManager
from shardckpt.saving.async_save import SaveHandle
from shardckpt.state.markers import FromRank0, PerRank
from shardckpt.state.module_state import ModuleState, ddp_rank0_buffers, module_state
from shardckpt.state.optimizer_state import OptimizerState, ParameterNames, optimizer_state
from shardckpt.state.random_state import random_state, set_random_state
from shardckpt.storage.base import MANIFEST_NAME
from shardckpt.storage.resolve import resolve
from shardckpt.torch_compat import dtensor_local, is_dtensor

__all__ = [
    "ShardckptCallback",
    "ShardckptFSDPStrategy",
    "ShardckptModelParallelStrategy",
    "ShardckptStrategy",
]


def _package() -> str:
    """Return the name of the package that the program uses: both define the same classes."""
    names = ("lightning.pytorch", "pytorch_lightning")
    return next((name for name in names if name in sys.modules), None) or next(
        name for name in names if importlib.util.find_spec(name.split(".")[0])
    )


_TENSORS = ("state_dict", "optimizer_states")
_pl: Any = importlib.import_module(_package())
_strategies: Any = importlib.import_module(f"{_package()}.strategies")


class _Saving:
    """The part of the strategies that saves and loads.

    Args:
        asynchronous: Save in the background. ModelCheckpoint removes a checkpoint only after the
            next one is complete.
        **options: Arguments of Lightning's strategy.
    """

    lightning_module: Any
    model: Any
    optimizers: list[Any]
    is_global_zero: bool

    def __init__(self, *, asynchronous: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.asynchronous = asynchronous
        self._handles: dict[str, SaveHandle] = {}  # by path
        self._obsolete: list[str] = []
        self._counting: list[Any] = []  # callbacks for which saves in the background exist
        self._foreign = False  # the checkpoint being restored is Lightning's own

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """See Strategy: the model is filled after it was sharded."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """See Strategy: load_checkpoint fills the optimizers."""
        return self._foreign and bool(super().lightning_restore_optimizer)  # type: ignore[misc]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """See Strategy. The tensors alias those of the module."""
        return module_state(self.lightning_module)

    def optimizer_state(self, optimizer: Any) -> Any:
        """See Strategy. The optimizer itself is saved."""
        return getattr(optimizer, "_optimizer", optimizer)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """See Strategy. Collective. An existing checkpoint or link at the path is replaced."""
        plugin = getattr(self, "_checkpoint_io", None)
        if plugin is not None and type(plugin).__name__ != "TorchCheckpointIO":
            raise StateError(
                "The strategy does not use a CheckpointIO",
                path=str(filepath),
                expected="no CheckpointIO plugin",
                actual=type(plugin).__qualname__,
                remedy="leave the plugin out; to save in the background, pass asynchronous=True",
            )
        if storage_options is not None:
            raise StateError(
                "The strategy does not take storage options",
                path=str(filepath),
                expected="storage_options=None",
                actual=repr(storage_options),
                remedy="pass a URL as the path, and set the options of its storage",
            )
        if os.path.islink(filepath):
            self._unlink(filepath)
        path = os.fspath(self.broadcast(filepath))  # type: ignore[attr-defined]
        self._obsolete = [each for each in self._obsolete if each != path]
        state = self._state(checkpoint)
        if self.asynchronous:
            handle = api.async_save(state, path, overwrite=True)
            self._settle()
            self._handles[path] = handle
        else:
            api.save(state, path, overwrite=True)

    def _state(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        weights = self._weights_to_save(checkpoint["state_dict"])
        return _state_to_save(checkpoint, weights, self.lightning_module)

    def _weights_to_save(self, weights: dict[str, Any]) -> Any:
        return _weights_to_save(weights, self.model, self.lightning_module)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """See Strategy. Collective. Checkpoints of Lightning itself are loaded by Lightning."""
        path = os.fspath(self.broadcast(checkpoint_path))  # type: ignore[attr-defined]
        self._settle()
        self._foreign = _is_foreign(path)
        if self._foreign:
            if weights_only is None:
                weights_only = True
            return super().load_checkpoint(path, weights_only=weights_only)  # type: ignore[misc]
        fitting = self.lightning_module.trainer.state.fn == "fit"
        return self._load(path, fitting=fitting)

    def _load(self, path: str, *, fitting: bool) -> dict[str, Any]:
        with api.open_checkpoint(path) as opened:
            others = dict(opened.load_state(keys=["lightning"])["lightning"])
            # Without lr_schedulers only weights were saved: Lightning raises an error that says so.
            has_optimizers = "lr_schedulers" in others and any(
                name.startswith("optimizer_states") for name in opened
            )
        state = self._template(optimizers=fitting and has_optimizers)
        if fitting:
            state["random"] = PerRank(random_state())
        api.load(state, path, strict=self.lightning_module.strict_loading)
        self._place(state)
        if fitting:
            random = state["random"]
            set_random_state(random.value if isinstance(random, PerRank) else random)
        if has_optimizers:
            others["optimizer_states"] = []
        return {**others, "state_dict": self.lightning_module_state_dict()}

    def _template(self, *, optimizers: bool) -> dict[str, Any]:
        """Return the state to load into."""
        state: dict[str, Any] = {"state_dict": self.lightning_module}
        return {**state, "optimizer_states": list(self.optimizers)} if optimizers else state

    def _place(self, state: dict[str, Any]) -> None:
        """Put the loaded state where it belongs, if it was not filled in place."""

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """See Strategy. load_checkpoint has filled the model. A hook may have put other weights
        into the checkpoint."""
        if self._foreign or not _is_own(checkpoint["state_dict"], self.lightning_module):
            super().load_model_state_dict(checkpoint, strict=strict)  # type: ignore[misc]

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """See Strategy. load_checkpoint has filled the optimizers."""
        if self._foreign:
            super().load_optimizer_state_dict(checkpoint)  # type: ignore[misc]

    def remove_checkpoint(self, filepath: Any) -> None:
        """See Strategy. The checkpoint stays until all saves in the background are complete."""
        self._obsolete.append(os.fspath(filepath))
        if not self._handles:
            self._settle()

    def _settle(self) -> None:
        """Wait for the saves in the background, and remove the checkpoints that are obsolete."""
        handles, self._handles = self._handles, {}
        for handle in handles.values():
            handle.result()
        obsolete, self._obsolete = self._obsolete, []
        for path in obsolete:
            if os.path.islink(path):
                self._unlink(path)
            elif _is_foreign(path):
                super().remove_checkpoint(path)  # type: ignore[misc]
            elif self.is_global_zero:
                place = resolve(path)
                place.storage.remove(place.path)

    def _unlink(self, path: Any) -> None:
        """Remove a link that ModelCheckpoint made. Its target is another checkpoint, and stays."""
        if self.is_global_zero:
            os.unlink(path)

    def setup(self, trainer: Any) -> None:
        """See Strategy. ModelCheckpoint will not choose the path of a save in the background."""
        super().setup(trainer)  # type: ignore[misc]
        callbacks = trainer.checkpoint_callbacks if self.asynchronous else ()
        for callback in callbacks:
            if hasattr(callback, "file_exists") and callback not in self._counting:
                callback.file_exists = self._counted(callback.file_exists)
                self._counting.append(callback)

    def _counted(self, exists: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
        """Return ModelCheckpoint's `file_exists` as if each save and removal were complete."""

        def file_exists(filepath: Any, trainer: Any) -> bool:
            path = os.fspath(filepath)
            if path in self._obsolete:
                return False
            return path in self._handles or exists(filepath, trainer)

        return file_exists

    def teardown(self) -> None:
        """See Strategy. Waits for the saves in the background."""
        try:
            self._settle()
        finally:
            while self._counting:
                del self._counting.pop().file_exists
            super().teardown()  # type: ignore[misc]


def _state_to_save(checkpoint: dict[str, Any], weights: Any, module: Any) -> dict[str, Any]:
    """Return the state to save: what Lightning dumped, with tensors and other values apart."""
    others = {key: value for key, value in checkpoint.items() if key not in _TENSORS}
    optimizers = checkpoint.get("optimizer_states", [])
    if not isinstance(weights, torch.nn.Module):
        optimizers = _named(optimizers, module)
    return {
        "state_dict": weights,
        "optimizer_states": optimizers,
        "lightning": FromRank0(others),
        "random": PerRank(random_state()),
    }


def _weights_to_save(weights: dict[str, Any], model: Any, module: Any) -> Any:
    """Return the module, which names the optimizer's parameters, unless a hook has changed its
    state dict."""
    wrapped = _wrapped(model, module)
    if _is_own(weights, module):
        return wrapped
    return ModuleState(weights, set(), ddp_rank0_buffers(wrapped) & weights.keys())


def _is_own(weights: Mapping[str, Any], module: Any) -> bool:
    """Whether these are the tensors of the module."""
    own = module_state(module)
    return weights.keys() == own.keys() and all(
        _same_memory(weights[name], own[name]) for name in own
    )


def _named(optimizers: list[Any], module: Any) -> list[Any]:
    """Return states of optimizers with the names that their parameters have in the module."""
    names = ParameterNames([("state_dict", module)])
    return [
        OptimizerState(optimizer_state(each, names, at=f"optimizer_states.{index}"))
        if isinstance(each, torch.optim.Optimizer)
        else each
        for index, each in enumerate(optimizers)
    ]


def _wrapped(model: Any, module: Any) -> Any:
    """Return the module in its wrapper of DDP, which says that buffers of rank 0 are saved: those
    of batch norms differ between ranks."""
    return model if isinstance(model, torch.nn.parallel.DistributedDataParallel) else module


def _same_memory(a: Any, b: Any) -> bool:
    """Whether two entries of state dicts are the same tensor."""
    a, b = (dtensor_local(each) if is_dtensor(each) else each for each in (a, b))
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return a is b
    return a.data_ptr() == b.data_ptr() and (a.shape, a.dtype) == (b.shape, b.dtype)


def _is_foreign(path: str) -> bool:
    """Whether a local path exists and holds another format than a checkpoint of shardckpt."""
    return os.path.exists(path) and not os.path.isfile(os.path.join(path, MANIFEST_NAME))


class ShardckptStrategy(_Saving, _strategies.DDPStrategy):
    """Lightning's DDPStrategy, with checkpoints of shardckpt.

    Every rank writes a part of each checkpoint, and any number of ranks resumes it. A `.ckpt` file
    of Lightning can be resumed too.

    Args:
        asynchronous: Save in the background. ModelCheckpoint removes a checkpoint only after the
            next one is complete.
        **options: Arguments of DDPStrategy.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(strategy=ShardckptStrategy(), accelerator="cpu", devices=2)
    """


class ShardckptModelParallelStrategy(_Saving, _strategies.ModelParallelStrategy):
    """Lightning's ModelParallelStrategy (FSDP2, tensor parallelism), with checkpoints of shardckpt.

    Args:
        asynchronous: See ShardckptStrategy.
        **options: Arguments of ModelParallelStrategy.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> strategy = ShardckptModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=2)
    """


class ShardckptFSDPStrategy(_Saving, _strategies.FSDPStrategy):
    """Lightning's FSDPStrategy, with checkpoints of shardckpt.

    Args:
        asynchronous: See ShardckptStrategy.
        **options: Arguments of FSDPStrategy.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(strategy=ShardckptFSDPStrategy(), accelerator="gpu", devices=2)
    """

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """See Strategy. FSDP1 modules have no names of their own: torch makes a dict of shards."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        return dict(get_model_state_dict(self.model))

    def optimizer_state(self, optimizer: Any) -> Any:
        """See Strategy."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return get_optimizer_state_dict(self.model, super().optimizer_state(optimizer))

    def _weights_to_save(self, weights: dict[str, Any]) -> Any:
        return weights

    def _template(self, *, optimizers: bool) -> dict[str, Any]:
        state: dict[str, Any] = {"state_dict": self.lightning_module_state_dict()}
        states = [self.optimizer_state(optimizer) for optimizer in self.optimizers]
        return {**state, "optimizer_states": states} if optimizers else state

    def _place(self, state: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.state_dict import (
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        set_model_state_dict(self.model, state["state_dict"])
        for optimizer, values in zip(
            self.optimizers, state.get("optimizer_states", ()), strict=False
        ):
            set_optimizer_state_dict(self.model, optimizer, values)


class ShardckptCallback(_pl.Callback):
    """Saves a training, and resumes it when `fit` begins, under any strategy but FSDP1.

    Use it if the strategy of the training can't be replaced. It does not need ModelCheckpoint.
    The collective calls are made at the end of batches and of epochs. The states of callbacks and
    of the data module are saved. Hooks named `on_save_checkpoint` and `on_load_checkpoint` are
    called, as the strategies do.

    Args:
        folder: The folder of the checkpoints.
        every_n_steps: Save when the number of optimizer steps is a multiple of it. By default the
            end of each epoch is saved.
        resume: Restore the newest checkpoint in `folder` when `fit` begins.
        **options: Arguments of CheckpointManager, such as `keep` and `asynchronous`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = ShardckptCallback("run", keep=[shardckpt.KeepLast(2)])
        >>> trainer = Trainer(callbacks=[callback], enable_checkpointing=False)
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every_n_steps: int | None = None,
        resume: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.folder, self.every_n_steps, self.resume = folder, every_n_steps, resume
        self._options = options
        self._manager: CheckpointManager | None = None
        self._saved_step = -1

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the folder, and restore the newest checkpoint in it."""
        self._manager = CheckpointManager(self.folder, **self._options)
        if self.resume:
            self._restore(self._manager, trainer, pl_module)

    def _restore(self, manager: CheckpointManager, trainer: Any, pl_module: Any) -> None:
        state = {
            "state_dict": pl_module,
            "optimizer_states": _optimizers(trainer),
            "lightning": FromRank0({}),
            "random": PerRank(random_state()),
        }
        restored = manager.restore_latest(state, strict=pl_module.strict_loading)
        if restored is None:
            return
        self._saved_step = restored.step
        others, random = (
            each.value if isinstance(each, (FromRank0, PerRank)) else each
            for each in (state["lightning"], state["random"])
        )
        _restore_others(_as_dumped(others), trainer, pl_module, self._others(trainer))
        set_random_state(random)

    def _others(self, trainer: Any) -> list[Any]:
        """Return the other callbacks."""
        return [callback for callback in trainer.callbacks if callback is not self]

    def _state(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        checkpoint = _dumped(trainer, pl_module, self._others(trainer))
        weights = _weights_to_save(checkpoint["state_dict"], trainer.strategy.model, pl_module)
        return _state_to_save(checkpoint, weights, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        """Save after a number of steps."""
        step = trainer.global_step
        if step and self.every_n_steps and step % self.every_n_steps == 0:
            self._save(trainer, pl_module, step)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Save at the end of an epoch."""
        if not self.every_n_steps:
            self._save(trainer, pl_module, trainer.global_step)

    def _save(self, trainer: Any, pl_module: Any, step: int) -> None:
        if step == self._saved_step:  # a batch of gradient accumulation
            return
        assert self._manager is not None
        self._saved_step = step
        self._manager.save(step, self._state(trainer, pl_module))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Wait for saves in the background."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None


def _optimizers(trainer: Any) -> list[Any]:
    return [getattr(optimizer, "_optimizer", optimizer) for optimizer in trainer.optimizers]


def _dumped(trainer: Any, module: Any, callbacks: list[Any]) -> dict[str, Any]:
    """Return a checkpoint as Lightning dumps it, but with the module's own tensors and optimizers:
    some strategies of Lightning would gather them."""
    precision, data = trainer.precision_plugin, trainer.datamodule
    parts = [(precision, precision.state_dict()), (data, data.state_dict() if data else {})]
    checkpoint = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "pytorch-lightning_version": _pl.__version__,
        "state_dict": module_state(module),
        "loops": {"fit_loop": trainer.fit_loop.state_dict()},
        "callbacks": {
            each.state_key: values for each in callbacks if (values := each.state_dict())
        },
        "optimizer_states": _optimizers(trainer),
        "lr_schedulers": [each.scheduler.state_dict() for each in trainer.lr_scheduler_configs],
        **{type(part).__qualname__: values for part, values in parts if values},
    }
    precision.on_save_checkpoint(checkpoint)
    for callback in callbacks:
        callback.on_save_checkpoint(trainer, module, checkpoint)
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def _as_dumped(others: dict[str, Any]) -> dict[str, Any]:
    """Return the values in the layout of Lightning. Callbacks of earlier versions had another."""
    if "loops" in others:
        return others
    return {
        "loops": {"fit_loop": others["fit_loop"]},
        "lr_schedulers": others["schedulers"],
        "callbacks": others["callbacks"],
        "precision": others["precision"],
    }


def _restore_others(
    others: dict[str, Any], trainer: Any, module: Any, callbacks: list[Any]
) -> None:
    """Restore what Lightning restores besides tensors and optimizers, in its order."""
    checkpoint = {**others, "state_dict": module_state(module), "optimizer_states": []}
    module.on_load_checkpoint(checkpoint)
    if not _is_own(checkpoint["state_dict"], module):
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
    data, precision = trainer.datamodule, trainer.precision_plugin
    if data is not None and type(data).__qualname__ in checkpoint:
        data.load_state_dict(checkpoint[type(data).__qualname__])
    for callback in callbacks:
        callback.on_load_checkpoint(trainer, module, checkpoint)
    for callback in callbacks:
        if callback.state_key in checkpoint["callbacks"]:
            callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
    precision.on_load_checkpoint(checkpoint)
    values = checkpoint.get(type(precision).__qualname__, checkpoint.get("precision"))
    if values:
        precision.load_state_dict(values)
    trainer.fit_loop.load_state_dict(checkpoint["loops"]["fit_loop"])
    for config, values in zip(
        trainer.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=True
    ):
        config.scheduler.load_state_dict(values)
