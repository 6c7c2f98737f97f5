"""Decode steps as graphs give what eager steps give, whatever happens to pages between replays."""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import ENGINE_CONFIGS, PAGE, VOCABULARY, engine_model, one_thread
from tests.recorded_graph import (
    RecordedGraph,
    flash2,
    flash3,
    refusal,
    torch_flash,
    vllm_flash3,
)
from vattn import LLM, KVCache, PagePool, SamplingParams
from vattn.attention.flash import FlashBackend
from vattn.attention.select import choose
from vattn.attention.upload import Ring, Uploader
from vattn.engine import buckets, graphs, runner, setup
from vattn.engine.batch import SAMPLED, StepBatch
from vattn.engine.buckets import Bucket
from vattn.engine.cuda_graph import Graph
from vattn.engine.runner import GraphStats, ModelRunner
from vattn.hf.model import LoadedModel, load_model

SLOTS, MAX_TOKENS = 9, 128
SIZES = (1, 2, 4, 6)
FEWER_SIZES = (2, 4)  # quicker to capture
LENGTHS = (32, 128)  # buckets


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setattr(buckets, "_SHORTEST", LENGTHS[0])
        patch.setattr(graphs, "graph_maker", lambda device: RecordedGraph)
        yield


class Event:
    """Done when it is recorded."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


def ring_uploader(device: torch.device) -> Uploader:
    """One that packs, as on a GPU."""
    return Uploader(device, Ring(pin=lambda n: torch.empty(n, dtype=torch.uint8), event=Event))


def batch_of(slots: Any, ends: Any, ids: Any) -> StepBatch:
    """A step of decodes."""
    slots = np.asarray(slots, np.int32)
    return StepBatch(
        slots=slots,
        query_lens=np.ones(len(slots), np.int32),
        kv_lens=np.asarray(ends, np.int32),
        num_decodes=len(slots),
        input_ids=np.asarray(ids, np.int64),
        logit_rows=np.arange(len(slots)),
        sample_slots=slots.astype(np.int64),
    )


def chunk_of(slot: int, ids: Any) -> StepBatch:
    """A step of one whole prompt."""
    n = np.array([len(ids)], np.int32)
    return StepBatch(
        slots=np.array([slot], np.int32),
        query_lens=n,
        kv_lens=n,
        num_decodes=0,
        input_ids=np.asarray(ids, np.int64),
        logit_rows=np.array([len(ids) - 1]),
        sample_slots=np.array([slot], np.int64),
    )


class Twins:
    """The same steps by graphs and by SDPA, eagerly, in caches of their own."""

    def __init__(
        self, loaded: LoadedModel, backend: FlashBackend | None = None, **options: Any
    ) -> None:
        specs = loaded.layer_specs()
        backend = backend or flash2(loaded.specs)
        # Holes read as zeros; a write to what is not mapped ends the process.
        self.cache = KVCache(
            specs,
            max_seqs=SLOTS,
            max_tokens=MAX_TOKENS,
            pool=PagePool(page_bytes=PAGE),
            order="token",
            kv_tile_tokens=16,  # less than the kernels', which the stand-ins do not need
        )
        self.plain_cache = KVCache(
            specs, max_seqs=SLOTS, max_tokens=MAX_TOKENS, pool=PagePool(page_bytes=PAGE)
        )
        self.scratch = SLOTS - 1
        self.cache.open(slot=self.scratch)
        self.cache.ensure(self.scratch, 1)
        settings: dict[str, Any] = {
            "max_num_seqs": SIZES[-1],
            "max_model_len": LENGTHS[-1],
            "scratch_slot": self.scratch,
            "capture_sizes": FEWER_SIZES,
            "graphs": True,
        }
        self.runner = ModelRunner(loaded, self.cache, backend, **settings | options)
        self.runner.capture()
        self.plain = ModelRunner(loaded, self.plain_cache, choose(loaded.specs, loaded.device))
        self.random = np.random.default_rng(3)
        self.lens: dict[int, int] = {}

    def ids(self, n: int) -> Any:
        return self.random.integers(2, VOCABULARY, n)

    def open(self, slot: int, tokens: int) -> None:
        """A sequence with a random prompt."""
        for cache in (self.cache, self.plain_cache):
            cache.open(slot=slot)
        self.lens[slot] = 0
        self.both(chunk_of(slot, self.ids(tokens)), [slot], [tokens])

    def release(self, slot: int) -> None:
        for cache in (self.cache, self.plain_cache):
            cache.release(slot)
        del self.lens[slot]

    def truncate(self, slot: int, tokens: int) -> None:
        for cache in (self.cache, self.plain_cache):
            cache.truncate(slot, tokens)
        self.lens[slot] = tokens

    def decode(self, slots: Any) -> torch.Tensor:
        """A token for each; the logits, which are the same."""
        slots = sorted(slots)
        ends = [self.lens[slot] + 1 for slot in slots]
        return self.both(batch_of(slots, ends, self.ids(len(slots))), slots, ends)

    def both(self, batch: StepBatch, slots: Any, ends: Any) -> torch.Tensor:
        ends = np.asarray(ends, np.int32)
        for cache in (self.cache, self.plain_cache):
            cache.ensure_many(batch.slots, ends)
        logits = self.runner.run(batch)
        wanted = self.plain.run(batch)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        self.lens.update(zip(slots, ends.tolist(), strict=True))
        return logits

    def snapshot(self) -> list[torch.Tensor]:
        """All that the caches of open slots hold, the scratch slot's aside."""
        return [
            tensor.clone()
            for slot in sorted(self.lens)
            for layer in range(len(self.cache.specs))
            for tensor in self.cache.view(slot, layer)
        ]

    def replayed(self) -> int:
        return self.runner.graph_stats.replayed


