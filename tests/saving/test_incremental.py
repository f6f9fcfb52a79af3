"""Saves with a base link unchanged files, and lose nothing."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed import checkpoint as dcp

import shardckpt
from shardckpt import errors
from shardckpt.format.lazy_manifest import LazyManifest
from shardckpt.format.manifest import check_text, from_bytes
from shardckpt.maintenance.reshard import reshard
from shardckpt.saving import incremental as base_module
from shardckpt.saving.incremental import _block_digests
from shardckpt.state import file_groups as kinds
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.posix import System

FILE = "shard-00000-of-00001-frozen.safetensors"


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(kinds, "FROZEN_FILE_BYTES", 1)


class Lora(nn.Module):
    """A frozen layer, and two small ones that are trained."""

    def __init__(self, size: int = 64, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.frozen = nn.Linear(size, size).requires_grad_(False)
        self.a = nn.Linear(size, 1, bias=False)
        self.b = nn.Linear(1, size, bias=False)

    def forward(self, x):
        return self.frozen(x) + self.b(self.a(x))


def a_job(size: int = 64, seed: int = 0):
    model = Lora(size, seed)
    return model, torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)


def a_step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(1, model.a.in_features)).sum().backward()
    optimizer.step()


def same(path, model) -> None:
    """The checkpoint is whole, and holds the model as it is."""
    with shardckpt.open_checkpoint(path) as checkpoint:
        checkpoint.verify()
    found = shardckpt.load_state(path)["model"]
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def frozen_bytes(report) -> int:
    return sum(report.linked_by_rank)


def test_a_lora_job_writes_what_it_trains(tmp_path):
    model, optimizer = a_job(512)
    state = {"model": model, "optimizer": optimizer}
    a_step(model, optimizer)
    first = shardckpt.save(state, tmp_path / "0")
    assert first.written_bytes == first.total_bytes
    snapshots = [{k: v.clone() for k, v in model.state_dict().items()}]
    for number in range(1, 4):
        a_step(model, optimizer)
        report = shardckpt.save(state, tmp_path / f"{number}", base=tmp_path / f"{number - 1}")
        snapshots.append({k: v.clone() for k, v in model.state_dict().items()})
        assert report.total_bytes == first.total_bytes
        assert report.written_bytes * 5 < first.total_bytes
        assert report.base_problems == ()
    inodes = {os.stat(tmp_path / f"{number}" / FILE).st_ino for number in range(4)}
    assert len(inodes) == 1
    for gone in (0, 2):  # any of them may go
        shutil.rmtree(tmp_path / f"{gone}")
    for number in (1, 3):
        found = shardckpt.load_state(tmp_path / f"{number}")["model"]
        for name, tensor in snapshots[number].items():
            assert torch.equal(found[name], tensor)
        same_frozen, _ = a_job(512, seed=1)
        fresh = torch.optim.AdamW(p for p in same_frozen.parameters() if p.requires_grad)
        shardckpt.load({"model": same_frozen, "optimizer": fresh}, tmp_path / f"{number}")
    assert str(fresh.state_dict()) == str(optimizer.state_dict())


def test_what_thaws_is_written(tmp_path):
    model, _ = a_job()
    shardckpt.save({"model": model}, tmp_path / "0")
    model.frozen.requires_grad_(True)
    report = shardckpt.save({"model": model}, tmp_path / "1", base=tmp_path / "0")
    assert frozen_bytes(report) == 0
    same(tmp_path / "1", model)


def test_nothing_changed_at_all(tmp_path):
    model, optimizer = a_job()
    state = {"model": model, "optimizer": optimizer, "step": 1}
    shardckpt.save(state, tmp_path / "0")
    report = shardckpt.save({**state, "step": 2}, tmp_path / "1", base=tmp_path / "0")
    assert report.written_bytes == report.manifest_bytes
    assert shardckpt.load_state(tmp_path / "1")["step"] == 2


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40_000), min_size=1, max_size=4),
    changed=st.integers(-1, 160_000),
)
def test_linked_exactly_if_no_byte_differs(tmp_path_factory, sizes, changed):
    """A byte anywhere in the frozen weights, or none, changes between two saves."""
    folder = tmp_path_factory.mktemp("c")
    modules = nn.ParameterList(torch.randn(size) for size in sizes).requires_grad_(False)
    trained = nn.Linear(3, 3)
    state = {"frozen": modules, "trained": trained}
    shardckpt.save(state, folder / "0")
    where = changed if 0 <= changed < 4 * sum(sizes) else None
    with torch.no_grad():
        trained.weight.add_(1)
        for parameter in modules:
            if changed >= 0 and where is not None and where < 4 * parameter.numel():
                parameter.view(torch.uint8)[where].bitwise_xor_(1)
                where = None
            elif where is not None:
                where -= 4 * parameter.numel()
    report = shardckpt.save(state, folder / "1", base=folder / "0")
    unchanged = not 0 <= changed < 4 * sum(sizes)
    if sum(sizes):
        assert (frozen_bytes(report) > 0) == unchanged
    found = shardckpt.load_state(folder / "1")
    for number, parameter in enumerate(modules):
        assert torch.equal(
            found["frozen"][f"{number}"].view(torch.uint8), parameter.view(torch.uint8)
        )
    shutil.rmtree(folder)


@pytest.mark.parametrize("length", [0, 5, 4096, (1 << 20) - 4096, 1 << 20, (3 << 20) + 17])
def test_digests_are_those_that_the_writer_makes(tmp_path, length):
    data = torch.arange(length, dtype=torch.int64).to(torch.uint8)
    shardckpt.save({"t": data, "u": data.flip(0)[:9]}, tmp_path / "c")
    with shardckpt.open_checkpoint(tmp_path / "c") as checkpoint:
        (shard,) = checkpoint.manifest.shards
        whole = (tmp_path / "c" / shard.name).read_bytes()
        parts = [torch.frombuffer(bytearray(whole[4096:]), dtype=torch.uint8)] if length else []
        for cut in (parts, [piece for part in parts for piece in part.split(70_000)]):
            assert list(_block_digests(whole[:4096], cut, {})) == shard.digests.tolist()


def damage(kind: str, path: Path) -> None:
    file = path / FILE
    if kind == "gone":
        shutil.rmtree(path)
    elif kind == "no manifest":
        (path / "manifest.json").unlink()
    elif kind == "manifest of other bytes":
        data = (path / "manifest.json").read_bytes()
        (path / "manifest.json").write_bytes(data.replace(b'"size":', b'"size":1', 1))
    elif kind == "file gone":
        file.unlink()
    elif kind == "file cut":
        os.truncate(file, 5000)
    elif kind == "file swapped for a symlink":
        file.rename(path / "elsewhere")
        file.symlink_to(path / "elsewhere")
    elif kind == "file rotten":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)


@pytest.mark.parametrize(
    "kind",
    [
        "gone",
        "no manifest",
        "manifest of other bytes",
        "file gone",
        "file cut",
        "file swapped for a symlink",
        "file rotten",
    ],
)
def test_a_damaged_base_fails_nothing_and_is_reported(tmp_path, kind):
    model, _ = a_job()
    shardckpt.save({"model": model}, tmp_path / "0")
    damage(kind, tmp_path / "0")
    report = shardckpt.save({"model": model}, tmp_path / "1", base=tmp_path / "0")
    assert not (tmp_path / "1" / FILE).is_symlink()
    assert len(report.base_problems) == 1
    assert report.base_problems[0].startswith("rank 0: ")
    assert str(tmp_path / "0") in report.base_problems[0]
    same(tmp_path / "1", model)
    next_one = shardckpt.save({"model": model}, tmp_path / "2", base=tmp_path / "1")
    assert frozen_bytes(next_one) > 0


def test_rot_is_found_by_one_save_in_sixteen_and_by_verify_base_at_once(tmp_path, monkeypatch):
    model = nn.Linear(1024, 5 << 10, bias=False).requires_grad_(False)  # 20 MiB and a header
    shardckpt.save({"model": model}, tmp_path / "0")
    with open(tmp_path / "0" / FILE, "r+b") as file:
        file.seek((18 << 20) + 5)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 64]))
    mended = []
    for phase in range(16):
        monkeypatch.setattr(base_module.secrets, "randbelow", lambda step, phase=phase: phase)
        report = shardckpt.save({"model": model}, tmp_path / "1", base=tmp_path / "0")
        if report.base_problems:
            mended.append(phase)
            assert "block 18" in report.base_problems[0]
            same(tmp_path / "1", model)
        shutil.rmtree(tmp_path / "1")
    assert mended == [18 % 16]
    monkeypatch.setattr(base_module.secrets, "randbelow", lambda step: 0)
    report = shardckpt.save({"model": model}, tmp_path / "1", base=tmp_path / "0", verify_base=True)
    assert report.base_problems
    same(tmp_path / "1", model)


class Links(System):
    """A file system that refuses hard links with `code`, and clones unless it has them."""

    def __init__(self, code: int, *, clones: bool) -> None:
        self.code, self.clones, self.synced = code, clones, []

    def link(self, name, target, *, dir_fd):
        raise OSError(self.code, "no link", target)

    def clone(self, source_fd, target_fd, *, offset=0, size_bytes=0):
        if not self.clones:
            raise OSError(errno.EOPNOTSUPP, "no clone")
        os.copy_file_range(source_fd, target_fd, size_bytes or 1 << 30, offset, offset)

    def fsync(self, fd):
        self.synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        super().fsync(fd)


@pytest.mark.parametrize("clones", [False, True])
@pytest.mark.parametrize("code", ["EXDEV", "EPERM", "EMLINK", "EOPNOTSUPP", "EIO", "ENOENT"])
def test_where_no_link_is_possible(tmp_path, code, clones):
    model, _ = a_job()
    shardckpt.save({"model": model}, tmp_path / "0")
    system = Links(getattr(errno, code), clones=clones)
    storage = LocalStorage(system)
    report = shardckpt.save({"model": model}, tmp_path / "1", base=tmp_path / "0", storage=storage)
    assert (frozen_bytes(report) > 0) == clones
    assert bool(report.base_problems) != clones
    assert os.stat(tmp_path / "1" / FILE).st_nlink == 1
    assert [name for name in system.synced if name.endswith(FILE)]
    same(tmp_path / "1", model)


def test_a_name_that_leads_to_another_file_meanwhile(tmp_path):
    """Between the check and the link the base's file is replaced: the link is not kept."""
    model, _ = a_job()
    shardckpt.save({"model": model}, tmp_path / "0")

    class Raced(System):
        def link(self, name, target, *, dir_fd):
            os.rename(tmp_path / "0" / FILE, tmp_path / "old")
            (tmp_path / "0" / FILE).write_bytes(bytes(os.path.getsize(tmp_path / "old")))
            super().link(name, target, dir_fd=dir_fd)

    shardckpt.save(
        {"model": model}, tmp_path / "1", base=tmp_path / "0", storage=LocalStorage(Raced())
    )
    same(tmp_path / "1", model)


