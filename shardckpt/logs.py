"""The logger of the package, and warnings that name the line of the user's program.

`logging.getLogger("shardckpt")` logs INFO for each save and load, WARNING for what is skipped, and
ERROR for a failure that no call reports. Without a logging configuration, Python prints WARNING
and above to stderr.

`logging.getLogger("shardckpt.reports")` gets one record at the end of each save and load, for
handlers that count or trace them. Its records do not reach the handlers of other loggers. Each has
the attributes `call` ("save" or "load"), `path`, `rank`, `begun_ns` and `ended_ns` (time.time_ns),
`report` (a SaveReport or LoadReport, or None) and `error` (an exception, or None).
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from shardckpt.errors import printable

__all__ = ["logger", "reported", "warn"]

logger = logging.getLogger("shardckpt")

_reports = logging.getLogger("shardckpt.reports")
_reports.setLevel(logging.INFO)
_reports.propagate = False
_reports.addHandler(logging.NullHandler())

_Arguments = ParamSpec("_Arguments")
_Report = TypeVar("_Report")
_Function = Callable[_Arguments, _Report]

_PACKAGE = os.path.dirname(__file__) + os.sep


def _escape(record: logging.LogRecord) -> bool:
    """Escape the control characters of paths, and the bytes in them that are not UTF-8."""
    if isinstance(record.args, tuple):
        record.args = tuple(printable(a) if isinstance(a, str) else a for a in record.args)
    return True


for _logger in (logger, _reports):
    _logger.addFilter(_escape)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning that names the line of the program which called the package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _tell_handlers(call: str, path: str, facts: dict[str, Any]) -> None:
    """Log a record to `shardckpt.reports`. A handler that raises must not fail the call."""
    try:
        _reports.info("%s %s", call, path, extra=facts)
    except Exception:
        logger.exception("A handler of the logger shardckpt.reports failed")


def reported(
    call: str, about: Callable[..., tuple[str, int]]
) -> Callable[[_Function[_Arguments, _Report]], _Function[_Arguments, _Report]]:
    """Decorate a save or load, so that the logger `shardckpt.reports` gets a record at its end.

    Args:
        call: The name of the call.
        about: Returns the path and the rank, from the arguments of the call.
    """

    def decorate(function: _Function[_Arguments, _Report]) -> _Function[_Arguments, _Report]:
        @functools.wraps(function)
        def call_and_report(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Report:
            begun_ns, report, error = time.time_ns(), None, None
            try:
                report = function(*args, **kwargs)
                return report
            except BaseException as raised:
                error = raised
                raise
            finally:
                path, rank = about(*args, **kwargs)
                facts = {"call": call, "path": path, "rank": rank, "report": report, "error": error}
                facts |= {"begun_ns": begun_ns, "ended_ns": time.time_ns()}
                _tell_handlers(call, path, facts)
                error = facts = None  # type: ignore[assignment]  # its traceback refers to this frame

        return call_and_report

    return decorate
