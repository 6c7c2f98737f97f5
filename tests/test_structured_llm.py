"""Structured outputs through ``vattn.LLM``: valid in any batch, and errors of one request alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

import vattn
from tests.engine_cases import EMBEDDED_PATH, assert_nothing_left
from tests.models import one_thread
from tests.schemas import assert_valid, random_schema
from vattn.engine.grammars import Grammar
from vattn.outputs import CompletionOutput, RequestOutput
from vattn.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

PROMPTS = ["A transaction is a group of", "The", "Pages are mapped when", "In the year"]
UNICODE = "[日本語😀é]{6}"


def make_llm(**options: Any) -> vattn.LLM:
    """On strict memory with small pages: what is not mapped faults."""
    options = {
        "device": "cpu",
        "dtype": "float32",
        "max_num_seqs": 64,
        "page_bytes": 4096,
        "strict": True,
        "kv_cache_memory_bytes": "64MiB",
        **options,
    }
    return vattn.LLM(str(EMBEDDED_PATH), **options)


@pytest.fixture(scope="module")
def llm() -> Iterator[vattn.LLM]:
    with make_llm() as llm:
        yield llm
        assert_nothing_left(llm)


def structured(seed: int = 0, **options: Any) -> SamplingParams:
    """Parameters; those of a language go to the language."""
    kinds = StructuredOutputsParams.__dataclass_fields__
    asked = {name: options.pop(name) for name in list(options) if name in kinds}
    return SamplingParams(
        **{"max_tokens": 1500, "seed": seed, **options},
        structured_outputs=StructuredOutputsParams(**asked),
    )


def generate(
    llm: vattn.LLM, params: list[SamplingParams], prompts: list[str] | None = None
) -> list[RequestOutput]:
    texts = prompts or [PROMPTS[i % len(PROMPTS)] for i in range(len(params))]
    with one_thread():
        outputs = llm.generate(texts, params, use_tqdm=False)
    llm.engine.check()
    return outputs


def stopped(output: RequestOutput) -> list[str]:
    """The texts of the samples, which have all ended by themselves."""
    assert [(s.error, s.finish_reason) for s in output.outputs] == [
        (None, "stop") for _ in output.outputs
    ]
    return [sample.text for sample in output.outputs]


def failed(output: RequestOutput) -> str:
    (sample,) = output.outputs
    assert sample.finish_reason == "error"
    return str(sample.error)


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_200_random_schemas(ahead: bool) -> None:
    """All at once, one and three samples, with and without end of sequence, beside plain ones."""
    schemas = [random_schema(seed) for seed in range(200)]
    params = [
        structured(
            seed,
            json=schema,
            disable_any_whitespace=bool(seed % 2),
            whitespace_pattern=None if seed % 2 else " ?",
            n=3 if seed % 5 == 0 else 1,
            temperature=(0.0, 0.5, 1.0, 1.5)[seed % 4],
            ignore_eos=seed % 3 == 0,
        )
        for seed, schema in enumerate(schemas)
    ]
    plain = [SamplingParams(seed=i, max_tokens=60, ignore_eos=True, top_p=0.9) for i in range(20)]
    mixed = [*params]
    for i, each in enumerate(plain):
        mixed.insert(11 * i, each)
    with make_llm(async_scheduling=ahead) as llm:
        outputs = generate(llm, mixed)
        alone = generate(llm, plain, [PROMPTS[mixed.index(p) % 4] for p in plain])
        assert_nothing_left(llm)
    found = [o for o, p in zip(outputs, mixed, strict=True) if p.structured_outputs]
    for schema, output in zip(schemas, found, strict=True):
        for text in stopped(output):
            assert_valid(schema, text)
    beside = [o for o, p in zip(outputs, mixed, strict=True) if not p.structured_outputs]
    assert [tokens(o) for o in beside] == [tokens(o) for o in alone]


def tokens(output: RequestOutput) -> list[list[int]]:
    return [sample.token_ids for sample in output.outputs]


LARK = """
start: "(" item ("," " "? item){0,3} ")"
item: NAME | start | %json {"type": "boolean"}
NAME: /[a-z]{1,8}/
"""
GBNF = 'root ::= "<" word ("-" word)? ">"\nword ::= [a-z] [a-z] [a-z]?'
ITEM = r"(?:[a-z]{1,8}|true|false|\((?:[a-z]{1,8}|[(), a-z])*\))"


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_every_kind_of_language(llm: vattn.LLM, n: int, ignore_eos: bool) -> None:
    common: dict[str, Any] = {"n": n, "ignore_eos": ignore_eos}
    choices = ["yes", "yesterday", "no way", "日本語", "naïve 😀", 'a "quoted" / one\n']
    asked = [
        structured(1, regex=r"^(\d{3}-){2}\d{4}$", **common),
        structured(2, choice=choices, temperature=1.5, **common),
        structured(3, choice=["only this one, whatever it takes"], **common),
        structured(4, regex="[ab]{9}", max_tokens=None, logprobs=1, **common),
        structured(5, grammar=LARK, **common),
        structured(6, grammar=GBNF, temperature=1.2, **common),
        structured(7, regex=UNICODE, temperature=2.0, **common),
        structured(8, json={"const": "😀é\n"}, **common),
    ]
    outputs = generate(llm, asked)
    digits, one_of, forced, letters, lark, gbnf, uni, const = map(stopped, outputs)
    assert all(re.fullmatch(r"(\d{3}-){2}\d{4}", text) for text in digits)
    assert set(one_of) <= set(choices)
    assert forced == ["only this one, whatever it takes"] * n
    assert all(re.fullmatch("[ab]{9}", text) for text in letters)
    for text in lark:
        assert re.fullmatch(rf"\({ITEM}(?:, ?{ITEM}){{0,3}}\)", text), text
        assert text.count("(") == text.count(")")
    assert all(re.fullmatch(r"<[a-z]{2,3}(-[a-z]{2,3})?>", text) for text in gbnf)
    assert all(re.fullmatch(UNICODE, text) for text in uni)
    assert [json.loads(text) for text in const] == ["😀é\n"] * n


def test_free_text_with_json_in_it(llm: vattn.LLM) -> None:
    """It ends where the model ends it, or with its tokens, but not by itself."""
    (brace,) = llm.get_tokenizer().encode("{", add_special_tokens=False)
    structure = {"begin": "{", "schema": {"enum": [[1], "two"]}, "end": "}"}
    tag = {"type": "structural_tag", "triggers": ["{"], "structures": [structure]}
    params = structured(structural_tag=tag, max_tokens=40, n=3, logit_bias={brace: 14.0})
    samples = [sample for output in generate(llm, [params] * 4) for sample in output.outputs]
    whole = re.compile(r"""(?:[^{]|{(?:\[ *1 *\]|"two")})*(?:{(?:\[? *|\[ *1 *\]?|"?t?w?o?))?""")
    assert all(whole.fullmatch(sample.text) for sample in samples)
    assert {sample.finish_reason for sample in samples} <= {"stop", "length"}
    assert any("}" in sample.text for sample in samples)


def test_an_output_may_be_empty(llm: vattn.LLM) -> None:
    ends, cannot = generate(llm, [structured(regex="", ignore_eos=each) for each in (False, True)])
    assert stopped(ends) == [""]
    assert "nothing but an empty output" in failed(cannot)


def test_any_json_object(llm: vattn.LLM) -> None:
    """The model would go on for ever, so it is kept from commas and helped to end a string."""
    tokenizer = llm.get_tokenizer()
    bias = {tokenizer.convert_tokens_to_ids(text): -100.0 for text in (",", '",')}
    bias[tokenizer.convert_tokens_to_ids('"')] = 6.0
    asked = structured(json_object=True, disable_any_whitespace=True, n=8, logit_bias=bias)
    for output in generate(llm, [asked] * 4):
        found = [json.loads(text) for text in stopped(output)]
        assert all(isinstance(each, dict) for each in found)
        assert any(found)


def test_max_tokens_may_cut_it(llm: vattn.LLM) -> None:
    (output,) = generate(llm, [structured(regex="[a-z]{300}", max_tokens=7)])
    (sample,) = output.outputs
    assert (sample.finish_reason, len(sample.token_ids)) == ("length", 7)
    assert re.fullmatch("[a-z]{7,}", sample.text)


def test_a_stream_gives_every_character_once(llm: vattn.LLM) -> None:
    """Its characters are of several tokens each."""
    text, last = "", None
    params = structured(
        3, regex=UNICODE, temperature=2.0, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    for output in llm.stream(PROMPTS[0], params):
        (sample,) = output.outputs
        assert "\ufffd" not in sample.text
        text, last = text + sample.text, sample
    assert isinstance(last, CompletionOutput)
    assert last.finish_reason == "stop"
    assert re.fullmatch(UNICODE, text)


@pytest.mark.parametrize("swap_space", [0.0, 0.01])
def test_requests_that_are_preempted(swap_space: float) -> None:
    """Their outputs go on where they were; the second time, prompts are in the cache."""
    schemas = [random_schema(seed) for seed in range(300, 324)]
    params = [
        structured(seed, json=schema, disable_any_whitespace=True, n=1 + 2 * (seed % 4 == 0))
        for seed, schema in enumerate(schemas)
    ]
    prompts = [f"{PROMPTS[i % 4]} and so on, that is what it says {i}" for i in range(24)]
    options: dict[str, Any] = {"kv_cache_memory_bytes": "512KiB", "swap_space": swap_space}
    with make_llm(max_model_len=600, max_num_batched_tokens=64, **options) as llm:
        first, second = (generate(llm, params, prompts) for _ in range(2))
        stats = llm.stats()
        assert stats.num_preemptions > 0
        assert stats.prefix_cache_hits > 0
        assert_nothing_left(llm)
    for outputs in (first, second):
        for schema, output in zip(schemas, outputs, strict=True):
            for text in stopped(output):
                assert_valid(schema, text)
    assert list(map(tokens, first)) == list(map(tokens, second))


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_errors_are_of_one_request_alone(ahead: bool) -> None:
    well = structured(1, regex="[a-z]{5,9}")
    plain = SamplingParams(temperature=0, max_tokens=12)
    bad: list[tuple[SamplingParams, str]] = [
        (structured(json={"type": "object", "required": 5}), "array for 'required'"),
        (structured(json={"uniqueItems": True}), "uniqueItems"),
        (structured(regex="a("), "unclosed group"),
        (structured(grammar="start: nothing"), "unknown name"),
        (structured(choice=["yes", "no"], min_tokens=50), "min_tokens=50 asks for more"),
        (structured(choice=["no"], min_tokens=50, ignore_eos=True), "min_tokens=50 asks for more"),
        (structured(regex="[a-z]+", allowed_token_ids=[4]), "allowed_token_ids exclude every"),
    ]
    with make_llm(async_scheduling=ahead) as llm:
        outputs = generate(llm, [well, plain, *(params for params, _ in bad), well, plain])
        assert_nothing_left(llm)
    for output, (_, words) in zip(outputs[2:-2], bad, strict=True):
        assert words in failed(output)
    for output in (outputs[0], outputs[-2]):
        assert re.fullmatch("[a-z]{5,9}", stopped(output)[0])
    for output in (outputs[1], outputs[-1]):
        assert output.outputs[0].error is None
        assert len(output.outputs[0].token_ids) == 12


def test_no_tokenizer_no_structure() -> None:
    with make_llm(skip_tokenizer_init=True) as llm:
        params = structured(choice=["yes"], detokenize=False)
        asked: Any = [{"prompt_token_ids": [5, 6]}] * 2
        plain = SamplingParams(max_tokens=3, temperature=0, detokenize=False, ignore_eos=True)
        refused, served = llm.generate(asked, [params, plain], use_tqdm=False)
    assert "structured_outputs need a tokenizer" in failed(refused)
    assert len(served.outputs[0].token_ids) == 3


def test_a_failed_step_leaves_the_masks_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    with make_llm() as llm:
        runner, calls = llm.engine.runner, iter(range(1000))
        run = runner.run

        def broken(*arguments: Any, **options: Any) -> Any:
            if next(calls) == 3:
                raise RuntimeError("made to fail")
            return run(*arguments, **options)

        monkeypatch.setattr(runner, "run", broken)
        params = [structured(i, regex="[a-z]{20,30}") for i in range(3)]
        assert all("made to fail" in failed(output) for output in generate(llm, params))
        again = generate(llm, params[:2])
        assert all(re.fullmatch("[a-z]{20,30}", stopped(output)[0]) for output in again)
        assert_nothing_left(llm)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("call", [1, 4])
def test_a_grammar_that_breaks_loses_nothing_else(
    monkeypatch: pytest.MonkeyPatch, is_async: bool, call: int
) -> None:
    calls = 0
    advance = Grammar.advance

    def breaks(self: Grammar, ids: Sequence[int]) -> bool:
        nonlocal calls
        calls += 1
        if calls == call:
            raise RuntimeError("it broke")
        return advance(self, ids)

    with make_llm(async_scheduling=is_async) as llm:
        monkeypatch.setattr(Grammar, "advance", breaks)
        plain = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
        outputs = generate(llm, [plain, structured(regex="[a-z]{30}", ignore_eos=True)])
        samples = [output.outputs[0] for output in outputs]
        assert (samples[0].finish_reason, len(samples[0].token_ids)) == ("length", 20)
        assert samples[1].finish_reason == "error"
        assert "llguidance failed: RuntimeError: it broke" in str(samples[1].error)
        assert_nothing_left(llm)
