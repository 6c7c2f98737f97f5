"""Event streams: ``data: ...`` lines that end with ``[DONE]``, at little cost for each event."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vattn.outputs import CompletionOutput, RequestOutput
from vattn.server.errors import ApiError
from vattn.server.observe import CLIENT_LEFT
from vattn.server.openai.connected import ClientGone, while_connected

_log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
encode_json = msgspec.json.Encoder().encode


def event(data: Any) -> bytes:
    """One event with ``data`` as JSON."""
    return b"data: " + encode_json(data) + b"\n\n"


class Chunk:
    """Events that differ in a few values: what is the same in all of them is encoded once.

    ::

        chunk = Chunk({"id": "cmpl-1", "choices": [{"index": 0, "text": HOLE}]})
        chunk.event("Hello")  # data: {"id":"cmpl-1","choices":[{"index":0,"text":"Hello"}]}

    Args:
        template: JSON with :data:`HOLE` where the values go, in order.
    """

    def __init__(self, template: Any) -> None:
        parts = event(template).split(encode_json(HOLE))
        self._first, self._rest = parts[0], parts[1:]

    def event(self, *values: Any) -> bytes:
        """One event, with a value for each hole."""
        parts = [self._first]
        for value, part in zip(values, self._rest, strict=True):
            parts += (encode_json(value), part)
        return b"".join(parts)


class TextChunks:
    """Of a stream that for the most part is a text now and then a little more of it.

    Args:
        template: gives a chunk of a choice, by its index, with :data:`HOLE` for the text.
    """

    def __init__(self, template: Callable[[int], Any]) -> None:
        self._template = template
        self._chunks: dict[int, Chunk] = {}

    def event(self, index: int, text: str) -> bytes:
        """More text of a choice."""
        chunk = self._chunks.get(index)
        if chunk is None:
            chunk = self._chunks[index] = Chunk(self._template(index))
        return chunk.event(text)


def only_text(output: RequestOutput) -> CompletionOutput | None:
    """The sample of an output that tells no more than some text, of one sample; else None."""
    samples = output.outputs
    return samples[0] if len(samples) == 1 and not samples[0].finish_reason else None


# Clients' text is in templates too; a control character that no id and no model name has.
HOLE = "\x00hole\x00"


class EventStream(Response):
    """A response that sends events as they come.

    The status is sent with the first events: whatever fails before them is raised, and becomes a
    proper response. Later failures become an event ``{"error": {...}}``, after which the stream
    ends as always, with ``[DONE]``. When the client leaves, ``events`` is closed at once.

    Args:
        events: whole events, one or several at a time.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self._events = events
        self._started = False
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream."""
        try:
            await while_connected(receive, self._stream(send))
        except ClientGone:
            if not self._started:
                # Nobody reads it, but what counts responses sees why there was none.
                await Response(status_code=CLIENT_LEFT)(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        try:
            async with aclosing(self._events) as events:
                async for data in events:
                    if not self._started:
                        await self._start(send)
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as error:
            if not self._started:
                raise
            if not isinstance(error, ApiError):
                _log.exception("a stream failed")
                error = ApiError(500, "the stream failed in the server", type="server_error")
            body = event(error.body())
            await send({"type": "http.response.body", "body": body, "more_body": True})
        if not self._started:
            await self._start(send)
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _start(self, send: Send) -> None:
        self._started = True
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
