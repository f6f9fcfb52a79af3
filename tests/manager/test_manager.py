"""CheckpointManager keeps, prunes and restores checkpoints, and loses none that must stay."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt import (
    CheckpointManager,
    KeepBest,
    KeepEveryHours,
    KeepEverySteps,
    KeepLast,
    api,
    errors,
)
from shardckpt.errors import NoSpaceError, StateError, StorageError, StoreUnavailableError
from shardckpt.saving import incremental as base
from shardckpt.state import file_groups as kinds
from shardckpt.storage.local import LocalStorage
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    "make",
    [
        lambda: KeepLast(0),
        lambda: KeepLast(1.5),
        lambda: KeepLast("2"),
        lambda: KeepBest(1, "loss", "least"),
        lambda: KeepEverySteps(-1),
        lambda: KeepEveryHours(True),
        lambda: CheckpointManager("c", check="half"),
        lambda: CheckpointManager("c", keep=3),
        lambda: CheckpointManager("c", keep=KeepLast(3)),
        lambda: CheckpointManager("c", keep=[3]),
        lambda: CheckpointManager("c").save(-1, {}),
        lambda: CheckpointManager("c").save(1, [torch.ones(1)]),
        lambda: CheckpointManager("c").save(1, {"checkpoint_manager": 1}),
        lambda: CheckpointManager("c").restore_best({}),
    ],
)
def test_bad_arguments_are_refused(make):
    with pytest.raises(errors.StateError):
        make()


def state(value: float = 0.0) -> dict:
    return {"w": torch.full((4,), float(value)), "step": int(value)}


def test_a_loop_of_ones_own(tmp_path):
    keep = [KeepLast(2), KeepBest(1, "loss")]
    manager = CheckpointManager(tmp_path / "c", keep=keep)
    assert manager.all_steps() == []
    assert manager.restore_latest(state()) is None
    for step, loss in enumerate([0.5, 0.1, 0.3, 0.4], 1):
        manager.save(step, state(step), metrics={"loss": loss})
    assert manager.all_steps() == [2, 3, 4]
    assert sorted(os.listdir(tmp_path / "c")) == ["step-2", "step-3", "step-4"]
    target = state()
    restored = CheckpointManager(tmp_path / "c").restore_latest(target)
    assert (restored.step, restored.metrics, restored.skipped) == (4, {"loss": 0.4}, ())
    assert target["step"] == 4
    assert torch.equal(target["w"], torch.full((4,), 4.0))
    assert manager.restore_best(target).step == 2
    assert manager.restore_best(target, "loss", "max").step == 4
    with pytest.raises(errors.CheckpointExistsError):
        manager.save(4, state())
    manager.save(4, state(44), if_exists="overwrite")
    manager.save(4, state(45), if_exists="number")
    assert manager.restore_latest(target)
    assert target["step"] == 45
    assert "step-4-v1" in os.listdir(tmp_path / "c")


def test_a_monitored_metric_that_no_checkpoint_has_is_reported_once(tmp_path):
    manager = CheckpointManager(tmp_path / "c", keep=[KeepBest(1, "val_loss")])
    manager.save(1, state(1))
    manager.save(2, state(2))
    with pytest.warns(UserWarning, match="'val_loss', and the saved metrics are valloss") as caught:
        manager.save(3, state(3), metrics={"valloss": 0.1})
    assert [one.filename for one in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager.save(4, state(4), metrics={"valloss": 0.2})


def damage(path, *, cut: bool = False) -> None:
    (shard,) = [path / name for name in os.listdir(path) if name.startswith("shard")]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data[:-1] if cut else data)


@pytest.mark.parametrize("how", ["flipped", "cut", "no manifest", "manifest cut"])
def test_a_broken_newest_is_passed_over_aloud(tmp_path, how):
    manager = CheckpointManager(tmp_path)
    manager.save(1, state(1))
    newest = tmp_path / "step-2"
    manager.save(2, state(2))
    if how in ("flipped", "cut"):
        damage(newest, cut=how == "cut")
    elif how == "manifest cut":
        text = (newest / "manifest.json").read_bytes()
        (newest / "manifest.json").write_bytes(text[: len(text) // 2])
    target = state()
    if how == "no manifest":  # no checkpoint at all
        (newest / "manifest.json").unlink()
        restored = CheckpointManager(tmp_path).restore_latest(target)
    else:
        with pytest.warns(UserWarning, match=r"step-2 is corrupted"):
            restored = CheckpointManager(tmp_path).restore_latest(target)
        assert restored.skipped == (str(newest),)
    assert restored.step == 1
    assert target["step"] == 1


def test_where_all_are_broken(tmp_path):
    CheckpointManager(tmp_path).save(1, state(1))
    damage(tmp_path / "step-1")
    with (
        pytest.warns(UserWarning, match="broken"),
        pytest.raises(errors.CorruptionError, match="All checkpoints are corrupted"),
    ):
        CheckpointManager(tmp_path).restore_latest(state())


def test_another_state_is_no_reason_to_fall_back(tmp_path):
    CheckpointManager(tmp_path).save(1, {"other": torch.ones(1)})
    with pytest.raises(errors.LoadMismatchError):
        CheckpointManager(tmp_path).restore_latest(state())


def test_broken_ones_are_not_counted_nor_removed(tmp_path):
    manager = CheckpointManager(tmp_path, keep=[KeepLast(2)])
    manager.save(1, state(1))
    manager.save(2, state(2))
    damage(tmp_path / "step-2")
    fresh = CheckpointManager(tmp_path, keep=[KeepLast(2)])
    with pytest.warns(UserWarning, match=r"step-2 is corrupted and does not count"):
        fresh.save(3, state(3))
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-2", "step-3"]
    fresh.save(4, state(4))
    assert sorted(os.listdir(tmp_path)) == ["step-2", "step-3", "step-4"]


def test_the_newest_that_verifies_is_never_removed(tmp_path, monkeypatch):
    """If the newest checkpoint is corrupted, the one before it stays, whatever the policy is."""
    manager = CheckpointManager(tmp_path, keep=[KeepLast(1)])
    manager.save(1, state(1))
    save = shardckpt.save

    def bad_disk(*arguments, **options):
        save(*arguments, **options)
        damage(tmp_path / "step-2")

    monkeypatch.setattr(api, "save", bad_disk)
    with pytest.warns(UserWarning, match="step-2 is corrupted"):
        manager.save(2, state(2))
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-2"]


def test_a_quick_check_reads_no_shard(tmp_path, monkeypatch):
    manager = CheckpointManager(tmp_path, keep=[KeepLast(1)], check="quick")
    monkeypatch.setattr(shardckpt.Checkpoint, "verify", None)
    manager.save(1, state(1))
    manager.save(2, state(2))
    assert manager.all_steps() == [2]


def frozen_files(folder) -> list[os.stat_result]:
    return [
        os.stat(folder / name / "shard-00000-of-00001-frozen.safetensors")
        for name in sorted(os.listdir(folder))
    ]


def test_frozen_weights_are_linked_and_mended(tmp_path, monkeypatch):
    monkeypatch.setattr(kinds, "FROZEN_FILE_BYTES", 1)
    monkeypatch.setattr(base.secrets, "randbelow", lambda step: 0)  # the first block alone
    model = torch.nn.Linear(1024, 512).requires_grad_(False)
    manager = CheckpointManager(tmp_path, keep=[KeepLast(2)])
    for step in range(3):
        manager.save(step, {"model": model, **state(step)})
    assert [found.st_nlink for found in frozen_files(tmp_path)] == [2, 2]
    with open(tmp_path / "step-2" / "shard-00000-of-00001-frozen.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.warns(UserWarning, match=r"step-3 is corrupted and does not count"):
        manager.save(3, {"model": model, **state(3)})  # takes it over, and finds it broken
    manager.save(4, {"model": model, **state(4)})
    target = {"model": torch.nn.Linear(1024, 512), **state()}
    assert manager.restore_latest(target).step == 4
    assert torch.equal(target["model"].weight, model.weight)


def test_labels_and_strangers_are_left_alone(tmp_path):
    shardckpt.save(state(0), tmp_path / "mine")
    (tmp_path / "notes.txt").write_text("hello")
    one = CheckpointManager(tmp_path, keep=[KeepLast(1)], label="one", name="one-{step}")
    other = CheckpointManager(tmp_path, keep=[KeepLast(1)], label="other", name="other-{step}")
    for step in (1, 2):
        one.save(step, state(step))
        other.save(step, state(step))
    assert sorted(os.listdir(tmp_path)) == ["mine", "notes.txt", "one-2", "other-2"]
    assert len(CheckpointManager(tmp_path, label=None).checkpoints()) == 2


def test_a_symlink_to_the_newest_counts_for_nothing(tmp_path):
    """Or it would take a place among the newest, and what it leads to would be removed."""
    manager = CheckpointManager(tmp_path, keep=[KeepLast(2)])
    for step in range(1, 6):
        manager.save(step, {"w": torch.full((3,), float(step))})
        (tmp_path / "latest").unlink(missing_ok=True)
        (tmp_path / "latest").symlink_to(f"step-{step}")
        assert manager.all_steps() == list(range(max(1, step - 1), step + 1))
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-4", "step-5"]
    assert len(manager.checkpoints()) == 2


def test_in_the_background(tmp_path):
    with CheckpointManager(tmp_path, keep=[KeepLast(1)], asynchronous=True) as manager:
        tensors = state(1)
        for step in (1, 2, 3):
            tensors["w"].fill_(step)
            manager.save(step, tensors)
            tensors["w"].fill_(-1)
    assert manager.all_steps() == [3]
    target = state()
    assert manager.restore_latest(target).step == 3
    assert torch.equal(target["w"], torch.full((4,), 3.0))


def test_a_failure_in_the_background_is_raised(tmp_path):
    manager = CheckpointManager(tmp_path, asynchronous=True)
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "file").write_text("in the way")
    manager.save(1, state(1), if_exists="overwrite")
    with pytest.raises(errors.NotACheckpointError):
        manager.wait()
    manager.wait()


def on_ranks(folder: str) -> list[int]:
    manager = CheckpointManager(folder, keep=[KeepLast(2)])
    for step in range(1, 5):
        # metrics that differ by rank are rank 0's
        manager.save(step, state(step), metrics={"loss": step + 10.0 * dist.get_rank()})
    if dist.get_rank() == 1:
        for name in os.listdir(f"{folder}/step-4"):
            if name.startswith("shard"):
                os.truncate(f"{folder}/step-4/{name}", 8)
    dist.barrier()
    target = state()
    if dist.get_rank() == 0:
        with pytest.warns(UserWarning, match="step-4"):
            restored = manager.restore_latest(target)
    else:
        restored = manager.restore_latest(target)
    assert restored.metrics == {"loss": 3.0}
    return [restored.step, target["step"]]


@pytest.mark.ranks
def test_several_ranks_share_a_manager(tmp_path):
    assert run_ranks(2, on_ranks, str(tmp_path)) == [[3, 3], [3, 3]]
    assert sorted(os.listdir(tmp_path)) == ["step-3", "step-4"]


PAIRS = {
    "names": ({"name": "a-{step}"}, {"name": "b-{step}"}),
    "metrics": ({"keep": [KeepBest(1, "x")]}, {"keep": [KeepBest(1, "y", "max")]}),
    "modes": ({"keep": [KeepBest(1, "x")]}, {"keep": [KeepBest(1, "x", "max")]}),
    "policies": ({"keep": [KeepLast(1)]}, {"keep": [KeepEverySteps(2)]}),
    "no policy": ({"keep": [KeepLast(1)]}, {"keep": []}),
    "labels": ({"label": "a"}, {"label": "b"}),
    "one label": ({"label": "a"}, {}),
    "all labels": ({"label": None, "keep": [KeepBest(1, "x")]}, {}),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_two_managers_in_one_folder(tmp_path, pair):
    """Each removes only what it has saved itself, also after both were started again."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    for _ in range(2):
        options = [{"keep": [KeepLast(1)], **options} for options in PAIRS[pair]]
        managers = [CheckpointManager(both, **given) for given in options]
        apart = [CheckpointManager(alone / str(n), **given) for n, given in enumerate(options)]
        first = max((c.step for c in CheckpointManager(both, label=None).checkpoints()), default=0)
        for step in range(first + 1, first + 7):
            given = {"metrics": {"x": step % 4, "y": step % 3}, "name": f"step-{step}"}
            for found in (managers, apart):
                found[step % 2].save(step, state(step), **given)
    kept = {name for folder in os.listdir(alone) for name in os.listdir(alone / folder)}
    assert set(os.listdir(both)) == kept


