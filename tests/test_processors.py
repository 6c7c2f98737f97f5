"""Logits processors against transformers' own of the same meaning, and against plain loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from vattn.attention.upload import Uploader
from vattn.engine import allowed_tokens
from vattn.engine.allowed_tokens import AllowedTokens
from vattn.engine.processors import (
    BadWords,
    LogitBias,
    LogitsProcessor,
    MinTokens,
    PerRequest,
)
from vattn.engine.sampler import Sampler
from vattn.request import FinishReason, Request, Status
from vattn.sampling_params import SamplingParams

VOCABULARY = 40
PROMPT = [5, 6, 7]
KINDS: dict[str, Any] = {
    "allowed": AllowedTokens,
    "bad words": BadWords,
    "min_tokens": MinTokens,
    "bias": LogitBias,
}


def request(
    output: list[int] | None = None,
    *,
    words: tuple[tuple[int, ...], ...] = (),
    stop: tuple[int, ...] = (),
    prompt: list[int] | None = None,
    **params: Any,
) -> Request:
    made = Request("r", prompt or PROMPT, SamplingParams(**params), 10_000, bad_words_ids=words)
    made.stop_ids = frozenset(stop)
    made.tokens += output or []
    return made


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def processed(kind: str, logits: torch.Tensor, rows: list[Request]) -> torch.Tensor:
    """By a processor that has seen no rows before."""
    return again(KINDS[kind](VOCABULARY, Uploader("cpu")), logits, rows)


def again(processor: LogitsProcessor, logits: torch.Tensor, rows: list[Request]) -> torch.Tensor:
    out = logits.clone()
    if processor.update(rows):
        processor.apply(out, rows)
    return out


def theirs(processor: Any, tokens: list[int], row: torch.Tensor) -> torch.Tensor:
    """What transformers makes of one row."""
    out: torch.Tensor = processor(torch.tensor([tokens]), row[None].clone())
    return out[0]


tokens = st.integers(0, VOCABULARY - 1)
words = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=5)


# Each against transformers ------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sets(tokens, min_size=1), min_size=1, max_size=5),
    st.sampled_from([0, 4, VOCABULARY]),
    st.integers(0, 99),
)
def test_allowed_tokens_suppress_all_others(
    allowed: list[set[int]], most_listed: int, seed: int
) -> None:
    """Whether they are listed or have a mask."""
    logits = random_logits(len(allowed) + 1, seed)
    rows = [request(), *(request(allowed_token_ids=list(ids)) for ids in allowed)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allowed_tokens, "_MOST_LISTED", most_listed)
        out = processed("allowed", logits, rows)
    assert torch.equal(out[0], logits[0])
    for i, ids in enumerate(allowed, 1):
        others = [token for token in range(VOCABULARY) if token not in ids]
        wanted = logits[i]
        if others:
            wanted = theirs(SuppressTokensLogitsProcessor(others), PROMPT, logits[i])
        assert torch.equal(out[i], wanted), ids


@settings(max_examples=80, deadline=None)
@given(st.lists(words, min_size=1, max_size=4), st.integers(0, 99), st.data())
def test_bad_words_are_not_completed(many: list[Any], seed: int, data: Any) -> None:
    logits = random_logits(len(many), seed)
    # As long as the longest word at least: transformers passes over words that fill the output.
    outputs = [
        data.draw(st.lists(st.integers(0, 4), min_size=4, max_size=9)) for _ in range(len(many))
    ]
    rows = [
        request(output, words=tuple(map(tuple, each)))
        for output, each in zip(outputs, many, strict=True)
    ]
    out = processed("bad words", logits, rows)
    for i, each in enumerate(many):
        processor = NoBadWordsLogitsProcessor(each, eos_token_id=VOCABULARY - 1)
        assert torch.equal(out[i], theirs(processor, outputs[i], logits[i])), each


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.dictionaries(tokens, st.floats(-9, 9, width=32), min_size=1), max_size=4),
    st.integers(0, 99),
)
def test_biases_are_added(biases: list[dict[int, float]], seed: int) -> None:
    logits = random_logits(len(biases) + 1, seed)
    rows = [*(request(logit_bias=each) for each in biases), request()]
    out = processed("bias", logits, rows)
    assert torch.equal(out[-1], logits[-1])
    for i, each in enumerate(biases):
        asked: Any = [[[token], float(bias)] for token, bias in each.items()]
        assert torch.equal(out[i], theirs(SequenceBiasLogitsProcessor(asked), PROMPT, logits[i]))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.sets(tokens, max_size=4))),
    st.integers(0, 99),
)
def test_no_end_before_min_tokens(asked: list[Any], seed: int) -> None:
    logits = random_logits(len(asked), seed)
    rows = [request([1] * done, min_tokens=least, stop=tuple(stop)) for done, least, stop in asked]
    out = processed("min_tokens", logits, rows)
    for i, (done, least, stop) in enumerate(asked):
        wanted = logits[i]
        if stop and least:
            processor = MinNewTokensLengthLogitsProcessor(len(PROMPT), least, list(stop))
            wanted = theirs(processor, PROMPT + [1] * done, logits[i])
        assert torch.equal(out[i], wanted), asked[i]


# Bad words ----------------------------------------------------------------------------------------


def banned(each: Request) -> set[int]:
    out = processed("bad words", torch.zeros(1, VOCABULARY), [each])
    return set(torch.isneginf(out[0]).nonzero()[:, 0].tolist())


def test_bad_words_begin_in_the_output() -> None:
    word = ((7, 8),)
    assert banned(request([], words=word)) == set()  # the prompt ends in 7
    assert banned(request([7], words=word)) == {8}  # a word that fills the output
    assert banned(request([7, 8], words=word)) == set()
    assert banned(request([8], words=((6, 7, 8, 9),))) == set()
    assert banned(request([6, 7, 8], words=((6, 7, 8, 9), (8, 3), (7, 4), (2,)))) == {9, 3, 2}
    assert banned(request([6, 6], words=((6, 6, 6), (6, 6)))) == {6}


def test_bad_words_follow_the_output_while_the_rows_stay() -> None:
    each, other = request(words=((1, 2), (1, 2, 3), (9,))), request()
    processor = BadWords(VOCABULARY, Uploader("cpu"))
    assert processor.update([other, each])
    seen = []
    for token in (1, 2, 1, 4):
        out = torch.zeros(2, VOCABULARY)
        processor.apply(out, [other, each])
        seen.append(set(out[1].isneginf().nonzero()[:, 0].tolist()))
        assert not out[0].any()
        each.tokens.append(token)
    assert seen == [{9}, {9, 2}, {9, 3}, {9, 2}]


# Rows ---------------------------------------------------------------------------------------------


def mixed_requests(count: int = 24) -> list[Request]:
    """Of all kinds, some of several."""
    made = []
    for i in range(count):
        params: dict[str, Any] = {"temperature": 0}
        if i % 3 == 0:
            params["logit_bias"] = {i % 7: 2.0, 9 + i % 5: -3.0}
        if i % 4 == 1:
            params["allowed_token_ids"] = range(i % 9, 12)
        if i % 4 == 3:
            params["allowed_token_ids"] = range(1 + i % 3, VOCABULARY)
        if i % 5 == 2:
            params["min_tokens"] = 4
        each = request([2] * (i % 6), stop=(1, 3, 77), **params)
        each.seed = i
        if i % 6 == 4:
            each.bad_words_ids = ((2,), (2, 4), (11, 2, 5))
        made.append(each)
    return made


def plain(row: torch.Tensor, each: Request) -> torch.Tensor:
    """All processors of these tests on one row, one token after another."""
    out, params, output = row.tolist(), each.params, each.output_ids
    for token in range(VOCABULARY):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            out[token] = -math.inf
        for *prefix, last in each.bad_words_ids:
            begins = len(output) - len(prefix)
            if token == last and begins >= 0 and output[begins:] == prefix:
                out[token] = -math.inf
        if len(output) + each.in_flight < params.min_tokens and token in each.stop_ids:
            out[token] = -math.inf
        out[token] += (params.logit_bias or {}).get(token, 0.0)
    return torch.tensor(out)


@pytest.mark.parametrize("most_listed", [0, 3, VOCABULARY])
def test_one_batch_of_all_kinds_and_rows_that_come_and_go(
    most_listed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allowed_tokens, "_MOST_LISTED", most_listed)
    requests = mixed_requests()
    sampler = Sampler(VOCABULARY, "cpu")
    for step in range(60):
        # Some steps have the rows of the step before, some others; preempted ones come back.
        first = (step // 3 * 5) % 17
        rows = requests[first : first + 3 + step // 3 % 9]
        logits = random_logits(len(rows), step)
        wanted = [plain(logits[i], each) for i, each in enumerate(rows)]
        out = logits.clone()
        got = sampler.sample(out, rows).to_host().token_ids
        assert torch.equal(out, torch.stack(wanted)), step
        assert got == [int(row.argmax()) for row in wanted]
        for each, token in zip(rows, got, strict=True):
            each.tokens.append(token)


def test_a_large_set_is_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests share it, and whatever rows they are later."""
    monkeypatch.setattr(allowed_tokens, "_MOST_LISTED", 0)
    sent: list[int] = []

    class Counting(Uploader):
        def __call__(self, *arrays: Any) -> list[torch.Tensor]:
            sent.append(sum(each.nbytes for each in arrays))
            return super().__call__(*arrays)

    params = SamplingParams(allowed_token_ids=range(9, 30))
    rows = [Request("r", PROMPT, params, 100) for _ in range(6)]
    rows.insert(2, request(allowed_token_ids=range(3, 20)))
    processor = AllowedTokens(VOCABULARY, Counting("cpu"))
    for i, wanted in enumerate(([2 * VOCABULARY, 7 * 16], [6 * 16], [5 * 16])):
        logits = random_logits(7 - i, i)
        out = again(processor, logits, rows[i:])
        for row, each in enumerate(rows[i:]):
            assert torch.equal(out[row], processed("allowed", logits[row : row + 1], [each])[0])
        assert sent == wanted
        sent.clear()
    for each in rows:
        each.status, each.finish_reason = Status.FINISHED, FinishReason.STOP
    assert not processor.update([])
    assert len(processor._known) == 0


