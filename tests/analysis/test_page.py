"""An HTML page about checkpoints, also in a browser."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess

import pytest
import torch
from torch import nn

import shardckpt
from shardckpt.cli.main import main

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>"


def data_of(page):
    text = page.read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def save_run(folder, steps=(1, 2, 10)):
    model = nn.Linear(4, 3)
    for step in steps:
        state = {"model": model, "step": step, "log": torch.ones(step)}
        report = shardckpt.save(state, f"{folder}/step-{step}")
    return report


def test_the_page_has_the_checkpoints_and_the_tensors_of_the_newest_one(tmp_path):
    save_run(tmp_path / "run")
    page = tmp_path / "run.html"
    assert shardckpt.write_report([tmp_path / "run"], page) == str(page)
    data = data_of(page)
    assert [one["name"] for one in data["checkpoints"]] == ["step-1", "step-2", "step-10"]
    assert [one["parts"]["log"] for one in data["checkpoints"]] == [4, 8, 40]
    assert data["tensors"]["name"] == ["model.weight", "model.bias", "log"]
    assert data["tensors"]["shape"] == [[3, 4], [3], [10]]
    assert data["tensors"]["bytes"] == [48, 12, 40]
    assert data["tensors"]["ranks"] == [[[0, 48]], [[0, 12]], [[0, 40]]]
    assert data["tensors"]["layout"] == ["whole"] * 3


def test_parts_of_a_tensor_are_counted_along_each_dimension(tmp_path):
    shardckpt.save({"w": torch.zeros(1024, 1024)}, tmp_path / "one")
    shardckpt.reshard(tmp_path / "one", tmp_path / "four", shards=4)
    shardckpt.write_report([tmp_path / "four"], tmp_path / "page.html")
    tensors = data_of(tmp_path / "page.html")["tensors"]
    assert tensors["layout"] == ["4 along dim 0"]
    assert tensors["ranks"] == [[[rank, 1 << 20] for rank in range(4)]]


def test_tied_tensors_count_once(tmp_path):
    weight = torch.ones(4)
    shardckpt.save({"a": weight, "b": weight}, tmp_path / "tied")
    shardckpt.write_report([tmp_path / "tied"], tmp_path / "page.html")
    data = data_of(tmp_path / "page.html")
    assert (data["tensors"]["bytes"], data["tensors"]["tied"]) == ([16, 0], ["", "a"])
    assert data["checkpoints"][0]["parts"] == {"a": 16, "b": 0}


def test_norms_corruption_and_timings_are_shown_if_asked_for(tmp_path):
    report = save_run(tmp_path / "run", steps=(1, 2))
    timings = tmp_path / "save.json"
    timings.write_text(json.dumps(dataclasses.asdict(report)))
    (shard,) = (tmp_path / "run" / "step-1").glob("*.safetensors")
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    page = tmp_path / "page.html"
    shardckpt.write_report([tmp_path / "run"], page, verify=True, timings=[timings])
    first, second = data_of(page)["checkpoints"]
    assert "model.weight" in first["damage"]["corrupted"] or "log" in first["damage"]["corrupted"]
    assert second["damage"] == {"corrupted": [], "errors": []}
    assert data_of(page)["timings"][0]["ranks"] == [[0, report.profile[0]]]
    shardckpt.write_report([tmp_path / "run" / "step-2"], page, norms=True, overwrite=True)
    assert data_of(page)["checkpoints"][0]["norms"]["log"] == pytest.approx(2**0.5)
    with pytest.raises(shardckpt.CorruptionError):
        shardckpt.write_report([tmp_path / "run"], page, norms=True, overwrite=True)


def test_other_formats_have_a_page_too(tmp_path):
    torch.save({"w": torch.ones(2, 3), "epoch": 4}, tmp_path / "last.pt")
    shardckpt.write_report([tmp_path / "last.pt"], tmp_path / "page.html", verify=True)
    data = data_of(tmp_path / "page.html")
    assert data["tensors"]["shape"] == [[2, 3]]
    assert data["checkpoints"][0]["values"] == 1


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        '{"path": "p", "profile": {"x": {}}}',
        '{"path": "p", "profile": {"0": {"write": NaN}}}',  # which browsers refuse in JSON
        "[]",
    ],
)
def test_a_file_of_timings_in_another_form_is_named(tmp_path, text):
    shardckpt.save({"w": torch.ones(2)}, tmp_path / "c")
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(shardckpt.StateError, match=r"bad\.json"):
        shardckpt.write_report(
            [tmp_path / "c"], tmp_path / "p.html", timings=[tmp_path / "bad.json"]
        )
    assert not (tmp_path / "p.html").exists()


def test_a_single_path_is_not_taken_as_letters(tmp_path):
    shardckpt.save({"w": torch.ones(2)}, tmp_path / "c")
    shardckpt.write_report(str(tmp_path / "c"), tmp_path / "p.html")
    assert data_of(tmp_path / "p.html")["checkpoints"][0]["name"] == "c"


def test_the_command_writes_the_page_once(tmp_path, capsys):
    save_run(tmp_path / "run", steps=(1,))
    command = ["report", f"{tmp_path}/run", "--html", f"{tmp_path}/p.html", "--norms"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path}/p.html\n"
    assert main(command) == shardckpt.CheckpointExistsError.exit_code
    assert main([*command, "--overwrite"]) == 0
    assert main(["report", f"{tmp_path}/none", "--html", f"{tmp_path}/q.html"]) == 5


def test_a_name_in_a_checkpoint_is_never_html(tmp_path):
    shardckpt.save({HOSTILE: torch.ones(2)}, tmp_path / "hostile")
    page = tmp_path / "page.html"
    shardckpt.write_report([tmp_path / "hostile"], page)
    assert data_of(page)["tensors"]["name"] == [HOSTILE]
    text = page.read_text()
    assert (text.count("<script"), text.count("</script"), text.count("<img")) == (2, 2, 0)
    outside = re.sub(r'id="data">.*?</script>', "", text, flags=re.DOTALL)
    assert not re.search(r"(src|href)=|url\(|https?://(?!www\.w3\.org/2000/svg)", outside)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_searches_and_sorts_twenty_thousand_tensors(tmp_path):
    layers = {f"layers.{i}": {f"w{j}": torch.ones(j + 1) for j in range(20)} for i in range(1000)}
    shardckpt.save({"model": layers, HOSTILE: torch.ones(1)}, tmp_path / "many")
    page = tmp_path / "page.html"
    shardckpt.write_report([tmp_path / "many"], page)
    script = """<script>{
      const ready = performance.now(), shown = () => document.querySelectorAll(".row").length;
      const first = () => [...document.querySelectorAll(".row > span:first-child")];
      const names = () => first().map(element => element.title);
      const input = document.querySelector("input"), opened = shown();
      input.value = "layers.77.w"; input.oninput();
      const matched = names();
      const button = [...document.querySelectorAll("button")].find(b => b.textContent === "Bytes");
      button.click();
      const sorted = names(), rows = shown();
      input.value = ""; input.oninput();
      const result = {ready, opened, matched, sorted, rows, all: names().length,
        scripts: document.scripts.length, images: document.images.length,
        wide: document.documentElement.scrollWidth > innerWidth};
      document.title = JSON.stringify(result);
    }</script>"""
    page.write_text(page.read_text() + script)
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    done = subprocess.run([*command, f"file://{page}"], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]
    found = json.loads(title.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["matched"][-20:] == [f"model.layers.77.w{j}" for j in range(20)]
    assert found["sorted"][-20:] == [f"model.layers.77.w{j}" for j in reversed(range(20))]
    assert found["rows"] < 100  # only the rows in view are in the document
    assert (found["scripts"], found["images"], found["wide"]) == (3, 0, False)
    print(f"usable after {found['ready']:.0f} ms")


def test_checkpoints_of_a_folder_that_can_not_be_read_are_on_the_page(tmp_path):
    save_run(tmp_path / "run", steps=(1, 2))
    manifest = tmp_path / "run" / "step-1" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    shardckpt.write_report(tmp_path / "run", tmp_path / "p.html")
    data = data_of(tmp_path / "p.html")
    assert [one["name"] for one in data["checkpoints"]] == ["step-2"]
    assert [one["name"] for one in data["unreadable"]] == ["step-1"]
    assert "The manifest is corrupted" in data["unreadable"][0]["error"]


def test_norms_of_corrupted_tensors_are_left_out_if_they_are_verified(tmp_path):
    shardckpt.save({"a": torch.ones(1 << 18), "b": torch.ones(1 << 18)}, tmp_path / "c")
    (shard,) = (tmp_path / "c").glob("*.safetensors")
    with open(shard, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    shardckpt.write_report(tmp_path / "c", tmp_path / "p.html", norms=True, verify=True)
    (one,) = data_of(tmp_path / "p.html")["checkpoints"]
    assert one["damage"]["corrupted"] == ["b"]
    assert one["norms"] == {"a": 512.0}


def test_a_page_that_exists_is_an_error_before_anything_is_read(tmp_path):
    (tmp_path / "p.html").touch()
    read = []
    shardckpt.save({"w": torch.ones(2)}, tmp_path / "c")
    with pytest.raises(shardckpt.CheckpointExistsError):
        shardckpt.write_report(tmp_path / "c", tmp_path / "p.html", progress=read.append)
    assert read == []


def test_control_characters_of_names_are_escaped(tmp_path):
    shardckpt.save({"w\u202egnp\x1b[2J": torch.ones(2)}, tmp_path / "c")
    shardckpt.write_report(tmp_path / "c", tmp_path / "p.html", norms=True)
    data = data_of(tmp_path / "p.html")
    name = "w\\u202egnp\\x1b[2J"
    assert data["tensors"]["name"] == [name]
    assert list(data["checkpoints"][0]["norms"]) == list(data["checkpoints"][0]["parts"]) == [name]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_tree_is_used_with_the_keyboard(tmp_path):
    layers = {f"{i}": {"w": torch.ones(2)} for i in range(50)}
    for step in (1, 2):
        state = {"a": {"layers": layers}, "constructor": torch.ones(step), "z": torch.ones(1)}
        shardckpt.save(state if step == 1 else {"z": state["z"]}, tmp_path / "run" / f"step-{step}")
    shardckpt.save({"b": {"c": layers}, "z": torch.ones(3)}, tmp_path / "run" / "step-3")
    page = tmp_path / "page.html"
    shardckpt.write_report(tmp_path / "run", page, norms=True)
    script = """<script>{
      const tree = document.querySelector("#tree"), steps = [];
      const press = key => {
        tree.dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
        const row = document.querySelector(".active > span");
        steps.push([row.title, tree.scrollTop > 0]);
      };
      press("Home"); press("ArrowDown"); press("ArrowRight"); press("End"); press("Enter");
      press("ArrowUp"); press("Home"); press("ArrowLeft"); press("ArrowDown");
      const norms = document.querySelector("#norms h2 span").textContent;
      document.title = JSON.stringify([steps, norms]);
    }</script>"""
    page.write_text(page.read_text() + script)
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    done = subprocess.run([*command, f"file://{page}"], capture_output=True, text=True, timeout=120)
    steps, norms = json.loads(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1])
    names = [name for name, _ in steps]
    assert names == ["b", "b.c", "b.c", "z", "z", "b.c.49", "b", "b", "z"]
    assert [scrolled for _, scrolled in steps][3:7] == [True, True, True, False]
    assert norms == "z"
