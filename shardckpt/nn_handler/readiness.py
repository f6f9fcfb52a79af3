"""Whether a handler can train, and all ranks prepare the same training."""

from __future__ import annotations

from dataclasses import asdict

import msgspec

from shardckpt.coordination.exchange import exchange
from shardckpt.coordination.resolve import operation
from shardckpt.errors import StateError
from shardckpt.nn_handler.train_options import TrainOptions
from shardckpt.nn_handler.training_state import TrainingState
from shardckpt.state.flatten import flatten

__all__ = ["check_on_all"]


def check_on_all(handler: TrainingState, options: TrainOptions) -> None:
    """Raise StateError for a handler that can't train, or that differs by rank. Collective.

    An error on one rank, such as one of a callback's state_dict, is raised on all ranks at once.
    """

    def check() -> bytes:
        _check_ready(handler)
        return msgspec.msgpack.encode(_outline(handler, options))

    if handler.world_size == 1:
        _check_ready(handler)
        return
    with operation("NNHandler: the beginning of training") as coordinator:
        exchange(coordinator, "ready", check, _check_alike)


def _outline(handler: TrainingState, options: TrainOptions) -> dict[str, str]:
    """Return the parts that take part in collectives, by name."""
    saver = handler.auto_saver
    parts = {f"train({name}=)": value for name, value in asdict(options).items()}
    parts["set_val_loader"] = "called" if handler.val_data is not None else "not called"
    parts["auto_save"] = "not called" if saver is None else saver.description()
    parts["add_callback"] = [type(callback).__name__ for callback in handler.callbacks]
    parts["set_optimizer"] = list(handler.optimizations)
    parts.pop("train(progress_bar=)")
    return {name: str(value) for name, value in parts.items()}


def _check_alike(payloads: list[bytes]) -> bytes:
    """Raise StateError unless the outlines of all ranks are equal."""
    first, *others = (msgspec.msgpack.decode(p, type=dict[str, str]) for p in payloads)
    for rank, other in enumerate(others, 1):
        for name, value in first.items():
            if other[name] != value:
                raise StateError(
                    f"The ranks prepare training differently: {name}",
                    rank=rank,
                    expected=f"{value}, as on rank 0",
                    actual=other[name],
                    remedy="make the same calls on all ranks; callbacks that write files write on "
                    "rank 0 alone",
                )
    return b""


def _check_ready(handler: TrainingState) -> None:
    handler.check_given()
    if handler.trains:
        raise StateError(
            "train was called inside of train",
            remedy="call it after train has returned; a callback ends training with "
            "handler.stop_training = True",
        )
    if handler.averaging:
        raise StateError(
            "Training inside ema_weights() is not possible: its end restores the weights",
            remedy="call train after the with block",
        )
    missing = {
        "set_optimizer": handler.optimizations or None,
        "set_train_loader": handler.train_data,
    }
    for setter, value in missing.items():
        if value is None:
            raise StateError("The handler can't train yet", remedy=f"call {setter} first")
    for scheduler in handler.schedulers.values():
        if scheduler.needs_metric:
            handler.check_monitor(scheduler.monitor)
    # an error of what can't be saved is raised now, not by the first save
    flatten({"config": handler.config(), "callbacks": handler.callback_states()}, rank=handler.rank)
