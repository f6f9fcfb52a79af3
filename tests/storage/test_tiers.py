"""Checkpoints in a fast tier, copied to a slower one in the background."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt import TieredStorage
from shardckpt.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptionError,
    StateError,
    StoreUnavailableError,
)
from shardckpt.storage import drain, tiered_files
from shardckpt.storage import tiers as module
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing import StorageTests
from tests.ranks import run_ranks

STATE = {"w": torch.arange(2_000_000.0), "frozen": torch.ones(70), "step": 3}  # eight blocks
DEADLINE_S = 60


class TestTieredStorage(StorageTests):
    @pytest.fixture
    def storage(self, tiers, monkeypatch):
        # The checkpoints of these tests have no manifest that could be copied.
        for one in (module, tiered_files):
            monkeypatch.setattr(one, "check_text", lambda text, path: None)
        monkeypatch.setattr(tiers._drain, "add", lambda *arguments, **options: None)
        return tiers

    @pytest.fixture
    def path(self):
        return "checkpoint"


def is_saved(state) -> bool:
    return torch.equal(state["w"], STATE["w"]) and state["step"] == 3


def test_a_save_reaches_all_tiers(tiers, tmp_path, url):
    report = shardckpt.save(STATE, "step-1", storage=tiers)
    assert list(report.tiers) == [str(tmp_path / "fast/step-1"), f"{url}/step-1"]
    assert report.tiers[str(tmp_path / "fast/step-1")] == "durable"
    tiers.wait(DEADLINE_S)
    assert set(tiers.tiers("step-1").values()) == {"durable"}
    for path in (tmp_path / "fast/step-1", f"{url}/step-1", report.path):
        assert is_saved(shardckpt.load_state(path)), path
    shardckpt.verify(f"{url}/step-1")
    assert shardckpt.metadata(f"{url}/step-1").checkpoint_id == report.checkpoint_id


def test_a_handle_waits_for_a_tier(tiers, url):
    handle = shardckpt.async_save(STATE, "step-1", storage=tiers)
    handle.result(DEADLINE_S, tier=1)
    assert is_saved(shardckpt.load_state(f"{url}/step-1"))
    with pytest.raises(StateError, match="does not have a tier with this number"):
        handle.result(tier=2)


class Down(MemoryStorage):
    """A store that can be down."""

    down = False

    def begin(self, path, **options):
        if self.down:
            raise StoreUnavailableError("503")
        return super().begin(path, **options)


def test_a_store_that_is_down_holds_up_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(drain, "_FIRST_WAIT_S", 0.05)
    store = Down()
    shardckpt.register_storage("down", lambda url: store)
    store.down = True
    tiers = TieredStorage(tmp_path / "fast", "down://bucket/run")
    with shardckpt.CheckpointManager(tiers, keep=[shardckpt.KeepLast(2)]) as manager:
        for step in range(4):
            manager.save(step, STATE)
        assert manager.all_steps() == [2, 3]
    with pytest.raises(TimeoutError):
        tiers.wait(0.3)
    assert "pending" in tiers.tiers("step-3").values()
    store.down = False
    tiers.wait(DEADLINE_S)
    for step in (2, 3):
        assert is_saved(shardckpt.load_state(f"down://bucket/run/step-{step}", storage=store))
    assert not store.exists("down://bucket/run/step-0")


@pytest.fixture
def held(monkeypatch):
    """No copy begins before this event is set."""
    go, copy = threading.Event(), module._copy

    def wait(*arguments, **options):
        assert go.wait(DEADLINE_S)
        copy(*arguments, **options)

    monkeypatch.setattr(module, "_copy", wait)
    yield go
    go.set()


@pytest.mark.parametrize("error", [CorruptionError, CheckpointNotFoundError])
def test_who_waits_for_a_tier_learns_that_it_will_never_have_the_checkpoint(
    tmp_path, url, held, error
):
    tiers = TieredStorage(tmp_path / "fast", url)
    handle = shardckpt.async_save(STATE, "step-1", storage=tiers)
    handle.result(DEADLINE_S)
    shardckpt.save(STATE, "step-2", storage=tiers)
    first = tmp_path / "fast/step-1"
    if error is CorruptionError:
        (shard,) = first.glob("*.safetensors")
        shard.write_bytes(bytes(shard.stat().st_size))
    else:
        shutil.rmtree(first)
    held.set()
    with pytest.raises(error):
        handle.result(DEADLINE_S, tier=1)
    with pytest.raises(error):
        tiers.wait(DEADLINE_S)
    assert tiers.tiers("step-1")[f"{url}/step-1"] == "missing"
    assert is_saved(shardckpt.load_state(f"{url}/step-2"))
    tiers.remove("step-1")
    tiers.wait(DEADLINE_S)


def test_an_old_checkpoint_that_can_not_be_copied_is_no_error_of_this_program(tmp_path, url):
    shardckpt.save(STATE, tmp_path / "fast/step-1")
    (shard,) = (tmp_path / "fast/step-1").glob("*.safetensors")
    shard.write_bytes(bytes(shard.stat().st_size))
    tiers = TieredStorage(tmp_path / "fast", url)
    with shardckpt.CheckpointManager(tiers) as manager:
        manager.save(2, STATE)
    tiers.wait(DEADLINE_S)
    assert set(tiers.tiers("step-2").values()) == {"durable"}


def test_a_tier_with_an_older_checkpoint_does_not_have_this_one(tmp_path, url, held):
    held.set()
    tiers = TieredStorage(tmp_path / "fast", url)
    shardckpt.save(STATE, "step-1", storage=tiers)
    tiers.wait(DEADLINE_S)
    shardckpt.save(STATE, tmp_path / "fast/step-1", overwrite=True)  # it is not copied
    assert list(tiers.tiers("step-1").values()) == ["durable", "missing"]
    tiers.resume()
    tiers.wait(DEADLINE_S)
    assert list(tiers.tiers("step-1").values()) == ["durable", "durable"]


def made_at(path, time: str, version: int) -> None:
    """Save a checkpoint that says that it was made at a time of the same day."""
    with mock.patch("shardckpt.saving.commit.datetime") as module:
        module.datetime.now.return_value.isoformat.return_value = f"2026-11-29T{time}+00:00"
        shardckpt.save({"version": version}, path)


def test_a_machine_that_was_away(tmp_path, url):
    """Its fast tier has an older checkpoint than the slow one: the newest one loads, and is not
    replaced by the older one."""
    made_at(tmp_path / "fast/step-1", "10:00:00", 1)
    made_at(f"{url}/step-1", "10:00:01", 2)
    made_at(tmp_path / "fast/step-2", "10:00:00", 1)
    tiers = TieredStorage(tmp_path / "fast", url)
    state = {"version": 0}
    shardckpt.load(state, "step-1", storage=tiers)
    assert state == shardckpt.load_state("step-1", storage=tiers) == {"version": 2}
    with shardckpt.CheckpointManager(tiers) as manager:
        manager.save(3, state)
    tiers.wait(DEADLINE_S)
    assert shardckpt.load_state(f"{url}/step-1") == {"version": 2}
    assert shardckpt.load_state(f"{url}/step-2") == {"version": 1}
    assert shardckpt.load_state(f"{url}/step-3")["version"] == 2
    shardckpt.save({"version": 4}, "step-1", storage=tiers, overwrite=True)
    tiers.wait(DEADLINE_S)
    assert shardckpt.load_state(f"{url}/step-1") == {"version": 4}


def test_a_load_while_a_slower_tier_is_down(tmp_path, held):
    class Dead(MemoryStorage):
        def open(self, path):
            raise StoreUnavailableError("503")

    shardckpt.register_storage("dead", lambda url: Dead())
    shardckpt.save(STATE, tmp_path / "fast/step-1")
    assert is_saved(shardckpt.load_state(f"tiers://{tmp_path}/fast/step-1,dead://bucket/step-1"))


class Untouched(MemoryStorage):
    """A store that is listed by rank 0, once, and asked for nothing else while saves run."""

    def refuse(self, *arguments, **options):
        raise AssertionError("the slower tier was asked for something")

    begin = assemble = open = version = exists = refuse
    lists = 0

    def names(self, folder):
        Untouched.lists += 1
        raise StoreUnavailableError("503")


def save_beside_a_store_that_is_down(folder):
    shardckpt.register_storage("untouched", lambda url: Untouched())
    tiers = TieredStorage(folder / "fast", "untouched://bucket/run")
    tiers._drain.add = lambda *arguments, **options: None
    for step in (1, 2):
        report = shardckpt.save(STATE, f"step-{step}", storage=tiers)
        assert list(report.tiers.values()) == ["durable", "pending"]
    assert Untouched.lists == (1 if dist.get_rank() == 0 else 0)


@pytest.mark.ranks
def test_saves_list_a_slower_tier_once_and_ask_it_for_nothing(tmp_path):
    run_ranks(2, save_beside_a_store_that_is_down, tmp_path)


def test_what_only_a_slower_tier_has_is_not_replaced_unasked(tmp_path, url):
    """As on a new machine, whose first tier is empty."""
    shardckpt.save({"run": 1}, f"{url}/step-1")
    tiers = TieredStorage(tmp_path / "fast", url)
    with pytest.raises(CheckpointExistsError, match="slower tier") as caught:
        shardckpt.save({"run": 2}, "step-1", storage=tiers)
    assert caught.value.path == f"{url}/step-1"
    assert tiers.exists("step-1")
    with (
        shardckpt.CheckpointManager(tiers) as manager,
        pytest.raises(CheckpointExistsError),
    ):
        manager.save(1, {"run": 2})
    tiers.wait(DEADLINE_S)
    assert shardckpt.load_state("step-1", storage=tiers) == {"run": 1}
    shardckpt.save({"run": 2}, "step-1", storage=tiers, overwrite=True)
    tiers.wait(DEADLINE_S)
    assert shardckpt.load_state(f"{url}/step-1") == {"run": 2}
    tiers.remove("step-1")
    shardckpt.save({"run": 3}, "step-1", storage=tiers)
    tiers.wait(DEADLINE_S)
    assert shardckpt.load_state(f"{url}/step-1") == {"run": 3}


def test_a_slower_tier_that_could_not_be_listed_is_listed_later(tmp_path, url, monkeypatch):
    monkeypatch.setattr(drain, "_FIRST_WAIT_S", 0.01)
    shardckpt.save({"run": 1}, f"{url}/step-1")
    tiers = TieredStorage(tmp_path / "fast", url)
    names, failures = MemoryStorage.names, [StoreUnavailableError("503")] * 3

    def fails(self, folder):
        if failures:
            raise failures.pop()
        return names(self, folder)

    monkeypatch.setattr(MemoryStorage, "names", fails)
    assert tiers.names(tiers.full_path("")) == []
    tiers.wait(DEADLINE_S)
    assert tiers.names(tiers.full_path("")) == ["step-1"]


def test_retention_by_tier(tmp_path, url):
    tiers = TieredStorage(tmp_path / "fast", url, keep_fast=2)
    with shardckpt.CheckpointManager(tiers) as manager:
        for step in range(5):
            manager.save(step, {"step": step})
            tiers.wait(DEADLINE_S)
            time.sleep(1.01)  # the time in a manifest is in seconds
        assert sorted(os.listdir(tmp_path / "fast")) == ["step-3", "step-4"]
        assert manager.all_steps() == [0, 1, 2, 3, 4]
    state = {"step": -1}
    manager = shardckpt.CheckpointManager(TieredStorage(tmp_path / "fast", url))
    assert manager.restore_latest(state).step == 4
    assert shardckpt.load_state("step-0", storage=tiers)["step"] == 0


def test_another_process_goes_on(tmp_path, url, monkeypatch):
    """A checkpoint that a process did not copy before its end is copied by the next process."""
    lost = TieredStorage(tmp_path / "fast", url)
    monkeypatch.setattr(lost, "_copy_later", lambda path, saved: None)
    with shardckpt.CheckpointManager(lost) as manager:
        manager.save(1, STATE)
    with pytest.raises(CheckpointNotFoundError):
        shardckpt.load_state(f"{url}/step-1")
    again = TieredStorage(tmp_path / "fast", url)
    with shardckpt.CheckpointManager(again) as manager:
        manager.save(2, STATE)
    again.wait(DEADLINE_S)
    for step in (1, 2):
        assert is_saved(shardckpt.load_state(f"{url}/step-{step}"))


def test_a_program_that_ends_copies_first(tmp_path):
    code = (
        "import shardckpt, torch\n"
        "tiers = shardckpt.TieredStorage('a', 'b')\n"
        "shardckpt.save({'w': torch.ones(1_000_000)}, 'step-1', storage=tiers)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(shardckpt.__file__).parents[1])}
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120, env=environment
    )
    assert shardckpt.load_state(tmp_path / "b/step-1")["w"].sum() == 1_000_000


def test_auto_save_takes_tiers(tmp_path, url):
    model = torch.nn.Linear
    handler = shardckpt.NNHandler(model, device="cpu", in_features=2, out_features=2)
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_loss_fn(torch.nn.MSELoss())
    data = torch.utils.data.TensorDataset(torch.ones(4, 2), torch.ones(4, 2))
    handler.set_train_loader(torch.utils.data.DataLoader(data, batch_size=2))
    tiers = TieredStorage(tmp_path / "fast", url)
    handler.auto_save(save_path=tiers, interval=1)
    handler.train(2)
    tiers.wait(DEADLINE_S)
    again = shardckpt.NNHandler.load(f"{url}/epoch2")
    assert torch.equal(again.module.weight, handler.module.weight)


def test_paths_and_arguments_of_tiers_are_checked(tiers, tmp_path, url):
    full = f"tiers://{tmp_path}/fast/a,{url}/a"
    assert tiers.full_path("a") == tiers.full_path("/a"[1:] + "/") == full
    for path in ("/a", "../a", "a/./b"):
        with pytest.raises(StateError, match="Invalid path"):
            tiers.full_path(path)
    for arguments in ((), ("a",)):
        with pytest.raises(StateError, match="Invalid arguments"):
            TieredStorage(*arguments)
    with pytest.raises(StateError, match="Invalid arguments"):
        TieredStorage("a", "b", keep_fast=0)
    with pytest.raises(CheckpointNotFoundError):
        shardckpt.load_state("nothing", storage=tiers)
    with pytest.raises(StateError, match="another number"):
        shardckpt.load_state("tiers:///a,/b,/c", storage=tiers)
    odd = TieredStorage(tmp_path / "a,b%", tmp_path / "c")
    report = shardckpt.save({"n": 1}, "x", storage=odd)
    assert shardckpt.load_state(report.path) == {"n": 1}
    odd.wait(DEADLINE_S)
    assert sorted(os.listdir(tmp_path)) == ["a,b%", "c"]
