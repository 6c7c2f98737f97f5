"""Logs of the processes of a server: one line for each record, as text or as JSON."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")
_LONGEST = 200  # characters of a text given as ``extra``; clients choose some of them
# What every record has; the rest was given as ``extra``.
_USUAL = frozenset(vars(logging.makeLogRecord({}))) | {
    *("message", "asctime", "taskName"),
    "color_message",  # uvicorn's, for its own formatter
}


def setup(
    level: str = "info",
    format: str = "text",  # noqa: A002  (the name of the setting)
    stream: TextIO | None = None,
) -> None:
    """Sends all records of this process to stderr, in place of where they went before.

    Args:
        level: one of :data:`LEVELS`; records below it are dropped.
        format: ``"text"``, or ``"json"`` for one object a line: ``time`` (ISO 8601, UTC),
            ``level``, ``logger``, ``message``, ``exception`` if there is one, and the fields given
            as ``extra``.
        stream: instead of stderr.

    Raises:
        ValueError: no such level or format.
    """
    if level not in LEVELS:
        raise ValueError(f"log_level={level!r} must be one of {', '.join(LEVELS)}")
    if format not in FORMATS:
        raise ValueError(f"log_format={format!r} must be one of {', '.join(FORMATS)}")
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def extra_fields(record: logging.LogRecord) -> dict[str, Any]:
    """What was given as ``extra``; long texts are cut."""
    return {name: _cut(value) for name, value in vars(record).items() if name not in _USUAL}


class JsonFormatter(logging.Formatter):
    """A record as a JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """See :func:`setup`."""
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in extra_fields(record).items() if name not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """A record as time, level, logger, message, and ``name=value`` for what was given as extra."""

    def format(self, record: logging.LogRecord) -> str:
        """See :func:`setup`."""
        extra = "".join(f" {name}={_quoted(value)}" for name, value in extra_fields(record).items())
        level, message = record.levelname.lower(), record.getMessage()
        line = f"{_time(record)} {level:7} {record.name}: {message}{extra}"
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        return line


def _cut(value: Any) -> Any:
    is_long = isinstance(value, str) and len(value) > _LONGEST
    return f"{value[:_LONGEST]}..." if is_long else value


def _quoted(value: Any) -> str:
    """As it is if it is one word; else so that it can be no other field, nor a line of its own."""
    text = str(value)
    if text.isprintable() and not set(' "=') & set(text):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _time(record: logging.LogRecord) -> str:
    when = datetime.fromtimestamp(record.created, UTC)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
