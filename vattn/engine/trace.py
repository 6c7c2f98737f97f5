"""Event traces of an engine: its steps, its requests, its memory's driver calls; no torch here.

While a trace runs, methods of the engine's objects have wrappers, as attributes of these objects.
Without a trace there is nothing, so nothing is slower.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from threading import get_native_id
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from vattn import _core
from vattn.config import positive_int
from vattn.engine.gangs import is_lead
from vattn.engine.policy import Plan
from vattn.engine.wrapping import Wrappers
from vattn.request import Request, Status
from vattn.tracing import DEFAULT_MAX_EVENTS, Trace, TraceSummary, driver_events

if TYPE_CHECKING:
    from vattn.engine.engine import Engine
    from vattn.engine.kernel_trace import KernelTrace

# Counting the pages of many slots takes long: it is done for so little of the time, as one in ...
_LOOK_SHARE = 20
_MAX_FLYING = 8  # steps that were launched, and of which nobody is told may be among them


class EngineTrace:
    """A trace that runs from now on until :meth:`stop`.

    Args:
        engine: between two steps.
        path: of the file, which is replaced; compressed if it ends in ``.gz``.
        kernels: have torch's profiler record operators and kernels as well.
        max_events: the last so many events are kept, and as many calls of the driver.

    Raises:
        ValueError: the file cannot be written, the driver's calls or torch's are being traced
            already, or ``max_events`` is not positive.
        MemoryError: there is no room for so many calls.
    """

    def __init__(
        self,
        engine: Engine,
        path: str | os.PathLike[str],
        *,
        kernels: bool = False,
        max_events: int = DEFAULT_MAX_EVENTS,
    ) -> None:
        positive_int(max_events, "max_events")
        self._engine = engine
        self._scheduler = engine.scheduler
        self._driver = _driver_of(engine)
        self._wrappers = Wrappers()
        self._kernels: KernelTrace | None = None
        self._flying: dict[Plan, tuple[int, int, int]] = {}  # step, thread, time
        self._launched: dict[str, int] = {}  # what the step that runs computes, if anything
        self._told: dict[str, dict[str, int]] = {}
        self._next_look_ns = 0
        with ExitStack() as undo:
            undo.callback(self._wrappers.remove)
            if self._driver is not None:
                self._driver.start_trace(max_events)
                undo.callback(self._driver.stop_trace)
            if kernels:
                from vattn.engine.kernel_trace import KernelTrace

                self._kernels = KernelTrace(engine.loaded.device)
                undo.callback(self._kernels.close)
            self._trace = Trace(path, max_events)
            undo.callback(self._trace.close)
            self._attach()
            undo.pop_all()

    def stop(self) -> TraceSummary:
        """Ends the trace and writes the file.

        Whatever fails, profiler and driver are traced no more, and the file has the rest.

        Raises:
            OSError: the disk is full, or the like.
            MemoryError: of the driver's calls there are too many.
        """
        self._wrappers.remove()
        calls: list[list[int]] = []
        others: list[dict[str, Any]] = []
        dropped = 0
        try:
            try:
                if self._driver is not None:
                    calls, dropped = _stop_calls(self._driver)
            finally:
                if self._kernels is not None:
                    others = self._kernels.stop(self._trace.start_ns)
        finally:
            summary = self._write(calls, dropped, others)
        return summary

    def _write(
        self, calls: list[list[int]], dropped: int, others: list[dict[str, Any]]
    ) -> TraceSummary:
        for request in [*self._scheduler._ended, *self._scheduler._requests.values()]:
            self._live(request)
        operations = [] if self._driver is None else list(self._driver.counters())
        about = {
            "driver": None if self._driver is None else self._driver.name(),
            "kernels": self._kernels is not None,
        }
        return self._trace.write(
            driver_events(operations, calls), others, dropped_calls=dropped, about=about
        )

    # Wrappers -------------------------------------------------------------------------------------

    def _attach(self) -> None:
        engine, memory = self._engine, self._engine.memory
        slices = [
            (engine, "_propose"),
            (engine, "_sample"),
            (engine, "_stage"),
            (engine.runner, "remember"),
            (self._scheduler, "schedule"),
            (memory, "grow"),
            (memory, "prepare"),
            (memory, "reorder"),
        ]
        wrap = self._wrappers.add
        for owner, name in slices:
            wrap(owner, name, partial(self._timed, name.removeprefix("_"), None))
        wrap(engine, "_step", self._step)
        wrap(engine, "_forward", self._forward)
        wrap(engine, "_take", self._take)
        wrap(memory, "admit", self._admit)
        wrap(memory, "preempt", self._preempt)
        wrap(self._scheduler, "take_finished", self._take_finished)
        if self._kernels is not None:
            wrap(engine.runner._backend, "forward", self._kernels.attention)

    def _timed(
        self,
        name: str,
        args: dict[str, Any] | None,
        call: Callable[..., Any],
        *given: Any,
        **named: Any,
    ) -> Any:
        """Makes a call that is a slice, also if it fails."""
        begin_ns = perf_counter_ns()
        try:
            return call(*given, **named)
        except BaseException as error:
            args = {**(args or {}), "error": type(error).__name__}
            raise
        finally:
            self._trace.slice(name, begin_ns, perf_counter_ns(), args)

    def _step(self, step: Callable[[], list[Request]]) -> list[Request]:
        self._trace.name_thread("engine")
        self._launched = {}
        begin_ns = perf_counter_ns()
        args: dict[str, Any] = {}
        try:
            news = step()
            self._count()
        except BaseException as error:
            args["error"] = type(error).__name__
            raise
        finally:
            # A step that only waits, or takes the tokens of the one before, computes nothing.
            name = "step" if self._launched else "idle"
            args = {**self._launched, **args}
            self._trace.slice(name, begin_ns, perf_counter_ns(), args)
        return news

    def _forward(self, forward: Callable[[Plan], Any], plan: Plan) -> Any:
        counts = self._scheduler.stats()
        self._launched = {
            "step": self._engine._steps + 1,
            "decodes": len(plan.decodes),
            "chunks": len(plan.chunks),
            "chunk_tokens": sum(n for _, n in plan.chunks),
            "drafts": sum(n for _, n in plan.verifies),
            "tokens": plan.tokens,
            "running": counts.running,
            "waiting": counts.waiting,
            "kv_tokens": sum(plan.kv_lens),
        }
        step = self._launched["step"]
        while len(self._flying) >= _MAX_FLYING:
            del self._flying[next(iter(self._flying))]

        def noted() -> Any:  # the arrow leaves from within the slice
            self._flying[plan] = step, get_native_id(), perf_counter_ns()
            return forward(plan)

        return self._timed("forward", {"step": step}, noted)

    def _take(self, take: Callable[[Any], list[Request]], launched: Any) -> list[Request]:
        step, *source = self._flying.pop(launched.plan, (None,))
        arriving = _Awaited(partial(self._timed, "wait", None, launched.arriving.wait))

        def noted() -> list[Request]:
            if source:
                self._trace.flow("tokens", (source[0], source[1]), perf_counter_ns())
            return take(dataclasses.replace(launched, arriving=arriving))

        news: list[Request] = self._timed("take", {"step": step}, noted)
        return news

    # Requests -------------------------------------------------------------------------------------

    def _admit(self, admit: Callable[[Request], bool | None], request: Request) -> bool | None:
        counters, told = self._engine.memory.counters, {"request": request.id}
        swapped = counters.swapped_in
        admitted: bool | None = self._timed("admit", told, admit, request)
        if admitted:
            self._trace.instant("admit", {**told, "slot": request.slot})
            if counters.swapped_in > swapped:
                self._trace.instant("swap in", {**told, "tokens": request.computed})
            elif request.computed:
                self._trace.instant("prefix hit", {**told, "tokens": request.computed})
        return admitted

    def _preempt(self, preempt: Callable[[Request], None], request: Request) -> None:
        told = {"request": request.id, "tokens": request.computed}
        ran, was_saved = request.status is Status.RUNNING, request.saved is not None
        self._timed("preempt", told, preempt, request)
        name = "preempt" if ran else "put back"  # one that has a slot and has not begun
        if request.saved is not None and not was_saved:
            name = "swap out"
        self._trace.instant(name, told)

    def _take_finished(self, take_finished: Callable[[], list[Request]]) -> list[Request]:
        ended = take_finished()
        for request in ended:
            self._live(request)
        return ended

    def _live(self, request: Request) -> None:
        """Tells the life of a request, as far as it has come."""
        if not is_lead(request):
            return
        times, reason = request.timings, "unfinished"
        end_ns = perf_counter_ns()
        if request.finish_reason is not None:
            end_ns, reason = round(times.finished_s * 1e9), request.finish_reason.value
            self._trace.instant("finish", {"request": request.id, "reason": reason})
        moments = [times.arrival_s, times.scheduled_s, times.first_token_s]
        reached = [round(moment * 1e9) for moment in moments if moment] or [end_ns]
        phases = list(
            zip(("queued", "prefill", "decode"), reached, [*reached[1:], end_ns], strict=False)
        )
        args = {
            "prompt_tokens": len(request.prompt_ids),
            "cached_tokens": request.cached,
            "output_tokens": len(request.tokens) - len(request.prompt_ids),
            "preemptions": request.preemptions,
            "finish_reason": reason,
        }
        self._trace.life(f"request {request.id}", phases, args)

    # Figures --------------------------------------------------------------------------------------

    def _count(self) -> None:
        requests = self._scheduler.stats()
        self._tell("requests", {"running": requests.running, "waiting": requests.waiting})
        begin_ns = perf_counter_ns()
        if begin_ns < self._next_look_ns:
            return
        memory = self._engine.cache.stats()
        end_ns = perf_counter_ns()
        self._next_look_ns = end_ns + _LOOK_SHARE * (end_ns - begin_ns)
        self._tell(
            "memory (bytes)",
            {
                "live": memory.live_bytes,
                "cover": memory.cover_bytes,
                "stale": memory.stale_bytes,
                "pooled": memory.pooled_bytes,
            },
        )

    def _tell(self, name: str, values: dict[str, int]) -> None:
        if self._told.get(name) != values:
            self._told[name] = values
            self._trace.counter(name, values)


class _Awaited:
    """Stands for tokens on their way, and tells how long they were waited for."""

    def __init__(self, wait: Callable[[], Any]) -> None:
        self.wait = wait


def _driver_of(engine: Engine) -> _core.Driver | None:
    """The driver of the cache's pool; None for a cache of ordinary memory."""
    pool = getattr(engine.cache, "pool", None)
    return None if pool is None else pool.driver


def _stop_calls(driver: _core.Driver) -> tuple[list[list[int]], int]:
    rows, dropped = driver.stop_trace()
    return rows.tolist(), dropped
