"""Driver calls beside a running kernel, and kernel launches beside driver calls, by page size.

Whether map, set_access and unmap wait for the device is not promised by CUDA; what they do here is
measured: each call's time while a long kernel runs, whether the kernel was still running when the
call returned, and how much later launches come back while another thread maps and unmaps.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench.common import Budget, Json, print_table, short_bytes, wall_clock
from vattn import _core

PAGES = 16  # of one call
OPS = ("reserve", "create", "map", "set_access", "unmap", "destroy", "release")
_LAUNCHES = 400
_LONG_CYCLES = 100_000_000  # some 50 ms

cuda: Any = torch.cuda  # parts of it are untyped


def measure_beside(
    driver: _core.Driver, page_sizes: Sequence[int], rounds: int, budget: Budget
) -> Json:
    """Every call on ``PAGES`` pages, and launches beside the calls, for every page size.

    Args:
        driver: of the device that the kernels run on.
        page_sizes: in bytes.
        rounds: of every call, beside a kernel and not.
        budget: begins no further page size when it is used up.
    """
    calls: list[Json] = []
    launches: list[Json] = []
    for page in page_sizes:
        if budget.allows(f"calls beside a kernel: {short_bytes(page)}"):
            calls += _calls(driver, page, rounds)
            launches += _launches(driver, page)
    print_table(
        f"cuda: one call on {PAGES} pages beside a running kernel, us",
        ["page", "op", "idle", "beside", "longest beside", "kernel still running after the call"],
        [
            [
                short_bytes(r["page_bytes"]),
                r["op"],
                r["idle_us"],
                r["beside_us"],
                r["beside_max_us"],
                f"{r['still_running']} of {r['rounds']}",
            ]
            for r in calls
        ],
    )
    print_table(
        "cuda: launch of an empty kernel, us",
        ["page", "", "median", "p99", "max"],
        [
            [short_bytes(r["page_bytes"]), r["what"], r["median_us"], r["p99_us"], r["max_us"]]
            for r in launches
        ],
    )
    return {"pages": PAGES, "calls": calls, "launches": launches}


def _calls(driver: _core.Driver, page: int, rounds: int) -> list[Json]:
    idle: dict[str, list[float]] = {op: [] for op in OPS}
    beside: dict[str, list[float]] = {op: [] for op in OPS}
    running: dict[str, list[bool]] = {op: [] for op in OPS}
    stream = cuda.Stream()
    for i in range(rounds + 1):  # the first round warms up
        for op, work in _round(driver, page):
            cuda.synchronize()
            seconds = wall_clock(work)
            if i > 0:
                idle[op].append(seconds)
        for op, work in _round(driver, page):
            done = _start_kernel(stream)
            seconds = wall_clock(work)
            if i > 0:
                running[op].append(not done.query())
                beside[op].append(seconds)
    cuda.synchronize()
    return [
        {
            "page_bytes": page,
            "op": op,
            "rounds": rounds,
            "idle_us": statistics.median(idle[op]) * 1e6,
            "beside_us": statistics.median(beside[op]) * 1e6,
            "beside_max_us": max(beside[op]) * 1e6,
            "still_running": sum(running[op]),
        }
        for op in OPS
    ]


def _start_kernel(stream: Any) -> Any:
    """A long kernel that is running when this returns; the event is done when it has ended."""
    cuda.synchronize()
    started, done = cuda.Event(), cuda.Event()
    with cuda.stream(stream):
        started.record(stream)
        cuda._sleep(_LONG_CYCLES)
        done.record(stream)
    while not started.query():
        pass
    return done


def _round(driver: _core.Driver, page: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every call once, in order; the caller makes one before it asks for the next."""
    bases: list[int] = []
    pages: list[int] = []
    size = PAGES * page
    yield "reserve", lambda: bases.append(driver.reserve(size, page))
    yield "create", lambda: pages.extend(driver.create(PAGES, page))
    yield "map", lambda: driver.map(bases[0], pages, page)
    yield "set_access", lambda: driver.set_access(bases[0], size)
    yield "unmap", lambda: driver.unmap(bases[0], size)
    yield "destroy", lambda: driver.destroy(pages, page)
    yield "release", lambda: driver.release(bases[0], size)


def _launches(driver: _core.Driver, page: int) -> list[Json]:
    size = PAGES * page
    tiny = empty_kernel()
    base = driver.reserve(size, page)
    pages = driver.create(PAGES, page)
    stop = threading.Event()
    errors: list[BaseException] = []
    turns = 0

    def map_and_unmap() -> None:
        nonlocal turns
        try:
            while not stop.is_set():
                driver.map(base, pages, page)
                driver.set_access(base, size)
                driver.unmap(base, size)
                turns += 1
        except BaseException as error:  # raised below: a thread has nobody to tell
            errors.append(error)

    def launches(what: str) -> Json:
        times = []
        for i in range(_LAUNCHES):
            times.append(wall_clock(tiny))
            if i % 50 == 49:
                cuda.synchronize()
        times.sort()
        found = (times[len(times) // 2], times[int(0.99 * len(times))], times[-1])
        names = ("median_us", "p99_us", "max_us")
        return {"page_bytes": page, "what": what} | {
            name: seconds * 1e6 for name, seconds in zip(names, found, strict=True)
        }

    launches("warm-up")
    alone = launches("alone")
    thread = threading.Thread(target=map_and_unmap)
    thread.start()
    try:
        beside = launches("while another thread maps and unmaps")
    finally:
        stop.set()
        thread.join()
    if errors:
        raise errors[0]
    driver.destroy(pages, page)
    driver.release(base, size)
    return [alone, beside | {"map_and_unmap_turns": turns}]


def empty_kernel() -> Callable[[], object]:
    """What launches a kernel that does next to nothing."""
    tiny = torch.zeros(1, device="cuda")
    return lambda: tiny.add_(1)
