"""Where a step's K and V go: by which launch, and never to a page that somebody else uses."""

from __future__ import annotations

import builtins
import importlib.util
import random
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import vattn
from tests.attention_reference import make_world, spec_of
from vattn.attention import append as module
from vattn.attention.append import append, append_mode, index_put, writer
from vattn.attention.base import Step, prepare_append
from vattn.attention.sdpa import SdpaBackend
from vattn.kv.layout import Order

ORDERS: tuple[Order, ...] = ("token", "head")
CPU = torch.device("cpu")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows", [None, slice(0, 2), slice(2, None)])
def test_rows_of_a_step(order: Order, rows: slice | None) -> None:
    world = make_world(SdpaBackend(), [spec_of(), spec_of()], order=order)
    for slot, tokens in ((4, 9), (1, 30), (6, 5)):
        world.fill(world.open(slot), tokens)
    step = world.prepare([1, 4], [(6, 3)])
    prepare_append(step)
    key, value = torch.randn(2, 5, 2, 16)
    append(1, key, value, step, rows)
    places = [(1, 30), (4, 9), (6, 5), (6, 6), (6, 7)]
    for own, new in zip(world.cache.layer(1), (key, value), strict=True):
        for row, (slot, at) in enumerate(places):
            written = rows is None or row in range(5)[rows]
            assert torch.equal(own[slot, at], new[row]) == written
    world.end()


# Which launch ------------------------------------------------------------------------------------


def test_a_cpu_needs_no_triton() -> None:
    assert writer("cpu") is index_put
    assert append_mode(CPU) == "index_put"
    assert SdpaBackend().append_mode == "index_put"


def fresh_writer(device_type: str) -> Any:
    """What would be chosen in a new process."""
    return writer.__wrapped__(device_type)


def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else found(name)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fresh_writer("cuda") is index_put


def test_triton_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def broken(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("triton"):
            raise ImportError("libtriton.so is of another machine")
        return real(name, *arguments, **options)

    monkeypatch.delitem(sys.modules, "vattn.attention.triton_append", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.warns(RuntimeWarning, match=r"ImportError: libtriton\.so .* two launches"):
        assert fresh_writer("cuda") is index_put


def test_triton_that_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; the dev extra has it")

    def fails(*arguments: Any) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(module, "_try", fails)
    with pytest.warns(RuntimeWarning, match="RuntimeError: no C compiler"):
        assert fresh_writer("cuda") is index_put


def test_a_gpu_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; the dev extra has it")
    tried = []
    monkeypatch.setattr(module, "_try", lambda write, device: tried.append((write, device)))
    chosen = fresh_writer("cuda")
    from vattn.attention.triton_append import append_kv

    assert chosen is append_kv
    assert tried == [(append_kv, torch.device("cuda"))]
    monkeypatch.setattr(module, "writer", lambda device_type: chosen)
    assert append_mode(torch.device("cuda")) == "triton"


def test_the_trial_runs_a_writer() -> None:
    calls = []

    def write(*arguments: torch.Tensor) -> None:
        calls.append([tuple(x.shape) for x in arguments])
        index_put(*arguments)

    module._try(write, CPU)
    assert calls == [[(1, 1, 8), (1, 1, 8), (1, 1, 1, 8), (1, 1, 1, 8), (1,), (1,)]]


# Never into a page that another slot shares ------------------------------------------------------


def users_of_next(cache: vattn.KVCache, slot: int, token: int, slots: Sequence[int]) -> list[int]:
    """How many open slots have the page that ``token`` of ``slot`` is on: per region and run."""
    space, counts = cache._slots, []
    for index, region in enumerate(cache.layout.regions):
        shape = (region.runs, -1)
        own = space.page_ids(slot, index).reshape(shape)
        page = token * region.token_bytes // cache.layout.page_bytes
        end = ((token + 1) * region.token_bytes - 1) // cache.layout.page_bytes
        for at in range(page, end + 1):  # a token may lie across two pages
            for run in range(region.runs):
                users = [space.page_ids(s, index).reshape(shape)[run] for s in slots]
                counts.append(sum(int(own[run, at] in ids) for ids in users))
    return counts


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tile", [1, 16])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 31, 32, 33, 64, 100])
def test_the_next_token_after_a_fork_has_a_page_of_its_own(
    order: Order, tile: int, tokens: int
) -> None:
    """Which is where a kernel writes that appends by itself: at the length before the step.

    A page holds 8 tokens in token order and 32 in head order.
    """
    specs = [vattn.LayerSpec(2, 32, torch.float32)] * 2
    with vattn.KVCache(
        specs,
        max_seqs=4,
        max_tokens=128,
        device="cpu",
        strict=True,
        order=order,
        page_bytes=4096,
        layers_per_region=1,
        kv_tile_tokens=tile,
    ) as cache:
        parent = int(cache.open())
        cache.ensure(parent, tokens)
        child = int(cache.fork(parent))
        third = int(cache.fork(child, tokens // 2))
        slots = [parent, child, third]
        shared = users_of_next(cache, parent, 0, slots)
        page = 8 if order == "token" else 32
        assert max(shared) == (1 if tokens < page else 3 if tokens // 2 >= page else 2)
        for slot in slots:
            length = cache.tokens(slot)
            cache.ensure(slot, length + 1)
            assert set(users_of_next(cache, slot, length, slots)) == {1}
        cache.check()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(4))
def test_every_growth_ends_on_pages_of_its_own(order: Order, seed: int) -> None:
    """Forks, cuts into shared pages, growth ahead of need and releases, in any order."""
    chance = random.Random(seed)
    specs = [vattn.LayerSpec(1, 24, torch.float32)] * 3  # tokens that divide no page
    cache = vattn.KVCache(
        specs,
        max_seqs=6,
        max_tokens=160,
        device="cpu",
        strict=True,
        order=order,
        page_bytes=4096,
        layers_per_region=3,
        kv_tile_tokens=8,
    )
    slots = [int(cache.open())]
    cache.ensure(slots[0], 60)
    grown = 0
    for _ in range(150):
        slot, what = chance.choice(slots), chance.random()
        length = cache.tokens(slot)
        if what < 0.2 and len(slots) < 6:
            slots.append(int(cache.fork(slot, chance.randint(0, length))))
        elif what < 0.35:
            cache.truncate(slot, chance.randint(0, length))
        elif what < 0.45 and len(slots) > 1:
            slots.remove(slot)
            cache.release(slot, keep=chance.random() < 0.5)
        elif what < 0.55:
            cache.prepare([slot], [min(length + 20, 160)]).wait()
        elif length < 160:
            cache.ensure(slot, length + 1)
            assert set(users_of_next(cache, slot, length, slots)) == {1}
            grown += 1
        cache.check()
    assert grown > 40
    for slot in slots:
        cache.release(slot)
    cache.close()


def test_step_needs_its_places() -> None:
    world = make_world(SdpaBackend(), [spec_of()])
    world.fill(world.open(0), 3)
    step: Step = world.prepare([0])
    with pytest.raises(AssertionError):
        append(0, torch.zeros(1, 2, 16), torch.zeros(1, 2, 16), step)
    world.end()
