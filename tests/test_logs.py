"""The logger, and warnings that point at the line of the caller."""

from __future__ import annotations

import logging
import os
import warnings

import pytest
import torch

import shardckpt
from shardckpt.logs import warn


def test_a_warning_points_at_the_first_line_outside_the_package():
    namespace = {"warn": warn}
    deep = compile("def a():\n    b()\ndef b():\n    warn('deep')\n", shardckpt.__file__, "exec")
    exec(deep, namespace)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        namespace["a"]()
    assert caught[0].filename == __file__


def test_the_package_logs_each_save_and_load_and_prints_nothing(tmp_path, caplog, capfd):
    with caplog.at_level(logging.INFO, logger="shardckpt"):
        shardckpt.save({"weight": torch.ones(3)}, tmp_path / "c")
        shardckpt.load({"weight": torch.zeros(3)}, tmp_path / "c")
    said = [record.getMessage() for record in caplog.records]
    assert any("saved" in text and "c" in text for text in said)
    assert any("loaded" in text for text in said)
    assert capfd.readouterr() == ("", "")


def test_a_path_that_is_not_utf_8_can_be_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="shardckpt"):
        shardckpt.save({"n": 1}, tmp_path / os.fsdecode(b"\xff"))
    records = [record for record in caplog.records if record.name == "shardckpt.reports"]
    assert records
    for record in records:
        record.getMessage().encode()
    assert os.fsencode(records[0].path).endswith(b"\xff")


def test_a_handler_that_raises_fails_no_save_and_no_load(tmp_path, caplog):
    class Raising(logging.Handler):
        def emit(self, record):
            raise RuntimeError("broken handler")

    reports, handler = logging.getLogger("shardckpt.reports"), Raising()
    reports.addHandler(handler)
    try:
        shardckpt.save({"w": torch.ones(3)}, tmp_path / "c")
        with pytest.raises(shardckpt.LoadMismatchError):  # the error of the call itself
            shardckpt.load({"w": torch.ones(4)}, tmp_path / "c")
    finally:
        reports.removeHandler(handler)
    assert caplog.text.count("RuntimeError: broken handler") == 2
