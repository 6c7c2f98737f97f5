"""Pages made ahead, copies through pinned memory, and what `vattn doctor` says, on a GPU."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from vattn import KVCache, PagePool
from vattn.kv.swap import SwapSpace

LAYERS, HEADS, DIM = 4, 2, 64
DTYPE = torch.bfloat16
TOKENS = 9000


def test_pages_are_made_ahead_of_need(device: str) -> None:
    pool = PagePool(device, budget_bytes="256MiB", ahead_bytes=32 << 20)
    cache = KVCache(LAYERS, HEADS, DIM, DTYPE, max_seqs=2, max_tokens=20_000, pool=pool)
    pool.mapper.drain()
    pool.check()
    ahead = pool.stats().created_bytes
    assert ahead >= 32 << 20
    slot = cache.open()
    cache.ensure(slot, 500)
    assert pool.stats().created_bytes >= ahead  # what was taken came from those
    cache.release(slot)
    cache.trim()
    pool.check()
    assert pool.driver.physical_bytes() == pool.stats().created_bytes
    cache.close()


@pytest.mark.parametrize("order", ["token", "head"])
def test_a_saved_sequence_comes_back_byte_for_byte(order: Any, device: str) -> None:
    pool = PagePool(device, budget_bytes="256MiB")
    cache = KVCache(
        LAYERS, HEADS, DIM, DTYPE, max_seqs=2, max_tokens=20_000, pool=pool, order=order
    )
    swap = SwapSpace(256 << 20, pinned=device == "cuda")
    slot = cache.open()
    cache.ensure(slot, TOKENS)
    wanted = []
    for layer in range(LAYERS):
        for tensor in cache.view(slot, layer):
            tensor.copy_(torch.randn(tensor.shape).to(tensor))
            wanted.append(tensor.clone())
    saved = swap.take(cache.saved_bytes(slot), TOKENS, cache.anchor(slot))
    cache.save(slot, saved.buffer)
    cache.release(slot)
    blocker = cache.open(slot=slot.index)  # takes the place, and other bytes with it
    cache.ensure(blocker, TOKENS)
    for layer in range(LAYERS):
        for tensor in cache.view(blocker, layer):
            tensor.fill_(3)
    cache.release(blocker)
    back = cache.open(slot=1 - slot.index)
    cache.restore(back, saved.tokens, saved.anchor, saved.buffer, 0)
    found = [tensor for layer in range(LAYERS) for tensor in cache.view(back, layer)]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    swap.give_back(saved)
    if device == "cuda":
        torch.cuda.synchronize()
    assert swap.used_bytes == 0
    swap.check()
    cache.release(back)
    cache.check()
    cache.trim()
    assert pool.driver.physical_bytes() == 0
    cache.close()


def test_doctor_finds_the_device(device: str) -> None:
    testing = pytest.importorskip("typer.testing", reason="the command line needs typer")
    from vattn.cli import app

    result = testing.CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["host"]["self_test"]["ok"]
    if device == "cuda":
        assert report["cuda"]["found"], report["cuda"]
        assert torch.cuda.get_device_name(0) in json.dumps(report["cuda"]["devices"])
