"""The engine's backend over blocks: whole models, recorded graphs, and which kernel is chosen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from bench.paged import kernels, storage
from bench.paged.backends import PagedBackend
from bench.paged.cache import PagedCache
from bench.paged.flash_kernels import PagedFlash2, PagedFlash3, PagedTorch
from bench.paged.gather import SdpaGather
from bench.paged.kernels import PagedKernel
from bench.paged.select import BEST_BLOCK, choose_paged
from bench.paged.storage import paged_storage
from tests.attention_reference import spec_of
from tests.models import ENGINE_CONFIGS, VOCABULARY, engine_model, one_thread
from tests.recorded_graph import RecordedGraph, _chunks, _decode
from vattn import LLM, SamplingParams
from vattn.attention.base import AttentionSpec, Step, UnsupportedAttention
from vattn.attention.flash import FlashBackend
from vattn.attention.flash_attn import Flash2Kernels
from vattn.attention.flash_attn_3 import Flash3Kernel
from vattn.attention.flash_calls import DecodeTensors
from vattn.engine import buckets, graphs
from vattn.kv.layout import LayerSpec

CPU = torch.device("cpu")
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with one_thread():
        yield


@functools.cache
def model(family: str) -> Any:
    return engine_model(family)


def prompts() -> list[list[int]]:
    """Of many lengths; the last two begin alike."""
    random = np.random.default_rng(4)
    out = [random.integers(2, VOCABULARY, n).tolist() for n in (3, 50, 17, 90, 33)]
    return [*out, [*out[3][:70], 5, 6, 7]]


def generate(family: str, **options: Any) -> tuple[list[list[int]], Any]:
    """Tokens of all prompts, twice: the second time prefixes are cached."""
    llm = LLM(
        model(family),
        skip_tokenizer_init=True,
        max_model_len=160,
        max_num_seqs=4,
        max_num_batched_tokens=48,
        kv_cache_memory_bytes=1 << 24,
        **options,
    )
    outs = []
    for _ in range(2):
        given = [{"prompt_token_ids": ids} for ids in prompts()]
        done = llm.generate(given, GREEDY, use_tqdm=False)
        outs += [list(request.outputs[0].token_ids) for request in done]
    stats = llm.engine.runner.graph_stats
    llm.close()
    return outs, stats


@functools.cache
def wanted(family: str) -> list[list[int]]:
    return generate(family)[0]


@pytest.mark.parametrize(
    ("family", "block_tokens"),
    [*((family, None) for family in ENGINE_CONFIGS), ("gemma3", 7), ("gpt_oss", 7)],
)
def test_tokens_are_those_of_the_contiguous_cache(family: str, block_tokens: int | None) -> None:
    assert generate(family, storage=paged_storage(block_tokens))[0] == wanted(family)


# Graphs -------------------------------------------------------------------------------------------


def _blocks(k: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return k[table.long()].flatten(1, 2)


def _kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_batch_idx: None,
    num_splits: int,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nothing but tensor operations, so that it can be recorded."""
    assert (cache_batch_idx, num_splits) == (None, 0)
    table = block_table if page_table is None else page_table
    assert table is not None
    lens, size = cache_seqlens.long(), k_cache.shape[1]
    if k is not None and v is not None:
        block = table.gather(1, (lens // size).unsqueeze(1)).squeeze(1).long()
        k_cache.index_put_((block, lens % size), k[:, 0])
        v_cache.index_put_((block, lens % size), v[:, 0])
        lens = lens + 1
    key, value = _blocks(k_cache, table), _blocks(v_cache, table)
    if cu_seqlens_q is not None:
        return _chunks(q, list(zip(key, value, strict=True)), cu_seqlens_q, lens, **options)
    out, lse = _decode(q[:, 0], key, value, lens, **options)
    return out[:, None], lse[..., None]


def _varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = _blocks(k, block_table), _blocks(v, block_table)
    if max_seqlen_q == 1:
        out, lse = _decode(q, key, value, seqused_k.long(), **options)
        return out, lse.transpose(0, 1)
    sequences = list(zip(key, value, strict=True))
    return _chunks(q, sequences, cu_seqlens_q, seqused_k.long(), **options)


def _aten(**given: Any) -> Any:
    return _varlen(
        given["query"],
        given["key"],
        given["value"],
        given["cum_seq_q"],
        given["cum_seq_k"],
        given["max_q"],
        given["max_k"],
        given["seqused_k"],
        given["block_table"],
        softmax_scale=given["scale"],
        window=(given["window_size_left"], given["window_size_right"]),
        softcap=0.0,
    )


RECORDABLE: dict[str, Callable[[], PagedKernel]] = {
    "fa2": lambda: PagedFlash2(Flash2Kernels(_kvcache, _varlen, appends=False)),
    "fa2-appends": lambda: PagedFlash2(Flash2Kernels(_kvcache, _varlen, appends=True)),
    "fa3": lambda: PagedFlash3(Flash3Kernel(_kvcache, appends=False, knows_sinks=False)),
    "fa3-appends": lambda: PagedFlash3(Flash3Kernel(_kvcache, appends=True, knows_sinks=False)),
    "torch": lambda: PagedTorch(_aten),
}
# With a softcap, with windows, and with sinks, which are added to what kernels return.
GRAPHS = [
    ("gemma2", "fa2"),
    *(("gemma3", name) for name in RECORDABLE),
    *(("gpt_oss", name) for name in ("fa2-appends", "fa3", "torch")),
]


@pytest.mark.parametrize(("family", "name"), GRAPHS)
def test_recorded_decodes_find_the_blocks_of_each_step(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "_SHORTEST", 32)
    monkeypatch.setattr(graphs, "graph_maker", lambda device: RecordedGraph)
    monkeypatch.setattr(storage, "can_capture", lambda device: True)
    for kind in (PagedFlash2, PagedFlash3, PagedTorch):
        monkeypatch.setattr(kind, "block_multiple", 1)

    def chosen(specs: Any, device: torch.device, kernel: str | None = None) -> PagedBackend:
        return PagedBackend(RECORDABLE[name](), specs, device)

    monkeypatch.setattr(storage, "choose_paged", chosen)
    made = paged_storage(16)
    tokens, stats = generate(family, storage=made, cudagraph_capture_sizes=[1, 2, 4])
    assert tokens == wanted(family)
    assert stats.captured
    assert stats.replayed
    assert stats.padded_rows


def tiny_cache(block_tokens: int = 16, order: Any = "token") -> PagedCache:
    return PagedCache(
        [LayerSpec(2, 16, torch.float32, None)],
        device="cpu",
        max_seqs=4,
        max_tokens=64,
        num_blocks=20,
        block_tokens=block_tokens,
        order=order,
    )


def decode_step(cache: PagedCache) -> Step:
    one = np.ones(1, np.int32)
    slot = cache.open()
    cache.ensure([slot], [1])
    return Step(cache, np.array([slot], np.int32), one, one, 1)  # type: ignore[arg-type]


def test_kernels_that_plan_on_the_host_are_not_recorded() -> None:
    backend = choose_paged([spec_of()], CPU)
    assert not backend.graphs
    none = torch.zeros(1)
    tensors = DecodeTensors(none, none, none, {}, none, none, none, 1)
    with pytest.raises(ValueError, match="decodes of sdpa-gather cannot be recorded"):
        backend.prepare_decode(decode_step(tiny_cache()), tensors)


def test_blocks_that_the_kernel_does_not_take() -> None:
    spec = spec_of()
    backend = PagedBackend(RECORDABLE["fa2"](), [spec], CPU)
    with pytest.raises(ValueError, match=r"block_tokens=16: fa2 takes multiples of 256"):
        backend.prepare(decode_step(tiny_cache()), [spec])
    backend = PagedBackend(SdpaGather(), [spec], CPU)
    with pytest.raises(ValueError, match='needs blocks in order="token", not "head"'):
        backend.prepare(decode_step(tiny_cache(order="head")), [spec])


# Which kernel -------------------------------------------------------------------------------------


def test_every_kernel_has_a_block_size_that_it_takes() -> None:
    kinds = kernels.kinds()
    assert set(BEST_BLOCK) == set(kinds)
    for name, kind in kinds.items():
        assert BEST_BLOCK[name] in kind.block_sizes(spec_of())


def test_the_cpu_has_one_kernel() -> None:
    backend = choose_paged([spec_of()], CPU)
    assert (backend.name, backend.order, backend.append_mode) == (
        "sdpa-gather",
        "token",
        "index_put",
    )
    assert backend.refusal(spec_of(dtype=torch.int8), CPU) is not None


def test_what_cannot_be_chosen() -> None:
    with pytest.raises(UnsupportedAttention, match=r"fa2: layer 0: needs a CUDA device, not cpu"):
        choose_paged([spec_of()], CPU, "fa2")
    with pytest.raises(ValueError, match=r"kernel='fa4' is not one of fa3, vllm-fa3"):
        choose_paged([spec_of()], CPU, "fa4")
    with pytest.raises(ValueError, match="specs is empty"):
        choose_paged([], CPU)
    odd = spec_of(dtype=torch.int8)
    with pytest.raises(UnsupportedAttention) as caught:
        choose_paged([odd], CPU)
    for name in kernels.kinds():
        assert f"{name}: layer 0: " in str(caught.value)


def _without_loading(kind: Any, specs: Any, device: torch.device) -> Any:
    del specs, device
    return object.__new__(kind)


def test_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the first that is installed and can serve the layers."""
    monkeypatch.setattr("vattn.attention.flash.capability", lambda device: (9, 0))
    cuda = torch.device("cuda")
    for kind in kernels.kinds().values():
        monkeypatch.setattr(kind, "create", classmethod(_without_loading))
    half: AttentionSpec = spec_of(head_dim=64, dtype=torch.bfloat16)
    assert choose_paged([half], cuda).name == "fa3"
    assert choose_paged([half], cuda, "flashinfer").name == "flashinfer"
    monkeypatch.setattr(
        FlashBackend, "refusal", classmethod(lambda cls, spec, device: "not on this device")
    )
    assert choose_paged([half], cuda).name == "sdpa-gather"
