"""Hostile checkpoints are refused with a typed error, at once and in little memory. No code runs,
and no file outside of the checkpoint is opened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from shardckpt.convert.convert import FORMATS
from tests.faults import hostile
from tests.faults.hostile_foreign import FOREIGN, GOOD
from tests.faults.hostile_holes import HOLES

ROOT = Path(__file__).parents[2]
MOST_S = 1.0
MOST_BYTES = 200 << 20

OWN_CALLS = [
    "load", "load_in_place", "map", "verify", "cut", "NNHandler.load", "restore", "initialize",
    *(f"convert to {kind}" for kind in FORMATS), "reshard", "rescue",
    *(f"shardckpt {name}" for name in ("inspect", "verify", "convert", "reshard", "rescue")),
]  # fmt: skip
FOREIGN_CALLS = [
    "convert to shardckpt", "initialize", "NNHandler.load", "restore", "load", "verify", "rescue",
    "reshard", "shardckpt convert", "shardckpt inspect",
]  # fmt: skip
PLANTED = {
    "metadata of DCP is unpickled": "metadata: runs a command",
    "a torch file is unpickled": "torch: runs a command",
    "metadata of torch_checkpointing are unpickled": "metadata.pkl: runs a command",
    "a file of a rank is unpickled": "rank: runs a command",
    "a torch file is not checked": "torch: bytes after the end",
    "a pickle is not scanned": "metadata: a memo index of 2**24",
    "a file of any kind is opened": "a pipe for a torch file",
    "names and links are followed": "index: hugging face, absolute",
    "names and links are followed in DCP": "dcp: a data file that is a link",
    "one key of the seal is enough": "safetensors: bit 0 of character 0 of shardckpt.state",
    "errors stay untyped": "safetensors: a tree that is not JSON",
    "an index of any size is read": "index: hugging face, a sparse GB",
    "an enum's module is imported": "an enum of a module not imported",
    "tensors may be expanded without end": "torch: a tensor of 4 TB, expanded",
    "lists may be shared without end": "torch: 2**40 shared lists",
}
MAY_SUCCEED = {
    "cut", "shardckpt inspect", "reshard", "shardckpt reshard", "rescue", "shardckpt rescue",
    "convert to shardckpt", "convert to hf", "shardckpt convert",
}  # fmt: skip
"""Calls that read a part of a checkpoint of ours, or carry its values over as they are."""
READ_EVERY_VALUE = {"load", "load_in_place", "map", "NNHandler.load", "restore"}
"""Calls that make every value of a checkpoint of ours; others leave the class of an enum alone."""
CALL_OF_HOLE = {"an enum's module is imported": "load"}


class Corpus:
    """Hostile checkpoints in a folder, and what calls do with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: list[dict[str, str]] = []
        self.paths: dict[str, str] = {}
        self.warm = [hostile.build(folder / "good", None)]
        for number, attack in enumerate(GOOD.values()):
            self.warm.append(attack(self._new(f"good{number}")))

    def _new(self, name: str) -> Path:
        (self.folder / name).mkdir()
        return self.folder / name

    def add(self, name: str, calls: list[str], hole: str = "") -> None:
        if name not in self.paths:
            number = len(self.paths)
            if name in FOREIGN:
                made = FOREIGN[name](self._new(f"case{number}"))
            else:
                attack = {**hostile.ATTACKS, **hostile.HEADERS}.get(name)
                made = hostile.build(self.folder / f"case{number}", attack)
            self.paths[name] = str(made)
        self.jobs += [
            {"case": name, "path": self.paths[name], "call": call, "hole": hole} for call in calls
        ]

    def run(self) -> list[dict]:
        # Warm with errors too: what a refusal imports is not the checkpoint's doing.
        calls = sorted({job["call"] for job in self.jobs})
        warm = [{"path": str(path), "call": call} for path in self.warm for call in calls]
        (self.folder / "plan.json").write_text(json.dumps({"warm": warm, "jobs": self.jobs}))
        done = subprocess.run(
            [sys.executable, "-m", "tests.faults.hostile_child", str(self.folder)],
            capture_output=True,
            text=True,
            timeout=900,
            cwd=self.folder,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, [ROOT, os.environ.get("PYTHONPATH", "")])),
                "MALLOC_ARENA_MAX": "1",
                "OMP_NUM_THREADS": "1",
            },
        )
        assert not done.returncode, done.stderr[-3000:]
        found = [json.loads(line) for line in done.stdout.splitlines() if line[:1] == "{"]
        assert len(found) == len(self.jobs)
        return found


