"""`vattn.reserve`: tensors whose rows get memory when they are committed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import vattn
from vattn.virtual_tensor import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.drivers import Memory
    from vattn import _core
    from vattn.virtual_tensor import RowsLike

pytest_plugins = ("tests.cache_fixtures",)
pytestmark = pytest.mark.usefixtures("small_pages")

ROWS = 100


def columns(pool: vattn.PagePool, pages: float) -> int:
    """So many bytes that a row of them is this part of a page."""
    return int(pool.page_bytes * pages)


def pages_of(rows: Iterable[int], row_bytes: int, page_bytes: int) -> set[int]:
    """The pages that these rows have bytes in, by the definition."""
    return {
        page
        for row in rows
        for page in range(row * row_bytes // page_bytes, -(-(row + 1) * row_bytes // page_bytes))
    }


# Growing in place ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [3 / 8, 1, 2.5])
def test_grows_in_place_and_costs_the_pages_of_its_rows(
    pool: vattn.PagePool, driver: _core.Driver, pages: float
) -> None:
    width = columns(pool, pages)
    table, handle = vattn.reserve((ROWS, width), torch.uint8, pool=pool)
    assert table.shape == (ROWS, width)
    assert table.is_contiguous()
    assert (handle.rows, handle.committed_rows, handle.committed_bytes) == (ROWS, 0, 0)
    assert driver.physical_bytes() == 0
    address, last = table.data_ptr(), 0
    for rows in (1, 2, 7, 7, 40, ROWS):
        handle.commit(rows)
        assert bool((table[last:rows] == 0).all())
        for row in range(last, rows):
            table[row] = row + 1
        last = rows
        expected = len(pages_of(range(rows), width, pool.page_bytes)) * pool.page_bytes
        assert handle.committed_bytes == driver.physical_bytes() == expected
        handle.check()
    assert table.data_ptr() == handle.tensor.data_ptr() == address
    assert table[:, width // 2].tolist() == list(range(1, ROWS + 1))
    handle.close()


def test_what_is_committed_already_costs_no_call(pool: vattn.PagePool) -> None:
    table, handle = vattn.reserve((ROWS, columns(pool, 1)), torch.int8, pool=pool)
    handle.commit(50)
    table[:50] = 7
    calls = pool.driver_calls()
    handle.commit(50)
    handle.commit(slice(10, 20))
    handle.commit(0)
    handle.decommit(slice(60, None))
    assert pool.driver_calls() == calls
    assert bool((table[:50] == 7).all())
    handle.close()


def test_pages_side_by_side_take_one_call_each(pool: vattn.PagePool) -> None:
    _, handle = vattn.reserve((ROWS, columns(pool, 1)), torch.uint8, pool=pool)
    before = pool.driver_calls()
    handle.commit(ROWS)
    calls = pool.driver_calls()
    assert calls["set_access"] - before["set_access"] <= 1
    assert calls["fill"] - before["fill"] <= 1
    handle.decommit(ROWS)
    assert pool.driver_calls()["unmap"] - before["unmap"] == 1
    handle.close()


def test_only_committed_memory_exists(
    driver_kind: str, pool: vattn.PagePool, memory: Memory
) -> None:
    width = columns(pool, 1)
    table, handle = vattn.reserve((ROWS, width), torch.uint8, pool=pool)
    handle.commit(slice(10, 20))
    expected = None if driver_kind == "cuda" else True
    assert memory.accessible(table.data_ptr() + 10 * width) is expected
    assert memory.accessible(table.data_ptr() + 20 * width - 1) is expected
    for row in (9, 20, 99):  # on the host, what is not mapped reads as zeros
        outside = None if driver_kind == "cuda" else driver_kind == "host"
        assert memory.accessible(table.data_ptr() + row * width) is outside
    handle.close()


# Giving up ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [3 / 8, 1, 2.5])
def test_rows_given_up_return_as_zeros(pool: vattn.PagePool, pages: float) -> None:
    """Those that share a page with others too; the others keep what they hold."""
    width = columns(pool, pages)
    table, handle = vattn.reserve((ROWS, width), torch.uint8, pool=pool)
    handle.commit(ROWS)
    table[:] = 9
    handle.decommit(slice(11, 61))
    assert handle.committed == [range(11), range(61, ROWS)]
    kept = pages_of([*range(11), *range(61, ROWS)], width, pool.page_bytes)
    assert handle.committed_bytes == len(kept) * pool.page_bytes
    stats = pool.stats()
    assert stats.used_bytes == handle.committed_bytes
    assert stats.free_bytes == stats.created_bytes - stats.used_bytes > 0
    handle.check()
    handle.commit(range(11, 61))
    assert bool((table[11:61] == 0).all())
    assert bool((table[:11] == 9).all())
    assert bool((table[61:] == 9).all())
    handle.close()


def test_a_page_goes_with_the_last_row_in_it(pool: vattn.PagePool) -> None:
    width = columns(pool, 1 / 4)
    _, handle = vattn.reserve((8, width), torch.uint8, pool=pool)
    handle.commit(8)
    for row in (1, 3, 0):
        handle.decommit(slice(row, row + 1))
        assert handle.committed_bytes == 2 * pool.page_bytes
    handle.decommit(slice(2, 3))
    assert handle.committed_bytes == pool.page_bytes
    assert handle.committed == [range(4, 8)]
    handle.check()
    handle.close()


def test_view_is_the_committed_prefix(pool: vattn.PagePool) -> None:
    table, handle = vattn.reserve((ROWS, 8), pool=pool)
    assert handle.view().shape == (0, 8)
    handle.commit(slice(20, 30))
    assert handle.view().shape == (0, 8)
    handle.commit(12)
    assert handle.view().shape == (12, 8)
    handle.commit(20)
    assert handle.view().shape == (30, 8)
    assert handle.view().data_ptr() == table.data_ptr()
    assert float(handle.view().sum()) == 0
    handle.close()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (np.int64(3), [range(3)]),
        (0, []),
        (ROWS, [range(ROWS)]),
        (slice(None), [range(ROWS)]),
        (slice(None, 4), [range(4)]),
        (slice(96, None, 1), [range(96, ROWS)]),
        (range(5, 9), [range(5, 9)]),
        (range(5, 5), []),
    ],
)
def test_forms_of_rows(rows: RowsLike, expected: list[range]) -> None:
    with vattn.reserve((ROWS, 8))[1] as handle:
        handle.commit(rows)
        assert handle.committed == expected
        assert handle.committed_rows == sum(map(len, expected))
        handle.decommit(rows)
        assert (handle.committed, handle.committed_bytes) == ([], 0)


# Element types ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(pool: vattn.PagePool, dtype: torch.dtype) -> None:
    table, handle = vattn.reserve((10, 3, 5), dtype, pool=pool)
    handle.commit(4)
    assert (table.dtype, table.shape, table.stride()) == (dtype, (10, 3, 5), (15, 5, 1))
    assert table.device == pool.device
    zeros, ones = torch.zeros(3, 5).to(dtype), torch.ones(3, 5).to(dtype)
    table[2] = ones.to(pool.device)
    assert table[1].cpu().view(torch.uint8).equal(zeros.view(torch.uint8))
    assert table[2].cpu().view(torch.uint8).equal(ones.view(torch.uint8))
    handle.close()


def test_an_ordinary_tensor_to_autograd() -> None:
    """Whoever asks first: made in inference mode, too."""
    with torch.inference_mode():
        table, handle = vattn.reserve((1000, 4))
    handle.commit(10)
    weight = torch.nn.Parameter(handle.view())
    optimizer = torch.optim.SGD([weight], lr=1.0)
    loss = torch.nn.functional.embedding(torch.tensor([1, 3, 3]), weight).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert table[:4, 0].tolist() == [0, -1, 0, -2]
    handle.close()
