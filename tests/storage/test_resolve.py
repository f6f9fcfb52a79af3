"""Paths, URLs and storages that a user passes lead to a storage and a full path."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import shardckpt
from shardckpt.errors import CheckpointNotFoundError, StateError
from shardckpt.storage import resolve as module
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryStorage
from shardckpt.storage.resolve import resolve, scheme_of
from shardckpt.storage.tiers import TieredStorage

STATE = {"w": torch.arange(300_000.0), "frozen": torch.ones(7), "step": 3}


def loads(path) -> bool:
    state = shardckpt.load_state(path)
    return torch.equal(state["w"], STATE["w"]) and state["step"] == 3


def test_urls_of_memory_are_checked_and_normalized(tmp_path):
    for url in ("memory://", "memory://b//x", "memory://b/../x"):
        with pytest.raises(StateError, match="Invalid URL"):
            shardckpt.save(STATE, url)
    shardckpt.save(STATE, "MEMORY://tests/upper/")
    assert loads("memory://tests/upper")
    with pytest.raises(CheckpointNotFoundError):
        shardckpt.load_state("memory://tests/nothing")
    with pytest.raises(StateError, match="can't be used"):
        shardckpt.save(STATE, "memory://tests/x", storage=shardckpt.LocalStorage())


def test_a_scheme_of_the_user():
    storage = MemoryStorage()

    class Mine(MemoryStorage):
        def full_path(self, path):
            return super().full_path(path.replace("mine://", "memory://mine/"))

    storage = Mine()
    shardckpt.register_storage("Mine", lambda url: storage)
    shardckpt.save(STATE, "mine://a")
    assert loads("mine://a")
    assert torch.equal(shardckpt.load_state("memory://mine/a", storage=storage)["w"], STATE["w"])
    for scheme in ("file", "", "a b", "x"):
        with pytest.raises(StateError, match="Invalid scheme"):
            shardckpt.register_storage(scheme, lambda url: storage)


@pytest.mark.parametrize(
    ("path", "scheme"),
    [
        ("s3://bucket/a", "s3"),
        ("S3:/bucket/a", "s3"),  # as pathlib shortens it
        ("memory://a", "memory"),
        ("tiers:///a,/b", "tiers"),
        ("file:///a", None),
        ("unknown://a", None),
        ("s3:bucket", None),
        ("c:/a", None),
        ("/a/s3://b", None),
        ("", None),
    ],
)
def test_the_scheme_of_a_url_is_known_or_none(path, scheme):
    assert scheme_of(path) == scheme


def test_a_path_without_a_scheme_is_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("run/1", Path("run/1")):
        storage, full = resolve(path)
        assert type(storage) is LocalStorage
        assert os.path.abspath(full) == str(tmp_path / "run" / "1")
    assert resolve("run/1", fixed=True).path == str(tmp_path / "run" / "1")
    own = LocalStorage()
    assert resolve("run/1", own).storage is own


def test_a_url_that_pathlib_has_shortened_gets_its_slash_back():
    assert resolve(Path("memory://run/1")) == resolve("memory://run/1")
    assert resolve(Path("memory://run/1")).path == "memory://run/1"


def test_a_storage_with_a_root_may_be_the_path(tmp_path):
    tiers = TieredStorage(tmp_path / "a", tmp_path / "b")
    assert resolve(tiers) == resolve(tiers, tiers) == (tiers, tiers.full_path(""))
    with pytest.raises(StateError, match="given twice") as raised:
        resolve(tiers, LocalStorage())
    assert raised.value.actual == "TieredStorage and storage=LocalStorage"
    assert raised.value.remedy == "leave out storage="


@pytest.mark.parametrize("storage", ["s3", LocalStorage, object()])
def test_other_objects_are_not_storages(storage):
    with pytest.raises(StateError, match="Invalid storage"):
        resolve("a", storage)


def test_a_storage_that_is_given_gets_the_path_as_it_is():
    class Own(MemoryStorage):
        def full_path(self, path):
            return f"own:{path}"

    storage = Own()
    assert resolve("run//1", storage) == (storage, "own:run//1")
    assert resolve(Path("run/1"), storage).path == "own:run/1"


def test_a_registered_storage_comes_before_a_built_in_one(monkeypatch):
    monkeypatch.setattr(module, "_registered", {})
    storage, urls = MemoryStorage(), []
    shardckpt.register_storage("memory", lambda url: urls.append(url) or storage)
    assert resolve("MEMORY://a/b").storage is storage
    assert urls == ["memory://a/b"]
