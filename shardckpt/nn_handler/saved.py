"""The types of the values in a handler's checkpoint.

They are checked before anything is created from them. An error names the malformed field.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
import torch

from shardckpt.errors import CheckpointError

__all__ = ["Config", "NamedOptimizer", "OwnState", "Saved", "SavedProgress", "checked"]

_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
_REMEDY = (
    "load another checkpoint, or take the weights alone with NNHandler.initialize_from_checkpoint"
)
_Name = dict[str, Any]
"""A class by its import name; see shardckpt.nn_handler.objects."""


class _Struct(msgspec.Struct, kw_only=True):
    """The base class of the structs. Checks that torch accepts the field `seed`."""

    def __post_init__(self) -> None:
        if not -(1 << 63) <= getattr(self, "seed", 0) < 1 << 64:
            raise ValueError("Expected a seed of 64 bits")


class SavedModel(_Struct):
    """The class of the model, and its arguments."""

    class_name: _Name = msgspec.field(name="class")
    kwargs: dict[str, Any]


class SavedOptimizer(_Struct):
    """The arguments of set_optimizer."""

    class_name: _Name = msgspec.field(name="class")
    groups: list[dict[str, Any]] | None = None
    options: dict[str, Any] = {}


class SavedScheduler(_Struct):
    """The arguments of set_scheduler."""

    class_name: _Name = msgspec.field(name="class")
    options: dict[str, Any]
    interval: Literal["epoch", "step"]
    monitor: str


class NamedOptimizer(_Struct):
    """An optimizer beside the main one, and its scheduler."""

    optimizer: SavedOptimizer
    scheduler: SavedScheduler | None = None


class SavedCallback(_Struct):
    """The class of a callback, and its arguments."""

    class_name: _Name = msgspec.field(name="class")
    args: list[Any]
    kwargs: dict[str, Any]


class Config(msgspec.Struct, kw_only=True):
    """The arguments of all parts of a handler."""

    model: SavedModel
    optimizer: SavedOptimizer | None = None
    scheduler: SavedScheduler | None = None
    optimizers: dict[str, NamedOptimizer] = {}
    loss_fn: Any = None
    loss_arguments: dict[str, Any] = {}
    pass_epoch_to_loss: bool = False
    metrics: dict[str, Any] = {}
    whole_epoch: list[str] = []
    callbacks: list[SavedCallback] = []
    auto_saver: dict[str, Any] | None = None
    frozen: list[str] = []
    kept_eval: list[str] = []
    untrained: list[str] | None = None
    own_step: bool = False
    compile: dict[str, Any] | None = None
    code: dict[str, str] | None = None

    def __post_init__(self) -> None:
        """Check the names of optimizers, which are parts of the names of entries."""
        wrong = [name for name in self.optimizers if not name.isidentifier() or name == "main"]
        if wrong:
            raise ValueError("Expected words other than main as names of optimizers")


class SavedPosition(_Struct):
    """See shardckpt.nn_handler.data.Position."""

    samples: _Count
    batches: _Count
    length: _Count
    seed: int


class SavedProgress(_Struct):
    """The progress of training."""

    epoch: _Count
    step: _Count
    position: SavedPosition
    runs: list[_Count]
    run_id: str | None
    history: dict[str, list[Any]]
    rate: float
    seed: int
    stopped: bool
    rates: dict[str, float] = {}
    history_epochs: dict[str, list[_Count]] = {}
    run_steps: list[_Count] = []
    validations: list[dict[str, float]] = []
    hyperparameters: dict[str, dict[str, Any]] = {}


class CallbackState(_Struct):
    """The name of a callback's class, and the result of its state_dict."""

    class_name: str = msgspec.field(name="kind")
    state: dict[str, Any]


class Scaler(_Struct):
    """The state of a GradScaler that is enabled."""

    scale: float
    growth_factor: float
    backoff_factor: float
    growth_interval: int
    tracker: int = msgspec.field(name="_growth_tracker")


class Average(_Struct):
    """The values of an EMA, besides its weights."""

    decay: float


class Saved(_Struct):
    """All values of a handler's checkpoint."""

    config: Config
    progress: SavedProgress
    callbacks: dict[str, CallbackState]
    scheduler: dict[str, Any] | None = None
    schedulers: dict[str, dict[str, Any]] = {}
    scaler: dict[str, Any] | None = None
    ema: Average | None = None


class Sums(_Struct):
    """The running sums of an epoch."""

    sums: dict[str, float]
    count: _Count = 0  # of all sums, in checkpoints of 0.1
    counts: dict[str, _Count] = {}
    metrics: dict[str, dict[str, Any]] = {}


class OwnState(_Struct):
    """The values of one rank."""

    random: Any
    sums: Sums | None
    epoch_random: Any = None


_T = TypeVar("_T")


def checked(value: Any, cls: type[_T], at: str, *, path: str) -> _T:
    """Convert a value to a struct. Raises CheckpointError with the field if it is malformed."""
    try:
        return msgspec.convert(value, cls)
    except Exception as error:  # msgspec iterates over odd values such as tensors
        text, _, place = str(error).partition(" - at ")
        field = place.strip("`").removeprefix("key` in `").removeprefix("$")
        if "missing required field" in text:
            field += "." + text.split("`")[1]
        raise CheckpointError(
            "The configuration in the checkpoint is malformed",
            path=path,
            tensor=f"{at}{field}".removeprefix(".") or "config",
            actual=text,
            remedy=_REMEDY,
        ) from error


def check_random(state: Any, at: str, *, path: str) -> None:
    """Raise CheckpointError unless torch, numpy and Python can restore a state."""
    try:
        torch.Generator().set_state(state["torch"])
        _, internal, gauss = state["python"]
        name, keys, index, has_gauss, cached = state["numpy"]
        for own in state.get("loader", []):
            torch.Generator().set_state(own)
        ints = [*internal, *keys.tolist(), index, has_gauss]
        right = (
            (name, len(internal), tuple(keys.shape)) == ("MT19937", 625, (624,))
            and all(type(number) is int for number in ints)
            and all(0 <= number < 1 << 32 for number in ints)
            and max(index, internal[-1]) <= 624  # with larger ones numpy reads beyond its memory
            and all(isinstance(g, (float, type(None))) for g in (gauss, cached))
        )
    except Exception as error:
        raise _bad_random(at, path, error) from error
    if not right:
        raise _bad_random(at, path, None)


def _bad_random(at: str, path: str, error: Exception | None) -> CheckpointError:
    return CheckpointError(
        "The state of the random-number generators in the checkpoint is malformed",
        path=path,
        tensor=at,
        actual=None if error is None else f"{type(error).__name__}: {error}".partition("\n")[0],
        remedy=_REMEDY,
    )
