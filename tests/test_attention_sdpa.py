"""The sdpa backend against a plain reference, on memory that faults where nothing is mapped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.attention_reference import World, make_world, spec_of, variants
from vattn.attention import batching, dense, sdpa, sdpa_plan
from vattn.attention.base import Step
from vattn.attention.sdpa import SdpaBackend
from vattn.attention.sdpa_plan import DecodeCuts, chunk_calls
from vattn.kv.layout import Order

VARIANTS = variants(spec_of())


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def readable_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte of the cache's range may be read, as on a host that is not strict."""
    monkeypatch.setattr(sdpa_plan, "holes_readable", lambda step: True)


def calls_of(world: World, step: Step) -> sdpa_plan.Plan:
    world.backend.prepare(step, world.specs)
    plan: sdpa_plan.Plan = step.plan[world.specs[0].window]
    return plan


def run(world: World) -> None:
    """Prefill in chunks, decode with holes, grow over tiles and pages, reuse slots."""
    a, b, c, d, e = (world.open() for _ in range(5))
    world.step((), [(a, 40), (b, 40), (d, 40), (c, 3)])
    world.step([a, b, c], [(e, 150)])
    world.step([a, b, d, e], [(c, 60)])
    for _ in range(18):
        world.step([a, b, d, e])
    world.step([a], [(c, 9), (d, 9), (e, 200)])
    world.release(b)
    world.step([a, c, d, e])
    f = world.open(b)
    world.step([a, c, d, e], [(f, 70)])
    world.step([a, c, d, e, f])
    world.end()


