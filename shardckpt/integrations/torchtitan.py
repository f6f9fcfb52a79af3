"""A checkpoint manager for torchtitan.

    Trainer.Config(..., checkpoint=ShardckptManager.Config(enable=True, interval=500))

It honours all options of torchtitan's BaseCheckpointManager.Config. Tested with torchtitan 0.3.
"""

from __future__ import annotations

import os
import shutil
import sys
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torchdata.stateful_dataloader import StatefulDataLoader
from torchtitan.components.checkpointer import BaseCheckpointManager
from torchtitan.components.checkpointer.base import (
    DATALOADER,
    LR_SCHEDULER,
    MODEL,
    OPTIMIZER,
    ModelWrapper,
)
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools import filesystem

from shardckpt import api
from shardckpt.convert.convert import convert_source
from shardckpt.convert.opening import open_source
from shardckpt.convert.source_loading import load_source
from shardckpt.coordination.exchange import Attempt, attempt
from shardckpt.coordination.resolve import operation
from shardckpt.errors import CheckpointNotFoundError, StateError
from shardckpt.integrations.transformers import working_folder
from shardckpt.maintenance.rewritable import Source
from shardckpt.manager.manager import CheckpointManager
from shardckpt.manager.retention import KeepLast
from shardckpt.state.markers import Union
from shardckpt.state.matching import DtypePolicy
from shardckpt.state.mismatches import mismatch_remedy
from shardckpt.storage.resolve import resolve

__all__ = ["ShardckptManager"]

_OTHER_STATE = (
    "train the model that was saved; checkpoint.exclude_from_loading leaves out other states, and "
    "checkpoint.initial_load_model_only=True all of them"
)
_OTHER_MODEL = "set checkpoint.initial_load_path to a checkpoint of this model"


