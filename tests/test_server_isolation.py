"""Nothing of one request is seen by another: salts keep prefixes apart, and pages carry nothing."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

import vattn
from tests.engine_cases import EMBEDDED_PATH
from tests.poisoned_llm import Poison
from tests.running_server import PATIENCE_S, RunningServer, running_server
from vattn.sampling_params import SamplingParams

ENGINE: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 48,
    "max_model_len": 256,
    "page_bytes": 4096,
    "kv_cache_memory_bytes": "8MiB",
}
PREAMBLE = "The parties agree that the memory of one is never read by the other. "
LOW_BUDGET = 1 << 20


@pytest.fixture(scope="module")
def llm() -> Iterator[vattn.LLM]:
    with vattn.LLM(EMBEDDED_PATH, dtype="float32", device="cpu", **ENGINE) as made:
        yield made


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Its memory is poisoned between steps."""
    with running_server(
        EMBEDDED_PATH, dtype="float32", llm_factory="tests.poisoned_llm:make", **ENGINE
    ) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with server.http_client() as client:
        yield client
    server.wait_idle()


def complete(client: httpx.Client, prompt: str, **more: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **more}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def texts(found: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in found["choices"]]


def cached(client: httpx.Client, prompt: str, salt: str | None) -> int:
    more = {} if salt is None else {"cache_salt": salt}
    number: int = complete(client, prompt, **more)["usage"]["prompt_tokens_details"][
        "cached_tokens"
    ]
    return number


@pytest.mark.parametrize("first", ["alice", "bob", None])
@pytest.mark.parametrize("others", [("mallory", "alic", "alice ", "Alice"), (None,)])
def test_prefixes_are_of_those_with_the_same_salt(
    client: httpx.Client, first: str | None, others: tuple[str | None, ...]
) -> None:
    others = tuple(each for each in others if each != first)
    prompt = f"{first} against {others}: {PREAMBLE * 4}"
    assert cached(client, prompt, first) < 10
    assert cached(client, prompt, first) > 40
    for other in others:
        assert cached(client, prompt, other) == 0
    assert cached(client, prompt, first) > 40


def test_a_poison_is_felt(llm: vattn.LLM) -> None:
    """What the next test shows is only worth something if rows are hit, and hits are seen."""
    prompts = [f"{PREAMBLE}Rule {number}" for number in range(8)]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    wanted = [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]
    with vattn.LLM(EMBEDDED_PATH, dtype="float32", device="cpu", **ENGINE) as spoiled:
        poison = Poison(spoiled)
        for _ in range(2):
            outputs = spoiled.generate(prompts, params, use_tqdm=False)
            assert [output.outputs[0].text for output in outputs] == wanted
        assert poison.rows > poison.stale_rows > 1000
        poison.spare = -1
        outputs = spoiled.generate(prompts, params, use_tqdm=False)
        assert [output.outputs[0].text for output in outputs] != wanted


def test_recycled_pages_show_nothing(
    server: RunningServer, client: httpx.Client, llm: vattn.LLM
) -> None:
    rng = random.Random(8)
    asked: list[tuple[str, dict[str, Any]]] = []
    for number in range(18):
        beginning = PREAMBLE * rng.choice((0, 1, 4)) or f"{number}. "
        prompt = beginning + "so " * rng.randrange(30)
        asked.append((prompt, {"max_tokens": rng.randrange(1, 40)}))
    asked += [
        (prompt, {"n": 2, "seed": 5, "temperature": 1.0, "max_tokens": 16})
        for prompt, _ in asked[:6]
    ]
    wanted = [
        [
            sample.text
            for sample in llm.generate(
                prompt,
                SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **more}),
                use_tqdm=False,
            )[0].outputs
        ]
        for prompt, more in asked
    ]
    budget = server.llm.facts.budget_bytes
    with ThreadPoolExecutor(6) as pool:
        for round_, to in enumerate((LOW_BUDGET, budget, LOW_BUDGET)):
            order = rng.sample(range(len(asked)), len(asked))
            answers = {
                number: pool.submit(complete, client, asked[number][0], **asked[number][1])
                for number in order
            }
            for _ in range(4):
                leave_in_prefill(server, f"{round_}" + " word" * 200)
            report = server.call(server.llm.set_budget(to))
            assert report.budget == to
            for number, answer in answers.items():
                assert texts(answer.result(PATIENCE_S)) == wanted[number], asked[number]
            server.wait_idle()
            server.call(server.llm.check())
    server.call(server.llm.set_budget(budget))


def leave_in_prefill(server: RunningServer, prompt: str) -> None:
    """Asks, and goes away before the first token."""
    body = json.dumps({"prompt": prompt, "max_tokens": 4, "stream": True}).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as sock:
        sock.sendall(head + body)
