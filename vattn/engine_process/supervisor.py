"""Keeps one engine process up: starts it, watches it, and replaces it when it dies or hangs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from vattn.engine_process.errors import EngineDeadError
from vattn.engine_process.messages import Facts, News, Ready, Start, StartFailed, encode
from vattn.engine_process.spawn import Child

_log = logging.getLogger(__name__)
MAX_FAILED_STARTS = 5
_MAX_DELAY_S = 30.0
_SETTLED_S = 30.0  # one that lived so long after it was ready is replaced without delay
_IDLE_TIMEOUT_S = 30.0  # an engine with nothing to do tells its figures every second
_STOP_S = 5.0
_LAST_WORDS_S = 1.0


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
        self._command = encode(command)
        self._restart = restart
        self._engine_timeout_s = engine_timeout_s
        self._start_timeout_s = start_timeout_s
        self._on_news = on_news
        self._on_death = on_death
        self._is_busy = is_busy
        self._task: asyncio.Task[None] | None = None
        self._first: asyncio.Future[None] | None = None  # how the first start went
        self._began: asyncio.Future[Ready | StartFailed] | None = None  # of the present child
        self._dead = asyncio.Event()  # for good
        self._closing = False
        self._failed = self._deaths = 0  # starts, and lives that were short, one after another
        self.child: Child | None = None
        self.facts: Facts | None = None
        self.is_ready = False
        self.restarts = 0
        self.last_error: EngineDeadError | None = None

    async def start(self) -> None:
        """Returns when the engine serves; see :meth:`vattn.AsyncLLM.start`."""
        if self._task is None or self._task.done():
            loop = asyncio.get_running_loop()
            self._closing = False
            self._failed = self._deaths = 0
            self._dead.clear()
            self._first = loop.create_future()
            self._task = loop.create_task(self._keep_up(self._first), name="vattn-supervisor")
        assert self._first is not None
        try:
            await asyncio.shield(self._first)
        except asyncio.CancelledError:
            if not self._first.done():
                await self.close()
            raise

    async def close(self) -> None:
        """Ends the engine process, also while it starts; twice is once."""
        self._closing = True
        closed = EngineDeadError("the engine was closed", restarting=False)
        self._down(closed)
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})
        self._give_up(closed)

    async def wait_for_failure(self) -> EngineDeadError:
        """See :meth:`vattn.AsyncLLM.wait_for_failure`."""
        await self._dead.wait()
        assert self.last_error is not None
        return self.last_error

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

    async def _keep_up(self, first: asyncio.Future[None]) -> None:
        try:
            while True:
                await self._life(first)
                assert self.last_error is not None
                if not self.last_error.restarting:
                    break
                await asyncio.sleep(self._delay_s())
            self._give_up(self.last_error)
        except asyncio.CancelledError:  # by close(), or by the end of the loop
            self._give_up(EngineDeadError("the engine was closed", restarting=False))
            raise
        except Exception as problem:  # a bug, which must not leave anybody waiting
            _log.exception("the engine process is not watched any more")
            self._give_up(EngineDeadError(f"it is not watched: {problem}", restarting=False))

    async def _life(self, first: asyncio.Future[None]) -> None:
        """Of one engine process, from its start to its end, which is told to everybody."""
        loop = asyncio.get_running_loop()
        self._began = loop.create_future()
        try:
            child = self.child = Child(self._take)
        except OSError as error:
            self._died(f"the engine process cannot be started: {error}", first)
            return
        grace_s = 0.0
        try:
            child.send_encoded(self._command)
            failure = await self._until_ready(child, self._began)
            if failure is not None:
                self._died(failure, first)
                return
            grace_s = _STOP_S
            self._up(first)
            ready_s = loop.time()
            how = await self._until_dead(child)
            grace_s = 0.0
            if loop.time() - ready_s >= _SETTLED_S:
                self._deaths = 0
            self._died(f"the engine process {child.process.pid} {how}", first)
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
        if isinstance(news, Ready | StartFailed):
            assert self._began is not None
            if not self._began.done():
                self._began.set_result(news)
        else:
            self._on_news(news)

    # What its ends mean ---------------------------------------------------------------------------

    def _up(self, first: asyncio.Future[None]) -> None:
        self._failed = 0
        self.is_ready = True
        if first.done():
            self.restarts += 1
        else:
            first.set_result(None)

    def _died(self, failure: str | StartFailed, first: asyncio.Future[None]) -> None:
        """Decides whether another one is started, and tells everybody."""
        is_input = isinstance(failure, StartFailed) and failure.is_input
        text = failure.error if isinstance(failure, StartFailed) else failure
        self._failed += not self.is_ready
        again = self._restart and first.done() and not is_input
        if again and self._failed >= MAX_FAILED_STARTS:
            again = False
            text = f"{text} ({self._failed} starts failed one after another)"
        self._deaths += 1
        error = EngineDeadError(text, restarting=again)
        _log.error("%s; %s", text, "another one is started" if again else "this is the end")
        if is_input and not first.done():
            first.set_exception(ValueError(text))
        self._down(error)

    def _down(self, error: EngineDeadError) -> None:
        self.is_ready = False
        self.last_error = error
        self._on_death(error)

    def _give_up(self, error: EngineDeadError) -> None:
        self._down(error)
        self._dead.set()
        if self._first is not None and not self._first.done():
            self._first.set_exception(error)
        if self._first is not None and not self._first.cancelled():
            self._first.exception()  # it need not be awaited by anybody

    def _delay_s(self) -> float:
        """0 before the first restart, then longer and longer."""
        return min(_MAX_DELAY_S, 2.0 ** (self._deaths - 2)) if self._deaths > 1 else 0.0
