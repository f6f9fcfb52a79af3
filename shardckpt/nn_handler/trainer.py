"""The training loop.

Between two steps of the optimizer lies a boundary. What a checkpoint holds is the state at the
last boundary: weights change after it in the optimizer's step alone, and the loader's position,
the random numbers and the running sums are noted at it. There the ranks agree on what happens
next, so that they save, stop and fail together.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from shardckpt.errors import CoordinationError, RankFailedError, StateError
from shardckpt.nn_handler.auto_saver import AutoSaver
from shardckpt.nn_handler.batch import forward
from shardckpt.nn_handler.callbacks import Callback, ModelCheckpoint, ProgressBar, check_monitor
from shardckpt.nn_handler.data import Position
from shardckpt.nn_handler.ema import EMA, check_decay
from shardckpt.nn_handler.emergency import BufferCopies, Failure, group_of_one, is_echo, meet
from shardckpt.nn_handler.epoch_metrics import EpochSums
from shardckpt.nn_handler.parallel import clip_gradients, largest, synchronise_gradients
from shardckpt.nn_handler.random_state import random_state, set_random_state
from shardckpt.nn_handler.signals import leave, stop_requests
from shardckpt.state.flatten import flatten

if TYPE_CHECKING:
    from shardckpt.nn_handler.handler import NNHandler

__all__ = ["TrainOptions", "Trainer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """The arguments of NNHandler.train."""

    epochs: int
    validate_every: int = 1
    gradient_accumulation_steps: int = 1
    use_amp: bool = False
    gradient_clipping_norm: float | None = None
    ema_decay: float = 0.0
    progress_bar: bool = True
    save_on_last_epoch: bool = True

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 0),
            ("validate_every", 0),
            ("gradient_accumulation_steps", 1),
        ):
            number = getattr(self, name)
            if type(number) is not int or number < least:
                raise StateError(
                    f"train was given a bad {name}",
                    expected=f"an int from {least}",
                    actual=repr(number),
                )
        norm = self.gradient_clipping_norm
        if norm is not None and not (isinstance(norm, (int, float)) and norm > 0):
            raise StateError(
                "train was given a bad gradient_clipping_norm",
                expected="None, or a number above 0",
                actual=repr(norm),
            )
        check_decay(self.ema_decay)


class Trainer:
    """One call of NNHandler.train."""

    def __init__(self, handler: NNHandler, options: TrainOptions) -> None:
        self.handler = handler
        self.options = options
        self.failure: BaseException | None = None  # of this rank, to be told to the others
        self.told = False  # all ranks know that training fails
        self.alone = False  # the ranks can't talk any more
        self.at: Literal["boundary", "forward", "update"] = "boundary"
        self.buffers: BufferCopies | None = None
        handler.validates = options.validate_every > 0
        _check_ready(handler)

    def run(self) -> None:
        """Train; collective."""
        handler, saver = self.handler, self.handler.auto_saver
        if self.options.ema_decay and handler.ema is None:
            handler.ema = EMA(handler.model, self.options.ema_decay)
        if self.options.use_amp and handler.device.type == "cuda" and handler.scaler is None:
            handler.set_grad_scaler()
        resumed = saver is not None and saver.begin(handler)
        if self.options.ema_decay and handler.ema is not None:
            handler.ema.decay = self.options.ema_decay
        end = handler.begin_run(self.options.epochs, resumed=resumed)
        self.bar = [ProgressBar()] if self.options.progress_bar else []
        if saver is not None and saver.on_exception:
            self.buffers = BufferCopies(handler.module)
        with stop_requests(enabled=saver is not None and saver.on_signal) as self.requests:
            try:
                self._hooks(lambda callback: callback.on_train_start(handler))
                self._agree()
                while handler.epoch < end and not handler.stop_training:
                    self._epoch(end)
                self._hooks(lambda callback: callback.on_train_end(handler))
                self._agree()
            except BaseException as error:
                if (raised := self._emergency(error)) is not error:
                    raise raised from error
                raise
            if saver is not None:
                saver.close()

    def _epoch(self, end: int) -> None:
        handler, position = self.handler, self.handler.position
        assert handler.train_data is not None
        self.sums = EpochSums(handler)
        if not handler.train_data.fits(position):
            warnings.warn(
                f"The train loader has not the {position.length} samples of when the epoch was "
                "begun: the epoch begins anew",
                stacklevel=4,
            )
            handler.position = position = Position()
        if position.batches == 0:
            handler.position = position = Position(seed=handler.seed_value, random=random_state())
            self._hooks(lambda callback: callback.on_epoch_start(handler))
        elif handler.boundary is not None:
            self.sums.load(handler.boundary["sums"])
        batches = handler.train_data.batches(handler.epoch, position)
        if handler.boundary is not None and position.batches:
            set_random_state(handler.boundary["random"])
        handler.train_mode()
        self._mark()
        while self._step(batches):
            pass
        self._finish_epoch(end)

    def _mark(self) -> None:
        """Note a boundary."""
        self.handler.boundary = {"random": random_state(), "sums": self.sums.state()}
        self.at = "boundary"

    def _step(self, batches: Iterator[Any]) -> bool:
        """One step of the optimizer; False where the epoch has no more batches."""
        handler = self.handler
        assert handler.train_data is not None
        group: list[Any] = []
        if self.failure is None:
            self._guard(
                lambda: group.extend(
                    itertools.islice(batches, self.options.gradient_accumulation_steps)
                )
            )
        group = group[: self._agree(len(group))]
        if not group or handler.stop_training:
            return False
        loss = self._optimise(group)
        handler.step += 1
        handler.train_data.advance(handler.position, len(group))
        self._mark()
        self._hooks(lambda callback: callback.on_step_end(handler, loss))
        return True

    def _agree(self, batches: int | None = None) -> int:
        """The ranks tell each other what they know, and all act on it alike; collective.

        Saves, stops and raises; returns how many batches every rank has. `batches` is None
        outside of an epoch.
        """
        handler, saver = self.handler, self.handler.auto_saver
        signal, failed, stop, minutes, fewest = largest(
            [
                self.requests.received,
                handler.rank + 1 if self.failure is not None else 0,
                int(handler.stop_training),
                int(saver is not None and handler.rank == 0 and saver.minutes_due()),
                -(batches or 0),
            ],
            handler.device,
        )
        handler.stop_training = bool(stop)
        if failed:
            self.told = True
            raise self.failure or RankFailedError(
                "Training fails on another rank",
                rank=failed - 1,
                remedy="look at that rank's own error",
            )
        if signal:
            self.told = True
            if saver is not None:
                saver.emergency(handler)
            leave(signal)
        if saver is not None and batches is not None:
            with self._saving():
                saver.within_epoch(handler, now=bool(minutes))
        return -fewest

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """A save that fails does so on all ranks."""
        self.told = True
        try:
            yield
        except CoordinationError:
            self.alone = True
            raise
        self.told = False

    def _guard(self, act: Callable[[], Any]) -> None:
        """Do what may fail on this rank alone; the next boundary tells the others."""
        try:
            act()
        except BaseException as error:
            self.failure = self.failure or error

    def _hooks(self, call: Callable[[Callback], None]) -> None:
        callbacks = [*self.bar, *self.handler.callbacks]
        callbacks.sort(key=lambda callback: isinstance(callback, ModelCheckpoint))
        for callback in callbacks:
            if self.failure is None:
                self._guard(lambda callback=callback: call(callback))  # type: ignore[misc]

    def _optimise(self, group: list[Any]) -> float:
        handler, clip = self.handler, self.options.gradient_clipping_norm
        assert handler.optimizer is not None
        scaler = handler.scaler if self.options.use_amp else None
        if self.buffers is not None:
            self.buffers.note()
        self.at = "forward"
        handler.optimizer.zero_grad()
        for number, batch in enumerate(group, 1):
            synchronise_gradients(handler.model, now=number == len(group))
            loss, outputs, targets = forward(handler, batch, use_amp=self.options.use_amp)
            part = loss / len(group)
            torch.autograd.backward(part if scaler is None else scaler.scale(part))
            self._guard(lambda a=loss, b=outputs, c=targets: self.sums.add(a, b, c))  # type: ignore[misc]
        if clip is not None:
            if scaler is not None:
                scaler.unscale_(handler.optimizer)
            clip_gradients(handler.model, clip)
        handler.rate = float(handler.optimizer.param_groups[0]["lr"])
        if handler.auto_saver is not None:
            handler.auto_saver.wait_staged()
        self.at = "update"
        skipped = False
        if scaler is None:
            handler.optimizer.step()
        else:
            before = scaler.get_scale()
            scaler.step(handler.optimizer)
            scaler.update()
            skipped = scaler.get_scale() < before
        if handler.scheduler is not None and not skipped:
            handler.scheduler.after_step()
        if handler.ema is not None:
            handler.ema.update(handler.model)
        return float(loss.detach())

    def _finish_epoch(self, end: int) -> None:
        handler, saver = self.handler, self.handler.auto_saver
        if handler.stop_training and self._unfinished():
            if saver is not None:
                with self._saving():
                    saver.within_epoch(handler, now=True)
            return
        epoch = handler.epoch + 1
        results = {**self.sums.means(), "lr": handler.rate}
        if handler.val_data is not None and self._validates(epoch, end):
            results |= {f"val_{name}": value for name, value in self._validate().items()}
        self.at = "update"
        if handler.scheduler is not None:
            handler.scheduler.after_epoch(results)
        handler.epoch = epoch
        handler.position = Position()
        for name, value in results.items():
            handler.history.setdefault(name, []).append(value)
        handler.boundary = None
        self.at = "boundary"
        self._hooks(lambda callback: callback.on_epoch_end(handler, results))
        self._agree()
        if saver is not None:
            with self._saving():
                saver.after_epoch(
                    handler,
                    results,
                    last=epoch == end or handler.stop_training,
                    save_last=self.options.save_on_last_epoch,
                )

    def _unfinished(self) -> bool:
        """Whether a callback has ended training within the epoch."""
        data, position = self.handler.train_data, self.handler.position
        return data is not None and data.even and position.samples < len(data.loader.dataset)  # type: ignore[arg-type]

    def _validates(self, epoch: int, end: int) -> bool:
        every, saver = self.options.validate_every, self.handler.auto_saver
        if not every:
            return False
        saves = saver is not None and saver.plan.due_after_epoch(
            epoch, last=epoch == end, save_last=self.options.save_on_last_epoch
        )
        return epoch % every == 0 or (saves and saver is not None and saver.plan.needs_validation())

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        handler = self.handler
        assert handler.val_data is not None
        handler.model.eval()
        sums = EpochSums(handler)
        try:
            for number, batch in enumerate(handler.val_data.loader):
                loss, outputs, targets = forward(handler, batch, use_amp=self.options.use_amp)
                if number < handler.val_data.counted:
                    self._guard(lambda a=loss, b=outputs, c=targets: sums.add(a, b, c))  # type: ignore[misc]
        finally:
            handler.train_mode()
        return sums.means()

    def _emergency(self, error: BaseException) -> BaseException:
        """Save before an error ends training, if the state of the last boundary can be had whole.

        Returns what to raise: the error, or of one that is but the echo of another rank's, this.
        """
        handler, saver = self.handler, self.handler.auto_saver
        exits = isinstance(error, (KeyboardInterrupt, SystemExit)) and error is not self.failure
        if exits or self.alone:
            return error
        echo, saves = is_echo(error), saver is not None and saver.on_exception
        try:
            where = f"step {handler.step}, epoch {handler.epoch}, updating: {self.at == 'update'}"
            failure = Failure() if self.told else meet(where, echo=echo, patient=saves)
        except RankFailedError as unknown:
            return unknown if echo else error
        raised = failure.error() if echo else error
        try:
            if saver is not None and saves:
                self._save_emergency(saver, failure)
        except Exception as second:
            text = f"and nothing was saved before the end: {second}"
            if hasattr(raised, "add_note"):
                raised.add_note(text)
            else:  # Python 3.10
                warnings.warn(text, stacklevel=3)
        return raised

    def _save_emergency(self, saver: AutoSaver, failure: Failure) -> None:
        """Under DDP every rank has the whole state, so that one can save alone."""
        handler = self.handler
        if self.at == "update":
            raise StateError("A step of the optimizer was cut short")
        if self.at == "forward" and self.buffers is not None:
            self.buffers.put_back()
        if failure.together:
            saver.emergency(handler)
        elif handler.parallel != "ddp":
            raise StateError(f"The ranks hold the state together, and {failure.problem}")
        elif failure.elected:
            saver.emergency(handler, process_group=group_of_one())


def _check_ready(handler: NNHandler) -> None:
    handler.check_given()
    missing = {
        "set_optimizer": handler.optimizer,
        "set_loss_fn": handler.loss_fn,
        "set_train_loader": handler.train_data,
    }
    for setter, value in missing.items():
        if value is None:
            raise StateError("The handler can't train yet", remedy=f"call {setter} first")
    scheduler = handler.scheduler
    if scheduler is not None and scheduler.needs_metric:
        check_monitor(scheduler.monitor, handler)
    # what can't be saved is told now, not at the first save
    flatten({"config": handler.config(), "callbacks": handler.callback_states()}, rank=handler.rank)
