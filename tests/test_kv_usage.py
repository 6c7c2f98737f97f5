"""What a sequence has of the cache, shares with others, and copied: slots, then requests."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import vattn
from tests.helpers import Sequences, make_cache, make_pool, pages_of
from tests.kept import KeptSequences
from tests.kv_usage import tail_bytes
from tests.stub_model import StubModel, StubRunner
from vattn import DriverError
from vattn.engine.config import EngineConfig
from vattn.engine.engine import Engine
from vattn.outputs import KVUsage
from vattn.request import Request
from vattn.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.fake_cuda.fake import FakeCuda
    from vattn import _core
    from vattn.kv.layout import Order

pytest_plugins = ("tests.cache_fixtures",)
pytestmark = pytest.mark.usefixtures("small_pages")

ORDERS: tuple[Order, ...] = ("token", "head")
OPERATING_SYSTEM = 304  # a CUresult that is neither memory nor fatal


def full_pages(cache: vattn.KVCache, tokens: int) -> int:
    """Pages that so many tokens fill: those that a fork shares."""
    page = cache.pool.page_bytes
    return sum(r.runs * (tokens * r.token_bytes // page) for r in cache.layout.regions)


# Slots ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_a_sequence_of_its_own_shares_and_copies_nothing(
    pool: vattn.PagePool, order: Order
) -> None:
    seqs = Sequences(make_cache(pool, order=order, tile=16))
    a = seqs.open()
    assert seqs.cache.usage(a) == KVUsage(0, 0, 0)
    for tokens in (1, 50, 90):
        seqs.grow(a, tokens)
        pages = pages_of(seqs.cache, [tokens])  # without the cover of the last tile
        assert seqs.cache.usage(a) == KVUsage(pages, 0, 0)
    seqs.truncate(a, 7)
    assert seqs.cache.usage(a).pages == pages_of(seqs.cache, [7])
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tokens", [1, 64, 90])
def test_a_fork_shares_full_pages_and_copies_tails(
    pool: vattn.PagePool, order: Order, tokens: int
) -> None:
    seqs = Sequences(make_cache(pool, order=order))
    cache, page = seqs.cache, pool.page_bytes
    a = seqs.new(90)
    b = seqs.fork(a, tokens)
    full = full_pages(cache, tokens)
    assert cache.usage(a) == KVUsage(pages_of(cache, [90]), full, 0)
    assert cache.usage(b) == KVUsage(pages_of(cache, [tokens]), full, tail_bytes(cache, tokens))
    stats = cache.stats()
    assert (stats.shared_bytes, stats.copied_bytes) == (full * page, tail_bytes(cache, tokens))
    runs = sum(region.runs for region in cache.layout.regions)
    assert cache.usage(b).copied_bytes < runs * page
    seqs.end()


def test_the_order_in_which_sequences_end_does_not_matter(pool: vattn.PagePool) -> None:
    seqs = Sequences(make_cache(pool, max_seqs=6))
    a = seqs.new(80)
    group = [a, *(seqs.fork(a) for _ in range(3))]
    for slot in group:
        seqs.grow(slot, 100)
    full = full_pages(seqs.cache, 80)
    for slot in [group[2], a, group[1]]:
        assert seqs.cache.usage(slot).shared_pages == full
        seqs.release(slot)
    assert seqs.cache.stats().shared_bytes == 0  # nobody else has them now
    assert seqs.cache.usage(group[3]).shared_pages == full
    later = seqs.fork(group[3], 30)
    assert seqs.cache.usage(later).shared_pages == full_pages(seqs.cache, 30)
    assert seqs.cache.usage(group[3]).shared_pages == full
    seqs.end()


@pytest.mark.parametrize("tile", [1, 64])
def test_what_is_written_anew_is_not_shared(pool: vattn.PagePool, tile: int) -> None:
    """In place, in pages that were shared, some of them covered by the last tile meanwhile."""
    seqs = Sequences(make_cache(pool, tile=tile))
    a = seqs.new(90)
    seqs.release(seqs.fork(a))
    seqs.truncate(a, 37)
    seqs.grow(a, 90)
    # The page at the end of what was left has some tokens of before.
    assert seqs.cache.usage(a).shared_pages == pages_of(seqs.cache, [37])
    seqs.truncate(a, 0)
    seqs.grow(a, 90)
    assert seqs.cache.usage(a).shared_pages == 0
    seqs.end()


def test_what_only_free_slots_keep_is_not_shared(pool: vattn.PagePool) -> None:
    seqs = KeptSequences(make_cache(pool))
    cache = seqs.cache
    a = seqs.new(90)
    seqs.keep(a)
    b = seqs.fork(a)
    assert cache.usage(b) == KVUsage(pages_of(cache, [90]), 0, tail_bytes(cache, 90))
    assert cache.stats().shared_bytes == 0
    seqs.reopen(a, 90)  # in use again
    for slot in (a, b):
        assert cache.usage(slot).shared_pages == full_pages(cache, 90)
    assert cache.usage(a).copied_bytes == 0
    for slot in (a, b):
        seqs.keep(slot)
    seqs.reopen(b, 90)  # another sequence, in the same pages
    assert cache.usage(b) == KVUsage(pages_of(cache, [90]), 0, 0)
    seqs.end()


def test_a_new_sequence_in_the_pages_of_shared_ones_has_them_alone(pool: vattn.PagePool) -> None:
    seqs = Sequences(make_cache(pool))
    a = seqs.new(90)
    b = seqs.fork(a)
    seqs.release(a)
    c = seqs.open(slot=a)  # maps in place what is stale, but not what b has
    seqs.grow(c, 90)
    assert seqs.cache.usage(b).shared_pages == full_pages(seqs.cache, 90)
    assert seqs.cache.usage(c) == KVUsage(pages_of(seqs.cache, [90]), 0, 0)
    seqs.release(b)
    d = seqs.open(slot=b)
    seqs.grow(d, 90)
    assert seqs.cache.usage(d) == KVUsage(pages_of(seqs.cache, [90]), 0, 0)
    seqs.check()
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
def test_a_write_to_a_shared_page_copies_its_beginning(pool: vattn.PagePool, order: Order) -> None:
    seqs = Sequences(make_cache(pool, order=order))
    cache = seqs.cache
    a = seqs.new(90)
    b = seqs.fork(a)
    seqs.truncate(a, 37)
    assert cache.usage(a).copied_bytes == 0
    before = cache.stats().copied_bytes
    seqs.grow(a, 38)
    copied = cache.usage(a).copied_bytes
    assert copied == cache.stats().copied_bytes - before
    shared_tail = full_pages(cache, 90) > full_pages(cache, 37)
    assert copied == (tail_bytes(cache, 37) if shared_tail else 0)
    assert cache.usage(b) == KVUsage(
        pages_of(cache, [90]), full_pages(cache, 90), tail_bytes(cache, 90)
    )
    seqs.check()
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
def test_a_reorder_counts_for_the_slots_that_change(pool: vattn.PagePool, order: Order) -> None:
    seqs = Sequences(make_cache(pool, order=order))
    cache = seqs.cache
    a = seqs.new(60)
    b, c = seqs.fork(a), seqs.fork(a)
    for slot, tokens in ((a, 70), (b, 75), (c, 80)):
        seqs.grow(slot, tokens)
    forked, before = tail_bytes(cache, 60), cache.stats().copied_bytes
    seqs.assign([a, b, c], [b, b, a])
    copied = [tail_bytes(cache, 75), forked, forked + tail_bytes(cache, 70)]
    assert [usage.copied_bytes for usage in cache.usage_many([a, b, c])] == copied
    staged = tail_bytes(cache, 70)  # of a, which is source and destination
    received = tail_bytes(cache, 75) + tail_bytes(cache, 70)
    assert cache.stats().copied_bytes - before == received + staged
    assert cache.usage(a).shared_pages == cache.usage(b).shared_pages == full_pages(cache, 75)
    seqs.check()
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
def test_beams_copy_less_than_a_page_per_run_and_step(pool: vattn.PagePool, order: Order) -> None:
    """The worst step: all go on from one, whose tails are as good as full."""
    seqs = Sequences(make_cache(pool, order=order, max_seqs=8))
    cache = seqs.cache
    beams = [seqs.new(40)]
    beams += [seqs.fork(beams[0]) for _ in range(7)]
    runs = sum(region.runs for region in cache.layout.regions)
    for tokens in range(41, 100):
        for slot in beams:
            seqs.grow(slot, tokens)
        before = cache.stats().copied_bytes
        best = beams[tokens % 8]
        seqs.assign([slot for slot in beams if slot != best], [best] * 7)
        assert cache.stats().copied_bytes - before == 7 * tail_bytes(cache, tokens)
        assert 7 * tail_bytes(cache, tokens) < 8 * runs * pool.page_bytes
    assert cache.stats().scratch_bytes == 0  # nothing was staged
    seqs.check()
    seqs.end()


@pytest.mark.parametrize("call", ["cuMemMap", "cuMemcpyDtoDAsync", "cuEventRecord"])
def test_a_reorder_that_fails_changes_no_figure(
    fake_cuda: FakeCuda, fake_driver: _core.Driver, call: str
) -> None:
    """Nor of pages that nobody else has any more, and that were given up until it failed."""
    seqs = Sequences(make_cache(make_pool(fake_driver)))
    cache = seqs.cache
    a, c = seqs.new(95), seqs.new(60)
    seqs.release(seqs.fork(a))
    before = cache.usage_many([a, c])
    assert before[0].shared_pages > 0
    failures = 0
    for nth in itertools.count(1):
        fake_cuda.fail(call, nth=nth, code=OPERATING_SYSTEM)
        try:
            seqs.assign([a], [c])
        except DriverError:
            failures += 1
        else:
            break
        assert cache.usage_many([a, c]) == before
        seqs.check(nth)
    fake_cuda.clear_failures()
    assert failures > 0
    seqs.check("done")
    assert cache.usage(a).shared_pages == full_pages(cache, 60)
    assert cache.usage(a).copied_bytes == tail_bytes(cache, 60)
    seqs.end()


def test_a_reorder_goes_on_after_its_first_copy(
    fake_cuda: FakeCuda, fake_driver: _core.Driver
) -> None:
    """What a copy has overwritten is gone, so one that fails after it is tried once more."""
    seqs = Sequences(make_cache(make_pool(fake_driver), order="head"))
    a, b, c = seqs.new(70), seqs.new(60), seqs.new(50)
    copies = sum(region.runs for region in seqs.cache.layout.regions)
    for failures, nth in enumerate((2, copies, copies + 1, 2 * copies), start=1):
        fake_cuda.fail("cuMemcpyDtoDAsync", nth=nth, code=OPERATING_SYSTEM)
        seqs.assign([a, b], [c, c])
        assert fake_cuda.stats().failures_injected == failures
        seqs.check(nth)
        for slot, tokens in ((a, 70), (b, 60)):
            seqs.truncate(slot, 20)
            seqs.grow(slot, tokens)
    seqs.end()


def test_a_reorder_that_fails_half_way_for_good_loses_the_cache(
    fake_cuda: FakeCuda, fake_driver: _core.Driver
) -> None:
    seqs = Sequences(make_cache(make_pool(fake_driver), order="head"))
    a, c = seqs.new(70), seqs.new(50)
    fake_cuda.fail("cuMemcpyDtoDAsync", nth=2, count=2, code=OPERATING_SYSTEM)
    with pytest.raises(DriverError):
        seqs.assign([a], [c])
    with pytest.raises(DriverError, match="make a new one") as caught:
        seqs.cache.tokens(c)
    assert caught.value.fatal
    del caught
    seqs.cache.close()


@pytest.mark.parametrize("order", ORDERS)
def test_pressure_takes_nothing_from_open_slots(driver: _core.Driver, order: Order) -> None:
    probe = make_cache(make_pool(driver), order=order)
    room = pages_of(probe, [90, 90])
    probe.close()
    seqs = KeptSequences(make_cache(make_pool(driver, pages=room), order=order))
    a = seqs.new(90)
    seqs.keep(a)
    b = seqs.fork(a, 60)
    before = seqs.cache.usage(b)
    c = seqs.open(slot=next(s for s in range(4) if s not in (a, b)))
    seqs.grow(c, 90)
    assert seqs.cache.evictions() > 0
    assert seqs.cache.usage(b) == before
    assert seqs.cache.usage(c) == KVUsage(pages_of(seqs.cache, [90]), 0, 0)
    seqs.check()
    seqs.end()


@pytest.mark.parametrize("shared", [0, 60])
def test_what_comes_back_from_host_memory_is_not_copied(pool: vattn.PagePool, shared: int) -> None:
    seqs = KeptSequences(make_cache(pool))
    cache = seqs.cache
    a = seqs.new(90)
    buffer = torch.empty(cache.saved_bytes(a), dtype=torch.uint8)
    cache.save(a, buffer)
    pool.driver.synchronize()
    writers = list(seqs.writers[a])
    b = seqs.fork(a, shared) if shared else seqs.open()
    cache.restore(b, 90, 0, buffer, shared)
    pool.driver.synchronize()
    seqs.writers[b] = writers
    pages = pages_of(cache, [90])
    assert cache.usage(b) == KVUsage(pages, full_pages(cache, shared), tail_bytes(cache, shared))
    seqs.check()
    seqs.end()


def test_a_window_leaves_pages_behind(pool: vattn.PagePool) -> None:
    """Pages count while they are held; those before the window belong to nobody."""
    specs = [vattn.LayerSpec(1, 24 * (pool.page_bytes // 4096), torch.float32, window=12)]
    seqs = Sequences(make_cache(pool, specs))
    a = seqs.new(50)
    b = seqs.fork(a)
    shared = seqs.cache.usage(b).shared_pages
    assert shared == full_pages(seqs.cache, 50) > 0
    for tokens in range(51, 101):
        seqs.grow(b, tokens)
    usage = seqs.cache.usage(b)
    assert usage.shared_pages == 0
    assert usage.pages < pages_of(seqs.cache, [100])
    assert seqs.cache.usage(a).shared_pages == shared  # it has them still
    seqs.end()


def test_usage_of_many_and_of_wrong_slots(pool: vattn.PagePool) -> None:
    seqs = Sequences(make_cache(pool))
    cache = seqs.cache
    handle = cache.open()
    seqs.writers[int(handle)] = []
    seqs.grow(int(handle), 90)
    b = seqs.fork(int(handle), 50)
    seen = [cache.usage(handle), cache.usage(b)]
    assert cache.usage_many([handle, b]) == seen
    assert cache.usage_many(np.array([b, int(handle)], np.int32)) == seen[::-1]
    assert cache.usage_many([]) == []
    free = next(slot for slot in range(4) if slot not in seqs.writers)
    for wrong, message in ((free, "is not open"), (9, "is not one of the 4 slots")):
        with pytest.raises(ValueError, match=message):
            cache.usage(wrong)
        with pytest.raises(ValueError, match=message):
            cache.usage_many(np.array([b, wrong], np.int32))
    seqs.release(int(handle))
    with pytest.raises(ValueError, match="is not open"):
        cache.usage(handle)
    seqs.open(slot=int(handle))
    with pytest.raises(ValueError, match="was released"):
        cache.usage(handle)
    seqs.end()


# Requests ---------------------------------------------------------------------------------------
#
# Two layers of 16 tokens per page; the stub model's text shows whether every byte is right.

PAGE, TOKENS_PER_PAGE = 4096, 16


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = make_engine()
    yield engine
    finish(engine)


def make_engine(*, pages: int = 400, **options: Any) -> Engine:
    driver = vattn._core.host_driver(strict=True)
    pool = vattn.PagePool("cpu", driver=driver, page_bytes=PAGE, budget_bytes=pages * PAGE)
    config = EngineConfig(
        **{"max_num_seqs": 8, "max_num_batched_tokens": 256, "order": "token", **options}
    )
    model: Any = StubModel(max_positions=512)
    engine = Engine(model, config, pool=pool)
    engine.runner = StubRunner(engine.cache)  # type: ignore[assignment]
    return engine


def finish(engine: Engine) -> None:
    """Nothing is left."""
    engine.check()
    engine.memory.reset_prefix_cache()
    engine.cache.trim()
    engine.check()
    assert engine.cache.stats().open_slots == 0
    assert engine.cache.pool.stats().created_bytes == 0
    engine.close()


def start(engine: Engine, ids: list[int], new: int, n: int = 1, name: str = "r") -> list[Request]:
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, n=n, detokenize=False)
    requests = engine.make_requests(name, ids, params)
    for request in requests:
        engine.add(request)
    return requests


def drive(engine: Engine, requests: list[Request], look: Callable[[], None] | None = None) -> None:
    """Until all have ended; `look` is called after every step."""
    for _ in range(10_000):
        if all(request.finished for request in requests):
            break
        engine.step()
        engine.check()
        if look is not None:
            look()
    assert {request.finish_reason for request in requests} == {"length"}


def prompt(n: int, seed: int = 0) -> list[int]:
    return [(seed * 131 + i * i + 7 * i) % 997 for i in range(n)]


def usages(requests: list[Request]) -> list[KVUsage]:
    found = [request.kv for request in requests]
    assert None not in found
    return [usage for usage in found if usage is not None]


def pages_for(tokens: int) -> int:
    return -(-tokens // TOKENS_PER_PAGE)


@pytest.mark.parametrize("is_async", [False, True])
def test_samples_share_the_prompt_and_copy_less_than_a_page(is_async: bool) -> None:
    engine = make_engine(async_scheduling=is_async)
    samples = start(engine, prompt(200), 30, n=4)
    full = 200 // TOKENS_PER_PAGE
    most_shared = 0

    def look() -> None:
        nonlocal most_shared
        stats = engine.cache.stats()
        most_shared = max(most_shared, stats.shared_bytes)
        live = [request for request in samples if request.slot >= 0]
        copied = sum(engine.memory.usage(request).copied_bytes for request in samples)
        assert copied == stats.copied_bytes
        if len(live) == 4:
            assert [engine.memory.usage(r).shared_pages for r in live] == [full] * 4

    drive(engine, samples, look)
    assert most_shared == full * PAGE
    seen = usages(samples)
    assert [usage.shared_pages for usage in seen] == [full] * 4  # whoever ended first
    assert [usage.pages for usage in seen] == [pages_for(200 + 29)] * 4
    assert seen[0].copied_bytes == 0  # it computed the prompt
    tail = 199 % TOKENS_PER_PAGE * (PAGE // TOKENS_PER_PAGE)  # all but the last token of the prompt
    assert [usage.copied_bytes for usage in seen[1:]] == [tail] * 3
    assert engine.stats().cache.copied_bytes == 3 * tail
    assert [engine.memory.usage(request) for request in samples] == seen
    finish(engine)


def test_one_sample_shares_and_copies_nothing(engine: Engine) -> None:
    (request,) = start(engine, prompt(200), 30)
    drive(engine, [request])
    assert request.kv == KVUsage(pages_for(229), 0, 0)


def test_samples_that_end_at_different_steps_tell_the_same(engine: Engine) -> None:
    """The last one, too, though it has been alone since."""
    requests = [start(engine, prompt(100), new, name=f"r{new}")[0] for new in (60, 5, 20)]
    drive(engine, requests)
    full = 100 // TOKENS_PER_PAGE
    assert [usage.shared_pages for usage in usages(requests)] == [full] * 3
    assert requests[0].kv is not None
    assert requests[0].kv.pages == pages_for(159)


def test_a_prefix_of_a_running_request_is_seen_on_both_sides(engine: Engine) -> None:
    (first,) = start(engine, prompt(100), 40, name="a")
    engine.step()
    engine.step()
    assert engine.memory.usage(first).shared_pages == 0
    (second,) = start(engine, [*prompt(90), *prompt(30, seed=1)], 8, name="b")
    drive(engine, [first, second])
    assert second.cached == 90
    full = 90 // TOKENS_PER_PAGE
    assert [usage.shared_pages for usage in usages([first, second])] == [full, full]
    assert second.kv is not None
    assert second.kv.copied_bytes == 90 % TOKENS_PER_PAGE * (PAGE // TOKENS_PER_PAGE)
    (third,) = start(engine, prompt(100), 3, name="c")  # from what is kept: nobody runs
    drive(engine, [third])
    assert third.cached > 90
    assert third.kv is not None
    assert third.kv.shared_pages == 0


def test_a_preempted_request_takes_its_copies_along(engine: Engine) -> None:
    first, second = start(engine, prompt(100), 40, n=2)
    for _ in range(4):
        engine.step()
    tail = 99 % TOKENS_PER_PAGE * (PAGE // TOKENS_PER_PAGE)
    assert engine.memory.usage(second) == KVUsage(7, 6, tail)
    engine.scheduler._preempt(second)
    assert engine.memory.usage(second) == KVUsage(0, 0, tail)
    drive(engine, [first, second])
    assert second.kv is not None
    assert second.kv.shared_pages == 6
    # It went on in its own slot, so nothing more was copied; the total says the same.
    assert second.kv.copied_bytes == tail == engine.stats().cache.copied_bytes


def test_every_end_is_told(engine: Engine) -> None:
    """By abort, after it was scheduled or before: then there is nothing to tell."""
    first, second = start(engine, prompt(100), 40, n=2)
    (waiting,) = start(engine, prompt(100, seed=3), 4, name="w")
    engine.abort("w")
    for _ in range(4):
        engine.step()
    assert waiting.finished
    assert engine.memory.usage(waiting) == KVUsage()
    engine.abort([first.id, second.id])
    engine.step()
    assert [usage.shared_pages for usage in usages([first, second])] == [6, 6]
    assert not engine.has_unfinished
