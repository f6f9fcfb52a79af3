"""The entry point runs the command, or says how to install what it lacks."""

from __future__ import annotations

import io
import subprocess
import sys
from types import SimpleNamespace

import pytest

from shardckpt.cli import entry


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


@pytest.fixture
def command(monkeypatch):
    """A function that sets what the module of the command is, or the error of its import."""

    def set_command(found):
        def import_module(name):
            assert name == "shardckpt.cli.main"
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(entry, "importlib", SimpleNamespace(import_module=import_module))

    return set_command


def test_the_exit_code_is_that_of_the_command(command):
    command(SimpleNamespace(main=lambda: 6))
    assert entry.main() == 6


@pytest.mark.parametrize("name", ["click", "rich", "rich.console", "click.core"])
def test_a_package_of_the_extra_that_is_missing_is_named(command, capsys, name):
    command(ImportError("missing", name=name))
    assert entry.main() == 9
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"needs {name}, which is not installed" in shown.err


@pytest.mark.parametrize("name", ["numpy", "clicks", "shardckpt.cli.main", None])
def test_other_errors_of_the_import_are_raised(command, name):
    error = ImportError("broken", name=name)
    command(error)
    with pytest.raises(ImportError) as raised:
        entry.main()
    assert raised.value is error


def test_characters_that_the_output_lacks_are_escaped(command, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    command(SimpleNamespace(main=lambda: print("\u6587 w", flush=True) or 0))
    assert entry.main() == 0
    assert written.getvalue() == b"\\u6587 w\n"


def test_an_import_that_is_interrupted_ends_quietly(monkeypatch):
    def import_module(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, "importlib", SimpleNamespace(import_module=import_module))
    assert entry.main() == 130
