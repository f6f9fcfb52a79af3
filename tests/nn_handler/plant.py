"""The 22 faults, planted: each is a change to the source, and a named test must fail for it.

    python -m tests.nn_handler.plant [NUMBER ...]

Each runs in a fork that has torch imported already, and nothing of shardckpt.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import io
import json
import os
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch  # noqa: F401  what a fork has already it need not import

from tests import ranks

ROOT = Path(__file__).parents[2]
HANGS_S = 150
ENVIRONMENT = "PLANTED"  # the changes, for ranks that the tests start
HANDLER, MANAGER = "shardckpt/nn_handler", "shardckpt/manager/manager.py"
TESTS = "tests/nn_handler"


@dataclass(frozen=True)
class Plant:
    """A fault: (file, text, new text) of each change, and the test that must see it."""

    fault: int
    what: str
    changes: tuple[tuple[str, str, str], ...]
    test: str


def plant(fault: int, what: str, file: str, text: str, other: str, test: str) -> Plant:
    return Plant(fault, what, ((file, text, other),), test)


PLANTS = [
    plant(
        1,
        "the last checkpoint is removed before the next is saved",
        MANAGER,
        "        checkpoint, base, manager = self._agree(",
        "        [self._backend.remove(c.path) for c in self.checkpoints() if self.keep]\n"
        "        checkpoint, base, manager = self._agree(",
        f"{TESTS}/test_handler.py::test_a_failed_save_keeps_the_last_good_one",
    ),
    plant(
        2,
        "load makes a handler of one process",
        f"{HANDLER}/loading.py",
        "            parallel=options.parallel,",
        '            parallel="none",',
        f"{TESTS}/test_ranks.py::test_load_as_the_first_call_and_a_save_by_one_rank_alone",
    ),
    plant(
        3,
        "names of wrappers stay",
        f"{HANDLER}/initializing.py",
        '_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")',
        "_WRAPPERS = ()",
        f"{TESTS}/test_initializing.py::test_no_names_of_wrappers_and_no_random_weights[c]",
    ),
    Plant(
        3,
        "compiling changes the names in checkpoints",
        (
            (
                f"{HANDLER}/components.py",
                "self.model.compile(**options)",
                "self.model = torch.compile(self.model, **options)",
            ),
            (
                f"{HANDLER}/training_state.py",
                '{"model": self.model}',
                '{"model": self.model.state_dict()}',
            ),
            (
                f"{HANDLER}/training_state.py",
                'state["optimizer"] = main\n',
                'state["optimizer"] = main.state_dict()\n',
            ),
        ),
        f"{TESTS}/test_initializing.py::test_no_names_of_wrappers_and_no_random_weights[c]",
    ),
    plant(
        3,
        "weights that are not there stay random",
        f"{HANDLER}/initializing.py",
        '            strict=strict,\n            dtype="cast",',
        '            strict=False,\n            dtype="cast",',
        f"{TESTS}/test_initializing.py::test_no_names_of_wrappers_and_no_random_weights[c]",
    ),
    plant(
        4,
        "train begins a new average",
        f"{HANDLER}/trainer.py",
        "if options.ema_decay and handler.ema is None:",
        "if True:",
        f"{TESTS}/test_ema.py::test_the_average_goes_on_and_the_model_is_not_its_copy[c]",
    ),
    plant(
        4,
        "the resumed model is the average",
        f"{HANDLER}/loading.py",
        "    handler.ema = ema or (",
        "    from shardckpt.nn_handler import ema as average\n"
        "    ema and average._fill(average._tensors(handler.model), ema.weights)\n"
        "    handler.ema = ema or (",
        f"{TESTS}/test_ema.py::test_the_average_goes_on_and_the_model_is_not_its_copy[c]",
    ),
    plant(
        5,
        "the gradient scaler begins anew",
        f"{HANDLER}/loading.py",
        "handler.scaler.load_state_dict(saved)",
        "pass",
        f"{TESTS}/test_resume.py::test_stopped_by_ctrl_c[]",
    ),
    plant(
        6,
        "the state of callbacks is lost",
        f"{HANDLER}/loading.py",
        "callback.load_state_dict(state.state)",
        "pass",
        f"{TESTS}/test_callbacks.py::test_each_callback_has_its_own_state_and_arguments",
    ),
    plant(
        6,
        "keyword arguments of callbacks are lost",
        f"{HANDLER}/loading.py",
        "made[0](*made[1], **made[2])",
        "made[0](*made[1])",
        f"{TESTS}/test_callbacks.py::test_each_callback_has_its_own_state_and_arguments",
    ),
    plant(
        6,
        "callbacks of one class share a state",
        f"{HANDLER}/training_state.py",
        'str(number): {"kind"',
        'type(callback).__name__: {"kind"',
        f"{TESTS}/test_callbacks.py::test_each_callback_has_its_own_state_and_arguments",
    ),
    *(
        plant(
            7,
            f"{name} begins anew",
            f"{HANDLER}/scheduling.py",
            "    scheduler.load_state_dict(state)\n",
            "    pass\n",
            f"{TESTS}/test_scheduling.py::test_every_scheduler_resumes_bit_for_bit[{name}]",
        )
        for name in ("LinearLR-epoch", "OneCycleLR-step", "LambdaLR-epoch", "SequentialLR-step")
    ),
    plant(
        8,
        "the newest is not known when others are removed",
        MANAGER,
        "if self._verified.get(_key(checkpoint), True) and self._may_remove(checkpoint)\n        ]",
        "if self._verified.get(_key(checkpoint), True) and self._may_remove(checkpoint)\n        ][:-1]",  # noqa: E501
        f"{TESTS}/test_auto_saver.py::test_retention_after_a_resume",
    ),
    plant(
        8,
        "what was saved before the resume is forgotten",
        f"{HANDLER}/loading.py",
        "list(saved.runs), saved.run_id",
        "list(saved.runs), None",
        f"{TESTS}/test_auto_saver.py::test_retention_after_a_resume",
    ),
    plant(
        8,
        "broken ones count",
        MANAGER,
        "and not self._intact(c, coordinator)",
        "and False",
        "tests/manager/test_manager.py::test_broken_ones_are_not_counted_nor_removed",
    ),
    plant(
        9,
        "an early stop is not the last epoch",
        f"{HANDLER}/trainer.py",
        "last=epoch == self.end or self._ends(),",
        "last=epoch == self.end,",
        f"{TESTS}/test_trainer.py::test_an_early_stop_is_the_last_epoch",
    ),
    plant(
        10,
        "handlers share their metrics",
        f"{HANDLER}/training_state.py",
        "metrics: dict[str, Callable[..., Any]] = field(default_factory=dict)",
        "metrics: dict[str, Callable[..., Any]] = field(default_factory=lambda kept={}: kept)",
        f"{TESTS}/test_training_state.py::test_handlers_share_nothing",
    ),
    plant(
        11,
        "load needs an optimizer",
        f"{HANDLER}/config_differences.py",
        "{MAIN: NamedOptimizer(optimizer=main, scheduler=config.scheduler)} if main else {}",
        "{MAIN: NamedOptimizer(optimizer=main, scheduler=config.scheduler)}",
        f"{TESTS}/test_handler.py::test_saving_before_training",
    ),
    plant(
        12,
        "load does not know directories of several files",
        f"{HANDLER}/handler_source.py",
        "elif os.path.isfile(os.path.join(path, INDEX)):",
        "elif False:",
        f"{TESTS}/test_saving.py::test_split_files_load_completely[torch]",
    ),
    plant(
        13,
        "a lambda can't be saved",
        f"{HANDLER}/objects.py",
        "return {_ABSENT: _text(value)} if name is None else {_IMPORT: name}",
        "return value if name is None else {_IMPORT: name}",
        f"{TESTS}/test_handler.py::"
        "test_what_has_no_importable_name_is_reported_and_asked_for_again[c.pth]",
    ),
    plant(
        13,
        "what torch.load refuses is written",
        "shardckpt/convert/single_files.py",
        "    check_loads(state, target)\n",
        "",
        f"{TESTS}/test_saving.py::test_what_torch_load_refuses_is_not_written",
    ),
    plant(
        14,
        "only bare weights are taken",
        f"{HANDLER}/initializing.py",
        "weight_names(checkpoint.tensors(), own, prefix=prefix)",
        'weight_names(checkpoint.tensors(), own, prefix="")',
        f"{TESTS}/test_initializing.py::test_weights_of_a_full_checkpoint[c]",
    ),
    plant(
        15,
        "parameter groups are dropped",
        f"{HANDLER}/loading.py",
        'made[f"{at}.groups"],\n                    made[f"{at}.options"]',
        'None,\n                    made[f"{at}.options"]',
        f"{TESTS}/test_groups.py::test_parameter_groups_of_any_kind",
    ),
    Plant(
        15,
        "a scheduler is dropped",
        (
            (
                f"{HANDLER}/config_differences.py",
                '{"optimizer": own["optimizer"], "scheduler": own["scheduler"]}',
                '{"optimizer": own["optimizer"]}',
            ),
            (
                f"{HANDLER}/config_differences.py",
                'parts: dict[str, Any] = {"scheduler": config.scheduler}',
                "parts: dict[str, Any] = {}",
            ),
            (
                f"{HANDLER}/config_differences.py",
                'parts |= {place_of(name, "scheduler"): one.scheduler}',
                "pass",
            ),
        ),
        f"{TESTS}/test_config_differences.py::test_no_part_is_dropped_or_mixed_up_by_a_resume",
    ),
    plant(
        16,
        "names differ by rank",
        f"{HANDLER}/parallel.py",
        "    if not dist.is_initialized() or dist.get_world_size() == 1:\n"
        "        found = add([own])",
        "    if True:\n        found = add([own])",
        f"{TESTS}/test_ranks.py::test_metrics_and_names_are_the_same_on_all_ranks",
    ),
    plant(
        16,
        "a missing metric is written out raw",
        f"{HANDLER}/save_schedule.py",
        "            raise _unknown(field, template, set(metrics))",
        "            return template",
        f"{TESTS}/test_save_schedule.py::test_a_checkpoint_name_is_filled_from_metrics",
    ),
    plant(
        17,
        "exceptions in callbacks are swallowed",
        f"{HANDLER}/trainer.py",
        "self.failure = self.failure or error",
        "pass",
        f"{TESTS}/test_trainer.py::test_an_exception_in_a_callback_stops_training_after_a_save",
    ),
    plant(
        18,
        "bad intervals are ignored",
        f"{HANDLER}/save_schedule.py",
        "if self.interval is not None and (type(",
        "if False and (type(",
        f"{TESTS}/test_save_schedule.py::test_bad_intervals_are_refused",
    ),
    plant(
        19,
        "an epoch begins anew in its middle",
        f"{HANDLER}/data.py",
        "rest = order[self.start :]",
        "rest = order",
        f"{TESTS}/test_resume.py::test_no_sample_is_repeated_or_skipped",
    ),
    plant(
        20,
        "a save waits in training's group",
        f"{HANDLER}/saving.py",
        '    with operation(f"save {path}", process_group) as coordinator:',
        "    torch.distributed.barrier()\n"
        '    with operation(f"save {path}", process_group) as coordinator:',
        f"{TESTS}/test_ranks.py::test_load_as_the_first_call_and_a_save_by_one_rank_alone",
    ),
    plant(
        21,
        "a signal ends training without a save",
        f"{HANDLER}/trainer.py",
        "                saver.emergency(handler)\n            end_process(",
        "                pass\n            end_process(",
        f"{TESTS}/test_resume.py::test_stopped_by_ctrl_c[]",
    ),
    plant(
        21,
        "an exception ends training without a save",
        f"{HANDLER}/trainer.py",
        "        if failure.at_one_point:",
        "        if False:",
        f"{TESTS}/test_trainer.py::test_a_save_on_an_exception_in_the_data",
    ),
    plant(
        21,
        "a rank that gets a signal stops alone",
        f"{HANDLER}/parallel.py",
        "    if not dist.is_initialized() or dist.get_world_size() == 1:\n        return flags",
        "    if True:\n        return flags",
        f"{TESTS}/test_ranks.py::test_a_signal_to_one_rank_stops_all_at_one_step[ddp]",
    ),
    plant(
        22,
        "a resume takes the newest, broken or not",
        MANAGER,
        "except _BROKEN as error:\n                if rank == 0:",
        "except () as error:\n                if rank == 0:",
        f"{TESTS}/test_auto_saver.py::test_auto_resume_falls_back[flipped]",
    ),
    plant(
        22,
        "a resume stops at a checkpoint that is cut",
        MANAGER,
        "except (CorruptionError, FormatVersionError) as error:",
        "except () as error:",
        f"{TESTS}/test_auto_saver.py::test_auto_resume_falls_back[cut]",
    ),
]


NOTHING = Plant(
    0, "nothing is changed", (), f"{TESTS}/test_training_state.py::test_handlers_share_nothing"
)
"""The check of the check: its test must pass."""


class Planted(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports the modules that are changed."""

    def __init__(self, changes: list[list[str]]) -> None:
        self.changes = changes

    def find_spec(self, fullname, path, target=None):  # type: ignore[no-untyped-def]
        file = f"{fullname.replace('.', '/')}.py"
        if file not in [changed for changed, _, _ in self.changes]:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=str(ROOT / file))

    def get_filename(self, fullname: str) -> str:
        return str(ROOT / f"{fullname.replace('.', '/')}.py")

    def get_data(self, path: str) -> bytes:
        source = Path(path).read_text()
        for file, text, other in self.changes:
            source = source.replace(text, other) if str(ROOT / file) == path else source
        return source.encode()

    def get_code(self, fullname: str):  # type: ignore[no-untyped-def]
        path = self.get_filename(fullname)
        return compile(self.get_data(path), path, "exec", dont_inherit=True)