def wrong(attempt) -> str | None:
    """Describe the problem of an attempt. None if it is as expected."""
    what = f"{attempt['case']}, {attempt['call']}: "
    if attempt["forbidden"]:
        return what + f"forbidden: {attempt['forbidden']}"
    if attempt["seconds"] > MOST_S or attempt["peak_bytes"] > MOST_BYTES:
        return what + f"{attempt['seconds']:.1f} s, {attempt['peak_bytes'] >> 20} MiB"
    if attempt["case"] == "good" or attempt["case"] in GOOD:
        return what + attempt["text"] if attempt["error"] else None
    if attempt["case"].startswith("an enum ") and attempt["call"] not in READ_EVERY_VALUE:
        if attempt["error"] is None:
            return None
        if "verify" in attempt["call"]:
            return what + attempt["text"]
    if attempt["case"] == "index: hugging face, a sparse configuration" and not attempt["error"]:
        return None if attempt["call"] != "convert to hf" else what + "copied"
    if attempt["case"] == "safetensors: data of another file" and not attempt["error"]:
        return None if attempt["call"] == "shardckpt inspect" else what + "read"  # reads no data
    if attempt["call"] in MAY_SUCCEED and attempt["case"] not in FOREIGN and not attempt["error"]:
        return None
    if not attempt["typed"]:
        return what + f"{attempt['error']}: {attempt['text']}"
    if not attempt["remedy"]:
        return what + f"no remedy: {attempt['text']}"
    return None


PARTS = 10


def try_part(folder: Path, part: int) -> int:
    """Each hostile checkpoint with a part of the calls, other ones for each; how many calls."""

    def some(calls: list[str]) -> list[str]:
        return calls[(len(corpus.paths) + part) % PARTS :: PARTS]

    corpus = Corpus(folder)
    corpus.add("good", ["load", "load_in_place", "map", "verify", "cut"])
    for name in hostile.ATTACKS:
        corpus.add(name, some(OWN_CALLS))
    for name in hostile.HEADERS:
        corpus.add(name, ["verify", "shardckpt verify"])
    for name in FOREIGN:
        corpus.add(name, some(FOREIGN_CALLS))
    corpus.add("index: hugging face, a sparse configuration", ["convert to hf"])
    assert len(corpus.paths) > 200
    failures = [text for text in map(wrong, corpus.run()) if text]
    assert not failures, "\n".join(failures)
    assert not (folder / "shardckpt-was-here").exists()
    return len(corpus.jobs)


def trial(seed: int) -> int:
    """A part of the corpus, for scripts/torture: PARTS seeds make the whole."""
    with tempfile.TemporaryDirectory() as folder:
        return try_part(Path(folder), seed % PARTS)


def test_hostile_checkpoints_are_refused(tmp_path):
    """A tenth of the calls; scripts/torture --only hostile makes all."""
    assert try_part(tmp_path, 0) > 500


def test_good_files_are_read_and_planted_holes_are_seen(tmp_path):
    """One test, as a child takes seconds to import everything; each hole has a fork of its own."""
    assert set(PLANTED) == set(HOLES)
    corpus = Corpus(tmp_path)
    for name, path in zip(GOOD, corpus.warm[1:], strict=True):
        corpus.paths[name] = str(path)
        if name.startswith("torch"):  # they have other entries than those that these calls name
            corpus.add(name, ["shardckpt convert", "shardckpt inspect"])
            continue
        folder_of_others = name in ("hub", "hugging face")
        corpus.add(name, ["convert to shardckpt", "convert to torch"])
        corpus.add(name, [] if folder_of_others else ["initialize"])
    for hole, name in PLANTED.items():
        corpus.add(name, [CALL_OF_HOLE.get(hole, "convert to shardckpt")], hole)
    attempts = corpus.run()
    failures = [text for a in attempts if not a["hole"] and (text := wrong(a))]
    assert not failures, "\n".join(failures)
    unseen = [a["hole"] for a in attempts if a["hole"] and wrong(a) is None]
    assert not unseen
    assert (tmp_path / "shardckpt-was-here").exists()  # one of them runs a command
