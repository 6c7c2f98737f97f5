"""What the routes that generate have in common: a stream or a body, as the client asked for."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response

from vattn.server.observe import CLIENT_LEFT
from vattn.server.openai.common import SamplingFields, note_user
from vattn.server.openai.connected import ClientGone, while_connected
from vattn.server.openai.sse import EventStream
from vattn.server.state import ServerState, state_of

_Body = TypeVar("_Body", bound=SamplingFields)
_Task = TypeVar("_Task")


async def respond(
    request: Request,
    body: _Body,
    *,
    understood: Callable[[ServerState, Request, _Body], Coroutine[Any, Any, _Task]],
    events: Callable[[ServerState, _Task], AsyncGenerator[bytes, None]],
    whole: Callable[[ServerState, _Task], Coroutine[Any, Any, bytes]],
) -> Response:
    """The response to a request; all work for it ends when its client leaves.

    Args:
        request: of HTTP.
        body: what it asks for.
        understood: makes a task of it.
        events: those of a stream.
        whole: the JSON of a response that is no stream.

    Raises:
        ApiError: the request cannot be served.
    """
    state = state_of(request)
    note_user(request, body)
    try:
        task = await while_connected(request.receive, understood(state, request, body))
        if body.stream:
            return EventStream(events(state, task))
        made = await while_connected(request.receive, whole(state, task))
    except ClientGone:
        return Response(status_code=CLIENT_LEFT)
    return Response(made, media_type="application/json")
