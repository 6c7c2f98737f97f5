"""An asyncio client that speaks HTTP/1.1 by itself, and so can leave wherever it wants to."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Reply:
    """What came back until the server closed the connection, or the client left."""

    begun: asyncio.Event = field(default_factory=asyncio.Event)  # something of the body is there
    raw: bytes = b""

    @property
    def status(self) -> int:
        return int(self.raw.split(b" ", 2)[1])

    @property
    def headers(self) -> dict[str, str]:
        head = self.raw.partition(b"\r\n\r\n")[0].decode()
        lines = (line.partition(": ") for line in head.split("\r\n")[1:])
        return {name.lower(): value for name, _, value in lines}

    @property
    def body(self) -> bytes:
        rest = self.raw.partition(b"\r\n\r\n")[2]
        if self.headers.get("transfer-encoding") != "chunked":
            return rest
        body = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        return body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Of a stream that ended as it should."""
        *events, done, rest = self.body.split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b""), self.raw
        assert all(event.startswith(b"data: ") for event in events), self.raw
        return [json.loads(event[6:]) for event in events]

    def texts(self) -> list[str]:
        """Of a completion, streamed or not, in the order of the choices."""
        assert self.status == 200, self.raw
        stream = self.headers["content-type"].startswith("text/event-stream")
        found: dict[int, str] = {}
        for each in self.events if stream else [self.json]:
            assert "error" not in each, each
            for choice in each["choices"]:
                found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
        return [found[index] for index in sorted(found)]


async def post(
    port: int,
    body: dict[str, Any],
    reply: Reply | None = None,
    *,
    path: str = "/v1/completions",
    sends: float = 1.0,
    reads: int | None = None,
) -> Reply:
    """Sends a request on a connection of its own and reads what comes back.

    Args:
        port: of 127.0.0.1.
        body: of the request.
        reply: filled while it comes.
        path: of the request.
        sends: the share of the request's bytes that is sent; the client leaves after them if it is
            less than 1.
        reads: the client leaves after so many pieces; None for all.
    """
    reply = reply or Reply()
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    whole = head.encode() + data
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(whole[: int(len(whole) * sends)])
        await writer.drain()
        pieces = 0
        while sends >= 1 and (reads is None or pieces < reads):
            piece = await reader.read(1 << 16)
            if not piece:
                break
            reply.raw += piece
            pieces += 1
            if reply.raw.partition(b"\r\n\r\n")[2]:
                reply.begun.set()
    finally:
        if reads is not None or sends < 1:
            writer.transport.abort()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return reply
