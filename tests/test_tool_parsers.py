"""Tool calls in text: found, streamed, and never half of a tag shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vattn.server.tools import TOOL_PARSERS, make_tool_parser
from vattn.server.tools.base import (
    CallBegins,
    CallEnds,
    CallGoesOn,
    FunctionCall,
    ParsedText,
    Piece,
    Said,
    ToolParser,
    parse_whole,
)
from vattn.server.tools.forced import ListParser, NamedParser
from vattn.server.tools.scan import MAX_DEPTH

MAKERS: dict[str, Callable[[], ToolParser]] = {
    "hermes": lambda: make_tool_parser("hermes"),
    "llama3_json": lambda: make_tool_parser("llama3_json"),
    "required": ListParser,
    "named": lambda: NamedParser("f"),
}

# What texts are made of: all that a parser looks at, and some that it does not.
PARTS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "<tool", "</tool_", "<|py", "<"),
    *(";", "\n", " ", "[", "]", ",", "{", "}", ": ", '"', "\\", "\x01", "ü€", "null", "0"),
    '{"name": "f", "arguments": {"a": [1, {"b": "}</tool_call>"}]}}',
    '{"arguments": {}, "id": -1.5e3, "name": "late"}',
    '{"name": "g", "parameters"',
    ': {"x": "q\\"{["}}',
    '{"name": "", "arguments": {}}',
    '{"name": "two", "name": "x"',
    '"arguments": {"a": tru}}',
    '{"answer": 42}',
]


def joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one kind are one piece."""
    result: list[Piece] = []
    for piece in pieces:
        match result[-1:], piece:
            case [Said(before)], Said(text):
                result[-1] = Said(before + text)
            case [CallGoesOn(before)], CallGoesOn(text):
                result[-1] = CallGoesOn(before + text)
            case _:
                result.append(piece)
    return result


def run(parser: ToolParser, deltas: list[str]) -> list[Piece]:
    return joined([p for delta in deltas for p in parser.feed(delta)] + parser.finish())


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=150, deadline=None)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=14), data=st.data())
def test_any_cut_gives_the_same(name: str, parts: list[str], data: Any) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    deltas = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = run(MAKERS[name](), [text])
    assert run(MAKERS[name](), deltas) == whole
    assert run(MAKERS[name](), list(text)) == whole
    for call in parse_whole(MAKERS[name](), text).calls:
        assert call.name
        if not call.is_cut:
            assert isinstance(json.loads(call.arguments), dict)


@pytest.mark.parametrize("name", ["hermes", "llama3_json"])
@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=14))
def test_nothing_is_lost(name: str, parts: list[str]) -> None:
    text = "".join(parts)
    parsed = parse_whole(make_tool_parser(name), text)
    if not parsed.calls:
        assert parsed.content == text
    # What is left of a text without its calls and tags is there, in its order.
    rest = iter(text)
    assert all(char in rest for char in parsed.content)


strings = st.text(st.characters(codec="utf-8"), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3),
    max_leaves=6,
)
calls = st.tuples(strings.filter(bool), st.dictionaries(strings, values, max_size=3))
words = st.text("abc .,!?ü", max_size=12)


@settings(max_examples=80, deadline=None)
@given(written=st.lists(st.tuples(calls, words), max_size=4), first=words)
def test_hermes_calls_are_read(written: list[Any], first: str) -> None:
    text = first
    for (name, arguments), after in written:
        call = json.dumps({"name": name, "arguments": arguments})
        text += f"\n<tool_call>\n{call}\n</tool_call>{after}"
    parsed = parse_whole(make_tool_parser("hermes"), text)
    assert parsed.calls == [FunctionCall(n, json.dumps(a)) for (n, a), _ in written]
    said = first + "".join(after for _, after in written)
    assert "".join(parsed.content.split()) == "".join(said.split())


