"""The examples under docs/examples run; the demo runs digits.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_script

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "char_lm.py"


@pytest.mark.ranks
def test_the_character_model(tmp_path):
    out = tmp_path / "lm"
    train = ["train", out, 3000]
    *_, text = run_script(EXAMPLE, train, train, ["write", out])  # the second has nothing to do
    assert [path.name for path in out.iterdir()]
    assert len(text) > 150
