"""Bodies: how large and how deep they may be. How slowly they may come is for protocol.py."""

from __future__ import annotations

import json
import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vattn.config import format_bytes
from vattn.server.errors import ApiError
from vattn.server.responses import error_response

# What parses, validates and renders bodies recurses, and Python ends at about 1,000 levels.
MAX_DEPTH = 128
# A string (whole, or without its end), or a bracket outside of strings. Takes linear time.
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[][{}]', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Limits:
    """ASGI middleware that reads bodies: too large ones get 413, unreadable ones 400.

    A body that says how large it is, is refused before any of it is read; another one as soon as it
    is too large.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._most = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
            if body is not None:
                check_json(body)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        if body is None:  # the client left
            return
        pending: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal pending
            if pending is not None:
                message, pending = pending, None
                return message
            return await receive()

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client left before it was sent."""
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length) > self._most:
            raise self._too_large()
        parts = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts += message.get("body", b"")
            if len(parts) > self._most:
                raise self._too_large()
            more = message.get("more_body", False)
        return bytes(parts)

    def _too_large(self) -> ApiError:
        limit = format_bytes(self._most)
        message = f"the body is larger than {limit}, the limit that --max-body-bytes sets"
        return ApiError(413, message, code="request_too_large")


def check_json(body: bytes) -> None:
    """Refuses JSON that would not harm the parser, but what comes behind it.

    Whether it is JSON at all is for the parser to say.

    Raises:
        ApiError: nested too deeply, not UTF-8, or text with half of a surrogate pair.
    """
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH:
        depth = 0
        for found in _TOKEN.finditer(body):
            kind = found.group()[:1]
            depth += (kind in b"{[") - (kind in b"}]")
            if depth > MAX_DEPTH:
                message = f"the body is nested deeper than {MAX_DEPTH} levels"
                raise ApiError(400, message, code="invalid_json")
    try:
        body.decode()
        if _SURROGATE.search(body):
            _check_text(body)
    except UnicodeError as error:
        message = f"the body is not text in UTF-8: {error.reason}"  # type: ignore[attr-defined]
        raise ApiError(400, message, code="invalid_json") from error


def _check_text(body: bytes) -> None:
    try:
        value = json.loads(body)
    except ValueError:
        return
    json.dumps(value, ensure_ascii=False).encode()
