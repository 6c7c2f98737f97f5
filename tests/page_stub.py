"""A server that only looks like ours: the page's router, and snapshots that a test chooses."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from vattn.server.errors import ApiError
from vattn.server.page import router
from vattn.server.settings import ServerSettings

_MIB = 1 << 20
_PERCENTILES = {"count": 12, "p50": 0.012, "p90": 0.03, "p99": 0.05}
_ROWS = [
    (0, 410, 0, "cmpl-7f3a90", "16s9L1c6."),
    (1, 300, 0, "cmpl-7f3a91", "16s2l1C13."),
    (2, 96, 0, "chatcmpl-04", "6l26."),
    (5, 0, 128, None, "8k24."),
    (6, 0, 0, None, "5x27."),
    (9, 20, 0, "<img src=x onerror=alert(1)>", "2L1C29."),
]


def snapshot() -> dict[str, Any]:
    """A server that is busy with four requests; two of them share a prefix."""
    rows = [
        {"slot": s, "tokens": t, "kept": k, "request": r, "sample": 0, "cells": c}
        for s, t, k, r, c in _ROWS
    ]
    requests = [
        {"id": r, "state": "running", "prompt_tokens": 256, "max_tokens": 256, "samples": 1}
        | {"output_tokens": [t // 4], "cached_tokens": 128, "age_s": 2.5}
        | {"time_to_first_token_s": 0.02}
        for _, t, _, r, _ in _ROWS
        if r
    ]
    waiting = {"id": "cmpl-waiting", "state": "waiting", "output_tokens": [0, 0], "samples": 2}
    requests.append({**requests[0], **waiting, "time_to_first_token_s": None})
    calls = {"map": {"count": 40, "per_s": 2.0, "seconds": 0.002}}
    states = {"live": 10, "shared": 16, "cover": 3, "kept": 8, "stale": 5, "scratch": 1}
    return {
        "version": 1,
        "time": 0.0,
        "uptime_s": 1.0,
        "model": "stub",
        "engine": {"state": "up", "restarts": 0, "error": None, "dtype": "float32"}
        | {"device": "cpu", "attention_backend": "sdpa", "max_model_len": 512, "max_num_seqs": 64},
        "queue": {"running": 4, "waiting": 2, "max_waiting": 2048},
        "throughput": {"prompt_tokens_per_s": 100.0, "generation_tokens_per_s": 93.5}
        | {"steps_per_s": 31.0, "requests_per_s": 1.5},
        "latency": dict.fromkeys(("time_to_first_token", "inter_token"), _PERCENTILES),
        "memory": {"page_bytes": 16384, "budget_bytes": 64 * _MIB, "created_bytes": 45 * _MIB}
        | {"peak_created_bytes": 48 * _MIB, "token_bytes": 1}
        | {"states": {name: n * _MIB for name, n in states.items()} | {"pooled": 2 * _MIB}},
        "driver": {"calls": calls, "count": 40, "per_s": 2.0, "seconds": 0.002}
        | {"remaps_avoided": 120, "bytes_returned": 0},
        "map": {"page_bytes": 16384, "slots": 64, "slot_tokens": 512, "pages_per_cell": 1}
        | {"cells": 32, "rows": rows},
        "requests": requests,
        "requests_left_out": 0,
    }


class Stub:
    """What it sends and asks for is a test's to set, at any time.

    Args:
        port: where it listens.
    """

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/"
        self.snapshot: dict[str, Any] = snapshot()
        self.key = ""
        self.refuse: int | None = None  # status of new streams
        self.cut = 0  # streams older than this one end
        self.streams = 0
        self.app = FastAPI()
        self.app.include_router(router)
        self.settings = ServerSettings()
        self.app.state.vattn = SimpleNamespace(settings=self.settings)
        self.app.add_exception_handler(ApiError, _told)
        self.app.get("/live")(self._live)
        self.app.post("/v1/completions")(self._complete)

    async def _live(self, request: Request) -> Response:
        if self.refuse is not None:
            return JSONResponse({"error": {"message": "too many viewers"}}, self.refuse)
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "the key is wrong"}}, 401)
        self.streams += 1
        return StreamingResponse(self._events(self.streams), media_type="text/event-stream")

    async def _events(self, number: int) -> AsyncGenerator[str, None]:
        at = 1.7e9
        while number > self.cut:
            data = copy.deepcopy(self.snapshot)
            for i in range(60 if at == 1.7e9 else 1):  # a past, so that charts have something
                at += 1
                data["time"] = at
                data["throughput"]["generation_tokens_per_s"] = 90.0 + 37 * i % 50
                yield f"data: {json.dumps(data)}\n\n"
            await asyncio.sleep(0.05)

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        error = {"error": {"message": f"prompt {body['prompt']!r} is refused"}}
        return JSONResponse(error, 429, {"Retry-After": "3"})


async def _told(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status)


@contextlib.contextmanager
def stub_server() -> Iterator[Stub]:
    """Serves on a free port until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stub = Stub(listener.getsockname()[1])
        config = uvicorn.Config(
            stub.app, log_level="warning", timeout_graceful_shutdown=5, ws="none", lifespan="off"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield stub
        finally:
            stub.cut = 1 << 30
            server.should_exit = True
            thread.join()
