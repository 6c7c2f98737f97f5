"""What the paged baseline's memory manager shares, copies, drops and refuses, in blocks.

The machines of ``test_paged_machine`` tell right tokens from wrong ones; here counts are looked at.
"""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from tests.engine_cases import make_llm, mixed_cases, run
from tests.paged_engines import NGRAM, finish, paged
from tests.paged_model import assert_no_block_lost, read
from tests.paged_requests import BLOCK, compute, end, ids, make_memory, start
from tests.scheduler_model import make_request
from vattn.engine.policy import NeverFits
from vattn.request import Status
from vattn.sampling_params import SamplingParams


@pytest.mark.parametrize(("tokens", "hit"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (30, 28)])
def test_hits_are_whole_blocks_and_leave_a_token(tokens: int, hit: int) -> None:
    memory = make_memory()
    first = start(memory, "a", ids(tokens))
    compute(memory, first)
    second = start(memory, "b", ids(tokens))
    assert (second.computed, second.cached) == (hit, hit)
    assert read(memory.cache, second.slot, 0) == []
    compute(memory, second)
    assert read(memory.cache, second.slot, tokens) == ids(tokens)
    assert memory.cache.blocks.live == 2 * memory.cache.blocks_for(tokens) - hit // BLOCK
    assert (memory.counters.prefix_queries, memory.counters.prefix_hits) == (2 * tokens, hit)
    assert memory.cache.copied_bytes == 0
    end(memory, first, second)
    third = start(memory, "c", ids(tokens))  # of those that have ended
    assert third.computed == hit
    end(memory, third)
    assert_no_block_lost(memory)


def test_a_block_is_found_once_the_step_that_writes_it_was_launched() -> None:
    memory = make_memory()
    first = start(memory, "a", ids(30))
    assert start(memory, "b", ids(30)).computed == 0
    compute(memory, first, 10)
    assert start(memory, "c", ids(30)).computed == 8
    compute(memory, first, 3)
    assert start(memory, "d", ids(30)).computed == 12


def test_what_is_generated_is_found_when_the_next_block_begins_and_at_the_end() -> None:
    memory = make_memory()
    request = start(memory, "a", ids(6))
    compute(memory, request)
    for token in (40, 41, 42):  # the ninth token is the first of a third block
        request.tokens.append(token)
        compute(memory, request)
    assert start(memory, "b", [*ids(6), 40, 41, 42, 43, 0]).computed == 8
    request.tokens += [43, 44]
    compute(memory, request)
    end(memory, request)
    assert start(memory, "c", [*ids(6), 40, 41, 42, 43, 44, 0]).computed == 8
    request = start(memory, "d", [*ids(6), 40, 41, 42, 43, 44, 45, 46])
    assert request.computed == 8


def test_tokens_in_flight_are_not_named() -> None:
    memory = make_memory()
    request = start(memory, "a", ids(7))
    compute(memory, request)
    request.in_flight = 1
    assert memory.grow([request.slot], [8])
    request.computed = 8  # a block is full, of a token that nobody knows
    request.in_flight = 2
    assert memory.grow([request.slot], [9])
    assert memory.cache.blocks.name_of(memory.cache.blocks_of(request.slot)[1]) is None
    request.tokens.append(49)
    request.in_flight, request.computed = 1, 8
    end(memory, request)
    assert start(memory, "b", [*ids(7), 49, 0]).computed == 8


def test_tenants_share_nothing_and_a_prefix_cache_that_is_off_nothing_either() -> None:
    memory = make_memory()
    for salt in ("", "x", "y"):
        request = start(memory, salt, ids(30), cache_salt=salt)
        assert request.computed == 0
        compute(memory, request)
    assert start(memory, "again", ids(30), cache_salt="x").computed == 28
    memory = make_memory(prefix_caching=False)
    first = start(memory, "a", ids(30))
    compute(memory, first)
    assert start(memory, "b", ids(30)).computed == 0
    end(memory, first)
    assert memory.cache.blocks.kept == 0


def test_scores_of_a_prompt_are_computed_again() -> None:
    memory = make_memory()
    compute(memory, start(memory, "a", ids(30)))
    scored = make_request("b", ids(30), 4)
    scored.prompt_logprobs = [None]
    assert memory.admit(scored)
    assert scored.computed == 0


# Waiting and fitting ------------------------------------------------------------------------------


