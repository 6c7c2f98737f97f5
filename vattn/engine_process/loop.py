"""The engine's steps, and what is told of each, on the main thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vattn.engine.engine import Engine
from vattn.engine_process.answers import Answers
from vattn.engine_process.messages import Ask, News, Progress, Stats, Steps, encode
from vattn.engine_process.told import Told
from vattn.request import Request, Status

BUSY_STATS_S = 0.25
IDLE_STATS_S = 1.0
_MOST_REQUESTS = 256


class Loop:
    """Runs the engine. All but :meth:`run` may be called from any thread.

    Args:
        engine: nobody else steps it.
        send: one encoded message to the owner; called by the thread of :meth:`run` only.
    """

    def __init__(self, engine: Engine, send: Callable[[bytes], object]) -> None:
        self._engine = engine
        self._send = send
        self._wake = threading.Event()
        self._told: dict[Request, Told] = {}  # unfinished samples
        self._names: dict[int, tuple[str, int]] = {}  # of unfinished prompts, and their samples
        self._asked: deque[Ask] = deque()
        self._to_tell: deque[News | Progress] = deque()
        self._stopping = False
        self._failure: BaseException | None = None
        self._step_seconds, self._step_tokens = 0.0, 0
        self._stats_due_s = 0.0
        self._answers = Answers(engine, self._owners, self._stats)

    # From any thread ------------------------------------------------------------------------------

    def add(self, handle: int, name: str, requests: Sequence[Request]) -> None:
        """Samples of a prompt, whose tokens and ends will be told."""
        self._names[handle] = (name, len(requests))
        for request in requests:
            self._told[request] = Told(handle, request)
            self._engine.add(request)
        self._wake.set()

    def abort(self, handle: int) -> None:
        """Ends a prompt; nothing if it has ended, or is not known."""
        if (known := self._names.get(handle)) is not None:
            self._engine.abort(known[0])
            self._wake.set()

    def ask(self, question: Ask) -> None:
        """Has a question answered between two steps."""
        self._asked.append(question)
        self._wake.set()

    def tell(self, news: News | Progress) -> None:
        """Has something told between two steps."""
        self._to_tell.append(news)
        self._wake.set()

    def stop(self) -> None:
        """Has :meth:`run` return."""
        self._stopping = True
        self._wake.set()

    def fail(self, error: BaseException) -> None:
        """Has :meth:`run` raise."""
        self._failure = error
        self.stop()

    # The loop -------------------------------------------------------------------------------------

    def run(self) -> None:
        """Steps while there is something to do, and waits when there is not, until :meth:`stop`.

        Raises:
            Exception: what a step failed with; all requests are lost.
        """
        engine, busy = self._engine, True
        while not self._stopping:
            if self._to_tell or self._asked:
                self._between_steps()
            if engine.has_unfinished:
                if not busy:  # idle figures are no longer of use
                    self._stats_due_s -= IDLE_STATS_S - BUSY_STATS_S
                self._step()
                busy = True
                continue
            now = time.monotonic()
            if busy or now >= self._stats_due_s:  # how it is when nobody asks anything of it
                self._send(encode(Steps([], self._stats(IDLE_STATS_S))))
                busy = False
            self._wake.wait(max(0.0, self._stats_due_s - now))
            self._wake.clear()
        if self._failure is not None:
            raise self._failure

    def _step(self) -> None:
        begin = time.monotonic()
        stats = begin >= self._stats_due_s
        before = self._engine.scheduler.stats().scheduled_tokens if stats else 0
        news = self._engine.step()
        self._step_seconds = time.monotonic() - begin
        told = self._told
        progress = [told[request].progress(request) for request in news if request in told]
        for request in news:
            if request.finished:
                self._forget(request)
        if stats:
            self._step_tokens = self._engine.scheduler.stats().scheduled_tokens - before
        if progress or stats:
            self._send(encode(Steps(progress, self._stats(BUSY_STATS_S) if stats else None)))

    def _forget(self, request: Request) -> None:
        told = self._told.pop(request, None)
        if told is None:
            return
        name, left = self._names[told.handle]
        if left == 1:
            del self._names[told.handle]
        else:
            self._names[told.handle] = (name, left - 1)

    def _between_steps(self) -> None:
        while self._to_tell:
            news = self._to_tell.popleft()
            self._send(encode(Steps([news]) if isinstance(news, Progress) else news))
        while self._asked:
            question = self._asked.popleft()
            answer = self._answers.answer(question)
            if question.what == "set_budget":  # figures of before it are of no use any more
                self._send(encode(Steps([], self._stats())))
            self._send(encode(answer))

    # Figures --------------------------------------------------------------------------------------

    def _owners(self) -> dict[int, tuple[int, int]]:
        """Slots in use, with the handle and the index of the sample."""
        return {
            request.slot: (told.handle, request.index)
            for request, told in list(self._told.items())
            if request.slot >= 0
        }

    def _stats(self, next_s: float | None = None) -> Stats:
        """Figures of now; with ``next_s`` the next ones are due so many seconds later."""
        now = time.monotonic()
        if next_s is not None:
            self._stats_due_s = now + next_s
        engine = self._engine
        stats, pool = engine.stats(), engine.storage.pool
        return Stats(
            engine=replace(stats, cache=None),
            cache=stats.cache,
            pool={} if pool is None else pool.core.stats(),
            driver_calls={} if pool is None else _driver_calls(pool.driver.counters()),
            step_seconds=self._step_seconds,
            step_tokens=self._step_tokens,
            monotonic_s=now,
            requests=self._unfinished(),
        )

    def _unfinished(self) -> list[tuple[int, int, int, int]]:
        """At most so many of those that have not ended, those that run first."""
        # Of a copy, for others add to it; sorted() makes it in one go.
        samples = sorted(self._told.items(), key=_place)[:_MOST_REQUESTS]
        return [
            (told.handle, request.index, int(request.status), request.computed)
            for request, told in samples
        ]


def _place(sample: tuple[Request, Told]) -> tuple[bool, bool, Any, int]:
    request = sample[0]
    # What has not been taken in has no rank.
    return request.status is not Status.RUNNING, request.rank is None, request.rank, request.order


def _driver_calls(counters: dict[str, tuple[int, int]]) -> dict[str, tuple[int, float]]:
    return {op: (calls, ns / 1e9) for op, (calls, ns) in counters.items()}
