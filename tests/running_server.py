"""Real servers for tests: uvicorn in a thread, a real port, a real engine process.

At the end of a server nothing may be left: no request, no place in the queue, no page of a request.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import uvloop
from fastapi import FastAPI

from vattn.async_llm import AsyncLLM
from vattn.server.app import build_app
from vattn.server.http import HttpServer, bind, url_of
from vattn.server.settings import ServerSettings
from vattn.server.state import ServerState

EMBEDDED = {"max_num_seqs": 16}
PATIENCE_S = 60.0

T = TypeVar("T")


@dataclass
class RunningServer:
    """A server that runs in a thread of its own."""

    url: str
    settings: ServerSettings
    llm: AsyncLLM
    app: FastAPI
    http: HttpServer
    loop: asyncio.AbstractEventLoop

    @property
    def state(self) -> ServerState:
        state: ServerState = self.app.state.vattn
        return state

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def key(self) -> str:
        return (*self.settings.api_keys, "none")[0]

    def call(self, coroutine: Awaitable[T]) -> T:
        """Runs it on the server's loop."""

        async def run() -> T:
            return await coroutine

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(PATIENCE_S)

    @contextmanager
    def client(self, **options: Any) -> Iterator[openai.OpenAI]:
        """The `openai` package's client. Does not try again by itself."""
        given = {"api_key": self.key, "max_retries": 0, "timeout": PATIENCE_S, **options}
        with openai.OpenAI(base_url=f"{self.url}/v1", **given) as client:
            yield client

    @contextmanager
    def http_client(self, **options: Any) -> Iterator[httpx.Client]:
        """A plain client that knows the server's address and the first key."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.settings.api_keys else {}
        given = {"base_url": self.url, "headers": headers, "timeout": PATIENCE_S, **options}
        with httpx.Client(**given) as client:
            yield client

    def wait_idle(self) -> None:
        """Returns when no request is unfinished, here and in the engine."""
        self.call(asyncio.wait_for(self._idle(), PATIENCE_S))

    def wait_running(self, prompts: int) -> None:
        """Returns when so many prompts are unfinished."""
        self.call(asyncio.wait_for(self._running(prompts), PATIENCE_S))

    async def _running(self, prompts: int) -> None:
        while len(self.llm.live_requests()) != prompts:
            await asyncio.sleep(0)

    async def _idle(self) -> None:
        await self.state.admission.wait_idle()
        while self.llm.live_requests():
            await asyncio.sleep(0.01)
        # The engine tells an end before it tells figures; a question comes after both.
        while True:
            await self.llm.check()
            stats = self.llm.stats()
            if stats is not None and not stats.requests:
                return
            await asyncio.sleep(0.01)


@contextmanager
def paused(llm: AsyncLLM) -> Iterator[None]:
    """Its engine computes nothing meanwhile, so that what runs still does."""
    pid = llm.engine_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def running_server(model: str | Path | None = None, **options: Any) -> Iterator[RunningServer]:
    """A server of a model, by default the embedded one with a context of 512 tokens.

    Args:
        model: as for AsyncLLM.
        options: fields of ServerSettings, and options of AsyncLLM.
    """
    names = {field.name for field in fields(ServerSettings)}
    chosen = {"port": 0, "log_level": "warning"}
    chosen |= {name: options.pop(name) for name in names & options.keys()}
    settings = ServerSettings(**chosen)  # type: ignore[arg-type]
    llm_options: dict[str, Any] = {
        "max_logprobs": settings.max_logprobs,
        **(EMBEDDED if model is None else {}),
        **options,
    }
    ready: threading.Event = threading.Event()
    found: dict[str, Any] = {}

    async def serve() -> None:
        llm = AsyncLLM(model, log_level="warning", **llm_options)
        app = build_app(llm, settings)
        app.state.vattn.metrics.keep_s = 0.0  # tests ask for what they have just done
        http = HttpServer(app, settings)
        sock = bind(settings.host, settings.port)
        url = url_of(sock, settings)
        try:
            await llm.start()
            task = asyncio.ensure_future(http.run_until_stopped(sock))
            listening = asyncio.ensure_future(http.is_listening.wait())
            await asyncio.wait({task, listening}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                await task
                raise RuntimeError("the server ended before it listened")
            loop = asyncio.get_running_loop()
            found["server"] = RunningServer(url, settings, llm, app, http, loop)
            ready.set()
            await task
        finally:
            sock.close()
            await llm.close()

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(serve())
        except BaseException as error:
            found["error"] = error
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="server", daemon=True)
    thread.start()
    ready.wait()
    if "error" in found:
        thread.join()
        raise found["error"]
    server: RunningServer = found["server"]
    try:
        yield server
        if server.llm.is_ready:
            server.wait_idle()
            server.call(server.llm.check())
        server.state.admission.check()
    except BaseException:
        server.http.force_exit = True  # what a failed test left open is not waited for
        raise
    finally:
        server.loop.call_soon_threadsafe(server.http.stop)
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the server does not end"
    if "error" in found:
        raise found["error"]