@pytest.mark.parametrize(("block_tokens", "waits"), [(16, True), (64, True), (128, False)])
def test_a_request_waits_for_a_prefix_that_is_computed_now_if_it_can_have_it(
    block_tokens: int, waits: bool
) -> None:
    memory = make_memory(block_tokens=block_tokens)
    first = start(memory, "a", ids(120))
    compute(memory, first, 20)
    second = make_request("b", [*ids(110), 49, 49, 49], 4)
    assert memory.admit(second) is (None if waits else True)
    if waits:
        assert second.slot == -1
        compute(memory, first)
        assert memory.admit(second)
        assert second.computed == 110 // block_tokens * block_tokens


def test_nobody_waits_for_another_tenant_or_for_what_is_too_short() -> None:
    memory = make_memory(block_tokens=16)
    start(memory, "a", ids(120))
    assert memory.admit(make_request("b", ids(120), 4, cache_salt="x"))
    assert memory.admit(make_request("c", [*ids(70), 49, 49], 4)) is None
    assert memory.admit(make_request("d", [*ids(60), 49, 49], 4))  # 48 of whole blocks


def test_admissions_leave_what_prefills_still_need() -> None:
    memory = make_memory(10)
    first = start(memory, "a", ids(24))  # seven blocks, with the next token
    second = make_request("b", ids(12, seed=1), 4)
    assert memory.admit(second) is False
    compute(memory, first, 4)
    assert memory.admit(second) is False
    short = make_request("c", ids(11, seed=1), 4)
    assert memory.admit(short)


def test_admissions_leave_a_hundredth_to_those_that_run() -> None:
    memory = make_memory(300)
    compute(memory, start(memory, "a", ids(3)))
    for seed in range(4):
        compute(memory, start(memory, str(seed), ids(235, seed=seed)))
    assert memory.cache.blocks.free == 300 - 1 - 4 * 59 == 63  # of which three are left to these
    fits = make_request("b", ids(4 * 60 - 1, seed=9), 4)
    assert memory.admit(fits)
    end(memory, fits)
    assert memory.admit(make_request("c", ids(4 * 61, seed=9), 4)) is False


def test_hits_among_free_blocks_are_not_free_any_more() -> None:
    memory = make_memory(8)
    first = start(memory, "a", ids(16))
    compute(memory, first)
    end(memory, first)
    second = start(memory, "b", ids(12, seed=1))
    compute(memory, second)
    assert memory.cache.blocks.free == 5
    # Of 21 tokens four blocks are there, among the free; six are needed.
    assert memory.admit(make_request("c", [*ids(16), *ids(5, seed=2)], 4)) is False
    assert memory.admit(make_request("d", [*ids(16), 1, 2], 4))


def test_what_never_fits_and_what_cannot_go_on_is_said_in_blocks() -> None:
    memory = make_memory(5)
    with pytest.raises(NeverFits, match=r"20 tokens need 6 blocks of 4 tokens, .* is 5 blocks"):
        memory.admit(make_request("a", ids(20), 4))
    request = start(memory, "b", ids(19))
    compute(memory, request)
    request.tokens += [1, 2]
    assert not memory.grow([request.slot], [21])
    assert memory.cache.tokens(request.slot) == 19
    assert "out of blocks: its 21 tokens need 6 blocks of 4 tokens" in memory.shortage(request)
    memory.check()


# Sharing of what is not full ----------------------------------------------------------------------


def test_samples_share_full_blocks_and_copy_the_one_in_which_the_prompt_ends() -> None:
    memory = make_memory(block_tokens=16)
    first = start(memory, "a", ids(40))
    compute(memory, first)
    second = make_request("b", ids(40), 8, source=first, index=1)
    assert memory.admit(second)
    assert second.computed == 39
    assert memory.cache.blocks_of(second.slot)[:2] == memory.cache.blocks_of(first.slot)[:2]
    compute(memory, second)
    assert read(memory.cache, second.slot, 40) == ids(40)
    assert memory.cache.blocks.live == 4
    for request, copied in ((first, 0), (second, memory.cache.block_bytes)):
        usage = memory.usage(request)
        assert (usage.pages, usage.shared_pages, usage.copied_bytes) == (3, 2, copied)
    end(memory, first)
    assert memory.usage(second).shared_pages == 2  # it had them while another one did
    end(memory, second)
    assert second.kv is not None
    assert (second.kv.pages, second.kv.shared_pages) == (3, 2)
    assert_no_block_lost(memory)


