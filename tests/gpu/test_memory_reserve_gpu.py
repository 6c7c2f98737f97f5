"""`vattn.reserve` on a CUDA device: rows that come and go beside kernels that are still running."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vattn

ROWS, WIDTH = 4096, 1024  # float32: 512 rows are 2 MiB

cuda: Any = torch.cuda  # parts of it are untyped


@pytest.fixture
def pool(device: str) -> vattn.PagePool:
    return vattn.PagePool(device, budget_bytes="64MiB")


@pytest.fixture
def streams(device: str) -> None:
    if device != "cuda":
        pytest.skip("needs CUDA streams")


def keep_busy() -> torch.Tensor:
    """Tens of milliseconds of work on the current stream."""
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        busy = torch.tanh(busy @ busy / 64)
    return busy


def end(pool: vattn.PagePool) -> None:
    pool.check()
    pool.trim()
    assert pool.driver.physical_bytes() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_grows_and_shrinks_in_place(pool: vattn.PagePool, dtype: torch.dtype) -> None:
    table, handle = vattn.reserve((ROWS, WIDTH), dtype, pool=pool)
    address = table.data_ptr()
    for rows in (1, 700, 1500):
        held = handle.committed_rows
        handle.commit(rows)
        assert bool((table[held:rows] == 0).all())
        table[held:rows] = 1
    assert handle.committed_bytes == pool.stats().used_bytes < table.numel() * dtype.itemsize
    handle.decommit(slice(100, 1400))
    handle.commit(1500)
    assert bool((table[100:1400] == 0).all())
    assert bool((table[:100] == 1).all())
    assert bool((table[1400:1500] == 1).all())
    assert handle.view().data_ptr() == table.data_ptr() == address
    handle.check()
    handle.close()
    end(pool)


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("how", ["decommit", "close", "drop"])
def test_pages_go_after_the_work_of_the_stream(pool: vattn.PagePool, how: str) -> None:
    """An early unmap would end the context, which the fixture after each test would report."""
    table, handle = vattn.reserve((ROWS, WIDTH), pool=pool)
    with cuda.stream(cuda.Stream()):
        handle.commit(2048)
        table[:2048] = 1 + 0 * keep_busy()[0, 0]
        total = table[:2048].sum()
        if how == "decommit":
            handle.decommit(slice(512, None))
        elif how == "close":
            handle.close()
        del table
        if how == "drop":
            del handle
        assert float(total) == 2048 * WIDTH
    if how == "decommit":
        handle.close()
    end(pool)


@pytest.mark.usefixtures("streams")
def test_a_captured_graph_goes_on_working_as_the_table_grows(pool: vattn.PagePool) -> None:
    table, handle = vattn.reserve((ROWS, WIDTH), pool=pool)
    handle.commit(100)
    ids = torch.zeros(8, dtype=torch.int64, device="cuda")
    out = torch.empty(8, WIDTH, device="cuda")

    def look_up() -> None:
        torch.index_select(table, 0, ids, out=out)

    look_up()
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        look_up()
        with pytest.raises(RuntimeError, match="is being captured"):
            handle.commit(200)
    for rows in (100, 1000, ROWS):
        handle.commit(rows)
        table[rows - 1] = rows
        ids.fill_(rows - 1)
        graph.replay()
        assert bool((out == rows).all())
    del graph
    cuda.synchronize()
    handle.close()
    end(pool)


def test_example(device: str) -> None:
    path = Path(__file__).resolve().parents[2] / "examples" / "growing_embedding.py"
    done = subprocess.run(
        [sys.executable, str(path), "--device", device],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "kept 1000 words" in done.stdout
