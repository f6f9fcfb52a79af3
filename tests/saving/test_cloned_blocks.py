"""Saves with a base of which blocks have changed: the others are cloned, and each checkpoint stays
complete without the other."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shardckpt
from shardckpt.errors import CorruptionError, NoSpaceError
from shardckpt.saving import incremental
from shardckpt.saving.incremental import ClonedBlocks
from shardckpt.storage.local import LocalStorage
from tests.storage.clones import Clones, allocated_bytes, device_bytes, mounted

MIB = 1 << 20
FILE = "shard-00000-of-00001.safetensors"


def rows(count: int, *, seed: int = 0) -> torch.Tensor:
    """A tensor of `count` rows of a MiB."""
    return torch.randn((count, MIB // 4), generator=torch.Generator().manual_seed(seed))


def assert_intact(path, tensors) -> None:
    with shardckpt.open_checkpoint(path) as checkpoint:
        checkpoint.verify()
    found = shardckpt.load_state(path)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("background", [False, True])
def test_a_large_tensor_of_which_rows_change(tmp_path, background):
    weight, system = rows(40), Clones()
    storage = LocalStorage(system)
    first = shardckpt.save({"w": weight}, tmp_path / "0", storage=storage)
    assert system.clones == 0
    system.written_bytes = 0
    weight[[3, 17, 18]] += 1
    if background:
        handle = shardckpt.async_save(
            {"w": weight}, tmp_path / "1", base=tmp_path / "0", storage=storage
        )
        report = handle.result(60)
    else:
        report = shardckpt.save({"w": weight}, tmp_path / "1", base=tmp_path / "0", storage=storage)
    # A row lies in two blocks, as the header moves all rows. Rows 17 and 18 share a block.
    changed = 5 * MIB
    assert report.total_bytes == pytest.approx(first.total_bytes, abs=100)
    assert report.written_bytes == changed + report.manifest_bytes
    assert system.written_bytes == changed + report.manifest_bytes
    assert report.base_problems == ()
    shutil.rmtree(tmp_path / "0")
    assert_intact(tmp_path / "1", {"w": weight})


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 3 * MIB), min_size=1, max_size=3),
    changed=st.lists(st.integers(0, 9 * MIB), max_size=5),
    grown=st.sampled_from([0, 0, 0, 4, 4096]),
    staged=st.booleans(),
)
def test_any_bytes_change(tmp_path_factory, sizes, changed, grown, staged):
    """Every block with a changed byte is written, and no other one."""
    folder = tmp_path_factory.mktemp("c")
    storage = LocalStorage(Clones())
    state = {f"{n}": torch.randint(0, 256, (size,)).byte() for n, size in enumerate(sizes)}
    shardckpt.save(state, folder / "0", storage=storage)
    state["0"] = torch.cat([state["0"], torch.zeros(grown, dtype=torch.uint8)])
    for at in changed:
        for tensor in state.values():
            if at < len(tensor):
                tensor[at] ^= 1
                break
            at -= len(tensor)
    if staged:
        handle = shardckpt.async_save(state, folder / "1", base=folder / "0", storage=storage)
        report = handle.result(60)
    else:
        report = shardckpt.save(state, folder / "1", base=folder / "0", storage=storage)
    old, new = ((folder / number / FILE).read_bytes() for number in "01")
    same = sum(
        len(new[at : at + MIB])
        for at in range(0, len(new), MIB)
        if new[at : at + MIB] == old[at : at + MIB]
    )
    if len(new) > MIB and len(old) >= MIB:
        assert sum(report.linked_by_rank) == same
    assert report.base_problems == ()
    assert_intact(folder / "1", state)
    shutil.rmtree(folder)


@pytest.mark.parametrize("fails_at", [0, 1, 2])
@pytest.mark.parametrize("code", ["EOPNOTSUPP", "EXDEV", "EINVAL", "ENOTTY", "EIO", "ENOSPC"])
def test_what_can_not_be_cloned_is_written(tmp_path, code, fails_at):
    """The first clone shows whether the file system has clones; the others fail later."""
    weight = rows(40)
    shardckpt.save({"w": weight}, tmp_path / "0")
    weight[11] += 1
    system = Clones(fails_at=fails_at, code=getattr(errno, code))
    report = shardckpt.save(
        {"w": weight}, tmp_path / "1", base=tmp_path / "0", storage=LocalStorage(system)
    )
    cloned = sum(report.linked_by_rank)
    assert (cloned > 0) == (fails_at > 1)
    assert cloned + system.written_bytes == report.total_bytes
    if not fails_at:
        assert system.clones == 1, "it was tried again"
    assert report.base_problems == ()
    assert_intact(tmp_path / "1", {"w": weight})


def flip(path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 64]))


def test_a_corrupted_block_of_the_base(tmp_path, monkeypatch):
    """It is written if it is among those that are read back, one in 16 or all of them."""
    weight, storage = rows(40), LocalStorage(Clones())
    base = tmp_path / "0"
    shardckpt.save({"w": weight}, base)
    flip(base / FILE, 20 * MIB + 5)
    weight[3] += 1
    repaired = []
    for phase in range(16):
        monkeypatch.setattr(incremental.secrets, "randbelow", lambda step, phase=phase: phase)
        report = shardckpt.save({"w": weight}, tmp_path / "1", base=base, storage=storage)
        if report.base_problems:
            repaired.append(phase)
            (problem,) = report.base_problems
            assert "other bytes in block 20" in problem
            assert str(base / FILE) in problem
            assert_intact(tmp_path / "1", {"w": weight})
        else:  # the new checkpoint has the corrupted block too, and a load sees it
            with pytest.raises(CorruptionError, match=r"block 20"):
                shardckpt.load_state(tmp_path / "1")
        shutil.rmtree(tmp_path / "1")
    assert repaired == [20 % 16]
    monkeypatch.setattr(incremental.secrets, "randbelow", lambda step: 0)
    report = shardckpt.save(
        {"w": weight}, tmp_path / "1", base=base, storage=storage, verify_base=True
    )
    assert report.base_problems
    assert_intact(tmp_path / "1", {"w": weight})


def test_a_corrupted_block_of_a_file_without_changes_is_not_cloned(tmp_path, monkeypatch):
    weight, storage, base = rows(20), LocalStorage(Clones()), tmp_path / "0"
    shardckpt.save({"w": weight}, base)
    flip(base / FILE, 18 * MIB + 5)
    samples = iter([18, 3])  # of the check before the link, and of one before clones
    monkeypatch.setattr(incremental.secrets, "randbelow", lambda step: next(samples) % step)
    report = shardckpt.save({"w": weight}, tmp_path / "1", base=base, storage=storage)
    (problem,) = report.base_problems
    assert "other bytes in block 18" in problem
    assert_intact(tmp_path / "1", {"w": weight})


@pytest.mark.parametrize("size", [0, 5, 10 * MIB, 10 * MIB + 17, None])
def test_a_truncated_or_missing_file_of_the_base(tmp_path, size):
    weight = rows(20)
    shardckpt.save({"w": weight}, tmp_path / "0")
    if size is None:
        (tmp_path / "0" / FILE).unlink()
    else:
        os.truncate(tmp_path / "0" / FILE, size)
    weight[0] += 1
    report = shardckpt.save(
        {"w": weight}, tmp_path / "1", base=tmp_path / "0", storage=LocalStorage(Clones())
    )
    (problem,) = report.base_problems
    assert str(tmp_path / "0" / FILE) in problem
    assert_intact(tmp_path / "1", {"w": weight})


def test_a_planted_clone_of_the_wrong_bytes_is_seen(tmp_path):
    weight = rows(20)
    shardckpt.save({"w": weight}, tmp_path / "0")
    weight[3] += 1
    storage = LocalStorage(Clones(shift=MIB))
    shardckpt.save({"w": weight}, tmp_path / "1", base=tmp_path / "0", storage=storage)
    with pytest.raises(CorruptionError):
        assert_intact(tmp_path / "1", {"w": weight})


@pytest.mark.long
def test_a_planted_comparison_that_ignores_digests_is_seen(tmp_path, monkeypatch):
    write = ClonedBlocks.write

    def careless(self, view, offset, digests):
        write(self, view, offset, self._digests[offset // MIB :][: len(digests)])

    monkeypatch.setattr(ClonedBlocks, "write", careless)
    weight = rows(20)
    shardckpt.save({"w": weight}, tmp_path / "0")
    weight[3] += 1
    storage = LocalStorage(Clones())
    shardckpt.save({"w": weight}, tmp_path / "1", base=tmp_path / "0", storage=storage)
    with pytest.raises(CorruptionError):
        assert_intact(tmp_path / "1", {"w": weight})


def test_the_disk_is_full_in_between(tmp_path):
    """The error is typed, and both the path and the base are as they were."""

    class Full(Clones):
        def write(self, fd, data, *, offset):
            if offset > 5 * MIB:
                raise OSError(errno.ENOSPC, "full")
            return super().write(fd, data, offset=offset)

    weight = rows(20)
    shardckpt.save({"w": weight}, tmp_path / "0")
    changed = weight.clone()
    changed[3::5] += 1
    with pytest.raises(NoSpaceError):
        shardckpt.save(
            {"w": changed}, tmp_path / "1", base=tmp_path / "0", storage=LocalStorage(Full())
        )
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    assert_intact(tmp_path / "0", {"w": weight})


def test_in_tiers_and_over_the_base_itself(tmp_path):
    """A manager bases each save on the one before; and a path is based on itself."""
    weight, system = rows(20), Clones()
    tiers = shardckpt.TieredStorage(tmp_path / "fast", tmp_path / "slow")
    tiers._roots[0].storage.system = system
    with shardckpt.CheckpointManager(tiers, keep=[shardckpt.KeepLast(1)]) as manager:
        for step in range(3):
            weight[step] += 1
            system.cloned_bytes = 0
            manager.save(step, {"w": weight})
            assert (system.cloned_bytes > 10 * MIB) == (step > 0)
        tiers.wait()
    assert_intact(tmp_path / "fast" / "step-2", {"w": weight})
    assert_intact(tmp_path / "slow" / "step-2", {"w": weight})
    path = tmp_path / "fast" / "step-2"
    weight[7] += 1
    report = shardckpt.save(
        {"w": weight}, path, base=path, overwrite=True, storage=LocalStorage(system)
    )
    assert sum(report.linked_by_rank) > 10 * MIB
    assert_intact(path, {"w": weight})


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_on_a_file_system_that_clones(kind):
    """Of a tensor of which a tenth has changed, 8 times fewer bytes are allocated and written."""
    with mounted(kind) as place:
        if isinstance(place, str):
            pytest.skip(f"no {kind} on a loop device: {place}")
        weight = rows(100)
        shardckpt.save({"w": weight}, place / "warm-up")
        before, device = allocated_bytes(place), device_bytes(place)
        shardckpt.save({"w": weight}, place / "0")
        complete = allocated_bytes(place) - before, device_bytes(place) - device
        for step in range(1, 4):
            weight[20 * step : 20 * step + 10] += 1
            before, device = allocated_bytes(place), device_bytes(place)
            report = shardckpt.save(
                {"w": weight}, place / f"{step}", base=place / f"{step - 1}", verify_base=True
            )
            changed = allocated_bytes(place) - before, device_bytes(place) - device
            assert report.base_problems == ()
            assert report.written_bytes * 8 < report.total_bytes
            assert all(8 * new < old for new, old in zip(changed, complete, strict=True)), (
                changed,
                complete,
            )
            print(kind, step, changed, complete)
        shutil.rmtree(place / "2")
        shutil.rmtree(place / "0")
        assert_intact(place / "3", {"w": weight})
