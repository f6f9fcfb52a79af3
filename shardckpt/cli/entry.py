"""The entry point: the command, or a hint for its installation."""

from __future__ import annotations

import importlib
import io
import sys

from shardckpt.errors import DependencyError

__all__ = ["main"]


def main() -> int:
    """Run the command of `sys.argv` and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that its encoding lacks are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        command = importlib.import_module("shardckpt.cli.main")
    except KeyboardInterrupt:
        return 130
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("click", "rich"):
            raise
        print(
            f"shardckpt: the command needs {error.name}, which is not installed\n"
            '  remedy: pip install "shardckpt[cli]"',
            file=sys.stderr,
        )
        return DependencyError.exit_code
    code: int = command.main()
    return code
