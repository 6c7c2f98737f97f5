"""Starts an engine process with its sockets, and leaves nothing of it behind."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import zmq

from vattn.engine_process.messages import Command, News, Stop, decode_news, encode

_log = logging.getLogger(__name__)
ENGINE_MODULE = "vattn.engine_process"
_PREFIX = "vattn-engine-"
_NEW_PREFIX = ".vattn-new-"
# Of a socket's path, with the zero at its end; see unix(7).
_LONGEST_PATH = 107
_NEWS_AT_ONCE = 64
_KILL_TIMEOUT_S = 10.0
# Of libgomp, in turns of a loop: some 50 us, which is longer than from one product of a layer to
# the next. Its own 300,000 are for programs that have the machine to themselves: threads of the
# engine would spin on the cores that its other threads, and we, wait for.
_SPIN_COUNT = 2000


def engine_environment() -> dict[str, str]:
    """The environment of an engine process: ours, unless it is silent about what matters."""
    environment = dict(os.environ)
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(_SPIN_COUNT))
    return environment


class Child:
    """One engine process, its two sockets and their directory. Nothing is shared with the next one.

    It is killed, and all of it removed, when this object is closed or collected, and at the end of
    the interpreter. It ends itself when its standard input does, so also if we are killed.

    Args:
        on_news: called for each message of the engine.

    Raises:
        OSError: there is no memory, no place for a process, no directory.
    """

    def __init__(self, on_news: Callable[[News], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_news = on_news
        self._outbox: deque[bytes] = deque()
        self.ended: asyncio.Future[str] = self._loop.create_future()  # how
        self.exited: asyncio.Future[None] = self._loop.create_future()
        self.news = 0  # messages so far
        self._closed = self._waits_to_send = False
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(_directory())
            context = zmq.Context()
            stack.callback(context.destroy, linger=0)
            self._commands = _bind(context, f"{directory}/commands")
            self._news = _bind(context, f"{directory}/news")
            self.process = _popen(directory)
            stack.callback(_end, self.process)
            self._pidfd = _pidfd(self.process.pid)
            if self._pidfd is not None:
                stack.callback(os.close, self._pidfd)
            self._finish = weakref.finalize(self, stack.pop_all().close)
        self._loop.add_reader(self._news.fileno(), self._read)
        if self._pidfd is not None:
            self._loop.add_reader(self._pidfd, self._on_exit)
        else:
            threading.Thread(
                target=_wait_for_exit,
                args=(self.process.pid, weakref.ref(self), self._loop),
                name="vattn-engine-exit",
                daemon=True,
            ).start()

    def send(self, command: Command) -> None:
        """Sends it as soon as the engine process listens."""
        self.send_encoded(encode(command))

    def send_encoded(self, message: bytes) -> None:
        """As :meth:`send`."""
        if not self._closed:
            self._outbox.append(message)
            self._flush()

    def _flush(self) -> None:
        while self._outbox:
            try:
                self._commands.send(self._outbox[0], zmq.NOBLOCK)
            except zmq.Again:  # it has not connected
                if not self._waits_to_send:
                    self._waits_to_send = True
                    self._loop.add_reader(self._commands.fileno(), self._flush)
                return
            self._outbox.popleft()
        if self._waits_to_send:
            self._waits_to_send = False
            self._loop.remove_reader(self._commands.fileno())

    def _read(self) -> None:
        """Takes messages. The descriptor tells of changes only, so until there are none left."""
        for _ in range(_NEWS_AT_ONCE):
            if self._closed:
                return
            try:
                news = decode_news(self._news.recv(zmq.NOBLOCK))
                self.news += 1
                self._on_news(news)
            except zmq.Again:
                return
            except Exception as error:  # the rest of what it says cannot be trusted either
                _log.exception("news of the engine process %d cannot be taken", self.process.pid)
                self._tell_end(f"sent news that cannot be taken: {type(error).__name__}: {error}")
                return
        self._loop.call_soon(self._read)

    def _on_exit(self) -> None:
        if self._closed or self.exited.done():
            return
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
        self._read()  # its last words
        if not self.exited.done():
            self.exited.set_result(None)
        self._tell_end(_how_it_ended(self.process.pid))

    def _tell_end(self, how: str) -> None:
        if not self.ended.done():
            self.ended.set_result(how)

    async def stop(self, grace_s: float) -> None:
        """Asks it to end, kills it after so many seconds, and removes everything of it."""
        try:
            if grace_s > 0 and not self.exited.done():
                self.send(Stop())
                await asyncio.wait({self.exited}, timeout=grace_s)
            if not self.exited.done():
                _kill(self.process)
                await asyncio.wait({self.exited}, timeout=_KILL_TIMEOUT_S)
        finally:
            self.close()

    def close(self) -> None:
        """Kills it, and removes everything of it; twice is once."""
        if self._closed:
            return
        self._closed = True
        if not self._loop.is_closed():
            self._loop.remove_reader(self._news.fileno())
            if self._waits_to_send:
                self._loop.remove_reader(self._commands.fileno())
            if self._pidfd is not None:
                self._loop.remove_reader(self._pidfd)
        self.ended.cancel()
        self.exited.cancel()
        self._finish()


@contextlib.contextmanager
def _directory() -> Iterator[str]:
    """A directory for sockets that only we can enter; it is locked as long as we live."""
    room = _LONGEST_PATH - len(f"/{_PREFIX}{os.getpid()}-12345678/commands")
    bases = [tempfile.gettempdir(), "/tmp"]
    base = next((base for base in bases if len(os.fsencode(base)) <= room), None)
    if base is None or not os.access(base, os.W_OK):
        raise OSError(
            f"no directory for sockets: {bases[0]} is too long for their paths, and {bases[1]} "
            "cannot be written; set TMPDIR to a shorter path"
        )
    remove_stale(base)
    made = tempfile.mkdtemp(prefix=f"{_NEW_PREFIX}{os.getpid()}-", dir=base)
    path = made.replace(_NEW_PREFIX, _PREFIX)
    lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Locked before it has its name: who finds the name without a lock finds a dead owner.
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(made, path)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def remove_stale(base: str) -> None:
    """Removes directories whose owners are dead, and whose engine processes died with them."""
    for path in Path(base).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _bind(context: zmq.Context[zmq.Socket[bytes]], path: str) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.PAIR)
    socket.sndhwm = socket.rcvhwm = socket.linger = 0
    socket.bind(f"ipc://{path}")
    return socket


def _popen(directory: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", ENGINE_MODULE, "--directory", directory]
    command += ["--commands", f"ipc://{directory}/commands", "--news", f"ipc://{directory}/news"]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        env=engine_environment(),
        start_new_session=True,  # the terminal's Ctrl-C is for us to act on
    )


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):  # an old kernel, or a sandbox
        return None


def _wait_for_exit(pid: int, child: weakref.ref[Child], loop: asyncio.AbstractEventLoop) -> None:
    """In a thread of its own, where there is no descriptor to watch."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    living = child()
    if living is not None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(living._on_exit)


def _how_it_ended(pid: int) -> str:
    """In words, without reaping it."""
    try:
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return "ended"
    if end is None:
        return "ended"
    if end.si_code == os.CLD_EXITED:
        return f"exited with status {end.si_status}"
    return f"was killed by {signal.Signals(end.si_status).name}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills it and what it has started. It is not reaped yet, so its number is still its own."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()


def _end(process: subprocess.Popen[bytes]) -> None:
    _kill(process)
    assert process.stdin is not None
    process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_KILL_TIMEOUT_S)
