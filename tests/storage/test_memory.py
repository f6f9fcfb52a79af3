"""Checkpoints in memory: the rules of an object store, without a server."""

from __future__ import annotations

import time
import uuid

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import shardckpt
from shardckpt.cli.main import main
from shardckpt.convert.convert import convert
from shardckpt.errors import (
    CheckpointBusyError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptionError,
    NotACheckpointError,
    StateError,
)
from shardckpt.storage.memory import MemoryStorage
from shardckpt.storage.object_store import TOMBSTONE
from shardckpt.storage.resolve import resolve
from shardckpt.testing import StorageTests
from tests.storage.stores import keys

STATE = {"w": torch.arange(300_000.0), "frozen": torch.ones(7), "step": 3}


@pytest.fixture
def url():
    return f"memory://tests/{uuid.uuid4().hex}"


class TestMemoryStorage(StorageTests):
    @pytest.fixture
    def storage(self):
        return MemoryStorage()

    @pytest.fixture
    def path(self):
        return "memory://bucket/run/checkpoint"


def loads(path) -> bool:
    state = shardckpt.load_state(path)
    return torch.equal(state["w"], STATE["w"]) and state["step"] == 3


def test_a_checkpoint_is_not_saved_inside_another_one_or_around_it(url):
    shardckpt.save({"n": 1}, f"{url}/a")
    before = keys(url)
    with pytest.raises(StateError, match="inside another checkpoint"):
        shardckpt.save({"n": 2}, f"{url}/a/b")
    with pytest.raises(CheckpointExistsError, match=r"a/manifest\.json"):
        shardckpt.save({"n": 2}, url)
    with pytest.raises(NotACheckpointError, match=r"a/manifest\.json"):
        shardckpt.save({"n": 2}, url, overwrite=True)
    with pytest.raises(StateError, match="inside another checkpoint"):
        shardckpt.CheckpointManager(f"{url}/a").save(1, {"n": 2})
    assert keys(url) == before
    objects, prefix = resolve(url).storage.at(url)
    objects.put(f"{prefix}manifest.json", b'{"name": "of another program"}')
    objects.put(f"{prefix}c/", b"")  # as some tools mark a folder
    shardckpt.save({"n": 3}, f"{url}/c")
    assert shardckpt.load_state(f"{url}/c") == {"n": 3}
    objects.delete([f"{prefix}a/manifest.json"])  # a removed checkpoint does not block a save
    shardckpt.save({"n": 4}, f"{url}/a/b")


def test_every_function_takes_a_url(url):
    shardckpt.save(STATE, f"{url}/a")
    shardckpt.async_save(STATE, f"{url}/b", base=f"{url}/a").result()
    shardckpt.save(STATE, f"{url}/c", planner=shardckpt.ShardSavePlanner())
    dcp.save(dict(STATE), storage_writer=shardckpt.ShardWriter(f"{url}/d"))
    dcp.save(dict(STATE), checkpoint_id=f"{url}/e", storage_writer=shardckpt.ShardWriter())
    shardckpt.reshard(f"{url}/a", f"{url}/f", shards=3)
    shardckpt.rescue(f"{url}/a", f"{url}/g")
    convert(f"{url}/a", f"{url}/h")
    for name in "abcdefgh":
        assert loads(f"{url}/{name}"), name
        state = {"w": torch.zeros(300_000), "step": 0}
        shardckpt.load(state, f"{url}/{name}", keys=["w", "step"])
        assert torch.equal(state["w"], STATE["w"])
        read = {"w": torch.zeros(300_000)}
        dcp.load(read, storage_reader=shardckpt.ShardReader(f"{url}/{name}"))
        assert torch.equal(read["w"], STATE["w"])
    assert shardckpt.metadata(f"{url}/f").path == f"{url}/f"
    assert shardckpt.verify(f"{url}/f").checked_bytes > 1_200_000
    assert len(shardckpt.metadata(f"{url}/f").shards) == 3


def test_the_commands_take_a_url(url, tmp_path, capsys):
    shardckpt.save(STATE, f"{url}/a")
    assert main(["verify", f"{url}/a"]) == 0
    assert main(["inspect", f"{url}/a"]) == 0
    assert main(["reshard", f"{url}/a", f"{url}/b", "--shards", "2"]) == 0
    assert main(["rescue", f"{url}/b", f"{url}/c"]) == 0
    assert main(["convert", f"{url}/c", str(tmp_path / "d")]) == 0
    assert main(["convert", str(tmp_path / "d"), f"{url}/e"]) == 0
    assert loads(f"{url}/e")
    assert main(["verify", url]) == NotACheckpointError.exit_code
    assert "checkpoints in it: a, b, c, e" in capsys.readouterr().err


def test_a_handler_saves_and_loads(url):
    handler = shardckpt.NNHandler(nn.Linear, device="cpu", in_features=2, out_features=2)
    handler.save(f"{url}/h")
    again = shardckpt.NNHandler.load(f"{url}/h")
    assert torch.equal(again.module.weight, handler.module.weight)
    handler.restore(f"{url}/h")
    fresh = shardckpt.NNHandler.initialize_from_checkpoint(
        f"{url}/h", nn.Linear, device="cpu", in_features=2, out_features=2
    )
    assert torch.equal(fresh.module.weight, handler.module.weight)
    with pytest.raises(StateError, match="can't be used here"):
        handler.save(f"{url}/h.pth")


