"""What `/v1/chat/completions` refuses, and that it names the field."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.server_fixtures import RunningServer

pytest_plugins = ["tests.server_fixtures"]

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f"}}
STRICT = {"type": "function", "function": {"name": "f", "strict": True}}
OTHER = {"type": "function", "function": {"name": "g"}}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}
ARGUMENTS = "messages[0].tool_calls[0].function.arguments"
OFF = "not supported"

MESSAGES: list[tuple[Any, str, str]] = [
    ([], "messages", "at least 1"),
    ([USER, {"role": "function", "content": "x"}], "messages[1].role", "one of system"),
    ([{"content": "x"}], "messages[0]", "role"),
    ([{"role": "user"}], "messages[0].content", "missing"),
    ([{"role": "user", "content": 5}], "messages[0].content", "string"),
    ([{"role": "user", "content": []}], "messages[0].content", "at least 1"),
    ([USER, {"role": "user", "content": [IMAGE]}], "messages[1].content[0].type", "image_url"),
    ([{"role": "assistant", "content": None}], "messages[0].content", "tool_calls"),
    ([{"role": "assistant", "content": "x", "refusal": "no"}], "messages[0].refusal", OFF),
    ([{"role": "assistant", "content": "x", "audio": {"id": "1"}}], "messages[0].audio", OFF),
    ([{"role": "assistant", "function_call": {}}], "messages[0].function_call", OFF),
    ([{"role": "assistant", "tool_calls": [CALL]}], ARGUMENTS, "no JSON"),
    ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id", "missing"),
    ([{**USER, "mood": "good"}], "messages[0].mood", OFF),
    ([{"role": "user", "content": "word " * 3000}], "messages", "maximum context"),
]
FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [TOOL, TOOL]}, "tools[1].function.name", "own name"),
    ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type", "custom"),
    ({"tools": [STRICT]}, "tools[0].function.strict", "required"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tool_choice": "often", "tools": [TOOL]}, "tool_choice", "none"),
    ({"tool_choice": OTHER, "tools": [TOOL]}, "tool_choice.function.name", "among"),
    ({"tool_choice": {"type": "allowed_tools"}, "tools": [TOOL]}, "tool_choice.type", OFF),
    (
        {"tool_choice": "required", "tools": [TOOL], "structured_outputs": {"regex": "a"}},
        "structured_outputs",
        "a call",
    ),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
    ({"max_tokens": 600}, "messages", "maximum context"),
    ({"top_logprobs": 3}, "top_logprobs", "logprobs=true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", OFF),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "tools"),
    ({"continue_final_message": True}, "continue_final_message", "add_generation_prompt"),
    ({"echo": True}, "echo", "continue_final_message"),
    ({"reasoning_effort": "high"}, "reasoning_effort", OFF),
    ({"modalities": ["text", "audio"]}, "modalities", OFF),
    ({"functions": [{"name": "f"}]}, "functions", OFF),
    ({"temprature": 1}, "temprature", OFF),
]
BODIES = [({"messages": messages}, *rest) for messages, *rest in MESSAGES]
BODIES += [({"messages": [USER], **fields}, *rest) for fields, *rest in FIELDS]


@pytest.mark.parametrize(("body", "param", "message"), [({}, "messages", "missing"), *BODIES])
def test_what_is_refused(
    server: RunningServer, body: dict[str, Any], param: str, message: str
) -> None:
    with server.http_client() as http:
        response = http.post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert message in error["message"]


def test_fields_that_ask_for_nothing_are_taken(server: RunningServer) -> None:
    nulls = ("audio", "functions", "prediction", "reasoning_effort", "tools", "tool_choice", "stop")
    body = {
        "messages": [USER],
        "max_tokens": 1,
        "store": False,
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        **dict.fromkeys(nulls),
    }
    with server.http_client() as http:
        assert http.post("/v1/chat/completions", json=body).status_code == 200
