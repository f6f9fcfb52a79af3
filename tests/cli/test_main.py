"""The command, as its user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress

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


def test_a_name_with_a_line_end_stays_on_one_line(tmp_path, capsys):
    """A name could otherwise look like the line of another entry, or like a fact of an error."""
    name = "w\n  b  float32  [2]\r\x07\ttail"
    path = str(tmp_path / "c")
    shardckpt.save({name: torch.ones(2), "step": 1}, path)
    shown = "w\\n  b  float32  [2]\\r\\x07\\ttail"
    for words in (["inspect", path], ["stats", path], ["diff", path, path, "--keys", name]):
        main(words)
    assert main(["extract", path, name, "step", str(tmp_path / "t")]) == 0
    assert main(["diff", path, str(tmp_path / "t"), "--rename", f"{name}=v"]) == 1
    text = capsys.readouterr().out
    assert text.count(shown) == 3
    assert "\n  b" not in text
    assert main(["cat", path, "nothing"]) == 4
    assert "\n  b" not in capsys.readouterr().err
    assert main(["cat", path, f"{name}[0]"]) == 0
    assert capsys.readouterr().out == "1.\n"


def test_wrong_arguments_do_not_drive_the_terminal(capsys):
    for words in (
        ["verify", "a", "b\x1b]0;t\x07"],
        ["convert", "a", "b", "--format", "\x1b]0;t\x07"],
    ):
        with pytest.raises(SystemExit):
            main(words)
        shown = capsys.readouterr().err
        assert "\\x1b]0;t" in shown
        assert "\x1b" not in shown


def test_an_error_is_json_too(tmp_path, capsys):
    shardckpt.save({"w": torch.ones(3)}, tmp_path / "c")
    path = str(tmp_path / "c")
    assert main(["inspect", f"{path}x", "--json"]) == 5
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["type"], error["exit_code"]) == ("CheckpointNotFoundError", 5)
    assert error["path"] == f"{path}x"
    assert main(["convert", path, path, "--json"]) == 7
    assert "--overwrite" in json.loads(capsys.readouterr().out)["error"]["remedy"]
    with open(next((tmp_path / "c").glob("shard-*")), "r+b") as shard:
        shard.seek(-1, os.SEEK_END)
        shard.write(b"x")
    assert main(["verify", path, "--json"]) == 6
    assert json.loads(capsys.readouterr().out)["corrupted"] == ["w"]  # the report, and no more
    assert main(["convert", path, f"{path}2", "--json", "--jobs", "1"]) == 6
    assert json.loads(capsys.readouterr().out)["error"]["rank"] == "0"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["inspect", "--help"]])
def test_help_that_can_not_be_written(words, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(words) == StorageError.exit_code
    assert "The output can't be written: No space" in capsys.readouterr().err
    reader, writer = os.pipe()
    os.close(reader)
    with suppress(BrokenPipeError), open(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        ended = main(words)
    assert ended == 0


def test_an_error_stream_that_is_full_changes_no_exit_code(tmp_path, monkeypatch):
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert main(["inspect", str(tmp_path / "c")]) == 5
        with pytest.raises(SystemExit) as done:
            main(["inspect"])
        assert done.value.code == 2
        with suppress(OSError):  # the text is still in the buffer
            full.close()


@pytest.mark.parametrize(
    "words",
    ["verify ", "extract ", "report --html ", "cat --npy ", "convert --like ", "ls x", "cp a "],
)
def test_the_shell_completes_file_names_in_place_of_paths(words, monkeypatch, capsys):
    words = f"shardckpt {words}"
    monkeypatch.setenv("_SHARDCKPT_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().out.startswith("file,")
