"""Keeps one engine process up: starts it, watches it, and replaces it when it dies or hangs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

import msgspec

from vattn.engine_process.errors import EngineDeadError
from vattn.engine_process.messages import Facts, News, Ready, Start, StartFailed
from vattn.engine_process.spawn import Child

_log = logging.getLogger(__name__)
MAX_FAILED_STARTS = 5
_MAX_DELAY_S = 30.0
_SETTLED_S = 30.0  # one that lived so long after it was ready is replaced without delay
_IDLE_TIMEOUT_S = 30.0  # an engine with nothing to do tells its figures every second
_STOP_S = 5.0
_LAST_WORDS_S = 1.0


class State(Enum):
    """Of an engine that is kept up."""

    DOWN = auto()  # not started, closed, or dead for good
    STARTING = auto()  # its first process
    UP = auto()
    RESTARTING = auto()


class Supervisor:
    """See the module.

    Args:
        command: what the engine is to be made of.
        restart: replace one that dies.
        engine_timeout_s: without news for so long, while it is busy, it counts as hung.
        start_timeout_s: until it is ready.
        on_news: called for each message but those of its start.
        on_death: called at once when it dies, and when it is closed.
        is_busy: whether news are due.
    """

    def __init__(
        self,
        command: Start,
        *,
        restart: bool,
        engine_timeout_s: float | None,
        start_timeout_s: float,
        on_news: Callable[[News], None],
        on_death: Callable[[EngineDeadError], None],
        is_busy: Callable[[], bool],
    ) -> None:
        self._command = command
        self._restart = restart
        self._engine_timeout_s = engine_timeout_s
        self._start_timeout_s = start_timeout_s
        self._on_news = on_news
        self._on_death = on_death
        self._is_busy = is_busy
        self._state = State.DOWN
        self._task: asyncio.Task[None] | None = None
        self._serving: asyncio.Future[None]  # done when it is up, fails when it is dead for good
        self._began: asyncio.Future[Ready | StartFailed]  # of the present child
        self._dead = asyncio.Event()  # for good
        self._ending = asyncio.Lock()  # one process has gone before another one comes
        self._waiting = 0  # for start()
        self._hears = False  # the present child, which has not died
        self._failed = self._deaths = 0  # starts, and lives that were short, one after another
        self.child: Child | None = None
        self.facts: Facts | None = None
        self.restarts = 0
        self.last_error: EngineDeadError | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the engine serves."""
        return self._state is State.UP

    async def start(self) -> None:
        """Returns when the engine serves; see :meth:`vattn.AsyncLLM.start`."""
        self._waiting += 1
        try:
            async with self._ending:
                if self._state is State.DOWN:
                    if self._task is not None:
                        await asyncio.wait({self._task})
                    self._begin()
            await asyncio.shield(self._serving)
        except asyncio.CancelledError:
            if self._state is State.STARTING and self._waiting == 1:
                await self.close()
            raise
        finally:
            self._waiting -= 1

    async def close(self) -> None:
        """Ends the engine process, also while it starts; twice is once."""
        async with self._ending:
            if not self._dead.is_set():
                self._finish(EngineDeadError("the engine was closed", restarting=False))
            if self._task is not None and not self._task.done():
                self._task.cancel()
                await asyncio.wait({self._task})

    async def wait_for_failure(self) -> EngineDeadError:
        """See :meth:`vattn.AsyncLLM.wait_for_failure`."""
        await self._dead.wait()
        assert self.last_error is not None
        return self.last_error

    def keep_budget(self, budget_bytes: int) -> None:
        """Has those that replace the engine process begin with this budget."""
        self._command = msgspec.structs.replace(self._command, budget_bytes=budget_bytes)

    def send(self, message: bytes) -> None:
        """Sends an encoded command.

        Raises:
            EngineDeadError: the engine is not up.
        """
        self.check_ready()
        assert self.child is not None
        self.child.send_encoded(message)

    def check_ready(self) -> None:
        """Raises EngineDeadError unless the engine serves."""
        if self.is_ready:
            return
        if self.last_error is None:
            raise EngineDeadError("the engine is not up; await start() first")
        raise EngineDeadError(str(self.last_error), restarting=self.last_error.restarting)

    # One life after another -----------------------------------------------------------------------

    def _begin(self) -> None:
        loop = asyncio.get_running_loop()
        self._state = State.STARTING
        self._failed = self._deaths = 0
        self._dead.clear()
        self._serving = loop.create_future()
        self._task = loop.create_task(self._keep_up(), name="vattn-supervisor")

    async def _keep_up(self) -> None:
        try:
            await self._life()
            while self._state is State.RESTARTING:
                await asyncio.sleep(self._delay_s())
                await self._life()
        except asyncio.CancelledError:
            self._loop_ends()
            raise
        except Exception as problem:  # a bug, which must not leave anybody waiting
            _log.exception("the engine process is not watched any more")
            self._finish(EngineDeadError(f"it is not watched: {problem}", restarting=False))

    async def _life(self) -> None:
        """Of one engine process, from its start to its end, which is told to everybody."""
        loop = asyncio.get_running_loop()
        self._began = loop.create_future()
        try:
            self._hears = True
            child = self.child = Child(self._take)
        except OSError as error:
            self._died(f"the engine process cannot be started: {error}")
            return
        grace_s = 0.0
        try:
            child.send(self._command)
            failure = await self._until_ready(child, self._began)
            if failure is not None:
                self._died(failure)
                return
            grace_s = _STOP_S
            self._up()
            ready_s = loop.time()
            how = await self._until_dead(child)
            grace_s = 0.0
            if loop.time() - ready_s >= _SETTLED_S:
                self._deaths = 0
            self._died(f"the engine process {child.process.pid} {how}")
        except asyncio.CancelledError:
            self._loop_ends()  # before there is no child
            raise
        finally:
            self.child = None
            await child.stop(grace_s)

    async def _until_ready(
        self, child: Child, began: asyncio.Future[Ready | StartFailed]
    ) -> str | StartFailed | None:
        """What went wrong; None if it serves."""
        either: set[asyncio.Future[Any]] = {began, child.ended}
        await asyncio.wait(
            either,
            timeout=self._start_timeout_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if child.ended.done() and not began.done():
            # What it said last may still be on its way through the socket.
            await asyncio.wait({began}, timeout=_LAST_WORDS_S)
        if not began.done():
            how = f"was not ready after start_timeout_s={self._start_timeout_s:g}"
            if child.ended.done():
                how = f"{child.ended.result()} while it started; what it printed says why"
            return f"the engine process {child.process.pid} {how}"
        outcome = began.result()
        if isinstance(outcome, StartFailed):
            return outcome
        self.facts = outcome.facts
        return None

    async def _until_dead(self, child: Child) -> str:
        """How it died, or was found to hang."""
        limit_s = self._engine_timeout_s
        if limit_s is None:
            return await asyncio.shield(child.ended)
        tick_s = min(1.0, limit_s / 4)
        loop = asyncio.get_running_loop()
        heard, silent_s, last_s = child.news, 0.0, loop.time()
        while True:
            await asyncio.wait({child.ended}, timeout=tick_s)
            if child.ended.done():
                return child.ended.result()
            now_s = loop.time()
            # If it was this process that stood still, the engine's news have not been read yet.
            silent_s += min(now_s - last_s, 2 * tick_s)
            last_s = now_s
            if child.news != heard:
                heard, silent_s = child.news, 0.0
            allowed_s = limit_s if self._is_busy() else max(limit_s, _IDLE_TIMEOUT_S)
            if silent_s >= allowed_s:
                return f"said nothing for {silent_s:.1f} s (engine_timeout_s={limit_s:g})"

    def _take(self, news: News) -> None:
        if not self._hears:  # what a dead one had said; it would pass for the next one's
            return
        if isinstance(news, Ready | StartFailed):
            if not self._began.done():
                self._began.set_result(news)
                # Before its first figures, which are known by this number.
                self.restarts += isinstance(news, Ready) and self._state is State.RESTARTING
        else:
            self._on_news(news)

    # What its ends mean ---------------------------------------------------------------------------

    def _up(self) -> None:
        self._failed = 0
        self._state = State.UP
        self._serving.set_result(None)

    def _died(self, failure: str | StartFailed) -> None:
        """Decides whether another one is started, and tells everybody."""
        self._hears = False
        text = failure.error if isinstance(failure, StartFailed) else failure
        self._deaths += 1
        self._failed += self._state is not State.UP
        # What the settings were good for once they are good for again, whatever it says.
        again = self._restart and self._state is not State.STARTING
        if again and self._failed >= MAX_FAILED_STARTS:
            again = False
            text = f"{text} ({self._failed} starts failed one after another)"
        _log.error("%s; %s", text, "another one is started" if again else "this is the end")
        error = EngineDeadError(text, restarting=again)
        if not again:
            is_input = isinstance(failure, StartFailed) and failure.is_input
            is_theirs = is_input and self._state is State.STARTING
            self._finish(error, ValueError(text) if is_theirs else error)
            return
        if self._state is State.UP:
            self._serving = asyncio.get_running_loop().create_future()
        self._state = State.RESTARTING
        self.last_error = error
        self._on_death(error)

    def _finish(self, error: EngineDeadError, told: Exception | None = None) -> None:
        """It is dead for good, which whoever waits for its start is told in their words."""
        self._hears = False
        starts = self._state in (State.STARTING, State.RESTARTING)
        self._state = State.DOWN
        self.last_error = error
        self._dead.set()
        if starts:
            self._serving.set_exception(told or error)
            self._serving.exception()  # it need not be awaited by anybody
        self._on_death(error)

    def _loop_ends(self) -> None:
        """It may be cancelled by the end of the loop, and not by :meth:`close`."""
        if self._state is not State.DOWN:
            self._finish(EngineDeadError("the engine was closed", restarting=False))

    def _delay_s(self) -> float:
        """0 before the first restart, then longer and longer."""
        return min(_MAX_DELAY_S, 2.0 ** min(self._deaths - 2, 9)) if self._deaths > 1 else 0.0
