"""Virtual tensors and their pools: budgets, what others leave in a page, what keeps what alive."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

import vattn
from tests.helpers import Sequences, assert_all_given_back, layer_specs, make_cache, make_pool

if TYPE_CHECKING:
    from vattn import _core

pytest_plugins = ("tests.cache_fixtures",)
pytestmark = pytest.mark.usefixtures("small_pages")

ROWS = 100


def columns(pool: vattn.PagePool, pages: float) -> int:
    """So many bytes that a row of them is this part of a page."""
    return int(pool.page_bytes * pages)


def test_an_exhausted_budget_changes_nothing(driver: _core.Driver) -> None:
    pool = make_pool(driver, pages=10)
    table, handle = vattn.reserve((ROWS, columns(pool, 1)), torch.uint8, pool=pool)
    handle.commit(8)
    table[:8] = 5
    with pytest.raises(vattn.OutOfPages, match=r"3 pages .* are needed, and 2 can be had"):
        handle.commit(11)
    assert (handle.committed_rows, handle.committed_bytes) == (8, 8 * pool.page_bytes)
    handle.check()
    assert bool((table[:8] == 5).all())
    handle.commit(10)
    pool.set_budget(12 * pool.page_bytes)
    handle.commit(12)
    handle.decommit(4)
    handle.commit(slice(50, 54))
    assert bool((table[4:8] == 5).all())
    assert bool((table[50:54] == 0).all())
    handle.check()
    handle.close()


def test_takes_what_a_cache_has_no_use_for(driver: _core.Driver) -> None:
    """And gives it back to it; nobody sees what the other left in a page."""
    pool = make_pool(driver, pages=30)
    seqs = Sequences(make_cache(pool, layer_specs(pool)))
    table, handle = vattn.reserve((ROWS, columns(pool, 1)), torch.uint8, pool=pool)
    for _ in range(2):
        slots = [seqs.new(100), seqs.new(90)]
        with pytest.raises(vattn.OutOfPages):
            handle.commit(20)
        for slot in slots:
            seqs.release(slot)
        handle.commit(25)
        assert bool((table[:25] == 0).all())
        table[:25] = 0xFF
        seqs.check()
        with pytest.raises(vattn.OutOfPages):
            seqs.cache.ensure(seqs.open(slot=3), 100)
        seqs.release(3)
        handle.decommit(25)
    handle.close()
    seqs.end()


def test_a_lowered_budget_gets_what_is_given_up(driver: _core.Driver) -> None:
    pool = make_pool(driver, pages=20)
    _, handle = vattn.reserve((ROWS, columns(pool, 1)), torch.uint8, pool=pool)
    handle.commit(20)
    pool.set_budget(5 * pool.page_bytes)
    assert driver.physical_bytes() == 20 * pool.page_bytes
    handle.decommit(slice(8, None))
    assert driver.physical_bytes() == 8 * pool.page_bytes
    handle.decommit(slice(2, None))
    assert driver.physical_bytes() == 5 * pool.page_bytes
    handle.check()
    handle.close()


def test_a_pool_of_its_own_keeps_nothing() -> None:
    table, handle = vattn.reserve((1000, 1024), page_bytes=8192)
    assert table.device.type == "cpu"
    assert handle.pool.page_bytes == 8192
    assert handle.pool.stats().budget_bytes == 4096_000
    handle.commit(1000)
    assert handle.pool.driver.physical_bytes() == 4096_000
    handle.decommit(slice(10, None))
    assert handle.pool.driver.physical_bytes() == handle.committed_bytes == 40960
    handle.close()
    assert handle.pool.driver.physical_bytes() == 0


def test_its_budget_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VATTN_BUDGET", "1MiB")
    _, handle = vattn.reserve((1000, 1024))
    assert handle.pool.stats().budget_bytes == 1 << 20
    with pytest.raises(vattn.OutOfPages):
        handle.commit(1000)
    handle.close()


@pytest.mark.parametrize("pages", [0.013, 0.3, 1, 1.7])
@pytest.mark.parametrize("seed", range(3))
def test_a_cache_and_a_table_share_a_pool_for_long(
    driver: _core.Driver, pages: float, seed: int
) -> None:
    rng = random.Random(seed)
    pool = make_pool(driver, pages=60)
    seqs = Sequences(make_cache(pool))
    table, handle = vattn.reserve((ROWS, columns(pool, pages)), torch.uint8, pool=pool)
    length = 0
    for step in range(60):
        wanted = rng.randrange(ROWS + 1)
        try:
            handle.commit(wanted)
            assert bool((table[length:wanted] == 0).all())
            table[length:wanted] = step + 1
            length = max(length, wanted)
        except vattn.OutOfPages:
            handle.decommit(slice(length // 2, None))
            length //= 2
        with contextlib.suppress(vattn.OutOfPages):
            seqs.grow(seqs.open(), rng.randrange(1, 101))
        if len(seqs.writers) > 2:
            seqs.release(rng.choice(list(seqs.writers)))
        handle.check()
        seqs.check()
    handle.close()
    seqs.end()
    assert_all_given_back(make_cache(pool))


# Lifetime -----------------------------------------------------------------------------------------


def test_close_gives_everything_back(pool: vattn.PagePool, driver: _core.Driver) -> None:
    table, handle = vattn.reserve((ROWS, 1024), pool=pool)
    handle.commit(40)
    view = handle.view()
    with handle:
        assert not handle.closed
    handle.close()
    assert handle.closed
    assert "closed" in repr(handle)
    handle.check()
    pool.trim()
    assert driver.physical_bytes() == handle.committed_bytes == handle.committed_rows == 0
    acts: list[Any] = [
        lambda: handle.commit(1),
        lambda: handle.decommit(1),
        handle.view,
        lambda: handle.tensor,
    ]
    for act in acts:
        with pytest.raises(ValueError, match="is closed"):
            act()
    # The addresses are still the tensors': nobody else gets them.
    other, second = vattn.reserve((ROWS, 1024), pool=pool)
    assert abs(other.data_ptr() - table.data_ptr()) >= table.numel() * 4
    assert view.data_ptr() == table.data_ptr()
    second.close()


@pytest.mark.parametrize("last", ["tensor", "view", "handle"])
def test_pages_last_as_long_as_anything_over_them(
    pool: vattn.PagePool, driver: _core.Driver, last: str
) -> None:
    table, handle = vattn.reserve((ROWS, 1024), pool=pool)
    handle.commit(40)
    table[:40] = 3
    kept: Any = {"tensor": table, "view": handle.view()[5:7], "handle": handle}[last]
    del table, handle
    seen = kept.view() if last == "handle" else kept
    assert bool((seen[:2] == 3).all())
    assert pool.stats().used_bytes > 0
    del kept, seen
    assert pool.stats().used_bytes == 0
    pool.check()
    pool.trim()
    assert driver.physical_bytes() == 0


FORKED = """
import os, sys, vattn
table, handle = vattn.reserve((1000, 64))
handle.commit(100)
table[:100] = 2
pid = os.fork()
if pid == 0:
    try:
        handle.commit(200)
    except vattn.DriverError as error:
        os._exit(0 if "before fork()" in str(error) else 2)
    os._exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert float(handle.view().sum()) == 2 * 6400
handle.check()
"""


def test_a_forked_child_is_told() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
