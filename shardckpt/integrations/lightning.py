"""Strategies and a callback for Lightning, which save and resume with shardckpt.

    Trainer(strategy=ShardckptStrategy())                     # DDP
    Trainer(strategy=ShardckptModelParallelStrategy())        # FSDP2, tensor parallelism
    Trainer(strategy=ShardckptFSDPStrategy())                 # FSDP1

ModelCheckpoint, `trainer.save_checkpoint` and `ckpt_path=` work as before. Tested with lightning
2.6.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from shardckpt import api
from shardckpt.errors import StateError
from shardckpt.manager.manager import CheckpointManager
from shardckpt.saving.async_save import SaveHandle
from shardckpt.state.flatten import flatten
from shardckpt.state.markers import FromRank0, PerRank
from shardckpt.state.mismatches import mismatch_remedy
from shardckpt.state.module_state import (
    ModuleState,
    canonical_names,
    ddp_rank0_buffers,
    has_state,
    instances_in,
    named_state,
)
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
_OTHER_MODEL = "train the module that was saved, or set its strict_loading to False"
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
        self._is_set_up = False
        self._rank0_buffers: set[str] | None = None  # after teardown has taken DDP off the module
        self._handles: dict[str, SaveHandle] = {}  # by path
        self._obsolete: list[str] = []
        self._counting: list[Any] = []  # callbacks for which saves in the background exist
        self._foreign = False  # the checkpoint being restored is Lightning's own
        self._restored = ""  # the path of the checkpoint being restored
        self._loaded: dict[str, Any] = {}  # the weights of the module that it has filled

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """See Strategy: the model is filled after it was sharded and has its dtype."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """See Strategy."""
        return not self._foreign or bool(super().lightning_restore_optimizer)  # type: ignore[misc]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """See Strategy. The tensors alias those of the module."""
        return _own_weights(self.lightning_module)

    def optimizer_state(self, optimizer: Any) -> Any:
        """See Strategy. The optimizer itself is saved."""
        return getattr(optimizer, "_optimizer", optimizer)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """See Strategy. Collective. A checkpoint or link at the path is replaced.

        Only the saves of a running `fit` are in the background. A save for the queue of SLURM is
        not, as the job may be ended when it returns.
        """
        self._check_plugin()
        if storage_options is not None:
            raise StateError(
                "The strategy does not take storage options",
                path=str(filepath),
                expected="storage_options=None",
                actual=repr(storage_options),
                remedy="pass a URL as the path, and set the options of its storage",
            )
        path = os.fspath(self.broadcast(filepath))  # type: ignore[attr-defined]
        state = self._state(checkpoint)
        self._obsolete = [each for each in self._obsolete if each != path]
        self._settle()
        aside = self._prepare(path) if self.is_global_zero else []
        if _is_of_queue(path):
            self._save_for_queue(state, path)
        elif self.asynchronous and self._is_set_up:
            self._handles[path] = api.async_save(state, path, overwrite=True)
            # Callbacks and modules change weights outside of an optimizer's step, in any hook.
            self._handles[path].wait_staged()
        else:
            api.save(state, path, overwrite=True)
        self._obsolete += aside
        if not self._handles:
            self._settle()

    def _check_plugin(self) -> None:
        plugin = getattr(self, "_checkpoint_io", None)
        if plugin is not None and type(plugin).__name__ != "TorchCheckpointIO":
            raise StateError(
                "The strategy does not use a CheckpointIO",
                expected="no CheckpointIO plugin",
                actual=type(plugin).__qualname__,
                remedy="leave the plugin out; to save in the background, pass asynchronous=True",
            )

    def _save_for_queue(self, state: dict[str, Any], path: str) -> None:
        """Save under another name first: Lightning looks for a number in every name that contains
        `hpc_ckpt_`, also in those of the files that an interrupted save leaves."""
        if "://" in path or self.broadcast(os.path.exists(path)):  # type: ignore[attr-defined]
            api.save(state, path, overwrite=True)
            return
        unfinished = os.path.join(os.path.dirname(path), "unfinished.ckpt")
        api.save(state, unfinished, overwrite=True)
        if self.is_global_zero:
            os.replace(unfinished, path)

    def _prepare(self, path: str) -> list[str]:
        """Remove a link, and put a checkpoint of Lightning aside until the new one is complete.
        Return its new path.

        ModelCheckpoint may place a link beside a checkpoint whose save has not begun.
        """
        if "://" not in path:
            with contextlib.suppress(OSError):  # the save raises the error, on all ranks
                os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        if os.path.islink(path):
            self._unlink(path)
        elif os.path.isfile(path) or os.path.isfile(os.path.join(path, "meta.pt")):
            aside = f"{path}.replaced"
            os.replace(path, aside)
            return [aside]
        return []

    def _state(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        weights = self._weights_to_save(checkpoint["state_dict"])
        return _state_to_save(checkpoint, weights, self.lightning_module)

    def _weights_to_save(self, weights: dict[str, Any]) -> Any:
        if self._rank0_buffers is not None:
            return _saved_as_dict(weights, self.lightning_module, self._rank0_buffers)
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
        self._restored = path
        with api.open_checkpoint(path) as opened:
            others = dict(opened.load_state(keys=["lightning"])["lightning"])
        self._load_into({"state_dict": self._weights()})
        # Without lr_schedulers only weights were saved: Lightning raises an error that says so.
        states: dict[str, Any] = {"optimizer_states": []} if "lr_schedulers" in others else {}
        self._loaded = self.lightning_module_state_dict()
        return {**others, **states, "state_dict": dict(self._loaded)}

    def _load_into(self, state: dict[str, Any], keys: list[str] | None = None) -> None:
        strict = self.lightning_module.strict_loading
        with mismatch_remedy(_OTHER_MODEL):
            api.load(state, self._restored, strict=strict, keys=keys)
        self._place(state)

    def _weights(self) -> Any:
        """Return what the weights are loaded into."""
        return self.lightning_module

    def _optimizer_states(self) -> list[Any]:
        """Return what the states of the optimizers are loaded into."""
        return list(self.optimizers)

    def _place(self, state: dict[str, Any]) -> None:
        """Put the loaded state where it belongs, if it was not filled in place."""

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """See Strategy. load_checkpoint has filled the model. A hook may have put other weights
        into the checkpoint."""
        loaded, self._loaded = self._loaded, {}
        if self._foreign:
            super().load_model_state_dict(checkpoint, strict=strict)  # type: ignore[misc]
        elif not _are_same(checkpoint["state_dict"], loaded):
            self._set_weights(checkpoint["state_dict"], strict=strict)

    def _set_weights(self, weights: Mapping[str, Any], *, strict: bool) -> None:
        self.lightning_module.load_state_dict(weights, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """See Strategy. Collective. Fills the optimizers, and restores the random-number state."""
        trainer = self.lightning_module.trainer
        for callback in trainer.callbacks:
            if isinstance(callback, _pl.callbacks.BaseFinetuning):
                # It adds the parameters that the saved optimizer has. Lightning calls this before
                # it restores callbacks if `restore_checkpoint_after_setup` is set.
                callback.on_fit_start(trainer, self.lightning_module)
        if self._foreign:
            super().load_optimizer_state_dict(checkpoint)  # type: ignore[misc]
            return
        # The weights name the parameters. They are not loaded again: a hook may have changed them.
        optimizers, weights = self._optimizer_states(), self._weights()
        state: dict[str, Any] = {
            "optimizer_states": optimizers,
            "random": PerRank(random_state()),
        }
        keys = [name for name in state if name != "optimizer_states" or optimizers]
        state["state_dict"] = weights
        self._load_into(state, keys)
        random = state["random"]
        set_random_state(random.value if isinstance(random, PerRank) else random)

    def remove_checkpoint(self, filepath: Any) -> None:
        """See Strategy. The checkpoint stays until all saves in the background are complete."""
        self._obsolete.append(os.fspath(filepath))
        if not self._handles:
            self._settle()

    def _settle(self) -> None:
        """Wait for the saves in the background, and remove the checkpoints that are obsolete.

        After a failed save they stay: no newer one is complete.
        """
        try:
            for handle in self._handles.values():
                handle.result()
        except KeyboardInterrupt:  # teardown waits again
            raise
        except BaseException:
            self._handles, self._obsolete = {}, []
            raise
        self._handles = {}
        obsolete, self._obsolete = self._obsolete, []
        for path in obsolete:
            if os.path.islink(path):
                self._unlink(path)
            elif _is_foreign(path):
                super().remove_checkpoint(path)  # type: ignore[misc]
            elif self.is_global_zero:
                self._remove(path)

    def _remove(self, path: str) -> None:
        """Remove a checkpoint, if there is one. OnExceptionCheckpoint does not know."""
        place = resolve(path)
        if place.storage.exists(place.path):
            place.storage.remove(place.path)

    def _unlink(self, path: Any) -> None:
        """Remove a link that ModelCheckpoint made. Its target is another checkpoint, and stays."""
        if self.is_global_zero:
            os.unlink(path)

    def setup(self, trainer: Any) -> None:
        """See Strategy. ModelCheckpoint will not choose the path of a save in the background."""
        if trainer.state.fn == "fit" and trainer.checkpoint_callbacks:
            self._check_plugin()
            _check_hyperparameters(trainer)
        super().setup(trainer)  # type: ignore[misc]
        self._is_set_up, self._rank0_buffers = True, None
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
        self._is_set_up = False
        if isinstance(self.model, torch.nn.parallel.DistributedDataParallel):
            self._rank0_buffers = ddp_rank0_buffers(self.model)
        try:
            self._settle()
        finally:
            while self._counting:
                del self._counting.pop().file_exists
            super().teardown()  # type: ignore[misc]


def _state_to_save(checkpoint: dict[str, Any], weights: Any, module: Any) -> dict[str, Any]:
    """Return the state to save: what Lightning dumped, with tensors and other values apart."""
    others = {key: value for key, value in checkpoint.items() if key not in _TENSORS}
    _check_plain(others, "lightning")
    optimizers = checkpoint.get("optimizer_states", [])
    if not isinstance(weights, torch.nn.Module):
        optimizers = _named(optimizers, module)
    return {
        "state_dict": weights,
        "optimizer_states": optimizers,
        "lightning": _from_rank0(others),
        "random": PerRank(random_state()),
    }


def _from_rank0(value: Any) -> Any:
    """Mark values to save those of rank 0. Of a DTensor, every rank saves its part."""
    if not any(is_dtensor(each) for _, each in instances_in(value, torch.Tensor)):
        return FromRank0(value)
    if isinstance(value, Mapping):
        return {key: _from_rank0(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(_from_rank0, value))
    return value


def _check_plain(value: Any, name: str) -> None:
    """Raise StateError for a module or another object that has a state: a load would return the
    state in place of the object."""
    if isinstance(value, (Mapping, list, tuple)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, each in items:
            _check_plain(each, f"{name}.{key}")
    elif has_state(value):
        raise StateError(
            "Lightning would pickle this object",
            tensor=name,
            expected="values and tensors",
            actual=type(value).__qualname__,
            remedy="name a hyperparameter in the argument `ignore` of save_hyperparameters; in a "
            "hook, put the state_dict() of the object into the checkpoint",
        )


def _check_hyperparameters(trainer: Any) -> None:
    """Raise the error of the first save when `fit` begins. A hook may remove what can't be saved,
    and is called by a save only."""
    module = trainer.lightning_module
    if any(_has_save_hook(each) for each in (module, *trainer.callbacks)):
        return
    for each in (module, trainer.datamodule):
        if each is not None and each.hparams:
            values = {each.CHECKPOINT_HYPER_PARAMS_KEY: dict(each.hparams)}
            _check_plain(values, "lightning")
            flatten({"lightning": FromRank0(values)}, rank=0)


def _has_save_hook(part: Any) -> bool:
    base = _pl.LightningModule if isinstance(part, _pl.LightningModule) else _pl.Callback
    return type(part).on_save_checkpoint is not base.on_save_checkpoint


def _weights_to_save(weights: dict[str, Any], model: Any, module: Any) -> Any:
    """Return the module, which names the optimizer's parameters, unless a hook has changed its
    state dict."""
    wrapped = _wrapped(model, module)
    if _is_own(weights, module):
        return wrapped
    return _saved_as_dict(weights, module, ddp_rank0_buffers(wrapped))


def _saved_as_dict(weights: Mapping[str, Any], module: Any, rank0_buffers: set[str]) -> ModuleState:
    names = canonical_names(module)  # without the prefixes of torch.compile
    entries = {names.get(key, key): value for key, value in weights.items()}
    return ModuleState(entries, set(), rank0_buffers & entries.keys())


def _own_weights(module: Any) -> dict[str, Any]:
    """Return the state dict of a module. Its tensors alias those of the module."""
    return named_state(module, keep_vars=False).tensors


def _is_own(weights: Mapping[str, Any], module: Any) -> bool:
    """Whether these are the tensors of the module."""
    return _are_same(weights, _own_weights(module))


def _are_same(weights: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
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


def _is_of_queue(path: str) -> bool:
    """Whether Lightning saves to this path before it puts its job back into the queue of SLURM."""
    return os.path.basename(path).startswith("hpc_ckpt_")


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


def _no_full_checkpoint(option: str) -> StateError:
    return StateError(
        "A checkpoint of shardckpt is not a single file",
        expected="every rank saves its part",
        actual=option,
        remedy="leave it out; shardckpt.convert writes a single file",
    )


class ShardckptModelParallelStrategy(_Saving, _strategies.ModelParallelStrategy):
    """Lightning's ModelParallelStrategy (FSDP2, tensor parallelism), with checkpoints of shardckpt.

    Args:
        asynchronous: See ShardckptStrategy.
        **options: Arguments of ModelParallelStrategy, but not save_distributed_checkpoint=False:
            every rank saves its part.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> strategy = ShardckptModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=2)
    """

    def __init__(self, **options: Any) -> None:
        if not options.get("save_distributed_checkpoint", True):
            raise _no_full_checkpoint("save_distributed_checkpoint=False")
        super().__init__(**options)


class ShardckptFSDPStrategy(_Saving, _strategies.FSDPStrategy):
    """Lightning's FSDPStrategy, with checkpoints of shardckpt.

    Args:
        asynchronous: See ShardckptStrategy.
        **options: Arguments of FSDPStrategy, but not state_dict_type="full": every rank saves its
            part.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(strategy=ShardckptFSDPStrategy(), accelerator="gpu", devices=2)
    """

    def __init__(self, **options: Any) -> None:
        if options.get("state_dict_type") == "full":
            raise _no_full_checkpoint('state_dict_type="full"')
        super().__init__(**options)

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

    def _weights(self) -> Any:
        return self.lightning_module_state_dict()

    def _optimizer_states(self) -> list[Any]:
        return [self.optimizer_state(optimizer) for optimizer in self.optimizers]

    def _set_weights(self, weights: Mapping[str, Any], *, strict: bool) -> None:
        self._place({"state_dict": weights})

    def _place(self, state: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.state_dict import (
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        if "optimizer_states" not in state:
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

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the last place, as the states of other callbacks change at the end of a batch."""
        trainer.callbacks = [*self._others(trainer), self]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the folder, and restore the newest checkpoint in it."""
        self._manager = CheckpointManager(self.folder, **self._options)
        if self.resume and trainer.ckpt_path and self._manager.checkpoints():
            raise StateError(
                "There are two checkpoints to resume from",
                path=str(self.folder),
                expected="ckpt_path=None, or a folder without checkpoints",
                actual=f"ckpt_path={trainer.ckpt_path!r}",
                remedy="leave out ckpt_path, or remove its checkpoint if Lightning itself has "
                "found it (OnExceptionCheckpoint, SLURM), or pass resume=False to "
                "ShardckptCallback",
            )
        _check_hyperparameters(trainer)
        if self.resume:
            self._restore(self._manager, trainer, pl_module)

    def _restore(self, manager: CheckpointManager, trainer: Any, pl_module: Any) -> None:
        state = {
            "state_dict": pl_module,
            "optimizer_states": _optimizers(trainer),
            "lightning": FromRank0({}),
            "random": PerRank(random_state()),
        }
        with mismatch_remedy(_OTHER_MODEL):
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
        # After a resume from an older checkpoint, those that follow it are replaced.
        if_exists: Literal["overwrite", "error"] = "overwrite" if self.resume else "error"
        self._manager.save(step, self._state(trainer, pl_module), if_exists=if_exists)
        self._manager.wait_staged()  # callbacks and modules change weights in any hook

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Wait for saves in the background. Lightning does not call teardown after an error."""
        if self._manager is not None:
            self._manager.__exit__(type(exception), exception, None)
            self._manager = None

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
        "state_dict": _own_weights(module),
        "loops": {
            f"{name}_loop": getattr(trainer, f"{name}_loop").state_dict()
            for name in ("fit", "validate", "test", "predict")
        },
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
    checkpoint = {**others, "state_dict": _own_weights(module), "optimizer_states": []}
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
    configs, states = trainer.lr_scheduler_configs, checkpoint["lr_schedulers"]
    if len(configs) != len(states):
        raise StateError(
            "The checkpoint has another number of schedulers",
            expected=f"{len(states)} schedulers, as saved",
            actual=str(len(configs)),
            remedy="return as many from configure_optimizers, or pass resume=False to "
            "ShardckptCallback",
        )
    for config, values in zip(configs, states, strict=True):
        config.scheduler.load_state_dict(values)
