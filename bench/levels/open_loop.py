"""An engine in this process under open-loop load: requests come when they are due.

Nobody waits for an answer before the next request is sent. Whoever is slow finds more of them
waiting, as a server would.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.levels.arrivals import Moments
from bench.levels.serving.metrics import Served
from vattn.request import Request

_IDLE_S = 0.01  # longest sleep, so that a moment is not missed by a timer's whole error


class Steps(Protocol):
    """What is asked of an engine here; see :class:`vattn.engine.engine.Engine`."""

    @property
    def has_unfinished(self) -> bool: ...

    def add(self, request: Request) -> None: ...

    def step(self) -> list[Request]: ...


@dataclass
class Window:
    """One run: what each request waited for, what it was given, and seconds until the last end."""

    served: list[Served]
    texts: list[list[int]]
    seconds: float


def serve_open_loop(
    engine: Steps,
    requests: Sequence[Request],
    moments: Moments,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Window:
    """Adds each request when it is due, and steps meanwhile, until all have ended.

    A request that is due while a step runs is added after it. The engine would not have taken it
    earlier: it takes new ones at the beginning of a step. The delay is part of its latency and, as
    :attr:`Served.slip_s`, of the result.

    Args:
        engine: that nobody else uses meanwhile.
        requests: made beforehand, since checking a prompt takes time; in the order of moments.
        moments: seconds from now, ascending, one of each request.
        clock: seconds.
        sleep: for so many seconds.

    Raises:
        ValueError: not as many moments as requests.
    """
    if len(requests) != len(moments):
        raise ValueError(f"{len(requests)} requests and {len(moments)} moments; give one of each")
    due = moments.tolist()
    served = [Served(at, len(r.prompt_ids)) for r, at in zip(requests, due, strict=True)]
    of = {request.id: each for request, each in zip(requests, served, strict=True)}
    start, coming = clock(), 0
    while coming < len(due) or engine.has_unfinished:
        now = clock() - start
        while coming < len(due) and due[coming] <= now:
            served[coming].sent_s = now
            engine.add(requests[coming])
            coming, now = coming + 1, clock() - start
        if engine.has_unfinished:
            news = engine.step()
            now = clock() - start
            for request in news:
                _record(of[request.id], request, now)
        elif coming < len(due):
            sleep(min(_IDLE_S, max(0.0, due[coming] - now)))
    return Window(served, [request.output_ids for request in requests], clock() - start)


def _record(served: Served, request: Request, now_s: float) -> None:
    new = len(request.tokens) - len(request.prompt_ids) - served.output_tokens
    if new > 0:
        served.came(new, now_s)
    if request.finished:
        served.error, served.cached_tokens = request.error, request.cached