class ShardckptManager(BaseCheckpointManager):
    """torchtitan's checkpoint manager, with checkpoints of shardckpt. All calls are collective.

    A checkpoint has the model, the optimizers under the names of their parameters, the schedulers,
    the position of each data-parallel rank in the data, and the other states of the trainer. Any
    number of ranks resumes it. On another data-parallel degree the position in the data is refused,
    as by torchtitan itself: `exclude_from_loading=["dataloader"]` begins the data anew.

    Args:
        config: The options of torchtitan, and `asynchronous`, which saves in the background.
        dataloader: The loader of this rank.
        model_parts: The models of this rank.
        optimizers: Their optimizers.
        lr_schedulers: Their schedulers.
        states: The other states of the trainer.
        sd_adapter: Converts the model's state to that of Hugging Face.
        base_folder: The folder below which `config.folder` is.

    Example:
        >>> checkpoint = ShardckptManager.Config(enable=True, interval=100, keep_latest_k=2)
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseCheckpointManager.Config):
        """Options: see torchtitan's BaseCheckpointManager.Config."""

        asynchronous: bool = False
        """Save in the background."""

    def __init__(
        self,
        config: Config,
        *,
        dataloader: Any,
        model_parts: list[torch.nn.Module],
        optimizers: Any,
        lr_schedulers: Any,
        states: dict[str, Any],
        sd_adapter: Any,
        base_folder: str = "",
    ) -> None:
        self.enable = config.enable
        self.save_future: Future[None] | None = None
        if not self.enable:
            return
        if config.last_save_in_hf and sd_adapter is None:
            raise StateError(
                "The final checkpoint can't be in the layout of Hugging Face",
                expected="a model with a state_dict_adapter",
                actual="sd_adapter=None",
                remedy="set checkpoint.last_save_in_hf to False",
            )
        self.config, self.sd_adapter = config, sd_adapter
        self.folder = filesystem.join(base_folder, config.folder)
        self.model = ModelWrapper(model_parts)
        self.states = {
            **states,
            MODEL: self.model,
            OPTIMIZER: optimizers,
            DATALOADER: dataloader,
            LR_SCHEDULER: lr_schedulers,
        }
        self.manager = CheckpointManager(
            self.folder,
            keep=[KeepLast(config.keep_latest_k)] if config.keep_latest_k else [],
            asynchronous=config.asynchronous,
        )

    def _state(self, keys: set[str]) -> dict[str, Any]:
        """Return plain state dicts by name."""
        return {key: self._of(key, self.states[key]) for key in sorted(keys)}

    def _of(self, key: str, part: Any) -> Any:
        if part is None:
            return {}
        if _is_plain_loader(part):
            # torchtitan's own state_dict is pickled
            position = StatefulDataLoader.state_dict(part)
            ranks = {f"dp_rank_{part.dp_rank}": position}
            return Union({**ranks, "world_size": part.dp_world_size})
        return Union(part.state_dict()) if key == DATALOADER else part.state_dict()

    def _restore(self, key: str, values: Any) -> None:
        part = self.states[key]
        if isinstance(values, Union):
            values = values.value
        if _is_plain_loader(part):
            if values["world_size"] != part.dp_world_size:
                raise StateError(
                    "The position in the data does not fit another data-parallel degree",
                    tensor=DATALOADER,
                    expected=f"degree {values['world_size']}, as saved",
                    actual=f"degree {part.dp_world_size}",
                    remedy='set checkpoint.exclude_from_loading to ["dataloader"]',
                )
            StatefulDataLoader.load_state_dict(part, values[f"dp_rank_{part.dp_rank}"])
        elif part is not None:
            part.load_state_dict(values)

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        config = self.config
        due = last_step or curr_step % config.interval == 0
        due |= curr_step == 1 and config.enable_first_step_checkpoint
        due |= curr_step == 0 and config.create_seed_checkpoint
        if config.load_only or not due:
            return False
        if last_step and config.last_save_in_hf:
            self.manager.wait()
            self._save_hugging_face(os.path.join(self.folder, f"step-{curr_step}"))
        elif last_step and config.last_save_model_only:
            self._save_state(curr_step, {MODEL: self._exported()})
        else:
            self._save_state(curr_step, self._state(set(self.states)))
        if last_step:
            self._wait_for_saving()
        return True

    def _save_state(self, step: int, state: dict[str, Any]) -> None:
        # After a load of an older checkpoint, those that follow it are replaced.
        if not dist.is_initialized() or dist.get_rank() == 0:
            _keep_hugging_face(os.path.join(self.folder, f"step-{step}"))
        self.manager.save(step, state, if_exists="overwrite")
        if self.config.asynchronous:
            self.save_future = Future()  # by which the base class knows that there is a save

    def _exported(self) -> dict[str, Any]:
        dtype = TORCH_DTYPE_MAP[self.config.export_dtype]
        return {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in self.model.state_dict().items()
        }

    def _save_hugging_face(self, path: str) -> None:
        weights = self.sd_adapter.to_hf(self._exported())
        with working_folder(path) as work:
            saved = os.path.join(work, "weights")
            api.save(weights, saved)
            with operation(f"save {path}") as ranks, api.open_checkpoint(saved) as checkpoint:
                convert_source(
                    checkpoint,
                    resolve(path),
                    to="hf",
                    shards=None,
                    file_bytes=None,
                    overwrite=True,
                    coordinator=ranks,
                )

    def _load(self, step: int = -1) -> bool:
        config = self.config
        saved = {one.step: one.path for one in self.manager.checkpoints()}
        if step != -1 and step not in saved:
            raise CheckpointNotFoundError(
                "The folder contains no checkpoint of this step",
                path=self.folder,
                expected=f"step {step}",
                actual=f"steps {sorted(saved)}",
                remedy="set checkpoint.load_step to one of them, or to -1 for the newest",
            )
        if not saved:
            self._check_new()
        if saved:
            model_only = (step if step != -1 else max(saved)) == 0
            self._load_from(saved.get(step), model_only=model_only)
        elif config.initial_load_in_hf:
            self._load_hugging_face(config.initial_load_path or self._hugging_face_assets())
        elif config.initial_load_path and _is_of_torchtitan(config.initial_load_path):
            self._load_torchtitan(config.initial_load_path)
        elif config.initial_load_path:
            self._load_from(
                config.initial_load_path, model_only=config.initial_load_model_only, dtype="cast"
            )
        else:
            return False
        return True

    def _check_new(self) -> None:
        """Raise StateError if torchtitan itself has saved in the folder."""
        names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        paths = [os.path.join(self.folder, name) for name in sorted(names)]
        if found := [path for path in paths if _is_of_torchtitan(path)]:
            raise StateError(
                "The folder has checkpoints of torchtitan's own manager",
                path=self.folder,
                expected="checkpoints of shardckpt, or none",
                actual=", ".join(map(os.path.basename, found)),
                remedy="set checkpoint.folder to another folder, and checkpoint.initial_load_path "
                "to one of them to load its model",
            )

    def _load_from(
        self, path: str | None, *, model_only: bool, dtype: DtypePolicy = "strict"
    ) -> None:
        """Load a checkpoint, or the newest that verifies."""
        keys = {MODEL} if model_only else set(self.states) - self._excluded()
        state = self._state(keys)
        with mismatch_remedy(_OTHER_STATE):
            if path is None:
                self.manager.restore_latest(state)
            else:
                api.load(state, path, dtype=dtype)
        for key, values in state.items():
            self._restore(key, values)

    def _excluded(self) -> set[str]:
        excluded = set(self.config.exclude_from_loading)
        if unknown := excluded - self.states.keys():
            raise StateError(
                "checkpoint.exclude_from_loading has a name that no state has",
                expected=f"some of {sorted(self.states)}",
                actual=f"{sorted(unknown)}",
                remedy="correct the name, or leave it out",
            )
        return excluded

    def _hugging_face_assets(self) -> str:
        path = getattr(self.sd_adapter, "hf_assets_path", None)
        if path is None:
            raise StateError(
                "The path of the checkpoint of Hugging Face is not set",
                expected="checkpoint.initial_load_path, or hf_assets_path of the model",
                actual="neither",
                remedy="set one of them, or set checkpoint.initial_load_in_hf to False",
            )
        return str(path)

    def _load_hugging_face(self, path: str) -> None:
        if self.config.initial_load_in_hf_quantized:
            raise StateError(
                "Quantized checkpoints of Hugging Face can't be loaded",
                path=path,
                expected="checkpoint.initial_load_in_hf_quantized=False",
                actual="True",
                remedy="load it with torchtitan's own CheckpointManager, and save it",
            )
        state = self.sd_adapter.to_hf(self.model.state_dict())
        _load_source(state, path)
        self.model.load_state_dict(self.sd_adapter.from_hf(state))

    def _load_torchtitan(self, path: str) -> None:
        """Load the model from a checkpoint of torchtitan's own manager."""
        if not self.config.initial_load_model_only:
            raise StateError(
                "Only the model of torchtitan's own checkpoints can be loaded",
                path=path,
                expected="checkpoint.initial_load_model_only=True",
                actual="False",
                remedy="set it to True, or finish the run with torchtitan's own CheckpointManager",
            )
        state = self.model.state_dict()
        _load_source(state, path)
        self.model.load_state_dict(state)

    def _maybe_wait_for_staging(self) -> None:
        self.manager.wait_staged()

    def _wait_for_saving(self) -> None:
        self.manager.wait()
        if self.save_future is not None:
            self.save_future.set_result(None)
            self.save_future = None

    def _close(self) -> None:
        if hasattr(self, "manager"):
            # torchtitan also calls this after an error, which other ranks may not have.
            self.manager.__exit__(*sys.exc_info())


