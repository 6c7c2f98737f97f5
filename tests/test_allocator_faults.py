"""Every driver call fails at every position of a script once, and the allocator is none the worse.

After a failure: a typed error, every block as it was, the invariants, and the same operation
succeeds when it is tried again. At the end all bytes are right and nothing leaked.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.allocator_model import KIB, MIB, Allocator, Block
from tests.drivers import FakeMemory, HostMemory, make_driver
from vattn import DriverError, OutOfPages, _core

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fake_cuda.fake import FakeCuda

T = TypeVar("T")

OPERATING_SYSTEM = 304  # a CUresult that is neither memory nor fatal
OUT_OF_MEMORY = 2
PAGE = 64 * KIB
CALLS = (
    "cuMemAddressReserve",
    "cuMemCreate",
    "cuMemMap",
    "cuMemSetAccess",
    "cuMemUnmap",
    "cuMemRelease",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuStreamWaitEvent",
    "cuStreamCreate",
    "cuStreamSynchronize",
    "cuMemcpyDtoHAsync",
    "cuMemcpyHtoDAsync",
)


class Script:
    """Uses everything that calls the driver: growth, moves, other streams, tags, graphs, trim."""

    def __init__(self, fake: FakeCuda) -> None:
        self.fake = fake
        self.failures = 0
        self.allocator: Allocator | None = None

    def attempt(self, act: Callable[[], T]) -> T:
        """The result of `act`; if it fails, nothing has changed, and it works when repeated."""
        before = self.state()
        try:
            return act()
        except (DriverError, OutOfPages) as error:
            self.failures += 1
            assert not getattr(error, "fatal", False)
            assert self.state() == before
            assert self.allocator is not None
            self.allocator.core.check()
            self.allocator.verify()
        return act()

    def state(self) -> object:
        """What a failed operation must leave alone."""
        if self.allocator is None:
            return None
        figures = self.allocator.figures
        counts = ("allocation", "allocated_bytes", "requested_bytes")
        return [figures["all"][name]["current"] for name in counts]

    def pages(self, n: float, stream: int = 0, tag: int = 0) -> int:
        allocator = self.allocator
        assert allocator is not None
        return self.attempt(lambda: allocator.pages(n, stream, tag))

    def free(self, *addresses: int) -> None:
        allocator = self.allocator
        assert allocator is not None
        for address in addresses:
            self.attempt(lambda address=address: allocator.free(address))  # type: ignore[misc]

    def run(self) -> None:
        driver = make_driver("cuda_fake")
        one, two = driver.create_stream(), driver.create_stream()
        # Failures of the mapper's thread have nobody to tell; here all work is the caller's.
        self.allocator = Allocator(driver, FakeMemory(self.fake), pages=100, page=PAGE)
        self.work(self.allocator, one, two)
        self.injected = self.fake.stats().failures_injected
        self.fake.clear_failures()
        self.allocator.end()
        self.allocator = None
        for stream in (one, two):
            driver.destroy_stream(stream)

    def work(self, allocator: Allocator, one: int, two: int) -> None:
        core, attempt = allocator.core, self.attempt
        tag = _core.tag_id("faults")
        blocks = [self.pages(18, one) for _ in range(4)]
        small = [self.pages(0.01, one) for _ in range(5)]
        self.free(blocks[0], blocks[2])
        big = self.pages(40, one)  # pages move
        self.fake.hold(one)
        self.fake.launch(one, [(big, 40 * PAGE)])
        self.free(small[1], big)
        other = self.pages(45, two)  # behind the other stream's work
        self.fake.release(one)
        core.record_stream(other, one)
        core.record_stream(small[0], two)
        self.free(other, small[0])
        tagged = [self.pages(n, one, tag) for n in (17, 0.5, 3)]
        self.free(tagged[1])
        attempt(lambda: core.pause(tag, backup=True))
        more = self.pages(30, two)
        self.free(more)
        attempt(lambda: core.resume(tag))
        allocator.verify()
        attempt(core.trim)
        core.begin_graph_pool((0, 9), [two])
        node = attempt(lambda: core.allocate(17 * PAGE, two))
        late = blocks[1]
        core.record_stream(late, two)
        self.free(late)
        self.finish_capture(core)
        attempt(lambda: core.free(node))
        core.release_graph_pool((0, 9))
        attempt(lambda: core.trim(10 * PAGE))
        self.pages(60, one)
        attempt(core.trim)
        attempt(core.settle)

    def finish_capture(self, core: _core.CachingAllocator) -> None:
        """The end of a capture does not fail for want of an event."""
        core.end_graph_pool((0, 9))
        core.check()


def run(fake: FakeCuda, name: str, nth: int, code: int) -> int:
    """Runs the script with one failure; returns how many were injected."""
    fake.reset()
    fake.configure(granularity=PAGE, watchdog_ms=5000)
    script = Script(fake)
    driver_ready = nth + setup_calls(fake, name)
    fake.fail(name, nth=driver_ready, code=code)
    script.run()
    if fake.leaks():
        gc.collect()  # takes 0.2 s
    assert fake.violations() == []
    assert fake.leaks() == []
    return script.injected


_setup: dict[str, int] = {}


def setup_calls(fake: FakeCuda, name: str) -> int:
    """Calls that make the driver and its streams, which are not what is tested here."""
    if name not in _setup:
        driver = make_driver("cuda_fake")
        streams = [driver.create_stream() for _ in range(2)]
        _setup.update({call: fake.calls(call) for call in CALLS})
        for stream in streams:
            driver.destroy_stream(stream)
        del driver
        gc.collect()
        fake.reset()
        fake.configure(granularity=PAGE, watchdog_ms=5000)
    return _setup[name]


@pytest.mark.parametrize("name", CALLS)
def test_any_call_may_fail_once(fake_cuda: FakeCuda, name: str) -> None:
    code = OUT_OF_MEMORY if name == "cuMemCreate" else OPERATING_SYSTEM
    nth = 1
    while run(fake_cuda, name, nth, code):
        nth += 1 + nth // 5  # every early one, and then fewer
    assert nth > 1, f"the script never calls {name}"


# Random operations ------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Random operations on a pool that is always short, on the host's driver."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = HostMemory()
        self.driver = _core.host_driver(strict=True)
        self.allocator = Allocator(self.driver, self.memory, pages=60, page=16 * KIB)
        self.tag = _core.tag_id("random")
        self.limit = 0

    @property
    def core(self) -> _core.CachingAllocator:
        return self.allocator.core

    @property
    def paused(self) -> bool:
        return self.core.is_paused(self.tag)

    def usable(self) -> list[Block]:
        return [b for b in self.allocator.live.values() if not (b.tag and self.paused)]

    @rule(
        nbytes=st.one_of(
            st.integers(1, 2048), st.integers(2049, 64 * KIB), st.integers(64 * KIB, MIB * 3 // 2)
        ),
        stream=st.integers(0, 2),
        tagged=st.booleans(),
    )
    def allocate(self, nbytes: int, stream: int, tagged: bool) -> None:
        tag = self.tag if tagged else 0
        if tagged and self.paused:
            with pytest.raises(ValueError, match="is paused"):
                self.allocator.allocate(nbytes, stream, tag)
            return
        try:
            self.allocator.allocate(nbytes, stream, tag)
        except _core.OutOfMemory:
            # On the host all work is done: whatever nobody holds could have been had.
            assert nbytes + self.held_bytes() > self.room_bytes()

    def held_bytes(self) -> int:
        """At most: every block holds whole pages at both its ends."""
        page = self.allocator.page
        small = {(b.stream, b.tag) for b in self.allocator.live.values()}
        total = sum(-(-b.nbytes // page) * page + 2 * page for b in self.allocator.live.values())
        return total + 2 * page * (1 + len(small))

    def room_bytes(self) -> int:
        budget = self.allocator.pool.stats().budget_bytes
        return min(budget, self.limit or budget)

    @precondition(lambda self: self.allocator.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.allocator.free(data.draw(st.sampled_from(sorted(self.allocator.live))))

    @precondition(lambda self: self.allocator.live)
    @rule(data=st.data(), inner=st.integers(1, 511))
    def free_badly(self, data: st.DataObject, inner: int) -> None:
        address = data.draw(st.sampled_from(sorted(self.allocator.live)))
        before = self.allocator.figures["all"]["allocation"]["current"]
        for bad, nbytes in ((address + inner, None), (address, 10 * MIB)):
            with pytest.raises(ValueError, match="free of"):
                self.core.free(bad, nbytes)
        assert self.allocator.figures["all"]["allocation"]["current"] == before

    @precondition(lambda self: self.usable())
    @rule(data=st.data(), stream=st.integers(0, 3))
    def record(self, data: st.DataObject, stream: int) -> None:
        block = data.draw(st.sampled_from(sorted(b.address for b in self.usable())))
        self.core.record_stream(block, stream)

    @rule(keep=st.integers(0, 30))
    def trim(self, keep: int) -> None:
        self.core.trim(keep * self.allocator.page)

    @rule(backup=st.booleans())
    def pause_or_resume(self, backup: bool) -> None:
        if not self.paused:
            self.core.pause(self.tag, backup=backup)
            self.backup = backup
            return
        try:
            self.core.resume(self.tag)
        except _core.OutOfMemory:
            assert self.paused
            return
        for block in self.allocator.live.values():
            if block.tag and not self.backup:
                self.allocator.mark(block)

    @rule(pages=st.integers(20, 80))
    def set_budget(self, pages: int) -> None:
        self.allocator.pool.set_budget(pages * self.allocator.page)

    @rule(pages=st.integers(0, 70))
    def set_limit(self, pages: int) -> None:
        self.limit = pages * self.allocator.page
        self.core.set_limit(self.limit)

    @invariant()
    def holds(self) -> None:
        self.core.check()
        for block in self.usable():
            self.allocator.verify_block(block)
        assert self.allocator.figures["all"]["allocated_bytes"]["current"] == (
            self.allocator.live_bytes
        )

    def teardown(self) -> None:
        self.allocator.pool.set_budget(200 * self.allocator.page)
        self.core.set_limit(0)
        for address in list(self.allocator.live):
            self.allocator.free(address)
        if self.paused:
            self.core.resume(self.tag)
        self.allocator.end()
        self.memory.close()


Machine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestRandomOperations = Machine.TestCase
