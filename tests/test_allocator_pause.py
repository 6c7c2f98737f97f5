"""Tags: `pause` gives their pages back and keeps addresses, `resume` brings them back; budgets."""

from __future__ import annotations

import ctypes
import itertools
from typing import TYPE_CHECKING

import pytest

from tests.allocator_model import MIB, PAGE, Allocator
from tests.drivers import FakeMemory, make_driver
from tests.fake_cuda.fake import StreamMode
from vattn import _core

if TYPE_CHECKING:
    from tests.drivers import Memory
    from tests.fake_cuda.fake import FakeCuda

pytest_plugins = ("tests.allocator_fixtures",)
pytestmark = pytest.mark.usefixtures("allocator_pages")

_numbers = itertools.count()


@pytest.fixture
def tag() -> int:
    """A tag that no other test uses."""
    return _core.tag_id(f"test {next(_numbers)}")


@pytest.fixture
def mixed(allocator: Allocator, tag: int) -> Allocator:
    """Blocks of all sizes under the tag, beside others."""
    for nbytes in (1, 700, 2048, 5000, MIB, 3 * MIB + 17, 2 * MIB):
        allocator.allocate(nbytes, tag=tag)
        allocator.allocate(nbytes)
    freed = [allocator.allocate(MIB + 4096 * i, tag=tag) for i in range(4)]
    for address in freed[::2]:
        allocator.free(address)
    return allocator


def untagged_pages(allocator: Allocator, tag: int) -> int:
    """Pages mapped for anything but the tag."""
    name = _core.tag_name(tag)
    segments = allocator.core.segments()
    nbytes: int = sum(s["bytes"] for s in segments if s["scope"] != name)
    return nbytes // allocator.page


# Pause and resume -------------------------------------------------------------------------------


def test_contents_come_back_with_a_backup(mixed: Allocator, tag: int) -> None:
    mixed.core.pause(tag, backup=True)
    mixed.core.check()
    assert mixed.core.is_paused(tag)
    mixed.pool.trim()
    assert mixed.physical_pages == untagged_pages(mixed, tag)
    for block in mixed.live.values():
        if block.tag != tag:
            mixed.verify_block(block)
    mixed.core.resume(tag)
    mixed.core.check()
    assert not mixed.core.is_paused(tag)
    mixed.verify()


def test_contents_come_back_from_memory_of_the_callers(mixed: Allocator, tag: int) -> None:
    nbytes = mixed.core.tag_live_bytes(tag)
    host = ctypes.create_string_buffer(nbytes)
    address = ctypes.addressof(host)
    with pytest.raises(ValueError, match=f"has {nbytes - 1} bytes, and the live blocks of"):
        mixed.core.pause(tag, backup=True, host=address, host_bytes=nbytes - 1)
    assert not mixed.core.is_paused(tag)
    mixed.core.pause(tag, backup=True, host=address, host_bytes=nbytes)
    mixed.core.resume(tag)
    mixed.core.check()
    mixed.verify()


def test_addresses_stay_without_a_backup(mixed: Allocator, tag: int) -> None:
    mixed.core.pause(tag, backup=False)
    mixed.core.resume(tag)
    mixed.core.check()
    for block in mixed.live.values():
        if block.tag == tag:
            mixed.mark(block)
    mixed.verify()


def test_others_use_the_pages_meanwhile(driver: _core.Driver, memory: Memory, tag: int) -> None:
    allocator = Allocator(driver, memory, pages=60)
    a = allocator.pages(40, tag=tag)
    allocator.core.pause(tag, backup=True)
    b = allocator.pages(50)
    with pytest.raises(_core.OutOfMemory, match=r"\(paused\)"):
        allocator.core.resume(tag)
    allocator.core.check()
    assert allocator.core.is_paused(tag)
    allocator.verify_block(allocator.live[b])
    allocator.free(b)
    allocator.core.resume(tag)
    allocator.core.check()
    allocator.verify_block(allocator.live[a])
    allocator.end()


def test_what_is_freed_while_paused_does_not_come_back(mixed: Allocator, tag: int) -> None:
    mixed.core.pause(tag, backup=True)
    others = untagged_pages(mixed, tag)
    for block in [b for b in mixed.live.values() if b.tag == tag and b.nbytes != 700]:
        mixed.free(block.address)
    mixed.core.resume(tag)
    mixed.core.check()
    mixed.pool.trim()
    assert mixed.physical_pages == others + 1
    mixed.verify()
    mixed.allocate(3 * MIB, tag=tag)


def test_all_is_freed_while_paused(mixed: Allocator, tag: int) -> None:
    mixed.core.pause(tag, backup=True)
    for block in [b for b in mixed.live.values() if b.tag == tag]:
        mixed.free(block.address)
    mixed.trim()
    mixed.core.resume(tag)
    mixed.core.check()
    mixed.allocate(100_000, tag=tag)
    mixed.verify()


def test_again_and_again(mixed: Allocator, tag: int) -> None:
    for i in range(4):
        mixed.core.pause(tag, backup=True)
        mixed.core.trim()
        mixed.core.resume(tag)
        mixed.verify()
        mixed.allocate(MIB + 512 * i, tag=tag)
    mixed.core.check()


