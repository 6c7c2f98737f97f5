"""Runs a server from its first log line to its exit code: start, serve, drain, end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from typing import Self

import uvloop

from vattn.async_llm import AsyncLLM
from vattn.engine_process.errors import EngineDeadError
from vattn.server.app import build_app
from vattn.server.http import HttpServer, bind, url_of
from vattn.server.settings import ServerSettings
from vattn.server.state import ServerState

logger = logging.getLogger("vattn.server")

_ABORT_S = 10.0  # for aborted requests to tell their clients what they have


class Signals:
    """SIGTERM and SIGINT while it is entered: the first one drains, the second one ends at once."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._come, number)
        return self

    def __exit__(self, *exc: object) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    def _come(self, number: int) -> None:
        again = self.first.is_set()
        what = "ending at once" if again else "shutting down; once more ends at once"
        logger.warning("%s: %s", signal.Signals(number).name, what)
        (self.second if again else self.first).set()


def serve(
    make_llm: Callable[[], AsyncLLM],
    settings: ServerSettings,
    told: Callable[[str, AsyncLLM], None] | None = None,
) -> int:
    """Serves until SIGTERM or SIGINT; blocks.

    On the first signal ``/health`` turns 503, new requests get 503, and running ones have
    ``drain_timeout_s`` to end; then they end with what they have.

    Args:
        make_llm: makes the engine, on the loop that it will be used on.
        settings: of the server.
        told: called with the server's URL and the engine when it serves.

    Returns:
        The exit code: 0, or 1 if the engine is dead for good.

    Raises:
        AddressError: the address cannot be had; before any model is loaded.
        ValueError: the model or the settings are at fault.
        EngineDeadError: the engine does not start.
    """
    sock = bind(settings.host, settings.port)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(make_llm, settings, sock, told))
    finally:
        sock.close()


async def _serve(
    make_llm: Callable[[], AsyncLLM],
    settings: ServerSettings,
    sock: socket.socket,
    told: Callable[[str, AsyncLLM], None] | None,
) -> int:
    with Signals() as signals:
        llm = make_llm()
        try:
            if not await _start(llm, signals):
                return 0
            app = build_app(llm, settings)
            http = HttpServer(app, settings)
            serving = asyncio.create_task(http.run_until_stopped(sock))
            listening = asyncio.create_task(http.is_listening.wait())
            await _first_of(serving, listening)
            if serving.done():
                await serving
                return 1
            if told is not None:
                told(url_of(sock, settings), llm)
            code = await _until_end(app.state.vattn, signals, serving)
            http.stop()
            if signals.second.is_set():
                http.force_exit = True
            await serving
            return code
        finally:
            await llm.close()


async def _start(llm: AsyncLLM, signals: Signals) -> bool:
    """Starts the engine; False if a signal came first."""
    starting = asyncio.create_task(llm.start())
    stopped = asyncio.create_task(signals.first.wait())
    try:
        await _first_of(starting, stopped)
    finally:
        stopped.cancel()
    if starting.done():
        await starting
        return True
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    return False


async def _until_end(state: ServerState, signals: Signals, serving: asyncio.Task[None]) -> int:
    """Returns the exit code when there is nothing more to serve."""
    failing = asyncio.create_task(state.llm.wait_for_failure())
    signalled = asyncio.create_task(signals.first.wait())
    try:
        await _first_of(failing, signalled, serving)
        if failing.done():
            logger.error("the engine is dead for good: %s", await failing)
            return 1
        state.draining = True
        state.admission.drain()
        await _drain(state, signals, failing)
    finally:
        failing.cancel()
        signalled.cancel()
    return 0


async def _drain(
    state: ServerState, signals: Signals, failing: asyncio.Task[EngineDeadError]
) -> None:
    """Lets what runs end, for a while; then ends it."""
    idle = asyncio.create_task(state.admission.wait_idle())
    hurried = asyncio.create_task(signals.second.wait())
    try:
        running, timeout = state.admission.samples, state.settings.drain_timeout_s
        if running:
            logger.info("waiting up to %g s for %d prompts that are unfinished", timeout, running)
        await _first_of(idle, hurried, failing, timeout=timeout)
        if not idle.done():
            left = [request.request_id for request in state.llm.live_requests()]
            logger.warning("%d prompts end with what they have", len(left))
            await state.llm.abort(left)
            await _first_of(idle, hurried, failing, timeout=_ABORT_S)
    finally:
        idle.cancel()
        hurried.cancel()


async def _first_of(*tasks: asyncio.Task[object], timeout: float | None = None) -> None:
    await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
