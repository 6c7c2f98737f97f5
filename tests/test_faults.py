"""Every driver call fails at every position of a script once, and the cache is none the worse.

After a failure: a typed error, every sequence as it was, the invariants, and the same operation
succeeds when it is tried again. At the end of the script all bytes are right and nothing leaked.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, TypeVar

import pytest
import torch

import vattn
from tests.drivers import make_driver
from tests.fake_cuda import fake as fk
from tests.helpers import SMALL_PAGE, Sequences, assert_all_given_back, make_cache, make_pool
from tests.kept import KeptSequences
from vattn import DriverError, OutOfPages

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fake_cuda.fake import FakeCuda
    from vattn.kv.layout import Order

    Config = tuple[Order, int | None]

T = TypeVar("T")

OPERATING_SYSTEM = 304  # a CUresult that is neither memory nor fatal
CONFIGS: list[Config] = [("token", 12), ("head", None)]
PAGES = 400


class Script:
    """Uses everything that calls the driver: two streams, all operations, reuse, scratch, budgets.

    `failures` has the errors that arrived, one per injected failure at most: some are dealt with
    where they happen. Until its only failure, a script that `fails_once` is what it is without one,
    which another run has checked.
    """

    def __init__(self, fake: FakeCuda, config: Config, *, fails_once: bool = False) -> None:
        self.fake, self.order, self.window = fake, *config
        self.fails_once = fails_once
        self.failures: list[type[Exception]] = []  # no tracebacks: they would keep the cache alive
        self.seqs: KeptSequences | None = None

    def attempt(self, act: Callable[[], T]) -> T:
        """The result of `act`; if it fails, nothing has changed, and it works when repeated."""
        if self.fails_once and self.failures:
            return act()
        before = self.state()
        try:
            return act()
        except (DriverError, OutOfPages) as error:
            self.failures.append(type(error))
            if isinstance(error, DriverError) and error.fatal:
                raise
            assert self.state() == before
            if self.seqs:
                self.seqs.check(f"after {error}")
            self.recover()
        return act()

    def check(self, context: str) -> None:
        if self.seqs and (not self.fails_once or self.fake.stats().failures_injected):
            self.seqs.check(context)

    def recover(self) -> None:
        """Before the second try; for tests that take memory away."""

    def state(self) -> object:
        """What a failed operation must leave alone, besides the bytes of the tokens."""
        if not self.seqs:
            return None
        cache = self.seqs.cache
        lengths = {slot: cache.tokens(slot) for slot in self.seqs.writers}
        # A page that was copied before the failure stays its sequence's own, so not what is shared.
        pages = [usage.pages for usage in cache.usage_many(list(lengths))]
        return lengths, pages, cache.stats().open_slots, cache.pool.stats().budget_bytes

    def grow(self, slot: int, tokens: int, stream: int = 0) -> None:
        seqs = self.seqs
        assert seqs
        self.attempt(lambda: seqs.cache.ensure(slot, tokens, stream=stream))
        seqs.write(slot)

    def run(self) -> None:
        driver = self.attempt(lambda: make_driver("cuda_fake"))
        try:
            streams = [self.attempt(driver.create_stream) for _ in range(2)]
            pool = make_pool(driver, pages=PAGES)
            plain = vattn.LayerSpec(1, 24, torch.float32)
            specs = [plain, vattn.LayerSpec(2, 40, torch.bfloat16, self.window)]
            cache = self.attempt(
                lambda: make_cache(pool, specs, max_seqs=5, max_tokens=160, order=self.order)
            )
            self.seqs = KeptSequences(cache)
            self.work(self.seqs, *streams)
            self.end(self.seqs)
            self.seqs = None
            for stream in streams:
                self.attempt(lambda stream=stream: driver.destroy_stream(stream))  # type: ignore[misc]
            # What a driver does when it ends is test_cuda_faults' business.
            self.injected = self.fake.stats().failures_injected
            self.fake.clear_failures()
        except DriverError as error:
            assert error.fatal
            self.seqs = None

    def work(self, seqs: KeptSequences, one: int, two: int) -> None:
        cache, attempt, grow = seqs.cache, self.attempt, self.grow
        a = seqs.open()
        grow(a, 20)
        grow(a, 45)
        b = attempt(lambda: seqs.fork(a))
        c = attempt(lambda: seqs.fork(a, 40))
        grow(b, 60)
        attempt(lambda: seqs.truncate(c, 39))
        grow(c, 41)  # copies what it shares before it writes
        attempt(lambda: seqs.assign([a, b, c], [b, c, a]))
        self.check("after assign")
        d = seqs.open()
        attempt(lambda: cache.ensure_many([a, d], [70, 30]))
        seqs.write(a)
        seqs.write(d)
        attempt(lambda: seqs.assign([d, a], [a, c]))  # lengths differ: more to stage, less to keep
        for tokens in range(cache.tokens(d) + 1, 120, 3):  # with a window: pages come back
            grow(d, tokens, two)
        self.check("after decode")
        attempt(lambda: seqs.assign([d], [c]))  # whose tail ends in the middle of what d holds

        attempt(lambda: cache.mark_dirty(b))
        attempt(lambda: seqs.release(b, stream=one))
        b = seqs.open(slot=b)
        grow(b, 50, two)  # in place, cleaned, after the first stream
        attempt(lambda: cache.prepare([b], [90], stream=two).wait())
        grow(b, 90, two)
        attempt(lambda: seqs.release(d, stream=two))
        attempt(lambda: seqs.release(a, stream=one))
        attempt(lambda: cache.pool.set_budget(100 * SMALL_PAGE))
        e = seqs.open(slot=4)
        grow(e, 30, one)  # from what the others left
        attempt(lambda: cache.pool.set_budget(PAGES * SMALL_PAGE))
        attempt(cache.trim)
        grow(c, 80)
        self.keep_and_swap(seqs, c, one, two)
        self.check("at the end")

    def keep_and_swap(self, seqs: KeptSequences, c: int, one: int, two: int) -> None:
        """What is kept may be lost to a failure: it is a cache. What is left of it is right."""
        cache, attempt, grow = seqs.cache, self.attempt, self.grow
        buffer = torch.empty(cache.saved_bytes(c), dtype=torch.uint8)
        attempt(lambda: cache.save(c, buffer, stream=one))
        anchor, writers = cache.anchor(c), list(seqs.writers[c])
        attempt(lambda: seqs.keep(c, stream=one))
        f = attempt(lambda: seqs.fork(c, 75, stream=two))  # after the first stream, copies a tail
        grow(f, 90, two)
        if cache.kept(c)[1] >= 60:  # else it had to give up its end
            attempt(lambda: seqs.reopen(c, 60))
            grow(c, 62, one)  # copies what it shares before it writes
            attempt(lambda: cache.restore(c, len(writers), anchor, buffer, 62, stream=one))
            seqs.writers[c] += writers[62:]
            self.check("restored to what was reopened")
            attempt(lambda: seqs.release(c, stream=two))
        c = seqs.open(slot=c)
        attempt(lambda: cache.restore(c, len(writers), anchor, buffer, stream=one))
        seqs.writers[c] = writers
        self.check("restored")
        attempt(lambda: seqs.keep(f, stream=two))
        attempt(lambda: cache.pool.set_budget(60 * SMALL_PAGE))  # takes the end of it
        attempt(lambda: cache.pool.set_budget(PAGES * SMALL_PAGE))
        if cache.kept(f)[1]:
            attempt(lambda: seqs.reopen(f, cache.kept(f)[1]))

    def end(self, seqs: KeptSequences) -> None:
        for slot in list(seqs.writers):
            self.attempt(lambda slot=slot: seqs.release(slot))  # type: ignore[misc]
        self.attempt(seqs.cache.trim)
        assert_all_given_back(seqs.cache)
        slot = seqs.open()
        self.attempt(lambda: seqs.cache.ensure(slot, 20))  # close() has something to do
        seqs.cache.close()


def run_script(fake: FakeCuda, config: Config, *, fails_once: bool = False) -> Script:
    """Runs the script on a fresh fake, and proves that nothing is left of it."""
    script = Script(fake, config, fails_once=fails_once)
    script.run()
    if leaks := fake.leaks():
        gc.collect()
        leaks = fake.leaks()
    assert (fake.violations(), leaks) == ([], [])
    return script


def fresh(fake: FakeCuda) -> None:
    fake.reset()
    fake.configure(granularity=SMALL_PAGE)


def calls_of_script(fake: FakeCuda, config: Config) -> dict[str, int]:
    """Calls of each driver function in a run without failures."""
    fresh(fake)
    assert run_script(fake, config).failures == []
    return fake.calls()


def run_failing(fake: FakeCuda, config: Config, name: str, position: int, code: int) -> Script:
    fresh(fake)
    fake.fail(name, position, code)
    try:
        script = run_script(fake, config, fails_once=True)
    except BaseException as error:
        error.add_note(f"call {position} of {name} failed with {code}")
        raise
    assert len(script.failures) <= script.injected <= 1
    return script


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_call_fails_once(fake_cuda: FakeCuda, config: Config) -> None:
    calls = sum(calls_of_script(fake_cuda, config).values())
    arrived = 0
    for position in range(1, calls):
        script = run_failing(fake_cuda, config, "*", position, OPERATING_SYSTEM)
        arrived += len(script.failures)
        if script.injected == 0:
            break  # the rest are those of the driver's end
    # The others are dealt with where they happen: a capture mode that is not put back, say.
    assert arrived > 0.7 * position > 300


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_call_runs_out_of_memory_once(fake_cuda: FakeCuda, config: Config) -> None:
    calls = calls_of_script(fake_cuda, config)
    for name in (
        "cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemcpyDtoDAsync",
        "cuMemcpyDtoHAsync", "cuMemcpyHtoDAsync", "cuMemsetD8Async", "cuEventCreate",
        "cuEventRecord",
    ):  # fmt: skip
        for position in range(1, calls[name] + 1):
            run_failing(fake_cuda, config, name, position, fk.OUT_OF_MEMORY)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_function_fails_at_its_first_and_last_call(
    fake_cuda: FakeCuda, config: Config
) -> None:
    """By name, so that a function which the script stops using is noticed."""
    calls = calls_of_script(fake_cuda, config)
    assert {
        "cuMemAddressReserve", "cuMemAddressFree", "cuMemCreate", "cuMemRelease", "cuMemMap",
        "cuMemUnmap", "cuMemSetAccess", "cuMemcpyDtoDAsync", "cuMemcpyDtoHAsync",
        "cuMemcpyHtoDAsync", "cuMemsetD8Async", "cuEventRecord", "cuEventSynchronize",
        "cuStreamWaitEvent",
    } <= set(calls)  # fmt: skip
    for name, count in calls.items():
        for position in {1, count}:
            run_failing(fake_cuda, config, name, position, OPERATING_SYSTEM)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_device_smaller_than_the_budget(fake_cuda: FakeCuda, config: Config) -> None:
    """Another program takes memory: OutOfPages at each size, until there is enough again."""

    class Short(Script):
        def recover(self) -> None:
            fake_cuda.configure(device_bytes=PAGES * SMALL_PAGE)

    calls_of_script(fake_cuda, config)
    peak = fake_cuda.stats().bytes_peak // SMALL_PAGE
    for pages in range(0, peak, 3):
        fresh(fake_cuda)
        fake_cuda.configure(device_bytes=max(1, pages * SMALL_PAGE))
        script = Short(fake_cuda, config)
        script.run()
        assert set(script.failures) <= {OutOfPages}
        assert len(script.failures) == 1 or pages > peak // 2, pages
        assert (fake_cuda.violations(), fake_cuda.leaks()) == ([], [])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_lost_context_is_fatal_and_crashes_nothing(fake_cuda: FakeCuda, config: Config) -> None:
    calls = sum(calls_of_script(fake_cuda, config).values())
    for position in range(1, calls, 3):
        fresh(fake_cuda)
        fake_cuda.fail("*", position, fk.ILLEGAL_ADDRESS, count=-1)
        script = Script(fake_cuda, config)
        try:
            script.run()
        except DriverError as error:  # not even a driver
            assert error.fatal
        assert script.failures in ([], [DriverError])
        del script
        fake_cuda.reset()


def test_a_lost_cache_says_so_and_its_pool_goes_on(fake_cuda: FakeCuda) -> None:
    """A call fails, and so does undoing it: the cache gives up, others on its pool do not."""
    fresh(fake_cuda)
    driver = make_driver("cuda_fake")
    pool = make_pool(driver, pages=60)
    seqs, other = Sequences(make_cache(pool)), Sequences(make_cache(pool))
    a = seqs.new(90)
    b = seqs.fork(a)
    seqs.truncate(b, 20)
    fake_cuda.fail("cuMemSetAccess", code=OPERATING_SYSTEM, count=3)
    fake_cuda.fail("cuMemMap", nth=3, code=OPERATING_SYSTEM, count=3)
    with pytest.raises(DriverError) as first:
        seqs.cache.ensure(b, 60)
    assert not first.value.fatal
    fake_cuda.clear_failures()
    with pytest.raises(DriverError, match="drop this cache and make a new one") as later:
        seqs.cache.ensure(b, 60)
    assert later.value.fatal
    other.new(100)
    other.check()
    seqs.cache.close()
    other.new(100)
    other.check()
    other.end()


def test_errors_of_the_mapper_arrive_at_the_ticket(fake_cuda: FakeCuda) -> None:
    fresh(fake_cuda)
    driver = make_driver("cuda_fake")
    pool = make_pool(driver)
    position = 0
    while True:
        position += 1
        seqs = Sequences(make_cache(pool))
        a, b = seqs.new(30), seqs.new(10)
        fake_cuda.fail("*", position, OPERATING_SYSTEM)
        before = fake_cuda.stats().failures_injected
        ticket = seqs.cache.prepare([a, b], [60, 50])
        try:
            ticket.wait()
        except DriverError as error:
            assert error.code == OPERATING_SYSTEM
            assert ticket.done()
        hit = fake_cuda.stats().failures_injected > before
        fake_cuda.clear_failures()
        seqs.check()
        assert seqs.cache.prepare([a, b], [60, 50]).wait()
        for slot in (a, b):
            seqs.grow(slot, 60)
        seqs.check()
        seqs.end()
        if not hit:
            break
    assert position > 20


def test_pages_ahead_may_fail_to_come(fake_cuda: FakeCuda) -> None:
    """The background's errors are nobody's: who needs a page meets the next one."""
    fresh(fake_cuda)
    driver = make_driver("cuda_fake")
    fake_cuda.fail("cuMemCreate", code=OPERATING_SYSTEM, count=0)
    pool = make_pool(driver, pages=50, ahead_pages=10)
    pool.mapper.drain()
    assert pool.stats().created_bytes == 0
    seqs = Sequences(make_cache(pool, max_seqs=2))
    a = seqs.open()
    with pytest.raises(DriverError, match="cuMemCreate failed: CUDA_ERROR_OPERATING_SYSTEM"):
        seqs.cache.ensure(a, 10)
    fake_cuda.clear_failures()
    seqs.grow(a, 100)
    pool.mapper.drain()
    assert pool.stats().free_bytes >= 5 * SMALL_PAGE
    seqs.check()
    pool.mapper.stop()
    seqs.end()
