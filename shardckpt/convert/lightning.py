"""The state of a checkpoint file of Lightning, which `Trainer.fit(ckpt_path=...)` and
`LightningModule.load_from_checkpoint` read.

A source that Lightning wrote, or the strategies of shardckpt, has the entries of Lightning already.
Otherwise `model` becomes `state_dict`, `optimizer` becomes the only item of `optimizer_states`, and
`scheduler` that of `lr_schedulers`. Lightning's optimizers are those of torch, whose states have
indices in place of names. Integers `step` and `epoch` become the progress of the Trainer. Tested
with lightning 2.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from shardckpt.errors import StateError

__all__ = ["LIGHTNING_SUFFIX", "lightning_state"]

LIGHTNING_SUFFIX = ".ckpt"
_VERSION = "pytorch-lightning_version"
_WRITTEN_VERSION = "2.6.0"
_SINGLE = {"optimizer": "optimizer_states", "scheduler": "lr_schedulers"}


def lightning_state(state: Mapping[Any, Any], path: str) -> dict[Any, Any]:
    """Return the state in the layout of Lightning. Raises StateError if it holds no weights."""
    rest = dict(state)
    if isinstance(others := rest.get("lightning"), Mapping) and "state_dict" in rest:
        rest = {**others, **{key: item for key, item in rest.items() if key != "lightning"}}
    prefix = "state_dict."  # a rename may add a prefix to the names of the weights
    if deeper := [key for key in rest if isinstance(key, str) and key.startswith(prefix)]:
        rest["state_dict"] = {key.removeprefix(prefix): rest.pop(key) for key in deeper}
    if "state_dict" not in rest and "model" in rest:
        rest["state_dict"] = rest.pop("model")
    elif "state_dict" not in rest and rest and all(map(torch.is_tensor, rest.values())):
        rest = {"state_dict": rest}
    if not isinstance(weights := rest.get("state_dict"), Mapping):
        raise StateError(
            "The source has no weights for a checkpoint of Lightning",
            path=path,
            expected="an entry `state_dict` or `model`, or only tensors",
            actual=", ".join(map(str, rest))[:200],
            remedy="rename the entry with the weights: --rename OLD=state_dict",
        )
    for name, several in _SINGLE.items():
        if several not in rest and name in rest:
            rest[several] = [rest.pop(name)]
    if isinstance(rest.get("optimizer_states"), (list, tuple)):
        rest["optimizer_states"] = [_indexed(item) for item in rest["optimizer_states"]]
    steps = _count(rest.get("global_step", rest.get("step")))
    epoch = _count(rest.get("epoch"))
    head = {
        "epoch": epoch,
        "global_step": steps,
        _VERSION: _WRITTEN_VERSION,
        "loops": {"fit_loop": _progress(steps, epoch)},
        "lr_schedulers": [],  # the Trainer refuses a file without this entry
    }
    return {**head, **rest, "state_dict": _flat(weights)}


def _count(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0


def _progress(steps: int, epoch: int) -> dict[str, Any]:
    """Return the state of the Trainer's loop after `steps` steps, at the start of `epoch`."""
    epochs = dict.fromkeys(("ready", "started", "processed", "completed"), epoch)
    step = {"total": {"ready": steps, "completed": steps}, "current": {"ready": 0, "completed": 0}}
    zero = dict.fromkeys(("ready", "started", "completed"), 0)
    optimizer = {"step": step, "zero_grad": {"total": zero, "current": zero}}
    return {
        "epoch_progress": {"total": epochs, "current": epochs},
        "epoch_loop.state_dict": {"_batches_that_stepped": steps},
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": optimizer},
        "epoch_loop.manual_optimization.optim_step_progress": step,
    }


def _flat(weights: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested weights as one dict, with names joined by dots."""
    found: dict[str, Any] = {}
    for key, item in weights.items():
        if isinstance(item, Mapping) and any(map(_has_tensors, item.values())):
            found |= _flat(item, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = item
    return found


def _has_tensors(item: Any) -> bool:
    if isinstance(item, Mapping):
        return any(map(_has_tensors, item.values()))
    return isinstance(item, torch.Tensor)


def _indexed(optimizer: Any) -> Any:
    """Return the state of an optimizer with indices in place of the names of parameters."""
    groups = optimizer.get("param_groups") if isinstance(optimizer, Mapping) else None
    if not isinstance(groups, (list, tuple)) or "state" not in optimizer:
        return optimizer
    names = [name for group in groups for name in group.get("params", ())]
    index = {name: number for number, name in enumerate(names)}
    if any(not isinstance(name, str) for name in names) or set(optimizer["state"]) - set(index):
        return optimizer
    return {
        **optimizer,
        "state": {index[name]: item for name, item in optimizer["state"].items()},
        "param_groups": [
            {**group, "params": [index[name] for name in group.get("params", ())]}
            for group in groups
        ],
    }
