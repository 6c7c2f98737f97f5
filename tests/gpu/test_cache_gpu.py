"""KVCache and VirtualCache on a CUDA device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import vattn
from tests.models import prompts, tiny_model
from vattn import KVCache, PagePool
from vattn.kv.layout import Order

LAYERS, HEADS, DIM = 4, 2, 64
DTYPE = torch.bfloat16

cuda: Any = torch.cuda  # parts of it are untyped
# The mapper's thread makes calls of its own meanwhile, which end a capture in the default mode.
CAPTURE = "thread_local"


@pytest.fixture
def streams(device: str) -> None:
    if device != "cuda":
        pytest.skip("needs CUDA streams")


@pytest.fixture
def pool(device: str) -> Iterator[PagePool]:
    pool = PagePool(device, budget_bytes="256MiB")
    yield pool
    pool.check()


def make_cache(pool: PagePool, tokens: int = 20_000, **options: Any) -> KVCache:
    options.setdefault("max_seqs", 4)
    return KVCache(LAYERS, HEADS, DIM, DTYPE, max_tokens=tokens, pool=pool, **options)


def write(cache: KVCache, slot: vattn.Slot, tokens: int, value: float) -> None:
    """Grows a sequence and sets the new tokens of every layer, K to ``value``, V to ``-value``."""
    first = cache.tokens(slot)
    cache.ensure(slot, tokens)
    for layer in range(LAYERS):
        k, v = cache.view(slot, layer)
        k[first:] = value + layer
        v[first:] = -(value + layer)


def assert_holds(cache: KVCache, slot: vattn.Slot, first: int, last: int, value: float) -> None:
    for layer in range(LAYERS):
        k, v = cache.view(slot, layer)
        assert bool((k[first:last] == value + layer).all())
        assert bool((v[first:last] == -(value + layer)).all())


def end(cache: KVCache, *slots: vattn.Slot) -> None:
    """Nothing is left on the device."""
    for slot in slots:
        cache.release(slot)
    cache.check()
    cache.trim()
    assert cache.pool.driver.physical_bytes() == 0
    cache.close()


def synchronize(device: str) -> None:
    if device == "cuda":
        cuda.synchronize()


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["token", "head"])
@pytest.mark.parametrize("layers_per_region", [1, 3, None])
def test_sequences_keep_their_own_bytes(
    pool: PagePool, order: Order, layers_per_region: int | None
) -> None:
    cache = make_cache(pool, order=order, layers_per_region=layers_per_region)
    a, b = cache.open(), cache.open()
    for tokens in (1, 500, 9000):
        write(cache, a, tokens, 1)
        write(cache, b, tokens // 2 + 1, 11)
    assert_holds(cache, a, 0, 9000, 1)
    assert_holds(cache, b, 0, 4501, 11)
    assert cache.stats().live_bytes >= cache.stats().token_bytes
    end(cache, a, b)


def test_forks_share_pages_and_diverge(pool: PagePool) -> None:
    cache = make_cache(pool)
    a = cache.open()
    write(cache, a, 9000, 1)
    alone = cache.pool.driver.physical_bytes()
    b = cache.fork(a, 8000)
    assert cache.stats().shared_bytes > 0
    assert cache.pool.driver.physical_bytes() < 1.5 * alone
    write(cache, a, 9500, 21)
    write(cache, b, 9500, 31)
    assert_holds(cache, a, 0, 9000, 1)
    assert_holds(cache, b, 0, 8000, 1)
    assert_holds(cache, b, 8000, 9500, 31)
    cache.release(a)
    assert_holds(cache, b, 0, 8000, 1)
    end(cache, b)


def test_memory_goes_back_to_the_device(pool: PagePool, device: str) -> None:
    driver = pool.driver
    cache = make_cache(pool)
    free = driver.memory_info()[0]
    a = cache.open()
    write(cache, a, 20_000, 1)
    synchronize(device)
    held = driver.physical_bytes()
    assert held >= cache.stats().token_bytes
    if device == "cuda":  # a host's free memory moves by itself
        assert free - driver.memory_info()[0] >= held
    end(cache, a)
    if device == "cuda":
        assert driver.memory_info()[0] >= free - held // 2


def test_an_exhausted_budget_leaves_sequences_intact(device: str) -> None:
    pool = PagePool(device, budget_bytes="64MiB")
    cache = make_cache(pool)
    a, b = cache.open(), cache.open()
    write(cache, a, 20_000, 1)
    with pytest.raises(vattn.OutOfPages):
        cache.ensure(b, 20_000)
    assert cache.tokens(b) == 0
    assert_holds(cache, a, 0, 20_000, 1)
    write(cache, b, 100, 11)
    assert_holds(cache, b, 0, 100, 11)
    end(cache, a, b)


# Streams ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("streams")
def test_mapping_beside_a_running_kernel_leaves_it_alone(pool: PagePool) -> None:
    cache = make_cache(pool)
    a = cache.open()
    write(cache, a, 9000, 1)
    cuda.synchronize()
    stream = cuda.Stream()
    with cuda.stream(stream):
        cuda._sleep(200_000_000)  # some 100 ms, in which the rest happens
        copies = [tuple(x.clone() for x in cache.view(a, layer)) for layer in range(LAYERS)]
    for i in range(8):
        b = cache.open()
        write(cache, b, 2000 * (i + 1), 50 + i)
        assert_holds(cache, b, 0, 2000 * (i + 1), 50 + i)
        cache.release(b)
        cache.trim()
    stream.synchronize()
    for layer, (k, v) in enumerate(copies):
        assert bool((k == 1 + layer).all())
        assert bool((v == -(1 + layer)).all())
    end(cache, a)


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("slot", [0, 1], ids=["in place", "remapped"])
def test_pages_are_not_reused_under_a_running_kernel(device: str, slot: int) -> None:
    tokens = 9000
    probe = make_cache(PagePool(device))
    needed = probe.pages_needed(probe.open(), tokens) * probe.pool.page_bytes
    probe.close()
    pool = PagePool(device, budget_bytes=needed)  # the second sequence has to take the first's
    cache = make_cache(pool, max_seqs=2)
    a = cache.open(slot=0)
    write(cache, a, tokens, 1)
    cuda.synchronize()
    stream = cuda.Stream()
    with cuda.stream(stream):
        cuda._sleep(200_000_000)
        copies = [tuple(x.clone() for x in cache.view(a, layer)) for layer in range(LAYERS)]
    cache.release(a, stream=stream.cuda_stream)
    b = cache.open(slot=slot)
    write(cache, b, tokens, 71)
    cuda.synchronize()
    for layer, (k, v) in enumerate(copies):
        assert bool((k == 1 + layer).all())
        assert bool((v == -(1 + layer)).all())
    assert_holds(cache, b, 0, tokens, 71)
    end(cache, b)


@pytest.mark.usefixtures("streams")
def test_a_captured_graph_outlives_the_pages_beneath_it(pool: PagePool) -> None:
    cache = make_cache(pool)
    a = cache.open(slot=0)
    write(cache, a, 3000, 1)
    k = cache.layer(0)[0][0, :3000]
    out = torch.zeros_like(k)
    torch.add(k, 0, out=out)
    cuda.synchronize()
    graph = cuda.CUDAGraph()
    with cuda.graph(graph, capture_error_mode=CAPTURE):
        torch.add(k, 0, out=out)
    cache.release(a)
    cache.trim()
    blocker = cache.open(slot=1)  # takes the pages that slot 0 had
    write(cache, blocker, 3000, 81)
    a = cache.open(slot=0)
    write(cache, a, 3000, 91)
    graph.replay()
    cuda.synchronize()
    assert bool((out == 91).all())
    end(cache, a, blocker)


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "remapped"])
def test_graphs_replay_between_forks_releases_and_background_maps(
    pool: PagePool, in_place: bool
) -> None:
    """One graph over all slots; the mapper works beside each replay."""
    cache = make_cache(pool, max_seqs=3, order="token", reuse_stale=in_place)
    tokens = 5000
    a, b = cache.open(slot=0), cache.open(slot=1)
    write(cache, a, tokens, 1)
    write(cache, b, tokens, 2)
    k = cache.layer(1)[0]
    out = torch.zeros(2, tokens, HEADS, DIM, dtype=DTYPE, device="cuda")
    cuda.synchronize()
    graph = cuda.CUDAGraph()
    with cuda.graph(graph, capture_error_mode=CAPTURE):
        for slot in (0, 1):
            torch.add(k[slot, :tokens], 0, out=out[slot])
    for turn in range(6):
        cache.release(b)
        if turn % 2:
            cache.trim()
            b = cache.open(slot=1)
            write(cache, b, tokens, 40 + turn)
            wanted = 41 + turn
        else:
            b = cache.fork(a)
            wanted = 2
        if b.index != 1:  # the fork was given another slot
            c, b = b, cache.open(slot=1)
            cache.assign([b], [c])
            cache.release(c)
        extra = cache.open(slot=2)
        ticket = cache.prepare([extra], [3000 * (turn + 1)])  # the mapper maps beside the replay
        graph.replay()
        ticket.wait()
        write(cache, extra, 3000 * (turn + 1), 100 + turn)
        cache.release(extra)
        cuda.synchronize()
        assert bool((out[0] == 2).all())
        assert bool((out[1] == wanted).all())
    end(cache, a, b)


def test_running_out_of_pages_is_typed_and_recoverable(device: str) -> None:
    """A budget that shrinks below what is used takes nothing away, and gives nothing more."""
    pool = PagePool(device, budget_bytes="256MiB")
    cache = make_cache(pool)
    a, b = cache.open(), cache.open()
    write(cache, a, 9000, 1)
    pool.set_budget(cache.pool.stats().created_bytes)
    with pytest.raises(vattn.OutOfPages):
        cache.ensure(b, 20_000)
    assert_holds(cache, a, 0, 9000, 1)
    pool.set_budget("256MiB")
    write(cache, b, 20_000, 11)
    assert_holds(cache, a, 0, 9000, 1)
    assert_holds(cache, b, 0, 20_000, 11)
    end(cache, a, b)


# transformers -------------------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beam": {"num_beams": 3, "do_sample": False},
    "sample": {"num_return_sequences": 3, "do_sample": True},
    "lookup": {"prompt_lookup_num_tokens": 4, "do_sample": False},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_tokens_are_those_of_the_stock_cache(device: str, family: str, mode: str) -> None:
    model = copy.deepcopy(tiny_model(family)).to(device)
    ids = prompts()[: 1 if mode == "lookup" else None].to(device)

    def generate(cache: Any) -> torch.Tensor:
        torch.manual_seed(0)
        options = MODES[mode] | {"max_new_tokens": 40, "pad_token_id": 0}
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            **options,
        )
        return torch.as_tensor(out)

    cache = vattn.VirtualCache(model.config, max_tokens=320)
    expected = generate(DynamicCache(config=model.config))
    assert generate(cache).tolist() == expected.tolist()
    cache.reset()
    assert generate(cache).tolist() == expected.tolist()
    cache.check()
    cache.close()
