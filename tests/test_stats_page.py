"""The figures that a process shares: what is in them, who can read them, and when they go."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.cli_helpers import ROOT
from tests.helpers import make_cache, make_pool
from tests.stats_processes import OTHER_VERSION, busy, running
from vattn import _core
from vattn.allocator.figures_layout import Page
from vattn.allocator.figures_page import (
    NoFiguresError,
    PoolFigures,
    ProcessFigures,
    process,
    processes,
)


@pytest.fixture(autouse=True)
def no_leftovers() -> None:
    """The page has room for so many pools; those of earlier tests may wait to be collected."""
    gc.collect()


def mine() -> ProcessFigures:
    return process(os.getpid())


def pool_with_budget(budget_bytes: int) -> tuple[int, PoolFigures]:
    """The pool of this process that has the budget, and its index."""
    (found,) = [(i, p) for i, p in enumerate(mine().pools) if p.budget_bytes == budget_bytes]
    return found


def assert_agrees(shown: PoolFigures, stats: dict[str, int]) -> None:
    for name in ("page", "budget", "created", "peak_created", "free", "stale"):
        assert getattr(shown, f"{name}_bytes") == stats[f"{name}_bytes"], name


# What is shown ----------------------------------------------------------------------------------


def test_pool_of_a_cache_without_an_allocator(driver: _core.Driver) -> None:
    pool = make_pool(driver, pages=77)
    cache = make_cache(pool)
    budget = 77 * pool.page_bytes
    slots = [cache.open() for _ in range(3)]
    for step, slot in enumerate(slots):
        cache.ensure(slot, 30 * (step + 1))
        assert_agrees(pool_with_budget(budget)[1], pool.core.stats())
    cache.release(slots[0])
    shown = pool_with_budget(budget)[1]
    assert_agrees(shown, pool.core.stats())
    assert shown.stale_bytes > 0
    assert shown.other_bytes > 0
    assert shown.driver == driver.name()
    assert shown.torch_mapped_bytes == 0
    assert shown.torch_limit_bytes is None
    pool.set_budget(78 * pool.page_bytes)
    assert_agrees(pool_with_budget(78 * pool.page_bytes)[1], pool.core.stats())
    cache.close()
    pool.trim()
    shown = pool_with_budget(78 * pool.page_bytes)[1]
    assert_agrees(shown, pool.core.stats())
    assert shown.created_bytes == 0


def test_figures_of_an_allocator(driver: _core.Driver) -> None:
    page = driver.granularity()
    budget = 33 * page
    pool = _core.PagePool(driver, page_bytes=page, budget_bytes=budget)
    allocator = _core.CachingAllocator(pool)
    rng = random.Random(1)
    tags = {0: "(no tag)"} | {_core.tag_id(name): name for name in ("acts", "weights")}
    live: dict[int, int] = {}
    for _ in range(300):
        if live and rng.random() < 0.5:
            allocator.free(address := rng.choice(list(live)))
            del live[address]
        else:
            _core.set_current_tag(rng.choice(list(tags)))
            try:
                address = allocator.allocate(rng.choice([300, page // 2, page, 2 * page + 5]))
            except _core.OutOfMemory:
                allocator.trim()
            else:
                live[address] = _core.current_tag()
    _core.set_current_tag(0)

    index, shown = pool_with_budget(budget)
    figures = allocator.figures()
    assert_agrees(shown, pool.stats())
    assert shown.torch_mapped_bytes == figures["all"]["reserved_bytes"]["current"]
    assert shown.torch_idle_bytes == figures["idle_bytes"]
    assert shown.out_of_memory == figures["num_ooms"]
    by_tag = {tag.name: tag for tag in mine().tags if tag.pool == index}
    assert set(by_tag) == set(tags.values())
    for tag, name in tags.items():
        assert by_tag[name].blocks == list(live.values()).count(tag)
    totals = figures["all"]
    assert sum(t.live_bytes for t in by_tag.values()) == totals["allocated_bytes"]["current"]
    assert sum(t.allocations for t in by_tag.values()) == totals["allocation"]["allocated"]
    assert sum(t.mapped_bytes for t in by_tag.values()) == shown.torch_mapped_bytes
    ranges = [each for each in mine().ranges if each.pool == index]
    for name, tag_figures in by_tag.items():
        in_tag = [each for each in ranges if each.tag == name]
        assert sum(each.mapped_bytes for each in in_tag) == tag_figures.mapped_bytes
    for segment in allocator.segments():
        (around,) = [r for r in ranges if 0 <= segment["address"] - r.address < r.reserved_bytes]
        assert (around.stream, around.kind, around.tag) == (
            segment["stream"],
            segment["kind"],
            segment["scope"],
        )


def test_states_limits_and_failures(driver: _core.Driver) -> None:
    page = driver.granularity()
    budget = 21 * page
    pool = _core.PagePool(driver, page_bytes=page, budget_bytes=budget)
    allocator = _core.CachingAllocator(pool)
    tag = _core.tag_id("acts")
    allocator.set_tag_budget(tag, 4 * page)
    allocator.set_limit(9 * page)
    _core.set_current_tag(tag)
    held = allocator.allocate(3 * page)
    with pytest.raises(_core.OutOfMemory):
        allocator.allocate(3 * page)
    _core.set_current_tag(0)
    index, shown = pool_with_budget(budget)
    assert shown.torch_limit_bytes == 9 * page
    assert shown.out_of_memory == 1

    def acts() -> tuple[str, int | None, int]:
        (found,) = [each for each in mine().tags if each.pool == index and each.name == "acts"]
        return found.state, found.budget_bytes, found.mapped_bytes

    assert acts() == ("in use", 4 * page, 3 * page)
    allocator.pause(tag, backup=False)
    assert acts() == ("paused", 4 * page, 0)
    assert [r.mapped_bytes for r in mine().ranges if r.pool == index and r.tag == "acts"] == [0]
    allocator.resume(tag)
    assert acts() == ("in use", 4 * page, 3 * page)
    allocator.free(held)
    allocator.begin_graph_pool((0, 7), [0])
    allocator.free(allocator.allocate(page))
    allocator.end_graph_pool((0, 7))
    graphs = [t for t in mine().tags if t.pool == index and t.state == "graph pool"]
    assert [each.name for each in graphs] == ["graph pool 0.7"]
    allocator.release_graph_pool((0, 7))
    allocator.trim()
    assert [t for t in mine().tags if t.pool == index and t.name.startswith("graph")] == []


def test_refusals_of_a_pool_are_counted(driver: _core.Driver) -> None:
    pool = make_pool(driver, pages=5)
    cache = make_cache(pool)
    slot = cache.open()
    with pytest.raises(_core.OutOfPages):
        cache.ensure(slot, 100)
    assert pool_with_budget(5 * pool.page_bytes)[1].refused == 1
    cache.close()


# Entries ----------------------------------------------------------------------------------------


def test_entries_are_given_back(driver: _core.Driver) -> None:
    page = driver.granularity()
    before = mine() if _has_page() else None
    for _ in range(40):  # more than there are entries
        pool = _core.PagePool(driver, page_bytes=page, budget_bytes=8 * page)
        allocator = _core.CachingAllocator(pool)
        allocator.allocate(page)
        pool_with_budget(8 * page)
        del allocator, pool
    after = mine()
    if before is not None:
        assert len(after.pools) == len(before.pools)
        assert len(after.tags) == len(before.tags)
        assert len(after.ranges) == len(before.ranges)
    assert all(each.budget_bytes != 8 * page for each in after.pools)


def test_more_than_can_be_shown(driver: _core.Driver) -> None:
    page = driver.granularity()
    pool = _core.PagePool(driver, page_bytes=page, budget_bytes=130 * page)
    allocator = _core.CachingAllocator(pool)
    tags = [_core.tag_id(f"many-{i}") for i in range(100)]
    held = []
    for tag in tags:
        _core.set_current_tag(tag)
        held.append(allocator.allocate(page))
    _core.set_current_tag(0)
    assert all(allocator.tag_live_bytes(tag) == page for tag in tags)
    index, shown = pool_with_budget(130 * page)
    assert shown.torch_mapped_bytes == 100 * page
    seen = [each for each in mine().tags if each.pool == index]
    assert 0 < len(seen) <= 64
    assert {each.live_bytes for each in seen} == {page}
    for address in held:
        allocator.free(address)
    allocator.check()
    pools = [_core.PagePool(driver, page_bytes=page, budget_bytes=page) for _ in range(30)]
    assert len(mine().pools) == 16
    assert {each.stats()["budget_bytes"] for each in pools} == {page}


def test_threads_share_one_page() -> None:
    code = """
