"""The commands diff, stats, cat and merge."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import shardckpt
from shardckpt.cli.main import main
from shardckpt.errors import CheckpointExistsError, LoadMismatchError, StateError


@pytest.fixture
def two(tmp_path):
    paths = [str(tmp_path / "one"), str(tmp_path / "two")]
    for step, path in enumerate(paths):
        w = torch.arange(24.0).reshape(4, 6)
        w[1, 2] += step
        shardckpt.save({"w": w, "bf16": torch.ones(2).bfloat16(), "step": step}, path)
    return paths


def test_diff_lists_what_differs_and_exits_with_1(two, capsys):
    assert main(["diff", *two]) == 1
    shown = capsys.readouterr().out
    assert "step: 0 and 1" in shown
    assert "w: 1 element of [4, 6] differ, largest difference 1" in shown
    assert "equal: 1 tensor and 0 other values" in shown
    assert main(["diff", *two, "--keys", "w", "bf16", "--atol", "1"]) == 0
    assert main(["diff", *two, "--json"]) == 1
    report = json.loads(capsys.readouterr().out.partition("{")[2].join(("{", "")))
    assert report["tensors"]["w"]["dtypes"] == ["float32", "float32"]
    assert report["values"] == {"step": [0, 1]}
    assert report["equal"] is False
    assert main(["diff", two[0], "nowhere"]) not in (0, 1)


def test_diff_names_other_dtypes_and_exits_with_0_within_a_tolerance(two, tmp_path, capsys):
    one, half = two[0], str(tmp_path / "half.pth")
    shardckpt.convert(one, half, dtype="float16")
    assert main(["diff", one, half]) == 1
    assert "w: dtypes float32 and float16\n" in capsys.readouterr().out
    assert main(["diff", one, half, "--atol", "0"]) == 0
    assert "w: dtypes float32 and float16, equal within the tolerance" in capsys.readouterr().out
    assert main(["diff", two[1], half, "--rtol", "0", "--keys", "w", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["tensors"]["w"]["elements"] == 1
    assert report["dtypes"] == {}
    assert main(["diff", two[1], half, "--rtol", "0", "--keys", "w"]) == 1
    assert "dtypes float32 and float16, 1 element of [4, 6] differ" in capsys.readouterr().out


def test_stats_prints_a_row_for_each_tensor(two, capsys):
    assert main(["stats", two[0]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["name", "dtype", "shape"]
    assert lines[1].split()[:2] == ["w", "float32"]
    assert main(["stats", two[0], "--json", "--keys", "w"]) == 0
    assert json.loads(capsys.readouterr().out)["w"]["largest"] == 23


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("w", ...),
        ("w[1]", 1),
        ("w[-1, 2:5]", np.s_[-1, 2:5]),
        ("w[0:4:2]", np.s_[0:4:2]),
        ("w[:, -2]", np.s_[:, -2]),
        ("w[3:1]", np.s_[3:1]),
        ("w[]", ...),
        ("bf16", None),
    ],
)
def test_cat_prints_a_slice_or_writes_it(text, index, two, tmp_path, capsys):
    assert main(["cat", two[0], text]) == 0
    expected = np.arange(24, dtype=np.float32).reshape(4, 6)[index]
    expected = np.ones(2, dtype=np.float32) if index is None else expected
    assert capsys.readouterr().out == f"{np.array2string(expected)}\n"
    file = tmp_path / "x.npy"
    assert main(["cat", two[0], text, "--npy", str(file)]) == 0
    found = np.load(file)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)
    assert main(["cat", two[0], text, "--npy", str(file)]) == CheckpointExistsError.exit_code
    assert main(["cat", two[0], text, "--npy", str(file), "--overwrite"]) == 0


@pytest.mark.parametrize("text", ["w[4]", "w[0,0,0]", "w[::-1]", "w[a]", "w[1:2:3:4]", "w[.]"])
def test_cat_refuses_a_slice_that_is_none(text, two, capsys):
    code = main(["cat", two[0], text])
    assert code == (LoadMismatchError.exit_code if "a" in text else StateError.exit_code)
    assert "w" in capsys.readouterr().err


def test_cat_writes_one_kind_of_output(two, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main(["cat", two[0], "w", "--json", "--npy", str(tmp_path / "x.npy")])
    assert caught.value.code == 2


def test_cat_says_that_an_entry_is_a_value(tmp_path, capsys):
    shardckpt.save({"w": torch.ones(2), "step": 7}, tmp_path / "c")
    assert main(["cat", str(tmp_path / "c"), "step"]) == LoadMismatchError.exit_code
    assert "actual: the value 7" in capsys.readouterr().err


def test_cat_prints_complex_numbers_and_names_with_brackets(tmp_path, capsys):
    half = torch.tensor([1 + 2j], dtype=torch.complex32)
    bits = torch.zeros(1, dtype=torch.uint8).view(torch.bits8)
    shardckpt.save({"w[0]": half, "w": torch.tensor([5.0]), "bits": bits}, tmp_path / "c")
    for name, shown in (("w[0]", "[1.+2.j]"), ("w[0][0]", "1.+2.j"), ("w", "[5.]")):
        assert main(["cat", str(tmp_path / "c"), name]) == 0
        assert capsys.readouterr().out.strip() == shown
    assert main(["cat", str(tmp_path / "c"), "bits"]) == StateError.exit_code
    assert "bits8" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["stats", "diff"])
def test_json_holds_no_nan(command, tmp_path, capsys):
    for step, number in enumerate((float("nan"), float("-inf"))):
        state = {"w": torch.tensor([number, 1.5e308, 1.5e308], dtype=torch.float64), "best": number}
        shardckpt.save(state, tmp_path / str(step))
    paths = [str(tmp_path / "0"), str(tmp_path / "1")]
    main([command, *(paths if command == "diff" else paths[:1]), "--json"])
    text = capsys.readouterr().out
    found = json.loads(text[text.index("{") :], parse_constant=pytest.fail)
    assert (
        found["w"]["norm"] == "inf"
        if command == "stats"
        else found["values"]["best"] == ["nan", "-inf"]
    )


def test_cat_lists_names_for_a_tensor_that_is_not_there(two, capsys):
    assert main(["cat", two[0], "v"]) == LoadMismatchError.exit_code
    assert "actual: w, bf16" in capsys.readouterr().err


def test_merge_writes_the_average(two, tmp_path, capsys):
    target = str(tmp_path / "merged")
    assert main(["merge", *two, target, "--weights", "1,3"]) == 0
    assert "2 tensors, 1 value" in capsys.readouterr().out
    assert shardckpt.load_state(target)["w"][1, 2] == 8.75
    assert main(["merge", *two, target]) == CheckpointExistsError.exit_code
    assert main(["merge", two[0], str(tmp_path / "x")]) == StateError.exit_code
    with pytest.raises(SystemExit):
        main(["merge", *two, target, "--weights", "1;3"])


def test_cat_prints_json(two, capsys):
    assert main(["cat", two[0], "w[1, 2:4]", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"name": "w[1, 2:4]", "dtype": "float32", "shape": [2], "values": [8.0, 9.0]}
    shardckpt.save({"x": torch.tensor([float("nan"), 1.5]).bfloat16()}, two[0], overwrite=True)
    assert main(["cat", two[0], "x", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["dtype"], found["values"]) == ("bfloat16", ["nan", 1.5])