@functools.cache
def model(family: str = "llama") -> LoadedModel:
    """Shared: runners leave models as they are."""
    made = engine_model(family)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith("sinks"):
                weight.copy_(weight.bfloat16())  # some kernels take them so
    return load_model(made)


def twins(family: str = "llama", **options: Any) -> Twins:
    return Twins(model(family), **options)


# What is computed ---------------------------------------------------------------------------------


BACKENDS: dict[str, Callable[..., FlashBackend]] = {
    "flash2": flash2,
    "flash2-appends": functools.partial(flash2, appends=True),
    "flash3": flash3,
    "flash3-appends": functools.partial(flash3, appends=True),
    "torch": torch_flash,
    "vllm_flash3": vllm_flash3,
}
CASES = [
    *((family, "flash2") for family in ENGINE_CONFIGS),
    *((family, "torch") for family in ENGINE_CONFIGS if family != "gemma2"),  # no softcap
    *(
        (family, backend)
        for family in ("gemma3", "gpt_oss")
        for backend in BACKENDS
        if backend not in ("flash2", "torch")
    ),
]


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_replays_equal_eager_steps(family: str, backend: str) -> None:
    pair = Twins(model(family), BACKENDS[backend](model(family).specs))
    for slot, tokens in ((6, 20), (0, 41), (3, 1), (4, 60)):  # shorter and longer than a window
        pair.open(slot, tokens)
    for _ in range(12):  # beyond the window, and from one bucket of lengths to the next
        pair.decode([0, 3, 4, 6])
        pair.decode([3, 6])
    assert pair.replayed() == 24
    pair.cache.check()


@pytest.mark.parametrize("n", range(1, 9))
def test_every_number_of_rows(n: int) -> None:
    """Below, at and above each bucket's; above the largest, steps are eager."""
    pair = twins(capture_sizes=SIZES)
    for slot in range(n):
        pair.open(slot, 5 + slot)
    eager = pair.runner.graph_stats.eager
    pair.decode(range(n))
    rows = next((size for size in SIZES if size >= n), None)
    assert pair.runner.graph_stats == GraphStats(
        captured=len(SIZES) * len(LENGTHS),
        replayed=int(rows is not None),
        eager=eager + (rows is None),
        padded_rows=0 if rows is None else rows - n,
    )


