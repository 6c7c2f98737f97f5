"""Log lines of a server's processes."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from vattn import logs


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(format: str) -> list[str]:  # noqa: A002
    """What comes of three records, of which one is below the level."""
    stream = io.StringIO()
    logs.setup("info", format, stream)
    logger = logging.getLogger("vattn.test")
    logger.debug("nothing")
    logger.info("begun at %d", 80, extra={"color_message": "\x1b[1m%d", "request_id": "a"})
    try:
        raise OSError("full")
    except OSError:
        logger.exception("failed")
    return stream.getvalue().splitlines()


def test_text(root: logging.Logger) -> None:
    first, second, *trace = lines("text")
    assert first.endswith("Z info    vattn.test: begun at 80 request_id=a")
    assert second.endswith("Z error   vattn.test: failed")
    assert trace[-1] == "OSError: full"


def test_json(root: logging.Logger) -> None:
    first, second = map(json.loads, lines("json"))
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "info", "logger": "vattn.test", "message": "begun at 80", "request_id": "a"
    }  # fmt: skip
    assert second["exception"].endswith("OSError: full")


def test_what_is_no_level_or_format_is_refused() -> None:
    with pytest.raises(ValueError, match="log_level='loud'"):
        logs.setup("loud")
    with pytest.raises(ValueError, match="log_format='xml'"):
        logs.setup(format="xml")


def test_what_clients_choose_stays_on_its_line() -> None:
    record = logging.makeLogRecord({"msg": "GET", "levelname": "INFO"})
    record.user = "a\n2026-01-01T00:00:00Z error   vattn: forged\x1b[31m\u2028"
    record.finish, record.said, record.long = "stop", 'a status=200 "', "x" * 10_000
    text = logs.TextFormatter().format(record)
    assert text.splitlines() == [text]
    assert text.isprintable()
    assert " finish=stop " in text
    assert ' said="a status=200 \\"" ' in text
    assert len(text) < 600
    assert len(logs.JsonFormatter().format(record)) < 700
