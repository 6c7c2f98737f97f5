"""Choosing a backend, and cutting decodes into calls."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.attention_reference import spec_of
from vattn.attention import flash, select
from vattn.attention.base import UnsupportedAttention
from vattn.attention.batching import Reads, split
from vattn.attention.operators import Unavailable
from vattn.attention.select import BACKENDS, choose
from vattn.attention.torch_flash import TorchFlashBackend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF = spec_of(dtype=torch.bfloat16, head_dim=64)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of compute capability 9.0 on which only PyTorch's own kernels are installed."""

    def missing(*args: object) -> None:
        raise Unavailable(f"{args[0]} is not installed")

    monkeypatch.setattr(flash, "capability", lambda device: (9, 0))
    for module in ("flash_attn", "flash_attn_3"):
        monkeypatch.setattr(f"vattn.attention.{module}.python_function", missing)
        monkeypatch.setattr(f"vattn.attention.{module}.library_operator", missing)


def test_a_cpu_gets_sdpa() -> None:
    backend = choose([spec_of(), spec_of(softcap=30.0, sinks=True)], CPU)
    assert (backend.name, backend.kv_tile_tokens, backend.order) == ("sdpa", (1,), None)


@pytest.mark.usefixtures("hopper")
def test_the_first_that_serves_all_layers() -> None:
    backend = choose([HALF, replace(HALF, window=100, sinks=True)], CUDA)
    assert isinstance(backend, TorchFlashBackend)
    assert (backend.kv_tile_tokens, backend.order) == ((256,), "token")
    # One layer that it cannot serve, and another backend serves them all.
    assert choose([HALF, replace(HALF, softcap=30.0)], CUDA).name == "sdpa"
    assert choose([HALF], CUDA, order="head").name == "sdpa"
    assert choose([HALF], CUDA, name="sdpa").kv_tile_tokens == (64,)


@pytest.mark.usefixtures("hopper")
def test_nobody_serves() -> None:
    with pytest.raises(UnsupportedAttention) as error:
        choose([HALF, replace(HALF, dtype=torch.float8_e4m3fn)], CUDA)
    for name in BACKENDS:
        assert f"{name}: layer 1: " in str(error.value)
    with pytest.raises(UnsupportedAttention, match=r"flash_attn_2: .* is not installed"):
        choose([HALF], CUDA, name="flash_attn_2")
    with pytest.raises(UnsupportedAttention, match='torch: needs order="token", not "head"'):
        choose([HALF], CUDA, order="head", name="torch")


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"'flash' is not one of flash_attn_3, .*, sdpa"):
        choose([HALF], CPU, name="flash")
    with pytest.raises(ValueError, match="specs is empty"):
        choose([], CPU)


def test_names_are_the_backends_own() -> None:
    assert all(name == kind.name for name, kind in select.BACKENDS.items())


def test_importing_imports_no_kernels() -> None:
    code = (
        "import sys, vattn.attention.select; print([m for m in sys.modules "
        "if m.split('.')[0] in ('flash_attn', 'flash_attn_interface', 'vllm', 'flashinfer')])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.strip() == "[]"


# Calls --------------------------------------------------------------------------------------------


def reads(slots: list[int], begin: list[int], end: list[int], tile: int | None = None) -> Reads:
    s, b, e = (np.array(x, np.int64) for x in (slots, begin, end))
    if tile is None:
        return Reads(s, b, e)
    return Reads(s, b, e, b // tile * tile, -(-e // tile) * tile)


def cost(of: Reads, calls: list[tuple[int, int]], call_tokens: float) -> float:
    total = 0.0
    for first, last in calls:
        rows = slice(first, last)
        part = Reads(
            of.slots[rows],
            of.begin[rows],
            of.end[rows],
            None if of.lowest is None else of.lowest[rows],
            None if of.highest is None else of.highest[rows],
        )
        if not part.may_share():
            return np.inf
        span = part.slots[-1] - part.slots[0] + 1
        total += call_tokens + float(span * (part.end.max() - part.begin.min()))
    return total


def every_cut(n: int) -> list[list[tuple[int, int]]]:
    cuts = []
    for chosen in itertools.product((False, True), repeat=n - 1):
        bounds = [0, *(i + 1 for i, cut in enumerate(chosen) if cut), n]
        cuts.append(list(itertools.pairwise(bounds)))
    return cuts


@pytest.mark.parametrize("tile", [None, 1, 16])
def test_the_cut_costs_least(tile: int | None) -> None:
    random = np.random.default_rng(0)
    for _ in range(40):
        n = int(random.integers(1, 9))
        slots = sorted(random.choice(12, n, replace=False).tolist())
        end = random.integers(1, 100, n)
        begin = np.maximum(end - int(random.integers(1, 150)), 0)
        of = reads(slots, begin.tolist(), end.tolist(), tile)
        call_tokens = float(random.integers(1, 120))
        least = min(cost(of, cut, call_tokens) for cut in every_cut(n))
        calls = split(of, call_tokens)
        assert [row for first, last in calls for row in range(first, last)] == list(range(n))
        # One call for all is taken where it wastes less than another call costs.
        assert cost(of, calls, call_tokens) == least or calls == [(0, n)]
        assert cost(of, calls, call_tokens) < least + call_tokens


def test_equal_neighbours_are_one_call() -> None:
    assert split(reads(list(range(300)), [0] * 300, [500] * 300), 10.0) == [(0, 300)]
    assert split(reads(list(range(300)), [0] * 300, [500] * 300, tile=1), 10.0) == [(0, 300)]


def test_what_faults_is_not_read() -> None:
    """A hole, another tile, or a window that begins elsewhere end a call, however cheap."""
    free = 1e9
    assert split(reads([0, 1, 3], [0] * 3, [9] * 3, tile=16), free) == [(0, 2), (2, 3)]
    assert split(reads([0, 1, 2], [0] * 3, [9, 16, 17], tile=16), free) == [(0, 2), (2, 3)]
    by_window = split(reads([0, 1, 2], [0, 15, 16], [30, 31, 32], tile=16), free)
    assert by_window == [(0, 2), (2, 3)]
    assert split(reads([0, 1, 3], [0] * 3, [9, 40, 9]), free) == [(0, 3)]
