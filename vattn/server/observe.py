"""Request ids, the access log, and a last net under all failures; outermost of the middleware."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vattn.server.errors import ApiError
from vattn.server.responses import error_response
from vattn.server.state import ServerState

CLIENT_LEFT = 499  # as nginx counts clients that left before the response
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")

access = logging.getLogger("vattn.server.access")
logger = logging.getLogger("vattn.server")


def request_id_of(request: Request) -> str:
    """The id of an HTTP request: the client's ``X-Request-Id``, or one made here."""
    found: str = request.state.request_id
    return found


def note(request: Request, **fields: Any) -> None:
    """Adds fields to the request's line in the access log, such as ``finish="stop"``."""
    request.state.log.update(fields)


class Observe:
    """ASGI middleware that names, times and logs each request.

    When it came is in ``request.state.arrival_s``, of ``time.monotonic``. The id is in
    ``request.state.request_id`` and goes back as ``X-Request-Id``. A failure that nobody caught
    becomes a 500 with the id, and a traceback in the log.

    Args:
        app: what is behind it.
        state: of the server.
        routes: by whose paths the metrics tell requests apart.
    """

    def __init__(self, app: ASGIApp, state: ServerState, routes: Sequence[BaseRoute] = ()) -> None:
        self._app = app
        self._state = state
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        request_id = _choose_id(scope)
        fields: dict[str, Any] = {}
        scope.setdefault("state", {}).update(
            request_id=request_id, log=fields, arrival_s=time.monotonic()
        )
        status = 0
        is_whole = False

        async def watched(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).setdefault("X-Request-Id", request_id)
            await send(message)
            is_whole = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await self._app(scope, receive, watched)
        except Exception:
            logger.exception("request %s failed: %s", request_id, _path(scope))
            if status:
                raise  # too late for another answer: the server cuts the connection
            message = f"the server failed; its log has the cause under request id {request_id}"
            failure = error_response(ApiError(500, message, type="server_error"))
            await failure(scope, receive, watched)
        finally:
            seconds = time.perf_counter() - begun
            status = status if is_whole else CLIENT_LEFT
            self._state.metrics.http(scope["method"], self._template(scope), status, seconds)
            _log(scope, request_id, status, seconds, fields)

    def _template(self, scope: Scope) -> str | None:
        """The path of the request's route, also where it was refused on its way there."""
        route = scope.get("route")
        if route is None:
            found = (each for each in self._routes if each.matches(scope)[0] is not Match.NONE)
            route = next(found, None)
        return getattr(route, "path", None)


def _choose_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            text: str = value.decode("ascii")
            return text
    return uuid.uuid4().hex


def _log(
    scope: Scope, request_id: str, status: int, seconds: float, fields: dict[str, Any]
) -> None:
    level = logging.DEBUG if scope["path"] in ("/health", "/metrics") else logging.INFO
    if not access.isEnabledFor(level):
        return
    shown = {"request_id": request_id, "status": status, "ms": round(seconds * 1000, 1), **fields}
    access.log(level, "%s %s", scope["method"], _path(scope), extra=shown)


def _path(scope: Scope) -> str:
    """As it came, percent-encoded: a client's control characters must not make their own lines."""
    found: str = scope.get("raw_path", b"").decode("ascii", "backslashreplace")
    return found
