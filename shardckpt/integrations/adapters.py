"""The weights and the configuration of one adapter of PEFT, as peft writes them to a folder.

Tested with peft 0.21.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from shardckpt.errors import StateError
from shardckpt.torch_compat import is_dtensor

__all__ = [
    "adapter_weights",
    "check_loadable",
    "class_before_sharding",
    "is_adapter",
    "save_adapter_config",
    "set_adapter_weights",
]

_PREFIX = "base_model.model."


def is_adapter(model: Any) -> bool:
    """Return whether a model, without wrappers, has adapters."""
    return bool(getattr(model, "peft_config", None)) and hasattr(model, "active_adapters")


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights of the active adapter by their names in a file of peft.

    Most of them are the model's own parameters. peft computes the others, such as prompts.

    Raises:
        StateError: Not one adapter is active, or it can't be computed from shards.
    """
    from peft import get_peft_model_state_dict

    name = _active(model)
    with _as_for_inference(model, name), torch.no_grad():
        own = model.state_dict(keep_vars=True)
        weights = get_peft_model_state_dict(model, own, adapter_name=name)
    prefix = "" if _is_peft_model(model) else _PREFIX
    return {f"{prefix}{key}": weight for key, weight in weights.items()}


def check_loadable(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse an adapter that a file can't fill: on the meta device, or with a prompt encoder of
    which the file has only the output.

    Raises:
        StateError: See above.
    """
    meta = next((key for key, weight in weights.items() if weight.is_meta), None)
    if meta is not None:
        raise StateError(
            "An adapter on the meta device can't be loaded",
            tensor=meta,
            expected="weights with memory",
            actual="device meta",
            remedy="build the adapter outside of torch.device('meta')",
        )
    lacking = sorted(_prompt_layers(model, _active(model)))
    if lacking:
        raise StateError(
            "A prompt encoder with layers can't be loaded: the file has only its output",
            tensor=lacking[0],
            expected="a prompt encoder without layers",
            actual=", ".join(lacking),
            remedy="build the adapter with inference_mode=True; save a training with "
            "shardckpt.save, which saves the layers",
        )


def set_adapter_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Give the active adapter the weights that `adapter_weights` returned and a load has filled."""
    from peft import set_peft_model_state_dict

    if not _is_peft_model(model):
        weights = {key.removeprefix(_PREFIX): weight for key, weight in weights.items()}
    with torch.no_grad():
        set_peft_model_state_dict(model, dict(weights), adapter_name=_active(model))


def save_adapter_config(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write the configuration of the active adapter, as PeftModel.save_pretrained does."""
    config, classes = copy.deepcopy(model.peft_config[_active(model)]), None
    if _is_peft_model(model):
        base = model.base_model if config.is_prompt_learning else model.base_model.model
        config.inference_mode = True
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = base.__dict__.get("name_or_path") or None
        if config.task_type is None:
            base_class = class_before_sharding(base)
            names = base_class.__name__, base_class.__module__
            classes = dict(zip(("base_model_class", "parent_library"), names, strict=True))
    config.save_pretrained(folder, auto_mapping_dict=classes)


def class_before_sharding(model: Any) -> Any:
    """Return the class that a model had before fully_shard replaced it."""
    from torch.distributed.fsdp import FSDPModule

    return next(each for each in type(model).__mro__ if not issubclass(each, FSDPModule))


def _is_peft_model(model: Any) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)


def _active(model: Any) -> str:
    active = model.active_adapters
    names: list[str] = active() if callable(active) else active
    if len(names) != 1:
        raise StateError(
            "Only one adapter can be saved or loaded at a time",
            expected="one active adapter",
            actual=", ".join(names) or "none",
            remedy="call model.set_adapter(name) first",
        )
    return names[0]


def _prompt_layers(model: Any, name: str) -> dict[str, torch.Tensor]:
    """Return the parameters of a prompt encoder in training that its file lacks."""
    config = model.peft_config[name]
    if not config.is_prompt_learning or config.inference_mode:
        return {}
    saved = {"embedding.weight", "prefix_task_cols", "prefix_task_rows"}
    parameters = model.prompt_encoder[name].named_parameters()
    return {key: weight for key, weight in parameters if key not in saved}


@contextmanager
def _as_for_inference(model: Any, name: str) -> Iterator[None]:
    """Let peft return the embedding of a prompt encoder itself where its output is the same."""
    config, layers = model.peft_config[name], _prompt_layers(model, name)
    if any(map(is_dtensor, layers.values())):
        raise StateError(
            "The output of a prompt encoder can't be computed from shards",
            tensor=min(layers),
            expected="a prompt encoder that is not sharded",
            actual="layers in shards",
            remedy="call fully_shard with ignored_params={*model.prompt_encoder.parameters()}",
        )
    before = config.inference_mode
    if config.is_prompt_learning and not layers:
        config.inference_mode = True
    try:
        yield
    finally:
        config.inference_mode = before
