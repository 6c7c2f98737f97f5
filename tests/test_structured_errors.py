"""Structured outputs that cannot be: refused when they are compiled, explained when they fail."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
from vattn.engine.grammars import Grammar, GrammarCompiler
from vattn.engine.structured import ended, explain
from vattn.request import Request
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


# What breaks --------------------------------------------------------------------------------------


class Panic(BaseException):
    """As what comes out of Rust."""


class BrokenGrammar(Grammar):
    """Some of it raises."""

    def __init__(self, whole: Grammar, *broken: str) -> None:
        super().__init__(whole.vocabulary, whole.matcher)
        self.broken = broken

    def advance(self, output_ids: Sequence[int]) -> bool:
        self._break("advance")
        return super().advance(output_ids)

    def is_complete(self) -> bool:
        self._break("is_complete")
        return super().is_complete()

    def allows_any(self, tokens: Sequence[int]) -> bool:
        self._break("allows_any")
        return super().allows_any(tokens)

    def _break(self, name: str) -> None:
        if name in self.broken:
            raise Panic(f"{name} of {self.vocabulary.end} broke")


def break_grammar(request: Request, *broken: str) -> None:
    request.grammar = BrokenGrammar(request.grammar, *broken)


@pytest.mark.parametrize("early", [False, True])
def test_a_grammar_that_breaks_is_its_requests_affair(
    compiler: GrammarCompiler, early: bool
) -> None:
    sampler, masks = make_sampler()
    lost, well = (make_request(compiler, i, choice=CHOICES) for i in range(2))
    break_grammar(lost, "advance")
    if early:
        masks.begin([lost, well])
    sampled = sampler.sample(torch.randn(2, TOKENS), [lost, well]).send().wait()
    assert sampled.bad_rows() == [0]
    assert "llguidance failed: Panic: advance of" in str(explain(lost))
    assert explain(well) is None
    masks.check()
    masks.close()


@pytest.mark.parametrize("broken", ["advance", "is_complete"])
def test_a_grammar_that_breaks_when_its_end_is_looked_for(
    compiler: GrammarCompiler, broken: str
) -> None:
    lost, well = (make_request(compiler, i, [], choice=["no"]) for i in range(2))
    break_grammar(lost, broken)
    ((request, problem),) = ended([lost, well])
    assert request is lost
    assert f"cannot go on: llguidance failed: Panic: {broken}" in str(problem)


@pytest.mark.parametrize(
    ("broken", "params"),
    [
        ("allows_any", {"allowed_token_ids": [7]}),
        ("is_complete", {"allowed_token_ids": [7]}),
        ("is_complete", {}),
    ],
)
def test_a_grammar_that_breaks_when_it_is_to_explain(
    compiler: GrammarCompiler, broken: str, params: dict[str, Any]
) -> None:
    request = make_request(compiler, choice=CHOICES, params=params)
    break_grammar(request, broken)
    assert f"llguidance failed: Panic: {broken}" in str(explain(request))


@pytest.mark.parametrize("early", [False, True])
def test_a_worker_that_breaks_loses_the_rows_it_was_at(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    from llguidance import numpy as llguidance_numpy

    sampler, masks = make_sampler()
    requests = [make_request(compiler, i, choice=CHOICES) for i in range(3)]
    lost = requests[1].grammar.matcher
    fill = llguidance_numpy.fill_next_token_bitmask_par

    def breaks(executor: Any, rows: list[Any], *rest: Any) -> None:
        if any(matcher is lost for matcher, _ in rows):
            raise Panic("poisoned")
        fill(executor, rows, *rest)

    monkeypatch.setattr(llguidance_numpy, "fill_next_token_bitmask_par", breaks)
    if early:
        masks.begin(requests)
    sampled = sampler.sample(torch.randn(3, TOKENS), requests).send().wait()
    assert sampled.bad_rows() == [1]
    assert "llguidance failed: Panic: poisoned" in str(explain(requests[1]))
    assert [explain(request) for request in requests[::2]] == [None, None]
    masks.check()
    masks.close()


def test_masks_are_made_without_a_thread_if_there_is_none(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, masks = make_sampler()
    request = make_request(compiler, choice=CHOICES)
    wanted = allowed(make_sampler()[1], [request])

    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    masks.begin([request])
    assert allowed(masks, [request]) == wanted
    masks.close()


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


def test_a_language_that_only_its_first_output_can_begin_is_refused(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``(a{1000}){1000}``, whose first mask uses up what a lexer may hold: it takes seconds."""
    can_begin = iter((True, False, False))
    monkeypatch.setattr(Grammar, "has_tokens", lambda grammar: next(can_begin))
    with pytest.raises(ValueError, match="cannot be compiled"):
        compiler.compile(StructuredOutputsParams(regex="a{3}"))