@pytest.mark.parametrize(("tokens", "longest"), [(31, 32), (32, 32), (33, 128), (128, 128)])
def test_every_length(tokens: int, longest: int) -> None:
    """`tokens` counts the new one."""
    pair = twins()
    pair.open(2, tokens - 1)
    pair.open(5, 3)
    batch = batch_of([2, 5], [tokens, 4], [1, 1])
    assert pair.runner._graphs is not None
    assert pair.runner._graphs.bucket(batch) == Bucket(2, longest)
    pair.decode([2, 5])
    assert pair.replayed() == 1


def test_mixed_steps_are_eager() -> None:
    pair = twins()
    pair.open(2, 10)
    before = pair.runner.graph_stats
    batch = dataclasses.replace(
        chunk_of(4, pair.ids(6)),
        slots=np.array([2, 4], np.int32),
        query_lens=np.array([1, 6], np.int32),
        kv_lens=np.array([11, 6], np.int32),
        num_decodes=1,
        input_ids=pair.ids(7),
        logit_rows=np.array([0, 6]),
        sample_slots=np.array([2, 4]),
    )
    for cache in (pair.cache, pair.plain_cache):
        cache.open(slot=4)
    pair.both(batch, [2, 4], [11, 6])
    assert pair.runner.graph_stats == dataclasses.replace(before, eager=before.eager + 1)
    pair.decode([2, 4])
    assert pair.replayed() == 1


def test_logits_that_were_written_to_do_not_matter() -> None:
    pair = twins()
    pair.open(0, 7)
    pair.decode([0]).fill_(float("nan"))
    pair.decode([0])


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_padding_touches_no_other_slot(family: str) -> None:
    pair = twins(family)
    for slot in (0, 1, 6, 7):  # the first and the last, and neighbours of theirs
        pair.open(slot, 14)
    for slots in ((0, 1, 6), (7,), (0, 6, 7)):
        before, fresh = pair.snapshot(), {slot: pair.lens[slot] for slot in slots}
        pair.decode(slots)
        for slot, tokens in fresh.items():
            pair.truncate(slot, tokens)
        for old, new in zip(before, pair.snapshot(), strict=True):
            assert torch.equal(old, new)
    assert pair.runner.graph_stats.padded_rows == 3
    assert pair.cache.tokens(pair.scratch) == 1


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_pages_change_beneath_the_graphs(family: str) -> None:
    """Slots are released and reused, their pages unmapped, shared, copied and mapped elsewhere."""
    pair = twins(family)
    random = np.random.default_rng(8)
    for slot in (0, 2, 5):
        pair.open(slot, 30)
    for turn in range(8):
        pair.decode(pair.lens)
        oldest = sorted(pair.lens)[turn % len(pair.lens)]
        pair.release(oldest)
        if turn % 3 == 0:
            pair.cache.trim()  # unmaps every page that is not needed, returns them to the system
        pair.decode(pair.lens)
        free = [slot for slot in range(SLOTS - 1) if slot not in pair.lens]
        pair.open(int(random.choice(free)), int(random.integers(1, 50)))
        pair.decode(pair.lens)
    pair.cache.check()
    assert pair.replayed() == 24


def test_forks_share_pages_beneath_the_graphs() -> None:
    pair = twins()
    pair.open(0, 45)
    forks = {int(cache.fork(0)) for cache in (pair.cache, pair.plain_cache)}
    assert len(forks) == 1
    fork = forks.pop()
    pair.lens[fork] = pair.lens[0]
    for _ in range(10):
        pair.decode([0, fork])
        pair.decode([fork])
    assert pair.replayed() == 20


# Tokens that stay on the device -------------------------------------------------------------------


