"""What the engine's memory manager shares, evicts, swaps and gives back, in pages and calls.

The stub model tells wrong bytes from right ones; here the counts are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import vattn
from tests.helpers import memory_calls
from tests.stub_model import VOCABULARY, StubModel, StubRunner, expected_tokens
from vattn.engine.config import EngineConfig
from vattn.engine.engine import Engine
from vattn.request import Request
from vattn.sampling_params import SamplingParams

PAGE = 4096
TOKENS_PER_PAGE = 16  # of two layers: 2 x 2 x 2 heads x 8 floats are 256 bytes
MAX_LEN = 512


def make_engine(
    *,
    pages: int = 400,
    window: bool = False,
    before: Any = lambda: None,
    pool: vattn.PagePool | None = None,
    **options: Any,
) -> Engine:
    pool = pool or vattn.PagePool(
        "cpu",
        driver=vattn._core.host_driver(strict=True),
        page_bytes=PAGE,
        budget_bytes=pages * PAGE,
    )
    config = EngineConfig(
        **{"max_num_seqs": 8, "max_num_batched_tokens": 256, "order": "token", **options}
    )
    model: Any = StubModel(max_positions=MAX_LEN, window=window)
    engine = Engine(model, config, pool=pool)
    engine.runner = StubRunner(engine.cache, before)  # type: ignore[assignment]
    return engine


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = make_engine()
    yield engine
    finish(engine)


def finish(engine: Engine) -> None:
    engine.check()
    assert not engine.has_unfinished
    engine.memory.reset_prefix_cache()
    engine.cache.trim()
    engine.check()
    assert engine.cache.pool.stats().created_bytes == 0
    assert engine.memory.swap.used_bytes == 0
    engine.close()


def prompt(n: int, seed: int = 0) -> list[int]:
    return [(seed * 131 + i * i + 7 * i) % VOCABULARY for i in range(n)]


def start(engine: Engine, ids: list[int], new: int, name: str = "r", **options: Any) -> Request:
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    (request,) = engine.make_requests(name, ids, params, **options)
    engine.add(request)
    return request


def drive(engine: Engine, *requests: Request) -> None:
    for _ in range(10_000):
        if all(request.finished for request in requests):
            break
        engine.step()
        engine.check()
    for request in requests:
        assert request.finish_reason == "length", (request.id, request.error)
        wanted = expected_tokens(
            request.prompt_ids, len(request.output_ids), engine.cache.specs[1].window is not None
        )
        assert request.output_ids == wanted, request.id


def serve(engine: Engine, ids: list[int], new: int, name: str = "r", **options: Any) -> Request:
    request = start(engine, ids, new, name, **options)
    drive(engine, request)
    return request


# Prefixes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [False, True])
def test_a_follow_up_turn_makes_no_memory_call(window: bool) -> None:
    """The second turn computes its new tokens only, in place, on pages that are there already."""
    engine = make_engine(window=window)
    first = serve(engine, prompt(100), 21)  # 120 tokens are cached: the last page has room for 8
    calls = memory_calls(engine.cache.pool)
    before = engine.stats()
    turn = [*first.tokens, 5, 6]
    second = serve(engine, turn, 4, "again")
    after = engine.stats()
    assert memory_calls(engine.cache.pool) == calls
    assert second.cached == 120
    assert after.prompt_tokens - before.prompt_tokens == len(turn) - 120
    assert after.cache.copied_bytes == before.cache.copied_bytes
    assert (after.requests_reopened, after.requests_forked) == (1, 0)
    finish(engine)


def test_an_equal_prompt_is_forked_while_the_other_runs(engine: Engine) -> None:
    ids = prompt(100)
    first = start(engine, ids, 40, "a")
    for _ in range(3):
        engine.step()
    live = engine.cache.stats().live_bytes
    second = start(engine, ids, 30, "b")
    engine.step()
    engine.step()
    engine.check()
    stats = engine.cache.stats()
    assert second.cached == 99
    assert stats.shared_bytes == 99 // TOKENS_PER_PAGE * PAGE
    assert stats.live_bytes - live <= 2 * PAGE  # its own tail, and one page grown
    drive(engine, first, second)


def test_a_prefix_is_forked_from_a_kept_sequence_and_stays(engine: Engine) -> None:
    system = prompt(96, seed=1)
    serve(engine, [*system, *prompt(50, 2)], 10, "a")
    cached = [
        serve(engine, [*system, *prompt(50, seed)], 10, f"b{seed}").cached for seed in range(3, 7)
    ]
    assert cached == [96] * 4
    again = serve(engine, [*system, *prompt(50, 2)], 10, "a2")
    assert again.cached == 145  # all but the token whose logits are needed


def test_prompts_that_come_together_compute_their_prefix_once(engine: Engine) -> None:
    system = prompt(160, seed=1)
    requests = [start(engine, [*system, *prompt(20, s)], 10, f"r{s}") for s in range(2, 8)]
    drive(engine, *requests)
    assert [request.cached for request in requests] == [0] + [160] * 5
    assert engine.stats().prompt_tokens == 160 + 6 * 20


def test_a_long_prefix_is_shared_while_its_prompt_is_still_computed() -> None:
    engine = make_engine(max_num_batched_tokens=64)
    system = prompt(100, seed=1)
    first = start(engine, [*system, *prompt(300, 2)], 10, "long")
    second = start(engine, [*system, 7, 8], 10, "short")
    drive(engine, first, second)
    assert second.cached == 100
    finish(engine)


def test_nothing_is_shared_without_prefix_caching() -> None:
    engine = make_engine(enable_prefix_caching=False)
    ids = prompt(100)
    assert [serve(engine, ids, 3, f"r{i}").cached for i in range(3)] == [0, 0, 0]
    assert engine.cache.stats().kept_bytes == 0
    finish(engine)


def test_samples_share_their_prompt_even_without_prefix_caching() -> None:
    engine = make_engine(enable_prefix_caching=False)
    params = SamplingParams(
        n=4, temperature=0, max_tokens=20, ignore_eos=True, detokenize=False, seed=1
    )
    samples = engine.make_requests("s", prompt(80), params)
    for sample in samples:
        engine.add(sample)
    for _ in range(4):
        engine.step()
        engine.check()
    # All of the four have the four full pages that the prompt shares up to its last token.
    assert engine.cache.stats().shared_bytes == 79 // TOKENS_PER_PAGE * PAGE
    drive(engine, *samples)
    assert engine.stats().requests_forked == 3
    assert engine.stats().prompt_tokens == 80 + 3
    finish(engine)


def test_what_diverges_is_not_seen_by_the_other(engine: Engine) -> None:
    """Copy on write: both write behind the same prefix, into pages of their own."""
    ids = prompt(40)
    first = start(engine, [*ids, 1], 30, "a")
    engine.step()
    engine.step()
    second = start(engine, [*ids, 2], 30, "b")
    drive(engine, first, second)
    assert second.cached == 40
    third = serve(engine, [*first.tokens[:-1], 9], 20, "c")
    assert third.cached > 40


# Pressure -----------------------------------------------------------------------------------------


def test_kept_prefixes_are_evicted_before_anybody_is_preempted() -> None:
    engine = make_engine(pages=30)
    for seed in range(12):
        serve(engine, prompt(150, seed), 20, f"r{seed}")
    stats = engine.stats()
    assert stats.num_preemptions == 0
    assert stats.cache.evicted_tokens > 0
    # What was used last is still there, what was used first is not.
    assert serve(engine, prompt(150, 11), 2, "last").cached == 149
    assert serve(engine, prompt(150, 0), 2, "first").cached == 0
    finish(engine)


def test_eviction_takes_tails_first() -> None:
    engine = make_engine(pages=30)
    serve(engine, prompt(200), 5, "a")  # 13 pages
    serve(engine, prompt(300, 1), 5, "b")  # 19 pages: two of the other's had to go
    assert 100 < serve(engine, prompt(200), 2, "c").cached < 199
    finish(engine)


def test_unrelated_requests_take_over_pages_without_calls() -> None:
    """In steady state with a full pool, a new sequence adopts the oldest kept slot as it is."""
    engine = make_engine(pages=60)
    for seed in range(12):
        serve(engine, prompt(150, seed), 10, f"warm{seed}")
    calls = memory_calls(engine.cache.pool)
    for seed in range(12, 24):
        serve(engine, prompt(150, seed), 10, f"steady{seed}")
    assert memory_calls(engine.cache.pool) == calls
    finish(engine)


@pytest.mark.parametrize("swap", [0.0, 0.001])
@pytest.mark.parametrize("window", [False, True])
def test_preempted_requests_come_back(swap: float, window: bool) -> None:
    engine = make_engine(pages=40, window=window, swap_space=swap, enable_prefix_caching=False)
    requests = [start(engine, prompt(60, seed), 120, f"r{seed}") for seed in range(6)]
    drive(engine, *requests)
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert (stats.requests_swapped_in > 0) == (swap > 0)
    if swap:
        # What was swapped out is not computed again.
        assert stats.prompt_tokens < 6 * 60 + stats.num_preemptions * 60
    finish(engine)


@pytest.mark.parametrize("window", [False, True])
def test_a_victim_that_was_mapped_for_the_step_is_saved_as_it_was(window: bool) -> None:
    """What is swapped out has the length that was computed, not the one that was planned."""
    engine = make_engine(swap_space=0.001, window=window, enable_prefix_caching=False)
    requests = [start(engine, prompt(60, seed), 40, f"r{seed}") for seed in range(3)]
    grow, refused = engine.memory.grow, False

    def grow_then_refuse(slots: list[int], tokens: list[int]) -> bool:
        nonlocal refused
        done = grow(slots, tokens)
        if refused or tokens != [65] * 3:  # a page more than the 64 tokens that are computed
            return done
        refused = True
        return False

    engine.memory.grow = grow_then_refuse  # type: ignore[method-assign]
    drive(engine, *requests)
    assert engine.stats().num_preemptions == 1
    assert engine.stats().requests_swapped_in == 1
    finish(engine)


def test_swap_space_that_is_full_falls_back_to_recomputing() -> None:
    one = 100 * 256 / 2**30
    engine = make_engine(pages=40, swap_space=one, enable_prefix_caching=False)
    requests = [start(engine, prompt(60, seed), 120, f"r{seed}") for seed in range(6)]
    drive(engine, *requests)
    stats = engine.stats()
    assert 0 < stats.requests_swapped_out < stats.num_preemptions
    finish(engine)


def test_a_request_that_can_never_fit_fails_alone() -> None:
    engine = make_engine(pages=10)
    small = start(engine, prompt(30), 20, "small")
    large = start(engine, prompt(300, 1), 20, "large")
    after = start(engine, prompt(30, 2), 20, "after")
    drive(engine, small, after)
    assert large.finish_reason == "error"
    assert "its 300 tokens need 19 pages" in str(large.error)
    assert "the budget of the KV cache is 10 pages" in str(large.error)
    finish(engine)


def test_a_request_that_outgrows_the_budget_fails_with_its_output() -> None:
    engine = make_engine(pages=10)
    request = start(engine, prompt(100), 200)
    while not request.finished:
        engine.step()
        engine.check()
    assert request.finish_reason == "error"
    assert "out of pages" in str(request.error)
    assert request.output_ids == expected_tokens(request.prompt_ids, 61)
    finish(engine)


# Budgets ------------------------------------------------------------------------------------------


def test_the_budget_shrinks_and_grows_while_requests_run() -> None:
    engine = make_engine(pages=100)
    requests = [start(engine, prompt(60, seed), 150, f"r{seed}") for seed in range(6)]
    for step in range(400):
        if step == 20:
            engine.memory.set_budget(30 * PAGE)
        if step == 60:
            engine.memory.set_budget(200 * PAGE)
        engine.step()
        engine.check()
        stats = engine.cache.pool.stats()
        assert stats.created_bytes <= stats.budget_bytes
        if all(request.finished for request in requests):
            break
    drive(engine, *requests)
    assert engine.stats().num_preemptions > 0
    finish(engine)


def test_a_lower_budget_takes_kept_prefixes_first() -> None:
    engine = make_engine(pages=100)
    for seed in range(5):
        serve(engine, prompt(150, seed), 5, f"r{seed}")
    running = start(engine, prompt(60, 9), 100, "running")
    engine.step()
    kept = engine.cache.stats().kept_bytes
    assert kept > 40 * PAGE
    engine.memory.set_budget(25 * PAGE)
    assert engine.cache.stats().kept_bytes <= 21 * PAGE  # four are the running request's
    drive(engine, running)
    assert engine.stats().num_preemptions == 0
    finish(engine)


# Failures -----------------------------------------------------------------------------------------


def test_a_failed_step_fails_its_requests_only() -> None:
    fail = iter([False, False, True])

    def before() -> None:
        if next(fail, False):
            raise RuntimeError("the kernel tripped")

    engine = make_engine(before=before, max_num_seqs=2)
    a, b = (start(engine, prompt(20, i), 10, f"r{i}") for i in range(2))
    late = start(engine, prompt(20, 2), 10, "late")
    while not (a.finished and b.finished):
        engine.step()
        engine.check()
    assert a.finish_reason == b.finish_reason == "error"
    assert "the step failed: RuntimeError: the kernel tripped" in str(a.error)
    drive(engine, late)
    # What a failed step may have written is nobody's prefix.
    assert serve(engine, prompt(20, 0), 10, "again").cached == 0
    finish(engine)
