"""What an engine refuses and what it makes of a prompt and its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import vattn
from tests.engine_cases import EMBEDDED_PATH, assert_nothing_left, make_llm
from tests.models import VOCABULARY
from vattn.engine import intake
from vattn.engine.token_sets import bad_words_ids
from vattn.request import Request
from vattn.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def bare() -> Iterator[vattn.LLM]:
    """A model without a tokenizer, whose end of sequence is token 7."""
    with make_llm(max_model_len=64) as llm:
        object.__setattr__(llm.engine.loaded, "eos_token_ids", frozenset([7]))
        yield llm
        assert_nothing_left(llm)


@pytest.fixture(scope="module")
def embedded() -> Iterator[vattn.LLM]:
    with vattn.LLM(str(EMBEDDED_PATH), dtype="float32", device="cpu") as llm:
        yield llm


def make(llm: vattn.LLM, prompt: list[int] | None = None, **params: Any) -> list[Request]:
    return llm.engine.make_requests("r", prompt or [3, 4, 5], SamplingParams(**params))


LAST = VOCABULARY - 1
BAD: list[tuple[dict[str, Any], str]] = [
    ({"stop_token_ids": [3, 96, 97]}, r"stop_token_ids has \[96, 97\], not among the 96 .* to 95"),
    ({"allowed_token_ids": [3, 96]}, r"allowed_token_ids has \[96\]"),
    ({"logit_bias": {3: 1.0, 500: 2.0}}, r"logit_bias has \[500\]"),
    ({"allowed_token_ids": range(96, 120)}, r"\[96, .*105, and 14 more\]"),
    ({"bad_words": ["word"]}, r"bad_words=\['word'\] need a tokenizer; use logit_bias"),
    ({"stop": "a"}, "stop strings need a tokenizer"),
    (
        {"allowed_token_ids": [7], "min_tokens": 2},
        r"min_tokens=2 rules out, at first, end-of-sequence and stop tokens, and so are all of al",
    ),
    ({"allowed_token_ids": [7, 9], "stop_token_ids": [9, 11], "min_tokens": 1}, "min_tokens=1"),
    (
        {"stop_token_ids": list(range(VOCABULARY)), "min_tokens": 1},
        "min_tokens=1 rule out all 96 tokens",
    ),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=[str(given)[:40] for given, _ in BAD])
def test_sets_that_cannot_be(bare: vattn.LLM, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(bare, **given)
    # Of that request alone.
    good = SamplingParams(max_tokens=2, temperature=0)
    prompts: Any = [[3, 4], [3, 4]]
    first, second = bare.generate(prompts, [SamplingParams(**given), good], use_tqdm=False)
    assert first.outputs[0].finish_reason == "error"
    assert second.outputs[0].finish_reason == "length"


def test_sets_at_the_edge_are_served(bare: vattn.LLM) -> None:
    options: list[dict[str, Any]] = [
        {"stop_token_ids": [LAST], "allowed_token_ids": [LAST], "logit_bias": {LAST: -100}},
        {"allowed_token_ids": [7]},
        {"allowed_token_ids": [7], "min_tokens": 2, "ignore_eos": True},
        {"allowed_token_ids": [7, 8], "min_tokens": 2},
    ]
    for given in options:
        (request,) = make(bare, **given)
        assert not request.needs_tokens
    bare.engine.check()


def test_what_needs_tokens_says_so(bare: vattn.LLM, embedded: vattn.LLM) -> None:
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        options: dict[str, Any] = {name: 2}
        assert all(each.needs_tokens for each in make(bare, n=2, **options))
    assert not make(bare, min_tokens=2, logprobs=2, top_k=3)[0].needs_tokens
    assert make(embedded, bad_words=["the"])[0].needs_tokens


def test_only_the_first_sample_scores_the_prompt(bare: vattn.LLM) -> None:
    samples = make(bare, n=3, prompt_logprobs=2)
    assert [each.prompt_logprobs for each in samples] == [[None], None, None]
    assert make(bare)[0].prompt_logprobs is None


# Log probabilities --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_no_more_log_probabilities_than_the_engine_allows(bare: vattn.LLM, name: str) -> None:
    def asked(count: int) -> SamplingParams:
        options: dict[str, Any] = {name: count, "max_tokens": 2}
        return SamplingParams(**options)

    outputs = bare.generate(
        [[3, 4]] * 4, [asked(21), asked(-1), asked(20), asked(0)], use_tqdm=False
    )
    reasons = [each.outputs[0].finish_reason for each in outputs]
    assert reasons == ["error", "error", "length", "length"]
    errors = [str(each.outputs[0].error) for each in outputs]
    assert f"{name}=21 is more than max_logprobs=20 of this engine; lower it" in errors[0]
    assert f"{name}=-1 asks for all 96 tokens, which is more than max_logprobs=20" in errors[1]


@pytest.mark.parametrize(
    ("most", "good", "bad"),
    [(-1, (-1, 1024), ()), (0, (0,), (1, -1)), (95, (95,), (96, -1)), (96, (96, -1), (97, 1024))],
)
def test_how_many_log_probabilities_are_allowed(
    most: int, good: tuple[int, ...], bad: tuple[int, ...]
) -> None:
    with make_llm(max_model_len=64, max_logprobs=most) as llm:
        for count in good:
            make(llm, logprobs=count, prompt_logprobs=count)
        for count in bad:
            with pytest.raises(ValueError, match=rf"^logprobs={count} .*max_logprobs={most} "):
                make(llm, logprobs=count)


def test_without_chunks_a_prompt_is_scored_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "MAX_SCORED_TOKENS", 8)
    prompt = [3 + i for i in range(10)]
    for chunked in (True, False):
        with make_llm(max_model_len=64, enable_chunked_prefill=chunked) as llm:
            make(llm, prompt[:9], prompt_logprobs=1)
            make(llm, prompt, logprobs=1)
            if chunked:
                make(llm, prompt, prompt_logprobs=1)
                continue
            with pytest.raises(ValueError, match=r"of 10 tokens: a step scores 8 .*shorten"):
                make(llm, prompt, prompt_logprobs=1)
            make(llm, prompt, prompt_logprobs=1, truncate_prompt_tokens=9)


# Truncation ---------------------------------------------------------------------------------------


def test_the_last_tokens_are_kept(bare: vattn.LLM) -> None:
    prompt = [3 + i % 90 for i in range(100)]
    for keep, kept in ((1, 1), (10, 10), (63, 63), (-1, 63)):
        (request,) = make(bare, prompt, truncate_prompt_tokens=keep, max_tokens=None)
        assert request.prompt_ids == request.tokens == prompt[-kept:]
        assert request.limit == 64
    for keep in (5, 6, 1000, -1):
        (request,) = make(bare, prompt[:5], truncate_prompt_tokens=keep)
        assert request.prompt_ids == prompt[:5]
    for refused in (64, 99, None):
        with pytest.raises(ValueError, match=r"max_model_len=64 leaves no room .*truncate_prompt"):
            make(bare, prompt, truncate_prompt_tokens=refused)
    with pytest.raises(ValueError, match="token id 96"):
        make(bare, [96, *prompt], truncate_prompt_tokens=4)


def test_truncated_prompts_give_what_short_ones_give(bare: vattn.LLM) -> None:
    prompt = [3 + i % 90 for i in range(100)]
    params = SamplingParams(temperature=0, max_tokens=6, truncate_prompt_tokens=20)
    asked: Any = [prompt, prompt[-20:]]
    long, short = bare.generate(asked, params, use_tqdm=False)
    assert long.outputs[0].token_ids == short.outputs[0].token_ids
    assert long.prompt_token_ids == prompt[-20:]


# Bad words ----------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one token per letter, but for some words."""

    def __init__(self, **words: int) -> None:
        self.words = words

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        if text in self.words:
            return [self.words[text]]
        return [ord(letter) for letter in text]