@pytest.mark.parametrize("order", ["head", "token"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_the_references(variant: str, order: Order) -> None:
    spec = VARIANTS[variant]
    run(make_world(SdpaBackend(), [spec], order=order, tile=32))


@pytest.mark.usefixtures("readable_holes")
@pytest.mark.parametrize("variant", VARIANTS)
def test_with_holes_that_may_be_read(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "CALL_ELEMENTS", 1e9)  # one call for all, whatever lies between
    run(make_world(SdpaBackend(), [VARIANTS[variant]], strict=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("variant", ["gqa", "window_sinks", "softcap"])
def test_dtypes(variant: str, dtype: torch.dtype) -> None:
    run(make_world(SdpaBackend(), [replace(VARIANTS[variant], dtype=dtype)], tile=16))


def test_layers_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of a step share its calls by window, and nothing else."""
    monkeypatch.setattr(sdpa, "_MOST_MASK", 2000)  # some chunks go by two calls, merged
    specs = [spec_of(), spec_of(window=20), spec_of(), spec_of(window=1, kv_heads=1, head_dim=8)]
    run(make_world(SdpaBackend(), specs))


@pytest.mark.parametrize("seed", range(6))
def test_random_steps(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(seed)
    monkeypatch.setattr(sdpa, "_MOST_MASK", int(random.integers(1, 10_000)))
    monkeypatch.setattr(sdpa, "_WINDOW_ROWS", int(random.integers(1, 64)))
    monkeypatch.setattr(sdpa, "CALL_ELEMENTS", int(random.integers(1, 5000)))
    group, kv_heads = random.choice([1, 2, 3], 2)
    base = spec_of(int(group * kv_heads), int(kv_heads), int(random.choice([8, 16, 24])))
    window = int(random.integers(1, 120))
    softcap = float(random.uniform(1, 20)) if random.random() < 0.5 else None
    specs = [base, replace(base, window=window, softcap=softcap, sinks=bool(random.random() < 0.5))]
    order: Order = "head" if random.random() < 0.5 else "token"
    tile = int(random.choice([1, 16, 48]))
    world = make_world(SdpaBackend(), specs, order=order, tile=tile, seed=seed)
    for _ in range(14):
        free = [slot for slot in range(8) if slot not in world.history]
        opened = [world.open(int(slot)) for slot in random.permutation(free)[:3]]
        chunks = [(slot, int(random.choice([1, 5, 5, 30, 100]))) for slot in opened]
        running = [slot for slot in world.history if slot not in opened]
        for slot in list(running):
            if world.tokens(slot) > 250:
                world.release(slot)
                running.remove(slot)
        longer = [s for s in running if random.random() < 0.3]
        chunks += [(slot, int(random.integers(1, 60))) for slot in longer]
        decodes = [s for s in running if s not in longer and random.random() < 0.8]
        if decodes or chunks:
            world.step(decodes, chunks)
    world.end()


@pytest.mark.parametrize("variant", VARIANTS)
def test_where_torch_has_no_more_than_its_public_function(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of other devices than CPUs."""
    monkeypatch.setattr(dense, "tells_lse", lambda device: False)
    monkeypatch.setattr(dense, "_MOST_SCORES", 3000)  # many small products
    run(make_world(SdpaBackend(64), [VARIANTS[variant]], order="token"))


@pytest.mark.parametrize("strict", [False, True])
def test_holes_may_be_read_where_nothing_faults(strict: bool) -> None:
    world = make_world(SdpaBackend(), [spec_of()], strict=strict)
    slots = [world.open() for _ in range(4)]
    world.step((), [(slot, 20 + slot) for slot in slots])
    plan = calls_of(world, world.prepare([slots[0], slots[1], slots[3]]))
    assert len(plan.decodes) == (3 if strict else 1)
    world.end()


# Calls --------------------------------------------------------------------------------------------


def test_equal_prompts_and_their_decodes_are_one_call_each() -> None:
    world = make_world(SdpaBackend(), [spec_of()])
    slots = [world.open() for _ in range(8)]
    plan = calls_of(world, world.prepare((), [(slot, 16) for slot in slots]))
    assert [(c.sequences, c.n) for c in plan.chunks] == [(8, 16)]
    world.step((), [(slot, 16) for slot in slots])
    plan = calls_of(world, world.prepare(slots))
    assert [(c.slots, c.begin, c.end, c.mask) for c in plan.decodes] == [(8, 0, 17, None)]
    world.end()


def test_chunks_are_joined_where_one_view_has_them() -> None:
    world = make_world(SdpaBackend(), [spec_of()])
    slots = [world.open() for _ in range(8)]
    # First chunks read nothing but themselves, so their slots may lie anywhere.
    step = world.prepare((), [(slots[i], 9) for i in (0, 1, 5)])
    assert [(c.sequences, c.neighbours) for c in chunk_calls(step)] == [(3, False)]
    world.step((), [(slot, 9) for slot in slots])
    step = world.prepare((), [(slots[i], 5) for i in (0, 1, 5, 6)])
    assert [(c.sequences, c.slot) for c in chunk_calls(step)] == [(2, 0), (2, 5)]
    world.end()


def test_a_cut_is_kept_while_sequences_grow_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = 0
    real = batching.split

    def counted(*args: Any) -> Any:
        nonlocal cuts
        cuts += 1
        return real(*args)

    monkeypatch.setattr(sdpa_plan, "split", counted)
    monkeypatch.setattr(sdpa_plan, "holes_readable", lambda step: True)
    world = make_world(SdpaBackend(), [spec_of()], strict=False)
    slots = [world.open() for _ in range(4)]
    world.step((), [(slot, 5 + slot) for slot in slots])
    for _ in range(16):
        world.step(slots)
    assert cuts == 1
    world.step(slots)  # long ago
    assert cuts == 2
    world.step(slots[:3])  # other sequences
    assert cuts == 3
    world.step(slots)  # one of them grew less
    assert cuts == 4
    world.end()


def test_cuts_of_no_decodes() -> None:
    world = make_world(SdpaBackend(), [spec_of()])
    slot = world.open()
    assert DecodeCuts().calls(world.prepare((), [(slot, 3)]), None, 1.0) == []
    world.end()


# No copies ----------------------------------------------------------------------------------------


def largest_allocation(world: World, decodes: list[int], chunks: list[tuple[int, int]]) -> int:
    """Bytes of the largest block that a step's forward takes, inside of operators too."""
    step = world.prepare(decodes, chunks)
    world.backend.prepare(step, world.specs)
    spec = world.specs[0]
    query, key, value = world.inputs(step, spec)
    world.expected(step, 0, query, key, value)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        world.backend.forward(0, spec, query, key, value, step, world.sinks[0])
    largest = max(event.self_cpu_memory_usage for event in events.events())
    assert largest > 0
    return int(largest)


@pytest.mark.parametrize("order", ["head", "token"])
@pytest.mark.parametrize("variant", ["gqa", "mha", "sinks", "softcap", "window"])
def test_cached_keys_are_not_copied(
    variant: str, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdpa_plan, "holes_readable", lambda step: True)
    spec = replace(VARIANTS[variant], head_dim=64)
    if spec.window is not None:
        spec = replace(spec, window=1500)
    world = make_world(
        SdpaBackend(), [spec], strict=False, order=order, max_tokens=2048, page_bytes=16384
    )
    slots = [world.open() for _ in range(4)]
    for slot in slots:
        world.fill(slot, 2000)
    world.step((), [(slots[1], 8)])  # leaves the masks that all steps share
    # K of a call, or of one head of it, which a product with it could copy.
    item = spec.dtype.itemsize * spec.head_dim
    one_head = 4 * 1500 * item
    assert largest_allocation(world, slots, []) < one_head // 4
    # A chunk's scores are larger than the little that it computes, and smaller than K.
    assert largest_allocation(world, [], [(slots[0], 8)]) < 1500 * item
    world.end()


def test_a_copy_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: what is copied shows."""
    spec = spec_of(head_dim=64)
    world = make_world(SdpaBackend(), [spec], max_tokens=2048)
    slot = world.open()
    world.fill(slot, 2000)
    real = world.backend.forward

    def copying(*args: Any) -> torch.Tensor:
        k, _ = world.cache.layer(0)
        k[slot : slot + 1, :2000].transpose(1, 2).clone()
        return real(*args)

    monkeypatch.setattr(world.backend, "forward", copying)
    assert largest_allocation(world, [slot], []) >= 2000 * 2 * 64 * 4
    world.end()


# Refusals -----------------------------------------------------------------------------------------


def test_what_it_refuses() -> None:
    cpu = torch.device("cpu")
    assert SdpaBackend.refusal(spec_of(softcap=3.0, sinks=True, window=4), cpu) is None
    assert "float8" in str(SdpaBackend.refusal(spec_of(dtype=torch.float8_e5m2), cpu))
    assert "5 heads" in str(SdpaBackend.refusal(spec_of(heads=5), cpu))
