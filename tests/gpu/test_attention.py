"""Every installed attention backend on a GPU, for the numbers, with the worst memory around it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.attention_reference import World, make_world, spec_of, variants
from vattn.attention.base import AttentionSpec, Backend, UnsupportedAttention
from vattn.attention.flash import FlashBackend
from vattn.attention.select import BACKENDS, choose

PAGE = 2 << 20


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def base(head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> AttentionSpec:
    return spec_of(8, 2, head_dim, dtype)


def backend_for(name: str, specs: list[AttentionSpec], device: str) -> Backend:
    """The backend, or a skip that says why this machine or kernel cannot."""
    try:
        return choose(specs, torch.device(device), name=name)
    except UnsupportedAttention as error:
        pytest.skip(str(error))


def world_of(name: str, specs: list[AttentionSpec], device: str, max_tokens: int = 3000) -> World:
    backend = backend_for(name, specs, device)
    return make_world(
        backend,
        specs,
        order=backend.order or "token",
        device=device,
        strict=device == "cpu",  # on a GPU it always is
        garbage=True,
        max_tokens=max_tokens,
        page_bytes=PAGE,
        layers_per_region=1,
    )


def run(world: World) -> None:
    """Chunks and decodes over several tiles and pages; slots 0, 3 and 5 stay unmapped."""
    long = 400 if world.device.type == "cpu" else 1500  # where it is the test that is tested
    a, b, c, d = (world.open(slot) for slot in (6, 1, 4, 2))
    world.step((), [(a, long), (b, 7), (c, 130)])
    world.step([a, b, c])
    world.step([a, c], [(d, 300), (b, 57)])
    for _ in range(3):
        world.step([a, b, c, d])
    world.step((), [(a, 64), (d, 1)])
    world.step([b, c], [(a, long // 2)])
    world.step([a, b, c, d])
    world.end()


@pytest.mark.parametrize("variant", variants(base()))
@pytest.mark.parametrize("name", BACKENDS)
def test_outputs_are_the_references(name: str, variant: str, device: str) -> None:
    run(world_of(name, [variants(base())[variant]], device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("name", BACKENDS)
def test_head_sizes(name: str, head_dim: int, dtype: torch.dtype, device: str) -> None:
    """Each has a tile of its own; with a window and without, and heads of their own K and V."""
    spec = base(head_dim, dtype)
    run(world_of(name, [spec, replace(spec, window=200), replace(spec, kv_heads=8)], device))


@pytest.mark.parametrize("name", BACKENDS)
def test_float32(name: str, device: str) -> None:
    run(world_of(name, [base(64, torch.float32)], device))


@pytest.mark.parametrize("in_kernel", [True, False], ids=["in_kernel", "launch"])
@pytest.mark.parametrize("variant", ["gqa", "mha", "window", "window_sinks"])
@pytest.mark.parametrize("name", BACKENDS)
def test_who_writes_new_tokens(name: str, variant: str, in_kernel: bool, device: str) -> None:
    """The attention kernel, or a launch before it: the same outputs and the same cache."""
    world = world_of(name, [variants(base())[variant]], device)
    if isinstance(world.backend, FlashBackend):
        if in_kernel and not world.backend.can_append(world.backend._kernel):
            pytest.skip(f"the kernel of {name} cannot append")
        world.backend.appends = in_kernel
    elif in_kernel:
        pytest.skip(f"{name} is not a kernel that appends")
    assert (world.backend.append_mode == "kernel") == in_kernel
    a, b = world.open(5), world.open(2)
    world.step((), [(a, 255), (b, 127)])
    for _ in range(4):  # over the edge of a tile
        world.step([a, b])
    world.step([a], [(b, 130)])
    assert_cache_is_history(world)
    world.end()


def assert_cache_is_history(world: World) -> None:
    """K and V that may still be read lie in the slots bit for bit, whoever wrote them."""
    for slot, layers in world.history.items():
        for layer, (k, v) in enumerate(layers):
            last = min(world.specs[layer].window or len(k), len(k))
            for seen, wanted in zip(world.cache.view(slot, layer), (k, v), strict=True):
                assert torch.equal(seen[-last:], wanted[-last:])


@pytest.mark.parametrize("name", BACKENDS)
def test_sinks_where_shapes_cannot_tell_heads_from_tokens(name: str, device: str) -> None:
    """As many rows as heads: log-sum-exps ``[heads, n]`` and ``[n, heads]`` look alike."""
    spec = replace(base(64), sinks=True)
    world = world_of(name, [spec, replace(spec, kv_heads=8, window=40)], device, max_tokens=600)
    slots = [world.open(slot) for slot in range(7, -1, -1)]
    world.step((), [(slot, 8) for slot in slots[:1]])  # a chunk of so many tokens
    world.step((), [(slot, 30 + 40 * i) for i, slot in enumerate(slots[1:])])
    for _ in range(2):
        world.step(slots)
    world.step(slots[:7], [(slots[7], 8)])
    world.end()


@pytest.mark.parametrize("name", BACKENDS)
def test_forks_share_pages_that_kernels_read_by_two_addresses(name: str, device: str) -> None:
    world = world_of(name, [base(128), replace(base(128), kv_heads=8)], device, max_tokens=6000)
    a = world.open(3)
    world.fill(a, 4500)
    forks = [world.fork(a, tokens) for tokens in (4500, 4100, 130)]
    assert world.cache.stats().shared_bytes > 0
    for _ in range(2):
        world.step([a, *forks])
    world.step([a, forks[1]], [(forks[0], 50), (forks[2], 70)])
    world.step([a, *forks])
    assert_cache_is_history(world)
    world.release(a)
    world.step(forks)
    world.end()


@pytest.mark.parametrize("tokens", [127, 128, 129, 175, 176, 177, 191, 192, 193])
@pytest.mark.parametrize("name", BACKENDS)
def test_lengths_about_a_tile(name: str, tokens: int, device: str) -> None:
    world = world_of(name, [base(64), base(128)], device)
    slots = [world.open(slot) for slot in (1, 3)]
    world.step((), [(slots[0], tokens - 1), (slots[1], tokens)])
    for _ in range(3):
        world.step(slots)
    world.end()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_window_that_leaves_its_pages_behind(name: str, device: str) -> None:
    """Pages below the window's first tile are unmapped, and nothing reads them."""
    spec = replace(base(128), kv_heads=8, window=100)
    world = world_of(name, [spec], device, max_tokens=6000)
    slot = world.open()
    for n in (2000, 1500, 1):
        world.step((), [(slot, n)])
    world.step([slot])
    assert world.cache.first_token(slot, 0) > 0
    world.end()


@pytest.mark.parametrize("name", BACKENDS)
def test_one_long_sequence_beside_short_ones(name: str, device: str) -> None:
    """The kernel splits the long one over the GPU."""
    world = world_of(name, [base(128)], device, max_tokens=20_000)
    slots = [world.open() for _ in range(3)]
    for slot, tokens in zip(slots, (19_000, 3, 700), strict=True):
        world.fill(slot, tokens)
    for _ in range(2):
        world.step(slots)
    world.end()
