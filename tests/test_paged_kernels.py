"""Paged kernels against a plain reference, over random block tables, with their real signatures."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bench.paged import flash_kernels, kernels
from bench.paged.calls import make_call
from bench.paged.flash_kernels import FlashKernel
from bench.paged.gather import SdpaGather
from bench.paged.gather_plan import Cost, Cuts
from bench.paged.kernels import PagedKernel, load_kernels
from tests.attention_reference import reference, spec_of, variants
from tests.models import one_thread
from tests.paged_installed import installed_kernels
from tests.paged_kernels import PagedRecorder
from tests.paged_world import run_mixed_steps, world_of
from vattn.attention import torch_flash
from vattn.attention.operators import Unavailable

CPU = torch.device("cpu")
VARIANTS = variants(spec_of())
FLASH = [kind for kind in kernels.kinds().values() if issubclass(kind, FlashKernel)]


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def recorder() -> PagedRecorder:
    return PagedRecorder()


@pytest.fixture
def installed(recorder: PagedRecorder, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with installed_kernels(recorder, monkeypatch):
        yield


def kernel_cases() -> list[Any]:
    cases = []
    for kind in FLASH:
        for name, spec in VARIANTS.items():
            if spec.softcap is None or kind.contiguous.has_softcap:
                cases += [
                    pytest.param(kind, name, appends, id=f"{kind.name}-{name}-{appends}")
                    for appends in ((True, False) if kind.name != "torch" else (False,))
                ]
    return cases


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("kind", "variant", "appends"), kernel_cases())
def test_flash_kernels(
    kind: type[FlashKernel], variant: str, appends: bool, recorder: PagedRecorder
) -> None:
    spec = VARIANTS[variant]
    kernel = kind.create([spec], CPU)
    assert kernel.appends == (kind.name != "torch")
    kernel.appends = appends
    recorder.calls.clear()
    recorder.multiple = kind.block_multiple
    world = world_of(kernel, [spec], kind.block_multiple)
    memory = {tensor.data_ptr() for tensor in world.cache.layer(0)}
    run_mixed_steps(world)
    assert {name for name, _ in recorder.calls} == {"decode", "chunks"}
    for _, arguments in recorder.calls:  # the blocks themselves, not a copy
        assert {arguments["k"].data_ptr(), arguments["v"].data_ptr()} == memory
    assert (recorder.appended > 0) == appends


# Gather -------------------------------------------------------------------------------------------

# Tokens of a block, and bytes of a piece: all at once, a block at a time, some of each.
SIZES = ((1, 1 << 13), (5, None), (16, 1), (16, 1 << 13), (64, None), (512, 1))


@pytest.mark.parametrize(("block_tokens", "piece_bytes"), SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gather(variant: str, block_tokens: int, piece_bytes: int | None) -> None:
    specs = [VARIANTS[variant], spec_of(kv_heads=1)]
    run_mixed_steps(world_of(SdpaGather(CPU, piece_bytes), specs, block_tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gather_in_other_dtypes(dtype: torch.dtype) -> None:
    run_mixed_steps(world_of(SdpaGather(CPU, 1 << 13), [spec_of(dtype=dtype)], 16))


@pytest.mark.parametrize("window", [None, 37])
def test_pieces_are_no_larger_than_asked(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for one block, and for the tail of one."""
    spec = spec_of(window=window)
    kernel, most = SdpaGather(CPU, 1 << 13), []
    gathered = SdpaGather._gather

    def watch(self: SdpaGather, source: torch.Tensor, blocks: torch.Tensor, *rest: int) -> Any:
        most.append(len(blocks) * source[0].nbytes)
        return gathered(self, source, blocks, *rest)

    monkeypatch.setattr(SdpaGather, "_gather", watch)
    world = world_of(kernel, [spec], 16)
    slots = [world.open() for _ in range(6)]
    world.step(
        (), [(slot, tokens) for slot, tokens in zip(slots, (500, 3, 90, 91, 17, 92), strict=True)]
    )
    most.clear()
    world.step(slots)
    assert len(most) > 2
    assert max(most) <= (1 << 13) + 2 * 16 * 128 + 16 * 128


