"""What each driver operation costs, whole runs in one call against one page per call."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from bench.bare import Bare, timed_map_calls
from bench.common import Json, summarize_pairs, wall_clock
from vattn import _core

# "remap" maps pages that were mapped before: the difference to "map" is what a first map pays for
# memory that create did not make ready.
OPS = ("reserve", "create", "map", "set_access", "unmap", "remap", "destroy", "release")


@dataclass(frozen=True)
class OpCost:
    """One operation on a run: microseconds per page inside the driver, medians over rounds."""

    driver: str
    op: str
    page_bytes: int
    run_pages: int
    run_us_per_page: float  # the run in one call of ours
    single_us_per_page: float  # one call of ours per page
    ratio: float  # median of single / run, measured side by side
    run_api_calls: int  # calls of the underlying API
    single_api_calls: int

    def as_json(self) -> Json:
        return asdict(self)


class _Meter:
    """Time and API calls of one kind inside the driver, as its own counters hold them."""

    def __init__(self, driver: _core.Driver) -> None:
        self._driver = driver

    def __call__(self, op: str, work: Callable[[], object]) -> tuple[float, int]:
        calls, ns = self._driver.counters()[op]
        work()
        calls_after, ns_after = self._driver.counters()[op]
        return (ns_after - ns) * 1e-9, calls_after - calls


def measure_ops(
    driver: _core.Driver, name: str, page_bytes: int, run_pages: int, rounds: int
) -> list[OpCost]:
    """Every operation of ``OPS`` on a run of new pages, ``rounds`` times both ways."""
    meter = _Meter(driver)
    base = driver.reserve(run_pages * page_bytes, driver.granularity())
    run: dict[str, list[tuple[float, int]]] = {}
    single: dict[str, list[tuple[float, int]]] = {}
    try:
        for i in range(rounds + 1):
            ways = [(run, _whole), (single, _one_by_one)]
            for into, way in ways if i % 2 else reversed(ways):
                for op, cost in way(driver, meter, base, page_bytes, run_pages).items():
                    if i > 0:  # the first round warms up
                        into.setdefault(op, []).append(cost)
    finally:
        driver.release(base, run_pages * page_bytes)
    return [_cost(name, op, page_bytes, run_pages, run[op], single[op]) for op in OPS]


def _cost(
    name: str,
    op: str,
    page_bytes: int,
    run_pages: int,
    run: Sequence[tuple[float, int]],
    single: Sequence[tuple[float, int]],
) -> OpCost:
    run_s, single_s = [s for s, _ in run], [s for s, _ in single]
    return OpCost(
        driver=name,
        op=op,
        page_bytes=page_bytes,
        run_pages=run_pages,
        run_us_per_page=statistics.median(run_s) * 1e6 / run_pages,
        single_us_per_page=statistics.median(single_s) * 1e6 / run_pages,
        ratio=statistics.median(s / max(r, 1e-9) for r, s in zip(run_s, single_s, strict=True)),
        run_api_calls=run[-1][1],
        single_api_calls=single[-1][1],
    )


def _whole(
    driver: _core.Driver, meter: _Meter, base: int, page: int, n: int
) -> dict[str, tuple[float, int]]:
    pages: list[int] = []

    def map_run() -> None:
        driver.map(base, pages, page)

    bases: list[int] = []
    grain = driver.granularity()
    costs = {
        "reserve": meter("reserve", lambda: bases.append(driver.reserve(n * page, grain))),
        "release": meter("release", lambda: driver.release(bases[0], n * page)),
        "create": meter("create", lambda: pages.extend(driver.create(n, page))),
        "map": meter("map", map_run),
        "set_access": meter("set_access", lambda: driver.set_access(base, n * page)),
        "unmap": meter("unmap", lambda: driver.unmap(base, n * page)),
        "remap": meter("map", map_run),
    }
    driver.unmap(base, n * page)
    return costs | {"destroy": meter("destroy", lambda: driver.destroy(pages, page))}


def _one_by_one(
    driver: _core.Driver, meter: _Meter, base: int, page: int, n: int
) -> dict[str, tuple[float, int]]:
    pages: list[int] = []

    def create_each() -> None:
        for _ in range(n):
            pages.extend(driver.create(1, page))

    def map_each() -> None:
        for i in range(n):
            driver.map(base + i * page, [pages[i]], page)

    def access_each() -> None:
        for i in range(n):
            driver.set_access(base + i * page, page)

    def unmap_each() -> None:
        for i in range(n):
            driver.unmap(base + i * page, page)

    def destroy_each() -> None:
        for i in range(n):
            driver.destroy([pages[i]], page)

    bases: list[int] = []
    grain = driver.granularity()

    def reserve_each() -> None:
        bases.extend(driver.reserve(page, grain) for _ in range(n))

    def release_each() -> None:
        for range_base in bases:
            driver.release(range_base, page)

    costs = {
        "reserve": meter("reserve", reserve_each),
        "release": meter("release", release_each),
        "create": meter("create", create_each),
        "map": meter("map", map_each),
        "set_access": meter("set_access", access_each),
        "unmap": meter("unmap", unmap_each),
        "remap": meter("map", map_each),
    }
    driver.unmap(base, n * page)
    return costs | {"destroy": meter("destroy", destroy_each)}


# The host against bare system calls ---------------------------------------------------------------


# "neighbours" and "scattered" (one mmap per stretch) are pages that were mapped before; "new" are
# neighbours that were just created and never mapped, on both sides with their first touch paid.
BARE_KINDS = ("neighbours", "scattered", "new")


@dataclass(frozen=True)
class BareMap:
    """The host driver's map of a run against the bare ``mmap`` calls for the same pages."""

    page_bytes: int
    run_pages: int
    kind: str  # one of BARE_KINDS
    mmap_calls: int
    driver_us: float
    bare_us: float
    slowdown: float  # median of driver / bare, inside the driver against ctypes taken off
    slowdown_from_python: float  # the same, both called from Python

    def as_json(self) -> Json:
        return asdict(self)


