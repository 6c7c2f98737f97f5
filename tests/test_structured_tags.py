"""Structural tags: free text, and JSON of a schema behind certain words."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from tokenizers import AddedToken

from tests.schemas import assert_valid
from tests.structured_cases import EOS, TOKENS, allowed, make_request, make_sampler, tiny_tokenizer
from vattn.engine.grammars import Grammar, GrammarCompiler
from vattn.models import tiny_path
from vattn.sampling_params import StructuredOutputsParams

DAYS = {
    "type": "object",
    "properties": {"days": {"$ref": "#/$defs/Days"}},
    "required": ["days"],
    "additionalProperties": False,
    "$defs": {"Days": {"type": "integer", "minimum": 1, "maximum": 9}},
}


def call(name: str, schema: Any) -> dict[str, Any]:
    return {"begin": f'<call>{{"{name}": ', "schema": schema, "end": "}</call>"}


def tag(triggers: list[str], *structures: dict[str, Any]) -> dict[str, Any]:
    return {"type": "structural_tag", "triggers": triggers, "structures": list(structures)}


CALLS = tag(["<call>"], call("weather", DAYS), call("any", {"type": "object"}))
WEATHER = '<call>{"weather": {"days": 3}}</call>'


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def tagged() -> Any:
    """A tokenizer that has the tags, and one more, as tokens that are text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_path(), local_files_only=True)
    tokenizer.add_tokens([AddedToken(t, special=False) for t in ("<call>", "</call>", "<think>")])
    return tokenizer


@pytest.fixture(scope="module", params=["spelled", "tokens"])
def grammar_and_tokenizer(request: Any, tokenizer: Any, tagged: Any) -> tuple[Grammar, Any]:
    chosen = tokenizer if request.param == "spelled" else tagged
    compiler = GrammarCompiler(tagged, len(tagged), frozenset([EOS]))
    asked = StructuredOutputsParams(structural_tag=CALLS, whitespace_pattern=" ?")
    return compiler.compile(asked), chosen


def fate(grammar: Grammar, ids: list[int]) -> str:
    """What becomes of an output: it may end, must go on, or is not in the language."""
    grammar = grammar.copy()
    if not grammar.advance(ids):
        return "no"
    end = grammar.vocabulary.end
    mask = grammar.matcher.compute_bitmask()
    return "may end" if mask[end // 8] >> end % 8 & 1 else "goes on"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "may end"),
        ("Any text, with\nlines and { [ <", "may end"),
        ("A <think> b </think> <cal", "may end"),
        ("Now <call>", "goes on"),
        ("Now <call> and", "no"),
        ('<call>{"weather": {"days": 3', "goes on"),
        ('<call>{"weather": {"days": 30', "no"),
        ('<call>{"none"', "no"),
        ('<call>{"any": {"a": [1, {}]}}</call>', "may end"),
        ('<call>{"any": {"a": [1, {}]}} </call>', "no"),
        (f"<cal{WEATHER}{WEATHER} and {WEATHER}, <", "may end"),
        (f"{WEATHER} <call>{{}}", "no"),
    ],
)
def test_what_is_in_the_language(
    grammar_and_tokenizer: tuple[Grammar, Any], text: str, expected: str
) -> None:
    grammar, tokenizer = grammar_and_tokenizer
    assert fate(grammar, tokenizer.encode(text, add_special_tokens=False)) == expected


def test_random_outputs_keep_to_the_schema(tokenizer: Any) -> None:
    """Of a trigger so short that text runs into it all the time; any token that may come does."""
    schema = {"type": "array", "items": {"enum": [1, "b", None]}, "maxItems": 2}
    asked = tag(["e", "th"], *({"begin": b, "schema": schema, "end": "!"} for b in ("e: ", "th=")))
    compiler = GrammarCompiler(tokenizer, TOKENS, frozenset([EOS]))
    params: dict[str, Any] = {"structural_tag": asked, "disable_any_whitespace": True}
    requests = [make_request(compiler, seed, **params) for seed in range(8)]
    _, masks = make_sampler()
    rng = random.Random(0)
    for _ in range(60):
        for request, row in zip(requests, allowed(masks, requests), strict=True):
            request.tokens.append(rng.choice(sorted(row - {EOS})))
    found = 0
    for request in requests:
        text = tokenizer.decode(request.output_ids)
        while begun := re.search("e|th", text):
            text = text[begun.start() :]
            begin = "e: " if text[0] == "e" else "th="
            if len(text) < 30:  # it may be cut off
                break
            assert text.startswith(begin)
            value, end = json.JSONDecoder().raw_decode(text[len(begin) :])
            assert_valid(schema, text[len(begin) :][:end])
            text = text[len(begin) + end :]
            assert text[0] == "!", value
            text, found = text[1:], found + 1
    assert found > 20
    masks.close()


@pytest.mark.parametrize(
    ("schema", "words"),
    [({"not": {}}, '"not"'), (False, "no output is in it"), ({"extends": {}}, "old draft")],
)
def test_a_schema_that_does_not_compile(tokenizer: Any, schema: Any, words: str) -> None:
    compiler = GrammarCompiler(tokenizer, TOKENS, frozenset([EOS]))
    asked = StructuredOutputsParams(structural_tag=tag(["<call>"], call("a", schema)))
    with pytest.raises(ValueError, match="cannot be compiled: structural_tag=") as error:
        compiler.compile(asked)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{", "is no JSON"),
        ({"type": "structural_tag", "format": {}}, '"triggers" and "structures"'),
        ({**CALLS, "type": "tag"}, "type='tag'"),
        (tag([], call("a", {})), "triggers"),
        (tag(["<call>", ""], call("a", {})), "triggers"),
        (tag(["<call>"]), "structures"),
        (tag(["<call>"], {"begin": "<call>", "schema": {}}), '"end"'),
        (tag(["<call>"], {**call("a", {}), "schema": 5}), '"schema"'),
        (tag(["<call>", "<other>"], call("a", {})), "'<other>'"),
        (tag(["<other>"], call("a", {})), "'<other>'"),
        (tag(["<call>"], call("a", {}), {"begin": "x", "schema": {}, "end": ""}), "begin='x'"),
    ],
)
def test_what_is_no_structural_tag(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match="structural_tag") as error:
        StructuredOutputsParams(structural_tag=given)
    assert words in str(error.value)
