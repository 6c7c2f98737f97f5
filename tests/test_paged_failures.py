"""The paged baseline's memory when requests fail, give way or are lost; and its budget."""

from __future__ import annotations

import pytest

from bench.paged.memory import PagedMemory
from tests.paged_model import assert_no_block_lost, read, tensors
from tests.paged_requests import compute, end, ids, make_memory, start


def test_what_a_failed_request_wrote_is_neither_found_nor_read() -> None:
    memory = make_memory()
    good = start(memory, "a", ids(8))
    compute(memory, good)
    bad = start(memory, "b", [*ids(8), *ids(9, seed=1)])
    compute(memory, bad)
    assert bad.cached == 8
    own = memory.cache.blocks_of(bad.slot)[2:]
    for tensor in tensors(memory.cache):
        tensor[own] = float("nan")
    end(memory, bad, error=True)
    assert all(tensor.isfinite().all() for tensor in tensors(memory.cache))
    assert read(memory.cache, good.slot, 8) == ids(8)  # what it had found is another one's
    assert start(memory, "c", [*ids(8), *ids(9, seed=1)]).computed == 8


def spoil(memory: PagedMemory, blocks: list[int]) -> None:
    for tensor in tensors(memory.cache):
        tensor[blocks] = float("nan")


def is_sound(memory: PagedMemory) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors(memory.cache))


@pytest.mark.parametrize("error", [True, False], ids=["fails", "aborted"])
def test_who_drops_a_spoiled_block_last_has_it_zeroed(error: bool) -> None:
    """A second request shares what the first has spoiled before anybody sees it."""
    memory = make_memory()
    first = start(memory, "a", ids(9))
    compute(memory, first)
    second = start(memory, "b", ids(14))
    assert second.computed == 8
    compute(memory, second)
    spoil(memory, memory.cache.blocks_of(second.slot))  # the shared ones as well
    spoil(memory, memory.cache.blocks_of(first.slot))
    end(memory, first, error=True)
    assert not is_sound(memory)  # it may still be read
    third = start(memory, "c", ids(14))
    assert third.computed == 0  # neither's
    end(memory, second, error=error)
    assert is_sound(memory)
    compute(memory, third)
    assert start(memory, "d", ids(14)).computed == 12
    assert read(memory.cache, third.slot, 14) == ids(14)


def test_what_a_request_wrote_before_it_gave_way_is_not_trusted_either() -> None:
    memory = make_memory()
    request = start(memory, "a", ids(18))
    compute(memory, request, 12)
    spoil(memory, memory.cache.blocks_of(request.slot))
    sharer = start(memory, "b", ids(11))
    assert sharer.computed == 8
    memory.preempt(request)
    assert memory.admit(request)
    assert request.computed == 12  # its own, two of which another one holds
    compute(memory, request)
    end(memory, request, error=True)
    assert start(memory, "c", ids(18)).computed == 0
    end(memory, sharer)
    assert is_sound(memory)


def test_who_shares_a_spoiled_block_names_nothing_and_leaves_nothing() -> None:
    memory = make_memory()
    first = start(memory, "a", ids(9))
    compute(memory, first)
    second = start(memory, "b", ids(24))
    compute(memory, second, 5)
    end(memory, first, error=True)
    compute(memory, second)  # four more blocks, after the failure
    assert memory.cache.blocks.kept == 0
    names = map(memory.cache.blocks.name_of, memory.cache.blocks_of(second.slot))
    assert not any(names)
    memory.preempt(second)
    assert memory.cache.blocks.tainted == set()
    assert memory.admit(second)
    assert second.computed == 0
    compute(memory, second)
    end(memory, second)
    assert start(memory, "c", ids(24)).computed == 20


def test_spoiled_drafts_are_zeroed_and_their_blocks_given_up() -> None:
    memory = make_memory()
    request = start(memory, "a", ids(6))
    compute(memory, request)
    request.tokens.append(1)
    assert memory.grow([request.slot], [12])
    for tensor in tensors(memory.cache):
        blocks = memory.cache.blocks_of(request.slot)
        tensor[blocks[1], 2:] = tensor[blocks[2]] = float("nan")
    memory.cut(request, spoiled=True)
    assert all(tensor.isfinite().all() for tensor in tensors(memory.cache))
    assert (memory.cache.tokens(request.slot), memory.cache.blocks.live) == (6, 2)
    assert read(memory.cache, request.slot, 6) == ids(6)
    memory.check()


def test_who_gives_way_finds_what_is_left_of_its_blocks() -> None:
    memory = make_memory(6)
    request = start(memory, "a", ids(18))
    compute(memory, request)
    memory.preempt(request)
    assert (request.slot, request.computed, memory.cache.blocks.live) == (-1, 0, 0)
    other = start(memory, "b", ids(7, seed=1))  # two of six; the tail's go first
    compute(memory, other)
    end(memory, other)
    assert memory.admit(request)
    assert request.computed == 16
    memory.check()


def test_everything_can_be_lost_but_the_scratch_slot_and_the_limit() -> None:
    memory = make_memory(20, scratch=True)
    memory.cache.blocks.set_limit(10)
    scratch = memory.scratch_slot
    assert scratch == memory.cache.max_seqs - 1
    compute(memory, start(memory, "a", ids(30)))
    for tensor in tensors(memory.cache):
        tensor[memory.cache.blocks.held()] = float("nan")
    memory.lose_all()
    memory.check()
    assert (memory.cache.blocks.limit, memory.cache.blocks.kept) == (10, 0)
    assert all(not tensor.any() for tensor in tensors(memory.cache))
    assert memory.cache.open_slots == 1
    assert not memory.cache.tables.device[scratch].any()  # padding rows write to the null block
    request = start(memory, "b", ids(30))
    assert request.computed == 0
    end(memory, request)
    memory.close()
    assert memory.cache.open_slots == 0
    assert_no_block_lost(memory)


def test_a_budget_is_of_bytes_and_within_what_was_allocated() -> None:
    memory = make_memory(10)
    size = memory.cache.block_bytes
    memory.set_budget(6 * size + 1)
    assert memory.cache.blocks.limit == 5
    assert memory.cache.stats().budget_bytes == 6 * size
    memory.set_budget(11 * size)
    assert memory.cache.blocks.limit == 10
    with pytest.raises(ValueError, match="that were allocated for blocks"):
        memory.set_budget(11 * size + 1)
    with pytest.raises(ValueError, match="is less than two blocks"):
        memory.set_budget(2 * size - 1)
    with pytest.raises(ValueError, match="budget_bytes='much' is not a size"):
        memory.set_budget("much")