def test_gather_does_not_read_what_is_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts without a past are computed from the new K and V, as ours are."""
    world = world_of(SdpaGather(CPU), [spec_of()], 16)
    monkeypatch.setattr(torch, "index_select", None)
    world.step((), [(world.open(), 20), (world.open(), 20), (world.open(), 9)])


def test_chunks_of_one_shape_share_a_call() -> None:
    world = world_of(SdpaGather(CPU), [spec_of()], 16)
    slots = [world.open() for _ in range(4)]
    world.step((), [(slot, 32) for slot in slots])
    step = world.prepare((), [(slot, 8) for slot in slots])
    world.backend.prepare(step, world.specs)
    (call,) = step.plan["calls"]
    ((groups, _),) = call.plan.values()
    assert [group.call.sequences for group in groups] == [4]


def test_decodes_are_sorted_by_length() -> None:
    """Groups of a gather need not be neighbours, so lengths far apart never share a call."""
    world = world_of(SdpaGather(CPU), [replace(spec_of(), kv_heads=4)], 16, max_tokens=600)
    slots = [world.open() for _ in range(6)]
    world.step((), [(slot, 500 if i % 2 else 40) for i, slot in enumerate(slots)])
    step = world.prepare(slots)
    cost = Cost(call_tokens=100, piece_tokens=None, may_merge=True)
    host = make_call(
        world.cache.tables.host[step.slots], step.kv_lens, step.query_lens, 16, CPU
    ).on_host()
    plan = Cuts().plan(host, 16, None, cost, CPU)
    assert [(group.first, group.last) for group in plan.groups] == [(0, 3), (3, 6)]
    assert plan.order is not None
    assert plan.order.tolist() == [0, 2, 4, 1, 3, 5]


# Kernels by themselves ----------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", list(kernels.kinds()))
@pytest.mark.parametrize("query_lens", [(1, 1, 1), (5, 33, 2)])
def test_kernels_without_an_engine(
    name: str, query_lens: tuple[int, ...], recorder: PagedRecorder
) -> None:
    """As the benchmark of kernels calls them."""
    spec = spec_of(heads=8, kv_heads=2)
    kernel = kernels.kinds()[name].create([spec], CPU)
    block = kernel.block_sizes(spec)[0]
    lens, random = (70, 300, 2), np.random.default_rng(2)
    k, v = (x.normal_() for x in kernel.empty(spec, 700, block, CPU))
    table = random.permutation(np.arange(1, 700))[: 3 * 200].reshape(3, -1)
    if block == 1:
        table = np.concatenate([random.permutation(np.arange(1, 700))[:300][None]] * 3)
    call = make_call(table, lens, query_lens, block, CPU)
    kernel.plan(call, [spec])
    query = torch.randn(sum(query_lens), 8, 16)
    out = kernel.attend(call, spec, query, k, v)
    row = 0
    for i, (tokens, n) in enumerate(zip(lens, query_lens, strict=True)):
        own = [x[table[i].astype(np.int64)].flatten(0, 1)[:tokens] for x in (k, v)]
        wanted = reference(query[row : row + n], own[0], own[1], scale=spec.scale)
        torch.testing.assert_close(out[row : row + n], wanted, rtol=2e-5, atol=2e-5)
        row += n


def test_block_sizes_are_those_that_kernels_take() -> None:
    spec = spec_of()
    for kind in kernels.kinds().values():
        for size in kind.block_sizes(spec):
            kind.check_block(size)
    with pytest.raises(ValueError, match=r"block_tokens=16: fa2 takes multiples of 256"):
        flash_kernels.PagedFlash2.check_block(16)
    with pytest.raises(ValueError, match="block_tokens=0"):
        SdpaGather.check_block(0)


@pytest.mark.parametrize(
    ("table", "kv_lens", "query_lens", "message"),
    [
        (np.zeros((1, 2)), [33], [1], "33 tokens need 3 blocks of 16"),
        (np.zeros((2, 2)), [3], [1], "2 rows of the table"),
        (np.zeros((1, 2)), [3], [4], r"query_lens=\[4\] have to be between 1 and kv_lens=\[3\]"),
        (np.zeros((1, 2)), [3], [0], r"query_lens=\[0\]"),
        (np.zeros((0, 2)), [], [], "0 rows of the table"),
    ],
)
def test_calls_that_cannot_be(table: Any, kv_lens: Any, query_lens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_call(table.astype(np.int32), kv_lens, query_lens, 16, CPU)


# What is absent -----------------------------------------------------------------------------------


def test_absent_kernels_have_reasons() -> None:
    found, missing = load_kernels(CPU, [spec_of()])
    anywhere = {"sdpa-gather", "sdpa-gather-whole"}
    assert set(found) == anywhere
    assert set(missing) == set(kernels.kinds()) - anywhere
    assert all("needs a CUDA device, not cpu" in reason for reason in missing.values())


@pytest.mark.parametrize("kind", [kind for kind in kernels.kinds().values() if kind.graphs])
def test_kernels_that_take_no_table_are_refused(
    kind: type[PagedKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(q: Any, k: Any = None) -> None:
        del q, k

    monkeypatch.setattr(flash_kernels, "python_function", lambda *_: without)
    monkeypatch.setattr(flash_kernels, "library_operator", lambda *_: without)
    monkeypatch.setattr(
        torch.ops.aten, "_flash_attention_forward", types.SimpleNamespace(default=without)
    )
    with pytest.raises(Unavailable, match=r"has no argument (block|page)_table"):
        kind.create([spec_of()], CPU)


def test_torch_of_this_version_takes_tables() -> None:
    assert torch_flash.load() is not None
    assert flash_kernels.PagedTorch.load() is not None
