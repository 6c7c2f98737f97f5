"""How much one request may ask for, and that legal bodies do not hold up the others."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from tests.running_server import RunningServer, paused, running_server
from tests.test_server_operation import LONG, posted, received
from vattn.async_llm import AsyncLLM
from vattn.server.admission import Admission
from vattn.server.errors import ApiError
from vattn.server.observe import Observe
from vattn.server.openai import run
from vattn.server.openai.sampling import check_logprobs
from vattn.server.settings import ServerSettings

pytest_plugins = ("tests.server_fixtures",)

USER = {"role": "user", "content": "Hi"}
CHAT: dict[str, Any] = {"messages": [USER], "max_tokens": 2}
TEXT: dict[str, Any] = {"prompt": "A", "max_tokens": 2}


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with server.http_client() as client:
        yield client


def tools(count: int) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": f"f{n}"}} for n in range(count)]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert len(error["message"]) < 400
    return error


TOO_MUCH: list[tuple[str, dict[str, Any], str]] = [
    ("completions", {"n": 129}, "n"),
    ("completions", {"stop": ["a"] * 17}, "stop"),
    ("completions", {"stop": "a" * 1025}, "stop"),
    ("completions", {"bad_words": ["a"] * 1025}, "bad_words"),
    ("completions", {"stop_token_ids": [1] * 5000}, "stop_token_ids"),
    ("completions", {"allowed_token_ids": [1] * 5000}, "allowed_token_ids"),
    ("completions", {"logit_bias": {str(n): 1 for n in range(5000)}}, "logit_bias"),
    ("completions", {"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ("chat/completions", {"tools": tools(129)}, "tools"),
    ("chat/completions", {"tools": tools(5000), "tool_choice": "none"}, "tools"),
    ("chat/completions", {"messages": [USER] * 8193}, "messages"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 8193}]},
        "messages[0].content",
    ),
]


@pytest.mark.parametrize(("path", "fields", "param"), TOO_MUCH)
def test_lists_are_limited(
    client: httpx.Client, path: str, fields: dict[str, Any], param: str
) -> None:
    body = {**(TEXT if path == "completions" else CHAT), **fields}
    assert error_of(client.post(f"/v1/{path}", json=body), 400)["param"] == param


def test_as_many_tools_as_openai_takes(client: httpx.Client) -> None:
    body = {**CHAT, "tools": tools(128), "tool_choice": "none", "max_tokens": 1}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    twice = {**body, "tools": tools(127) + tools(1)}
    error = error_of(client.post("/v1/chat/completions", json=twice), 400)
    assert error["param"] == "tools[127].function.name"


def test_all_log_probabilities_may_be_asked_for() -> None:
    state: Any = SimpleNamespace(settings=ServerSettings(max_logprobs=-1))
    for count in (None, 0, 500):
        check_logprobs(state, "logprobs", count)
    with pytest.raises(ApiError, match=r"logprobs=-1 must be at least 0$"):
        check_logprobs(state, "logprobs", -1)


def test_samples_are_counted(client: httpx.Client, server: RunningServer) -> None:
    """Before anything is made of the prompts, which are no good here."""
    places = server.state.admission.places
    prompts = [[10**9]] * (places // 128 + 1)
    for stream in (False, True):
        body = {"prompt": prompts, "n": 128, "stream": stream}
        error = error_of(client.post("/v1/completions", json=body), 413)
        assert error["message"].startswith(f"{len(prompts) * 128} samples")


def test_many_prompts_begin_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    async def outputs(state: Any, job: Any, index: int) -> AsyncGenerator[int, None]:
        begun.append(index)
        yield index

    monkeypatch.setattr(run, "_outputs", outputs)

    async def most_at_once() -> int:
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                before = len(begun)
                await asyncio.sleep(0)
                most = max(most, len(begun) - before)

        watcher = asyncio.create_task(watch())
        job: Any = SimpleNamespace(prompts=[[1]] * 100)
        found = [number async for number, _ in run._merged(cast(Any, None), job)]
        watcher.cancel()
        assert sorted(found) == list(range(100))
        return most

    assert asyncio.run(most_at_once()) <= 16


def test_only_who_was_served_tells_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("vattn.server.admission.time.monotonic", lambda: now)
    llm = SimpleNamespace(is_ready=True, facts=SimpleNamespace(max_num_seqs=2))
    admission = Admission(ServerSettings(max_queued_requests=0), cast(AsyncLLM, llm))
    with admission.admit(1, 1):
        pass
    for _ in range(50):
        with suppress(ApiError), admission.admit(1, 1):
            raise ApiError(400, "refused by the engine")
    now = 20.0
    with admission.admit(2, 1), pytest.raises(ApiError) as caught:
        admission.expect(1)
    admission.check()
    assert (caught.value.status, caught.value.retry_after_s) == (429, 20.0)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_what_cannot_fit_is_not_tokenized(
    client: httpx.Client, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise AssertionError("it was looked at")

    monkeypatch.setattr("vattn.server.openai.completions.encode_all", fail)
    monkeypatch.setattr("vattn.server.openai.chat.chat_prompt", fail)
    text = "word " * 100_000
    body = {"prompt": text} if path == "completions" else {"messages": [{**USER, "content": text}]}
    error = error_of(client.post(f"/v1/{path}", json=body), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == next(iter(body))


def test_what_cannot_fit_is_cut_if_asked_for(client: httpx.Client) -> None:
    body = {"prompt": "word " * 100_000, "truncate_prompt_tokens": 5, "max_tokens": 1}
    found = client.post("/v1/completions", json=body).json()
    assert found["usage"]["prompt_tokens"] == 5


@pytest.mark.parametrize(
    ("path", "body", "work"),
    [
        ("/detokenize", {"tokens": [5] * 5000}, "vattn.server.openai.tokenize._text"),
        (
            "/v1/chat/completions",
            {**CHAT, "tools": tools(1), "tool_choice": "none"},
            "vattn.server.openai.chat_template._render",
        ),
        (
            "/v1/chat/completions",
            {**CHAT, "chat_template_kwargs": {"a": "b"}},
            "vattn.server.openai.chat_template._render",
        ),
    ],
)
def test_long_work_is_beside_the_loop(
    client: httpx.Client, server: RunningServer, monkeypatch: pytest.MonkeyPatch,
    path: str, body: dict[str, Any], work: str,
) -> None:  # fmt: skip
    module, _, name = work.rpartition(".")
    real = getattr(__import__(module, fromlist=[name]), name)
    threads: list[int] = []

    def watched(*args: Any, **options: Any) -> Any:
        threads.append(threading.get_ident())
        return real(*args, **options)

    async def own() -> int:
        return threading.get_ident()

    monkeypatch.setattr(work, watched)
    assert client.post(path, json=body).status_code == 200
    assert len(threads) == 1
    assert server.call(own()) not in threads


def test_what_is_detokenized_is_limited(client: httpx.Client) -> None:
    response = client.post("/detokenize", json={"tokens": [5] * 65_537})
    assert error_of(response, 400)["param"] == "tokens"


def test_health_is_for_heads_too(client: httpx.Client) -> None:
    response = client.head("/health")
    assert (response.status_code, response.content) == (200, b"")


def test_a_path_makes_no_lines_of_its_own(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails(*_: object) -> None:
        raise OSError("full")

    async def nothing(*_: object) -> Any:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "GET", "path": "/a\nb", "raw_path": b"/a%0ab", "headers": []}
    with caplog.at_level(logging.INFO, "vattn.server"):
        server.call(Observe(fails, server.state)(scope, nothing, nothing))
    assert len(caplog.records) == 2
    for record in caplog.records:
        assert "/a%0ab" in record.getMessage()


# A budget that is too small -----------------------------------------------------------------------


def test_a_smaller_budget_is_told_at_once_and_passes() -> None:
    with (
        running_server(api_keys=("key",), max_num_seqs=4) as server,
        server.http_client() as client,
    ):
        before = client.get("/admin/memory").json()["pool"]["budget_bytes"]
        page = client.get("/admin/memory").json()["pool"]["page_bytes"]
        body = {**LONG, "prompt": "A transaction is " * 20}
        with ExitStack() as stack:
            with paused(server.llm):
                request = stack.enter_context(posted(server, body, b"Connection: close\r\n"))
                server.wait_running(1)
                server.loop.call_soon_threadsafe(
                    lambda: asyncio.ensure_future(server.llm.set_budget(page))
                )
            told = received(request)
        head, _, content = told.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 "), told
        assert b"\r\nretry-after: " in head
        assert "out of pages" in json.loads(content)["error"]["message"]
        for budget in (2 * page, before):
            client.post("/admin/memory", json={"budget": budget}).raise_for_status()
            assert client.get("/admin/memory").json()["pool"]["budget_bytes"] == budget
        assert client.post("/v1/completions", json=TEXT).status_code == 200
