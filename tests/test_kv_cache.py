"""`KVCache`: whatever the layout, a sequence has its own bytes; for memory, test_kv_memory."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
import torch

import vattn
from tests.helpers import (
    Sequences,
    assert_all_given_back,
    layer_specs,
    make_cache,
    slot_ranges,
    write_tokens,
)
from vattn.kv.layout import DTYPES

if TYPE_CHECKING:
    from vattn.kv.layout import Order

pytest_plugins = ("tests.cache_fixtures",)
pytestmark = pytest.mark.usefixtures("small_pages")

ORDERS: tuple[Order, ...] = ("token", "head")
LAYOUTS = [
    pytest.param(order, layers_per_region, id=f"{order}-{layers_per_region}")
    for order, layers_per_region in itertools.product(ORDERS, (1, 2, 3))
]


@pytest.mark.parametrize(("order", "layers_per_region"), LAYOUTS)
def test_a_sequence_grows_in_place(
    pool: vattn.PagePool, order: Order, layers_per_region: int
) -> None:
    cache = make_cache(pool, order=order, layers_per_region=layers_per_region)
    assert len(cache.layout.regions) == -(-3 // layers_per_region)
    seqs = Sequences(cache)
    a, b = seqs.open(), seqs.open()
    addresses = slot_ranges(cache, a, 1)
    for tokens in (1, 2, 7, 8, 43, 99, 100):
        seqs.grow(a, tokens)
        seqs.grow(b, tokens // 2)
        seqs.check(tokens)
    assert [start for start, _ in slot_ranges(cache, a, 1)] == [start for start, _ in addresses]
    seqs.end()


def test_layers_of_any_shape_share_a_cache(pool: vattn.PagePool) -> None:
    scale = pool.page_bytes // 4096
    specs = [
        vattn.LayerSpec(2, 16 * scale, torch.float32),
        vattn.LayerSpec(1, 64 * scale, torch.bfloat16),
        vattn.LayerSpec(2, 16 * scale, torch.float32, window=16),
        vattn.LayerSpec(4, 32 * scale, torch.float8_e4m3fn),
        vattn.LayerSpec(2, 16 * scale, torch.float32),
        vattn.LayerSpec(1, 8 * scale, torch.float64, window=40),
    ]
    for order in ORDERS:
        cache = make_cache(pool, specs, order=order)
        assert len(cache.layout.regions) == 5  # only the two equal layers share one
        seqs = Sequences(cache)
        a = seqs.open()
        for tokens in range(1, 101, 3):
            seqs.grow(a, tokens)
        seqs.check()
        b = seqs.fork(a)
        seqs.grow(b, 100)
        seqs.check()
        assert [cache.first_token(b, layer) > 0 for layer in range(6)][:2] == [False, False]
        seqs.end()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(pool: vattn.PagePool, dtype: torch.dtype) -> None:
    seqs = Sequences(make_cache(pool, layer_specs(pool, 2, head_dim=16, dtype=dtype)))
    a = seqs.new(70)
    k, v = seqs.cache.view(a, 1)
    assert k.dtype == v.dtype == dtype
    seqs.check()
    del k, v
    seqs.end()


def test_shapes_of_layer_view_and_flat(pool: vattn.PagePool) -> None:
    specs = layer_specs(pool, 3, kv_heads=2)
    heads, dim = specs[0].kv_heads, specs[0].head_dim
    for order in ORDERS:
        cache = make_cache(pool, specs, order=order, max_seqs=3)
        slot = cache.open(slot=1)
        cache.ensure(slot, 30)
        k, v = cache.layer(2)
        n = cache.slot_tokens(2)
        assert n >= 100
        assert k.shape == v.shape == (3, n, heads, dim)
        assert cache.layer(2)[0] is k
        view, _ = cache.view(slot, 2)
        assert view.shape == (30, heads, dim)
        assert view.data_ptr() == k[1].data_ptr()
        if order == "head":
            with pytest.raises(ValueError, match='only order="token" has a flat view'):
                cache.flat(2)
            continue
        flat, _ = cache.flat(2)
        assert flat.shape == (3 * n, heads, dim)
        view[:] = 3
        assert bool((flat[n : n + 30] == 3).all())
        assert flat[n].data_ptr() == view[0].data_ptr()


@pytest.mark.parametrize("order", ORDERS)
def test_a_fork_shares_and_then_diverges(pool: vattn.PagePool, order: Order) -> None:
    seqs = Sequences(make_cache(pool, order=order))
    a = seqs.new(90)
    used = pool.stats().used_bytes
    b = seqs.fork(a)
    runs = sum(region.runs for region in seqs.cache.layout.regions)
    assert pool.stats().used_bytes - used <= runs * pool.page_bytes  # the partial tails only
    assert seqs.cache.stats().shared_bytes > 0
    seqs.grow(a, 95)
    seqs.grow(b, 100)
    seqs.check()
    c = seqs.fork(b)
    seqs.release(b)
    seqs.check()
    seqs.truncate(c, 20)
    seqs.grow(c, 60)
    seqs.check()
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cut", [0, 1, 7, 8, 42, 43, 50, 89])
def test_either_side_of_a_fork_may_write_after_truncate(
    pool: vattn.PagePool, order: Order, cut: int
) -> None:
    for writer in (0, 1):
        seqs = Sequences(make_cache(pool, order=order))
        pair = [seqs.new(90)]
        pair.append(seqs.fork(pair[0]))
        seqs.truncate(pair[writer], cut)
        seqs.check("truncated")
        seqs.grow(pair[writer], cut + 1)
        seqs.check("one token on")
        seqs.grow(pair[writer], 95)
        seqs.check("grown")
        seqs.end()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("prefix", [0, 1, 7, 8, 57, 64, 90])
def test_a_prefix_can_be_shared(pool: vattn.PagePool, order: Order, prefix: int) -> None:
    seqs = Sequences(make_cache(pool, order=order))
    a = seqs.new(90)
    b = seqs.fork(a, prefix)
    assert seqs.cache.tokens(b) == prefix
    seqs.grow(b, 100)
    seqs.release(a)
    seqs.check()
    a = seqs.fork(b, 50)
    seqs.check()
    seqs.end()


def test_ensure_after_a_fork_writes_to_nobody_else(pool: vattn.PagePool) -> None:
    """The pages that a free slot still shares are not written by its next user."""
    seqs = Sequences(make_cache(pool))
    a = seqs.new(90)
    b = seqs.fork(a)
    seqs.release(b)
    b = seqs.open(slot=b)
    for tokens in (1, 30, 90):
        seqs.grow(b, tokens)
        seqs.check(tokens)
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
def test_assign_permutes(pool: vattn.PagePool, order: Order) -> None:
    seqs = Sequences(make_cache(pool, order=order))
    slots = [seqs.new(tokens) for tokens in (90, 13, 0, 57)]
    rng = random.Random(1)
    for permutation in [*itertools.permutations(slots)][1::5]:
        seqs.assign(slots, permutation)
        seqs.check(permutation)
        for slot in slots:
            if rng.random() < 0.5 and seqs.cache.tokens(slot) < 98:
                seqs.grow(slot, seqs.cache.tokens(slot) + rng.choice((1, 2)))
        seqs.check()
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
def test_assign_reorders_beams(pool: vattn.PagePool, order: Order) -> None:
    """Equal lengths, one token a step, some beams dropped and others doubled."""
    seqs = Sequences(make_cache(pool, order=order))
    beams = [seqs.new(30)]
    beams += [seqs.fork(beams[0]) for _ in range(3)]
    rng = random.Random(2)
    for tokens in range(31, 60):
        seqs.assign(beams, [rng.choice(beams) for _ in beams])
        seqs.check(tokens)
        for slot in beams:
            seqs.grow(slot, tokens)
    seqs.check()
    assert seqs.cache.stats().shared_bytes > 0
    seqs.end()


def test_assign_of_a_few_and_of_nothing(pool: vattn.PagePool) -> None:
    seqs = Sequences(make_cache(pool))
    a, b, c = seqs.new(40), seqs.new(20), seqs.new(60)
    calls = pool.driver_calls()
    seqs.assign([], [])
    seqs.assign([a, b], [a, b])
    assert pool.driver_calls() == calls
    seqs.assign([b, a], [c, c])
    seqs.check()
    seqs.assign([a], [b])
    seqs.check()
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
def test_a_sliding_window_forgets_only_what_no_query_reaches(
    pool: vattn.PagePool, order: Order
) -> None:
    window, specs = 16, layer_specs(pool, 2, kv_heads=2, window=16) + layer_specs(pool, 1)
    cache = make_cache(pool, specs, order=order, max_tokens=400)
    seqs = Sequences(cache)
    a = seqs.new(40)
    for tokens in range(41, 400):
        seqs.grow(a, tokens)
        # The query of token t sees [t - window + 1, t]; earlier ones may go.
        assert cache.first_token(a, 0) <= tokens - window
    assert cache.first_token(a, 0) > 300
    assert cache.first_token(a, 2) == 0
    seqs.check()
    b = seqs.fork(a)
    seqs.grow(b, 400)
    seqs.assign([a], [b])
    seqs.check()
    cache.truncate(a, 399)
    with pytest.raises(ValueError, match="cannot go back to 100 tokens"):
        cache.truncate(a, 100)
    seqs.writers[a].pop()
    seqs.check()
    seqs.end()


def test_close_gives_memory_back_and_keeps_the_addresses_of_tensors(
    pool: vattn.PagePool, driver_kind: str
) -> None:
    cache = make_cache(pool)
    slot = cache.open()
    cache.ensure(slot, 50)
    write_tokens(cache, slot, 1, 0, 50)
    k, _ = cache.layer(0)
    view, _ = cache.view(slot, 1)
    cache.close()
    pool.trim()
    pool.check()
    assert pool.driver.physical_bytes() == 0
    if driver_kind == "host":
        assert not bool(view.any())  # reserved and not mapped: zeros
    other = make_cache(pool)
    (start, _), *_ = slot_ranges(other, other.open(slot=0), 1)
    reserved = other.layout.slots * other.layout.slot_bytes
    assert not start <= k.data_ptr() < start + reserved
    for call in (cache.check, cache.stats, cache.open, lambda: cache.layer(0)):
        with pytest.raises(ValueError, match="this cache has been closed"):
            call()


def test_threads_share_a_cache(pool: vattn.PagePool) -> None:
    """Each thread has sequences of its own; opening, forking and reclaiming go through one lock."""
    cache = make_cache(pool, max_seqs=8)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        mine = Sequences(cache, next_writer=1000 * seed)
        try:
            for _ in range(25):
                a = mine.new(rng.randrange(1, 100))
                b = mine.fork(a, rng.randrange(len(mine.writers[a])))
                mine.grow(b, 100)
                mine.check()
                mine.assign([a], [b])
                mine.truncate(a, rng.randrange(100))
                cache.prepare([a], [100]).wait()
                mine.grow(a, 100)
                mine.check()
                for slot in (a, b):
                    mine.release(slot)
                if rng.random() < 0.2:
                    cache.trim()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert_all_given_back(cache)


FORKED = """
import os, sys, torch, vattn
cache = vattn.KVCache(2, 1, 64, torch.float32, max_seqs=2, max_tokens=100, strict=True)
slot = cache.open()
cache.ensure(slot, 50)
cache.prepare([slot], [60]).wait()
k, v = cache.view(slot, 0)
k[:] = 1
pid = os.fork()
if pid == 0:
    status = 1
    try:
        cache.ensure(slot, 60)
    except vattn.DriverError as error:
        status = 0 if "before fork()" in str(error) and error.fatal else 2
    other = vattn.KVCache(2, 1, 64, torch.float32, max_seqs=2, max_tokens=100)
    mine = other.open()
    other.ensure(mine, 20)
    other.view(mine, 0)[0][:] = 2
    other.check()
    cache.close()
    sys.exit(status)
_, status = os.waitpid(pid, 0)
cache.ensure(slot, 70)
cache.check()
assert bool((k == 1).all())
print("parent and child are well" if status == 0 else f"child: {status}")
"""


def test_a_forked_child_is_told_and_may_make_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "parent and child are well", done.stderr
    assert done.returncode == 0