@settings(max_examples=80, deadline=None)
@given(
    written=st.lists(calls, min_size=1, max_size=4),
    separator=st.sampled_from([";", "; ", "\n", ";\n<|python_tag|>"]),
    tag=st.booleans(),
)
def test_llama_calls_are_read(written: list[Any], separator: str, tag: bool) -> None:
    texts = [json.dumps({"name": n, "parameters": a}, ensure_ascii=False) for n, a in written]
    text = "<|python_tag|>" * tag + separator.join(texts)
    parsed = parse_whole(make_tool_parser("llama3_json"), text)
    assert parsed.content == ""
    assert parsed.calls == [FunctionCall(n, json.dumps(a, ensure_ascii=False)) for n, a in written]


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", "Just text < tags.", "Just text < tags.", []),
        ("hermes", "  \n", "  \n", []),
        ("hermes", 'A <tool_call>{"name": "f", "arguments": {}}', "A", [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', ..., []),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', ..., []),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', ..., []),
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>', ..., []),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": ', "", [("f", '{"a": ', True)]),
        ("hermes", '<tool_call>{"name": "f", "argu', ..., []),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>', ..., []),
        ("hermes", '{"name": "f", "arguments": {}}', ..., []),
        ("llama3_json", 'So: {"name": "f", "parameters": {}}', ..., []),
        ("llama3_json", '{"answer": 42}', ..., []),
        ("llama3_json", '{"name": "f", "parameters": {}}; and so on', "; and so on", [("f", "{}")]),
        ("llama3_json", 'A <|python_tag|> {"name": "f", "parameters": {}}', "A", [("f", "{}")]),
        ("required", '[{"name": "f", "parameters": {"a": 1}}, {"name"', ', {"name"', [
            ("f", '{"a": 1}')]),
        ("required", '[{"name": "f", "parameters": {}}, {"name": "g", "parameters": {"a', "", [
            ("f", "{}"), ("g", '{"a', True)]),
        ("named", '{"a": 1}', "", [("f", '{"a": 1}')]),
        ("named", '{"a": 1', "", [("f", '{"a": 1', True)]),
    ],
)  # fmt: skip
def test_examples(name: str, text: str, content: Any, calls: list[Any]) -> None:
    parsed = parse_whole(MAKERS[name](), text)
    assert parsed.content == (text if content is ... else content)
    assert parsed.calls == [FunctionCall(*call) for call in calls]


def test_arguments_arrive_as_they_are_written() -> None:
    parser = make_tool_parser("hermes")
    assert parser.feed("Well. <tool_") == [Said("Well.")]
    assert parser.feed('call>\n{"name": "f", "argu') == []
    assert parser.feed('ments": {"a"') == [CallBegins("f"), CallGoesOn('{"a"')]
    assert parser.feed(": 1") == [CallGoesOn(": 1")]
    assert parser.feed("}}</to") == [CallGoesOn("}"), CallEnds(complete=True)]
    assert parser.feed("ol_call>") == []
    assert parser.finish() == []


def test_a_call_that_breaks_late_ends_incomplete() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": 1}, oops}'
    pieces = run(make_tool_parser("hermes"), [text])
    raw = text.removesuffix("oops}")
    assert pieces == [
        CallBegins("f"),
        CallGoesOn('{"a": 1}'),
        CallEnds(complete=False, raw=raw, rest=", "),
        Said("oops}"),
    ]
    assert parse_whole(make_tool_parser("hermes"), text) == ParsedText(text, [])


def test_deep_arguments_are_text() -> None:
    deep = '{"name": "f", "arguments": {"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}}"
    assert parse_whole(make_tool_parser("llama3_json"), deep) == ParsedText(deep, [])


def test_unknown_parsers_are_refused() -> None:
    with pytest.raises(ValueError, match="no tool call parser 'mistral'; there are hermes"):
        make_tool_parser("mistral")
    assert all(make_tool_parser(name).finish() == [] for name in TOOL_PARSERS)
