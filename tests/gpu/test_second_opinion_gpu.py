"""The driver and the cache as cuda-python sees them: same addresses, nothing else in common.

`tests/test_second_opinion.py` runs this file on the fake libcuda, too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import vattn
from tests.drivers import REAL_LIBCUDA, Area
from tests.helpers import make_pool
from tests.second_opinion import CudaPythonError, SecondOpinion
from vattn import _core


@pytest.fixture
def driver(device: str) -> Iterator[_core.Driver]:
    """Of the library that cuda-python loads, too."""
    if device == "cpu":
        pytest.skip("cuda-python knows nothing of the host driver's memory")
    driver = _core.cuda_driver(libcuda=REAL_LIBCUDA, host_accessible=device == "cuda_fake")
    yield driver
    assert driver.physical_bytes() == 0


@pytest.fixture
def second(driver: _core.Driver) -> Iterator[SecondOpinion]:
    del driver  # which loads the library, or skips
    cuda: Any = pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    second = SecondOpinion(cuda)
    yield second
    second.close()


def bytes_of(driver: _core.Driver, address: int, nbytes: int, stream: int = 0) -> bytes:
    """Memory as our driver reads it."""
    out = ctypes.create_string_buffer(nbytes)
    driver.copy_to_host(ctypes.addressof(out), address, nbytes, stream)
    driver.synchronize(stream)
    return out.raw


def seen(second: SecondOpinion, area: Area) -> tuple[str, str]:
    """Of each page of an area: ``m`` where it is mapped, ``a`` where it is accessible."""
    # Both ends of a page, which is two granules.
    ends = [(area.at(i), area.at(i + 1) - 1) for i in range(8)]
    answers = []
    for ask, letter in ((second.mapped, "m"), (second.accessible, "a")):
        both = [(ask(first), ask(last)) for first, last in ends]
        assert all(first == last for first, last in both)
        answers.append("".join(letter if first else "." for first, _ in both))
    return answers[0], answers[1]


# Queries ------------------------------------------------------------------------------------------


def test_granularity(driver: _core.Driver, second: SecondOpinion) -> None:
    assert driver.granularity() == second.granularity()


def test_what_is_mapped_and_what_is_accessible(second: SecondOpinion, area: Area) -> None:
    assert seen(second, area) == ("........", "........")
    area.driver.map(area.at(1), area.pages[:3], area.page)
    assert seen(second, area) == (".mmm....", "........")
    area.driver.set_access(area.at(1), 3 * area.page)
    assert seen(second, area) == (".mmm....", ".aaa....")
    area.map(6, area.pages[6:])
    assert seen(second, area) == (".mmm..mm", ".aaa..aa")
    area.unmap(2, 1)
    assert seen(second, area) == (".m.m..mm", ".a.a..aa")
    area.map(2, area.pages[4:5])
    assert seen(second, area) == (".mmm..mm", ".aaa..aa")
    for first, n in ((1, 3), (6, 2)):
        area.unmap(first, n)
    assert seen(second, area) == ("........", "........")


def test_a_refused_map_changes_nothing(second: SecondOpinion, area: Area) -> None:
    area.map(3, area.pages[:1])
    second.write(area.at(3), b"stays")
    with pytest.raises(ValueError, match="mapped"):
        area.driver.map(area.at(1), area.pages[1:4], area.page)  # the last of them is taken
    assert seen(second, area) == ("...m....", "...a....")
    assert second.read(area.at(3), 5) == b"stays"


def test_pages_are_plain_pinned_memory_of_the_device(second: SecondOpinion, area: Area) -> None:
    area.map(2, area.pages[:2])
    for address in (area.at(2), area.at(3) + 12_345):
        properties = second.properties(address)
        pinned = second.cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        on_device = second.cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        assert properties.type == pinned
        assert (properties.location.type, properties.location.id) == (on_device, 0)
        assert second.is_device_memory(address)
        assert second.ordinal(address) == 0
        base, nbytes = second.address_range(address)
        assert area.base <= base <= address < base + nbytes <= area.base + area.bytes


def test_questions_leave_no_handle_behind(
    driver: _core.Driver, second: SecondOpinion, area: Area
) -> None:
    """Or pages that our driver has destroyed would never go back to the device."""
    page, extra = area.page, driver.create(8, area.page)
    base = driver.reserve(8 * page, page)
    driver.map(base, extra, page)
    driver.set_access(base, 8 * page)
    held = second.memory_info()[0]
    for i in range(8):
        assert second.mapped(base + i * page)
        second.properties(base + i * page)
    driver.unmap(base, 8 * page)
    driver.destroy(extra, page)
    driver.release(base, 8 * page)
    assert second.memory_info()[0] >= held + 4 * page


def test_memory_information(driver: _core.Driver, second: SecondOpinion) -> None:
    page = 2 * driver.granularity()
    before = second.memory_info()
    pages = driver.create(8, page)
    ours, theirs = driver.memory_info(), second.memory_info()
    assert ours[1] == theirs[1] == before[1]
    assert before[0] - theirs[0] >= 8 * page
    assert before[0] - ours[0] >= 8 * page
    assert driver.physical_bytes() == 8 * page
    driver.destroy(pages, page)


# Bytes --------------------------------------------------------------------------------------------


def test_each_sees_what_the_other_wrote(
    driver: _core.Driver, second: SecondOpinion, area: Area
) -> None:
    area.map(0, area.pages[:4])
    pattern = bytes(i * 7 % 251 for i in range(area.page + 3001))
    start = area.at(1) - 1501  # over the edges of a page, at no round address
    second.write(start, pattern)
    assert bytes_of(driver, start, len(pattern)) == pattern
    host = ctypes.create_string_buffer(pattern[::-1], len(pattern))
    driver.copy_from_host(start, ctypes.addressof(host), len(pattern))
    driver.synchronize()
    assert second.read(start, len(pattern)) == pattern[::-1]


def test_fill_and_copy(driver: _core.Driver, second: SecondOpinion, area: Area) -> None:
    area.map(0, area.pages[:4])
    driver.fill(area.base, 7, 2 * area.page)
    driver.fill(area.base + 3, 0, 5)
    driver.copy(area.at(3) - 101, area.at(1) - 1001, 2003)
    driver.synchronize()
    assert second.read(area.base, 10) == b"\x07\x07\x07\0\0\0\0\0\x07\x07"
    assert second.read(area.at(3) - 101, 2003) == b"\x07" * 2003
    second.fill(area.at(2) + 5, 9, 3)
    assert bytes_of(driver, area.at(2) + 5, 3) == b"\x09" * 3


def test_two_addresses_of_one_page(driver: _core.Driver, second: SecondOpinion, area: Area) -> None:
    page = area.pages[0]
    area.map(0, [page, area.pages[1], page])
    other = driver.reserve(area.page, area.page)
    driver.map(other, [page], area.page)
    driver.set_access(other, area.page)
    aliases = (area.at(0), area.at(2), other)
    second.fill(area.at(1), 0xEE, area.page)
    for turn, writer in enumerate(aliases):
        text = b"written through alias %d" % turn
        second.write(writer + 1234, text)
        for reader in aliases:
            assert second.read(reader + 1234, len(text)) == text
            assert bytes_of(driver, reader + 1234, len(text)) == text
    assert second.read(area.at(1), area.page) == b"\xee" * area.page
    driver.unmap(other, area.page)
    assert not second.mapped(other)
    assert second.accessible(area.at(2))
    assert second.read(area.at(2) + 1234, 7) == b"written"
    driver.release(other, area.page)


def test_remapping_moves_pages_and_not_bytes(
    driver: _core.Driver, second: SecondOpinion, area: Area
) -> None:
    area.map(0, area.pages[:4])
    for i in range(4):
        second.fill(area.at(i), 10 + i, area.page)
    area.unmap(1, 2)
    area.map(1, [area.pages[3]])
    area.map(2, [area.pages[1]])
    area.map(5, [area.pages[2]])
    firsts = {i: second.read(area.at(i), 1)[0] for i in (0, 1, 2, 3, 5)}
    assert firsts == {0: 10, 1: 13, 2: 11, 3: 13, 5: 12}
    driver.fill(area.at(3), 99, area.page)
    driver.synchronize()
    assert second.read(area.at(1), area.page) == b"\x63" * area.page
    assert second.read(area.at(0), area.page) == b"\x0a" * area.page


# Streams ------------------------------------------------------------------------------------------


def test_events_order_streams(driver: _core.Driver, second: SecondOpinion, area: Area) -> None:
    """Their stream calls on our streams: what each is given runs in one order."""
    area.map(0, area.pages)
    first, last = driver.create_stream(), driver.create_stream()
    for value in range(1, 20):
        driver.fill(area.base, value, 4 * area.page, first)
        event = driver.record(first)
        driver.stream_wait(last, event)
        driver.copy(area.at(4), area.base, 4 * area.page, last)
        second("cuMemsetD8Async", area.at(4), value + 100, 64, second.cuda.CUstream(last))
        again = driver.record(last)
        driver.stream_wait(first, again)  # or the next fill would run into this copy
        second("cuEventSynchronize", second.cuda.CUevent(again))
        assert driver.query(again)
        assert driver.query(event)
        assert second.read(area.at(4), 65) == bytes([value + 100] * 64 + [value])
        for each in (event, again):
            driver.destroy_event(each)
    second("cuStreamSynchronize", second.cuda.CUstream(last))
    second("cuStreamQuery", second.cuda.CUstream(first))
    for stream in (first, last):
        driver.destroy_stream(stream)


def test_work_that_is_held_back_is_not_done(
    device: str, driver: _core.Driver, second: SecondOpinion, area: Area
) -> None:
    if device != "cuda_fake":
        pytest.skip("only the fake can hold a stream back")
    from tests.drivers import fake_library_path
    from tests.fake_cuda.fake import FakeCuda

    fake = FakeCuda(fake_library_path())
    area.map(0, area.pages[:1])
    stream = driver.create_stream()
    with fake.held(stream):
        driver.fill(area.base, 5, 64, stream)
        event = driver.record(stream)
        for call, handle in (("cuStreamQuery", stream), ("cuEventQuery", event)):
            kind = second.cuda.CUstream if call == "cuStreamQuery" else second.cuda.CUevent
            with pytest.raises(CudaPythonError, match="NOT_READY"):
                second(call, kind(handle))
    second("cuEventQuery", second.cuda.CUevent(event))
    assert second.read(area.base, 64) == b"\x05" * 64
    driver.destroy_event(event)
    driver.destroy_stream(stream)


# The cache ----------------------------------------------------------------------------------------


def test_slots_forks_and_what_is_left_of_them(driver: _core.Driver, second: SecondOpinion) -> None:
    heads, dim, tokens, layers = 2, 64, 9000, 3
    pool = make_pool(driver, pages=64)
    cache = vattn.KVCache(
        layers, heads, dim, torch.float16, max_seqs=3, max_tokens=20_000, pool=pool, order="token"
    )
    row = heads * dim * 2

    def at(slot: int, layer: int, token: int) -> int:
        return int(cache.layer(layer)[0][slot, token].data_ptr())

    a = cache.open()
    cache.ensure(a, tokens)
    for layer in range(layers):
        for token in range(0, tokens, 500):
            second.fill(at(a.index, layer, token), layer + 1, row)
    b = cache.fork(a)
    cache.ensure(b, tokens + 1)
    for layer in range(layers):
        for token in range(0, tokens, 500):
            assert second.read(at(b.index, layer, token), row) == bytes([layer + 1]) * row
    # The first page is one page; the one that the fork writes to is its own.
    second.fill(at(a.index, 1, 0), 77, row)
    assert second.read(at(b.index, 1, 0), row) == b"\x4d" * row
    second.fill(at(b.index, 1, tokens), 88, row)
    assert second.read(at(a.index, 1, 8500), row) == b"\x02" * row
    k, _ = cache.view(b, 1)
    assert bytes(k[tokens].contiguous().view(torch.uint8).cpu().flatten().tolist()) == b"X" * row
    first, last = at(a.index, 0, 0), at(a.index, layers - 1, tokens - 1)
    cache.release(a)
    cache.trim()
    assert not second.mapped(first)
    assert not second.mapped(last)
    assert second.read(at(b.index, 1, 0), row) == b"\x4d" * row
    cache.release(b)
    cache.check()
    cache.trim()
    cache.close()
