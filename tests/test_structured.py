"""Masks of structured outputs on random logits: what is allowed where."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.schemas import assert_valid, random_schema
from tests.structured_cases import (
    CHOICES,
    EOS,
    TOKENS,
    allowed,
    finish,
    make_request,
    make_sampler,
    tiny_tokenizer,
)
from vattn.attention.upload import Uploader
from vattn.engine.grammars import GrammarCompiler
from vattn.engine.structured import StructuredMasks, ended
from vattn.request import FinishReason, Request
from vattn.sampling_params import StructuredOutputsParams

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, TOKENS, frozenset([EOS]))


def drive(requests: list[Request], vocab_size: int = TOKENS, seed: int = 0) -> None:
    """Samples from random logits until all have ended; masks come early in every other step."""
    sampler, masks = make_sampler(vocab_size)
    generator = torch.Generator().manual_seed(seed)
    live, step = list(requests), 0
    while live:
        logits = torch.randn(len(live), vocab_size, generator=generator) * 3
        if step % 2:
            masks.begin(live)
        sampled = sampler.sample(logits, live).send().wait()
        assert sampled.bad_rows() == []
        for request, token in zip(live, sampled.token_ids, strict=True):
            request.tokens.append(token)
            if token in request.stop_ids:
                finish(request, FinishReason.STOP)
            elif len(request.tokens) == request.limit:
                finish(request, FinishReason.LENGTH)
        for request, problem in ended(live):
            assert problem is None
            finish(request, FinishReason.STOP)
        masks.check()
        live, step = [request for request in live if not request.finished], step + 1
    masks.close()


def text_of(tokenizer: Any, request: Request) -> str:
    ids = request.output_ids
    return str(tokenizer.decode(ids[:-1] if ids[-1] in request.stop_ids else ids))


# What is allowed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_every_output_of_random_schemas_validates(
    compiler: GrammarCompiler, tokenizer: Any, seed: int
) -> None:
    """With end-of-sequence tokens and without; the logits know nothing of JSON."""
    schemas = [random_schema(1000 * seed + i) for i in range(60)]
    requests = [
        make_request(
            compiler,
            i,
            [EOS] if i % 3 else [],
            json=schema,
            disable_any_whitespace=bool(i % 2),
            whitespace_pattern=None if i % 2 else " ?",
        )
        for i, schema in enumerate(schemas)
    ]
    plain = [make_request(None, 100 + i) for i in range(4)]
    drive([*requests[:30], *plain, *requests[30:]], seed=seed)
    assert all(request.finish_reason is FinishReason.LENGTH for request in plain)
    for request, schema in zip(requests, schemas, strict=True):
        assert request.finish_reason is FinishReason.STOP, schema
        assert_valid(schema, text_of(tokenizer, request))


@pytest.mark.parametrize("device", DEVICES)
def test_masks_are_those_of_the_language(
    compiler: GrammarCompiler, tokenizer: Any, device: str
) -> None:
    """A token may follow if some choice goes on like that; the end may where a choice ends."""
    language = compiler.compile(StructuredOutputsParams(choice=CHOICES)).vocabulary.tokenizer
    bytes_of = [b"" if t < 3 else language.decode_bytes([t]) for t in range(TOKENS)]
    wanted = [choice.encode() for choice in CHOICES]
    rng = random.Random(1)
    masks = StructuredMasks(TOKENS, Uploader(device))
    requests = [make_request(compiler, i, choice=CHOICES) for i in range(12)]
    requests.insert(4, make_request(None))
    masks.update(requests)
    for _ in range(14):
        if rng.random() < 0.5:
            masks.begin(requests)
        logits = torch.randn(len(requests), TOKENS).to(device)
        kept = logits.clone()
        masks.apply(kept, requests)
        for request, row, before in zip(requests, kept.cpu(), logits.cpu(), strict=True):
            if request.grammar is None:
                assert torch.equal(row, before)
                continue
            text = b"".join(bytes_of[token] for token in request.output_ids)
            follow = {
                token
                for token, new in enumerate(bytes_of)
                if new and any(choice.startswith(text + new) for choice in wanted)
            }
            may = follow | ({EOS} if text in wanted else set())
            found = set(row.isfinite().nonzero()[:, 0].tolist())
            assert torch.equal(row[list(found)], before[list(found)])
            # Where only one byte can come, llguidance leaves the tokenizer's own choice.
            is_open = len({bytes_of[token][:1] for token in may}) > 1
            assert found == may if is_open else found and found <= may
            if follow:
                request.tokens.append(rng.choice(sorted(follow)))
    masks.close()


@pytest.mark.gpu
def test_nothing_waits_for_the_device(compiler: GrammarCompiler) -> None:
    sampler, masks = make_sampler(device="cuda")
    requests = [make_request(compiler, i, choice=CHOICES) for i in range(5)]
    requests.append(make_request(None))
    logits = torch.randn(6, TOKENS, device="cuda")
    sampler.sample(logits.clone(), requests)
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks.begin(requests)
        sampled = sampler.sample(logits, requests)  # raises if it waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sampled.token_ids.shape == (6,)
    assert not sampled.bad.any()


@pytest.mark.parametrize("vocab_size", [2030, 2048, 2049, 2061, 2600])
def test_a_model_may_have_more_logits_than_tokens_or_fewer(tokenizer: Any, vocab_size: int) -> None:
    compiler = GrammarCompiler(tokenizer, vocab_size, frozenset([EOS]))
    requests = [
        make_request(compiler, i, [EOS] if i % 2 else [], regex="[a-zé日]{1,40}") for i in range(8)
    ]
    drive(requests, vocab_size)
    for request in requests:
        text = text_of(tokenizer, request)
        assert 1 <= len(text) <= 40
        assert set(text) <= set("abcdefghijklmnopqrstuvwxyzé日")
        assert max(request.output_ids) < min(vocab_size, TOKENS)


def test_ends_are_the_models_and_only_at_the_end(tokenizer: Any) -> None:
    """They need be neither the tokenizer's nor special: one here is the letter a."""
    (letter,) = tokenizer("a", add_special_tokens=False)["input_ids"]
    ends = frozenset([letter, 2055, 700])
    compiler = GrammarCompiler(tokenizer, 2060, ends)
    _, masks = make_sampler(2060)
    tokens = tokenizer("bb", add_special_tokens=False)["input_ids"]
    with_all = make_request(compiler, 0, sorted(ends), regex="b{2}[ab]*")
    with_one = make_request(compiler, 1, [2055, 9], regex="b{2}[ab]*")
    without = make_request(compiler, 2, [], regex="b{2}[ab]*")
    requests = [with_all, with_one, without]
    for found in allowed(masks, requests, 2060):
        assert not found & (ends | {EOS, 9, TOKENS})
        assert found
    for request in requests:
        request.tokens += tokens
    all_ends, one_end, no_end = allowed(masks, requests, 2060)
    assert all_ends & (ends | {EOS, 9, TOKENS}) == ends
    assert one_end & (ends | {EOS, 9, TOKENS}) == {2055, 9}
    assert not no_end & (ends | {EOS, 9, TOKENS})
    assert no_end == all_ends - ends == one_end - {2055, 9} != set()


