"""A target appears complete or not at all, and replaces only a conversion."""

from __future__ import annotations

import os

import pytest

import shardckpt
from shardckpt import errors
from shardckpt.convert import targets
from shardckpt.convert.convert import convert
from shardckpt.convert.opening import open_source
from shardckpt.convert.sources import Selected
from shardckpt.convert.targets import Folder, Target

pytestmark = pytest.mark.filterwarnings("ignore")  # DCP's, of one process


def test_only_a_conversion_is_replaced(tmp_path, saved):
    target = str(tmp_path / "hf")
    convert(saved, target, to="hf", keys="model")
    with pytest.raises(errors.CheckpointExistsError):
        convert(saved, target, to="hf", keys="model")
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(errors.NotACheckpointError, match=r"config\.json"):
        convert(saved, target, to="hf", keys="model", overwrite=True)
    (tmp_path / "hf" / "config.json").unlink()
    convert(saved, target, to="hf", keys="model.scalar", overwrite=True)
    assert set(open_source(target).manifest.tensors) == {"model.scalar"}
    with pytest.raises(errors.NotACheckpointError):
        convert(saved, target, to="dcp", overwrite=True)
    assert os.listdir(tmp_path) == ["hf"]


def test_a_rank_fails_and_nothing_is_left(tmp_path, saved, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    for to in ("hf", "dcp", "shardckpt"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="space"):
            patch.setattr(Selected, "read_box", fail)
            convert(saved, str(tmp_path / "t"), to=to, keys="model")
        assert os.listdir(tmp_path) == []


class Text(Target):
    """A target with the results of the ranks."""

    def write(self, ranks, progress):
        return b""

    def finish(self, write, payloads):
        write.add_bytes(b"".join(payloads), "")


class Texts(Folder):
    index = ("index.txt",)
    names = r"index\.txt|part-\d+"

    def write(self, ranks, progress):
        return b""

    def finish(self, write, payloads):
        for number, payload in enumerate(payloads):
            write.add_bytes(payload, f"part-{number}")
        write.add_bytes(b"", "index.txt")
        self.copy(write)


def make(target: Target, *payloads: bytes) -> None:
    target.begin([])
    target.commit(list(payloads))
    target.close()


def test_a_folder_appears_when_it_is_complete(tmp_path):
    target = Texts(str(tmp_path / "c"), overwrite=False)
    temporary = os.fsdecode(target.begin([]))
    assert temporary == target.temporary
    assert os.path.dirname(temporary) == str(tmp_path)
    assert not (tmp_path / "c").exists()
    target.commit([b"a", b"b"])
    assert sorted(os.listdir(tmp_path / "c")) == ["index.txt", "part-0", "part-1"]
    assert not os.path.exists(temporary)


def test_an_abandoned_target_leaves_nothing(tmp_path):
    for cls in (Text, Texts):
        target = cls(str(tmp_path / "c"), overwrite=False)
        with pytest.raises(ZeroDivisionError):
            try:
                target.begin([])
                raise ZeroDivisionError
            except ZeroDivisionError:
                target.abandon()
                raise
        target.close()
        assert os.listdir(tmp_path) == []


def test_a_rank_that_does_not_see_the_target_is_an_error(tmp_path):
    target = Text(str(tmp_path / "c"), overwrite=False)
    with (
        shardckpt.options(shared_deadline_s=0.1),
        pytest.raises(errors.DirectoryNotSharedError, match="does not see") as raised,
    ):
        target.join(str(tmp_path / "nothing"))
    assert (raised.value.path, raised.value.expected) == (target.path, f"{tmp_path}/nothing")
    assert target.join(str(tmp_path)) == b""
    assert target.temporary == str(tmp_path)


def test_files_of_others_in_a_folder_keep_it_from_being_replaced(tmp_path):
    make(Texts(str(tmp_path / "c"), overwrite=False), b"a", b"b")
    make(Texts(str(tmp_path / "c"), overwrite=True), b"c")
    assert (tmp_path / "c" / "part-0").read_bytes() == b"c"
    (tmp_path / "c" / "part-x").touch()
    with pytest.raises(errors.NotACheckpointError, match="part-x"):
        make(Texts(str(tmp_path / "c"), overwrite=True), b"d")
    assert (tmp_path / "c" / "part-0").read_bytes() == b"c"


def test_a_copied_file_is_replaced_only_by_an_equal_one(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    options = {"copied": {"config.json": str(tmp_path / "config.json")}}
    make(Texts(str(tmp_path / "c"), overwrite=False, **options), b"a")
    assert (tmp_path / "c" / "config.json").read_text() == "{}"
    make(Texts(str(tmp_path / "c"), overwrite=True, **options), b"b")
    (tmp_path / "c" / "config.json").write_text("mine")
    with pytest.raises(errors.NotACheckpointError, match=r"config\.json"):
        make(Texts(str(tmp_path / "c"), overwrite=True, **options), b"c")
    monkeypatch.setattr(targets, "_COPY_LIMIT_BYTES", 1)
    with pytest.raises(errors.CorruptionError, match="too large"):
        make(Texts(str(tmp_path / "d"), overwrite=False, **options), b"c")
