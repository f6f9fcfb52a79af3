"""The training loop.

A boundary lies between two steps of the optimizer. A checkpoint holds the state at the last
boundary: the trainer notes the position in the data, the random numbers and the running sums there,
and after it only the optimizer changes weights. Every few boundaries (see TrainingAgreement), and
before each save, the ranks agree on the next action, so that they save, stop and fail together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from shardckpt.errors import RankFailedError, StateError
from shardckpt.logs import warn
from shardckpt.nn_handler.agreement import TrainingAgreement
from shardckpt.nn_handler.auto_saver import AutoSaver
from shardckpt.nn_handler.callbacks import ModelCheckpoint
from shardckpt.nn_handler.components import Components
from shardckpt.nn_handler.data import Position
from shardckpt.nn_handler.ema import EMA
from shardckpt.nn_handler.emergency import BufferCopies, Failure, group_of_one, is_consequence, meet
from shardckpt.nn_handler.epoch_batches import EpochBatches
from shardckpt.nn_handler.epoch_metrics import EpochSums
from shardckpt.nn_handler.handler_source import open_handler
from shardckpt.nn_handler.loading import restore, restore_tensors
from shardckpt.nn_handler.progress import ProgressBar
from shardckpt.nn_handler.readiness import check_on_all
from shardckpt.nn_handler.signals import end_process, stop_requests
from shardckpt.nn_handler.train_options import TrainOptions
from shardckpt.nn_handler.updating import Updater
from shardckpt.nn_handler.validation import validate
from shardckpt.state.random_state import random_state, set_random_state

__all__ = ["Trainer"]


class Trainer:
    """One call of NNHandler.train."""

    def __init__(self, handler: Components, options: TrainOptions) -> None:
        self.handler = handler
        self.options = options
        self.failure: BaseException | None = None  # the error of this rank, for the next agreement
        self.failure_is_known = False  # all ranks know that training fails
        self.save_failed = False  # another save would fail too, or wait for ranks that have left
        self.at: Literal["boundary", "forward", "update"] = "boundary"
        self.buffers: BufferCopies | None = None
        self.saver: AutoSaver | None = None if options.fast_dev_run else handler.auto_saver
        bar = ProgressBar(options.gradient_accumulation_steps, options.limit_train_batches)
        self.bar = [bar] if options.progress_bar else []
        self.updater: Updater | None = None
        self.agreement = TrainingAgreement(options.agree_every)
        self.batches = EpochBatches(iter(()), per_step=1, count=None)
        self.end = self.end_step = 0
        handler.validates = options.validate_every > 0 or options.validate_every_steps is not None

    def run(self) -> None:
        """Train. Collective."""
        handler = self.handler
        check_on_all(handler, self.options)
        handler.trains = True
        try:
            self._train()
        finally:
            handler.trains = False

    def _train(self) -> None:
        handler, saver = self.handler, self.saver
        resumed = self._prepare()
        self.updater = Updater(
            handler,
            self.options,
            note=self._note_point,
            guard=self._guard,
            go_back=self._go_back,
            put_back=self._put_back,
        )
        self.end, self.end_step = handler.begin_run(
            self.options.epochs, self.options.max_steps, resumed=resumed
        )
        with stop_requests(enabled=saver is not None and saver.on_signal) as self.requests:
            try:
                self._hooks("on_train_start")
                self._agree()
                if not resumed:
                    self._try_validation()
                while handler.epoch < self.end and not self._ends():
                    self._epoch()
                self._hooks("on_train_end")
                self._agree()
            except BaseException as error:
                self._tell(error)
                if (raised := self._emergency(error)) is not error:
                    raise raised from error
                raise
            finally:
                handler.sums = None
            if saver is not None:
                saver.close()

    def _prepare(self) -> bool:
        """Create the objects that training needs, and resume. Returns whether it resumed.

        Collective.
        """
        handler, options, saver = self.handler, self.options, self.saver
        if options.nan_guard == "restore" and (saver is None or not saver.schedule.saves()):
            raise StateError(
                'nan_guard="restore" needs checkpoints to go back to',
                remedy="call auto_save first, with every_steps= for example",
            )
        if options.ema_decay and handler.ema is None:
            handler.ema = EMA(handler.model, options.ema_decay)
        if options.scales(handler.device) and handler.scaler is None:
            handler.set_grad_scaler()
        resumed = saver is not None and saver.begin(
            handler, restore=lambda path: restore(handler, open_handler(path))
        )
        if options.ema_decay and handler.ema is not None:
            handler.ema.decay = options.ema_decay
        handler.wrap_again()
        self._warn_of_untrained()
        if options.nan_guard == "skip" or (saver is not None and saver.on_exception):
            self.buffers = BufferCopies(handler.module)
        return resumed

    def _epoch(self) -> None:
        handler = self.handler
        self._begin_epoch()
        while self._step():
            pass
        if not handler.position.batches and not self._ends():
            raise StateError(
                "The train loader gave no batch",
                actual=f"epoch {handler.epoch + 1}, rank {handler.rank}",
                remedy="give a Dataset, or a loader that can be iterated in every epoch; a "
                "generator ends with the first one",
            )
        if self._ends() and self._unfinished():
            self._save_within()
        else:
            self._finish_epoch()

    def _ends(self) -> bool:
        """Whether training ends early, or after max_steps."""
        return self.handler.stop_training or self.handler.step >= self.end_step

    def _begin_epoch(self) -> None:
        """Prepare the remaining batches of the epoch."""
        handler, data, position = self.handler, self.handler.train_data, self.handler.position
        assert data is not None
        self.sums = handler.sums = EpochSums(handler)
        if not data.fits(position):
            warn(
                f"The train loader had {position.length} samples before, and has another number "
                "now: the epoch starts again"
            )
            handler.position = position = Position()
        if position.batches == 0:
            position = Position(seed=handler.seed_value, random=data.random_now())
            handler.position = position
            self._hooks("on_epoch_start")
            self._agree()
            handler.wrap_again()
            self._warn_of_untrained()
        elif handler.boundary is not None and handler.boundary["sums"] is not None:
            self.sums.load(handler.boundary["sums"])
        batches = data.batches(handler.epoch, position)
        count = len(data.loader) if data.even else 0
        if handler.boundary is not None and position.batches:
            set_random_state(handler.boundary["random"])
        if self.options.limit_train_batches is not None:
            left = max(0, self.options.limit_train_batches - position.batches)
            batches, count = itertools.islice(batches, left), min(count, left)
        most, least = self.agreement.largest([count, -count])
        self.batches = EpochBatches(
            batches,
            per_step=self.options.gradient_accumulation_steps,
            count=count if count and most == -least else None,
        )
        self.agreement.soon()
        handler.train_mode()
        self._mark()

    def _step(self) -> bool:
        """Run a step of the optimizer. Returns False at the end of the epoch or of training."""
        handler = self.handler
        assert handler.train_data is not None
        assert self.updater is not None
        agrees = self._agrees()
        ends = agrees and (self._ends() or self.failure is not None)
        group = [] if ends else self.batches.for_step(agreed=agrees)
        self.failure = self.failure or self.batches.failure
        if agrees or not group:
            group = group[: self._agree(len(group))]
        if not group or (agrees and self._ends()):
            return False
        for number, batch in enumerate(group):
            self._hooks("on_batch_start", batch, number)
        if self.buffers is not None:
            self.buffers.note()
        loss = self.updater.step(group, self.sums)
        handler.step += 1
        handler.train_data.advance(handler.position, len(group))
        self._mark()
        self._hooks("on_step_end", loss)
        every = self.options.validate_every_steps
        if every and handler.step % every == 0 and handler.val_data is not None:
            results = {"step": float(handler.step), **self._validate()}
            handler.validations.append(results)
            self._hooks("on_validation_end", results)
        return True

    def _agrees(self) -> bool:
        """Whether the ranks agree before the next step. The same on all ranks.

        A rank may ask for the end by handler.stop_training. All of them end when they agree.
        """
        due, saver = self.agreement.due(), self.saver
        saves = saver is not None and saver.due(self.handler)
        return due or saves or self.batches.count is None or self.handler.step >= self.end_step

    def _finish_epoch(self) -> None:
        handler, saver = self.handler, self.saver
        epoch = handler.epoch + 1
        results = {**self.sums.means(), **handler.rates}
        handler.sums = None  # a value that is logged now would be lost
        if handler.val_data is not None and self._validates(epoch):
            found = self._validate()
            results |= found
            self._hooks("on_validation_end", found)
        self.at = "update"
        for scheduler in handler.schedulers.values():
            scheduler.after_epoch(results)
        handler.epoch = epoch
        handler.position = Position()
        for name, value in results.items():
            handler.history.setdefault(name, []).append(value)
            handler.history_epochs.setdefault(name, []).append(epoch)
        handler.boundary = None
        self.at = "boundary"
        self._hooks("on_epoch_end", results)
        self._tell_saves()
        self._agree()
        if saver is not None:
            with self._saving():
                saver.after_epoch(
                    handler,
                    results,
                    last=epoch == self.end or self._ends(),
                    save_last=self.options.save_on_last_epoch,
                )

    def _validates(self, epoch: int) -> bool:
        every, saver = self.options.validate_every, self.saver
        if not every:
            return False
        saves = saver is not None and saver.schedule.due_after_epoch(
            epoch, last=epoch == self.end, save_last=self.options.save_on_last_epoch
        )
        return epoch % every == 0 or (
            saves and saver is not None and saver.schedule.needs_validation()
        )

    def _try_validation(self) -> None:
        """Validate on a few batches before training, so that mistakes show at once.

        Not on a loader that is used as it is: one more pass could change what it gives later.
        """
        data, batches = self.handler.val_data, self.options.sanity_val_batches
        if data is None or data.counted is None or not (batches and self.handler.validates):
            return
        validate(
            self.handler,
            autocast=self.options.autocast(self.handler.device),
            limit=batches,
            guard=self._guard,
            agree=lambda more: self._agree(int(more), boundary=False),
        )
        self._agree()

    def _go_back(self) -> None:
        """Load the weights and the optimizers of the last checkpoint. Collective."""
        handler, saver = self.handler, self.saver
        assert saver is not None
        self.at = "update"
        if not saver.go_back(lambda path: restore_tensors(handler, open_handler(path))):
            raise StateError(
                'nan_guard="restore" found no checkpoint to go back to',
                actual=f"step {handler.step}",
                remedy="save earlier: auto_save(every_steps=...)",
            )

    def _put_back(self) -> None:
        """Restore the buffers of the last boundary."""
        if self.buffers is not None:
            self.buffers.put_back()

    def _validate(self) -> dict[str, float]:
        self._hooks("on_validation_start")
        found = validate(
            self.handler,
            autocast=self.options.autocast(self.handler.device),
            limit=self.options.limit_val_batches,
            guard=self._guard,
            agree=lambda more: self._agree(int(more), boundary=False),
            on_batch=lambda batch, number: self._hooks("on_validation_batch_start", batch, number),
        )
        return {f"val_{name}": value for name, value in found.items()}

    def _mark(self) -> None:
        """Note a boundary."""
        self.handler.boundary = {"random": random_state(), "sums": self.sums.state()}
        self.at = "boundary"

    def _note_point(self, point: Literal["forward", "update"]) -> None:
        if point == "update" and self.saver is not None:
            self.saver.wait_staged()
        self.at = point

    def _agree(self, batches: int | None = None, *, boundary: bool = True) -> int:
        """Exchange signals, failures and due saves. Then save, stop or raise on all ranks.

        Collective.

        `batches` is the number of batches that this rank has; None outside of an epoch. Returns
        the smallest number of all ranks, or the largest outside of a `boundary`.
        """
        handler, saver = self.handler, self.saver
        sign = -1 if boundary else 1
        signal, failed, stop, minutes, found = self.agreement.largest(
            [
                self.requests.received,
                handler.rank + 1 if self.failure is not None else 0,
                int(handler.stop_training),
                int(saver is not None and handler.rank == 0 and saver.minutes_due()),
                sign * (batches or 0),
            ]
        )
        handler.stop_training = bool(stop)
        if failed:
            self.failure_is_known = True
            self._warn_of_repeats()
            raise self.failure or RankFailedError(
                "Training fails on another rank",
                rank=failed - 1,
                remedy="look at that rank's own error",
            )
        if signal:
            self.failure_is_known = True
            if saver is not None:
                saver.emergency(handler)
            end_process(signal)
        if saver is not None and batches is not None and boundary:
            with self._saving():
                saver.within_epoch(handler, now=bool(minutes))
        return sign * found

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Mark that a failure in the with block happens on all ranks."""
        self.failure_is_known = True
        try:
            yield
        except Exception:
            self.save_failed = True
            raise
        self.failure_is_known = False
        self._tell_saves()

    def _tell_saves(self) -> None:
        savers = [c.saver for c in self.handler.callbacks if isinstance(c, ModelCheckpoint)]
        for saver in [*savers, *([self.saver] if self.saver is not None else [])]:
            for path, error in saver.take_failed():
                self.handler.failed_saves += 1
                self._hooks("on_save_failed", path, error)
            for path in saver.take_fresh():
                self._hooks("on_save", path)

    def _save_within(self) -> None:
        if self.saver is not None:
            with self._saving():
                self.saver.within_epoch(self.handler, now=True)

    def _guard(self, act: Callable[[], Any]) -> None:
        """Call a function that may fail on this rank alone. The others learn it at the boundary."""
        try:
            act()
        except BaseException as error:
            self.failure = self.failure or error

    def _hooks(self, hook: str, *args: Any) -> None:
        """Call a hook of all callbacks. ModelCheckpoints come last."""
        callbacks = [*self.bar, *self.handler.callbacks]
        if not callbacks:
            return
        if self.options.fast_dev_run:
            callbacks = [callback for callback in callbacks if not callback.writes_files]
        callbacks.sort(key=lambda callback: isinstance(callback, ModelCheckpoint))
        for callback in callbacks:
            if self.failure is None or self.handler.world_size > 1:  # others may wait in a hook
                self._guard(partial(getattr(callback, hook), self.handler, *args))

    def _unfinished(self) -> bool:
        """Whether the epoch has samples left."""
        data, position = self.handler.train_data, self.handler.position
        limit = self.options.limit_train_batches
        if data is None or (limit is not None and position.batches >= limit):
            return False
        return not data.even or position.samples < position.length

    def _warn_of_untrained(self) -> None:
        names = self.handler.untrained()
        key = f"untrained {names}"
        if names and key not in self.handler.warned:
            self.handler.warned.add(key)
            some = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            warn(
                f"{len(names)} parameters need gradients, but no optimizer holds them, so they are "
                f"not trained: {some}. Call set_optimizer again after unfreezing, "
                'or handler.optimizer.add_param_group({"params": [...]})'
            )

    def _warn_of_repeats(self) -> None:
        if self.batches.repeats:
            warn(
                f"The data of rank {self.handler.rank} failed {self.batches.repeats} steps ago. "
                "Until the ranks agreed, this rank used the batches of its last step again"
            )

    def _tell(self, error: BaseException) -> None:
        """Call on_exception of all callbacks. Errors that they raise become warnings."""
        for callback in (*self.bar, *self.handler.callbacks):
            try:
                callback.on_exception(self.handler, error)
            except Exception as second:
                warn(f"{type(callback).__name__}.on_exception raised {second!r}")

    def _emergency(self, error: BaseException) -> BaseException:
        """Save before an error ends training, if the state of the last boundary is complete.

        Returns the error to raise. If this rank's error only follows from that of another rank, it
        is a RankFailedError.
        """
        handler, saver = self.handler, self.saver
        exits = isinstance(error, (KeyboardInterrupt, SystemExit)) and error is not self.failure
        if exits or self.save_failed:
            return error
        consequence, saves = is_consequence(error), saver is not None and saver.on_exception
        try:
            where = f"step {handler.step}, epoch {handler.epoch}, updating: {self.at == 'update'}"
            failure = Failure()
            if not self.failure_is_known:
                failure = meet(where, consequence=consequence, patient=saves)
        except RankFailedError as unknown:
            return unknown if consequence else error
        raised = failure.error() if consequence else error
        try:
            if saver is not None and saves:
                self._save_emergency(saver, failure)
        except Exception as second:
            text = f"and nothing was saved before the end: {second}"
            if hasattr(raised, "add_note"):
                raised.add_note(text)
            else:  # Python 3.10
                warn(text)
        return raised

    def _save_emergency(self, saver: AutoSaver, failure: Failure) -> None:
        """Save with all ranks or, under DDP, where each rank has the full state, alone."""
        handler = self.handler
        if self.at == "update":
            raise StateError("A step of the optimizer was cut short")
        if self.at == "forward":
            self._put_back()
        if failure.at_one_point:
            saver.emergency(handler)
        elif handler.parallel != "ddp":
            raise StateError(f"No rank holds the full state, and {failure.problem}")
        elif failure.may_save:
            saver.emergency(handler, process_group=group_of_one())
