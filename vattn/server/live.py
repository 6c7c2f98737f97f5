"""What the live page shows: snapshots of the server as JSON, a stream of them or one.

``GET /live`` is an event stream: each event is one line, ``data: {...}``, about four times a second
(``?interval=SECONDS``, 0.25 to 60, for fewer). ``GET /live/snapshot`` is one. Both need an API key
if the server has any (``Authorization: Bearer KEY``: the page reads the stream with ``fetch``, not
with EventSource). More than 32 viewers get 503. The stream ends when the server shuts down.

A snapshot; sizes are bytes, times seconds, and null stands for what is not known yet::

    {
      "version": 1,
      "time": 1767225600.25,              Unix time
      "uptime_s": 12.5,
      "model": "embedded",                as clients name it
      "engine": {
        "state": "up",                    "up", "restarting", "down" (for good), "draining"
        "restarts": 0,
        "error": null,                    why it is not up, a text
        "dtype": "float32", "device": "cpu", "attention_backend": "sdpa",
        "max_model_len": 512, "max_num_seqs": 64     (these five null before the first start)
      },
      "queue": {"running": 3, "waiting": 0, "max_waiting": 2048},        running, waiting: samples
      "throughput": {"prompt_tokens_per_s": 0.0, "generation_tokens_per_s": 93.5,
                     "steps_per_s": 31.0, "requests_per_s": 1.5},        of the last two seconds;
                                          prompt tokens are those computed, not cached ones
      "latency": {                        of the last minute, of requests without a stream as well
        "time_to_first_token": {"count": 12, "p50": 0.012, "p90": 0.03, "p99": 0.05},
        "inter_token": {...}, "end_to_end": {...}        percentiles are null where count is 0
      },
      "totals": {"requests": 20, "prompt_tokens": 400, "generation_tokens": 900, "preemptions": 0,
                 "prefix_cache_queries": 400, "prefix_cache_hits": 128},   since the server started;
                                          a prompt counts for each of its samples
      "memory": {                         null before the first figures of an engine
        "page_bytes": 16384, "budget_bytes": 1073741824,
        "created_bytes": 655360,          that exist now
        "peak_created_bytes": 655360,
        "token_bytes": 400000,            K and V of all live tokens
        "states": {"live": 0, "shared": 0, "cover": 0, "kept": 0, "stale": 0, "scratch": 0,
                   "pooled": 0}           bytes; each page is in exactly one of them
      },
      "driver": {                         null with memory
        "calls": {"map": {"count": 12, "per_s": 0.5, "seconds": 0.001}, ...},
        "count": 52, "per_s": 0.5, "seconds": 0.004,
        "remaps_avoided": 120,            pages that the next user of a slot adopted in place
        "bytes_returned": 0               went back to the device
      },
      "map": {                            null while the engine does not answer
        "page_bytes": 16384, "slots": 64, "slot_tokens": 512, "pages_per_cell": 1,
        "cells": 32,                      in each row
        "rows": [{"slot": 0, "tokens": 37, "kept": 0, "request": "cmpl-1", "sample": 0,
                  "cells": "2l1c29."}, ...]      only slots with anything mapped, by number
      },
      "requests": [{"id": "cmpl-1", "state": "running", "prompt_tokens": 12, "max_tokens": 64,
                    "samples": 1, "output_tokens": [25], "cached_tokens": 8,
                    "age_s": 0.7, "time_to_first_token_s": 0.02}, ...],    oldest first
      "requests_left_out": 0              beyond the first 100
    }

A row's ``cells`` are pairs of a count and a letter: ``.`` reserved only, ``l`` live, ``s`` shared,
``c`` cover, ``k`` kept, ``x`` stale; a capital letter means recycled, that is mapped there for
another sequence before and adopted in place. ``request`` is null for a free slot, and for one whose
request ended this moment. A request's ``state`` is ``"waiting"``, ``"prefill"`` (it runs and has no
token yet) or ``"running"``; ``time_to_first_token_s`` is null before the first token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Send

from vattn.engine_process.errors import EngineDeadError
from vattn.engine_process.messages import PageRows
from vattn.server.errors import ApiError
from vattn.server.live_snapshot import MAX_CELLS, Rates, encode
from vattn.server.state import ServerState, state_of

MAX_VIEWERS = 32
INTERVAL_S = 0.25
_LONGEST_INTERVAL_S = 60.0
_MAP_TIMEOUT_S = 1.0

router = APIRouter()


@router.get("/live", response_class=StreamingResponse)
async def live(request: Request, interval: float = INTERVAL_S) -> Response:
    """Snapshots as an event stream."""
    if not INTERVAL_S <= interval <= _LONGEST_INTERVAL_S:
        raise ApiError(
            400,
            f"interval={interval:g} must be at least {INTERVAL_S:g} and at most "
            f"{_LONGEST_INTERVAL_S:g} seconds",
            param="interval",
        )
    feed = feed_of(request)
    if feed.viewers >= MAX_VIEWERS:
        raise ApiError(
            503,
            f"{MAX_VIEWERS} viewers watch already; close one, or ask for /live/snapshot",
            type="server_error",
            retry_after_s=5,
        )
    return _Events(
        feed.watch(interval),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


@router.get("/live/snapshot")
async def snapshot(request: Request) -> Response:
    """One snapshot."""
    body = await feed_of(request).snapshot()
    return Response(body, media_type="application/json", headers={"Cache-Control": "no-store"})


def feed_of(request: Request) -> LiveFeed:
    """The feed of the server that serves a request; made when somebody first asks for it."""
    app = request.app
    if not hasattr(app.state, "live_feed"):
        app.state.live_feed = LiveFeed(state_of(request))
    feed: LiveFeed = app.state.live_feed
    return feed


class _Events(StreamingResponse):
    """Closes its events as soon as the viewer is gone, which gives its place to another."""

    async def stream_response(self, send: Send) -> None:
        """See starlette."""
        async with aclosing(cast(AsyncGenerator[bytes, None], self.body_iterator)):
            await super().stream_response(send)


class LiveFeed:
    """Snapshots for all who watch, made once for all of them and only while there are any.

    A viewer that is slow misses snapshots; nothing waits for it and nothing queues up.
    """

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._rates = Rates()
        self._viewers = 0
        self._task: asyncio.Task[None] | None = None
        self._latest = b""
        self._next = asyncio.Event()  # set, and replaced, when there is another snapshot

    @property
    def viewers(self) -> int:
        """How many watch."""
        return self._viewers

    @property
    def is_running(self) -> bool:
        """Whether snapshots are being made."""
        return self._task is not None

    async def snapshot(self) -> bytes:
        """A snapshot of now, as JSON."""
        return encode(self._state, self._rates, await self._pages())

    async def watch(self, interval_s: float) -> AsyncGenerator[bytes, None]:
        """Gives events until the server has drained; the first one comes at once."""
        self._viewers += 1
        try:
            if self._task is None:
                self._task = asyncio.create_task(self._make_all())
            elif self._latest:
                yield b"data: " + self._latest + b"\n\n"
            task = self._task
            sent_s = -interval_s
            while not task.done():
                await self._next.wait()
                if task.done():
                    break
                # Half a tick of grace, or else 0.5 would often mean 0.75.
                if time.monotonic() - sent_s < interval_s - INTERVAL_S / 2:
                    continue
                sent_s = time.monotonic()
                yield b"data: " + self._latest + b"\n\n"
            if not task.cancelled():
                task.result()  # raises what ended it
        finally:
            self._viewers -= 1
            if self._viewers == 0 and self._task is not None:
                self._task.cancel()
                self._task = None
                self._latest = b""

    async def _make_all(self) -> None:
        try:
            while not self._is_over():
                begun_s = time.monotonic()
                self._latest = await self.snapshot()
                self._tell()
                await asyncio.sleep(max(0.0, INTERVAL_S - (time.monotonic() - begun_s)))
        finally:
            # Wakes the viewers, which see that the task is done.
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        event, self._next = self._next, asyncio.Event()
        event.set()

    def _is_over(self) -> bool:
        """An endless response would keep the server from ending."""
        return self._state.draining and not self._state.llm.live_requests()

    async def _pages(self) -> PageRows | None:
        if not self._state.llm.is_ready:
            return None
        try:
            return await asyncio.wait_for(self._state.llm.memory_map(MAX_CELLS), _MAP_TIMEOUT_S)
        except (EngineDeadError, TimeoutError):
            return None
