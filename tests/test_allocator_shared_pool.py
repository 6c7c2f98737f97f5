"""One pool for tensors and sequences: nothing is split, and each gets what the other does without.

When memory runs out: idle pages of the allocator go first, then what the KV cache keeps in case
that somebody asks for it again, then comes an error that says who holds what.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

import vattn
from tests.allocator_model import KIB, MIB, PAGE, Allocator
from tests.drivers import make_driver
from tests.engine_cases import EMBEDDED_PATH
from tests.fake_cuda.fake import StreamMode
from tests.helpers import Sequences, make_cache
from tests.kept import KeptSequences
from vattn import _core

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.drivers import Memory
    from tests.fake_cuda.fake import FakeCuda

pytest_plugins = ("tests.allocator_fixtures", "tests.cache_fixtures")
pytestmark = pytest.mark.usefixtures("small_pages")

PAGES = 120


@pytest.fixture
def shared(driver: _core.Driver, memory: Memory) -> Iterator[Allocator]:
    """An allocator whose pool has 120 of the smallest pages; tests make caches on it."""
    allocator = Allocator(driver, memory, pages=PAGES, page=4 * KIB)
    yield allocator
    allocator.end()


def end(shared: Allocator, seqs: Sequences) -> None:
    """Both give everything back, and nothing is left."""
    for address in list(shared.live):
        shared.free(address)
    shared.trim()
    seqs.end()


# Each gives to the other ------------------------------------------------------------------------


def test_a_growing_cache_gets_idle_ranges(shared: Allocator) -> None:
    """Of all kinds: large ones, ones in lists by size, slabs that are empty."""
    sizes = [0.1, 0.5, 1, 3, 20, 0.25, 40]
    for address in [shared.pages(n) for n in sizes for _ in range(2 if n < 20 else 1)]:
        shared.free(address)
    keep = shared.pages(10)
    seqs = Sequences(make_cache(shared.pool, max_seqs=8))
    for _ in range(7):
        seqs.new(100)  # 15 pages each
        seqs.check()
        shared.core.check()
        shared.verify()
    assert shared.mapped_pages <= PAGES - 7 * 15
    with pytest.raises(vattn.OutOfPages):
        seqs.new(100)
    shared.free(keep)
    seqs.release(max(seqs.writers))
    end(shared, seqs)


def test_tensors_get_what_the_cache_keeps(shared: Allocator) -> None:
    """In this order: idle ranges, kept sequences, and then an error that names all holders."""
    seqs = KeptSequences(make_cache(shared.pool, max_seqs=8))
    slots = [seqs.new(100) for _ in range(6)]
    for slot in slots[:4]:
        seqs.keep(slot)
    idle = shared.pages(20)
    shared.free(idle)
    before = seqs.cache.stats().kept_bytes
    shared.pages(25)
    assert seqs.cache.stats().kept_bytes == before, "idle memory would have done"
    tag = _core.tag_id("weights")
    shared.pages(40, tag=tag)
    assert seqs.cache.stats().kept_bytes < before
    seqs.check()
    with pytest.raises(_core.OutOfMemory) as caught:
        shared.pages(60)
    text = str(caught.value)
    assert "weights: 160.00 KiB" in text or driver_has_large_pages(shared)
    for part in ("out of memory", "Tried to allocate", "KV caches", "raise the budget"):
        assert part in text
    seqs.check()
    shared.core.check()
    shared.verify()
    for slot in slots[4:]:
        seqs.release(slot)
    shared.pages(28)
    end(shared, seqs)


def driver_has_large_pages(shared: Allocator) -> bool:
    return shared.page != 4 * KIB


def test_a_live_sequence_is_nobodys(shared: Allocator) -> None:
    seqs = Sequences(make_cache(shared.pool, max_seqs=8))
    for _ in range(4):
        seqs.new(100)
    shared.pages(60)
    with pytest.raises(_core.OutOfMemory):
        shared.pages(1)
    with pytest.raises(vattn.OutOfPages):
        seqs.new(10)
    seqs.check()
    shared.verify()
    end(shared, seqs)


def test_pages_that_moved_are_unmapped_before_the_cache_gets_them(shared: Allocator) -> None:
    """A page that served at two addresses of the allocator is at one of the cache only."""
    blocks = [shared.pages(20) for _ in range(6)]
    for address in blocks[::2]:
        shared.free(address)
    big = shared.pages(60)
    assert shared.figures["pages_moved"] > 0
    shared.free(big)
    seqs = Sequences(make_cache(shared.pool, max_seqs=8))
    for _ in range(3):
        seqs.new(100)
        seqs.check()
    for address in blocks[1::2]:
        shared.mark(shared.live[address])
    shared.verify()
    seqs.check()
    shared.core.check()
    end(shared, seqs)


def test_pages_mapped_twice_are_not_given_by_halves(fake_cuda: FakeCuda) -> None:
    """A page leaves both of its addresses or none, though the work at one of them is not done."""
    fake_cuda.configure(granularity=PAGE)
    driver = make_driver("cuda_fake")
    one, two = driver.create_stream(), driver.create_stream()
    allocator = Allocator(driver, pages=100)
    spec = _core.RegionSpec(runs=1, token_bytes=PAGE, capacity_tokens=100)
    space = _core.SlotSpace(allocator.pool.core, regions=[spec], slots=1, max_tokens=100, tiles=[1])
    space.ensure(space.open(), 40)
    first = allocator.pages(40, one)
    allocator.free(first)
    allocator.free(allocator.pages(40, two))  # 20 of the pages are at both places now
    assert allocator.figures["pages_moved"] == 20
    space.release(0)
    space.trim()
    fake_cuda.stream_mode(one, StreamMode.LAZY)
    lagging = allocator.pages(18, one)
    fake_cuda.launch(one, [(lagging, 18 * PAGE)])
    allocator.free(lagging)
    allocator.free(allocator.pages(45, two))
    space.ensure(space.open(), 60)  # takes what is idle and done, and no more
    allocator.core.check()
    space.release(0)
    space.trim()
    allocator.free(allocator.pages(45, two))
    driver.synchronize(one)
    allocator.pages(40, one)
    allocator.end()
    for stream in (one, two):
        driver.destroy_stream(stream)


def test_a_paused_tag_makes_room_for_sequences(shared: Allocator) -> None:
    tag = _core.tag_id("optimizer")
    shared.pages(80, tag=tag)
    shared.core.pause(tag, backup=True)
    seqs = Sequences(make_cache(shared.pool, max_seqs=8))
    for _ in range(7):
        seqs.new(100)
    with pytest.raises(_core.OutOfMemory, match=r"\(paused\)"):
        shared.core.resume(tag)
    for slot in list(seqs.writers)[:5]:
        seqs.release(slot)
    shared.core.resume(tag)
    seqs.check()
    shared.verify()
    end(shared, seqs)


def test_both_at_once(shared: Allocator) -> None:
    """Threads that grow, free, keep and trim; every byte is its owner's, and nothing is left."""
    seqs = KeptSequences(make_cache(shared.pool, max_seqs=8))
    errors: list[BaseException] = []
    met = {"memory": 0, "pages": 0}
    done = threading.Event()

    def tensors() -> None:
        for i in range(400):
            try:
                shared.pages(10 + i * 7 % 23 if i % 3 else 0.3)
            except _core.OutOfMemory:
                met["memory"] += 1
            while len(shared.live) > 6 or (shared.live and i % 4 == 0):
                shared.free(next(iter(shared.live)))
                if i % 4 == 0:
                    break

    def sequences() -> None:
        i = 0
        while not done.is_set():
            i += 1
            try:
                seqs.new(20 + i * 13 % 80)
            except vattn.OutOfSlots:
                pass
            except vattn.OutOfPages:
                met["pages"] += 1
                forget_empty(seqs)
            if len(seqs.writers) > 3:
                seqs.keep(next(iter(seqs.writers)))
            if i % 16 == 0:
                Sequences.check(seqs)  # what is kept may go at any moment

    def guarded(act: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                act()
            except BaseException as error:
                errors.append(error)
                done.set()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    threads = [guarded(tensors), guarded(sequences)]
    threads[0].join()
    done.set()
    threads[1].join()
    assert errors == []
    assert met["memory"] > 0
    shared.verify()
    seqs.check()
    end(shared, seqs)


def forget_empty(seqs: KeptSequences) -> None:
    """Ends the sequence that was opened and could not grow."""
    for slot in [slot for slot, writers in seqs.writers.items() if not writers]:
        seqs.release(slot)


# With an engine ---------------------------------------------------------------------------------


@pytest.fixture
def pool() -> Iterator[vattn.PagePool]:
    """Room for the prompts below and hardly more."""
    pool = vattn.PagePool("cpu", page_bytes=16 * KIB, budget_bytes=BUDGET, strict=True)
    yield pool
    assert pool.driver.physical_bytes() == 0


BUDGET = 4 * MIB
PROMPTS = [f"The {thing} was full of " * 6 for thing in ("garden", "river", "house", "letter")]


def texts(llm: vattn.LLM) -> list[str]:
    params = vattn.SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


@pytest.fixture(scope="module")
def wanted() -> list[str]:
    """What an engine says that has memory of its own."""
    with make_llm(vattn.PagePool("cpu", budget_bytes=64 * MIB)) as llm:
        return texts(llm)


def make_llm(pool: vattn.PagePool) -> vattn.LLM:
    return vattn.LLM(str(EMBEDDED_PATH), device="cpu", pool=pool, max_num_seqs=4, swap_space=0)


def fill(core: _core.CachingAllocator, nbytes: int) -> list[int]:
    """Blocks of so many bytes until there is no memory."""
    blocks = []
    while True:
        try:
            blocks.append(core.allocate(nbytes))
        except _core.OutOfMemory:
            return blocks


def test_an_engine_gives_its_prefixes_and_grows_again(
    pool: vattn.PagePool, wanted: list[str]
) -> None:
    core = _core.CachingAllocator(pool.core, pool.mapper)
    with make_llm(pool) as llm:
        cache = llm.engine.cache
        assert texts(llm) == wanted
        kept = cache.stats().kept_bytes
        assert kept > 0
        blocks = fill(core, 48 * KIB)
        assert cache.stats().kept_bytes == 0
        core.check()
        cache.check()
        assert len(blocks) * 48 * KIB > BUDGET * 9 // 10 - cache.stats().cover_bytes
        for address in blocks:
            core.free(address)  # idle now, and still mapped for tensors
        mapped = core.figures()["all"]["reserved_bytes"]["current"]
        assert mapped > BUDGET * 9 // 10 - 64 * KIB
        assert texts(llm) == wanted
        assert core.figures()["all"]["reserved_bytes"]["current"] < mapped
        core.check()
        llm.engine.check()
    core.trim()
    pool.trim()


def test_tensors_come_and_go_under_an_engine(pool: vattn.PagePool, wanted: list[str]) -> None:
    """A thread that takes what it gets, up to a third of the pool at a time."""
    core = _core.CachingAllocator(pool.core, pool.mapper)
    core.set_limit(BUDGET // 3)
    stop = threading.Event()
    rounds = []

    def tensors() -> None:
        while not stop.is_set():
            blocks = fill(core, 80 * KIB)
            core.check()
            for address in blocks:
                core.free(address)
            rounds.append(len(blocks))

    thread = threading.Thread(target=tensors)
    thread.start()
    try:
        with make_llm(pool) as llm:
            for _ in range(3):
                assert texts(llm) == wanted
            llm.engine.check()
    finally:
        stop.set()
        thread.join()
    assert sum(rounds) > 0
    core.trim()
    core.check()
    pool.trim()