@pytest.mark.parametrize("kind", ["allowed", "bias"])
def test_rows_of_drafts_are_rows_like_others(kind: str) -> None:
    one = request(allowed_token_ids=[3, 5], logit_bias={5: 2.5})
    other = request(allowed_token_ids=range(1, VOCABULARY), logit_bias={0: 1.5})
    rows = [one, one, one, other, other, request()]
    logits = random_logits(6)
    out = processed(kind, logits, rows)
    for i, each in enumerate(rows):
        assert torch.equal(out[i], processed(kind, logits[i : i + 1], [each])[0])


def test_min_tokens_count_what_is_in_flight() -> None:
    """One token was sampled and has not arrived; a request without penalties goes on meanwhile."""
    each = request([2], stop=(1,), min_tokens=3)
    for in_flight, masked in ((0, True), (1, True), (2, False)):
        each.in_flight = in_flight
        out = processed("min_tokens", torch.zeros(1, VOCABULARY), [each])
        assert bool(out[0, 1].isneginf()) is masked


def test_a_bias_opens_nothing_that_is_ruled_out() -> None:
    class Mask:
        """Rules out token 6, after all others."""

        def update(self, requests: Any) -> bool:
            return True

        def apply(self, logits: torch.Tensor, requests: Any) -> None:
            logits[:, 6] = -math.inf

    biases = {1: 100.0, 2: 100.0, 4: 100.0, 6: 100.0}
    each = request(
        [], words=((2,),), stop=(4,), min_tokens=1, allowed_token_ids=[2, 4, 6, 8],
        logit_bias=biases, temperature=0, repetition_penalty=0.01,
    )  # fmt: skip
    sampler = Sampler(VOCABULARY, "cpu", [Mask()])
    assert sampler.sample(torch.zeros(1, VOCABULARY), [each]).to_host().token_ids == [8]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_anything_to_do_cost_nothing(kind: str) -> None:
    processor = KINDS[kind](VOCABULARY, Uploader("cpu"))
    assert not processor.update([])
    assert not processor.update([request(), request(min_tokens=0, stop=(1,)), request([1])])


def test_what_is_kept_for_a_request_is_forgotten_with_it() -> None:
    numbers = itertools.count(1)
    kept = PerRequest(lambda each: next(numbers))
    one, other = request(), request()
    assert (kept[one], kept[other], kept[one]) == (1, 2, 1)
    one.status, one.finish_reason = Status.FINISHED, FinishReason.STOP
    kept.forget_ended()
    assert (len(kept), kept[other]) == (1, 2)
    kept.forget(other)
    assert (kept[other], len(kept)) == (3, 1)