import os, threading
from vattn import _core
from vattn.allocator.figures_page import process
driver = _core.host_driver()
barrier, pools = threading.Barrier(12), []
def make():
    barrier.wait()
    pools.append(_core.PagePool(driver, page_bytes=4096, budget_bytes=1 << 20))
threads = [threading.Thread(target=make) for _ in range(12)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(process(os.getpid()).pools) == 12
links = []
for name in os.listdir("/proc/self/fd"):
    try: links.append(os.readlink(f"/proc/self/fd/{name}"))
    except FileNotFoundError: pass
assert sum(link.startswith("/memfd:vattn-stats") for link in links) == 1, links
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_figures_are_read_while_they_change(driver: _core.Driver) -> None:
    page = driver.granularity()
    pool = _core.PagePool(driver, page_bytes=page, budget_bytes=50 * page)
    allocator = _core.CachingAllocator(pool)
    allocator.allocate(page)
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            allocator.free(allocator.allocate(3 * page))
            allocator.trim()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(100):
            _, shown = pool_with_budget(50 * page)
            assert shown.torch_mapped_bytes in (page, 4 * page)
    finally:
        stop.set()
        thread.join()


def _has_page() -> bool:
    return any(each.pid == os.getpid() for each in processes()[0])


# Other processes --------------------------------------------------------------------------------


def test_another_process_is_read_and_vanishes_when_killed() -> None:
    with busy() as other:
        found = process(other.pid)
        assert found.pid == other.pid
        assert "import _core" in found.command
        (pool,) = found.pools
        assert pool.driver == "host"
        assert pool.budget_bytes == 40 << 20
        assert pool.torch_mapped_bytes == pool.created_bytes == (3 << 20) + 65536
        assert {(tag.name, tag.live_bytes) for tag in found.tags} == {
            ("(no tag)", 512),
            ("weights", 3 << 20),
        }
        assert other.pid in [each.pid for each in processes()[0]]
        other.kill()
        other.wait()
        assert other.pid not in [each.pid for each in processes()[0]]
        with pytest.raises(ProcessLookupError, match=str(other.pid)):
            process(other.pid)


def test_processes_that_come_and_go_while_looking() -> None:
    code = "from vattn import _core; _core.PagePool(_core.host_driver(), budget_bytes=1 << 20)"
    others = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(6)]
    while any(other.poll() is None for other in others):
        processes()  # raises nothing
    assert [other.returncode for other in others] == [0] * 6


