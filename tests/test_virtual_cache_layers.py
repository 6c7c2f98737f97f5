"""VirtualCache by itself: the states, lengths and masks of the stock cache, update by update."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from operator import methodcaller
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Gemma4TextConfig, Llama4TextConfig, PreTrainedConfig

from tests.models import (
    CONFIGS,
    DIM,
    HEADS,
    LAYERS,
    PAGE,
    make_model,
    one_thread,
    run,
    states,
    step,
    stock_cache,
    strict_cache,
)
from vattn import OutOfPages, PagePool, VirtualCache


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def small_cache(family: str = "llama", **options: Any) -> VirtualCache:
    return strict_cache(CONFIGS[family](), **options)


def croppable_stock_cache(family: str) -> DynamicCache:
    cache = stock_cache(CONFIGS[family]())
    cache.activate_past_recording()  # type: ignore[no-untyped-call]  # for sliding layers
    return cache


def same(cache: VirtualCache, other: DynamicCache) -> None:
    """Lengths, masks and cached states agree."""
    cache.check()
    for layer in range(LAYERS):
        assert cache.get_seq_length(layer) == other.get_seq_length(layer)
        assert cache.get_query_offset(layer) == other.get_query_offset(layer)
        for queries in (1, 5, 100):
            assert cache.get_mask_sizes(queries, layer) == other.get_mask_sizes(queries, layer)
        mine, theirs = cache.layers[layer], other.layers[layer]
        for name in ("keys", "values"):
            a, b = getattr(mine, name), getattr(theirs, name)
            if a is None:
                assert b is None or b.numel() == 0
            else:
                # A stock sliding layer that may be cropped keeps more than it needs.
                assert torch.equal(a, b[:, :, -a.shape[2] :])


# As the stock cache -------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["token", "head"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("seed", range(6))
def test_any_script_gives_the_same_states(seed: int, family: str, order: Any) -> None:
    dice = random.Random(seed)
    calls = {"reorder": "reorder_cache", "select": "batch_select_indices"}
    cache = small_cache(family, order=order, layers_per_region=dice.choice([1, 2, None]))
    other = croppable_stock_cache(family)
    rows, last = dice.randint(1, 3), 0

    def both(act: Callable[[Any], Any]) -> None:
        act(cache)
        act(other)

    for turn in range(60):
        kind = dice.choice(["step", "step", "step", "crop", "reorder", "repeat", "select", "reset"])
        if kind == "step" or cache.get_seq_length() == 0:
            last = dice.choice([1, 1, 1, 2, 30])
            if cache.get_seq_length() + last > 400:
                kind = "reset"
            else:
                if cache.get_seq_length() > 0:
                    other.crop(0)  # or transformers 5.17 returns more than a window
                returned = step(cache, rows, last, turn), step(other, rows, last, turn)
                assert all(torch.equal(a, b) for a, b in zip(*returned, strict=True))
        elif kind == "crop":
            # Back to the latest step, as far as a window goes, and once: the stock cache then
            # forgets what another crop would need.
            both(methodcaller("crop", -dice.randint(0, last)))
            last = 0
        elif kind == "repeat" and rows <= 3:
            rows *= 2
            both(methodcaller("batch_repeat_interleave", 2))
        elif kind in calls:
            n = rows if kind == "reorder" else dice.randint(1, rows)
            index = torch.tensor([dice.randrange(rows) for _ in range(n)])
            rows = n
            both(methodcaller(calls[kind], index))
        if kind == "reset":
            cache.reset()
            other = croppable_stock_cache(family)  # transformers 5.17 keeps zeros after a reset()
            rows, last = dice.randint(1, 4), 0
        same(cache, other)


def test_updates_return_views_and_copy_nothing_old() -> None:
    cache = small_cache()
    first = step(cache, 2, 50)
    then = step(cache, 2, 1, seed=1)
    for before, after in zip(first, then, strict=True):
        assert after.shape == (2, HEADS, 51, DIM)
        assert after.data_ptr() == before.data_ptr()
    assert cache.kv is not None
    slot, layer = 1, 2
    assert cache.kv.view(slot, layer)[1].data_ptr() == then[2 * layer + 1][slot].data_ptr()
    assert cache.stats().copied_bytes == 0


def test_early_initialization_reserves_for_every_layer() -> None:
    cache = small_cache()
    assert not cache.is_initialized
    cache.early_initialization(2, HEADS, DIM, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    assert cache.batch_size == cache.max_batch_size == 2
    assert cache.get_seq_length() == cache.stats().live_bytes == 0
    same_as = stock_cache(CONFIGS["llama"]())
    assert torch.equal(step(cache, 2, 7)[5], step(same_as, 2, 7)[5])


def test_properties() -> None:
    cache = small_cache("gemma3", max_tokens=None)
    assert (len(cache), cache.max_cache_len, cache.get_max_length()) == (3, 1024, 1024)
    assert cache.is_sliding == [True, False, True]
    assert cache.get_max_length(0) == 24
    assert cache.is_croppable
    assert not cache.is_compileable
    assert (cache.batch_size, cache.max_batch_size, cache.get_seq_length()) == (-1, -1, 0)
    assert cache.kv is None
    cache.check()
    cache.reset()
    cache.crop(-3)
    step(cache, 2, 3)
    assert (cache.batch_size, cache.max_batch_size) == (2, 2)
    assert cache.memory_map().slots[1].tokens == 3


def test_inference_mode_and_after() -> None:
    cache = small_cache()
    with torch.inference_mode():
        step(cache, 1, 3)
    step(cache, 1, 3)
    with torch.inference_mode():
        step(cache, 1, 1)
    assert cache.get_seq_length() == 7


# Batches ------------------------------------------------------------------------------------------


def test_batches_after_reset() -> None:
    cache = small_cache()
    step(cache, 2, 100)
    reserved = cache.kv
    for rows, kept in ((1, True), (2, True), (5, False), (3, True)):
        cache.reset()
        step(cache, rows, 100)
        assert (cache.kv is reserved) == kept
        reserved = cache.kv
        assert cache.batch_size == cache.stats().open_slots == rows


@pytest.mark.parametrize("act", ["open", "release"])
def test_reset_after_an_interrupt_between_a_slot_and_its_record(act: str) -> None:
    cache = small_cache(max_batch=3)
    step(cache, 2, 10)
    assert cache.kv is not None
    if act == "open":
        cache.kv.open(slot=2)
    else:
        cache.kv.release(1)
    cache.reset()
    step(cache, 3, 10)
    assert cache.stats().open_slots == 3


def test_max_batch_bounds_rows() -> None:
    cache = small_cache(max_batch=4)
    step(cache, 2, 10)
    reserved = cache.kv
    cache.batch_repeat_interleave(2)
    assert cache.kv is reserved
    assert cache.batch_size == 4
    with pytest.raises(ValueError, match="8 rows are more than max_batch=4"):
        cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    cache.reset()
    with pytest.raises(ValueError, match=r"5 rows is more than max_batch=4.*beams"):
        step(cache, 5, 10)
    step(cache, 4, 10)


def test_another_batch_needs_a_reset() -> None:
    cache = small_cache()
    step(cache, 2, 10)
    with pytest.raises(ValueError, match=r"batch of 3 rows, but the cache holds 2 .*reset"):
        step(cache, 3, 1)
    step(cache, 2, 1)
    assert cache.get_seq_length() == 11


def test_rows_that_do_not_exist() -> None:
    cache = small_cache()
    cache.reorder_cache(torch.tensor([5]))  # nothing is cached: nothing happens, as in the stock
    step(cache, 2, 10)
    for rows in ([0, 2], [-1, 0], []):
        with pytest.raises(ValueError, match="of a batch of 2"):
            cache.reorder_cache(torch.tensor(rows, dtype=torch.long))
    cache.batch_select_indices(torch.tensor([False, True]))
    assert cache.batch_size == 1


def test_out_of_pages_in_a_reorder_changes_nothing() -> None:
    pool = PagePool(page_bytes=PAGE, strict=True)
    cache = small_cache(pool=pool)
    kept = [t.clone() for t in step(cache, 2, 100)]
    pool.set_budget(pool.stats().created_bytes)
    with pytest.raises(OutOfPages):
        cache.batch_repeat_interleave(2)
    assert cache.batch_size == 2
    cache.check()
    pool.set_budget("1MiB")
    cache.batch_repeat_interleave(2)
    for layer in range(LAYERS):
        keys = cache.layers[layer].keys
        assert keys is not None
        assert torch.equal(keys, kept[2 * layer].repeat_interleave(2, 0))


def test_copies_are_separate() -> None:
    cache = small_cache("gemma3")
    step(cache, 2, 150)
    step(cache, 2, 30, seed=1)
    twin = copy.deepcopy(cache)
    twin.check()
    for layer in range(LAYERS):
        for name in ("keys", "values"):
            a, b = getattr(cache.layers[layer], name), getattr(twin.layers[layer], name)
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr()
    twin.crop(-30)
    a, b = step(cache, 2, 1, seed=2), step(twin, 2, 1, seed=2)
    assert [t.shape[2] for t in a[:3]] == [24, 24, 181]
    assert [t.shape[2] for t in b[:3]] == [24, 24, 151]
    twin.close()
    assert torch.equal(step(cache, 2, 1, seed=3)[2][:, :, :181], a[2])
    cropped = small_cache("mistral")
    step(cropped, 1, 100)
    step(cropped, 1, 20)
    cropped.crop(-60)  # to before the latest step
    twin = copy.deepcopy(cropped)
    assert twin.stats().tokens == cropped.stats().tokens == 60
    empty = copy.deepcopy(small_cache())
    step(empty, 1, 5)


def test_caches_share_a_pool() -> None:
    pool = PagePool(page_bytes=PAGE, strict=True)
    one, two = small_cache(pool=pool), small_cache("mistral", pool=pool)
    step(one, 2, 100)
    step(two, 2, 100)
    used = pool.stats().used_bytes
    one.close()
    assert pool.stats().used_bytes < used
    two.check()


# Shapes -------------------------------------------------------------------------------------------


def test_layers_may_differ_from_the_config_and_each_other() -> None:
    cache = small_cache()
    shapes = [(2, 16, 16), (4, 32, 32), (2, 24, 16)]  # heads, dims of K and of V
    given: list[list[torch.Tensor]] = []
    returned: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer, (heads, k_dim, v_dim) in enumerate(shapes):
        given.append([states(2, 40, heads, k_dim), states(2, 40, heads, v_dim)])
        returned.append(cache.update(given[-1][0], given[-1][1], layer))
        cache.check()
        # What earlier layers were given stays readable in this step: others may share it.
        for mine, expected in zip(returned, given, strict=True):
            assert torch.equal(mine[0], expected[0])
            assert torch.equal(mine[1], expected[1])
    for layer, (heads, k_dim, v_dim) in enumerate(shapes):
        more = [states(2, 1, heads, k_dim), states(2, 1, heads, v_dim)]
        k, v = cache.update(more[0], more[1], layer)
        assert torch.equal(k, torch.cat([given[layer][0], more[0]], 2))
        assert torch.equal(v, torch.cat([given[layer][1], more[1]], 2))
    cache.check()
    with pytest.raises(ValueError, match=r"layer 1 holds LayerSpec\(kv_heads=4"):
        cache.update(states(2, 1), states(2, 1), 1)
    cache.reset()
    step(cache, 2, 5)  # another model


def small_config(kind: Callable[..., PreTrainedConfig], **options: Any) -> PreTrainedConfig:
    given = CONFIGS["llama"]().to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
    common = {name: given[name] for name in (*names, "num_key_value_heads", "bos_token_id")}
    return kind(**common, eos_token_id=None, **options)


def shared_kv() -> PreTrainedConfig:
    return small_config(
        Gemma4TextConfig,
        num_hidden_layers=6,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 3,
        global_head_dim=32,
        sliding_window=24,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=8,
    )


def chunked() -> PreTrainedConfig:
    return small_config(
        Llama4TextConfig,
        num_hidden_layers=4,
        attention_chunk_size=16,
        num_local_experts=2,
        intermediate_size_mlp=64,
    )


@pytest.mark.parametrize("config", [shared_kv, chunked])
def test_shared_and_chunked_layers(config: Callable[[], PreTrainedConfig]) -> None:
    model = make_model(config())
    cache = strict_cache(model.config, order="token")
    for mode in ("lookup", "padded"):
        assert torch.equal(run(model, cache, mode), run(model, stock_cache(model.config), mode))
        cache.reset()
    assert cache.kv is not None
    assert len(cache.kv.specs) == 4
