"""The command, as its user runs it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import shardckpt
from shardckpt.cli.main import main
from shardckpt.errors import StorageError
from tests.cli.states import save_some


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """Run it in a process of its own, in which only shardckpt is imported."""
    command = [sys.executable, "-m", "shardckpt", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, **options)


def test_as_a_module(tmp_path):
    save_some(tmp_path / "c")
    shown = run("inspect", tmp_path / "c")
    assert shown.returncode == 0, shown.stderr
    assert "Phase.WARM" in shown.stdout


def test_a_path_that_looks_like_an_argument_is_printed_as_it_is(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "keys=a")]) != 0
    assert f"path: {tmp_path}/keys=a\n" in capsys.readouterr().err


def test_errors_name_the_options_of_the_command(tmp_path, capsys):
    path = str(tmp_path / "c")
    save_some(path)
    assert main(["reshard", path, path, "--shards", "1"]) == 7
    assert "pass --overwrite to replace" in capsys.readouterr().err
    assert main(["convert", path, str(tmp_path / "d"), "--keys", "nothing"]) != 0
    assert "correct --keys, or" in capsys.readouterr().err
    assert main(["convert", path, str(tmp_path / "d.npz")]) != 0
    assert 'pass --format "shardckpt"' in capsys.readouterr().err


def cut(path):
    os.truncate(path / "shard-00000-of-00001.safetensors", 100)


def newer(path):
    manifest = path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"version":1', b'"version":9', 1))


@pytest.mark.parametrize("command", ["inspect", "verify", "reshard"])
@pytest.mark.parametrize(
    ("harm", "code", "word"),
    [
        (lambda path: os.rename(path, f"{path}-gone"), 5, "checkpoint does not exist"),
        (lambda path: (path / "manifest.json").unlink(), 5, "not a shardckpt checkpoint"),
        (newer, 5, "newer"),
        (cut, 6, "A shard"),
    ],
)
def test_each_family_of_errors_has_its_exit_code(tmp_path, capsys, command, harm, code, word):
    save_some(tmp_path / "c")
    harm(tmp_path / "c")
    more = [str(tmp_path / "d"), "--shards", "1"] if command == "reshard" else []
    if command == "inspect" and code == 6:
        code, word = 0, ""  # the manifest is intact
    assert main([command, str(tmp_path / "c"), *more]) == code
    error = capsys.readouterr().err
    assert word in error.replace(str(tmp_path), "")  # whose name has the words of the case
    assert ("remedy" in error) == (code != 0)
    assert not (tmp_path / "d").exists()


def test_the_folder_of_a_run_is_met_with_a_hint(tmp_path, capsys):
    for step in (1, 2):
        shardckpt.save({"step": step}, tmp_path / f"step-{step}")
    assert main(["inspect", str(tmp_path)]) == 5
    assert "checkpoints in it: step-1, step-2" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["reshard", "a", "b"], ["fly"]])
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "Usage: shardckpt" in capsys.readouterr().err


HOSTILE_TEXT = "\x1b]0;title\x07 \x1b[2J\u202e\nfaked: line"


@pytest.mark.parametrize(
    "words",
    [["inspect", "C"], ["convert", "C", "T", "--keys", "no\x1b]0;title\x07"], ["rescue", "C", "T"]],
)
def test_names_in_a_checkpoint_do_not_drive_the_terminal(tmp_path, capsys, words):
    """Control characters, and what no terminal can show, are escaped in all that is printed."""
    shardckpt.save(
        {f"w{HOSTILE_TEXT}": torch.ones(1), "v": HOSTILE_TEXT + "\ud800"}, tmp_path / "c"
    )
    shard = next((tmp_path / "c").glob("shard-*"))
    if words[0] == "rescue":
        os.truncate(shard, 4096)
    places = {"C": str(tmp_path / "c"), "T": str(tmp_path / "t")}
    main([places.get(word, word) for word in words])
    shown = "".join(capsys.readouterr())
    assert "\\x1b]0;title" in shown
    assert all(char.isprintable() or char == "\n" for char in shown)
    shown.encode()


def test_a_reader_that_has_gone(tmp_path):
    shardckpt.save({f"{n}": n for n in range(8_000)}, tmp_path / "c")
    command = f"{sys.executable} -m shardckpt inspect {tmp_path / 'c'} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == str(tmp_path / "c")
    assert done.stderr == ""


@pytest.mark.parametrize("command", [["inspect"], ["stats", "--json"], ["ls"]])
def test_an_output_that_is_full_or_closed(command, tmp_path, monkeypatch, capsys):
    shardckpt.save({"w": torch.ones(3)}, tmp_path / "c")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main([*command, str(tmp_path / "c")]) == StorageError.exit_code
    assert "StorageError: The output can't be written: No space" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdout", None)
    assert main([*command, str(tmp_path / "c")]) == 0


@pytest.mark.parametrize(
    ("words", "completed"),
    [("shardckpt in", "plain,inspect"), ("shardckpt verify --su", "plain,--subset")],
)
def test_the_shell_completes_commands_and_options(words, completed, monkeypatch, capsys):
    monkeypatch.setenv("_SHARDCKPT_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    with pytest.raises(SystemExit) as done:
        main([])
    assert done.value.code == 0
    assert capsys.readouterr().out.strip() == completed
