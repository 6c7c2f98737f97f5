"""The caching allocator on one stream: sizes, slabs, reuse, growth in place, limits, bad input.

Every promise of allocator/caching_allocator.h that needs no second stream, on every driver.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tests.allocator_model import KIB, MIB, UNIT, Allocator, rounded
from vattn import _core

if TYPE_CHECKING:
    from tests.drivers import Memory

pytest_plugins = ("tests.allocator_fixtures",)
pytestmark = pytest.mark.usefixtures("allocator_pages")

SLAB = 32 * KIB


# Sizes ------------------------------------------------------------------------------------------


def test_sizes_are_rounded_to_512_and_counted_as_asked_for(allocator: Allocator) -> None:
    sizes = [1, 511, 512, 513, 2047, 2048, 2049, 100_000, MIB, MIB + 1, 3 * MIB + 17]
    for size in sizes:
        allocator.allocate(size)
    stats = allocator.figures["all"]
    assert stats["requested_bytes"]["current"] == sum(sizes)
    assert stats["allocated_bytes"]["current"] == sum(rounded(size) for size in sizes)
    assert stats["allocation"]["current"] == len(sizes)
    assert allocator.figures["small_pool"]["allocation"]["current"] == 9
    assert allocator.figures["large_pool"]["allocation"]["current"] == 2


def test_nothing_is_asked_for_and_nothing_given(allocator: Allocator) -> None:
    assert allocator.core.allocate(0) == 0
    allocator.core.free(0)
    assert allocator.figures["all"]["allocation"]["allocated"] == 0
    assert allocator.calls() == 0


def test_peaks_and_sums_start_again(allocator: Allocator) -> None:
    allocator.free(allocator.pages(40))
    allocator.pages(10)
    allocator.core.reset_peaks()
    stats = allocator.figures["all"]["allocated_bytes"]
    assert stats["peak"] == stats["current"] == 10 * allocator.page
    allocator.core.reset_accumulated()
    assert allocator.figures["all"]["allocated_bytes"]["allocated"] == 0
    assert allocator.figures["all"]["allocated_bytes"]["current"] == 10 * allocator.page


# Slabs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [512, 1024, 1536, 2048])
def test_small_requests_share_a_slab(allocator: Allocator, piece: int) -> None:
    fits = SLAB // piece
    blocks = [allocator.allocate(piece - i % UNIT) for i in range(fits)]
    assert {address // SLAB for address in blocks} == {blocks[0] // SLAB}
    assert allocator.mapped_pages == 1
    other = allocator.allocate(piece)
    assert other // SLAB != blocks[0] // SLAB
    calls = allocator.calls()
    allocator.free(blocks[5])
    allocator.free(blocks[3])
    assert {allocator.allocate(piece), allocator.allocate(piece)} == {blocks[3], blocks[5]}
    assert allocator.calls() == calls


def test_an_empty_slab_serves_other_sizes(allocator: Allocator) -> None:
    page = allocator.page
    blocks = [allocator.allocate(512) for _ in range(page // 512)]
    assert allocator.mapped_pages == 1
    for address in blocks:
        allocator.free(address)
    for size in (2048, 1024):
        for _ in range(page // 2 // size):
            allocator.allocate(size)
    assert allocator.mapped_pages == 1


# Reuse ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [0.1, 3, 40])
def test_a_freed_block_is_adopted_without_a_driver_call(allocator: Allocator, pages: float) -> None:
    address = allocator.pages(pages)
    allocator.free(address)
    calls = allocator.calls("event") + allocator.calls()
    assert allocator.pages(pages) == address
    assert allocator.calls("event") + allocator.calls() == calls


def test_a_smaller_block_is_cut_from_a_freed_one(allocator: Allocator) -> None:
    address = allocator.pages(60)
    allocator.free(address)
    calls = allocator.calls()
    first, second = allocator.pages(20), allocator.pages(40)
    assert (first, second) == (address, address + 20 * allocator.page)
    assert allocator.calls() == calls


def test_neighbours_merge(allocator: Allocator) -> None:
    blocks = [allocator.pages(20) for _ in range(4)]
    calls = allocator.calls()
    for i in (2, 0, 3, 1):
        allocator.free(blocks[i])
    assert allocator.pages(80) == min(blocks)
    assert allocator.calls() == calls


def test_a_block_grows_where_it_lay(allocator: Allocator) -> None:
    address = allocator.pages(20)
    allocator.free(address)
    created, accesses = allocator.calls("create"), allocator.calls("set_access")
    assert allocator.pages(30) == address
    assert allocator.physical_pages == 30
    assert allocator.calls("set_access") <= accesses + 1  # once for the whole of what is new
    assert allocator.calls("unmap") == 0
    assert allocator.calls("create") > created
    assert allocator.figures["pages_moved"] == 0


def test_large_blocks_share_pages(allocator: Allocator) -> None:
    """They are packed at 512 bytes: only the end of all of them together is rounded to a page."""
    rng = random.Random(5)
    sizes = [MIB + UNIT * rng.randrange(1, 3000) for _ in range(6)]
    for size in sizes:
        allocator.allocate(size)
    assert allocator.mapped_pages == -(-sum(sizes) // allocator.page)
    assert allocator.physical_pages == allocator.mapped_pages


def test_any_free_pages_serve_any_range(driver: _core.Driver, memory: Memory) -> None:
    """Holes between live blocks hold one block as large as all of them."""
    allocator = Allocator(driver, memory, pages=240)
    blocks = [allocator.pages(20) for _ in range(12)]
    for address in blocks[::2]:
        allocator.free(address)
    assert allocator.physical_pages == 240
    big = allocator.pages(120)
    assert allocator.physical_pages == 240
    assert allocator.figures["pages_moved"] > 0
    allocator.verify()
    allocator.core.settle()
    allocator.core.check()
    allocator.verify()
    allocator.free(big)
    for _ in range(6):
        allocator.pages(20)
    assert allocator.physical_pages == 240
    allocator.end()


def test_what_is_trimmed_has_one_address(driver: _core.Driver, memory: Memory) -> None:
    """Pages may stay mapped where they served before, but not beyond a trim."""
    allocator = Allocator(driver, memory, pages=60, mapper=True)
    first, second, third = (allocator.pages(20) for _ in range(3))
    allocator.free(first)
    allocator.free(third)
    allocator.pages(40)
    assert allocator.figures["pages_moved"] > 0
    allocator.trim()
    starts = [address + i * allocator.page for address in (first, third) for i in range(20)]
    outside = [
        at for at in starts if not any(b.address <= at < b.end for b in allocator.live.values())
    ]
    assert len(outside) >= 20
    if not driver.holes_are_zero():
        assert not any(memory.accessible(at) for at in outside)
    allocator.free(second)
    allocator.end()


def test_two_arrangements_of_the_same_pages_alternate_without_calls(driver: _core.Driver) -> None:
    """A place that pages have left is theirs again when they are idle."""
    allocator = Allocator(driver, pages=80)
    for _ in range(3):
        calls = allocator.calls()
        for sizes in ((20, 20, 20, 20), (40, 40), (80,)):
            blocks = [allocator.pages(n) for n in sizes]
            for address in blocks:
                allocator.free(address)
    assert allocator.calls() == calls
    allocator.end()


def test_a_steady_program_calls_no_driver(allocator: Allocator) -> None:
    rng = random.Random(3)
    sizes = [rng.choice((700, 5000, 70_000, 2 * MIB, MIB + 3000, 40_000)) for _ in range(60)]
    lives = [rng.randrange(1, 12) for _ in sizes]

    def period() -> None:
        ends: dict[int, list[int]] = {}
        for i, (size, life) in enumerate(zip(sizes, lives, strict=True)):
            ends.setdefault(i + life, []).append(allocator.allocate(size))
            for address in ends.pop(i, []):
                allocator.free(address)
        for addresses in ends.values():
            for address in addresses:
                allocator.free(address)

    for _ in range(3):
        period()
    calls, events = allocator.calls(), allocator.calls("event")
    for _ in range(3):
        period()
    assert allocator.calls() == calls
    assert allocator.calls("event") == events


# Giving back ------------------------------------------------------------------------------------


def test_trim_gives_back_what_is_idle(allocator: Allocator) -> None:
    keep = allocator.pages(20)
    freed = [allocator.pages(n) for n in (30, 0.25, 2, 17)]
    allocator.allocate(512)
    for address in freed:
        allocator.free(address)
    assert allocator.trim(10 * allocator.page) > 0
    assert allocator.mapped_pages <= 20 + 1 + 10 + 1
    allocator.trim()
    assert allocator.mapped_pages == allocator.physical_pages == 21
    assert allocator.trim() == 0
    allocator.free(keep)


def test_a_lowered_budget_takes_idle_pages(allocator: Allocator) -> None:
    live = allocator.pages(30)
    allocator.free(allocator.pages(60))
    for address in [allocator.pages(0.5) for _ in range(40)]:
        allocator.free(address)
    allocator.pool.set_budget(40 * allocator.page)
    allocator.core.check()
    assert allocator.physical_pages <= 40
    allocator.free(live)
    allocator.pages(40)


# Bad input --------------------------------------------------------------------------------------


def test_bad_frees_are_refused(allocator: Allocator) -> None:
    small, large = allocator.allocate(1000), allocator.allocate(2 * MIB)
    for address in (12345, small + UNIT, small + 1, large + UNIT, large - UNIT, large + 1):
        with pytest.raises(ValueError, match=f"free of 0x{address:x}, which is not a live block"):
            allocator.core.free(address)
    for address, nbytes in ((small, 1000), (large, 2 * MIB)):
        for wrong in (nbytes - 1, nbytes + 1, 2048, 4096, 1 << 40):
            with pytest.raises(ValueError, match=f"a size of {wrong} bytes, but the block has"):
                allocator.core.free(address, wrong)
    assert allocator.figures["bad_frees"] == 16
    assert allocator.figures["all"]["allocation"]["current"] == 2
    allocator.core.check()
    for address in (small, large):
        allocator.free(address)
        with pytest.raises(ValueError, match="freed before, or never allocated here"):
            allocator.core.free(address)
    allocator.core.check()


def test_what_owns_an_address(allocator: Allocator) -> None:
    small, large = allocator.allocate(700), allocator.allocate(2 * MIB - 5)
    assert allocator.core.base(small + 699) == (small, 1024)
    assert allocator.core.base(large + 2 * MIB - 6) == (large, 2 * MIB)
    assert allocator.core.owns(small)
    assert allocator.core.owns(large)
    for address in (0, 1, small + 1, large + UNIT):
        assert not allocator.core.owns(address)
    allocator.free(large)
    assert not allocator.core.owns(large)
    with pytest.raises(ValueError, match="base of"):
        allocator.core.base(large)
    with pytest.raises(ValueError, match="base of 0x7"):
        allocator.core.base(7)


def test_settings_below_a_page_are_refused(allocator: Allocator) -> None:
    with pytest.raises(ValueError, match="a limit of 100 bytes is below one page"):
        allocator.core.set_limit(100)
    with pytest.raises(ValueError, match="a budget of 5 bytes is below one page"):
        allocator.core.set_tag_budget(_core.tag_id("small budget"), 5)
    with pytest.raises(ValueError, match="a budget needs a tag"):
        allocator.core.set_tag_budget(0, 10 * allocator.page)
    with pytest.raises(ValueError, match="a tag needs a name"):
        _core.tag_id("")


def test_the_kv_cache_takes_a_page_and_leaves_the_arrangement(driver: _core.Driver) -> None:
    """Shadows of other pages than those that it gets stay mapped."""
    allocator = Allocator(driver, pages=400)
    tag = _core.tag_id("arranged")
    for under in (0, tag):
        blocks = [allocator.pages(20, tag=under) for _ in range(18)]
        for block in blocks:
            allocator.free(block)
    shadows = allocator.figures["shadow_bytes"]
    assert shadows > 0
    calls = driver.counters()["unmap"][0]
    kv = _core.VirtualRange(allocator.pool.core, rows=100, row_bytes=allocator.page)
    kv.commit(0, 50)
    assert allocator.figures["shadow_bytes"] == shadows
    assert driver.counters()["unmap"][0] - calls <= 2
    kv.close()
    allocator.end()


def test_figures_and_segments_agree(driver: _core.Driver) -> None:
    allocator = Allocator(driver, pages=60)
    blocks = [allocator.pages(20) for _ in range(3)]
    allocator.free(blocks[1])
    allocator.pages(20, tag=_core.tag_id("apart"))
    assert allocator.figures["shadow_bytes"] > 0
    assert allocator.figures["all"]["segments"] == len(allocator.core.segments())
    for address in list(allocator.live):
        allocator.free(address)
    allocator.end()
