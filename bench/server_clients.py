"""The client of `bench.serving`, a program of its own: streams of completions, all at once.

    python -m bench.server_clients URL

``raw`` writes HTTP to plain sockets and only notes when how many bytes came; what they say is read
after the clock has stopped. ``openai`` is the package's AsyncClient.
"""

from __future__ import annotations

import asyncio
import json
import selectors
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from openai import AsyncOpenAI

from bench.common import Json
from bench.server_children import talk, tell

_END = b"data: [DONE]"
_LIMIT_S = 600.0


@dataclass
class Stream:
    """What came of one request, and when."""

    begun_s: float = 0.0
    times_s: list[float] = field(default_factory=list)  # of pieces of text
    text: str = ""


def body_of(question: Json, prompt: list[int]) -> Json:
    """The same request for both clients."""
    return {
        "model": "model",
        "prompt": prompt,
        "max_tokens": question["new_tokens"],
        "temperature": 0,
        "stream": True,
    }


def extras_of(question: Json) -> Json:
    """What OpenAI's API does not have. Both clients' prompts are the same, their prefixes apart."""
    return {"ignore_eos": True, "cache_salt": question["client"]}


def raw(url: str, question: Json) -> tuple[float, list[Stream]]:
    """One thread, one selector; a connection for each stream.

    Raises:
        AssertionError: a response that is not an event stream of ``new_tokens`` tokens.
    """
    host, port = urlsplit(url).hostname, urlsplit(url).port
    streams, received = {}, {}
    requests = []
    for prompt in question["prompts"]:
        body = body_of(question, prompt) | extras_of(question)
        content = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        requests.append(head.encode() + content)
    with selectors.DefaultSelector() as selector:
        start = time.perf_counter()
        for request in requests:
            sock = socket.create_connection((host, port), timeout=_LIMIT_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            streams[sock] = Stream(time.perf_counter())
            received[sock] = bytearray()
            sock.sendall(request)
            selector.register(sock, selectors.EVENT_READ, sock)
        open_sockets = len(streams)
        while open_sockets:
            ready = selector.select(_LIMIT_S)
            assert ready, "no stream went on"
            for key, _ in ready:
                sock = key.data
                data = sock.recv(1 << 16)
                now = time.perf_counter()
                received[sock] += data
                if b"data: {" in data:
                    streams[sock].times_s.append(now)
                if not data or _END in received[sock][-64:]:
                    selector.unregister(sock)
                    open_sockets -= 1
        seconds = time.perf_counter() - start
    for sock, stream in streams.items():
        sock.close()
        stream.text = _text_of(bytes(received[sock]), question["new_tokens"])
    return seconds, list(streams.values())


def _text_of(response: bytes, new_tokens: int) -> str:
    head, _, body = response.partition(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0], response[:2000]
    # Sizes of chunks stand on lines of their own; an event is on one line, and in one chunk.
    lines = [line[6:] for line in body.splitlines() if line.startswith(b"data: {")]
    events = [json.loads(line) for line in lines]
    assert events[-1]["usage"]["completion_tokens"] == new_tokens, events[-1]
    return "".join(choice["text"] for event in events for choice in event["choices"])


async def openai(url: str, question: Json) -> tuple[float, list[Stream]]:
    """One task for each stream."""

    async def run(client: AsyncOpenAI, prompt: list[int]) -> Stream:
        stream = Stream(time.perf_counter())
        body: Any = body_of(question, prompt)
        events: Any = await client.completions.create(**body, extra_body=extras_of(question))
        async for event in events:
            stream.times_s.append(time.perf_counter())
            stream.text += "".join(choice.text for choice in event.choices)
        return stream

    async with AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=_LIMIT_S
    ) as client:
        start = time.perf_counter()
        streams = await asyncio.gather(*(run(client, p) for p in question["prompts"]))
        return time.perf_counter() - start, streams


def answer(url: str, question: Json) -> Json:
    """A round by the client that the question names."""
    if question["client"] == "raw":
        seconds, streams = raw(url, question)
    else:
        seconds, streams = asyncio.run(openai(url, question))
    return {
        "seconds": seconds,
        "texts": [s.text for s in streams],
        "first_token_s": [s.times_s[0] - s.begun_s for s in streams],
        "gaps_s": [b - a for s in streams for a, b in zip(s.times_s, s.times_s[1:], strict=False)],
    }


def main(url: str) -> None:
    questions, out = talk()
    tell(out, {"ready": True})
    for question in questions:
        tell(out, answer(url, question))


if __name__ == "__main__":
    main(sys.argv[1])
