"""Hidden names beside a checkpoint or file, and the names of the files in a checkpoint."""

from __future__ import annotations

import os

import pytest

from shardckpt.storage import names
from shardckpt.storage.names import Hidden, hidden_file_path, hidden_path, parse

ID = "0123456789abcdef" * 2
ROLES = {f"tmp-{ID}": "tmp", f"parts-{ID}": "parts", "old": "old", "lock": "lock"}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("stem", ["c", ".c", "a\nb", "c.old", f"c.tmp-{ID}", "é" * 50, "\udcff"])
def test_a_hidden_name_is_parsed_into_its_stem_and_role(stem, role):
    assert parse(hidden_path(stem, role)) == Hidden(stem, ROLES[role])


def test_a_hidden_path_lies_beside_its_target():
    assert hidden_path("/a/b/c", f"tmp-{ID}") == f"/a/b/.c.tmp-{ID}"
    assert os.path.dirname(hidden_file_path("/a/b/c.pth", "lock")) == "/a/b"


@pytest.mark.parametrize(
    "name",
    [
        "c",
        ".c",
        f"c.tmp-{ID}",
        f".c.tmp-{ID[1:]}",
        f".c.tmp-{ID.upper()}",
        f".c.other-{ID}",
        ".c.lock",
        f".c.{ID}.lock",  # the hash of another name
        hidden_path("c", "lock").replace(".c.", ".d."),
        hidden_path("c", "old") + "~",
    ],
)
def test_names_of_others_are_not_parsed(name):
    assert parse(name) is None


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "x" * 99 + "é", "\udcff" * 120])
def test_long_names_are_shortened_to_distinct_stems(name):
    hidden = hidden_path(name, f"tmp-{ID}")
    assert len(os.fsencode(hidden)) <= 138
    found = parse(hidden)
    assert found is not None
    assert names.is_shortened(found.stem)
    other = parse(hidden_path(name[:-1] + "y", f"tmp-{ID}"))
    assert other is not None
    assert other.stem != found.stem


def test_a_name_of_100_bytes_is_not_shortened():
    assert parse(hidden_path("x" * 100, "old")) == Hidden("x" * 100, "old")
    assert not names.is_shortened("x" * 100)
    assert names.is_shortened(parse(hidden_path("x" * 101, "old")).stem)


def test_hidden_names_of_files_differ_by_file_and_are_recognized():
    paths = {hidden_file_path(name, role) for name in ("a", "b") for role in ("lock", "old")}
    assert len(paths) == 4
    for path in (*paths, hidden_file_path("a", f"{ID}.part")):
        assert names.is_hidden_file(path)
    for name in ("a", ".shardckpt-x.lock", f".shardckpt-{ID}.part", f"x.shardckpt-{ID}.lock"):
        assert not names.is_hidden_file(name)


def test_only_manifest_and_shards_are_files_of_a_checkpoint():
    ours = ["manifest.json", "shard-00000-of-00001.safetensors"]
    assert all(map(names.is_checkpoint_file, ours))
    for name in ("Manifest.json", "manifest.json~", "config.json", "model.safetensors"):
        assert not names.is_checkpoint_file(name)