@pytest.mark.parametrize("by_graphs", [True, False])
def test_sampled_tokens_are_read_on_the_device(by_graphs: bool) -> None:
    pair = twins(graphs=by_graphs)
    for slot in (1, 3, 4):
        pair.open(slot, 9 + slot)
    tokens = torch.tensor([5, 17, 60])
    pair.decode([1, 3, 4])
    batch = batch_of([1, 3, 4], [pair.lens[s] for s in (1, 3, 4)], [0, 0, 0])
    with pytest.raises(ValueError, match="another step"):
        pair.runner.remember(batch, tokens)
    known = {slot: pair.lens[slot] + 1 for slot in (1, 3, 4)}
    pair.cache.ensure_many(batch.slots, batch.kv_lens)
    pair.runner.run(batch)
    pair.runner.remember(batch, tokens)
    # What the same step gives with the tokens themselves; a slot more, whose token is known.
    pair.open(6, 12)
    slots, ends = [1, 3, 4, 6], [*known.values(), 13]
    for cache in (pair.cache, pair.plain_cache):
        cache.ensure_many(np.array(slots, np.int32), np.array(ends, np.int32))
    wanted = pair.runner.run(batch_of(slots, ends, [5, 17, 60, 2])).clone()
    logits = pair.runner.run(batch_of(slots, ends, [SAMPLED, 17, SAMPLED, 2]))
    assert torch.equal(logits, wanted)
    other = pair.runner.run(batch_of(slots, ends, [5, 17, 61, 2]))
    assert not torch.equal(other[2], wanted[2])


def test_a_prompt_s_first_token_is_remembered() -> None:
    pair = twins()
    chunk = chunk_of(3, pair.ids(10))
    pair.cache.open(slot=3)
    pair.cache.ensure(3, 11)
    pair.runner.run(chunk)
    pair.runner.remember(chunk, torch.tensor([44]))
    wanted = pair.runner.run(batch_of([3], [11], [44])).clone()
    assert torch.equal(pair.runner.run(batch_of([3], [11], [SAMPLED])), wanted)
    assert not torch.equal(pair.runner.run(batch_of([3], [11], [45])), wanted)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_engine_gives_the_same_text(
    family: str, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more prompts than run at once, so that slots change hands; also one step ahead."""

    def texts(**options: Any) -> tuple[list[Any], GraphStats]:
        llm = LLM(
            engine_model(family),
            max_model_len=LENGTHS[-1],
            max_num_seqs=4,
            page_bytes=PAGE,
            skip_tokenizer_init=True,
            **options,
        )
        prompts = [{"prompt_token_ids": [5, 6, 7, 8 + i] * (i + 1)} for i in range(7)]
        params = SamplingParams(max_tokens=24, temperature=0)
        outs = llm.generate(prompts, params, use_tqdm=False)
        return [out.outputs[0].token_ids for out in outs], llm.engine.runner.graph_stats

    wanted, stats = texts(enforce_eager=True)
    assert stats.captured == 0
    monkeypatch.setattr(setup, "can_capture", lambda device: True)
    monkeypatch.setattr(setup, "choose", lambda specs, *_, **__: flash2(specs))
    given, stats = texts(async_scheduling=ahead, cudagraph_capture_sizes=[1, 4])
    assert given == wanted
    assert stats.captured == 2 * len(LENGTHS)
    assert stats.replayed > 40
    assert stats.padded_rows > 0


# One transfer, no wait ----------------------------------------------------------------------------


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts copies from pinned memory, and fails where the host would wait."""

    def __init__(self, pinned: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pinned = pinned
        self.transfers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = f"{func._schema.name.split('::')[1]}.{func._schema.overload_name}"
        assert refusal(name, (args, kwargs)) is None
        if name.startswith("copy_") and args[1].untyped_storage().data_ptr() in self.pinned:
            assert (kwargs or {}).get("non_blocking") or args[2:] == (True,)
            self.transfers += 1
        return func(*args, **(kwargs or {}))


def test_a_step_is_one_transfer_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: set[int] = set()
    made = []

    def pin(n: int) -> torch.Tensor:
        made.append(torch.empty(n, dtype=torch.uint8))
        pinned.add(made[-1].untyped_storage().data_ptr())
        return made[-1]

    monkeypatch.setattr(
        runner, "Uploader", lambda device: Uploader(device, Ring(pin=pin, event=Event))
    )
    pair = twins()
    for slot in (0, 2, 5):
        pair.open(slot, 10)
    for _ in range(8):
        pair.decode([0, 2, 5])
    buffers = len(made)
    batch = batch_of([0, 2, 5], [pair.lens[slot] + 1 for slot in (0, 2, 5)], [SAMPLED, 3, SAMPLED])
    pair.cache.ensure_many(batch.slots, batch.kv_lens)
    tokens = torch.tensor([7, 8, 9])
    replayed = pair.replayed()
    with Watch(pinned) as watch:
        pair.runner.run(batch)
        assert watch.transfers == 1
        pair.runner.remember(batch, tokens)
    assert watch.transfers == 1
    assert len(made) == buffers  # nothing was allocated
    assert pair.replayed() == replayed + 1


def test_packed_uploads_serve_eager_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of all dtypes and shapes, none of them too, through pinned memory."""
    monkeypatch.setattr(runner, "Uploader", ring_uploader)
    pair = twins("gemma3", graphs=False)
    pair.open(0, 40)
    pair.open(7, 3)
    pair.decode([0, 7])
    assert pair.runner.graph_stats.eager == 3


# What cannot be captured --------------------------------------------------------------------------


def asks_the_device(of: Any) -> Callable[..., Any]:
    def forward(**arguments: Any) -> Any:
        if arguments["position_ids"].max().item() > 10**6:
            raise AssertionError("unreachable")
        return of(**arguments)

    return forward


def test_a_model_that_cannot_be_captured_runs_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    loaded = model()
    with caplog.at_level(logging.WARNING):
        pair = Twins(loaded, forward=asks_the_device(loaded.model))
    [record] = caplog.records
    assert "cannot be captured" in record.message
    assert "item" in record.message
    assert "enforce_eager=True" in record.message
    pair.open(0, 10)
    pair.decode([0])
    assert pair.runner.graph_stats == GraphStats(captured=0, replayed=0, eager=2, padded_rows=0)


class Failing:
    """A graph whose capture fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def capture(self, work: Callable[[], object]) -> None:
        raise self.error

    def replay(self) -> None:
        raise AssertionError("unreachable")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("CUDA error: out of memory")]
)
def test_too_little_memory_is_told(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "graph_maker", lambda device: lambda: Failing(error))
    with pytest.raises(type(error)) as caught:
        twins()
    assert "cudagraph_capture_sizes" in caught.value.__notes__[0]
    assert gc.isenabled()


