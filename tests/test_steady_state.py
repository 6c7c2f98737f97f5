"""How many driver calls a running system makes, counted on the fake. Clocks are not asked.

A release records one event, so that later users of the slot can wait for its kernels; everything
else that steady state could call is counted by name, and there is nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import vattn
from tests.drivers import make_driver
from tests.helpers import SMALL_PAGE, make_cache, make_pool, memory_calls

if TYPE_CHECKING:
    import numpy.typing as npt

    from tests.fake_cuda.fake import FakeCuda
    from vattn.kv.layout import Order

    Ints = npt.NDArray[np.int64]

# Around every call of CUDA: whose context, and not to disturb a capture, for this thread only.
BOOKKEEPING = ("cuCtxGetCurrent", "cuCtxSetCurrent", "cuThreadExchangeStreamCaptureMode")
SEQUENCES, ROUNDS = 64, 100

# Means and medians of the conversation trace, divided so that a run takes a second.
SCALE = 8
CONTEXT, GENERATED = (1155 / SCALE, 1020 / SCALE), (211 / SCALE, 129 / SCALE)
TOKENS_PER_PAGE = 8


def log_normal(rng: np.random.Generator, mean: float, median: float, n: int) -> Ints:
    sigma = np.sqrt(2 * np.log(mean / median))
    return np.maximum(1, np.rint(median * np.exp(rng.normal(0, sigma, n)))).astype(np.int64)


def trace_lengths(n: int) -> tuple[Ints, Ints]:
    """Tokens of the context and tokens generated of `n` requests."""
    rng = np.random.default_rng(0)
    return log_normal(rng, *CONTEXT, n), log_normal(rng, *GENERATED, n)


@dataclass
class Calls:
    peak_pages: int
    memory: int
    all_real: int
    by_name: dict[str, int]


def serve(
    fake: FakeCuda, contexts: Ints, generated: Ints, *, order: Order, budget_pages: int, reuse: bool
) -> Calls:
    """Runs requests in order, 64 at a time, a token each a step; a new one for each that ends.

    The engine knows a prompt's length when it opens its sequence, and not how long the answer is.
    """
    fake.reset()
    fake.configure(granularity=SMALL_PAGE, device_bytes=2**34, elide=True)
    pool = make_pool(make_driver("cuda_fake"), pages=budget_pages)
    per_token = SMALL_PAGE // TOKENS_PER_PAGE
    head_dim = per_token // 4 // (2 if order == "token" else 1)
    cache = make_cache(
        pool,
        [vattn.LayerSpec(1, head_dim, torch.float32)],
        max_seqs=SEQUENCES,
        max_tokens=int((contexts + generated).max()),
        order=order,
        reuse_stale=reuse,
    )
    made = memory_calls(pool)
    fake.reset_calls()
    slots, lengths, ends = (np.empty(0, dtype=np.int32) for _ in range(3))
    following, peak = 0, 0
    while following < len(contexts) or len(slots):
        while len(slots) < SEQUENCES and following < len(contexts):
            tokens = int(contexts[following])
            slot = cache.open(expected_tokens=tokens)
            cache.ensure(slot, tokens)
            slots = np.append(slots, np.int32(int(slot)))
            lengths = np.append(lengths, np.int32(tokens))
            ends = np.append(ends, np.int32(tokens + generated[following]))
            following += 1
        lengths += 1
        cache.ensure_many(slots, lengths)
        stats = pool.stats()
        peak = max(peak, (stats.used_bytes - stats.stale_bytes) // SMALL_PAGE)
        for slot in slots[lengths >= ends]:
            cache.release(int(slot))
        stay = lengths < ends
        slots, lengths, ends = slots[stay], lengths[stay], ends[stay]
    cache.check()
    by_name = {name: n for name, n in fake.calls().items() if name not in BOOKKEEPING}
    return Calls(peak, memory_calls(pool) - made, sum(by_name.values()), by_name)


@pytest.mark.parametrize("order", ["token", "head"])
def test_trace_lengths_in_a_tight_budget(fake_cuda: FakeCuda, order: Order) -> None:
    trace = trace_lengths(SEQUENCES * ROUNDS)
    peak = serve(fake_cuda, *trace, order=order, budget_pages=10**6, reuse=True).peak_pages
    budget = peak * 11 // 10
    reused = serve(fake_cuda, *trace, order=order, budget_pages=budget, reuse=True)
    fresh = serve(fake_cuda, *trace, order=order, budget_pages=budget, reuse=False)
    print(
        f"\n{order}: memory calls {reused.memory} against {fresh.memory} without reuse, "
        f"{reused.memory / fresh.memory:.3f}; all calls {reused.all_real / fresh.all_real:.3f}"
    )
    assert reused.memory <= 0.5 * fresh.memory
    assert reused.all_real <= 0.5 * fresh.all_real
    assert reused.peak_pages == fresh.peak_pages == peak


@pytest.mark.parametrize("order", ["token", "head"])
@pytest.mark.parametrize("budget", ["ample", "tight"])
def test_equal_lengths_call_nothing_after_warm_up(
    fake_cuda: FakeCuda, order: Order, budget: str
) -> None:
    fake_cuda.configure(granularity=SMALL_PAGE, elide=True)
    pool = make_pool(make_driver("cuda_fake"))
    cache = make_cache(pool, max_seqs=SEQUENCES, max_tokens=80, order=order, tile=16)
    for turn in range(ROUNDS + 2):
        if turn == 2:  # pages are mapped, and there are events to use again
            fake_cuda.reset_calls()
            if budget == "tight":
                pool.set_budget(pool.stats().created_bytes)
        slots = [cache.open(expected_tokens=80) for _ in range(SEQUENCES)]
        indices = np.array([int(slot) for slot in slots], dtype=np.int32)
        for tokens in (40, 41, 60, 80):
            cache.ensure_many(indices, np.full(SEQUENCES, tokens, dtype=np.int32))
        for slot in slots:
            cache.release(slot)
    called = {name: n for name, n in fake_cuda.calls().items() if name not in BOOKKEEPING}
    assert called == {"cuEventRecord": SEQUENCES * ROUNDS}
    cache.check()
    cache.close()


def test_decoding_calls_once_a_page(fake_cuda: FakeCuda) -> None:
    """A growing sequence maps a page at a time and otherwise calls nothing."""
    fake_cuda.configure(granularity=SMALL_PAGE)
    pool = make_pool(make_driver("cuda_fake"))
    cache = make_cache(pool, max_seqs=1)
    slot = cache.open()
    cache.ensure(slot, 1)
    fake_cuda.reset_calls()
    for tokens in range(2, 101):
        cache.ensure(slot, tokens)
    pages = cache.stats().live_bytes // SMALL_PAGE - 1
    calls = fake_cuda.calls()
    assert {name: n for name, n in calls.items() if name not in BOOKKEEPING} == {
        "cuMemCreate": pages,
        "cuMemMap": pages,
        "cuMemSetAccess": pages,
        "cuMemsetD8Async": pages,
    }
    assert calls["cuCtxGetCurrent"] == 4 * pages
    cache.close()


def test_a_prefill_sets_access_once(fake_cuda: FakeCuda) -> None:
    fake_cuda.configure(granularity=SMALL_PAGE)
    pool = make_pool(make_driver("cuda_fake"))
    cache = make_cache(pool, max_seqs=2)
    fake_cuda.reset_calls()
    cache.ensure(cache.open(), 100)
    pages = cache.stats().live_bytes // SMALL_PAGE
    assert fake_cuda.calls("cuMemMap") == pages > 10
    assert fake_cuda.calls("cuMemSetAccess") == 1
    assert fake_cuda.calls("cuMemsetD8Async") == 1
    cache.close()