def test_a_checkpoint_based_on_the_one_it_replaces(tmp_path):
    model, optimizer = a_job()
    path = tmp_path / "latest"
    for number in range(3):
        a_step(model, optimizer)
        report = shardckpt.save({"model": model}, path, overwrite=True, base=path)
        assert (frozen_bytes(report) > 0) == (number > 0)
        same(path, model)
    assert os.stat(path / FILE).st_nlink == 1
    assert os.listdir(tmp_path) == ["latest"]


def test_an_open_checkpoint_as_base(tmp_path):
    model, _ = a_job()
    shardckpt.save({"model": model}, tmp_path / "0")
    with shardckpt.open_checkpoint(tmp_path / "0") as checkpoint:
        report = shardckpt.save({"model": model}, tmp_path / "1", base=checkpoint)
        assert frozen_bytes(report) > 0
        assert torch.equal(checkpoint["model.frozen.bias"][...], model.frozen.bias)
    report = shardckpt.save({"model": model}, tmp_path / "2", base=checkpoint)  # closed by now
    assert frozen_bytes(report) == 0
    assert report.base_problems
    same(tmp_path / "2", model)


def test_a_base_that_is_no_path(tmp_path):
    with pytest.raises(errors.StateError):
        shardckpt.save({"a": 1}, tmp_path / "c", base="")


