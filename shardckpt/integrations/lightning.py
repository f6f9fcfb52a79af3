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
from collections.abc import Mapping
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
        self._handles: list[SaveHandle] = []
        self._obsolete: list[str] = []
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
        """See Strategy. Collective. An existing checkpoint at the path is replaced."""
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
        path = os.fspath(self.broadcast(filepath))  # type: ignore[attr-defined]
        self._obsolete = [each for each in self._obsolete if each != path]
        state = self._state(checkpoint)
        if self.asynchronous:
            handle = api.async_save(state, path, overwrite=True)
            self._settle()
            self._handles.append(handle)
        else:
            api.save(state, path, overwrite=True)

    def _state(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return the state to save: what Lightning dumped, with tensors and other values apart."""
        others = {key: value for key, value in checkpoint.items() if key not in _TENSORS}
        weights = self._weights_to_save(checkpoint["state_dict"])
        optimizers = checkpoint.get("optimizer_states", [])
        if not isinstance(weights, torch.nn.Module):
            optimizers = self._named(optimizers)
        return {
            "state_dict": weights,
            "optimizer_states": optimizers,
            "lightning": FromRank0(others),
            "random": PerRank(random_state()),
        }

    def _weights_to_save(self, weights: dict[str, Any]) -> Any:
        """Return the module, which names the optimizer's parameters, unless a hook has changed its
        state dict."""
        model = _wrapped(self.model, self.lightning_module)
        if self._is_own(weights):
            return model
        return ModuleState(weights, set(), ddp_rank0_buffers(model) & weights.keys())

    def _is_own(self, weights: Mapping[str, Any]) -> bool:
        """Whether these are the tensors of the module."""
        own = module_state(self.lightning_module)
        return weights.keys() == own.keys() and all(
            _same_memory(weights[name], own[name]) for name in own
        )

    def _named(self, optimizers: list[Any]) -> list[Any]:
        """Return states of optimizers with the names that their parameters have in the module."""
        names = ParameterNames([("state_dict", self.lightning_module)])
        return [
            OptimizerState(optimizer_state(each, names, at=f"optimizer_states.{index}"))
            if isinstance(each, torch.optim.Optimizer)
            else each
            for index, each in enumerate(optimizers)
        ]

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
            has_optimizers = any(name.startswith("optimizer_states") for name in opened)
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
        if self._foreign or not self._is_own(checkpoint["state_dict"]):
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
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.result()
        obsolete, self._obsolete = self._obsolete, []
        for path in obsolete:
            if _is_foreign(path):
                super().remove_checkpoint(path)  # type: ignore[misc]
            elif self.is_global_zero:
                place = resolve(path)
                place.storage.remove(place.path)

    def teardown(self) -> None:
        """See Strategy. Waits for the saves in the background."""
        try:
            self._settle()
        finally:
            super().teardown()  # type: ignore[misc]


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
    The collective calls are made at the end of batches and of epochs. The states of callbacks are
    saved. Hooks named `on_save_checkpoint` and `on_load_checkpoint` are not called.

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
        if not self.resume:
            return
        state = self._state(trainer, pl_module)
        restored = self._manager.restore_latest(state)
        if restored is None:
            return
        self._saved_step = restored.step
        random = state["random"]
        set_random_state(random.value if isinstance(random, PerRank) else random)
        others = state["lightning"]
        others = others.value if isinstance(others, FromRank0) else others
        trainer.fit_loop.load_state_dict(others["fit_loop"])
        for config, values in zip(trainer.lr_scheduler_configs, others["schedulers"], strict=True):
            config.scheduler.load_state_dict(values)
        if others["precision"]:
            trainer.precision_plugin.load_state_dict(others["precision"])
        for callback in trainer.callbacks:
            if callback is not self and callback.state_key in others["callbacks"]:
                callback.load_state_dict(others["callbacks"][callback.state_key])

    def _state(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        others = {
            "fit_loop": trainer.fit_loop.state_dict(),
            "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
            "precision": trainer.precision_plugin.state_dict(),
            "callbacks": {
                callback.state_key: callback.state_dict()
                for callback in trainer.callbacks
                if callback is not self and callback.state_dict()
            },
        }
        return {
            "state_dict": _wrapped(trainer.strategy.model, pl_module),
            "optimizer_states": [getattr(o, "_optimizer", o) for o in trainer.optimizers],
            "lightning": FromRank0(others),
            "random": PerRank(random_state()),
        }

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
