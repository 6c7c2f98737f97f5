"""What `/v1/completions` refuses: by name, with OpenAI's error body."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

pytest_plugins = ("tests.server_fixtures",)

# Fields of OpenAI and vLLM that are not served, and values that ask for something.
UNSUPPORTED = {
    "suffix": "the end",
    "best_of": 3,
    "use_beam_search": True,
    "length_penalty": 0.5,
    "watermarking": True,
    "spaces_between_special_tokens": False,
    "truncation_side": "right",
    "logprob_token_ids": [1],
    "session_id": "a",
    "return_token_offsets": True,
    "return_mm_kwargs": False,
    "routed_experts_prompt_start": 1,
    "kv_transfer_params": {"a": 1},
    "ec_transfer_params": {"a": 1},
    "vllm_xargs": {"a": 1},
    "repetition_detection": {"max_pattern_size": 3},
    "thinking_token_budget": 3,
    "stream_interval": 2,
    "logits_processors": ["a.b"],
    "prompt_embeds": "AAAA",
    "guided_json": {},
    "guided_regex": "a",
    "guided_choice": ["a"],
    "guided_grammar": "root ::= x",
    "service_tier": "flex",
    "store": True,
    "metadata": {"a": "b"},
    "prompt_cache_key": "a",
    "prompt_cache_retention": "24h",
    "messages": [],
    "a_new_field": 1,
}
# Values, and the path of the field that is at fault.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": "1"}, "n"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"stop": ["a", 1]}, "stop[1]"),
    ({"stop": [""]}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": "x"}}, "logit_bias.5"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"min_tokens": 20}, "min_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include": True}}, "stream_options.include"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"stop": {"a": 1}}, "stop"),
    ({"logit_bias": {"5": -100.5}}, "logit_bias.5"),
    ({"max_tokens": 600}, "max_tokens"),
    ({"prompt": "word " * 600, "max_tokens": 600}, "prompt"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"priority": 1}, "priority"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"request_id": "no\nid"}, "request_id"),
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [10**9]}, "prompt"),
    ({"prompt": [10**9], "stream": True}, "prompt"),
]
# What asks for nothing is taken.
HARMLESS = {
    "suffix": None,
    "best_of": 1,
    "echo": False,
    "service_tier": "auto",
    "store": False,
    "metadata": None,
    "logit_bias": None,
    "stream": None,
    "temperature": None,
    "truncation_side": "left",
    "response_format": {"type": "text"},
    "user": "somebody",
}


@pytest.fixture(scope="module")
def client(server_of_session: Any) -> Iterator[httpx.Client]:
    # Without a certificate store, which takes long to load.
    with server_of_session.http_client(verify=False) as client:
        yield client


def refused(client: httpx.Client, fields: dict[str, Any]) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"prompt": "a", **fields})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_refuses_what_is_not_supported(client: httpx.Client, name: str) -> None:
    error = refused(client, {name: UNSUPPORTED[name]})
    assert error["param"] == name
    assert error["message"] == f"{name} is not supported; leave it out"


@pytest.mark.parametrize(("fields", "param"), WRONG)
def test_refuses_what_is_wrong(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    assert refused(client, fields)["param"] == param


def test_takes_what_asks_for_nothing(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, **HARMLESS})
    assert response.status_code == 200, response.text


def test_refuses_what_is_too_long(client: httpx.Client, server: Any) -> None:
    error = refused(client, {"max_tokens": 600})
    assert error["code"] == "context_length_exceeded"
    assert "512" in error["message"]
    with server.client() as api, pytest.raises(openai.BadRequestError) as raised:
        api.completions.create(model="embedded", prompt="word " * 600, stream=True)
    assert raised.value.code == "context_length_exceeded"


def test_refuses_what_is_no_object(client: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    for body in (b"{", b"[]", b"3", b"", b'{"prompt": "a", "temperature": NaN}'):
        response = client.post("/v1/completions", content=body, headers=headers)
        assert response.status_code == 400, body
        assert response.json()["error"]["message"]
