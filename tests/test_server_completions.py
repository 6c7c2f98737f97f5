"""`/v1/completions` over a real server, by the `openai` client."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

pytest_plugins = ("tests.server_fixtures",)

PROMPT = "The server listens on a port and"


def ask(server: Any, **fields: Any) -> Any:
    """A completion, greedy and short unless said otherwise; vLLM's fields go beside OpenAI's."""
    given = {"model": "embedded", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **fields}
    # Without a certificate store, which takes long to load.
    with server.client(http_client=httpx.Client(verify=False)) as client:
        if given.get("stream"):
            return list(client.completions.create(**given))
        return client.completions.create(**given)


def text_of(chunks: Any, index: int = 0) -> str:
    return "".join(c.text for chunk in chunks for c in chunk.choices if c.index == index)


def test_says_what_it_said(server: Any) -> None:
    found = ask(server)
    assert found.id.startswith("cmpl-")
    assert found.object == "text_completion"
    assert found.choices[0].finish_reason == "length"
    assert found.choices[0].text
    usage = found.usage
    assert usage.completion_tokens == 8
    assert usage.total_tokens == usage.prompt_tokens + 8


def test_a_second_time_the_prompt_is_in_the_cache(server: Any) -> None:
    prompt = PROMPT + " a second time it is " * 8
    first, second = (ask(server, prompt=prompt) for _ in range(2))
    assert second.usage.prompt_tokens_details.cached_tokens > 0
    assert second.choices[0].text == first.choices[0].text
    salted = ask(server, prompt=prompt, extra_body={"cache_salt": "of another tenant"})
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


def test_a_stream_is_the_same_in_pieces(server: Any) -> None:
    whole = ask(server)
    chunks = ask(server, stream=True, stream_options={"include_usage": True})
    assert text_of(chunks) == whole.choices[0].text
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 8
    assert chunks[-2].choices[0].finish_reason == "length"


def test_a_stream_may_tell_its_usage_always(server: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        chunk.usage.completion_tokens for chunk in ask(server, stream=True, stream_options=options)
    ]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 8


def test_streams_as_events(server: Any) -> None:
    with server.http_client(verify=False) as client:
        response = client.post(
            "/v1/completions", json={"prompt": PROMPT, "stream": True, "temperature": 0}
        )
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(event[6:]) for event in events[:-2])


def test_serves_many_clients_at_once(server: Any) -> None:
    alone = ask(server).choices[0].text

    async def streamed(client: openai.AsyncOpenAI) -> str:
        stream = await client.completions.create(
            model="embedded", prompt=PROMPT, max_tokens=8, temperature=0, stream=True
        )
        return text_of([chunk async for chunk in stream])

    async def main() -> list[str]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=server.key) as client:
            return await asyncio.gather(*(streamed(client) for _ in range(8)))

    assert asyncio.run(main()) == [alone] * 8


def test_several_prompts_and_samples_are_in_order(server: Any) -> None:
    prompts = [PROMPT, "Another thing is"]
    found = ask(server, prompt=prompts, n=2)
    alone = [ask(server, prompt=prompt).choices[0].text for prompt in prompts]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in found.choices] == [alone[0]] * 2 + [alone[1]] * 2
    assert found.usage.completion_tokens == 4 * 8
    chunks = ask(server, prompt=prompts, n=2, stream=True)
    assert [text_of(chunks, index) for index in range(4)] == [alone[0]] * 2 + [alone[1]] * 2


def test_takes_token_ids(server: Any) -> None:
    ids = server.llm.tokenizer.encode(PROMPT)
    text = ask(server).choices[0].text
    assert ask(server, prompt=ids).choices[0].text == text
    assert [c.text for c in ask(server, prompt=[ids, ids]).choices] == [text] * 2
    told = ask(server, extra_body={"return_token_ids": True}).choices[0]
    assert told.prompt_token_ids == ids
    assert server.llm.tokenizer.decode(told.token_ids) == text


@pytest.mark.parametrize("seed", [7, -7, -(2**63)])
def test_a_seed_repeats(server: Any, seed: int) -> None:
    texts = {
        ask(server, temperature=1, seed=given, max_tokens=16).choices[0].text
        for given in (seed, seed, seed ^ 1)
    }
    assert len(texts) == 2


def test_stops(server: Any) -> None:
    text = ask(server).choices[0].text
    stop = text[3:6]
    found = ask(server, stop=stop).choices[0]
    assert found.text == text[: text.index(stop)]
    assert (found.finish_reason, found.stop_reason) == ("stop", stop)
    kept = ask(server, stop=[stop], extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].text == text[: text.index(stop)] + stop


def test_bias_and_penalties_change_what_is_said(server: Any) -> None:
    token = server.llm.tokenizer.encode(" port", add_special_tokens=False)[0]
    forced = ask(server, logit_bias={str(token): 100}, extra_body={"return_token_ids": True})
    assert forced.choices[0].token_ids == [token] * 8
    allowed = ask(server, extra_body={"allowed_token_ids": [token], "return_token_ids": True})
    assert allowed.choices[0].token_ids == [token] * 8
    # 100 is the most that a bias may be, and each penalty takes 2 off for each time.
    bias = {str(token): 10}
    plain = ask(server, logit_bias=bias, max_tokens=24).choices[0].text
    assert ask(server, logit_bias=bias, max_tokens=24, frequency_penalty=2).choices[0].text != plain


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(server: Any, stream: bool) -> None:
    fields = {"stream": True} if stream else {}
    found = ask(server, logprobs=2, **fields)
    parts = [c.logprobs for part in (found if stream else [found]) for c in part.choices]
    tokens = [token for part in parts for token in part.tokens]
    offsets = [offset for part in parts for offset in part.text_offset]
    assert len(tokens) == 8
    assert offsets == [len("".join(tokens[:n])) for n in range(8)]
    for part in parts:
        for token, logprob, top in zip(
            part.tokens, part.token_logprobs, part.top_logprobs, strict=True
        ):
            assert top[token] == logprob == max(top.values()) <= 0
            assert len(top) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_echo(server: Any, stream: bool) -> None:
    plain = ask(server).choices[0].text
    fields: dict[str, Any] = {"echo": True, "logprobs": 1}
    if stream:
        chunks = ask(server, stream=True, **fields)
        assert text_of(chunks) == PROMPT + plain
        first = chunks[0].choices[0].logprobs
    else:
        choice = ask(server, **fields).choices[0]
        assert choice.text == PROMPT + plain
        first = choice.logprobs
    assert first.token_logprobs[0] is None
    assert first.top_logprobs[0] is None
    assert all(logprob < 0 for logprob in first.token_logprobs[1:])


@pytest.mark.parametrize("stream", [False, True])
def test_echo_of_what_was_not_scored(
    server: Any, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Its time was over before it began."""
    settings = replace(server.settings, request_timeout_s=1e-6)
    monkeypatch.setattr(server.state, "settings", settings)
    body = {"prompt": [5, 6, 7], "echo": True, "logprobs": 1, "stream": stream}
    with server.http_client() as client:
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 200
    text = response.text.partition("data: ")[2].partition("\n")[0] if stream else response.text
    (choice,) = json.loads(text)["choices"]
    assert choice["stop_reason"] == "deadline"
    assert choice["logprobs"]["token_logprobs"] == [None] * 3


