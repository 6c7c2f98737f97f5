"""Packed steps give the logits that the plain model gives for each sequence on its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import ENGINE_CONFIGS, PAGE, VOCABULARY, engine_model, one_thread
from vattn import KVCache, PagePool
from vattn.attention.base import Step
from vattn.attention.select import choose
from vattn.engine.batch import StepBatch
from vattn.engine.runner import ModelRunner
from vattn.hf.attention import StepMissing
from vattn.hf.model import LoadedModel, load_model

FAMILY = pytest.mark.parametrize("family", ENGINE_CONFIGS)
LENGTHS = (40, 61, 17, 33)  # longer and shorter than the window
SLOTS = (6, 0, 3, 4)  # with holes between, and not in the order of the sequences
CHUNKS = (9, 7, 5, 20)


@pytest.fixture(autouse=True)
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


class Run:
    """Four sequences, each first prefilled in chunks and then decoded, in steps that mix both."""

    def __init__(self, loaded: LoadedModel, backend: Any = None, max_tokens: int = 128) -> None:
        pool = PagePool(page_bytes=PAGE, strict=True)
        self.cache = KVCache(loaded.layer_specs(), max_seqs=8, max_tokens=max_tokens, pool=pool)
        self.runner = ModelRunner(
            loaded, self.cache, backend or choose(loaded.specs, loaded.device)
        )
        generator = np.random.default_rng(5)
        self.tokens = [generator.integers(2, VOCABULARY, n) for n in LENGTHS]
        self.done = [0] * len(LENGTHS)
        for slot in SLOTS:
            self.cache.open(slot=slot)

    def step(self, rows: Any = None) -> list[tuple[int, torch.Tensor]]:
        """The next step; which sequence computed, and the logits after its tokens.

        Args:
            rows: which of the step's tokens to take logits of; None for all.
        """
        parts = []
        for i, tokens in enumerate(self.tokens):
            left, decodes = len(tokens) - self.done[i], self.done[i] > len(tokens) // 2
            if left:
                parts.append((not decodes, SLOTS[i], i, 1 if decodes else min(left, CHUNKS[i])))
        parts.sort()
        order = [i for _, _, i, _ in parts]
        counts = np.array([n for *_, n in parts], np.int32)
        slots = np.array([SLOTS[i] for i in order], np.int32)
        ends = np.array([self.done[i] for i in order], np.int32) + counts
        self.cache.ensure_many(slots, ends)
        ids = [self.tokens[i][e - n : e] for i, e, n in zip(order, ends, counts, strict=True)]
        total = int(counts.sum())
        rows_wanted = np.arange(total) if rows is None else np.asarray(rows, np.int64)
        batch = StepBatch(
            slots=slots,
            query_lens=counts,
            kv_lens=ends,
            num_decodes=sum(not chunk for chunk, *_ in parts),
            input_ids=np.concatenate(ids).astype(np.int64),
            logit_rows=rows_wanted,
            sample_slots=np.repeat(slots, counts)[rows_wanted].astype(np.int64),
        )
        logits = self.runner.run(batch)
        for i, n in zip(order, counts, strict=True):
            self.done[i] += int(n)
        if rows is not None:
            return [(-1, logits)]
        return list(zip(order, torch.split(logits, counts.tolist()), strict=True))

    def all(self) -> list[torch.Tensor]:
        """Logits ``[tokens, vocabulary]`` of each sequence."""
        parts: list[list[torch.Tensor]] = [[] for _ in LENGTHS]
        while self.done != list(LENGTHS):
            for i, logits in self.step():
                assert logits.dtype == torch.float32
                parts[i].append(logits)
        self.cache.check()
        return [torch.cat(each) for each in parts]


@torch.no_grad()
def plain(model: Any, tokens: Any) -> torch.Tensor:
    """What the untouched model computes for a whole sequence."""
    logits: torch.Tensor = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0]
    return logits.float()


@FAMILY
def test_packed_steps_equal_the_plain_model(family: str) -> None:
    run = Run(load_model(engine_model(family)))
    model = engine_model(family)
    for tokens, logits in zip(run.tokens, run.all(), strict=True):
        wanted = plain(model, tokens)
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        assert torch.equal(logits.argmax(-1), wanted.argmax(-1))


@pytest.mark.parametrize("family", [f for f in ENGINE_CONFIGS if f not in ("mixtral", "gpt_oss")])
def test_bfloat16_is_as_exact_as_the_plain_model(family: str) -> None:
    """Both are off what float32 gives for the same weights; experts could differ outright."""
    run = Run(load_model(engine_model(family, torch.bfloat16)))
    model = engine_model(family, torch.bfloat16)
    exact = engine_model(family, torch.bfloat16).float()
    assert run.cache.specs[0].dtype == torch.bfloat16
    for tokens, logits in zip(run.tokens, run.all(), strict=True):
        wanted = plain(exact, tokens)
        off = (plain(model, tokens) - wanted).norm()
        assert 0 < (logits - wanted).norm() < 1.5 * off


def test_a_wiped_token_changes_the_logits() -> None:
    """What the tests above compare depends on the cache."""
    run = Run(load_model(engine_model("llama")))
    model = engine_model("llama")
    run.step()
    for layer in range(len(run.cache.specs)):
        k, v = run.cache.view(SLOTS[1], layer)
        k[3] = v[3] = 0
    logits = run.all()[1]
    assert not torch.allclose(logits[-40:], plain(model, run.tokens[1])[-40:], atol=0.1)


@FAMILY
def test_some_rows_or_none(family: str) -> None:
    loaded = load_model(engine_model(family))
    seen: list[int] = []
    loaded.model.get_output_embeddings().register_forward_hook(
        lambda _module, inputs, _out: seen.append(inputs[0].shape[-2])
    )
    all_rows = Run(loaded).step()
    logits = torch.cat([rows for _, rows in all_rows])
    [(_, none)] = Run(loaded).step(rows=[])
    [(_, some)] = Run(loaded).step(rows=[11, 2])
    assert none.shape == (0, loaded.vocab_size)
    assert none.dtype == torch.float32
    torch.testing.assert_close(some, logits[[11, 2]], rtol=1e-4, atol=1e-4)
    assert seen == [len(logits), 0, 2]  # no more than what is asked for is computed


def test_a_model_that_computes_all_logits() -> None:
    loaded = load_model(engine_model("llama"))
    [(_, some)] = Run(loaded).step(rows=[11, 2])
    [(_, same)] = Run(dataclasses.replace(loaded, keeps_logits=False)).step(rows=[11, 2])
    torch.testing.assert_close(same, some)


class Nothing:
    """A backend that computes nothing."""

    def prepare(self, step: Step, specs: Any) -> None:
        pass

    def forward(self, layer: int, spec: Any, query: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.zeros_like(query)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return out


@FAMILY
def test_no_mask_is_built(family: str) -> None:
    """Nothing in a step is as large as tokens times tokens."""
    tokens = 1000
    run = Run(load_model(engine_model(family)), Nothing(), max_tokens=tokens)
    run.cache.ensure(SLOTS[0], tokens)
    slots, lens = np.array(SLOTS[:1], np.int32), np.array([tokens], np.int32)
    ids = np.full(tokens, 5, np.int64)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        run.runner.run(
            StepBatch(
                slots=slots,
                query_lens=lens,
                kv_lens=lens,
                num_decodes=0,
                input_ids=ids,
                logit_rows=np.array([tokens - 1]),
                sample_slots=slots.astype(np.int64),
            )
        )
    assert 0 < largest.elements < tokens**2 // 2


def test_a_failed_step_ends_with_it() -> None:
    """The next step is not affected, and the model does not answer without one."""

    class Failing(Nothing):
        def forward(self, *_: Any) -> torch.Tensor:
            raise ZeroDivisionError

    loaded = load_model(engine_model("llama"))
    with pytest.raises(ZeroDivisionError):
        Run(loaded, Failing()).step()
    with pytest.raises(StepMissing, match="set_attn_implementation"):
        loaded.model(torch.tensor([[1, 2]]))
    assert len(Run(loaded).step()) == len(LENGTHS)


def test_a_cache_of_another_model_is_refused() -> None:
    loaded = load_model(engine_model("llama"))
    cache = KVCache(2, 2, 16, torch.float32, max_seqs=2, max_tokens=32)
    with pytest.raises(ValueError, match="2 layers that are not this model's 3"):
        ModelRunner(loaded, cache, choose(loaded.specs, loaded.device))
