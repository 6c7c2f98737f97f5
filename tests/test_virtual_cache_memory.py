"""VirtualCache's memory: how much there is, where it goes, and what a failure leaves."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vattn
from tests.drivers import HostMemory
from tests.models import (
    FAMILIES,
    NEW,
    PAGE,
    one_thread,
    padded_prompts,
    prompts,
    run,
    stock_cache,
    strict_cache,
    tiny_model,
)
from vattn import PagePool, PageState, VirtualCache


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def lengths(cache: VirtualCache) -> list[int]:
    return [cache.get_seq_length(layer) for layer in range(len(cache))]


@pytest.mark.parametrize("order", ["token", "head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_the_live_tokens_and_one_page_per_run(family: str, order: Any) -> None:
    model = tiny_model(family)
    cache = strict_cache(model.config, order=order)
    run(model, cache, "padded")
    stats = cache.stats()
    assert cache.kv is not None
    runs = 3 * sum(region.runs for region in cache.kv.layout.regions)
    assert stats.tokens == 3 * cache.get_seq_length() == 3 * (40 + NEW - 1)
    assert 0 < stats.live_bytes <= stats.token_bytes + runs * PAGE
    assert stats.cover_bytes == stats.scratch_bytes == 0
    created = cache.kv.pool.driver.physical_bytes()
    assert created == stats.live_bytes + stats.stale_bytes + stats.pooled_bytes


def test_beams_share_full_pages() -> None:
    model = tiny_model("llama")
    cache = strict_cache(model.config, order="token", layers_per_region=1)
    ids = prompts(1, 200)
    run(model, cache, "beam", input_ids=ids, attention_mask=torch.ones_like(ids))
    stats = cache.stats()
    assert stats.shared_bytes > 0
    assert stats.live_bytes < 0.6 * stats.token_bytes
    # A reorder copies tails; the stock cache copies everything, once a step.
    assert stats.copied_bytes < 0.1 * stats.token_bytes * (NEW - 1)


def test_memory_goes_back() -> None:
    model = tiny_model("llama")
    pool = PagePool(page_bytes=PAGE, strict=True)
    cache = strict_cache(model.config, pool=pool)
    run(model, cache, "padded")
    cache.reset()
    assert cache.stats().live_bytes == 0 < pool.driver.physical_bytes()
    assert cache.kv is not None
    cache.kv.trim()
    assert pool.driver.physical_bytes() == 0
    cache.check()
    expected = run(model, cache, "padded")
    cache.close()
    assert cache.kv is None
    pool.trim()
    assert pool.driver.physical_bytes() == 0
    assert torch.equal(run(model, cache, "padded"), expected)  # usable again
    del cache
    pool.trim()
    assert pool.driver.physical_bytes() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_repeated_generation_makes_no_driver_call(family: str) -> None:
    model = tiny_model(family)
    cache = strict_cache(model.config)
    first = run(model, cache, "padded")
    cache.reset()
    assert cache.get_seq_length() == 0
    calls = cache.stats().driver_calls
    assert torch.equal(run(model, cache, "padded"), first)
    assert cache.stats().driver_calls == calls


def test_pages_that_left_the_window_are_unmapped() -> None:
    model = tiny_model("mistral")
    options = {"max_tokens": 600, "order": "token", "layers_per_region": 1}
    cache = strict_cache(model.config, **options)
    expected = run(model, stock_cache(model.config), max_new_tokens=300)
    assert torch.equal(run(model, cache, max_new_tokens=300), expected)
    assert cache.kv is not None
    stats = cache.stats()
    # A page holds 16 tokens of a layer, a window of 24 and a step touch at most 3 of them.
    assert stats.live_bytes <= 3 * 3 * PAGE
    assert cache.kv.pool.driver.physical_bytes() <= 3 * (40 // 16 + 3) * PAGE
    assert stats.pages_recycled > 0
    first = cache.kv.first_token(0, 0)
    assert first > 300
    cache.kv.trim()
    states = cache.kv.memory_map().slots[0].regions[0][0]
    gone = states[: first // 16]
    assert (gone == PageState.UNMAPPED).all()
    memory = HostMemory()
    k = cache.kv.layer(0)[0]
    assert not any(memory.accessible(k[0, token].data_ptr()) for token in range(first))
    assert memory.accessible(k[0, first].data_ptr())
    memory.close()


# Failures -----------------------------------------------------------------------------------------


def test_too_many_tokens_change_nothing() -> None:
    model = tiny_model("llama")
    cache = strict_cache(model.config, max_tokens=60)
    with pytest.raises(ValueError, match=r"70 tokens .* max_tokens=60 .* larger max_tokens"):
        run(model, cache, input_ids=prompts(1, 70), attention_mask=torch.ones(1, 70))
    assert cache.kv is None
    with pytest.raises(ValueError, match="61 tokens are more than max_tokens=60"):
        run(model, cache)
    assert cache.get_seq_length() == cache.stats().tokens == 60
    cache.crop(-21)
    got = run(model, cache, max_new_tokens=20)
    assert torch.equal(got, run(model, stock_cache(model.config), max_new_tokens=20))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_out_of_pages_is_recoverable(family: str) -> None:
    model = tiny_model(family)
    ids, mask = padded_prompts()
    expected = run(model, stock_cache(model.config), "padded")
    pool = PagePool(page_bytes=PAGE, budget_bytes=40 * PAGE, strict=True)
    cache = strict_cache(model.config, pool=pool)
    refused = 0
    with torch.inference_mode():
        while ids.shape[1] < expected.shape[1]:
            before = cache.get_seq_length()
            try:
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, before:]
                step = model(
                    ids[:, before:],
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                )
            except vattn.OutOfPages:
                refused += 1
                assert set(lengths(cache)) == {before}
                assert cache.stats().tokens == 3 * before
                cache.check()
                pool.set_budget(pool.stats().budget_bytes + 8 * PAGE)
                continue
            cache.check()
            ids = torch.cat([ids, step.logits[:, -1:].argmax(-1)], 1)
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
    assert refused > 0
    assert torch.equal(ids, expected)


def held_memory() -> tuple[list[str], list[str]]:
    gc.collect()
    links = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(fd))
        except OSError:
            continue
    maps = Path("/proc/self/maps").read_text().splitlines()
    return (
        [link for link in links if "vattn" in link],
        [line for line in maps if "vattn" in line] + sorted(os.listdir("/dev/shm")),
    )


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_interrupt_leaves_nothing_behind(family: str) -> None:
    model = tiny_model(family)
    expected = run(model, stock_cache(model.config), "padded")
    before = held_memory()
    cache = VirtualCache(model.config, max_tokens=320)
    steps = 0

    def interrupt(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(model, cache, "padded")
    hook.remove()
    del caught
    cache.check()
    assert lengths(cache) == [44, 44, 43]  # the interrupted step reached two layers of three
    cache.crop(-1)
    assert lengths(cache) == [43, 43, 43]
    cache.reset()
    assert torch.equal(run(model, cache, "padded"), expected)
    assert held_memory() != before
    del cache
    assert held_memory() == before
