"""Save and load the state of an Accelerator.

    save_state(accelerator, "run/step-100")
    load_state(accelerator, "run/step-100")

or `use_shardckpt(accelerator)`, after which `accelerator.save_state` and `accelerator.load_state`
do the same. Tested with accelerate 1.15.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping
from typing import Any

from shardckpt import api
from shardckpt.errors import CheckpointNotFoundError, StateError
from shardckpt.reports import LoadReport, SaveReport
from shardckpt.state.file_groups import frozen_entries
from shardckpt.state.markers import FromRank0, PerRank
from shardckpt.state.module_state import ModuleState, canonical_names, module_state
from shardckpt.state.optimizer_state import OptimizerState, ParameterNames, optimizer_state
from shardckpt.state.random_state import random_state, set_random_state
from shardckpt.storage.resolve import resolve

__all__ = ["load_state", "save_state", "use_shardckpt"]


def save_state(accelerator: Any, path: str | os.PathLike[str], **options: Any) -> SaveReport:
    """Save the state that `accelerator.save_state` saves. Each rank writes its own part.

    Collective. The state has the prepared models, optimizers, schedulers and samplers, the gradient
    scaler, the objects of `register_for_checkpointing`, and the random-number state of every rank.

    Args:
        accelerator: The accelerator, after `prepare`.
        path: The new checkpoint.
        **options: Arguments of `shardckpt.save`, such as `overwrite`, `base` and `storage`.

    Returns:
        The report of the save.

    Raises:
        StateError: The state can't be saved.
        StorageError: The file system refused an operation.
        CoordinationError: A rank failed, or the ranks are not connected.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> accelerator = Accelerator(cpu=True)
        >>> model = accelerator.prepare(torch.nn.Linear(4, 2))
        >>> report = save_state(accelerator, "run/step-1")
    """
    return api.save(_state_to_save(accelerator), path, **options)


def load_state(accelerator: Any, path: str | os.PathLike[str], **options: Any) -> LoadReport:
    """Load what `save_state` has saved, on any number of ranks.

    Collective. On another number of ranks each rank keeps its own random-number state.

    Args:
        accelerator: The accelerator, after `prepare` with the same kinds of objects.
        path: The checkpoint.
        **options: Arguments of `shardckpt.load`, such as `strict`, `dtype` and `storage`.

    Returns:
        The report of the load.

    Raises:
        LoadMismatchError: The checkpoint does not fit the prepared objects.
        CheckpointError: The checkpoint can't be read.
        CoordinationError: A rank failed, or the ranks are not connected.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> accelerator = Accelerator(cpu=True)
        >>> model = accelerator.prepare(torch.nn.Linear(4, 2))
        >>> report = save_state(accelerator, "run/step-1")
        >>> load_state(accelerator, "run/step-1").missing
        ()
    """
    state = _state(accelerator)
    report = api.load(state, path, **options)
    random = state["random"]
    set_random_state(random.value if isinstance(random, PerRank) else random)
    accelerator.step = state["step"]
    for loader, position in zip(accelerator._dataloaders, state["dataloaders"], strict=True):
        _resume(loader, position)
    return report


def use_shardckpt(accelerator: Any) -> None:
    """Make `accelerator.save_state` and `accelerator.load_state` use shardckpt. Not collective.

    Automatic names of a ProjectConfiguration and its `total_limit` work as before. Hooks of
    `register_save_state_pre_hook` and `register_load_state_pre_hook` are called with lists of the
    models and of their state dicts. All models are saved and loaded, also those that a hook takes
    out of the lists. A hook can't write files into the folder of the checkpoint.

    `save_state` also takes the arguments of `shardckpt.save`, and `load_state` those of
    `shardckpt.load`, such as `strict=False`. Both refuse `storage` and the arguments that only the
    files of accelerate have, such as `safe_serialization=False`. `load_state` returns the report.

    Args:
        accelerator: The accelerator.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> accelerator = Accelerator(cpu=True)
        >>> use_shardckpt(accelerator)
        >>> model = accelerator.prepare(torch.nn.Linear(4, 2))
        >>> path = accelerator.save_state("run/step-1")
    """

    def save(output_dir: str | None = None, safe_serialization: bool = True, **options: Any) -> str:
        if not safe_serialization:
            options["safe_serialization"] = safe_serialization
        _check_options("save_state", api.save, options)
        path = _path_to_save(accelerator, output_dir)
        for hook in accelerator._save_model_state_pre_hook.values():
            models = list(accelerator._models)  # a hook may take models and weights out
            hook(models, [model.state_dict() for model in models], path)
        automatic = accelerator.project_configuration.automatic_checkpoint_naming
        save_state(accelerator, path, **{"overwrite": not automatic, **options})
        accelerator.project_configuration.iteration += 1
        if automatic:
            _remove_old(accelerator)
        return path

    def load(
        input_dir: str | None = None, load_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> LoadReport:
        if options.get("map_location") in (None, "cpu", "on_device"):
            options.pop("map_location", None)  # tensors are filled on their devices
        if load_kwargs:
            options["load_kwargs"] = load_kwargs
        _check_options("load_state", api.load, options)
        path = _path_to_load(accelerator, input_dir)
        for hook in accelerator._load_model_state_pre_hook.values():
            hook(list(accelerator._models), path)
        report = load_state(accelerator, path, **options)
        if accelerator.project_configuration.automatic_checkpoint_naming:
            _continue_numbers(accelerator)
        return report

    accelerator.save_state, accelerator.load_state = save, load


def _check_options(call: str, function: Any, options: Mapping[str, Any]) -> None:
    """Refuse options that the function of shardckpt does not take, and `storage`, which automatic
    names and their limit would not use."""
    known = inspect.signature(function).parameters.keys() - {"state", "path", "storage"}
    if unknown := sorted(options.keys() - known):
        raise StateError(
            f"{call} of shardckpt does not take these arguments",
            expected=f"arguments of shardckpt.{function.__name__}: {', '.join(sorted(known))}",
            actual=", ".join(f"{name}={options[name]!r}" for name in unknown),
            remedy="leave them out; shardckpt writes no pickle files, and fills tensors in place. "
            f"For storage=, call {call}(accelerator, path, storage=...) of "
            "shardckpt.integrations.accelerate",
        )


def _state(accelerator: Any) -> dict[str, Any]:
    unsupported = str(accelerator.distributed_type).rsplit(".", 1)[-1]
    if unsupported in ("DEEPSPEED", "MEGATRON_LM", "XLA"):
        raise StateError(
            "The state of this accelerator can't be saved",
            expected="one process, DDP or FSDP2",
            actual=unsupported,
            remedy="use accelerate's own save_state",
        )
    scaler = accelerator.scaler
    return {
        "models": list(accelerator._models),
        "optimizers": [optimizer.optimizer for optimizer in accelerator._optimizers],
        "schedulers": [scheduler.scheduler for scheduler in accelerator._schedulers],
        "scaler": scaler if scaler is not None else {},
        "objects": list(accelerator._custom_objects),
        "dataloaders": [_position(loader) for loader in accelerator._dataloaders],
        "step": accelerator.step,
        "random": PerRank(random_state()),
    }


def _state_to_save(accelerator: Any) -> dict[str, Any]:
    """Return the state, with the buffers of rank 0 under DDP: those of batch norms differ between
    ranks, and accelerate has only the models inside DDP."""
    state = _state(accelerator)
    is_ddp = str(accelerator.distributed_type).rsplit(".", 1)[-1].startswith("MULTI_")
    if not (is_ddp and getattr(accelerator.ddp_handler, "broadcast_buffers", True)):
        return state

    def buffers(model: Any) -> set[str]:
        names = canonical_names(model)
        return {names[name] for name, _ in model.named_buffers() if name in names}

    models, first = state["models"], accelerator.is_main_process
    names = ParameterNames([(f"models.{at}", model) for at, model in enumerate(models)])
    state["optimizers"] = [
        OptimizerState(optimizer_state(optimizer, names, at=f"optimizers.{at}"))
        for at, optimizer in enumerate(state["optimizers"])
    ]
    state["models"] = [
        ModuleState(module_state(model), frozen_entries(model), set() if first else buffers(model))
        for model in models
    ]
    return state


def _position(loader: Any) -> dict[str, Any]:
    """Return the epoch of a prepared loader, the seed of its sampler, and the position of a
    StatefulDataLoader."""
    from accelerate.data_loader import SeedableRandomSampler

    position: dict[str, Any] = {"iteration": getattr(loader, "iteration", 0)}
    sampler = loader.get_sampler() if hasattr(loader, "get_sampler") else None
    if isinstance(sampler, SeedableRandomSampler):
        position["sampler"] = {"epoch": sampler.epoch, "seed": sampler.initial_seed}
    position = {"epoch": FromRank0(position)}
    if getattr(loader, "use_stateful_dataloader", False):
        position["stateful"] = PerRank(loader.state_dict(), on_resize="error")
    return position


def _resume(loader: Any, position: dict[str, Any]) -> None:
    epoch = position["epoch"]
    epoch = epoch.value if isinstance(epoch, FromRank0) else epoch
    if hasattr(loader, "iteration"):
        loader.iteration = epoch["iteration"]
    if "sampler" in epoch:
        sampler = loader.get_sampler()
        sampler.epoch, sampler.initial_seed = epoch["sampler"]["epoch"], epoch["sampler"]["seed"]
    if "stateful" in position:
        stateful = position["stateful"]
        loader.load_state_dict(stateful.value if isinstance(stateful, PerRank) else stateful)


def _numbered(accelerator: Any) -> list[str]:
    """Return the checkpoints with automatic names, oldest first."""
    folder = os.path.join(accelerator.project_dir, "checkpoints")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    numbers = sorted(int(n[11:]) for n in names if re.fullmatch(r"checkpoint_\d+", n))
    return [os.path.join(folder, f"checkpoint_{number}") for number in numbers]


def _continue_numbers(accelerator: Any) -> None:
    """Give the next save the number after the newest checkpoint, as a new process begins at 0."""
    saved, configuration = _numbered(accelerator), accelerator.project_configuration
    if saved:
        newest = int(saved[-1].rpartition("_")[2])
        configuration.iteration = max(configuration.iteration, newest + 1)


def _path_to_save(accelerator: Any, path: str | None) -> str:
    configuration = accelerator.project_configuration
    if configuration.automatic_checkpoint_naming:
        name = f"checkpoint_{configuration.iteration}"
        return os.path.join(accelerator.project_dir, "checkpoints", name)
    if path is None:
        raise StateError(
            "No path for the checkpoint",
            expected="a path, or automatic names",
            actual="None",
            remedy="pass output_dir=, or ProjectConfiguration(automatic_checkpoint_naming=True)",
        )
    return os.fspath(path)


def _path_to_load(accelerator: Any, path: str | None) -> str:
    if path is not None:
        return os.fspath(path)
    saved = _numbered(accelerator) if accelerator.project_dir else []
    if not saved:
        raise CheckpointNotFoundError(
            "The project folder contains no checkpoint with an automatic name",
            path=accelerator.project_dir,
            expected="checkpoints/checkpoint_N in the project folder",
            actual="none",
            remedy="pass input_dir=",
        )
    return saved[-1]


def _remove_old(accelerator: Any) -> None:
    """Remove the oldest checkpoints beyond `total_limit`, after the new one is complete."""
    limit = accelerator.project_configuration.total_limit
    if limit is not None and accelerator.is_main_process:
        for path in _numbered(accelerator)[:-limit]:
            place = resolve(path)
            place.storage.remove(place.path)