# Rows that come and go ----------------------------------------------------------------------------


def test_masks_follow_the_rows(compiler: GrammarCompiler, tokenizer: Any) -> None:
    """Begun or not, in another order, with others between, or begun for rows that then changed."""
    ids = tokenizer("yesterday", add_special_tokens=False)["input_ids"]
    requests = [make_request(compiler, i, choice=CHOICES) for i in range(len(ids))]
    for i, request in enumerate(requests):
        request.tokens += ids[:i]
    alone = [allowed(make_sampler()[1], [request])[0] for request in requests]
    _, masks = make_sampler()
    rng = random.Random(0)
    for _ in range(40):
        rows = rng.sample(range(len(ids)), rng.randint(1, len(ids)))
        some = [requests[row] for row in rows]
        if rng.random() < 0.6:
            masks.begin(some)
        if rng.random() < 0.3:
            masks.begin(requests[: rng.randint(0, 2)])
        some.insert(rng.randint(0, len(some)), make_request(None))
        found = [row for row in allowed(masks, some) if len(row) < TOKENS]
        assert found == [alone[row] for row in rows]
    masks.close()


def test_what_has_not_moved_is_not_made_again(compiler: GrammarCompiler) -> None:
    _, masks = make_sampler()
    requests = [make_request(compiler, i, choice=CHOICES) for i in range(3)]
    assert masks._masks.advance(requests) == [0, 1, 2]
    masks._masks.fill([0, 1, 2])
    (first, *_), _, _ = (sorted(row) for row in allowed(masks, requests))
    requests[1].tokens.append(first)
    assert masks._masks.advance(requests) == [1]
    masks._masks.fill([1])
    assert masks._masks.advance(requests) == []
    assert masks._masks.advance(requests[1:]) == [0, 1]


def test_a_row_may_become_another_requests(compiler: GrammarCompiler) -> None:
    """Of another language, and just as far."""
    _, masks = make_sampler()
    one, other = (make_request(compiler, regex=regex) for regex in ("[a-f]{9}", "[0-9]{9}"))
    assert allowed(masks, [one])[0].isdisjoint(allowed(masks, [other])[0])


def test_only_what_no_token_can_end_is_ended(compiler: GrammarCompiler) -> None:
    _, masks = make_sampler()
    requests = [make_request(compiler, i, ends, choice=["no"]) for i, ends in enumerate(([], [2]))]
    while not (found := ended(requests)):
        for request, row in zip(requests, allowed(masks, requests), strict=True):
            request.tokens.append(min(row))
    assert found == [(requests[0], None)]
    assert allowed(masks, requests)[1] == {EOS}


def test_a_row_that_has_ended_is_left_alone(compiler: GrammarCompiler) -> None:
    """With asynchronous scheduling it is sampled once more, in vain."""
    _, masks = make_sampler()
    requests = [make_request(compiler, i, choice=["yes"]) for i in range(2)]
    requests[0].tokens.append(EOS)
    finish(requests[0], FinishReason.STOP)
    assert allowed(masks, requests)[0] > allowed(masks, requests)[1] != set()


def test_samples_of_one_prompt_are_apart(compiler: GrammarCompiler) -> None:
    one, other = make_request(compiler, choice=CHOICES), make_request(None)
    other.grammar = one.grammar.copy()
    _, masks = make_sampler()
    first, same = allowed(masks, [one, other])
    assert first == same
    one.tokens.append(min(first))
    assert allowed(masks, [one, other])[1] == same != allowed(masks, [one])[0]
