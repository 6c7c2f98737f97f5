"""What changes the text, through the whole engine, against transformers' `generate` with the same.

Requests of all kinds run together, with and without tokens in flight, and short of memory.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import vattn
from tests.engine_cases import (
    EMBEDDED,
    EMBEDDED_PATH,
    assert_nothing_left,
    engine_model,
    make_llm,
)
from tests.models import VOCABULARY, one_thread
from vattn.sampling_params import SamplingParams

NEW = 24
PROMPTS = (3, 17, 40, 9)
END = 7  # ends the text of those that have an end


def prompts_of(vocabulary: int) -> list[list[int]]:
    rng = random.Random(11)
    return [[rng.randrange(3, vocabulary) for _ in range(n)] for n in PROMPTS]


# So little memory that requests give way to others and come back.
TIGHT: dict[str, Any] = {
    "kv_cache_memory_bytes": "384KiB",
    "order": "token",
    "enable_prefix_caching": False,
    "swap_space": 0,
}
# Options of SamplingParams, and those of `generate` that mean the same.
ALLOWED = list(range(3, VOCABULARY, 2))
BIASES = {token: (token % 7 - 3) * 0.8 for token in range(0, VOCABULARY, 3)}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "repetition": ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
    "reward": ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
    "allowed": (
        {"allowed_token_ids": ALLOWED},
        {"suppress_tokens": [t for t in range(VOCABULARY) if t not in ALLOWED]},
    ),
    "bias": (
        {"logit_bias": BIASES},
        {"sequence_bias": [[[token], bias] for token, bias in BIASES.items()]},
    ),
    # The end is made likely, so that it comes as soon as it may.
    "least": (
        {"min_tokens": 9, "stop_token_ids": [END], "logit_bias": {END: 50.0}},
        {"min_new_tokens": 9, "eos_token_id": END, "sequence_bias": [[[END], 50.0]]},
    ),
}


def theirs(model: Any, prompt: list[int], options: dict[str, Any]) -> list[int]:
    ids = torch.tensor([prompt])
    defaults: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    defaults["max_new_tokens"] = NEW
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **(defaults | options),
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("options", [{}, TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_transform_is_transformers(
    family: str, is_async: bool, options: dict[str, Any]
) -> None:
    model, prompts = engine_model(family), prompts_of(VOCABULARY)
    given = [(prompt, *KINDS[kind]) for kind in KINDS for prompt in prompts]
    random.Random(2).shuffle(given)
    params = [
        SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, **ours)
        for _, ours, _ in given
    ]
    with one_thread(), make_llm(family, async_scheduling=is_async, **options) as llm:
        asked: Any = [prompt for prompt, _, _ in given]
        outputs = llm.generate(asked, params, use_tqdm=False)
        assert bool(options) == (llm.stats().num_preemptions > 0)
        assert_nothing_left(llm)
    with one_thread():
        for number, (prompt, ours, wanted) in enumerate(given):
            (sample,) = outputs[number].outputs
            assert sample.error is None, sample.error
            assert sample.token_ids == theirs(model, prompt, wanted), ours
            ends = "stop_token_ids" in ours
            assert sample.finish_reason == ("stop" if ends else "length")
            assert len(sample.token_ids) == (10 if ends else NEW)


@pytest.mark.parametrize("is_async", [False, True])
def test_bad_words_do_not_come(is_async: bool) -> None:
    options: Any = {"async_scheduling": is_async, "page_bytes": 4096}
    with vattn.LLM(str(EMBEDDED_PATH), dtype="float32", device="cpu", **options) as llm:
        prompt, plain = (
            "A transaction is a group of statements",
            SamplingParams(temperature=0, max_tokens=40),
        )
        (before,) = llm.generate([prompt], plain, use_tqdm=False)
        text = before.outputs[0].text
        words = [word for word in dict.fromkeys(text.split()) if word.isalpha()][:6]
        assert len(words) > 3
        params = SamplingParams(temperature=0, max_tokens=40, bad_words=words)
        (request,) = llm.engine.make_requests("r", [1], params)
        assert any(len(word) > 1 for word in request.bad_words_ids)
        (after,) = llm.generate([prompt], params, use_tqdm=False)
        tokenizer = llm.get_tokenizer()
        ids = tokenizer.encode(prompt)
        with one_thread():
            wanted = theirs(
                engine_model(EMBEDDED),
                ids,
                {"max_new_tokens": 40, "bad_words_ids": [list(w) for w in request.bad_words_ids]},
            )
        assert after.outputs[0].token_ids == wanted
        assert not set(after.outputs[0].text.split()) & set(words)


# Log probabilities --------------------------------------------------------------------------------


def rows_of(model: Any, tokens: list[int]) -> torch.Tensor:
    """Log probabilities that a plain forward pass gives for each next token, ``[n, V]``."""
    with one_thread(), torch.inference_mode():
        out: torch.Tensor = model(torch.tensor([tokens])).logits[0].float().log_softmax(1)
    return out


def assert_entry(entry: Any, row: torch.Tensor, token: int, count: int) -> None:
    assert next(iter(entry)) == token
    for other, value in entry.items():
        assert value.logprob == pytest.approx(float(row[other]), abs=2e-4)
    assert entry[token].rank == int((row > row[token]).sum()) + 1
    assert len(entry) - (entry[token].rank > count) == count
    others = [value.logprob for other, value in entry.items() if other != token]
    assert others == sorted(others, reverse=True)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_logprobs_are_those_of_a_plain_forward_pass(family: str, is_async: bool) -> None:
    model, prompts = engine_model(family), prompts_of(VOCABULARY)
    common: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}
    kinds: list[dict[str, Any]] = [
        {"temperature": 0, "logprobs": 3, "prompt_logprobs": 0},
        {"seed": 5, "logprobs": 0, "prompt_logprobs": 4},
        {"seed": 6, "logprobs": -1, "prompt_logprobs": -1, "repetition_penalty": 1.5},
        {"temperature": 0, "prompt_logprobs": 2},
    ]
    params = [SamplingParams(**common, **each) for each in kinds]
    with make_llm(
        family,
        async_scheduling=is_async,
        max_num_batched_tokens=16,
        max_num_seqs=8,
        max_logprobs=-1,
    ) as llm:
        asked: Any = prompts
        for _ in range(2):  # the second time the prefix cache has them
            with one_thread():
                outputs = llm.generate(asked, params, use_tqdm=False)
            for prompt, output, each in zip(prompts, outputs, params, strict=True):
                (sample,) = output.outputs
                tokens = prompt + sample.token_ids
                rows = rows_of(model, tokens)
                scored = output.prompt_logprobs
                assert scored is not None
                assert len(scored) == len(prompt)
                assert scored[0] is None
                for at in range(1, len(prompt)):
                    count = VOCABULARY if each.prompt_logprobs == -1 else each.prompt_logprobs
                    assert_entry(scored[at], rows[at - 1], prompt[at], count or 0)
                if each.logprobs is None:
                    assert sample.logprobs is None
                    continue
                assert sample.logprobs is not None
                assert len(sample.logprobs) == 8
                count = VOCABULARY if each.logprobs == -1 else each.logprobs
                for at, entry in enumerate(sample.logprobs, len(prompt)):
                    assert_entry(entry, rows[at - 1], tokens[at], count)
        assert_nothing_left(llm)


# Both ways of scheduling --------------------------------------------------------------------------


def test_samples_do_not_depend_on_what_is_in_flight() -> None:
    """With and without asynchronous scheduling, and alone: the same tokens for every request."""
    options: list[dict[str, Any]] = [
        {"presence_penalty": 0.9, "frequency_penalty": 0.4},
        {"repetition_penalty": 1.2, "top_k": 20},
        {},
        {"logit_bias": BIASES, "min_p": 0.02},
        {"allowed_token_ids": ALLOWED, "frequency_penalty": -0.5},
    ]
    prompts = prompts_of(VOCABULARY)
    given = [
        (prompt, SamplingParams(seed=i, max_tokens=NEW, ignore_eos=True, **each))
        for i, each in enumerate(options)
        for prompt in prompts
    ]
    run: Callable[[vattn.LLM, Any], list[list[int]]] = lambda llm, some: [  # noqa: E731
        output.outputs[0].token_ids
        for output in llm.generate(
            [prompt for prompt, _ in some], [each for _, each in some], use_tqdm=False
        )
    ]
    with one_thread(), make_llm(async_scheduling=False) as llm:
        together = run(llm, given)
        alone = [run(llm, [each])[0] for each in given[::3]]
        assert_nothing_left(llm)
    with one_thread(), make_llm(async_scheduling=True) as llm:
        assert run(llm, given) == together
        assert_nothing_left(llm)
    assert alone == together[::3]
