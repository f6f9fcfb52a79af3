"""Hostile checkpoints of a handler: nothing in them is imported or called, in every format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from shardckpt.errors import UnsupportedLeafError
from tests.faults import handler_attacks as attacks
from tests.faults.test_hostile import MOST_BYTES, MOST_S

CASES: dict[str, tuple[attacks.Attack, bool]] = {
    **{f"refused: {what}": (attack, True) for what, attack in attacks.REFUSED.items()},
    **{f"harmless: {what}": (attack, False) for what, attack in attacks.HARMLESS.items()},
}
for what, text in attacks.NAMES.items():
    argument, called = attacks.SLOTS["a model's argument"], attacks.call(text, [1])
    CASES[f"{what} as model.class"] = (
        attacks.put(attacks.SLOTS["model.class"], attacks.name(text)),
        True,
    )
    CASES[f"{what}, called, as an argument"] = (attacks.put(argument, called), True)
    CASES[f"{what}, called, as loss"] = (attacks.put(attacks.FUNCTIONS["loss_fn"], called), False)


def attempts(folder: Path, cases, form: str, hole: str = "") -> list[dict]:
    """The result of a load of each case, from one child process."""
    attacks.write(folder / f"good{form}", None)
    names = {f"good{form}": ("good", False)}
    for number, (what, (attack, refused)) in enumerate(cases.items()):
        path = folder / f"case{number}{form}"
        try:
            attacks.write(path, attack)
        except UnsupportedLeafError:  # this format can't hold it
            assert form
            continue
        names[path.name] = (what, refused)
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.handler_child", str(folder), hole],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 or hole, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for attempt in found:
        attempt["case"], attempt["refused"] = names[attempt["case"]]
    assert {attempt["case"] for attempt in found} == {what for what, _ in names.values()} or hole
    return found


def wrong(attempt: dict) -> str | None:
    """Describe the problem of an attempt. None if it is as expected."""
    what = f"{attempt['case']}, {attempt['call']}: "
    if attempt["forbidden"]:
        return what + f"forbidden: {attempt['forbidden']}"
    if attempt["seconds"] > MOST_S or attempt["peak_bytes"] > MOST_BYTES:
        return what + f"{attempt['seconds']:.1f} s, {attempt['peak_bytes'] >> 20} MiB"
    if attempt["call"] != "load":  # which may take what has no meaning for it as plain data
        typed = attempt["typed"] or not attempt["error"]
        return None if typed else what + f"{attempt['error']}: {attempt['text']}"
    if not attempt["refused"]:
        return what + f"{attempt['error']} {attempt['text']}" if attempt["error"] else None
    if not attempt["error"]:
        return what + "loads"
    if not attempt["typed"]:
        return what + f"{attempt['error']}: {attempt['text']}"
    if not attempt["path"] or not attempt["remedy"] or "tensor: " not in attempt["text"]:
        return what + f"names no path, no field or no remedy: {attempt['text']}"
    return None


def try_part(folder: Path, form: str, part: slice) -> int:
    """A part of the cases in a format; how many."""
    cases = dict(list(CASES.items())[part])
    failures = [text for text in map(wrong, attempts(folder, cases, form)) if text]
    assert not failures, "\n".join(failures)
    assert not os.path.exists(folder / "shardckpt-was-here")
    return len(cases)


def trial(seed: int) -> int:
    """All cases in one format, for scripts/torture: four seeds try all formats."""
    with tempfile.TemporaryDirectory() as folder:
        return try_part(Path(folder), attacks.FORMATS[seed % len(attacks.FORMATS)], slice(None))


@pytest.mark.parametrize(
    "number",
    [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, len(attacks.FORMATS)))],
)
def test_hostile_checkpoints_of_a_handler(tmp_path, number):
    """A part of the cases for each format; scripts/torture tries all of them in all formats."""
    assert len(CASES) > 200
    assert try_part(tmp_path, attacks.FORMATS[number], slice(number, None, 12)) > 10


@pytest.mark.parametrize(
    ("hole", "signs"),
    [
        (
            "names",
            {
                "harmless: the shell as loss_fn": "os.system",
                "a module not imported as model.class": "imaplib.py",
                "the module's __getattr__ as model.class": "__getattr__",
                "refused: a function of the script as a factory": "a function of the script",
            },
        ),
        pytest.param("sizes", {"refused: a large model": "MiB"}, marks=pytest.mark.long),
    ],
)
def test_planted_holes_are_seen(tmp_path, hole, signs):
    found = attempts(tmp_path, {case: CASES[case] for case in signs}, "", hole)
    texts = {a["case"]: str(wrong(a)) for a in found if a["call"] == "load"}
    for case, sign in signs.items():
        assert sign in texts[case], texts[case]