def test_in_the_background(tmp_path):
    model, optimizer = a_job()
    handles = [shardckpt.async_save({"model": model}, tmp_path / "0")]
    for number in range(1, 3):
        a_step(model, optimizer)
        base = tmp_path / f"{number - 1}"
        handles.append(shardckpt.async_save({"model": model}, tmp_path / f"{number}", base=base))
    reports = [handle.result(60) for handle in handles]
    assert [frozen_bytes(report) > 0 for report in reports] == [False, True, True]
    same(tmp_path / "2", model)


def test_a_writer_of_dcp_takes_a_base(tmp_path):
    model, _ = a_job()
    for number in range(2):
        base = tmp_path / "0" if number else None
        dcp.save(
            {"model": model, "n": number},
            storage_writer=shardckpt.ShardWriter(tmp_path / f"{number}", base=base),
            planner=shardckpt.ShardSavePlanner(),
        )
    report = shardckpt.save(
        {"model": model, "n": 2},
        tmp_path / "2",
        base=tmp_path / "1",
        planner=shardckpt.ShardSavePlanner(),
    )
    assert sum(report.bytes_by_rank) == sum(
        os.path.getsize(file) for file in (tmp_path / "2").glob("*.safetensors")
    )
    same(tmp_path / "2", model)
    found = [os.stat(file).st_nlink for file in (tmp_path / "0").glob("*.safetensors")]
    assert max(found) == 3


def test_resharding_keeps_the_files_apart(tmp_path):
    model, _ = a_job()
    shardckpt.save({"model": model}, tmp_path / "0")
    with shardckpt.open_checkpoint(tmp_path / "0") as source:
        reshard(source, str(tmp_path / "1"), shards=2, storage=LocalStorage())
    assert len(list((tmp_path / "1").glob("*-frozen.safetensors"))) == 2
    same(tmp_path / "1", model)


def test_a_manifest_read_for_its_shards_alone(tmp_path):
    shardckpt.save({"a": torch.ones(5), "b": {1: (2, "x")}}, tmp_path / "c")
    data = (tmp_path / "c" / "manifest.json").read_bytes()
    (mine,), (whole,) = LazyManifest(data, path="p").all_shards(), from_bytes(data, path="p").shards
    assert (mine.name, mine.size_bytes) == (whole.name, whole.size_bytes)
    assert mine.digests.tolist() == whole.digests.tolist()
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1
        with pytest.raises(errors.CheckpointError):
            check_text(bytes(damaged), path="p")
        with pytest.raises(errors.CheckpointError):
            check_text(data[:at], path="p")
