"""``vattn.AsyncLLM`` with a real engine process, beside what ``vattn.LLM`` says."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

import vattn
from vattn import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vattn.models import tiny_path

T = TypeVar("T")
OPTIONS: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_seqs": 32,
    "kv_cache_memory_bytes": "64MiB",
    "page_bytes": 4096,
}
TEXT = "The engine and the server"
PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=20),
    "seeded": SamplingParams(temperature=0.9, seed=7, max_tokens=20),
    "n": SamplingParams(n=3, temperature=1.1, seed=3, max_tokens=12),
    "stop": SamplingParams(temperature=0, max_tokens=60, stop=["server", "and"]),
    "stop kept": SamplingParams(
        temperature=0, max_tokens=60, stop=["server"], include_stop_str_in_output=True
    ),
    "late stop": SamplingParams(temperature=0, max_tokens=60, stop=["server"], min_tokens=12),
    "stop token": SamplingParams(temperature=0, max_tokens=60, stop_token_ids=list(range(500))),
    "logprobs": SamplingParams(temperature=0, max_tokens=8, logprobs=3, prompt_logprobs=2),
    "structured": SamplingParams(
        temperature=0.8,
        seed=1,
        max_tokens=60,
        structured_outputs=StructuredOutputsParams(choice=["yes or no", "no"]),
    ),
    "grammar's own end": SamplingParams(
        temperature=0,
        max_tokens=60,
        ignore_eos=True,
        structured_outputs=StructuredOutputsParams(regex="[ab]{7}"),
    ),
    "truncated": SamplingParams(temperature=0, max_tokens=5, truncate_prompt_tokens=3),
}


class Served:
    """An AsyncLLM on a loop of its own."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.llm = vattn.AsyncLLM(**OPTIONS)

    def run(self, what: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(asyncio.wait_for(what, 120))


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    served = Served()
    served.run(served.llm.start())
    yield served
    served.run(served.llm.close())
    served.runner.close()
    with pytest.raises(vattn.EngineDeadError, match="closed"):
        served.llm.check_health()


@pytest.fixture
def idle(served: Served) -> Iterator[Served]:
    yield served
    served.run(served.llm.check())
    served.llm._owner.check_idle()


@pytest.fixture(scope="module")
def offline() -> Iterator[vattn.LLM]:
    with vattn.LLM(tiny_path(), **OPTIONS) as llm:
        yield llm


async def _outputs(
    llm: vattn.AsyncLLM, prompt: Any, params: SamplingParams, name: str = "one"
) -> list[vattn.RequestOutput]:
    return [output async for output in llm.generate(prompt, params, name)]


def _told(output: vattn.RequestOutput) -> list[Any]:
    samples = [
        (o.index, o.text, o.token_ids, o.finish_reason, o.stop_reason, o.error)
        for o in output.outputs
    ]
    return [output.prompt, output.prompt_token_ids, samples]


def _logprobs(entries: Any) -> list[dict[int, Any]]:
    return [
        {token: (pytest.approx(e.logprob, abs=1e-4), e.decoded_token) for token, e in entry.items()}
        for entry in entries or []
        if entry is not None
    ]


@pytest.mark.parametrize("name", PARAMS)
def test_it_says_what_the_offline_engine_says(idle: Served, offline: vattn.LLM, name: str) -> None:
    params = PARAMS[name]
    (expected,) = offline.generate(TEXT, params, use_tqdm=False)
    found = idle.run(_outputs(idle.llm, TEXT, params))
    assert _told(found[-1]) == _told(expected)
    assert all(o.finish_reason != "error" for o in expected.outputs)
    for ours, theirs in zip(found[-1].outputs, expected.outputs, strict=True):
        assert len(ours.logprobs or ()) == len(theirs.logprobs or ())
        assert ours.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-3)
        values = [
            {t: (e.logprob, e.decoded_token) for t, e in x.items()} for x in ours.logprobs or ()
        ]
        assert values == _logprobs(theirs.logprobs)
    assert len(found[-1].prompt_logprobs or ()) == len(expected.prompt_logprobs or ())


@pytest.mark.parametrize("name", ["greedy", "n", "stop", "logprobs"])
def test_pieces_make_the_whole(idle: Served, name: str) -> None:
    whole = idle.run(_outputs(idle.llm, TEXT, PARAMS[name]))[-1]
    delta = replace(PARAMS[name], output_kind=RequestOutputKind.DELTA)
    text = [""] * delta.n
    tokens: list[list[int]] = [[] for _ in text]
    for output in idle.run(_outputs(idle.llm, TEXT, delta)):
        for piece in output.outputs:
            text[piece.index] += piece.text
            tokens[piece.index] += piece.token_ids
    assert text == [o.text for o in whole.outputs]
    assert tokens == [o.token_ids for o in whole.outputs]
    final = replace(PARAMS[name], output_kind=RequestOutputKind.FINAL_ONLY)
    (once,) = idle.run(_outputs(idle.llm, TEXT, final))
    assert _told(once) == _told(whole)


