"""Random commits and decommits against a plain record of what each row must hold.

On the fake, two streams finish their work as late as they may, and a kernel over all that is
committed is still running when the next operation begins: what is unmapped too early lands in the
fake's log of violations.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vattn
from tests.drivers import fake_library_path, make_driver
from tests.fake_cuda.fake import FakeCuda, StreamMode
from tests.helpers import SMALL_PAGE, make_pool

ROWS = 64


class Table:
    """A virtual tensor, and what its rows must hold."""

    def __init__(self, kind: str, width: int, pages: int) -> None:
        self.fake = FakeCuda(fake_library_path()) if kind == "cuda_fake" else None
        if self.fake:
            self.fake.reset()
            self.fake.configure(granularity=SMALL_PAGE, stream_mode=StreamMode.LAZY)
        self.driver = make_driver(kind)
        self.streams = [self.driver.create_stream() for _ in range(2)]
        self.pool = make_pool(self.driver, pages=pages)
        self.width, self.budget = width, pages
        self.tensor, self.handle = vattn.reserve((ROWS, width), torch.uint8, pool=self.pool)
        self.record: dict[int, int] = {}

    def pages(self, rows: set[int]) -> int:
        """So many pages have a byte of one of these rows."""
        ends = [(row * self.width, (row + 1) * self.width - 1) for row in rows]
        return len({p for a, b in ends for p in range(a // SMALL_PAGE, b // SMALL_PAGE + 1)})

    def take_over(self, stream: int) -> None:
        """The stream goes on after what the other one does: its user's business."""
        for other in set(self.streams) - {stream}:
            event = self.driver.record(other)
            self.driver.stream_wait(stream, event)
            self.driver.destroy_event(event)

    def commit(self, rows: range, stream: int, value: int) -> None:
        try:
            self.handle.commit(rows, stream=stream)
        except vattn.OutOfPages:
            assert self.pages({*rows, *self.record}) > self.budget
            return
        self.driver.synchronize(stream)
        for row in set(rows) - set(self.record):
            assert bool((self.tensor[row] == 0).all())
            self.tensor[row] = self.record[row] = value

    def decommit(self, rows: range, stream: int) -> None:
        self.handle.decommit(rows, stream=stream)
        for row in rows:
            self.record.pop(row, None)

    def check(self) -> None:
        self.handle.check()
        assert {row for rows in self.handle.committed for row in rows} == set(self.record)
        assert self.handle.committed_bytes == self.pages(set(self.record)) * SMALL_PAGE
        assert self.pool.stats().used_bytes == self.handle.committed_bytes
        for row, value in self.record.items():
            assert bool((self.tensor[row] == value).all())

    def kernel(self, stream: int) -> None:
        if self.fake and self.record:
            base = self.tensor.data_ptr()
            self.fake.launch(stream, [(base + row * self.width, self.width) for row in self.record])

    def end(self) -> None:
        self.take_over(self.streams[0])
        self.handle.close(stream=self.streams[0])
        self.pool.trim()
        assert self.driver.physical_bytes() == 0
        for stream in self.streams:
            self.driver.destroy_stream(stream)
        del self.tensor, self.handle, self.pool, self.driver
        if self.fake:
            assert self.fake.violations() == []
            assert self.fake.leaks() == []


stretches = st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)).map(lambda n: range(*sorted(n)))
operations = st.lists(st.tuples(st.booleans(), stretches, st.integers(0, 1)), max_size=25)
widths = st.sampled_from([1, 100, SMALL_PAGE // 2, 3000, SMALL_PAGE, 2 * SMALL_PAGE + 7])


@pytest.mark.parametrize("kind", ["host", "host_strict", "cuda_fake"])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(operations=operations, width=widths, pages=st.integers(1, 130))
def test_against_a_plain_record(
    kind: str, operations: list[tuple[bool, range, int]], width: int, pages: int
) -> None:
    """Committed rows keep their contents, others come as zeros, not a page too many exists."""
    table = Table(kind, width, pages)
    for step, (grows, rows, which) in enumerate(operations):
        stream = table.streams[which]
        table.take_over(stream)
        if grows:
            table.commit(rows, stream, step + 1)
        else:
            table.decommit(rows, stream)
        table.check()
        table.kernel(stream)
    table.end()
