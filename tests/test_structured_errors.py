"""Structured outputs that cannot be: refused when they are compiled, explained when they fail."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import pytest
import torch

from tests.structured_cases import (
    CHOICES,
    EOS,
    TOKENS,
    allowed,
    make_request,
    make_sampler,
    tiny_tokenizer,
)
from vattn.engine import grammars
from vattn.engine.grammars import GrammarCompiler
from vattn.engine.structured import ended, explain
from vattn.sampling_params import StructuredOutputsParams


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, TOKENS, frozenset([EOS]))


def test_a_token_outside_of_the_language_fails_its_request(compiler: GrammarCompiler) -> None:
    sampler, masks = make_sampler()
    lost, well = (make_request(compiler, i, choice=CHOICES) for i in range(2))
    lost.tokens.append(500)
    sampled = sampler.sample(torch.randn(2, TOKENS), [lost, well]).send().wait()
    assert sampled.bad_rows() == [0]
    assert "token 500 of the output is not in the language" in str(explain(lost))
    assert allowed(masks, [lost, well])[0] == set()
    lost.stop_ids = frozenset()
    ((request, problem),) = ended([lost, well])
    assert (request, problem) == (lost, explain(lost))
    assert explain(well) is None


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"min_tokens": 30}, ["complete after 1 tokens", "min_tokens=30", "lower it"]),
        ({"allowed_token_ids": [7, 8]}, ["allowed_token_ids exclude", "after 0 tokens"]),
        ({"bad_words": ["yes"]}, ["bad_words exclude", "after 0 tokens"]),
    ],
)
def test_contradictions_are_explained(
    compiler: GrammarCompiler, tokenizer: Any, params: dict[str, Any], words: list[str]
) -> None:
    (token,) = tokenizer("yes", add_special_tokens=False)["input_ids"][:1]
    request = make_request(compiler, choice=[tokenizer.decode([token])], params=params)
    if "min_tokens" in params:
        request.tokens.append(token)
    sampler, _ = make_sampler()
    if "bad_words" not in params:  # of which the sampler would have to know the tokens
        assert sampler.sample(torch.randn(1, TOKENS), [request]).send().wait().bad_rows() == [0]
    for word in words:
        assert word in str(explain(request))


def test_logits_that_are_nan_are_no_contradiction(compiler: GrammarCompiler) -> None:
    sampler, masks = make_sampler()
    asked: list[dict[str, Any]] = [{}, {"min_tokens": 3}, {"allowed_token_ids": list(range(99))}]
    requests = [make_request(compiler, i, regex="[a-z]*", params=p) for i, p in enumerate(asked)]
    logits = torch.full((len(requests), TOKENS), torch.nan)
    assert sampler.sample(logits, requests).send().wait().bad_rows() == [0, 1, 2]
    assert [explain(request) for request in requests] == [None] * 3
    masks.check()


def test_an_output_that_is_complete_too_early_is_told(compiler: GrammarCompiler) -> None:
    request = make_request(compiler, 0, [], choice=["no"], params={"min_tokens": 9})
    _, masks = make_sampler()
    while not (found := ended([request])):
        request.tokens.append(min(allowed(masks, [request])[0]))
    assert "min_tokens=9" in str(found[0][1])


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"json": "{"}, ["json='{'", "line 1"]),
        ({"json": "[]"}, ["an object or a boolean"]),
        ({"json": "false"}, ["no output is in it"]),
        ({"json": {"type": "text"}}, ["Invalid type: text"]),
        ({"json": {"uniqueItems": True}}, ["uniqueItems"]),
        ({"json": {"properties": {"a": {"not": {}}}}}, ['"not"']),
        ({"json": {"not": {}, "x-guidance": {"lenient": True}}}, ['"not"']),
        ({"json": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}, ["oneOf"]),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 2}}, ["minimum (3)"]),
        ({"json": {"$ref": "#"}}, ["no output is in it"]),
        ({"json": {"$ref": "#/$defs/none"}}, ["/$defs/none"]),
        ({"json": {"items": {"minProperties": 2}}}, ["minProperties=2", "may come twice"]),
        ({"json": {"$defs": {"a": {"divisibleBy": 2}}, "$ref": "#/$defs/a"}}, ["divisibleBy"]),
        ({"json": '{"items":' * 5000 + "{}" + "}" * 5000}, ["recursion"]),
        ({"json": {}, "whitespace_pattern": "("}, ["unclosed group"]),
        ({"regex": "a("}, ["regex='a('", "unclosed group"]),
        ({"regex": "a(?=b)"}, ["look-ahead"]),
        ({"regex": r"(a)\1"}, ["backreferences"]),
        ({"regex": "x" * (1 << 18 | 1)}, ["262145 characters", "at most 262144"]),
        ({"grammar": 'start: "a" b'}, ['unknown name: "b"']),
        ({"grammar": 'begin: "a"'}, ["no start rule"]),
        ({"grammar": "start: again\nagain: again"}, ["no output is in it"]),
        ({"choice": ["\ud800"]}, ["regex"]),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_language_that_does_not_compile(
    compiler: GrammarCompiler, asked: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"structured_outputs") as error:
        compiler.compile(StructuredOutputsParams(**asked))
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value)) < 1200


def test_objects_of_which_nothing_is_free_may_need_properties(compiler: GrammarCompiler) -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "null"}}}
    compiler.compile(StructuredOutputsParams(json={**schema, "minProperties": 2}))
    with pytest.raises(ValueError, match="minProperties=3"):
        compiler.compile(StructuredOutputsParams(json={**schema, "minProperties": 3}))


class _Slow:
    """Has no backend of the tokenizers library."""


@pytest.mark.parametrize(
    ("tokenizer", "words"), [(None, "need a tokenizer"), (_Slow(), "_Slow is none")]
)
def test_a_tokenizer_that_does_not_serve(tokenizer: Any, words: str) -> None:
    compiler = GrammarCompiler(tokenizer, TOKENS, frozenset([EOS]))
    with pytest.raises(ValueError, match=words):
        compiler.compile(StructuredOutputsParams(json_object=True))


def test_a_missing_library_is_named(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    compiler = GrammarCompiler(tokenizer, TOKENS, frozenset([EOS]))
    with pytest.raises(ValueError, match="pip install llguidance"):
        compiler.compile(StructuredOutputsParams(json_object=True))


# What is kept -------------------------------------------------------------------------------------


def test_a_language_is_compiled_once(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "_KEPT", 2)
    compiler = GrammarCompiler(tokenizer, TOKENS, frozenset([EOS]))
    compiled: list[str] = []
    compile_one = compiler._compile

    def counted(params: StructuredOutputsParams) -> Any:
        compiled.append(str(params.regex))
        return compile_one(params)

    monkeypatch.setattr(compiler, "_compile", counted)
    for regex in ("a", "b", "a", "a", "c", "a", "b"):
        compiler.compile(StructuredOutputsParams(regex=regex))
    assert compiled == ["a", "b", "c", "b"]
    assert len(compiler._kept) == 2


def test_a_language_that_ran_out_of_states_is_compiled_again(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies share a lexer: without that, nobody could use the language any more."""
    monkeypatch.setattr(grammars, "_LEXER_STATES", 600)
    compiler = GrammarCompiler(tokenizer, TOKENS, frozenset([EOS]))
    regex = "(.*[ab].{12}){3}x"
    request = make_request(compiler, regex=regex)
    _, masks = make_sampler()
    rng = random.Random(0)
    while found := allowed(masks, [request])[0]:
        request.tokens.append(rng.choice(sorted(found)))
    assert "too many states" in str(explain(request))
    again = make_request(compiler, 1, regex=regex)
    assert allowed(masks, [again])[0] != set()
