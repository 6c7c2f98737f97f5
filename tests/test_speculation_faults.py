"""Speculation where something goes wrong, and its settings."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import vattn
from tests.engine_cases import (
    assert_equal,
    assert_nothing_left,
    greedy,
    make_llm,
    mixed_cases,
    run,
)
from tests.speculation_cases import (
    NGRAM,
    Oracle,
    assert_same,
    draft_model,
    generate,
    known_outputs,
    known_text,
    llm_with,
    whole_texts,
)
from vattn.outputs import RequestOutput

# What goes wrong ---------------------------------------------------------------------------------


class Poisoned:
    """A runner whose model has no numbers for one token, and none for what comes after it."""

    def __init__(self, llm: vattn.LLM, token: int) -> None:
        self._llm, self._runner, self._token = llm, llm.engine.runner, token
        self.poisoned = 0
        llm.engine.runner = self  # type: ignore[assignment]

    @torch.inference_mode()
    def run(self, batch: Any) -> torch.Tensor:
        logits: torch.Tensor = self._runner.run(batch)
        ends = batch.query_lens.cumsum()
        for slot, length, n, end in zip(
            batch.slots, batch.kv_lens, batch.query_lens, ends, strict=True
        ):
            row = batch.input_ids[end - n : end].tolist()
            if self._token not in row:
                continue
            at = row.index(self._token)
            for layer in range(len(self._llm.engine.cache.specs)):
                for tensor in self._llm.engine.cache.layer(layer):
                    tensor[slot, length - n + at : length] = torch.nan
            bad = [i for i, t in enumerate(batch.logit_rows) if end - n + at <= t < end]
            logits[bad] = torch.nan
            self.poisoned += 1
        return logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


def test_a_draft_without_numbers_is_no_error() -> None:
    """It is not what comes next, and what it has left in the slot does no harm."""
    cases = [case for case in mixed_cases("llama") if len(case.prompt) > 30][:6]
    prompts = [list(case.prompt) for case in cases]
    wanted = generate(make_llm("llama"), prompts, [greedy(30)] * 6)
    spoken = {t for o in wanted for t in o.prompt_token_ids + o.outputs[0].token_ids}
    bad = next(token for token in range(3, 96) if token not in spoken)
    llm = llm_with("llama", NGRAM)
    Oracle(llm, whole_texts(wanted), luck=0.7, wrong=bad)
    runner = Poisoned(llm, bad)
    assert_same(generate(llm, prompts, [greedy(30)] * 6), wanted)
    assert runner.poisoned > 5
    assert_nothing_left(llm)


def test_an_accepted_token_without_numbers_is_an_error_of_its_request() -> None:
    prompts, known, _ = known_text("llama", 30)
    text = known_outputs(prompts, known)
    at = next(i for i in range(4, 20) if text[i] not in prompts[0] + text[:i])
    results = []
    for oracle in (False, True):
        llm = llm_with("llama", NGRAM)
        Oracle(llm, known if oracle else (lambda request: ()), count=4 if oracle else 0)
        Poisoned(llm, text[at])
        results.append(generate(llm, prompts, [greedy(30)]))
        assert_nothing_left(llm)
    assert_same(results[1], results[0])
    assert results[0][0].outputs[0].token_ids == text[: at + 1]
    assert "not finite" in str(results[0][0].outputs[0].error)


def test_a_proposer_that_fails_costs_nothing_but_drafts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cases = mixed_cases("qwen3")[:8]
    llm = llm_with("qwen3", draft_model("qwen3", equal=True))
    proposer: Any = llm.engine.proposer
    good, calls = proposer.runner.run, []

    def run_or_fail(batch: Any) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == 2:
            raise RuntimeError("made to fail")
        out: torch.Tensor = good(batch)
        return out

    proposer.runner.run = run_or_fail
    with caplog.at_level(logging.WARNING):
        assert_equal(run(llm, cases), cases, "qwen3")
    assert "no drafts in this step: RuntimeError: made to fail" in caplog.text
    assert llm.stats().spec_decode_num_accepted_tokens > 0  # later on
    assert_nothing_left(llm)


def test_an_interruption_loses_nothing() -> None:
    cases = mixed_cases("llama")[:8]
    llm = llm_with("llama", draft_model("llama", equal=True))
    good, calls = llm.engine.runner.run, []

    def interrupt(batch: Any) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return good(batch)

    llm.engine.runner.run = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(llm, cases)
    llm.engine.check()
    assert_equal(run(llm, cases), cases, "llama")
    assert_nothing_left(llm)
    llm.close()


# Settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ngram", "must be a mapping"),
        ({"method": "ngram"}, "needs num_speculative_tokens"),
        ({**NGRAM, "prompt_lookup_mx": 3}, "did you mean prompt_lookup_max"),
        ({**NGRAM, "draft_tensor_parallel_size": 1}, "has no 'draft_tensor_parallel_size'"),
        ({**NGRAM, "num_speculative_tokens": 0}, "num_speculative_tokens=0"),
        ({**NGRAM, "num_speculative_tokens": 2.5}, "num_speculative_tokens=2.5"),
        ({**NGRAM, "num_speculative_tokens": True}, "num_speculative_tokens=True"),
        ({**NGRAM, "num_speculative_tokens": 999}, "at most 128"),
        ({**NGRAM, "method": "eagle"}, "method='eagle' must be one of ngram, draft_model"),
        ({**NGRAM, "method": ["ngram"]}, "must be one of"),
        ({"num_speculative_tokens": 3}, "method=None must be one of"),
        ({**NGRAM, "model": "x"}, "drop one of them"),
        ({**NGRAM, "prompt_lookup_min": 5}, "prompt_lookup_min=5 is more than"),
        ({**NGRAM, "prompt_lookup_max": -1}, "prompt_lookup_max=-1"),
        ({**NGRAM, "prompt_lookup_max": 64}, "at most 32"),
        ({"method": "draft_model", "num_speculative_tokens": 3}, "needs a model"),
        ({"model": "x", "num_speculative_tokens": 3, "prompt_lookup_max": 2}, "of the method ngra"),
        ({"model": "no/such/model", "num_speculative_tokens": 3}, "speculative_config's model"),
        ({"model": 3, "num_speculative_tokens": 3}, "speculative_config's model"),
    ],
)
def test_bad_settings(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm_with("llama", given)


def test_defaults_are_those_of_vllm() -> None:
    def lookup(**given: int) -> tuple[int, int]:
        options = {"method": "ngram", "num_speculative_tokens": 3, **given}
        config = vattn.engine.config.EngineConfig(speculative_config=options).speculative_config
        return config.prompt_lookup_min, config.prompt_lookup_max

    assert lookup() == (5, 5)
    assert lookup(prompt_lookup_max=4) == (4, 4)
    assert lookup(prompt_lookup_min=2) == (2, 2)
    assert lookup(prompt_lookup_min=2, prompt_lookup_max=3) == (2, 3)


def test_asynchronous_scheduling_needs_no_guesses() -> None:
    with pytest.raises(ValueError, match=r"async_scheduling=True .* drop one of them"):
        llm_with("llama", NGRAM, async_scheduling=True)
    llm = llm_with("llama", NGRAM)
    assert not llm.engine.is_async


def test_outputs_of_the_helper_can_differ() -> None:
    """The comparison of these tests sees what it should."""
    prompts, _, params = known_text("llama", 4)
    one: list[RequestOutput] = generate(make_llm("llama"), prompts, params)
    other = generate(make_llm("llama"), prompts, [greedy(5)])
    with pytest.raises(AssertionError):
        assert_same(one, other)