def test_echo_alone_scores_a_prompt(server: Any) -> None:
    found = ask(server, echo=True, logprobs=0, max_tokens=0)
    ids = server.llm.tokenizer.encode(PROMPT)
    assert found.choices[0].text == PROMPT
    assert len(found.choices[0].logprobs.tokens) == len(ids)
    assert found.usage.completion_tokens == 0


def test_prompt_logprobs(server: Any) -> None:
    ids = server.llm.tokenizer.encode(PROMPT)
    scored = ask(server, extra_body={"prompt_logprobs": 1}).choices[0].prompt_logprobs
    assert scored[0] is None
    assert len(scored) == len(ids)
    assert all(str(token) in entry for token, entry in zip(ids[1:], scored[1:], strict=True))


def test_structured_outputs(server: Any) -> None:
    choice = {"structured_outputs": {"choice": ["left", "right"]}}
    assert ask(server, extra_body=choice).choices[0].text in ("left", "right")
    schema: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "boolean"}}}
    schema |= {"required": ["a"], "additionalProperties": False}
    tight = {"structured_outputs": {"json": schema, "disable_any_whitespace": True}}
    found = ask(server, extra_body=tight, max_tokens=32)
    assert set(json.loads(found.choices[0].text)) == {"a"}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["up"]}}}
    found = ask(server, extra_body={"response_format": wanted})
    assert json.loads(found.choices[0].text) == "up"


def test_truncates(server: Any) -> None:
    found = ask(server, extra_body={"truncate_prompt_tokens": 4})
    assert found.usage.prompt_tokens == 4
    long = ask(server, prompt=PROMPT * 100, extra_body={"truncate_prompt_tokens": -1})
    assert long.usage.total_tokens == 512
    with server.http_client() as client:
        body = {"prompt": PROMPT * 100, "truncate_prompt_tokens": -1}
        found = client.post("/v1/completions", json=body).json()
    assert found["usage"]["prompt_tokens"] == 512 - 16


def test_tokenizes(server: Any) -> None:
    with server.http_client(verify=False) as client:
        asked = {"prompt": PROMPT, "return_token_strs": True}
        found = client.post("/tokenize", json=asked).json()
        assert found["tokens"] == server.llm.tokenizer.encode(PROMPT)
        assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
        asked = {"prompt": PROMPT, "add_special_tokens": False}
        plain = client.post("/tokenize", json=asked).json()["tokens"]
        assert client.post("/detokenize", json={"tokens": plain}).json() == {"prompt": PROMPT}
        wrong = client.post("/detokenize", json={"tokens": [10**9]})
        assert wrong.status_code == 400
        assert wrong.json()["error"]["param"] == "tokens"


def test_names_its_models(server: Any) -> None:
    with server.client() as client:
        (model,) = client.models.list().data
        assert model.id == "embedded"
        assert model.max_model_len == 512
        assert client.models.retrieve("embedded") == model
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError) as error:
        ask(server, model="other")
    assert error.value.code == "model_not_found"
