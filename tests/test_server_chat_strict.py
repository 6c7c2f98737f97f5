"""Strict tools that the model may call: free text, and arguments in their schema if it calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import openai
import pydantic
import pytest

from vattn.server.openai.logprobs import ChatLogprobs
from vattn.server.openai.token_bytes import TokenBytes

if TYPE_CHECKING:
    from tests.server_fixtures import RunningServer

pytest_plugins = ["tests.server_fixtures"]

MODEL = "embedded"
USER: Any = {"role": "user", "content": "Rain?"}
LOOSE: Any = {"type": "function", "function": {"name": "clock"}}
EOS = 2


class Weather(pydantic.BaseModel):
    """Of a place."""

    days: Literal[1, 2, 3]
    place: Literal["Turin", "Rome"]
    wind: bool


STRICT: Any = openai.pydantic_function_tool(Weather)


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def pushed(server: RunningServer, text: str, stop: str | None = None) -> dict[str, Any]:
    """Makes free text begin like this, and end with a word.

    Each token is likelier than the next one, and the penalty leaves little of those that
    have been there.
    """
    ids: list[int] = server.llm.tokenizer.encode(text, add_special_tokens=False)
    assert len(set(ids)) == len(ids)
    bias = dict.fromkeys(map(str, range(len(server.llm.tokenizer))), -100.0)
    bias |= {str(token): max(100.0 - 13 * place, 34.0) for place, token in enumerate(ids)}
    return {
        "logit_bias": bias,
        "extra_body": {"repetition_penalty": 1e19, "include_stop_str_in_output": True},
        "stop": stop,
        "temperature": 0.0,
        "max_tokens": 100,
    }


@pytest.mark.parametrize(
    ("parser", "begin", "stop"),
    [("hermes", "<tool_call>", "</tool_call>"), ("llama3_json", "{", None)],
)
def test_parse_with_a_pydantic_tool(
    server: RunningServer,
    client: openai.OpenAI,
    monkeypatch: pytest.MonkeyPatch,
    parser: str,
    begin: str,
    stop: str | None,
) -> None:
    settings = replace(server.settings, tool_call_parser=parser)
    monkeypatch.setattr(server.state, "settings", settings)
    asked: Any = {"model": MODEL, "messages": [USER], "tools": [STRICT]}
    options = {**asked, **pushed(server, begin, stop), "parallel_tool_calls": False}
    answer = client.chat.completions.parse(**options)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls
    for call in choice.message.tool_calls:
        assert isinstance(call.function.parsed_arguments, Weather)
    with client.chat.completions.stream(**options) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed
    assert [each.function.arguments for each in streamed] == [
        each.function.arguments for each in choice.message.tool_calls
    ]


@pytest.mark.parametrize("parser", ["hermes", "llama3_json"])
def test_the_model_need_not_call(
    server: RunningServer, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, parser: str
) -> None:
    settings = replace(server.settings, tool_call_parser=parser)
    monkeypatch.setattr(server.state, "settings", settings)
    asked: Any = {"model": MODEL, "messages": [USER], "tools": [LOOSE, STRICT]}
    choice = client.chat.completions.create(**asked, **pushed(server, " today", "day")).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.content == " today"
    assert not choice.message.tool_calls


def test_any_object_goes_to_a_tool_that_is_not_strict(
    server: RunningServer, client: openai.OpenAI
) -> None:
    asked: Any = {"model": MODEL, "messages": [USER], "tools": [LOOSE, STRICT]}
    options = pushed(server, "<tool_call>", "</tool_call>")
    choice = client.chat.completions.create(**asked, **options).choices[0]
    assert choice.message.tool_calls
    for call in choice.message.tool_calls:
        assert call.function.name in ("clock", "Weather")
        if call.function.name == "Weather":
            Weather.model_validate(json.loads(call.function.arguments))
        elif choice.finish_reason == "length":  # of an object without limits
            assert call.function.arguments.startswith("{")
        else:
            assert isinstance(json.loads(call.function.arguments), dict)


TAG: dict[str, Any] = {
    "type": "structural_tag",
    "triggers": ["<"],
    "structures": [{"begin": "<a ", "schema": {"enum": [1, 2]}, "end": ">"}],
}


@pytest.mark.parametrize(
    "asked",
    [{"response_format": TAG}, {"structured_outputs": {"structural_tag": json.dumps(TAG)}}],
    ids=lambda asked: next(iter(asked)),
)
def test_structural_tags(server: RunningServer, asked: dict[str, Any]) -> None:
    body = {"messages": [USER], **pushed(server, "<", ">"), **asked}
    body |= body.pop("extra_body")
    with server.http_client() as http:
        choice = http.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["message"]["content"] in ("<a 1>", "<a 2>")
    assert choice["finish_reason"] == "stop"


# What is refused ----------------------------------------------------------------------------------

BAD = {"type": "object", "properties": {"a": {"not": {}}}}


def tool(name: str, schema: dict[str, Any], strict: bool = True) -> dict[str, Any]:
    function = {"name": name, "parameters": schema, "strict": strict}
    return {"type": "function", "function": function}


SECOND = {"tools": [tool("good", {"type": "object"}), tool("bad", BAD)]}
ARGUMENTS = "tools[1].function.parameters"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (SECOND, ARGUMENTS, '"not"'),
        ({**SECOND, "tool_choice": "required"}, ARGUMENTS, '"not"'),
        (
            {**SECOND, "tool_choice": {"type": "function", "function": {"name": "bad"}}},
            ARGUMENTS,
            '"not"',
        ),
        (
            {"tools": [LOOSE, tool("old", {"extends": {}})]},
            ARGUMENTS,
            "old draft",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": BAD},
                }
            },
            "response_format.json_schema.schema",
            '"not"',
        ),
        (
            {"response_format": {**TAG, "structures": [{**TAG["structures"][0], "schema": BAD}]}},
            "response_format.structures",
            '"not"',
        ),
        ({"response_format": {**TAG, "triggers": ["x"]}}, "response_format", "'x'"),
        (
            {"response_format": {"type": "structural_tag", "format": {}}},
            "response_format.format",
            "not supported",
        ),
        ({"structured_outputs": {"json": BAD}}, "structured_outputs", '"not"'),
        ({"structured_outputs": {"structural_tag": "{"}}, "structured_outputs", "no JSON"),
        (
            {"tools": [STRICT], "response_format": {"type": "json_object"}},
            "response_format",
            "it may be one",
        ),
        ({"tools": [STRICT], "structured_outputs": {"regex": "a"}}, "structured_outputs", "strict"),
    ],
)
def test_what_is_refused(
    server: RunningServer, fields: dict[str, Any], param: str, message: str
) -> None:
    with server.http_client() as http:
        body = {"messages": [USER], "max_tokens": 1, **fields}
        response = http.post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert message in error["message"]


# Bytes of tokens ----------------------------------------------------------------------------------

TEXT = "naïve 日本語 😀 tab\t end"


def test_bytes_of_tokens_are_those_of_the_text(client: openai.OpenAI) -> None:
    """Its characters are of several tokens each."""
    choice = client.chat.completions.create(
        model=MODEL,
        messages=[USER],
        max_tokens=60,
        logprobs=True,
        top_logprobs=1,
        extra_body={"structured_outputs": {"regex": "[日本語😀é]{4}"}},
    ).choices[0]
    assert choice.logprobs is not None
    told = choice.logprobs.content or []
    octets = b"".join(bytes(token.bytes or []) for token in told if token.token != "</s>")
    assert octets.decode() == choice.message.content
    assert any("\ufffd" in token.token for token in told)
    assert all("token_id" not in token.token for token in told)


def test_bytes_of_every_kind_of_token(server: RunningServer) -> None:
    tokenizer: Any = server.llm.tokenizer
    known = TokenBytes(tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(known.of(t, tokenizer.decode([t])) or b"" for t in ids).decode() == TEXT
    assert known.of(EOS, "</s>") == b"</s>"
    assert known.of(1 << 20, None) is None
    assert ChatLogprobs(known, 0).of([], []) == []


def test_bytes_of_a_tokenizer_with_byte_fallback() -> None:
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE

    vocab = {"<unk>": 0, "\u2581a": 1, "b": 2, "<0xE6>": 3, "<0x97>": 4, "<0xA5>": 5}
    backend = Tokenizer(BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )

    class Tokens:
        backend_tokenizer = backend

    known = TokenBytes(Tokens())
    assert b"".join(known.of(token, "?") or b"" for token in range(1, 6)) == " ab日".encode()
    assert TokenBytes(object()).of(1, "é") == "é".encode()