def test_managers_alike_that_run_at_the_same_time(tmp_path):
    """Two jobs by the same script: what one saves while the other runs stays until both end."""
    one, other = (CheckpointManager(tmp_path, keep=[KeepLast(1)]) for _ in range(2))
    for step in range(1, 7):
        (one, other)[step % 2].save(step, state(step))
    assert one.all_steps() == [5, 6]
    CheckpointManager(tmp_path, keep=[KeepLast(3)]).save(7, state())
    assert one.all_steps() == [5, 6, 7]
    CheckpointManager(tmp_path, keep=[KeepLast(1)]).save(8, state())
    assert one.all_steps() == [8]


@pytest.mark.parametrize(
    "record", [1, None, {}, {"step": 1}, {"step": "1"}, {"label": "", "step": 1, "metrics": []}]
)
def test_a_record_that_no_manager_has_saved(tmp_path, record):
    record = {"step": 1, **record} if isinstance(record, dict) else {"step": record}
    shardckpt.save({"checkpoint_manager": record}, tmp_path / "other")
    manager = CheckpointManager(tmp_path, keep=[KeepLast(1)])
    for step in (1, 2):
        manager.save(step, state())
    assert sorted(os.listdir(tmp_path)) == ["other", "step-2"]


def test_a_checkpoint_with_files_of_the_user_is_not_removed(tmp_path):
    manager = CheckpointManager(tmp_path, keep=[KeepLast(1)])
    manager.save(1, state(1))
    (tmp_path / "step-1" / "tokenizer.json").write_text("precious")
    with pytest.warns(UserWarning, match=r"step-1 can't be removed.*has not made"):
        manager.save(2, state(2))
    assert manager.all_steps() == [1, 2]
    (tmp_path / "step-1" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    manager.save(2, state(3), if_exists="overwrite")
    assert sorted(os.listdir(tmp_path)) == ["step-2", "tokenizer.json"]


@pytest.mark.parametrize("name", ["a/b", "../a", "/tmp/a", "s3://b", "~/a", ".a", "a\0b", "..", ""])
def test_a_name_that_is_not_in_the_folder(tmp_path, name):
    manager = CheckpointManager(tmp_path / "runs")
    with pytest.raises(errors.StateError, match="Invalid name"):
        CheckpointManager(tmp_path / "runs", name=name)
    if name:
        with pytest.raises(errors.StateError, match="Invalid name"):
            manager.save(1, state(), name=name)
    with pytest.raises(errors.StateError, match="Invalid template"):
        CheckpointManager(tmp_path / "runs", name=f"{name}{{nothing}}")
    manager.save(1, state(), name="{literally}")
    assert os.listdir(tmp_path / "runs") == ["{literally}"]


def test_a_folder_whose_name_is_not_utf_8(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff\xfe")
    manager = CheckpointManager(folder, keep=[KeepLast(1)])
    for step in (1, 2):
        assert manager.save(step, state(step)).path == str(folder / f"step-{step}")
    with pytest.raises(errors.CheckpointExistsError):
        manager.save(2, state())
    os.truncate(manager.save(3, state(3)).path + "/shard-00000-of-00001.safetensors", 9)
    manager.keep = ()
    manager.save(4, state(4))
    restored = manager.restore_latest(state())
    assert restored is not None
    assert (restored.step, restored.checkpoint.path) == (4, str(folder / "step-4"))


class Full(LocalStorage):
    """A disk that is full for a number of saves."""

    def __init__(self, *errors):
        super().__init__()
        self.errors = list(errors)

    def begin(self, path, **options):
        if self.errors:
            raise self.errors.pop(0)
        return super().begin(path, **options)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_failures_of_the_storage_are_tolerated(tmp_path, asynchronous):
    failed = []
    full = [NoSpaceError("planted") for _ in range(2 if asynchronous else 4)]
    manager = CheckpointManager(
        tmp_path,
        storage=Full(*full),
        tolerate=2,
        on_failure=lambda path, error: failed.append((os.path.basename(path), type(error))),
        asynchronous=asynchronous,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            manager.save(step, {"n": step})
        manager.wait()
    assert [w for w in caught if "in a row" in str(w.message)]
    assert failed == [("step-0", NoSpaceError), ("step-1", NoSpaceError)]
    assert manager.all_steps() == [2]


def test_one_failure_is_tried_again(tmp_path):
    manager = CheckpointManager(tmp_path, storage=Full(NoSpaceError("planted")), tolerate=1)
    manager.save(1, {"n": 1})
    assert manager.all_steps() == [1]


def test_other_errors_and_too_many_failures_are_raised(tmp_path):
    many = Full(*(StoreUnavailableError("planted") for _ in range(9)))
    manager = CheckpointManager(tmp_path, storage=many, tolerate=1)
    with pytest.warns(UserWarning, match="in a row"):
        manager.save(1, {"n": 1})
    with pytest.raises(StoreUnavailableError):
        manager.save(2, {"n": 2})
    for error in (StateError("planted"), StorageError("planted")):
        manager = CheckpointManager(tmp_path, storage=Full(error), tolerate=5)
        with pytest.raises(type(error)):
            manager.save(3, {"n": 3})
    assert manager.all_steps() == []


class FailedSave:
    """A save in the background that has failed."""

    path = "step-1"

    def result(self):
        raise StorageError("the disk does not answer")


def test_a_manager_left_by_an_error_waits_for_its_save_without_other_ranks(tmp_path, monkeypatch):
    for step in (1, 2):
        CheckpointManager(tmp_path, keep=[KeepLast(2)]).save(step, state())
    monkeypatch.setattr(CheckpointManager, "_prune", None)  # other ranks would not join
    with (
        pytest.raises(ZeroDivisionError),
        CheckpointManager(tmp_path, keep=[KeepLast(1)], asynchronous=True) as manager,
    ):
        manager.save(3, state(3))
        raise ZeroDivisionError
    assert shardckpt.load_state(tmp_path / "step-3")["step"] == 3


def test_a_failed_save_does_not_hide_the_error_by_which_a_manager_is_left(tmp_path):
    manager = CheckpointManager(tmp_path, asynchronous=True)
    manager._pending = FailedSave()
    with pytest.warns(UserWarning, match="step-1 was not saved"):
        manager.__exit__(ZeroDivisionError, ZeroDivisionError(), None)  # raises no other error
    manager.close()
