"""The command, as its user runs it."""

from __future__ import annotations

import enum
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import shardckpt
from shardckpt import PerRank
from shardckpt.cli.main import main
from shardckpt.cli.parameters import separate
from shardckpt.cli.progress import Progress, size_text


class Phase(enum.Enum):
    WARM = "warm"


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """As a process of its own, in which nothing but shardckpt is imported."""
    command = [sys.executable, "-m", "shardckpt", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, **options)


def save_some(path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    state = {
        "model": {"w": weight, "tied": weight, "half": torch.ones(2, dtype=torch.bfloat16)},
        "table": np.arange(3),
        "step": 7,
        "history": {1: [0.5, float("nan")]},
        "phase": Phase.WARM,
        "rng": PerRank({"seed": 3, "t": torch.ones(1)}),
        "text": "long " * 40,
    }
    shardckpt.save(state, path)


def test_inspect(tmp_path, capsys):
    save_some(tmp_path / "c")
    assert main(["inspect", str(tmp_path / "c")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(tmp_path / "c")
    assert "on 1 rank" in lines[1]
    assert "4 tensors" in lines[2]
    rows = [" ".join(line.split()) for line in lines]
    assert "model.w float32 [3, 4] 48 B shard 0" in rows
    assert "model.tied float32 [3, 4] 48 B tied to model.w" in rows
    assert "model 2 tensors 52 B" in rows  # tied ones count once
    assert "step 7" in rows
    assert "history.1 [0.5, nan]" in rows
    assert not [row for row in rows if row.startswith("history.1.")]
    assert "rng [{'seed': 3, 't': <tensor rng.t@rank0>}]" in rows
    assert max(map(len, lines)) <= 120
    assert any("WARM" in row for row in rows)


def test_inspect_as_json(tmp_path, capsys):
    save_some(tmp_path / "c")
    assert main(["inspect", str(tmp_path / "c"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tensors"]["model.w"] == {
        "dtype": "float32",
        "shape": [3, 4],
        "size_bytes": 48,
        "shards": [0],
        "tied_to": None,
    }
    assert found["tensors"]["model.tied"]["tied_to"] == "model.w"
    assert found["values"]["step"] == 7
    assert found["world_size"] == 1
    assert found["shards"][0]["size_bytes"] > 4096


def test_inspect_of_thousands_of_tensors_is_a_page(tmp_path, capsys):
    layers = {
        f"{layer}.{part}.{kind}": torch.ones(2, 2) if kind == "weight" else torch.ones(2)
        for layer in range(300)
        for part in ("attention", "mlp")
        for kind in ("weight", "bias")
    }
    experts = {f"{layer}.e.{n}.w": torch.ones(1) for layer in (0, 2) for n in range(4)}
    state = {"layers": layers, "experts": experts, "embed": torch.ones(5, 2), "layers2": {}}
    layers["7.mlp.bias"] = torch.ones(3)  # one that is unlike the others
    shardckpt.save(state, tmp_path / "c")
    assert main(["inspect", str(tmp_path / "c")]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [" ".join(line.split()) for line in lines]
    assert len(lines) < 30
    assert "layers.{0-299}.attention.weight float32 [2, 2] 300 x 16 B shard 0" in rows
    assert "layers.{0-6,8-299}.mlp.bias float32 [2] 299 x 8 B shard 0" in rows
    assert "layers.7.mlp.bias float32 [3] 12 B shard 0" in rows
    assert "experts.{0,2}.e.{0-3}.w float32 [1] 8 x 4 B shard 0" in rows
    assert main(["inspect", str(tmp_path / "c"), "--all"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 1200
    assert main(["inspect", str(tmp_path / "c"), "--keys", "layers.7.*", "embed"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("layers.7.") == 4
    assert "layers.8." not in shown
    assert "embed" in shown


def test_inspect_of_nothing(tmp_path, capsys):
    shardckpt.save({}, tmp_path / "c")
    assert main(["inspect", str(tmp_path / "c")]) == 0
    assert "0 tensors" in capsys.readouterr().out


def test_as_a_module(tmp_path):
    save_some(tmp_path / "c")
    shown = run("inspect", tmp_path / "c")
    assert shown.returncode == 0, shown.stderr
    assert "Phase.WARM" in shown.stdout


def test_classes_that_are_not_there_stand_in_no_way(tmp_path, capsys, monkeypatch):
    """No tool imports what a checkpoint names, and none needs it."""
    save_some(tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, __name__)
        for more in (["inspect"], ["inspect", "--json"], ["verify"]):
            assert main([*more, str(tmp_path / "c")]) == 0
        again = ["reshard", str(tmp_path / "c"), str(tmp_path / "d"), "--shards", "2"]
        assert main(again) == 0
        assert "Phase.WARM" in capsys.readouterr().out
    assert shardckpt.load_state(tmp_path / "d")["phase"] is Phase.WARM


def test_reshard(tmp_path, capsys):
    state = {"t": torch.arange(1 << 20).reshape(-1, 8), "r": PerRank({"x": torch.ones(2)}), "n": 1}
    shardckpt.save(state, tmp_path / "c")
    target = str(tmp_path / "d")
    assert main(["reshard", str(tmp_path / "c"), target, "--shards", "3"]) == 0
    assert "3 shards" in capsys.readouterr().out
    sizes = [path.stat().st_size for path in (tmp_path / "d").glob("*.safetensors")]
    assert len(sizes) == 3
    assert max(sizes) - min(sizes) <= 8192
    found = shardckpt.load_state(target)
    assert torch.equal(found["t"], state["t"])
    assert found["r"][0]["x"].tolist() == [1, 1]
    again = {"r": PerRank({"x": torch.zeros(2)})}
    shardckpt.load(again, target)  # still a checkpoint of one rank
    assert again["r"].value["x"].tolist() == [1, 1]
    assert main(["verify", target]) == 0
    assert main(["reshard", str(tmp_path / "c"), target, "--shards", "1"]) == 7
    arguments = ["reshard", str(tmp_path / "c"), target, "--shards", "1", "--overwrite"]
    assert main(arguments) == 0
    assert main(["reshard", str(tmp_path / "c"), str(tmp_path / "e"), "--shards", "0"]) == 3


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
        (cut, 6, "cut"),
    ],
)
def test_exit_codes(tmp_path, capsys, command, harm, code, word):
    save_some(tmp_path / "c")
    harm(tmp_path / "c")
    more = [str(tmp_path / "d"), "--shards", "1"] if command == "reshard" else []
    if command == "inspect" and code == 6:
        code, word = 0, ""  # the manifest tells all
    assert main([command, str(tmp_path / "c"), *more]) == code
    error = capsys.readouterr().err
    assert word in error
    assert ("remedy" in error) == (code != 0)
    assert not (tmp_path / "d").exists()


def test_the_folder_of_a_run_is_met_with_a_hint(tmp_path, capsys):
    for step in (1, 2):
        shardckpt.save({"step": step}, tmp_path / f"step-{step}")
    assert main(["inspect", str(tmp_path)]) == 5
    assert "checkpoints in it: step-1, step-2" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["reshard", "a", "b"], ["fly"]])
def test_wrong_calls(arguments, capsys):
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
    shardckpt.save({f"{n}": n for n in range(20_000)}, tmp_path / "c")
    command = f"{sys.executable} -m shardckpt inspect {tmp_path / 'c'} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == str(tmp_path / "c")
    assert done.stderr == ""


def test_the_command_without_its_packages_says_how_to_install_them():
    code = "import sys; sys.modules['click'] = None; import shardckpt.cli.entry as entry; "
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(entry.main())"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 9
    assert 'pip install "shardckpt[cli]"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("given", "separated"),
    [
        ("convert --keys a b --json s t", "convert --keys a --keys b --json s t"),
        ("convert s t --rename a= =b", "convert s t --rename a= --rename =b"),
        ("inspect p --keys --json", "inspect p --keys --json"),
        ("inspect p --keys", "inspect p --keys"),
        ("inspect --keys a -- p", "inspect --keys a -- p"),
    ],
)
def test_an_option_with_several_values(given, separated):
    assert separate(given.split()) == separated.split()


def test_progress_counts_and_is_quiet_at_first():
    shown: list[int] = []
    quick = Progress(shown.append)
    quick.advance(5)
    assert shown == []
    slow = Progress(shown.append)
    slow._shown = 0.0
    slow.advance(5)
    slow._shown = 0.0
    slow.advance(7)
    assert shown == [5, 12]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 << 40, "5.0 TiB"),
        (1 << 70, "1048576.0 PiB"),
    ],
)
def test_sizes(size, text):
    assert size_text(size) == text
