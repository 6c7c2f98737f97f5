"""`vattn.reserve` with arguments that make no sense: the error names the value and the remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import vattn
from vattn import _core

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS = 100


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((8,), {}, TypeError, r"shape=8 is not a sequence of integers; write \(rows"),
        (("88",), {}, TypeError, "shape='88'"),
        (((4, 2.5),), {}, TypeError, r"2\.5 is not an integer"),
        (((),), {}, ValueError, "has no rows"),
        (((0, 8),), {}, ValueError, r"shape=\(0, 8\).*must be a positive integer"),
        (((8, 0),), {}, ValueError, r"shape=\(8, 0\).*must be a positive integer"),
        (((8, -1),), {}, ValueError, "must be a positive integer"),
        (((2**40, 2**10),), {}, ValueError, r"4503599627370496 bytes.*beyond 2\*\*46"),
        (((8,), torch.quint8), {}, ValueError, r"dtype=torch.quint8 is not supported"),
        (((8,), "float32"), {}, ValueError, r"dtype='float32' is not supported"),
        (((8,), torch.float32, "meta"), {}, ValueError, "device='meta' is not supported"),
        (((8,),), {"page_bytes": 0}, ValueError, "page_bytes=0 must be a positive"),
        (((8,),), {"page_bytes": 5000}, ValueError, "page_bytes=5000 is not a multiple"),
        (((8,),), {"pool": 3}, TypeError, r"pool=3 is not a vattn\.PagePool"),
    ],
)
def test_bad_reservations(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        vattn.reserve(*arguments, **options)


def test_a_pool_that_does_not_fit() -> None:
    pool = vattn.PagePool(page_bytes=4096, budget_bytes=4096)
    with pytest.raises(ValueError, match="device='cuda:0', but the pool given is on cpu"):
        vattn.reserve((8,), device="cuda:0", pool=pool)
    with pytest.raises(ValueError, match="page_bytes=4096 belongs to the pool"):
        vattn.reserve((8,), pool=pool, page_bytes=4096)
    vattn.reserve((8,), device="cpu", pool=pool)[1].close()


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (-1, ValueError, r"rows=-1 is not within the 100 rows"),
        (101, ValueError, r"rows=101 is not within the 100 rows"),
        (slice(-3, None), ValueError, "is not within"),
        (slice(0, 101), ValueError, "is not within"),
        (slice(5, 4), ValueError, "is not within"),
        (slice(0, 10, 2), ValueError, "has a step"),
        (range(9, -1, -1), ValueError, "has a step"),
        (2.0, TypeError, r"rows=2\.0 is not a number of rows"),
        (True, TypeError, "rows=True is not a number"),
        (None, TypeError, "rows=None is not a number"),
        ([1, 2], TypeError, r"rows=\[1, 2\]"),
        (slice(0.0, 3), TypeError, "not an integer"),
    ],
)
def test_bad_rows(rows: Any, error: type[Exception], message: str) -> None:
    _, handle = vattn.reserve((ROWS, 8))
    handle.commit(10)
    for act in (handle.commit, handle.decommit):
        with pytest.raises(error, match=message):
            act(rows)
    assert handle.committed == [range(10)]
    handle.close()


def test_nothing_happens_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zeros would be written by each replay of the graph."""
    table, handle = vattn.reserve((ROWS, 8))
    handle.commit(10)
    table[:10] = 3
    with monkeypatch.context() as patch:
        patch.setattr(handle.pool, "device", torch.device("cuda", 0))
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        acts: list[Callable[[], None]] = [
            lambda: handle.commit(20),
            lambda: handle.decommit(5),
            handle.close,
        ]
        for act in acts:
            with pytest.raises(RuntimeError, match="is being captured into a CUDA graph"):
                act()
    assert handle.committed == [range(10)]
    assert bool((table[:10] == 3).all())
    handle.close()


def test_the_core_checks_rows_too() -> None:
    pool = vattn.PagePool(page_bytes=4096, budget_bytes=4096)
    core = _core.VirtualRange(pool.core, rows=10, row_bytes=8)
    for begin, end in ((0, 11), (5, 4)):
        with pytest.raises(ValueError, match="are not a range of the 10 reserved rows"):
            core.commit(begin, end)
    for rows, row_bytes in ((0, 8), (8, 0), (2**62, 4)):
        with pytest.raises(ValueError, match=r"must be positive|beyond the address space"):
            _core.VirtualRange(pool.core, rows=rows, row_bytes=row_bytes)