def test_beams_change_places_at_the_cost_of_one_block_each() -> None:
    memory = make_memory(6)
    first, second = (start(memory, name, ids(10, seed)) for seed, name in enumerate("ab"))
    for request in (first, second):
        compute(memory, request)
    slots = [first.slot, second.slot]
    assert memory.cache.blocks.free == 0
    assert memory.reorder(slots, slots[::-1])  # in the blocks that they give up
    assert read(memory.cache, slots[0], 10) == ids(10, 1)
    assert read(memory.cache, slots[1], 10) == ids(10, 0)
    assert memory.cache.copied_bytes == 2 * memory.cache.block_bytes
    assert memory.cache.blocks.live == 6
    assert memory.reorder(slots, [slots[0], slots[0]])
    assert memory.cache.blocks.live == 4  # two are shared
    assert memory.reorder([slots[0]], [slots[0]])  # itself
    assert memory.cache.copied_bytes == 3 * memory.cache.block_bytes
    assert memory.counters.beams_moved == 5
    first.tokens, second.tokens = ids(10, 1), ids(10, 1)
    first.prompt_ids = second.prompt_ids = ids(10, 1)
    memory.check()
    third = start(memory, "c", ids(7, seed=3))
    compute(memory, third)


def test_a_reorder_that_finds_no_block_changes_nothing() -> None:
    memory = make_memory(5)
    source, other = start(memory, "a", ids(6)), start(memory, "b", ids(6))
    compute(memory, source)
    compute(memory, other)  # three blocks: the first is shared
    tables = memory.cache.tables.host.copy()
    memory.cache.blocks.set_limit(2)
    assert memory.reorder([other.slot], [source.slot]) is False
    assert (memory.cache.tables.host == tables).all()
    assert memory.cache.copied_bytes == memory.counters.beams_moved == 0
    memory.check()


# Names --------------------------------------------------------------------------------------------


def test_names_are_made_once_whoever_gives_way_and_however_often_one_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    digest = hashlib.blake2b

    def count(*given: Any, **options: Any) -> Any:
        made.append(1)
        return digest(*given, **options)

    monkeypatch.setattr(hashlib, "blake2b", count)
    memory = make_memory(10)
    first = start(memory, "a", ids(30))
    compute(memory, first)
    made.clear()
    waiting = [make_request(name, ids(17, seed=seed), 4) for seed, name in enumerate("bc", 1)]
    for _ in range(3):  # in turns, as when the head of the queue changes
        for request in waiting:
            assert memory.admit(request) is False
    memory.preempt(first)
    assert memory.admit(first)
    assert len(made) == 2 * 2  # salt and first block, which nobody has, of those that wait
    end(memory, first)
    assert "a" not in memory._known


def test_records_of_those_that_ended_without_a_slot_do_not_add_up() -> None:
    memory = make_memory(6)
    compute(memory, start(memory, "a", ids(23)))
    for i in range(200):
        request = make_request(str(i), ids(9, seed=i), 4)
        assert memory.admit(request) is False
        request.status = Status.FINISHED
    assert len(memory._known) < 50


# Beside the contiguous side -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"async_scheduling": True},
        {"max_num_seqs": 7, "max_num_batched_tokens": 40},
        {"speculative_config": NGRAM, "max_num_seqs": 9},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_both_sides_schedule_the_same_steps(options: dict[str, Any]) -> None:
    """Where memory is ample and nothing is cached, the steps are the same, token by token."""
    cases = mixed_cases("llama")
    found = []
    for make in (make_llm, paged):
        llm = make(enable_prefix_caching=False, **options)
        plans: list[tuple[int, ...]] = []
        launch = llm.engine.runner.run

        def run_and_record(batch: Any, launch: Any = launch, plans: Any = plans) -> Any:
            plans.append((batch.num_decodes, *batch.query_lens.tolist(), *batch.kv_lens.tolist()))
            return launch(batch)

        llm.engine.runner.run = run_and_record  # type: ignore[method-assign]
        outputs = run(llm, cases)
        found.append((plans, [output.outputs[0].token_ids for output in outputs]))
        if make is paged:
            finish(llm)
        else:
            llm.engine.close()
    contiguous, blocks = found
    assert len(contiguous[0]) > 10
    assert [sorted(plan) for plan in contiguous[0]] == [sorted(plan) for plan in blocks[0]]
    assert contiguous[1] == blocks[1]


def test_drawn_samples_are_the_same_on_both_sides() -> None:
    params = SamplingParams(temperature=1.0, seed=7, n=2, max_tokens=12, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids(n, seed=n)} for n in (5, 40, 21)]
    texts = []
    for make in (make_llm, paged):
        llm = make(max_num_seqs=8)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        texts.append([sample.token_ids for output in outputs for sample in output.outputs])
        llm.engine.close()
    assert texts[0] == texts[1]
