"""Checkpoints in an object store with the interface of S3."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import obstore
import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptionError,
    DependencyError,
    StateError,
    StorageError,
    StoragePermissionError,
    StoreUnavailableError,
)
from shardckpt.storage import object_clients
from shardckpt.storage.resolve import resolve
from shardckpt.testing import StorageTests
from tests.ranks import run_ranks
from tests.storage.stores import keys

STATE = {"w": torch.arange(5_000_000.0), "frozen": torch.ones(7), "step": 3}  # three parts


class TestObjectStorage(StorageTests):
    @pytest.fixture
    def storage(self, s3):
        return resolve(s3).storage

    @pytest.fixture
    def path(self, s3):
        return f"{s3}/checkpoint"


def loads(path) -> bool:
    state = shardckpt.load_state(path)
    return torch.equal(state["w"], STATE["w"]) and state["step"] == 3


@pytest.fixture
def requests(monkeypatch):
    """Counts the calls of obstore by name."""
    counted: Counter[str] = Counter()

    def counting(name):
        call = getattr(obstore, name)

        def count(*arguments, **options):
            counted[name] += 1
            return call(*arguments, **options)

        return count

    for name in ("get", "get_range", "put", "head", "list", "delete", "copy", "open_writer"):
        monkeypatch.setattr(obstore, name, counting(name))
    return counted


def test_a_checkpoint_comes_back(s3):
    shardckpt.save(STATE, s3)
    assert loads(s3)
    report = shardckpt.async_save(STATE, f"{s3}-2", base=s3).result()
    assert report.written_bytes == report.manifest_bytes, report.base_problems
    shardckpt.save({**STATE, "w": STATE["w"] + 1}, s3, overwrite=True)
    assert len(keys(s3)) == 2
    assert loads(f"{s3}-2")
    shardckpt.verify(f"{s3}-2")


def test_a_slice_takes_one_manifest_and_one_range(s3, requests):
    shardckpt.save({"w": torch.arange(4_000_000.0).reshape(-1, 100), "step": 1}, s3)
    requests.clear()
    with shardckpt.open_checkpoint(s3) as checkpoint:
        rows = checkpoint["w"][1000:1008]
    assert rows.flatten().tolist() == list(range(100_000, 100_800))
    assert requests == {"get": 1, "get_range": 1}


def test_the_requests_of_a_save_and_a_load(s3, requests):
    """docs/how-to/object-stores.md has these numbers."""
    shardckpt.save(STATE, s3)
    assert requests == {"list": 1, "get": 1, "head": 1, "open_writer": 2, "put": 1, "delete": 1}
    requests.clear()
    shardckpt.load_state(s3)
    assert requests == {"get": 1, "get_range": 5}


def test_memory_may_change_after_a_write(s3):
    """obstore's writer reads what it was given later."""
    objects, prefix = resolve(s3).storage.at(s3)
    data = bytearray(8 << 20)
    upload = objects.upload(f"{prefix}x", size_bytes=3 * len(data))
    for digit in b"abc":
        data[:] = bytes([digit]) * len(data)
        upload.write(memoryview(data))
    data[:] = bytes(len(data))
    upload.finish()
    found = bytes(objects.read(f"{prefix}x", offset=0, size_bytes=3 * len(data)))
    assert found == b"".join(bytes([digit]) * len(data) for digit in b"abc")


def test_of_eight_savers_one_wins(s3):
    start = threading.Barrier(8)

    def save(number):
        start.wait()
        try:
            with shardckpt.alone():
                shardckpt.save({"n": number}, s3)
            return number
        except CheckpointExistsError:
            return None

    with ThreadPoolExecutor(8) as pool:
        winners = [n for n in pool.map(save, range(8)) if n is not None]
    assert len(winners) == 1
    assert shardckpt.load_state(s3) == {"n": winners[0]}
    assert len(keys(s3)) == 2, "the losers have deleted what they put"


def _save_on_ranks(url, variables):
    os.environ.update(variables)
    rank = dist.get_rank()
    state = {"own": torch.full((1000,), rank), "both": torch.ones(70_000), "rank": None}
    state["rank"] = shardckpt.PerRank(rank)
    state["own"] = shardckpt.ShardedArray(state["own"], (2000,), (1000 * rank,))
    shardckpt.save(state, url)
    with shardckpt.CheckpointManager(f"{url}-run", keep=[shardckpt.KeepLast(1)]) as manager:
        for step in range(2):
            manager.save(step, state)
    mine = {"both": torch.zeros(70_000)}
    shardckpt.load(mine, url)
    return mine["both"].sum().item()


def test_several_ranks_save_to_an_object_store(s3, object_server):
    assert run_ranks(2, _save_on_ranks, s3, object_server) == [70_000, 70_000]
    state = shardckpt.load_state(s3)
    assert state["own"].tolist() == [0] * 1000 + [1] * 1000
    assert state["rank"] == [0, 1]
    assert {key.split("/")[0] for key in keys(f"{s3}-run")} == {"step-1"}


