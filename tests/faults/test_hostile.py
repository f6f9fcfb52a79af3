"""Hostile checkpoints: each refused with a typed error, at once, in little memory, and nothing runs
and nothing is opened that is none of the checkpoint's files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.faults import hostile

MOST_S = 1.0
MOST_BYTES = 200 << 20


def attempts(folder: Path, attacks: dict[str, hostile.Attack | None], calls: list[str]):
    """What each call did with each case, from one child process."""
    names = {}
    for number, (name, attack) in enumerate(attacks.items()):
        made = hostile.build(folder / ("good" if attack is None else f"case{number}"), attack)
        names[made.name] = name
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.hostile_child", str(folder), *calls],
        capture_output=True,
        text=True,
        timeout=110,
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [{**attempt, "case": names[attempt["case"]]} for attempt in found]


def wrong(attempt) -> str | None:
    """What is not as it should be in an attempt."""
    what = f"{attempt['case']}, {attempt['call']}: "
    if attempt["forbidden"]:
        return what + f"forbidden: {attempt['forbidden']}"
    if attempt["seconds"] > MOST_S or attempt["peak_bytes"] > MOST_BYTES:
        return what + f"{attempt['seconds']:.1f} s, {attempt['peak_bytes'] >> 20} MiB"
    if attempt["case"] == "good":
        return what + attempt["text"] if attempt["error"] else None
    if attempt["call"] == "verify" and attempt["case"].startswith("an enum "):
        return what + attempt["text"] if attempt["error"] else None
    if attempt["call"] == "cut" and not attempt["error"]:
        return None
    if not attempt["typed"]:
        return what + f"{attempt['error']}: {attempt['text']}"
    if not attempt["remedy"]:
        return what + f"no remedy: {attempt['text']}"
    return None


def test_hostile_checkpoints(tmp_path):
    attacks = {"good": None, **hostile.ATTACKS}
    assert len(hostile.ATTACKS) + len(hostile.HEADERS) >= 40
    found = attempts(tmp_path, attacks, ["load", "load_in_place", "map", "verify", "cut"])
    assert len(found) == 5 * len(attacks)
    failures = [text for text in map(wrong, found) if text]
    assert not failures, "\n".join(failures)
    assert not os.path.exists("/tmp/shardckpt-was-here")


def test_hostile_headers(tmp_path):
    found = attempts(tmp_path, {"good": None, **hostile.HEADERS}, ["verify"])
    failures = [text for text in map(wrong, found) if text]
    assert not failures, "\n".join(failures)


def test_what_is_forbidden_would_be_seen(tmp_path):
    """Planted faults: a hook that sees nothing is none."""
    hostile.build(tmp_path / "good", None)
    code = f"""
import pickle
from pathlib import Path
from tests.faults import hostile_child as child
import sys
sys.addaudithook(child.hook)
class Evil:
    def __reduce__(self):
        return print, ()
def planted(path):
    pickle.loads(pickle.dumps(Evil()))
    open("/etc/hostname").close()
    bytearray(300 << 20)[::4096] = bytes(300 << 8)
    sum(range(30_000_000))
child.CALLS["load"] = planted
import json
print(json.dumps(child.attempt("load", Path({str(tmp_path / "good")!r}))))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    attempt = json.loads(done.stdout.splitlines()[-1])
    assert any("pickle.find_class" in event for event in attempt["forbidden"])
    assert any("/etc/hostname" in event for event in attempt["forbidden"])
    assert attempt["peak_bytes"] > MOST_BYTES
    assert not attempt["error"]
    assert "forbidden" in str(wrong(attempt))
