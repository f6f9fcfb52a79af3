"""Paths of users: local ones are accepted, all others are refused before any file is created.

Every public callable that takes a path stands in CALLS.
"""

from __future__ import annotations

import inspect
import os
import pathlib
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import shardckpt
from shardckpt import CheckpointManager, NNHandler, ShardReader, ShardWriter
from shardckpt.api import rescue
from shardckpt.checkpoint import Checkpoint
from shardckpt.cli.main import main
from shardckpt.convert.convert import convert
from shardckpt.errors import StateError
from shardckpt.maintenance.reshard import reshard
from shardckpt.nn_handler import CSVLogger, ModelCheckpoint, TensorBoardLogger, callbacks
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.paths import local_path

STATE = {"w": torch.ones(3)}


def handler() -> NNHandler:
    return NNHandler(nn.Linear, device="cpu", in_features=2, out_features=2)


def resharded(path):
    with shardckpt.open_checkpoint(given()) as source:
        reshard(source, path, shards=1, storage=LocalStorage())


def command(*words):
    """A command that must not succeed; its error is printed, so it is raised anew from the code."""
    code = main(list(words))
    if code == StateError.exit_code:
        raise StateError("by exit code", remedy="see above")
    assert code == 0


def given():
    if not os.path.exists("given"):
        shardckpt.save(STATE, "given")
    return "given"


def single_file():
    handler().save("given.pth", overwrite=True)
    return "given.pth"


CALLS = {
    "save": lambda path: shardckpt.save(STATE, path),
    "save base": lambda path: shardckpt.save(STATE, "new", base=path),
    "save planner": lambda path: shardckpt.save(STATE, path, planner=shardckpt.ShardSavePlanner()),
    "async_save": lambda path: shardckpt.async_save(STATE, path).result(),
    "async_save base": lambda path: shardckpt.async_save(STATE, "new", base=path).result(),
    "load": lambda path: shardckpt.load(STATE, path),
    "load_state": shardckpt.load_state,
    "open_checkpoint": shardckpt.open_checkpoint,
    "metadata": shardckpt.metadata,
    "verify": shardckpt.verify,
    "Checkpoint": lambda path: Checkpoint(path, storage=LocalStorage()),
    "ShardWriter": ShardWriter,
    "ShardWriter base": lambda path: ShardWriter("new", base=path),
    "ShardReader": ShardReader,
    "dcp.save": lambda path: dcp.save(STATE, checkpoint_id=path, storage_writer=ShardWriter()),
    "dcp.load": lambda path: dcp.load(STATE, checkpoint_id=path, storage_reader=ShardReader()),
    "CheckpointManager": CheckpointManager,
    "stats": shardckpt.stats,
    "diff first": lambda path: shardckpt.diff(path, given()),
    "diff second": lambda path: shardckpt.diff(given(), path),
    "merge source": lambda path: shardckpt.merge([given(), path], "new"),
    "merge": lambda path: shardckpt.merge([given(), given()], path),
    "reshard": resharded,
    "rescue source": lambda path: rescue(path, "new", storage=LocalStorage()),
    "rescue target": lambda path: rescue(given(), path, storage=LocalStorage()),
    "convert source": lambda path: convert(path, "new"),
    "convert target": lambda path: convert(given(), path),
    "convert to dcp": lambda path: convert(given(), path, to="dcp"),
    "NNHandler.save": lambda path: handler().save(path),
    "NNHandler.save_single_file": lambda path: handler().save_single_file(path),
    "NNHandler.save_multi_files": lambda path: handler().save_multi_files(path),
    "NNHandler.save_multi_from_single": lambda path: NNHandler.save_multi_from_single(path, "new"),
    "multi_from_single target": lambda path: NNHandler.save_multi_from_single(single_file(), path),
    "NNHandler.save_single_from_multi": lambda path: NNHandler.save_single_from_multi(
        path, "new.pth"
    ),
    "single_from_multi target": lambda path: NNHandler.save_single_from_multi("given", path),
    "NNHandler.load": NNHandler.load,
    "NNHandler.initialize_from_checkpoint": lambda path: NNHandler.initialize_from_checkpoint(
        path, nn.Linear, in_features=2, out_features=2
    ),
    "NNHandler.restore": lambda path: handler().restore(path),
    "NNHandler.auto_save": lambda path: handler().auto_save(save_path=path),
    "NNHandler.plot_history": lambda path: handler().plot_history(path),
    "NNHandler.plot_losses": lambda path: handler().plot_losses(path),
    "ModelCheckpoint": ModelCheckpoint,
    "CSVLogger": CSVLogger,
    "TensorBoardLogger": TensorBoardLogger,
}
COMMANDS = {
    "inspect": lambda path: command("inspect", path),
    "verify of": lambda path: command("verify", path),
    "rescue from": lambda path: command("rescue", path, "new"),
    "rescue to": lambda path: command("rescue", given(), path),
    "reshard from": lambda path: command("reshard", path, "new", "--shards", "1"),
    "reshard to": lambda path: command("reshard", given(), path, "--shards", "1"),
    "convert from": lambda path: command("convert", path, "new"),
    "convert to": lambda path: command("convert", given(), path),
}
URLS = ["http://bucket/x", "ftp://b/x.pth", "x-y://x.safetensors", "file://host/x", "S3A://b/x"]
NOT_PATHS = [pathlib.Path("http://bucket/x"), b"/tmp/x", "", "a\0b", "~no-such-user/x", "\ud800", 7]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.parametrize("name", [*CALLS, *COMMANDS])
def test_what_is_not_a_local_path_is_refused_everywhere(name, tmp_path):
    call = {**CALLS, **COMMANDS}[name]
    for path in [*URLS, *(NOT_PATHS if name in CALLS else ["", "~no-such-user/x"])]:
        if path == "" and name.startswith("dcp."):
            continue  # DCP's word for no path
        begun = time.monotonic()
        with pytest.raises(StateError) as caught:
            call(path)
        assert time.monotonic() - begun < 2
        assert caught.value.remedy, caught.value
        assert set(os.listdir(tmp_path / "here")) <= {"given", "given.pth"}, path
    assert not os.listdir(tmp_path / "home")