def measure_bare_map(page_bytes: int, run_pages: int, kind: str, rounds: int) -> BareMap:
    """Maps the same run of existing pages by the driver and by bare calls, alternately."""
    driver = _core.host_driver()
    meter = _Meter(driver)
    size = run_pages * page_bytes
    order = list(range(run_pages))
    if kind == "scattered":
        random.Random(run_pages).shuffle(order)
    base = driver.reserve(size, driver.granularity())
    pages = driver.create(run_pages, page_bytes)
    inside: list[float] = []
    outside: list[float] = []
    bare_s: list[float] = []
    bare_outside: list[float] = []
    with Bare(run_pages, page_bytes) as bare:
        calls = bare.calls_of_map(order)

        def ours() -> None:
            if kind == "new":
                driver.destroy(pages, page_bytes)
                pages[:] = driver.create(run_pages, page_bytes)
            run = [pages[i] for i in order]

            def mapped() -> None:
                driver.map(base, run, page_bytes)

            seconds, _ = meter("map", lambda: outside.append(wall_clock(mapped)))
            inside.append(seconds)
            driver.unmap(base, size)

        def theirs() -> None:
            if kind == "new":
                bare.renew()
            bare_s.append(timed_map_calls(bare.fd, calls))
            bare.unmap(run_pages)
            if kind == "new":
                bare.renew()
            bare_outside.append(wall_clock(lambda: bare.map(order)))
            bare.unmap(run_pages)

        for i in range(rounds):
            first, second = (ours, theirs) if i % 2 else (theirs, ours)
            first()
            second()
    driver.destroy(pages, page_bytes)
    driver.release(base, size)
    pairs = summarize_pairs(inside, bare_s)
    return BareMap(
        page_bytes=page_bytes,
        run_pages=run_pages,
        kind=kind,
        mmap_calls=len(calls),
        driver_us=pairs.base_us,
        bare_us=pairs.candidate_us,
        slowdown=pairs.ratio,
        slowdown_from_python=summarize_pairs(outside, bare_outside).ratio,
    )


# First touch --------------------------------------------------------------------------------------


def measure_host_touch(size: int, rounds: int) -> list[Json]:
    """Microseconds per 2 MiB of each way to get memory that can be written without a fault."""
    pages = size // (2 << 20)
    order = list(range(pages))
    times: dict[str, list[float]] = {}

    def note(what: str, work: Callable[[], object]) -> None:
        times.setdefault(what, []).append(wall_clock(work) / pages)

    with Bare(pages, 2 << 20) as existing, Bare(pages, 2 << 20, sparse=True) as sparse:
        for _ in range(rounds):
            note("existing pages: map", lambda: existing.map(order, populate=False))
            note("existing pages: first touch after map", lambda: existing.touch(pages))
            note("existing pages: second touch", lambda: existing.touch(pages))
            existing.unmap(pages)
            note("existing pages: map with populate", lambda: existing.map(order))
            note("existing pages: first touch after populate", lambda: existing.touch(pages))
            existing.unmap(pages)
            sparse.map(order, populate=False)
            note("new pages: first touch after map", lambda: sparse.touch(pages))
            sparse.unmap(pages)
            sparse.punch()
            note("new pages: map with populate", lambda: sparse.map(order))
            sparse.unmap(pages)
            sparse.punch()
    return [
        {"what": what, "us_per_2MiB": statistics.median(values) * 1e6}
        for what, values in times.items()
    ]


def measure_device_touch(driver: _core.Driver, page_bytes: int, pages: int) -> list[Json]:
    """The first and the second fill of fresh mappings, device-side, microseconds per page."""
    size = pages * page_bytes
    first: list[float] = []
    second: list[float] = []
    base = driver.reserve(size, driver.granularity())
    for _ in range(5):
        handles = driver.create(pages, page_bytes)
        driver.map(base, handles, page_bytes)
        driver.set_access(base, size)
        for into in (first, second):
            into.append(wall_clock(lambda: _fill(driver, base, size)) / pages)
        driver.unmap(base, size)
        driver.destroy(handles, page_bytes)
    driver.release(base, size)
    return [
        {
            "what": f"{name} fill",
            "page_bytes": page_bytes,
            "us_per_page": statistics.median(t) * 1e6,
        }
        for name, t in (("first", first), ("second", second))
    ]


def _fill(driver: _core.Driver, base: int, size: int) -> None:
    driver.fill(base, 1, size)
    driver.synchronize()