def test_words_come_with_and_without_a_space() -> None:
    letters = Letters(cat=200)
    assert bad_words_ids([], None, 300) == ()
    assert bad_words_ids(["ab"], letters, 300) == ((97, 98), (32, 97, 98))
    assert bad_words_ids(["ab", "  ab"], letters, 300) == ((97, 98), (32, 97, 98))
    assert bad_words_ids(["cat"], letters, 300) == ((200,), (32, 99, 97, 116))
    assert bad_words_ids([" ", "\n"], letters, 300) == ((32,), (10,), (32, 10))


@pytest.mark.parametrize("word", ["é", "cat"])
def test_words_that_the_model_cannot_write(word: str) -> None:
    with pytest.raises(ValueError, match=f"bad_words has '{word}', which is .* in tokens"):
        bad_words_ids([word], Letters(cat=200), 128)


def test_words_that_rule_out_what_is_allowed(embedded: vattn.LLM) -> None:
    tokenizer = embedded.get_tokenizer()
    (e,), (t,) = (tokenizer.encode(letter, add_special_tokens=False) for letter in "et")
    with pytest.raises(ValueError, match=rf"bad_words=\['e'\] rule out every one .*\[{e}\]; allow"):
        make(embedded, bad_words=["e"], allowed_token_ids=[e])
    with pytest.raises(ValueError, match=r"bad_words=\['e'\] and, at first, min_tokens=1 together"):
        make(
            embedded,
            bad_words=["e"],
            allowed_token_ids=[e, t],
            stop_token_ids=[t],
            min_tokens=1,
        )
    (request,) = make(embedded, bad_words=["e"], allowed_token_ids=[e, t])
    assert (e,) in request.bad_words_ids
