"""Speculation changes nothing but the number of steps: whatever is guessed, with every option."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import vattn
from tests.engine_cases import (
    ALL_FAMILIES,
    EMBEDDED,
    EMBEDDED_PATH,
    assert_equal,
    assert_nothing_left,
    greedy,
    make_llm,
    mixed_cases,
    run,
)
from tests.models import FAMILIES, one_thread
from tests.speculation_cases import (
    NGRAM,
    Oracle,
    assert_same,
    copying_prompts,
    draft_model,
    generate,
    known_outputs,
    known_text,
    llm_with,
    whole_texts,
)
from vattn.sampling_params import (
    BeamSearchParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)

METHODS = ("ngram", "equal", "random")
# Every family with drafts of both kinds, and some with a draft model that knows nothing.
PAIRS = [
    (family, method)
    for family in ALL_FAMILIES
    for method in METHODS
    if method != "random" or family in ("llama", "gemma3")
]


def config(method: str, family: str) -> dict[str, Any]:
    return NGRAM if method == "ngram" else draft_model(family, equal=method == "equal")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EMBEDDED_PATH)


# Whatever is guessed -----------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_greedy_text_is_that_of_generate(family: str, method: str) -> None:
    cases = mixed_cases(family)
    llm = llm_with(family, config(method, family))
    assert_equal(run(llm, cases), cases, family)
    stats = llm.stats()
    assert stats.generation_tokens == sum(case.new_tokens for case in cases)
    assert stats.spec_decode_num_drafts > 0
    if method == "equal":
        assert stats.spec_decode_num_accepted_tokens == stats.spec_decode_num_draft_tokens
        assert stats.num_steps <= 10
    if method == "random":
        assert stats.spec_decode_num_accepted_tokens < stats.spec_decode_num_draft_tokens / 10
    assert_nothing_left(llm)


def mixed_params(family: str) -> tuple[list[list[int]], list[SamplingParams]]:
    """Greedy and drawn, one sample and three, with and without log probabilities and stops."""
    prompts, params = [], []
    for number, case in enumerate(mixed_cases(family)[:16]):
        options: dict[str, Any] = {"max_tokens": case.new_tokens + 6, "seed": number}
        if number % 2:
            options |= {"temperature": 0.8, "top_k": 12, "top_p": 0.95}
        else:
            options["temperature"] = 0
        if number % 3 == 0:
            options["logprobs"] = 2
        if number % 5 == 0:
            options["n"] = 3
        if number % 4 == 0:
            options |= {"stop_token_ids": list(range(10, 90, 7)), "min_tokens": number % 8}
        if number % 7 == 0:
            options["logit_bias"] = {5: 3.0}
        if number % 11 == 0:
            options["presence_penalty"] = 1.0
        prompts.append(list(case.prompt) * (1 + number % 2))
        params.append(SamplingParams(ignore_eos=True, **options))
    return prompts, params


@pytest.mark.parametrize(("family", "method"), [p for p in PAIRS if p[0] != EMBEDDED])
def test_drawn_samples_of_every_kind_are_the_same(family: str, method: str) -> None:
    prompts, params = mixed_params(family)
    options: dict[str, Any] = {"max_num_batched_tokens": 64, "max_num_seqs": 12}
    plain = make_llm(family, **options)
    wanted = generate(plain, prompts, params)
    llm = llm_with(family, config(method, family), **options)
    assert_same(generate(llm, prompts, params), wanted)
    assert llm.stats().generation_tokens == plain.stats().generation_tokens
    assert llm.stats().spec_decode_num_draft_tokens > 0
    assert_nothing_left(llm)


@pytest.mark.parametrize(
    ("family", "method", "swap_space"),
    [
        ("llama", "ngram", 0),
        ("llama", "equal", 1),
        ("llama", "random", 0),
        ("gemma3", "ngram", 1),
        ("gemma3", "equal", 0),
        ("mistral", "random", 1),
    ],
)
def test_with_few_pages(family: str, method: str, swap_space: int) -> None:
    """Requests are preempted, and drafts give their pages up first."""
    prompts = [list(case.prompt)[:20] for case in mixed_cases(family)[:16]]
    params = [
        SamplingParams(max_tokens=70, temperature=number % 2, seed=number, ignore_eos=True)
        for number in range(16)
    ]
    wanted = generate(make_llm(family, enable_prefix_caching=False), prompts, params)
    options: dict[str, Any] = {
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 170 * 4096,
        "swap_space": swap_space,
        "max_num_seqs": 12,
    }
    llm = llm_with(family, config(method, family), **options)
    assert_same(generate(llm, prompts, params), wanted)
    stats = llm.stats()
    assert stats.num_preemptions > 0
    assert (stats.requests_swapped_out > 0) == (swap_space > 0)
    assert stats.spec_decode_num_draft_tokens > 0
    assert_nothing_left(llm)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_without_chunks_and_by_priority(family: str) -> None:
    prompts, params = mixed_params(family)
    options: dict[str, Any] = {
        "enable_chunked_prefill": False,
        "max_num_seqs": 4,
        "scheduling_policy": "priority",
        "enable_prefix_caching": False,
    }
    wanted = generate(make_llm(family, **options), prompts, params)
    llm = llm_with(family, NGRAM, **options)
    with one_thread():
        found = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            params,
            use_tqdm=False,
            priority=[-number for number in range(len(prompts))],
        )
    assert_same(found, wanted)
    assert_nothing_left(llm)


# Steps -------------------------------------------------------------------------------------------


def test_copied_text_takes_fewer_steps(tokenizer: Any) -> None:
    """At least 1.5 times fewer, counted over prompts that run four at a time."""
    prompts = copying_prompts(tokenizer)
    params = [greedy(128)] * len(prompts)
    options = {"max_num_seqs": 4, "max_model_len": 512}
    plain = make_llm(EMBEDDED, **options)
    wanted = generate(plain, prompts, params)
    speculative = {**NGRAM, "num_speculative_tokens": 5, "prompt_lookup_max": 4}
    llm = llm_with(EMBEDDED, speculative, **options)
    assert_same(generate(llm, prompts, params), wanted)
    assert plain.stats().num_steps >= 1.5 * llm.stats().num_steps


def test_counts_tell_of_each_position() -> None:
    llm = llm_with("llama", NGRAM)
    prompts, known, params = known_text("llama", 31)
    Oracle(llm, known)
    generate(llm, prompts, params)
    stats = llm.stats()
    # After the first token six steps of five tokens each: all drafts are right.
    assert stats.num_steps == 7
    assert stats.spec_decode_num_drafts == 6
    assert stats.spec_decode_num_draft_tokens == stats.spec_decode_num_accepted_tokens == 24
    assert stats.spec_decode_num_accepted_tokens_per_pos == (6, 6, 6, 6)
    assert stats.generation_tokens == 31


# What ends within accepted drafts ----------------------------------------------------------------


@pytest.mark.parametrize("at", range(1, 8))
def test_stop_tokens_within_drafts(at: int) -> None:
    prompts, known, _ = known_text("llama", 30)
    text = known_outputs(prompts, known)
    llm, plain = llm_with("llama", NGRAM), make_llm("llama")
    Oracle(llm, known)
    params = [greedy(30, stop_token_ids=[text[at]], logprobs=1)]
    wanted = generate(plain, prompts, params)
    found = generate(llm, prompts, params)
    assert_same(found, wanted)
    assert found[0].outputs[0].stop_reason == text[at]
    # What comes after it is not found by the next request either.
    again = [[*prompts[0], *text[:20]]]
    assert_same(generate(llm, again, [greedy(3)]), generate(plain, again, [greedy(3)]))
    assert llm.stats().generation_tokens == plain.stats().generation_tokens
    assert_nothing_left(llm)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("new", [12, 13, 14, 40])
def test_stop_strings_within_drafts(tokenizer: Any, include: bool, new: int) -> None:
    """Tokens after it never come, wherever in a run of drafts it ends; nor do log probabilities."""
    prompts = copying_prompts(tokenizer)
    options: dict[str, Any] = {
        "skip_tokenizer_init": False,
        "tokenizer": tokenizer,
        "max_model_len": 512,
    }
    whole = generate(make_llm(EMBEDDED, **options), prompts, [greedy(48)] * len(prompts))
    plain, llm = make_llm(EMBEDDED, **options), llm_with(EMBEDDED, NGRAM, **options)
    Oracle(llm, whole_texts(whole))
    for begin in range(3, 30, 4):
        params = [
            greedy(
                new,
                stop=[output.outputs[0].text[begin : begin + 5]],
                include_stop_str_in_output=include,
                logprobs=1,
                min_tokens=begin % 3,
            )
            for output in whole
        ]
        assert_same(generate(llm, prompts, params), generate(plain, prompts, params))
    assert llm.stats().generation_tokens == plain.stats().generation_tokens
    assert llm.stats().finished == plain.stats().finished
    assert llm.stats().num_steps < plain.stats().num_steps / 2
    assert_nothing_left(llm)


def test_a_stream_tells_all_tokens_once(tokenizer: Any) -> None:
    prompts = copying_prompts(tokenizer)[:3]
    options: dict[str, Any] = {
        "skip_tokenizer_init": False,
        "tokenizer": tokenizer,
        "max_model_len": 512,
    }
    params = [greedy(40, stop=["zzz"], logprobs=0, output_kind=RequestOutputKind.DELTA)] * 3
    wanted = generate(make_llm(EMBEDDED, **options), prompts, params)
    llm = llm_with(EMBEDDED, NGRAM, **options)
    Oracle(llm, whole_texts(wanted), luck=0.8)
    texts, tokens, logprobs = [""] * 3, [[], [], []], [[], [], []]  # type: ignore[var-annotated]
    with one_thread():
        for output in llm.stream([{"prompt_token_ids": prompt} for prompt in prompts], params):
            number = int(output.request_id.rpartition("-")[2])
            texts[number] += output.outputs[0].text
            tokens[number] += output.outputs[0].token_ids
            logprobs[number] += output.outputs[0].logprobs or []
    assert texts == [output.outputs[0].text for output in wanted]
    assert tokens == [output.outputs[0].token_ids for output in wanted]
    assert [len(each) for each in logprobs] == [40, 40, 40]
    assert_nothing_left(llm)


@pytest.mark.parametrize("new", range(1, 9))
def test_limits(new: int) -> None:
    prompts, known, params = known_text("gemma3", new)
    llm = llm_with("gemma3", NGRAM)
    Oracle(llm, known)
    found = generate(llm, prompts, params)
    assert found[0].outputs[0].token_ids == known_outputs(prompts, known)[:new]
    assert found[0].outputs[0].finish_reason == "length"
    assert_nothing_left(llm)


@pytest.mark.parametrize("after", range(1, 6))
def test_aborts_between_steps(after: int) -> None:
    cases = mixed_cases("mistral")[:12]
    params = [greedy(24)] * len(cases)
    prompts = [list(case.prompt) for case in cases]
    wanted = generate(make_llm("mistral"), prompts, params)
    llm = llm_with("mistral", draft_model("mistral", equal=True), max_num_seqs=6)
    requests = []
    for number, prompt in enumerate(prompts):
        requests += llm.engine.make_requests(str(number), prompt, params[number])
        llm.engine.add(requests[-1])
    with one_thread():
        for steps in range(200):
            llm.engine.step()
            llm.engine.check()
            if steps == after:
                llm.engine.abort(["0", "3", "11"])
            if not llm.engine.has_unfinished:
                break
    for request, output in zip(requests, wanted, strict=True):
        whole = output.outputs[0].token_ids
        if request.id in ("0", "3", "11") and len(request.output_ids) < len(whole):
            assert request.finish_reason == "abort"
            assert request.output_ids == whole[: len(request.output_ids)]
        else:
            assert request.output_ids == whole
    assert_nothing_left(llm)


def test_what_has_no_drafts_is_the_same_beside_what_has(tokenizer: Any) -> None:
    """Beams, structured outputs, bad words; and prompts whose log probabilities are wanted."""
    prompts = copying_prompts(tokenizer)[:5]
    params = [
        greedy(16, prompt_logprobs=1),
        greedy(16, structured_outputs=StructuredOutputsParams(regex="[a-z]{4,12} [0-9]{3}")),
        greedy(16, bad_words=["page", " the"]),
        greedy(16, frequency_penalty=0.5),
        greedy(16),
    ]
    search = BeamSearchParams(beam_width=3, max_tokens=12, ignore_eos=True)
    options: dict[str, Any] = {
        "skip_tokenizer_init": False,
        "tokenizer": tokenizer,
        "max_model_len": 512,
    }
    found = []
    for config_of in (None, NGRAM, draft_model(EMBEDDED, equal=True)):
        llm = llm_with(EMBEDDED, config_of, **options)
        outputs = generate(llm, prompts, params)
        with one_thread():
            beams = llm.beam_search([{"prompt_token_ids": prompts[0]}], search)
        found.append((outputs, beams))
        assert (llm.stats().spec_decode_num_drafts > 0) == (config_of is not None)
        assert_nothing_left(llm)
    for outputs, beams in found[1:]:
        assert_same(outputs, found[0][0])
        scored, wanted = outputs[0].prompt_logprobs, found[0][0][0].prompt_logprobs
        assert scored is not None
        assert wanted is not None
        assert [e and e.keys() for e in scored] == [e and e.keys() for e in wanted]
        assert [s.token_ids for s in beams[0].sequences] == [
            s.token_ids for s in found[0][1][0].sequences
        ]


# What is left in the cache -----------------------------------------------------------------------


def steps(llm: vattn.LLM, prompt: list[int], new: int) -> Iterator[Any]:
    """A request after each step, while it runs."""
    (request,) = llm.engine.make_requests("r", prompt, greedy(new))
    llm.engine.add(request)
    with one_thread():
        while llm.engine.has_unfinished:
            llm.engine.step()
            llm.engine.check()
            if request.slot >= 0:
                yield request


@pytest.mark.parametrize("luck", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_slots_hold_what_they_would_hold_without_drafts(family: str, luck: float) -> None:
    prompts, known, _ = known_text(family, 40)
    plain, llm = make_llm(family), llm_with(family, NGRAM)
    Oracle(llm, known, luck=luck)
    held = {
        request.computed: contents(plain, request.slot) for request in steps(plain, prompts[0], 40)
    }
    seen = 0
    for request in steps(llm, prompts[0], 40):
        assert llm.engine.cache.tokens(request.slot) == request.computed
        for (first, k), (begin, other) in zip(
            contents(llm, request.slot), held[request.computed], strict=True
        ):
            # Of a window more or less of what no query will see again may still be there.
            start = max(first, begin)
            torch.testing.assert_close(
                k[start - first :], other[start - begin :], rtol=1e-4, atol=1e-4
            )
        seen += 1
    assert seen >= 8
    assert_nothing_left(llm)


def contents(llm: vattn.LLM, slot: int) -> list[tuple[int, torch.Tensor]]:
    """K and V of every layer, and the first token that they are of."""
    cache = llm.engine.cache
    return [
        (cache.first_token(slot, layer), tensor.clone())
        for layer in range(len(cache.specs))
        for tensor in cache.view(slot, layer)
    ]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_next_turn_finds_the_same_prefix(family: str) -> None:
    prompts, known, params = known_text(family, 30)
    plain, llm = make_llm(family), llm_with(family, NGRAM)
    Oracle(llm, known, luck=0.7)
    found = []
    for each in (plain, llm):
        first = generate(each, prompts, params)[0]
        turn = [[*first.prompt_token_ids, *first.outputs[0].token_ids, 7, 8, 9]]
        Oracle(llm, lambda request: request.tokens)
        found.append(generate(each, turn, [greedy(10)]))
    assert_same(*found)
    assert found[0][0].num_cached_tokens == len(prompts[0]) + 29
    assert llm.stats().prefix_cache_hits == plain.stats().prefix_cache_hits
    assert_nothing_left(llm)