def test_many_at_once_are_exact(idle: Served, offline: vattn.LLM) -> None:
    prompts = [{"prompt_token_ids": list(range(3 + n, 40 + 2 * n))} for n in range(64)]
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    expected = offline.generate(prompts, params, use_tqdm=False)

    async def whole() -> list[list[vattn.RequestOutput]]:
        tasks = [_outputs(idle.llm, p, params, str(n)) for n, p in enumerate(prompts)]
        return await asyncio.gather(*tasks)

    found = idle.run(whole())
    assert [_told(f[-1]) for f in found] == [_told(e) for e in expected]


def test_who_leaves_frees_what_it_had(idle: Served) -> None:
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)

    async def leave(number: int) -> None:
        async for _ in idle.llm.generate(TEXT, params, str(number)):
            if number % 2:
                return
            await asyncio.Event().wait()

    async def whole() -> None:
        tasks = [asyncio.create_task(leave(number)) for number in range(8)]
        await asyncio.gather(*tasks[1::2])
        assert {live.request_id for live in idle.llm.live_requests()} <= set("0246")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while (stats := idle.llm.stats()) is None or stats.engine.num_running or stats.requests:
            await asyncio.sleep(0.01)

    idle.run(whole())


def test_orders_and_questions(idle: Served) -> None:
    async def whole() -> None:
        rows = await idle.llm.memory_map(16)
        assert rows.slots == idle.llm.facts.slots
        report = await idle.llm.set_budget("32MiB")
        assert (report.budget_before, report.budget) == (64 << 20, 32 << 20)
        await idle.llm.set_budget("64MiB")
        await idle.llm.reset_prefix_cache()
        with pytest.raises(ValueError, match="budget_bytes"):
            await idle.llm.set_budget("much")
        with pytest.raises(vattn.RequestRefused, match="logprobs"):
            await _outputs(idle.llm, TEXT, SamplingParams(logprobs=1000))
        (long,) = await _outputs(
            idle.llm,
            "word " * 1000,
            SamplingParams(
                max_tokens=1, truncate_prompt_tokens=9, output_kind=RequestOutputKind.FINAL_ONLY
            ),
        )
        assert len(long.prompt_token_ids) == 9

    idle.run(whole())


def test_a_killed_engine_is_told_within_a_second_and_replaced(served: Served) -> None:
    llm = served.llm
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)

    async def whole() -> None:
        before = (await _outputs(llm, TEXT, PARAMS["greedy"]))[-1]
        tasks = [asyncio.create_task(_outputs(llm, TEXT, params, str(n))) for n in range(4)]
        while not any(sum(live.output_tokens) for live in llm.live_requests()):
            await asyncio.sleep(0.001)
        await llm.set_budget("48MiB")
        pid = llm.engine_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(5 if "CI" in os.environ else 1):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, vattn.EngineDeadError) for result in results)
        assert not llm.is_ready
        while not llm.is_ready:
            await asyncio.sleep(0.05)
        assert llm.restarts == 1
        assert not Path(f"/proc/{pid}").exists()
        assert llm.facts.budget_bytes == 48 << 20
        assert _told((await _outputs(llm, TEXT, PARAMS["greedy"]))[-1]) == _told(before)

    served.run(whole())
    llm._owner.check_idle()


def test_bad_options_are_refused_before_anything_starts() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"scheduling_policy": len}, "llm_factory"),
        ({"eviction_policy": object()}, "llm_factory"),
        ({"model": object()}, "model="),
        ({"llm_factory": "nowhere"}, "llm_factory='nowhere'"),
        ({"log_level": "loud"}, "log_level='loud'"),
        ({"engine_timeout_s": -1}, "engine_timeout_s=-1"),
        ({"start_timeout_s": "1"}, "start_timeout_s='1'"),
    ]
    for options, match in refused:
        with pytest.raises(ValueError, match=match):
            vattn.AsyncLLM(**options)
    with pytest.raises(TypeError, match="did you mean max_num_seqs"):
        vattn.AsyncLLM(max_num_seq=3)


OWNER = """
import asyncio, os, sys
from vattn.engine_process.supervisor import Supervisor
from vattn.engine_process.messages import VERSION, Start

async def main():
    engine = Supervisor(
        Start(VERSION, sys.argv[1], {}), restart=True, engine_timeout_s=None, start_timeout_s=99.0,
        on_news=lambda news: None, on_death=lambda error: None, is_busy=lambda: False,
    )
    start = asyncio.create_task(engine.start())
    while engine.child is None:
        await asyncio.sleep(0.01)
    print(engine.child.process.pid, flush=True)
    await start

asyncio.run(main())
"""


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Paths of sockets have 107 bytes, and pytest's directories are long."""
    with tempfile.TemporaryDirectory(prefix="vt-") as path:
        yield Path(path)


def test_an_owner_that_is_killed_takes_its_engine_along(short_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tiny_path())],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(short_path)},
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert len(list(short_path.glob("vattn-engine-*"))) == 1
        owner.kill()
    end_s = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() or list(short_path.glob("vattn-engine-*")):
        assert time.monotonic() < end_s
        time.sleep(0.02)
