"""Driver calls beside a running kernel, and kernel launches beside driver calls.

Whether map, set_access and unmap wait for the device is not promised by CUDA; what they do here is
measured: each call's time while a long kernel runs, whether the kernel was still running when the
call returned, and how much later launches come back while another thread maps and unmaps.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable
from typing import Any

import torch

from bench.common import Json, print_table, wall_clock
from vattn import _core

_PAGES = 16
_LAUNCHES = 400

cuda: Any = torch.cuda  # parts of it are untyped


def measure_beside(driver: _core.Driver, rounds: int) -> Json:
    page = driver.granularity()
    base = driver.reserve(_PAGES * page, page)
    try:
        calls = _calls(driver, base, page, rounds)
        launches = _launches(driver, base, page)
    finally:
        driver.release(base, _PAGES * page)
    print_table(
        f"cuda: one call on {_PAGES} pages of {page} bytes beside a running kernel, us",
        ["op", "idle", "beside", "kernel still running after the call"],
        [[r["op"], r["idle_us"], r["beside_us"], r["kernel_still_running"]] for r in calls],
    )
    print_table(
        "cuda: launch of an empty kernel, us",
        ["", "median", "p99"],
        [[name, r["median_us"], r["p99_us"]] for name, r in launches.items()],
    )
    return {"calls": calls, "launches": launches}


def _calls(driver: _core.Driver, base: int, page: int, rounds: int) -> list[Json]:
    size = _PAGES * page
    times: dict[str, dict[bool, list[float]]] = {}
    running: dict[str, list[bool]] = {}
    stream = cuda.Stream()
    for busy in [False, True] * (rounds + 1):
        pages: list[int] = []

        def create(into: list[int] = pages) -> None:
            into.extend(driver.create(_PAGES, page))

        steps: list[tuple[str, Callable[[], object]]] = [
            ("create", create),
            ("map", lambda pages=pages: driver.map(base, pages, page)),  # type: ignore[misc]
            ("set_access", lambda: driver.set_access(base, size)),
            ("unmap", lambda: driver.unmap(base, size)),
            ("destroy", lambda pages=pages: driver.destroy(pages, page)),  # type: ignore[misc]
        ]
        for op, work in steps:
            cuda.synchronize()
            with cuda.stream(stream):
                if busy:
                    cuda._sleep(100_000_000)  # some 50 ms
                done = cuda.Event()
                done.record(stream)
            seconds = wall_clock(work)
            if busy:
                running.setdefault(op, []).append(not done.query())
            times.setdefault(op, {False: [], True: []})[busy].append(seconds)
    cuda.synchronize()
    return [
        {
            "op": op,
            "idle_us": statistics.median(by_load[False][1:]) * 1e6,
            "beside_us": statistics.median(by_load[True][1:]) * 1e6,
            "kernel_still_running": f"{sum(running[op])} of {len(running[op])}",
        }
        for op, by_load in times.items()
    ]


def _launches(driver: _core.Driver, base: int, page: int) -> Json:
    tiny = torch.zeros(1, device="cuda")
    stop = threading.Event()

    def map_and_unmap() -> None:
        pages = driver.create(_PAGES, page)
        while not stop.is_set():
            driver.map(base, pages, page)
            driver.set_access(base, _PAGES * page)
            driver.unmap(base, _PAGES * page)
        driver.destroy(pages, page)

    def launches() -> Json:
        times = []
        for i in range(_LAUNCHES):
            times.append(wall_clock(lambda: tiny.add_(1)))
            if i % 50 == 49:
                cuda.synchronize()
        times.sort()
        return {
            "median_us": times[len(times) // 2] * 1e6,
            "p99_us": times[int(0.99 * len(times))] * 1e6,
        }

    launches()
    alone = launches()
    thread = threading.Thread(target=map_and_unmap)
    thread.start()
    try:
        beside = launches()
    finally:
        stop.set()
        thread.join()
    return {"alone": alone, "while another thread maps and unmaps": beside}