def run(plant: Plant) -> str:
    """Return the outcome of a plant's test: "passes", "fails", or "hangs"."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.environ[ENVIRONMENT] = json.dumps(plant.changes)
        ranks.PRELOAD.insert(0, "tests.nn_handler.plant")  # for the server of the ranks
        install()
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
            code = pytest.main([*options, "-m", "", plant.test])  # long tests too
        os._exit(int(code))
    give_up_at = time.monotonic() + HANGS_S
    while time.monotonic() < give_up_at:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.05)
    else:
        status = -1
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # the ranks, and their server
    if status == -1:
        os.waitpid(child, 0)
        return "hangs"
    code = os.waitstatus_to_exitcode(status)
    outcomes = {int(pytest.ExitCode.OK): "passes", int(pytest.ExitCode.TESTS_FAILED): "fails"}
    return outcomes.get(code, f"can't be run: exit code {code}")


def install() -> None:
    """Import what is changed as the environment says."""
    changes = json.loads(os.environ[ENVIRONMENT])
    sys.meta_path.insert(0, Planted(changes))


def main(numbers: list[int]) -> int:
    """Plant faults; 1 unless each is seen, and nothing is seen where there is none."""
    missed = 0
    for plant in [NOTHING, *PLANTS]:
        if plant.fault and numbers and plant.fault not in numbers:
            continue
        outcome = run(plant)
        right = outcome == "passes" if plant is NOTHING else outcome in ("fails", "hangs")
        missed += not right
        print(
            f"{'ok ' if right else 'BAD'} {plant.fault:2} {plant.what}: "
            f"{plant.test.rpartition('/')[2]} {outcome}",
            flush=True,
        )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main([int(number) for number in sys.argv[1:]]))
if ENVIRONMENT in os.environ:
    install()
