"""Blocks, their names and their tables, against plain records; and the bytes of a paged cache."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from bench.paged.blocks import NULL_BLOCK, BlockPool, OutOfBlocks
from bench.paged.cache import PagedCache
from bench.paged.prefix import Chain
from bench.paged.tables import BlockTables
from tests.paged_model import SPECS, make_paged, read, tensors, write
from vattn.kv.layout import LayerSpec, Order

ORDERS = pytest.mark.parametrize("order", ["token", "head"])


# Who holds what -----------------------------------------------------------------------------------


def test_the_block_that_was_free_longest_is_taken_first_and_tails_before_heads() -> None:
    pool = BlockPool(6)
    first, second = pool.take(2), pool.take(2)
    assert (first, second) == ([1, 2], [3, 4])
    pool.drop(second)
    pool.drop(first)
    assert pool.take(5) == [5, 4, 3, 2, 1]
    with pytest.raises(OutOfBlocks, match="1 blocks are needed, and 0 are free"):
        pool.take(1)
    pool.check(dict.fromkeys(range(1, 6), 1))


def test_a_free_block_is_found_until_it_is_taken() -> None:
    pool = BlockPool(4)
    (block,) = pool.take(1)
    pool.name(block, b"x")
    assert pool.find(b"x") == block
    pool.drop([block])
    assert (pool.find(b"x"), pool.kept, pool.free) == (block, 1, 3)
    pool.share([block])  # taken out of the middle of the queue
    assert pool.take(2) == [2, 3]
    assert (pool.live, pool.free, pool.overwritten) == (3, 0, 0)
    pool.drop([block])
    assert pool.take(1) == [block]
    assert pool.find(b"x") is None
    assert pool.overwritten == 1


def test_of_two_blocks_with_the_same_content_either_is_found() -> None:
    pool = BlockPool(4)
    one, two = pool.take(2)
    pool.name(one, b"x")
    pool.name(two, b"x")
    pool.drop([one])
    pool.take(2)  # the other free one, and this
    assert pool.find(b"x") == two
    pool.forget(two)
    assert pool.find(b"x") is None


def test_a_lowered_limit_takes_free_blocks_then_those_that_are_dropped() -> None:
    pool = BlockPool(8)
    held = pool.take(4)
    pool.name(held[0], b"x")
    pool.set_limit(2)
    assert (pool.free, pool.live, pool.limit, pool.is_over) == (0, 4, 2, True)
    pool.drop(held[:1])
    assert pool.find(b"x") is None  # it is nobody's any more
    assert pool.is_over
    pool.drop(held[1:2])
    assert (pool.live, pool.free, pool.is_over) == (2, 0, False)
    pool.drop(held[2:])
    assert (pool.live, pool.free) == (0, 2)
    pool.set_limit(7)
    assert sorted(pool.take(7)) == [1, 2, 3, 4, 5, 6, 7]
    for wrong in (0, 8):
        with pytest.raises(ValueError, match=f"a limit of {wrong} blocks must be between 1 and 7"):
            pool.set_limit(wrong)


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_against_a_record(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(rng.randint(3, 20))
    most = pool.num_blocks - 1
    held: list[list[int]] = []
    names: dict[int, bytes] = {}
    for _ in range(300):
        counts = {b: sum(b in each for each in held) for each in held for b in each}
        action = rng.randrange(6)
        if action == 0 and pool.free:
            held.append(pool.take(rng.randint(1, pool.free)))
            for block in held[-1]:
                names.pop(block, None)
        elif action == 1 and held:
            blocks = held.pop(rng.randrange(len(held)))
            freed = pool.drop(blocks)
            assert set(freed) == {b for b in blocks if counts[b] == 1}
        elif action == 2 and held:
            block = rng.choice(rng.choice(held))
            pool.name(block, digest := bytes([rng.randrange(6)]))
            names[block] = digest
        elif action == 3:
            found = {pool.find(bytes([i])) for i in range(6)} - {None}
            if found:
                pool.share(list(found))  # type: ignore[arg-type]
                held.append(list(found))  # type: ignore[arg-type]
        elif action == 4:
            pool.set_limit(rng.randint(1, most))
        elif held:
            pool.forget(block := rng.choice(rng.choice(held)))
            names.pop(block, None)
        counts = {b: sum(b in each for each in held) for each in held for b in each}
        pool.check(counts)
        assert (pool.live, pool.held()) == (len(counts), sorted(counts))
        assert pool.is_over == (len(counts) > pool.limit)
        assert pool.free == max(0, pool.limit - len(counts))
        for block in counts:  # who is held keeps its name
            assert pool.name_of(block) == names.get(block)
        assert all(pool.name_of(block) in (None, names.get(block)) for block in range(1, most + 1))
        assert NULL_BLOCK not in counts
    for blocks in held:
        pool.drop(blocks)
    pool.set_limit(most)
    assert sorted(pool.take(most)) == list(range(1, most + 1))


def test_names_depend_on_everything_before_and_on_the_salt() -> None:
    tokens = list(range(100, 112))
    chain = Chain("", 4)
    names = [chain.name(tokens, index) for index in range(3)]
    assert len(set(names)) == 3
    assert Chain("", 4).name(tokens[4:], 0) != names[1]
    assert Chain("", 4).name(tokens, 0) == names[0]
    other = Chain("", 4)
    changed = [other.name([0, *tokens[1:]], index) for index in range(3)]
    assert not set(changed) & set(names)  # the same blocks behind another beginning
    salted = Chain("tenant", 4)
    assert not {salted.name(tokens, index) for index in range(3)} & set(names)
    again = chain.first(2)
    assert again.name(tokens, 2) == names[2]
    assert len(chain.first(1).names) == 1


# Tables -------------------------------------------------------------------------------------------


def test_only_changes_are_sent_in_one_transfer() -> None:
    tables = BlockTables(3, 5, torch.device("cpu"))
    address = tables.device.data_ptr()
    tables.flush()
    assert (tables.transfers, tables.sent_bytes) == (0, 0)
    tables.put(0, 0, [7, 8])
    tables.put(2, 4, [9])
    tables.put(0, 1, [6])  # the latest counts
    tables.put(1, 0, [])
    assert tables.device.tolist() == [[0] * 5] * 3
    tables.check()
    tables.flush()
    assert tables.device.tolist() == [[7, 6, 0, 0, 0], [0] * 5, [0, 0, 0, 0, 9]]
    assert tables.device.dtype == torch.int32
    assert tables.device.data_ptr() == address
    assert (tables.transfers, tables.sent_bytes) == (1, 4 * (4 + 8))
    tables.check()
    tables.flush()
    assert tables.transfers == 1
    tables.host[1, 1] = 3
    with pytest.raises(AssertionError):
        tables.check()


def test_tables_can_be_changed_inside_and_outside_of_inference_mode() -> None:
    cache = make_paged(8, order="token")
    with torch.inference_mode():
        cache.open(0)
        cache.ensure([0], [5])
    cache.ensure([0], [9])
    with torch.inference_mode():
        cache.copy_blocks([1], [2])
        cache.zero_blocks([1])
        cache.zero_tokens(0, 1, 3)
    cache.zero_blocks([2])
    cache.check()


# The cache ----------------------------------------------------------------------------------------


@ORDERS
def test_layers_have_the_shapes_and_addresses_of_the_contract(order: Order) -> None:
    cache = make_paged(6, block_tokens=4, slots=3, max_tokens=10, order=order)
    assert (cache.max_blocks, cache.num_blocks) == (3, 7)
    for index, spec in enumerate(SPECS):
        shapes = {
            "token": (7, 4, spec.kv_heads, spec.head_dim),
            "head": (spec.kv_heads, 7, 4, spec.head_dim),
        }
        k, v = cache.layer(index)
        assert k.shape == v.shape == shapes[order]
        assert k.is_contiguous()
        assert v.is_contiguous()
        assert k.dtype == spec.dtype
        assert not k.any()
    assert cache.layout.regions == ()
    assert cache.block_bytes == 4 * sum(spec.token_bytes for spec in SPECS)
    with pytest.raises(ValueError, match="layer=2 is not one of 2"):
        cache.layer(2)


@ORDERS
def test_places_are_where_tokens_are_read(order: Order) -> None:
    cache = make_paged(12, slots=3, max_tokens=12, order=order)
    for slot, tokens in ((2, 9), (0, 6), (2, 12)):
        if not cache.is_open(slot):
            cache.open(slot)
        cache.ensure([slot], [tokens])
    write(cache, 2, 0, list(range(50, 62)))
    write(cache, 0, 0, list(range(30, 36)))
    slots, positions = np.array([0, 2, 2, 0]), np.array([5, 11, 0, 0])
    places = cache.locate(slots, positions)
    assert places.dtype == np.int64
    for tensor in tensors(cache):
        flat = tensor.flatten(0, 1)[torch.from_numpy(places)]
        assert flat[:, 0, 0].tolist() == [35, 61, 50, 30]
    assert cache.stats().tokens == 18
    assert cache.stats().live_bytes == 5 * cache.block_bytes
    cache.check()


@ORDERS
def test_copies_may_overlap_and_zeroes_end_where_they_should(order: Order) -> None:
    cache = make_paged(6, order=order)
    cache.open(0)
    cache.ensure([0], [12])
    write(cache, 0, 0, list(range(1, 13)))
    first, second, third = cache.blocks_of(0)
    cache.copy_blocks([first, second], [second, first])
    assert read(cache, 0, 12) == [5, 6, 7, 8, 1, 2, 3, 4, 9, 10, 11, 12]
    assert cache.copied_bytes == 2 * cache.block_bytes
    cache.zero_tokens(0, 3, 9)
    assert read(cache, 0, 12) == [5, 6, 7, *[0] * 6, 10, 11, 12]
    cache.zero_blocks([third])
    assert read(cache, 0, 12) == [5, 6, 7, *[0] * 9]


def test_what_does_not_fit_changes_nothing() -> None:
    cache = make_paged(3, slots=2, max_tokens=16, order="token")
    for _ in range(2):
        cache.open()
    cache.ensure([0], [5])
    with pytest.raises(OutOfBlocks, match="2 blocks are needed, and 1 are free"):
        cache.ensure([0, 1], [9, 4])
    assert (cache.tokens(0), cache.tokens(1), cache.blocks.free) == (5, 0, 1)
    with pytest.raises(OutOfBlocks, match="all 2 slots are open"):
        cache.open()
    with pytest.raises(ValueError, match="tokens=17 is more than max_tokens=16"):
        cache.ensure([0], [17])
    cache.release(1)
    with pytest.raises(ValueError, match="not all open"):
        cache.ensure([1], [1])
    with pytest.raises(ValueError, match="slot=0 is not a free one"):
        cache.open(0)
    cache.check()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_every_dtype_is_copied_bit_by_bit(dtype: torch.dtype) -> None:
    cache = PagedCache(
        [LayerSpec(2, 16, dtype)],
        device="cpu",
        max_seqs=1,
        max_tokens=8,
        num_blocks=3,
        block_tokens=4,
    )
    (k, v), bits = cache.layer(0), torch.arange(4 * 2 * 16 * dtype.itemsize).to(torch.uint8)
    k[1].view(torch.uint8).flatten().copy_(bits)
    cache.copy_blocks([1], [2])
    assert torch.equal(k[2].view(torch.uint8).flatten(), bits)
    assert not v[2].view(torch.uint8).any()
    cache.zero_blocks([2])
    assert not k[2].view(torch.uint8).any()


def test_bad_sizes_are_refused() -> None:
    def make(**options: object) -> PagedCache:
        given: dict[str, object] = {
            "device": "cpu",
            "max_seqs": 1,
            "max_tokens": 8,
            "num_blocks": 3,
            "block_tokens": 4,
        }
        return PagedCache(SPECS, **{**given, **options})  # type: ignore[arg-type]

    for name in ("max_seqs", "max_tokens", "block_tokens"):
        with pytest.raises(ValueError, match=f"{name}=0 must be a positive integer"):
            make(**{name: 0})
    with pytest.raises(ValueError, match="num_blocks=1 leaves no block"):
        make(num_blocks=1)
    with pytest.raises(ValueError, match="order='flat' must be"):
        make(order="flat")
    with pytest.raises(ValueError, match="at least one layer"):
        PagedCache([], device="cpu", max_seqs=1, max_tokens=1, num_blocks=2, block_tokens=1)
