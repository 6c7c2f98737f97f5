"""A policy of the user's over what is kept of finished requests: what it is asked, told and obeyed.

Pages have 16 tokens; the stub model tells wrong bytes from right ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

import vattn
from tests.policies import HOT, Spy, fails, flood, is_hot, serve
from tests.stub_model import expected_tokens
from tests.test_engine_memory import (
    PAGE,
    TOKENS_PER_PAGE,
    drive,
    finish,
    make_engine,
    prompt,
    start,
)
from vattn.engine.eviction import EvictionPolicy, KeptSequence, PolicyError
from vattn.engine.ranks import RankFunction
from vattn.request import Request

# Who goes first -----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
def test_what_the_policy_names_last_outlives_what_was_used_since(is_async: bool) -> None:
    spy = Spy(lambda kept: sorted(kept, key=is_hot))
    engine = make_engine(pages=30, eviction_policy=spy, async_scheduling=is_async)
    serve(engine, HOT, 20, "hot")
    flood(engine, range(1, 9))
    assert engine.stats().cache.evicted_tokens > 0
    assert serve(engine, HOT, 2, "again").cached == 149
    finish(engine)


def test_who_names_nobody_leaves_it_to_the_least_recently_used() -> None:
    hits = []
    for policy in (None, EvictionPolicy(), Spy()):
        engine = make_engine(pages=30, eviction_policy=policy)
        flood(engine, range(5))
        hits.append([serve(engine, prompt(150, i), 2, f"{i}").cached for i in (4, 3, 2, 1, 0)])
        finish(engine)
    assert hits[0] == hits[1] == hits[2]
    assert hits[0][0] == 149
    assert 0 in hits[0]


def test_what_is_not_named_goes_by_its_last_use_after_the_named() -> None:
    spy = Spy(lambda kept: [k for k in kept if list(k.token_ids[:10]) == prompt(10, 3)])
    engine = make_engine(pages=60, eviction_policy=spy)
    flood(engine, range(1, 5))
    serve(engine, prompt(320, 9), 20, "long")  # 22 pages, and 16 have no content yet
    cached = {i: serve(engine, prompt(150, i), 1, f"{i}").cached for i in (4, 2, 3, 1)}
    assert cached[3] < cached[2] == cached[4] == 149
    finish(engine)


def test_who_was_named_before_goes_by_its_last_use() -> None:
    """The newest is named in the first call alone: with it goes a page, and then the oldest."""
    spy = Spy()
    spy.answer = lambda kept: sorted(kept, key=lambda k: -k.last_used_s)[: len(spy.asked) == 1]
    engine = make_engine(pages=60, eviction_policy=spy)
    flood(engine, range(1, 5))
    serve(engine, prompt(250, 9), 150, "long")
    assert len(spy.asked) > 3
    left = {k.id: k.tokens for k in spy.asked[-1][0]}
    assert 150 <= left[3] < 169  # all of them have
    assert left[0] < left[1] == left[2] == 169
    finish(engine)


def test_stale_pages_of_another_engine_go_before_what_is_kept() -> None:
    """Two engines on a pool; whoever is asked is asked before anything goes."""
    spy = Spy()
    pool = vattn.PagePool(
        "cpu", driver=vattn._core.host_driver(strict=True), page_bytes=4096, budget_bytes=40 * 4096
    )
    engine = make_engine(pool=pool, eviction_policy=spy)
    other = make_engine(pool=pool, enable_prefix_caching=False)
    for seed in (1, 2):
        serve(engine, prompt(100, seed), 5, f"{seed}")
    serve(other, prompt(300, 5), 10, "other")  # 20 pages, which are stale now
    request = start(engine, prompt(200, 7), 2, "long")
    engine.step()
    assert (len(spy.asked), engine.stats().cache.evicted_tokens) == (0, 0)
    drive(engine, request)
    other.close()
    finish(engine)


def test_a_lower_budget_asks_too() -> None:
    spy = Spy(lambda kept: sorted(kept, key=is_hot))
    engine = make_engine(pages=60, eviction_policy=spy)
    serve(engine, HOT, 20, "hot")
    flood(engine, (1, 2))  # 33 pages are kept
    engine.memory.set_budget(40 * PAGE)
    engine.memory.set_budget(f"{50 * PAGE}")
    assert spy.asked == []
    engine.memory.set_budget(20 * PAGE)
    ((_, pages),) = spy.asked
    assert pages == 13
    assert serve(engine, HOT, 1, "again").cached == 149
    spy.answer = fails
    with pytest.raises(PolicyError, match="ZeroDivisionError"):
        engine.memory.set_budget(PAGE)
    assert engine.cache.pool.stats().budget_bytes == 20 * PAGE
    finish(engine)


def test_nobody_is_asked_while_there_is_room() -> None:
    spy = Spy()
    engine = make_engine(pages=400, eviction_policy=spy)
    flood(engine, range(8))
    serve(engine, HOT, 20, "hot")
    serve(engine, HOT, 20, "again")
    assert spy.asked == []
    assert len(spy.offered) == 10
    finish(engine)


def test_a_request_that_grows_asks_too() -> None:
    spy = Spy(lambda kept: kept)
    engine = make_engine(pages=30, eviction_policy=spy)
    serve(engine, HOT, 20, "kept")  # 11 pages
    request = start(engine, prompt(100, 1), 300, "grows")
    engine.step()
    assert request.slot >= 0
    assert spy.asked == []
    drive(engine, request)
    assert {pages for _, pages in spy.asked} == {1}  # a page at a time
    assert engine.stats().num_preemptions == 0
    finish(engine)


def test_a_slot_may_be_all_that_is_short() -> None:
    spy = Spy(lambda kept: sorted(kept, key=lambda k: -k.last_used_s))
    engine = make_engine(pages=400, max_num_seqs=1, eviction_policy=spy)
    slots = engine.cache.max_seqs
    for seed in range(slots):
        serve(engine, prompt(10, seed), 2, f"{seed}")
    assert spy.asked == []
    serve(engine, prompt(10, slots), 2, "one more")
    ((kept, pages),) = spy.asked
    assert (len(kept), pages) == (slots, 0)
    newest = spy.answer(kept)[0]
    assert list(newest.token_ids[:10]) == prompt(10, slots - 1)
    assert serve(engine, prompt(10, slots - 1), 2, "newest").cached == 0
    assert serve(engine, prompt(10, 0), 2, "oldest").cached > 0
    finish(engine)


def test_the_source_of_a_request_is_not_offered() -> None:
    spy = Spy(lambda kept: kept)
    engine = make_engine(pages=24, eviction_policy=spy)
    flood(engine, (1, 2))
    before = len(spy.asked)
    turn = prompt(150, 2) + expected_tokens(prompt(150, 2), 19)
    assert serve(engine, [*turn, *prompt(40, 5)], 20, "turn").cached == len(turn)
    later = spy.asked[before:]
    assert later
    assert all(list(k.token_ids[:150]) == prompt(150, 1) for kept, _ in later for k in kept)
    finish(engine)


# What it is told ----------------------------------------------------------------------------------


def test_what_a_policy_sees_of_a_sequence() -> None:
    spy = Spy()
    engine = make_engine(pages=40, eviction_policy=spy)
    first = serve(engine, HOT, 20, "first", cache_salt="a")
    fork = serve(engine, [*HOT[:96], *prompt(40, 7)], 2, "fork", cache_salt="a")
    turn = serve(engine, [*first.tokens[:-1], 9], 2, "turn", cache_salt="a")
    other = serve(engine, prompt(30, 3), 2, "other")
    assert (fork.cached, turn.cached) == (96, 169)
    serve(engine, prompt(400, 4), 2, "long")
    kept, pages = spy.asked[0]
    assert pages > 0
    by_request = {len(k.token_ids): k for k in kept}
    assert set(by_request) == {len(r.tokens) - 1 for r in (fork, turn, other)}
    seen = by_request[len(turn.tokens) - 1]  # it goes on where the first was
    assert (seen.uses, seen.cache_salt, seen.tokens) == (2, "a", 171)
    assert list(seen.token_ids) == turn.tokens[:-1]
    assert (by_request[len(other.tokens) - 1].uses, by_request[137].uses) == (0, 0)
    assert by_request[31].last_used_s >= seen.last_used_s > by_request[137].last_used_s
    assert spy.offered[0] is first
    finish(engine)


def test_a_sequence_is_known_by_its_id() -> None:
    spy = Spy()
    engine = make_engine(pages=30, eviction_policy=spy)
    first = serve(engine, HOT, 20, "first")
    serve(engine, prompt(150, 1), 20, "second")
    turn = serve(engine, [*first.tokens, 9], 10, "turn")  # in place
    assert engine.stats().requests_reopened == 1
    serve(engine, prompt(300, 4), 20, "long")
    seen: dict[int, set[tuple[int, ...]]] = {}
    for kept, _ in spy.asked:
        assert len({k.id for k in kept}) == len({k.last_used_s for k in kept}) == len(kept)
        for k in kept:
            seen.setdefault(k.id, set()).add(tuple(k.token_ids[:10]))
    assert len(spy.asked) > 1
    assert seen == {0: {tuple(HOT[:10])}, 1: {tuple(prompt(10, 1))}}
    assert tuple(turn.tokens[:10]) == tuple(HOT[:10])
    flood(engine, range(5, 9))  # in the same slots
    assert {k.id for k in spy.asked[-1][0]} & {0, 1} == set()
    finish(engine)


def test_token_ids_are_not_copied_unless_the_end_is_gone() -> None:
    spy = Spy()
    engine = make_engine(pages=30, eviction_policy=spy)
    flood(engine, (1, 2, 3))
    whole, cut = 0, 0
    for kept, _ in spy.asked:
        for k in kept:
            assert len(k.token_ids) == len(list(k.token_ids)) <= 169
            whole += k.token_ids is k.token_ids and len(k.token_ids) == 169
            cut += len(k.token_ids) < 169
            assert isinstance(k.token_ids, tuple)  # nobody changes what others see
    assert whole > 0 < cut
    finish(engine)


def test_pages_that_only_one_holds() -> None:
    counts: list[dict[int, int]] = []

    def count(kept: Sequence[KeptSequence]) -> list[KeptSequence]:
        counts.append({len(k.token_ids): k.pages for k in kept})
        return []

    engine = make_engine(pages=30, eviction_policy=Spy(count))
    serve(engine, HOT, 20, "hot")  # 169 tokens: 11 pages
    serve(engine, [*HOT[:96], *prompt(40, 7)], 2, "fork")  # 137: 9 pages, of which 6 are shared
    serve(engine, prompt(400, 4), 2, "long")
    assert 96 % TOKENS_PER_PAGE == 0
    assert counts[0] == {169: 5, 137: 3}
    finish(engine)


def test_a_return_after_preemption_is_no_use() -> None:
    spy = Spy()
    engine = make_engine(pages=30, eviction_policy=spy, swap_space=0)
    both = [start(engine, prompt(100, i), 250, f"{i}") for i in range(2)]
    drive(engine, *both)
    assert engine.stats().num_preemptions > 0
    waiting = [k for kept, _ in spy.asked for k in kept if k.waiting]
    assert {tuple(k.token_ids[:10]) for k in waiting} == {tuple(prompt(10, 1))}
    before = len(spy.asked)
    flood(engine, (5, 6))
    assert all(k.uses == 0 for kept, _ in spy.asked for k in kept)
    assert not any(k.waiting for kept, _ in spy.asked[before:] for k in kept)
    assert len(spy.offered) == 4  # whoever gives way is kept for itself, without a question
    finish(engine)


# What is kept -------------------------------------------------------------------------------------


def test_what_is_not_worth_keeping_is_not_kept() -> None:
    engine = make_engine(eviction_policy=Spy(keep=lambda request: request.cache_salt == "yes"))
    serve(engine, HOT, 20, "a", cache_salt="yes")
    serve(engine, HOT, 20, "b", cache_salt="no")
    assert engine.stats().cache.kept_slots == 1
    assert serve(engine, HOT, 2, "c", cache_salt="no").cached == 0
    assert serve(engine, HOT, 2, "d", cache_salt="yes").cached == 149
    finish(engine)


# Anything at all ----------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_texts_are_right_whatever_a_policy_wants(seed: int, window: bool) -> None:
    rng = random.Random(seed)

    def anything(kept: Sequence[KeptSequence]) -> list[KeptSequence]:
        assert all(0 < k.tokens <= 512 and k.pages >= 0 for k in kept)
        return rng.sample(list(kept), rng.randint(0, len(kept)))

    spy = Spy(anything, lambda request: rng.random() < 0.8)
    engine = make_engine(
        pages=40,
        window=window,
        eviction_policy=spy,
        swap_space=rng.choice([0.0, 0.001]),
        max_num_seqs=rng.choice([2, 8]),
        async_scheduling=rng.random() < 0.5,
    )
    waiting: list[tuple[str, list[int]]] = []
    running: list[tuple[list[int], Request]] = []
    for number in range(40):
        stem = prompt(rng.choice([0, 20, 90, 160]), rng.randrange(3))
        waiting.append((f"{number}", [*stem, *prompt(rng.randint(1, 60), number)]))
    while waiting or running:
        while waiting and len(running) < 6:
            name, ids = waiting.pop()
            running.append((ids, start(engine, ids, rng.randint(1, 90), name)))
        engine.step()
        engine.check()
        for ids, request in [each for each in running if each[1].finished]:
            new = len(request.output_ids)
            assert request.output_ids == expected_tokens(ids, new, window), request.id
            running.remove((ids, request))
    assert len(spy.offered) == 40
    assert spy.asked
    finish(engine)


def test_the_names_are_public() -> None:
    assert vattn.EvictionPolicy is EvictionPolicy
    assert vattn.KeptSequence is KeptSequence
    assert vattn.PolicyError is PolicyError
    assert vattn.Request is Request
    assert vattn.RankFunction is RankFunction