def _keep_hugging_face(path: str) -> None:
    """Rename a final checkpoint in the layout of Hugging Face that is at the path of a save."""
    names = ("model.safetensors", "model.safetensors.index.json")
    if any(os.path.isfile(os.path.join(path, name)) for name in names):
        kept = f"{path}-hf"
        shutil.rmtree(kept, ignore_errors=True)
        os.replace(path, kept)


def _is_plain_loader(part: Any) -> bool:
    """Whether this is a loader of torchtitan that does not define its own state."""
    return (
        isinstance(part, ParallelAwareDataloader)
        and type(part).state_dict is ParallelAwareDataloader.state_dict
        and type(part).load_state_dict is ParallelAwareDataloader.load_state_dict
    )


def _is_of_torchtitan(path: str) -> bool:
    """Whether a local folder has a checkpoint of torchtitan's own manager, which uses DCP."""
    return os.path.isfile(os.path.join(path, ".metadata"))


def _load_source(state: dict[str, Any], path: str) -> None:
    """Load a checkpoint of another library into a state, in place. Collective."""
    with operation(f"load {path}") as ranks:
        opened: Attempt[Source] = attempt(open_source, path, check=False)
        try:
            with mismatch_remedy(_OTHER_MODEL):
                load_source(state, path, opened, ranks, strict=True, cast=True)
        finally:
            if opened.value is not None:
                opened.value.close()