def test_auto_save_takes_a_url(url):
    def handler():
        made = shardckpt.NNHandler(nn.Linear, device="cpu", in_features=2, out_features=2)
        made.set_optimizer(torch.optim.SGD, lr=0.1)
        made.set_loss_fn(nn.MSELoss())
        data = torch.utils.data.TensorDataset(torch.ones(4, 2), torch.ones(4, 2))
        made.set_train_loader(torch.utils.data.DataLoader(data, batch_size=2))
        made.auto_save(save_path=url, interval=1, save_last=True, resume="auto")
        return made

    handler().train(2)
    again = handler()
    again.train(3)
    assert again.epoch == 3
    assert "last" in {key.split("/")[0] for key in keys(url)}


def test_a_manager_keeps_prunes_and_restores(url):
    keep = [shardckpt.KeepLast(2)]
    with shardckpt.CheckpointManager(url, keep=keep, asynchronous=True) as manager:
        for step in range(5):
            manager.save(step, STATE)
    assert manager.all_steps() == [3, 4]
    restored = shardckpt.CheckpointManager(url).restore_latest(dict(STATE))
    assert restored is not None
    assert restored.checkpoint.path == f"{url}/step-4"
    assert {key.split("/")[0] for key in keys(url)} == {"step-3", "step-4"}


def test_what_has_not_changed_is_copied_inside_the_store(url):
    shardckpt.save(STATE, f"{url}/a")
    report = shardckpt.save(STATE, f"{url}/b", base=f"{url}/a")
    assert report.written_bytes == report.manifest_bytes
    resolve(url).storage.remove(f"{url}/a")
    assert loads(f"{url}/b")
    assert shardckpt.save(STATE, f"{url}/c", base=f"{url}/a").base_problems


def test_a_replaced_checkpoint_leaves_nothing(url):
    shardckpt.save(STATE, url)
    before = keys(url)
    with shardckpt.open_checkpoint(url) as old:
        shardckpt.save(STATE, url, overwrite=True)
        with pytest.raises(CheckpointNotFoundError, match="replaced"):
            old["w"][...]
    assert len(keys(url)) == len(before) == 2
    assert set(before) & set(keys(url)) == {"manifest.json"}


def test_of_two_replacing_saves_one_wins(url):
    shardckpt.save(STATE, url)
    storage = resolve(url).storage
    first = storage.begin(url, checkpoint_id="a" * 32, overwrite=True)
    shardckpt.save(STATE, url, overwrite=True)
    with pytest.raises(CheckpointBusyError):
        first.commit(b"late")
    first.abandon()
    assert loads(url)
    assert len(keys(url)) == 2


def test_a_commit_that_is_repeated_on_its_way_succeeds(url):
    """The second request is refused, and its answer alone arrives."""
    storage = resolve(url).storage
    transaction = storage.begin(url, checkpoint_id="a" * 32, overwrite=False)
    objects, prefix = storage.at(url)
    manifest = b'{"format":"shardckpt","version":1,"id":"' + b"a" * 32 + b'"}'
    objects.put(f"{prefix}manifest.json", manifest)
    transaction.commit(manifest)
    transaction.abandon()
    assert keys(url) == ["manifest.json"]
    storage.remove(url)


def test_a_removal_deletes_all_objects(url):
    storage = resolve(url).storage
    shardckpt.save(STATE, url)
    storage.remove(url)
    assert keys(url) == []
    assert not storage.exists(url)
    storage.remove(url)
    shardckpt.save(STATE, url)
    assert storage.exists(url)


def test_a_removal_that_died_is_no_checkpoint(url):
    """The tombstone is what removes: objects below it may remain for a while."""
    storage = resolve(url).storage
    shardckpt.save(STATE, url)
    objects, prefix = storage.at(url)
    key = f"{prefix}manifest.json"
    objects.put_if(key, TOMBSTONE, replaces=objects.head(key).version)
    assert not storage.exists(url)
    with pytest.raises((CheckpointNotFoundError, NotACheckpointError)):
        shardckpt.load_state(url)
    shardckpt.save(STATE, url)
    assert loads(url)
    with shardckpt.options(leftover_age_s=1):
        time.sleep(1.1)
        storage.sweep(url.rpartition("/")[0])
    assert len(keys(url)) == 2
    assert loads(url)


def test_leftovers_are_deleted_by_age_and_id(url):
    storage = resolve(url).storage
    shardckpt.save(STATE, f"{url}/a")
    for path in ("a", "b"):
        dead = storage.begin(f"{url}/{path}", checkpoint_id="d" * 32, overwrite=True)
        file = dead.create("shard-00000-of-00001.safetensors", size_bytes=3)
        file.write(memoryview(b"abc"), offset=0)
        file.close(size_bytes=3)
    storage.sweep(url)
    assert len(keys(url)) == 6
    with shardckpt.options(leftover_age_s=1):
        time.sleep(1.1)
        storage.sweep(url)
    assert len(keys(url)) == 2
    assert loads(f"{url}/a")


def test_a_lost_manifest_is_rebuilt(url):
    shardckpt.save(STATE, url)
    objects, prefix = resolve(url).storage.at(url)
    objects.delete([f"{prefix}manifest.json"])
    with pytest.raises(NotACheckpointError):
        shardckpt.load_state(url)
    report = shardckpt.rescue(url, f"{url}-rescued")
    assert report.rebuilt
    assert torch.equal(shardckpt.load_state(f"{url}-rescued")["w"], STATE["w"])


def test_a_missing_shard_is_corruption(url):
    shardckpt.save(STATE, url)
    objects, prefix = resolve(url).storage.at(url)
    objects.delete([f"{prefix}{key}" for key in keys(url) if "shard" in key])
    with pytest.raises(CorruptionError, match="missing"):
        shardckpt.load_state(url)
