"""The logger of the package, and warnings that name the line of the user's program.

`logging.getLogger("shardckpt")` logs INFO for each save and load, WARNING for what is skipped, and
ERROR for a failure that no call reports. Without a logging configuration, Python prints WARNING
and above to stderr.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

__all__ = ["logger", "warn"]

logger = logging.getLogger("shardckpt")

_PACKAGE = os.path.dirname(__file__) + os.sep


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning that names the line of the program which called the package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
