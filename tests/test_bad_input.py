"""Bad input to `KVCache` and `PagePool`: a message that helps, and nothing has changed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import vattn
from tests.helpers import Sequences, layer_specs, make_cache, make_pool
from vattn import _core

if TYPE_CHECKING:
    from collections.abc import Callable

GOOD: dict[str, Any] = {
    "kv_heads": 1,
    "head_dim": 64,
    "dtype": torch.float32,
    "max_seqs": 2,
    "max_tokens": 100,
}


def build(layers: Any = 2, **changes: Any) -> vattn.KVCache:
    return vattn.KVCache(layers, **(GOOD | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers=0 must be a positive integer"),
        ({"layers": -3}, "layers=-3 must be a positive integer"),
        ({"kv_heads": 0}, "kv_heads=0 must be a positive integer"),
        ({"kv_heads": -2}, "kv_heads=-2 must be a positive integer"),
        ({"kv_heads": None}, "give kv_heads, head_dim and dtype, or a list of LayerSpec"),
        ({"head_dim": 0}, "head_dim=0 must be a positive integer"),
        ({"head_dim": 12}, "head_dim=12 is not a multiple of 8: .*pad the model's heads instead"),
        ({"head_dim": 24, "dtype": torch.float8_e5m2}, "24 bytes is not a multiple of 16; use a"),
        ({"dtype": torch.int8}, r"dtype=torch.int8 is not supported; use one of torch.float32, "),
        ({"dtype": "float32"}, r"dtype=float32 is not supported; use one of torch.float32, "),
        ({"max_seqs": 0}, "max_seqs=0 must be a positive integer"),
        ({"max_seqs": -1}, "max_seqs=-1 must be a positive integer"),
        ({"max_tokens": 0}, "max_tokens=0 must be a positive integer"),
        ({"max_tokens": -7}, "max_tokens=-7 must be a positive integer"),
        ({"max_tokens": 2**30}, r"fewer than 2\*\*31; lower max_seqs or max_tokens"),
        (
            {"layers": 256, "kv_heads": 64, "head_dim": 256, "max_tokens": 2**20, "max_seqs": 1},
            r"beyond the stride of 2\*\*40 .*lower max_tokens or layers_per_region",
        ),
        (
            {"layers": 32, "kv_heads": 64, "head_dim": 256, "max_tokens": 2**17, "max_seqs": 2048},
            r"beyond 2\*\*46; lower one of them",
        ),
        ({"window": 0}, "window=0 must be a positive integer, or None for full attention"),
        ({"window": -5}, "window=-5 must be a positive integer, or None for full attention"),
        ({"page_bytes": -4096}, "page_bytes=-4096 must be a positive integer"),
        ({"page_bytes": 5000}, "page_bytes=5000 .*granularity of host, which is 4096 bytes"),
        ({"budget_bytes": 0}, "budget_bytes=0 must be a positive integer"),
        ({"budget_bytes": -1}, "budget_bytes=-1 must be a positive integer"),
        ({"budget_bytes": 16383}, "budget_bytes=16383 is below one page of 16384 bytes; give at"),
        ({"budget_bytes": "lots"}, "budget_bytes='lots' is not a size; write 512MiB, 2GB or a"),
        (
            {"layers_per_region": -1},
            "layers_per_region=-1 must be a positive integer, or None for all",
        ),
        ({"order": "tokens"}, 'order=\'tokens\' must be "token" or "head"'),
        ({"kv_tile_tokens": 0}, "kv_tile_tokens=0 must be a positive integer"),
        ({"kv_tile_tokens": (16, -1)}, "kv_tile_tokens=-1 must be a positive integer"),
        ({"kv_tile_tokens": ()}, "kv_tile_tokens is empty"),
        ({"device": "mps"}, "device='mps' is not supported; use cpu or cuda"),
    ],
    ids=str,
)
def test_a_cache_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_layers_are_given_in_one_way() -> None:
    spec = vattn.LayerSpec(1, 64, torch.float32)
    with pytest.raises(ValueError, match="are part of each LayerSpec given"):
        build([spec])
    with pytest.raises(ValueError, match="a cache needs at least one layer"):
        vattn.KVCache([], max_seqs=1, max_tokens=1)


def test_settings_of_a_pool_that_is_shared() -> None:
    pool = vattn.PagePool(budget_bytes="1MiB")
    for setting in ({"page_bytes": 4096}, {"budget_bytes": 10**6}, {"strict": True}):
        with pytest.raises(ValueError, match="page_bytes, budget_bytes and strict belong to the"):
            build(pool=pool, **setting)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"page_bytes": 0}, "page_bytes=0 must be a positive integer"),
        ({"page_bytes": -4096}, "page_bytes=-4096 must be a positive integer"),
        ({"page_bytes": 5000}, "page_bytes=5000 is not a multiple of the granularity of host"),
        ({"budget_bytes": 0}, "budget_bytes=0 must be a positive integer"),
        ({"budget_bytes": "0MiB"}, "budget_bytes='0MiB' must be a positive integer"),
        ({"budget_bytes": "12 parsecs"}, "budget_bytes='12 parsecs' is not a size; write 512MiB"),
        ({"budget_bytes": 100}, "budget_bytes=100 is below one page of 16384 bytes; give at least"),
        ({"ahead_bytes": -1}, "ahead_bytes=-1 must not be negative"),
        ({"device": "mps"}, "device='mps' is not supported; use cpu or cuda"),
    ],
    ids=str,
)
def test_a_pool_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vattn.PagePool(**({"budget_bytes": "1MiB"} | settings))


def test_a_budget_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VATTN_BUDGET", "plenty")
    with pytest.raises(ValueError, match="VATTN_BUDGET='plenty' is not a size; write 512MiB"):
        vattn.PagePool()
    monkeypatch.setenv("VATTN_BUDGET", "3MiB")
    assert vattn.PagePool().stats().budget_bytes == 3 * 2**20


class Scene:
    """A cache with a sequence, a released one, and one of another cache."""

    def __init__(self) -> None:
        self.pool = make_pool(_core.host_driver(strict=True), pages=64)
        self.seqs = Sequences(make_cache(self.pool, layer_specs(self.pool, window=None)))
        self.cache = self.seqs.cache
        self.a = self.cache.open()
        self.seqs.writers[int(self.a)] = []
        self.seqs.grow(int(self.a), 10)
        self.gone = self.cache.open()
        self.cache.release(self.gone)
        self.other = make_cache(self.pool)
        self.foreign = self.other.open()

    def refuses(
        self,
        act: Callable[[], object],
        message: str | None,
        kind: type[Exception] | tuple[type[Exception], ...] = ValueError,
    ) -> None:
        before = self.cache.stats(), self.pool.stats()
        with pytest.raises(kind, match=message):
            act()
        assert (self.cache.stats(), self.pool.stats()) == before
        self.seqs.check()


@pytest.fixture
def scene() -> Scene:
    return Scene()


CALLS: dict[str, Callable[[vattn.KVCache, Any], object]] = {
    "release": lambda cache, slot: cache.release(slot),
    "ensure": lambda cache, slot: cache.ensure(slot, 5),
    "ensure_many": lambda cache, slot: cache.ensure_many([slot], [5]),
    "prepare": lambda cache, slot: cache.prepare([slot], [5]).wait(),
    "truncate": lambda cache, slot: cache.truncate(slot, 0),
    "fork": lambda cache, slot: cache.fork(slot),
    "assign to": lambda cache, slot: cache.assign([slot], [0]),
    "assign from": lambda cache, slot: cache.assign([0], [slot]),
    "mark_dirty": lambda cache, slot: cache.mark_dirty(slot),
    "view": lambda cache, slot: cache.view(slot, 0),
    "first_token": lambda cache, slot: cache.first_token(slot, 0),
    "tokens": lambda cache, slot: cache.tokens(slot),
    "pages_needed": lambda cache, slot: cache.pages_needed(slot, 5),
}


@pytest.mark.parametrize("call", CALLS)
def test_sequences_that_are_not_there(scene: Scene, call: str) -> None:
    act = CALLS[call]
    scene.refuses(lambda: act(scene.cache, scene.gone), "not open .released already.|was released")
    scene.refuses(lambda: act(scene.cache, int(scene.gone)), r"slot 1 is not open")
    scene.refuses(lambda: act(scene.cache, scene.foreign), r"Slot\(0\) belongs to another cache")
    for index in (-1, 4, 2**31 - 1):
        scene.refuses(
            lambda index=index: act(scene.cache, index),  # type: ignore[misc]
            rf"slot {index} is not one of the 4 slots of this cache",
        )
    scene.refuses(lambda: act(scene.cache, None), None, TypeError)


def test_a_handle_ends_with_its_sequence(scene: Scene) -> None:
    """The slot is in use again, by somebody else."""
    later = scene.cache.open(slot=int(scene.gone))
    scene.seqs.writers[int(later)] = []
    scene.refuses(lambda: scene.cache.ensure(scene.gone, 5), "was released; open a new sequence")
    scene.refuses(lambda: scene.cache.release(scene.gone), "was released; open a new sequence")
    scene.cache.ensure(later, 5)


@pytest.mark.parametrize("tokens", [-1, 101, 2**31 - 1, 2**31, 2**40])
def test_lengths_beyond_what_is_reserved(scene: Scene, tokens: int) -> None:
    said = {-1: "-1", 101: "101 tokens are more than the 100 reserved per sequence; raise"}
    message = said.get(tokens, str(tokens))
    scene.refuses(lambda: scene.cache.ensure(scene.a, tokens), message)
    if tokens < 2**31:
        array = np.array([tokens], dtype=np.int32)
        slots = np.array([int(scene.a)], dtype=np.int32)
        scene.refuses(lambda: scene.cache.ensure_many(slots, array), message)
        scene.refuses(lambda: scene.cache.prepare(slots, array).wait(), message)


def test_lengths_of_truncate_and_fork(scene: Scene) -> None:
    for act in (scene.cache.truncate, scene.cache.fork):
        scene.refuses(lambda act=act: act(scene.a, -1), "tokens=-1 must not be negative")  # type: ignore[misc]
    scene.refuses(
        lambda: scene.cache.truncate(scene.a, 11),
        "truncate to 11 tokens, but slot 0 holds 10; use ensure to grow",
    )
    scene.refuses(lambda: scene.cache.fork(scene.a, 11), "fork of 11 tokens, but slot 0 holds 10")
    scene.refuses(lambda: scene.cache.pages_needed(scene.a, 101), "raise max_tokens")


def test_half_a_batch_is_refused_whole(scene: Scene) -> None:
    b = scene.seqs.new(5)
    slots = [int(scene.a), b]
    for lengths in ([50, 101], [50, -1]):
        scene.refuses(lambda lengths=lengths: scene.cache.ensure_many(slots, lengths), "tokens")  # type: ignore[misc]
    scene.refuses(lambda: scene.cache.ensure_many([*slots, 3], [50, 50, 50]), "slot 3 is not open")


def test_arrays_that_do_not_fit(scene: Scene) -> None:
    cache, index = scene.cache, int(scene.a)
    one, two = np.zeros(1, dtype=np.int32), np.zeros(2, dtype=np.int32)
    for act in (cache.ensure_many, lambda *args: cache.prepare(*args).wait()):
        scene.refuses(
            lambda act=act: act(one, two),  # type: ignore[misc]
            "got 1 slots and 2 lengths; give one length each",
        )
    scene.refuses(lambda: cache.assign(one, two), "got 1 destinations and 2 sources; give one")
    scene.refuses(lambda: cache.assign([index] * 2, [index] * 2), "slot 0 is a destination twice")
    square = np.zeros((1, 1), dtype=np.int32)
    scene.refuses(lambda: cache.ensure_many(square, square), "one-dimensional int32 arrays; got 2")
    for wrong in (np.array([0]), np.array([0.0]), torch.tensor([0])):
        scene.refuses(
            lambda wrong=wrong: cache.ensure_many(wrong, one),  # type: ignore[misc]
            "expected int32, got .*; convert it once, outside the loop",
            TypeError,
        )


def test_slots_to_open(scene: Scene) -> None:
    cache = scene.cache
    scene.refuses(lambda: cache.open(slot=0), "slot 0 is open already; release it first")
    for slot in (-1, 4):
        scene.refuses(
            lambda slot=slot: cache.open(slot=slot),  # type: ignore[misc]
            rf"slot={slot} is not one of the 4 slots of this cache",
        )
    scene.refuses(lambda: cache.open(expected_tokens=-1), "expected_tokens=-1 must not be negative")
    for _ in range(3):
        scene.seqs.open()
    full = "all 4 slots are open; release a sequence or raise max_seqs"
    scene.refuses(cache.open, full, vattn.OutOfSlots)
    scene.refuses(lambda: cache.fork(scene.a), full, vattn.OutOfSlots)
    assert issubclass(vattn.OutOfSlots, vattn.OutOfPages)


def test_layers_that_are_not_there(scene: Scene) -> None:
    cache = scene.cache
    for layer in (-1, 3):
        for act in (cache.layer, cache.flat, cache.slot_tokens, lambda n: cache.view(scene.a, n)):
            scene.refuses(
                lambda act=act, layer=layer: act(layer),  # type: ignore[misc]
                rf"layer {layer} is not one of the 3 layers",
            )


def test_budgets_to_move_to(scene: Scene) -> None:
    pool = scene.pool
    for size, message in {
        0: "budget_bytes=0 must be a positive integer",
        -1: "budget_bytes=-1 must be a positive integer",
        100: "budget_bytes=100 is below one page of 4096 bytes; give at least one page",
        "much": "budget_bytes='much' is not a size; write 512MiB, 2GB or a number",
    }.items():
        scene.refuses(lambda size=size: pool.set_budget(size), re.escape(message))  # type: ignore[misc]
    scene.refuses(lambda: pool.trim(-1), "keep_bytes=-1 must not be negative")


def test_an_exhausted_budget_names_the_figures(scene: Scene) -> None:
    scene.pool.set_budget(4 * 4096)
    scene.refuses(
        lambda: scene.cache.ensure(scene.a, 100),
        "13 pages of 4096 bytes are needed, and 2 can be had: the budget is 4 pages, live "
        "sequences hold 2; release or truncate sequences, or raise the budget",
        vattn.OutOfPages,
    )
    assert issubclass(vattn.OutOfPages, MemoryError)


def test_a_window_cannot_give_back_what_left_it() -> None:
    pool = make_pool(_core.host_driver(strict=True))
    cache = make_cache(pool, layer_specs(pool, window=8), max_tokens=200)
    slot = cache.open()
    for tokens in range(1, 150):
        cache.ensure(slot, tokens)
    message = r"slot 0 cannot go back to 50 tokens: a sliding-window layer holds tokens from \d+ on"
    for act in (cache.truncate, cache.fork):
        with pytest.raises(ValueError, match=message + "; go back to at least 148"):
            act(slot, 50)
    assert cache.tokens(slot) == 149
    cache.check()


def test_a_slot_named_twice_in_one_step_has_one_first_query() -> None:
    pool = make_pool(_core.host_driver(strict=True))
    cache = make_cache(pool, layer_specs(pool, window=8), max_tokens=300)
    slot = cache.open()
    cache.ensure(slot, 100)
    cache.ensure_many([slot, slot], [200, 280])
    assert cache.first_token(slot, 0) <= 100 - 8
    cache.check()


@pytest.mark.parametrize(
    "changes",
    [
        {"page_bytes": 0},
        {"layers_per_region": 0},
        {"order": ""},
        {"budget_bytes": 1.5e9},
        {"max_seqs": 1.5},
        {"max_tokens": 1.5},
        {"kv_tile_tokens": (1.5,)},
        {"pool": 3},
        {"device": "nonsense"},
    ],
    ids=str,
)
def test_settings_of_the_wrong_kind(changes: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(changes))):
        build(**changes)


@pytest.mark.parametrize("slot", ["0", 0.0, 0.7])
def test_slots_that_are_no_integers(scene: Scene, slot: Any) -> None:
    scene.refuses(lambda: scene.cache.ensure(slot, 20), None, TypeError)


@pytest.mark.parametrize("tokens", [12.7, 2**40])
def test_lengths_in_a_list(scene: Scene, tokens: Any) -> None:
    scene.refuses(
        lambda: scene.cache.ensure_many([scene.a], [tokens]), str(tokens), (TypeError, ValueError)
    )


def test_a_pool_and_another_device() -> None:
    with pytest.raises(ValueError, match="device"):
        build(pool=vattn.PagePool(budget_bytes="1MiB"), device="cuda")


def test_the_environment_and_a_cache_without_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VATTN_BUDGET", "64KiB")
    assert build().stats().budget_bytes == 2**16
