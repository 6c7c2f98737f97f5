"""bench.gpu.beside with the host driver and a stand-in for the GPU's clocks: what is recorded."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from bench.common import Budget
from bench.gpu import beside
from vattn import _core

PAGES = (16 << 10, 64 << 10)


class Event:
    """Of a kernel that outlives the call timed beside it."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._last = False

    def record(self, stream: object) -> None:
        self._last = self._gpu.asleep

    def query(self) -> bool:
        return not self._last


class Gpu:
    """What ``bench.gpu.beside`` uses of ``torch.cuda``."""

    asleep = False
    kernels = 0

    def Stream(self) -> object:
        return object()

    def Event(self) -> Event:
        return Event(self)

    def stream(self, stream: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        self.asleep = False

    def _sleep(self, cycles: int) -> None:
        self.asleep = True
        self.kernels += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    monkeypatch.setattr(beside, "cuda", made)
    monkeypatch.setattr(beside, "empty_kernel", lambda: lambda: None)
    return made


def test_every_call_is_recorded_for_every_page_size(gpu: Gpu) -> None:
    driver = _core.host_driver()
    found = beside.measure_beside(driver, PAGES, 2, Budget(None))
    rows = {(row["page_bytes"], row["op"]): row for row in found["calls"]}
    assert set(rows) == {(page, op) for page in PAGES for op in beside.OPS}
    for row in rows.values():
        assert row["still_running"] == row["rounds"] == 2
        assert row["beside_us"] <= row["beside_max_us"]
    assert gpu.kernels == len(PAGES) * len(beside.OPS) * (2 + 1)
    launches: list[Any] = found["launches"]
    assert [row["page_bytes"] for row in launches] == [page for page in PAGES for _ in range(2)]
    assert {row["what"] for row in launches} == {"alone", "while another thread maps and unmaps"}
    for row in launches:
        assert row["median_us"] <= row["p99_us"] <= row["max_us"]


def test_page_sizes_are_cut_for_time(gpu: Gpu) -> None:
    budget = Budget(0)
    found = beside.measure_beside(_core.host_driver(), PAGES, 1, budget)
    assert found["calls"] == found["launches"] == []
    assert budget.cut == ["calls beside a kernel: 16K", "calls beside a kernel: 64K"]
