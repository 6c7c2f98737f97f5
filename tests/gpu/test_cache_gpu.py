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
    with cuda.graph(graph):
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


# Second opinions ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("streams")
def test_cuda_python_sees_the_same_bytes(pool: PagePool) -> None:
    driver: Any = pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    cache = make_cache(pool, order="token", layers_per_region=1)
    a = cache.open()
    write(cache, a, 3000, 1)
    b = cache.fork(a)
    k = cache.layer(2)[0]
    cuda.synchronize()

    def read(address: int, size: int) -> bytes:
        buffer = bytearray(size)
        (error,) = driver.cuMemcpyDtoH(buffer, address, size)
        assert error == driver.CUresult.CUDA_SUCCESS
        return bytes(buffer)

    row = HEADS * DIM * DTYPE.itemsize  # K of one token
    for token in (0, 1, 1499, 2999):
        expected = torch.full((HEADS * DIM,), 3.0, dtype=DTYPE).view(torch.uint8).numpy().tobytes()
        for slot in (a, b):
            assert read(k[slot.index, token].data_ptr(), row) == expected
    # The fork's first page is the very page of the original: what one writes the other shows.
    (error,) = driver.cuMemsetD8(k[a.index, 0].data_ptr(), 0, row)
    assert error == driver.CUresult.CUDA_SUCCESS
    cuda.synchronize()
    assert read(k[b.index, 0].data_ptr(), row) == bytes(row)
    error, properties = _allocation_properties(driver, k[a.index, 0].data_ptr())
    assert error == driver.CUresult.CUDA_SUCCESS
    assert properties.location.id == 0
    end(cache, a, b)


def _allocation_properties(driver: Any, address: int) -> tuple[Any, Any]:
    error, handle = driver.cuMemRetainAllocationHandle(address)
    assert error == driver.CUresult.CUDA_SUCCESS
    found: tuple[Any, Any] = driver.cuMemGetAllocationPropertiesFromHandle(handle)
    (error,) = driver.cuMemRelease(handle)
    assert error == driver.CUresult.CUDA_SUCCESS
    return found


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
