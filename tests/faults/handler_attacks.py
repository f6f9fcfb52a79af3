"""Checkpoints of a handler that someone made to do harm: what each changes in a handler's state.

Each case of REFUSED must end in a typed error. Each case of HARMLESS must load, and run nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import shardckpt
from shardckpt import NNHandler
from shardckpt.nn_handler import EarlyStopping
from shardckpt.nn_handler.ema import EMA

BAIT = "tests.faults.handler_bait"
FORMATS = ("", ".pth", ".safetensors", "many")

State = dict[str, Any]
Attack = Callable[[State], Any]


def name(text: Any) -> State:
    return {"shardckpt.import": text}


def call(text: Any, arguments: Any) -> State:
    return {"shardckpt.import": text, "arguments": arguments}


SHELL = call("os:system", ["touch shardckpt-was-here"])


def put(path: str, value: Any) -> Attack:
    """Put a value at a place of the state, as "config.model.class"."""

    def attack(state: State) -> None:
        *outer, last = path.split(".")
        found: Any = state
        for key in outer:
            found = found[int(key)] if isinstance(found, list) else found[key]
        found[int(last) if isinstance(found, list) else last] = value

    return attack


def model(text: Any, kwargs: Any = None) -> Attack:
    return put("config.model", {"class": name(text), "kwargs": kwargs or {}})


def scheduler(text: str, **options: Any) -> Attack:
    found = {"class": name(text), "options": options, "interval": "epoch", "monitor": "val_loss"}
    return put("config.scheduler", found)


def callback(text: str, *args: Any, **kwargs: Any) -> Attack:
    return put("config.callbacks", [{"class": name(text), "args": list(args), "kwargs": kwargs}])


def random(**changes: Any) -> Attack:
    def attack(state: State) -> None:
        own = state["ranks"].value
        own["random"] = {**own["random"], **changes}

    return attack


NAMES = {
    "a function of the system": "os:system",
    "a built-in": "builtins:exec",
    "eval": "builtins:eval",
    "a process": "subprocess:Popen",
    "an import": "importlib:import_module",
    "a module not imported": "imaplib:IMAP4",
    "a module of torch not imported": "torch.utils.bottleneck:main",
    "a function of the program": f"{BAIT}:function",
    "a function of the script": "__main__:record",
    "an alias in the script": "__main__:alias",
    "the module's __getattr__": f"{BAIT}:something",
    "a lazy module": "tests.faults.handler_lazy:something",
    "a descriptor": f"{BAIT}:Holder.attribute",
    "a metaclass": f"{BAIT}:Holder.nothing",
    "a class of nothing": f"{BAIT}:Plain",
    "globals through a class": "torch.nn:Module.__init__.__globals__",
    "a method": "torch.nn:Module.apply",
    "a method of a layer": "torch.nn:Linear.forward",
    "a tool of torch.nn": "torch.nn.utils.parametrizations:weight_norm",
    "a wrapper of torch.nn": "torch.nn.parallel.data_parallel:DataParallel",
    "a lazy layer": "torch.nn:LazyLinear",
    "torch.load": "torch:load",
    "torch.jit": "torch.jit:load",
    "torch.hub": "torch.hub:load",
    "a graph": "torch.fx.graph_module:GraphModule",
    "shared memory": "torch.multiprocessing:spawn",
    "a helper of torch.nn.functional": "torch.nn.functional:handle_torch_function",
    "a module in a module": "torch.nn.functional:importlib.import_module",
    "the library itself": "shardckpt:save",
    "the handler": "shardckpt.nn_handler.handler:NNHandler",
    "the saver": "shardckpt.nn_handler.auto_saver:AutoSaver",
    "a path": "pathlib:Path.unlink",
    "no class": "torch.nn:",
    "no module": ":Linear",
    "nothing": "",
    "a relative module": ".x:y",
    "dots": "torch.nn:Linear..x",
    "a very long name": "torch.nn:" + "a." * 50_000,
    "a NUL": "torch.nn:\0",
}
"""Names that no slot may take."""

SLOTS = {
    "model.class": "config.model.class",
    "a model's argument": "config.model.kwargs.bias",
    "optimizer.class": "config.optimizer.class",
    "an optimizer's option": "config.optimizer.options.lr",
    "a group's option": "config.optimizer.groups.0.lr",
    "scheduler.class": "config.scheduler.class",
    "a scheduler's option": "config.scheduler.options.gamma",
    "callbacks.class": "config.callbacks.0.class",
    "a callback's argument": "config.callbacks.0.args.0",
    "a callback's option": "config.callbacks.0.kwargs.patience",
}
FUNCTIONS = {"loss_fn": "config.loss_fn", "a metric": "config.metrics.m"}

BIG = {"in_features": 9000, "out_features": 9000}
LAYER = call("torch.nn:TransformerEncoderLayer", {"d_model": 8, "nhead": 1, "dim_feedforward": 8})
RECORD = name("__main__:record")

REFUSED: dict[str, Attack] = {
    # each slot, with a call of the shell
    **{f"the shell as {slot}": put(path, SHELL) for slot, path in SLOTS.items()},
    "the shell in a list": put("config.model.kwargs.bias", [[SHELL]]),
    "the shell in a dict": put("config.model.kwargs.bias", {"a": {"b": SHELL}}),
    "the shell in a layer": model("torch.nn:Sequential", {"args": [SHELL]}),
    "the shell in a path": put("config.callbacks.0.args.0", call("pathlib:Path", [SHELL])),
    "the shell in a range": put("config.model.kwargs.bias", [range(1 << 60)]),
    "the shell as an activation": model(
        "torch.nn:TransformerEncoderLayer", {"d_model": 2, "nhead": 1, "activation": SHELL}
    ),
    "the shell as lr_lambda": scheduler("torch.optim.lr_scheduler:LambdaLR", lr_lambda=SHELL),
    "the shell as a scheduler in a scheduler": scheduler(
        "torch.optim.lr_scheduler:ChainedScheduler", schedulers=[[name("os:system"), {}]]
    ),
    # classes in the wrong slot
    "an optimizer as model": model("torch.optim:SGD"),
    "a loss as optimizer": put("config.optimizer.class", name("torch.nn:MSELoss")),
    "a layer as callback": callback("torch.nn:Linear", 2, 2),
    "a callback as scheduler": scheduler("shardckpt.nn_handler.callbacks:EarlyStopping"),
    "an optimizer as an argument's instance": put(
        "config.model.kwargs.bias", call("torch.optim:SGD", {"params": []})
    ),
    "a wrapper's module as model": model("torch.optim.swa_utils:AveragedModel"),
    # functions that a constructor would call
    "a function of the script as an argument": model(f"{BAIT}:Eager", {"function": RECORD}),
    "a function of the script as a factory": model("__main__:record"),
    "a function of the script as an optimizer": put("config.optimizer.class", RECORD),
    "a function of the script as a scheduler": scheduler("__main__:record"),
    # sizes
    "a large model": model("torch.nn:Linear", BIG),
    "a huge model": model("torch.nn:Linear", {"in_features": 10**6, "out_features": 10**6}),
    "a model of 2**63": model("torch.nn:Linear", {"in_features": 2**63, "out_features": 2**63}),
    "a large model on a device": model("torch.nn:Linear", {**BIG, "device": "cpu"}),
    "a large norm": model("torch.nn:BatchNorm1d", {"num_features": 10**11, "affine": False}),
    "a large norm on a device": model(
        "torch.nn:BatchNorm1d", {"num_features": 10**8, "affine": False, "device": "cpu"}
    ),
    "a long shape": model("torch.nn:LayerNorm", {"normalized_shape": range(10**12)}),
    "many layers": model(
        "torch.nn:LSTM", {"input_size": 1, "hidden_size": 1, "num_layers": 10**9}
    ),
    "many copies": model(
        "torch.nn:TransformerEncoder", {"encoder_layer": LAYER, "num_layers": 10**9}
    ),
    "many copies of layers": model(
        "torch.nn:Transformer", {"d_model": 2, "nhead": 1, "num_encoder_layers": 10**9}
    ),
    "a large layer as an argument": model(
        f"{BAIT}:Eager", {"function": call("torch.nn:Linear", BIG)}
    ),
    "a large loss": put("config.loss_fn", call("torch.nn:Linear", BIG)),
    "a large metric": put("config.metrics.m", call("torch.nn:Embedding", {
        "num_embeddings": 10**8, "embedding_dim": 10})),
    "layers by position": model(f"{BAIT}:Eager", {"function": call("torch.nn:LSTM", [1, 1, 9**9])}),
    # options
    "a bad option of the optimizer": put("config.optimizer.options.lr", "high"),
    "parameters as an option": put("config.optimizer.options.params", []),
    "a bad option of the scheduler": put("config.scheduler.options.nothing", 0),
    "an interval as an option": put("config.scheduler.options.interval", "step"),
    "a group without parameters": put("config.optimizer.groups", [{"lr": 1.0}]),
    "a group of a number": put("config.optimizer.groups", [{"params": 5}]),
    "a device as the model's argument": put("config.model.kwargs.device", "nowhere"),
    "another handler's argument": put("config.model.kwargs.parallel", "fsdp"),
    "a frozen module that is not there": put("config.frozen", ["weight.__class__"]),
    "a backend of torch.compile": put("config.compile", {"backend": "os:system"}),
    "a compiler": put("config.compile", {"options": {"cpp.cxx": ["/bin/sh"]}}),
    "an unknown option of the saver": put("config.auto_saver", {"x": 1}),
    "a saver's name": put("config.auto_saver.name", "{epoch.__class__}" * 2 + "{"),
    "code that is no text": put("config.code", {"os": 3}),
    # states
    "a scheduler's method": put("scheduler.get_lr", 1),
    "a scheduler's optimizer": put("scheduler.optimizer", 1),
    "a callback's state": put("callbacks.0.state", {"best": "low", "waited": 0}),
    "a callback's state without a key": put("callbacks.0.state", {}),
    "a callback of another name": put("callbacks.0.kind", "Other"),
    "a scaler's state": put("scaler", {"scale": "high"}),
    "an average's decay": put("ema.decay", 7.0),
    "a negative position": put("progress.position.batches", -1),
    "a seed of 100 bits": put("progress.seed", 1 << 100),
    "numpy's index": random(numpy=["MT19937", torch.zeros(624).long(), 10**9, 0, 0.0]),
    "numpy's index below": random(numpy=["MT19937", torch.zeros(624).long(), -(10**9), 0, 0.0]),
    "numpy's other generator": random(numpy=["PCG64", torch.zeros(624).long(), 0, 0, 0.0]),
    "torch's generator": random(torch=torch.zeros(5, dtype=torch.uint8)),
    "Python's generator": random(python=[3, [0] * 5, None]),
    "no generator": random(python=None),
    "ranks that are a number": put("ranks", shardckpt.PerRank(3)),
    "a rank without sums": put("ranks", shardckpt.PerRank({"random": None})),
}  # fmt: skip

HARMLESS: dict[str, Attack] = {
    **{f"the shell as {slot}": put(path, SHELL) for slot, path in FUNCTIONS.items()},
    "the shell in the arguments of a loss": put(
        "config.loss_fn", call("torch.nn:MSELoss", {"reduction": SHELL})
    ),
    "a function as the script's loss": put("config.loss_fn", RECORD),
    "a function of the program as loss": put("config.loss_fn", name(f"{BAIT}:function")),
    "an instance of a class of nothing": put("config.loss_fn", call(f"{BAIT}:Plain", [1])),
    "a class as loss": put("config.loss_fn", name("torch.nn:MSELoss")),
    "a number as loss": put("config.loss_fn", 3),
    "a function of the script as lr_lambda": lambda state: (
        scheduler("torch.optim.lr_scheduler:LambdaLR", lr_lambda=RECORD)(state),
        put("scheduler.lr_lambdas", [None])(state),
    ),
    "a function of the script for a callback": lambda state: (
        callback("shardckpt.nn_handler.callback:Hook", RECORD)(state),
        put("callbacks.0", {"kind": "Hook", "state": {}})(state),
    ),
    "a saver with a path of its own": put(
        "config.auto_saver", {"save_path": "/etc/shardckpt-was-here", "overwrite": True}
    ),
    "a logger with a path of its own": lambda state: (
        callback("shardckpt.nn_handler.loggers:CSVLogger", "/etc/passwd")(state),
        put("callbacks.0", {"kind": "CSVLogger", "state": {"rows": [{"a": 1}]}})(state),
    ),
    "a compiled model": put("config.compile", {"backend": "inductor"}),
    "source that is not trusted": put("config.code", {"torch.nn": "raise SystemExit"}),
}


def base() -> NNHandler:
    """A handler that has every part."""
    handler = NNHandler(nn.Linear, device="cpu", in_features=2, out_features=2)
    handler.set_optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    handler.set_scheduler(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
    handler.set_loss_fn(nn.MSELoss())
    handler.add_metric("m", functional.l1_loss)
    handler.add_callback(EarlyStopping("val_loss", patience=3))
    handler.set_grad_scaler()
    handler.ema = EMA(handler.model, 0.9)
    handler.auto_save(interval=1, save_path="nowhere")
    return handler


def write(path: Path, attack: Attack | None) -> None:
    """A handler's checkpoint, attacked; the path's name says of which kind."""
    handler = base()
    state = handler.state()
    if attack is not None:
        attack(state)
    handler.state = lambda: state  # type: ignore[method-assign]
    if path.name.endswith("many"):
        handler.save_multi_files(path)
    else:
        handler.save(path)
