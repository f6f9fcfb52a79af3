"""The entry point runs the command, or says how to install what it lacks."""

from __future__ import annotations

import subprocess
import sys


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