def test_every_callable_that_takes_a_path_is_tried():
    taking = {
        f"{owner}{name}"
        for owner, members in (
            ("", {name: getattr(shardckpt, name) for name in shardckpt.__all__}),
            ("NNHandler.", dict(inspect.getmembers(NNHandler))),
            ("", {name: getattr(callbacks, name) for name in callbacks.__all__}),
        )
        for name, member in members.items()
        if callable(member) and (not name.startswith("_"))
        if {"path", "folder", "save_path", "source", "target"} & set(_parameters(member))
    }
    endings = ("Report", "Error", "Handle", "Tensor", "Metadata", "SavedCheckpoint", "Restored")
    results = {name for name in shardckpt.__all__ if name.endswith(endings)}
    # the paths of these are tried one by one
    assert taking - results <= {*CALLS, "convert", "rescue", "reshard"}
    assert len(taking) > 15


def _parameters(member) -> list[str]:
    try:
        return list(inspect.signature(member).parameters)
    except (ValueError, TypeError):
        return []


def test_a_home_directory_and_a_file_url_are_understood(tmp_path):
    home = tmp_path / "home"
    shardckpt.save(STATE, "~/a")
    shardckpt.async_save(STATE, f"file://{home}/b%20c").result()
    shardckpt.save(STATE, f"file://localhost{home}/d", base="~/a")
    assert shardckpt.load_state("~/b c")["w"].tolist() == [1.0] * 3
    CheckpointManager("~/managed").save(1, STATE)
    handler().save("~/h")
    handler().save(pathlib.Path("~/h.pth"))
    NNHandler.load("~/h.pth")
    convert("~/a", "~/a.safetensors")
    dcp.save(STATE, storage_writer=ShardWriter("~/w"))
    assert main(["verify", "~/w"]) == 0
    expected = ["a", "a.safetensors", "b c", "d", "h", "h.pth", "managed", "w"]
    assert sorted(os.listdir(home)) == expected
    assert not os.listdir(".")


def test_local_paths_that_look_odd(tmp_path):
    for path in ("./s3:/x", "./~", "a:b/c", "a b", "x/", "C:/x", "-x", "a//b", "http:x"):
        assert local_path(path) == path
        shardckpt.save(STATE, path)
        assert shardckpt.load_state(tmp_path / "here" / path)["w"].tolist() == [1.0] * 3
    assert local_path(local_path("file:///a%7E/~/b")) == "/a~/~/b"
    assert local_path("file:/a") == "/a"


def test_an_unknown_home_is_refused(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(StateError, match="home directory"):
        shardckpt.save(STATE, "~/x")


def test_a_relative_path_is_that_of_the_call(tmp_path, monkeypatch):
    """The program may change its working directory while a save goes on, or between two."""
    manager = CheckpointManager("runs", asynchronous=True)
    writer = ShardWriter("dcp")
    saved = shardckpt.async_save(STATE, "a")
    os.chdir(tmp_path)
    saved.result()
    manager.save(1, STATE)
    os.chdir(tmp_path / "home")
    manager.close()
    dcp.save(STATE, storage_writer=writer)
    assert sorted(os.listdir(tmp_path / "here")) == ["a", "dcp", "runs"]
    assert os.listdir(tmp_path / "here" / "runs") == ["step-1"]
    assert not os.listdir(tmp_path / "home")


def test_a_storage_of_the_user_takes_its_own_paths():
    class Elsewhere(shardckpt.Storage):
        def open(self, path):
            raise LookupError(path)

    with pytest.raises(LookupError, match="s3://bucket/x"):
        shardckpt.load_state("s3://bucket/x", storage=Elsewhere())
    with pytest.raises(StateError):
        shardckpt.load_state("", storage=Elsewhere())
