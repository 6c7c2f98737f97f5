"""Engines with and without drafts on the same prompts, and drafts of a chosen quality."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import vattn
from bench.decoding_speculation import TEXTS
from tests.engine_cases import fresh_model, greedy, make_llm, mixed_cases
from tests.models import one_thread
from vattn.engine.speculation.ngram import NgramProposer
from vattn.engine.speculation.proposer import most_drafts
from vattn.outputs import CompletionOutput, RequestOutput
from vattn.request import Request
from vattn.sampling_params import SamplingParams

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


def copying_prompts(tokenizer: Any) -> list[list[int]]:
    """Token ids of texts that say the same again and again."""
    return [tokenizer.encode(text * 6) for text in TEXTS]


def draft_model(family: str, *, equal: bool) -> dict[str, Any]:
    """A setting with the model itself as its draft, or one that knows nothing."""
    model = fresh_model(family)
    if not equal:
        for number, weight in enumerate(model.parameters()):
            weight.data = weight.data.roll(number + 1, 0)
    return {"model": model, "num_speculative_tokens": 3}


def generate(
    llm: vattn.LLM, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[RequestOutput]:
    """All at once; the invariants hold after every other step."""
    step, steps = llm.engine.step, itertools.count()

    def checked() -> list[Request]:
        news = step()
        if next(steps) % 2:
            llm.engine.check()
        return news

    llm.engine.step = checked  # type: ignore[method-assign]
    try:
        with one_thread():
            return llm.generate(
                [{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False
            )
    finally:
        llm.engine.step = step  # type: ignore[method-assign]


def assert_same(found: Sequence[RequestOutput], wanted: Sequence[RequestOutput]) -> None:
    """The same outputs but for moments, and for the last bits of log probabilities."""
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.finished == b.finished
        assert a.num_cached_tokens == b.num_cached_tokens, number
        for one, other in zip(a.outputs, b.outputs, strict=True):
            assert one.token_ids == other.token_ids, number
            assert one.text == other.text, number
            assert one.finish_reason == other.finish_reason, number
            assert one.stop_reason == other.stop_reason, number
            assert one.error == other.error, number
            assert_same_logprobs(one, other)


def assert_same_logprobs(one: CompletionOutput, other: CompletionOutput) -> None:
    assert (one.logprobs is None) == (other.logprobs is None)
    for found, wanted in zip(one.logprobs or [], other.logprobs or [], strict=True):
        assert found.keys() == wanted.keys()
        for token in found:
            assert found[token].logprob == pytest.approx(wanted[token].logprob, abs=1e-3)
            assert found[token].rank == wanted[token].rank
            assert found[token].decoded_token == wanted[token].decoded_token


class Oracle(NgramProposer):
    """Drafts that are known to be right, with a wrong one behind them now and then.

    Args:
        llm: an engine to guess for.
        known: the whole text that a request is going to be, by its prompt and index.
        count: most drafts.
        luck: share of drafts that are right.
    """

    def __init__(
        self,
        llm: vattn.LLM,
        known: Callable[[Request], Sequence[int]],
        *,
        count: int = 4,
        luck: float = 1.0,
        wrong: int = 3,
    ) -> None:
        super().__init__(count, 1, 1)
        self._known, self._luck, self._wrong = known, luck, wrong
        self._rng = random.Random(5)
        llm.engine.proposer = llm.engine.memory.proposer = self

    def propose(self, requests: Sequence[Request]) -> None:
        for request in requests:
            at = len(request.tokens)
            count = min(self._count, most_drafts(request))
            drafts = list(self._known(request)[at : at + count])
            drafts += [self._wrong] * (count - len(drafts))
            request.drafts = [
                draft if self._rng.random() < self._luck else self._wrong for draft in drafts
            ]


def whole_texts(outputs: Sequence[RequestOutput]) -> Callable[[Request], Sequence[int]]:
    """What requests are going to be, by outputs of the same prompts with more tokens.

    Nothing is known of others.
    """
    texts = {
        (tuple(output.prompt_token_ids), sample.index): output.prompt_token_ids + sample.token_ids
        for output in outputs
        for sample in output.outputs
    }
    return lambda request: texts.get((tuple(request.prompt_ids), request.index), ())


def llm_with(family: str, speculative_config: Any, **options: Any) -> vattn.LLM:
    """An engine of the tests, which may speculate."""
    return make_llm(family, speculative_config=speculative_config, **options)


def known_text(family: str, new: int, **options: Any) -> tuple[list[list[int]], Any, Any]:
    """A prompt, what it becomes, and how that is asked for."""
    prompts = [list(mixed_cases(family)[0].prompt)]
    outputs = generate(make_llm(family), prompts, [greedy(new + 8)])
    return prompts, whole_texts(outputs), [greedy(new, **options)]


def known_outputs(prompts: list[list[int]], known: Any) -> list[int]:
    """The new tokens of such a text."""
    request = Request("x", prompts[0], SamplingParams(), 999)
    return list(known(request))[len(prompts[0]) :]