def test_a_paused_tag_gives_nothing(mixed: Allocator, tag: int) -> None:
    with pytest.raises(ValueError, match="is not paused"):
        mixed.core.resume(tag)
    mixed.core.pause(tag, backup=True)
    for nbytes in (1, 5000, 3 * MIB):
        with pytest.raises(ValueError, match="is paused: resume it before allocating under it"):
            mixed.allocate(nbytes, tag=tag)
    with pytest.raises(ValueError, match="is paused already"):
        mixed.core.pause(tag, backup=True)
    mixed.core.trim()
    mixed.core.check()
    mixed.core.resume(tag)
    mixed.verify()


def test_memory_without_a_tag_stays(allocator: Allocator) -> None:
    for act in (allocator.core.resume, allocator.core.tag_live_bytes):
        with pytest.raises(ValueError, match="needs a tag"):
            act(0)
    with pytest.raises(ValueError, match="needs a tag"):
        allocator.core.pause(0, backup=True)


def test_a_pause_waits_for_streams_and_not_in_a_capture(fake_cuda: FakeCuda, tag: int) -> None:
    fake_cuda.configure(granularity=PAGE)
    driver = make_driver("cuda_fake")
    one, two = driver.create_stream(), driver.create_stream()
    allocator = Allocator(driver, FakeMemory(fake_cuda))
    a, b = allocator.pages(20, one, tag), allocator.pages(20, one, tag)
    allocator.core.record_stream(b, two)
    for stream, address in ((one, a), (two, b)):
        fake_cuda.stream_mode(stream, StreamMode.LAZY)
        driver.fill(address, 7, 20 * PAGE, stream)
    allocator.core.begin_graph_pool((0, 1), [one])
    with pytest.raises(ValueError, match="a CUDA graph is being captured"):
        allocator.core.pause(tag, backup=True)
    allocator.core.end_graph_pool((0, 1))
    allocator.core.pause(tag, backup=True)
    assert fake_cuda.stats().work_pending == 0
    allocator.core.resume(tag)
    for address in (a, b):
        assert fake_cuda.read(address, 20 * PAGE) == b"\7" * (20 * PAGE)
        allocator.core.free(address)
    allocator.live.clear()
    allocator.core.release_graph_pool((0, 1))
    allocator.end()
    for stream in (one, two):
        driver.destroy_stream(stream)


# Budgets and limits -----------------------------------------------------------------------------


def test_a_tags_budget_holds(allocator: Allocator, tag: int) -> None:
    """Wherever its pages come from: new ones, or those that lie idle elsewhere."""
    allocator.core.set_tag_budget(tag, 50 * allocator.page)
    for address in [allocator.pages(40) for _ in range(5)]:
        allocator.free(address)
    allocator.pages(40, tag=tag)
    with pytest.raises(_core.OutOfMemory, match="the budget of the tag 'test"):
        allocator.pages(11, tag=tag)
    allocator.core.check()
    allocator.pages(10, tag=tag)
    name = _core.tag_name(tag)
    held = [s["bytes"] for s in allocator.core.segments() if s["scope"] == name]
    assert sum(held) <= 50 * allocator.page
    allocator.core.set_tag_budget(tag, 0)
    allocator.pages(150, tag=tag)


def test_a_tag_reuses_its_own_pages_at_its_budget(allocator: Allocator, tag: int) -> None:
    allocator.core.set_tag_budget(tag, 40 * allocator.page)
    blocks = [allocator.pages(10, tag=tag) for _ in range(4)]
    for address in (blocks[0], blocks[2]):
        allocator.free(address)
    allocator.pages(20, tag=tag)
    allocator.verify()


def test_a_budget_binds_a_resume(allocator: Allocator, tag: int) -> None:
    allocator.pages(40, tag=tag)
    allocator.core.pause(tag, backup=True)
    allocator.core.set_tag_budget(tag, 30 * allocator.page)
    with pytest.raises(_core.OutOfMemory):
        allocator.core.resume(tag)
    assert allocator.core.is_paused(tag)
    allocator.core.set_tag_budget(tag, 40 * allocator.page)
    allocator.core.resume(tag)
    allocator.verify()


def test_the_limit_holds(allocator: Allocator) -> None:
    allocator.core.set_limit(60 * allocator.page)
    a, b, c = (allocator.pages(20) for _ in range(3))
    with pytest.raises(_core.OutOfMemory, match="the limit of this allocator is"):
        allocator.pages(1)
    allocator.core.check()
    allocator.free(a)
    allocator.free(c)
    allocator.pages(40)
    assert allocator.mapped_pages == 60
    allocator.core.set_limit(0)
    allocator.pages(60)
    allocator.free(b)


@pytest.mark.parametrize("backup", [True, False])
def test_pause_waits_for_streams_that_nobody_told_of(
    fake_cuda: FakeCuda, tag: int, backup: bool
) -> None:
    """Weights are read, and written, on streams that never asked for memory."""
    fake_cuda.configure(granularity=PAGE, watchdog_ms=10_000)
    driver = make_driver("cuda_fake")
    allocator = Allocator(driver, FakeMemory(fake_cuda), pages=40)
    stranger = driver.create_stream()
    fake_cuda.stream_mode(stranger, StreamMode.LAZY)
    address = allocator.pages(8, tag=tag)
    driver.fill(address, 7, 8 * PAGE, stranger)
    fake_cuda.launch(stranger, [(address, 8 * PAGE)], "reads the weights")
    allocator.core.pause(tag, backup=backup)
    assert fake_cuda.pending(stranger) == 0
    allocator.core.resume(tag)
    if backup:
        assert set(fake_cuda.read(address, 8 * PAGE)) == {7}
    allocator.core.free(address)
    allocator.live.pop(address)
    driver.destroy_stream(stranger)
    allocator.end()