@pytest.mark.long
def test_several_processes_reshard(s3):
    shardckpt.save(STATE, s3)
    command = ["reshard", s3, f"{s3}-3", "--shards", "3", "--jobs", "2"]
    subprocess.run([sys.executable, "-m", "shardckpt", *command], check=True, timeout=120)
    assert loads(f"{s3}-3")
    assert len(shardckpt.metadata(f"{s3}-3").shards) == 3


def test_leftovers_are_deleted_by_age(s3):
    storage = resolve(s3).storage
    shardckpt.save({"n": 1}, s3)
    dead = storage.begin(s3, checkpoint_id="d" * 32, overwrite=True)
    dead.create("shard-00000-of-00001.safetensors", size_bytes=3).discard()
    assert len(keys(s3)) == 3
    with shardckpt.options(leftover_age_s=1):
        threading.Event().wait(2.1)
        shardckpt.save({"n": 2}, s3, overwrite=True)
    assert len(keys(s3)) == 2
    storage.remove(s3)
    assert keys(s3) == []
    with pytest.raises(CheckpointNotFoundError):
        shardckpt.load_state(s3)


def test_a_changed_shard_is_corruption(s3):
    shardckpt.save({"w": torch.ones(300_000)}, s3)
    objects, prefix = resolve(s3).storage.at(s3)
    (key,) = [prefix + key for key in keys(s3) if "shard" in key]
    data = bytearray(objects.read(key, offset=0, size_bytes=2_000_000))
    data[-1] ^= 1
    for content in (data, data[:-1], data[:1000]):
        obstore.put(objects._store, key, bytes(content))
        with pytest.raises(CorruptionError):
            shardckpt.load_state(s3)
        assert shardckpt.verify(s3, strict=False).corrupted == ("w",)


def test_settings_of_the_program(s3, object_server, monkeypatch):
    shardckpt.save({"n": 1}, s3)
    for name in object_server:
        monkeypatch.delenv(name)
    settings = {
        "endpoint": object_server["AWS_ENDPOINT_URL"],
        "access_key_id": object_server["AWS_ACCESS_KEY_ID"],
        "secret_access_key": object_server["AWS_SECRET_ACCESS_KEY"],
        "region": "us-east-1",
        "allow_http": True,
    }
    with shardckpt.options(storage=settings):
        assert shardckpt.load_state(s3) == {"n": 1}
    unknown = {**settings, "no_such_setting": 1}
    with shardckpt.options(storage=unknown), pytest.raises(StateError):
        shardckpt.load_state(s3)


@pytest.fixture
def no_credentials(s3, monkeypatch, tmp_path):
    """The folder of the files of AWS profiles. The environment and the machine hold nothing."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return tmp_path


def test_an_aws_profile_has_the_credentials_and_the_endpoint(
    s3, object_server, no_credentials, monkeypatch
):
    (no_credentials / "credentials").write_text(
        f"[training]\naws_access_key_id = {object_server['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {object_server['AWS_SECRET_ACCESS_KEY']}\n"
    )
    (no_credentials / "config").write_text(
        "[profile training]\nregion = us-east-1\n"
        f"endpoint_url = {object_server['AWS_ENDPOINT_URL']}\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "training")
    shardckpt.save({"n": 1}, s3)
    assert shardckpt.load_state(s3) == {"n": 1}
    monkeypatch.setenv("AWS_PROFILE", "trainign")
    with pytest.raises(StoragePermissionError, match="trainign"):
        shardckpt.load_state(s3)


def test_no_credentials_are_an_error_that_says_how_to_give_them(no_credentials):
    with pytest.raises(StoragePermissionError, match="set AWS_ACCESS_KEY_ID"):
        shardckpt.load_state("s3://tests/any")


def test_what_the_store_refuses_is_typed(s3, monkeypatch):
    shardckpt.save({"n": 1}, s3)
    for url in ("s3://no-such-bucket-of-ours/x", "s3://no-such-bucket-of-ours/x/y"):
        with pytest.raises(StorageError, match="bucket"):
            shardckpt.load_state(url)
        with pytest.raises(StorageError, match="bucket"):
            shardckpt.save({"n": 1}, url)
    with monkeypatch.context() as changed:
        changed.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(StoragePermissionError):
            shardckpt.load_state(s3)
        with pytest.raises(StoragePermissionError):
            shardckpt.save({"n": 1}, f"{s3}-2")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with shardckpt.options(store_deadline_s=1), pytest.raises(StoreUnavailableError):
        shardckpt.load_state(s3)


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gcs"), ("az", "azure")])
def test_a_missing_extra_is_named(monkeypatch, scheme, extra):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(DependencyError, match="obstore") as caught:
        shardckpt.load_state(f"{scheme}://bucket/x")
    assert f'"shardckpt[{extra}]"' in str(caught.value)


def test_stores_of_google_and_azure_are_made(monkeypatch, tmp_path):
    """No server is asked: the settings reach obstore."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    for url, name in (("gs://bucket", "GCSStore"), ("az://container", "AzureStore")):
        objects, prefix = resolve(f"{url}/run/x").storage.at(f"{url}/run/x")
        assert isinstance(objects, object_clients.ClientObjects)
        assert type(objects._store).__name__ == name
        assert prefix == "run/x/"
