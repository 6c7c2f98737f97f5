"""uvicorn as a part of a program: a socket of its own, no signals, an end in bounded time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from vattn.server.protocol import PatientProtocol
from vattn.server.settings import ServerSettings

BACKLOG = 2048
_KEEP_ALIVE_S = 75  # longer than the 60 s of common proxies, which would meet closed connections
_LAST_WORDS_S = 2.0  # for responses that are still being sent when the server ends


class AddressError(OSError):
    """The address is taken, or not of this machine."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that has its address, but takes no connections yet.

    Raises:
        AddressError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(socket.socket(family, kind, protocol))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            stack.pop_all()
    except OSError as error:
        raise AddressError(*error.args) from error
    return sock


def url_of(sock: socket.socket, settings: ServerSettings) -> str:
    """Where a client on this machine finds the server."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "https" if settings.ssl_certfile else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class HttpServer(uvicorn.Server):
    """Serves an application until :meth:`stop`.

    ::

        server = HttpServer(app, settings)
        await server.run_until_stopped(bind(host, port))
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        protocol = type("Protocol", (PatientProtocol,), {"receive_s": settings.body_timeout_s})
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=10,
                backlog=BACKLOG,
                ssl_keyfile=settings.ssl_keyfile,
                ssl_certfile=settings.ssl_certfile,
            )
        )
        self.is_listening = asyncio.Event()

    async def run_until_stopped(self, sock: socket.socket) -> None:
        """Listens on a bound socket, and closes it in the end."""
        with contextlib.closing(sock):
            try:
                await self.serve(sockets=[sock])
            except OSError as error:
                if self.started:
                    raise
                raise AddressError(*error.args) from error  # another program took it meanwhile

    def stop(self) -> None:
        """Takes no more connections; what is being sent may end."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        self.is_listening.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends what goes on for ever, such as the live page's stream, as if its client had left."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(_LAST_WORDS_S, self._cut)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are for the program."""
        yield

    def _cut(self) -> None:
        for connection in list(self.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()
