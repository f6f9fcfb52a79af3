"""Folders and files as other libraries write them, made by torch alone."""

from __future__ import annotations

import argparse
import json
import pickle
import random
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import metadata as dcp_metadata

import shardckpt
from shardckpt.convert.convert import convert

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


class Loss:
    """A class of the user's."""

    def __init__(self) -> None:
        self.weight = 3


def loaded(source: Path, **options) -> tuple:
    """Return the report of a conversion, and the converted state."""
    target = source.parent / f"{source.name}-converted"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = convert(str(source), str(target), **options)
        return report, shardckpt.load_state(target)


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def write_dcp(state: dict, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=path)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def lightning_rest() -> dict[str, Any]:
    """Return the entries of a Trainer beside weights and optimizers."""
    return {
        "epoch": 3,
        "global_step": 40,
        "pytorch-lightning_version": "2.6.6",
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        "lr_schedulers": [{"last_epoch": 3, "_last_lr": [0.1]}],
        "hparams_name": "kwargs",
        "hyper_parameters": {
            "args": argparse.Namespace(width=5, loss=Loss()),
            "root": Path("/data/x"),
            "loss": Loss(),
            "lr": np.float64(0.25),
        },
    }


def lightning_folder(path: Path, model: nn.Module) -> None:
    """ModelParallelStrategy's sharded checkpoint."""
    write_dcp({"state_dict": model.state_dict(), "optimizer_0": {"lr": 0.1}}, path)
    torch.save(lightning_rest(), path / "meta.pt")


def lightning_file(path: Path, model: nn.Module) -> None:
    optimizer_states = [optimizer_of(model).state_dict()]
    state = {"state_dict": model.state_dict(), "optimizer_states": optimizer_states}
    torch.save({**state, **lightning_rest()}, path)


def random_states() -> dict[str, Any]:
    numpy, python = np.random.get_state(), random.getstate()
    return {"python": python, "numpy": numpy, "cpu": torch.get_rng_state()}


def trainer_folder(path: Path, model: nn.Module) -> None:
    """checkpoint-N of transformers' Trainer."""
    path.mkdir()
    torch.save(optimizer_of(model).state_dict(), path / "optimizer.pt")
    save_file(model.state_dict(), path / "model.safetensors", {"format": "pt"})
    torch.save({"last_epoch": 3, "_step_count": 4}, path / "scheduler.pt")
    torch.save(random_states(), path / "rng_state.pth")
    torch.save(Loss(), path / "training_args.bin")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        (path / name).write_text(json.dumps(CONFIG))
    (path / "trainer_state.json").write_text('{"global_step": 2}')


def accelerate_folder(path: Path, model: nn.Module, *, safe: bool = True) -> None:
    """Accelerator.save_state."""
    path.mkdir()
    torch.save(optimizer_of(model).state_dict(), path / "optimizer.bin")
    if safe:
        save_file(model.state_dict(), path / "model.safetensors", {"format": "pt"})
    else:
        torch.save(model.state_dict(), path / "pytorch_model.bin")
    torch.save({"last_epoch": 3}, path / "scheduler.bin")
    torch.save({"step": 7, **random_states()}, path / "random_states_0.pkl")
    torch.save({"state": 1}, path / "custom_checkpoint_0.pkl")


def fsdp_folder(path: Path, model: nn.Module) -> None:
    """Accelerator.save_state, or a Trainer's checkpoint, with SHARDED_STATE_DICT."""
    path.mkdir()
    write_dcp({"model": model.state_dict()}, path / "pytorch_model_fsdp_0")
    write_dcp({"optimizer": {"state": {"w": torch.ones(2)}}}, path / "optimizer_0")
    torch.save({"last_epoch": 3}, path / "scheduler.bin")
    torch.save(random_states(), path / "random_states_0.pkl")


def bin_folder(path: Path, model: nn.Module, *, files: int) -> None:
    """pytorch_model.bin, or several with an index."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    state = model.state_dict()
    if files == 1:
        torch.save(state, path / "pytorch_model.bin")
        return
    names = [f"pytorch_model-{n + 1:05}-of-{files:05}.bin" for n in range(files)]
    weight_map = {key: names[number % files] for number, key in enumerate(state)}
    for name in names:
        torch.save({k: state[k] for k, own in weight_map.items() if own == name}, path / name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def change_metadata(path: Path, change) -> None:
    found = pickle.loads((path / ".metadata").read_bytes())
    (path / ".metadata").write_bytes(pickle.dumps(change(found) or found))


@contextmanager
def foreign_module(name: str, *classes: type) -> Iterator[None]:
    """Make importable what another library has, within the block."""
    parents = name.split(".")
    added = [".".join(parents[: n + 1]) for n in range(len(parents))]
    added = [module for module in added if module not in sys.modules]
    for module in added:
        sys.modules[module] = types.ModuleType(module)
    for kind in classes:
        kind.__module__, kind.__qualname__ = name, kind.__name__
        setattr(sys.modules[name], kind.__name__, kind)
    try:
        yield
    finally:
        for module in added:
            del sys.modules[module]


def megatron_folder(path: Path, model: nn.Module) -> None:
    """torch_dist of megatron-core 0.15, whose classes nobody can import afterwards."""
    name = "megatron.core.dist_checkpointing.strategies.torch"
    metadata = type("MCoreMetadata", (dcp_metadata.Metadata,), {})
    attention = type("AttnBackend", (), {})

    def change(found):
        made = object.__new__(metadata)
        made.__dict__.update(vars(found), mcore_data={"w": {"nd_shape": (4,)}})
        return made

    write_dcp({f"model.{k}": v for k, v in model.state_dict().items()}, path)
    with foreign_module(name, metadata, attention):
        change_metadata(path, change)
        rest = {"args": argparse.Namespace(tp=1), "iteration": 100, "backend": attention()}
        torch.save({**rest, "checkpoint_version": 3.0}, path / "common.pt")
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')


def newer_torch_folder(path: Path, model: nn.Module) -> None:
    """DCP whose classes have got fields and helpers that this torch does not know."""
    encoding = type("TensorEncoding", (), {"__reduce__": lambda self: (type(self), ())})
    properties = dcp_metadata.TensorProperties
    old = properties.__getstate__

    def change(found):
        found.storage_meta.topology = encoding()
        found.layout_version = 2
        found.state_dict_metadata["odd"] = encoding()

    write_dcp({"model": model.state_dict(), "step": 5}, path)
    with foreign_module("torch.distributed.checkpoint.encodings", encoding):
        properties.__getstate__ = lambda self: (*old(self), encoding())
        try:
            change_metadata(path, change)
        finally:
            properties.__getstate__ = old


def same_weights(found: dict, model: nn.Module) -> bool:
    own = model.state_dict()
    return found.keys() == own.keys() and all(torch.equal(found[k], own[k]) for k in own)
