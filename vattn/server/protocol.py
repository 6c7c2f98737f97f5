"""HTTP connections of clients that are slow on purpose or by accident: uvicorn waits for ever."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from vattn.server.errors import ApiError

MAX_HEAD_BYTES = 64 << 10


class PatientProtocol(HttpToolsProtocol):
    """A connection whose requests must arrive whole in ``receive_s`` seconds, else 408 and its end.

    A client with a full buffer (64 KiB) that in ``stall_s`` seconds does not take it down to a
    quarter is cut off, so that its request ends and gives its pages back. Heads beyond
    :data:`MAX_HEAD_BYTES` get 431. Between two requests uvicorn's keep-alive timeout holds.
    """

    receive_s = 30.0
    stall_s = 120.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True  # the next bytes belong to a head
        self._head_bytes = 0
        self._ended = False  # a message ended in the bytes that were just parsed
        self._receiving: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first head has begun."""
        super().connection_made(transport)
        self._begin_receiving()

    def connection_lost(self, exc: Exception | None) -> None:
        """No more timers."""
        self._end_receiving()
        self._end_stall()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Counts what is no whole head yet, after uvicorn has parsed it."""
        self._ended = False
        super().data_received(data)
        # With the end of a message there may have come a part of the next one, which is left to
        # the keep-alive timeout until more of it comes.
        if self.transport.is_closing() or self._ended or not self._in_head:
            return
        self._begin_receiving()
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            message = f"the request's head is larger than {MAX_HEAD_BYTES} bytes"
            self._refuse(ApiError(431, message, code="head_too_large"))

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        """The body begins."""
        self._in_head = False
        self._head_bytes = 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._end_receiving()
        self._in_head = self._ended = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """As OpenAI tells errors."""
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def pause_writing(self) -> None:
        """The client takes less than it is sent."""
        super().pause_writing()
        self._end_stall()
        self._stalled = self.loop.call_later(self.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It took most of what waited."""
        self._end_stall()
        super().resume_writing()

    def _begin_receiving(self) -> None:
        if self._receiving is None:
            self._receiving = self.loop.call_later(self.receive_s, self._too_slow)

    def _end_receiving(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None

    def _end_stall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _too_slow(self) -> None:
        self._receiving = None
        if self._in_head and self._is_answering():
            self._begin_receiving()  # it sends another request meanwhile; that one can wait
            return
        message = f"the request did not arrive within {self.receive_s:g} s"
        self._refuse(ApiError(408, message, code="request_timeout"))

    def _is_answering(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # uvicorn's type leaves out the None
        return cycle is not None and not cycle.response_complete

    def _may_answer(self) -> bool:
        """Whether nothing was sent yet in answer to what is coming in."""
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None or not cycle.response_started:
            return True
        return self._in_head and cycle.response_complete

    def _refuse(self, error: ApiError) -> None:
        """Answers, unless an answer is on its way, and closes the connection."""
        if self.transport.is_closing():
            return
        if self._may_answer():
            body = json.dumps(error.body()).encode()
            head = (
                f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
                "connection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()
