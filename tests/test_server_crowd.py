"""A thousand streams at once, of which half leave wherever they are."""

from __future__ import annotations

import asyncio
import os
import random
import resource
from collections.abc import Iterator
from typing import Any

import pytest

import vattn
from tests.engine_cases import EMBEDDED_PATH
from tests.raw_http import Reply, post
from tests.running_server import RunningServer, running_server
from vattn.sampling_params import SamplingParams

CLIENTS = 1000
FILES = 4 * CLIENTS  # both ends of all connections are in this process
ENGINE: dict[str, Any] = {"max_num_seqs": 64, "max_model_len": 128, "page_bytes": 4096}
PROMPTS = [
    "A transaction is",
    "A transaction is a group of statements that",
    "The memory of a process is",
    "Once",
    "A page is mapped when it is needed, and a page is unmapped when nobody needs it; so",
]


@pytest.fixture(scope="module")
def _many_files() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = limits
    enough = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if enough < FILES:
        end = pytest.fail if "CI" in os.environ else pytest.skip
        end(f"{hard} open files are allowed, and {FILES} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, enough), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture(scope="module")
def server(_many_files: None) -> Iterator[RunningServer]:
    with running_server(EMBEDDED_PATH, dtype="float32", **ENGINE) as server:
        yield server


@pytest.fixture(scope="module")
def wanted() -> dict[tuple[str, int], str]:
    """By prompt and number of tokens, what an LLM of this process says."""
    with vattn.LLM(EMBEDDED_PATH, dtype="float32", device="cpu", **ENGINE) as llm:
        found = {}
        for tokens in range(2, 9):
            params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
            for prompt, output in zip(PROMPTS, outputs, strict=True):
                found[prompt, tokens] = output.outputs[0].text
        return found


def test_half_of_a_thousand_clients_leave(
    server: RunningServer, wanted: dict[tuple[str, int], str]
) -> None:
    rng = random.Random(1000)

    async def client(number: int) -> str | None:
        """What is wrong with what it got; None if nothing is, or it left."""
        prompt, tokens = rng.choice(PROMPTS), rng.randrange(2, 9)
        kind = rng.choice(("one", "one", "two", "prompts"))
        body: dict[str, Any] = {"prompt": prompt}
        body |= {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body["stream"] = True
        body["n"] = samples = 2 if kind == "two" else 1
        expected = [wanted[prompt, tokens]] * samples
        if kind == "prompts":
            body["prompt"] = [prompt, PROMPTS[0]]
            expected = [wanted[prompt, tokens], wanted[PROMPTS[0], tokens]]
        if number % 2:
            # In the head, in the body, before the response, within it.
            sends = rng.choice((0.0, 0.2, 0.6, 0.95, 1.0, 1.0, 1.0, 1.0))
            await post(server.port, body, sends=sends, reads=rng.randrange(4))
            return None
        reply = Reply()
        await post(server.port, body, reply)
        got = reply.texts() if reply.status == 200 else reply.raw
        return None if got == expected else f"{kind}, {prompt!r}: {got!r} is not {expected!r}"

    async def all_of_them() -> list[str | None]:
        # At once but for the time that connecting takes: the backlog of a socket is bounded.
        tasks = [asyncio.create_task(client(number)) for number in range(CLIENTS)]
        async with asyncio.timeout(240):
            return await asyncio.gather(*tasks)

    wrong = [problem for problem in asyncio.run(all_of_them()) if problem]
    assert wrong == []
    assert_idle(server)


def assert_idle(server: RunningServer) -> None:
    """Nothing is left of any request."""
    server.wait_idle()
    server.call(server.llm.check())
    server.state.admission.check()
    assert (server.state.admission.samples, server.state.admission.tokens) == (0, 0)
    assert server.llm.live_requests() == []
    stats = server.llm.stats()
    assert stats is not None
    assert stats.cache is not None
    assert (stats.cache.open_slots, stats.cache.live_bytes) == (0, 0)
    assert (stats.engine.num_running, stats.engine.num_waiting) == (0, 0)

    async def check_idle() -> None:
        server.llm._owner.check_idle()

    server.call(check_idle())