def test_nobody_can_shorten_the_page() -> None:
    with busy() as other:
        folder = Path("/proc", str(other.pid), "fd")
        (page,) = [link for link in folder.iterdir() if "vattn-stats" in os.readlink(link)]
        assert page.stat().st_size == ctypes.sizeof(Page)
        with pytest.raises(PermissionError):
            os.truncate(page, 64)


def test_process_without_a_pool() -> None:
    with running("import vattn") as other, pytest.raises(NoFiguresError, match="has no pool"):
        process(other.pid)


def test_page_of_another_version() -> None:
    with running(OTHER_VERSION) as other:
        with pytest.raises(NoFiguresError, match="version 99 and 4096 bytes"):
            process(other.pid)
        found, unreadable = processes()
        assert other.pid not in [each.pid for each in found]
        (told,) = [each for each in unreadable if each.pid == other.pid]
        assert "version 99" in told.reason


@pytest.mark.parametrize("content", ["b''", "b'x' * 100", "bytes(1 << 20)"])
def test_files_that_only_have_the_name(content: str) -> None:
    program = f"import os\nos.write(os.memfd_create('vattn-stats'), {content})"
    with running(program) as other:
        with pytest.raises(NoFiguresError, match="has no pool"):
            process(other.pid)
        assert other.pid not in [each.pid for each in processes()[1]]


# Forks ------------------------------------------------------------------------------------------

_FORK = """
import gc, os, sys
from vattn import _core
from vattn.allocator.figures_page import NoFiguresError, process
driver = _core.host_driver()
def make():
    pool = _core.PagePool(driver, page_bytes=4096, budget_bytes=8 << 20)
    allocator = _core.CachingAllocator(pool)
    held = allocator.allocate(5000)
    allocator.free(allocator.allocate(3 << 20))
    return allocator
allocator = make()
parent = os.getpid()
before = process(parent)
assert before.pools[0].torch_idle_bytes > 0
child = os.fork()
if child == 0:
    status = 1
    try:
        try:
            process(os.getpid())
        except NoFiguresError:
            pass  # what it inherited is its parent's
        else:
            raise AssertionError("the child shows its parent's figures")
        driver = _core.host_driver()
        mine = make()
        del allocator  # with what it counted
        gc.collect()
        (pool,) = process(os.getpid()).pools
        assert pool.torch_mapped_bytes == before.pools[0].torch_mapped_bytes
        assert len(process(os.getpid()).tags) == 1
        mine.allocate(100_000)
        assert process(parent) == before, process(parent)
        del mine
        gc.collect()
        assert process(os.getpid()).pools == ()
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)
assert os.waitpid(child, 0)[1] == 0
assert process(parent) == before
allocator.allocate(200_000)
assert process(parent).tags[0].live_bytes > before.tags[0].live_bytes
"""


def test_forked_child_leaves_its_parents_page_alone() -> None:
    subprocess.run([sys.executable, "-c", _FORK], check=True, cwd=ROOT, timeout=60)
