"""Takes in what the owner says, beside the steps: commands become requests, aborts, questions."""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import Any, Self

import zmq

from vattn.engine.engine import Engine
from vattn.engine_process.loop import Loop
from vattn.engine_process.messages import (
    Abort,
    Add,
    Ask,
    End,
    Progress,
    Refused,
    Start,
    Stop,
    decode_command,
)
from vattn.engine_process.params import from_wire
from vattn.outputs import Timings
from vattn.request import FinishReason
from vattn.sampling_params import SamplingParams

_log = logging.getLogger(__name__)


_POLL_MS = 200
_AT_ONCE_S = 1e-6


class CommandReader:
    """Reads commands on a thread of its own while it is entered, or until Stop.

    Grammars may take seconds to compile, which happens on another thread, so that nobody else waits
    for one.

    Args:
        commands: the socket; the thread's own while it is entered.
        engine: takes the requests.
        loop: of the engine; tells the owner.
    """

    def __init__(self, commands: zmq.Socket[bytes], engine: Engine, loop: Loop) -> None:
        self._commands = commands
        self._engine = engine
        self._loop = loop
        self._lock = threading.Lock()
        # By handle; commands, their samples, when they came.
        self._compiling: dict[int, tuple[Add, int, float]] = {}
        self._to_compile: queue.SimpleQueue[tuple[Add, SamplingParams] | None] = queue.SimpleQueue()
        self._closing = False
        self._reader = threading.Thread(target=self._read, name="vattn-commands", daemon=True)
        self._compiler = threading.Thread(target=self._compile, name="vattn-grammars", daemon=True)

    def __enter__(self) -> Self:
        self._reader.start()
        self._compiler.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing = True
        self._to_compile.put(None)  # nobody waits for a grammar
        self._reader.join()

    def _read(self) -> None:
        try:
            while not self._closing:
                if self._commands.poll(_POLL_MS) and not self._take(
                    decode_command(self._commands.recv())
                ):
                    return
                if self._compiling:
                    self._end_late()
        except Exception as error:  # nothing can be understood from here on
            _log.exception("a command cannot be read")
            self._loop.fail(error)

    def _take(self, command: Any) -> bool:
        """False for the last one."""
        match command:
            case Add():
                self._add(command)
            case Abort():
                for handle in command.handles:
                    self._abort(handle)
            case Ask():
                self._loop.ask(command)
            case Stop():
                self._loop.stop()
                return False
            case Start():
                raise TypeError("a second Start")
        return True

    def _add(self, command: Add) -> None:
        try:
            params = from_wire(command.params)
        except (ValueError, TypeError) as error:
            self._loop.tell(Refused(command.handle, str(error)))
            return
        if params.structured_outputs is None:
            self._make(command, params)
            return
        with self._lock:
            self._compiling[command.handle] = command, params.n, time.monotonic()
        self._to_compile.put((command, params))

    def _compile(self) -> None:
        while (asked := self._to_compile.get()) is not None and not self._closing:
            if asked[0].handle in self._compiling:  # has not ended
                self._make(*asked, compiles=True)

    def _make(self, command: Add, params: SamplingParams, *, compiles: bool = False) -> None:
        handle = command.handle
        # Unique, and tells who it is in a log.
        name = f"{command.name}#{handle}"
        error = timeout_s = None
        if command.deadline_s is not None:
            # One that is late ends in the next step, as others do.
            timeout_s = max(_AT_ONCE_S, command.deadline_s - time.monotonic())
        try:
            requests = self._engine.make_requests(
                name,
                command.prompt_ids,
                params,
                priority=command.priority,
                cache_salt=command.cache_salt,
                timeout_s=timeout_s,
            )
        except Exception as refused:  # whatever it is, it is of this prompt only
            error = refused
            if not isinstance(refused, ValueError | TypeError):
                _log.exception("prompt %s cannot be taken in", command.name)
        with self._lock:
            if compiles and self._compiling.pop(handle, None) is None:
                return  # ended, and told
            if error is None:
                self._loop.add(handle, name, requests)
        if error is not None:
            known = isinstance(error, ValueError | TypeError)
            text = str(error) if known else f"{type(error).__name__}: {error}"
            self._loop.tell(Refused(handle, text))

    def _abort(self, handle: int) -> None:
        with self._lock:
            waits = handle in self._compiling
            if not waits:
                self._loop.abort(handle)
        if waits:
            self._end(handle, FinishReason.ABORT)

    def _end_late(self) -> None:
        """Ends those whose time is over before their grammars are compiled."""
        with self._lock:
            now_s = time.monotonic()
            late = [
                handle
                for handle, (add, *_) in self._compiling.items()
                if add.deadline_s is not None and add.deadline_s <= now_s
            ]
        for handle in late:
            self._end(handle, FinishReason.DEADLINE)

    def _end(self, handle: int, reason: FinishReason) -> None:
        with self._lock:
            _, samples, arrival_s = self._compiling.pop(handle, (None, 0, 0.0))
        timings = Timings(arrival_s, finished_s=time.monotonic())
        for index in range(samples):
            end = End(reason.value, None, None, timings, None)
            self._loop.tell(Progress(handle, index, [], end=end))