def test_a_device_that_failed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no matter of capturing if the same work fails without."""
    loaded, calls = model(), []

    def forward(**arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return loaded.model(**arguments)

    with pytest.raises(RuntimeError, match="illegal memory access"):
        Twins(loaded, forward=forward)


def test_capture_order_and_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each bucket is run once and then captured, the largest first."""
    loaded, rows = model(), []

    def forward(**arguments: Any) -> Any:
        rows.append(arguments["input_ids"].shape[1])
        assert not gc.isenabled()
        return loaded.model(**arguments)

    pair = Twins(loaded, forward=forward, capture_sizes=SIZES)
    assert rows == [size for size in reversed(SIZES) for _ in range(2 * len(LENGTHS))]
    assert gc.isenabled()
    assert capsys.readouterr().err == ""
    pair.runner.capture(show_progress=True)
    shown = capsys.readouterr().err
    assert "Capturing CUDA graphs: 100%" in shown
    assert "8/8" in shown


@pytest.mark.parametrize("missing", ["max_num_seqs", "max_model_len", "scratch_slot"])
def test_graphs_need_settings(missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        Twins(model(), **{missing: None})


def test_a_backend_without_graphs_is_refused() -> None:
    backend: Any = flash2(model().specs)
    backend.graphs = False
    with pytest.raises(ValueError, match="flash_attn_2 cannot be captured"):
        Twins(model(), backend)


def test_only_gpus_have_graphs() -> None:
    assert graphs.can_capture(torch.device("cuda", 1))
    assert not graphs.can_capture(torch.device("cpu"))


def test_the_stand_in_is_a_graph() -> None:
    graph: Graph = RecordedGraph()
    total, given, two = torch.zeros(()), torch.ones(4), torch.full((4,), 2.0)
    graph.capture(lambda: total.copy_((given * two).sum()))
    given.fill_(3)
    graph.replay()
    assert total == 24
    refused: list[Callable[[], object]] = [
        lambda: total.item(),
        lambda: given.tolist(),
        lambda: given[given > 0],
        lambda: bool(total > 0),
        lambda: torch.tensor([1.0]) + given,
    ]
    for work in refused:
        with pytest.raises(RuntimeError, match="not permitted"):
            RecordedGraph().capture(work)
